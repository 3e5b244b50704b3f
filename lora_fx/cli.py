"""The command line: ``lora-fx``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
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
errors = Console(stderr=True)


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

    with _reported():
        run(out, console, steps=steps)


@app.command(
    epilog="Examples:  lora-fx plan path/to/model   ·   lora-fx plan config.json --rules all-linear --rank 16 --json   ·   "
    "lora-fx plan path/to/model --rules mine.toml"
)
def plan(
    model: Annotated[Path, typer.Argument(help="Model directory or config.json; weights are not needed and not read.")],
    rules: Annotated[
        str, typer.Option(help="Name of built-in rules, auto, all-linear, or the path of a .toml file.")
    ] = "auto",
    rules_dir: Annotated[
        list[Path] | None,
        typer.Option(help="Directory of further rule files, searched first. May be repeated; see also LORA_FX_RULES."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Replaces the default rank of the rules.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Likewise; a branch is scaled by alpha / rank.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show every call site of a model: its shape, operator and role, and whether rules give it a branch, and why."""
    from lora_fx.loading import empty_model
    from lora_fx.planning import plan as make_plan
    from lora_fx.reporting import as_data, as_text
    from lora_fx.ruleset import load

    with _reported():
        with errors.status("reading the config"):
            empty = empty_model(model)
        ruleset = load(rules, getattr(empty.config, "model_type", None), rules_dir or ())
        with errors.status(f"tracing {type(empty).__name__}"):
            made = make_plan(empty, ruleset, rank=rank, alpha=alpha, dropout=dropout)
    typer.echo(json.dumps(as_data(made), indent=2) if as_json else as_text(made))


@contextmanager
def _reported() -> Iterator[None]:
    """Report our own errors as one message, without a traceback, and exit with 1."""
    try:
        yield
    except LoraFxError as error:
        errors.print("[bold red]error:[/bold red]", end=" ")
        errors.print(str(error), soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(1) from error
