"""Base weights prepacked for the CPU's matrix library: a node calls a module that keeps the packed copies, and back.

Each node stays where it is, with its name, arguments and metadata; only what it calls changes, so that undoing it gives the
same graph. All nodes of one weight call one module. The modules hold no tensors as far as anything else can see, and whatever
reads sites or writes graphs down takes the graph from :func:`unpacked`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from typing import TypeVar

from torch import fx, nn

from lora_fx.errors import LoraFxError
from lora_fx.graph.adapter_names import is_of_adapter
from lora_fx.graph.graph_module import State, TracedGraphModule, assemble, copy_graph, state_of, trainable_names
from lora_fx.packed import KINDS, PrepackedWeight, is_available, is_packable

PREFIX = "prepacked"
"""The module path below which a graph keeps its packed weights, unless the model has a part of this name."""

LEAST_ELEMENTS = 2**18
"""Of a weight that is packed: with a smaller one the gain is less than the call of a Python function costs."""

Graph = TypeVar("Graph", bound=fx.GraphModule)

_log = logging.getLogger(__name__)


def prepacked(graph_module: TracedGraphModule) -> TracedGraphModule:
    """Return a graph whose large frozen weights are packed; what is not linear or not frozen is left as it is.

    Args:
        graph_module: left as it is; the result has parameters of its own over the same storage.

    Raises:
        LoraFxError: torch has no such operators here, or a weight is not on the CPU.
    """
    if not is_available():
        raise LoraFxError(
            "prepack=True lays weights out for MKL and oneDNN, and this build of torch has no oneDNN for this machine "
            "(torch.backends.mkldnn.is_available() is False). Use lora_fx.fuse without prepack."
        )
    state = state_of(graph_module)
    graph, _ = copy_graph(graph_module.graph)
    modules = _pack_nodes(graph, state)
    made = assemble(
        graph,
        state.with_modules(modules),
        meta=graph_module.meta,
        training=graph_module.training,
        trainable=trainable_names(graph_module),
    )
    weights = [made.get_parameter(module.name) for module in _packing(made).values()]
    size = sum(weight.nbytes for weight in weights) / 1e6
    _log.info(
        "%d weights of %.1f MB are packed when they are used, in as much again for each direction", len(weights), size
    )
    return made


def prepacked_bytes(graph_module: fx.GraphModule) -> int:
    """Return how much memory packed copies of weights take at present, beside the weights themselves.

    They are made by the first calls of a graph, and of its copies: those for the backward pass when a gradient needs them.
    """
    return sum(module.nbytes for module in _packing(graph_module).values())


def unpacked(graph_module: Graph) -> Graph | TracedGraphModule:
    """Return the graph that a prepacked one was made of, node for node; a graph that is not prepacked, itself.

    Args:
        graph_module: left as it is; the result has parameters of its own over the same storage.
    """
    packing = _packing(graph_module)
    if not packing:
        return graph_module
    graph, _ = copy_graph(graph_module.graph)
    for name, module in packing.items():
        for node in graph.find_nodes(op="call_module", target=name):
            node.target, node.op = module.operator, "call_function"
    return assemble(
        graph,
        state_of(graph_module).without(set(packing)),
        meta=graph_module.meta,
        training=graph_module.training,
        trainable=trainable_names(graph_module),
    )


def _packing(graph_module: fx.GraphModule) -> Mapping[str, PrepackedWeight]:
    """Return the modules that keep packed weights, by the names by which nodes call them."""
    called = dict.fromkeys(str(node.target) for node in graph_module.graph.find_nodes(op="call_module"))
    modules = {name: graph_module.get_submodule(name) for name in called}
    return {name: module for name, module in modules.items() if isinstance(module, PrepackedWeight)}


def _pack_nodes(graph: fx.Graph, state: State) -> dict[str, nn.Module]:
    """Let the nodes that multiply by packable weights call modules (in place), and return these."""
    prefix = _free_prefix(state)
    modules: dict[tuple[str, type[PrepackedWeight]], tuple[str, PrepackedWeight]] = {}
    for node in list(graph.nodes):
        found = _weight(node)
        if found is None or not _is_worthwhile(*found[:1], state):
            continue
        weight, kind = found
        target, _ = modules.setdefault(found, (f"{prefix}.weight_{len(modules)}", kind(weight)))
        node.op, node.target = "call_module", target
    return dict(modules.values())


def _weight(node: fx.Node) -> tuple[str, type[PrepackedWeight]] | None:
    """Return the name of the tensor by which a node multiplies, and what it would call if that were packed."""
    kind = next((kind for kind in KINDS if node.target is kind.operator), None)
    if kind is None or node.kwargs:
        return None
    weight = node.args[2 if kind.swapped else 1]
    return (str(weight.target), kind) if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def _is_worthwhile(name: str, state: State) -> bool:
    weight = state.tensors[name]
    if not isinstance(weight, nn.Parameter) or is_of_adapter(name) or weight.numel() < LEAST_ELEMENTS:
        return False
    if weight.device.type != "cpu":
        raise LoraFxError(
            f"prepack=True lays weights out for the CPU, and {name!r} is on {weight.device}. "
            + (
                "Give the graph its weights first: lora_fx.materialize."
                if weight.is_meta
                else "Use lora_fx.fuse without prepack there, or prepack what graph.to('cpu') returns."
            )
        )
    return is_packable(weight)


def _free_prefix(state: State) -> str:
    taken = {name.split(".")[0] for name in (*state.tensors, *state.modules)}
    return next(name for n in itertools.count() if (name := f"{PREFIX}_{n}" if n else PREFIX) not in taken)
