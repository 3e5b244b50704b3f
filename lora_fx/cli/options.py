"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Rules = Annotated[str, typer.Option(help="Name of built-in rules, auto, all-linear, or the path of a .toml file.")]
RulesDirectories = Annotated[
    list[Path] | None,
    typer.Option(help="Directory of further rule files, searched first. May be repeated; see also LORA_FX_RULES."),
]
Rank = Annotated[int | None, typer.Option(help="Replaces the default rank of the rules.")]
Strengths = Annotated[
    list[float] | None,
    typer.Option(help="Factor of an adapter's scaling, once for each, in their order. By default all are 1."),
]
ExampleInputsFile = Annotated[
    Path | None,
    typer.Option(
        "--example-inputs",
        metavar="FILE.safetensors",
        help="Inputs to trace with that the config does not describe: tensors by input name.",
    ),
]
Strict = Annotated[bool, typer.Option(help="Refuse a base other than the one that an adapter names as its own.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]


def strengths_of(adapters: list[Path], given: list[float] | None) -> list[float]:
    """Return the strength of each adapter: as given, or 1."""
    strengths = given or [1.0] * len(adapters)
    if len(strengths) != len(adapters):
        raise typer.BadParameter(
            f"{len(adapters)} adapters, and {len(strengths)} strengths: give one for each, or none"
        )
    return strengths
