"""Finding branches in a graph: nominated by the names of their factors, validated by their algebra.

A value that depends on a factor must be linear in a site's input, with constant factors, until it is added to that site's
output. One walk in graph order keeps, for each node that depends on a factor, what it is:

    stored    a factor itself, seen through transposes, reshapes and casts
    Delta     Σ scaling · … M₂ M₁ x            products with weights, scalings by constants, casts, sums of deltas, and
                                              features put in their places among zeros
    Joined    site + Delta                      the sum with the output of a site, and sums with further deltas

A product of factors alone is a delta too, of a weight: it may be added to that weight itself, as PEFT does for stacked experts.

Anything else that touches one of the first two is an error that names the node. So nothing is ever folded in part, and
nothing that merely looks like a branch is taken for one: without a nominated factor there is no ``Delta``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import fx, nn

from lora_fx.errors import FoldError
from lora_fx.factors import is_factor, is_places
from lora_fx.graph_module import state_of
from lora_fx.lowrank import Factor, Update
from lora_fx.products import Operands, is_pointwise, operands
from lora_fx.provenance import source_line
from lora_fx.sites import biased, is_site
from lora_fx.views import SWAP, Stored, View, cast_of, shows, stored
from lora_fx.vocabulary import Op

aten = torch.ops.aten

Nominate = Callable[[str], bool]
"""Tells by the name of a parameter whether it is a factor of a branch."""


@dataclass(frozen=True)
class Term:
    """One update, and the input that it is applied to.

    Attributes:
        source: the node that the first product reads.
        op: what kind of product that is; None if it is one of factors alone, without any input.
        geometry: which features of the source belong together, as the first product says.
        kernel: that of the first product, if it is a convolution.
        update: the factors and the scaling.
    """

    source: fx.Node
    op: Op | None
    geometry: tuple[Any, ...]
    kernel: tuple[int, ...]
    update: Update


@dataclass(frozen=True)
class FoundBranch:
    """All branches beside one site.

    Attributes:
        site: the site's node; where terms are added to the weight itself, the node that does that.
        base: what the terms are added to: the site's node, its sum with a bias, or a reshape of either; or the weight.
        end: the node that the rest of the graph reads in place of ``base``.
        terms: what is added.
        weight: the ``get_attr`` of the weight.
        view: of the weight, in which the updates are.
    """

    site: fx.Node
    base: fx.Node
    end: fx.Node
    terms: tuple[Term, ...]
    weight: fx.Node
    view: View

    @property
    def updates(self) -> tuple[Update, ...]:
        """What is added to the site's weight."""
        return tuple(term.update for term in self.terms)


def find_branches(graph_module: fx.GraphModule, nominate: Nominate = is_factor) -> tuple[FoundBranch, ...]:
    """Return the branches of a graph, one record for each site that has any.

    Args:
        graph_module: of ATen operators.
        nominate: tells the factors of branches by their names.

    Raises:
        FoldError: a nominated branch computes something that cannot be folded; the message names the node.
    """
    walk = _Walk(graph_module, nominate)
    for node in graph_module.graph.nodes:
        walk.step(node)
    return walk.found()


@dataclass(frozen=True)
class _Delta:
    """A value that is linear in the sources of its terms.

    ``padded`` if a zero stands behind its last feature, ``reshaped`` if its positions are no longer laid out as those of a source.
    """

    terms: tuple[Term, ...]
    dtype: torch.dtype
    padded: bool = False
    reshaped: bool = False

    @property
    def is_weight(self) -> bool:
        return self.terms[0].op is None

    @property
    def is_placed(self) -> bool:
        return self.padded or any(term.update.places is not None for term in self.terms)

    def updated(self, change: Callable[[Update], Update]) -> _Delta:
        return replace(self, terms=tuple(replace(term, update=change(term.update)) for term in self.terms))

    def scaled(self, number: float) -> _Delta:
        return self.updated(lambda update: replace(update, scaling=update.scaling * number))


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


class _Walk:
    """The walk through a graph, and what each node that depends on a factor was found to be."""

    def __init__(self, graph_module: fx.GraphModule, nominate: Nominate) -> None:
        self._graph_module = graph_module
        self._tensors = state_of(graph_module).tensors
        self._nominate = nominate
        self._holders = {prefix for name in self._tensors if nominate(name) for prefix in _prefixes(name)}
        self._factors: set[fx.Node] = set()
        self._values: dict[fx.Node, _Delta | _Joined] = {}
        self._next: dict[fx.Node, fx.Node] = {}

    def step(self, node: fx.Node) -> None:
        """Take the next node of the graph."""
        if node.op == "get_attr":
            if self._nominate(str(node.target)):
                self._factors.add(node)
            return
        inputs = node.all_input_nodes
        if shows(node) and inputs[0] in self._factors:
            self._factors.add(node)
        elif any(n in self._factors or isinstance(self._values.get(n), _Delta) for n in inputs):
            value = self._value(node)
            if value is None:
                raise _unexpected(
                    node, "a branch must be linear in its site's input until it is added to its site's output"
                )
            if not node.users:
                raise _unexpected(node, "nothing reads this part of a branch")
            self._values[node] = value
        elif node.op == "call_module":
            self._check_module(node)
        elif inputs and isinstance(joined := self._values.get(inputs[0]), _Joined):
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
                stored, branch = value.weight, (value.site, value.base, node, value.terms)
                branches.append(FoundBranch(*branch, stored.node, stored.view))
        return tuple(branches)

    # What an operator makes of a delta: None where it is not linear in it, or not known to be.

    def _value(self, node: fx.Node) -> _Delta | _Joined | None:
        parts = operands(node)
        if parts is not None:
            return self._product(node, parts)
        compute = _LINEAR.get(node.target)
        if compute is None or node.kwargs.keys() - {"alpha"} or not self._has_number(node):
            return self._same_features(node)
        return compute(self, node)

    def _has_number(self, node: fx.Node) -> bool:
        return isinstance(node.kwargs.get("alpha", 1), int | float)

    def _product(self, node: fx.Node, parts: Operands) -> _Delta | _Joined | None:
        """A product with a weight, to which an ``addmm`` adds something."""
        name = str(parts.weight.target)
        tensor = self._tensors[name]
        if not tensor.is_floating_point():
            return None
        delta, factor = self._values.get(parts.input), Factor(name, parts.view)
        dtype = parts.dtype or tensor.dtype
        if isinstance(delta, _Delta):
            if delta.is_placed or not all(_continues(term, parts, tensor.shape) for term in delta.terms):
                return None
            made = delta.updated(lambda update: replace(update, factors=(*update.factors, factor)))
            made = replace(made, dtype=dtype)
        elif self._is_factor(parts.weight) and parts.input in self._factors:
            made = self._weight_delta(parts)
        elif self._is_factor(parts.weight):
            kernel = tuple(tensor.shape[2:]) if parts.op.startswith("conv") else ()
            made = _Delta((Term(parts.input, parts.op, parts.geometry, kernel, Update((factor,))),), dtype)
        else:
            return None  # it is the addend that depends on a factor, or the choice of an expert
        made = made if parts.alpha == 1 else made.scaled(parts.alpha)
        return made if parts.addend is None else self._sum(node, parts.addend, made)

    def _weight_delta(self, parts: Operands) -> _Delta:
        """A product of two factors: the right one is applied first."""
        left, right = stored(parts.input), Factor(str(parts.weight.target), parts.view.then(SWAP))
        assert left is not None
        dtype = left.dtype or self._tensors[str(left.node.target)].dtype
        update = Update((right, Factor(str(left.node.target), left.view)))
        return _Delta((Term(parts.input, None, (), (), update),), dtype)

    def _is_factor(self, weight: fx.Node) -> bool:
        return weight in self._factors

    def _scale(self, node: fx.Node) -> _Delta | None:
        """A product with a number, or with a constant of one element; a quotient by a number."""
        left, right = node.args[:2]
        delta, other = (left, right) if isinstance(self._values.get(left), _Delta) else (right, left)  # type: ignore[arg-type]
        value = self._values.get(delta)  # type: ignore[arg-type]
        if not isinstance(value, _Delta):
            return None
        if isinstance(other, bool) or not isinstance(other, int | float):
            scale = self._constant(other, value.dtype)
            divides = node.target not in (aten.mul.Tensor, aten.mul.Scalar)
            if scale is None or divides:
                return None
            name, dtype = scale
            return replace(value.updated(lambda update: replace(update, scales=(*update.scales, name))), dtype=dtype)
        if node.target in (aten.div.Tensor, aten.div.Scalar):
            return value.scaled(1 / other) if delta is left and other != 0 else None
        return value.scaled(other)

    def _constant(self, value: Any, dtype: torch.dtype) -> tuple[str, torch.dtype] | None:
        """Return the name of a tensor with one element and at most one dimension, and the dtype of a product with it."""
        found = stored(value)
        if found is None:
            return None
        tensor = self._tensors[str(found.node.target)]
        if tensor.numel() != 1 or found.dims not in (0, 1) or not tensor.is_floating_point():
            return None
        other = found.dtype or tensor.dtype
        return str(found.node.target), torch.promote_types(dtype, other) if found.dims == 1 else dtype

    def _negate(self, node: fx.Node) -> _Delta | None:
        value = self._values.get(node.args[0])  # type: ignore[arg-type]
        return value.scaled(-1) if isinstance(value, _Delta) else None

    def _pad(self, node: fx.Node) -> _Delta | None:
        """A zero behind the features."""
        value, widths, *number = node.args
        delta = self._values.get(value)  # type: ignore[arg-type]
        if not isinstance(delta, _Delta) or delta.is_placed or number not in ([], [0], [0.0]):
            return None
        return replace(delta, padded=True) if list(widths) == [0, 1] and _by_last(delta) else None  # type: ignore[arg-type]

    def _place(self, node: fx.Node) -> _Delta | None:
        """Padded features: each output feature of the site takes its own, or the zero."""
        value, dim, places = node.args
        delta = self._values.get(value)  # type: ignore[arg-type]
        named = isinstance(places, fx.Node) and places.op == "get_attr" and is_places(str(places.target))
        if not isinstance(delta, _Delta) or not delta.padded or dim != -1 or not named:
            return None
        return replace(delta, padded=False).updated(lambda update: replace(update, places=str(places.target)))  # type: ignore[union-attr]

    def _add(self, node: fx.Node) -> _Delta | _Joined | None:
        """``left + alpha · right``, or ``left - alpha · right``; in place only where nothing else reads ``left``."""
        left, right = node.args[:2]
        in_place = node.target in (aten.add_.Tensor, aten.sub_.Tensor)
        if in_place and (not isinstance(left, fx.Node) or len(left.users) > 1):
            return None
        alpha = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
        alpha = -alpha if node.target in (aten.sub.Tensor, aten.sub_.Tensor) else alpha
        mine, theirs = self._values.get(left), self._values.get(right)  # type: ignore[arg-type]
        if isinstance(theirs, _Delta):
            return self._sum(node, left, theirs if alpha == 1 else theirs.scaled(alpha))
        return self._sum(node, right, mine) if isinstance(mine, _Delta) and alpha == 1 else None

    def _sum(self, node: fx.Node, base: Any, delta: _Delta) -> _Delta | _Joined | None:
        """A delta plus another one, or plus the output of a site, or plus a weight."""
        other = self._values.get(base)
        if delta.padded or not isinstance(base, fx.Node):
            return None
        if isinstance(other, _Delta):
            return None if other.padded or other.is_weight != delta.is_weight else _together(other, delta)
        if isinstance(other, _Joined):
            if delta.is_weight != (other.base is other.weight.node):
                return None
            return replace(_together(other, delta), previous=base)
        if delta.is_weight:
            return self._summed_weight(node, base, delta)
        site = self._site_of(base)
        if site is None:
            return None
        parts = operands(site)
        assert parts is not None
        narrow, weight = self._site_dtype(site), Stored(parts.weight, parts.view)
        reshaped = base is not site and base is not biased(site)
        return _together(_Joined(site, base, base, (), narrow, narrow, weight, reshaped), delta)

    def _summed_weight(self, node: fx.Node, base: fx.Node, delta: _Delta) -> _Joined | None:
        """A weight as it is stored, plus products of factors of its shape."""
        if base.op != "get_attr" or base in self._factors:
            return None
        tensor = self._tensors[str(base.target)]
        if any(self._shape(term.update) != tensor.shape for term in delta.terms):
            return None
        return _together(_Joined(node, base, base, (), tensor.dtype, tensor.dtype, Stored(base)), delta)

    def _shape(self, update: Update) -> torch.Size:
        """Return the shape of a product of two factors."""
        right, left = (factor.view.apply(self._tensors[factor.name]) for factor in update.factors)
        return torch.Size([*left.shape[:-1], right.shape[-1]])

    def _same_features(self, node: fx.Node) -> _Delta | None:
        """A cast, or a reshape that keeps the features together."""
        value = self._values.get(node.args[0]) if node.args else None  # type: ignore[arg-type]
        if not isinstance(value, _Delta):
            return None
        dtype = cast_of(node)
        if dtype is not None:
            return replace(value, dtype=dtype)
        if node.target in _COPIES and len(node.all_input_nodes) == 1:
            return value
        return replace(value, reshaped=True) if _by_last(value) and _keeps_last(node) else None

    # Where a delta may join.

    def _site_of(self, base: fx.Node) -> fx.Node | None:
        """Return the site whose output this is, with its bias or without, through reshapes that nothing else reads."""
        node = base
        while _keeps_last(node):
            node = node.args[0]  # type: ignore[assignment]
            if len(node.users) > 1:
                return None
        if self._is_site(node):
            return node
        sites = (source for source in node.all_input_nodes if self._is_site(source) and biased(source) is node)
        return next(sites, None)

    def _is_site(self, node: fx.Node) -> bool:
        parts = operands(node)
        return is_site(parts) and node not in self._values and parts.weight not in self._factors

    def _cast_back(self, node: fx.Node, joined: _Joined) -> dict[fx.Node, _Delta | _Joined]:
        """Take a cast for part of a branch if the sum has another dtype than its site alone has."""
        ours = joined.dtype != joined.narrow and cast_of(node) == joined.narrow
        return {node: replace(joined, previous=node.args[0], dtype=joined.narrow)} if ours else {}  # type: ignore[arg-type]

    def _check(self, node: fx.Node, value: _Joined) -> None:
        if value.dtype != value.narrow:
            raise _unexpected(
                node, f"the sum has dtype {value.dtype} and must be cast back to {value.narrow}, that of its site"
            )
        parts = operands(value.site)
        if value.base is value.weight.node or parts is None:
            return
        weight = self._tensors[str(parts.weight.target)]
        kernel = tuple(weight.shape[2:]) if parts.op.startswith("conv") else ()
        for term in value.terms:
            reached = self._reaches(term.source, parts.input)
            if reached is None:
                raise _unexpected(node, f"it adds a branch that reads {term.source} to a site that reads {parts.input}")
            if (term.op, term.geometry, term.kernel) != (parts.op, parts.geometry, kernel):
                raise _unexpected(
                    node,
                    f"it adds {_told(term.op, term.geometry, term.kernel)} to {_told(parts.op, parts.geometry, kernel)}",
                )
            if (reached or value.reshaped) and not _same_shapes(value.base, node):
                raise _unexpected(node, f"it adds values of other positions to {value.base}, or of positions not known")

    def _reaches(self, source: fx.Node, wanted: fx.Node) -> bool | None:
        """Tell whether two nodes have the same values once folded, and whether a reshape lies between; None if they differ."""
        mine, theirs = (dict(self._identities(node)) for node in (source, wanted))
        met = next((node for node in mine if node in theirs), None)
        return None if met is None else mine[met] or theirs[met]

    def _identities(self, node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
        """Yield a node and what it is a copy of, once folded: through dropout, casts, and reshapes, which it says."""
        reshaped = False
        while True:
            yield node, reshaped
            if not self._is_identity(node) and not _keeps_last(node):
                return
            reshaped = reshaped or _keeps_last(node)
            node = node.all_input_nodes[0]

    def _is_identity(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._graph_module.get_submodule(str(node.target)), nn.modules.dropout._DropoutNd)
        if node.target is aten.dropout.default:
            return not node.args[2] or all(self._is_factor_product(user) for user in node.users)
        return cast_of(node) is not None or node.target in _COPIES

    def _is_factor_product(self, node: fx.Node) -> bool:
        parts = operands(node)
        return parts is not None and parts.weight in self._factors

    def _check_module(self, node: fx.Node) -> None:
        """Refuse a module that holds a factor itself: what it computes with it is not seen."""
        if str(node.target) in self._holders:
            raise _unexpected(node, f"the module {str(node.target)!r} holds a factor, and is not made of operators")

    def _site_dtype(self, site: fx.Node) -> torch.dtype:
        parts = operands(site)
        assert parts is not None
        return parts.dtype or self._tensors[str(parts.weight.target)].dtype


_LINEAR: Mapping[object, Callable[[_Walk, fx.Node], _Delta | _Joined | None]] = {
    aten.mul.Tensor: _Walk._scale,
    aten.mul.Scalar: _Walk._scale,
    aten.div.Tensor: _Walk._scale,
    aten.div.Scalar: _Walk._scale,
    aten.neg.default: _Walk._negate,
    aten.constant_pad_nd.default: _Walk._pad,
    aten.index_select.default: _Walk._place,
    aten.add.Tensor: _Walk._add,
    aten.add_.Tensor: _Walk._add,
    aten.sub.Tensor: _Walk._add,
    aten.sub_.Tensor: _Walk._add,
}
"""Operator → what it makes of a ``_Delta``."""

_COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)
_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.flatten.using_ints,
)


_Sum = TypeVar("_Sum", _Delta, _Joined)


def _together(value: _Sum, delta: _Delta) -> _Sum:
    """Return a value with the terms of a delta added."""
    dtype = torch.promote_types(value.dtype, delta.dtype)
    return replace(value, terms=value.terms + delta.terms, dtype=dtype, reshaped=value.reshaped or delta.reshaped)


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))


def _continues(term: Term, parts: Operands, shape: torch.Size) -> bool:
    """Tell whether a product goes on where a term is: it acts on each position by itself, as the term's own products do."""
    if term.op is None:
        return False
    if term.op == "embedding":
        return parts.op == "linear"
    if term.op.startswith("conv"):
        return parts.op == term.op and parts.groups == term.geometry[-1] and is_pointwise(parts, shape)
    return (term.op, term.geometry) == (parts.op, parts.geometry)


def _by_last(delta: _Delta) -> bool:
    """Tell whether the features of a delta are its last dimension, and all others are positions."""
    return all(term.op in ("linear", "embedding") or term.geometry[:1] == ("grouped",) for term in delta.terms)


def _keeps_last(node: fx.Node) -> bool:
    """Tell whether a node is a reshape that leaves the last dimension alone: positions keep their order in memory."""
    if node.target not in _RESHAPES or not isinstance(node.args[0], fx.Node):
        return False
    before, after = (each.meta.get("val") for each in (node.args[0], node))
    if (
        not isinstance(before, torch.Tensor)
        or not isinstance(after, torch.Tensor)
        or not (before.dim() and after.dim())
    ):
        return False
    last = before.shape[-1], after.shape[-1]
    return all(type(size) is int for size in last) and last[0] == last[1]


def _same_shapes(left: fx.Node, right: fx.Node) -> bool:
    """Tell whether two values have the same shape in the trace, and whatever sizes it is run with."""
    mine, theirs = (node.meta.get("val") for node in (left, right))
    if not isinstance(mine, torch.Tensor) or not isinstance(theirs, torch.Tensor) or mine.dim() != theirs.dim():
        return False
    return [str(size) for size in mine.shape] == [str(size) for size in theirs.shape]


def _told(op: Op | None, geometry: tuple[Any, ...], kernel: tuple[int, ...]) -> str:
    more = [f"kernel {kernel}"] * bool(kernel) + [f"{geometry}"] * bool(geometry)
    return f"{op} ({', '.join(more)})" if more else str(op)


def _unexpected(node: fx.Node, problem: str) -> FoldError:
    return FoldError(
        f"a branch cannot be folded: {problem}. The node is {node.format_node()}{source_line(node)}. "
        "Take this computation out of the branch, or keep the graph unfolded."
    )
