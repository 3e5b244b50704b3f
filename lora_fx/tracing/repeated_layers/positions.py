"""A stand-in for the number of a layer that raises wherever it is used: a layer that does nothing with it is like the others."""

from __future__ import annotations

from typing import Any, NoReturn

from lora_fx.tracing.repeated_layers.calls import Departure


def _use(position: Any, *_args: Any, **_kwargs: Any) -> NoReturn:
    position.used = True  # code of a model may catch what is raised
    raise Departure("a layer computes with its position among the layers")


class Position:
    """Raises :class:`Departure` whatever is done with it, other than passing it on or comparing it with ``is``, and remembers that."""

    def __init__(self) -> None:
        self.used = False

    __class__ = property(_use)  # isinstance asks for it


_BINARY = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "lshift", "rshift", "and", "or", "xor"),
    "matmul",
)
_OTHER = (
    *("eq", "ne", "lt", "le", "gt", "ge", "hash", "bool", "int", "float", "complex", "index", "round", "trunc"),
    *("floor", "ceil", "neg", "pos", "abs", "invert", "len", "iter", "getitem", "contains", "call", "getattr"),
    *("str", "repr", "format", "reduce_ex", "copy", "deepcopy", "torch_function"),
)
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), *_OTHER):
    setattr(Position, f"__{_name}__", _use)
