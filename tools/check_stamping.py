"""Trace every small model of the tests, with twice the layers, and print which have layers stamped, and why the others do not.

Each graph with stamped layers is compared with that of a full trace, node by node.

Example:  python tools/check_stamping.py --only llama --only deberta
"""

from __future__ import annotations

import logging
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from lora_fx.cli.printing import run_script

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

HEADER = ("| model | traced |", "|---|---|")


def check(name: str) -> str:
    """Trace one model, and return its row."""
    import architectures
    import families
    import test_stamping
    import torch
    from graph_diff import first_difference

    import lora_fx
    from lora_fx.tracing import trace

    torch.set_num_threads(1)
    known = name in architectures.ARCHITECTURES
    try:
        model = test_stamping.deepened((architectures if known else families).model(name))
    except Exception as error:  # sizes that fit one number of layers alone
        return f"| {name} | not: {type(error).__name__} with twice the layers |"
    dynamic = None if known else families.FAMILIES[name].dynamic
    inference = not known or name in test_stamping.WITH_WEIGHTS
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lora_fx.tracing").addHandler(handler)
    logging.getLogger("lora_fx.tracing").setLevel(logging.INFO)
    try:
        graph = lora_fx.trace(model, dynamic=dynamic, inference=inference)
    except lora_fx.LoraFxError as error:
        return f"| {name} | not on the meta device: {str(error)[:100].replace('|', '')} |"
    handler.close()
    logging.getLogger("lora_fx.tracing").removeHandler(handler)
    if "stamped" in said[-1]:
        trace.layer_classes = lambda _model: []
        full = lora_fx.trace(model, dynamic=dynamic, inference=inference)
        difference = first_difference(graph, full)
        if difference is not None:
            said.append(f" is traced otherwise: {difference}")
    return f"| {name} | {said[-1].partition(' is traced ')[2].replace('|', '')} |"


def main(
    only: Annotated[list[str] | None, typer.Option(help="Just these models. May be repeated.")] = None,
    jobs: Annotated[int, typer.Option(help="Number of processes.")] = os.cpu_count() or 1,
) -> None:
    """Trace every small model of the tests, and print which have layers stamped, and why the others do not."""
    import architectures
    import families

    names = only or [*architectures.ARCHITECTURES, *families.FAMILIES]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = list(track(pool.map(check, names), total=len(names), description="tracing"))
    print("\n".join([*HEADER, *rows]))


if __name__ == "__main__":
    run_script(main)
