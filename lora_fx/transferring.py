"""Adapters from one trace of a model onto another, by site."""

from __future__ import annotations

from lora_fx.attaching import attach
from lora_fx.errors import PlanError
from lora_fx.factors import adapters, is_factor
from lora_fx.graph_module import TracedGraphModule, assemble, copy_graph, state_of, trainable_names
from lora_fx.planning import Branch, Chosen, Plan, Skipped
from lora_fx.ruleset import RuleSet, Selection
from lora_fx.sites import sites


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
    for adapter in adapters(graph_module):
        if adapter not in adapters(result):
            result = attach(result, _plan(graph_module, result, adapter), adapter=adapter)
    factors = {name: p for name, p in graph_module.named_parameters() if is_factor(name)}
    state = state_of(result)
    unlike = [
        f"{name}: {tuple(tensor.shape)} against {tuple(state.tensors[name].shape) if name in state.tensors else 'no such site'}"
        for name, tensor in factors.items()
        if name not in state.tensors or state.tensors[name].shape != tensor.shape
    ]
    if unlike:
        raise PlanError(
            f"the adapters do not fit the graph they are transferred onto: {'; '.join(unlike)}. Use the same model and rules."
        )
    graph, _ = copy_graph(result.graph)
    return assemble(
        graph,
        state.with_tensors(factors),
        meta=result.meta,
        training=result.training,
        trainable=trainable_names(result),
    )


def _plan(graph_module: TracedGraphModule, onto: TracedGraphModule, adapter: str) -> Plan:
    record = graph_module.meta["lora_fx"]["adapters"][adapter]
    found = sites(onto)
    missing = sorted(set(record) - {site.module for site in found})
    if missing:
        raise PlanError(
            f"adapter {adapter!r} has branches at {', '.join(missing)}, which the other graph has not. Trace the same model."
        )
    decisions = tuple(
        Chosen(
            site,
            record[site.module]["rule"],
            Branch(**{key: record[site.module][key] for key in ("rank", "alpha", "dropout")}),
        )
        if site.module in record
        else Skipped(site, f"adapter {adapter!r} has no branch here")
        for site in found
    )
    return Plan(RuleSet(name=adapter, select=(Selection(target=tuple(record)),)), decisions)
