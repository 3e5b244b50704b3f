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

from lora_fx.numerics.weight_view import AS_STORED, SWAP, View
from lora_fx.rules.vocabulary import Init, Layout, Op


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
    largest = torch.finfo(weight.dtype).max / 2
    spaces: dict[int, _Space] = {}
    still = same = non_finite = 0  # elements without an update, with the same bits before and after, and no numbers
    update_norms, weight_norms = [], []
    for index, rows in _blocks(source):
        old, height = source[index, rows], rows.stop - rows.start
        space = spaces.get(height) or spaces.setdefault(height, _Space.of(old, precision))
        delta, wide, new = space.delta, space.wide, space.new
        for number, product in enumerate(products):
            product.block(index, rows, merge.layout, wide if number else delta)
            if number:
                delta += wide
        zeros, update_norm = space.zeros_and_norm()
        wide.copy_(old)
        weight_norm = float(torch.linalg.vector_norm(wide))
        wide += delta
        place = None if result is None else result[index, rows]
        if place is not None and place.data_ptr() != old.data_ptr():
            new = place
        new.copy_(rounded(wide, weight.dtype) if precision == torch.float64 else wide)
        if zeros:
            torch.where(delta == 0, old, new, out=new)
        still += zeros
        same += space.same_bits(old, new)
        if not update_norm + weight_norm < largest:  # no element is larger than its norm
            non_finite += _non_finite(new, precision)
        update_norms.append(update_norm)
        weight_norms.append(weight_norm)
        if place is not None and new is not place:
            place.copy_(new)
    if out is not None and result is not None and result.data_ptr() != out.data_ptr():
        out.detach().copy_(result.view(out.shape))
    elements, norms = source.numel() - still, (math.hypot(*update_norms), math.hypot(*weight_norms))
    return Merged(elements, same - still, non_finite, *norms)


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


BLOCK_ELEMENTS = 2**17
"""How many elements of a weight are merged at a time: what is computed from them stays in the cache."""

DEVICE_BLOCK_ELEMENTS = 2**25
"""How many on any other device than the CPU, where each step has to be large; for bfloat16 weights they take 320 MiB."""


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
        if self.scaling != 1:
            out *= self.scaling


@dataclass(frozen=True)
class _Space:
    """Memory for what is computed of one block, used again for the next one: new memory costs more than the arithmetic.

    It is to stay in the cache, and so no larger than needed: what is compared in the end takes the place of ``wide``.

    Attributes:
        delta: for the sum of the updates.
        wide: for the weight in the same precision, and for what else is of that size.
        wide_bits: that as integers.
        new: for the result, where it must not be in its place yet.
        same: one integer of the weight's size for each element.
        rest: some more, which are to be zero.
        words: both as words of eight bytes, in rows in which no lane flows over when they are added up.
    """

    delta: torch.Tensor
    wide: torch.Tensor
    wide_bits: torch.Tensor
    new: torch.Tensor
    same: torch.Tensor
    rest: torch.Tensor
    words: torch.Tensor

    @staticmethod
    def of(block: torch.Tensor, precision: torch.dtype) -> _Space:
        lanes, count = 8 // block.element_size(), block.numel()
        rows = -(-count // (lanes * _WORDS))
        size = -(-count // (lanes * rows)) * lanes * rows
        memory = torch.empty(size, dtype=precision, device=block.device)
        wide, integers = memory[:count].view(block.shape), memory.view(_BITS[block.dtype])[:size]
        return _Space(
            delta=torch.empty_like(wide),
            wide=wide,
            wide_bits=wide.view(_BITS[precision]),
            new=torch.empty(block.shape, dtype=block.dtype, device=block.device),
            same=integers[:count].view(block.shape),
            rest=integers[count:],
            words=integers.view(torch.int64).view(rows, -1),
        )

    def zeros_and_norm(self) -> tuple[int, float]:
        """Return how many elements of the sum of the updates are zero, and its norm."""
        squares = torch.mul(self.delta, self.delta, out=self.wide)
        some = int(self.wide_bits.amin()) <= 0  # or only their squares are: mostly none is
        return int((self.delta == 0).count_nonzero()) if some else 0, math.sqrt(squares.sum())

    def same_bits(self, old: torch.Tensor, new: torch.Tensor) -> int:
        """Return how many elements have equal bits.

        Ones and zeros of the weight's size are added up as words of eight bytes, each of which counts in several lanes at once:
        several times as fast as ``count_nonzero``.
        """
        bits = self.same.dtype
        torch.eq(new.view(bits), old.view(bits), out=self.same)
        self.rest.zero_()
        width = 8 * bits.itemsize
        sums = self.words.sum(1).tolist()
        return sum(word >> lane & ((1 << width) - 1) for word in sums for lane in range(0, 64, width))


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


def _non_finite(values: torch.Tensor, precision: torch.dtype) -> int:
    """Return how many elements are infinite or no number. Mostly none is, which their sum tells faster."""
    finite = torch.isfinite(values.sum(dtype=precision))
    return 0 if finite else int((~torch.isfinite(values)).count_nonzero())


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
