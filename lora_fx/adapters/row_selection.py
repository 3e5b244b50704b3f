"""An adapter for each row of a batch, chosen by the call: PEFT's mixed batches.

The graph has one more input, the number of the adapter of each row. For each adapter, the rows with its number are found once; beside
each of its sites the branch computes on these rows alone, and its sum is written over theirs::

    x → index_select rows → A → B → mul scaling → add (y → index_select rows) → index_copy over the rows of y

So rows of different adapters cost what they cost apart, and the products are those that PEFT computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import overload

import torch
from torch import fx

from lora_fx.adapters.activate import at_rest
from lora_fx.adapters.branch_nodes import Rows, write_branches
from lora_fx.adapters.recorded import plan_branches, record_of, recorded_plan, trained_of
from lora_fx.errors import PlanError
from lora_fx.graph.adapter_rows import AdapterRows, RowCheck
from lora_fx.graph.adapter_states import adapters_as_added
from lora_fx.graph.cached_graphs import CachedGraphs, check_whole
from lora_fx.graph.graph_module import TracedGraphModule, copy_graph, rebuilt, state_of
from lora_fx.graph.info import info_of
from lora_fx.graph.invariants import PLAIN, checked_by
from lora_fx.graph.joined_graphs import apart, joined
from lora_fx.graph.records import BranchSpec
from lora_fx.graph.signature import let_choose_rows
from lora_fx.planning.plan import Plan, owners_of
from lora_fx.sites.call_sites import sites
from lora_fx.sites.weight_ops import weight_op

aten = torch.ops.aten

_CHECK = "input_checks.rows"

_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)


@overload
def activate_by_row(graph_module: CachedGraphs, adapters: Sequence[str] | None = None) -> CachedGraphs: ...


@overload
def activate_by_row(graph_module: fx.GraphModule, adapters: Sequence[str] | None = None) -> TracedGraphModule: ...


def activate_by_row(
    graph_module: fx.GraphModule | CachedGraphs, adapters: Sequence[str] | None = None
) -> TracedGraphModule | CachedGraphs:
    """Return a new graph that takes ``adapter_names``: for each row of the batch the adapter that acts there.

    ``graph(**batch, adapter_names=["style", "facts", "__base__"])`` computes the first row with ``style``, the second with ``facts``,
    and the third with none, as PEFT does with this argument; each adapter acts at strength 1. The graph is for inference: it is in
    evaluation mode, and nothing in it trains. It is called, copied, moved and pickled as other graphs; passes that change adapters take
    the graph from which it was made. The parameters are shared with ``graph_module``, which is not changed.

    Args:
        graph_module: made by lora_fx, with adapters; or the graphs of an encoder-decoder model with a cache.
        adapters: that rows may have; by default all that the graph has.

    Raises:
        PlanError: the graph has no such adapter, an adapter is more than branches of LoRA, or the first dimension of a site is not
            that of the batch.
        FoldError: a branch cannot be taken out without changing something else.
    """
    if isinstance(graph_module, CachedGraphs):
        rest = apart(at_rest(joined(graph_module)), graph_module)
        return CachedGraphs(**{part: _by_row(each, adapters) for part, each in rest.parts.items()}).sharing()
    check_whole(graph_module)
    return _by_row(at_rest(graph_module), adapters)


def _by_row(base: TracedGraphModule, adapters: Sequence[str] | None) -> TracedGraphModule:
    names = adapters_as_added(base) if adapters is None else tuple(dict.fromkeys(adapters))
    if not names:
        raise PlanError("expected a graph with adapters, got one without. Add them with lora_fx.load_adapter.")
    for name in names:
        _check_is_lora(base, name)
    plans = {name: _plan(base, name) for name in names}
    graph, _ = copy_graph(base.graph)
    source, size = _batch(graph)
    merged = _merged(graph, plans, size)
    numbers = let_choose_rows(graph, AdapterRows(names))
    state = state_of(base).with_modules({_CHECK: RowCheck(str(source.target), names)})
    with graph.inserting_before(numbers.next):
        graph.call_module(_CHECK, (numbers, source))
        batch = graph.call_function(aten.sym_size.int, (numbers, 0))
        found = {name: Rows(_indices(graph, numbers, number), batch, merged) for number, name in enumerate(names)}
    ends: dict[str, fx.Node] = {}
    for name, plan in plans.items():
        write_branches(graph, plan, state, name, ends, found[name])
    graph.lint()
    info = replace(info_of(base), by_row=names)
    made = rebuilt(base, graph, state=state, info=info, training=False, trainable=frozenset())
    return checked_by(made, "by row", PLAIN)


def _plan(base: TracedGraphModule, adapter: str) -> Plan:
    """Return the plan of an adapter; for a part of a model, of its branches there."""
    if not info_of(base).part:
        return recorded_plan(base, adapter, base, strength=1.0)
    record = record_of(base, adapter)
    here = {owner for site in sites(base) for owner in owners_of(site)}
    branches = {key: each for key, each in record.branches.items() if each[1].owner in here}
    return plan_branches(base, adapter, branches, (), origin=record.origin)


def _indices(graph: fx.Graph, numbers: fx.Node, number: int) -> fx.Node:
    """Write the indices of the rows that have a number."""
    mine = graph.call_function(aten.eq.Scalar, (numbers, number))
    return graph.call_function(aten.squeeze.dim, (graph.call_function(aten.nonzero.default, (mine,)), 1))


def _check_is_lora(graph_module: TracedGraphModule, adapter: str) -> None:
    """Raise :class:`PlanError` for an adapter that changes more than it adds by branches of LoRA."""
    record = record_of(graph_module, adapter)
    branches = [branch for _, branch in record.branches.values()]
    copies = [each.name for each in trained_of(graph_module, adapter)]
    more = next(iter((*_kinds(branches), *(f"a trained copy of {name!r}" for name in copies))), None)
    more = f"rows of {record.tokens[0].weight!r}" if record.tokens else more
    more = "a prefix" if record.prefix is not None else more
    if more is not None:
        raise PlanError(
            f"adapter {adapter!r} cannot act by row: expected branches of LoRA alone, got {more}. Leave it out, "
            f"lora_fx.activate_by_row(graph, [the others]), and compute its rows with lora_fx.activate(graph, {{{adapter!r}: 1.0}})."
        )


def _kinds(branches: Iterable[BranchSpec]) -> Iterable[str]:
    for branch in branches:
        if branch.setting.variant != "lora":
            yield f"a branch of {branch.setting.variant!r} at {branch.owner!r}"
        elif branch.splits:
            yield f"a branch at {branch.owner!r} whose start split the weight"


def _batch(graph: fx.Graph) -> tuple[fx.Node, object]:
    """Return the first input whose first dimension varies, and that size."""
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() and isinstance(value.shape[0], torch.SymInt):
            return node, value.shape[0].node.expr
    raise PlanError(
        "expected a graph whose batch may have any size, as a trace makes it, got one of fixed sizes. A graph that was pickled has lost "
        "them: choose adapters by row first, and pickle the result."
    )


def _merged(graph: fx.Graph, plans: dict[str, Plan], size: object) -> frozenset[str]:
    """Return the sites with branches at which the batch and other dimensions are one.

    Raises:
        PlanError: the first dimension of a site has nothing of the batch.
    """
    nodes, found = {node.name: node for node in graph.nodes}, set[str]()
    for adapter, plan in plans.items():
        for chosen in plan.chosen:
            parts = weight_op(nodes[chosen.site.node])
            assert parts is not None
            kind = None if parts.op == "expert" else _first_dimension(parts.input, size)
            if kind is None:
                value = parts.input.meta.get("val")
                shape = "unknown sizes" if value is None else tuple(value.shape)
                raise PlanError(
                    f"adapter {adapter!r} cannot act by row at {chosen.site.name!r}: expected an input whose first dimension is the batch "
                    f"{size}, got {shape}. Leave that site out, or activate one adapter for the whole batch."
                )
            if kind == "merged":
                found.add(chosen.site.node)
    return frozenset(found)


def _first_dimension(node: fx.Node, batch: object) -> str | None:
    """Tell whether the first dimension of a value is the batch, the batch merged with what follows it, or neither."""
    if _starts_with(node, batch):
        return "batch"
    source = node
    while source.target in _RESHAPES and isinstance(source.args[0], fx.Node):
        source = source.args[0]
        if _starts_with(source, batch):  # a reshape keeps the order: all of one row stays together
            value = node.meta["val"]
            rest = [size for size in value.shape[1:] if isinstance(size, torch.SymInt)]
            first = value.shape[0]
            whole = isinstance(first, torch.SymInt) and (first.node.expr / batch).is_integer
            return "merged" if whole and not rest else None
    return None


def _starts_with(node: fx.Node, batch: object) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.dim():
        return False
    first = value.shape[0]
    return isinstance(first, torch.SymInt) and first.node.expr == batch
