"""What the nodes of a prepacked graph compute: products with weights laid out for the CPU's matrix library; knows no graph.

y = x Wᵀ + b        dx = dy W

W is frozen, so both are products with a constant, and nothing has to be kept for the backward pass but the constant itself.
The packed copies are made from the weight that a call is given, and made again where that has changed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable

aten = torch.ops.aten

_ROWS = 512
"""Rows for which oneDNN chooses a layout. At 64, 512 and 2048 that is as fast; at 1 it is slower from 8 to 128 rows, up to 1.6 times."""

LEAST_ROWS = 16
"""Rows below which MKL adds a packed product in longer chains than a plain one: its results are twice as far from exact there."""


REPEATS = 1
"""Calls with as many rows, before the one that packs: for a single call, packing costs more than it gains."""


def is_available() -> bool:
    """Tell whether torch has operators on packed weights here."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def is_packable(weight: torch.Tensor) -> bool:
    """Tell whether there is a packed form of a weight: a frozen matrix of single precision or bfloat16, on a CPU."""
    return (
        type(weight) in _PLAIN_TYPES
        and not weight.requires_grad
        and weight.device.type == "cpu"
        and weight.dim() == 2
        and weight.is_contiguous()
        and not weight.is_inference()
        and _supports(weight.dtype)
    )


_PLAIN_TYPES = (torch.Tensor, nn.Parameter)


@functools.cache
def _supports(dtype: torch.dtype) -> bool:
    """Tell whether packed weights of a dtype serve on this machine."""
    if dtype == torch.bfloat16:
        return is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 and is_available() and torch.backends.mkl.is_available()


@dataclass(frozen=True)
class _Origin:
    """What a copy was packed from, as it was then.

    Attributes:
        weight: the tensor itself.
        version: counts its changes, other than through ``.data`` or memory that is shared with NumPy.
        address: of its values; that of others cannot be the same as long as ``sample`` keeps these alive.
        sample: a view of some of its values.
        values: what these were.
    """

    weight: torch.Tensor
    version: int
    address: int
    sample: torch.Tensor
    values: torch.Tensor

    @staticmethod
    def of(weight: torch.Tensor) -> _Origin:
        sample = _sample(weight.detach())
        return _Origin(weight, weight._version, weight.data_ptr(), sample, sample.clone())

    def is_still(self, weight: torch.Tensor) -> bool:
        return (
            weight is self.weight
            and weight._version == self.version
            and weight.data_ptr() == self.address
            and torch.equal(self.sample, self.values)
        )


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Return a view of one element or more of each row and of each column, as integers: bits are compared, also those of a NaN."""
    rows, columns = weight.shape
    step = max(min(rows, columns), 1)
    while math.gcd(step, columns) != 1:  # so that as many steps as there are columns come by each
        step -= 1
    return weight.view(torch.int32 if weight.dtype == torch.float32 else torch.int16).view(-1)[::step]


@dataclass(frozen=True)
class _OneDnn:
    """A matrix ``(out, in)`` of bfloat16, packed for any number of rows."""

    data: torch.Tensor

    @staticmethod
    def of(matrix: torch.Tensor) -> _OneDnn:
        return _OneDnn(torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), _ROWS))

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.data, bias, "none", [], "")
        return product

    @property
    def nbytes(self) -> int:
        return int(torch.ops.mkldnn._nbytes(self.data))


@dataclass(frozen=True)
class _Mkl:
    """A matrix ``(out, in)`` of single precision, packed for one number of rows: oneDNN's products of it are less exact.

    MKL reserves some megabytes more for each than it writes to.
    """

    data: torch.Tensor
    matrix: torch.Tensor
    rows: int

    @staticmethod
    def of(matrix: torch.Tensor, rows: int) -> _Mkl:
        return _Mkl(torch.ops.mkl._mkl_reorder_linear_weight(matrix.contiguous(), rows), matrix, rows)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkl._mkl_linear(x, self.data, self.matrix, bias, self.rows)
        return product

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes


class Packed:
    """A weight in the layouts of both directions; that of the second is made when it is first asked for.

    Attributes:
        rows: of the inputs that it is packed for; None: of all.
    """

    def __init__(self, weight: torch.Tensor, rows: int | None, *, swapped: bool) -> None:
        self._origin = _Origin.of(weight)
        self._matrix = weight.detach().t() if swapped else weight.detach()
        self.rows = rows
        self.forward = self._pack(self._matrix)
        self._backward: _OneDnn | _Mkl | None = None

    def is_of(self, weight: torch.Tensor) -> bool:
        """Tell whether this is the weight that was packed, and has the values that it had."""
        return self._origin.is_still(weight)

    @property
    def backward(self) -> _OneDnn | _Mkl:
        """The transposed weight. It is to be asked for while the weight is known to be unchanged."""
        if self._backward is None:
            self._backward = self._pack(self._matrix.t())
        return self._backward

    @property
    def nbytes(self) -> int:
        """Bytes that the copies take."""
        return self.forward.nbytes + (0 if self._backward is None else self._backward.nbytes)

    def _pack(self, matrix: torch.Tensor) -> _OneDnn | _Mkl:
        with torch.no_grad():
            return _OneDnn.of(matrix) if self.rows is None else _Mkl.of(matrix, self.rows)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, packed: Packed) -> torch.Tensor:
        # Packed now: at the backward pass the weight may have changed, and this gradient is that of the values used here.
        ctx.packed = packed.backward if ctx.needs_input_grad[0] else None
        return packed.forward.product(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_x = None if ctx.packed is None else ctx.packed.product(gradient)
        of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return of_x, of_bias, None


class PrepackedWeight(nn.Module):
    """Multiplies by one base weight, which each call is given, and keeps the packed copies of it.

    They are made by the second call, in single precision by the second of those in succession that have as many rows, and at
    least :data:`LEAST_ROWS`. They are no parameters and no buffers: not saved, not copied, not moved.
    Wherever packed copies do not serve, the operator itself is called: where the weight trains or is on another device, under
    ``torch.autocast``, ``torch.compile``, functorch's transforms and dispatch modes, and where dtypes differ.
    """

    operator: ClassVar[Any]
    swapped: ClassVar[bool]

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._packed: Packed | None = None
        self._rows: int | None = None  # of the call before
        self._repeats = -1  # calls before it with as many

    @property
    def nbytes(self) -> int:
        """Bytes that the packed copies take at present."""
        return 0 if self._packed is None else self._packed.nbytes

    def extra_repr(self) -> str:
        """Show which weight it is where the module is printed."""
        return self.name

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """Return the product with the packed weight, or None where that does not serve."""
        if not is_packable(weight):
            self._packed = None
            return None
        if not _is_plain_call(x, bias) or not _fits(x, weight.t() if self.swapped else weight, bias):
            return None
        packed = self._current(weight, None if weight.dtype == torch.bfloat16 else math.prod(x.shape[:-1]))
        if packed is None:
            return None
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return _PackedProduct.apply(x, bias, packed)  # type: ignore[no-any-return, no-untyped-call]
        return packed.forward.product(x, bias)

    def _current(self, weight: torch.Tensor, rows: int | None) -> Packed | None:
        """Return the copies of a weight as it is now, for as many rows; None where that is not worth while."""
        self._repeats, self._rows = (self._repeats + 1 if rows == self._rows else 0), rows
        if rows is not None and rows < LEAST_ROWS:
            return None
        packed = self._packed
        if packed is not None and not packed.is_of(weight):
            packed = self._packed = None
        if packed is None or packed.rows != rows:
            if self._repeats < REPEATS:
                return None
            packed = self._packed = None  # the memory of the old copies is free for the new ones
            packed = self._packed = Packed(weight, rows, swapped=self.swapped)
        return packed


def _fits(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Tell whether an input and a bias have the dtype and the features of a matrix ``(out, in)``."""
    fits = x.dtype == matrix.dtype and x.shape[-1] == matrix.shape[1]
    return fits and (bias is None or (bias.dtype == matrix.dtype and bias.shape == matrix.shape[:1]))


def _is_plain_call(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Tell whether values are computed at once, from tensors that hold them, by the operators that are written."""
    return (
        type(x) in _PLAIN_TYPES
        and (bias is None or (type(bias) in _PLAIN_TYPES and bias.device.type == "cpu"))
        and x.device.type == "cpu"
        and x.layout == torch.strided
        and x.dim() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
    )


class PrepackedLinear(PrepackedWeight):
    """``aten.linear``, whose weight is laid out ``(out, in)``."""

    operator = aten.linear.default
    swapped = False

    def forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``input weightᵀ + bias``."""
        if torch.compiler.is_compiling() or (product := self._multiply(input, weight, bias)) is None:
            return aten.linear.default(input, weight, bias)  # type: ignore[no-any-return]
        return product


class PrepackedAddmm(PrepackedWeight):
    """``aten.addmm``, whose weight is laid out ``(in, out)``, as in GPT-2."""

    operator = aten.addmm.default
    swapped = True

    def forward(self, addend: torch.Tensor, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return ``addend + input weight``."""
        if (
            torch.compiler.is_compiling()
            or input.dim() != 2
            or (product := self._multiply(input, weight, addend)) is None
        ):
            return aten.addmm.default(addend, input, weight)  # type: ignore[no-any-return]
        return product


KINDS: tuple[type[PrepackedWeight], ...] = (PrepackedLinear, PrepackedAddmm)
"""One for each operator."""
