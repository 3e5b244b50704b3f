"""Example inputs for a transformers model, made from its config; nothing is downloaded and no tokenizer is needed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.auto import modeling_auto

from lora_fx.errors import LoraFxError, TraceError, did_you_mean
from lora_fx.files.safetensors import TensorFile
from lora_fx.graph.example_sizes import cut_or_repeated
from lora_fx.graph.signature import key_parts
from lora_fx.torch_internals import pytree
from lora_fx.tracing.input_kinds import arguments, text_config
from lora_fx.tracing.input_trials import device_of, shapes, taken

_logger = logging.getLogger("lora_fx.tracing")


@dataclass(frozen=True)
class ExampleInputs:
    """Inputs of a trace.

    Attributes:
        args: positional inputs.
        kwargs: keyword inputs, constants of the trace (``use_cache=False``) among them.
        axes: input → name of each dimension that shall be dynamic (``None``: as the example has it). An input that is not
            listed is dynamic wherever the model allows.
        made: names of the inputs that were made from a config.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    axes: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    made: tuple[str, ...] = ()


def example_inputs(
    model: nn.Module,
    given: Mapping[str, Any] | tuple[Any, ...] | ExampleInputs | None,
    device: torch.device | None = None,
) -> ExampleInputs:
    """Return the inputs to trace ``model`` with: the given ones, or made from its config.

    A transformers model is traced without its key-value cache. Inputs that are made are the first of several candidates that the
    model takes in a run; they go to ``device``, by default that of the model, and the logger ``lora_fx.tracing`` names them at level INFO.

    Raises:
        TraceError: none are given, and the model is not one whose inputs follow from a config.
    """
    if isinstance(given, ExampleInputs):
        return replace(given, kwargs={**given.kwargs, **_constants(model, given.kwargs)})
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
    return _from_config(model, device or device_of(model))


def read_example_inputs(path: str | Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return example inputs from a safetensors file, whose tensors are named as the model's inputs, on the device of the model.

    Raises:
        LoraFxError: there is no such file, or it is none of this format.
        LoraFxError: the model does not take an input of the file, or the file lacks one that the model needs.
    """
    file = TensorFile.open(Path(path))
    # **kwargs are not counted: transformers passes unknown ones on until nobody looks at them.
    named = {name: p for name, p in arguments(model).items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    problems = [
        f"it has {name!r}, which is no input of the model{did_you_mean(name, named)}"
        for name in file.entries
        if name not in named
    ]
    needed = [name for name, parameter in named.items() if parameter.default is parameter.empty]
    main = getattr(model, "main_input_name", None)
    if main in named and file.entries.keys().isdisjoint({main, "input_ids", "inputs_embeds"}):
        needed.append(main)  # which has a default of None in transformers
    problems += [f"it lacks {name!r}" for name in dict.fromkeys(needed) if name not in file.entries]
    if problems:
        raise LoraFxError(
            f"{path}: expected example inputs of {type(model).__name__}, which takes {', '.join(named)}; {'; '.join(problems)}."
        )
    device = device_of(model)
    return {name: file.read(name).to(device) for name in file.entries}


def with_labels(model: nn.Module, inputs: ExampleInputs) -> ExampleInputs:
    """Return example inputs with labels, for which a transformers model returns its loss.

    Labels of a decoder take the place of its ``decoder_input_ids``, which the model makes of them if its config has a
    ``decoder_start_token_id``. Labels that are there already stay as they are.

    Args:
        model: a transformers model with a head that has a loss.
        inputs: keyword inputs.

    Raises:
        TraceError: the model takes no labels, or what they are like does not follow from its class and config.
    """
    if not _is_transformers(model) or not {"labels", "start_positions"} & set(arguments(model)):
        raise TraceError(
            f"{type(model).__name__} takes no labels: leave labels=True out, and compute the loss of its outputs."
        )
    if {"labels", "start_positions"} & set(inputs.kwargs):
        return inputs
    main = str(model.main_input_name)
    like = next((name for name in ("decoder_input_ids", "input_ids") if name in inputs.kwargs), main)
    if like not in inputs.kwargs:
        raise TraceError(
            f"labels are made like {like!r}, and example_inputs have no such keyword: let them have labels themselves."
        )
    tokens = inputs.kwargs[like]
    config: Any = model.config
    shifts = getattr(config, "decoder_start_token_id", None) is not None
    kept = {name: value for name, value in inputs.kwargs.items() if name != "decoder_input_ids" or not shifts}
    labels = {name: value.to(tokens.device) for name, value in _labels(model, tokens).items()}
    axes = inputs.axes.get(like, ("batch",) if inputs.axes else ())
    named = {name: axes[: value.dim()] for name, value in labels.items() if axes and not value.is_floating_point()}
    named |= {name: ("batch", None)[: value.dim()] for name, value in labels.items() if value.is_floating_point()}
    own = {name: of for name, of in inputs.axes.items() if name in kept}
    return replace(inputs, kwargs={**kept, **labels}, axes={**own, **named} if inputs.axes else {})


def _labels(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return labels as the model's class takes them; where they are for tokens, the loss skips one."""
    kind, config = type(model).__name__, model.config
    generator = torch.Generator().manual_seed(1)

    def chosen(*shape: int, below: int) -> torch.Tensor:
        return torch.randint(0, below, shape, generator=generator)

    batch = tokens.size(0)
    if _is_for(kind, _POSITIONS):
        return {name: chosen(batch, below=tokens.size(1)) for name in ("start_positions", "end_positions")}
    if _is_for(kind, _CLASSES):
        problem = getattr(config, "problem_type", None)
        if problem == "multi_label_classification":
            return {"labels": chosen(batch, config.num_labels, below=2).to(next(model.parameters()).dtype)}
        if problem == "regression" or (problem is None and config.num_labels == 1):
            several = (config.num_labels,) if config.num_labels > 1 else ()
            return {"labels": torch.randn(batch, *several, generator=generator).to(next(model.parameters()).dtype)}
        return {"labels": chosen(batch, below=config.num_labels)}
    if _is_for(kind, _TOKEN_CLASSES):
        below = config.num_labels
    elif _is_for(kind, _TOKENS) or (tokens.dim() == 2 and model.get_output_embeddings() is not None):
        below = text_config(config, decoder=True).vocab_size
    else:
        raise TraceError(f"what the labels of {kind} are like is not known: let example_inputs have them.")
    labels = chosen(*tokens.shape[:2], below=below)
    labels[0, -1] = _IGNORED
    return {"labels": labels}


_IGNORED = -100  # transformers' mark of labels that the loss skips
_TOKENS = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ")
_TOKEN_CLASSES = ("TOKEN_CLASSIFICATION",)
_CLASSES = ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION")
_POSITIONS = ("QUESTION_ANSWERING",)


def _is_for(kind: str, tasks: tuple[str, ...]) -> bool:
    """Tell whether transformers lists a class for one of these tasks."""
    mappings = (getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}) for task in tasks)
    return any(
        kind == name or (isinstance(name, tuple) and kind in name) for names in mappings for name in names.values()
    )


def varied(inputs: ExampleInputs, dynamic: Mapping[str, Sequence[int]] | None) -> ExampleInputs:
    """Return the inputs twice over in those dimensions of size 1 that must vary: torch.export takes a size of 1 for a constant.

    Args:
        inputs: keyword inputs; others stay as they are.
        dynamic: input → dimensions that must vary; ``None``: the ones with a name in ``inputs.axes``.
    """

    def of_two(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        axes = inputs.axes.get(name, ())
        varies = (
            {dim for dim, axis in enumerate(axes) if axis is not None} if dynamic is None else dynamic.get(name, ())
        )
        sizes = [2 if size == 1 and dim in varies else size for dim, size in enumerate(value.shape)]
        return cut_or_repeated(value, torch.Size(sizes))

    return replace(inputs, kwargs={name: of_two(name, value) for name, value in inputs.kwargs.items()})


def graph_inputs(inputs: ExampleInputs) -> dict[str, Any]:
    """Return the keyword inputs that hold tensors, which are the inputs of a graph."""
    return {
        name: value
        for name, value in inputs.kwargs.items()
        if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))
    }


def config_of(model: nn.Module) -> Any:
    """Return a copy of a transformers model's config, as that of a dense model, or None for another module."""
    config: Any = copy.deepcopy(getattr(model, "config", None))
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def pad_token_of(config: Any) -> int | None:
    """Return the ``pad_token_id`` of a config of transformers, of its text part; None for another, or none."""
    text = text_config(config) if hasattr(config, "get_text_config") else config
    return getattr(text, "pad_token_id", None)


def generation_config_of(model: nn.Module) -> Any:
    """Return a copy of the settings by which a transformers model generates, or None for another module."""
    return copy.deepcopy(getattr(model, "generation_config", None)) if is_pretrained(model) else None


def is_pretrained(model: nn.Module) -> bool:
    """Tell whether a module is a ``transformers.PreTrainedModel``, without importing that class."""
    return any((kind.__module__, kind.__qualname__) == _PRETRAINED for kind in type(model).__mro__)


_PRETRAINED = ("transformers.modeling_utils", "PreTrainedModel")


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "config") and hasattr(model, "main_input_name")


def _from_config(model: Any, device: torch.device) -> ExampleInputs:
    inputs = taken(model, _constants(model, {}))
    tensors = {name: value.to(device) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    _logger.info("inputs of %s are made from its config: %s", type(model).__name__, shapes(tensors))
    return ExampleInputs(kwargs={**inputs, **tensors}, axes=_axes(tensors), made=tuple(tensors))


# By the names of placeholders, which of an input in a list or mapping have its index or key behind them.
_AXES: Mapping[str, tuple[str | None, ...]] = {
    **dict.fromkeys(("input_ids", "attention_mask", "token_type_ids", "position_ids"), ("batch", "sequence")),
    **dict.fromkeys(("decoder_input_ids", "decoder_attention_mask"), ("batch", "target_sequence")),
    **dict.fromkeys(("bbox", "inputs_embeds"), ("batch", "sequence", None)),
    "decoder_inputs_embeds": ("batch", "target_sequence", None),
    **dict.fromkeys(("encoder_outputs_0", "encoder_outputs_last_hidden_state"), ("batch", "sequence", None)),
    "pixel_values": ("batch", None, None, None),
    "input_features": ("batch", None, None),
    "input_values": ("batch", "sequence"),
}


def _axes(inputs: Mapping[str, Any]) -> dict[str, tuple[str | None, ...]]:
    leaves = {"_".join(key_parts(path)): leaf for path, leaf in pytree.tree_leaves_with_path(dict(inputs))}
    ranks = {name: leaf.dim() for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}
    return {name: axes for name, axes in _AXES.items() if ranks.get(name) == len(axes)}


def _constants(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    parameters = arguments(model)
    accepts = "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    config: Any = getattr(model, "config", None)
    configs = [config, text_config(config)] if hasattr(config, "get_text_config") else [config]
    has_cache = any(getattr(part, "use_cache", None) is not None for part in configs)
    return {"use_cache": False} if has_cache and accepts and "use_cache" not in given else {}


def has_tensor(value: Any) -> bool:
    """Tell whether there is a tensor in a value."""
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))
