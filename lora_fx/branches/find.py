"""Recognition of branches in a graph: nominated by the names of their factors, validated by their algebra.

A value that depends on a factor must be linear in a site's input, with constant factors (a ``Delta``), until it is added to
that site's output. One walk in graph order records the sums:

    Joined    site + Delta                      the sum with the output of a site, and sums with further deltas
              weight + Delta                    a product of factors alone may be added to a weight itself, as PEFT does for
                                              stacked experts

Anything else that touches a factor or a delta is an error that names the node. So nothing is ever folded in part, and
nothing that merely looks like a branch is taken for one: without a nominated factor there is no delta.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from lora_fx.branches.dataflow import Flow, keeps_last_dim, same_shapes
from lora_fx.branches.linear_terms import Addition, Delta, Deltas, Term, features_are_last
from lora_fx.errors import FoldError
from lora_fx.graph.adapter_names import is_factor
from lora_fx.graph.graph_module import state_of
from lora_fx.graph.provenance import source_line
from lora_fx.numerics.lowrank_merge import Update
from lora_fx.numerics.weight_view import View
from lora_fx.rules.vocabulary import Op
from lora_fx.sites.call_sites import biased, is_site
from lora_fx.sites.stored_weight import Stored, cast_of
from lora_fx.sites.weight_ops import CONVOLUTIONS, weight_op

Nominate = Callable[[str], bool]
"""Tells by the name of a parameter whether it is a factor of a branch."""


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
    """

    site: fx.Node
    base: fx.Node
    end: fx.Node
    terms: tuple[Term, ...]
    weight: fx.Node
    view: View

    @property
    def updates(self) -> tuple[Update, ...]:
        """The updates of the site's weight."""
        return tuple(term.update for term in self.terms)


def find_branches(graph_module: fx.GraphModule, nominate: Nominate = is_factor) -> tuple[FoundBranch, ...]:
    """Return the branches of a graph, one record for each site that has any.

    Args:
        graph_module: a graph of ATen operators.
        nominate: tells the factors of branches by their names.

    Raises:
        FoldError: a nominated branch computes something that cannot be folded; the message names the node.
    """
    walk = _BranchFinder(graph_module, nominate)
    if not walk.has_factors:
        return ()
    for node in graph_module.graph.nodes:
        walk.step(node)
    return walk.found()


@dataclass(frozen=True)
class _Joined:
    """The output of a site, or a weight, plus deltas.

    ``previous`` is its ``base``, or the node of the ``_Joined`` that this one extends; ``narrow`` is the dtype of the base.
    """

    site: fx.Node
    base: fx.Node
    previous: fx.Node
    terms: tuple[Term, ...]
    dtype: torch.dtype
    narrow: torch.dtype
    weight: Stored
    reshaped: bool = False

    @property
    def is_weight(self) -> bool:
        return self.base is self.weight.node

    def plus(self, delta: Delta) -> _Joined:
        return replace(
            self,
            terms=self.terms + delta.terms,
            dtype=torch.promote_types(self.dtype, delta.dtype),
            reshaped=self.reshaped or delta.reshaped,
        )


class _BranchFinder:
    """One walk through a graph, and the sums found on it.

    Attributes:
        has_factors: whether the graph has any factor of a branch.
    """

    def __init__(self, graph_module: fx.GraphModule, nominate: Nominate) -> None:
        self._tensors = state_of(graph_module).tensors
        self._nominate = nominate
        factors = [name for name in self._tensors if nominate(name)]
        read = (str(node.target) for node in graph_module.graph.find_nodes(op="get_attr"))
        loose = sorted({repr(name) for name in read if nominate(name) and name not in self._tensors})
        if loose:
            raise FoldError(
                f"{', '.join(loose)}: read as a factor, and neither a parameter nor a buffer of the graph. Register it: register_buffer."
            )
        self.has_factors = bool(factors)
        self._holders = {prefix for name in factors for prefix in _prefixes(name)}
        self._deltas = Deltas(self._tensors)
        self._flow = Flow(graph_module, self._deltas.is_product)
        self._sums: dict[fx.Node, _Joined] = {}
        self._extended: set[fx.Node] = set()

    def step(self, node: fx.Node) -> None:
        """Take the next node of the graph."""
        if node.op == "get_attr":
            if self._nominate(str(node.target)):
                self._deltas.add_factor(node)
            return
        self._flow.note(node)
        if self._deltas.touches(node):
            value = self._deltas.step(node)
            joined = self._join(node, value) if isinstance(value, Addition) else None
            if joined is None and not isinstance(value, Delta):
                raise _unexpected(
                    node, "a branch must be linear in its site's input until it is added to its site's output"
                )
            if not node.users:
                raise _unexpected(node, "nothing reads this part of a branch")
        elif node.op == "call_module" and str(node.target) in self._holders:
            raise _unexpected(node, f"the module {str(node.target)!r} holds a factor, and is not made of operators")
        else:
            joined = self._cast_back(node)
        if joined is not None:
            self._sums[node] = joined
            self._extended.add(joined.previous)

    def found(self) -> tuple[FoundBranch, ...]:
        """Return the branches found; raise if one cannot be taken out without changing something else."""
        branches = []
        for node, value in self._sums.items():
            stray = next((user for user in value.previous.users if user is not node), None)
            if stray is not None and not (
                value.is_weight and value.previous is value.base
            ):  # a weight may have other uses
                raise _unexpected(
                    stray, f"it reads {value.previous}, the output of a site before all branches are added to it"
                )
            if node not in self._extended:
                self._check_branch(node, value)
                weight = value.weight
                branches.append(FoundBranch(value.site, value.base, node, value.terms, weight.node, weight.view))
        return tuple(branches)

    def _join(self, node: fx.Node, addition: Addition) -> _Joined | None:
        """Return the sum of a delta with the output of a site, with a weight, or with such a sum; None for other values."""
        base, delta = addition.base, addition.delta
        joined = self._sums.get(base)
        if joined is not None:
            return replace(joined.plus(delta), previous=base) if joined.is_weight == delta.is_weight else None
        if delta.is_weight:
            if base.op != "get_attr" or self._deltas.is_factor(base):
                return None
            narrow = self._tensors[str(base.target)].dtype
            return _Joined(node, base, base, (), narrow, narrow, Stored(base)).plus(delta)
        site = self._site_of(base)
        if site is None:
            return None
        product = weight_op(site)
        assert product is not None
        narrow = product.dtype or self._tensors[str(product.weight.target)].dtype
        total = biased(site)
        if total is not None and base is not site:  # a bias of a wider type widens the sum
            bias = next(each for each in total.all_input_nodes if each is not site)
            narrow = torch.promote_types(narrow, self._tensors[str(bias.target)].dtype)
        narrow = cast_of(base) or narrow
        reshaped = base is not site and base is not biased(site)
        weight = Stored(product.weight, product.view)
        return _Joined(site, base, base, (), narrow, narrow, weight, reshaped).plus(delta)

    def _site_of(self, base: fx.Node) -> fx.Node | None:
        """Return the site with this output, with its bias or without, through a cast and reshapes that nothing else reads."""
        node = base
        if cast_of(node) is not None:
            node = node.all_input_nodes[0]
            if len(node.users) > 1:
                return None
        while keeps_last_dim(node):
            node = node.args[0]  # type: ignore[assignment]
            if len(node.users) > 1:
                return None
        if self._is_site(node):
            return node
        sites = (source for source in node.all_input_nodes if self._is_site(source) and biased(source) is node)
        return next(sites, None)

    def _is_site(self, node: fx.Node) -> bool:
        product = weight_op(node)
        return is_site(product) and node not in self._sums

    def _cast_back(self, node: fx.Node) -> _Joined | None:
        """Return the cast of a sum back to the dtype of its site, as part of the branch; None for other casts."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None
        joined = self._sums.get(source)
        if joined is None or joined.dtype == joined.narrow or cast_of(node) != joined.narrow:
            return None
        return replace(joined, previous=source, dtype=joined.narrow)

    def _check_branch(self, node: fx.Node, value: _Joined) -> None:
        if value.dtype != value.narrow:
            raise _unexpected(
                node, f"the sum has dtype {value.dtype} and must be cast back to {value.narrow}, that of its site"
            )
        names = [str(value.weight.node.target), *(name for term in value.terms for name in term.update.names)]
        writer = self._flow.writer_of(names)
        if writer is not None:
            raise _unexpected(writer, "it writes to a weight or a factor while the graph computes")
        if not value.is_weight:
            self._check_input(node, value)
        wanted = tuple(self._viewed_shape(str(value.weight.node.target), value.weight.view))
        shapes = [self._update_shape(term.update) for term in value.terms]
        misfit = next((shape for shape in shapes if shape != wanted), None)
        if misfit is not None:
            raise _unexpected(node, f"it adds an update of shape {misfit} to a weight of {wanted}")

    def _check_input(self, node: fx.Node, value: _Joined) -> None:
        """Refuse terms that do not read the input of their site, or read it in another way."""
        product = weight_op(value.site)
        assert product is not None
        weight = self._tensors[str(product.weight.target)]
        kernel = tuple(weight.shape[2:]) if product.op in CONVOLUTIONS else ()
        for term in value.terms:
            reached = self._flow.reaches(term.source, product.input)
            if reached is None:
                raise _unexpected(
                    node, f"it adds a branch that reads {term.source} to a site that reads {product.input}"
                )
            written = self._flow.written_between({value.site: product.input, term.product: term.source})
            if written is not None:
                raise _unexpected(written, f"it writes to what {value.site} and {term.product} read, between the two")
            if (term.op, term.geometry, term.kernel) != (product.op, product.geometry, kernel):
                raise _unexpected(
                    node,
                    f"it adds {_product_text(term.op, term.geometry, term.kernel)} to {_product_text(product.op, product.geometry, kernel)}",
                )
            apart = reached and not features_are_last(term.op, term.geometry)
            if apart or ((reached or value.reshaped) and not same_shapes(value.base, node)):
                raise _unexpected(node, f"it adds values of other positions to {value.base}, or of positions not known")

    def _update_shape(self, update: Update) -> tuple[int, ...]:
        """Return the shape of an update; an empty one if its factors do not fit together."""
        shapes = [self._viewed_shape(factor.name, factor.view) for factor in update.factors]
        first, last = shapes[0], shapes[-1]
        if any(shape[:-2] != first[:-2] for shape in shapes):
            return ()  # stacks of different sizes
        rows = last[-2] if update.places is None else self._tensors[update.places].numel()
        return (*first[:-2], rows, first[-1])

    def _viewed_shape(self, name: str, view: View) -> torch.Size:
        """Return the shape of a tensor in a view."""
        return view.apply(torch.empty(self._tensors[name].shape, device="meta")).shape


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))


def _product_text(op: Op | None, geometry: tuple[Any, ...], kernel: tuple[int, ...]) -> str:
    more = [f"kernel {kernel}"] * bool(kernel) + [f"{geometry}"] * bool(geometry)
    return f"{op} ({', '.join(more)})" if more else str(op)


def _unexpected(node: fx.Node, problem: str) -> FoldError:
    return FoldError(
        f"a branch cannot be folded: {problem}. The node is {node.format_node()}{source_line(node)}. "
        "Take this computation out of the branch, or keep the graph unfolded."
    )
