"""Reasons why layers cannot be computed a second time: running statistics, and writes to what a layer reads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from lora_fx.errors import LoraFxError, listed
from lora_fx.graph.aten_kinds import POINTWISE, VIEW, is_view, name_of, tensor_inputs, writes
from lora_fx.graph.batch_norms import GivenBatchNorm
from lora_fx.graph.provenance import source_line
from lora_fx.graph.training_only import TrainingOnly

_SHARING = VIEW | POINTWISE | {"contiguous"}
"""Operators whose result may be their input, or a view of it."""


def check_computed_again(graph_module: fx.GraphModule, layers: Sequence[Sequence[fx.Node]]) -> None:
    """Raise :class:`LoraFxError` where layers would compute something else in the backward pass than in the forward pass.

    Args:
        graph_module: with layers.
        layers: the nodes of each call of a layer.
    """
    inside = {node for nodes in layers for node in nodes}
    norms = [str(node.target) for node in inside if isinstance(_called(graph_module, node), GivenBatchNorm)]
    if norms:
        raise LoraFxError(
            f"layers cannot be computed again: the running statistics of {listed(sorted(norms), 3)} would count each batch twice."
        )
    position = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    memory = _memory(graph_module)
    written = [(memory.get(target, target), node) for node in position for target in _targets(graph_module, node)]
    for nodes in layers:
        read = {source for node in nodes for source in node.all_input_nodes} - set(nodes)
        places = {memory.get(source, source) for source in read}
        write = next(
            (node for place, node in written if place in places and position[node] >= position[nodes[0]]), None
        )
        if write is not None:
            raise LoraFxError(
                f"layers cannot be computed again: {write.name} writes to what the layer of {nodes[0].name} reads, so that it would read "
                f"something else the second time{source_line(write)}."
            )


def _called(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _targets(graph_module: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Return the values that a node writes to."""
    called = _called(graph_module, node)
    if isinstance(called, TrainingOnly) and called.changes_inputs:
        return node.all_input_nodes
    target = node.args[0] if getattr(called, "inplace", False) is True else writes(node)
    return [target] if isinstance(target, fx.Node) else []


def _memory(graph_module: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Return for each value that may be another one, or a view of it, the first such."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        targets = _targets(graph_module, node)
        source = next(iter(targets or tensor_inputs(node)), None)
        if source is not None and (
            targets or node.op == "call_module" or name_of(node) in _SHARING or is_view(node.target)
        ):
            found[node] = found.get(source, source)
    return found
