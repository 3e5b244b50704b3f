"""Activation of some of a graph's adapters, each at its own strength."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import fx

from lora_fx.adapters.attach import attach
from lora_fx.adapters.transfer import branches_of, parameters_of, recorded_plan, trained_of
from lora_fx.branches.remove import unload
from lora_fx.errors import PlanError
from lora_fx.graph.adapter_names import adapters
from lora_fx.graph.graph_module import TracedGraphModule


def activate(graph_module: fx.GraphModule, strengths: Mapping[str, float]) -> TracedGraphModule:
    """Return the graph with the branches of just these adapters: ``y + Σ strength · scaling · B(A(x))``.

    Trained copies of the other adapters give way to the model's own parameters. ``{}`` gives the base. The parameters
    are shared with ``graph_module``, which is not changed. A strength replaces the present one of the adapter, it is no
    factor of it.

    Args:
        graph_module: made by lora_fx, with adapters.
        strengths: adapter → factor of its scaling; 1 is the adapter as it was trained.

    Raises:
        PlanError: the graph has no such adapter, a strength is not finite, or one is not 1 where the adapter has trained
            copies of the model's parameters, which have no strength.
        FoldError: a branch cannot be taken out without changing something else.
    """
    chosen = ordered(graph_module, strengths)
    result = unload(graph_module)
    for adapter in chosen:
        plan = recorded_plan(graph_module, adapter, result, strength=strengths[adapter])
        result = attach(result, plan, adapter=adapter, values=parameters_of(graph_module, adapter))
    return result


def ordered(graph_module: fx.GraphModule, strengths: Mapping[str, float]) -> tuple[str, ...]:
    """Return the names of these adapters in the order in which the graph has them.

    Raises:
        PlanError: see :func:`activate`.
    """
    if not isinstance(strengths, Mapping):
        raise PlanError(
            f'strengths are given by the names of adapters, as {{"a": 1.0, "b": 0.5}}, and not as {strengths!r}.'
        )
    for adapter, strength in strengths.items():
        branches_of(graph_module, adapter)
        if not isinstance(strength, int | float) or not math.isfinite(strength):
            raise PlanError(f"adapter {adapter!r} cannot have the strength {strength!r}: give a finite number.")
        names = ", ".join(trained.name for trained in trained_of(graph_module, adapter))
        if names and strength != 1:
            raise PlanError(
                f"adapter {adapter!r} has trained copies of {names}, which have no other strength than 1, and was asked for "
                f"{strength:g}. Leave it out, or give it the strength 1."
            )
    return tuple(adapter for adapter in adapters(graph_module) if adapter in strengths)
