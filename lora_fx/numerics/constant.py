"""Constants: tensors computed from named tensors alone, by operators of ATen, as data.

They are evaluated in float64, whatever the dtypes of the tensors are: what a fold replaces is arithmetic of real numbers, which
is rounded once, at its end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Named:
    """A named tensor in the arguments of a constant."""

    name: str


@dataclass(frozen=True, eq=False, repr=False)
class Constant:
    """The value of an operator on named tensors, other constants and numbers.

    Constants are equal if they say the same. A value that several operators read is one object in all of them, so that it is
    evaluated once.

    Attributes:
        operator: its name with that of the overload, ``"aten::mul.Tensor"``.
        arguments: by position: :class:`Named`, constants, numbers, and lists of these.
        keywords: arguments by keyword, in that order; none for devices.
        digest: of all this.
    """

    operator: str
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...] = ()
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        said = f"{self.operator}{_text(self.arguments)}{_text(self.keywords)}"
        object.__setattr__(self, "digest", hashlib.sha256(said.encode()).hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"{self.operator.removeprefix('aten::').partition('.')[0]}({', '.join(self.names)})"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors of which it is made, each once."""
        return tuple(dict.fromkeys(self._leaves(set())))

    def _leaves(self, seen: set[str]) -> Iterator[str]:
        for value in _flat((self.arguments, self.keywords)):
            if isinstance(value, Named):
                yield value.name
            elif isinstance(value, Constant) and value.digest not in seen:
                seen.add(value.digest)
                yield from value._leaves(seen)

    def value(self, tensors: Mapping[str, torch.Tensor], known: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return its value, in float64 where it is a floating-point number.

        Args:
            tensors: by name; on one device.
            known: values of constants by their digests, which grows.
        """
        if self.digest not in known:
            arguments = [_given(each, tensors, known) for each in self.arguments]
            keywords = {key: _given(each, tensors, known) for key, each in self.keywords}
            operator = _operator(self.operator)
            if (
                operator._schema.is_mutable
            ):  # of a value that nothing else in the graph reads, but equal ones are evaluated once
                arguments[0] = arguments[0].clone()
            with torch.device(next((tensors[name].device for name in self.names), "cpu")), torch.no_grad():
                known[self.digest] = operator(*arguments, **keywords)
        return known[self.digest]


def _given(value: Any, tensors: Mapping[str, torch.Tensor], known: dict[str, torch.Tensor]) -> Any:
    match value:
        case Named(name=name):
            tensor = tensors[name].detach()
            return tensor.double() if tensor.is_floating_point() else tensor
        case Constant():
            return value.value(tensors, known)
        case list() | tuple():
            return [_given(each, tensors, known) for each in value]
        case torch.dtype() if value.is_floating_point:
            return torch.float64
        case _:
            return value


def _operator(name: str) -> Any:
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for each in value:
            yield from _flat(each)
    else:
        yield value


def _text(value: Any) -> str:
    if isinstance(value, Constant):
        return value.digest
    return f"({','.join(map(_text, value))})" if isinstance(value, list | tuple) else repr(value)
