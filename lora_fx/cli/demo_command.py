"""``lora-fx demo``: the whole path on a pretrained model, and generation with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_fx.cli.console import console, help_end, reported

HELP_END = help_end("lora-fx demo --out demo-output", "lora-fx demo --generate")


def demo(
    out: Annotated[Path, typer.Option(help="Directory for the results; those of a former run are replaced.")] = Path(
        "demo-output"
    ),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of training steps; by default 60, and with --generate 800.")
    ] = None,
    generate: Annotated[
        bool,
        typer.Option(
            "--generate",
            help="Train a small language model and two adapters, and let onnxruntime continue a prompt without and with either.",
        ),
    ] = False,
) -> None:
    """Rewrite a pretrained MiniLM, fine-tune it on Python's own documentation, fold it, and write it out."""
    # transformers and torch are slow to import, and `--help` needs neither
    if generate:
        from lora_fx import demo_generation as chosen
    else:
        from lora_fx import demo as chosen  # type: ignore[no-redef]

    with reported():
        chosen.demo(out, console, steps=chosen.STEPS if steps is None else steps)
