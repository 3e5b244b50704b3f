"""Constants of a graph: values that depend on its tensors alone, one of which nominates a branch.

A factor may be computed: a product of two matrices, one scaled by its rows, ``m / ‖W + s · B A‖`` of DoRA. Where another part of
the graph reads such a value, it is given a name of its own, so that the search for branches sees a factor like any other. Where
the value is a whole weight, computed from the model's own one (trained rows, put into an embedding), the product with it is seen as
one with that weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import fx

from lora_fx.branches.affine import Deltas
from lora_fx.branches.dataflow import may_share, same_shapes
from lora_fx.branches.delta import Addition
from lora_fx.graph.aten_kinds import writes
from lora_fx.graph.graph_module import copy_graph
from lora_fx.numerics.constant import Constant, Named
from lora_fx.sites.stored_weight import cast_of, stored, written_rows
from lora_fx.sites.weight_ops import readers, weight_op
from lora_fx.torch_internals import OpOverload

aten = torch.ops.aten


@dataclass(frozen=True)
class NamedConstants:
    """A graph in which computed factors have names.

    Attributes:
        graph: with a ``get_attr`` for each; the graph itself, if it computes none.
        originals: its nodes → those of the graph it was made from.
        tensors: those of the graph, and one on the meta device for each computed factor.
        computed: the computed factors by their names.
        weights: the ``get_attr`` nodes that stand for a weight as it is computed from the model's own.
    """

    graph: fx.Graph
    originals: Mapping[fx.Node, fx.Node]
    tensors: Mapping[str, torch.Tensor]
    computed: Mapping[str, Constant]
    weights: Mapping[fx.Node, Constant]


def name_constants(
    graph: fx.Graph, tensors: Mapping[str, torch.Tensor], nominate: Callable[[str], bool]
) -> NamedConstants:
    """Give names to the computed factors of a graph, in a copy of it.

    Args:
        graph: of plain nodes.
        tensors: of the graph, by name.
        nominate: tells the tensors that nominate a branch by their names.
    """
    found = _Constants(graph, tensors, nominate)
    given = {node: node for node in graph.nodes}
    if rewrites := list(_rewrites(graph, found)):
        graph, given = _rewritten(graph, rewrites)
        found = _Constants(graph, tensors, nominate)
    read = [node for node in graph.nodes if found.is_computed_factor(node)]
    if not read:
        return NamedConstants(graph, given, tensors, {}, {})
    changed, copies = copy_graph(graph)
    originals = {copy: node for node, copy in copies.items()}
    computed: dict[str, Constant] = {}
    values: dict[str, torch.Tensor] = {}
    weights: dict[fx.Node, Constant] = {}
    for node in read:
        constant, copy = found.constant(node), copies[node]
        with changed.inserting_after(copy):
            name = constant.name if isinstance(constant, Named) else constant.digest
            named = changed.create_node("get_attr", name, name=f"{copy.name}_named")
        named.meta["val"], originals[named] = found.empty(node), node
        if isinstance(constant, Constant):
            computed[name], values[name] = constant, found.empty(node)
        for user in [user for user in copy.users if not found.is_constant(originals[user])]:
            user.replace_input_with(copy, named)
        weight = found.weight_of(node) if isinstance(constant, Constant) else None
        products = [weight_op(reader) for reader, _ in readers(named)] if weight is not None else []
        if weight and products and all(product is not None and product.weight is named for product in products):
            named.target, weights[named] = weight, computed[name]
    for node in reversed(graph.nodes):
        copy = copies[node]
        if found.is_touched(node) and not copy.users:
            changed.erase_node(copy)
            del originals[copy]
    originals = {node: given[original] for node, original in originals.items()}
    return NamedConstants(changed, originals, {**tensors, **values}, computed, weights)


_Rewrite = Callable[[fx.Node], None]


def _rewrites(graph: fx.Graph, found: _Constants) -> Iterator[tuple[fx.Node, _Rewrite]]:
    """Yield the nodes that say in another way what products and sums of a branch do, each with what writes it so.

    x / c                 x · (1 / c)        c computed from factors
    x · c                 x · (c, c, …)      c with one element
    linear(x · v, A)      linear(x, A · v)   v a vector over the features of x
    zeros + y             y                  of the shape of the zeros, cast to the dtype of the sum
    """
    for node in graph.nodes:
        if node.op != "call_function" or node.kwargs or found.is_constant(node):
            continue
        arguments = [each for each in node.args if isinstance(each, fx.Node)]
        if node.target in (aten.div.Tensor, aten.mul.Tensor) and len(arguments) == 2:
            yield from _by_vector(node, arguments, found)
        elif node.target is aten.linear.default and len(arguments) == 2:
            yield from _of_scaled_input(node, arguments, found)
        elif node.target in (aten.add.Tensor, aten.add_.Tensor) and len(arguments) == 2:
            zeros, value = arguments
            if zeros.target is aten.zeros_like.default and len(zeros.users) == 1 and _is_alike(zeros, value):
                yield node, partial(_drop_zeros, dtype=_sum_dtype(node, zeros, value))


def _by_vector(node: fx.Node, arguments: Sequence[fx.Node], found: _Constants) -> Iterator[tuple[fx.Node, _Rewrite]]:
    """Yield a quotient by a constant, or a product with a computed constant of one element, as a product with a vector."""
    divides = node.target is aten.div.Tensor
    place = 1 if divides or found.is_touched(arguments[1]) else 0
    constant, seen = arguments[place], arguments[1 - place].meta.get("val")
    if not found.is_touched(constant) or not isinstance(seen, torch.Tensor) or not seen.dim():
        return
    empty, width = found.empty(constant), seen.shape[-1]
    expands = empty.numel() == 1 and empty.dim() <= 1 and isinstance(width, int)
    if empty.is_floating_point() and (divides or (expands and found.is_computed_factor(constant))):
        yield node, partial(_multiply, place=place, inverse=divides, width=width if expands else None)


def _multiply(node: fx.Node, *, place: int, inverse: bool, width: int | None) -> None:
    graph, vector, value = node.graph, node.args[place], node.args[1 - place]
    with graph.inserting_before(node):
        vector = graph.call_function(aten.reciprocal.default, (vector,)) if inverse else vector
        vector = vector if width is None else graph.call_function(aten.expand.default, (vector, [width]))
    node.target, node.args = aten.mul.Tensor, (value, vector)


def _of_scaled_input(
    node: fx.Node, arguments: Sequence[fx.Node], found: _Constants
) -> Iterator[tuple[fx.Node, _Rewrite]]:
    """Yield a product of a factor with an input whose features a vector scales, as a product with that factor scaled."""
    scaled, factor = arguments
    if scaled.target is not aten.mul.Tensor or scaled.kwargs or len(scaled.users) > 1 or factor.op != "get_attr":
        return
    parts = [each for each in scaled.args if isinstance(each, fx.Node)]
    vectors = [each for each in parts if found.is_touched(each)]
    if len(parts) != 2 or len(vectors) != 1 or not found.is_touched(factor):
        return
    if found.empty(vectors[0]).shape == found.empty(factor).shape[-1:]:
        yield node, partial(_scale_factor, place=parts.index(vectors[0]))


def _scale_factor(node: fx.Node, *, place: int) -> None:
    scaled: Any = node.args[0]
    with node.graph.inserting_before(node):
        factor = node.graph.call_function(aten.mul.Tensor, (node.args[1], scaled.args[place]))
    node.args = (scaled.args[1 - place], factor)
    node.graph.erase_node(scaled)


def _drop_zeros(node: fx.Node, *, dtype: torch.dtype | None) -> None:
    zeros: Any = node.args[0]
    value: Any = node.args[1]
    if dtype is not None:
        with node.graph.inserting_before(node):
            value = node.graph.call_function(aten.to.dtype, (value, dtype))
        value.meta.update(node.meta)
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)
    node.graph.erase_node(zeros)


def _rewritten(
    graph: fx.Graph, rewrites: Sequence[tuple[fx.Node, _Rewrite]]
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Return a copy of a graph with nodes written in another way, and its nodes → those of the graph."""
    changed, copies = copy_graph(graph)
    originals = {copy: node for node, copy in copies.items()}
    for node, rewrite in rewrites:
        before = set(changed.nodes)
        rewrite(copies[node])
        originals |= {made: node for made in changed.nodes if made not in before}
    return changed, {node: originals[node] for node in changed.nodes}


def _is_alike(one: fx.Node, other: fx.Node) -> bool:
    """Tell whether two values have the same shape, at all sizes, and dtypes of which a cast makes one of the other."""
    if not same_shapes(one, other):
        return False
    mine, theirs = one.meta["val"].dtype, other.meta["val"].dtype
    return bool(mine == theirs or (mine.is_floating_point and theirs.is_floating_point))


def _sum_dtype(node: fx.Node, zeros: fx.Node, value: fx.Node) -> torch.dtype | None:
    """Return the dtype of zeros plus a value: in place that of the zeros; None if the value has it."""
    mine, theirs = zeros.meta["val"].dtype, value.meta["val"].dtype
    dtype = mine if node.target is aten.add_.Tensor else torch.promote_types(mine, theirs)
    return None if dtype == theirs else dtype


class _Constants:
    """The nodes of a graph that depend on its tensors alone."""

    def __init__(self, graph: fx.Graph, tensors: Mapping[str, torch.Tensor], nominate: Callable[[str], bool]) -> None:
        self._tensors, self._nominate = tensors, nominate
        self._touched: dict[fx.Node, bool] = {}  # of every constant: whether it depends on a tensor that nominates
        self._known: dict[fx.Node, Any] = {}
        self._empty: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if self._depends_on_tensors_alone(node):
                own = node.op == "get_attr" and nominate(str(node.target))
                reads = any(self._touched.get(each, False) for each in node.all_input_nodes)
                self._touched[node] = own or (reads and written_rows(node) is None)
        self._sums = self._weight_sums(graph)

    def is_constant(self, node: fx.Node) -> bool:
        return node in self._touched

    def is_touched(self, node: fx.Node) -> bool:
        """Tell whether a node is a constant that depends on a tensor that nominates."""
        return self._touched.get(node, False)

    def is_computed_factor(self, node: fx.Node) -> bool:
        """Tell whether other nodes read a constant that is neither a view of a tensor nor a weight plus products of factors."""
        read = self.is_touched(node) and any(user not in self._touched for user in node.users)
        return read and node not in self._sums and not _is_stored(node)

    def constant(self, node: fx.Node) -> Constant | Named:
        """Return a constant as data, without casts between floating-point types and copies."""
        return self._value(node)  # type: ignore[no-any-return]

    def weight_of(self, node: fx.Node) -> str | None:
        """Return the one tensor of the model, of the same shape and dtype, from which a constant is computed."""
        empty = self.empty(node)
        own = {name: self._tensors[name] for name in self._value(node).names if not self._nominate(name)}
        alike = [name for name, each in own.items() if (each.shape, each.dtype) == (empty.shape, empty.dtype)]
        return alike[0] if len(alike) == 1 and empty.numel() > 1 and empty.is_floating_point() else None

    def empty(self, node: fx.Node) -> torch.Tensor:
        """Return a tensor of the shape and dtype of a constant, on the meta device."""
        if node not in self._empty:
            if node.op == "get_attr":
                made = torch.empty_like(self._tensors[str(node.target)], device="meta")
            else:
                arguments: Any = fx.map_arg(node.args, self._argument)
                keywords = {key: fx.map_arg(each, self._argument) for key, each in node.kwargs.items()}
                with torch.device("meta"):
                    made = node.target(*arguments, **keywords)  # type: ignore[operator]
            self._empty[node] = made
        return self._empty[node]  # type: ignore[no-any-return]

    def _argument(self, node: fx.Node) -> Any:
        return torch.device("meta") if _is_device(node) else self.empty(node)

    def _depends_on_tensors_alone(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return str(node.target) in self._tensors
        target = node.target
        if node.op != "call_function" or not isinstance(target, OpOverload):
            return False
        if not _is_determined(target):
            return False
        product = weight_op(node)
        if product is not None and not self._touched.get(product.input, True) and not _is_identity(product.input):
            return False  # a product with an input, which happens to be constant (the positions of DeBERTa)
        written = writes(node)
        if target._schema.is_mutable and (written is None or len(written.users) > 1 or may_share(written)):
            return False
        return all(each in self._touched or _is_device(each) for each in node.all_input_nodes)

    def _weight_sums(self, graph: fx.Graph) -> set[fx.Node]:
        """Return the weights to which products of factors are added, as PEFT does for stacked experts, and views of these."""
        deltas, found = Deltas(self._tensors), set[fx.Node]()
        for node in graph.nodes:
            if not self.is_touched(node):
                continue
            if node.op == "get_attr":
                if self._nominate(str(node.target)):
                    deltas.add_factor(node)
            elif deltas.touches(node):
                value = deltas.step(node)
                if isinstance(value, Addition) and value.delta.is_weight:
                    own = value.base.op == "get_attr" and not deltas.is_factor(value.base)
                    found |= {node} if own or value.base in found else set()
            elif node.all_input_nodes and node.all_input_nodes[0] in found:
                found.add(node)
        return found

    def _value(self, node: fx.Node) -> Any:
        if node not in self._known:
            source = node.args[0] if node.args else None
            if node.op == "get_attr":
                made: Any = Named(str(node.target))
            elif _is_same_value(node) and isinstance(source, fx.Node):
                made = self._value(source)
            else:
                arguments = tuple(self._data(each) for each in node.args)
                keywords = ((key, self._data(each)) for key, each in node.kwargs.items())
                keywords = ((key, each) for key, each in keywords if not isinstance(each, torch.device))
                made = Constant(node.target.name(), arguments, tuple(keywords))  # type: ignore[union-attr]
            self._known[node] = made
        return self._known[node]

    def _data(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return torch.device("cpu") if _is_device(value) else self._value(value)
        return tuple(map(self._data, value)) if isinstance(value, list | tuple) else value


@cache  # torch makes new Python objects of a schema at every access
def _is_determined(operator: OpOverload) -> bool:
    """Tell whether an operator returns one tensor, which its arguments determine."""
    returns = [str(each.type) for each in operator._schema.returns]
    return torch.Tag.nondeterministic_seeded not in operator.tags and returns == ["Tensor"]


def _is_device(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1:] == ("device",)


def _is_identity(node: fx.Node) -> bool:
    """Tell whether a node is the identity matrix, by which PEFT multiplies to have ``B A``."""
    return node.target is aten.eye.default


def _is_stored(node: fx.Node) -> bool:
    found = stored(node)
    return found is not None and found.chosen is None


def _is_same_value(node: fx.Node) -> bool:
    if node.target is aten.to.dtype_layout:
        dtype = node.kwargs.get("dtype")
        return not isinstance(dtype, torch.dtype) or dtype.is_floating_point
    same = (
        aten.detach.default,
        aten.detach_.default,
        aten.alias.default,
        aten.clone.default,
        aten.lift_fresh_copy.default,
    )
    return cast_of(node) is not None or node.target in same
