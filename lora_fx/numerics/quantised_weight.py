"""Frozen weight that is stored quantised and looks dense: a tensor of the dense shape and dtype over codes and scales.

    dense(q(W)) = scheme.dequantise(codes and scales)

A graph reads it as any other weight, ``linear(x, weight)``. Every operator gets the dense values, made for it and dropped after it, below
autograd: for the backward pass autograd keeps the tensor itself, and so the codes. A node that dequantises in front of the product
would let autograd keep the dense weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_fx.errors import LoraFxError, listed
from lora_fx.numerics.schemes import CodebookScheme, Scheme, UniformScheme, scheme_text
from lora_fx.torch_internals import disabled_torch_function_impl, make_wrapper_subclass, pytree

aten = torch.ops.aten


class QuantisedWeight(torch.Tensor):
    """A quantised matrix that looks dense. It cannot be written to, and does not train.

    Args:
        tensors: codes and scales by the names that the scheme gives them; they are shared.
        scheme: makes the dense weight of them.
        shape: of the matrix that was quantised.
        dtype: of the dense weight.
        casts: dtypes into which the dense weight is cast, one after the other. The last one is the dtype that the tensor shows.
        transposed: whether the tensor is the transpose of that matrix.
    """

    _tensors: dict[str, torch.Tensor]
    _form: tuple[Scheme, tuple[int, ...], torch.dtype, tuple[torch.dtype, ...], bool]

    @staticmethod
    def __new__(  # noqa: D102  # as the class says
        cls,
        tensors: Mapping[str, torch.Tensor],
        scheme: Scheme,
        shape: Sequence[int],
        dtype: torch.dtype,
        casts: Sequence[torch.dtype] = (),
        transposed: bool = False,
    ) -> QuantisedWeight:
        rows, columns = shape
        size, strides = ((columns, rows), (1, columns)) if transposed else ((rows, columns), (columns, 1))
        device = next(iter(tensors.values())).device
        shown: QuantisedWeight = make_wrapper_subclass(
            cls, size, strides=strides, dtype=(dtype, *casts)[-1], device=device, requires_grad=False
        )
        shown._tensors = dict(tensors)
        shown._form = (scheme, tuple(shape), dtype, tuple(casts), transposed)
        return shown

    @staticmethod
    def of(dense: torch.Tensor, scheme: Scheme, dtype: torch.dtype | None = None) -> QuantisedWeight:
        """Quantise a matrix.

        Args:
            dense: the matrix.
            scheme: by which it is quantised.
            dtype: of the dense weight that is made of it; by default that of the matrix.
        """
        return QuantisedWeight(scheme.quantise(dense), scheme, dense.shape, dtype or dense.dtype)

    @property
    def scheme(self) -> Scheme:
        """How the weight is quantised."""
        return self._form[0]

    @property
    def stored(self) -> Mapping[str, torch.Tensor]:
        """Codes and scales, by the names that the scheme gives them."""
        return self._tensors

    @property
    def is_transposed(self) -> bool:
        """Whether the tensor is the transpose of the matrix that was quantised."""
        return bool(self._form[4])

    @property
    def is_cast(self) -> bool:
        """Whether the dense weight is cast to other dtypes than that in which it is made."""
        return bool(self._form[3])

    def dequantize(self) -> torch.Tensor:  # as torch spells it
        """Return the dense weight."""
        scheme, shape, dtype, casts, transposed = self._form
        dense = scheme.dequantise(self._tensors, shape, dtype)
        for cast in casts:
            dense = dense.to(cast)
        return dense.t() if transposed else dense

    def quantised_matrix(self) -> torch.Tensor:
        """Return the dense matrix that was quantised, not transposed, in float32 whatever the dtype of the weight."""
        scheme, shape, *_ = self._form
        return scheme.dequantise(self._tensors, shape, torch.float32)

    def elements_of_matrix(self, positions: torch.Tensor) -> torch.Tensor:
        """Return some elements of :meth:`quantised_matrix`, by their positions one after another."""
        if isinstance(self.scheme, CodebookScheme):
            return self.scheme.elements(self._tensors, positions.to(self.device))
        return self.quantised_matrix().reshape(-1)[positions.to(self.device)]

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of the matrix that was quantised."""
        return self._form[1]

    def requires_grad_(self, requires_grad: bool = True) -> QuantisedWeight:
        """Refuse to train.

        Raises:
            LoraFxError: codes have no gradient.
        """
        if requires_grad:
            raise LoraFxError(
                "a quantised weight does not train: its codes have no gradient. Train branches beside it, or load the model without "
                "quantisation."
            )
        return self

    def is_like(self, other: torch.Tensor) -> bool:
        """Tell whether another tensor is quantised in the same way, to the same shape and dtype, with codes and scales of the same shapes."""
        return isinstance(other, QuantisedWeight) and other._form == self._form and other._parts() == self._parts()

    def with_values(self, other: QuantisedWeight) -> QuantisedWeight:
        """Return a weight on the device of this one, with copies of the codes and scales of another one that is like it."""
        device = self.device
        return _made(other._with(lambda tensor: tensor.to(device, copy=True)), isinstance(self, nn.Parameter))

    def _parts(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in self._tensors.items()}

    def share_memory_(self) -> QuantisedWeight:
        """Move codes and scales to shared memory."""
        for tensor in self._tensors.values():
            tensor.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Tell whether codes and scales are in shared memory."""
        return all(tensor.is_shared() for tensor in self._tensors.values())

    def _with(self, function: Callable[[torch.Tensor], torch.Tensor]) -> QuantisedWeight:
        """Return the weight with a function applied to its codes and scales."""
        return QuantisedWeight({name: function(tensor) for name, tensor in self._tensors.items()}, *self._form)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"a weight in {scheme_text(self.scheme)} ({tuple(self.shape)}, {self.dtype})"

    def __getattr__(self, name: str) -> torch.Tensor:
        if name.startswith(_INNER):
            return self._tensors[name.removeprefix(_INNER)]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [f"{_INNER}{name}" for name in self._tensors], self._form

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, torch.Tensor], form: Any, *_: Any) -> QuantisedWeight:
        return QuantisedWeight({name.removeprefix(_INNER): tensor for name, tensor in inner.items()}, *form)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantisedWeight:
        if id(self) not in memo:
            memo[id(self)] = _made(self._with(torch.clone), isinstance(self, nn.Parameter))
        copied: QuantisedWeight = memo[id(self)]
        return copied

    def __reduce_ex__(self, _protocol: object) -> tuple[Any, ...]:
        return _restored, (self._tensors, self._form, isinstance(self, nn.Parameter))

    __torch_function__ = disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        weight = args[0] if args else None
        if isinstance(weight, QuantisedWeight):
            known = weight._kept(func, args, kwargs)
            if known is not None:
                return known
        if any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments):
            _check_writes(func, args, kwargs)
        args, kwargs = pytree.tree_map_only(QuantisedWeight, QuantisedWeight.dequantize, (args, dict(kwargs)))
        return func(*args, **kwargs)

    def _kept(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the result of an operator that leaves the weight quantised; None for the others."""
        scheme, shape, dtype, casts, transposed = self._form
        if func in (aten.detach.default, aten.alias.default):
            return QuantisedWeight(self._tensors, *self._form)
        if func is aten.clone.default:
            return self._with(torch.clone)
        if func is aten.copy_.default and args[1] is self:  # torch's end of loading a state dict
            return self
        if func is aten.t.default or (func is aten.transpose.int and {args[1] % 2, args[2] % 2} == {0, 1}):
            return QuantisedWeight(self._tensors, scheme, shape, dtype, casts, not transposed)
        if func is aten._to_copy.default:
            cast = kwargs.get("dtype") or self.dtype
            casts, copied = (
                (casts, True) if cast == self.dtype else ((*casts, cast), False)
            )  # another dtype is over the same codes
            moved = self._with(lambda tensor: tensor.to(kwargs.get("device") or tensor.device, copy=copied))
            return QuantisedWeight(moved._tensors, scheme, shape, dtype, casts, transposed)
        return None


_INNER = "_inner_"
"""Begins the names of attributes under which torch finds codes and scales."""


def _made(weight: QuantisedWeight, is_parameter: bool) -> QuantisedWeight:
    return nn.Parameter(weight, requires_grad=False) if is_parameter else weight  # type: ignore[return-value]


def _restored(tensors: Mapping[str, torch.Tensor], form: tuple[Any, ...], is_parameter: bool) -> Any:
    """Return a pickled weight.

    Raises:
        LoraFxError: its codes and scales are none of its scheme and shape, which would give other values in silence.
    """
    _check_parts(tensors, *form)
    return _made(QuantisedWeight(tensors, *form), is_parameter)


def _check_parts(
    tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype, *_: object
) -> None:
    if not (
        isinstance(scheme, CodebookScheme | UniformScheme)
        and all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
        and len(shape) == 2
        and all(isinstance(size, int) and size > 0 for size in shape)
        and isinstance(dtype, torch.dtype)
        and dtype.is_floating_point
    ):
        raise LoraFxError(
            f"a quantised weight: expected tensors, a scheme, two sizes and a floating-point dtype, got {scheme!r}, {shape!r} and {dtype!r}. "
            "Save the state dict again."
        )
    scheme.__post_init__()  # which a pickle passes over
    parts = scheme.parts(shape)
    problems = [f"{name}: expected {_part_text(*parts[name])}, got none" for name in parts.keys() - tensors.keys()]
    for name, tensor in tensors.items():
        if name not in parts:
            problems.append(f"{name}: expected no such tensor")
        elif tuple(tensor.shape) != parts[name][0] or tensor.dtype not in parts[name][1]:
            problems.append(f"{name}: expected {_part_text(*parts[name])}, got {tensor.dtype} {list(tensor.shape)}")
    if problems:
        raise LoraFxError(
            f"a weight in {scheme_text(scheme)} of shape {list(shape)}: {listed(sorted(problems), 5, '; ')}. Save the state dict again."
        )


def _part_text(shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> str:
    return f"{' or '.join(map(str, dtypes))} {list(shape)}"


# Data without code: torch.load(weights_only=True) may make them.
torch.serialization.add_safe_globals([_restored, CodebookScheme, UniformScheme])


def _check_writes(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise for an operator that would write to a quantised weight, or a quantised weight into a dense tensor."""
    given = {**dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)), **kwargs}
    for argument in func._schema.arguments:
        value = given.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, QuantisedWeight):
            raise LoraFxError(
                f"{func} would write to {value!r}, which is frozen. Take its dense values, weight.dequantize(), and write to those."
            )
