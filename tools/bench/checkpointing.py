"""Row K1: a training step with activation checkpointing beside PEFT's, on a CPU: its time, of the processor, and its peak memory.

    python tools/bench/checkpointing.py                # a table; minutes
    python tools/bench/checkpointing.py --json found.json

A step is that of training.py. *Nested* is the graph after ``lora_fx.nest``; *again* says that all layers are computed again in the
backward pass, and *kept* that the results of attention are kept. Loss and gradients of graphs that are not fused are PEFT's, bit for
bit, before anything is timed.
"""

from __future__ import annotations

import copy
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import transformers
import typer
from contenders import Adapter, Contender, compared, rewritten, set_factors
from measuring import alternating, peak_bytes, shown
from results import Conditions, Goal, Measured, Result, report
from shapes import Llama, Timed, batch_of, built
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import lora_fx
from lora_fx.cli.printing import run_script

ROW = Timed("K1", Llama(width=384, inner=1024, layers=8, heads=6), 4, 256, 15)
ADAPTER = Adapter("all-linear", "all-linear", rank=8, alpha=16, dropout=0.1)
GOALS = (
    Goal("nested", "time", 1.02, "plain"),
    Goal("nested, again", "time", 1.05, "PEFT, again"),
    Goal("nested, again", "peak", 1.0, "PEFT, again"),
    Goal("fused, nested, again", "peak", 0.75, "PEFT, again"),
)

ATTENTION = [torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default]


def contenders_of(row: Timed) -> list[Contender]:
    """Return who takes the step."""
    torch.manual_seed(0)
    model = built(row.model, torch.float32)
    batch = batch_of(model, row.batch, row.sequence)
    plain = rewritten(model, ADAPTER, batch)
    modules: dict[str, Any] = {
        "PEFT": peft.get_peft_model(copy.deepcopy(model), ADAPTER.peft_config()),
        "plain": plain,
        "nested": lora_fx.nest(plain),
        "PEFT, again": peft.get_peft_model(copy.deepcopy(model), ADAPTER.peft_config()),
        "nested, again": lora_fx.nest(plain),
        "nested, again, kept": lora_fx.nest(plain),
        "fused, nested, again": lora_fx.nest(lora_fx.fuse(plain)),
    }
    set_factors(*modules.values())
    for name, module in modules.items():
        if "again" in name:
            contexts = partial(create_selective_checkpoint_contexts, ATTENTION)
            module.activation_checkpointing_enable({"context_fn": contexts} if "kept" in name else None)
    return [Contender(name, module.train(), batch, module) for name, module in modules.items()]


def measured(row: Timed) -> Result:
    """Measure the row."""
    found = contenders_of(row)
    unfused = [each for each in found if "fused" not in each.name]
    apart_by = compared(unfused, 0.0) | compared([found[0], *(each for each in found if "fused" in each.name)], 1e-4)
    saved = {each.name: each.saved() for each in found}
    peaks = {each.name: peak_bytes(each.step) for each in found}
    for each in found:
        each.clear()
    steps = {each.name: each.step for each in found}
    times = alternating(steps, row.repetitions, warm_up=1, clock=lambda _: time.process_time(), says=row.name)
    del found, unfused, steps
    every = [
        Measured(
            name,
            times[name],
            saved[name],
            peaks[name],
            difference=apart_by[name],
            against="" if name == "PEFT" else "PEFT",
        )
        for name in times
    ]
    shape = (
        f"Llama, width {row.model.width}, inner {row.model.inner}, {row.model.layers} layers, float32, batch {row.batch} × {row.sequence}, "
        f"all-linear, r={ADAPTER.rank}, dropout {ADAPTER.dropout:g}"
    )
    unlike = ", ".join(f"{name} {shown(apart_by[name])}" for name in apart_by if name != "PEFT")
    notes = (f"Loss and gradients against PEFT's: {unlike}", f"Processor time, {row.repetitions} repetitions")
    return Result(row.name, shape, tuple(every), GOALS, Conditions.present(), notes)


def main(
    tiny: Annotated[bool, typer.Option("--tiny", help="With sizes that take no time, and show nothing.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Also write what was found here.")] = None,
) -> None:
    """Measure a training step with activation checkpointing beside PEFT's."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    report([measured(ROW.tiny() if tiny else ROW)], json)


if __name__ == "__main__":
    run_script(main)
