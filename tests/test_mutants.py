"""Six ways to get a merge wrong, each of which the unit tests must notice every time. All others: ``make mutate``."""

from __future__ import annotations

import gc
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType

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


MODULE = "lora_fx.numerics.lowrank_merge"
SOURCE = ROOT / "lora_fx" / "numerics" / "lowrank_merge.py"


class Mutating(SourceFileLoader, MetaPathFinder):
    """Finds one module, and compiles another text for it."""

    def __init__(self, text: str) -> None:
        super().__init__(MODULE, str(SOURCE))
        self.text = text

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return spec_from_file_location(name, SOURCE, loader=self) if name == MODULE else None

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.text, str(SOURCE), "exec")


def run(tmp_path: Path, was: str, becomes: str) -> tuple[int, str]:
    """Run the unit tests of lowrank_merge.py where one line of it is another, in a copy of this process, and return how they ended.

    Those of random merges are left out: they take as long as all others together.
    """
    text = SOURCE.read_text(encoding="utf-8")
    assert was in text
    said = tmp_path / "said"
    child = os.fork()
    if child == 0:
        gc.freeze()  # else the child copies the memory of its parent to look for garbage
        try:
            with said.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            for name in [
                each for each in sys.modules if each.partition(".")[0] in ("lora_fx", "conftest", "test_lowrank")
            ]:
                del sys.modules[name]
            sys.meta_path.insert(0, Mutating(text.replace(was, becomes)))
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            options = [
                "-x",
                "-q",
                "-o",
                "addopts=",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:xdist",
                "-k",
                "not random_merges",
            ]
            code = pytest.main([*options, "--rootdir", str(ROOT), str(ROOT / "tests" / "test_lowrank.py")])
            sys.stdout.flush()
            os._exit(int(code))
        finally:
            os._exit(70)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_merge_that_is_wrong_in_this_way_fails_the_unit_tests(mutant: str, tmp_path: Path) -> None:
    code, said = run(tmp_path, *MUTANTS[mutant])
    assert code == 1, said  # 1: tests ran, and one failed
    assert "1 failed" in said


@pytest.mark.slow
def test_as_it_is_the_copy_passes_them(tmp_path: Path) -> None:
    code, said = run(tmp_path, FOLD, FOLD)
    assert code == 0, said
    assert " passed" in said
