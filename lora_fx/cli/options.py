"""Options that several commands have."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # torch is slow to import, and `--help` does not need it
    from lora_fx.adapters.peft_format.stacks import StackLayout

Rules = Annotated[
    str,
    typer.Option(
        help="Name of built-in rules, auto, all-linear, all-conv, or the path of a .toml file or of a PEFT configuration (.json)."
    ),
]
RulesDirectories = Annotated[
    list[Path] | None,
    typer.Option(help="Directory of further rule files, searched first. May be repeated; see also LORA_FX_RULES."),
]
Rank = Annotated[int | None, typer.Option(min=1, help="Replaces the default rank of the rules.")]
Strengths = Annotated[
    list[float] | None,
    typer.Option(help="Factor of an adapter's scaling, once for each, in their order. By default all are 1."),
]


class StacksIn(StrEnum):
    """Layouts of the factors of stacked experts in an adapter's file."""

    auto = "auto"
    as_stored = "as_stored"
    exchanged = "exchanged"


Stacks = Annotated[
    list[StacksIn] | None,
    typer.Option(
        help="How an adapter of stacked experts has A and B, once for each adapter, in their order; asked for where neither their "
        "shapes nor the version of PEFT tell."
    ),
]
IgnoredConfigKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-config-key",
        metavar="KEY",
        help="Key of an adapter_config.json that lora-fx does not know, and that has no effect on the result. May be repeated.",
    ),
]
ModelClass = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Class of transformers that the adapters were trained on. By default that of config.json, or of their task where they "
        "have modules that this lacks.",
    ),
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
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT if it is a file; never a directory, nor a file that is read.")
]


def inputs(*given: Path | str | None) -> tuple[Path, ...]:
    """Return the files and directories that a command reads; of rules, only those that are a file."""
    return tuple(
        Path(path)
        for path in given
        if path is not None and str(path).endswith((".toml", ".json") if isinstance(path, str) else "")
    )


def strengths_of(adapters: list[Path], given: list[float] | None) -> list[float]:
    """Return the strength of each adapter: as given, or 1. Without strengths no two adapters are one, by the paths they resolve to."""
    places: dict[str, Path] = {}
    for adapter in adapters:
        other = places.setdefault(os.path.realpath(adapter), adapter)
        if other is not adapter and not given:
            also = "twice" if str(other) == str(adapter) else f"as {other} too"
            raise typer.BadParameter(
                f"{adapter} is given {also}, and would be added twice: give it once, with --strength 2 if that is meant, or with a strength each time"
            )
    strengths = given or [1.0] * len(adapters)
    if len(strengths) != len(adapters):
        raise typer.BadParameter(
            f"{len(adapters)} adapters, and {len(strengths)} strengths: give one for each, or none"
        )
    return strengths


def stacks_of(adapters: list[Path], given: list[StacksIn] | None) -> list[StackLayout | None]:
    """Return the layout of the stacked experts of each adapter: as given, or None where its file tells."""
    chosen = given or [StacksIn.auto] * len(adapters)
    if len(chosen) != len(adapters):
        raise typer.BadParameter(
            f"{len(adapters)} adapters, and {len(chosen)} times --stacks: give it once for each (auto where the file tells), or not "
            "at all"
        )
    told: dict[StacksIn, StackLayout | None] = {StacksIn.as_stored: "as_stored", StacksIn.exchanged: "exchanged"}
    return [told.get(each) for each in chosen]
