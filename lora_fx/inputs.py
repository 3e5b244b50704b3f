"""Example inputs for a transformers model, made from its config; nothing is downloaded and no tokenizer is needed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_fx.errors import TraceError

# Small, distinct, and no divisors of each other, so that a size taken for another shows.
BATCH, SEQUENCE, TARGET_SEQUENCE = 2, 7, 5


@dataclass(frozen=True)
class ExampleInputs:
    """What a model is traced with.

    Attributes:
        args: positional inputs.
        kwargs: keyword inputs, constants of the trace (``use_cache=False``) among them.
        axes: input → name of each dimension that shall be dynamic (``None``: as the example has it). An input that is not
            listed is dynamic wherever the model allows.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    axes: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)


def example_inputs(model: nn.Module, given: Mapping[str, Any] | tuple[Any, ...] | None) -> ExampleInputs:
    """Return the inputs to trace ``model`` with: the given ones, or made from its config.

    A transformers model is traced without its key-value cache.

    Raises:
        TraceError: none are given, and the model is not one whose inputs follow from a config.
    """
    if isinstance(given, tuple):
        return ExampleInputs(args=given, kwargs=_constants(model, {}))
    if given is not None:
        return ExampleInputs(
            kwargs={**given, **_constants(model, given)}, axes=_text_axes(given) if _is_transformers(model) else {}
        )
    if not _is_transformers(model):
        raise TraceError(
            f"{type(model).__name__} is not a transformers model, so its inputs do not follow from a config: "
            "pass example_inputs, a tuple or a mapping of keyword inputs."
        )
    return _from_config(model)


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "config") and hasattr(model, "main_input_name")


def _from_config(model: Any) -> ExampleInputs:
    if model.main_input_name != "input_ids":
        raise TraceError(
            f"{type(model).__name__} takes {model.main_input_name!r}, which is not made from a config yet: pass example_inputs."
        )
    device = next(model.parameters()).device
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)  # leaves the caller's random state alone
    inputs = {
        "input_ids": torch.randint(0, config.vocab_size, (BATCH, SEQUENCE), generator=generator).to(device),
        "attention_mask": torch.ones(BATCH, SEQUENCE, dtype=torch.int64, device=device),
    }
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(
            0, config.vocab_size, (BATCH, TARGET_SEQUENCE), generator=generator
        ).to(device)
    return ExampleInputs(kwargs={**inputs, **_constants(model, inputs)}, axes=_text_axes(inputs))


def _text_axes(inputs: Mapping[str, Any]) -> dict[str, tuple[str | None, ...]]:
    axes: dict[str, tuple[str | None, ...]] = {}
    for name in ("input_ids", "attention_mask", "token_type_ids", "position_ids"):
        axes[name] = ("batch", "sequence")
    for name in ("decoder_input_ids", "decoder_attention_mask", "labels"):
        axes[name] = ("batch", "target_sequence")
    return {name: names for name, names in axes.items() if name in inputs and inputs[name].dim() == len(names)}


def _constants(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    accepts = "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    has_cache = getattr(getattr(model, "config", None), "use_cache", None) is not None
    return {"use_cache": False} if has_cache and accepts and "use_cache" not in given else {}
