"""Input checks of an ONNX model. ONNX has no assertions: an index goes out of range where a check fails.

    Shape(input) ─► … ─► Not ─► Cast ─► Gather([1], ·) ─► Cast ─► Mul(input, ·)

An input is multiplied by the gathered 1, which leaves it unchanged; everything reads the result, so that nothing is
computed where a check fails. The runtime's error names the node, and its name says which sizes the trace covers. A shape that
depends on the checks, as of an Expand, would end the shape inference of other tools.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch

from lora_fx.export.onnx_ops import onnx_package
from lora_fx.graph.input_checks import Constraints
from lora_fx.graph.size_relations import Reference, Relation

DOUBLE, INT64 = 11, 7
"""Types, as ONNX numbers them. Sizes are computed in double precision, which holds every size exactly."""


def add_checks(model: Any, constraints: Constraints, names: Mapping[str, str]) -> None:
    """Insert checks into an ``onnx_ir`` model (in place). Fixed sizes, dtypes and ranks are part of its inputs already.

    Args:
        model: its inputs have the names that they have in the graph.
        constraints: to be checked.
        names: of inputs in the file, where they are others, for messages.
    """
    conditions = constraints.conditions
    if not conditions:
        return
    ir = onnx_package("onnx_ir")
    first = next(value for value in model.graph.inputs if len(value.shape))
    logical = first.dtype == ir.DataType.BOOL
    emitter = _Emitter(ir, {value.name: value for value in model.graph.inputs}, names)
    one = reduce(lambda a, b: emitter.op("Mul", [a, b]), [emitter.check(relation) for relation in conditions])
    checked = emitter.op("And" if logical else "Mul", [first, emitter.op("Cast", [one], to=first.dtype.value)])
    checked.type, checked.shape = first.type, first.shape
    own = set(emitter.nodes)
    for use in list(first.uses()):
        if use.node not in own:
            use.node.replace_input_with(use.idx, checked)
    for index, node in enumerate(emitter.nodes):
        model.graph.insert_before(model.graph[index], node)


class _Emitter:
    """Builder of the nodes of checks. Every value has one element; equal expressions share a node."""

    def __init__(self, ir: Any, inputs: Mapping[str, Any], names: Mapping[str, str]) -> None:
        self._ir = ir
        self._names = names
        self._inputs = inputs
        self._made: dict[tuple[Any, ...], Any] = {}
        self.nodes: list[Any] = []

    def check(self, relation: Relation) -> Any:
        """Return ``[1]``, computed by a node that fails where the relation does not hold."""
        if relation.equal_sizes is not None:
            index = self._differ(relation.equal_sizes)
        else:
            holds = relation.interpret(self._size, self._number, self._apply)
            index = self.op("Cast", [self.op("Not", [holds])], to=INT64)
        name = f"expected {relation.renamed(self._names)}, which the trace covers; trace again with example_inputs of these sizes"
        return self.op("Gather", [self._constant([1], torch.int64), index], name=name)

    def _differ(self, sizes: Sequence[Reference]) -> Any:
        """Return ``[0]`` where all sizes are equal, and else ``[1]``: by one comparison, however many there are."""
        first, *others = (self._shape(name, dim) for name, dim in sizes)
        beside = others[0] if len(others) == 1 else self.op("Concat", others, axis=0)
        unequal = self.op("Cast", [self.op("Not", [self.op("Equal", [beside, first])])], to=INT64)
        return unequal if len(others) == 1 else self.op("ReduceMax", [unequal], keepdims=1)

    def op(self, kind: str, inputs: Sequence[Any], name: str | None = None, **attributes: Any) -> Any:
        key = (kind, *map(id, inputs), name, *map(str, attributes.items()))
        if key not in self._made:
            number = len(self.nodes)
            node = self._ir.node(kind, inputs, attributes=attributes, name=name or f"input_check.{number}")
            node.outputs[0].name = f"input_check.value.{number}"
            self.nodes.append(node)
            self._made[key] = node.outputs[0]
        return self._made[key]

    def _size(self, name: str, dim: int) -> Any:
        return self.op("Cast", [self._shape(name, dim)], to=DOUBLE)

    def _shape(self, name: str, dim: int) -> Any:
        return self.op("Shape", [self._inputs[name]], start=dim, end=dim + 1)

    def _number(self, value: int) -> Any:
        return self._constant([value], torch.float64)

    def _constant(self, values: list[int], dtype: torch.dtype) -> Any:
        tensor = torch.tensor(values, dtype=dtype).numpy()
        return self.op("Constant", [], value=self._ir.tensor(tensor))

    def _apply(self, function: Callable[..., Any], operands: Sequence[Any]) -> Any:
        if function is operator.floordiv:
            return self.op("Floor", [self.op("Div", operands)])
        if function is operator.mod:
            left, right = operands
            return self.op("Sub", [left, self.op("Mul", [self._apply(operator.floordiv, operands), right])])
        if function is operator.ne:
            return self.op("Not", [self.op("Equal", operands)])
        return self.op(_OPERATORS[function], operands)


_OPERATORS: Mapping[Callable[..., Any], str] = {
    operator.add: "Add",
    operator.sub: "Sub",
    operator.mul: "Mul",
    operator.truediv: "Div",
    operator.neg: "Neg",
    operator.eq: "Equal",
    operator.lt: "Less",
    operator.le: "LessOrEqual",
    operator.gt: "Greater",
    operator.ge: "GreaterOrEqual",
    operator.and_: "And",
    operator.or_: "Or",
    torch.sym_min: "Min",
    torch.sym_max: "Max",
}
