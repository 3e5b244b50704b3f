"""Input checks at the head of a graph: no constraint that torch.export found is lost.

``torch.export`` establishes a range for every dynamic dimension, and a guard for every decision of the model's Python on a
shape. Here they become modules that are called on the inputs: unlike closures and hooks, modules survive copies, pickling,
scripting and compilation.

    ranges      one ``InputCheck`` per input: its dtype, its number of dimensions, and the range of each
    relations   ``sym_size`` and comparison nodes that end in a ``RelationCheck``: ``a.size(1) == b.size(1)``, divisibility
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from lora_fx.errors import InputError
from lora_fx.graph.erasing import erase_unread
from lora_fx.graph.signature import signature_of
from lora_fx.graph.size_relations import UNBOUNDED, Reference, Relation

PREFIX = "input_checks"
"""The module path below which a graph keeps its checks."""


class InputCheck(nn.Module):
    """Raise :class:`InputError` unless a tensor has the dtype, the rank and the sizes that the trace covers."""

    _is_impure = True  # keeps the call alive through dead-code elimination

    def __init__(self, name: str, dtype: torch.dtype, ranges: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.name = name
        self.dtype = dtype
        self.dtype_name = str(dtype)
        self.rank = len(ranges)
        self.low = [low for low, _ in ranges] or [0]  # TorchScript cannot infer the type of an empty list
        self.high = [high for _, high in ranges] or [0]

    def forward(self, value: torch.Tensor) -> None:
        """Check ``value``, a tensor whose shape lies within the ranges."""
        if value.dtype != self.dtype:
            raise InputError(
                f"input '{self.name}' has dtype {value.dtype}, expected {self.dtype_name} as in the trace. "
                "Cast it, or trace again with example_inputs of this dtype."
            )
        if value.dim() != self.rank:
            raise InputError(
                f"input '{self.name}' has {value.dim()} dimensions, expected {self.rank} as in the trace. "
                "Reshape it, or trace again with example_inputs of this shape."
            )
        for dim in range(self.rank):
            low, high = self.low[dim], self.high[dim]
            size = value.size(dim)
            if size < low or (high != -1 and size > high):
                covered = f"{low} or more" if high == -1 else f"{low} to {high}" if low != high else f"{low} alone"
                raise InputError(
                    f"input '{self.name}' has size {size} in dimension {dim}, expected {covered}, which the trace covers. "
                    "For other sizes the model computes something else, or fails; a recurrent layer is traced for one length. "
                    "Trace again with example_inputs of this size."
                )

    def extra_repr(self) -> str:
        """Return the checked condition, for the printed module."""
        return f"{self.name}: {self.dtype_name}, {list(_ranges(self))}"


def _ranges(check: InputCheck) -> tuple[tuple[int, int], ...]:
    return tuple(zip(check.low, check.high, strict=True))[: check.rank]


class RelationCheck(nn.Module):
    """Raise :class:`InputError` unless a relation between input sizes holds."""

    _is_impure = True

    def __init__(self, relation: str) -> None:
        super().__init__()
        self.relation = relation
        self.sizes = [f"{name}.size({dim})" for name, dim in Relation(relation).ordered_references]
        equal = Relation(relation).equal_sizes is not None
        self.advice = "Pass inputs of equal sizes" if equal else "Trace again with example_inputs of these sizes"

    def forward(self, holds: bool, sizes: list[int]) -> None:
        """Check that the relation, computed by nodes of the graph, holds; the sizes are those in it, for the message."""
        if not holds:
            found = [f"{self.sizes[index]} = {size}" for index, size in enumerate(sizes)]
            raise InputError(
                f"expected input sizes with {self.relation}, which the trace covers, got {', '.join(found)}. {self.advice}."
            )

    def extra_repr(self) -> str:
        """Return the checked condition, for the printed module."""
        return self.relation


@dataclass(frozen=True)
class Constraints:
    """The inputs that a trace covers.

    Attributes:
        ranges: input → (lowest, highest) size of each dimension; ``UNBOUNDED`` where there is no highest.
        dtypes: input → dtype.
        relations: conditions on sizes that are no ranges.
    """

    ranges: Mapping[str, tuple[tuple[int, int], ...]]
    dtypes: Mapping[str, torch.dtype]
    relations: tuple[Relation, ...] = ()

    def intersection(self, other: Constraints) -> Constraints:
        """Return the constraints on inputs that both cover."""
        ranges = {
            name: tuple(_intersect(a, b) for a, b in zip(dims, other.ranges[name], strict=True))
            for name, dims in self.ranges.items()
        }
        return Constraints(ranges, self.dtypes, tuple(dict.fromkeys(self.relations + other.relations)))

    def renamed(self, names: Mapping[str, str]) -> Constraints:
        """Return the same for inputs of these names, in their order: all of its inputs, by the names that they had."""
        return Constraints(
            {new: self.ranges[old] for old, new in names.items()},
            {new: self.dtypes[old] for old, new in names.items()},
            tuple(relation.renamed(names) for relation in self.relations),
        )

    def fixed_sizes(self) -> tuple[Relation, ...]:
        """Return the sizes that do not vary, as relations."""
        return tuple(
            Relation(f"{name}.size({dim}) == {low}")
            for name, ranges in self.ranges.items()
            for dim, (low, high) in enumerate(ranges)
            if low == high
        )

    @cached_property
    def conditions(self) -> tuple[Relation, ...]:
        """The ranges of sizes that vary, and all relations, as relations; of equal sizes the first alone has a range."""
        equal = [relation.equal_sizes for relation in self.relations if relation.equal_sizes is not None]
        first = {size: sizes[0] for sizes in equal for size in sizes}
        varying: dict[Reference, tuple[int, int]] = {}
        for name, ranges in self.ranges.items():
            for dim, (low, high) in enumerate(ranges):
                if low != high:
                    size = first.get((name, dim), (name, dim))
                    varying[size] = _intersect(varying.get(size, (low, high)), (low, high))
        bounds = []
        for (name, dim), (low, high) in varying.items():
            bounds += [Relation(f"{name}.size({dim}) >= {low}")] if low > 0 else []
            bounds += [Relation(f"{name}.size({dim}) <= {high}")] if high != UNBOUNDED else []
        return (*bounds, *self.relations)


def add_checks(graph: fx.Graph, constraints: Constraints) -> dict[str, nn.Module]:
    """Insert the checks behind the placeholders of ``graph`` (in place) and return the modules to register.

    An input that may be left out has none.

    Raises:
        TraceError: a relation uses an operator that has no counterpart in a graph.
    """
    signature = signature_of(graph)
    placeholders = dict(zip(signature.inputs, graph.find_nodes(op="placeholder"), strict=True))
    modules: dict[str, nn.Module] = {}
    with graph.inserting_before(_first_computation(graph)):
        for index, (name, ranges) in enumerate(constraints.ranges.items()):
            if name in signature.omissible:  # a number may have any shape and dtype that the model divides by
                continue
            target = f"{PREFIX}.input_{index}"  # the name of the input may be that of another attribute
            modules[target] = InputCheck(name, constraints.dtypes[name], ranges)
            graph.call_module(target, (placeholders[name],))
    return modules | add_relation_checks(graph, constraints.relations, f"{PREFIX}.relation")


def add_relation_checks(graph: fx.Graph, relations: Sequence[Relation], path: str) -> dict[str, nn.Module]:
    """Insert checks of relations behind the placeholders of ``graph`` (in place) and return the modules to register, by numbered paths.

    Raises:
        TraceError: a relation uses an operator that has no counterpart in a graph.
    """
    placeholders = dict(zip(signature_of(graph).inputs, graph.find_nodes(op="placeholder"), strict=True))
    modules: dict[str, nn.Module] = {}
    emitter = _RelationEmitter(graph, placeholders)
    with graph.inserting_before(_behind_checks(graph)):
        for index, relation in enumerate(relations):
            target = f"{path}_{index}"
            modules[target] = RelationCheck(relation.text)
            sizes = [emitter.size(*reference) for reference in relation.ordered_references]
            graph.call_module(target, (emitter.emit(relation), sizes))
    return modules


def remove_checks(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Constraints:
    """Remove the checks from ``graph`` (in place) and return the constraints that they checked.

    Args:
        graph: as :func:`add_checks` left it, or rewritten since.
        modules: the called modules by name, the checks among them.
    """
    ranges: dict[str, tuple[tuple[int, int], ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    relations: list[Relation] = []
    for node in list(graph.nodes):
        check = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(check, InputCheck):
            ranges[check.name] = _ranges(check)
            dtypes[check.name] = check.dtype
        elif isinstance(check, RelationCheck):
            relations.append(Relation(check.relation))
        else:
            continue
        erase_unread(graph, node)
    return Constraints(ranges, dtypes, tuple(relations))


class _RelationEmitter:
    """Emitter of relations as nodes; equal sub-expressions become one node."""

    def __init__(self, graph: fx.Graph, placeholders: Mapping[str, fx.Node]) -> None:
        self._graph = graph
        self._placeholders = placeholders
        self._emitted: dict[tuple[Any, ...], fx.Node] = {}

    def emit(self, relation: Relation) -> Any:
        return relation.interpret(self.size, int, self._call)

    def size(self, name: str, dim: int) -> fx.Node:
        return self._call(torch.ops.aten.sym_size.int, (self._placeholders[name], dim))

    def _call(self, function: Callable[..., Any], operands: Sequence[Any]) -> fx.Node:
        key = (function, *operands)
        if key not in self._emitted:
            self._emitted[key] = self._graph.call_function(function, tuple(operands))
        return self._emitted[key]


def _intersect(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    highs = [high for _, high in (a, b) if high != UNBOUNDED]
    return max(a[0], b[0]), min(highs, default=UNBOUNDED)


def _behind_checks(graph: fx.Graph) -> fx.Node:
    """Return the first computation that is no check."""
    first: fx.Node = next(
        node
        for node in graph.nodes
        if node.op not in ("placeholder", "get_attr") and not str(node.target).startswith(f"{PREFIX}.")
    )
    return first


def _first_computation(graph: fx.Graph) -> fx.Node:
    first: fx.Node = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    return first
