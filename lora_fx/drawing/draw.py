"""Pictures of graphs, and of the changes that a pass made in them: a page, SVG, PNG, DOT, JSON, text.

All are written from one description (see :mod:`lora_fx.drawing.describe.description`), which has no layout; a writer reads nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from torch import fx

from lora_fx.drawing.describe.description import Description, describe, describe_graph, within
from lora_fx.drawing.models import describe_model
from lora_fx.drawing.render.dot import dot
from lora_fx.drawing.render.graphviz import render
from lora_fx.drawing.render.page import page
from lora_fx.drawing.render.text import in_words, text
from lora_fx.errors import ExportError
from lora_fx.files.atomic import replacing
from lora_fx.files.target import Target
from lora_fx.graph.info import held_graphs

__all__ = [
    "FORMATS",
    "Description",
    "describe",
    "describe_graph",
    "describe_model",
    "draw",
    "format_of",
    "in_words",
    "save",
    "within",
]


def _json(description: Description) -> str:
    return json.dumps(description, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


FORMATS: Mapping[str, Callable[[Description], str | bytes]] = {
    "html": page,
    "svg": lambda description: render(dot(description), "svg"),
    "png": lambda description: render(dot(description), "png"),
    "dot": dot,
    "json": _json,
    "text": text,
}
"""The writers of pictures, by the name of their format."""

_SUFFIXES = {".txt": "text", **{f".{name}": name for name in FORMATS if name != "text"}}


def draw(
    before: fx.GraphModule,
    after: fx.GraphModule,
    path: str | Path,
    *,
    show: Literal["before", "after", "diff"] = "diff",
    module: str = "",
    overwrite: bool = False,
) -> None:
    """Draw two graphs as one, with their differences, or one of the two alone.

    Weights stand in the label of the operator that reads them; layers that are exactly alike are one box, ``layers.0–31 ×32``,
    and a branch is one unit. Added nodes are blue, thick and have a ``+``; removed ones are orange, dashed, ``−``; nodes that
    read other nodes purple, ``⇄``; nodes with another argument, weight or shape ochre, ``~``.

    Args:
        before: for instance ``trace(model)``.
        after: for instance ``rewrite(model)`` or ``fold(…)``.
        path: of the picture: ``.html`` (a page to look around in, which needs no network), ``.svg``, ``.png``, ``.dot``, ``.json``
            (the description itself) or ``.txt`` (a tree, and the matrix of which projection of which layer has a branch).
        show: ``"before"`` or ``"after"`` draws that graph alone.
        module: path of the module to draw, by default the whole model.
        overwrite: replace a file that exists.

    Raises:
        LoraFxError: there is no such module.
        ExportError: the suffix is not known, or Graphviz (the extra ``draw``) is not installed, fails, or takes too long.
        WriteError: something exists at ``path``, or it cannot be written.
    """
    target = Path(path)
    name = format_of(target)
    for graph in (before, after):
        if not isinstance(graph, fx.GraphModule):
            raise ExportError(
                f"expected graphs to draw, got a {type(graph).__name__}: "
                f"{held_graphs(graph) or 'trace it first, lora_fx.trace(model)'}."
            )
    alone = {"before": before, "after": after}
    if show != "diff" and show not in alone:
        raise ExportError(
            f"show: expected 'before', 'after' or 'diff', got {show!r}. For a fold, draw(base, fold(graph), path)."
        )
    description = describe_graph(alone[show], show) if show in alone else describe(before, after)
    save(within(description, module), target, name, overwrite=overwrite)


def format_of(path: Path) -> str:
    """Return the format in :data:`FORMATS` for the suffix of a file.

    Raises:
        ExportError: the suffix is not known.
    """
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        what = f"{path} is a directory" if path.is_dir() else path.name or "no name"
        raise ExportError(f"{what}: a picture is a file, and one of {', '.join(sorted(_SUFFIXES))}.")
    return _SUFFIXES[suffix]


def save(description: Description, target: Path, name: str, *, overwrite: bool = False) -> None:
    """Write a description in one of the :data:`FORMATS`; see :func:`draw`."""
    place = Target(target, overwrite)
    place.check()
    content = FORMATS[name](description)
    with replacing(place) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
