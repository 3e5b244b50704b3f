"""Rows C8 and W3: tracing and rewriting Llamas of real widths on the meta device, with equal layers traced once and in full.

    python tools/bench/tracing.py C8                   # in train and eval mode; four minutes
    python tools/bench/tracing.py W3 --json found.json # with inference=True

Every run is in a process of its own, with what is imported and made on first use. Times are of the processor: one thread of Python
does it all, so that other work on the machine counts for little. The graphs of both ways are compared node by node.
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer
from measuring import apart
from results import Conditions, Goal, Measured, Result, report
from shapes import LLAMA_8B, LLAMA_70B, Llama, built
from torch import nn
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent.parent))

from graph_diff import first_difference

import lora_fx
from lora_fx.cli.printing import run_script


@dataclass(frozen=True)
class Way:
    """How a model is traced.

    Attributes:
        model: its shape.
        full: trace every layer.
        inference: trace the eval mode alone; else that and the train mode.
        against: the name of the way that its speed is relative to.
        repetitions: in processes of their own.
    """

    model: Llama
    full: bool
    inference: bool
    against: str
    repetitions: int

    @property
    def name(self) -> str:
        """As the table has it."""
        modes = ", inference=True" if self.inference else ""
        return f"{self.model.layers} layers{modes}{', in full' if self.full else ''}"


def ways(row: str, repetitions: int, small: Llama = LLAMA_8B, large: Llama = LLAMA_70B) -> list[Way]:
    """Return what is measured; full traces, which take long, once."""
    inference = row == "W3"
    full = Way(small, True, inference, "", 1)
    largest = [] if inference else [Way(large, False, False, "", repetitions)]
    return [full, Way(small, False, inference, full.name, repetitions), *largest]


def in_full() -> AbstractContextManager[object]:
    """Let no layers count as equal."""

    def none(_: nn.Module) -> list[object]:
        return []

    return mock.patch("lora_fx.tracing.trace.layer_classes", none)


def rewritten(way: Way) -> lora_fx.TracedGraphModule:
    """Trace and rewrite a model without weights."""
    model = built(way.model, torch.float32, "meta").eval()
    with in_full() if way.full else nullcontext():
        return lora_fx.rewrite(model, "llama", rank=16, inference=way.inference)


def seconds(way: Way) -> float:
    """Return the processor time of a trace and a rewrite, without that of making the model."""
    model, rewrite = built(way.model, torch.float32, "meta").eval(), lora_fx.rewrite  # which imports what it needs
    with in_full() if way.full else nullcontext():
        start = time.process_time()
        rewrite(model, "llama", rank=16, inference=way.inference)
        return time.process_time() - start


def unlike(model: Llama, inference: bool) -> str | None:
    """Return what first differs between the graphs of both ways."""
    full, stamped = (rewritten(Way(model, full, inference, "", 1)) for full in (True, False))
    return first_difference(full, stamped)


def measured(
    row: str,
    repetitions: int,
    small: Llama = LLAMA_8B,
    large: Llama = LLAMA_70B,
) -> Result:
    """Measure a row."""
    every = ways(row, repetitions, small, large)
    times: dict[str, list[float]] = {way.name: [] for way in every}
    with tqdm(total=sum(way.repetitions for way in every) + 1, desc=row, leave=False, disable=None) as bar:
        difference = apart(unlike, small, row == "W3")
        bar.update()
        for number in range(repetitions):
            for way in every:
                if number < way.repetitions:
                    times[way.name].append(apart(seconds, way))
                    bar.update()
    if difference is not None:
        raise SystemExit(f"stamped and in full are not the same graph: {difference}")
    full, stamped, *largest = every
    goals = (Goal(stamped.name, "speed", 9.0, full.name), *(Goal(way.name, "seconds", 5.0) for way in largest))
    notes = (
        "In full means every layer; both ways give the same graph, node by node",
        f"Processor time, medians of {repetitions} processes, full traces once",
    )
    found = [Measured(way.name, tuple(times[way.name]), against=way.against) for way in every]
    modes = "with inference=True" if row == "W3" else "in train and eval mode"
    sizes = ", ".join(
        f"width {each.width} with {each.layers} layers" for each in ([small] if row == "W3" else [small, large])
    )
    shape = f"Trace and rewrite (q and v) of Llama on the meta device, {modes}: {sizes}"
    return Result(row, shape, tuple(found), goals, Conditions.present(), notes)


def main(
    row: Annotated[str, typer.Argument(help="C8 or W3.")],
    repetitions: Annotated[int, typer.Option(min=1, help="Processes for each way; full traces are made once.")] = 3,
    tiny: Annotated[bool, typer.Option("--tiny", help="With sizes that take little time, and show nothing.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write what was found here.")] = None,
) -> None:
    """Measure tracing and rewriting."""
    if row not in ("C8", "W3"):
        raise typer.BadParameter(f"{row}: the rows here are C8 and W3.")
    torch.set_num_threads(1)
    shapes = (LLAMA_8B.tiny(5), LLAMA_70B.tiny(6)) if tiny else (LLAMA_8B, LLAMA_70B)
    found = measured(row, repetitions, *shapes)
    report([found], json)


EXAMPLES = "Example:  python tools/bench/tracing.py C8 --repetitions 1 --json found.json"

if __name__ == "__main__":
    run_script(main, epilog=EXAMPLES)
