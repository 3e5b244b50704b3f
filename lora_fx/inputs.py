"""Example inputs for a transformers model, made from its config; nothing is downloaded and no tokenizer is needed."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

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


def example_inputs(
    model: nn.Module, given: Mapping[str, Any] | tuple[Any, ...] | None, device: torch.device | None = None
) -> ExampleInputs:
    """Return the inputs to trace ``model`` with: the given ones, or made from its config.

    A transformers model is traced without its key-value cache. Inputs that are made go to ``device``, by default that of the
    model.

    Raises:
        TraceError: none are given, and the model is not one whose inputs follow from a config.
    """
    if isinstance(given, tuple):
        return ExampleInputs(args=given, kwargs=_constants(model, {}))
    if given is not None:
        return ExampleInputs(
            kwargs={**given, **_constants(model, given)}, axes=_axes(given) if _is_transformers(model) else {}
        )
    if not _is_transformers(model):
        raise TraceError(
            f"{type(model).__name__} is not a transformers model, so its inputs do not follow from a config: "
            "pass example_inputs, a tuple or a mapping of keyword inputs."
        )
    return _from_config(model, device or next(model.parameters()).device)


def graph_inputs(inputs: ExampleInputs) -> dict[str, Any]:
    """Return the keyword inputs that hold tensors: those that a graph takes."""
    return {
        name: value
        for name, value in inputs.kwargs.items()
        if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))
    }


def config_of(model: nn.Module) -> Any:
    """Return a copy of a transformers model's config, or None for another module."""
    return copy.deepcopy(getattr(model, "config", None))


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "config") and hasattr(model, "main_input_name")


def _from_config(model: Any, device: torch.device) -> ExampleInputs:
    made = {"input_ids": _text, "pixel_values": _image_and_text}.get(model.main_input_name)
    if made is None:
        raise TraceError(
            f"{type(model).__name__} takes {model.main_input_name!r}, which is not made from a config yet: pass example_inputs."
        )
    inputs = made(
        model, torch.Generator().manual_seed(0)
    )  # a generator of its own leaves the caller's random state alone
    inputs = {name: value.to(device) for name, value in inputs.items()}
    return ExampleInputs(kwargs={**inputs, **_constants(model, inputs)}, axes=_axes(inputs))


def _text(model: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    config = model.config.get_text_config()

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(0, config.vocab_size, (BATCH, length), generator=generator)

    inputs = {"input_ids": tokens(SEQUENCE), "attention_mask": torch.ones(BATCH, SEQUENCE, dtype=torch.int64)}
    if "bbox" in inspect.signature(model.forward).parameters:
        corner = torch.randint(0, config.max_2d_position_embeddings // 2, (BATCH, SEQUENCE, 2), generator=generator)
        inputs["bbox"] = torch.cat([corner, 2 * corner], dim=-1)  # left, top, right, bottom
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(TARGET_SEQUENCE)
    return inputs


def _image_and_text(model: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return inputs of a model that replaces the first tokens of its text by the features of an image, as BLIP-2 does."""
    config = model.config
    count, token = (getattr(config, name, None) for name in ("num_query_tokens", "image_token_id"))
    if count is None or token is None:
        raise TraceError(
            f"the config of {type(model).__name__} does not say by num_query_tokens and image_token_id which tokens an image "
            "takes the place of: pass example_inputs."
        )
    inputs = _text(model, generator)
    text = inputs["input_ids"].masked_fill(
        inputs["input_ids"] == token, (token + 1) % config.get_text_config().vocab_size
    )
    inputs["input_ids"] = torch.cat([torch.full((BATCH, count), token), text], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    size = config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(config.vision_config, "num_channels", 3)
    pixels = torch.randn(BATCH, channels, height, width, generator=generator)
    return {"pixel_values": pixels.to(next(model.parameters()).dtype), **inputs}


_AXES: Mapping[str, tuple[str | None, ...]] = {
    **dict.fromkeys(("input_ids", "attention_mask", "token_type_ids", "position_ids"), ("batch", "sequence")),
    **dict.fromkeys(("decoder_input_ids", "decoder_attention_mask"), ("batch", "target_sequence")),
    "bbox": ("batch", "sequence", None),
    "pixel_values": ("batch", None, None, None),
}


def _axes(inputs: Mapping[str, Any]) -> dict[str, tuple[str | None, ...]]:
    return {name: axes for name, axes in _AXES.items() if name in inputs and inputs[name].dim() == len(axes)}


def _constants(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    accepts = "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    config: Any = getattr(model, "config", None)
    configs = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    has_cache = any(getattr(part, "use_cache", None) is not None for part in configs)
    return {"use_cache": False} if has_cache and accepts and "use_cache" not in given else {}
