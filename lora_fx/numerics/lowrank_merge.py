"""Tensor arithmetic of low-rank adaptation (LoRA, arXiv 2106.09685); knows no graph.

y = W x + scaling · B A dropout(x)
W' = W + Σ scaling · B A

A is ``(rank, in)``, B is ``(out, rank)`` and W is ``(out, in)``, or a stack of such: of experts, of the groups of a
convolution with all places under its kernel as input features. A weight may be stored ``(in, out)``. For one part of a fused
projection B has a row for each feature of the part, and the rows of W of other features stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import nn

from lora_fx.numerics.update import Update
from lora_fx.numerics.weight_view import AS_STORED, SWAP, View
from lora_fx.rules.vocabulary import Layout


@dataclass(frozen=True)
class RowWrite:
    """Values that take the place of rows of a weight, as data.

    Attributes:
        rows: name of the tensor with the numbers of the rows.
        values: name of the tensor with a row for each of them.
    """

    rows: str
    values: str


@dataclass(frozen=True, repr=False)
class Merge:
    """What a fold does to one weight, as data.

    Attributes:
        weight: its name.
        names: of the result: all of the weight's, unless uses of it were untied.
        updates: the products to add to it.
        view: from the weight as it is stored to a matrix ``(out, in)``, or a stack of them.
        writes: values that take the place of rows of the weight as it is stored, before the products are added.
    """

    weight: str
    names: tuple[str, ...]
    updates: tuple[Update, ...]
    view: View = AS_STORED
    writes: tuple[RowWrite, ...] = ()

    def __repr__(self) -> str:
        done = [f"[{write.rows}] = {write.values}" for write in self.writes]
        done += [f"+= {' + '.join(map(repr, self.updates))}"] * bool(self.updates)
        return f"<Merge {' = '.join(self.names)} ({self.layout}) {', '.join(done)}>"

    @property
    def read(self) -> tuple[str, ...]:
        """Names of all tensors that it is made of, beside the weight."""
        written = (name for write in self.writes for name in (write.rows, write.values))
        return (*written, *(name for update in self.updates for name in update.names))

    def written(self, weight: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return a weight with the values of its rows, rounded to its dtype; itself where no row has any."""
        weight = weight.detach()
        for write in self.writes:
            values = rounded(tensors[write.values].detach(), weight.dtype).to(weight.device)
            weight = weight.index_copy(0, tensors[write.rows].to(weight.device), values)
        return weight

    @property
    def layout(self) -> Layout:
        """How each matrix of the weight is stored."""
        return "in_out" if SWAP in self.view.steps else "out_in"

    @property
    def is_dense(self) -> bool:
        """Whether an update is a computed matrix as large as the weight, as of LoHa and LoKr."""
        return any(len(update.factors) == 1 and update.factors[0].computed is not None for update in self.updates)

    def stack(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight as a stack of matrices in this layout; a view of it where there is one."""
        steps = tuple(step for step in self.view.steps if step != SWAP)
        return _stacked(View(steps).apply(weight.detach()))


@dataclass(frozen=True)
class Merged:
    """Figures of the merge of one weight, for a report.

    Attributes:
        elements: number of elements that the updates reach.
        unchanged: how many of these kept their value, since the update is less than half a step of the weight's dtype.
        update_norm: Frobenius norm of the sum of the updates.
        weight_norm: that of the weight before.
        others: how many elements of the weight are after it something else than the sum, so that the figures are of no fold.
    """

    elements: int = 0
    unchanged: int = 0
    update_norm: float = 0.0
    weight_norm: float = 0.0
    others: int = 0

    @property
    def relative(self) -> float:
        """Size of the update as a part of that of the weight."""
        return self.update_norm / self.weight_norm if self.weight_norm else math.inf


def merge_into(
    weight: torch.Tensor, merge: Merge, tensors: Mapping[str, torch.Tensor], out: torch.Tensor | None
) -> int:
    """Compute ``W + Σ scaling · B A``, rounded to the weight's dtype once; return how many elements are not finite.

    Products and sums are formed in float32 for float32 and bfloat16 weights, in float64 for all others, and wherever an update is
    more than a product of named tensors. An element to which exactly zero is added keeps its bits. Of products, only parts of a
    limited size are ever held in that precision.

    Args:
        weight: as it is stored.
        merge: the updates.
        tensors: the factors and all else that the updates name.
        out: where the result goes: a tensor like ``weight``, or that itself. None: nowhere, for the count alone.
    """
    source = merge.stack(merge.written(weight, tensors))
    result = None if out is None else merge.stack(out)
    dtype, bits = weight.dtype, BITS[weight.dtype]
    largest, negative_zero = torch.finfo(dtype).max / 2, torch.iinfo(bits).min
    non_finite = 0
    for index, rows, wide, delta in _block_sums(source, merge, tensors):
        old, place = source[index, rows], None if result is None else result[index, rows]
        wide += delta
        flat = wide.view(-1)
        finite = math.sqrt(torch.dot(flat, flat)) < largest  # no element is larger than the norm; false for a NaN
        # Adding zero changes the bits of -0.0 and of a NaN alone: as an integer, -0.0 is the least that there is.
        if finite and int(old.view(bits).amin()) != negative_zero:
            if place is not None:
                place.copy_(rounded(wide, dtype) if wide.dtype == torch.float64 else wide)
            continue
        new = torch.where(delta == 0, old, rounded(wide, dtype))
        if not finite:
            non_finite += int((~torch.isfinite(new)).count_nonzero())
        if place is not None:
            place.copy_(new)
    if out is not None and result is not None and result.data_ptr() != out.data_ptr():
        out.detach().copy_(result.view(out.shape))
    return non_finite


def surely_finite(weight: torch.Tensor, merge: Merge, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Tell whether norms alone exclude that a merge gives an infinity or a NaN; false says nothing.

    No element is larger than ``‖W‖ + Σ |scaling| ‖B‖ ‖A‖``, nor is any intermediate result where each of these is at least
    one. A NaN or an infinity in the weight or in a factor is one in its norm.

    Args:
        weight: see :func:`merge_into`.
        merge: see :func:`merge_into`.
        tensors: see :func:`merge_into`.
    """
    bound = _norm(weight) + sum(_norm(tensors[write.values]) for write in merge.writes)
    for update in merge.updates:
        if not update.is_plain:
            return False
        sizes = [_norm(tensors[factor.name]) for factor in update.factors]
        sizes += [abs(float(tensors[name])) for name in update.scales]
        # max(size, 1.0) is NaN for a NaN, max(1.0, size) is not
        bound += math.prod((max(size, 1.0) for size in sizes), start=max(abs(update.scaling), 1.0))
    return bound < torch.finfo(weight.dtype).max / 4


def _norm(tensor: torch.Tensor) -> float:
    if tensor.dtype not in BITS:  # torch has no norm of float8, and none is needed: an exact pass takes its place
        return math.inf
    # Half precision sums in float32 all the same; with dtype= torch would first copy the tensor, at 20 times the cost.
    return float(torch.linalg.vector_norm(tensor.detach()))


def measure(weight: torch.Tensor, merge: Merge, tensors: Mapping[str, torch.Tensor], merged: torch.Tensor) -> Merged:
    """Return the figures of a merge, of which the result is known.

    Args:
        weight: as it was before.
        merge: see :func:`merge_into`.
        tensors: see :func:`merge_into`.
        merged: the weight after it.
    """
    source, result, bits = merge.stack(merge.written(weight, tensors)), merge.stack(merged), BITS[weight.dtype]
    elements = unchanged = others = 0
    update_norms, weight_norms = [], []
    before = merge.stack(weight)
    for index, rows, wide, delta in _block_sums(source, merge, tensors):
        old, new = source[index, rows], result[index, rows]
        weight_norms.append(float(torch.linalg.vector_norm(wide)))
        wide += delta
        others += int((~_is_sum(new, old, wide, delta)).count_nonzero())
        if merge.writes:
            delta += old.to(delta.dtype) - before[index, rows]
        reached = delta != 0
        elements += int(reached.count_nonzero())
        unchanged += int(((before[index, rows].view(bits) == new.view(bits)) & reached).count_nonzero())
        update_norms.append(math.sqrt(delta.square_().sum()))
    return Merged(elements, unchanged, math.hypot(*update_norms), math.hypot(*weight_norms), others)


def _is_sum(new: torch.Tensor, old: torch.Tensor, wide: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Tell for each element of a result whether it is the sum of the old one and an update, as any device rounds it."""
    exact = torch.where(delta == 0, old, rounded(wide, old.dtype)) == new
    if bool(exact.all()) or old.dtype.itemsize == 2:
        return exact
    off = (new.to(wide.dtype) - wide).abs()
    eps = torch.finfo(wide.dtype).eps
    return exact | (off <= eps * (wide.abs() + 2.0**5 * delta.abs().amax()))


def _block_sums(
    source: torch.Tensor, merge: Merge, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[int, slice, torch.Tensor, torch.Tensor]]:
    """Yield, block by block, which matrix, which rows, the weight there in the precision of the sums, and the sum of the updates.

    Both tensors are the caller's until the next block, which has the same memory: new memory costs more than the arithmetic.
    """
    plain = all(update.is_plain for update in merge.updates)
    precision = torch.float32 if plain and source.dtype in (torch.float32, torch.bfloat16) else torch.float64
    known: dict[str, torch.Tensor] = {}
    products = [_Product.of(update, tensors, precision, known) for update in merge.updates]
    spaces: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by height: a matrix has blocks of two heights at most
    for index, rows in _blocks(source):
        old = source[index, rows]
        shape = tuple(old.shape)
        if shape[0] not in spaces:
            wide, delta = (torch.empty(shape, dtype=precision, device=old.device) for _ in range(2))
            spaces[shape[0]] = wide, delta
        wide, delta = spaces[shape[0]]
        if not products:
            delta.zero_()
        for number, product in enumerate(products):
            product.block(index, rows, merge.layout, wide if number else delta)
            if number:
                delta += wide
        wide.copy_(old)
        yield index, rows, wide, delta


def exact_blocks(
    weight: torch.Tensor, merge: Merge, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """Yield ``W + Σ scaling · B A`` in float64, block by block: of the stack of matrices, which one, which rows, and these.

    Args:
        weight: see :func:`merge_into`.
        merge: see :func:`merge_into`.
        tensors: see :func:`merge_into`.
    """
    known: dict[str, torch.Tensor] = {}
    products = [_Product.of(update, tensors, torch.float64, known) for update in merge.updates]
    source = merge.stack(merge.written(weight, tensors))
    for index, rows in _blocks(source):
        exact = source[index, rows].double()
        part, delta = torch.empty_like(exact), torch.zeros_like(exact)
        for product in products:
            product.block(index, rows, merge.layout, part)
            delta += part
        yield index, rows, exact + delta


BLOCK_ELEMENTS = 2**17
"""How many elements of a weight are merged at a time: few enough for all intermediate results to stay in the cache."""

DEVICE_BLOCK_ELEMENTS = 2**25
"""How many on any other device than the CPU, where each step has to be large; for bfloat16 weights they take 320 MiB."""


@dataclass(frozen=True)
class _Product:
    """``scaling · left · right``, a stack of ``(out, rank)`` and one of ``(rank, in)``; the left one may be missing.

    Then ``rows`` has a scale for each row of the right one, ``(matrices, out, 1)``, or is missing too.
    """

    left: torch.Tensor | None
    right: torch.Tensor
    scaling: float
    rows: torch.Tensor | None = None

    @staticmethod
    def of(
        update: Update, tensors: Mapping[str, torch.Tensor], precision: torch.dtype, known: dict[str, torch.Tensor]
    ) -> _Product:
        first, *rest = update.factors
        if not rest and update.places is None and not first.is_plain:  # as large as the weight: scaled block by block
            right = _stacked(replace(first, rows=()).stored(tensors, known))
            scales = first.row_scales(tensors, known, precision)
            rows = None if scales is None else scales.reshape(*right.shape[:-1], 1)
            return _Product(None, right, _scaling(update, tensors), rows)
        factors = [factor.value(tensors, known, precision) for factor in update.factors]
        right, *others = map(_stacked, factors)
        left = reduce(lambda product, factor: factor @ product, others) if others else None
        if update.places is not None:
            padded = nn.functional.pad(right if left is None else left, (0, 0, 0, 1))[:, tensors[update.places]]
            left, right = (None, padded) if left is None else (padded, right)
        scaling = _scaling(update, tensors)
        if left is not None and abs(math.frexp(scaling)[0]) == 0.5:  # a power of two is exact wherever it is multiplied
            left, scaling = left * scaling, 1.0
        return _Product(left, right, scaling)

    def block(self, index: int, rows: slice, layout: Layout, out: torch.Tensor) -> None:
        """Write some rows of one matrix of the product, as a weight of this layout has them."""
        right = self.right[index]
        if self.left is None:
            out.copy_(right[:, rows].T if layout == "in_out" else right[rows])
        elif layout == "in_out":
            out.copy_((self.left[index] @ right[:, rows]).T)
        else:
            torch.mm(self.left[index, rows], right, out=out)
        if self.rows is not None:
            scales = self.rows[index]
            out *= scales.T if layout == "in_out" else scales[rows]
        if self.scaling != 1:
            out *= self.scaling


def _scaling(update: Update, tensors: Mapping[str, torch.Tensor]) -> float:
    return math.prod((float(tensors[name]) for name in update.scales), start=update.scaling)


def _stacked(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.dim() == 3 else matrix[None]


def _blocks(stack: torch.Tensor) -> Iterator[tuple[int, slice]]:
    matrices, rows, columns = stack.shape
    elements = BLOCK_ELEMENTS if stack.device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    most = max(1, elements // max(1, columns))
    height = -(
        -rows // max(1, -(-rows // most))
    )  # of about equal ones: a product of a single row may be rounded otherwise
    for index in range(matrices if rows and columns else 0):
        for start in range(0, rows, height):
            yield index, slice(start, min(start + height, rows))


BITS: Mapping[torch.dtype, torch.dtype] = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
"""Integers of the size of each floating-point type, by which its bits are compared."""

FOLDABLE = frozenset(BITS)
"""Dtypes of the weights that can be merged into."""


def concatenated(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], matrices: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of one product that is the sum of several, of the sum of their ranks: ``[B₁ B₂] [A₁; A₂] = B₁ A₁ + B₂ A₂``.

    Args:
        pairs: A and B of each.
        matrices: how many a stack has, whose A are one below the other: then the ranks of each matrix are together in A.
    """
    a = torch.cat([a.unflatten(0, (matrices, -1)) for a, _ in pairs], dim=1).flatten(0, 1)
    return a, torch.cat([b for _, b in pairs], dim=1)


def with_all_rows(b: torch.Tensor, features: Iterable[int] | None, out_features: int) -> torch.Tensor:
    """Return B for all output features, with zeros for those that it does not write to; None: it writes to all."""
    if features is None:
        return b
    rows = b.new_zeros(out_features, *b.shape[1:])
    rows[list(features)] = b
    return rows


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in another dtype, each element rounded once, to the nearest, ties to even.

    Torch takes float64 to half precision by way of float32 and so rounds twice. Here that step rounds to odd, after which
    the second one rounds as if it were the only one (Boldo and Melquiond, IEEE Trans. Computers 57, 2008).
    """
    if exact.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return exact.to(dtype)
    single = exact.float()
    bits = single.view(torch.int32).clone()
    back = single.double()
    bits -= ((back.abs() > exact.abs()) & torch.isfinite(exact)).int()  # towards zero
    bits |= (back != exact).int()
    return bits.view(torch.float32).to(dtype)
