"""Transfer of adapters from one trace of a model onto another, by site."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lora_fx.adapters.activate import at_rest, let_act
from lora_fx.adapters.attach import attach
from lora_fx.adapters.recorded import (
    moved_statistics,
    parameters_of,
    record_of,
    recorded_plan,
    resting_records,
    tensors_of,
    trained_of,
    values_of,
)
from lora_fx.adapters.starts import model_weight, rests
from lora_fx.errors import PlanError, listed
from lora_fx.graph.adapter_names import adapter_of, adapters, rest_name
from lora_fx.graph.adapter_states import acting, adapters_as_added
from lora_fx.graph.cached_graphs import CachedGraphs, check_changeable
from lora_fx.graph.compare import described
from lora_fx.graph.graph_module import TracedGraphModule, as_traced, rebuilt, state_of
from lora_fx.graph.info import RuledBranches, info_of
from lora_fx.graph.joined_graphs import Graphs, through, whole
from lora_fx.graph.late_code import without_code
from lora_fx.graph.records import BranchSpec, PrefixSpec, TokenRows, Trained
from lora_fx.planning.plan import owners_of
from lora_fx.rules.peft_config.config import problem_of_layers
from lora_fx.sites.call_sites import sites

_logger = logging.getLogger("lora_fx.adapters")


def transfer(graph_module: TracedGraphModule | CachedGraphs, *, onto: Graphs) -> Graphs:
    """Return a new graph: ``onto`` with the adapters of ``graph_module``, of which the same act at the same strengths.

    Sites correspond by module. An adapter that ``onto`` already has gets the trained factors, and trains if it does in
    ``graph_module``; any other is added. The factors are the result's own parameters, over the storage of those of
    ``graph_module``; what PiSSA and the like left of a weight is made anew of the weight of ``onto``, where that is another one. Adapters
    of ``onto`` alone stay as they are. An adapter that is folded into the weights of ``onto`` is left
    out, if it does not act.

    Args:
        graph_module: a branched graph, or the graphs of an encoder-decoder model with a cache; not changed.
        onto: another trace of the same model (another mode, dtype of activations, or other inputs), not changed; or its graphs
            with a cache, if it has an encoder and a decoder.

    Raises:
        PlanError: one of the two is no graph of lora_fx; their layers differ (``layer_replication``); a site of an adapter is missing in
            ``onto``, or has other features or another rank there; an adapter that acts is folded into the weights of ``onto``; or two
            that would act have trained copies of one parameter.
    """
    given = whole(graph_module)

    def transferred(graph: TracedGraphModule) -> TracedGraphModule:
        with without_code():
            result = _transferred(given, as_traced(graph))
        result.recompile()
        return result

    return through(onto, transferred)


def _transferred(graph_module: TracedGraphModule, onto: TracedGraphModule) -> TracedGraphModule:
    given = as_traced(graph_module)
    norms = list(dict.fromkeys(moved_statistics(given).values()))
    if norms:
        _logger.warning(
            "training has moved the running statistics of %s, which belong to no adapter and are not transferred: the result has "
            "those of the graph that it is transferred onto.",
            listed(norms, 8),
        )
    for each in (given, onto):
        check_changeable(each)
    if problem := problem_of_layers(info_of(given).layers, info_of(onto).layers):
        raise PlanError(f"{problem}.")
    strengths = {**{name: each for name, each in acting(onto).items() if name not in adapters(given)}, **acting(given)}
    within = _folded_into(onto) - _folded_into(given)
    twice = sorted(within & acting(given).keys())
    if twice:
        raise PlanError(
            f"adapter {twice[0]!r} is folded into the weights of the graph that it is transferred onto, and would count twice. "
            "Transfer it onto lora_fx.unload(graph), or let it not act: lora_fx.activate."
        )
    result, tensors, unlike = at_rest(onto), dict[str, torch.Tensor](), list[str]()
    for adapter in adapters_as_added(given):
        if adapter in within:
            _logger.warning("adapter %r is folded into the weights already, and is not transferred.", adapter)
        elif adapter not in adapters(onto):
            plan = recorded_plan(given, adapter, result, strength=1.0)
            result = attach(
                result,
                plan,
                adapter=adapter,
                values=values_of(given, adapter) | _rests(given, result, adapter),
                acts=False,
            )
        else:
            mine, theirs = (record_of(each, adapter).at_strength(1.0).branches for each in (given, result))
            unlike += differences(mine, theirs) or _copy_differences(given, result, adapter)
            unlike += row_differences(record_of(given, adapter).tokens, record_of(result, adapter).tokens)
            unlike += prefix_differences(record_of(given, adapter).prefix, record_of(result, adapter).prefix)
            tensors |= {**tensors_of(given, [adapter]), **_rests(given, result, adapter)}
    state = state_of(result)
    unlike += [
        f"{name}: {described(tensor)} against {_shape_text(state.tensors.get(name))}"
        for name, tensor in tensors.items()
        if _shape_text(state.tensors.get(name)) != _shape_text(tensor)
    ]
    if unlike:
        raise PlanError(
            f"the adapters do not fit the graph they are transferred onto: {'; '.join(unlike)}. Use the same model and rules."
        )
    carried = resting_records(given)
    records = {name: carried.get(name, record) for name, record in info_of(result).adapters.items()}
    info = replace(info_of(result), adapters=records)
    return let_act(rebuilt(result, result.graph, tensors=tensors, info=info), strengths)


def _rests(given: TracedGraphModule, onto: TracedGraphModule, adapter: str) -> dict[str, torch.Tensor]:
    """Return what the start of an adapter leaves of the weights of another graph, where they are others than those it started from.

    Of a weight on the meta device it is there, too, until the weight has values.
    """
    branches = [(adapter, branch) for _, branch in record_of(given, adapter).branches.values() if branch.splits]
    if not branches:
        return {}
    mine, theirs = state_of(given).tensors, state_of(onto).tensors
    site_of = {owner: site for site in sites(onto) for owner in owners_of(site)}
    other, empty = list[tuple[str, BranchSpec]](), dict[str, torch.Tensor]()
    for each in branches:
        name = model_weight(site_of[each[1].owner])
        if theirs[name].is_meta:
            empty[rest_name(name, adapter)] = nn.Parameter(theirs[name].detach().clone(), False)
        elif name not in mine or (theirs[name].shape == mine[name].shape and not _same(mine[name], theirs[name])):
            other.append(each)
    return {**empty, **rests(other, site_of.values(), {**theirs, **parameters_of(given, adapter)})}


def _same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Tell whether two weights are one, or have the same dtype and values."""
    if mine is theirs:
        return True
    return not mine.is_meta and mine.dtype == theirs.dtype and torch.equal(mine.to(theirs.device), theirs)


def _folded_into(graph_module: TracedGraphModule) -> set[str]:
    """Return the adapters of which the fold that made a graph merged branches."""
    read = (name for merge in info_of(graph_module).folded for name in merge.read)
    return {adapter for name in read if (adapter := adapter_of(name)) is not None}


def _shape_text(tensor: torch.Tensor | None) -> str:
    return "no such site" if tensor is None else described(tensor)


def differences(mine: RuledBranches, theirs: RuledBranches) -> list[str]:
    """Return the differences between the branches of an adapter in two graphs that change the result."""
    told = {
        key: (_function_text(mine.get(key)), _function_text(theirs.get(key))) for key in dict.fromkeys((*mine, *theirs))
    }
    return [f"{key}: {one} against {other}" for key, (one, other) in told.items() if one != other]


def _copy_differences(given: TracedGraphModule, onto: TracedGraphModule, adapter: str) -> list[str]:
    """Return the trained copies that an adapter has in ``onto`` alone, and those that other modules compute with in one graph alone."""
    copies, theirs = ({each.name: each for each in trained_of(graph, adapter)} for graph in (given, onto))
    return [
        f"{name}: no trained copy against one"
        if name not in copies
        else f"{name}: a trained copy {_reach(copies[name])} against one {_reach(copy)}"
        for name, copy in theirs.items()
        if name not in copies or copies[name].untied != copy.untied
    ]


def _reach(copy: Trained) -> str:
    return "for that module alone" if copy.untied else "for all modules that share it"


def row_differences(mine: Sequence[TokenRows], theirs: Sequence[TokenRows]) -> list[str]:
    """Return the differences between the rows of embeddings that an adapter has in two graphs."""
    one, other = ({each.weight: each.rows for each in tokens} for tokens in (mine, theirs))
    weights = sorted(weight for weight in one.keys() | other.keys() if one.get(weight) != other.get(weight))
    return [f"{weight}: rows {list(one.get(weight, ()))} against {list(other.get(weight, ()))}" for weight in weights]


def prefix_differences(mine: PrefixSpec | None, theirs: PrefixSpec | None) -> list[str]:
    """Return how the prefixes of an adapter differ in two graphs."""
    told = [None if each is None else replace(each, rule="", dropout=0.0) for each in (mine, theirs)]
    if told[0] == told[1]:
        return []
    if (
        mine is not None
        and theirs is not None
        and mine.hidden is not None
        and replace(mine, hidden=None, rule="", dropout=0.0) == told[1]
    ):
        return ["prefix: it has a projection here, and a file has what that computes: load it under another name"]
    shown = [
        "no prefix"
        if each is None
        else f"{each.tokens} embeddings of {each.size} features"
        if each.is_prompt
        else f"{each.tokens} tokens of {each.layers} layers, {each.heads} heads of {each.size}{f', at {each.place}' if each.place else ''}"
        for each in (mine, theirs)
    ]
    return [f"prefix: {shown[0]} against {shown[1]}"]


def _function_text(entry: tuple[str, BranchSpec] | None) -> str:
    if entry is None:
        return "no branch"
    _, branch = entry
    tied = f", factors of {branch.mirrors}" if branch.mirrors is not None else ""
    kind = "DoRA, " * (branch.setting.variant == "dora") + "a bias in B, " * branch.setting.bias
    tokens = branch.setting.invocation_tokens
    kind += f"invocation tokens {list(tokens)}, " * bool(tokens)
    part = f" for features {branch.features}" if branch.features is not None else ""
    tied += f", beside what {branch.setting.init} left of the weight" if branch.splits else ""
    return f"{kind}rank {branch.setting.rank}, scale {branch.setting.scale:g}, dropout {branch.setting.dropout:g}{part}{tied}"
