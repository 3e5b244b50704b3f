"""How fast an adapter is folded in memory, beside the bounds of the machine and beside PEFT.

    python tools/bench/folding.py                    # prints a table
    python tools/bench/folding.py --write            # puts it into the guide, with the machine and the date

Folded are bfloat16 weights of the shapes of Llama 2 7B, with a branch of rank 16 at each. All runs are in one process and take
turns; times are medians, rates are bytes of weights a second. Times are of the processor, on one thread: threads that wait for
each other, as those of torch do around every operator, measure what else runs on the machine. No fold can be faster than
either of two bounds, measured beside it:

copy     the weights cloned: a fold reads each once, and writes a new one
product  ``B A`` in float32 alone, rows at a time into memory that stays in the cache: 2 · rank operations an element

The slower of them binds. PEFT's ``merge_and_unload`` overwrites the weights, which saves it new memory; it adds in
one pass and rounds the product, where it is bfloat16, once more. It is timed as its default, with factors in float32. ``fold(inplace=True)``
overwrites too; before it writes anything it reads every weight for its norm, which tells that no result is infinite. Counting
for a report is in none of the times.
"""

from __future__ import annotations

import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import typer
from results import Conditions
from rich.console import Console
from torch import nn

sys.path.append(str(Path(__file__).parent.parent))

import guides

import lora_fx
from lora_fx.adapters.attach import attach
from lora_fx.adapters.recorded import parameters_of
from lora_fx.cli.printing import run_script
from lora_fx.graph.adapter_names import is_factor_b
from lora_fx.numerics.lowrank_merge import BLOCK_ELEMENTS
from lora_fx.planning.planner import plan_graph
from lora_fx.rules.lookup import load

RANK, ALPHA = 16, 32
WIDE, INNER = 4096, 11008
RULES = {"defaults": {"rank": RANK, "alpha": ALPHA}, "select": [{"op": ["linear"]}]}


class Layers(nn.Module):
    """The linears of a decoder, one behind the other."""

    def __init__(self, gigabytes: float) -> None:
        super().__init__()
        shapes = [*[(WIDE, WIDE)] * 4, (WIDE, INNER), (INNER, WIDE)]
        linears, size = [], 0.0
        while size < gigabytes * 1e9:
            shape = shapes[len(linears) % len(shapes)]
            linears.append(nn.Linear(*shape, bias=False, dtype=torch.bfloat16))
            size += 2 * shape[0] * shape[1]
        if linears[-1].out_features != WIDE:
            linears.append(nn.Linear(INNER, WIDE, bias=False, dtype=torch.bfloat16))
        self.linears = nn.ModuleList(linears)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Go through all of them."""
        for linear in self.linears:
            x = linear(x)
        return x


def wrapped(model: nn.Module) -> Any:
    """Return the model with PEFT's layers, and factors that are not zero."""
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    made = peft.get_peft_model(model, config)
    fill(made)
    return made


def fill(module: nn.Module) -> None:
    """Give factors B small values: they start as zero, to which a fold adds nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if is_factor_b(name):
                parameter.normal_(std=1e-3, generator=generator)


def product(weights: list[torch.Tensor]) -> Callable[[], None]:
    """Return what multiplies factors for weights of these shapes, block by block."""
    factors = {
        weight.shape: (torch.randn(weight.shape[0], RANK), torch.randn(RANK, weight.shape[1])) for weight in weights
    }
    blocks = {shape: torch.empty(max(1, BLOCK_ELEMENTS // shape[1]), shape[1]) for shape in factors}

    def run() -> None:
        for weight in weights:
            (b, a), out = factors[weight.shape], blocks[weight.shape]
            for rows in b.split(len(out)):
                torch.mm(rows, a, out=out[: len(rows)])

    return run


def measured(
    gigabytes: float,
    repetitions: int,
    status: Callable[[str], None],
    clock: Callable[[], float] = time.process_time,
) -> tuple[int, dict[str, float]]:
    """Return how many bytes the weights have, and the median seconds of everything, by default of processor time."""
    torch.manual_seed(0)
    status("making the model")
    model = Layers(gigabytes).eval()
    own = copy.deepcopy(model)  # of which PEFT overwrites the weights
    graph = lora_fx.trace(model, (torch.randn(1, 2, WIDE, dtype=torch.bfloat16),), inference=True)
    plan = plan_graph(graph, load(RULES))
    branched = attach(graph, plan, seed=0)
    fill(branched)
    weights = [linear.weight.detach() for linear in model.linears]
    values = parameters_of(branched, "default")
    runs: Mapping[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "copy": (lambda: None, lambda _: [weight.clone() for weight in weights]),
        "product": (lambda: product(weights), lambda run: run()),
        "fold": (lambda: branched, lora_fx.fold),
        "fold, inplace=True": (
            lambda: attach(graph, plan, values=values),
            lambda made: lora_fx.fold(made, inplace=True),
        ),
        "PEFT, merge_and_unload": (lambda: wrapped(own), lambda made: made.merge_and_unload()),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, (prepare, run) in runs.items():
            status(f"{name}, {repetition} of {repetitions}")
            prepared = prepare()
            gc.collect()
            start = clock()
            result = run(prepared)
            took = clock() - start
            del result
            if repetition:  # the first warms up
                times[name].append(took)
    return sum(weight.nbytes for weight in weights), {name: statistics.median(each) for name, each in times.items()}


def table(size: int, seconds: Mapping[str, float]) -> str:
    """Return what each took, its rate, and how it compares."""
    bound = max(seconds["copy"], seconds["product"])
    theirs = seconds["PEFT, merge_and_unload"]
    lines = ["| | seconds | GB/s | of the bound | beside PEFT |", "|---|---:|---:|---:|---:|"]
    for name, took in seconds.items():
        lines.append(f"| {name} | {took:.3f} | {size / took / 1e9:.2f} | {bound / took:.0%} | {theirs / took:.2f}× |")
    return "\n".join(lines)


def main(
    gigabytes: Annotated[float, typer.Option(min=0.01, help="Size of the weights.")] = 1.0,
    repetitions: Annotated[int, typer.Option(min=1, help="Of each, after one that warms up.")] = 5,
    write: Annotated[bool, typer.Option("--write", help="Put the table into the guide.")] = False,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    with Console(stderr=True).status("") as status:
        size, seconds = measured(gigabytes, repetitions, status.update)
    conditions = Conditions.present(("torch", "peft"))
    text = f"{table(size, seconds)}\n\n{conditions}; {size / 1e9:.2f} GB of bfloat16 weights, rank {RANK}, medians of {repetitions}."
    print(text)
    if as_json is not None:
        result = {"conditions": asdict(conditions), "bytes": size, "rank": RANK, "seconds": seconds}
        as_json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if write:
        guides.write("tools/bench/folding.py", text)


if __name__ == "__main__":
    run_script(main)
