"""Matching of dotted names by patterns, layers and regular expressions. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

from lora_fx.errors import RuleError
from lora_fx.rules.safe_regex import matched


def ends_in(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether a dotted name is one of these patterns, or ends in one."""
    parts = name.split(".")
    wanted = map(_ends, patterns)
    return any(len(ends) <= len(parts) and all(map(fnmatchcase, parts[-len(ends) :], ends)) for ends in wanted)


@lru_cache(1024)  # asked for every name
def _ends(pattern: str) -> list[str]:
    return re.sub(r"[?\[]", r"[\g<0>]", pattern).split(".")  # of fnmatch, * alone is ours


def layer_of(name: str) -> int | None:
    """Return the first number among the parts of a dotted name."""
    return next((int(part) for part in name.split(".") if part.isascii() and part.isdecimal()), None)


def admits(layers: int | str, name: str) -> bool:
    """Tell whether a name is in a layer, or in a range of them such as ``"4-7"``."""
    index = layer_of(name)
    return index is not None and has_layer(layers, index)


def has_layer(layers: int | str, index: int) -> bool:
    """Tell whether a layer is this one, or in a range such as ``"4-7"``."""
    if isinstance(layers, int):
        return index == layers
    first, _, last = layers.partition("-")
    return int(first) <= index and (not last or index <= int(last))


def matches(pattern: str, name: str, where: str) -> bool:
    """Tell whether a regular expression matches a whole name. Raises :class:`RuleError` if that takes too long."""
    try:
        return matched(pattern, name) is not None
    except TimeoutError as error:
        raise RuleError(where, [str(error)]) from error
