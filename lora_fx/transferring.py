"""Adapters from one trace of a model onto another, by site."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lora_fx.attaching import attach
from lora_fx.errors import PlanError
from lora_fx.factors import adapters, copy_name, is_of_adapter, original_name
from lora_fx.graph_module import TracedGraphModule, assemble, copy_graph, described, state_of, trainable_names
from lora_fx.planning import Branch, Chosen, Decision, Plan, Skipped, Trained, owners_of
from lora_fx.ruleset import RuleSet, Selection
from lora_fx.sites import sites
from lora_fx.states import checked


def transfer(graph_module: TracedGraphModule, *, onto: TracedGraphModule) -> TracedGraphModule:
    """Return the graph ``onto`` with the adapters of ``graph_module``.

    Sites correspond by module. An adapter that ``onto`` has already is given the trained factors; one that it has not is
    attached. The factors are the result's own parameters, over the storage of those of ``graph_module``.

    Args:
        graph_module: a branched graph, left as it is.
        onto: another trace of the same model (another mode, dtype of activations, or other inputs), left as it is.

    Raises:
        PlanError: a site of an adapter is missing in ``onto``, or has other features or another rank there.
    """
    result = onto
    factors = {name: p for name, p in graph_module.named_parameters() if is_of_adapter(name)}
    unlike = []
    for adapter in adapters(graph_module):
        if adapter not in adapters(result):
            result = attach(result, _plan(graph_module, result, adapter), adapter=adapter)
        else:
            unlike += _differences(_branches(graph_module, adapter), _branches(result, adapter))
    state = state_of(result)
    unlike += [
        f"{name}: {described(tensor)} against {_told(state.tensors.get(name))}"
        for name, tensor in factors.items()
        if _told(state.tensors.get(name)) != _told(tensor)
    ]
    if unlike:
        raise PlanError(
            f"the adapters do not fit the graph they are transferred onto: {'; '.join(unlike)}. Use the same model and rules."
        )
    graph, _ = copy_graph(result.graph)
    moved = assemble(
        graph,
        state.with_tensors(factors),
        meta=result.meta,
        training=result.training,
        trainable=trainable_names(result),
    )
    return checked(moved, "branched")


def _told(tensor: torch.Tensor | None) -> str:
    return "no such site" if tensor is None else described(tensor)


def _branches(graph_module: TracedGraphModule, adapter: str) -> dict[str, Branch]:
    record = graph_module.meta["lora_fx"]["adapters"][adapter]
    return {key: entry["branch"] for key, entry in record.items()}


def _differences(mine: Mapping[str, Branch], theirs: Mapping[str, Branch]) -> list[str]:
    """Return how branches of one adapter differ where that changes what they compute."""
    return [
        f"{key}: {_computes(mine.get(key))} against {_computes(theirs.get(key))}"
        for key in dict.fromkeys((*mine, *theirs))
        if _computes(mine.get(key)) != _computes(theirs.get(key))
    ]


def _computes(branch: Branch | None) -> str:
    if branch is None:
        return "no branch"
    part = f" for features {branch.features}" if branch.features is not None else ""
    return f"rank {branch.setting.rank}, scale {branch.setting.scale:g}, dropout {branch.setting.dropout:g}{part}"


def _plan(graph_module: TracedGraphModule, onto: TracedGraphModule, adapter: str) -> Plan:
    record = graph_module.meta["lora_fx"]["adapters"][adapter]
    found = sites(onto)
    by_owner: dict[str, list[str]] = {}
    for key, entry in record.items():
        by_owner.setdefault(entry["branch"].owner, []).append(key)
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
            decisions.append(Chosen(site, record[keys[0]]["rule"], tuple(record[key]["branch"] for key in keys)))
        else:
            decisions.append(Skipped(site, f"adapter {adapter!r} has no branch here"))
    trained = tuple(
        Trained(original, "transferred", parameter.numel())
        for name, parameter in graph_module.named_parameters()
        if (original := original_name(name)) is not None and name == copy_name(original, adapter)
    )
    return Plan(RuleSet(name=adapter, select=(Selection(regex=".*"),)), tuple(decisions), trained)
