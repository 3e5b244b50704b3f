"""Linear terms: the value of an unfinished branch, linear in the input of a site, with constant factors.

    Delta     Σ scaling · … M₂ M₁ x            products with weights, scalings by constants, casts, reshapes that keep features
                                              together, sums of deltas, and features put in their places among zeros

A product of factors alone is a delta too, of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from lora_fx.branches.dataflow import COPIES, keeps_last_dim, may_share
from lora_fx.graph.adapter_names import is_places
from lora_fx.numerics.lowrank_merge import Factor, Update
from lora_fx.numerics.weight_view import SWAP
from lora_fx.rules.vocabulary import Op
from lora_fx.sites.stored_weight import Stored, cast_of, is_transparent, stored
from lora_fx.sites.weight_ops import CONVOLUTIONS, WeightOp, is_pointwise, weight_op

aten = torch.ops.aten


@dataclass(frozen=True)
class Term:
    """One update, and the input that it is applied to.

    Attributes:
        source: the node that the first product reads.
        op: the kind of that product; None for a product of factors alone, without any input.
        geometry: which features of the source belong together, as the first product says.
        kernel: that of the first product, if it is a convolution.
        product: the node of the first product.
        update: the factors and the scaling.
    """

    source: fx.Node
    op: Op | None
    geometry: tuple[Any, ...]
    kernel: tuple[int, ...]
    product: fx.Node
    update: Update


@dataclass(frozen=True)
class Delta:
    """A value that is linear in the sources of its terms.

    Attributes:
        terms: its summands.
        dtype: of the value.
        padded: whether a zero stands behind its last feature.
        reshaped: whether its positions are no longer laid out as those of a source.
    """

    terms: tuple[Term, ...]
    dtype: torch.dtype
    padded: bool = False
    reshaped: bool = False

    @property
    def is_weight(self) -> bool:
        """Whether it is a product of factors alone, to be added to a weight."""
        return self.terms[0].op is None

    @property
    def is_placed(self) -> bool:
        """Whether its features are put in places of their own, or padded for that."""
        return self.padded or any(term.update.places is not None for term in self.terms)

    def updated(self, change: Callable[[Update], Update]) -> Delta:
        """Return it with another update in each of its terms."""
        return replace(self, terms=tuple(replace(term, update=change(term.update)) for term in self.terms))

    def scaled(self, number: float) -> Delta:
        """Return it times a number."""
        return self.updated(lambda update: replace(update, scaling=update.scaling * number))


@dataclass(frozen=True)
class Addition:
    """The sum of a delta and a value that is no delta."""

    base: fx.Node
    delta: Delta


class Deltas:
    """The deltas and factors among the nodes of a graph that have been visited.

    Args:
        tensors: of the graph, by name.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._factors: set[fx.Node] = set()
        self._values: dict[fx.Node, Delta] = {}

    def add_factor(self, node: fx.Node) -> None:
        """Take the ``get_attr`` of a factor."""
        self._factors.add(node)

    def is_factor(self, node: fx.Node) -> bool:
        """Tell whether a node is a factor, or a view of one."""
        return node in self._factors

    def is_product(self, node: fx.Node) -> bool:
        """Tell whether a node multiplies by a factor."""
        product = weight_op(node)
        return product is not None and product.weight in self._factors

    def touches(self, node: fx.Node) -> bool:
        """Tell whether a node reads a factor or a delta; finished branches do not count. A view of a factor is recorded as one."""
        inputs = node.all_input_nodes
        if inputs and inputs[0] in self._factors and is_transparent(node):
            self._factors.add(node)
            return False
        return any(source in self._factors or source in self._values for source in inputs)

    def step(self, node: fx.Node) -> Delta | Addition | None:
        """Return the value of a node that reads a factor or a delta; None if it is not linear, or not known to be."""
        value = self._value(node)
        if isinstance(value, Delta):
            self._values[node] = value
        return value

    def _value(self, node: fx.Node) -> Delta | Addition | None:
        product = weight_op(node)
        if product is not None:
            return self._product(node, product)
        compute = _LINEAR.get(node.target)
        if compute is None or node.kwargs.keys() - {"alpha"} or not self._has_number(node):
            return self._same_features(node)
        return compute(self, node)

    def _has_number(self, node: fx.Node) -> bool:
        return isinstance(node.kwargs.get("alpha", 1), int | float)

    def _product(self, node: fx.Node, product: WeightOp) -> Delta | Addition | None:
        """Return the value of a product with a weight, and of the sum that an ``addmm`` makes of it."""
        name = str(product.weight.target)
        tensor = self._tensors[name]
        if not tensor.is_floating_point() or (product.op in CONVOLUTIONS and product.layout is None):
            return None  # the places under a reshaped kernel are not known
        delta, factor = self._values.get(product.input), Factor(name, product.view)
        if isinstance(delta, Delta):
            if delta.is_placed or not all(_continues(term, product, tensor.shape) for term in delta.terms):
                return None
            made = delta.updated(lambda update: replace(update, factors=(*update.factors, factor)))
        elif self.is_factor(product.weight) and product.input in self._factors:
            left = stored(product.input)
            if left is None or left.chosen is not None or product.geometry not in ((), ("right", None)):
                return None
            made = self._weight_delta(node, left, product)
        elif self.is_factor(product.weight):
            kernel = tuple(tensor.shape[2:]) if product.op in CONVOLUTIONS else ()
            term = Term(product.input, product.op, product.geometry, kernel, node, Update((factor,)))
            made = Delta((term,), product.dtype or tensor.dtype)
        else:
            return None  # only the addend, or the choice of an expert, depends on a factor
        made = made.scaled(product.alpha)
        return made if product.addend is None else self._sum(product.addend, made)

    def _weight_delta(self, node: fx.Node, left: Stored, product: WeightOp) -> Delta:
        """Return the delta of a product of two factors: the right one is applied first."""
        right = Factor(str(product.weight.target), product.view.then(SWAP))
        dtype = left.dtype or self._tensors[str(left.node.target)].dtype
        update = Update((right, Factor(str(left.node.target), left.view)))
        return Delta((Term(product.input, None, (), (), node, update),), dtype)

    def _scale(self, node: fx.Node) -> Delta | None:
        """Scale by a number, or by a constant of one element; divide by a number."""
        left, right = node.args[:2]
        delta, other = (left, right) if isinstance(self._values.get(left), Delta) else (right, left)  # type: ignore[arg-type]
        value = self._values.get(delta)  # type: ignore[arg-type]
        if not isinstance(value, Delta):
            return None
        if isinstance(other, bool) or not isinstance(other, int | float):
            scale = self._one_element_constant(other, value.dtype)
            divides = node.target not in (aten.mul.Tensor, aten.mul.Scalar)
            if scale is None or divides:
                return None
            name, dtype = scale
            return replace(value.updated(lambda update: replace(update, scales=(*update.scales, name))), dtype=dtype)
        if node.target in (aten.div.Tensor, aten.div.Scalar):
            return value.scaled(1 / other) if delta is left and other != 0 else None
        return value.scaled(other)

    def _one_element_constant(self, value: Any, dtype: torch.dtype) -> tuple[str, torch.dtype] | None:
        """Return the name of a tensor with one element and at most one dimension, and the dtype of a product with it."""
        found = stored(value)
        if found is None or found.chosen is not None:
            return None
        tensor = self._tensors[str(found.node.target)]
        if tensor.numel() != 1 or found.dims not in (0, 1) or not tensor.is_floating_point():
            return None
        other = found.dtype or tensor.dtype
        return str(found.node.target), torch.promote_types(dtype, other) if found.dims == 1 else dtype

    def _negate(self, node: fx.Node) -> Delta | None:
        value = self._values.get(node.args[0])  # type: ignore[arg-type]
        return value.scaled(-1) if isinstance(value, Delta) else None

    def _pad(self, node: fx.Node) -> Delta | None:
        """Pad with one zero behind the features."""
        value, widths, *number = node.args
        delta = self._values.get(value)  # type: ignore[arg-type]
        if not isinstance(delta, Delta) or delta.is_placed or number not in ([], [0], [0.0]):
            return None
        return replace(delta, padded=True) if list(widths) == [0, 1] and _has_features_last(delta) else None  # type: ignore[arg-type]

    def _place_features(self, node: fx.Node) -> Delta | None:
        """Gather padded features: each output feature of the site takes its own, or the zero."""
        value, dim, places = node.args
        delta = self._values.get(value)  # type: ignore[arg-type]
        named = isinstance(places, fx.Node) and places.op == "get_attr" and is_places(str(places.target))
        if not isinstance(delta, Delta) or not delta.padded or dim != -1 or not named:
            return None
        return replace(delta, padded=False).updated(lambda update: replace(update, places=str(places.target)))  # type: ignore[union-attr]

    def _add(self, node: fx.Node) -> Delta | Addition | None:
        """Add or subtract: ``left ± alpha · right``; in place only if nothing else sees ``left``."""
        left, right = node.args[:2]
        in_place = node.target in (aten.add_.Tensor, aten.sub_.Tensor)
        if in_place and (not isinstance(left, fx.Node) or len(left.users) > 1 or may_share(left)):
            return None
        alpha = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
        alpha = -alpha if node.target in (aten.sub.Tensor, aten.sub_.Tensor) else alpha
        mine, theirs = self._values.get(left), self._values.get(right)  # type: ignore[arg-type]
        if isinstance(theirs, Delta):
            return self._sum(left, theirs.scaled(alpha))
        return self._sum(right, mine) if isinstance(mine, Delta) and alpha == 1 else None

    def _sum(self, base: Any, delta: Delta) -> Delta | Addition | None:
        """Return the sum of a delta with another delta, or with any other value."""
        if delta.padded or not isinstance(base, fx.Node):
            return None
        other = self._values.get(base)
        if other is None:
            return Addition(base, delta)
        if other.padded or other.is_weight != delta.is_weight:
            return None
        dtype = torch.promote_types(other.dtype, delta.dtype)
        reshaped = other.reshaped or delta.reshaped
        return replace(other, terms=other.terms + delta.terms, dtype=dtype, reshaped=reshaped)

    def _same_features(self, node: fx.Node) -> Delta | None:
        """Return a delta after a cast, a copy, or a reshape that keeps the features together."""
        value = self._values.get(node.args[0]) if node.args else None  # type: ignore[arg-type]
        if not isinstance(value, Delta):
            return None
        dtype = cast_of(node)
        if dtype is not None:
            return replace(value, dtype=dtype)
        if node.target in COPIES and len(node.all_input_nodes) == 1:
            return value
        return replace(value, reshaped=True) if _has_features_last(value) and keeps_last_dim(node) else None


_LINEAR: Mapping[object, Callable[[Deltas, fx.Node], Delta | Addition | None]] = {
    aten.mul.Tensor: Deltas._scale,
    aten.mul.Scalar: Deltas._scale,
    aten.div.Tensor: Deltas._scale,
    aten.div.Scalar: Deltas._scale,
    aten.neg.default: Deltas._negate,
    aten.constant_pad_nd.default: Deltas._pad,
    aten.index_select.default: Deltas._place_features,
    aten.add.Tensor: Deltas._add,
    aten.add_.Tensor: Deltas._add,
    aten.sub.Tensor: Deltas._add,
    aten.sub_.Tensor: Deltas._add,
}
"""Operator → the method that computes its value from deltas."""


def _continues(term: Term, product: WeightOp, shape: torch.Size) -> bool:
    """Tell whether a product continues a term: it acts on each position by itself, as the term's own products do."""
    if term.op is None:
        return False
    if term.op == "embedding":
        return product.op == "linear"
    if term.op in CONVOLUTIONS:
        return product.op == term.op and product.groups == term.geometry[-1] and is_pointwise(product, shape)
    return (term.op, term.geometry) == (product.op, product.geometry)


def _has_features_last(delta: Delta) -> bool:
    """Tell whether the last dimension of a delta holds its features, and all others are positions."""
    return all(features_are_last(term.op, term.geometry) for term in delta.terms)


def features_are_last(op: Op | None, geometry: tuple[Any, ...]) -> bool:
    """Tell whether the last dimension of a product holds its features, and all others are positions."""
    return op in ("linear", "embedding") or geometry[:1] == ("grouped",)
