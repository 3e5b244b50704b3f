"""Row W10: what passes take on a graph of a hundred thousand nodes.

    python tools/bench/large_graph.py                  # a table; two minutes
    python tools/bench/large_graph.py --nodes 10000 --json found.json

The graph and the passes are those of scaling.py, which shows how the time grows with the size of a graph. Each runs once, on one
thread; times are of the processor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from results import Conditions, Goal, Measured, Result, report
from scaling import of_size, times_of, traced
from tqdm import tqdm

from lora_fx.cli.printing import run_script

PASSES = {"rewrite (attach)": 6.0, "fold": 5.0, "verify": 7.0, "transfer": 11.0, "draw (describe)": 11.0}
"""Pass → its goal in seconds, half of what it took in November 2026."""


def measured(nodes: int, repetitions: int = 1) -> Result:
    """Measure the row.

    Args:
        nodes: about how many the graph has.
        repetitions: of each pass, of which the fastest counts.
    """
    graph = of_size(traced(), nodes)
    with tqdm(desc="W10", leave=False, disable=None, bar_format="{desc}") as bar:
        times = times_of(graph, repetitions, lambda told: bar.set_description(f"W10: {told}"), PASSES)
    found = tuple(Measured(name, (times[name],)) for name in PASSES)
    goals = tuple(Goal(name, "seconds", bound) for name, bound in PASSES.items())
    shape = (
        f"Passes over a graph of {len(graph.graph.nodes):,} nodes, a tiny Llama of many layers with branches at q and v"
    )
    return Result("W10", shape, found, goals, Conditions.present(("torch",)), ("Processor time, once each",))


def main(
    nodes: Annotated[int, typer.Option(min=500, help="About how many the graph has.")] = 100_000,
    tiny: Annotated[bool, typer.Option("--tiny", help="With sizes that take little time, and show nothing.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write what was found here.")] = None,
) -> None:
    """Measure passes over a large graph."""
    torch.set_num_threads(1)
    report([measured(600 if tiny else nodes)], json)


if __name__ == "__main__":
    run_script(main)
