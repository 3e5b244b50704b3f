"""A plan on a page: sites that differ in their layer alone are one line, under the decision that they have in common."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora_fx.planning.plan import Chosen, Decision, Plan, Skipped, cells, totals

WIDTH = 80
"""Columns of a terminal. The name of a site is not cut, whatever its length."""


def as_page(plan: Plan) -> str:
    """Return decisions, the sites that they are about, and the totals, in lines of at most 80 columns.

    Sites that are equal but for the numbers in their names are one line, with the numbers as ranges: ``layers.0-11.q_proj``. Beside the
    name are the widths of input and output, and the role, or the operator where it is other than linear.
    """
    groups: dict[str, list[Decision]] = {}
    for decision in plan:
        groups.setdefault(_heading(decision), []).append(decision)
    ordered = sorted(groups.items(), key=lambda item: isinstance(item[1][0], Skipped))
    lines = [line for heading, decisions in ordered for line in (*wrapped(f"{heading}:"), *_rows(decisions), "")]
    return "\n".join([*lines, *wrapped(totals(plan))])


def wrapped(text: str) -> list[str]:
    """Return the lines of a paragraph."""
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _heading(decision: Decision) -> str:
    rank, _, why = cells(decision)
    if isinstance(decision, Chosen):
        scales = dict.fromkeys(f"{branch.setting.scale:g}" for branch in decision.branches)
        return f"{why}, rank {rank}, scaling {' + '.join(scales)}"
    return f"skipped: {decision.kind or decision.reason}"


_Name = tuple[str | None, ...]
"""The parts of a dotted name, with None in place of numbers."""


@dataclass(frozen=True)
class _Row:
    """Sites that are equal but for the numbers in their names: name, widths and purpose in words."""

    name: _Name
    widths: str
    purpose: str


def _rows(decisions: Sequence[Decision]) -> Iterator[str]:
    """Yield a line for each row, or two where one would be too wide."""
    numbers: dict[_Row, list[tuple[int, ...]]] = {}
    for decision in decisions:
        site = decision.site
        parts, found = _split(site.name)
        row = _Row(parts, f"{site.in_features} -> {site.out_features}", _purpose(decision))
        numbers.setdefault(row, []).append(found)
    named = [(text, row) for row, found in numbers.items() for text in _with_ranges(row.name, found)]
    widths, purposes = (
        max(len(text) for text in texts) for texts in zip(*((r.widths, r.purpose) for r in numbers), strict=True)
    )
    column = min(max(len(name) for name, _ in named), WIDTH - len("      ") - widths - purposes)
    for name, row in named:
        rest = f"  {row.widths:>{widths}}  {row.purpose}".rstrip()
        if len(name) + len(rest) + 2 > WIDTH:
            yield f"  {name}"
            name = ""
        yield f"  {name:<{column}}{rest}"


def _purpose(decision: Decision) -> str:
    roles = ", ".join(decision.purpose.roles)
    return roles if decision.site.op in ("linear", roles) else f"{roles} ({decision.site.op})".strip()


def _split(name: str) -> tuple[_Name, tuple[int, ...]]:
    parts = [int(part) if part.isascii() and part.isdecimal() else part for part in name.split(".")]
    name_parts = tuple(part if isinstance(part, str) else None for part in parts)
    return name_parts, tuple(part for part in parts if isinstance(part, int))


def _with_ranges(name: _Name, found: Sequence[tuple[int, ...]]) -> Iterator[str]:
    """Yield names with ranges that stand for these numbers and no others."""
    places = [sorted(set(place)) for place in zip(*found, strict=True)]
    if math.prod(map(len, places)) == len(found):
        texts = iter([_ranges(place) for place in places])
        yield ".".join(next(texts) if part is None else part for part in name)
        return
    for rest in dict.fromkeys(numbers[1:] for numbers in found):  # each with those of the first place that it is with
        yield from _with_ranges(name, [numbers for numbers in found if numbers[1:] == rest])


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as ranges: ``0-3,7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
