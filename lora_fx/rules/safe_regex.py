"""Regular expressions of strangers: what one costs is bounded before it is compiled, and while it matches. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import regex as regexes

from lora_fx.rules.validation import shown

REGEX_SECONDS = 0.1  # to match one name
REGEX_COUNT = 100_000  # more than any model has modules
REGEX_LENGTH = 100_000  # characters with counted repetitions written out, which is what compiling does

_NAME = re.compile(r"[\w.-]*")  # needs no compiling to be known as a pattern


def problem_of(pattern: str) -> str | None:
    """Return why a pattern cannot be used, ``"expected …, found …"``, or None if it can."""
    if _NAME.fullmatch(pattern):
        return None
    # The cost of compiling a pattern is bounded beforehand: ((a{1000}){1000}){1000} would take all memory there is.
    if re.search(r"\(\?[\w-]*x", pattern):  # where comments can stand in the middle of a number
        return f"expected a pattern without the verbose flag x, found {shown(pattern)}"
    counts = [int(count[:9]) for braces in re.findall(r"\{[^}]*", pattern) for count in re.findall(r"[0-9]+", braces)]
    if len(pattern) * math.prod(max(1, count) for count in counts) > REGEX_LENGTH:
        return f"expected a pattern with fewer characters or counted repetitions, found {shown(pattern)}"
    try:
        regexes.compile(pattern)
    except Exception as error:  # also RecursionError and others, by the pattern
        return f"expected a regular expression, found {shown(pattern)}: {error}"
    return None


def problem_of_patterns(patterns: Collection[object]) -> str | None:
    """Return why so many patterns cannot be used, or None if they can: compiling takes time by their lengths, but for mere names."""
    length = sum(len(each) for each in patterns if isinstance(each, str) and not _NAME.fullmatch(each))
    if length > REGEX_LENGTH or len(patterns) > REGEX_COUNT:
        return (
            f"expected at most {REGEX_COUNT} patterns, of {REGEX_LENGTH} characters where they are no names, found {len(patterns)} "
            f"of {length}"
        )
    return None


def matched(pattern: str, name: str) -> regexes.Match[str] | None:
    """Return how a pattern matches a whole name, or None if it does not.

    Raises:
        TimeoutError: it takes too long; the message is for people.
    """
    try:
        return _compiled(pattern).fullmatch(name, timeout=REGEX_SECONDS)  # type: ignore[no-any-return]
    except TimeoutError as error:
        message = f"regex {pattern!r} took more than {REGEX_SECONDS} s to match {name!r}; simplify it"
        raise TimeoutError(message) from error


@lru_cache(maxsize=2**13)
def _compiled(pattern: str) -> Any:
    """Return a compiled pattern; a configuration may have one for each module, and regex itself keeps few."""
    return regexes.compile(pattern)
