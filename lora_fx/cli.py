"""The command line: ``lora-fx``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lora_fx.errors import LoraFxError

app = typer.Typer(
    help="LoRA as graph surgery: rewrite a PyTorch model with low-rank branches, train it, fold them back into its weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


@app.callback()
def main() -> None:
    """LoRA as graph surgery."""


@app.command(epilog="Example:  lora-fx demo --out demo-output")
def demo(
    out: Annotated[
        Path, typer.Option(help="Directory for the results; what a former run left there is replaced.")
    ] = Path("demo-output"),
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps.")] = 60,
) -> None:
    """Rewrite a pretrained MiniLM, fine-tune it on Python's own documentation, fold it, and write it out."""
    from lora_fx.demo import demo as run  # transformers and torch are slow to import, and `--help` needs neither

    try:
        run(out, console, steps=steps)
    except LoraFxError as error:
        console.print(f"[bold red]error:[/bold red] {error}", soft_wrap=True)
        raise typer.Exit(1) from error
