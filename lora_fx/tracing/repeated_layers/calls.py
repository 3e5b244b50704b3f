"""What a layer is called with and returns, so that two calls can be compared: structure, constants, aliasing and metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lora_fx.tracing.repeated_layers.call_values import Frozen, is_plain

Symbolic = torch.SymInt | torch.SymFloat | torch.SymBool


class Departure(Exception):  # noqa: N818  # whether it is an error is up to the tracer
    """Something in a trace is not as stamping needs it; the message says what."""


class FirstDeparts(Departure):
    """The first of equal layers is called with something else than all others, as with the model's own input."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path!r} is called with something else than the layers after it")
        self.path = path


@dataclass(frozen=True)
class Values:
    """Arguments or results, taken apart.

    Attributes:
        leaves: tensors, sizes and constants.
        spec: how they are held.
        form: what has to be equal in two calls. To be compared when the trace is over: until then sizes may become equal.
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    form: tuple[Any, ...]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the leaves."""
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]


def values_of(value: Any) -> Values:
    """Take arguments or results apart."""
    leaves, spec = pytree.tree_flatten(value)
    frozen = Frozen()
    form = tuple(_form(leaf, frozen) for leaf in leaves)
    return Values(tuple(leaves), spec, (spec, _modes(), form, _aliasing(leaves)))


def same_values(values: Values, value: Any) -> bool:
    """Tell whether ``value`` holds the very same leaves in the same structure."""
    leaves, spec = pytree.tree_flatten(value)
    return spec == values.spec and all(a is b for a, b in zip(leaves, values.leaves, strict=True))


def storage_of(tensor: torch.Tensor) -> int:
    """Return what tells the memory of a tensor from others."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def is_constant(leaf: Any) -> bool:
    """Tell whether a leaf is the same in every call: a number, a text or a size."""
    return is_plain(leaf) or isinstance(leaf, Symbolic)


def _modes() -> tuple[object, ...]:
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _form(leaf: Any, frozen: Frozen) -> Any:
    if isinstance(leaf, torch.Tensor):
        strides = _sizes((*leaf.stride(), leaf.storage_offset())) if leaf.layout is torch.strided else None
        flags = leaf.requires_grad, leaf.is_conj(), leaf.is_neg(), leaf.is_inference()
        return type(leaf), leaf.dtype, leaf.device, leaf.layout, _sizes(leaf.shape), strides, flags
    return _Size(leaf) if isinstance(leaf, Symbolic) else frozen(leaf, {})


def _sizes(sizes: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_Size(size) if isinstance(size, Symbolic) else size for size in sizes)


class _Size:
    """A symbolic size, equal to those that are known to be equal when they are compared."""

    def __init__(self, size: Any) -> None:
        self._size = size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Size) and bool(self._size.node.expr == other._size.node.expr)

    __hash__ = None  # type: ignore[assignment]


def _aliasing(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Return, for each tensor, which is the first that is the same, and the first of the same memory."""
    objects: dict[int, int] = {}
    storages: dict[int, int] = {}
    return tuple(
        (objects.setdefault(id(leaf), index), storages.setdefault(storage_of(leaf), index))
        for index, leaf in enumerate(leaves)
        if isinstance(leaf, torch.Tensor)
    )
