"""``lora-fx draw``: pictures of a graph, and of the changes that rules make in it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lora_fx.cli.console import errors, help_end, reported
from lora_fx.cli.options import ExampleInputsFile, Overwrite, Rank, Rules, RulesDirectories, inputs
from lora_fx.cli.printing import remark, shown
from lora_fx.errors import ExportError, LoraFxError

HELP_END = help_end(
    "lora-fx draw config.json",
    "lora-fx draw path/to/model --rules t5 --out graph.html",
    "lora-fx draw config.json --module model.layers.0 --out layer.svg",
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
    from lora_fx.drawing.draw import FORMATS, describe_model, in_words, save, within
    from lora_fx.files.target import Target

    with reported():
        name = format.value if format is not None else "text" if out is None else _format_named(out)
        if out is None and name in ("html", "svg", "png"):
            raise typer.BadParameter(f"--out names the file that the {name} is written to")
        if out is not None:
            Target(out, overwrite, inputs(model, example_inputs, *(rules_dir or ()), rules)).check()
        if model.suffix == ".pt2" and model.is_file():
            place = _with_suffix(out or Path("graph"), format or (DrawFormat.html if out is None else None))
            raise LoraFxError(_in_python(model, rules, rules_dir or (), rank, place, show, module, overwrite))
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
        print(_escaped(name, content))
    else:
        remark(f"{out}: {in_words(description)}")


def _format_named(out: Path) -> str:
    """Return the format that a path names; a name without one is an error of usage, as for exports."""
    from lora_fx.drawing.draw import format_of

    try:
        return format_of(out)
    except ExportError as error:
        if out.is_dir():
            raise
        raise typer.BadParameter(str(error)) from error


def _escaped(format_name: str, content: str) -> str:
    """Return what is printed of a picture: where its language has escapes, they stand for what the encoding may lack."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if format_name == "dot":
        return content.encode(encoding, "xmlcharrefreplace").decode(encoding)
    if format_name == "json" and shown(content, encoding) != content:
        return json.dumps(json.loads(content), indent=1, sort_keys=True)
    return content


def _with_suffix(path: Path, format: DrawFormat | None) -> Path:
    """Return a path at which ``lora_fx.draw`` writes a format, which it tells by the suffix."""
    suffix = path.suffix if format is None else ".txt" if format is DrawFormat.text else f".{format.value}"
    return path if path.suffix == suffix else path.with_name(path.name + suffix)


def _in_python(
    model: Path,
    rules: str,
    rules_dir: Sequence[Path],
    rank: int | None,
    out: Path,
    show: Show,
    module: str,
    overwrite: bool,
) -> str:
    """Return the refusal of an exported program, whose loading can run code, and the lines that draw one that is trusted."""
    loaded = f"load({rules!r}, directories={[*map(str, rules_dir)]!r})" if rules_dir else repr(rules)
    settings = f"rules={loaded}" + (f", rank={rank}" if rank is not None else "")
    before, after = "graph", f"lora_fx.rewrite(graph, {settings})"
    if show is Show.fold:
        before, after = "branched", "lora_fx.fold(branched)"
    options = [f"show={show.value!r}"] if show in (Show.before, Show.after) else []
    options += [f"module={module!r}"] if module else []
    options += ["overwrite=True"] if overwrite else []
    lines = [
        f"graph = lora_fx.trace(torch.export.load({str(model)!r}), inference=True)",
        *(["branched = " + f"lora_fx.rewrite(graph, {settings})"] if show is Show.fold else []),
        f"lora_fx.draw({', '.join([before, after, repr(str(out)), *options])})",
    ]
    imports = "import lora_fx, torch" + ("; from lora_fx.rules.lookup import load" if rules_dir else "")
    return "\n".join(
        [
            f"{model}: expected a model directory or a config.json, got an exported program. torch.export.load can run code "
            f"from such a file; if you trust it, draw it in Python, after `{imports}`:",
            *lines,
        ]
    )
