"""Relations: conditions on the sizes of inputs, Python expressions over ``<input>.size(<dim>)`` that are parsed once."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import pairwise
from typing import Any, TypeVar

import torch

from lora_fx.errors import TraceError

UNBOUNDED = -1
"""Stands for "no upper bound" in a range (TorchScript has no optional list elements)."""

Reference = tuple[str, int]
"""A size: the name of an input, and one of its dimensions."""

Compute = Callable[[Mapping[Reference, int]], Any]

T = TypeVar("T")


@dataclass(frozen=True)
class Relation:
    """A condition on the sizes of inputs. Two are equal if their texts are.

    Attributes:
        text: such as ``a.size(1) == b.size(1)``; graphs and files store relations as texts.
    """

    text: str

    @classmethod
    def from_guard(cls, guard: str, paths: Mapping[str, str]) -> Relation:
        """Read a guard of torch.export.

        Args:
            guard: such as ``L['x'].size()[1] <= 16``.
            paths: source of an input in guards (``L['x']``) → its name.

        Raises:
            TraceError: the guard refers to anything but sizes of inputs.
        """
        tree = _SizeReferences(paths).visit(ast.parse(guard, mode="eval"))
        return cls(ast.unparse(ast.fix_missing_locations(tree)))

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[type[Relation], tuple[str]]:
        return Relation, (self.text,)  # without cached values, some of which do not pickle

    @property
    def guard(self) -> str:
        """The relation as a guard of torch.export, whose sources are the inputs by name."""
        return _SIZE.sub(r"L['\1'].size()[\2]", self.text)

    def renamed(self, names: Mapping[str, str]) -> Relation:
        """Return the relation with other names for the inputs."""
        return Relation(_SIZE.sub(lambda size: f"{names.get(size[1], size[1])}.size({size[2]})", self.text))

    def check_supported(self) -> None:
        """Raise :class:`TraceError` unless a graph can compute the relation."""
        unknown = [part for part in ast.walk(self._tree) if not _is_known(part)]
        if unknown:
            raise TraceError(
                f"torch.export bound this trace by {_cut(self.text)!r}, of which {_cut(ast.unparse(unknown[0]))!r} cannot be checked in a graph. "
                "Trace with dynamic= naming fewer dynamic dimensions."
            )

    @cached_property
    def bound(self) -> tuple[str, int, int, int] | None:
        """The relation as a range of one dimension: (input, dim, low, high), or None if it is anything else."""
        if self._comparison is None:
            return None
        left, operation, right = self._comparison
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

    @cached_property
    def references(self) -> frozenset[Reference]:
        """The sizes to which the relation refers."""
        found = (_as_reference(tree) for tree in ast.walk(self._tree) if isinstance(tree, ast.expr))
        return frozenset(reference for reference in found if reference is not None)

    @property
    def ordered_references(self) -> tuple[Reference, ...]:
        """The sizes to which the relation refers, in the order of its text."""
        return tuple(dict.fromkeys((found[1], int(found[2])) for found in _SIZE.finditer(self.text)))

    @cached_property
    def functions(self) -> frozenset[str]:
        """The names of the functions that it calls, of ``FUNCTIONS``."""
        calls = (tree.func for tree in ast.walk(self._tree) if isinstance(tree, ast.Call))
        return frozenset(function.id for function in calls if isinstance(function, ast.Name))

    @cached_property
    def equal_sizes(self) -> tuple[Reference, ...] | None:
        """The sizes that the relation declares equal, two or more, or None if it is anything else."""
        match self._tree:
            case ast.Compare(left=left, ops=operations, comparators=others):
                sizes = [size for each in (left, *others) if (size := _as_reference(each)) is not None]
                equal = all(isinstance(operation, ast.Eq) for operation in operations)
                return tuple(sizes) if equal and len(sizes) == len(others) + 1 else None
        return None

    @classmethod
    def of_equal_sizes(cls, sizes: Sequence[Reference]) -> Relation:
        """Return the relation that two sizes or more are equal."""
        return cls(" == ".join(f"{name}.size({dim})" for name, dim in sizes))

    @classmethod
    def of_sum(cls, size: Reference, added: Sequence[Reference]) -> Relation:
        """Return the relation that a size is the sum of others."""
        whole, *parts = (f"{name}.size({dim})" for name, dim in (size, *added))
        return cls(f"{whole} == {' + '.join(parts)}")

    @property
    def is_exclusion(self) -> bool:
        """Whether it excludes single values: ``… != …``."""
        return self._comparison is not None and isinstance(self._comparison[1], ast.NotEq)

    def holds(self, sizes: Mapping[Reference, int]) -> bool:
        """Tell whether the relation holds for these sizes; where it divides by zero it does not."""
        try:
            return bool(self._compute(sizes))
        except ZeroDivisionError:
            return False

    def interpret(
        self,
        size: Callable[[str, int], T],
        constant: Callable[[int], T],
        apply: Callable[[Callable[..., Any], Sequence[T]], T],
    ) -> T:
        """Compute the relation from its leaves up; values may be functions, nodes of a graph, or values of a runtime.

        Args:
            size: returns the value of the size of a dimension, from (input, dim).
            constant: returns that of a number.
            apply: returns that of one of ``OPERATORS`` or ``FUNCTIONS``, from its one or two operands.

        Raises:
            TraceError: :meth:`check_supported` refuses the relation.
        """

        def value(tree: ast.expr) -> T:
            reference = _as_reference(tree)
            if reference is not None:
                return size(*reference)
            match tree:
                case ast.Constant(value=int() as number):
                    return constant(number)
                case (
                    ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right])
                ) if type(op) in OPERATORS:
                    return apply(OPERATORS[type(op)], [value(left), value(right)])
                case ast.Compare(left=left, ops=operations, comparators=others) if all(
                    type(op) in OPERATORS for op in operations
                ):
                    sides = [value(side) for side in (left, *others)]
                    links = [
                        apply(OPERATORS[type(op)], pair) for op, pair in zip(operations, pairwise(sides), strict=True)
                    ]
                    return reduce(lambda left, right: apply(operator.and_, [left, right]), links)
                case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
                    return apply(OPERATORS[type(op)], [value(operand)])
                case ast.BoolOp(op=op, values=values):
                    return reduce(lambda left, right: apply(OPERATORS[type(op)], [left, right]), map(value, values))
                case ast.Call(func=ast.Name(id=function), args=[_, _, *_] as operands, keywords=[]) if (
                    function in FUNCTIONS
                ):
                    return reduce(lambda left, right: apply(FUNCTIONS[function], [left, right]), map(value, operands))
            raise TraceError(
                f"torch.export bound this trace by a condition that cannot be checked: {_cut(ast.unparse(tree))}. "
                "Trace with dynamic= naming fewer dynamic dimensions."
            )

        return value(self._tree)

    @cached_property
    def _tree(self) -> ast.expr:
        return ast.parse(self.text, mode="eval").body

    @property
    def _comparison(self) -> tuple[ast.expr, ast.cmpop, ast.expr] | None:
        """The two sides and the operator of a single comparison."""
        match self._tree:
            case ast.Compare(left=left, ops=[operation], comparators=[right]):
                return left, operation, right
        return None

    @cached_property
    def _compute(self) -> Compute:
        """A closure, since a relation is evaluated for many sizes."""

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

        return self.interpret(size, constant, apply)


_SIZE = re.compile(r"\b(\w+)\.size\((\d+)\)")


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"


_MAX_TEXT = 160  # of a condition in a message; windows and pools give thousands of characters


def _is_known(tree: ast.AST) -> bool:
    """Tell whether relations may contain a node of a syntax tree; operators and contexts, which are no expressions, may be there."""
    match tree:
        case ast.BinOp(op=op) | ast.UnaryOp(op=op) | ast.BoolOp(op=op):
            return type(op) in OPERATORS
        case ast.Compare(ops=operations):
            return all(type(op) in OPERATORS for op in operations)
        case ast.Call(func=ast.Name(id=function), args=[_, _, *_], keywords=[]):
            return function in FUNCTIONS
        case ast.Call():
            return _as_reference(tree) is not None
        case ast.Constant(value=value):
            return isinstance(value, int)
        case ast.Attribute() | ast.Name():  # within a reference
            return True
    return not isinstance(tree, ast.expr)


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


def _as_reference(tree: ast.expr) -> Reference | None:
    """Read ``<input>.size(<dim>)``; None for any other expression."""
    match tree:
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id=name), attr="size"), args=[ast.Constant(value=int() as dim)]
        ):
            return name, dim
    return None
