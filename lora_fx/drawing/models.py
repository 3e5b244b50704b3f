"""Descriptions of models in files, and of the changes that rules make in them. Weights are not read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lora_fx.adapters.attach import attach
from lora_fx.branches.remove import unload
from lora_fx.drawing.describe.description import Description, Show, describe, describe_graph
from lora_fx.folding.fold import recipe
from lora_fx.planning.planner import plan_graph
from lora_fx.rules.lookup import load
from lora_fx.tracing.example_inputs import read_example_inputs
from lora_fx.tracing.trace import trace
from lora_fx.tracing.transformers_models import empty_model


def describe_model(
    path: Path,
    rules: str,
    show: Show = "diff",
    *,
    directories: Sequence[Path] = (),
    rank: int | None = None,
    example_inputs: Path | None = None,
    step: Callable[[str], object] = lambda _: None,
) -> Description:
    """Return the description of a model, and of the changes that rules make in it.

    Args:
        path: a model directory or its ``config.json``; the model is built without weights.
        rules: see :func:`lora_fx.rewrite`.
        show: the graph before, after, both with their difference, or the result of a fold, which differs in no node. Without
            weights nothing is computed; only that all branches can be folded is checked.
        directories: with further rule files, searched first.
        rank: replaces the default rank of the rules.
        example_inputs: a safetensors file of the inputs to trace with, by name.
        step: called with a line about each step.

    Raises:
        LoraFxError: of the kind that reading, tracing, planning and folding raise.
    """
    model = empty_model(path)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    ruleset = load(rules, model_type, directories).with_overrides(rank, None, None)
    step(f"tracing {type(model).__name__}")
    inputs = None if example_inputs is None else read_example_inputs(example_inputs, model)
    base = trace(model, inputs, inference=True)
    if show == "before":
        return {**describe_graph(base, show), "before": f"traced from {path.name}"}
    step(f"rewriting by rules {ruleset.name}")
    branched = attach(base, plan_graph(base, ruleset), seed=0)
    captions = {"before": f"traced from {path.name}", "after": f"rewritten by rules {ruleset.name}"}
    step("comparing")
    match show:
        case "after":
            return {**describe_graph(branched, show), "after": captions["after"]}
        case "fold":
            merges = recipe(branched)
            folded = f"{captions['after']}, and folded"
            return {**describe(base, unload(branched), show=show, merges=merges), **captions, "after": folded}
        case _:
            return {**describe(base, branched), **captions}
