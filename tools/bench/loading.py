"""Row W9: many adapters loaded onto a graph of 32 layers, and one of them activated, beside PEFT.

    python tools/bench/loading.py                      # a table
    python tools/bench/loading.py --adapters 200 --json found.json

Every adapter is loaded from a directory of its own, as :func:`lora_fx.save_adapter` writes it, and with all checks; PEFT loads the same
directories into the model. Times are of the processor: of each load, so that the growth with the number of adapters shows, and of making
one adapter after the other act. Before anything is timed, outputs with one of them are compared.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import transformers
import typer
from measuring import difference
from results import Conditions, Goal, Measured, Result, report
from shapes import Llama, batch_of, built
from torch import nn
from tqdm import tqdm

import lora_fx
from lora_fx.cli.printing import run_script
from lora_fx.graph.adapter_names import is_factor_b

MODEL = Llama(width=64, inner=176, layers=32, heads=4)
RANK, ALPHA = 8, 16
PEFT_LOADS, LOADS = "PEFT, load_adapter", "load_adapter"
PEFT_SETS, ACTIVATES, SETS = "PEFT, set_adapter", "activate", "graph.set_adapter"


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call returns, and its processor time."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def written(graph: lora_fx.TracedGraphModule, count: int, where: Path) -> list[Path]:
    """Write adapters with other values each, and return their directories."""
    branched = lora_fx.rewrite(graph, ["q_proj", "v_proj"], rank=RANK, alpha=ALPHA, seed=0)
    places = [where / f"adapter-{number}" for number in range(count)]
    factors = [parameter for name, parameter in branched.named_parameters() if is_factor_b(name)]
    generator = torch.Generator().manual_seed(1)
    for place in places:
        with torch.no_grad():
            for factor in factors:
                factor.normal_(std=0.02, generator=generator)
        lora_fx.save_adapter(branched, place)
    return places


def peft_times(model: nn.Module, places: list[Path], calls: int) -> tuple[Any, list[float], list[float]]:
    """Return PEFT's model with the adapters, and the times of loads and of calls of ``set_adapter``."""
    made, first = timed(lambda: peft.PeftModel.from_pretrained(copy.deepcopy(model), places[0], adapter_name="a0"))
    names = [f"a{number}" for number in range(len(places))]
    loads = [
        first,
        *(timed(lambda p=p, n=n: made.load_adapter(p, n))[1] for n, p in zip(names[1:], places[1:], strict=True)),
    ]  # type: ignore[misc]
    sets = [timed(lambda name=name: made.set_adapter(name))[1] for name in names[-calls:]]  # type: ignore[misc]
    return made.eval(), loads, sets


def own_times(
    graph: lora_fx.TracedGraphModule, places: list[Path], calls: int
) -> tuple[lora_fx.TracedGraphModule, list[float], list[float], list[float]]:
    """Return the graph with the last adapter active, and the times of loads, of ``activate`` and of ``graph.set_adapter``."""
    names = [f"a{number}" for number in range(len(places))]
    loads, activations = [], []
    for name, place in zip(names, tqdm(places, desc="W9", leave=False, disable=None), strict=True):
        graph, took = timed(lambda graph=graph, place=place, name=name: lora_fx.load_adapter(graph, place, name))  # type: ignore[misc]
        loads.append(took)
    active = graph
    for name in names[-calls:]:
        active, took = timed(lambda name=name: lora_fx.activate(graph, {name: 1.0}))  # type: ignore[misc]
        activations.append(took)
    sets = [timed(lambda name=name: graph.set_adapter(name))[1] for name in names[-calls:]]  # type: ignore[misc]
    return active, loads, activations, sets


def measured(model_shape: Llama, adapters: int, calls: int) -> Result:
    """Measure the row.

    Args:
        model_shape: of the model.
        adapters: how many are loaded.
        calls: of ``activate`` and ``set_adapter``, each for another adapter.
    """
    torch.manual_seed(0)
    model = built(model_shape, torch.float32).eval()
    graph = lora_fx.trace(model, inference=True)
    with tempfile.TemporaryDirectory() as directory:
        places = written(graph, adapters, Path(directory))
        theirs, peft_loads, peft_sets = peft_times(model, places, calls)
        ours, loads, activations, sets = own_times(graph, places, calls)
    batch = batch_of(model, 2, 5)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        apart = difference({"logits": ours(**inputs).logits}, {"logits": theirs(**inputs).logits})
    if apart:
        raise SystemExit(f"logits with the last adapter are {apart:.1e} from PEFT's: there is nothing to time.")
    every = (
        Measured(PEFT_LOADS, tuple(peft_loads)),
        Measured(LOADS, tuple(loads), difference=apart, against=PEFT_LOADS),
        Measured(PEFT_SETS, tuple(peft_sets)),
        Measured(ACTIVATES, tuple(activations), against=PEFT_SETS),
        Measured(SETS, tuple(sets), against=PEFT_SETS),
    )
    goals = (Goal(LOADS, "time", 1.5, PEFT_LOADS), Goal(ACTIVATES, "seconds", 0.05))
    shape = (
        f"{adapters} adapters at q and v, r={RANK}, loaded from their directories onto a Llama of {model_shape.layers} layers, "
        f"and one of them activated"
    )
    notes = (
        f"Processor time of one load, medians of {adapters}; all of them: PEFT {sum(peft_loads):.1f} s, graph {sum(loads):.1f} s",
        f"Of one change of adapter, medians of {calls}",
    )
    return Result("W9", shape, every, goals, Conditions.present(), notes)


def main(
    adapters: Annotated[int, typer.Option(min=2, help="How many are loaded.")] = 50,
    tiny: Annotated[bool, typer.Option("--tiny", help="With sizes that take little time, and show nothing.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write what was found here.")] = None,
) -> None:
    """Measure loading and activating adapters, beside PEFT."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("lora_fx").setLevel(logging.ERROR)  # each load says that its adapter waits
    torch.set_num_threads(1)
    found = measured(MODEL.tiny(), 3, 2) if tiny else measured(MODEL, adapters, min(adapters, 7))
    report([found], json)


if __name__ == "__main__":
    run_script(main)
