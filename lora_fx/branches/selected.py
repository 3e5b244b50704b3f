"""Branches that act for a part of the tokens, seen as branches that act for all.

A branch of aLoRA reads the tokens from an invocation on, and its sum is written over these alone. Where it is and what it adds there is
that of a branch of LoRA; so the search for branches reads a copy of the graph in which nothing is selected::

    view_as(index_copy(flat(y), tokens, index_select(flat(y), tokens) + Δ(index_select(flat(x), tokens))), y)    →    y + Δ(x)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from lora_fx.errors import FoldError
from lora_fx.graph.erasing import erase_unread
from lora_fx.graph.graph_module import copy_graph

aten = torch.ops.aten


@dataclass(frozen=True)
class Unselected:
    """A graph in which branches act for all tokens.

    Attributes:
        graph: the copy, or the graph itself if its branches do.
        originals: its nodes → those of the graph it was made from; the sum of a branch → the end of that.
        partial: the sums in it that are written over a part of the tokens in the original.
    """

    graph: fx.Graph
    originals: Mapping[fx.Node, fx.Node]
    partial: frozenset[fx.Node]


def unselected(graph: fx.Graph) -> Unselected:
    """Return a graph in which branches that select tokens act for all of them."""
    ends = [node for node in graph.find_nodes(op="call_function", target=aten.view_as.default) if _is_end(node)]
    if not ends:
        return Unselected(graph, {node: node for node in graph.nodes}, frozenset())
    changed, copies = copy_graph(graph)
    changed.owning_module = graph.owning_module  # which knows the shapes of tensors that nodes do not
    originals = {copy: node for node, copy in copies.items()}
    partial = set[fx.Node]()
    for end in ends:
        copy = copies[end]
        written = copy.args[0]
        assert isinstance(written, fx.Node)
        _, _, indices, value = written.args
        assert isinstance(indices, fx.Node)
        assert isinstance(value, fx.Node)
        copy.replace_all_uses_with(value)
        erase_unread(changed, copy)
        value.meta["val"] = end.meta.get("val")  # of the shape that its readers see
        originals[value] = end
        partial.add(value)
    for node in list(changed.find_nodes(op="call_function", target=aten.index_select.default)):
        flat = node.args[0]
        if isinstance(flat, fx.Node) and _is_flat(flat) and _is_places(node.args[2]):
            node.replace_all_uses_with(flat.args[0])
            erase_unread(changed, node)
    alive = set(changed.nodes)
    return Unselected(changed, {new: old for new, old in originals.items() if new in alive}, frozenset(partial))


def not_always(adapter: str, where: str) -> FoldError:
    """Return the error for a fold of an adapter whose branch at a module acts for a part of the tokens."""
    return FoldError(
        f"adapter {adapter} cannot be folded: at {where!r} a branch acts from its invocation tokens on (aLoRA), so that what it adds depends "
        "on the input, and no weight can hold that. Keep the graph as it is, or let other adapters act."
    )


def _is_end(node: fx.Node) -> bool:
    written, like = node.args
    if not isinstance(written, fx.Node) or written.target is not aten.index_copy.default:
        return False
    whole, dim, indices, _ = written.args
    flat = isinstance(whole, fx.Node) and _is_flat(whole) and whole.args[0] is like
    return flat and isinstance(dim, int) and dim == 0 and _is_places(indices)


def _is_flat(node: fx.Node) -> bool:
    """Tell whether a node merges all dimensions of a value but the last."""
    sizes = node.args[1] if node.target is aten.reshape.default else ()
    return isinstance(sizes, list | tuple) and len(sizes) == 2 and bool(sizes[0] == -1)


def _is_places(node: object) -> bool:
    """Tell whether a value has the places at which another one is not zero: each once."""
    if not isinstance(node, fx.Node) or node.target is not aten.squeeze.dim:
        return False
    found = node.args[0]
    return isinstance(found, fx.Node) and found.target is aten.nonzero.default
