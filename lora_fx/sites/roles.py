"""Roles of call sites, read off the dataflow. No name of a module or parameter is read.

Attention. An operand of an attention (``attention.py``) comes from the nearest sites before it, through operators that move
values, rotate, scale or normalise them: those are its query, key or value projections. The site that reads the result is its
output projection. Attention is self-attention if its queries and keys are made of the same stream of values.

MLP. A site whose input is an activation of other sites' outputs, and which returns to the width that those read, is
``down``; where two outputs are multiplied, the activated one is ``gate`` and the other ``up``.

A site that holds several of these in one weight has several roles, and ``parts`` says which of its features are whose.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from lora_fx.graph.aten_kinds import (
    ACTIVATION,
    ATTENTION,
    NORM,
    POINTWISE,
    POWER,
    PRODUCT,
    SHAPE,
    SOFTMAX,
    STATISTIC,
    VIEW,
    name_of,
    tensor_inputs,
    writes,
)
from lora_fx.graph.graph_module import state_of
from lora_fx.graph.records import Features
from lora_fx.rules.vocabulary import ROLES, Part, Role
from lora_fx.sites.attention import attentions
from lora_fx.sites.call_sites import Site, sites
from lora_fx.sites.feature_flow import Push, disjoint
from lora_fx.sites.weight_ops import WeightOp, weight_op

_SUMS = frozenset({"add", "sub", "rsub"})
_GATES = frozenset({"mul", "div"})
_LOOK_UPS = frozenset({"index", "gather", "index_select", "take_along_dim"})
_CARRIES = SHAPE | POINTWISE | POWER
_CHOOSES = _CARRIES | SOFTMAX | ACTIVATION | STATISTIC | frozenset({"topk", "sort", "max", "scatter", "zeros_like"})


@dataclass(frozen=True)
class Purpose:
    """The roles of one site.

    Attributes:
        roles: in the order of the vocabulary; none if the dataflow says nothing.
        parts: the features of each part of a fused projection; empty if there are no parts, or if they overlap.
    """

    roles: tuple[Role, ...] = ()
    parts: Mapping[Part, Features] = field(default_factory=dict)

    def with_role(self, role: Role) -> Purpose:
        """Return the purpose with one more role."""
        return replace(self, roles=tuple(each for each in ROLES if each in (*self.roles, role)))


def purposes(graph_module: fx.GraphModule, known: Iterable[Site] | None = None) -> Mapping[str, Purpose]:
    """Return the roles of each call site, by its name.

    Args:
        graph_module: a graph in normal form.
        known: its sites, if they have been found already.
    """
    graph = _Graph(graph_module, tuple(known) if known is not None else sites(graph_module))
    found = _Found()
    _find_attention(graph, found)
    _find_heads(graph, found)
    _find_mlps(graph, found)
    _find_embeddings(graph, found)
    _find_routers(graph, found)
    return {site.name: found.purpose(node) for node, site in graph.sites.items()}


@dataclass(frozen=True)
class _Found:
    """The roles and parts found so far; one search after the other fills it."""

    roles: dict[fx.Node, set[Role]] = field(default_factory=dict)
    parts: dict[fx.Node, dict[Part, Features]] = field(default_factory=dict)

    def add(self, node: fx.Node, kind: str, part: str, features: Features | None = None) -> None:
        role = f"{kind}.{part}" if part else kind
        self.roles.setdefault(node, set()).add(role)  # type: ignore[arg-type]
        if features is not None:
            mine = self.parts.setdefault(node, {})
            mine[part] = mine[part] | features if part in mine else features  # type: ignore[index]

    def has(self, node: fx.Node, *kinds: str) -> bool:
        return any(role.startswith(kinds) for role in self.roles.get(node, ()))

    def purpose(self, node: fx.Node) -> Purpose:
        parts = self.parts.get(node, {})
        roles = self.roles.get(node, ())
        return Purpose(tuple(role for role in ROLES if role in roles), parts if disjoint(parts) else {})


class _Graph:
    """A graph, its sites, and the sources of its values."""

    def __init__(self, graph_module: fx.GraphModule, known: tuple[Site, ...]) -> None:
        self.tensors = state_of(graph_module).tensors
        self.nodes = list(graph_module.graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        by_name = {node.name: node for node in self.nodes}
        self.sites: dict[fx.Node, Site] = {by_name[site.node]: site for site in known}
        self.weight_ops: dict[fx.Node, WeightOp] = {}
        for node in self.sites:
            product = weight_op(node)
            assert product is not None
            self.weight_ops[node] = product
        self._bases: dict[fx.Node, fx.Node] = {}
        self._writers: dict[fx.Node, list[fx.Node]] = {}
        self.constants: set[fx.Node] = set()
        self.reads = {node: self._reads(node) for node in self.nodes}

    def written(self, value: fx.Node) -> list[fx.Node]:
        """Return a value and all nodes that write to it in place."""
        return list(dict.fromkeys([value, *self._writers.get(self._bases.get(value, value), ())]))

    def values_before(self, reader: fx.Node, values: Iterable[fx.Node]) -> list[fx.Node]:
        """Return these values and all nodes that write to them before ``reader``."""
        before = self.position[reader]
        return [part for value in values for part in self.written(value) if self.position[part] < before]

    def _reads(self, node: fx.Node) -> list[fx.Node]:
        """Return the sources of a node's value: the tensors that it reads, and the nodes that wrote to them before."""
        inputs = tensor_inputs(node)
        target = writes(node)
        if target is not None:
            self._bases[node] = self._bases.get(target, target)
            self._writers.setdefault(self._bases[node], []).append(node)
        elif name_of(node) in VIEW and inputs:
            self._bases[node] = self._bases.get(inputs[0], inputs[0])
        reads = [source for value in inputs for source in self.written(value) if source is not node]
        computed = node.op != "placeholder" and node not in self.sites
        if node.op == "get_attr" or (computed and all(source in self.constants for source in reads)):
            self.constants.add(node)
        return reads if node not in self.constants else []

    def push(self, source: fx.Node, last: fx.Node) -> Push:
        """Push the features of a site up to the node ``last``."""
        push = Push(self.tensors, source, self.weight_ops[source], self.sites[source].out_features)
        for node in self.nodes[self.position[source] + 1 : self.position[last] + 1]:
            push.step(node)
        return push

    def is_projection(self, node: fx.Node) -> bool:
        """Tell whether a site multiplies each position by a matrix."""
        op = self.weight_ops[node].op
        if op == "conv1d":
            return self.tensors[self.sites[node].weight].shape[-1] == 1
        return op in ("linear", "expert")


Sources = frozenset[fx.Node]
"""The sites that a value is made of; none if it is made of constants and positions alone."""


def _find_attention(graph: _Graph, found: _Found) -> None:
    made_of, streams = _projections(graph), _streams(graph)
    kinds: dict[fx.Node, str] = {}
    for attention in attentions(graph.nodes):
        values_of: dict[Part, list[fx.Node]] = {
            "query": graph.values_before(attention.result, attention.queries),
            "key": graph.values_before(attention.result, attention.keys),
            "value": graph.values_before(attention.result, attention.values),
        }
        read_by: dict[Part, set[fx.Node]] = {}
        uses: dict[fx.Node, list[tuple[Part, fx.Node]]] = {}
        for part, values in values_of.items():
            for value in values:
                for site in made_of[value] or ():
                    uses.setdefault(site, []).append((part, value))
                    read_by.setdefault(part, set()).add(graph.weight_ops[site].input)
        own = _starts(streams, read_by.get("query", set())) & _starts(streams, read_by.get("key", set()))
        kinds[attention.result] = kind = "self_attention" if own else "cross_attention"
        for site, reads in uses.items():
            fused = len({part for part, _ in reads}) > 1
            push = (
                graph.push(site, max((value for _, value in reads), key=graph.position.__getitem__)) if fused else None
            )
            for part, value in reads:
                # A value written in place is reached at the write, not at its views.
                found.add(site, kind, part, push[value].features if push is not None and value in push else None)
    for node, kind in _output_sites(graph, kinds):
        found.add(node, kind, "output")


def _projections(graph: _Graph) -> dict[fx.Node, Sources | None]:
    """Return for each value the nearest projections that it is made of; None if anything else takes part in it."""
    made_of: dict[fx.Node, Sources | None] = {}
    for node in graph.nodes:
        if node in graph.sites:
            made_of[node] = None if graph.weight_ops[node].op == "embedding" else frozenset([node])
        elif node.op == "placeholder":
            made_of[node] = None if _is_floating(node) else frozenset()
        else:
            made_of[node] = _join_sources(node, [made_of[source] for source in graph.reads[node]])
    return made_of


def _join_sources(node: fx.Node, inputs: list[Sources | None]) -> Sources | None:
    name = name_of(node)
    if all(value == frozenset() for value in inputs) or name in STATISTIC:
        return frozenset()
    if name in NORM or name in _LOOK_UPS:
        return inputs[0]
    if name not in _CARRIES:
        return None
    known = frozenset().union(*(value for value in inputs if value is not None))
    if name in _GATES:
        return known or None
    return None if None in inputs else known


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


Streams = frozenset[fx.Node]
"""The starts of the values that run through a model's layers: embeddings and floating-point inputs."""


def _streams(graph: _Graph) -> dict[fx.Node, Streams]:
    """Return for each value the streams it is made of. Values that attention brings in from elsewhere do not count."""
    streams: dict[fx.Node, Streams] = {}
    for node in graph.nodes:
        starts = _is_floating(node) if node.op == "placeholder" else _is_embedding(graph, node)
        if starts and node not in graph.constants:
            streams[node] = frozenset([node])
        elif node in graph.constants or (name_of(node) in PRODUCT | {ATTENTION} and node not in graph.sites):
            streams[node] = frozenset()
        else:
            streams[node] = frozenset().union(*(streams[source] for source in graph.reads[node]))
    return streams


def streams_of(
    graph_module: fx.GraphModule, operands: Iterable[tuple[Sequence[fx.Node], fx.Node]]
) -> list[set[fx.Node]]:
    """Return the streams of operands, each given as its values and the node that reads them."""
    graph = _Graph(graph_module, sites(graph_module))
    streams = _streams(graph)
    return [_starts(streams, graph.values_before(reader, values)) for values, reader in operands]


def _starts(streams: Mapping[fx.Node, Streams], values: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the streams of these values; a value without one, such as a learned query, stands for itself."""
    return {start for value in values for start in streams[value] or (value,)}


def _is_embedding(graph: _Graph, node: fx.Node) -> bool:
    return node in graph.sites and graph.weight_ops[node].op == "embedding"


def _output_sites(graph: _Graph, kinds: Mapping[fx.Node, str]) -> Iterator[tuple[fx.Node, str]]:
    """Yield the sites that read the result of an attention, and its kind."""
    carried: dict[fx.Node, frozenset[str]] = {}
    for node in graph.nodes:
        if node in kinds:
            carried[node] = frozenset([kinds[node]])
            continue
        inputs = [source for source in graph.reads[node] if source in carried]
        if not inputs:
            continue
        if node in graph.sites:
            if graph.weight_ops[node].op != "embedding" and graph.weight_ops[node].input in carried:
                for kind in carried[graph.weight_ops[node].input]:
                    yield node, kind
        elif name_of(node) in _CARRIES | NORM and not (name_of(node) in _SUMS and len(graph.reads[node]) > len(inputs)):
            carried[node] = frozenset().union(*(carried[source] for source in inputs))


Flow = Mapping[fx.Node, bool]
"""The projections that a value is made of, and whether each went through an activation."""


def _find_mlps(graph: _Graph, found: _Found) -> None:
    flows = _flows(graph)
    for node in graph.sites:
        flow = flows.get(graph.weight_ops[node].input)
        if not flow or not any(flow.values()) or not graph.is_projection(node):
            continue
        kind = "expert" if graph.weight_ops[node].op == "expert" else "mlp"
        if not _is_mlp(graph, found, node, flow):
            continue
        if len(flow) == 1:
            (inner,) = flow
            gated = _gated_parts(graph, inner, graph.weight_ops[node].input)
            for part, features in gated.items():
                found.add(inner, kind, part, features)
            if not gated:
                found.add(inner, kind, "up")
        elif len(flow) == 2 and len(set(flow.values())) == 2:
            for inner, activated in flow.items():
                found.add(inner, kind, "gate" if activated else "up")
        else:
            continue
        found.add(node, kind, "down")


def _is_mlp(graph: _Graph, found: _Found, down: fx.Node, inner: Iterable[fx.Node]) -> bool:
    width, op = graph.sites[down].out_features, graph.weight_ops[down].op
    return not any(found.has(node, "self_attention", "cross_attention", "head") for node in (down, *inner)) and all(
        graph.sites[node].in_features == width and graph.weight_ops[node].op == op for node in inner
    )


def _flows(graph: _Graph) -> dict[fx.Node, Flow | None]:
    flows: dict[fx.Node, Flow | None] = {}
    for node in graph.nodes:
        if node in graph.sites:
            flows[node] = {node: False} if graph.is_projection(node) else None
        elif node.op == "placeholder":
            flows[node] = None if _is_floating(node) else {}
        else:
            flows[node] = _flow(node, [flows[source] for source in graph.reads[node]])
    return flows


def _flow(node: fx.Node, inputs: list[Flow | None]) -> Flow | None:
    name = name_of(node)
    if all(value == {} for value in inputs) or name in STATISTIC:
        return {}
    if name in NORM or name in _LOOK_UPS:
        return inputs[0]
    if name not in _CARRIES | ACTIVATION or None in inputs:
        return None
    joined: dict[fx.Node, bool] = {}
    for value in inputs:
        for site, activated in (value or {}).items():
            joined[site] = joined.get(site, False) or activated or name in ACTIVATION
    return joined


def _gated_parts(graph: _Graph, inner: fx.Node, last: fx.Node) -> dict[Part, Features]:
    """Return the gate and up features of a site whose output is split and multiplied with itself; empty otherwise."""
    push = graph.push(inner, last)
    for node in graph.nodes[graph.position[inner] : graph.position[last] + 1]:
        factors = [push[source] for source in graph.reads[node] if source in push]
        if name_of(node) not in _GATES or len(factors) != 2 or factors[0].activated == factors[1].activated:
            continue
        gate, up = factors if factors[0].activated else reversed(factors)
        if not gate.features & up.features:
            return {"gate": gate.features, "up": up.features}
    return {}


def _find_heads(graph: _Graph, found: _Found) -> None:
    """Find heads: their output is returned by the graph, but for scaling, a cap, and a choice of positions.

    Keys and values that are returned, for a cache, are none.
    """
    todo, seen = graph.nodes[-1].all_input_nodes, set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        inputs = [source for source in graph.reads[node] if source not in graph.constants]
        if node in graph.sites:
            if graph.weight_ops[node].op == "linear" and not found.has(node, *_KEPT):
                found.add(node, "head", "")
        elif len(inputs) == 1 and (name_of(node) in SHAPE | POINTWISE or _is_cap(node)):
            todo += inputs


_KEPT = tuple(f"{kind}_attention.{part}" for kind in ("self", "cross") for part in ("key", "value"))


def _is_cap(node: fx.Node) -> bool:
    """Tell whether this is the tanh of ``cap · tanh(x / cap)``."""
    return name_of(node) == "tanh" and name_of(node.all_input_nodes[0]) in _GATES


def _find_embeddings(graph: _Graph, found: _Found) -> None:
    rows = set()
    for node, product in graph.weight_ops.items():
        if product.op != "embedding":
            continue
        if _is_input(product.input):
            found.add(node, "embedding", "")
            rows.add(graph.sites[node].in_features)
    for node, site in graph.sites.items():
        if found.has(node, "head") and site.out_features in rows:
            found.add(node, "lm_head", "")


def _is_input(index: fx.Node) -> bool:
    """Tell whether an index is an input of the graph, but for its shape and some replaced values."""
    while index.op != "placeholder":
        kept = {"where": 1, "masked_fill": 0}.get(
            name_of(index), 0 if name_of(index) in SHAPE | {"to", "clamp"} else None
        )
        inputs = [node for node in index.args if isinstance(node, fx.Node)]
        if kept is None or len(inputs) <= kept:
            return False
        # where(condition, replacement, index), or the other way round
        index = inputs[-1] if name_of(index) == "where" and _is_number(inputs[1]) else inputs[kept]
    return True


def _is_number(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() == 0


def _find_routers(graph: _Graph, found: _Found) -> None:
    """Find routers: their scores choose among as many experts as some stack of matrices has."""
    stacks = {
        graph.tensors[graph.sites[n].weight].shape[0]
        for n, product in graph.weight_ops.items()
        if product.op == "expert"
    }
    if not stacks:
        return
    todo, seen = [node for node in graph.nodes if name_of(node) == "topk"], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in graph.sites:
            if graph.weight_ops[node].op == "linear" and graph.sites[node].out_features in stacks:
                found.add(node, "router", "")
        elif name_of(node) in _CHOOSES:
            todo += graph.reads[node]
