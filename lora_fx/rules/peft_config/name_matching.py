"""Matching of module names as PEFT 0.21 does it: lists of ends, regular expressions, layers, and values by pattern."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from lora_fx.rules.safe_regex import matched

Value = TypeVar("Value")


def value_of_pattern(pattern: Mapping[str, Value], module: str, default: Value) -> Value:
    """Return the value of the first key that matches, else of the key equal to the name, which need not match it as an expression."""
    return next((value for key, value in pattern.items() if matches_key(key, module)), pattern.get(module, default))


def matches_key(key: str, module: str) -> bool:
    """Tell whether a regular expression matches a name, or its end after a dot."""
    return matched(rf"(.*\.)?({key})", module) is not None


def is_named(module: str, names: str | Sequence[str]) -> bool:
    """Tell whether a regular expression matches a whole name, or one of several names is its end after a dot."""
    if isinstance(names, str):
        return matched(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


def _layer(expression: str, module: str) -> int | None:
    found = matched(expression, module)
    return int(found["idx"]) if found else None


def admits_layer(module: str, layers: int | Sequence[int] | None, names: str | Sequence[str] | None) -> bool:
    """Tell whether a module is in one of some layers.

    Args:
        module: its name.
        layers: numbers of layers; all, if there are none.
        names: expected before the number of a layer; any, if there are none.
    """
    if layers is None or layers == ():
        return True
    index = layer_of(module, names)
    return index is not None and index in ((layers,) if isinstance(layers, int) else layers)


def layer_of(module: str, names: str | Sequence[str] | None) -> int | None:
    """Return the number of the layer that PEFT takes a module to be in; None if it is in none. For the names, see :func:`admits_layer`."""
    patterns = (names,) if names and isinstance(names, str) else names or ()
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\..*" for pattern in patterns] or [
        r".*?\.[^.]*\.(?P<idx>\d+)\..*"
    ]
    return next((found for each in expressions if (found := _layer(each, module)) is not None), None)


def is_bias(parameter: str) -> bool:
    """Tell whether a parameter is a bias, by its name."""
    return parameter.rpartition(".")[2] == "bias"


def modules_of(parameter: str) -> Iterator[str]:
    """Yield the paths of the modules that a parameter is in, the outermost first."""
    parts = parameter.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))
