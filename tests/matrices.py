"""The table of the matrices: what came of every row of a test that ``make test-all`` runs for more than its representatives.

A pytest plugin, which the option ``--matrices FILE`` of ``conftest.py`` starts.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

HEAD = """# Matrices

Written by `make test-all`, or for some files alone by
`.venv/bin/pytest -m "" --matrices tests/matrices.md tests/test_exports.py`. A row is an architecture, a family or a setting; a
column is a promise, numbered as below the table; a cell is how many cases of it passed. `make test` runs the rows in **bold**,
which stand for the others, wherever a promise takes long.
"""


class Matrices:
    """Collects the outcome of every case, by test and row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[tuple[str, str], dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
        self.partial: set[tuple[str, str]] = set()
        self.everywhere: set[tuple[str, str, str]] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        file, _, name = report.nodeid.partition("::")
        function, _, case = name.partition("[")
        function = function.partition("@")[0]  # xdist's name of the group
        test, row = (file, function), dict(report.user_properties).get("row", case.partition("]")[0])
        self.outcomes[test][str(row)][report.outcome] += 1
        if "matrix" in report.keywords:
            self.partial.add(test)
        else:
            self.everywhere.add((*test, str(row)))

    def pytest_sessionfinish(self) -> None:
        """Write the tables of all files that ran; those of other files stay."""
        by_file: dict[str, list[str]] = defaultdict(list)
        for file, function in sorted(self.partial):
            by_file[file].append(function)
        tables = _tables_in(self.path) | {file: self._table(file, functions) for file, functions in by_file.items()}
        self.path.write_text("\n".join([HEAD, *(tables[file] for file in sorted(tables))]), encoding="utf-8")

    def _table(self, file: str, functions: list[str]) -> str:
        rows = sorted({row for function in functions for row in self.outcomes[file, function]})
        lines = [
            f"## {file}",
            "",
            f"| | {' | '.join(map(str, range(1, len(functions) + 1)))} |",
            "|---" * (len(functions) + 1) + "|",
        ]
        for row in rows:
            cells = [_cell(self.outcomes[file, function].get(row)) for function in functions]
            stands = any((file, function, row) in self.everywhere for function in functions)
            lines.append(f"| {f'**{row}**' if stands else row} | {' | '.join(cells)} |")
        promises = [
            f"{number}. {name.removeprefix('test_').replace('_', ' ')}" for number, name in enumerate(functions, 1)
        ]
        return "\n".join([*lines, "", *promises, ""])


def _tables_in(path: Path) -> dict[str, str]:
    """Return the tables that a file has already, by the files of their tests."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    _, *parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    return {part.partition("\n")[0].removeprefix("## "): part.rstrip("\n") + "\n" for part in parts}


def _cell(found: Counter[str] | None) -> str:
    if not found:
        return ""
    others = [f"{count} {outcome}" for outcome, count in sorted(found.items()) if outcome != "passed"]
    return ", ".join([str(found["passed"]), *others])
