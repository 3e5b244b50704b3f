"""Tensor arithmetic of low-rank adaptation (LoRA, arXiv 2106.09685); knows no graph.

y = W x + scaling · B A dropout(x)
W' = W + Σ scaling · B A

A is ``(rank, in)``, B is ``(out, rank)`` and W is ``(out, in)``, or a stack of such: of experts, of the groups of a
convolution with all places under its kernel as input features. A weight may be stored ``(in, out)``. For one part of a fused
projection B has a row for each feature of the part, and the rows of W of other features stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import nn

from lora_fx.views import AS_STORED, SWAP, View
from lora_fx.vocabulary import Init, Layout, Op


@dataclass(frozen=True)
class Factor:
    """One matrix of a product.

    Attributes:
        name: of the tensor.
        view: from that to a matrix ``(out, in)``, or a stack of them.
    """

    name: str
    view: View = AS_STORED


@dataclass(frozen=True)
class Update:
    """One low-rank update ``scaling · … M₂ M₁``, of LoRA ``scaling · B A``, as data.

    Attributes:
        factors: in the order in which they are applied to ``x``: A, then B.
        scaling: factor of the product.
        scales: names of tensors with one element, which are factors of the product too.
        places: name of the tensor that has, for each output feature, the row of the product that is added to it, or the
            number of rows where none is; None where the product has a row for every feature.
    """

    factors: tuple[Factor, ...]
    scaling: float = 1.0
    scales: tuple[str, ...] = ()
    places: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors of which it is made."""
        places = () if self.places is None else (self.places,)
        return (*(factor.name for factor in self.factors), *self.scales, *places)


@dataclass(frozen=True)
class Merge:
    """What a fold does to one weight, as data.

    Attributes:
        weight: its name.
        names: those that the result has: all of the weight's, unless uses of it were un-tied.
        updates: what is added to it.
        view: from the weight as it is stored to a matrix ``(out, in)``, or a stack of them.
    """

    weight: str
    names: tuple[str, ...]
    updates: tuple[Update, ...]
    view: View = AS_STORED

    @property
    def layout(self) -> Layout:
        """How each matrix of the weight is stored."""
        return "in_out" if SWAP in self.view.steps else "out_in"

    def stack(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight as a stack of matrices in this layout; a view of it where there is one."""
        steps = tuple(step for step in self.view.steps if step != SWAP)
        return _stacked(View(steps).apply(weight.detach()))


@dataclass(frozen=True)
class Merged:
    """What a fold did to one weight.

    Attributes:
        elements: how many the updates reach.
        unchanged: how many of these kept their value, since the update is less than half a step of the weight's dtype.
        non_finite: how many are infinite or no number after it.
        update_norm: Frobenius norm of the sum of the updates.
        weight_norm: that of the weight before.
    """

    elements: int = 0
    unchanged: int = 0
    non_finite: int = 0
    update_norm: float = 0.0
    weight_norm: float = 0.0

    @property
    def relative(self) -> float:
        """Size of the update as a part of that of the weight."""
        return self.update_norm / self.weight_norm if self.weight_norm else math.inf

    def __add__(self, other: Merged) -> Merged:
        return Merged(
            self.elements + other.elements,
            self.unchanged + other.unchanged,
            self.non_finite + other.non_finite,
            math.hypot(self.update_norm, other.update_norm),
            math.hypot(self.weight_norm, other.weight_norm),
        )


def merge_into(
    weight: torch.Tensor, merge: Merge, tensors: Mapping[str, torch.Tensor], out: torch.Tensor | None
) -> Merged:
    """Compute ``W + Σ scaling · B A``, rounded to the weight's dtype once.

    Products and sums are formed in float32 for float32 and bfloat16 weights, in float64 for all others. An element to which
    exactly zero is added keeps its bits. Only parts of a limited size are ever held in that precision.

    Args:
        weight: as it is stored.
        merge: the updates.
        tensors: the factors and all else that the updates name.
        out: where the result goes: a tensor like ``weight``, or that itself. None: nowhere, for what there is to report.
    """
    precision = torch.float32 if weight.dtype in (torch.float32, torch.bfloat16) else torch.float64
    products = [_Product.of(update, tensors, precision) for update in merge.updates]
    source = merge.stack(weight)
    result = None if out is None else merge.stack(out)
    space = _Space.of(source, precision)
    total = Merged()
    for index, rows in _blocks(source):
        old = source[index, rows]
        delta, wide = space.delta[: len(old)], space.wide[: len(old)]
        for number, product in enumerate(products):
            product.block(index, rows, merge.layout, wide if number else delta)
            if number:
                delta += wide
        still = _zeros(delta, wide)
        wide.copy_(old)
        weight_norm = float(torch.linalg.vector_norm(wide))
        wide += delta
        new = rounded(wide, weight.dtype) if wide.dtype == torch.float64 else space.new[: len(old)].copy_(wide)
        if still:
            new = torch.where(delta == 0, old, new)
        total += _measured(old, delta, new, still, weight_norm, space.same)
        if result is not None:
            result[index, rows] = new
    if out is not None and result is not None and result.data_ptr() != out.data_ptr():
        out.detach().copy_(result.view(out.shape))
    return total


def exact_blocks(
    weight: torch.Tensor, merge: Merge, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """Yield ``W + Σ scaling · B A`` in float64, block by block: of the stack of matrices, which one, which rows, and these.

    Args:
        weight: see :func:`merge_into`.
        merge: see :func:`merge_into`.
        tensors: see :func:`merge_into`.
    """
    products = [_Product.of(update, tensors, torch.float64) for update in merge.updates]
    source = merge.stack(weight)
    for index, rows in _blocks(source):
        exact = source[index, rows].double()
        part, delta = torch.empty_like(exact), torch.zeros_like(exact)
        for product in products:
            product.block(index, rows, merge.layout, part)
            delta += part
        yield index, rows, exact + delta


BLOCK_ELEMENTS = 2**18
"""How many elements of a weight are merged at a time: what is computed from them stays in the cache."""


@dataclass(frozen=True)
class _Product:
    """``scaling · left · right``, a stack of ``(out, rank)`` and one of ``(rank, in)``; either may be missing."""

    left: torch.Tensor | None
    right: torch.Tensor
    scaling: float

    @staticmethod
    def of(update: Update, tensors: Mapping[str, torch.Tensor], precision: torch.dtype) -> _Product:
        factors = [factor.view.apply(tensors[factor.name].detach()).to(precision) for factor in update.factors]
        right, *others = map(_stacked, factors)
        left = reduce(lambda product, factor: factor @ product, others) if others else None
        if update.places is not None:
            padded = nn.functional.pad(right if left is None else left, (0, 0, 0, 1))[:, tensors[update.places]]
            left, right = (None, padded) if left is None else (padded, right)
        scaling = math.prod((float(tensors[name]) for name in update.scales), start=update.scaling)
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
        if self.scaling != 1:
            out *= self.scaling


@dataclass(frozen=True)
class _Space:
    """Memory for what is computed of one block, used again for the next one: new memory costs more than the arithmetic.

    Attributes:
        delta: for the sum of the updates.
        wide: for the weight in the same precision, and for what else is of that size.
        new: for the result.
        same: one integer of the weight's size for each element, in whole words of eight bytes.
    """

    delta: torch.Tensor
    wide: torch.Tensor
    new: torch.Tensor
    same: torch.Tensor

    @staticmethod
    def of(stack: torch.Tensor, precision: torch.dtype) -> _Space:
        _, rows, columns = stack.shape
        shape = (min(rows, _height(columns)), columns)
        delta, wide = (torch.empty(shape, dtype=precision, device=stack.device) for _ in range(2))
        new = torch.empty(shape, dtype=stack.dtype, device=stack.device)
        lanes = 8 // stack.element_size()
        size = -(-math.prod(shape) // lanes) * lanes
        return _Space(delta, wide, new, torch.empty(size, dtype=_BITS[stack.dtype], device=stack.device))


def _stacked(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.dim() == 3 else matrix[None]


def _blocks(stack: torch.Tensor) -> Iterator[tuple[int, slice]]:
    matrices, rows, columns = stack.shape
    height = _height(columns)
    for index in range(matrices):
        for start in range(0, rows, height):
            yield index, slice(start, start + height)


def _height(columns: int) -> int:
    return max(1, BLOCK_ELEMENTS // max(1, columns))


def _zeros(delta: torch.Tensor, wide: torch.Tensor) -> int:
    """Return how many elements are zero; ``wide`` is memory to use. Mostly none is, which is told faster than a number."""
    some = torch.eq(delta, 0, out=wide).sum()
    return int((delta == 0).count_nonzero()) if some else 0


def _measured(
    old: torch.Tensor, delta: torch.Tensor, new: torch.Tensor, still: int, weight_norm: float, same: torch.Tensor
) -> Merged:
    """Return what to report; ``still`` elements have no update, and are the same bits before and after."""
    update_norm = float(torch.linalg.vector_norm(delta))
    # No element is larger than its norm. Only where that does not tell, and then the sum does not, each is looked at.
    small = weight_norm + update_norm < torch.finfo(new.dtype).max / 2
    finite = small or bool(torch.isfinite(new.sum(dtype=delta.dtype)))
    return Merged(
        elements=old.numel() - still,
        unchanged=_same_bits(old, new, same) - still,
        non_finite=0 if finite else int((~torch.isfinite(new)).count_nonzero()),
        update_norm=update_norm,
        weight_norm=weight_norm,
    )


def _same_bits(old: torch.Tensor, new: torch.Tensor, same: torch.Tensor) -> int:
    """Return how many elements have equal bits; ``same`` is memory to use.

    Ones and zeros of the weight's size are added up as words of eight bytes, each of which counts in several lanes at once:
    several times as fast as ``count_nonzero``.
    """
    bits = _BITS[new.dtype]
    count = new.numel()
    torch.eq(new.view(bits), old.view(bits), out=same[:count].view(new.shape))
    lanes = 8 // bits.itemsize
    words = -(-count // lanes)
    same[count : words * lanes] = 0
    sums = [int(part.sum()) for part in same[: words * lanes].view(torch.int64).split(_WORDS)]
    width = 8 * bits.itemsize
    return sum(word >> (lane * width) & ((1 << width) - 1) for word in sums for lane in range(lanes))


_WORDS = 2**15
"""How many words are added up at a time, so that no lane flows over."""

_BITS: Mapping[torch.dtype, torch.dtype] = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}

FOLDABLE = frozenset(_BITS)
"""Dtypes of the weights that can be merged into."""


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


def initial_factors(
    shapes: tuple[Sequence[int], Sequence[int]],
    rank: int,
    like: torch.Tensor,
    *,
    computed: torch.dtype | None = None,
    op: Op = "linear",
    init: Init = "kaiming",
) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A and B of a new branch, one random and one zero, so that the branch starts as zero.

    They are drawn on the CPU from torch's global generator, in the order of draws that PEFT has (each factor is first
    initialised as its layer is, then once more), and rounded as PEFT rounds them, so that equal seeds give equal factors.

    Args:
        shapes: of A and of B.
        rank: of the update.
        like: the weight that the branch goes beside: gives the device and the dtype.
        computed: the dtype in which the site multiplies, if that is not the weight's. Factors are float32 beside half precision.
        op: of the site. Beside an embedding A is zero and B is normal, else B is zero.
        init: of A otherwise: Kaiming-uniform with ``a = √5``, or normal with a standard deviation of ``1 / rank``.
    """
    a, b = (torch.empty(*shape) for shape in shapes)
    if op == "embedding":
        for factor in (a, b, b):
            nn.init.normal_(factor)
        a.zero_()
    else:
        for factor in (a, b, a) if init == "kaiming" else (a, b):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        if init == "gaussian":
            nn.init.normal_(a, std=1 / rank)
        b.zero_()
    dtype = adapter_dtype(computed or like.dtype)
    a, b = (factor.to(like.device, like.dtype).to(dtype) for factor in (a, b))
    return nn.Parameter(a), nn.Parameter(b)


def adapter_dtype(computed: torch.dtype) -> torch.dtype:
    """Return the dtype of the factors beside a site that computes in a dtype: float32 for half precision, else that."""
    return torch.float32 if computed in (torch.float16, torch.bfloat16) else computed
