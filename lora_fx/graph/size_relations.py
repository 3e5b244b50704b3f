"""Conditions on the sizes of inputs, as Python expressions over ``<input>.size(<dim>)``: read, evaluated and classified."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, reduce
from typing import Any, TypeVar

import torch

from lora_fx.errors import TraceError

UNBOUNDED = -1
"""Stands for "no upper bound" in a range (TorchScript has no optional list elements)."""


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


def as_guard(relation: str) -> str:
    """Rewrite a relation into a guard of torch.export, whose sources are the inputs by name."""
    return _SIZE.sub(r"L['\1'].size()[\2]", relation)


def renamed(relation: str, names: Mapping[str, str]) -> str:
    """Return the relation with other names for the inputs."""
    return _SIZE.sub(lambda size: f"{names.get(size[1], size[1])}.size({size[2]})", relation)


_SIZE = re.compile(r"\b(\w+)\.size\((\d+)\)")


def check_relation(relation: str) -> None:
    """Raise :class:`TraceError` where a relation is made of what neither this module nor a graph can compute."""
    unknown = [part for part in ast.walk(ast.parse(relation, mode="eval")) if not _is_known(part)]
    if unknown:
        raise TraceError(
            f"torch.export bound this trace by {relation!r}, of which {ast.unparse(unknown[0])!r} cannot be checked in a graph. "
            "Trace with dynamic= naming fewer dynamic dimensions."
        )


def _is_known(tree: ast.AST) -> bool:
    """Tell whether an expression is made of what relations know. Of others than expressions nothing is said."""
    match tree:
        case ast.BinOp(op=op) | ast.UnaryOp(op=op) | ast.BoolOp(op=op) | ast.Compare(ops=[op]):
            return type(op) in OPERATORS
        case ast.Call(func=ast.Name(id=function), args=[_, _], keywords=[]):
            return function in FUNCTIONS
        case ast.Call():
            return as_reference(tree) is not None
        case ast.Constant(value=value):
            return isinstance(value, int)
        case ast.Attribute() | ast.Name():  # within a reference
            return True
    return not isinstance(tree, ast.expr)


def as_bound(relation: str) -> tuple[str, int, int, int] | None:
    """Read a relation as a range of one dimension: (input, dim, low, high), or None if it is something else."""
    tree = ast.parse(relation, mode="eval").body
    if not (isinstance(tree, ast.Compare) and len(tree.ops) == 1):
        return None
    left, operation, right = tree.left, tree.ops[0], tree.comparators[0]
    if isinstance(left, ast.Constant):
        left, right, operation = right, left, _MIRRORED.get(type(operation), operation)
    reference = as_reference(left)
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
    found = (as_reference(tree) for tree in ast.walk(ast.parse(relation, mode="eval")) if isinstance(tree, ast.expr))
    return {reference for reference in found if reference is not None}


def holds(relation: str, sizes: Mapping[tuple[str, int], int]) -> bool:
    """Tell whether a relation holds for these sizes of its dimensions; one that divides by zero does not."""
    try:
        return bool(_compiled(relation)(sizes))
    except ZeroDivisionError:
        return False


Compute = Callable[[Mapping[tuple[str, int], int]], Any]


@cache  # asked of many sizes
def _compiled(relation: str) -> Compute:
    def apply(function: Callable[..., Any], operands: Sequence[Compute]) -> Compute:
        if len(operands) == 1:
            (only,) = operands
            return lambda sizes: function(only(sizes))
        first, second = operands
        return lambda sizes: function(first(sizes), second(sizes))

    def constant(value: int) -> Compute:
        return lambda _: value

    def size(name: str, dim: int) -> Compute:
        return operator.itemgetter((name, dim))

    return interpret(relation, size, constant, apply)


T = TypeVar("T")


def interpret(
    relation: str,
    size: Callable[[str, int], T],
    constant: Callable[[int], T],
    apply: Callable[[Callable[..., Any], Sequence[T]], T],
) -> T:
    """Compute a relation from its leaves up, whatever its values are: functions, nodes of a graph, values of a runtime.

    Args:
        relation: of what :func:`check_relation` admits.
        size: gives the value of the size of a dimension, from (input, dim).
        constant: that of a number.
        apply: that of one of ``OPERATORS`` or ``FUNCTIONS``, from its one or two operands.

    Raises:
        TraceError: the relation is made of something else.
    """

    def value(tree: ast.expr) -> T:
        reference = as_reference(tree)
        if reference is not None:
            return size(*reference)
        match tree:
            case ast.Constant(value=int() as number):
                return constant(number)
            case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]) if (
                type(op) in OPERATORS
            ):
                return apply(OPERATORS[type(op)], [value(left), value(right)])
            case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
                return apply(OPERATORS[type(op)], [value(operand)])
            case ast.BoolOp(op=op, values=values):
                return reduce(lambda left, right: apply(OPERATORS[type(op)], [left, right]), map(value, values))
            case ast.Call(func=ast.Name(id=function), args=[left, right], keywords=[]) if function in FUNCTIONS:
                return apply(FUNCTIONS[function], [value(left), value(right)])
        raise TraceError(
            f"torch.export bound this trace by a condition that cannot be checked: {ast.unparse(tree)}. "
            "Trace with dynamic= naming fewer dynamic dimensions."
        )

    return value(ast.parse(relation, mode="eval").body)


@cache
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

OPERATORS: Mapping[type[ast.AST], Callable[..., object]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
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
"""The operators of relations, as functions of numbers and of nodes alike."""

FUNCTIONS: Mapping[str, Callable[..., object]] = {"min": torch.sym_min, "max": torch.sym_max}
"""The functions of relations, as they are called in a graph."""


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


def as_reference(tree: ast.expr) -> tuple[str, int] | None:
    """Read ``<input>.size(<dim>)`` as (input, dim); None for any other expression."""
    match tree:
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id=name), attr="size"), args=[ast.Constant(value=int() as dim)]
        ):
            return name, dim
    return None
