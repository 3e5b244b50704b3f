"""Row Q1: a decode step by onnxruntime with weights in 4 bits, beside the same with dense ones; an adapter is in slots of each.

    python tools/bench/quantised_decoding.py                    # a table
    python tools/bench/quantised_decoding.py --json found.json

One token behind a cache, a batch of one, on one thread. Processor time, which other programs on the machine change less than time on
the clock. The two graphs have the same values: the dense one is made of the codes.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import torch
import typer
from contenders import set_factors
from generation import of_session, options, processor_time
from measuring import alternating
from results import Conditions, Goal, Measured, Result, report
from shapes import Llama
from torch import nn

import lora_fx
from lora_fx.cli.printing import run_script
from lora_fx.demo_generation import empty_past
from lora_fx.graph.graph_module import rebuilt, state_of
from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.numerics.schemes import parse_scheme
from lora_fx.runtime import OnnxSession

SHAPE = Llama(width=1024, inner=2816, layers=4, heads=16)
PAST = 128
DENSE, SCHEMES = "dense", ("nf4", "int4:32")


def quantised(graph: Any, text: str) -> Any:
    """Return a graph with the matrices of its layers quantised."""
    names = [name for name in state_of(graph).tensors if name.endswith("_proj.weight")]
    scheme = parse_scheme(text)
    made = {name: QuantisedWeight.of(state_of(graph).tensors[name].detach(), scheme) for name in names}
    return rebuilt(graph, tensors={name: nn.Parameter(each, requires_grad=False) for name, each in made.items()})


def sessions(shape: Llama, place: Path) -> dict[str, tuple[Path, OnnxSession]]:
    """Write the model in each way, and return file and session, with an adapter loaded."""
    torch.manual_seed(0)
    model = shape.build().eval().requires_grad_(False)
    plain = lora_fx.trace(model, cache=True, inference=True)
    found = {}
    for text in SCHEMES:
        branched = lora_fx.rewrite(quantised(plain, text), "all-linear", rank=16, alpha=32)
        set_factors(branched)
        for name, codes in ((f"{DENSE} of {text}", False), (text, True)):
            path = place / f"{name.replace(':', '-')}.onnx"
            lora_fx.export.onnx(branched, path, slots=True, quantised=codes, verify=False)
            adapter = path.with_suffix(".onnx_adapter")
            lora_fx.export.onnx_adapter(branched, adapter)
            session = OnnxSession(path, options=options())
            session.load("tuned", adapter)
            found[name] = (path, session)
    return found


def measured(shape: Llama, past: int, repetitions: int, place: Path) -> Result:
    """Measure the row."""
    made = sessions(shape, place)
    generator = np.random.default_rng(0)
    inputs: dict[str, Any] = {
        "input_ids": np.array([[5]]),
        "attention_mask": np.ones((1, past + 1), np.int64),
        "position_ids": np.array([[past]]),
    }
    path, _ = next(iter(made.values()))
    _, shapes = of_session(onnxruntime.InferenceSession(path, options()))
    for name, empty in empty_past(shapes).items():
        inputs[name] = generator.standard_normal((1, empty.shape[1], past, empty.shape[3])).astype(np.float32)
    steps = {name: partial(session.run, inputs, adapter="tuned") for name, (_, session) in made.items()}
    logits = {name: torch.from_numpy(step()["logits"]) for name, step in steps.items()}
    times = alternating(steps, repetitions, clock=processor_time, says="Q1")
    contenders, notes = [], []
    for name in made:
        against = "" if name.startswith(DENSE) else f"{DENSE} of {name}"
        beside = logits[against or name]
        difference = float((logits[name] - beside).abs().max() / beside.abs().max())
        contenders.append(Measured(name, times[name], difference=difference, against=against))
        notes.append(f"{name}: {made[name][0].stat().st_size / 1e6:.0f} MB")
    if max(each.difference or 0.0 for each in contenders) > 1e-4:
        raise SystemExit(f"the logits are not the same, and there is nothing to time: {contenders}")
    words = (
        f"one token behind {past} in a cache, Llama, width {shape.width}, inner {shape.inner}, {shape.layers} layers, slots with an adapter "
        "of rank 16 at all linears, onnxruntime, processor time"
    )
    goals = (
        Goal("int4:32", "speed", 1.0, f"{DENSE} of int4:32"),
    )  # onnxruntime's kernel of NF4 is slower than a dense product
    conditions = Conditions.present(("torch", "transformers", "onnxruntime"))
    return Result("Q1", words, tuple(contenders), goals, conditions, (f"Files: {', '.join(notes)}",))


def main(
    tiny: Annotated[bool, typer.Option("--tiny", help="With sizes that take little time, and show nothing.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write what was found here.")] = None,
) -> None:
    """Measure a decode step with weights in 4 bits."""
    torch.set_num_threads(1)
    shape = replace(SHAPE, width=64, inner=128, layers=1, heads=2) if tiny else SHAPE
    with tempfile.TemporaryDirectory() as place:
        report([measured(shape, 8 if tiny else PAST, 3 if tiny else 15, Path(place))], json)


EXAMPLES = "Example:  python tools/bench/quantised_decoding.py --json found.json"

if __name__ == "__main__":
    run_script(main, epilog=EXAMPLES)
