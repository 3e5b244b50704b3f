"""A graph as plain data, for pickling: ``fx.GraphModule`` itself pickles its code and traces that again, losing all metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lora_fx.graph.aten_kinds import size_of
from lora_fx.torch_internals import OpOverload, pytree

_KEPT_META = ("nn_module_stack", "stack_trace", "custom")


@dataclass(frozen=True)
class NodeRecord:
    """One node; arguments refer to other nodes as :class:`Reference`."""

    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """Stands for a node in the arguments of a record."""

    name: str


@dataclass(frozen=True)
class Operator:
    """Stands for an operator of ``torch.ops``, which does not pickle: ``aten.linear.default``."""

    name: str


@dataclass(frozen=True)
class MemoryFormat:
    """Stands for a ``torch.memory_format``, which does not pickle in the protocol of ``torch.save``: ``contiguous_format``."""

    name: str


@dataclass(frozen=True)
class Shape:
    """Stands for the fake value of a node: its dtype, and the sizes that it had in the trace."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class GraphRecord:
    """All nodes of a graph, and the code generator that gives it its signature."""

    nodes: tuple[NodeRecord, ...]
    codegen: Any


def record(graph: fx.Graph) -> GraphRecord:
    """Return a graph as data that pickles. Of the fake values of nodes, the sizes become those of the trace."""
    return GraphRecord(tuple(_record(node) for node in graph.nodes), graph._codegen)


def restore(recorded: GraphRecord) -> fx.Graph:
    """Return the graph that was recorded: same names, operators, arguments and metadata."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for item in recorded.nodes:
        args, kwargs = _map(item.args, nodes), _map(item.kwargs, nodes)
        node = graph.create_node(item.op, _operator(item.target), args, kwargs, name=item.name)
        node.meta.update(item.meta)
        if "val" in item.meta:
            node.meta["val"] = pytree.tree_map_only(Shape, _empty, item.meta["val"])
        nodes[item.name] = node
    graph.set_codegen(recorded.codegen)
    return graph


def _record(node: fx.Node) -> NodeRecord:
    meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
    if "nn_module_stack" in meta:
        # Classes as names: those of a model that was defined in a function would not pickle.
        meta["nn_module_stack"] = {k: (path, _class_name(kind)) for k, (path, kind) in meta["nn_module_stack"].items()}
    if "val" in node.meta:
        meta["val"] = pytree.tree_map(_shape, node.meta["val"])
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: Reference(n.name))  # type: ignore[arg-type, return-value]
    target = Operator(str(node.target)) if isinstance(node.target, OpOverload) else node.target
    return NodeRecord(node.name, node.op, target, _plain(args), _plain(kwargs), meta)


def _shape(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        sizes = tuple(size_of(size) for size in value.shape)
        return None if None in sizes else Shape(sizes, value.dtype)  # type: ignore[arg-type]
    return value if isinstance(value, bool | int | float | str) else size_of(value)


def _empty(shape: Shape) -> torch.Tensor:
    return torch.empty(shape.sizes, dtype=shape.dtype, device="meta")


def _class_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _plain(value: Any) -> Any:
    """Turn fx's immutable collections into builtin ones."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, slice):
        return slice(_plain(value.start), _plain(value.stop), _plain(value.step))
    return MemoryFormat(str(value).removeprefix("torch.")) if isinstance(value, torch.memory_format) else value


def _map(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, Reference):
        return nodes[value.name]
    if isinstance(value, MemoryFormat):
        return getattr(torch, value.name)
    if isinstance(value, dict):
        return {key: _map(item, nodes) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, nodes) for item in value)
    if isinstance(value, slice):
        return slice(_map(value.start, nodes), _map(value.stop, nodes), _map(value.step, nodes))
    return value


def _operator(target: Any) -> str | Callable[..., Any]:
    if not isinstance(target, Operator):
        return target  # type: ignore[no-any-return]
    found: Any = torch.ops
    for part in target.name.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]
