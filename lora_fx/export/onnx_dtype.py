"""Half precision in an ONNX model: its float32 becomes float16 or bfloat16; the graph that it was written from keeps its dtype.

    inputs, outputs             float32, with casts at the border
    products, sums, weights     the dtype
    norms, Softmax, powers, …   float32: their values do not fit into float16, or lose what the result needs

What leads to such operators alone stays in float32 too, back to a product (the mask that is added to scores, the variance of a norm,
the angles of a rotary embedding): a row that is masked entirely has the same weights as in the graph. Where numbers that the dtype does
not hold, such as the minimum of a mask, meet it nevertheless, they become three quarters of its largest number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_fx.errors import ExportError, listed
from lora_fx.export.onnx_ops import onnx_package

DTYPES: Mapping[torch.dtype, str] = {torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
"""The dtypes of models, with ONNX's names."""

_SINGLE = frozenset(
    (
        *("Pow", "Sqrt", "Reciprocal", "Exp", "Log", "Softmax", "LogSoftmax", "Sin", "Cos"),
        *("CumSum", "Range", "Resize", "GridSample"),
        *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsInf", "IsNaN"),
        *("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization"),
        "BatchNormalization",
    )
)
"""Operators that are computed in float32, beside reductions, squares, and casts of integers."""

_BETWEEN = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Neg", "Abs", "Min", "Max", "Where", "Identity"),
        *("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Concat", "Slice", "Gather", "Expand", "Split"),
    )
)
"""Operators that are computed in float32 where their results are for those alone; so are products of two vectors, and rows of a table
that is not a weight."""


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
    """Write the float32 of an ``onnx_ir`` model in another dtype (in place).

    Raises:
        ExportError: a weight has values that the dtype does not hold, or an operator holds a graph.
    """
    ir = onnx_package("onnx_ir")
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
    ir: Any
    model: Any
    half: Any
    range: torch.finfo
    casts: dict[tuple[Any, Any], Any] = field(default_factory=dict)
    clips: bool = False

    def run(self) -> None:
        single = self._single()
        uses = [
            (node, index)
            for node in self.model.graph
            for index in range(len(node.inputs))
            if self._is_float(node.inputs[index])
        ]
        wanted = {use: self.ir.DataType.FLOAT if use[0] in single else self.half for use in uses}
        kept = {value for value in self._constants() if all(use.node in single for use in value.uses())}
        self._convert_weights()
        for node in list(self.model.graph):
            in_single = node in single or not kept.isdisjoint(node.outputs)
            self._convert_node(node, self.ir.DataType.FLOAT if in_single else self.half)
        self.clips = self._are_beyond(kept)
        for (node, index), dtype in wanted.items():
            if node.inputs[index].dtype != dtype:
                node.replace_input_with(index, self._cast(node.inputs[index], dtype))
        for index, value in enumerate(self.model.graph.outputs):
            if value.dtype == self.half:
                self.model.graph.outputs[index] = self._cast(value, self.ir.DataType.FLOAT)

    def _is_float(self, value: Any) -> bool:
        return value is not None and value.dtype == self.ir.DataType.FLOAT

    def _constants(self) -> Iterable[Any]:
        return [
            node.outputs[0]
            for node in self.model.graph
            if node.op_type == "Constant" and self._is_float(node.outputs[0])
        ]

    def _single(self) -> set[Any]:
        """Return the nodes that are computed in float32."""
        nodes = [node for node in self.model.graph if any(map(self._is_float, (*node.inputs, *node.outputs)))]
        chosen = {node for node in nodes if self._needs_single(node)}
        behind, before = set(chosen), set(chosen)
        for node in nodes:
            given = [
                value.producer() for value in node.inputs if self._is_float(value) and not self._is_constant(value)
            ]
            if self._may_be_between(node) and given and behind.issuperset(given):
                behind.add(node)
        for node in reversed(nodes):
            users = [use.node for value in node.outputs for use in value.uses()]
            is_output = any(value.is_graph_output() for value in node.outputs)
            if self._may_be_between(node) and users and not is_output and before.issuperset(users):
                before.add(node)
        return {node for node in before if node in behind or node.op_type not in ("MatMul", "Gather")}

    def _needs_single(self, node: Any) -> bool:
        if node.op_type == "Cast":
            return self._is_float(node.outputs[0]) and (
                node.inputs[0].dtype is None or node.inputs[0].dtype.is_integer()
            )
        is_square = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
        return node.op_type in _SINGLE or node.op_type.startswith("Reduce") or is_square

    def _may_be_between(self, node: Any) -> bool:
        if node.op_type == "MatMul":
            shape = node.inputs[0].shape
            return shape is not None and shape[-1] == 1
        return node.op_type in _BETWEEN

    def _is_constant(self, value: Any) -> bool:
        producer = value.producer()
        return value.is_initializer() or (producer is not None and producer.op_type == "Constant")

    def _convert_weights(self) -> None:
        problems = []
        for value in self.model.graph.initializers.values():
            if not self._is_float(value):
                continue
            array = value.const_value.numpy()
            largest = float(abs(array[abs(array) < float("inf")]).max(initial=0))
            if largest > self.range.max:
                problems.append(f"{value.name} has {largest:.3g}")
            value.const_value = self._tensor(value.const_value, value.name)
            value.dtype = self.half
        if problems:
            raise ExportError(
                f"expected weights within ±{self.range.max:.5g}, which {self.range.dtype} holds: {listed(problems, 5)}. Write bfloat16 or float32."
            )

    def _tensor(self, tensor: Any, name: str | None = None) -> Any:
        numpy = self.half.numpy()
        return self.ir.LazyTensor(
            lambda: self.ir.Tensor(tensor.numpy().astype(numpy), dtype=self.half, name=name),
            dtype=self.half,
            shape=tensor.shape,
            name=name,
        )

    def _are_beyond(self, constants: Iterable[Any]) -> bool:
        tensors = (self.ir.convenience.get_const_tensor(value) for value in constants)
        return any(bool(self._beyond(tensor.numpy()).any()) for tensor in tensors if tensor is not None)

    def _beyond(self, array: Any) -> Any:
        """Return which numbers are finite, and larger than the half precision holds."""
        return (abs(array) > self.range.max) & (abs(array) < float("inf"))

    @property
    def _bound(self) -> float:
        return 0.75 * self.range.max

    def _clamped(self, tensor: Any, dtype: Any) -> Any:
        """Return numbers in a dtype, within its range."""
        array = tensor.numpy().copy()
        if dtype == self.half:
            beyond = self._beyond(array)
            array[beyond] = ((array[beyond] > 0) * 2.0 - 1.0) * self._bound
        return self.ir.Tensor(array.astype(dtype.numpy()), dtype=dtype)

    def _convert_node(self, node: Any, dtype: Any) -> None:
        """Let a node compute in a dtype: its numbers, the dtypes that it names, and the types of its results."""
        for name, attribute in list(node.attributes.items()):
            if attribute.type == self.ir.AttributeType.TENSOR and attribute.value.dtype == self.ir.DataType.FLOAT:
                node.attributes[name] = self.ir.AttrTensor(name, self._clamped(attribute.value, dtype))
            elif name in ("to", "dtype", "output_dtype") and attribute.value == self.ir.DataType.FLOAT:
                node.attributes[name] = self.ir.AttrInt64(name, int(dtype))
        for value in node.outputs:
            if self._is_float(value):
                value.dtype = dtype

    def _cast(self, value: Any, dtype: Any) -> Any:
        key = value, dtype
        if key not in self.casts:
            producer = value.producer()
            clips = dtype == self.half and self.clips and producer is not None and producer.op_type in _BETWEEN
            self.casts[key] = self._plain_cast(self._clipped(value) if clips else value, dtype)
        return self.casts[key]

    def _plain_cast(self, value: Any, dtype: Any) -> Any:
        node = self.ir.node("Cast", [value], attributes={"to": self.ir.AttrInt64("to", int(dtype))})
        result, producer = node.outputs[0], value.producer()
        result.dtype, result.shape = dtype, value.shape
        if producer is None:
            self.model.graph.insert_before(self.model.graph[0], node)
        else:
            self.model.graph.insert_after(producer, node)
        return result

    def _clipped(self, value: Any) -> Any:
        """Return a float32 value within the range of the half precision, in which infinities stay what they are."""
        bounds = [
            self.ir.node("Constant", [], attributes={"value": self._number(sign * self._bound)}) for sign in (-1, 1)
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
