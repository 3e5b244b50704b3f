"""All rows that need no GPU, one after another, each in a process of its own; the table of them is in README.md beside this file.

    python tools/bench                                 # what ``make bench`` runs, without --write
    python tools/bench --all                           # what ``make bench-all`` runs: the rows of MORE too
    python tools/bench C2 C9                           # these rows; the others of the table are as they were found before
    python tools/bench --write                         # puts the table into the guide

Each row is found in OUT/<row>.json, and the table is made of all that are there: also of H1, H1-long, H2 and H3, which
``python tools/bench/gpu.py H1 --json OUT/H1.json`` writes on a machine with a GPU.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from results import Result, load, table
from tqdm import tqdm

from lora_fx.cli.printing import run_script

sys.path.append(str(Path(__file__).parent.parent))

import guides

HERE = Path(__file__).parent
ROWS: dict[str, tuple[str, ...]] = {
    "C1": ("training.py", "C1", "--compile"),
    "C2": ("training.py", "C2"),
    "C3": ("training.py", "C3"),
    "C4": ("training.py", "C4"),
    "C5": ("training.py", "C5"),
    "C6": ("folds.py", "C6"),
    "C8": ("tracing.py", "C8"),
    "C9": ("inference.py",),
    "W1": ("rewriting.py", "W1"),
    "W2": ("rewriting.py", "W2"),
    "W3": ("tracing.py", "W3"),
    "W4": ("folds.py", "W4"),
    "W6": ("folds.py", "W6"),
    "W7": ("compiling.py",),
    "W9": ("loading.py",),
    "W10": ("large_graph.py",),
}
"""What each row of ``make bench`` runs."""

MORE: dict[str, tuple[str, ...]] = {
    "G1": ("generation.py",),
    "Q1": ("quantised_decoding.py",),
    "Q2": ("quantised.py",),
    "K1": ("checkpointing.py",),
}
"""What the further rows of ``make bench-all`` run; their tables stand for themselves in the guide."""

ORDER = (*ROWS, "H1", "H1-long", "H2", "H3")


def run(row: str, path: Path, *, tiny: bool) -> str | None:
    """Measure a row, and return what went wrong, if anything did."""
    tool, *arguments = (ROWS | MORE)[row]
    command = [sys.executable, str(HERE / tool), *arguments, "--json", str(path), *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"{row}: {' '.join(command)}\n{done.stderr[-2000:]}"


def found_in(directory: Path, rows: Iterable[str] = (*ORDER, *MORE)) -> list[Result]:
    """Return the rows that were measured, in the order of the table."""
    paths = (directory / f"{row}.json" for row in rows)
    return [result for path in paths if path.exists() for result in load(path)]


def main(
    rows: Annotated[list[str] | None, typer.Argument(help="Which rows; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="Where what was found is written, a JSON file a row.")] = Path(
        "bench-output"
    ),
    every: Annotated[
        bool, typer.Option("--all", help="All rows by default, and not only those of `make bench`.")
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="Put the table into the guide.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="With sizes that take little time, and show nothing.")] = False,
) -> None:
    """Run the benchmarks, and print the table."""
    chosen = rows or [*ROWS, *(MORE if every else ())]
    unknown = [row for row in chosen if row not in ROWS | MORE]
    if unknown:
        raise typer.BadParameter(
            f"{', '.join(unknown)}: the rows are {', '.join(ROWS | MORE)}; H1 to H3 are in gpu.py."
        )
    out.mkdir(parents=True, exist_ok=True)
    failures = []
    for row in (bar := tqdm(chosen, unit="row")):
        bar.set_description(row)
        start = time.perf_counter()
        failure = run(row, out / f"{row}.json", tiny=tiny)
        bar.write(f"{row}: {time.perf_counter() - start:.0f} s{'' if failure is None else ', failed'}", file=sys.stderr)
        failures += [] if failure is None else [failure]
    text = table(found_in(out))
    print(text)
    for failure in failures:
        print(failure, file=sys.stderr)
    if failures:
        raise typer.Exit(1)
    if write:
        for marker, its_rows in {
            "tools/bench": ORDER,
            **{f"tools/bench/{MORE[row][0]}": (row,) for row in MORE},
        }.items():
            if found := found_in(out, its_rows):
                guides.write(marker, table(found))


EXAMPLES = "Examples:  python tools/bench --write   ·   python tools/bench C2 C9 --out found"

if __name__ == "__main__":
    run_script(main, epilog=EXAMPLES)
