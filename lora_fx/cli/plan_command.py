"""``lora-fx plan``: the call sites of a model, and what rules make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lora_fx.cli.console import errors, help_end, reported
from lora_fx.cli.options import ExampleInputsFile, Rank, Rules, RulesDirectories

HELP_END = help_end(
    "lora-fx plan path/to/model",
    "lora-fx plan path/to/model --rules mine.toml --all",
    "lora-fx plan config.json --rules all-linear --rank 16 --json",
    "lora-fx plan config.json --example-inputs inputs.safetensors",
)


def plan(
    model: Annotated[Path, typer.Argument(help="Model directory or config.json; weights are not needed and not read.")],
    rules: Rules = "auto",
    rules_dir: RulesDirectories = None,
    rank: Rank = None,
    alpha: Annotated[
        float | None, typer.Option(help="Replaces the default alpha of the rules; a branch is scaled by alpha / rank.")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Replaces the default dropout of the rules.")] = None,
    example_inputs: ExampleInputsFile = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Print a line for every site, as wide as it is; equal layers are one otherwise."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead, with every site.")] = False,
) -> None:
    """Show the call sites of a model: shape, operator and role, and whether rules give them a branch, and why.

    Sites that are equal in several layers are one line.
    """
    from lora_fx.planning.grouped import as_page, wrapped
    from lora_fx.planning.plan import as_data, as_text
    from lora_fx.planning.planner import plan as make_plan
    from lora_fx.rules.lookup import load
    from lora_fx.tracing.example_inputs import read_example_inputs
    from lora_fx.tracing.transformers_models import empty_model, why_this_class

    if every and as_json:
        raise typer.BadParameter("--json has every site, and --all is for the table: leave out one of them")
    with reported():
        with errors.status("reading the config"):
            empty = empty_model(model)
            head = f"{type(empty).__name__}, {why_this_class(empty.config)}"
        ruleset = load(rules, getattr(empty.config, "model_type", None), rules_dir or ())
        with errors.status(f"tracing {type(empty).__name__}"):
            inputs = None if example_inputs is None else read_example_inputs(example_inputs, empty)
            made = make_plan(empty, ruleset, example_inputs=inputs, rank=rank, alpha=alpha, dropout=dropout)
    if as_json:
        print(json.dumps({"model": type(empty).__name__, **as_data(made)}, indent=2))
    else:
        print("\n".join([*wrapped(head), "", as_text(made) if every else as_page(made)]))
