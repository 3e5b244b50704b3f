"""Affine values: what an unfinished branch computes, from the input of a site and constant factors.

    Delta     Σ scaling · … M₂ M₁ x + Σ c      products with weights, scalings by constants and of features by a vector of them, casts,
                                              reshapes that keep features together, sums of deltas and with constant vectors,
                                              and features put in their places among zeros

A product of factors alone is a delta too, of a weight. So is the output of a site that a factor scales: a product with the site's
own weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lora_fx.branches.dataflow import COPIES, is_read_once, keeps_last_dim
from lora_fx.branches.delta import Addition, Delta, SiteOutput, Term, summed
from lora_fx.graph.adapter_names import is_places
from lora_fx.numerics.constant import Constant
from lora_fx.numerics.update import Factor, Update
from lora_fx.numerics.weight_view import SWAP, Step, View
from lora_fx.rules.vocabulary import Op
from lora_fx.sites.call_sites import biased, is_site
from lora_fx.sites.stored_weight import Stored, cast_of, has_written_rows, is_transparent, stored, written_rows
from lora_fx.sites.weight_ops import CONVOLUTIONS, WeightOp, is_pointwise, weight_op

aten = torch.ops.aten


class Deltas:
    """The deltas and factors among the nodes of a graph that have been visited.

    Args:
        tensors: of the graph, by name.
        computed: the computed ones of these.
        weights: the ``get_attr`` nodes of weights that are computed.
        passed: returns the input that a node returns in evaluation, if it is such a node.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        computed: Mapping[str, Constant] | None = None,
        weights: Mapping[fx.Node, Constant] | None = None,
        passed: Callable[[fx.Node], fx.Node | None] = lambda _: None,
    ) -> None:
        self._tensors, self._computed, self._weights, self._passed = tensors, computed or {}, weights or {}, passed
        self._factors: set[fx.Node] = set()
        self._values: dict[fx.Node, Delta] = {}
        self._outputs: dict[fx.Node, Delta] = {}

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
        if written_rows(node) is not None:
            return False  # a weight, of which some rows are others
        return any(source in self._factors or source in self._values for source in inputs)

    def finish(self, node: fx.Node, value: Delta) -> None:
        """Take a node for the output of a site, with all that its branches add to it."""
        self._values.pop(node, None)
        self._outputs[node] = value

    def unfinished_outputs(self, node: fx.Node) -> dict[fx.Node, Delta]:
        """Return the outputs of sites, changed by factors, that a node reads."""
        values = {source: self._values.get(source) for source in node.all_input_nodes}
        return {source: value for source, value in values.items() if value is not None and value.output is not None}

    def last_change(self, node: fx.Node) -> tuple[fx.Node, Delta]:
        """Return the last node up to a delta that a factor takes part in, cast back; scales of the model behind it are no deltas any more."""
        chain = [node]
        while chain[-1].target in _OWN_SCALES or cast_of(chain[-1]) is not None:
            sources = [each for each in chain[-1].all_input_nodes if each in self._values]
            factors = any(each in self._factors for each in chain[-1].all_input_nodes)
            if factors or len(sources) != 1 or len(sources[0].users) > 1:
                break
            chain.append(sources[0])
        values = [self._values[each] for each in chain]
        while len(chain) > 1 and values[-1].output is not None and values[-1].dtype != values[-1].output.dtype:
            if cast_of(chain[-2]) is None:
                break
            chain.pop(), values.pop()
        for each in chain[:-1]:
            self._values.pop(each)
        return chain[-1], values[-1]

    def output_of(self, node: fx.Node) -> Delta | None:
        """Return the output of a site, with its bias or without, as a product with its own weight; None for other values."""
        if node in self._outputs:
            return self._outputs[node]
        passed, product = self._passed(node), weight_op(node)
        if passed is not None:
            return self.output_of(passed)
        if product is not None:
            return (
                self._site_output(node, product) if is_site(product) and product.weight not in self._factors else None
            )
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None
        dtype = cast_of(node)
        if dtype is None and not keeps_last_dim(node) and node.target not in COPIES:
            return self._with_vector(node)
        value = self.output_of(source)
        if value is None or value.output is None:
            return None
        dtype, output = dtype or value.dtype, value.output
        if output.base is source:
            output = replace(output, nodes=(*output.nodes, node), dtype=dtype)
        return replace(value, dtype=dtype, output=output)

    def total(self, site: fx.Node) -> fx.Node | None:
        """Return the sum of a site's output with the bias of the model behind it."""
        node = biased(site)
        return None if node is None or any(each in self._factors for each in node.all_input_nodes) else node

    def _site_output(self, node: fx.Node, product: WeightOp) -> Delta | None:
        name = str(product.weight.target)
        if product.op == "expert" or has_written_rows(node, product.weight):
            return None
        constant = self._weights.get(product.weight)
        factor = Factor(name if constant is None else constant.digest, product.view, constant)
        tensor = self._tensors[name]
        kernel = tuple(tensor.shape[2:]) if product.op in CONVOLUTIONS else ()
        term = Term(product.input, product.op, product.geometry, kernel, node, Update((factor,)))
        dtype = product.dtype or tensor.dtype
        made = Delta((term,), dtype, output=SiteOutput(node, (node,), dtype))
        if product.addend is None:
            return made
        offset = self._offset(product.addend, made, stands_alone=True)
        return None if offset is None else replace(made, offsets=(offset,))

    def _with_vector(self, node: fx.Node) -> Delta | None:
        """Return the output of a site plus or minus a constant vector over its features."""
        if node.target not in (aten.add.Tensor, aten.sub.Tensor) or node.kwargs:
            return None
        left, right = node.args[:2]
        sign = -1.0 if node.target is aten.sub.Tensor else 1.0
        for source, vector, of_source, of_vector in ((left, right, 1.0, sign), (right, left, sign, 1.0)):
            value = self.output_of(source) if isinstance(source, fx.Node) else None
            offset = None if value is None else self._offset(vector, value)
            if value is not None and value.output is not None and offset is not None:
                offset = replace(offset, scaling=of_vector)
                made, output = value.scaled(of_source), value.output
                if self.total(output.site) is node:
                    output = replace(output, nodes=(*output.nodes, node), dtype=self._sum_dtype(vector, value.dtype))
                return replace(
                    made,
                    offsets=summed((*made.offsets, offset)),
                    output=output,
                    dtype=self._sum_dtype(vector, value.dtype),
                )
        return None

    def _sum_dtype(self, vector: Any, dtype: torch.dtype) -> torch.dtype:
        found = stored(vector)
        assert found is not None
        return torch.promote_types(dtype, found.dtype or self._tensors[str(found.node.target)].dtype)

    def _offset(self, value: Any, beside: Delta, *, stands_alone: bool = False) -> Update | None:
        """Return a constant vector over the features of a delta as a matrix of one column; None for other values."""
        factor = self._vector(value, beside, stands_alone=stands_alone)
        return None if factor is None else Update((replace(factor, view=COLUMN),))

    def _vector(self, value: Any, beside: Delta, *, stands_alone: bool = False) -> Factor | None:
        """Return a constant with one element for each feature of a delta, in the place where a sum or product takes it for that.

        Args:
            value: an argument of a node.
            beside: the delta that is the other argument.
            stands_alone: whether the operator takes it as a vector, wherever the features are.
        """
        found = stored(value)
        if found is None or found.chosen is not None or beside.is_placed:
            return None
        name, term = str(found.node.target), beside.terms[0]
        tensor = self._tensors[name]
        shape = found.view.shape_of(tensor.shape)
        features = self._height(term.update)
        behind = 0 if stands_alone else len(term.kernel)
        fits = len(shape) > behind and shape[len(shape) - 1 - behind] == features == shape.numel()
        known = term.op in CONVOLUTIONS or features_are_last(term.op, term.geometry)
        if not (fits and known and term.op != "expert" and tensor.is_floating_point()):
            return None
        return Factor(name, VECTOR, self._computed.get(name))

    def _height(self, update: Update) -> int:
        """Return the number of features of an update."""
        last = update.factors[-1]
        shape = last.view.shape_of(self._tensors[last.name].shape)
        return shape[:-1].numel()

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
        delta, factor = self._values.get(product.input), Factor(name, product.view, self._computed.get(name))
        if isinstance(delta, Delta):
            if (
                delta.output is not None
                or delta.is_placed
                or not all(_continues(term, product, tensor.shape) for term in delta.terms)
            ):
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
        if product.addend is None:
            return made
        offset = self._offset(product.addend, made, stands_alone=product.op in CONVOLUTIONS)
        return self._sum(product.addend, made) if offset is None else replace(made, offsets=(*made.offsets, offset))

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
        if value is None:
            return self._scaled_output(node)
        if isinstance(other, bool) or not isinstance(other, int | float):
            return self._scaled(value, other) if node.target in (aten.mul.Tensor, aten.mul.Scalar) else None
        if node.target in (aten.div.Tensor, aten.div.Scalar):
            return value.scaled(1 / other) if delta is left and other != 0 else None
        return value.scaled(other)

    def _scaled_output(self, node: fx.Node) -> Delta | None:
        """Scale the output of a site by a factor."""
        left, right = node.args[:2]
        output, other = (right, left) if left in self._factors else (left, right)
        value = self.output_of(output) if isinstance(output, fx.Node) and other in self._factors else None
        return None if value is None or node.target is not aten.mul.Tensor else self._scaled(value, other)

    def _scaled(self, value: Delta, other: Any) -> Delta | None:
        """Scale by a constant of one element, or the features by a vector."""
        scale = self._one_element_constant(other, value.dtype)
        if scale is not None:
            name, dtype = scale
            return replace(value.updated(lambda update: replace(update, scales=(*update.scales, name))), dtype=dtype)
        vector = self._vector(other, value)
        if vector is None or value.is_weight:
            return None
        return replace(value.scaled_by_rows(vector), dtype=self._sum_dtype(other, value.dtype))

    def _one_element_constant(self, value: Any, dtype: torch.dtype) -> tuple[str, torch.dtype] | None:
        """Return the name of a tensor with one element and at most one dimension, and the dtype of a product with it."""
        found = stored(value)
        if found is None or found.chosen is not None or str(found.node.target) in self._computed:
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
        if in_place and not (isinstance(left, fx.Node) and is_read_once(left)):
            return None
        alpha = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
        alpha = -alpha if node.target in (aten.sub.Tensor, aten.sub_.Tensor) else alpha
        mine, theirs = self._values.get(left), self._values.get(right)  # type: ignore[arg-type]
        if isinstance(theirs, Delta):
            made = self._sum(left, theirs.scaled(alpha))
        elif isinstance(mine, Delta):
            made = self._sum(right, mine) if alpha == 1 else self._shifted(mine, right, alpha)
        else:
            return self._with_vector(node)
        if not in_place or made is None:
            return made
        if isinstance(made, Addition):
            return replace(made, written=left)  # type: ignore[arg-type]
        return replace(made, dtype=mine.dtype) if mine is not None else None

    def _sum(self, base: Any, delta: Delta) -> Delta | Addition | None:
        """Return the sum of a delta with another delta, or with any other value."""
        if delta.padded or not isinstance(base, fx.Node):
            return None
        other = self._values.get(base)
        if other is None:
            shifted = None if delta.is_weight else self._shifted(delta, base, 1.0)
            return Addition(base, delta) if shifted is None else shifted
        if other.padded or other.is_weight != delta.is_weight:
            return None
        outputs = [each.output.site for each in (other, delta) if each.output is not None]
        return other.plus(delta) if len(set(outputs)) < 2 else None

    def _shifted(self, delta: Delta, vector: Any, factor: float) -> Delta | None:
        """Return a delta plus a multiple of a constant vector over its features; None for other values."""
        offset = self._offset(vector, delta)
        if offset is None:
            return None
        offsets = summed((*delta.offsets, replace(offset, scaling=factor)))
        return replace(delta, offsets=offsets, dtype=self._sum_dtype(vector, delta.dtype))

    def _same_features(self, node: fx.Node) -> Delta | None:
        """Return a delta after a cast, a copy, or a reshape that keeps the features together."""
        source = node.args[0] if node.args else None
        value = self._values.get(source) if isinstance(source, fx.Node) else None
        if value is None:
            return None
        dtype = cast_of(node)
        if dtype is not None:
            return replace(value, dtype=dtype)
        if node.target in COPIES and len(node.all_input_nodes) == 1:
            return value
        moves = value.output is None and _has_features_last(value) and keeps_last_dim(node)
        return replace(value, reshaped=True) if moves else None


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


_OWN_SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default)

VECTOR, COLUMN = View((Step("reshape", (-1,)),)), View((Step("reshape", (-1, 1)),))
"""Views of a tensor that is a vector among dimensions of size one."""


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
