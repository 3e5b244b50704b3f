"""Body of a template: its nodes between the marks in a flat graph, with the check that every value passes through the marks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from lora_fx.tracing.repeated_layers.call_values import LayersDiffer
from lora_fx.tracing.repeated_layers.stubs import ENTER, LEAVE, STUB

aten = torch.ops.aten


@dataclass
class Body:
    """The nodes of a template.

    Attributes:
        path: of its module.
        enter: the mark where it begins.
        nodes: between the marks.
        given: nodes of its input tensors.
        left: the same tensors when it has ended: the nodes that touched them last.
        results: nodes of the other tensors that it returned.
    """

    path: str
    enter: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    given: Sequence[fx.Node] = ()
    left: Sequence[fx.Node] = ()
    results: Sequence[fx.Node] = ()

    def constants(self, names: Collection[str]) -> list[fx.Node]:
        """Return the tensors that it reads and that are not among ``names``, which are the model's."""
        sources = (source for node in self.nodes for source in node.all_input_nodes)
        return list(dict.fromkeys(node for node in sources if node.op == "get_attr" and node.target not in names))


def find_bodies(graph: fx.Graph, names: Collection[str]) -> list[Body]:
    """Return the bodies of all templates in a graph.

    Args:
        graph: flat.
        names: of the model's tensors.

    Raises:
        LayersDiffer: a value enters or leaves a template by another way than its inputs and outputs.
    """
    bodies = list(_bodies(graph))
    for body in bodies:
        _check(body, names)
    return bodies


def is_size(node: fx.Node) -> bool:
    """Tell whether a node is a symbolic number, computed from the sizes of inputs."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)


def stack_of(node: fx.Node) -> dict[str, Any]:
    """Return the modules in which a node was recorded."""
    return node.meta.get("nn_module_stack") or {}


def _bodies(graph: fx.Graph) -> Iterator[Body]:
    body: Body | None = None
    for node in graph.nodes:
        if node.target is ENTER:
            if body is not None:
                raise LayersDiffer(f"{node.args[0]!r} is called inside of {body.path!r}")
            body = Body(node.args[0], node, given=node.args[1])
        elif node.target is LEAVE:
            assert body is not None
            count = len(node.args[1]) - len(body.given)
            body.results, body.left = node.args[1][:count], node.args[1][count:]
            yield body
            body = None
        elif body is not None:
            body.nodes.append(node)


def _check(body: Body, names: Collection[str]) -> None:
    own, passed = set(body.nodes), {*body.results, *body.left}
    for node in body.nodes:
        if node.target is STUB:
            raise LayersDiffer(f"{node.args[0]!r} is called inside of {body.path!r}")
        if free_unbacked_symbols(node.meta.get("val")):
            raise LayersDiffer(f"{body.path!r} computes sizes from values")
        for source in node.all_input_nodes:
            if source not in own and source not in body.given and not _is_known(source, body.path, names):
                raise LayersDiffer(f"{body.path!r} uses {source.name!r}, which it is not given")
        for user in node.users:
            if user not in own and node not in passed and not is_size(node):
                raise LayersDiffer(f"{user.name!r} uses {node.name!r} of {body.path!r}, which does not return it")
        _check_stack(node, body)


def _is_known(source: fx.Node, path: str, names: Collection[str]) -> bool:
    """Tell whether every layer has its own counterpart of an outside node: a tensor, a number in its code, a size, the device."""
    if source.op == "get_attr":
        return str(source.target).startswith(f"{path}.") and (source.target in names or _is_written_there(source))
    return source.target is getattr or is_size(source)


def _is_written_there(source: fx.Node) -> bool:
    """Tell whether a constant was made by the code of a layer, as ``torch.tensor(0.5)`` is, and is not an attribute of an object."""
    return [user.target for user in source.users] == [aten.lift_fresh_copy.default]


def _check_stack(node: fx.Node, body: Body) -> None:
    """Refuse a node that was recorded outside of the layer and its parts."""
    stack, around = list(stack_of(node).items()), list(stack_of(body.enter).items())
    inner = stack[len(around) :]
    if stack[: len(around)] != around or not all(path.startswith(f"{body.path}.") for _, (path, _) in inner):
        raise LayersDiffer(f"{node.name!r} of {body.path!r} was recorded in another module")


class Moved:
    """Names below the path of one layer, moved below that of another."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new
        self._stacks: dict[tuple[str, ...], dict[str, Any]] = {}

    def is_below(self, name: str) -> bool:
        """Tell whether a name lies below the old path."""
        return name.startswith(f"{self.old}.")

    def name(self, name: str) -> str:
        """Return a name below the new path."""
        return self.new + name[len(self.old) :]

    def stack(self, stack: Mapping[str, Any]) -> dict[str, Any]:
        """Return the modules in which a node would have been recorded; nodes of one module share them."""
        key = tuple(stack)
        if key not in self._stacks:
            self._stacks[key] = dict(self._entry(*item) for item in stack.items())
        return self._stacks[key]

    def meta(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metadata that a node would have."""
        stack = meta.get("nn_module_stack")
        return dict(meta) if stack is None else {**meta, "nn_module_stack": self.stack(stack)}

    def _entry(self, key: str, recorded: tuple[str, Any]) -> tuple[str, tuple[str, Any]]:
        path, kind = recorded
        if path != self.old and not self.is_below(path):
            return key, recorded
        head = f"{_ROOT}{path}"
        if not key.startswith(head):  # the rest of the key may count the calls of the module
            raise LayersDiffer(f"{path!r} is recorded as {key!r}")
        return f"{_ROOT}{self.name(path)}{key[len(head) :]}", (self.name(path), kind)


_ROOT = "L__self__"  # torch.export's name for the model
