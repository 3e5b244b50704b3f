"""Python values in a form in which equal means: no code can tell them apart, but by asking which object they are.

What is not known to be equal differs: of an object that is not made of plain Python attributes, only itself is equal.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import nn

_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
_SEQUENCES = (list, tuple)
_SETS = (set, frozenset)
_MAPPINGS = (dict, OrderedDict, defaultdict)


class Frozen:
    """Freezes values. One that was met before is frozen to the same object, which makes comparing quick."""

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
            return type(value), repr(value)  # as text, -0.0 is not 0.0 and NaN is NaN
        if isinstance(value, nn.Module):
            return self._path(value, own) if value in own else Same(value)
        known = self._met.get(id(value))
        if known is not None:
            return known[1]
        self._met[id(value)] = value, Same(value)  # for a value that holds itself
        paths = self._paths
        frozen = self._taken_apart(value, own)
        if self._paths == paths:
            self._met[id(value)] = value, frozen
        else:  # in another layer it may not stand for the same
            del self._met[id(value)]
        return frozen

    def _path(self, module: nn.Module, own: Mapping[nn.Module, str]) -> Any:
        self._paths += 1
        return "own", own[module]

    def _taken_apart(self, value: Any, own: Mapping[nn.Module, str]) -> Any:
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
    """Tell whether an object is nothing beside its ``__dict__``: its classes are written in Python, without slots."""
    kinds = type(value).__mro__[:-1]
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, type | Enum | torch.Tensor)
        and all(kind.__flags__ & _HEAP_TYPE for kind in kinds)
        and type(value).__basicsize__ == _Attributes.__basicsize__
    )


class _Attributes:
    """An object that has attributes alone."""


_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement


def is_plain(value: object) -> bool:
    """Tell whether a value is a number, a text, or another that cannot change."""
    return type(value) in _PLAIN
