"""An adapter for each row of a batch, chosen by the call: PEFT's mixed batches.

The graph has one more input, the number of the adapter of each row. For each adapter, the rows with its number are found once; beside
each of its sites the branch computes on these rows alone, and its sum is written over theirs::

    x → index_select rows → A → B → mul scaling → add (y → index_select rows) → index_copy over the rows of y

So rows of different adapters cost what they cost apart, and the products are those that PEFT computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import overload

import torch
from torch import fx

from lora_fx.adapters.activate import at_rest
from lora_fx.adapters.batch_dimension import batch_first, shown_shape, size_of_batch
from lora_fx.adapters.branch_nodes import Rows, write_branches
from lora_fx.adapters.recorded import plan_branches, record_of, recorded_plan, trained_of
from lora_fx.adapters.row_modules import RowModule, row_modules, write_modules
from lora_fx.errors import PlanError
from lora_fx.graph.adapter_rows import BASE, AdapterRows, RowCheck
from lora_fx.graph.adapter_states import adapters_as_added
from lora_fx.graph.cached_graphs import CachedGraphs, check_changeable
from lora_fx.graph.graph_module import TracedGraphModule, copy_graph, rebuilt, state_of
from lora_fx.graph.info import info_of
from lora_fx.graph.input_checks import PREFIX
from lora_fx.graph.invariants import PLAIN, checked_by
from lora_fx.graph.joined_graphs import apart, joined
from lora_fx.graph.records import BranchSpec
from lora_fx.graph.signature import let_choose_rows
from lora_fx.planning.plan import Plan, owners_of
from lora_fx.sites.call_sites import sites
from lora_fx.sites.weight_ops import weight_op

aten = torch.ops.aten

_CHECKS = f"{PREFIX}.rows"


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
    check_changeable(graph_module)
    return _by_row(at_rest(graph_module), adapters)


def _by_row(base: TracedGraphModule, adapters: Sequence[str] | None) -> TracedGraphModule:
    given = [adapters] if isinstance(adapters, str) else adapters
    names = adapters_as_added(base) if given is None else tuple(dict.fromkeys(given))
    if not names:
        raise PlanError("expected a graph with adapters, got one without. Add them with lora_fx.load_adapter.")
    for name in names:
        _check_is_lora(base, name)
    plans = {name: _plan(base, name) for name in names}
    graph, _ = copy_graph(base.graph)
    copies = {name: {each.name for each in trained_of(base, name)} for name in names}
    modules = _modules(base, graph, names)
    sources, merged = _places(graph, plans, modules)
    numbers = let_choose_rows(graph, AdapterRows(names))
    checks = {f"{_CHECKS}.{node.name}": RowCheck(str(node.target), names) for node in sources}
    state = state_of(base).with_modules(checks)
    with graph.inserting_before(numbers.next):
        for check, source in zip(checks, sources, strict=True):
            graph.call_module(check, (numbers, source))
        batch = graph.call_function(aten.sym_size.int, (numbers, 0))
        chosen = (*names, BASE) if modules else names
        found = {name: Rows(*_rows(graph, numbers, number), batch, merged) for number, name in enumerate(chosen)}
    ends: dict[str, fx.Node] = {}
    for name, plan in plans.items():
        write_branches(graph, plan, state, name, ends, found[name])
    write_modules(graph, modules, found, copies)
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


def _rows(graph: fx.Graph, numbers: fx.Node, number: int) -> tuple[fx.Node, fx.Node]:
    """Write which rows have a number, and their indices."""
    mine = graph.call_function(aten.eq.Scalar, (numbers, number))
    return mine, graph.call_function(aten.squeeze.dim, (graph.call_function(aten.nonzero.default, (mine,)), 1))


def _modules(graph_module: TracedGraphModule, graph: fx.Graph, adapters: Sequence[str]) -> dict[str, RowModule]:
    """Return the modules that adapters train as a whole, in a copy of the graph.

    Raises:
        PlanError: one is more than a product.
    """
    found: dict[str, RowModule] = {}
    for adapter in adapters:
        modules = row_modules(graph, state_of(graph_module), trained_of(graph_module, adapter))
        if isinstance(modules, str):
            raise _cannot(adapter, f"a trained copy of {modules!r}, which is read elsewhere or in another way")
        found |= modules
    return found


def _check_is_lora(graph_module: TracedGraphModule, adapter: str) -> None:
    """Raise :class:`PlanError` for an adapter that is more than branches of LoRA and modules."""
    record = record_of(graph_module, adapter)
    branches = [branch for _, branch in record.branches.values()]
    more = next(iter(_kinds(branches)), None)
    more = f"rows of {record.tokens[0].weight!r}" if record.tokens else more
    more = f"a {record.prefix.kind}" if record.prefix is not None else more
    if more is not None:
        raise _cannot(adapter, more)


def _cannot(adapter: str, more: str) -> PlanError:
    return PlanError(
        f"adapter {adapter!r} cannot act by row: expected branches of LoRA and modules that train as a whole, each a linear, a convolution "
        f"or an embedding, got {more}. Leave it out, lora_fx.activate_by_row(graph, [the others]), and compute its rows with "
        f"lora_fx.activate(graph, {{{adapter!r}: 1.0}})."
    )


def _kinds(branches: Iterable[BranchSpec]) -> Iterable[str]:
    for branch in branches:
        if branch.setting.variant != "lora":
            yield f"a branch of {branch.setting.variant!r} at {branch.owner!r}"
        elif branch.splits:
            yield f"a branch at {branch.owner!r} whose start split the weight"


def _batches(graph: fx.Graph) -> dict[object, fx.Node]:
    """Return the sizes of the first dimensions of inputs, as far as they vary, each with the first input that has it.

    Raises:
        PlanError: none varies.
    """
    inputs = graph.find_nodes(op="placeholder")
    sizes = {size_of_batch(node): node for node in reversed(inputs)}
    found = {size: node for size, node in sizes.items() if size is not None and not isinstance(size, int)}
    if not found:
        raise PlanError(
            "expected a graph whose batch may have any size, as a trace makes it, got one of fixed sizes. A graph that was pickled has lost "
            "them: choose adapters by row first, and pickle the result."
        )
    return found


def _places(
    graph: fx.Graph, plans: Mapping[str, Plan], modules: Mapping[str, RowModule]
) -> tuple[list[fx.Node], frozenset[str]]:
    """Return the inputs whose rows are meant, and the sites at which the batch and other dimensions are one, with their inputs.

    Raises:
        PlanError: the first dimension of a site has nothing of the batch.
    """
    batches, nodes = _batches(graph), {node.name: node for node in graph.nodes}
    sources, merged = list[fx.Node](), set[str]()
    branched = [
        (f"adapter {adapter!r} cannot act by row at {chosen.site.name!r}", nodes[chosen.site.node])
        for adapter, plan in plans.items()
        for chosen in plan.chosen
    ]
    whole = [(f"the module {path!r} cannot be chosen by row", module.node) for path, module in modules.items()]
    for what, node in (*branched, *whole):
        parts = weight_op(node)
        assert parts is not None
        known = {} if parts.op == "expert" else batches
        tried = ((source, batch_first(parts.input, size)) for size, source in known.items())
        source, place = next(((source, place) for source, place in tried if place is not None), (None, None))
        if source is None or place is None:
            raise PlanError(
                f"{what}: expected an input whose first dimension is that of "
                f"{' or '.join(f'{each.target} {size}' for size, each in batches.items())}, got {shown_shape(parts.input)}. Leave that "
                "site out, or activate one adapter for the whole batch."
            )
        sources += [source] if source not in sources else []
        merged |= {node.name, parts.input.name} if place.merged else set()
    return sources, frozenset(merged)
