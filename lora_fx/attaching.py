"""From a plan to a new graph with low-rank branches written out as nodes.

A branch beside a site ``y = x W^T (+ bias)`` is these nodes, in this order (the casts only for half-precision weights)::

    x → [to float32] → [dropout] → linear A → linear B → mul scaling → add y → [to the weight's dtype]

This is the order of operations of PEFT's layers, so that equal factors give equal bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from lora_fx.branches import find_branches
from lora_fx.errors import PlanError
from lora_fx.factors import adapters, factor_name
from lora_fx.graph_module import State, TracedGraphModule, assemble, copy_graph, state_of, trainable_names
from lora_fx.lowrank import adapter_dtype, initial_factors
from lora_fx.planning import Chosen, Plan, check_weights
from lora_fx.sites import operands

aten = torch.ops.aten


def attach(
    graph_module: TracedGraphModule, plan: Plan, *, adapter: str = "default", seed: int | None = None
) -> TracedGraphModule:
    """Return a new graph with a branch beside every chosen site.

    Args:
        graph_module: left as it is; the result has parameters of its own over the same storage.
        plan: made for this graph.
        adapter: name of the new adapter.
        seed: of the initial factors. Without one they are drawn from torch's current random state, which is put back.

    Raises:
        PlanError: the adapter name is taken or not usable, or a chosen site cannot get a branch.
    """
    if not adapter.isidentifier():
        raise PlanError(
            f"adapter={adapter!r} cannot be part of a parameter's name: use letters, digits and underscores."
        )
    taken = adapters(graph_module)
    if adapter in taken:
        raise PlanError(
            f"the graph already has an adapter {adapter!r}; name the new one differently with adapter=. It has: {', '.join(taken)}."
        )
    check_weights(plan, graph_module)
    state = state_of(graph_module)
    factors = _new_factors(plan, state, adapter, seed)
    dropouts = {_dropout_name(c, adapter): nn.Dropout(c.branch.dropout) for c in plan.chosen if c.branch.dropout > 0}
    state = state.with_tensors(factors)
    ends = {branch.site.name: branch.end.name for branch in find_branches(graph_module)}
    graph, _ = copy_graph(graph_module.graph)
    nodes = {node.name: node for node in graph.nodes}
    for chosen in plan.chosen:
        site = chosen.site.node
        _Writer(graph, state, chosen, adapter).write(nodes[site], nodes[ends.get(site, site)])
    graph.lint()
    inference = graph_module.meta["lora_fx"]["inference"]
    trainable = trainable_names(graph_module) | (frozenset() if inference else frozenset(factors))
    return assemble(
        graph,
        state.with_modules(dropouts),
        meta=_with_adapter(graph_module.meta, adapter, plan),
        training=graph_module.training,
        trainable=trainable,
    )


def _new_factors(plan: Plan, state: State, adapter: str, seed: int | None) -> dict[str, torch.Tensor]:
    # Drawn in the order of the model's modules, not of its calls: that is PEFT's order.
    position = {name: index for index, name in enumerate(state.tensors)}
    modules = {chosen.site.module: chosen for chosen in reversed(plan.chosen)}
    ordered = sorted(modules.values(), key=lambda chosen: position[_own_weight(chosen, state)])
    factors: dict[str, torch.Tensor] = {}
    with _seeded(seed):
        for chosen in ordered:
            site = chosen.site
            a, b = initial_factors(
                site.in_features, site.out_features, chosen.branch.rank, like=state.tensors[site.weight]
            )
            factors[factor_name(site.module, "A", adapter)] = a
            factors[factor_name(site.module, "B", adapter)] = b
    return factors


def new_factors_like(
    wanted: Mapping[str, torch.Tensor], device: torch.device, seed: int | None
) -> dict[str, torch.Tensor]:
    """Return initial values for factors that have none yet.

    Args:
        wanted: factors by name, in the order of the model's modules, A before B.
        device: for the values.
        seed: of the draws. Without one they come from torch's current random state, which is put back.
    """
    values: dict[str, torch.Tensor] = {}
    with _seeded(seed):
        for name, a in wanted.items():
            other = name.replace(".lora_A.", ".lora_B.")
            if other != name:
                like = torch.empty(0, dtype=a.dtype, device=device)
                values[name], values[other] = initial_factors(a.shape[1], wanted[other].shape[0], a.shape[0], like)
    return values


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _own_weight(chosen: Chosen, state: State) -> str:
    own = f"{chosen.site.module}.weight"
    return own if own in state.tensors else chosen.site.weight


def _dropout_name(chosen: Chosen, adapter: str) -> str:
    return f"{chosen.site.module}.lora_dropout.{adapter}"


def _with_adapter(meta: Mapping[str, Any], adapter: str, plan: Plan) -> dict[str, Any]:
    own = dict(meta["lora_fx"])
    record = {
        chosen.site.module: {
            "rank": chosen.branch.rank,
            "alpha": chosen.branch.alpha,
            "dropout": chosen.branch.dropout,
            "rule": chosen.rule,
        }
        for chosen in plan.chosen
    }
    own["adapters"] = {**own.get("adapters", {}), adapter: record}
    return {**meta, "lora_fx": own}


@dataclass(frozen=True)
class _Writer:
    """Writes one branch into a graph."""

    graph: fx.Graph
    state: State
    chosen: Chosen
    adapter: str

    def write(self, base: fx.Node, end: fx.Node) -> None:
        """Write the branch of site ``base`` behind ``end``: the site itself, or its last branch so far."""
        site, branch = self.chosen.site, self.chosen.branch
        parts = operands(base)
        assert parts is not None
        narrow = self.state.tensors[site.weight].dtype
        wide = adapter_dtype(narrow)
        a, b = (self._factor(part, parts.weight) for part in "AB")
        users = list(end.users)
        with self.graph.inserting_before(end.next):
            value = parts.input
            if wide != narrow:
                value = self._call(base, "cast", aten.to.dtype, value, wide)
            if branch.dropout > 0:
                value = self._record(
                    base, "dropout", self.graph.call_module(_dropout_name(self.chosen, self.adapter), (value,))
                )
            value = self._call(base, "A", aten.linear.default, value, a)
            value = self._call(base, "B", aten.linear.default, value, b)
            value = self._call(base, "scale", aten.mul.Tensor, value, branch.scaling)
            value = self._call(base, "add", aten.add.Tensor, end, value)
            if wide != narrow:
                value = self._call(base, "cast", aten.to.dtype, value, narrow)
        for user in users:
            user.replace_input_with(end, value)

    def _factor(self, part: str, weight: fx.Node) -> fx.Node:
        """Return the one ``get_attr`` of a factor; several calls of one module share it."""
        name = factor_name(self.chosen.site.module, part, self.adapter)
        for known in self.graph.find_nodes(op="get_attr"):
            if known.target == name:
                assert isinstance(known, fx.Node)
                return known
        with self.graph.inserting_after(weight):
            node = self.graph.get_attr(name)
        return self._record(weight, f"factor {part}", node)

    def _call(self, base: fx.Node, part: str, target: Any, *args: Any) -> fx.Node:
        return self._record(base, part, self.graph.call_function(target, args))

    def _record(self, base: fx.Node, part: str, node: fx.Node) -> fx.Node:
        for key in ("nn_module_stack", "stack_trace"):
            if key in base.meta:
                node.meta[key] = base.meta[key]
        stamp = {"rule": self.chosen.rule, "site": self.chosen.site.name, "adapter": self.adapter, "part": part}
        node.meta["custom"] = {"lora_fx": stamp}
        _record_value(node, base, self.state)
        return node


def _record_value(node: fx.Node, base: fx.Node, state: State) -> None:
    """Give a new node the fake value that the traced nodes have, from which its shape and dtype can be read."""
    fake = base.meta.get("val")
    if not isinstance(fake, FakeTensor):
        return
    if node.op == "get_attr":
        node.meta["val"] = fake.fake_mode.from_tensor(state.tensors[str(node.target)].detach(), static_shapes=True)
    elif all("val" in argument.meta for argument in node.all_input_nodes):
        arguments = fx.map_arg(node.args, lambda n: n.meta["val"])
        with fake.fake_mode:
            node.meta["val"] = node.target(*arguments) if callable(node.target) else arguments[0]
