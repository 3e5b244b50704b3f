"""Removal of branches: the graph as it was before the rewrite, without the tensors and modules that only branches had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

from torch import fx

from lora_fx.branches.find import Nominate, find_branches
from lora_fx.branches.found import FoundBranch
from lora_fx.branches.invariants import checked
from lora_fx.branches.lower import lower
from lora_fx.branches.tied_copies import rejoin, untied_copies
from lora_fx.branches.weight_uses import Value, separate, written_nodes
from lora_fx.errors import FoldError
from lora_fx.graph.adapter_names import is_of_adapter, is_of_branch, original_name
from lora_fx.graph.cached_graphs import CachedGraphs
from lora_fx.graph.erasing import erase_unread
from lora_fx.graph.graph_module import TracedGraphModule, copy_graph, rebuilt, state_of
from lora_fx.graph.info import held_graphs, known_info
from lora_fx.graph.joined_graphs import apart, joined
from lora_fx.graph.prefix_slot import emptied
from lora_fx.graph.provenance import source_line
from lora_fx.graph.state import State
from lora_fx.sites.stored_weight import is_transparent, written_rows


@overload
def unload(graph_module: fx.GraphModule, *, branches: Nominate = is_of_branch) -> TracedGraphModule: ...


@overload
def unload(graph_module: CachedGraphs, *, branches: Nominate = is_of_branch) -> CachedGraphs: ...


def unload(
    graph_module: fx.GraphModule | CachedGraphs, *, branches: Nominate = is_of_branch
) -> TracedGraphModule | CachedGraphs:
    """Return the graph as it was before the rewrite: its branches dropped, its weights unchanged.

    Args:
        graph_module: see :func:`lora_fx.fold`.
        branches: see :func:`lora_fx.fold`.

    Raises:
        FoldError: a branch cannot be taken out without changing something else.
    """
    if isinstance(graph_module, CachedGraphs):
        return apart(unload(joined(graph_module), branches=branches), graph_module)
    plain = plain_graph(graph_module)
    return without_branches(plain, find_branches(plain, branches), (), state_of(plain), branches)


def plain_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph whose branches can be taken out, written out as plain nodes.

    Raises:
        FoldError: the argument is no graph, or was folded in place.
    """
    if not isinstance(graph_module, fx.GraphModule):
        raise FoldError(
            f"expected a graph, got a {type(graph_module).__name__}: "
            f"{held_graphs(graph_module) or 'make one with lora_fx.rewrite or lora_fx.trace'}."
        )
    if known_info(graph_module).consumed:
        raise FoldError(
            "this graph was folded in place: its weights hold its branches already. Use the graph that fold returned."
        )
    return lower(graph_module)


def without_branches(
    graph_module: fx.GraphModule,
    found: Sequence[FoundBranch],
    values: Sequence[Value],
    state: State,
    nominate: Nominate,
) -> TracedGraphModule:
    """Return a flat graph without these branches, with a state that may have other values for their weights.

    Args:
        graph_module: of plain nodes.
        found: all of its branches.
        values: the values of each weight; uses that need different ones are untied.
        state: for the result, without the tensors and modules that only the branches had.
        nominate: tells the factors of branches by their names.
    """
    graph, copies = copy_graph(graph_module.graph)
    untied, first, joined = untied_copies(graph_module), state.aliases(), {}
    for node in graph.find_nodes(op="get_attr"):
        if node.target in untied:
            joined[node] = first[untied[str(node.target)]]
        node.target = original_name(str(node.target)) or node.target
    rejoin(graph, joined)
    for branch in found:
        if branch.computed is not None and copies[branch.computed].users:
            copies[branch.computed].replace_all_uses_with(copies[branch.weight])
            erase_unread(graph, copies[branch.computed])
    separate(graph, values, copies)
    for branch in found:
        if branch.end is branch.base:
            continue
        base = copies[branch.base]
        if branch.base is branch.weight:  # untying may have given the sum another get_attr
            base = copies[branch.site].all_input_nodes[branch.site.all_input_nodes.index(branch.base)]
        copies[branch.end].replace_all_uses_with(base)
        erase_unread(graph, copies[branch.end])
    for node in graph.find_nodes(op="get_attr"):
        if nominate(str(node.target)):
            _erase_dead(graph, node)
    for node in written_nodes(graph):
        node.replace_all_uses_with(node.all_input_nodes[0])
        erase_unread(graph, node)
    _check_nothing_left(graph, nominate)
    state = state.with_modules(emptied(graph, known_info(graph_module).prefix_slot))
    graph.lint()
    aliases, read = (
        state.aliases(),
        {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")},
    )
    of_branches = {aliases[name] for branch in found for update in branch.all_updates for name in update.names}
    writes = (write for node in written_nodes(graph_module.graph) if (write := written_rows(node)) is not None)
    of_branches |= {aliases[name] for write in writes for name in (write.rows, write.values)}
    dropped = {
        name
        for name, first in aliases.items()
        if first not in read and (first in of_branches or is_of_adapter(name) or nominate(name))
    }
    dropped |= set(state.modules) - read
    known = known_info(graph_module)
    info = replace(known.flat, adapters={}, shards=known.shards and known.shards.folded)
    plain = rebuilt(graph_module, graph, state=state.without(dropped), info=info, trainable=frozenset())
    return checked(plain, "folded")


def _check_nothing_left(graph: fx.Graph, nominate: Nominate) -> None:
    """Raise :class:`FoldError` if a node still reads what nominates a branch."""
    left = next((node for node in graph.find_nodes(op="get_attr") if nominate(str(node.target))), None)
    if left is not None:
        reader = next(iter(left.users))
        raise FoldError(
            f"a branch cannot be folded: {left.target!r} is read by {reader.format_node()}{source_line(reader)}, which is part of no branch. "
            "Take this computation out of the graph, or keep it unfolded."
        )


def _erase_dead(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a factor and its views, as far as nothing reads them."""
    for user in list(node.users):
        if is_transparent(user):
            _erase_dead(graph, user)
    if not node.users:
        graph.erase_node(node)
