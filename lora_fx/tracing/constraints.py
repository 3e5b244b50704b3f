"""What torch.export established about a trace → :class:`~lora_fx.graph.input_checks.Constraints`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Mapping

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from lora_fx.errors import TraceError
from lora_fx.graph.input_checks import Constraints
from lora_fx.graph.size_relations import UNBOUNDED, as_bound, check_relation, parse_guard

Range = tuple[int, int]


def constraints_of(program: torch.export.ExportedProgram, graph: fx.Graph, signature: inspect.Signature) -> Constraints:
    """Return the ranges, equalities and guards under which the trace computes what the model computes.

    Args:
        program: the exported program.
        graph: its graph, with the placeholders that remained.
        signature: of the ``forward`` that was exported.

    Raises:
        TraceError: torch.export bound the trace by something that is not a condition on input sizes.
    """
    placeholders = {
        str(node.target): node.meta["val"]
        for node in graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), torch.Tensor)
    }
    ranges: dict[str, list[Range]] = {}
    relations: list[str] = []
    source: dict[sympy.Expr, str] = {}
    derived: list[tuple[str, sympy.Expr]] = []
    for name, fake in placeholders.items():
        ranges[name] = []
        for dim, size in enumerate(fake.shape):
            reference = f"{name}.size({dim})"
            if isinstance(size, int):
                ranges[name].append((size, size))
                continue
            expression = size.node.expr
            ranges[name].append(_range(program, expression))
            if expression in source:
                relations.append(f"{source[expression]} == {reference}")
            elif isinstance(expression, sympy.Symbol):
                source[expression] = reference
            else:
                derived.append((reference, expression))
    relations += [_derived(reference, expression, source) for reference, expression in derived]
    paths = _paths(program, signature)
    relations += [parse_guard(guard, paths) for guard in program._guards_code]
    for relation in relations:
        check_relation(relation)
        bound = as_bound(relation)
        if bound is not None:
            name, dim, low, high = bound
            ranges[name][dim] = _tighten(ranges[name][dim], low, high)
    dtypes = {name: fake.dtype for name, fake in placeholders.items()}
    remaining = [relation for relation in relations if as_bound(relation) is None]
    return Constraints({name: tuple(dims) for name, dims in ranges.items()}, dtypes, _independent(remaining))


def _range(program: torch.export.ExportedProgram, expression: sympy.Expr) -> Range:
    bounds = program.range_constraints.get(expression)
    if bounds is None:
        return 1, UNBOUNDED
    high = bounds.upper
    return int(bounds.lower), UNBOUNDED if not high.is_finite or high >= 2**62 else int(high)


def _tighten(current: Range, low: int, high: int) -> Range:
    highs = [value for value in (current[1], high) if value != UNBOUNDED]
    return max(current[0], low), min(highs, default=UNBOUNDED)


def _derived(reference: str, expression: sympy.Expr, source: Mapping[sympy.Expr, str]) -> str:
    """Express that a size is ``a·s + b``: equal to that of another size ``s``, or, if nothing else has size ``s``, divisible."""
    unknown = [symbol for symbol in expression.free_symbols if symbol not in source]
    if not unknown:
        names = {symbol: sympy.Symbol(source[symbol]) for symbol in expression.free_symbols}
        return f"{reference} == {expression.xreplace(names)}"
    if len(expression.free_symbols) == 1 and sympy.degree(expression, unknown[0]) == 1:
        factor, offset = expression.coeff(unknown[0], 1), expression.coeff(unknown[0], 0)
        return f"({reference} - {offset}) % {factor} == 0"
    raise TraceError(
        f"torch.export made {reference} depend on others as {expression}, which cannot be checked. Trace with fewer dynamic dimensions (dynamic=)."
    )


def _paths(program: torch.export.ExportedProgram, signature: inspect.Signature) -> dict[str, str]:
    """Map the sources that guards speak of (``L['x']``, ``L['args'][0]``, ``L['flat_args'][2]``) to placeholder names."""
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    leaves, spec = pytree.tree_flatten(program.example_inputs)
    assert len(leaves) == len(names)
    args, kwargs = pytree.tree_unflatten(names, spec)
    paths: dict[str, str] = {f"L['flat_args'][{index}]": name for index, name in enumerate(names)}
    for arguments in (signature.bind(*args, **kwargs).arguments, {"kwargs": kwargs}, kwargs):
        for path, name in pytree.tree_leaves_with_path(dict(arguments)):
            paths[f"L{pytree.keystr(path)}"] = name
    return {ast.unparse(ast.parse(source, mode="eval")): name for source, name in paths.items()}


def _independent(relations: Iterable[str]) -> tuple[str, ...]:
    """Drop what follows from the equalities between sizes: torch.export records many consequences of one fact."""
    equal = _Equalities()
    kept: list[str] = []
    others: list[str] = []
    for relation in dict.fromkeys(relations):
        sides = _equal_sizes(relation)
        if sides is None:
            others.append(relation)
        elif equal.join(*sides):
            kept.append(relation)
    seen: set[object] = set()
    for relation in others:
        meaning = _as_sympy(ast.parse(relation, mode="eval").body, equal)
        if meaning is sympy.true or (meaning is not None and meaning in seen):
            continue
        seen.add(meaning)
        kept.append(relation)
    return tuple(kept)


class _Equalities:
    """Union-find over size references."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, name: str) -> str:
        while name in self._parent:
            name = self._parent[name]
        return name

    def join(self, a: str, b: str) -> bool:
        """Make two references equal; tell whether that was news."""
        a, b = self.find(a), self.find(b)
        if a == b:
            return False
        self._parent[b] = a
        return True


def _equal_sizes(relation: str) -> tuple[str, str] | None:
    match ast.parse(relation, mode="eval").body:
        case ast.Compare(left=ast.Call() as left, ops=[ast.Eq()], comparators=[ast.Call() as right]) if _is_size(
            left
        ) and _is_size(right):
            return ast.unparse(left), ast.unparse(right)
    return None


def _is_size(tree: ast.Call) -> bool:
    return isinstance(tree.func, ast.Attribute) and tree.func.attr == "size"


def _as_sympy(tree: ast.expr, equal: _Equalities) -> sympy.Basic | None:
    """Return the meaning of a relation over positive integers, or None where it has no simple one."""
    match tree:
        case ast.Constant(value=int() as value):
            return sympy.Integer(value)
        case ast.Call() if _is_size(tree):
            return sympy.Symbol(equal.find(ast.unparse(tree)), integer=True, positive=True)
        case ast.BinOp(left=left, op=op, right=right):
            operands = _as_sympy(left, equal), _as_sympy(right, equal)
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            operands = _as_sympy(left, equal), _as_sympy(right, equal)
        case ast.BoolOp(op=ast.Or(), values=[left, right]):
            arms = _as_sympy(left, equal), _as_sympy(right, equal)
            return sympy.true if sympy.true in arms else None
        case _:
            return None
    if operands[0] is None or operands[1] is None or type(op) not in _SYMPY:
        return None
    return _SYMPY[type(op)](*operands)


_SYMPY = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: sympy.floor(a / b),
    ast.Mod: sympy.Mod,
    ast.Eq: sympy.Eq,
    ast.NotEq: sympy.Ne,
    ast.Lt: sympy.Lt,
    ast.LtE: sympy.Le,
    ast.Gt: sympy.Gt,
    ast.GtE: sympy.Ge,
}
