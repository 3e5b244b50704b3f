"""An adapter in a graph by its record and its parameters: its branches, its trained copies, its plan for another graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx, nn

from lora_fx.errors import PlanError, did_you_mean
from lora_fx.graph.adapter_names import adapter_of, adapters, copy_name, is_of_start, original_name
from lora_fx.graph.adapter_states import adapters_as_added, trained_names, trained_of_each
from lora_fx.graph.batch_norms import statistics
from lora_fx.graph.graph_module import TracedGraphModule, rebuilt, state_of
from lora_fx.graph.info import AdapterRecord, info_of, known_info
from lora_fx.graph.module_tensors import parameters_of_module, trainable_names
from lora_fx.graph.records import BranchSpec, Origin, PrefixSpec, TokenRows, Trained
from lora_fx.planning.plan import Chosen, Decision, Plan, Skipped, owners_of
from lora_fx.rules.rule_file import RuleSet, Selection
from lora_fx.sites.call_sites import sites


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
    record = record_of(graph_module, adapter)
    if strength is not None:
        record = record.at_strength(strength)
    trained = trained_of(graph_module, adapter)
    return plan_branches(
        onto, adapter, record.branches, trained, origin=record.origin, tokens=record.tokens, prefix=record.prefix
    )


def plan_branches(
    graph_module: TracedGraphModule,
    adapter: str,
    branches: Mapping[str, tuple[str, BranchSpec]],
    trained: Sequence[Trained],
    *,
    origin: Origin,
    tokens: tuple[TokenRows, ...] = (),
    prefix: PrefixSpec | None = None,
) -> Plan:
    """Return a plan for branches that are already known.

    Args:
        graph_module: gets the branches.
        adapter: name of the adapter, for messages.
        branches: by their keys: the rule that chose the branch, and the branch.
        trained: parameters of the model that train.
        origin: of the adapter.
        tokens: rows of embeddings that train.
        prefix: of the adapter.

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
    rules = RuleSet(name=adapter, select=(Selection(regex=".*"),))
    return Plan(rules, tuple(decisions), tuple(trained), origin, tokens, prefix)


def record_of(graph_module: fx.GraphModule, adapter: str) -> AdapterRecord:
    """Return the record of an adapter.

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
    return known[adapter]


def resting_records(graph_module: fx.GraphModule) -> dict[str, AdapterRecord]:
    """Return the record of every adapter as one that does not act: at strength 1, with what trains once it acts.

    They come in the order in which they were added.

    Raises:
        PlanError: see :func:`record_of`.
    """
    known, trained = known_info(graph_module).adapters, trained_of_each(graph_module)
    records = {name: known.get(name) or record_of(graph_module, name) for name in adapters_as_added(graph_module)}
    return {
        name: replace(record.at_strength(1.0), acts=False, trains=trained[name]) for name, record in records.items()
    }


def tensors_of(graph_module: nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Return the parameters and running statistics of these adapters, one adapter after the other."""
    found: dict[str, dict[str, torch.Tensor]] = {adapter: {} for adapter in names}
    for name, parameter in parameters_of_module(graph_module).items():
        if (adapter := adapter_of(name)) in found:
            found[adapter][name] = parameter
    for name, buffer in graph_module.named_buffers():
        if (adapter := adapter_of(name)) in found and original_name(name) is not None:
            found[adapter][name] = buffer
    return {name: tensor for own in found.values() for name, tensor in own.items()}


def branches_of(graph_module: fx.GraphModule, adapter: str) -> dict[str, tuple[str, BranchSpec]]:
    """Return the branches of an adapter by their keys, each with the rule that chose it. Raises as :func:`record_of` does."""
    return dict(record_of(graph_module, adapter).branches)


def trained_of(graph_module: nn.Module, adapter: str) -> tuple[Trained, ...]:
    """Return the model's parameters of which an adapter has trained copies."""
    record = known_info(graph_module).adapters.get(adapter)
    untied = frozenset[str]() if record is None else record.untied
    return tuple(
        Trained(original, "transferred", parameter.numel(), untied=original in untied)
        for name, parameter in parameters_of_module(graph_module).items()
        if (original := original_name(name)) is not None and name == copy_name(original, adapter)
    )


def origin_of(graph_module: fx.GraphModule, adapter: str) -> Origin:
    """Return the origin of an adapter."""
    return record_of(graph_module, adapter).origin


def parameters_of(graph_module: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Return the parameters of an adapter: the factors of its branches, and its trained copies."""
    return {name: p for name, p in parameters_of_module(graph_module).items() if adapter_of(name) == adapter}


def statistics_of(graph_module: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """Return the running statistics of an adapter: of batch norms of which it has trained copies."""
    return {
        name: buffer
        for name, buffer in graph_module.named_buffers()
        if original_name(name) is not None and adapter_of(name) == adapter
    }


def moved_statistics(graph_module: TracedGraphModule) -> dict[str, str]:
    """Return the model's running statistics that are others than in the trace, and the path of the norm of each."""
    before, state = info_of(graph_module).statistics, state_of(graph_module)
    return {
        name: path
        for name, path in statistics(graph_module.graph, state.modules).items()
        if name in before
        and not before[name].is_meta
        and not torch.equal(state.tensors[name].cpu(), before[name].cpu())
    }


def values_of(graph_module: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """Return new parameters over those of an adapter, and its statistics; what trains while it acts requires a gradient."""
    trains, own = trained_names(graph_module, adapter), parameters_of(graph_module, adapter)
    values = {name: nn.Parameter(p.detach(), name in trains) for name, p in own.items()}
    return {**values, **statistics_of(graph_module, adapter)}


def with_training(graph_module: TracedGraphModule, adapter: str, trains: frozenset[str]) -> TracedGraphModule:
    """Return the graph with just these parameters of an adapter training while it acts."""
    info, own = info_of(graph_module), set(parameters_of(graph_module, adapter))
    record = replace(record_of(graph_module, adapter), trains=trains)
    info = replace(info, adapters={**info.adapters, adapter: record})
    now = trains if record.acts and not info.inference else frozenset()
    return rebuilt(graph_module, info=info, trainable=(trainable_names(graph_module) - own) | now)


def free_names(graph_module: fx.GraphModule, adapter: str) -> frozenset[str]:
    """Return the names of an adapter's parameters, without those that its kind freezes: B of MiCA, and what belongs to a start."""
    branches = [branch for _, branch in branches_of(graph_module, adapter).values()]
    frozen = {branch.names(adapter).a for branch in branches if not branch.setting.trains_a}
    frozen |= {branch.names(adapter).b for branch in branches if not branch.setting.trains_b}
    own = parameters_of(graph_module, adapter).keys() - frozen
    return frozenset(name for name in own if not is_of_start(name))
