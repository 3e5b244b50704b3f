"""Finding branches in a graph: nominated by the names of their factors, validated by their algebra.

A value that depends on a factor must be linear in a site's input, with constant factors, until it is added to that site's
output. One walk in graph order keeps, for each node that depends on a factor, what it is:

    Delta     Σ scaling · x M₁ᵀ M₂ᵀ …          products with weights, scalings by numbers, casts, sums of deltas, and
                                              features put in their places among zeros
    Joined    site + Delta                      the sum with the output of a site, and sums with further deltas

Anything else that touches a ``Delta`` is an error that names the node. So nothing is ever folded in part, and nothing that
merely looks like a branch is taken for one: without a nominated factor there is no ``Delta``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from lora_fx.errors import FoldError
from lora_fx.factors import is_factor, is_places
from lora_fx.provenance import source_line
from lora_fx.sites import Operands, biased, operands

aten = torch.ops.aten


@dataclass(frozen=True)
class Term:
    """``scaling · source M₁ᵀ M₂ᵀ …``.

    Attributes:
        source: the node that the first product reads.
        factors: names of M₁, M₂, …, each of shape ``(out, in)``, in the order in which they are applied.
        scaling: product of the constants.
        places: name of the buffer that says which output feature takes which row of the product; None: each its own.
    """

    source: fx.Node
    factors: tuple[str, ...] = ()
    scaling: float = 1.0
    places: str | None = None


@dataclass(frozen=True)
class FoundBranch:
    """All branches beside one site.

    Attributes:
        site: the site's node.
        base: what the terms are added to: the site's node, or its sum with a bias.
        end: the node that the rest of the graph reads in place of ``base``.
        terms: what is added to the site's output.
    """

    site: fx.Node
    base: fx.Node
    end: fx.Node
    terms: tuple[Term, ...]


def find_branches(graph_module: fx.GraphModule) -> tuple[FoundBranch, ...]:
    """Return the branches of a graph, one record for each site that has any.

    Raises:
        FoldError: a nominated branch computes something that cannot be folded; the message names the node.
    """
    walk = _Walk(graph_module)
    for node in graph_module.graph.nodes:
        walk.step(node)
    return walk.found()


@dataclass(frozen=True)
class _Delta:
    """A value that is linear in the sources of its terms; ``padded`` if a zero stands behind its last feature."""

    terms: tuple[Term, ...]
    dtype: torch.dtype
    padded: bool = False


@dataclass(frozen=True)
class _Joined:
    """The output of a site plus deltas; ``previous`` is its ``base``, or the ``_Joined`` that this one extends."""

    site: fx.Node
    base: fx.Node
    previous: fx.Node
    terms: tuple[Term, ...]
    dtype: torch.dtype


class _Walk:
    """The walk through a graph, and what each node that depends on a factor was found to be."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._graph_module = graph_module
        self._factors: set[fx.Node] = set()
        self._values: dict[fx.Node, _Delta | _Joined] = {}
        self._next: dict[fx.Node, fx.Node] = {}

    def step(self, node: fx.Node) -> None:
        """Take the next node of the graph."""
        if node.op == "get_attr":
            if is_factor(str(node.target)):
                self._factors.add(node)
            return
        inputs = node.all_input_nodes
        if any(n in self._factors or isinstance(self._values.get(n), _Delta) for n in inputs):
            compute = _LINEAR.get(node.target)
            value = compute(self, *node.args) if compute is not None and not node.kwargs else None
            if value is None:
                raise _unexpected(
                    node, "a branch must be linear in its site's input until it is added to its site's output"
                )
            if not node.users:
                raise _unexpected(node, "nothing reads this part of a branch")
            self._values[node] = value
        elif node.target is aten.to.dtype and isinstance(joined := self._values.get(inputs[0]), _Joined):
            self._values.update(self._cast_back(node, joined))
        joined = self._values.get(node)
        if isinstance(joined, _Joined):
            self._next[joined.previous] = node

    def found(self) -> tuple[FoundBranch, ...]:
        """Return what was found; raise where a branch cannot be taken out without changing something else."""
        branches = []
        for node, value in self._values.items():
            if not isinstance(value, _Joined):
                continue
            stray = next((user for user in value.previous.users if user is not node), None)
            if stray is not None:
                raise _unexpected(
                    stray, f"it reads {value.previous}, the output of a site before all branches are added to it"
                )
            if node not in self._next:
                self._check(node, value)
                branches.append(FoundBranch(value.site, value.base, node, value.terms))
        return tuple(branches)

    def multiply(self, value: Any, weight: Any, bias: Any = None) -> _Delta | None:
        """``aten.linear``."""
        if not (isinstance(weight, fx.Node) and weight.op == "get_attr") or bias is not None:
            return None
        name = str(weight.target)
        terms = self._terms(value)
        if any(term.places is not None for term in terms) or self._is_padded(value):
            return None
        return _Delta(tuple(replace(term, factors=(*term.factors, name)) for term in terms), self._dtype(name))

    def scale(self, value: Any, number: Any) -> _Delta | None:
        """``aten.mul`` by a number."""
        delta = self._values.get(value)
        if not isinstance(delta, _Delta) or not isinstance(number, (int, float)):
            return None
        return replace(delta, terms=tuple(replace(term, scaling=term.scaling * number) for term in delta.terms))

    def pad(self, value: Any, widths: Any, number: Any = 0) -> _Delta | None:
        """``aten.constant_pad_nd``: a zero behind the features."""
        delta = self._values.get(value)
        if not isinstance(delta, _Delta) or delta.padded or any(term.places is not None for term in delta.terms):
            return None
        return replace(delta, padded=True) if list(widths) == [0, 1] and number == 0 else None

    def place(self, value: Any, dim: Any, places: Any) -> _Delta | None:
        """``aten.index_select`` of padded features: each output feature of the site takes its own, or the zero."""
        delta = self._values.get(value)
        if (
            not self._is_padded(value)
            or dim != -1
            or not isinstance(places, fx.Node)
            or not is_places(str(places.target))
        ):
            return None
        assert isinstance(delta, _Delta)
        terms = tuple(replace(term, places=str(places.target)) for term in delta.terms)
        return _Delta(terms, delta.dtype)

    def cast(self, value: Any, dtype: torch.dtype) -> _Delta | None:
        """``aten.to.dtype``."""
        delta = self._values.get(value)
        return replace(delta, dtype=dtype) if isinstance(delta, _Delta) and dtype.is_floating_point else None

    def add(self, left: Any, right: Any) -> _Delta | _Joined | None:
        """``aten.add`` of two deltas, or of a delta and the output of a site."""
        if self._is_padded(left) or self._is_padded(right):
            return None
        mine, theirs = self._values.get(left), self._values.get(right)
        if isinstance(mine, _Delta) and isinstance(theirs, _Delta):
            return _Delta(mine.terms + theirs.terms, torch.promote_types(mine.dtype, theirs.dtype))
        base, joined, delta = (right, theirs, mine) if isinstance(mine, _Delta) else (left, mine, theirs)
        assert isinstance(delta, _Delta)
        if isinstance(joined, _Joined):
            dtype = torch.promote_types(joined.dtype, delta.dtype)
            return replace(joined, previous=base, terms=joined.terms + delta.terms, dtype=dtype)
        site = _site_of(base)
        if site is None:
            return None
        return _Joined(site, base, base, delta.terms, torch.promote_types(self._site_dtype(site), delta.dtype))

    def _is_padded(self, value: Any) -> bool:
        delta = self._values.get(value)
        return isinstance(delta, _Delta) and delta.padded

    def _terms(self, value: Any) -> tuple[Term, ...]:
        delta = self._values.get(value)
        return delta.terms if isinstance(delta, _Delta) else (Term(value),)

    def _cast_back(self, node: fx.Node, joined: _Joined) -> dict[fx.Node, _Delta | _Joined]:
        """Take a cast for part of a branch if the sum has another dtype than its site alone has."""
        narrow = self._site_dtype(joined.site)
        ours = joined.dtype != narrow and node.args[1:] == (narrow,)
        return {node: replace(joined, previous=node.args[0], dtype=narrow)} if ours else {}  # type: ignore[arg-type]

    def _check(self, node: fx.Node, value: _Joined) -> None:
        parts = operands(value.site)
        assert parts is not None
        for term in value.terms:
            if not self._reaches(term.source, parts.input):
                raise _unexpected(node, f"it adds a branch that reads {term.source} to a site that reads {parts.input}")
        narrow = self._dtype_of(parts)
        if value.dtype != narrow:
            raise _unexpected(
                node, f"the sum has dtype {value.dtype} and must be cast back to {narrow}, that of its site"
            )

    def _reaches(self, source: fx.Node, wanted: fx.Node) -> bool:
        """Tell whether a source is the wanted node, seen through dropout (the identity once folded) and casts."""
        while source is not wanted:
            if not (source.target in (aten.to.dtype, aten.dropout.default) or self._is_dropout(source)):
                return False
            source = source.all_input_nodes[0]
        return True

    def _is_dropout(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self._graph_module.get_submodule(str(node.target)), nn.Dropout)

    def _site_dtype(self, site: fx.Node) -> torch.dtype:
        parts = operands(site)
        assert parts is not None
        return self._dtype_of(parts)

    def _dtype_of(self, parts: Operands) -> torch.dtype:
        return self._dtype(str(parts.weight.target))

    def _dtype(self, name: str) -> torch.dtype:
        return self._graph_module.get_parameter(name).dtype


_LINEAR: Mapping[object, Callable[..., _Delta | _Joined | None]] = {
    aten.linear.default: _Walk.multiply,
    aten.mul.Tensor: _Walk.scale,
    aten.to.dtype: _Walk.cast,
    aten.constant_pad_nd.default: _Walk.pad,
    aten.index_select.default: _Walk.place,
    aten.add.Tensor: _Walk.add,
}
"""Operator → what it makes of a ``_Delta``; ``None`` where it is not linear with these arguments."""


def _site_of(base: Any) -> fx.Node | None:
    """Return the site whose output this is, with its bias or without."""
    if not isinstance(base, fx.Node) or operands(base) is not None:
        return base if isinstance(base, fx.Node) else None
    return next((node for node in base.all_input_nodes if operands(node) is not None and biased(node) is base), None)


def _unexpected(node: fx.Node, problem: str) -> FoldError:
    return FoldError(
        f"a branch cannot be folded: {problem}. The node is {node.format_node()}{source_line(node)}. "
        "Take this computation out of the branch, or keep the graph unfolded."
    )
