"""Rows C1 to C5: a training step beside PEFT's, on a CPU: its time, what it keeps for backward, and its peak memory.

    python tools/bench/training.py C1                  # a table
    python tools/bench/training.py C1 --compile        # with torch.compile of PEFT and of the fused graph beside them
    python tools/bench/training.py C3 C4 --json found.json

A step is the forward pass with the loss, and the backward pass, in train mode. *Frozen* is the same graph on embeddings that
require a gradient, with no branches; Ω is how much longer a step takes than that one. Before anything is timed, loss and gradients
are compared under one random state: the plain graph's are PEFT's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from contenders import NAMES, Adapter, Contender, compared, contenders
from measuring import alternating, apart, peak_bytes, resident_bytes, shown
from results import Conditions, Goal, Measured, Result, report
from shapes import MT5, Llama, Timed, batch_of, built

from lora_fx.cli.printing import run_script

ALL_LINEAR = Adapter("all-linear", "all-linear", rank=16, alpha=32)
SEEDS_RULE = Adapter("t5", ("q", "v"), rank=8, alpha=32, dropout=0.1)
RESIDENT = ("PEFT", "fused")
"""Of whom resident memory is measured."""

LIMIT = 120.0
"""Seconds after which no repetition begins."""

SMALL_LLAMA = Llama(width=1024, inner=2816, layers=4, heads=16)


@dataclass(frozen=True, kw_only=True)
class Row(Timed):
    """What is measured.

    Attributes:
        adapter: what is added.
        goals: what is to be reached.
        dtype: of the base; factors are float32.
        resident: measure resident memory too, each in a process of its own.
    """

    adapter: Adapter
    goals: tuple[Goal, ...]
    dtype: torch.dtype = torch.float32
    resident: bool = False

    @property
    def shape(self) -> str:
        """The row in words."""
        kind, own, adapter = type(self.model).__name__, self.model, self.adapter
        targets = adapter.targets if isinstance(adapter.targets, str) else " and ".join(adapter.targets)
        return (
            f"{kind}, width {own.width}, inner {own.inner}, {own.layers} layers, {str(self.dtype).removeprefix('torch.')}, batch "
            f"{self.batch} × {self.sequence}, {targets}, r={adapter.rank}, dropout {adapter.dropout:g}"
        )

    @property
    def tolerance(self) -> float:
        """How far gradients may be apart by rounding."""
        return 1e-4 if self.dtype == torch.float32 else 0.05


ROWS = (
    Row(
        "C1",
        SMALL_LLAMA,
        4,
        128,
        11,
        adapter=ALL_LINEAR,
        goals=(
            Goal("fused", "speed", 1.05, "PEFT"),
            Goal("fused", "resident", 0.8, "PEFT"),
            Goal("fused, compiled", "speed", 1.0, "PEFT, compiled"),
        ),
        resident=True,
    ),
    Row(
        "C2",
        Llama(width=256, inner=704, layers=12, heads=4),
        1,
        32,
        60,
        adapter=ALL_LINEAR,
        goals=(Goal("fused", "speed", 1.15, "PEFT"),),
    ),
    Row(
        "C3",
        SMALL_LLAMA,
        4,
        128,
        9,
        adapter=ALL_LINEAR,
        goals=(Goal("fused", "overhead", 0.5, "PEFT"), Goal("fused", "saved", 0.3, "PEFT")),
        dtype=torch.bfloat16,
    ),
    Row(
        "C4",
        SMALL_LLAMA,
        4,
        128,
        11,
        adapter=replace(ALL_LINEAR, dropout=0.1),
        goals=(Goal("fused", "speed", 1.0, "PEFT"), Goal("fused", "saved", 0.45, "PEFT")),
    ),
    Row(
        "C5",
        MT5(width=512, inner=1024, layers=8, heads=6, head=64),
        4,
        128,
        11,
        adapter=SEEDS_RULE,
        goals=(Goal("fused", "speed", 1.0, "PEFT"),),
    ),
)


def contenders_of(row: Row, names: Collection[str] = NAMES) -> list[Contender]:
    """Return who takes the step of a row."""
    torch.manual_seed(0)
    model = built(row.model, row.dtype)
    return contenders(model, row.adapter, batch_of(model, row.batch, row.sequence), names)


def resident(row: Row, name: str) -> int | None:
    """Return the resident memory that the step of one contender takes; to be called in a process of its own."""
    (contender,) = contenders_of(row, (name,))
    return resident_bytes(contender.step)


def measured(row: Row, *, compiled: bool = False) -> Result:
    """Measure one row."""
    found = contenders_of(row)
    if compiled:
        *others, frozen = found
        found = [*others, *(each.compiled() for each in others if each.name in ("PEFT", "fused")), frozen]
    apart_by = compared(found, row.tolerance)
    saved = {each.name: each.saved() for each in found}
    peaks = {each.name: peak_bytes(each.step) for each in found}
    for each in found:
        each.clear()
    times = alternating(
        {each.name: each.step for each in found}, row.repetitions, warm_up=1, says=row.name, limit=LIMIT
    )
    del found
    every = [
        Measured(
            name,
            times[name],
            saved[name],
            peaks[name],
            apart(resident, row, name) if row.resident and name in RESIDENT else None,
            apart_by.get(name),
            against="" if name == "PEFT" else "PEFT",
        )
        for name in times
    ]
    unlike = ", ".join(f"{name} {shown(apart_by[name])}" for name in apart_by if name != "PEFT")
    notes = (
        f"Loss and gradients against PEFT's: {unlike}",
        f"{len(times['PEFT'])} repetitions",
    )
    return Result(row.name, row.shape, tuple(every), row.goals, Conditions.present(), notes)


def chosen(names: Iterable[str]) -> list[Row]:
    """Return the rows of these names."""
    rows = {row.name: row for row in ROWS}
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: the rows here are {', '.join(rows)}.")
    return [rows[name] for name in names]


def main(
    rows: Annotated[list[str], typer.Argument(help="Which rows: C1, C2, C3, C4, C5.")],
    compiled: Annotated[bool, typer.Option("--compile", help="With torch.compile too, which takes minutes.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="With sizes that take no time, and show nothing.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Also write what was found here.")] = None,
) -> None:
    """Measure a training step beside PEFT's."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    found = [measured(row.tiny() if tiny else row, compiled=compiled) for row in chosen(rows)]
    report(found, json)


EXAMPLES = "Examples:  python tools/bench/training.py C1 --compile   ·   python tools/bench/training.py C3 C4 --json found.json"

if __name__ == "__main__":
    run_script(main, epilog=EXAMPLES)
