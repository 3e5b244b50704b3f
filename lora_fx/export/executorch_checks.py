"""Input checks of an ExecuTorch program: operators that fail for sizes that the trace does not cover.

ExecuTorch drops assertions, and of an input it checks the dtype, the rank and how many values it has at most. So the program compares the sizes
itself, and stops at an index that is out of range where a condition is false. The first input is multiplied by the one that this index
reads, so that nothing is computed before. Sizes are in double precision, which holds each exactly, and where a division by zero ends no process.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import fx

from lora_fx.export.prepare import Exportable
from lora_fx.export.rewritten_ops import multiply_result_by_check, value_checks
from lora_fx.graph.graph_module import copy_graph

aten = torch.ops.aten


def with_checks(exportable: Exportable) -> Exportable:
    """Return the graph with the conditions on its inputs as operators."""
    graph, _ = copy_graph(exportable.plain.graph)
    for holds, _ in value_checks(graph):
        multiply_result_by_check(graph, holds)
    inputs = {str(node.target): node for node in graph.find_nodes(op="placeholder") if node.target in exportable.inputs}
    read = next((node for node in inputs.values() if node.users), None)
    if read is not None:  # else every result is a constant
        users = list(read.users)
        with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
            conditions = _conditions(graph, inputs, exportable)
            if conditions:
                holds = reduce(lambda a, b: graph.call_function(aten.logical_and.default, (a, b)), conditions)
                checked = _if(graph, holds, read, exportable.constraints.dtypes[str(read.target)])
                for user in users:
                    user.replace_input_with(read, checked)
    graph.lint()
    return replace(exportable, plain=fx.GraphModule(exportable.plain, graph, class_name="GraphModule").eval())


def _conditions(graph: fx.Graph, inputs: Mapping[str, fx.Node], exportable: Exportable) -> list[fx.Node]:
    """Insert what computes the conditions on sizes, and return their truth values."""
    counted: dict[tuple[str, int], fx.Node] = {}

    def size(name: str, dim: int) -> fx.Node:
        if (name, dim) not in counted:
            counted[name, dim] = _counted(graph, inputs[name], dim, exportable.constraints.ranges[name])
        return counted[name, dim]

    def number(value: int) -> fx.Node:
        return graph.call_function(aten.scalar_tensor.default, (value,), {"dtype": torch.float64})

    def apply(function: Callable[..., Any], operands: Sequence[fx.Node]) -> fx.Node:
        if function is operator.floordiv:
            return graph.call_function(aten.div.Tensor_mode, tuple(operands), {"rounding_mode": "floor"})
        return graph.call_function(_OPERATORS[function], tuple(operands))

    return [
        *(
            _fixed_sizes(graph, inputs[name], dims, exportable.constraints.ranges[name])
            for name, dims in exportable.dynamic.items()
            if 0 < len(dims) < len(exportable.constraints.ranges[name])  # of others the runtime compares every size
        ),
        *(relation.interpret(size, number, apply) for relation in exportable.constraints.conditions),
    ]


def _fixed_sizes(graph: fx.Graph, given: fx.Node, varying: Sequence[int], ranges: Sequence[tuple[int, int]]) -> fx.Node:
    """Return a truth value that is true, and behind an operator whose result has the fixed dimensions alone.

    The runtime refuses to write a result of other sizes than planned where none of them varies.
    """
    given = _without(graph, given, varying, ranges)
    unequal = graph.call_function(aten.any.default, (graph.call_function(aten.ne.Tensor, (given, given)),))
    return graph.call_function(aten.ge.Scalar, (graph.call_function(aten.to.dtype, (unequal, torch.float64)), 0))


def _counted(graph: fx.Graph, given: fx.Node, dim: int, ranges: Sequence[tuple[int, int]]) -> fx.Node:
    """Return how many elements lie along a dimension, counted: of sizes that the trace takes for equal, torch.export reads one alone."""
    line = _without(graph, given, [other for other in range(len(ranges)) if other != dim], ranges)
    equal, unequal = (graph.call_function(compare, (line, line)) for compare in (aten.eq.Tensor, aten.ne.Tensor))
    each = graph.call_function(aten.logical_or.default, (equal, unequal))  # true also of NaN
    return graph.call_function(aten.to.dtype, (graph.call_function(aten.sum.dim_IntList, (each, [0])), torch.float64))


def _without(graph: fx.Graph, given: fx.Node, dims: Sequence[int], ranges: Sequence[tuple[int, int]]) -> fx.Node:
    """Return a tensor without some of its dimensions: at 0 along them, or the sum where they may be empty."""
    for dim in sorted(dims, reverse=True):
        if ranges[dim][0] > 0:
            given = graph.call_function(aten.select.int, (given, dim, 0))
        else:
            given = graph.call_function(aten.sum.dim_IntList, (given, [dim]))
    return given


def _if(graph: fx.Graph, holds: fx.Node, given: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Return ``given``, times an element of a tensor of a single one, whose index is 1 where the condition does not hold."""
    fails = graph.call_function(aten.logical_not.default, (holds,))
    index = graph.call_function(aten.reshape.default, (graph.call_function(aten.to.dtype, (fails, torch.int64)), [1]))
    one = graph.call_function(aten.ones.default, ([1],), {"dtype": dtype})
    factor = graph.call_function(aten.index_select.default, (one, 0, index))
    factor = graph.call_function(aten.reshape.default, (factor, []))
    both = aten.logical_and.default if dtype is torch.bool else aten.mul.Tensor
    return graph.call_function(both, (given, factor))


_OPERATORS: Mapping[Callable[..., Any], Any] = {
    operator.add: aten.add.Tensor,
    operator.sub: aten.sub.Tensor,
    operator.mul: aten.mul.Tensor,
    operator.truediv: aten.div.Tensor,
    operator.mod: aten.remainder.Tensor,
    operator.neg: aten.neg.default,
    operator.eq: aten.eq.Tensor,
    operator.ne: aten.ne.Tensor,
    operator.lt: aten.lt.Tensor,
    operator.le: aten.le.Tensor,
    operator.gt: aten.gt.Tensor,
    operator.ge: aten.ge.Tensor,
    operator.and_: aten.logical_and.default,
    operator.or_: aten.logical_or.default,
    torch.sym_min: aten.minimum.default,
    torch.sym_max: aten.maximum.default,
}
