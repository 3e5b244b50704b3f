"""Row W7: how long a person waits for the first compiled training step, and what a step takes then, on a CPU.

    python tools/bench/compiling.py                    # a table; minutes
    python tools/bench/compiling.py --json found.json

*Whole* is ``torch.compile`` of the model. *By layers* compiles the layers alone (``layer.compile()`` of each, what torch calls regional
compilation): all are of one class, so that the first is compiled and the others take its code. Of a graph they are those of
``lora_fx.nest``. Nothing is taken from inductor's caches. Its imports and its first call of the C++ compiler are made before, by a
module of one linear. Times are those of the clock, since the compiler has processes of its own.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import transformers
import typer
from contenders import Adapter, Contender, compared, rewritten, set_factors
from measuring import alternating, shown
from results import Conditions, Goal, Measured, Result, report
from shapes import Llama, Timed, batch_of, built
from torch import nn

import lora_fx
from lora_fx.cli.printing import run_script

ROW = Timed("W7", Llama(width=256, inner=704, layers=8, heads=8), 4, 64, 11)
ADAPTER = Adapter("all-linear", "all-linear", rank=16, alpha=32)
WHOLE, BY_LAYERS, NESTED = "PEFT, whole", "PEFT, by layers", "nested, by layers"
FIRST = "first step"
LAYER = "LlamaDecoderLayer"


def contenders_of(row: Timed) -> list[Contender]:
    """Return who takes the step, as yet nothing compiled."""
    torch.manual_seed(0)
    model = built(row.model, torch.float32)
    batch = batch_of(model, row.batch, row.sequence)
    modules: dict[str, nn.Module] = {
        WHOLE: peft.get_peft_model(copy.deepcopy(model), ADAPTER.peft_config()),
        BY_LAYERS: peft.get_peft_model(copy.deepcopy(model), ADAPTER.peft_config()),
        NESTED: lora_fx.nest(rewritten(model, ADAPTER, batch)),
    }
    set_factors(*modules.values())
    return [Contender(name, module.train(), batch, module) for name, module in modules.items()]


def to_compile(contender: Contender, backend: str) -> Contender:
    """Return a contender that compiles in its first step: all of it, or its layers."""
    if contender.name == WHOLE:
        return replace(contender, call=torch.compile(contender.module, backend=backend))
    layers = [module for module in contender.module.modules() if type(module).__name__ == LAYER]
    if len(layers) < 2:
        raise SystemExit(f"{contender.name}: expected several modules of class {LAYER}, got {len(layers)}")
    for layer in layers:
        layer.compile(backend=backend)
    return contender


def first_step(contender: Contender) -> float:
    """Return the seconds of a step."""
    start = time.perf_counter()
    contender.step()
    return time.perf_counter() - start


def measured(row: Timed, backend: str = "inductor") -> Result:
    """Measure the row.

    Args:
        row: its sizes.
        backend: of ``torch.compile``.
    """
    torch.compile(nn.Linear(3, 2), backend=backend)(torch.ones(5, 3)).sum().backward()
    found = [to_compile(each, backend) for each in contenders_of(row)]
    first = {each.name: first_step(each) for each in found}
    apart_by = compared(found, 1e-4)
    times = alternating({each.name: each.step for each in found}, row.repetitions, warm_up=1, says=row.name)
    every = [
        *(Measured(f"{name}: {FIRST}", (took,), against=f"{WHOLE}: {FIRST}") for name, took in first.items()),
        *(Measured(name, times[name], difference=apart_by[name], against=WHOLE) for name in times),
    ]
    goals = (
        Goal(f"{NESTED}: {FIRST}", "speed", 5.0, f"{WHOLE}: {FIRST}"),
        Goal(f"{NESTED}: {FIRST}", "time", 1.0, f"{BY_LAYERS}: {FIRST}"),
        Goal(NESTED, "time", 1.03, WHOLE),
    )
    own = row.model
    shape = (
        f"The first compiled training step, and those after it: Llama, width {own.width}, inner {own.inner}, {own.layers} layers, float32, "
        f"batch {row.batch} × {row.sequence}, all-linear, r={ADAPTER.rank}, dropout 0"
    )
    unlike = ", ".join(f"{name} {shown(apart_by[name])}" for name in apart_by if name != WHOLE)
    notes = (
        f"Loss and gradients against those of {WHOLE}: {unlike}",
        f"First steps once, without caches; {row.repetitions} repetitions of the others",
    )
    return Result(row.name, shape, tuple(every), goals, Conditions.present(), notes)


def main(
    tiny: Annotated[bool, typer.Option("--tiny", help="With sizes that take little time, and show nothing.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Also write what was found here.")] = None,
) -> None:
    """Measure the time to the first compiled training step, beside PEFT's."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    settings: Any = torch._inductor.config
    settings.force_disable_caches = True
    with tempfile.TemporaryDirectory() as directory:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory
        report([measured(ROW.tiny() if tiny else ROW)], json)


if __name__ == "__main__":
    run_script(main)
