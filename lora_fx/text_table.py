"""Tables for people as plain text: one line per row, whatever the width of the terminal."""

from __future__ import annotations

import io

from rich import box
from rich.console import Console
from rich.table import Table

MAX_WIDTH = 10_000
"""Wider than any table, so that no row is broken into two lines."""


def new_table() -> Table:
    """Return an empty table in the style of all reports: headings over a rule, no frame."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False)


def text_lines(table: Table) -> list[str]:
    """Return the lines of a table, without colour, trailing blanks and empty lines."""
    written = io.StringIO()
    Console(file=written, width=MAX_WIDTH, color_system=None).print(table)
    return [line.rstrip() for line in written.getvalue().splitlines() if line.strip()]
