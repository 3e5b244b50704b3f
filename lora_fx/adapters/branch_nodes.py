"""Branches as nodes: each one beside its site, in the operators of the site.

See :mod:`lora_fx.adapters.attach` for the order of the nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from lora_fx.adapters.dora import DoraBranch
from lora_fx.adapters.fake_values import FakeValues
from lora_fx.adapters.invocation import Invocations, Tokens
from lora_fx.branches.lower import describe
from lora_fx.graph.provenance import module_path, write_stamp
from lora_fx.graph.records import BranchSpec
from lora_fx.graph.state import State
from lora_fx.numerics.factor_init import adapter_dtype, casts_first
from lora_fx.planning.plan import Chosen, Plan
from lora_fx.sites.call_sites import biased, cast_back
from lora_fx.sites.stored_weight import cast_of
from lora_fx.sites.weight_ops import Emit, low_rank, weight_op

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """The rows of a batch for which branches act.

    Attributes:
        mine: the node that tells of each row of the batch whether it is one ``(batch,)``.
        indices: the node with their numbers ``(rows,)``.
        batch: the node with the size of the batch.
        merged: the sites at which the first dimension is the batch and others in one, and their inputs, by the names of the nodes.
    """

    mine: fx.Node
    indices: fx.Node
    batch: fx.Node
    merged: frozenset[str]

    def of(self, emit: Emit, value: fx.Node, like: fx.Node) -> fx.Node:
        """Write the selection of these rows of a value, and return it.

        Args:
            emit: appends a node.
            value: with the rows of the whole batch.
            like: the site, or its input: whichever has the sizes of the value.
        """
        return emit("rows", aten.index_select.default, self._apart(emit, value, like), 0, self.indices)

    def put(self, emit: Emit, whole: fx.Node, value: fx.Node, site: fx.Node) -> fx.Node:
        """Write a value over these rows of the output of a site, and return that."""
        done = emit("rows", aten.index_copy.default, self._apart(emit, whole, site), 0, self.indices, value)
        return emit("rows", aten.reshape.default, done, [-1, *_sizes(site)]) if site.name in self.merged else done

    def _apart(self, emit: Emit, value: fx.Node, like: fx.Node) -> fx.Node:
        if like.name not in self.merged:
            return value
        return emit("rows", aten.reshape.default, value, [self.batch, -1, *_sizes(like)])


def _sizes(node: fx.Node) -> list[int]:
    return [int(size) for size in node.meta["val"].shape[1:]]


def write_branches(
    graph: fx.Graph, plan: Plan, state: State, adapter: str, ends: dict[str, fx.Node], rows: Rows | None = None
) -> None:
    """Write the branches of a plan into a graph (in place).

    Args:
        graph: gets the nodes.
        plan: the branches, made for this graph.
        state: has the tensors and modules of the branches.
        adapter: that they belong to.
        ends: the ends of the branches so far, by the names of their sites' nodes; grows.
        rows: for which they act; by default for all.
    """
    nodes, invocations = {node.name: node for node in graph.nodes}, Invocations(graph)
    named = {str(node.target): node for node in graph.find_nodes(op="get_attr")}
    fakes = FakeValues(state)
    for chosen in plan.chosen:
        site = nodes[chosen.site.node]
        returned = cast_back(site, state.tensors[chosen.site.weight])
        end = ends.get(site.name) or returned or _complete(site, state)
        for branch in chosen.branches:
            behind = site if end in (site, biased(site), returned) else _added(end)
            end = _BranchWriter(graph, state, named, fakes, chosen, branch, adapter, rows, invocations).write(
                site, end, behind
            )
        ends[site.name] = end


def _complete(site: fx.Node, state: State) -> fx.Node:
    """Return the node with the complete output of a site's module: PEFT adds a branch to that, bias included."""
    total, parts = biased(site), weight_op(site)
    if total is None or parts is None or module_path(total) != module_path(site):
        return site
    bias = next(node for node in total.all_input_nodes if node is not site)
    dtype = parts.dtype or state.tensors[str(parts.weight.target)].dtype
    return total if state.tensors[str(bias.target)].dtype == dtype else site


def _added(end: fx.Node) -> fx.Node:
    """Return the output of the last branch at a site: the second summand of its sum, which may be cast back or put in rows."""
    end = end.args[0] if end.target in (aten.reshape.default, aten.view_as.default) else end  # type: ignore[assignment]
    end = end.args[3] if end.target is aten.index_copy.default else end  # type: ignore[assignment]
    total = end if end.target is aten.add.Tensor else end.args[0]
    added = total.args[1] if isinstance(total, fx.Node) and total.target is aten.add.Tensor else None
    return added if isinstance(added, fx.Node) else end


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
    rows: Rows | None
    invocations: Invocations

    def write(self, base: fx.Node, end: fx.Node, behind: fx.Node) -> fx.Node:
        """Write the branch of a site, and return the node that the rest of the graph reads from now on.

        Args:
            base: the site's node.
            end: the node to which the branch is added: the site itself, its sum with a bias, or its last branch so far.
            behind: the node behind which the branch reads the site's input, which may be overwritten later.
        """
        setting, names = self.branch.setting, self.branch.names(self.adapter)
        acts: Rows | Tokens | None = self.rows
        emit = partial(self._call, base)
        parts = weight_op(base)
        assert parts is not None
        weight = self.state.tensors[self.chosen.site.weight]
        returned = cast_back(base, weight)
        x, narrow = parts.input, parts.dtype or weight.dtype
        if returned is not None:
            x, narrow = x.all_input_nodes[0], cast_of(returned) or narrow
        wide = adapter_dtype(narrow)
        a = self._named(names.a, "factor A", parts.weight)
        b = self._named(names.b, "factor B", a)
        places = None if self.branch.features is None else self._named(names.places, "places", b)
        users, following = list(end.users), behind.next
        with self.graph.inserting_before(following):
            if setting.invocation_tokens:
                mine = None if self.rows is None else self.rows.mine
                acts = self.invocations.tokens(emit, base, setting.invocation_tokens, mine)
            value = x if acts is None else acts.of(emit, x, parts.input)
            if wide != narrow and parts.op != "embedding":
                value = self._call(base, "cast", aten.to.dtype, value, wide)
            if names.dropout in self.state.modules:
                value = self._record(base, "dropout", self.graph.call_module(names.dropout, (value,)))
            if self.branch.mirrors is not None:
                a, b = (self._call(base, part, aten.t.default, factor) for part, factor in (("A", a), ("B", b)))
            bias = self._named(names.bias, "bias of B", b) if setting.bias else None
            x, value = value, low_rank(base, value, a, b, setting.rank, emit, bias)
            if setting.variant == "lora":
                value = self._call(base, "scale", aten.mul.Tensor, value, setting.scale)
            if places is not None:
                value = self._call(base, "pad", aten.constant_pad_nd.default, value, [0, 1])
                value = self._call(base, "place", aten.index_select.default, value, -1, places)
            in_narrow = casts_first(weight) if acts is None else isinstance(acts, Rows) and parts.op != "embedding"
            cast_first = wide != narrow and setting.variant == "lora" and in_narrow
            if cast_first:
                value = self._call(base, "cast", aten.to.dtype, value, narrow)
        with self.graph.inserting_before(following if behind is end else end.next):
            added = self._dora(base, end, x, (a, b, value)) if setting.variant == "dora" else None
            to = end if acts is None else acts.of(emit, end, base)
            value = added or self._call(base, "add", aten.add.Tensor, to, value)
            if wide != narrow and not cast_first:
                value = self._call(base, "cast", aten.to.dtype, value, narrow)
            if acts is not None:
                value = acts.put(emit, end, value, base)
                value.meta |= {"val": end.meta["val"]} if "val" in end.meta else {}
        for user in users:
            user.replace_input_with(end, value)
        return value

    def _dora(self, base: fx.Node, end: fx.Node, x: fx.Node, nodes: tuple[fx.Node, fx.Node, fx.Node]) -> fx.Node:
        """Write what makes a branch DoRA's, given the nodes of A, B and ``B(A(x))``, and return its sum with the output of the site."""
        names, weight = self.branch.names(self.adapter), self.state.tensors[self.chosen.site.weight]
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
        describe(node, base, None)
        stamp = {"rule": self.chosen.rule, "site": self.chosen.site.name, "adapter": self.adapter, "part": part}
        write_stamp(node, stamp)
        self.fakes.record(node, base)
        return node
