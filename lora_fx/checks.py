"""What a trace holds for, as nodes at the head of its graph: no constraint that torch.export found is lost.

``torch.export`` establishes a range for every dynamic dimension, and guards for every decision that the model's Python
took on a shape. Here they become modules that are called on the inputs. Modules, because those survive copies, pickling,
scripting and compilation, where a closure or a hook would not.

    ranges      one ``InputCheck`` an input: its dtype, its number of dimensions, and the range of each
    relations   ``sym_size`` and comparison nodes that end in a ``RelationCheck``: ``a.size(1) == b.size(1)``, divisibility
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import fx, nn

from lora_fx.errors import InputError, TraceError
from lora_fx.graph_module import erase_unread

UNBOUNDED = -1
"""Stands for "no upper bound" in a range (TorchScript has no optional list elements)."""

PREFIX = "input_checks"
"""The module path below which a graph keeps its checks."""


class InputCheck(nn.Module):
    """Raise :class:`InputError` unless a tensor has the dtype, the rank and the sizes that the trace holds for."""

    _is_impure = True  # keeps the call alive through dead-code elimination

    def __init__(self, name: str, dtype: torch.dtype, ranges: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.name = name
        self.dtype = dtype
        self.dtype_name = str(dtype)
        self.low = [low for low, _ in ranges]
        self.high = [high for _, high in ranges]

    def forward(self, value: torch.Tensor) -> None:
        """Check ``value``, a tensor whose shape lies within the ranges."""
        if value is None:
            raise InputError(
                f"input '{self.name}' was left out, and the graph was traced with it. Pass it, "
                "or trace again with example_inputs that leave it out too."
            )
        if value.dtype != self.dtype:
            raise InputError(
                f"input '{self.name}' has dtype {value.dtype}, and the graph was traced with {self.dtype_name}. "
                "Cast it, or trace again with example_inputs of this dtype."
            )
        if value.dim() != len(self.low):
            raise InputError(
                f"input '{self.name}' has {value.dim()} dimensions, and the graph was traced with {len(self.low)}. "
                "Reshape it, or trace again with example_inputs of this shape."
            )
        for dim, (low, high) in enumerate(zip(self.low, self.high, strict=False)):  # TorchScript knows no strict=True
            size = value.size(dim)
            if size < low or (high != -1 and size > high):
                covered = f"{low} or more" if high == -1 else f"{low} to {high}" if low != high else f"{low} alone"
                raise InputError(
                    f"input '{self.name}' has size {size} in dimension {dim}, and the trace holds for {covered}. "
                    "Beyond that the model computes something else, or fails. Trace again with example_inputs of this size."
                )

    def extra_repr(self) -> str:
        """Show what is checked where the module is printed."""
        return f"{self.name}: {self.dtype_name}, {list(zip(self.low, self.high, strict=True))}"


class RelationCheck(nn.Module):
    """Raise :class:`InputError` unless a relation between input sizes holds."""

    _is_impure = True

    def __init__(self, relation: str) -> None:
        super().__init__()
        self.relation = relation

    def forward(self, holds: bool) -> None:
        """Check that the relation, computed by nodes of the graph, holds."""
        if not holds:
            raise InputError(
                f"the trace holds for inputs with {self.relation}, and these sizes do not satisfy it. Trace again with example_inputs of these sizes."
            )

    def extra_repr(self) -> str:
        """Show what is checked where the module is printed."""
        return self.relation


@dataclass(frozen=True)
class Constraints:
    """What the trace holds for.

    Attributes:
        ranges: input → (lowest, highest) size of each dimension; ``UNBOUNDED`` where there is no highest.
        dtypes: input → dtype.
        relations: conditions on sizes, as Python expressions over ``<input>.size(<dim>)``.
    """

    ranges: Mapping[str, tuple[tuple[int, int], ...]]
    dtypes: Mapping[str, torch.dtype]
    relations: tuple[str, ...] = ()

    def intersection(self, other: Constraints) -> Constraints:
        """Return what both hold for."""
        ranges = {
            name: tuple(_intersect(a, b) for a, b in zip(dims, other.ranges[name], strict=True))
            for name, dims in self.ranges.items()
        }
        return Constraints(ranges, self.dtypes, tuple(dict.fromkeys(self.relations + other.relations)))


def add_checks(graph: fx.Graph, constraints: Constraints) -> dict[str, nn.Module]:
    """Insert the checks behind the placeholders of ``graph`` (in place) and return the modules to register.

    Raises:
        TraceError: a relation uses an operator that has no counterpart in a graph.
    """
    placeholders = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    modules: dict[str, nn.Module] = {}
    with graph.inserting_before(_first_computation(graph)):
        for name, ranges in constraints.ranges.items():
            target = f"{PREFIX}.{name}"
            modules[target] = InputCheck(name, constraints.dtypes[name], ranges)
            graph.call_module(target, (placeholders[name],))
        emitter = _RelationEmitter(graph, placeholders)
        for index, relation in enumerate(constraints.relations):
            target = f"{PREFIX}.relation_{index}"
            modules[target] = RelationCheck(relation)
            graph.call_module(target, (emitter.emit(relation),))
    return modules


def remove_checks(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Constraints:
    """Remove the checks from ``graph`` (in place) and return what they checked.

    Args:
        graph: as :func:`add_checks` left it, or rewritten since.
        modules: the called modules by name, the checks among them.
    """
    ranges: dict[str, tuple[tuple[int, int], ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    relations: list[str] = []
    for node in list(graph.nodes):
        check = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(check, InputCheck):
            ranges[check.name] = tuple(zip(check.low, check.high, strict=True))
            dtypes[check.name] = check.dtype
        elif isinstance(check, RelationCheck):
            relations.append(check.relation)
        else:
            continue
        erase_unread(graph, node)
    return Constraints(ranges, dtypes, tuple(relations))


def parse_guard(guard: str, paths: Mapping[str, str]) -> str:
    """Rewrite a guard of torch.export into a relation over ``<input>.size(<dim>)``.

    Args:
        guard: such as ``L['x'].size()[1] <= 16``.
        paths: source of an input in guards (``L['x']``) → its name.

    Raises:
        TraceError: the guard speaks of something else than the sizes of the inputs.
    """
    tree = _SizeReferences(paths).visit(ast.parse(guard, mode="eval"))
    return ast.unparse(ast.fix_missing_locations(tree))


def as_bound(relation: str) -> tuple[str, int, int, int] | None:
    """Read a relation as a range of one dimension: (input, dim, low, high), or None if it is something else."""
    tree = ast.parse(relation, mode="eval").body
    if not (isinstance(tree, ast.Compare) and len(tree.ops) == 1):
        return None
    left, operation, right = tree.left, tree.ops[0], tree.comparators[0]
    if isinstance(left, ast.Constant):
        left, right, operation = right, left, _MIRRORED.get(type(operation), operation)
    reference = _as_reference(left)
    if reference is None or not (isinstance(right, ast.Constant) and isinstance(right.value, int)):
        return None
    bound = right.value
    match operation:
        case ast.LtE():
            return (*reference, 0, bound)
        case ast.Lt():
            return (*reference, 0, bound - 1)
        case ast.GtE():
            return (*reference, bound, UNBOUNDED)
        case ast.Gt():
            return (*reference, bound + 1, UNBOUNDED)
        case ast.Eq():
            return (*reference, bound, bound)
        case _:
            return None


def references(relation: str) -> set[tuple[str, int]]:
    """Return the dimensions that a relation speaks of, as (input, dim)."""
    found = (_as_reference(tree) for tree in ast.walk(ast.parse(relation, mode="eval")) if isinstance(tree, ast.expr))
    return {reference for reference in found if reference is not None}


def holds(relation: str, sizes: Mapping[tuple[str, int], int]) -> bool:
    """Tell whether a relation holds for these sizes of its dimensions; one that divides by zero does not."""

    def compute(tree: ast.expr) -> Any:
        reference = _as_reference(tree)
        if reference is not None:
            return sizes[reference]
        match tree:
            case ast.Constant(value=value):
                return value
            case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
                return _OPERATORS[type(op)](compute(left), compute(right))
            case ast.UnaryOp(op=op, operand=operand):
                return _OPERATORS[type(op)](compute(operand))
            case ast.BoolOp(op=op, values=values):
                return reduce(_OPERATORS[type(op)], map(compute, values))
            case ast.Call(func=ast.Name(id=function), args=arguments):
                return {"min": min, "max": max}[function](*map(compute, arguments))
        raise TraceError(f"not a relation between sizes: {ast.unparse(tree)}")

    try:
        return bool(compute(ast.parse(relation, mode="eval").body))
    except ZeroDivisionError:
        return False


def excludes(relation: str) -> bool:
    """Tell whether a relation excludes single values: ``… != …``."""
    tree = ast.parse(relation, mode="eval").body
    return isinstance(tree, ast.Compare) and len(tree.ops) == 1 and isinstance(tree.ops[0], ast.NotEq)


_MIRRORED: Mapping[type[ast.cmpop], ast.cmpop] = {
    ast.Lt: ast.Gt(),
    ast.Gt: ast.Lt(),
    ast.LtE: ast.GtE(),
    ast.GtE: ast.LtE(),
}

_OPERATORS: Mapping[type[ast.AST], Callable[..., object]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Or: operator.or_,
    ast.And: operator.and_,
}
_FUNCTIONS: Mapping[str, Callable[..., object]] = {"min": torch.sym_min, "max": torch.sym_max}


class _RelationEmitter:
    """Emits a relation as nodes; equal sub-expressions are emitted once."""

    def __init__(self, graph: fx.Graph, placeholders: Mapping[str, fx.Node]) -> None:
        self._graph = graph
        self._placeholders = placeholders
        self._emitted: dict[str, fx.Node] = {}

    def emit(self, relation: str) -> fx.node.Argument:
        return self._expression(ast.parse(relation, mode="eval").body)

    def _expression(self, tree: ast.expr) -> fx.node.Argument:
        if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
            return tree.value
        source = ast.unparse(tree)
        if source not in self._emitted:
            self._emitted[source] = self._compute(tree)
        return self._emitted[source]

    def _compute(self, tree: ast.expr) -> fx.Node:
        reference = _as_reference(tree)
        if reference is not None:
            name, dim = reference
            return self._graph.call_function(torch.ops.aten.sym_size.int, (self._placeholders[name], dim))
        match tree:
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return self._call(_OPERATORS[type(op)], left, right)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
                return self._call(_OPERATORS[type(op)], operand)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
                return self._call(_OPERATORS[type(op)], left, right)
            case ast.BoolOp(op=op, values=[first, *rest]):
                node = self._expression(first)
                for value in rest:
                    node = self._graph.call_function(_OPERATORS[type(op)], (node, self._expression(value)))
                assert isinstance(node, fx.Node)
                return node
            case ast.Call(func=ast.Name(id=function), args=[left, right], keywords=[]) if function in _FUNCTIONS:
                return self._call(_FUNCTIONS[function], left, right)
        raise TraceError(
            f"torch.export bound this trace by a condition that cannot be checked in a graph: {ast.unparse(tree)}. "
            "Trace with dynamic= naming fewer dynamic dimensions."
        )

    def _call(self, function: Callable[..., object], *operands: ast.expr) -> fx.Node:
        return self._graph.call_function(function, tuple(self._expression(operand) for operand in operands))


class _SizeReferences(ast.NodeTransformer):
    """Rewrites ``L['x'].size()[1]`` to ``x.size(1)``."""

    def __init__(self, paths: Mapping[str, str]) -> None:
        self._paths = paths

    def visit_Subscript(self, tree: ast.Subscript) -> ast.AST:
        match tree:
            case ast.Subscript(
                value=ast.Call(func=ast.Attribute(value=source, attr="size"), args=[]),
                slice=ast.Constant(value=int() as dim),
            ):
                name = self._paths.get(ast.unparse(source))
                if name is not None:
                    return ast.parse(f"{name}.size({dim})", mode="eval").body
        raise TraceError(
            f"torch.export bound this trace by {ast.unparse(tree)!r}, which is not the size of an input. Pass fewer kinds of inputs."
        )


def _as_reference(tree: ast.expr) -> tuple[str, int] | None:
    match tree:
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id=name), attr="size"), args=[ast.Constant(value=int() as dim)]
        ):
            return name, dim
    return None


def _intersect(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    highs = [high for _, high in (a, b) if high != UNBOUNDED]
    return max(a[0], b[0]), min(highs, default=UNBOUNDED)


def _first_computation(graph: fx.Graph) -> fx.Node:
    first: fx.Node = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    return first
