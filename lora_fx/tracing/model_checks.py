"""Models that are refused before or after a trace, with what to do: no module, layers computed again, no loss, tensors written to."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_fx.errors import LoraFxError, TraceError, listed
from lora_fx.graph.cached_graphs import has_cache
from lora_fx.graph.graph_module import TracedGraphModule, check_names, state_of
from lora_fx.graph.info import held_graphs, info_of
from lora_fx.graph.layers import Checkpointing
from lora_fx.graph.nested import nest_in_place
from lora_fx.graph.signature import ITEM_COUNT
from lora_fx.tracing.example_inputs import ExampleInputs
from lora_fx.tracing.item_count import without_item_count
from lora_fx.tracing.model_state import Mode
from lora_fx.tracing.parity import OnCopies


def _advice_on(value: object) -> str:
    """Return what to do with something that is no module, behind its type."""
    if isinstance(value, str | Path):
        name = str(value)
        return f": load it first, as by transformers.AutoModelForCausalLM.from_pretrained({name!r:.100})"
    if isinstance(value, type):
        return f": pass an instance of {value.__name__}"
    if isinstance(value, PreTrainedConfig):
        return ": make its model, as by transformers.AutoModelForCausalLM.from_config"
    return f": {held_graphs(value) or format(repr(value).partition(chr(10))[0], '.100')}"


def check_model(model: nn.Module) -> None:
    """Raise :class:`TraceError` for anything but a module in Python whose tensors can have gradients and have usable names."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TraceError(f"expected a torch.nn.Module in Python, got a {type(model).__name__}{_advice_on(model)}.")
    tensors = state_of(model).tensors
    check_names(tensors)
    if any(tensor.is_inference() for tensor in tensors.values()):
        raise TraceError(
            f"the tensors of {type(model).__name__} were made under torch.inference_mode(), and can have no gradients: "
            "make the model outside of it."
        )


def check_cached(given: Any, *, cache: bool, dynamic: bool, labels: bool, prefix: bool | Literal["prompt"]) -> None:
    """Raise :class:`TraceError` for arguments of a trace that do not go with a cache."""
    if cache and (labels or given is not None or dynamic):
        raise TraceError(
            "cache=True makes its own example_inputs, and has no labels: leave out example_inputs, dynamic and labels."
        )
    if cache and prefix == "prompt":
        raise TraceError(
            'cache=True and prefix="prompt" do not go together: a prompt is no past. Leave out cache=True.'
        )
    if cache and prefix:
        raise TraceError(
            "cache=True and prefix=True do not go together: with a cache a prefix is the past of the first call. Trace without prefix=True."
        )


def check_taken_as_traced(
    graph_module: TracedGraphModule, *, cache: bool, labels: bool, prefix: bool | Literal["prompt"]
) -> None:
    """Raise :class:`TraceError` where a trace of a graph, which is that graph, is asked for what it was traced without."""
    slot = info_of(graph_module).prefix_slot
    lacks = prefix and (slot is None or slot.is_prompt != (prefix == "prompt"))
    if lacks or (cache and not has_cache(graph_module)) or (labels and not info_of(graph_module).labels):
        raise TraceError(
            "a graph is taken as it was traced, and this one was traced without what cache=True, labels=True or "
            f"prefix={prefix or True!r} ask for: pass the model. "
            "Adapters of this graph go along by lora_fx.transfer(graph, onto=lora_fx.trace(model, …))."
        )


def taken_checkpointing(model: nn.Module) -> Checkpointing | None:
    """Let a model keep what its layers compute (in place), and return how it computed them again in the backward pass, if it did.

    Raises:
        LoraFxError: by a function that is neither torch's nor transformers', or with settings that a graph refuses.
    """
    switched = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    if not switched:
        return None
    functions = [
        module._gradient_checkpointing_func for module in switched if "_gradient_checkpointing_func" in vars(module)
    ]
    function = functions[0] if functions else partial(checkpoint)
    inner = getattr(function, "func", function)
    offloads = getattr(inner, "__module__", "") == "transformers.modeling_utils"  # which wraps torch's, for that alone
    if inner is not checkpoint and not offloads:
        raise TraceError(
            f"{type(model).__name__} computes its layers again by {getattr(inner, '__qualname__', inner)}, expected "
            "torch.utils.checkpoint.checkpoint. Call model.activation_checkpointing_disable(), and graph.activation_checkpointing_enable()."
        )
    repeated = [
        module.gradient_checkpointing for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    chosen = [index for index, on in enumerate(repeated) if on]
    every = chosen[1] - chosen[0] if len(chosen) > 1 else max(len(repeated), 1)
    for module in switched:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    return Checkpointing.of(getattr(function, "keywords", None), every, offload=offloads)


def nest_as(
    model: nn.Module, graph_module: TracedGraphModule, checkpointing: Checkpointing | None
) -> TracedGraphModule:
    """Return a graph that computes its layers again (in place) if its model does.

    Raises:
        TraceError: it cannot.
    """
    if checkpointing is None:
        return graph_module
    try:
        nest_in_place(graph_module, checkpointing)
    except LoraFxError as error:
        raise TraceError(
            f"{type(model).__name__} has activation checkpointing switched on, and its graph would train without it, in more memory: {error} "
            "Call model.activation_checkpointing_disable(), or trace with inference=True."
        ) from error
    return graph_module


def check_loss(model: nn.Module, inputs: ExampleInputs, mode: Mode) -> None:
    """Raise :class:`TraceError` unless the model returns a loss. In its first call it may choose a kind by the labels, and note it in its config.

    On the meta device, where models cannot look at their inputs, nothing is checked.
    """
    if any(tensor.is_meta for tensor in state_of(model).tensors.values()):
        return
    mode.set(model, False)
    try:
        with torch.no_grad():
            found = OnCopies(model)(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        if ITEM_COUNT not in str(error):
            raise
        raise TraceError(
            f"{type(model).__name__}.forward has **kwargs, so that transformers' Trainer passes {ITEM_COUNT}, and the model fails "
            f"with it: {error}. Set model.accepts_loss_kwargs = False, by which Trainer goes too, or let forward take it."
        ) from error
    if getattr(found, "loss", None) is None:
        names = ", ".join(without_item_count(inputs).kwargs)
        raise TraceError(
            f"{type(model).__name__} returns no loss for {names}: let example_inputs have all labels that it asks for."
        )


def advice_on_writes(model: nn.Module, written: Collection[str], *, training: bool) -> str:
    """Return what to do about tensors that a model writes to while it computes."""
    weights = {id(value) for name, value in model.named_parameters(remove_duplicate=False) if name in written}
    tables = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.max_norm is not None and id(module.weight) in weights
    ]
    if tables:
        return (
            f"The embedding {listed(tables, 3)} has a max_norm: give its rows that norm once, "
            "torch.embedding_renorm_(weight, torch.arange(len(weight)), max_norm, norm_type) under torch.no_grad(), "
            "and set its max_norm to None. It computes the same then."
        )
    return "Use inference=True." if training else "Such a model is not supported."
