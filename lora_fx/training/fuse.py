"""Fusion of branches: the same function in fewer passes over memory.

A branch beside a site, ``z = y + s · (D(x) Aᵀ) Bᵀ`` with a dropout D or without, becomes two nodes::

    h, … = reduce_features(x, [A, …], wide, [p, …])      for all branches that read x, where the first of them stands
    z    = add_update(y, h, B, s, narrow, places)        for each branch, where its sum stands

So x is read once and gets one gradient, instead of one for each branch; dz B serves both dx and dA; the product with B is
added where it is computed. No node has to move, since the first product needs only x and factors: a single node for a whole
group would have to wait for the last site, and most models read the output of the first before that (q is reshaped before k
is computed), so that sites would have to move, and their order could not be restored.

Branches are matched node by node as they are attached, not by their algebra (:mod:`lora_fx.branches.find`): lowering has to
write out exactly the nodes that were fused, and a branch in any other form stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeGuard

import torch
from torch import fx, nn

from lora_fx.branches.invariants import checked
from lora_fx.branches.lower import describe
from lora_fx.errors import PlanError
from lora_fx.graph.adapter_names import is_factor, is_places
from lora_fx.graph.aten_kinds import writes
from lora_fx.graph.cached_graphs import CachedGraphs, check_changeable
from lora_fx.graph.graph_module import TracedGraphModule, as_traced, copy_graph, rebuilt, state_of
from lora_fx.graph.provenance import stamp_of, write_stamp
from lora_fx.numerics.bit_dropout import DropoutRate
from lora_fx.numerics.fused_branch import add_update, reduce_features
from lora_fx.sites.call_sites import biased, is_site
from lora_fx.sites.weight_ops import weight_op

aten = torch.ops.aten


def fuse(graph_module: TracedGraphModule) -> TracedGraphModule:
    """Return a graph that computes the same, with the same parameters, in fewer passes over memory.

    Outputs and gradients are as close to the exact ones as before, but not the same bits. Branches beside linear sites are
    fused; those beside sites of other kinds (convolutions, embeddings, stacked experts) stay as they are. Passes that need the
    branches themselves (fold, exporters, ``save_adapter``) take a fused graph as it is.

    Dropout draws the masks that the graph drew before, from equal seeds and in the same order, and follows the mode and ``p``
    of the same modules, which are still ``nn.Dropout``. The masks are kept as bits for the backward pass.

    A factor that a loss does not depend on has a gradient of zero where others of its group have one, and not None: an optimizer
    with weight decay then moves it. Derivatives of gradients, and forward-mode ones, are those of the plain graph only without
    dropout and factors of another dtype than the weights; with them torch refuses: take the graph before ``fuse``.

    Args:
        graph_module: left as it is; the result has parameters of its own over the same storage.

    Raises:
        PlanError: the argument is no graph of lora_fx.
    """
    if isinstance(graph_module, CachedGraphs):
        raise PlanError(
            "fuse is for graphs that train, and the graphs of an encoder-decoder model with a cache generate: fold(graphs) has no branches left "
            "to fuse. To train, rewrite the model without cache=True, and transfer the adapter onto these graphs."
        )
    graph_module = as_traced(graph_module)
    check_changeable(graph_module)
    graph, _ = copy_graph(graph_module.graph)
    modules = state_of(graph_module).modules
    for group in _groups(graph, modules):
        _write_fused(graph, group)
    called = {str(node.target) for node in graph.find_nodes(op="call_module") if not node.args}
    rates = {name: DropoutRate(each.p) for name, each in modules.items() if name in called and _drops(each)}
    graph.lint()
    return checked(rebuilt(graph_module, graph, modules=rates), "fused")


@dataclass(frozen=True)
class _AttachedBranch:
    """A branch in the form in which it is attached.

    Attributes:
        nodes: ``[cast], [dropout], A, B, scale, [pad, place], add, [cast]``, in this order.
        a: ``get_attr`` of A.
        b: ``get_attr`` of B.
        scaling: a number.
        wide: the dtype to which x is cast, or None.
        narrow: the dtype to which the sum is cast back, or None.
        dropout: the call of its module, or None.
        places: ``get_attr`` of the places of a part's features, or None.
    """

    nodes: tuple[fx.Node, ...]
    a: fx.Node
    b: fx.Node
    scaling: float
    wide: torch.dtype | None
    narrow: torch.dtype | None
    dropout: fx.Node | None
    places: fx.Node | None

    @property
    def x(self) -> fx.Node:
        """The input, which may be the output of a branch that has been fused meanwhile."""
        return self.nodes[0].args[0]  # type: ignore[return-value]

    @property
    def product(self) -> fx.Node:
        """The node of ``x Aᵀ``."""
        return self.nodes[(self.wide is not None) + (self.dropout is not None)]

    @property
    def constants(self) -> tuple[fx.Node, ...]:
        """The factors, and the places."""
        return (self.a, self.b) if self.places is None else (self.a, self.b, self.places)

    @property
    def total(self) -> fx.Node:
        """The node of the sum."""
        return self.nodes[-1 if self.narrow is None else -2]


def _branches(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Sequence[_AttachedBranch]:
    """Return the branches beside linear sites that can be fused."""
    input_of: dict[fx.Node, fx.Node] = {}  # output of a site, also after its branches → input of the site
    found = []
    for node in graph.nodes:
        input_of.update(_outputs(node))
        branch = _attached_branch(node, input_of, modules)
        if branch is not None:
            found.append(branch)
            input_of[branch.nodes[-1]] = branch.x
    # The module of a fused dropout becomes a DropoutRate, which only returns p: no plain call of it may remain.
    dropouts = {branch.dropout for branch in found}
    shared = {node.target for node in graph.find_nodes(op="call_module") if node not in dropouts}
    return [branch for branch in found if branch.dropout is None or branch.dropout.target not in shared]


def _groups(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Iterable[Sequence[_AttachedBranch]]:
    """Return groups of branches that read one input, without a write to any tensor between them.

    A group draws its masks one after the other at its first branch, so nothing else may draw between its branches either.
    """
    position = {node: index for index, node in enumerate(graph.nodes)}
    draws = dict(zip(graph.nodes, accumulate((_may_draw(node) for node in graph.nodes), initial=0), strict=False))
    branches = {branch.nodes[-1]: branch for branch in _branches(graph, modules)}
    open_groups: dict[tuple[fx.Node, torch.dtype | None], list[_AttachedBranch]] = {}
    groups: list[list[_AttachedBranch]] = []
    written = -1
    for node in graph.nodes:
        branch = branches.get(node)
        if branch is not None and max(position[read] for read in branch.constants) < position[branch.nodes[0]]:
            group = open_groups.get((branch.x, branch.wide))
            start = position[group[0].nodes[0]] if group else -1
            drawn = draws[group[0].nodes[0]] + sum(each.dropout is not None for each in group) if group else -1
            moves = branch.dropout is not None and draws[branch.dropout] != drawn
            if group is None or not written < start or position[branch.a] > start or moves:
                group = open_groups[branch.x, branch.wide] = []
                groups.append(group)
            group.append(branch)
        elif _may_write(node, modules):
            written = position[node]
    return groups


def _outputs(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield the outputs of a linear site, with its bias and without, each with the site's input."""
    product = weight_op(node)
    if is_site(product) and product.op == "linear" and not is_factor(str(product.weight.target)):
        yield node, product.input
        if (total := biased(node)) is not None:
            yield total, product.input


def _may_write(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return bool(node.args) and not (isinstance(module, nn.Dropout) and not module.inplace)
    return writes(node) is not None


def _may_draw(node: fx.Node) -> bool:
    tags: Iterable[object] = getattr(node.target, "tags", ())
    return (node.op == "call_module" and bool(node.args)) or torch.Tag.nondeterministic_seeded in tags


def _attached_branch(
    total: fx.Node, input_of: Mapping[fx.Node, fx.Node], modules: Mapping[str, nn.Module]
) -> _AttachedBranch | None:
    """Return the branch that ends in this sum, if it has the form as attached and nothing else reads its nodes."""
    base, update = _two_arguments(total, aten.add.Tensor)
    padded, places = _padded_and_places(update)
    scale = update if places is None else padded.args[0]
    product, scaling = _two_arguments(scale, aten.mul.Tensor)
    reduced, b = _two_arguments(product, aten.linear.default)
    value, a = _two_arguments(reduced, aten.linear.default)
    if not (_is_factor(a) and _is_factor(b)) or base not in input_of or type(scaling) not in (int, float):
        return None
    middle = (reduced, product, scale) if places is None else (reduced, product, scale, padded, update)
    nodes: tuple[fx.Node, ...] = (*middle, total)
    dropout = value if _is_dropout(value, modules) and value is not input_of[base] else None
    if dropout is not None:
        nodes, value = (dropout, *nodes), dropout.args[0]
    x, wide, narrow = input_of[base], None, None
    if value is not x:
        source, wide = _two_arguments(value, aten.to.dtype)
        end = next(iter(total.users), total)
        _, narrow = _two_arguments(end, aten.to.dtype)
        if source is not x or narrow is None:
            return None
        nodes = (value, *nodes, end)
    if any(len(node.users) != 1 for node in nodes[:-1]):
        return None
    return _AttachedBranch(nodes, a, b, scaling, wide, narrow, dropout, places)


def _padded_and_places(update: Any) -> tuple[Any, fx.Node | None]:
    """Return the padded rows and the places of an update that is put at the features of a part; else two Nones."""
    found = isinstance(update, fx.Node) and update.target is aten.index_select.default and len(update.args) == 3
    padded, dim, places = update.args if found else (None, None, None)
    is_named = isinstance(places, fx.Node) and places.op == "get_attr" and is_places(str(places.target)) and dim == -1
    if not is_named or _two_arguments(padded, aten.constant_pad_nd.default)[1] != [0, 1]:
        return None, None
    return padded, places


def _is_dropout(node: Any, modules: Mapping[str, nn.Module]) -> bool:
    if not (isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1):
        return False
    return _drops(modules[str(node.target)])


def _drops(module: nn.Module) -> TypeGuard[nn.Dropout]:
    """Tell whether a module is a dropout that leaves its input unchanged."""
    return type(module) is nn.Dropout and not module.inplace


def _two_arguments(node: Any, target: object) -> tuple[Any, Any]:
    """Return both arguments of a call of this operator with exactly two; else two Nones."""
    found = isinstance(node, fx.Node) and node.target is target and len(node.args) == 2 and not node.kwargs
    return tuple(node.args) if found else (None, None)


def _is_factor(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and is_factor(str(node.target))


def _write_fused(graph: fx.Graph, group: Sequence[_AttachedBranch]) -> None:
    first = group[0]
    with graph.inserting_before(first.nodes[0]):
        rates = [0.0 if branch.dropout is None else _write_rate(graph, branch.dropout) for branch in group]
        more = () if all(branch.dropout is None for branch in group) else (rates,)
        factors = [branch.a for branch in group]
        reduced = graph.call_function(reduce_features, (first.x, factors, first.wide, *more))
    values = [branch.product.meta.get("val") for branch in group]
    describe(reduced, first.product, None if None in values else values)
    for index, (branch, value) in enumerate(zip(group, values, strict=True)):
        with graph.inserting_before(branch.nodes[0]):  # a lowered branch reads x here again
            part = graph.call_function(operator.getitem, (reduced, index))
        describe(part, branch.product, value)
        with graph.inserting_before(branch.total):
            places = () if branch.places is None else (branch.places,)
            arguments = (branch.total.args[0], part, branch.b, branch.scaling, branch.narrow, *places)
            fused = graph.call_function(add_update, arguments)
        end = branch.nodes[-1]
        describe(fused, end, end.meta.get("val"))
        names = [node.name for node in branch.nodes]
        write_stamp(fused, {**stamp_of(end), "part": "update", "nodes": names}, like=end)
        end.replace_all_uses_with(fused)
        for node in reversed(branch.nodes):
            graph.erase_node(node)


def _write_rate(graph: fx.Graph, dropout: fx.Node) -> fx.Node:
    node = graph.call_module(str(dropout.target))
    describe(node, dropout, None)
    node.meta["custom"] = dropout.meta.get("custom", {})
    return node
