"""Rows C9: a folded graph beside the model that it was traced from, untouched, both computing with the merged weights, on a CPU.

    python tools/bench/inference.py                    # a table
    python tools/bench/inference.py --no-compile       # without torch.compile of both

C9 waits for products; C9-small, of one token, for Python and torch's dispatcher.

The eager model runs twice in each repetition, so that the table shows what differences are of the machine alone. It counts as
within noise if the graph's median time is at most the third quartile of the model's times. Outputs are compared before.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from contenders import set_factors
from measuring import alternating, difference, shown
from results import Conditions, Goal, Measured, Result, report
from shapes import Llama, Timed, batch_of

import lora_fx
from lora_fx.cli.printing import run_script


@dataclass(frozen=True)
class Row(Timed):
    """What is measured.

    Attributes:
        compiled: measure ``torch.compile`` of both too.
    """

    compiled: bool


ROWS = (
    Row("C9", Llama(width=1024, inner=2816, layers=4, heads=16), 4, 128, 25, compiled=True),
    Row("C9-small", Llama(width=256, inner=704, layers=12, heads=4), 1, 1, 300, compiled=False),
)
TOLERANCE = 1e-5
"""How far the outputs of compiled code may be from those of the model."""


def measured(row: Row) -> Result:
    """Measure one row."""
    model = row.model
    torch.manual_seed(0)
    eager: Any = model.build().eval().requires_grad_(False)
    branched = lora_fx.rewrite(eager, "all-linear", rank=16, alpha=32, seed=0)
    set_factors(branched)
    folded = lora_fx.fold(branched.eval())
    merged = copy.deepcopy(eager)
    merged.load_state_dict(folded.state_dict())
    inputs = batch_of(eager, row.batch, row.sequence)
    del inputs["labels"]
    calls: dict[str, Any] = {"eager": merged, "folded": folded, "eager, once more": merged}
    goals = [Goal("folded", "noise", 1.0, "eager")]
    if row.compiled:
        calls |= {"eager, compiled": torch.compile(merged), "folded, compiled": torch.compile(folded)}
        goals.append(Goal("folded, compiled", "noise", 1.0, "eager, compiled"))
    with torch.no_grad():
        logits = {name: call(**inputs).logits for name, call in calls.items()}
        apart = {name: difference({"": found}, {"": logits["eager"]}) for name, found in logits.items()}
        if apart["folded"] > 0 or max(apart.values()) > TOLERANCE:
            raise SystemExit(f"the outputs are not the same, and there is nothing to time: {apart}")
        times = alternating({name: _step(call, inputs) for name, call in calls.items()}, row.repetitions, says=row.name)
    against = {"folded": "eager", "eager, once more": "eager", "folded, compiled": "eager, compiled"}
    found = [Measured(name, times[name], difference=apart[name], against=against.get(name, "")) for name in calls]
    unlike = ", ".join(f"{name} {shown(apart[name])}" for name in calls if "eager" not in name)
    notes = (f"Logits against the eager model's: {unlike}", f"{row.repetitions} repetitions")
    shape = f"Inference of Llama, width {model.width}, inner {model.inner}, {model.layers} layers, batch {row.batch} × {row.sequence}"
    return Result(row.name, shape, tuple(found), tuple(goals), Conditions.present(), notes)


def _step(call: Any, inputs: dict[str, torch.Tensor]) -> Any:
    return lambda: call(**inputs)


def main(
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="With torch.compile of both.")] = True,
    tiny: Annotated[bool, typer.Option("--tiny", help="With sizes that take no time, and show nothing.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Also write what was found here.")] = None,
) -> None:
    """Measure folded inference beside the eager model's."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    rows = [row.tiny() if tiny else row for row in ROWS]
    report([measured(replace(row, compiled=row.compiled and compiled)) for row in rows], json)


EXAMPLES = "Example:  python tools/bench/inference.py --no-compile --json found.json"

if __name__ == "__main__":
    run_script(main, epilog=EXAMPLES)
