"""``lora-fx draw``: pictures of a graph, and of the changes that rules make in it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lora_fx.cli.console import errors, reported
from lora_fx.cli.options import ExampleInputsFile, Overwrite, Rank, Rules, RulesDirectories

EXAMPLES = (
    "Examples:  lora-fx draw path/to/model --rules t5 --out graph.html   ·   lora-fx draw config.json   ·   "
    "lora-fx draw config.json --rules all-linear --show fold --out graph.svg"
)


class DrawFormat(StrEnum):
    """File formats of ``lora-fx draw``."""

    html = "html"
    svg = "svg"
    png = "png"
    dot = "dot"
    json = "json"
    text = "text"


class Show(StrEnum):
    """Views of ``lora-fx draw``: a graph alone, or two as one."""

    before = "before"
    after = "after"
    diff = "diff"
    fold = "fold"


def draw(
    model: Annotated[Path, typer.Argument(help="Model directory or config.json; weights are not needed and not read.")],
    rules: Rules = "auto",
    rules_dir: RulesDirectories = None,
    rank: Rank = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to be made. Without one, text, json and dot are printed.")
    ] = None,
    format: Annotated[
        DrawFormat | None,
        typer.Option("--format", "-f", help="What to write. By default as the name of OUT ends, else text."),
    ] = None,
    show: Annotated[
        Show,
        typer.Option(
            help="The model before the rules, after them, the difference, or the difference that folding leaves: none."
        ),
    ] = Show.diff,
    module: Annotated[str, typer.Option(help="Path of the module to draw, by default the whole model.")] = "",
    example_inputs: ExampleInputsFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw a model's graph, and the changes that rules make in it.

    html is a page to look around in, which needs no network. text shows which projections of which layers get a branch.
    """
    from lora_fx.drawing.draw import FORMATS, describe_model, format_of, in_words, save, within
    from lora_fx.files.atomic import check_file

    with reported():
        name = format.value if format is not None else "text" if out is None else format_of(out)
        if out is None and name in ("html", "svg", "png"):
            raise typer.BadParameter(f"--out names the file that the {name} is written to")
        if out is not None:
            check_file(out, overwrite=overwrite)
        with errors.status("reading the model") as status:
            description = describe_model(
                model,
                rules,
                show.value,
                directories=rules_dir or (),
                rank=rank,
                example_inputs=example_inputs,
                step=status.update,
            )
            description = within(description, module)
            if out is not None:
                status.update(f"writing {out}")
                save(description, out, name, overwrite=overwrite)
    if out is None:
        content = FORMATS[name](description)
        assert isinstance(content, str)
        typer.echo(content)
    else:
        typer.echo(f"{out}: {in_words(description)}")
