"""``lora-fx demo``: the whole path on a pretrained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_fx.cli.console import console, reported

EXAMPLES = "Example:  lora-fx demo --out demo-output"


def demo(
    out: Annotated[Path, typer.Option(help="Directory for the results; those of a former run are replaced.")] = Path(
        "demo-output"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps.")] = 60,
) -> None:
    """Rewrite a pretrained MiniLM, fine-tune it on Python's own documentation, fold it, and write it out."""
    from lora_fx.demo import demo as run  # transformers and torch are slow to import, and `--help` needs neither

    with reported():
        run(out, console, steps=steps)
