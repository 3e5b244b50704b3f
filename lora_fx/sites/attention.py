"""Attention in a graph: where queries, keys and values meet. No name of a module or parameter is read.

Found are ``scaled_dot_product_attention`` and attention written out: products whose result goes through a softmax into another
product. Of ``softmax(Q Kᵀ) V``, with the softmax over the keys, the operand that brings the dimension of the keys is K.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import networkx as nx
import torch
from torch import fx

from lora_fx.graph.aten_kinds import (
    ATTENTION,
    POINTWISE,
    PRODUCT,
    SHAPE,
    SOFTMAX,
    STATISTIC,
    flattened,
    is_tensor,
    name_of,
    tensor_inputs,
)
from lora_fx.sites.weight_ops import weight_op

_SCORES = SHAPE | POINTWISE | STATISTIC | {"max", "tanh", "exp", "softplus"}
"""Operators that may lie between the product of scores and the softmax: scaling, masks, sinks, caps."""


@dataclass(frozen=True)
class Attention:
    """One attention: its operands, and its result. Relative attention has several queries and keys."""

    queries: tuple[fx.Node, ...]
    keys: tuple[fx.Node, ...]
    values: tuple[fx.Node, ...]
    result: fx.Node


def attentions(nodes: Sequence[fx.Node]) -> Iterator[Attention]:
    """Yield every attention among the nodes of a graph, in graph order."""
    flow = nx.DiGraph((source, node) for node in nodes if is_tensor(node) for source in tensor_inputs(node))
    for node in nodes:
        name = name_of(node)
        if name == ATTENTION:
            query, key, value = flattened(node.args[:3])
            yield Attention((query,), (key,), (value,), node)
        elif name in SOFTMAX:
            found = _eager_attention(flow, node)
            if found is not None:
                yield found


def _eager_attention(flow: nx.DiGraph, softmax: fx.Node) -> Attention | None:
    scores = _Scores.behind(softmax)
    if not scores.queries:
        return None
    values, results = [], []
    for product, weights in _products_of(flow, softmax):
        others = [source for source in tensor_inputs(product) if source not in weights]
        if others and others[0] not in scores.products:
            values += others
            results.append(product)
    return Attention(tuple(scores.queries), tuple(scores.keys), tuple(values), results[0]) if results else None


def _products_of(flow: nx.DiGraph, softmax: fx.Node) -> Iterator[tuple[fx.Node, set[fx.Node]]]:
    """Yield the products that read the result of a softmax, and the nodes that carry it there."""
    carries = nx.subgraph_view(
        flow,
        filter_node=lambda node: node is softmax or (name_of(node) in SHAPE | POINTWISE and weight_op(node) is None),
    )
    carriers = {softmax, *nx.descendants(carries, softmax)}
    users = {user for carrier in carriers for user in carrier.users}
    for user in sorted(users):
        if name_of(user) in PRODUCT and weight_op(user) is None:
            yield user, carriers


@dataclass
class _Scores:
    """The operands of the products that make the scores before a softmax."""

    queries: list[fx.Node] = field(default_factory=list)
    keys: list[fx.Node] = field(default_factory=list)
    products: set[fx.Node] = field(default_factory=set)

    @classmethod
    def behind(cls, softmax: fx.Node) -> _Scores:
        found = cls()
        dim = softmax.args[1] if len(softmax.args) > 1 else -1
        first = softmax.all_input_nodes[0]
        rank = _dims(first)
        assert isinstance(dim, int)
        todo, seen = [(first, dim if dim < 0 or rank is None else dim - rank)], set()
        while todo:
            node, axis = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if weight_op(node) is not None:
                continue
            name = name_of(node)
            if name in PRODUCT:
                found._add(node, axis)
            elif name in _SCORES:
                todo += [(source, _axis_before(node, axis)) for source in tensor_inputs(node)]
        return found

    def _add(self, product: fx.Node, axis: int) -> None:
        nodes = list(flattened(product.args))
        if len(nodes) < 2:  # an einsum of one operand is no product
            return
        left, right = nodes[-2:]  # baddbmm has a summand before them
        if any(node.op == "get_attr" for node in (left, right)) or (_dims(left) or 0) < 3:
            return
        if name_of(product) == "einsum":
            axis = _axis_of_einsum(str(product.args[0]), axis)
        if axis not in (-1, -2):
            return
        query, key = (left, right) if axis == -1 else (right, left)
        self.queries.append(query)
        self.keys.append(key)
        self.products.add(product)


def _axis_of_einsum(equation: str, axis: int) -> int:
    """Return -1 if the axis of the result comes from the second operand, -2 if from the first, 0 if from both."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    letter = output[axis]
    return 0 if letter in left and letter in right else -1 if letter in right else -2


def _axis_before(node: fx.Node, axis: int) -> int:
    """Return the axis (counted from the end) of a node's input that becomes this axis of its value."""
    name = name_of(node)
    rank = _dims(node)
    if rank is None:
        return axis
    if name in ("transpose", "swapaxes"):
        first, second = (int(position) % rank - rank for position in node.args[1:3])  # type: ignore[arg-type]
        return {first: second, second: first}.get(axis, axis)
    if name in ("t", "numpy_T", "mT"):
        return {-1: -2, -2: -1}.get(axis, axis)
    if name == "permute":
        return int(node.args[1][axis]) % rank - rank  # type: ignore[index, arg-type]
    return axis


def _dims(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else None
