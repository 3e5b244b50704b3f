"""How long every pass takes on graphs of a thousand to a hundred thousand nodes, and how that grows: it is to be linear.

    python tools/bench/scaling.py                    # prints a table
    python tools/bench/scaling.py --write            # puts it into the guide, with the machine and the date

The graphs are one traced Llama with its last layer repeated, node by node. Its weights are tiny and real, so that fold and
verify compute, and nearly all of the time is that of the graph. Times are of the processor, on one thread, so that other
work on the machine counts for little. The exponent is that of a power law, fitted to all sizes by least squares of logarithms.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from lengthening import lengthened, nodes_in
from results import Conditions
from rich.console import Console
from shapes import Llama

sys.path.append(str(Path(__file__).parent.parent))

import guides

import lora_fx
from lora_fx.adapters.attach import attach
from lora_fx.cli.printing import run_script
from lora_fx.drawing.draw import describe
from lora_fx.planning.planner import plan_graph
from lora_fx.rules.lookup import load

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
TINY = Llama(width=32, inner=64, layers=3, heads=4, groups=2, vocabulary=64)

BY_NAME = {"defaults": {"rank": 4}, "select": [{"target": ["q_proj", "v_proj"]}]}
BY_ROLE = {"defaults": {"rank": 4}, "select": [{"role": ["self_attention.query", "self_attention.value"]}]}


def traced() -> lora_fx.TracedGraphModule:
    """Return the trace of a tiny Llama."""
    torch.manual_seed(0)
    return lora_fx.trace(TINY.build().eval(), inference=True)


def of_size(graph_module: lora_fx.TracedGraphModule, nodes: int) -> lora_fx.TracedGraphModule:
    """Return a longer graph of about this many nodes."""
    missing = nodes - len(graph_module.graph.nodes)
    layer = len(nodes_in(graph_module.graph, f"model.layers.{TINY.layers - 1}"))
    return lengthened(graph_module, TINY.layers, TINY.layers + max(1, round(missing / layer)))


PASSES = (
    "plan, rules by name",
    "plan, rules by role",
    "rewrite (attach)",
    "unload",
    "fold",
    "verify",
    "transfer",
    "draw (describe)",
)
NEEDED = ("plan, rules by name", "rewrite (attach)", "fold")
"""What other passes need the results of."""


def times_of(
    graph: lora_fx.TracedGraphModule,
    repetitions: int,
    status: Callable[[str], None],
    passes: Collection[str] = PASSES,
) -> dict[str, float]:
    """Return the seconds that each of some passes takes on a graph."""
    times: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        if name not in passes and name not in NEEDED:
            return None
        status(name)
        result, times[name] = seconds(function, repetitions)
        return result

    tokens = torch.arange(4)[None]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    plan = timed("plan, rules by name", lambda: plan_graph(graph, load(BY_NAME)))
    timed("plan, rules by role", lambda: plan_graph(graph, load(BY_ROLE)))
    branched = timed("rewrite (attach)", lambda: attach(graph, plan, seed=0))
    timed("unload", lambda: lora_fx.unload(branched))
    folded = timed("fold", lambda: lora_fx.fold(branched))
    timed("verify", lambda: lora_fx.verify(branched, folded, inputs))
    timed("transfer", lambda: lora_fx.transfer(branched, onto=graph))
    timed("draw (describe)", lambda: describe(graph, branched))
    return times


def seconds(function: Callable[[], Any], repetitions: int) -> tuple[Any, float]:
    """Return what a function returns, and the least processor time of its calls."""
    times = []
    for _ in range(repetitions):
        gc.collect()
        start = time.process_time()
        result = function()
        times.append(time.process_time() - start)
    return result, min(times)


def exponent(nodes: Sequence[int], times: Sequence[float]) -> float:
    """Return the exponent of the power law that fits best."""
    return statistics.linear_regression(list(map(math.log, nodes)), list(map(math.log, times))).slope


def table(nodes: Sequence[int], times: Mapping[str, Sequence[float]]) -> str:
    """Return the seconds of each pass at each size, and its exponent."""
    lines = [
        f"| nodes | {' | '.join(f'{count:,}' for count in nodes)} | exponent |",
        "|---|" + "---:|" * (len(nodes) + 1),
    ]
    for name, found in times.items():
        lines.append(f"| {name} | {' | '.join(f'{t:.2f} s' for t in found)} | {exponent(nodes, found):.2f} |")
    return "\n".join(lines)


def main(
    largest: Annotated[
        int, typer.Option(min=SIZES[1], help="Leave out graphs with more nodes; two sizes show how a cost grows.")
    ] = SIZES[-1],
    write: Annotated[bool, typer.Option("--write", help="Put the table into the guide.")] = False,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    base = traced()
    nodes: list[int] = []
    times: dict[str, list[float]] = {}
    with Console(stderr=True).status("") as status:
        for size in (size for size in SIZES if size <= largest):
            graph = of_size(base, size)
            nodes.append(len(graph.graph.nodes))
            told = f"{nodes[-1]:,} nodes: "
            found = times_of(graph, 3 if size < 30_000 else 1, lambda name, told=told: status.update(told + name))  # type: ignore[misc]
            for name, took in found.items():
                times.setdefault(name, []).append(took)
    conditions = Conditions.present(("torch",))
    text = f"{table(nodes, times)}\n\n{conditions}; processor time, branches at q and v of every layer."
    print(text)
    if as_json is not None:
        exponents = {name: exponent(nodes, found) for name, found in times.items()}
        result = {"conditions": asdict(conditions), "nodes": nodes, "seconds": times, "exponents": exponents}
        as_json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if write:
        guides.write("tools/bench/scaling.py", text)


if __name__ == "__main__":
    run_script(main)
