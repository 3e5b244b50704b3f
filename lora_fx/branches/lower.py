"""Lowering: fused branches written out again as plain operators, which fold, verify and the exporters know."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import fx, nn

from lora_fx.graph.erasing import erase_unread
from lora_fx.graph.graph_module import TracedGraphModule, copy_graph, rebuilt, state_of
from lora_fx.graph.info import check_same_for_all_rows
from lora_fx.graph.process_sums import gradient_sums_of
from lora_fx.graph.provenance import stamp_of, write_stamp
from lora_fx.numerics.bit_dropout import DropoutRate
from lora_fx.numerics.fused_branch import add_update

aten = torch.ops.aten

Graph = TypeVar("Graph", bound=fx.GraphModule)


def lower(graph_module: Graph) -> Graph | TracedGraphModule:
    """Return the graph from which a fused one was made, with the same node names; a graph that is not fused is returned itself.

    Of a graph of one of several processes, the sums of gradients are left out: the result is to be read, folded and exported, not trained.

    Args:
        graph_module: left as it is; the result has parameters of its own over the same storage.

    Raises:
        PlanError: the graph takes the adapter of each row.
    """
    check_same_for_all_rows(graph_module)
    gradient_sums = gradient_sums_of(graph_module)
    if not is_fused(graph_module) and not gradient_sums:
        return graph_module
    graph, copies = copy_graph(graph_module.graph)
    for node in gradient_sums:
        copies[node].replace_all_uses_with(copies[node].all_input_nodes[0])
        graph.erase_node(copies[node])
    for node in graph.find_nodes(op="call_function", target=add_update):
        _write_plain(graph, node)
    modules = state_of(graph_module).modules
    dropouts = {name: nn.Dropout(each.p) for name, each in modules.items() if isinstance(each, DropoutRate)}
    graph.lint()
    return rebuilt(graph_module, graph, modules=dropouts)


def is_fused(graph_module: fx.GraphModule) -> bool:
    """Tell whether a graph computes branches in nodes that compute several at a time."""
    return bool(graph_module.graph.find_nodes(op="call_function", target=add_update))


def describe(node: fx.Node, like: fx.Node, value: Any) -> None:
    """Give a new node the origin of another node, and a value."""
    node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
    if value is not None:
        node.meta["val"] = value


def _write_plain(graph: fx.Graph, fused: fx.Node) -> None:
    """Write a branch out again, with its stamp and the names of its nodes, unless another pass lost them."""
    arguments: Any = fused.args
    base, part, b, scaling, narrow, *places = arguments
    reduced, index = part.args
    x, factors, wide, *rates = reduced.args
    stamp = dict(stamp_of(fused))
    names = iter(stamp.pop("nodes", ()))
    stamp.pop("part", None)

    # As the graph has them: to compute them anew, with symbolic sizes, takes a hundred times as long as all else.
    reads, reduces, adds = (_cast(node, wide) for node in (x, part, fused))

    def emit(part: str, value: Any, target: Any, *args: Any) -> fx.Node:
        op = "call_module" if isinstance(target, str) else "call_function"
        node = graph.create_node(op, target, args, name=next(names, None))
        describe(node, fused, value)
        write_stamp(node, {**stamp, "part": part}, like=fused)
        return node

    with graph.inserting_before(part):  # the values read here may be overwritten before the sum
        value = x if wide is None else emit("cast", reads, aten.to.dtype, x, wide)
        if rates and isinstance(rates[0][index], fx.Node):
            value = emit("dropout", reads, str(rates[0][index].target), value)
        value = emit("A", reduces, aten.linear.default, value, factors[index])
        rows = _rows(adds, b) if places else adds
        value = emit("B", rows, aten.linear.default, value, b)
        value = emit("scale", rows, aten.mul.Tensor, value, scaling)
        if places:
            value = emit("pad", _rows(adds, b, 1), aten.constant_pad_nd.default, value, [0, 1])
            value = emit("place", adds, aten.index_select.default, value, -1, *places)
    with graph.inserting_before(fused):
        value = emit("add", adds, aten.add.Tensor, base, value)
        value = value if narrow is None else emit("cast", fused.meta.get("val"), aten.to.dtype, value, narrow)
    fused.replace_all_uses_with(value)
    erase_unread(graph, fused)


def _cast(node: fx.Node, dtype: torch.dtype | None) -> Any:
    value = node.meta.get("val")
    return value if value is None or dtype is None else value.to(dtype)


def _rows(value: Any, b: fx.Node, more: int = 0) -> Any:
    """Return a value with one feature for each row of B, and ``more``."""
    factor = b.meta.get("val")
    if value is None or factor is None:
        return None
    return value.new_empty((*value.shape[:-1], factor.shape[0] + more))
