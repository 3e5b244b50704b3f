"""Rows C6, W4, W5 and W6: folds in memory and of a checkpoint on disk, as rows of the table.

    python tools/bench/folds.py C6 W4 W6               # W5 comes with W4
    python tools/bench/folds.py W6 --gigabytes 2 --peft

What is run and timed is in folding.py and in checkpoint_fold.py, which print more of it.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import checkpoint_fold
import folding
import torch
import typer
from results import Conditions, Goal, Measured, Result, report
from tqdm import tqdm

from lora_fx.cli.printing import run_script

COPY, PLANNING, COLD, IN_PLACE = "cp and fsync", "planning", ", cold", "fold, inplace=True"


def in_memory(gigabytes: float, repetitions: int) -> Result:
    """Measure a fold in memory by the clock, beside PEFT's."""
    size, seconds = _seconds("C6", gigabytes, repetitions, time.perf_counter)
    peer = _peer(seconds)
    goals = (Goal("fold", "speed", 3.0, peer),)
    notes = (f"Time of the clock, medians of {repetitions} repetitions",)
    return Result("C6", _shape(size), _all(seconds, peer), goals, Conditions.present(), notes)


def beside_bounds(gigabytes: float, repetitions: int) -> list[Result]:
    """Measure a fold's processor time beside what no fold can be faster than, and in place beside not."""
    size, seconds = _seconds("W4", gigabytes, repetitions, time.process_time)
    bound = max(("copy", "product"), key=lambda name: seconds[name])
    notes = (f"Processor time, medians of {repetitions} repetitions",)
    shape, here = _shape(size), Conditions.present()
    aside = {name: seconds[name] for name in (IN_PLACE, "fold")}
    goal, other = Goal("fold", "speed", 0.45, bound), Goal(IN_PLACE, "speed", 1.2, "fold")
    rest = {name: took for name, took in seconds.items() if name != IN_PLACE}
    return [
        Result("W4", shape, _all(rest, _peer(seconds)), (goal,), here, notes),
        Result("W5", "The same in place, of the same runs", _all(aside, "fold"), (other,), here, notes),
    ]


def _seconds(row: str, gigabytes: float, repetitions: int, clock: Callable[[], float]) -> tuple[int, dict[str, float]]:
    with tqdm(desc=row, leave=False, disable=None, bar_format="{desc}") as bar:
        return folding.measured(gigabytes, repetitions, lambda told: bar.set_description(f"{row}: {told}"), clock)


def _peer(seconds: Mapping[str, float]) -> str:
    return next(name for name in seconds if name.startswith("PEFT"))


def _all(seconds: Mapping[str, float], against: str) -> tuple[Measured, ...]:
    return tuple(Measured(name, (took,), against="" if name == against else against) for name, took in seconds.items())


def _shape(size: int) -> str:
    return f"Fold in memory of {size / 1e9:.2f} GB of bfloat16 weights, r=16; copy and product are what no fold can be faster than"


def on_disk(gigabytes: float, repetitions: int, *, peft: bool = False, directory: Path | None = None) -> Result:
    """Measure a fold on disk, with the checkpoint in the page cache and not; that of PEFT, which takes long, once if at all."""
    with checkpoint_fold.place(directory) as where:
        base, adapter, out = where / "base", where / "adapter", where / "out"
        checkpoint_fold.make(base, adapter, gigabytes)
        runs: dict[str, Callable[[], checkpoint_fold.Measured]] = {
            COPY: lambda: checkpoint_fold.copy(base, out),
            "fold": lambda: checkpoint_fold.apart(checkpoint_fold.fold, base, adapter, out),
            PLANNING: lambda: checkpoint_fold.apart(checkpoint_fold.planning, base, adapter),
            "PEFT": lambda: checkpoint_fold.apart(checkpoint_fold.fold_by_peft, base, adapter, out),
        }
        runs |= {f"{name}{COLD}": runs[name] for name in (COPY, "fold")}
        order = (COPY, "fold", f"{COPY}{COLD}", f"fold{COLD}", PLANNING, *["PEFT"] * peft)
        found: dict[str, list[checkpoint_fold.Measured]] = {name: [] for name in order}
        for number in tqdm(range(repetitions), desc="W6", leave=False, disable=None):
            for name in found if number == 0 else order[:5]:
                checkpoint_fold.cooled(base) if name.endswith(COLD) else checkpoint_fold.warmed(base)
                found[name].append(runs[name]())
                shutil.rmtree(out, ignore_errors=True)
    every = [
        Measured(
            name,
            tuple(run.seconds for run in own),
            resident=round(statistics.median(run.memory for run in own)) if name in ("fold", "PEFT") else None,
            against={"fold": COPY, "PEFT": COPY, f"fold{COLD}": f"{COPY}{COLD}"}.get(name, ""),
        )
        for name, own in found.items()
    ]
    goals = (
        Goal("fold", "time", 1.3, COPY),
        Goal(f"fold{COLD}", "time", 1.3, f"{COPY}{COLD}"),
        Goal(PLANNING, "seconds", 4.0),
    )
    shape = (
        f"Fold of a checkpoint of {gigabytes:g} GB on disk, bfloat16, all-linear, r=16, page cache warm and cold; planning reads the headers, "
        "and traces the config on the meta device"
    )
    notes = (f"Time of the clock, medians of {repetitions} repetitions{', PEFT once' * peft}",)
    return Result("W6", shape, tuple(every), goals, Conditions.present(), notes)


SIZES = {"C6": 1.0, "W4": 0.6, "W6": 4.0}
"""Row → gigabytes of weights."""


def main(
    rows: Annotated[list[str], typer.Argument(help=f"Which rows: {', '.join(SIZES)}.")],
    gigabytes: Annotated[
        float | None, typer.Option(min=0.01, help="Of weights; by default 1 for C6, 0.6 for W4, 4 for W6.")
    ] = None,
    repetitions: Annotated[int | None, typer.Option(min=1, help="Of each; by default 3, and 2 for W6.")] = None,
    peft: Annotated[bool, typer.Option("--peft", help="In W6 PEFT folds too, once.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="With sizes that take no time, and show nothing.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write what was found here.")] = None,
) -> None:
    """Measure folds."""
    unknown = [row for row in rows if row not in SIZES]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: the rows here are {', '.join(SIZES)}.")
    found: list[Result] = []
    for row in rows:
        size = 0.02 if tiny else gigabytes or SIZES[row]
        times = repetitions or (2 if row == "W6" else 3)
        torch.set_num_threads(1 if row == "W4" else 2)
        if row == "C6":
            found.append(in_memory(size, times))
        elif row == "W4":
            found += beside_bounds(size, times)
        else:
            found.append(on_disk(size, times, peft=peft))
    report(found, json)


EXAMPLES = "Example:  python tools/bench/folds.py C6 W4 --repetitions 5 --json found.json"

if __name__ == "__main__":
    run_script(main, epilog=EXAMPLES)
