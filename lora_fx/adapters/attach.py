"""Attaching an adapter: a new graph with the low-rank branches of a plan written out as nodes.

A branch beside a site ``y = x W^T (+ bias)`` is these nodes, in this order (the casts only for half-precision weights)::

    x → [to float32] → [dropout] → A → B → mul scaling → [pad → index_select] → add y → [to the weight's dtype]

Beside a weight in 4 bits the last two are in the other order. A and B are products of the kind that the site is. This is the order
of operations of PEFT's layers, so that equal factors give equal bits (experts excepted: PEFT adds the update to all of their weights in
every pass). The branch of one part of a fused projection has as many outputs as the part has features; a zero is put behind them, and
each output feature of the site then takes its own one, or the zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from lora_fx.adapters.dora import DoraBranch, check_dora_alone, dropout_modules, initial_magnitude
from lora_fx.adapters.fake_values import FakeValues
from lora_fx.adapters.starts import (
    GivenStart,
    check_alone,
    frozen_names,
    is_from_weight,
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
from lora_fx.graph.cached_graphs import check_whole
from lora_fx.graph.graph_module import TracedGraphModule, copy_graph, rebuilt, state_of, trainable_names
from lora_fx.graph.info import AdapterRecord, GraphInfo, RuledBranches, info_of
from lora_fx.graph.process_state import forked_random_state, uncollected
from lora_fx.graph.provenance import module_path, write_stamp
from lora_fx.graph.records import BranchSpec, Origin
from lora_fx.graph.state import State
from lora_fx.numerics.factor_init import adapter_dtype, casts_first, initial_factors
from lora_fx.planning.plan import Chosen, Plan, Skipped, factor_shapes
from lora_fx.planning.planner import check_attachable
from lora_fx.sites.call_sites import biased
from lora_fx.sites.stored_weight import cast_of
from lora_fx.sites.weight_ops import low_rank, weight_op

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
    check_whole(graph_module)
    taken = adapters(graph_module)
    if adapter in taken:
        raise PlanError(
            f"the graph already has an adapter {adapter!r}; name the new one differently with adapter=. It has: {', '.join(taken)}."
        )
    graph_module = lower(graph_module)
    check_attachable(plan, graph_module)
    state = state_of(graph_module)
    plan, pairs = (plan, {}) if values is not None else started(plan, graph_module.graph, state, start)
    if pairs:
        check_attachable(plan, graph_module)  # again: branches start from the weight now
    ordered = _in_module_order(plan, state)
    factors = _new_factors(ordered, state, adapter, seed, pairs) if values is None else _given(ordered, adapter, values)
    copies = _copies(plan, state, adapter, values)
    rows = token_values(plan.tokens, state.tensors, adapter, values)
    new = {**factors, **copies, **rows, **_statistics(graph_module.graph, plan, state, adapter, values)}
    state = state.with_tensors(new)
    trains = frozenset(name for name, parameter in new.items() if parameter.requires_grad)
    origin, untied = plan.origin or Origin.of(plan.rules), frozenset(each.name for each in plan.trained if each.untied)
    record = AdapterRecord(_branches(plan), origin, _reasons(plan), False, trains, untied, plan.tokens)
    if not info_of(graph_module).adapters if acts is None else acts:
        return _with_nodes(graph_module, state, plan, adapter, record)
    return checked(rebuilt(graph_module, state=state, info=_with_record(graph_module, adapter, record)), "branched")


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
    record = info_of(graph_module).adapters[adapter]
    return _with_nodes(graph_module, state_of(graph_module), plan, adapter, record)


def _with_nodes(
    graph_module: TracedGraphModule, state: State, plan: Plan, adapter: str, record: AdapterRecord
) -> TracedGraphModule:
    """Return a graph with the nodes of an adapter, whose parameters are in ``state``."""
    others = {name: each for name, each in info_of(graph_module).adapters.items() if each.acts}
    check_alone(adapter, replace(record, branches=_branches(plan)), others)
    copies = {name for name in state.tensors if original_name(name) is not None and adapter_of(name) == adapter}
    check_copied_once(graph_module, adapter, copies, record.untied)
    check_written_once(graph_module.graph, adapter, record.tokens, copies, state)
    ordered = _in_module_order(plan, state)
    places = {**_places(ordered, state, adapter), **row_numbers(record.tokens, state, adapter)}
    check_dora_alone(graph_module, plan, adapter, record.tokens)
    state = state.with_tensors(places).with_modules(dropout_modules(graph_module.graph, ordered.values(), adapter))
    state = State(state.tensors, state.non_persistent | set(places), state.modules)
    graph = _branched(graph_module, plan, state, adapter)
    for node in graph.find_nodes(op="get_attr"):
        for own in (copy_name(str(node.target), adapter), rest_name(str(node.target), adapter)):
            if node.target not in record.untied and own in copies:
                node.target = own
    for names in state.names().values():
        untie(graph, names, {name: copy_name(name, adapter) for name in names if name in record.untied})
    write_rows(graph, state, FakeValues(state), adapter, record.tokens)
    graph.lint()
    info = _with_record(graph_module, adapter, replace(record, branches=_branches(plan), acts=True))
    trainable = trainable_names(graph_module) | (frozenset() if info.inference else record.trains)
    return checked(rebuilt(graph_module, graph, state=state, info=info, trainable=trainable), "branched")


def _branched(graph_module: TracedGraphModule, plan: Plan, state: State, adapter: str) -> fx.Graph:
    """Return a copy of the graph with the branches of a plan, over the tensors and modules of ``state``."""
    ends = {branch.site.name: branch.end.name for branch in find_branches(graph_module)}
    graph, _ = copy_graph(graph_module.graph)
    nodes = {node.name: node for node in graph.nodes}
    named = {str(node.target): node for node in graph.find_nodes(op="get_attr")}
    fakes = FakeValues(state)
    for chosen in plan.chosen:
        site = nodes[chosen.site.node]
        cast_back = _cast_back(site, state.tensors[chosen.site.weight])
        end = nodes[ends[site.name]] if site.name in ends else cast_back or _complete(site, state)
        for branch in chosen.branches:
            behind = site if end in (site, biased(site), cast_back) else _added(end)
            end = _BranchWriter(graph, state, named, fakes, chosen, branch, adapter).write(site, end, behind)
    return graph


def _complete(site: fx.Node, state: State) -> fx.Node:
    """Return the node with the complete output of a site's module: PEFT adds a branch to that, bias included."""
    total, parts = biased(site), weight_op(site)
    if total is None or parts is None or module_path(total) != module_path(site):
        return site
    bias = next(node for node in total.all_input_nodes if node is not site)
    dtype = parts.dtype or state.tensors[str(parts.weight.target)].dtype
    return total if state.tensors[str(bias.target)].dtype == dtype else site


def _cast_back(site: fx.Node, weight: torch.Tensor) -> fx.Node | None:
    """Return the cast of a product back to the dtype of the site's input, in a layer for 4 bits that computes in another one.

    PEFT's branch reads the input as it is in front of such a layer, and is added behind it.
    """
    parts, users = weight_op(site), list(site.users)
    if not casts_first(weight) or parts is None or len(users) != 1 or None in (cast_of(parts.input), cast_of(users[0])):
        return None
    return users[0] if module_path(parts.input) == module_path(site) == module_path(users[0]) else None


def _added(end: fx.Node) -> fx.Node:
    """Return the output of the last branch at a site: the second summand of its sum, which may be cast back."""
    total = end if end.target is aten.add.Tensor else end.args[0]
    added = total.args[1] if isinstance(total, fx.Node) and total.target is aten.add.Tensor else None
    return added if isinstance(added, fx.Node) else end


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


def new_factors_like(
    wanted: Mapping[str, torch.Tensor],
    branches: Iterable[tuple[str, BranchSpec]],
    device: torch.device,
    seed: int | None,
) -> dict[str, torch.Tensor]:
    """Return initial values for pairs of factors that have none yet.

    Args:
        wanted: factors by name, in the order of the model's modules, A before B.
        branches: adapter and branch, of every branch in the graph.
        device: for the values.
        seed: of the draws. Without one they come from torch's current random state, which is restored.
    """
    own = ((adapter, branch) for adapter, branch in branches if branch.mirrors is None)
    by_name = {names.a: (branch, names.b, names.bias) for adapter, branch in own for names in (branch.names(adapter),)}
    values: dict[str, torch.Tensor] = {}
    with forked_random_state(seed=seed):
        for name, a in wanted.items():
            if name in by_name and by_name[name][1] in wanted:
                branch, other, bias = by_name[name]
                if is_from_weight(branch):
                    raise PlanError(
                        f"the branch at {branch.key!r} starts from the weight (init {branch.setting.init!r}), and there are no values for it. "
                        "Rewrite the model with its weights, or load an adapter from a directory."
                    )
                like = torch.empty(0, dtype=a.dtype, device=device)
                shapes = {each: wanted[each].shape for each in (name, other, bias) if each in wanted}
                drawn = initial_factors(
                    [*shapes.values()], branch.setting.rank, like, op=branch.op, init=branch.setting.init
                )
                values |= dict(zip(shapes, drawn, strict=True))
                values[name].requires_grad_(branch.setting.trains_a)
                values[other].requires_grad_(branch.setting.trains_b)
    return values


def _own_weight(chosen: Chosen, state: State) -> str:
    own = f"{chosen.site.module}.weight"
    return own if own in state.tensors else chosen.site.weight


def _branches(plan: Plan) -> RuledBranches:
    return {branch.key: (chosen.rule, branch) for chosen in plan.chosen for branch in chosen.branches}


def _reasons(plan: Plan) -> dict[str, str]:
    return {decision.site.name: decision.reason for decision in plan if isinstance(decision, Skipped)}


def _with_record(graph_module: TracedGraphModule, adapter: str, record: AdapterRecord) -> GraphInfo:
    info = info_of(graph_module)
    return replace(info, adapters={**info.adapters, adapter: record})


@dataclass(frozen=True)
class _BranchWriter:
    """Writes one branch into a graph; ``named`` has the ``get_attr`` of every tensor, and grows."""

    graph: fx.Graph
    state: State
    named: dict[str, fx.Node]
    fakes: FakeValues
    chosen: Chosen
    branch: BranchSpec
    adapter: str

    def write(self, base: fx.Node, end: fx.Node, behind: fx.Node) -> fx.Node:
        """Write the branch of a site, and return the node that the rest of the graph reads from now on.

        Args:
            base: the site's node.
            end: the node to which the branch is added: the site itself, its sum with a bias, or its last branch so far.
            behind: the node behind which the branch reads the site's input, which may be overwritten later.
        """
        setting, names = self.branch.setting, self.branch.names(self.adapter)
        parts = weight_op(base)
        assert parts is not None
        weight = self.state.tensors[self.chosen.site.weight]
        cast_back = _cast_back(base, weight)
        x, narrow = parts.input, parts.dtype or weight.dtype
        if cast_back is not None:
            x, narrow = x.all_input_nodes[0], cast_of(cast_back) or narrow
        wide = adapter_dtype(narrow)
        a = self._named(names.a, "factor A", parts.weight)
        b = self._named(names.b, "factor B", a)
        places = None if self.branch.features is None else self._named(names.places, "places", b)
        users, following = list(end.users), behind.next
        with self.graph.inserting_before(following):
            value = x
            if wide != narrow and parts.op != "embedding":
                value = self._call(base, "cast", aten.to.dtype, value, wide)
            if names.dropout in self.state.modules:
                value = self._record(base, "dropout", self.graph.call_module(names.dropout, (value,)))
            if self.branch.mirrors is not None:
                a, b = (self._call(base, part, aten.t.default, factor) for part, factor in (("A", a), ("B", b)))
            bias = self._named(names.bias, "bias of B", b) if setting.bias else None
            x, value = value, low_rank(base, value, a, b, setting.rank, partial(self._call, base), bias)
            if setting.variant == "lora":
                value = self._call(base, "scale", aten.mul.Tensor, value, setting.scale)
            if places is not None:
                value = self._call(base, "pad", aten.constant_pad_nd.default, value, [0, 1])
                value = self._call(base, "place", aten.index_select.default, value, -1, places)
            cast_first = wide != narrow and setting.variant == "lora" and casts_first(weight)
            if cast_first:
                value = self._call(base, "cast", aten.to.dtype, value, narrow)
        with self.graph.inserting_before(following if behind is end else end.next):
            added = self._dora(base, end, x, (a, b, value)) if setting.variant == "dora" else None
            value = added or self._call(base, "add", aten.add.Tensor, end, value)
            if wide != narrow and not cast_first:
                value = self._call(base, "cast", aten.to.dtype, value, narrow)
        for user in users:
            user.replace_input_with(end, value)
        return value

    def _dora(self, base: fx.Node, end: fx.Node, x: fx.Node, nodes: tuple[fx.Node, fx.Node, fx.Node]) -> fx.Node:
        """Write what makes a branch DoRA's, given the nodes of A, B and ``B(A(x))``, and return its sum with the output of the site."""
        names, weight = self.branch.names(self.adapter), self.state.tensors[self.chosen.site.weight]
        if (cast := _cast_back(base, weight)) is not None:
            raise PlanError(
                f"site {self.chosen.site.name!r} can get no branch with DoRA: expected a layer in 4 bits that computes in {cast_of(cast)}, as the "
                f"model, got one that computes in {weight.dtype}. Load the model with bnb_4bit_compute_dtype={cast_of(cast)}."
            )
        magnitude, module = self._named(names.magnitude, "magnitude", nodes[1]), names.training_product
        branch = DoraBranch.of(base, end, weight, (x, *nodes), magnitude, self.branch.setting)

        def in_training(*args: fx.Node) -> fx.Node:
            return self._record(base, "base", self.graph.call_module(module, args))

        return branch.write(partial(self._call, base), in_training if module in self.state.modules else None)

    def _named(self, name: str, part: str, after: fx.Node) -> fx.Node:
        """Return the one ``get_attr`` of a factor; several calls of one module share it."""
        if name not in self.named:
            with self.graph.inserting_after(after):
                node = self.graph.get_attr(name)
            self.named[name] = self._record(after, part, node)
        return self.named[name]

    def _call(self, base: fx.Node, part: str, target: Any, *args: Any) -> fx.Node:
        return self._record(base, part, self.graph.call_function(target, args))

    def _record(self, base: fx.Node, part: str, node: fx.Node) -> fx.Node:
        for key in ("nn_module_stack", "stack_trace"):
            if key in base.meta:
                node.meta[key] = base.meta[key]
        stamp = {"rule": self.chosen.rule, "site": self.chosen.site.name, "adapter": self.adapter, "part": part}
        write_stamp(node, stamp)
        self.fakes.record(node, base)
        return node
