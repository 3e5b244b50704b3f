"""Half precision in an ONNX model: its products are computed in float16 or bfloat16; the graph that it was written from keeps its dtype.

    inputs, outputs                                     float32, with casts at the border
    products with weights, and of what follows them     the dtype; so are the weights and tables that they read
    sums, gates and copies between such products        the dtype, where all that they read has it
    all else, known or not                              float32

So what half precision cannot hold is never given to it: masks and the scores that they are added to, norms with their small constants,
positions, angles, buckets, sums over a dimension. Numbers beyond the dtype (the minimum of a mask) are followed to the operator that
bounds them, such as a Softmax: products before it are float32, weights included. Where a quotient or a power meets a product, its finite
values are clipped to the range of the dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_fx.errors import ExportError, listed
from lora_fx.export.onnx_ops import onnx_package

DTYPES: Mapping[torch.dtype, str] = {torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
"""The dtypes of models, with ONNX's names."""

_PRODUCTS = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"))

_BETWEEN = frozenset(
    (
        *("Add", "Sub", "Mul", "Neg", "Relu", "LeakyRelu", "Gelu", "Sigmoid", "Tanh", "Erf", "HardSwish", "Where"),
        *("Transpose", "Reshape", "Flatten", "Unsqueeze", "Squeeze", "Concat", "Slice", "Gather", "Expand", "Split"),
        "Identity",
    )
)
"""Operators that are computed in the dtype where all that they read has it, and a product reads them; so are products of two vectors."""

_BOUNDED = frozenset(
    (
        *("Softmax", "LogSoftmax", "Sigmoid", "Tanh", "Erf", "Sin", "Cos"),
        *("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization"),
    )
)
"""Operators whose results the dtype holds, whatever they read."""

_UNBOUNDED = frozenset(
    ("Div", "Reciprocal", "Exp", "Pow", "Sqrt", "CumSum", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceProd")
)
"""Operators whose results may be beyond the dtype where all that they read is within; so are squares."""


def check_dtype(dtype: torch.dtype | None, slots: bool, quantised: bool) -> None:
    """Raise :class:`ExportError` unless models can be written in a dtype, with these options."""
    if dtype is None:
        return
    if dtype not in DTYPES:
        raise ExportError(
            f"dtype: expected torch.float16 or torch.bfloat16, got {dtype}. Without it, the file has the dtype of the graph."
        )
    for name, given in (("slots", slots), ("quantised", quantised)):
        if given:
            raise ExportError(
                f"dtype={dtype} and {name}=True: adapters and codes are for float32. Leave out one of them."
            )


def convert_dtype(model: Any, dtype: torch.dtype) -> None:
    """Write the products of an ``onnx_ir`` model in float32 in another dtype (in place).

    Raises:
        ExportError: a weight or an input has another dtype than float32, or a result is in half precision, or an operator holds a graph.
    """
    ir = onnx_package("onnx_ir")
    others = [
        f"{value.name} ({value.dtype.name.lower()})"
        for value in (*model.graph.inputs, *model.graph.initializers.values())
        if value.dtype is not None and value.dtype.is_floating_point() and value.dtype != ir.DataType.FLOAT
    ]
    halves = {ir.DataType[name] for name in DTYPES.values()}
    others += [
        f"{value.name} ({value.dtype.name.lower()})"
        for node in model.graph
        for value in node.outputs
        if value.dtype in halves
    ]
    if others:
        raise ExportError(
            f"dtype={dtype} is for graphs in float32, got {listed(others, 3)}: trace the model after `.float()`, without autocast, or leave out "
            "dtype= for a file in the dtype of the graph."
        )
    if any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for node in model.graph
        for attribute in node.attributes.values()
    ):
        raise ExportError(
            f"dtype={dtype}: the model has operators that hold a graph (If, Loop, Scan), which are float32 alone."
        )
    onnx_package("onnx_ir.passes.common").ShapeInferencePass()(model)  # which gives types to values that have none
    untyped = [node for node in model.graph if any(value.dtype is None for value in node.outputs if value.uses())]
    if untyped:
        named = listed([f"{node.op_type} ({node.name})" for node in untyped], 3)
        raise ExportError(
            f"dtype={dtype}: the types of some results are not known, so that no casts can be placed: {named}."
        )
    _Conversion(ir, model, ir.DataType[DTYPES[dtype]], torch.finfo(dtype)).run()


@dataclass
class _Conversion:
    """The conversion of one model.

    Attributes:
        ir: the package ``onnx_ir``.
        model: converted in place.
        half: the dtype.
        range: the numbers of the dtype.
        beyond: values that may have finite numbers of the model beyond the dtype.
        unbounded: float32 values that may be computed to be beyond the dtype.
        casts: values → the same in the other dtype.
    """

    ir: Any
    model: Any
    half: Any
    range: torch.finfo
    beyond: set[Any] = field(default_factory=set)
    unbounded: set[Any] = field(default_factory=set)
    casts: dict[Any, Any] = field(default_factory=dict)

    def run(self) -> None:
        nodes = [node for node in self.model.graph if any(map(self._is_float, (*node.inputs, *node.outputs)))]
        half = self._half(nodes)
        for value in list(self.model.graph.initializers.values()):
            if self._is_float(value) and any(use.node in half for use in value.uses()):
                value.const_value, value.dtype = self._tensor(value.const_value, value.name), self.half
        for node in half:
            for value in filter(self._is_float, node.outputs):
                value.dtype = self.half
        for node in nodes:
            other = self.ir.DataType.FLOAT if node in half else self.half
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype == other:
                    node.replace_input_with(index, self._cast(value))
        for index, value in enumerate(self.model.graph.outputs):
            if value.dtype == self.half:
                self.model.graph.outputs[index] = self._cast(value)

    def _is_float(self, value: Any) -> bool:
        return value is not None and value.dtype == self.ir.DataType.FLOAT

    def _half(self, nodes: list[Any]) -> set[Any]:
        """Return the nodes that are computed in the dtype, and find the values that are beyond it."""
        fitting, weighted, half = self._known(), set(self.model.graph.initializers.values()), set()
        for node in nodes:
            given, results = list(filter(self._is_float, node.inputs)), list(filter(self._is_float, node.outputs))
            if not weighted.isdisjoint(given):
                weighted.update(results)
            if not given or not results:
                continue
            if self._is_product(node):
                is_half = self.beyond.isdisjoint(given) and not weighted.isdisjoint(given)
            else:
                held = [value.producer() in half or value in fitting for value in given]
                is_half = self._may_be_between(node) and all(held) and not all(map(self._is_constant, given))
            if is_half:
                half.add(node)
            elif node.op_type not in _BOUNDED:
                if not self.beyond.isdisjoint(given):
                    self.beyond.update(results)
                if self._is_unbounded(node) or not self.unbounded.isdisjoint(given):
                    self.unbounded.update(results)
        for node in reversed(nodes):  # what no product reads is float32, back to a product or a table
            is_kept = self._is_product(node) or (node.op_type == "Gather" and node.inputs[0].is_initializer())
            if not is_kept and half.isdisjoint(use.node for value in node.outputs for use in value.uses()):
                half.discard(node)
        return half

    def _known(self) -> set[Any]:
        """Return the weights and constants that the dtype holds; those with larger numbers are put into ``beyond``."""
        fitting = set()
        for value in (*self.model.graph.initializers.values(), *(v for node in self.model.graph for v in node.outputs)):
            if not self._is_float(value) or not (value.is_initializer() or self._is_constant(value)):
                continue
            numbers = abs(self.ir.convenience.get_const_tensor(value).numpy())
            numbers = numbers[(numbers > 0) & (numbers < float("inf"))]
            if numbers.max(initial=0) > self.range.max:
                self.beyond.add(value)
            elif not numbers.size or numbers.max() >= self.range.smallest_normal:
                fitting.add(value)
        return fitting

    def _is_product(self, node: Any) -> bool:
        return node.op_type in _PRODUCTS and not self._is_of_vectors(node)

    def _is_of_vectors(self, node: Any) -> bool:
        shape = node.inputs[0].shape
        return node.op_type == "MatMul" and shape is not None and len(shape) > 0 and shape[-1] == 1

    def _may_be_between(self, node: Any) -> bool:
        return (node.op_type in _BETWEEN and not self._is_square(node)) or self._is_of_vectors(node)

    def _is_square(self, node: Any) -> bool:
        return node.op_type == "Mul" and node.inputs[0] is node.inputs[1]

    def _is_unbounded(self, node: Any) -> bool:
        if node.op_type == "Div" and self._is_constant(node.inputs[1]):
            return False
        return node.op_type in _UNBOUNDED or self._is_square(node)

    def _is_constant(self, value: Any) -> bool:
        producer = value.producer()
        return producer is not None and producer.op_type == "Constant"

    def _tensor(self, tensor: Any, name: str | None = None) -> Any:
        numpy = self.half.numpy()
        return self.ir.LazyTensor(
            lambda: self.ir.Tensor(tensor.numpy().astype(numpy), dtype=self.half, name=name),
            dtype=self.half,
            shape=tensor.shape,
            name=name,
        )

    def _cast(self, value: Any) -> Any:
        """Return a value in the other dtype."""
        if value not in self.casts:
            self.casts[value] = self._new_cast(value)
        return self.casts[value]

    def _new_cast(self, value: Any) -> Any:
        dtype = self.ir.DataType.FLOAT if value.dtype == self.half else self.half
        if self._is_constant(value):
            tensor = self._tensor(self.ir.convenience.get_const_tensor(value))
            node = self.ir.node("Constant", [], attributes={"value": self.ir.AttrTensor("value", tensor)})
        else:
            value = self._clipped(value) if value in self.unbounded else value
            node = self.ir.node("Cast", [value], attributes={"to": self.ir.AttrInt64("to", int(dtype))})
        result, producer = node.outputs[0], value.producer()
        result.dtype, result.shape = dtype, value.shape
        if producer is None:
            self.model.graph.insert_before(self.model.graph[0], node)
        else:
            self.model.graph.insert_after(producer, node)
        return result

    def _clipped(self, value: Any) -> Any:
        """Return a float32 value within the range of the dtype, in which infinities stay what they are."""
        bounds = [
            self.ir.node("Constant", [], attributes={"value": self._number(sign * self.range.max)}) for sign in (-1, 1)
        ]
        node = self.ir.node("Clip", [value, *(bound.outputs[0] for bound in bounds)])
        infinite = self.ir.node("IsInf", [value])
        chosen = self.ir.node("Where", [infinite.outputs[0], value, node.outputs[0]])
        for result in (node.outputs[0], chosen.outputs[0], *(bound.outputs[0] for bound in bounds)):
            result.dtype = self.ir.DataType.FLOAT
        infinite.outputs[0].dtype = self.ir.DataType.BOOL
        node.outputs[0].shape = chosen.outputs[0].shape = value.shape
        self.model.graph.insert_after(value.producer(), [*bounds, node, infinite, chosen])
        return chosen.outputs[0]

    def _number(self, number: float) -> Any:
        return self.ir.AttrTensor("value", self.ir.tensor(number, dtype=self.ir.DataType.FLOAT))
