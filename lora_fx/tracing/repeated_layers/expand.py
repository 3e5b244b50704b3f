"""Expansion of stubs in a flat graph: copies of their template's nodes, with parameters, modules and inputs of their own.

The graph is walked in order, and each node copied onto the copies of its arguments. A stub becomes a copy of the body of its
template, in which

    inputs of the template         become inputs of the stub
    parameters, modules, paths     become those of the layer
    sizes                          stay, since the template has computed them
    results                        replace those of the stub
    inputs that it touched         are replaced from there on: a tensor that an operator returns unchanged, or that was written
                                   to, stands for the node that touched it last

Constants in the code of layers are numbered anew: torch.export numbers them in their order, all through the model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lora_fx.progress import step
from lora_fx.tracing.repeated_layers.call_values import LayersDiffer
from lora_fx.tracing.repeated_layers.layer_classes import LayerClass
from lora_fx.tracing.repeated_layers.stubs import ENTER, LEAVE, STUB
from lora_fx.tracing.repeated_layers.template_body import Body, Moved, find_bodies, is_size, stack_of

_LIFTED = re.compile(r"(?P<path>(?:.*\.)?)lifted_tensor_(?P<number>\d+)")

Names = Mapping[str, Mapping[str, str]]
"""Path of a stub, or nothing for the traced part → name in the trace → name in the graph."""


@dataclass(frozen=True)
class Expanded:
    """A graph without stubs.

    Attributes:
        graph: without stubs.
        constants: name of a numbered constant → name in the trace of a constant with the same value.
        modules: called by the graph.
    """

    graph: fx.Graph
    constants: Mapping[str, str]
    modules: Mapping[str, nn.Module]

    def with_copies(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the constants of the graph, copied from those of the trace; each is a tensor of its own."""
        found = {new: values[old].clone() for new, old in self.constants.items()}
        return {**found, **{name: value for name, value in values.items() if name not in self.constants.values()}}


def expand(
    graph: fx.Graph,
    classes: Iterable[LayerClass],
    names: Sequence[str],
    modules: Mapping[str, nn.Module],
) -> Expanded:
    """Return a new graph, in which every stub is a copy of its template.

    Args:
        graph: flat, each tensor read by one node at its head.
        classes: of the layers that were stubs.
        names: of all tensors of the model, in the order in which a graph reads them.
        modules: called by the graph.

    Raises:
        LayersDiffer: the graph of a full trace is not known.
    """
    step("writing out equal layers")
    ranks = {name: index for index, name in enumerate(names)}
    bodies = {body.path: body for body in find_bodies(graph, ranks)}
    moves = {path: Moved(each.paths[0], path) for each in classes if each.paths[0] in bodies for path in each.paths[1:]}
    constants = constant_names(graph, bodies, moves, ranks)
    expansion = _Expansion(graph, bodies, moves, constants, ranks, modules)
    renamed = [(new, old) for each in constants.values() for old, new in each.items()]
    in_order = dict(sorted(renamed, key=lambda pair: number_of(pair[0])))
    return Expanded(expansion.made, in_order, expansion.modules)


class _Expansion:
    """The walk through a graph."""

    def __init__(
        self,
        graph: fx.Graph,
        bodies: Mapping[str, Body],
        moves: Mapping[str, Moved],
        constants: Names,
        ranks: Mapping[str, int],
        modules: Mapping[str, nn.Module],
    ) -> None:
        self.made = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self._called = modules
        self._bodies, self._moves, self._constants, self._ranks = bodies, moves, constants, ranks
        self._read = list(graph.find_nodes(op="get_attr"))
        self._tensors: dict[str, fx.Node] = {}
        self._copies: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            self._walk(node)
        self.made.set_codegen(graph._codegen)

    def _walk(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            if not self._tensors:
                self._read_tensors()
            self._copies[node] = self._tensors[self._named(node)]
        elif node.target is STUB:
            self._stamp(node)
        elif node.target not in (ENTER, LEAVE) and node not in self._copies:
            self._copies[node] = self._copy(node, self._copies)

    def _named(self, node: fx.Node, moved: Moved | None = None) -> str:
        """Return the name of the tensor that a node reads, in a stamped layer or in the traced part."""
        name, path = str(node.target), "" if moved is None else moved.new
        return self._constants.get(path, {}).get(name) or (name if moved is None else moved.name(name))

    def _read_tensors(self) -> None:
        """Read the tensors of all layers at the head of the graph, where it reads those of the templates."""
        wanted = {self._named(node): node for node in self._read}
        for moved in self._moves.values():
            wanted.update((self._named(node, moved), node) for node in self._read if moved.is_below(str(node.target)))
        for name in sorted(wanted, key=self._rank):
            self._tensors[name] = self.made.get_attr(name)
            self._tensors[name].meta = dict(wanted[name].meta)

    def _rank(self, name: str) -> tuple[int, int]:
        """Return the place of a tensor: first those of the model in its order, then constants by their numbers."""
        rank = self._ranks.get(name)
        return (0, rank) if rank is not None else (1, number_of(name))

    def _stamp(self, stub: fx.Node) -> None:
        path, given = _called(stub)
        moved = self._moves[path]
        body = self._bodies[moved.old]
        if moved.stack(stack_of(body.enter)) != stack_of(stub) or body.enter.stack_trace != stub.stack_trace:
            raise LayersDiffer(f"{path!r} is called from another place than {body.path!r}")
        inner = dict(self._copies)
        inner.update((old, self._copies[new]) for old, new in zip(body.given, given, strict=True))
        own = (node for node in self._read if moved.is_below(str(node.target)))
        inner.update((node, self._tensors[self._named(node, moved)]) for node in own)
        for node in body.nodes:
            if not is_size(node):  # torch.export computes sizes once for all layers
                inner[node] = self._copy(node, inner, moved)
        results = dict(enumerate(inner[node] for node in body.results))
        self._copies.update((user, results[user.args[1]]) for user in stub.users)  # type: ignore[index]
        changed = zip(given, body.given, body.left, strict=True)
        self._copies.update((node, inner[after]) for node, before, after in changed if after is not before)

    def _copy(self, node: fx.Node, copies: Mapping[fx.Node, Any], moved: Moved | None = None) -> fx.Node:
        target = node.target if node.op != "call_module" else self._module(str(node.target), moved)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: copies[each])
        made = self.made.create_node(node.op, target, args, kwargs, node.name, node.type)
        made.meta = dict(node.meta) if moved is None else moved.meta(node.meta)
        return made

    def _module(self, name: str, moved: Moved | None) -> str:
        """Return the name of a module that is called; each layer has its own."""
        if moved is None:
            self.modules[name] = self._called[name]
            return name
        if not moved.is_below(name):
            raise LayersDiffer(f"{moved.old!r} calls {name!r}, which is outside of it")
        self.modules[moved.name(name)] = copy.deepcopy(self._called[name])
        return moved.name(name)


def _called(stub: fx.Node) -> tuple[str, list[fx.Node]]:
    """Return the path of a layer, and its inputs."""
    path, given, _ = stub.args
    return path, given  # type: ignore[return-value]


def constant_names(
    graph: fx.Graph, bodies: Mapping[str, Body], moves: Mapping[str, Moved], names: Collection[str]
) -> Names:
    """Return the names that constants would have in a full trace.

    Args:
        graph: with stubs.
        bodies: by the paths of templates.
        moves: by the paths of stubs.
        names: of the model's own tensors.

    Raises:
        LayersDiffer: the numbers in the trace have gaps, so that those of a full trace are not known.
    """
    if not any(body.constants(names) for body in bodies.values()):
        return {}
    found: dict[str, dict[str, str]] = {}
    traced = []
    for number, (path, name) in enumerate(_in_order(graph, bodies, moves, names)):
        match = _LIFTED.fullmatch(name)
        if match is None:
            raise LayersDiffer(f"{name!r} is a constant that is not numbered")
        place = moves[path].name(match["path"]) if path else match["path"]
        found.setdefault(path, {})[name] = f"{place}lifted_tensor_{number}"
        traced += [] if path else [int(match["number"])]
    if traced != list(range(len(traced))):
        raise LayersDiffer("some constants are not used")
    return found


def number_of(name: str) -> int:
    """Return the number in the name of a constant; 0 if it has none."""
    match = _LIFTED.fullmatch(name)
    return int(match["number"]) if match is not None else 0


def _in_order(
    graph: fx.Graph, bodies: Mapping[str, Body], moves: Mapping[str, Moved], names: Collection[str]
) -> Iterator[tuple[str, str]]:
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target is STUB:
            path = str(node.args[0])
            yield from ((path, str(each.target)) for each in bodies[moves[path].old].constants(names))
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source.target not in names and source not in seen:
                seen.add(source)
                yield "", str(source.target)
