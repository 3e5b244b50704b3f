"""Recognition of branches in a graph: nominated by the names of their factors, validated by their algebra.

Two domains in one walk. A value that depends on tensors of the graph alone is constant, and may be a factor as it is computed
(:mod:`lora_fx.branches.constants`). Any other value that depends on a factor must be affine in a site's input (a ``Delta``), until it
is added to that site's output, or is that output, scaled. The walk in graph order records these:

    Joined    site + Delta                      the sum with the output of a site, and sums with further deltas
              Delta with the site's output      what takes the place of that output (IA³)
              weight + Delta                    a product of factors alone may be added to a weight itself, as PEFT does for
                                              stacked experts

Anything else that touches a factor or a delta is an error that names the node. So nothing is ever folded in part, and
nothing that merely looks like a branch is taken for one: without a nominated factor there is no delta.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from lora_fx.branches.affine import Deltas, features_are_last
from lora_fx.branches.constants import NamedConstants, name_constants
from lora_fx.branches.dataflow import Flow, keeps_last_dim, same_shapes
from lora_fx.branches.delta import Addition, Delta, SiteOutput, Term, summed
from lora_fx.branches.found import FoundBias, FoundBranch, unexpected, unread_nodes
from lora_fx.branches.selected import unselected
from lora_fx.errors import FoldError
from lora_fx.graph.adapter_names import is_of_branch
from lora_fx.graph.graph_module import state_of
from lora_fx.graph.training_only import TrainingOnly
from lora_fx.numerics.update import Factor, Update
from lora_fx.numerics.weight_view import View
from lora_fx.rules.peft_config.name_matching import modules_of
from lora_fx.rules.vocabulary import Op
from lora_fx.sites.call_sites import is_site
from lora_fx.sites.stored_weight import Stored, cast_of, stored
from lora_fx.sites.weight_ops import CONVOLUTIONS, readers, weight_op

Nominate = Callable[[str], bool]
"""Tells by the name of a parameter whether it is a factor of a branch."""


def find_branches(graph_module: fx.GraphModule, nominate: Nominate = is_of_branch) -> tuple[FoundBranch, ...]:
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
    for node in walk.graph.nodes:
        walk.step(node)
    return walk.found()


@dataclass(frozen=True)
class _Joined:
    """The output of a site, or a weight, plus deltas.

    ``previous`` is its ``base``, or the node of the ``_Joined`` that this one extends; ``narrow`` is the dtype of the base; ``nodes``
    are those on the way from the site to the base that a factor scales.
    """

    site: fx.Node
    base: fx.Node
    previous: fx.Node
    terms: tuple[Term, ...]
    dtype: torch.dtype
    narrow: torch.dtype
    weight: Stored
    reshaped: bool = False
    offsets: tuple[Update, ...] = ()
    nodes: tuple[fx.Node, ...] = ()

    @property
    def is_weight(self) -> bool:
        return self.base is self.weight.node

    def plus(self, addition: Addition) -> _Joined:
        delta = addition.delta
        return replace(
            self,
            terms=self.terms + delta.terms,
            dtype=addition.dtype(self.dtype),
            reshaped=self.reshaped or delta.reshaped,
            offsets=summed((*self.offsets, *delta.offsets)),
        )

    def takes(self, delta: Delta) -> bool:
        return self.is_weight == delta.is_weight and (delta.output is None or delta.output.site is self.site)


class _BranchFinder:
    """One walk through a graph, and the sums found on it.

    Attributes:
        has_factors: whether the graph reads any factor of a branch; those of an adapter that does not act are read by no node.
        graph: whose nodes are to be taken in turn.
    """

    def __init__(self, graph_module: fx.GraphModule, nominate: Nominate) -> None:
        tensors = state_of(graph_module).tensors
        self._nominate = nominate
        factors = [name for name in tensors if nominate(name)]
        read = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
        loose = sorted({repr(name) for name in read if nominate(name) and name not in tensors})
        if loose:
            raise FoldError(
                f"{', '.join(loose)}: read as a factor, and neither a parameter nor a buffer of the graph. Register it: register_buffer."
            )
        self._holders = {prefix for name in factors for prefix in modules_of(name)}
        called = {str(node.target) for node in graph_module.graph.find_nodes(op="call_module")}
        self.has_factors = any(name in read for name in factors) or not called.isdisjoint(self._holders)
        plain = unselected(graph_module.graph) if self.has_factors else None
        self._named, self._partial = NamedConstants(graph_module.graph, {}, tensors, {}, {}), set[fx.Node]()
        if plain is not None:
            named = name_constants(plain.graph, tensors, nominate)
            originals = {copy: plain.originals[node] for copy, node in named.originals.items()}
            self._partial = {copy for copy, node in named.originals.items() if node in plain.partial}
            self._named = replace(named, originals=originals)
        self._modules, self._tensors, self.graph = graph_module, self._named.tensors, self._named.graph
        self._deltas = Deltas(self._tensors, self._named.computed, self._named.weights, self._passed)
        self._flow = Flow(graph_module, self._deltas.is_product, self.graph)
        self._sums: dict[fx.Node, _Joined] = {}
        self._extended: set[fx.Node] = set()

    def step(self, node: fx.Node) -> None:
        """Take the next node of the graph."""
        if node.op == "get_attr":
            if node not in self._named.weights and (
                self._nominate(str(node.target)) or node.target in self._named.computed
            ):
                self._deltas.add_factor(node)
            return
        self._flow.note(node)
        if self._deltas.touches(node):
            joined = self._step(node)
        elif node.op == "call_module" and str(node.target) in self._holders:
            raise self._error(node, f"the module {str(node.target)!r} holds a factor, and is not made of operators")
        else:
            joined = self._cast_back(node)
        if joined is not None:
            self._record(node, joined)

    def found(self) -> tuple[FoundBranch, ...]:
        """Return the branches found; raise if one cannot be taken out without changing something else."""
        branches: dict[fx.Node, FoundBranch] = {}
        ends = self._sums.keys() - self._extended
        dead = unread_nodes(self.graph, ends, {value.base for value in self._sums.values()})
        partial = {self._sums[each].site for each in self._partial if each in self._sums}
        for node, value in self._sums.items():
            self._check_readers(node, value, dead)
            if node in ends:
                self._check_branch(node, value)
                site, weight, bias = value.site, value.weight, self._bias(node, value)
                branches[site] = FoundBranch(
                    site, value.base, node, value.terms, weight.node, weight.view, bias, partial=site in partial
                )
        for named, constant in self._named.weights.items():
            for site, _ in readers(named):
                product = weight_op(site)
                assert product is not None
                factors = Factor(constant.digest, product.view, constant), Factor(str(named.target), product.view)
                updates = Update((factors[0],)), Update((factors[1],), -1.0)
                terms = tuple(Term(product.input, product.op, product.geometry, (), site, update) for update in updates)
                found = branches.get(site) or FoundBranch(site, site, site, (), named, product.view)
                branches[site] = replace(found, terms=(*found.terms, *terms), computed=named)
        by_name = {str(node.target): node for node in self._named.originals.values() if node.op == "get_attr"}
        return tuple(self._original(each, by_name) for each in branches.values())

    def _original(self, found: FoundBranch, by_name: Mapping[str, fx.Node]) -> FoundBranch:
        """Return a branch with the nodes of the graph that was given, of which those that read tensors are known by their names."""
        of = self._named.originals
        if not of:
            return found
        terms = tuple(replace(each, source=of[each.source], product=of[each.product]) for each in found.terms)
        bias = found.bias
        bias = (
            None if bias is None else replace(bias, node=of[bias.node] if bias.node else None, reader=of[bias.reader])
        )
        weight, computed = by_name[str(found.weight.target)], found.computed
        return FoundBranch(
            of[found.site], of[found.base], of[found.end], terms, weight, found.view, bias,
            None if computed is None else of[computed], found.partial,
        )  # fmt: skip

    def _step(self, node: fx.Node) -> _Joined | None:
        """Return the sum that a node makes of a delta; None where it is a delta itself."""
        value = self._deltas.step(node)
        joined = self._join(node, value) if isinstance(value, Addition) else None
        if joined is None and not isinstance(value, Delta):
            outputs = self._deltas.unfinished_outputs(node)
            if not outputs:
                raise self._error(
                    node, "a branch must be linear in its site's input until it is added to its site's output"
                )
            for source in outputs:
                last, delta = self._deltas.last_change(source)
                self._record(last, self._in_place_of_output(delta))
            return self._step(node) if self._deltas.touches(node) else self._cast_back(node)
        if not node.users:
            raise self._error(node, "nothing reads this part of a branch")
        return joined

    def _record(self, node: fx.Node, joined: _Joined) -> None:
        self._sums[node] = joined
        self._extended.add(joined.previous)
        output = None if joined.is_weight else self._deltas.output_of(joined.base)
        if output is not None and output.output is not None:
            whole = Delta(joined.terms, joined.dtype, reshaped=joined.reshaped, offsets=joined.offsets)
            nodes = SiteOutput(joined.site, (*output.output.nodes, node), joined.dtype)
            self._deltas.finish(node, replace(output.plus(whole), output=nodes))

    def _in_place_of_output(self, delta: Delta) -> _Joined:
        """Return what takes the place of the output of a site as a sum with that: less one product with the site's own weight."""
        assert delta.output is not None
        output, product = delta.output, weight_op(delta.output.site)
        own = self._deltas.output_of(output.base)
        assert own is not None
        assert product is not None
        reshaped = output.base not in (output.site, self._deltas.total(output.site))
        weight = Stored(product.weight, product.view)
        base = _Joined(output.site, output.base, output.base, (), output.dtype, output.dtype, weight, reshaped)
        whole = summed(tuple(term.update for term in (*delta.terms, *own.scaled(-1).terms)))
        terms = {replace(term.update, scaling=1.0): term for term in (*own.terms, *delta.terms)}
        found = tuple(replace(terms[replace(update, scaling=1.0)], update=update) for update in whole)
        return replace(
            base,
            terms=found,
            dtype=delta.dtype,
            offsets=summed((*delta.offsets, *own.scaled(-1).offsets)),
            nodes=output.nodes,
        )

    def _error(self, node: fx.Node, problem: str) -> FoldError:
        return unexpected(self._named.originals.get(node, node), problem)

    def _passed(self, node: fx.Node) -> fx.Node | None:
        """Return the input that a node returns in evaluation."""
        if node.op != "call_module" or not isinstance(self._modules.get_submodule(str(node.target)), TrainingOnly):
            return None
        return node.args[0] if isinstance(node.args[0], fx.Node) else None

    def _check_readers(self, node: fx.Node, value: _Joined, dead: set[fx.Node]) -> None:
        """Refuse readers of a site's output that are not part of its branches."""
        if value.is_weight and value.previous is value.base:  # a weight may have other uses
            return
        for read in {value.previous, *value.nodes}:
            inner = {node, *value.nodes, *(dead - self._sums.keys())}
            stray = next((user for user in read.users if user not in inner), None)
            if stray is not None:
                raise self._error(stray, f"it reads {read}, the output of a site before all branches are added to it")

    def _bias(self, node: fx.Node, value: _Joined) -> FoundBias | None:
        """Return what is added to the bias of a site."""
        if not value.offsets:
            return None
        product, total = weight_op(value.site), self._deltas.total(value.site)
        assert product is not None
        reader, addend = (value.site, product.addend) if product.addend is not None else (total, None)
        if total is not None and addend is None:
            addend = next(each for each in total.all_input_nodes if each is not value.site)
        held = stored(addend)
        if held is None or reader is None:
            return FoundBias(None, node, value.offsets)
        wanted = self._tensors[str(held.node.target)].numel()
        misfit = next((update for update in value.offsets if self._update_shape(update) != (wanted, 1)), None)
        if misfit is not None:
            raise self._error(
                node, f"it adds a constant of shape {self._update_shape(misfit)} to a bias of {wanted} elements"
            )
        return FoundBias(held.node, reader, value.offsets)

    def _join(self, node: fx.Node, addition: Addition) -> _Joined | None:
        """Return the sum of a delta with the output of a site, with a weight, or with such a sum; None for other values."""
        base, delta = addition.base, addition.delta
        joined = self._sums.get(base)
        if joined is not None:
            return replace(joined.plus(addition), previous=base) if joined.takes(delta) else None
        if delta.is_weight:
            if base.op != "get_attr" or self._deltas.is_factor(base):
                return None
            narrow = self._tensors[str(base.target)].dtype
            return _Joined(node, base, base, (), narrow, narrow, Stored(base)).plus(addition)
        site = self._site_of(base)
        if site is None:
            return None
        product = weight_op(site)
        assert product is not None
        narrow = product.dtype or self._tensors[str(product.weight.target)].dtype
        total = self._deltas.total(site)
        if total is not None and base is not site:  # a bias of a wider type widens the sum
            bias = next(each for each in total.all_input_nodes if each is not site)
            narrow = torch.promote_types(narrow, self._tensors[str(bias.target)].dtype)
        narrow = cast_of(base) or narrow
        reshaped = base is not site and base is not total
        weight = Stored(product.weight, product.view)
        joined = _Joined(site, base, base, (), narrow, narrow, weight, reshaped)
        return joined.plus(addition) if joined.takes(delta) else None

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
        sites = (
            source for source in node.all_input_nodes if self._is_site(source) and self._deltas.total(source) is node
        )
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
            raise self._error(
                node, f"the sum has dtype {value.dtype} and must be cast back to {value.narrow}, that of its site"
            )
        updates = (*(term.update for term in value.terms), *value.offsets)
        names = [str(value.weight.node.target), *(name for update in updates for name in update.names)]
        writer = self._flow.writer_of(names)
        if writer is not None:
            raise self._error(writer, "it writes to a weight or a factor while the graph computes")
        if not value.is_weight:
            self._check_input(node, value)
        wanted = tuple(self._viewed_shape(str(value.weight.node.target), value.weight.view))
        shapes = [self._update_shape(term.update) for term in value.terms]
        misfit = next((shape for shape in shapes if shape != wanted), None)
        if misfit is not None:
            raise self._error(node, f"it adds an update of shape {misfit} to a weight of {wanted}")

    def _check_input(self, node: fx.Node, value: _Joined) -> None:
        """Refuse terms that do not read the input of their site, or read it in another way."""
        product = weight_op(value.site)
        assert product is not None
        weight = self._tensors[str(product.weight.target)]
        kernel = tuple(weight.shape[2:]) if product.op in CONVOLUTIONS else ()
        for term in value.terms:
            reached = self._flow.reaches(term.source, product.input)
            if reached is None:
                raise self._error(
                    node, f"it adds a branch that reads {term.source} to a site that reads {product.input}"
                )
            written = self._flow.written_between({value.site: product.input, term.product: term.source})
            if written is not None:
                raise self._error(written, f"it writes to what {value.site} and {term.product} read, between the two")
            if (term.op, term.geometry, term.kernel) != (product.op, product.geometry, kernel):
                raise self._error(
                    node,
                    f"it adds {_product_text(term.op, term.geometry, term.kernel)} to {_product_text(product.op, product.geometry, kernel)}",
                )
            apart = reached and not features_are_last(term.op, term.geometry)
            if apart or ((reached or value.reshaped) and not same_shapes(value.base, node)):
                raise self._error(node, f"it adds values of other positions to {value.base}, or of positions not known")

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
        return view.shape_of(self._tensors[name].shape)


def _product_text(op: Op | None, geometry: tuple[Any, ...], kernel: tuple[int, ...]) -> str:
    more = [f"kernel {kernel}"] * bool(kernel) + [f"{geometry}"] * bool(geometry)
    return f"{op} ({', '.join(more)})" if more else str(op)
