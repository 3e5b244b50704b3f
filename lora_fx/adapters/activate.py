"""Activation of some of a graph's adapters, each at its own strength."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from lora_fx.adapters.attach import attach
from lora_fx.adapters.transfer import branches_of, parameters_of, recorded_plan, trained_of
from lora_fx.branches.remove import unload
from lora_fx.errors import PlanError
from lora_fx.graph.adapter_names import adapters
from lora_fx.graph.graph_module import TracedGraphModule
from lora_fx.rules.plain_numbers import finite_number


def activate(graph_module: fx.GraphModule, strengths: Mapping[str, float]) -> TracedGraphModule:
    """Return the graph with the branches of just these adapters: ``y + Σ strength · scaling · B(A(x))``.

    Trained copies of the other adapters give way to the model's own parameters. ``{}`` gives the base. The parameters
    are shared with ``graph_module``, which is not changed. A strength replaces the present one of the adapter, it is no
    factor of it.

    Args:
        graph_module: made by lora_fx, with adapters.
        strengths: adapter → factor of its scaling; 1 is the adapter as it was trained. Numbers of numpy and tensors without
            dimensions are taken too.

    Raises:
        PlanError: the graph has no such adapter, a strength is not finite, or one is not 1 where the adapter has trained
            copies of the model's parameters, which have no strength.
        FoldError: a branch cannot be taken out without changing something else.
    """
    result = unload(graph_module)
    for adapter, strength in ordered(graph_module, strengths).items():
        plan = recorded_plan(graph_module, adapter, result, strength=strength)
        result = attach(result, plan, adapter=adapter, values=parameters_of(graph_module, adapter))
    return result


def ordered(graph_module: fx.GraphModule, strengths: Mapping[str, float]) -> dict[str, float]:
    """Return the strengths of these adapters in the order in which the graph has them, as floats.

    Raises:
        PlanError: see :func:`activate`.
    """
    if not isinstance(strengths, Mapping):
        raise PlanError(f'expected strengths by the names of adapters, as {{"a": 1.0, "b": 0.5}}, got {strengths!r}.')
    found: dict[str, float] = {}
    for adapter, given in strengths.items():
        branches_of(graph_module, adapter)
        strength = finite_number(given)
        if strength is None:
            raise PlanError(f"adapter {adapter!r} cannot have the strength {given!r}: give a finite number.")
        found[adapter] = strength
        names = ", ".join(trained.name for trained in trained_of(graph_module, adapter))
        if names and strength != 1:
            raise PlanError(
                f"adapter {adapter!r} has trained copies of {names}, which have no other strength than 1, and was asked for "
                f"{strength:g}. Leave it out, or give it the strength 1."
            )
    return {adapter: found[adapter] for adapter in adapters(graph_module) if adapter in found}
