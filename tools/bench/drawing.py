"""What pictures of a Llama cost: making them, opening the page in a browser, and whether they stay as large as they were.

    python tools/bench/drawing.py                    # prints a table
    python tools/bench/drawing.py --write            # puts it into the guide, with the machine and the date

Drawn is what ``rewrite(rules="llama")`` changes: branches at q and v of every layer. Weights are on the meta device. The longer
model is the traced one with its last layer repeated: ``torch.export`` takes minutes for so many layers.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from lengthening import lengthened
from results import Conditions
from rich.console import Console
from shapes import LLAMA_8B

ROOT = Path(__file__).parent.parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tools")]

import guides  # noqa: E402
from browser import launched, opened, settled  # noqa: E402
from playwright.sync_api import Browser, Page  # noqa: E402

import lora_fx  # noqa: E402
from lora_fx.cli.printing import run_script  # noqa: E402
from lora_fx.drawing.draw import FORMATS, Description, describe  # noqa: E402

LAYERS, MORE_LAYERS = 32, 230
NO_BROWSER, NO_GRAPHVIZ = "no browser", "no Graphviz"
WINDOW, LARGE_WINDOW = {"width": 1400, "height": 900}, {"width": 3800, "height": 2000}

ROWS = (
    ("nodes of the rewritten graph", "", ""),
    ("trace", "", ""),
    ("page: describe and write", "≤ 2 s", "≤ 10 s"),
    ("page: size", "≤ 1.5 MB", ""),
    ("page: first paint", "≤ 500 ms", "≤ 500 ms"),
    ("page: boxes in the first view", "", "the same"),
    ("page: open a layer", "≤ 250 ms", "≤ 250 ms"),
    ("page: most elements drawn", "≤ 1,500", "≤ 1,500"),
    ("SVG: write", "≤ 1 s", "≤ 1 s"),
    ("SVG: describe and write", "", ""),
    ("SVG: size", "≤ 200 KB", "≤ 200 KB"),
)
"""What is measured, and the goals for each of the two models."""


@dataclass(frozen=True)
class Looked:
    """What a browser says of one opening of a page; times in milliseconds."""

    painted: float
    boxes: int
    layer: float
    elements: int


def traced(layers: int) -> lora_fx.TracedGraphModule:
    """Return the trace of a Llama with the widths of 8B and so many layers."""
    with torch.device("meta"):
        model = replace(LLAMA_8B, layers=layers).build().eval()
    return lora_fx.trace(model, inference=True)


def seconds(function: Callable[[], Any], repetitions: int) -> float:
    """Return the median time of a call."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def look(browser: Browser, path: Path, description: Description) -> Looked:
    """Open a page, in it the layers, one of them, and then everything, and look at that from near and from far."""
    repeat = max(
        (index for index, group in enumerate(description["groups"]) if group["kind"] == "repeat"),
        key=lambda index: description["groups"][index]["counts"]["nodes"],
    )
    layer = description["groups"][repeat]["items"][0]
    with opened(browser, path, viewport=WINDOW) as page:
        painted = page.evaluate("performance.getEntriesByName('viewer:painted')[0].startTime")
        boxes = page.evaluate("viewer.boxes().length")
        elements = [drawn(page)]
        page.evaluate("(id) => viewer.toggle(id)", f"g{repeat}")
        elements.append(drawn(page))
        page.evaluate("performance.clearMeasures('open')")
        page.evaluate("(id) => viewer.toggle(id)", layer)
        elements.append(drawn(page))
        (opening,) = page.evaluate("performance.getEntriesByName('open').map((entry) => entry.duration)")
        page.evaluate("viewer.toggle('g0', true)")
        page.evaluate("viewer.fit()")
        elements.append(drawn(page))
        page.set_viewport_size(LARGE_WINDOW)
        page.evaluate("(id) => viewer.reveal(id)", f"n{len(description['nodes']) // 2}")
        for _ in range(14):
            elements.append(drawn(page))
            page.evaluate("viewer.zoom(0.8)")
    return Looked(painted, boxes, opening, max(elements))


def drawn(page: Page) -> int:
    """Return how many elements the page has drawn."""
    settled(page)
    return int(page.evaluate("document.documentElement.dataset.drawn"))


def in_browser(path: Path, description: Description, repetitions: int) -> list[str]:
    """Return the cells for what a browser says."""
    with contextlib.suppress(pytest.skip.Exception), launched() as browser:
        looked = [look(browser, path, description) for _ in range(repetitions)]
        return [
            f"{statistics.median(each.painted for each in looked):.0f} ms",
            f"{max(each.boxes for each in looked):,}",
            f"{statistics.median(each.layer for each in looked):.0f} ms",
            f"{max(each.elements for each in looked):,}",
        ]
    return [NO_BROWSER] * 4


def as_svg(description: Description, describing: float, repetitions: int) -> list[str]:
    """Return the cells of the SVG."""
    try:
        size = len(FORMATS["svg"](description))
    except lora_fx.ExportError:
        return [NO_GRAPHVIZ] * 3
    writing = seconds(lambda: FORMATS["svg"](description), repetitions)
    return [f"{writing:.2f} s", f"{describing + writing:.2f} s", f"{size / 1e3:.0f} KB"]


def measured(before: lora_fx.TracedGraphModule, tracing: str, repetitions: int, console: Console) -> list[str]:
    """Return the cells of one model."""
    with console.status("rewriting") as status, tempfile.TemporaryDirectory() as directory:
        after = lora_fx.rewrite(before, rules="llama", seed=0, inference=True)
        status.update("drawing")
        description = describe(before, after)
        describing = seconds(lambda: describe(before, after), repetitions)
        paging = seconds(lambda: FORMATS["html"](description), repetitions)
        path = Path(directory) / "page.html"
        path.write_text(str(FORMATS["html"](description)), encoding="utf-8")
        status.update("looking at the page")
        looked = in_browser(path, description, repetitions)
        status.update("writing the SVG")
        return [
            f"{len(after.graph.nodes):,}",
            tracing,
            f"{describing + paging:.2f} s",
            f"{path.stat().st_size / 1e6:.2f} MB",
            *looked,
            *as_svg(description, describing, repetitions),
        ]


def table(small: Sequence[str], large: Sequence[str]) -> str:
    """Return the cells of both models, with the goals beside them."""
    lines = [f"| | {LAYERS} layers | goal | {MORE_LAYERS} layers | goal |", "|---|---:|---:|---:|---:|"]
    for (name, goal, far_goal), cell, far_cell in zip(ROWS, small, large, strict=True):
        lines.append(f"| {name} | {cell} | {goal} | {far_cell} | {far_goal} |")
    return "\n".join(lines)


def main(
    repetitions: Annotated[int, typer.Option(min=1, help="Of everything that is timed.")] = 5,
    write: Annotated[bool, typer.Option("--write", help="Put the table into the guide.")] = False,
) -> None:
    """Print the table."""
    console = Console(stderr=True)
    with console.status(f"tracing {LAYERS} layers"):
        start = time.perf_counter()
        graph = traced(LAYERS)
        tracing = time.perf_counter() - start
    small = measured(graph, f"{tracing:.1f} s", repetitions, console)
    large = measured(lengthened(graph, LAYERS, MORE_LAYERS), "not traced", repetitions, console)
    text = (
        f"{table(small, large)}\n\n{Conditions.present(('torch',))}, Chromium without a GPU; medians of {repetitions}. The "
        f"{MORE_LAYERS} layers are the {LAYERS} of the trace, the last of them repeated."
    )
    print(text)
    if write:
        guides.write("tools/bench/drawing.py", text)


if __name__ == "__main__":
    run_script(main)
