"""Values of calls, compared: two are equal if no code can tell them apart, except by object identity.

A value that is not known to be equal differs: an object that is not made of plain Python attributes is equal to itself alone.
Layers are compared by their frozen attributes, their calls by structure, constants, aliasing and metadata of all arguments.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from lora_fx.torch_internals import pytree

Symbolic = torch.SymInt | torch.SymFloat | torch.SymBool

_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
_SEQUENCES = (list, tuple)
_SETS = (set, frozenset)
_MAPPINGS = (dict, OrderedDict, defaultdict)


class Frozen:
    """Freezes values. A value is frozen once, so that comparing two frozen forms is mostly comparing identities."""

    def __init__(self) -> None:
        self._met: dict[int, tuple[Any, Any]] = {}
        self._paths = 0

    def __call__(self, value: Any, own: Mapping[nn.Module, str]) -> Any:
        """Return the frozen form of a value.

        Args:
            value: any.
            own: modules that stand for their path, and not for themselves.
        """
        if is_plain(value):
            return type(value), repr(value)  # as text, -0.0 differs from 0.0 and NaN equals NaN
        if isinstance(value, nn.Module):
            return self._path(value, own) if value in own else Same(value)
        known = self._met.get(id(value))
        if known is not None:
            return known[1]
        self._met[id(value)] = value, Same(value)  # ends the recursion for a value that holds itself
        paths = self._paths
        frozen = self._freeze_parts(value, own)
        if self._paths == paths:
            self._met[id(value)] = value, frozen
        else:  # a path means another module in another layer: do not cache
            del self._met[id(value)]
        return frozen

    def _path(self, module: nn.Module, own: Mapping[nn.Module, str]) -> Any:
        self._paths += 1
        return "own", own[module]

    def _freeze_parts(self, value: Any, own: Mapping[nn.Module, str]) -> Any:
        kind = type(value)
        if kind in _SEQUENCES:
            return kind, tuple(self(item, own) for item in value)
        if kind in _SETS and all(map(is_plain, value)):
            return kind, frozenset(self(item, own) for item in value)
        if kind in _MAPPINGS:
            items = tuple((self(key, own), self(item, own)) for key, item in value.items())
            return kind, items, self(getattr(value, "default_factory", None), own)
        if isinstance(value, functools.partial) and kind is functools.partial:
            return kind, self(value.func, own), self(value.args, own), self(value.keywords, own)
        if kind is _METHOD:
            return kind, Same(value.__func__), self(value.__self__, own)
        if _is_made_of_attributes(value):
            return kind, self(vars(value), own)
        return Same(value)


class Same:
    """Equal to the same object only."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)

    def __repr__(self) -> str:
        return f"one {type(self._value).__name__}"


_METHOD = type(Frozen().__call__)


def _is_made_of_attributes(value: object) -> bool:
    """Tell whether an object has no state beside its ``__dict__``: its classes are written in Python, without slots."""
    kinds = type(value).__mro__[:-1]
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, type | Enum | torch.Tensor)
        and all(kind.__flags__ & _HEAP_TYPE for kind in kinds)
        and type(value).__basicsize__ == _Attributes.__basicsize__
    )


class _Attributes:
    """A plain object, for the size of one without slots."""


_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement


def is_plain(value: object) -> bool:
    """Tell whether a value is a number, a text, or of another immutable built-in type."""
    return type(value) in _PLAIN


class LayersDiffer(Exception):  # noqa: N818  # the tracer decides whether it is an error
    """Layers differ, or cannot be shown to be equal, so that they are not stamped; the message says how."""


class FirstLayerDiffers(LayersDiffer):
    """The first of equal layers is called with other arguments than the rest, such as the model's own input."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path!r} is called with other arguments than the layers after it")
        self.path = path


def reason_of(error: Exception) -> BaseException:
    """Return why layers could not be stamped, which may be the cause of torch.export's own error."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return next((cause for cause in causes if isinstance(cause, LayersDiffer)), error)


@dataclass(frozen=True)
class Values:
    """Flattened arguments or results of a call.

    Attributes:
        leaves: tensors, sizes and constants.
        spec: their structure.
        form: equal for two equal calls. To be compared when the trace is over: until then sizes may become equal.
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    form: tuple[Any, ...]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the leaves."""
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]


def values_of(value: Any) -> Values:
    """Flatten arguments or results."""
    leaves, spec = pytree.tree_flatten(value)
    frozen = Frozen()
    form = tuple(_form(leaf, frozen) for leaf in leaves)
    return Values(tuple(leaves), spec, (spec, _modes(), form, _aliasing(leaves)))


def same_values(values: Values, value: Any) -> bool:
    """Tell whether ``value`` holds the very same leaves in the same structure."""
    leaves, spec = pytree.tree_flatten(value)
    return spec == values.spec and all(a is b for a, b in zip(leaves, values.leaves, strict=True))


def storage_of(tensor: torch.Tensor) -> int:
    """Return a number that identifies the memory of a tensor."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def is_constant(leaf: Any) -> bool:
    """Tell whether a leaf is equal in every call: a number, a text or a size."""
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
    """A symbolic size; two are equal if torch knows so at the time of the comparison."""

    def __init__(self, size: Any) -> None:
        self._size = size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Size) and bool(self._size.node.expr == other._size.node.expr)

    __hash__ = None  # type: ignore[assignment]


def _aliasing(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Return, for each tensor, the index of the first identical one, and of the first in the same memory."""
    objects: dict[int, int] = {}
    storages: dict[int, int] = {}
    return tuple(
        (objects.setdefault(id(leaf), index), storages.setdefault(storage_of(leaf), index))
        for index, leaf in enumerate(leaves)
        if isinstance(leaf, torch.Tensor)
    )
