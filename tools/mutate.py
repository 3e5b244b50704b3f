"""Mutation test: change one operator, argument or constant of a function at a time, and expect that a test fails.

mutmut runs it; what it mutates and by which tests is in ``[tool.mutmut]`` of pyproject.toml. A mutant that survives fails
the run unless tests/mutants_allowed.toml has it with a reason, and so does an entry of that file without its survivor::

    [[allowed]]
    function = "lora_fx.numerics.lowrank_merge.merged_weight"
    was = "total = reduce(operator.add, products)"
    becomes = ["total = reduce(None, products)"]
    reason = "…"

Example:  python tools/mutate.py, then mutmut run NAME for a single mutant, and python tools/mutate.py --report
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Annotated, NamedTuple

import tomlkit
import typer
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files
from mutmut.utils.format_utils import get_module_from_key, orig_function_and_class_names_from_key

from lora_fx.cli.printing import run_script

ROOT = Path(__file__).parent.parent
ALLOWED = ROOT / "tests" / "mutants_allowed.toml"
NEW = ROOT / "mutants" / "survivors.toml"
DEAD = {"killed", "timeout", "segfault", "caught by type check"}


class Mutant(NamedTuple):
    """A mutant by what it changes; neither line numbers nor mutmut's numbering, which any edit moves."""

    function: str
    was: str
    becomes: str


def mutants() -> list[tuple[str, str, Mutant | None]]:
    """Return name and outcome of each mutant of the last run, and what it changes if no test killed it."""
    made = []
    for data in [SourceFileMutationData(path=path) for path in walk_mutatable_files()]:
        data.load()
        outcomes = {name: status_by_exit_code[code] for name, code in data.exit_code_by_key.items()}
        made += [(name, word, None if word in DEAD else changed(name, data.path)) for name, word in outcomes.items()]
    return made


def changed(name: str, path: Path | str) -> Mutant:
    """Return what a mutant changes."""
    lines = get_diff_for_mutant(name, path=path).splitlines()[2:]
    was, becomes = ("\n".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    function, owner = orig_function_and_class_names_from_key(name)
    return Mutant(".".join(filter(None, (get_module_from_key(name), owner, function))), was, becomes)


def allowed() -> Counter[Mutant]:
    """Return the survivors that are listed with a reason."""
    entries = tomllib.loads(ALLOWED.read_text(encoding="utf-8")).get("allowed", []) if ALLOWED.exists() else []
    for entry in entries:
        if not entry.get("reason", "").strip():
            raise SystemExit(f"{ALLOWED.name}: {entry['function']}, {entry['was']!r}: no reason is given.")
    return Counter(Mutant(entry["function"], entry["was"], line) for entry in entries for line in entry["becomes"])


def diff(title: str, mutant: Mutant) -> str:
    """Return a mutant as it is reported."""
    signed = (f"\n  {sign} {line}" for sign, text in zip("-+", mutant[1:], strict=True) for line in text.splitlines())
    return f"{mutant.function}  ({title})" + "".join(signed)


def as_toml(found: Counter[Mutant]) -> str:
    """Return survivors as entries that lack a reason, one for each line of code."""
    lines: dict[tuple[str, str], list[str]] = {}
    for function, was, becomes in found.elements():
        lines.setdefault((function, was), []).append(becomes)
    tables = tomlkit.aot()
    for (function, was), texts in lines.items():
        first, *others = (tomlkit.string(t, literal=True, multiline="'" in t or "\n" in t) for t in (was, *texts))
        array = tomlkit.array().multiline(len(others) > 1)
        array.extend(others)
        tables.append(tomlkit.item({"function": function, "was": first, "becomes": array, "reason": ""}))
    return tomlkit.dumps({"allowed": tables})


def main(report: Annotated[bool, typer.Option("--report", help="Report on the last run.")] = False) -> None:
    """Run the mutation test and fail on survivors that are not allowed, and on allowed ones that do not survive."""
    os.chdir(ROOT)  # where mutmut looks for its configuration
    listed = allowed()  # first: an error in it should not wait for the run
    if not report:
        shutil.rmtree(NEW.parent, ignore_errors=True)  # mutmut keeps verdicts, and does not see that a test has changed
        if code := subprocess.run([sys.executable, "-m", "mutmut", "run"]).returncode:
            raise typer.Exit(code)
    if not (run := mutants()) or any(outcome == "not checked" for _, outcome, _ in run):
        raise SystemExit("The run did not come to its end. Run again without --report.")
    found = Counter(mutant for _, _, mutant in run if mutant is not None)
    new, stale = found - listed, listed - found
    for name, outcome, mutant in run:
        if mutant is not None and mutant in new:
            print(diff(f"{outcome}; {name}", mutant))
    for entry in stale:
        print(diff(f"stale in {ALLOWED.name}: killed, or no mutant any more", entry))
    NEW.write_text(as_toml(new), encoding="utf-8")
    counts = ", ".join(f"{number} {outcome}" for outcome, number in Counter(outcome for _, outcome, _ in run).items())
    print(f"{len(run)} mutants: {counts}. Not allowed: {new.total()} (in {NEW}); stale: {stale.total()}.")
    raise typer.Exit(bool(new or stale))


if __name__ == "__main__":
    run_script(main)
