"""Rows C6 and C7: a fold in memory and one of a checkpoint on disk, as rows of the table.

    python tools/bench/folds.py C6 C7
    python tools/bench/folds.py C7 --gigabytes 4

What is run and timed is in folding.py and in checkpoint_fold.py, which print more of it.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import checkpoint_fold
import folding
import typer
from results import Conditions, Goal, Measured, Result, report
from tqdm import tqdm

from lora_fx.cli.printing import run_script


def in_memory(gigabytes: float, repetitions: int) -> Result:
    """Measure a fold in memory."""
    with tqdm(desc="C6", leave=False, disable=None, bar_format="{desc}") as bar:
        size, seconds = folding.measured(gigabytes, repetitions, lambda told: bar.set_description(f"C6: {told}"))
    peer = next(name for name in seconds if name.startswith("PEFT"))
    bound = max(("copy", "product"), key=lambda name: seconds[name])
    found = [Measured(name, (took,), against="" if name == peer else peer) for name, took in seconds.items()]
    goals = (Goal("fold", "speed", 0.7, bound), Goal("fold", "speed", 3.0, peer))
    shape = f"Fold in memory of {size / 1e9:.2f} GB of bfloat16 weights, r=16; copy and product are what no fold can be faster than"
    return Result("C6", shape, tuple(found), goals, Conditions.present(), (f"Medians of {repetitions} repetitions",))


def on_disk(gigabytes: float, repetitions: int, *, peft: bool = True, directory: Path | None = None) -> Result:
    """Measure a fold on disk; that of PEFT, which takes long, once."""
    with checkpoint_fold.place(directory) as where:
        base, adapter, out = where / "base", where / "adapter", where / "out"
        checkpoint_fold.make(base, adapter, gigabytes)
        runs: dict[str, Callable[[], checkpoint_fold.Measured]] = {
            "cp and fsync": lambda: checkpoint_fold.copy(base, out),
            "fold": lambda: checkpoint_fold.apart(checkpoint_fold.fold, base, adapter, out),
            "PEFT": lambda: checkpoint_fold.apart(checkpoint_fold.fold_by_peft, base, adapter, out),
        }
        found: dict[str, list[checkpoint_fold.Measured]] = {name: [] for name in runs if peft or name != "PEFT"}
        for number in tqdm(range(repetitions), desc="C7", leave=False, disable=None):
            for name in found if number == 0 else ("cp and fsync", "fold"):
                checkpoint_fold.warmed(base)
                found[name].append(runs[name]())
                shutil.rmtree(out)
    every = [
        Measured(
            name,
            tuple(run.seconds for run in own),
            resident=None if name == "cp and fsync" else round(statistics.median(run.memory for run in own)),
            against="" if name == "cp and fsync" else "cp and fsync",
        )
        for name, own in found.items()
    ]
    goals = (Goal("fold", "time", 1.3, "cp and fsync"),)
    shape = f"Fold of a checkpoint of {gigabytes:g} GB on disk, bfloat16, all-linear, r=16, page cache warm"
    notes = (f"Medians of {repetitions} repetitions, PEFT once",)
    return Result("C7", shape, tuple(every), goals, Conditions.present(), notes)


def main(
    rows: Annotated[list[str], typer.Argument(help="Which rows: C6, C7.")],
    gigabytes: Annotated[
        float | None, typer.Option(min=0.01, help="Of weights; by default 1 for C6, 2 for C7.")
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Of each.")] = 3,
    tiny: Annotated[bool, typer.Option("--tiny", help="With sizes that take no time, and show nothing.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write what was found here.")] = None,
) -> None:
    """Measure folds."""
    unknown = [row for row in rows if row not in ("C6", "C7")]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: the rows here are C6 and C7.")
    found = []
    for row in rows:
        size = 0.02 if tiny else gigabytes or {"C6": 1.0, "C7": 2.0}[row]
        found.append(in_memory(size, repetitions) if row == "C6" else on_disk(size, repetitions, peft=not tiny))
    report(found, json)


EXAMPLES = "Example:  python tools/bench/folds.py C6 C7 --repetitions 5 --json found.json"

if __name__ == "__main__":
    run_script(main, epilog=EXAMPLES)
