"""Products of an input with a named weight, read and written: the only file that knows how a linear looks in ATen.

Each is brought to one form: a matrix ``(out, in)``, or a stack of such, that acts on the features of the input. Of a
convolution the features are the channels at the places under its kernel, and a stack has a matrix for each group; of an
embedding they are the rows of its table; a stack of experts has a matrix for each, and an index picks among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from lora_fx.graph.aten_kinds import arguments_of
from lora_fx.numerics.weight_view import SWAP, Step, View
from lora_fx.rules.vocabulary import Layout, Op
from lora_fx.sites.stored_weight import Stored, is_transparent, stored
from lora_fx.torch_internals import OpOverload

aten = torch.ops.aten


@dataclass(frozen=True)
class WeightOp:
    """What a node computes: ``addend + alpha · weight · input``.

    Attributes:
        op: the kind of product.
        input: the node that it reads.
        weight: the ``get_attr`` of its weight.
        view: from the weight as it is stored to a matrix ``(out, in)``, or a stack of them.
        dtype: the dtype to which the weight is cast first, or None.
        geometry: the rest of what decides which features belong together: stride, padding, dilation and groups of a convolution;
            of experts, how one is chosen, and by which node.
        addend: the bias or other value that the operator adds.
        alpha: a constant factor.
    """

    op: Op
    input: fx.Node
    weight: fx.Node
    view: View
    dtype: torch.dtype | None = None
    geometry: tuple[Any, ...] = ()
    addend: fx.Node | None = None
    alpha: float = 1.0

    @property
    def layout(self) -> Layout | None:
        """Layout of the weight as it is stored; None if more than a transpose lies between it and the operator."""
        if self.op in CONVOLUTIONS:
            return "out_in" if len(self.view.steps) == 1 else None
        return {(): "out_in", (SWAP,): "in_out"}.get(self.view.steps)  # type: ignore[return-value]

    @property
    def groups(self) -> int:
        """Number of groups of a convolution; 1 for every other operator."""
        return int(self.geometry[-1]) if self.op in CONVOLUTIONS else 1

    @property
    def feature_dim(self) -> int:
        """The dimension of the node's value that holds the output features."""
        if self.op in CONVOLUTIONS:
            return 1
        return -2 if self.geometry[:1] == ("left",) else -1


CONVOLUTIONS: tuple[Op, ...] = ("conv1d", "conv2d", "conv3d")


def weight_op(node: fx.Node) -> WeightOp | None:
    """Return ``node`` as a product of an input with a named weight; None if it is none."""
    read = _READ.get(node.target.name()) if isinstance(node.target, OpOverload) else None
    return read(node) if read is not None else None


def is_pointwise(product: WeightOp, shape: torch.Size) -> bool:
    """Tell whether a product with a weight of this shape maps each position by itself."""
    if product.op not in CONVOLUTIONS:
        return True
    stride, padding, *_ = product.geometry
    return set(shape[2:]) == {1} and set(stride) == {1} and (isinstance(padding, str) or set(padding) == {0})


def readers(weight: fx.Node) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """Yield the nodes that read a weight, through transposes, casts and choices of experts, with the nodes in between."""
    for user in weight.users:
        if is_transparent(user):
            for reader, between in readers(user):
                yield reader, (user, *between)
        else:
            yield user, ()


Emit = Callable[..., fx.Node]
"""Appends a node to a graph, given its part in the branch, the operator, and its arguments."""


def low_rank(
    site: fx.Node, value: fx.Node, a: fx.Node, b: fx.Node, rank: int, emit: Emit, bias: fx.Node | None = None
) -> fx.Node:
    """Write ``B(A(value))`` beside a site, in the operators of the site, and return its node.

    Args:
        site: the site's node.
        value: the input of the branch.
        a: ``(rank, in)``; with the kernel of a convolution; for experts ``(experts · rank, in)``.
        b: ``(out, rank)``; ``(out, rank, 1, …)``; for experts ``(out, rank · experts)``, as PEFT stores them.
        rank: the rank of each matrix.
        emit: appends the nodes.
        bias: of B, ``(out,)``, at a linear or a convolution.
    """
    product = weight_op(site)
    assert product is not None
    if product.op == "linear":
        more = () if bias is None else (bias,)
        return emit("B", aten.linear.default, emit("A", aten.linear.default, value, a), b, *more)
    if product.op == "embedding":
        found = emit("A", aten.embedding.default, emit("A", aten.t.default, a), value, *site.args[2:])
        return emit("B", aten.matmul.default, found, emit("B", aten.t.default, b))
    if product.op in CONVOLUTIONS:
        *sizes, groups = (list(each) if isinstance(each, tuple) else each for each in product.geometry)
        none, ones = [0] * len(sizes[0]), [1] * len(sizes[0])
        reduced = emit("A", site.target, value, a, None, *sizes, groups)
        return emit("B", _POINTWISE[product.op], reduced, b, bias, ones, none, ones, groups)
    experts = product.weight.meta["val"].shape[0]
    down = emit("A", aten.reshape.default, a, [experts, rank, -1])
    up = emit("B", aten.permute.default, emit("B", aten.reshape.default, b, [-1, rank, experts]), [2, 0, 1])
    return _by_expert(site, product, _by_expert(site, product, value, down, "A", emit), up, "B", emit)


def _by_expert(site: fx.Node, product: WeightOp, value: fx.Node, stack: fx.Node, part: str, emit: Emit) -> fx.Node:
    """Multiply by a stack of ``(out, in)`` as the site multiplies by its own."""
    how, chosen = product.geometry
    if how == "grouped":
        return emit(part, site.target, value, emit(part, aten.transpose.int, stack, -2, -1), chosen)
    if chosen is not None:
        stack = emit(part, aten.index.Tensor, stack, [chosen])
    multiply = aten.matmul.default if site.target is aten.matmul.default else aten.bmm.default  # matmul broadcasts
    if how == "left":
        return emit(part, multiply, stack, value)
    return emit(part, multiply, value, emit(part, aten.transpose.int, stack, -2, -1))


_POINTWISE: Mapping[Op, Any] = {
    "conv1d": aten.conv1d.default,
    "conv2d": aten.conv2d.default,
    "conv3d": aten.conv3d.default,
}


# Reading.


def _make_op(op: Op, value: Any, weight: Stored | None, dims: int, **more: Any) -> WeightOp | None:
    if weight is None or not isinstance(value, fx.Node) or weight.dims != dims:
        return None
    return WeightOp(op, value, weight.node, weight.view, weight.dtype, **more)


def _whole_tensor(value: Any, *, swapped: bool = False) -> Stored | None:
    """Return the named tensor that is the whole of ``value``, on request with its last two dimensions exchanged."""
    found = stored(value)
    if found is None or found.chosen is not None:
        return None
    return found.swapped if swapped else found


def _linear(node: fx.Node) -> WeightOp | None:
    given = arguments_of(node)
    return _make_op("linear", given["input"], _whole_tensor(given["weight"]), 2, addend=given["bias"])


def _addmm(node: fx.Node) -> WeightOp | None:
    given = arguments_of(node)
    if given["beta"] != 1 or not isinstance(given["alpha"], int | float):
        return None
    more = {"addend": given["self"], "alpha": given["alpha"]}
    return _make_op("linear", given["mat1"], _whole_tensor(given["mat2"], swapped=True), 2, **more)


def _baddbmm(node: fx.Node) -> WeightOp | None:
    given = arguments_of(node)
    if given["beta"] != 1 or not isinstance(given["alpha"], int | float):
        return None
    more = {"addend": given["self"], "alpha": given["alpha"], "geometry": ("right", None)}
    return _make_op("expert", given["batch1"], _whole_tensor(given["batch2"], swapped=True), 3, **more)


def _matmul(node: fx.Node) -> WeightOp | None:
    value, weight = node.args[:2]
    return _make_op("linear", value, _whole_tensor(weight, swapped=True), 2) or _batched(node)


def _batched(node: fx.Node) -> WeightOp | None:
    left, right = node.args[:2]
    stack = stored(right)
    if stack is not None:
        return _make_op("expert", left, stack.swapped, 3, geometry=("right", stack.chosen))
    stack = stored(left)
    if stack is None or stack.chosen is None:
        return None
    return _make_op("expert", right, stack, 3, geometry=("left", stack.chosen))


def _grouped(node: fx.Node) -> WeightOp | None:
    given = arguments_of(node)
    value, weight, offsets, *others = given.values()
    if not isinstance(offsets, fx.Node) or any(other is not None for other in others):
        return None
    return _make_op("expert", value, _whole_tensor(weight, swapped=True), 3, geometry=("grouped", offsets))


def _convolution(op: Op) -> Callable[[fx.Node], WeightOp | None]:
    dims = int(op[4])

    def read(node: fx.Node) -> WeightOp | None:
        given = arguments_of(node)
        sizes = tuple(_per_dimension(given[name], dims) for name in ("stride", "padding", "dilation"))
        more = {"geometry": (*sizes, given["groups"]), "addend": given["bias"]}
        found = _make_op(op, given["input"], _whole_tensor(given["weight"]), dims + 2, **more)
        return None if found is None else replace(found, view=found.view.then(Step("stack", (given["groups"],))))

    return read


def _per_dimension(value: Any, dims: int) -> Any:
    """Return a setting of a convolution with one size for each dimension; padding may be a word such as "same"."""
    values = (value,) if isinstance(value, int) else value
    return values if isinstance(values, str) else tuple(values) * (dims if len(values) == 1 else 1)


def _embedding(node: fx.Node) -> WeightOp | None:
    weight, index = node.args[:2]
    return _make_op("embedding", index, _whole_tensor(weight, swapped=True), 2)


# By name: operators of other libraries do not exist before those are imported.
_READ: Mapping[str, Callable[[fx.Node], WeightOp | None]] = {
    "aten::linear": _linear,
    "aten::addmm": _addmm,
    "aten::mm": _matmul,
    "aten::matmul": _matmul,
    "aten::bmm": _batched,
    "aten::baddbmm": _baddbmm,
    "aten::_grouped_mm": _grouped,
    "transformers::grouped_mm_fallback": _grouped,
    "aten::conv1d": _convolution("conv1d"),
    "aten::conv1d.padding": _convolution("conv1d"),
    "aten::conv2d": _convolution("conv2d"),
    "aten::conv2d.padding": _convolution("conv2d"),
    "aten::conv3d": _convolution("conv3d"),
    "aten::conv3d.padding": _convolution("conv3d"),
    "aten::embedding": _embedding,
}
