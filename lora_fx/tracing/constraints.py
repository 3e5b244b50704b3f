"""Constraints of a trace, read from the ranges, symbolic sizes and guards of torch.export."""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from lora_fx.errors import TraceError
from lora_fx.graph.example_sizes import SUM
from lora_fx.graph.input_checks import Constraints
from lora_fx.graph.size_relations import UNBOUNDED, Reference, Relation
from lora_fx.torch_internals import pytree

Range = tuple[int, int]


def constraints_of(
    program: torch.export.ExportedProgram,
    graph: fx.Graph,
    signature: inspect.Signature,
    axes: Mapping[str, Sequence[str | None]] | None = None,
) -> Constraints:
    """Return the ranges, equalities and guards under which the trace computes what the model computes.

    Args:
        program: the exported program.
        graph: its graph, with the placeholders that remained.
        signature: of the ``forward`` that was exported.
        axes: input → names of its dimensions. If one is a sum, the inputs vary together as these names say, which becomes part of
            the constraints.

    Raises:
        TraceError: torch.export bound the trace by anything but conditions on input sizes.
    """
    placeholders = {
        str(node.target): node.meta["val"]
        for node in graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), torch.Tensor)
    }
    ranges: dict[str, list[Range]] = {}
    relations: list[Relation] = []
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
                relations.append(Relation(f"{source[expression]} == {reference}"))
            elif isinstance(expression, sympy.Symbol):
                source[expression] = reference
            else:
                derived.append((reference, expression))
    relations += [_derived(reference, expression, source) for reference, expression in derived]
    paths = _paths(program, signature)
    relations += [Relation.from_guard(guard, paths) for guard in program._guards_code]
    declared, sums = _declared(axes or {})
    relations = [*declared, *relations]
    for relation in relations:
        relation.check_supported()
        if relation.bound is not None:
            name, dim, low, high = relation.bound
            ranges[name][dim] = _tighten(ranges[name][dim], low, high)
    dtypes = {name: fake.dtype for name, fake in placeholders.items()}
    remaining = [relation for relation in relations if relation.bound is None]
    return Constraints({name: tuple(dims) for name, dims in ranges.items()}, dtypes, _independent(remaining, sums))


def _range(program: torch.export.ExportedProgram, expression: sympy.Expr) -> Range:
    bounds = program.range_constraints.get(expression)
    if bounds is None:
        return 1, UNBOUNDED
    high = bounds.upper
    return int(bounds.lower), UNBOUNDED if not high.is_finite or high >= 2**62 else int(high)


def _tighten(current: Range, low: int, high: int) -> Range:
    highs = [value for value in (current[1], high) if value != UNBOUNDED]
    return max(current[0], low), min(highs, default=UNBOUNDED)


def _derived(reference: str, expression: sympy.Expr, source: Mapping[sympy.Expr, str]) -> Relation:
    """Express that a size is ``a·s + b``: equal to that of another size ``s``, or, if nothing else has size ``s``, divisible."""
    unknown = [symbol for symbol in expression.free_symbols if symbol not in source]
    if not unknown:
        names = {symbol: sympy.Symbol(source[symbol]) for symbol in expression.free_symbols}
        return Relation(f"{reference} == {expression.xreplace(names)}")
    if len(expression.free_symbols) == 1 and sympy.degree(expression, unknown[0]) == 1:
        factor, offset = expression.coeff(unknown[0], 1), expression.coeff(unknown[0], 0)
        return Relation(f"({reference} - {offset}) % {factor} == 0")
    raise TraceError(
        f"torch.export made {reference} depend on others as {expression}, which cannot be checked. Trace with fewer dynamic dimensions (dynamic=)."
    )


def _paths(program: torch.export.ExportedProgram, signature: inspect.Signature) -> dict[str, str]:
    """Map the sources in guards (``L['x']``, ``L['args'][0]``, ``L['flat_args'][2]``) to placeholder names."""
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    leaves, spec = pytree.tree_flatten(program.example_inputs)
    assert len(leaves) == len(names)
    args, kwargs = pytree.tree_unflatten(names, spec)
    paths: dict[str, str] = {f"L['flat_args'][{index}]": name for index, name in enumerate(names)}
    for arguments in (signature.bind(*args, **kwargs).arguments, {"kwargs": kwargs}, kwargs):
        for path, name in pytree.tree_leaves_with_path(dict(arguments)):
            paths[f"L{pytree.keystr(path)}"] = name
    return {ast.unparse(ast.parse(source, mode="eval")): name for source, name in paths.items()}


def _declared(axes: Mapping[str, Sequence[str | None]]) -> tuple[list[Relation], dict[Reference, list[Reference]]]:
    """Return the relations that axes with sums among them say, and the sizes that are added for each sum."""
    by_axis: dict[str, list[Reference]] = {}
    for name, named in axes.items():
        for dim, axis in enumerate(named):
            if axis is not None:
                by_axis.setdefault(axis, []).append((name, dim))
    sums = {
        size: [by_axis[each][0] for each in axis.split(SUM)]
        for axis, sizes in by_axis.items()
        if SUM in axis
        for size in sizes
    }
    equal = [Relation.of_equal_sizes(sizes) for axis, sizes in by_axis.items() if len(sizes) > 1 and SUM not in axis]
    return [*equal, *(Relation.of_sum(size, added) for size, added in sums.items())] if sums else [], sums


def _independent(relations: Iterable[Relation], sums: Mapping[Reference, Sequence[Reference]]) -> tuple[Relation, ...]:
    """Say all that the relations say in few conditions: torch.export records many of one fact, and each costs time at every call.

    All sizes that are equal become one condition. What holds for all sizes, or follows from the sums, is dropped.
    """
    equal, others = _Equalities(), []
    for relation in dict.fromkeys(relations):
        if relation.equal_sizes is not None:
            equal.join(relation.equal_sizes)
        else:
            others.append(relation)
    defining = {Relation.of_sum(size, added) for size, added in sums.items()}  # by which all others are judged
    kept: dict[object, Relation] = {}
    for relation in others:
        meaning = None if relation in defining else _meaning(relation, equal, sums)
        if meaning is not sympy.true:
            kept.setdefault(relation if meaning is None else meaning, relation)
    return (*map(Relation.of_equal_sizes, equal.classes()), *kept.values())


class _Equalities:
    """Classes of equal sizes, each in the order in which its sizes were met."""

    def __init__(self) -> None:
        self._of: dict[Reference, list[Reference]] = {}

    def first(self, size: Reference) -> Reference:
        """Return the size that stands for all that are equal to it."""
        return self._of.get(size, [size])[0]

    def join(self, sizes: Iterable[Reference]) -> None:
        """Make sizes equal."""
        whole, *rest = [self._of.setdefault(size, [size]) for size in sizes]
        for part in rest:
            if part is not whole:
                whole += part
                self._of |= dict.fromkeys(part, whole)

    def classes(self) -> list[list[Reference]]:
        """Return the classes of more than one size."""
        return [sizes for sizes in {id(each): each for each in self._of.values()}.values() if len(sizes) > 1]


def _meaning(
    relation: Relation, equal: _Equalities, sums: Mapping[Reference, Sequence[Reference]]
) -> sympy.Basic | None:
    """Return the meaning of a relation over positive integers, or None where it has no simple one."""

    def size(name: str, dim: int) -> sympy.Basic | None:
        if (name, dim) in sums:
            return sympy.Add(*(size(*added) for added in sums[name, dim]))
        return sympy.Symbol("{}.size({})".format(*equal.first((name, dim))), integer=True, positive=True)

    def apply(function: Callable[..., Any], operands: Sequence[sympy.Basic | None]) -> sympy.Basic | None:
        if function is operator.or_:
            return sympy.true if sympy.true in operands else None
        if any(operand is None for operand in operands) or function not in _SYMPY:
            return None
        return _SYMPY[function](*operands)

    return relation.interpret(size, sympy.Integer, apply)


_SYMPY: Mapping[Callable[..., Any], Callable[..., sympy.Basic]] = {
    operator.neg: operator.neg,
    operator.add: operator.add,
    operator.sub: operator.sub,
    operator.mul: operator.mul,
    operator.floordiv: lambda a, b: sympy.floor(a / b),
    operator.mod: sympy.Mod,
    operator.eq: sympy.Eq,
    operator.ne: sympy.Ne,
    operator.lt: sympy.Lt,
    operator.le: sympy.Le,
    operator.gt: sympy.Gt,
    operator.ge: sympy.Ge,
    torch.sym_min: sympy.Min,
    torch.sym_max: sympy.Max,
}
