"""A graph whose code is a tree of modules that mirrors the model's, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lora_fx.errors import PlanError
from lora_fx.graph.cached_graphs import CachedGraphs, check_undivided
from lora_fx.graph.graph_module import TracedGraphModule, as_traced, copied_over, state_of
from lora_fx.graph.info import GraphInfo, info_of, with_info
from lora_fx.graph.layers import Checkpointing, nesting
from lora_fx.graph.recomputed import check_computed_again


def nest(graph_module: TracedGraphModule) -> TracedGraphModule:
    """Return the same computation as a tree of modules, as the model is: one for each layer, which hooks, FSDP and compilers see.

    A layer is the outermost module with tensors whose path ends in a number (``model.layers.3``). It is a module of a class that is
    called as the model's (``LlamaDecoderLayer``), and layers of equal code share one. All else stays with the graph: embeddings, rotary
    tables, masks, sizes, what several layers share. The result has the same ``Parameter`` objects under the same names; its ``graph``
    is that of the flat one, and only its code is called by layers. All functions of lora_fx take it as they take a flat one, and return a
    nested graph for it; :func:`fold`, :func:`unload` and exports give flat ones.

    Args:
        graph_module: not changed.

    Raises:
        LoraFxError: the model has no such layers, or they are interleaved, so that neither can be computed before the other.
        PlanError: the argument is no graph of lora_fx, or the graphs of an encoder-decoder with a key-value cache.
    """
    info = replace(info_of(_nestable(graph_module)), nested=True)
    return _like(graph_module, info)


def flatten(graph_module: TracedGraphModule) -> TracedGraphModule:
    """Return the flat graph with the same ``Parameter`` objects: nodes, code, metadata and order are as before :func:`nest`.

    Args:
        graph_module: nested or flat; not changed.

    Raises:
        PlanError: the argument is no graph of lora_fx.
    """
    return _like(graph_module, info_of(as_traced(graph_module)).flat)


def nest_in_place(graph_module: TracedGraphModule, checkpointing: Checkpointing | None) -> None:
    """Nest a graph (in place), with layers that are computed again if there are settings for it. Raises as :func:`nest` does."""
    layers = nesting(_nestable(graph_module), graph_module.graph)
    if checkpointing is not None:
        check_computed_again(graph_module, layers.computed_again(graph_module, checkpointing))
    info = replace(info_of(graph_module), nested=True, checkpointing=checkpointing)
    graph_module.meta.update(with_info(graph_module.meta, info))
    graph_module.recompile()


def _nestable(graph_module: Any) -> TracedGraphModule:
    if isinstance(graph_module, TracedGraphModule):
        check_undivided(graph_module)
    if isinstance(graph_module, CachedGraphs):
        raise PlanError(
            "expected one graph, got CachedGraphs: the graphs of an encoder-decoder with a key-value cache stay flat."
        )
    return as_traced(graph_module)


def _like(graph_module: TracedGraphModule, info: GraphInfo) -> TracedGraphModule:
    """Return a copy with another record, over the same tensors."""
    tensors = state_of(graph_module).tensors
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors.values()}
    return copied_over(graph_module, tensors, with_info(graph_module.meta, info), memo)
