"""Six ways to get a merge wrong, each of which the unit tests must notice every time. All others: ``make mutate``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLD = "        wide += delta\n"

MUTANTS = {
    "flipped sign": (FOLD, "        wide -= delta\n"),
    "dropped scale": ("if self.scaling != 1:", "if self.scaling != self.scaling:"),
    "swapped A and B": ("right, *others = map(_stacked, factors)", "right, *others = map(_stacked, reversed(factors))"),
    "missing transpose": ("(self.left[index] @ right[:, rows]).T", "(self.left[index] @ right[:, rows])"),
    "second adapter ignored": ("                delta += wide\n", "                pass\n"),
    "double rounding": (FOLD, "        wide += delta.to(dtype)\n"),
}


def run(tmp_path: Path, was: str, becomes: str) -> subprocess.CompletedProcess[str]:
    """Run the unit tests of lowrank_merge.py in a copy of the project in which one line of it is another."""
    for folder in ("lora_fx", "tests", "rules"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "lora_fx" / "numerics" / "lowrank_merge.py"
    text = source.read_text(encoding="utf-8")
    assert was in text
    source.write_text(text.replace(was, becomes), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "tests/test_lowrank.py",
    ]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_merge_that_is_wrong_in_this_way_fails_the_unit_tests(mutant: str, tmp_path: Path) -> None:
    result = run(tmp_path, *MUTANTS[mutant])
    assert result.returncode == 1, result.stdout  # 1: tests ran, and one failed
    assert "1 failed" in result.stdout


@pytest.mark.slow
def test_as_it_is_the_copy_passes_them(tmp_path: Path) -> None:
    result = run(tmp_path, FOLD, FOLD)
    assert result.returncode == 0, result.stdout
