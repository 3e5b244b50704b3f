"""Attaching an adapter: a new graph with the low-rank branches of a plan written out as nodes.

A branch beside a site ``y = x W^T (+ bias)`` is these nodes, in this order (the casts only for half-precision weights)::

    x → [to float32] → [dropout] → A → B → mul scaling → [pad → index_select] → add y → [to the weight's dtype]

Beside a weight in 4 bits the last two are in the other order. A and B are products of the kind that the site is. This is the order
of operations of PEFT's layers, so that equal factors give equal bits (experts excepted: PEFT adds the update to all of their weights in
every pass). The branch of one part of a fused projection has as many outputs as the part has features; a zero is put behind them, and
each output feature of the site then takes its own one, or the zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx, nn

from lora_fx.adapters.branch_nodes import write_branches
from lora_fx.adapters.dora import check_dora_alone, dropout_modules, initial_magnitude
from lora_fx.adapters.fake_values import FakeValues
from lora_fx.adapters.invocation import check_invocable
from lora_fx.adapters.prefix import check_one_prefix, prefix_values, write_prefix
from lora_fx.adapters.starts import (
    GivenStart,
    check_alone,
    frozen_names,
    model_weight,
    start_values,
    started,
)
from lora_fx.adapters.tokens import check_written_once, row_numbers, token_values, write_rows
from lora_fx.branches.find import find_branches
from lora_fx.branches.invariants import checked
from lora_fx.branches.lower import lower
from lora_fx.branches.tied_copies import check_copied_once, untie
from lora_fx.errors import PlanError
from lora_fx.graph.adapter_names import (
    adapter_of,
    adapters,
    check_adapter_name,
    copy_name,
    original_name,
    rest_name,
)
from lora_fx.graph.batch_norms import whole_norms
from lora_fx.graph.cached_graphs import check_changeable
from lora_fx.graph.graph_module import TracedGraphModule, copy_graph, rebuilt, state_of
from lora_fx.graph.info import AdapterRecord, GraphInfo, RuledBranches, info_of
from lora_fx.graph.module_tensors import trainable_names
from lora_fx.graph.process_state import forked_random_state, uncollected
from lora_fx.graph.records import BranchSpec, Origin
from lora_fx.graph.state import State
from lora_fx.numerics.factor_init import adapter_dtype, initial_factors
from lora_fx.planning.plan import Chosen, Plan, factor_shapes
from lora_fx.planning.planner import check_attachable
from lora_fx.sites.attention_places import attentions_at

aten = torch.ops.aten


@uncollected()
def attach(
    graph_module: TracedGraphModule,
    plan: Plan,
    *,
    adapter: str = "default",
    seed: int | None = None,
    values: Mapping[str, torch.Tensor] | None = None,
    acts: bool | None = None,
    start: GivenStart | None = None,
) -> TracedGraphModule:
    """Return a new graph with another adapter: its parameters, and, if it acts, a branch beside every chosen site.

    Args:
        graph_module: not changed; the result has parameters of its own over the same storage.
        plan: made for this graph.
        adapter: name of the new adapter.
        seed: of the initial factors. Without one they are drawn from torch's current random state, which is restored.
        values: the adapter's parameters, all of them, by their names in the graph, in place of initial ones. Those with
            ``requires_grad`` train while it acts.
        acts: whether the graph computes with it. By default the first adapter of a graph does, and a later one does not. Branches that
            came with the model do not count.
        start: gives first factors for call sites.

    Raises:
        PlanError: the adapter name is taken or not usable, a chosen site cannot get a branch, a branch has no values and does
            not start with random ones, or another adapter that acts has a trained copy of the same parameter.
    """
    check_adapter_name(adapter)
    check_changeable(graph_module)
    taken = adapters(graph_module)
    if adapter in taken:
        raise PlanError(
            f"the graph already has an adapter {adapter!r}; name the new one differently with adapter=. It has: {', '.join(taken)}."
        )
    graph_module = lower(graph_module)
    check_attachable(plan, graph_module)
    check_invocable(graph_module, plan, adapter)
    state = state_of(graph_module)
    plan, pairs = (plan, {}) if values is not None else started(plan, graph_module.graph, state, start)
    if pairs:
        check_attachable(plan, graph_module)  # again: branches start from the weight now
    ordered = _in_module_order(plan, state)
    factors = _new_factors(ordered, state, adapter, seed, pairs) if values is None else _given(ordered, adapter, values)
    copies = _copies(plan, state, adapter, values)
    rows = token_values(plan.tokens, state.tensors, adapter, values)
    ahead = prefix_values(plan.prefix, state, adapter, values, seed)
    new = {**factors, **copies, **rows, **ahead, **_statistics(graph_module.graph, plan, state, adapter, values)}
    state = state.with_tensors(new)
    trains = frozenset(name for name, parameter in new.items() if parameter.requires_grad)
    origin, untied = plan.origin or Origin.of(plan.rules), frozenset(each.name for each in plan.trained if each.untied)
    record = AdapterRecord(_branches(plan), origin, plan.reasons, False, trains, untied, plan.tokens, plan.prefix)
    if not info_of(graph_module).adapters if acts is None else acts:
        return _with_nodes(graph_module, state, plan, adapter, record)
    return checked(rebuilt(graph_module, state=state, info=_with_record(graph_module, adapter, record)), "waiting")


@uncollected()
def act(graph_module: TracedGraphModule, plan: Plan, adapter: str) -> TracedGraphModule:
    """Return the graph computing with an adapter that it has, and that does not act.

    Args:
        graph_module: not changed.
        plan: of the adapter, made for this graph; its strengths are those of the branches.
        adapter: its name.

    Raises:
        PlanError: another adapter that acts has a trained copy of the same parameter.
    """
    graph_module = lower(graph_module)
    check_invocable(graph_module, plan, adapter)
    record = info_of(graph_module).adapters[adapter]
    return _with_nodes(graph_module, state_of(graph_module), plan, adapter, record)


def _with_nodes(
    graph_module: TracedGraphModule, state: State, plan: Plan, adapter: str, record: AdapterRecord
) -> TracedGraphModule:
    """Return a graph with the nodes of an adapter, whose parameters are in ``state``."""
    others = {name: each for name, each in info_of(graph_module).adapters.items() if each.acts}
    check_alone(adapter, replace(record, branches=_branches(plan)), others)
    check_one_prefix(adapter, record, others)
    copies = {name for name in state.tensors if original_name(name) is not None and adapter_of(name) == adapter}
    check_copied_once(graph_module, adapter, copies, record.untied)
    check_written_once(graph_module.graph, adapter, record.tokens, copies, state)
    ordered = _in_module_order(plan, state)
    places = {**_places(ordered, state, adapter), **row_numbers(record.tokens, state, adapter)}
    check_dora_alone(graph_module, plan, adapter, record.tokens)
    state = state.with_tensors(places).with_modules(dropout_modules(graph_module.graph, ordered.values(), adapter))
    state = State(state.tensors, state.non_persistent | set(places), state.modules)
    ends = {branch.site.name: branch.end for branch in find_branches(graph_module)}
    graph, copies_of = copy_graph(graph_module.graph)
    write_branches(graph, plan, state, adapter, {site: copies_of[end] for site, end in ends.items()})
    for node in graph.find_nodes(op="get_attr"):
        for own in (copy_name(str(node.target), adapter), rest_name(str(node.target), adapter)):
            if node.target not in record.untied and own in copies:
                node.target = own
    for names in state.names().values() if record.untied else ():
        untie(graph, names, {name: copy_name(name, adapter) for name in names if name in record.untied})
    write_rows(graph, state, FakeValues(state), adapter, record.tokens)
    slot, place = info_of(graph_module).prefix_slot, record.prefix and record.prefix.place
    attended = [copies_of[each.result] for each in attentions_at(graph_module, place)] if place else []
    state = state.with_modules(write_prefix(graph, state, adapter, record.prefix, slot, attended))
    graph.lint()
    info = _with_record(graph_module, adapter, replace(record, branches=_branches(plan), acts=True))
    trainable = trainable_names(graph_module) | (frozenset() if info.inference else record.trains)
    return checked(rebuilt(graph_module, graph, state=state, info=info, trainable=trainable), "branched")


def _in_module_order(plan: Plan, state: State) -> dict[str, tuple[Chosen, BranchSpec]]:
    """Return every branch once, however many sites share it, in the order of the model's modules: that is PEFT's order."""
    position = {name: index for index, name in enumerate(state.tensors)}
    ordered = sorted(plan.chosen, key=lambda chosen: position[_own_weight(chosen, state)])
    return {branch.key: (chosen, branch) for chosen in ordered for branch in chosen.branches}


def _new_factors(
    ordered: Mapping[str, tuple[Chosen, BranchSpec]],
    state: State,
    adapter: str,
    seed: int | None,
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    factors: dict[str, torch.Tensor] = {}
    with forked_random_state(seed=seed):
        for chosen, branch in ordered.values():
            site, names, init = chosen.site, branch.names(adapter), branch.setting.init
            if branch.mirrors is not None:
                continue
            like = state.tensors[model_weight(site)]
            if (made := start_values(site, branch, adapter, like, pairs.get(branch.key))) is not None:
                factors |= made
                if branch.setting.bias:
                    factors[names.bias] = nn.Parameter(torch.zeros_like(made[names.b][:, 0]).flatten())
                if branch.setting.variant == "dora":
                    a, b = made[names.a], made[names.b]
                    factors[names.magnitude] = initial_magnitude(site, like, a, b, branch.setting.scale)
                continue
            shapes = (*factor_shapes(branch, site), *[(site.out_features,)] * branch.setting.bias)
            dtype = adapter_dtype(site.cast or like.dtype)
            if like.is_meta:  # there is nothing to draw, which takes longer than all else
                drawn = tuple(nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes)
            else:
                drawn = initial_factors(shapes, branch.setting.rank, like, computed=site.cast, op=site.op, init=init)
            drawn[0].requires_grad_(branch.setting.trains_a)
            drawn[1].requires_grad_(branch.setting.trains_b)
            factors |= dict(zip((names.a, names.b, names.bias), drawn, strict=False))
            if branch.setting.variant == "dora":
                factors[names.magnitude] = initial_magnitude(site, like, drawn[0], drawn[1], branch.setting.scale)
    return factors


def _given(
    ordered: Mapping[str, tuple[Chosen, BranchSpec]], adapter: str, values: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    names = [
        (branch.parameters(adapter), frozen_names(chosen.site, branch, adapter)) for chosen, branch in ordered.values()
    ]
    return {name: _parameter(values[name]) for own, frozen in names for name in (*own, *frozen)}


def _copies(
    plan: Plan, state: State, adapter: str, values: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """Return copies of the parameters that train: training them in place would change the model they came from."""
    own = {copy_name(trained.name, adapter): state.tensors[trained.name] for trained in plan.trained}
    if values is not None:
        return {name: _parameter(values[name]) for name in own}
    return {name: nn.Parameter(parameter.detach().clone()) for name, parameter in own.items()}


def _statistics(
    graph: fx.Graph, plan: Plan, state: State, adapter: str, values: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """Return copies of the running statistics of the batch norms that train as a whole."""
    names = whole_norms(graph, state.modules, [trained.name for trained in plan.trained], state.tensors)
    own = {copy_name(name, adapter): state.tensors[name] for name in names}
    return {name: (values or own).get(name, tensor).detach().clone() for name, tensor in own.items()}


def _parameter(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), value.requires_grad)


def _places(ordered: Mapping[str, tuple[Chosen, BranchSpec]], state: State, adapter: str) -> dict[str, torch.Tensor]:
    """Return for each branch of a part: for each output feature the row of B that belongs to it, or the number of rows."""
    places = {}
    for chosen, branch in ordered.values():
        if branch.features is not None:
            weight = state.tensors[chosen.site.weight]
            rows = torch.full((chosen.site.out_features,), len(branch.features))
            rows[list(branch.features)] = torch.arange(len(branch.features))
            # Real even where the weights are not: they follow from the plan.
            places[branch.names(adapter).places] = rows if weight.is_meta else rows.to(weight.device)
    return places


def _own_weight(chosen: Chosen, state: State) -> str:
    own = f"{chosen.site.module}.weight"
    return own if own in state.tensors else chosen.site.weight


def _branches(plan: Plan) -> RuledBranches:
    return {branch.key: (chosen.rule, branch) for chosen in plan.chosen for branch in chosen.branches}


def _with_record(graph_module: TracedGraphModule, adapter: str, record: AdapterRecord) -> GraphInfo:
    info = info_of(graph_module)
    return replace(info, adapters={**info.adapters, adapter: record})
