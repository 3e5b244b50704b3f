"""Transfer of adapters from one trace of a model onto another, by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx, nn

from lora_fx.adapters.attach import attach
from lora_fx.branches.invariants import checked
from lora_fx.errors import PlanError, did_you_mean
from lora_fx.graph.adapter_names import adapter_of, adapters, copy_name, is_of_adapter, original_name
from lora_fx.graph.compare import described
from lora_fx.graph.graph_module import (
    TracedGraphModule,
    as_traced,
    rebuilt,
    state_of,
)
from lora_fx.graph.info import info_of, known_info
from lora_fx.graph.records import BranchSpec, Origin, Trained
from lora_fx.planning.plan import Chosen, Decision, Plan, Skipped, owners_of
from lora_fx.rules.rule_file import RuleSet, Selection
from lora_fx.sites.call_sites import sites


def transfer(graph_module: TracedGraphModule, *, onto: TracedGraphModule) -> TracedGraphModule:
    """Return the graph ``onto`` with the adapters of ``graph_module``.

    Sites correspond by module. An adapter that ``onto`` already has gets the trained factors; any other is
    attached. The factors are the result's own parameters, over the storage of those of ``graph_module``.

    Args:
        graph_module: a branched graph, not changed.
        onto: another trace of the same model (another mode, dtype of activations, or other inputs), not changed.

    Raises:
        PlanError: one of the two is no graph of lora_fx, a site of an adapter is missing in ``onto``, or has other features or another rank there.
    """
    result = as_traced(onto)
    factors = {name: p for name, p in as_traced(graph_module).named_parameters() if is_of_adapter(name)}
    unlike = []
    for adapter in adapters(graph_module):
        if adapter not in adapters(result):
            plan = recorded_plan(graph_module, adapter, result)
            result = attach(result, plan, adapter=adapter, values=parameters_of(graph_module, adapter))
        else:
            unlike += differences(branches_of(graph_module, adapter), branches_of(result, adapter))
    state = state_of(result)
    unlike += [
        f"{name}: {described(tensor)} against {_shape_text(state.tensors.get(name))}"
        for name, tensor in factors.items()
        if _shape_text(state.tensors.get(name)) != _shape_text(tensor)
    ]
    if unlike:
        raise PlanError(
            f"the adapters do not fit the graph they are transferred onto: {'; '.join(unlike)}. Use the same model and rules."
        )
    return checked(rebuilt(result, tensors=factors), "branched")


def _shape_text(tensor: torch.Tensor | None) -> str:
    return "no such site" if tensor is None else described(tensor)


def differences(mine: Mapping[str, tuple[str, BranchSpec]], theirs: Mapping[str, tuple[str, BranchSpec]]) -> list[str]:
    """Return the differences between the branches of an adapter in two graphs that change the result."""
    told = {
        key: (_function_text(mine.get(key)), _function_text(theirs.get(key))) for key in dict.fromkeys((*mine, *theirs))
    }
    return [f"{key}: {one} against {other}" for key, (one, other) in told.items() if one != other]


def _function_text(entry: tuple[str, BranchSpec] | None) -> str:
    if entry is None:
        return "no branch"
    _, branch = entry
    part = f" for features {branch.features}" if branch.features is not None else ""
    return f"rank {branch.setting.rank}, scale {branch.setting.scale:g}, dropout {branch.setting.dropout:g}{part}"


def recorded_plan(
    graph_module: fx.GraphModule, adapter: str, onto: TracedGraphModule, *, strength: float | None = None
) -> Plan:
    """Return a plan that gives a graph an adapter of another one.

    Args:
        graph_module: has the adapter.
        adapter: its name.
        onto: a trace of the same model.
        strength: of the branches, in place of their own.

    Raises:
        PlanError: ``onto`` has not all of the sites, or the adapter has no record.
    """
    branches = {
        key: (rule, branch if strength is None else replace(branch, setting=replace(branch.setting, strength=strength)))
        for key, (rule, branch) in branches_of(graph_module, adapter).items()
    }
    return plan_branches(
        onto, adapter, branches, trained_of(graph_module, adapter), origin=origin_of(graph_module, adapter)
    )


def plan_branches(
    graph_module: TracedGraphModule,
    adapter: str,
    branches: Mapping[str, tuple[str, BranchSpec]],
    trained: Sequence[Trained],
    *,
    origin: Origin,
) -> Plan:
    """Return a plan for branches that are already known.

    Args:
        graph_module: gets the branches.
        adapter: name of the adapter, for messages.
        branches: by their keys: the rule that chose the branch, and the branch.
        trained: parameters of the model that train.
        origin: of the adapter.

    Raises:
        PlanError: the graph has not all of the sites.
    """
    found = sites(graph_module)
    by_owner: dict[str, list[str]] = {}
    for key, (_, branch) in branches.items():
        by_owner.setdefault(branch.owner, []).append(key)
    owners = {site.name: next((o for o in owners_of(site) if o in by_owner), None) for site in found}
    missing = sorted(set(by_owner) - set(owners.values()))
    if missing:
        raise PlanError(
            f"adapter {adapter!r} has branches at {', '.join(missing)}, which the other graph has not. Trace the same model."
        )
    decisions: list[Decision] = []
    for site in found:
        keys = by_owner.get(owners[site.name] or "", [])
        if keys:
            decisions.append(Chosen(site, branches[keys[0]][0], tuple(branches[key][1] for key in keys)))
        else:
            decisions.append(Skipped(site, f"adapter {adapter!r} has no branch here"))
    return Plan(RuleSet(name=adapter, select=(Selection(regex=".*"),)), tuple(decisions), tuple(trained), origin)


def branches_of(graph_module: fx.GraphModule, adapter: str) -> dict[str, tuple[str, BranchSpec]]:
    """Return the branches of an adapter by their keys, each with the rule that chose it.

    Raises:
        PlanError: the graph has no such adapter, or no record of it.
    """
    known = known_info(graph_module).adapters
    present = adapters(graph_module)
    if not isinstance(adapter, str):
        raise PlanError(
            f"expected the name of an adapter, got {adapter!r}; the graph has: {', '.join(present) or 'none'}."
        )
    if adapter not in present:
        raise PlanError(
            f"the graph has no adapter {adapter!r}{did_you_mean(adapter, present)}; it has: {', '.join(present) or 'none'}."
        )
    if adapter not in known:
        raise PlanError(
            f"adapter {adapter!r} came with the model that was traced, or its record was lost: lora_fx.fold folds it as it is. "
            "To choose among adapters, rewrite a model that has none and load them with lora_fx.load_adapter."
        )
    return dict(known[adapter])


def trained_of(graph_module: nn.Module, adapter: str) -> tuple[Trained, ...]:
    """Return the model's parameters of which an adapter has trained copies."""
    return tuple(
        Trained(original, "transferred", parameter.numel())
        for name, parameter in graph_module.named_parameters()
        if (original := original_name(name)) is not None and name == copy_name(original, adapter)
    )


def origin_of(graph_module: fx.GraphModule, adapter: str) -> Origin:
    """Return the origin of an adapter."""
    return info_of(graph_module).origins[adapter]


def parameters_of(graph_module: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Return the parameters of an adapter: the factors of its branches, and its trained copies."""
    return {name: p for name, p in graph_module.named_parameters() if adapter_of(name) == adapter}
