"""Weights of an ONNX model as its products read them: transposed when written, not each time the model is loaded.

    weight ─► Transpose ─► MatMul(x, ·)      becomes      weight.T ─► MatMul(x, ·)

Tools that quantise or fuse look for products whose second operand is an initializer, and pass over those behind a Transpose.
"""

from __future__ import annotations

import json
from typing import Any

from lora_fx.export.onnx_ops import onnx_package

TRANSPOSED_KEY = "lora_fx.transposed_weights"
"""Key of the model's metadata under which a JSON object maps the name of each transposed initializer to the key of its weight."""


def store_transposed(model: Any) -> None:
    """Replace matrices that products alone read, each transposed, by their transposes, called ``<key>.T`` (in place of an ``onnx_ir`` model).

    A weight with other uses, such as one that is tied to an embedding, stays as it is: it is stored once.
    """
    ir = onnx_package("onnx_ir")
    taken = {value.name for node in model.graph for value in node.outputs} | {
        value.name for value in model.graph.inputs
    }
    names: dict[str, str] = {}
    for node in list(model.graph):
        if not _is_transposed_factor(node):
            continue
        weight, name = node.inputs[0], f"{node.inputs[0].name}.T"
        if name in taken or name in model.graph.initializers:
            continue
        value = ir.Value(
            name=name,
            shape=ir.Shape(reversed(weight.const_value.shape.numpy())),
            type=ir.TensorType(weight.const_value.dtype),
            const_value=_transposed(weight.const_value, name),
        )
        model.graph.register_initializer(value)
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        model.graph.remove(node, safe=True)
        del model.graph.initializers[weight.name]
        names[name] = weight.name
    if names:
        model.metadata_props[TRANSPOSED_KEY] = json.dumps(names)


def _is_transposed_factor(node: Any) -> bool:
    """Tell whether a node transposes a matrix that nothing else reads, for products alone."""
    if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
        return False
    (weight,), (result,) = node.inputs, node.outputs
    return (
        weight is not None
        and weight.is_initializer()
        and weight.const_value is not None
        and len(weight.const_value.shape) == 2
        and list(node.attributes["perm"].as_ints() if "perm" in node.attributes else (1, 0)) == [1, 0]
        and not (weight.is_graph_input() or weight.is_graph_output() or result.is_graph_output())
        and len(weight.uses()) == 1
        and all(use.node.op_type == "MatMul" and use.idx == 1 for use in result.uses())
    )


def _transposed(tensor: Any, name: str) -> Any:
    """Return the transpose of a matrix, made when it is written: a model of many gigabytes is not held twice."""
    ir = onnx_package("onnx_ir")
    shape = ir.Shape(reversed(tensor.shape.numpy()))
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().T.copy(), dtype=tensor.dtype, shape=shape, name=name),
        dtype=tensor.dtype,
        shape=shape,
        name=name,
    )
