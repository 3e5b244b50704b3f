"""Branches → the same function in fewer passes over memory, and back.

A branch beside a site, ``z = y + s · (x Aᵀ) Bᵀ``, becomes two nodes::

    h, … = reduce_features(x, [A, …], wide)       for all branches that read x, where the first of them stands
    z    = add_update(y, h, B, s, narrow)         for each branch, where its sum stands

So x is read once and gets one gradient, instead of one for each branch; dz B serves both dx and dA; the product with B is
added where it is computed. No node has to move, since the first product needs nothing but x and factors: one node for all of a
group would have to wait for the last site, and most models read the output of the first before that (q is reshaped before k
is computed), so that sites would have to move, and could not be put back in order.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lora_fx.factors import is_factor
from lora_fx.fused import add_update, reduce_features
from lora_fx.graph_module import TracedGraphModule, as_traced, copy_graph, state_of
from lora_fx.lowering import describe, with_graph
from lora_fx.operators import writes
from lora_fx.products import operands
from lora_fx.sites import biased, is_site
from lora_fx.states import checked

aten = torch.ops.aten


def fuse(graph_module: TracedGraphModule) -> TracedGraphModule:
    """Return a graph that computes the same, with the same parameters, in fewer passes over memory.

    Outputs and gradients are as close to the exact ones as before, but not the same bits. Branches beside linear sites are
    fused; those with a dropout, or for a part of a projection, and those beside sites of other kinds stay as they are.
    What needs the branches themselves (fold, exporters) takes them from :func:`~lora_fx.lowering.lower`.

    Args:
        graph_module: left as it is; the result has parameters of its own over the same storage.

    Raises:
        PlanError: it is no graph of ours.
    """
    graph, _ = copy_graph(as_traced(graph_module).graph)
    for group in _groups(graph, state_of(graph_module).modules):
        _write_fused(graph, group)
    return checked(with_graph(graph_module, graph), "fused")


@dataclass(frozen=True)
class _Branch:
    """A branch as it is attached.

    Attributes:
        nodes: ``[cast], A, B, scale, add, [cast]``, in this order.
        a: ``get_attr`` of A.
        b: that of B.
        scaling: a number.
        wide: to which x is cast, or None.
        narrow: to which the sum is cast, or None.
    """

    nodes: tuple[fx.Node, ...]
    a: fx.Node
    b: fx.Node
    scaling: float
    wide: torch.dtype | None
    narrow: torch.dtype | None

    @property
    def x(self) -> fx.Node:
        """What it reads, which may be the output of a branch that was fused since."""
        return self.nodes[0].args[0]  # type: ignore[return-value]

    @property
    def product(self) -> fx.Node:
        """The node of ``x Aᵀ``."""
        return self.nodes[0 if self.wide is None else 1]

    @property
    def total(self) -> fx.Node:
        """The node of the sum."""
        return self.nodes[-1 if self.narrow is None else -2]


def _groups(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Iterable[Sequence[_Branch]]:
    """Return the branches of a graph; those in a group read the same, and nothing is written to between them."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    read: dict[fx.Node, fx.Node] = {}  # by the output of a site, of a branch too: what the site reads
    open_groups: dict[tuple[fx.Node, torch.dtype | None], list[_Branch]] = {}
    groups: list[list[_Branch]] = []
    written = -1
    for node in graph.nodes:
        read.update(_outputs(node))
        branch = _branch(node, read)
        if branch is not None and position[branch.b] < position[branch.nodes[0]]:
            group = open_groups.get((branch.x, branch.wide))
            start = position[group[0].nodes[0]] if group else -1
            if group is None or not written < start or position[branch.a] > start:
                group = open_groups[branch.x, branch.wide] = []
                groups.append(group)
            group.append(branch)
            read[branch.nodes[-1]] = branch.x
        elif _may_write(node, modules):
            written = position[node]
    return groups


def _outputs(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield the outputs of a linear site, with its bias and without, and what it reads."""
    parts = operands(node)
    if is_site(parts) and parts.op == "linear" and not is_factor(str(parts.weight.target)):
        yield node, parts.input
        if (total := biased(node)) is not None:
            yield total, parts.input


def _may_write(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(node.args) and not isinstance(modules[str(node.target)], nn.Dropout)
    return writes(node) is not None


def _branch(total: fx.Node, read: Mapping[fx.Node, fx.Node]) -> _Branch | None:
    """Return the branch that ends in this sum, if it is one as attached, and nothing else reads its nodes."""
    base, scale = _pair(total, aten.add.Tensor)
    product, scaling = _pair(scale, aten.mul.Tensor)
    reduced, b = _pair(product, aten.linear.default)
    value, a = _pair(reduced, aten.linear.default)
    if not (_is_factor(a) and _is_factor(b)) or base not in read or type(scaling) not in (int, float):
        return None
    nodes: tuple[fx.Node, ...] = (reduced, product, scale, total)
    x, wide, narrow = read[base], None, None
    if value is not x:
        source, wide = _pair(value, aten.to.dtype)
        end = next(iter(total.users), total)
        _, narrow = _pair(end, aten.to.dtype)
        if source is not x or narrow is None:
            return None
        nodes = (value, *nodes, end)
    if any(len(node.users) != 1 for node in nodes[:-1]):
        return None
    return _Branch(nodes, a, b, scaling, wide, narrow)


def _pair(node: Any, target: object) -> tuple[Any, Any]:
    """Return both arguments of a call, or nothing if it is not one of this operator with two."""
    found = isinstance(node, fx.Node) and node.target is target and len(node.args) == 2 and not node.kwargs
    return tuple(node.args) if found else (None, None)


def _is_factor(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and is_factor(str(node.target))


def _write_fused(graph: fx.Graph, group: Sequence[_Branch]) -> None:
    first = group[0]
    with graph.inserting_before(first.nodes[0]):
        reduced = graph.call_function(reduce_features, (first.x, [branch.a for branch in group], first.wide))
    values = [branch.product.meta.get("val") for branch in group]
    describe(reduced, first.product, None if None in values else values)
    for index, (branch, value) in enumerate(zip(group, values, strict=True)):
        with graph.inserting_before(branch.nodes[0]):  # where a lowered branch will read x again
            part = graph.call_function(operator.getitem, (reduced, index))
        describe(part, branch.product, value)
        with graph.inserting_before(branch.total):
            arguments = (branch.total.args[0], part, branch.b, branch.scaling, branch.narrow)
            fused = graph.call_function(add_update, arguments)
        end = branch.nodes[-1]
        describe(fused, end, end.meta.get("val"))
        custom = end.meta.get("custom", {})
        names = [node.name for node in branch.nodes]
        fused.meta["custom"] = {**custom, "lora_fx": {**custom.get("lora_fx", {}), "part": "update", "nodes": names}}
        end.replace_all_uses_with(fused)
        for node in reversed(branch.nodes):
            graph.erase_node(node)
