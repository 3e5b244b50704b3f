"""Replicated layers (``layer_replication`` of PEFT): a model whose list of layers has some of them again, over the same weights.

The list is found, and each copy is told its place, as PEFT 0.21 does both. The weights are shared; adapters at the copies are their own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, Literal, overload

from torch import fx, nn

from lora_fx.errors import TraceError
from lora_fx.graph.cached_graphs import CachedGraphs
from lora_fx.graph.graph_module import TracedGraphModule, rebuilt
from lora_fx.graph.info import info_of
from lora_fx.graph.joined_graphs import through
from lora_fx.rules.peft_config.config import LayerMap
from lora_fx.tracing.trace import trace


@overload
def trace_with_layers(
    model: nn.Module,
    layers: LayerMap | None,
    example_inputs: Any = None,
    *,
    cache: Literal[False] = False,
    **settings: Any,
) -> TracedGraphModule: ...


@overload
def trace_with_layers(
    model: nn.Module, layers: LayerMap | None, example_inputs: Any = None, *, cache: bool, **settings: Any
) -> TracedGraphModule | CachedGraphs: ...


def trace_with_layers(
    model: nn.Module, layers: LayerMap | None, example_inputs: Any = None, *, cache: bool = False, **settings: Any
) -> TracedGraphModule | CachedGraphs:
    """Trace a model with its layers replicated; see :func:`lora_fx.trace`.

    Args:
        model: not changed. A graph stays as it is: a plan says whether it has these layers.
        layers: ranges of layers, ``((0, 4), (2, 5))`` for 0, 1, 2, 3, 2, 3, 4; None for the layers of the model.
        example_inputs: see :func:`lora_fx.trace`.
        cache: see :func:`lora_fx.trace`.
        settings: of :func:`lora_fx.trace`.

    Raises:
        TraceError: the model has no list of layers that PEFT would find, or not so many; or it cannot be traced.
    """
    if layers is None or isinstance(model, fx.GraphModule):
        return trace(model, example_inputs, cache=cache, **settings)
    graphs = trace(replicated(model, layers), example_inputs, cache=cache, **settings)
    return through(graphs, lambda graph: rebuilt(graph, info=replace(info_of(graph), layers=layers)))


def replicated(model: nn.Module, layers: LayerMap) -> nn.Module:
    """Return a copy of a model, over its parameters and buffers, whose list of layers has these ranges of them one after the other.

    Raises:
        TraceError: there is no such list, or it is shorter.
    """
    result = _copied(model, model)
    parent, name = _list_of_layers(result)
    old: nn.ModuleList = getattr(parent, name)
    numbers = [number for first, past in layers for number in range(first, past)]
    if not numbers or max(numbers) >= len(old):
        raise TraceError(
            f"layer_replication: {type(model).__name__} has {len(old)} layers, 0 to {len(old) - 1}, got the ranges {[list(e) for e in layers]}."
        )
    copies = [_copied(old[number], model) for number in numbers]
    for place, layer in enumerate(copies):
        inner: Any
        for inner in layer.modules():
            if hasattr(inner, "layer_idx"):
                inner.layer_idx = place
    setattr(parent, name, nn.ModuleList(copies))
    config: Any = getattr(parent, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds:  # which PEFT leaves as they are, so that such a model ends in an IndexError
        config.layer_types = [kinds[number] for number in numbers]
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = len(copies)
    return result


def _copied(module: nn.Module, owner: nn.Module) -> nn.Module:
    """Return a copy of a module over the parameters and buffers of a model that it is in."""
    shared: Mapping[int, Any] = {id(tensor): tensor for tensor in chain(owner.parameters(), owner.buffers())}
    return copy.deepcopy(module, dict(shared))


def _list_of_layers(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the module that has the list of layers, and the name of the list in it, where PEFT looks for them."""
    inner: Any = model
    while hasattr(inner, "model"):
        inner = inner.model
    inner = getattr(inner, "bert", inner)
    if hasattr(inner, "layers"):
        found = inner, "layers"
    elif hasattr(inner, "encoder") and hasattr(inner.encoder, "layer"):
        found = inner.encoder, "layer"
    else:
        found = inner, "h"
    if not isinstance(getattr(*found, None), nn.ModuleList):
        raise TraceError(
            f"layer_replication: {type(model).__name__} has no list of layers where PEFT looks for one (layers, encoder.layer or h of the "
            "innermost .model)."
        )
    return found
