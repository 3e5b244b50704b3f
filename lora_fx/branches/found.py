"""Branches as they are found: what is beside each site, and which nodes go with them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import fx

from lora_fx.branches.delta import Term
from lora_fx.errors import FoldError
from lora_fx.graph.provenance import source_line
from lora_fx.numerics.update import Update
from lora_fx.numerics.weight_view import View


@dataclass(frozen=True)
class FoundBias:
    """What branches beside a site add to its bias.

    Attributes:
        node: the ``get_attr`` of the bias; None where the site has none.
        reader: the node that adds it to the product; without a bias, the end of the branches.
        updates: vectors, each as a matrix of one column.
    """

    node: fx.Node | None
    reader: fx.Node
    updates: tuple[Update, ...]


@dataclass(frozen=True)
class FoundBranch:
    """All branches beside one site.

    Attributes:
        site: the site's node; if terms are added to the weight itself, the node of that sum.
        base: the value to which the terms are added: the site's node, its sum with a bias, or a reshape of either; or the weight.
        end: the node that the rest of the graph reads in place of ``base``.
        terms: the summands of the branches.
        weight: the ``get_attr`` of the weight.
        view: the view of the weight in which the updates are.
        bias: the updates of the site's bias.
        computed: the node of a weight that is computed from this one, and that the site reads in its place.
        partial: whether they act for a part of the tokens, which depends on the input.
    """

    site: fx.Node
    base: fx.Node
    end: fx.Node
    terms: tuple[Term, ...]
    weight: fx.Node
    view: View
    bias: FoundBias | None = None
    computed: fx.Node | None = None
    partial: bool = False

    @property
    def updates(self) -> tuple[Update, ...]:
        """The updates of the site's weight."""
        return tuple(term.update for term in self.terms)

    @property
    def all_updates(self) -> tuple[Update, ...]:
        """The updates of the site's weight and of its bias."""
        return (*self.updates, *(() if self.bias is None else self.bias.updates))


def replaced_nodes(graph: fx.Graph, found: Iterable[FoundBranch]) -> set[fx.Node]:
    """Return the nodes of a graph that nothing reads any more once its branches are taken out."""
    branches = list(found)
    ends = {each.end for each in branches if each.end is not each.base}
    return unread_nodes(
        graph, ends | {each.computed for each in branches if each.computed}, {each.base for each in branches}
    )


def unread_nodes(graph: fx.Graph, ends: Collection[fx.Node], bases: Collection[fx.Node]) -> set[fx.Node]:
    """Return the nodes that nothing reads any more once others take the place of ``ends``, apart from ``bases``."""
    dead: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in ends or (node.users and node not in bases and dead.issuperset(node.users)):
            dead.add(node)
    return dead


def unexpected(node: fx.Node, problem: str) -> FoldError:
    """Return the error for what cannot be folded, with its node."""
    return FoldError(
        f"a branch cannot be folded: {problem}. The node is {node.format_node()}{source_line(node)}. "
        "Take this computation out of the branch, or keep the graph unfolded."
    )
