"""Whether training leaves memory flat: a small Llama with branches, in a plain loop, with another batch and length at each step.

    python tools/bench/training_memory.py              # ten minutes; --minutes 2, --fused, --compiled

prints resident memory at regular times, and the slope of a line through what comes after the warm-up.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import lora_fx
from lora_fx.cli.printing import run_script

VOCABULARY = 1000
WARM_UP = 0.2
"""The part of the time that counts as warm-up."""


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long to train.")] = 10.0,
    fused: Annotated[bool, typer.Option(help="Train a fused graph.")] = False,
    compiled: Annotated[
        bool, typer.Option(help="Train through torch.compile, with autograd's graphs run as they are.")
    ] = False,
    readings: Annotated[int, typer.Option(min=5, help="Number of readings.")] = 20,
) -> None:
    """Train a small Llama with changing sizes, and print resident memory over time."""
    seconds, console = minutes * 60, Console()
    table = Table("minute", "steps", "MB", "loss", title="resident memory in training")
    points: list[tuple[float, float]] = []
    losses = train(fused=fused, compiled=compiled)
    next(losses)  # with the trace, and what is compiled
    start = time.monotonic()
    bar = tqdm(total=round(seconds), unit="s", desc="training")
    for steps, loss in enumerate(losses, 2):
        elapsed = time.monotonic() - start
        bar.update(int(elapsed) - bar.n)
        if elapsed >= seconds * len(points) / readings:
            points.append((elapsed / 60, resident()))
            table.add_row(f"{elapsed / 60:.2f}", f"{steps:,}", f"{points[-1][1]:.1f}", f"{loss:.4f}")
        if elapsed >= seconds:
            break
    bar.close()
    console.print(table)
    after = [point for point in points if point[0] >= WARM_UP * minutes]
    console.print(f"slope after {WARM_UP * minutes:.1f} minutes: {slope(after):+.3f} MB per minute")


def train(*, fused: bool, compiled: bool) -> Iterator[float]:
    """Yield the loss of each of endless steps, whose batch is 1 to 8 and whose length 4 to 64."""
    torch.manual_seed(0)
    graph = lora_fx.rewrite(small_llama(), rules="llama", rank=8, alpha=16, dropout=0.05).train()
    graph = lora_fx.fuse(graph) if fused else graph
    call = torch.compile(graph, fullgraph=True, dynamic=True, backend="aot_eager") if compiled else graph
    optimizer = torch.optim.AdamW([p for p in graph.parameters() if p.requires_grad], lr=1e-3)
    sizes = random.Random(0)
    while True:
        ids = torch.randint(0, VOCABULARY, (sizes.randint(1, 8), sizes.randint(4, 64)))
        logits = call(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def small_llama() -> transformers.LlamaForCausalLM:
    """Return a Llama that makes some tens of steps a second."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


def resident() -> float:
    """Return the resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def slope(points: list[tuple[float, float]]) -> float:
    """Return the slope of the line through ``points`` with the least squares."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


if __name__ == "__main__":
    run_script(main)
