"""Versions of ONNX's operators (opsets): those that a model may be written in, and the way from 18 back to 17."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_fx.errors import ExportError, option, shortened
from lora_fx.export.onnx_ops import onnx_package

OLDEST, TRANSLATED = 17, 18
"""The oldest opset, and the oldest that torch.onnx translates to."""

# TensorRT 11 takes opsets up to 25 (its ONNX Opset Guide, docs.nvidia.com/deeplearning/tensorrt/latest/reference/onnx-opset-guide.html).
# onnxruntime loads 24 since 1.24 (February 2026), but had no CUDA kernels of it for Reshape and Cast in May 2026, so that these run on the
# CPU (github.com/microsoft/onnxruntime/pull/28368).
DEFAULT_OPSET = 23
"""The newest opset of whose operators all releases of onnxruntime and TensorRT of the year before November 2026 have kernels."""


def check_opset(opset: int) -> None:
    """Raise :class:`ExportError` unless models can be written in an opset."""
    newest = onnx_package("onnxscript.version_converter._version_converter").SUPPORTED_MAX_ONNX_OPSET
    newest = min(newest, onnx_package("onnx").defs.onnx_opset_version())
    if isinstance(opset, bool) or not isinstance(opset, int) or not OLDEST <= opset <= newest:
        raise ExportError(f"{option('opset', '--opset')}: expected a number from {OLDEST} to {newest}, got {opset!r}.")


def set_opset(model: Any, opset: int) -> None:
    """Write an ``onnx_ir`` model of opset 18 in opset 17 if asked to, and give it the version of the file format (in place).

    Args:
        model: of this opset; of opset 18 where 17 is asked for.
        opset: of the result.

    Raises:
        ExportError: an operator of the model needs a later opset; all such are named.
    """
    if opset == OLDEST:
        problems = {node: problem for node in list(model.graph) if (problem := _lowered(node)) is not None}
        if problems:
            told = [f"{node.op_type} ({node.name}): {problem}" for node, problem in problems.items()]
            lines = "\n  ".join(shortened(told, _MAX_NAMED, "operators"))
            raise ExportError(
                f"opset {opset} lacks operators of this graph:\n  {lines}\n"
                f"Write it with {option(f'opset={TRANSLATED}', f'--opset {TRANSLATED}')} or later."
            )
        model.graph.opset_imports[""] = opset
    onnx = onnx_package("onnx")
    imports = [onnx.helper.make_opsetid("", opset)]
    model.ir_version = max(onnx.helper.find_min_ir_version_for(imports), _OLDEST_FORMAT)


_MAX_NAMED = 10
_OLDEST_FORMAT = 8  # initializers that are no inputs, and all that is written here, are in it


def _lowered(node: Any) -> str | None:
    """Write an operator of opset 18 in opset 17 (in place); return why it cannot be."""
    defs = onnx_package("onnx").defs
    if node.domain not in ("", "ai.onnx"):
        return None
    node.version = OLDEST
    if not defs.has(node.op_type, OLDEST, ""):
        return f"needs opset {defs.get_schema(node.op_type, TRANSLATED).since_version}"
    if defs.get_schema(node.op_type, TRANSLATED).since_version <= OLDEST:
        return None
    lower = _LOWERED.get(node.op_type, _axes_as_attribute if node.op_type.startswith("Reduce") else _same)
    return lower(node)


def _same(node: Any) -> str | None:
    schema = onnx_package("onnx").defs.get_schema(node.op_type, OLDEST)
    new = [name for name in node.attributes if name not in schema.attributes]
    new += [
        f"input {index}" for index, value in enumerate(node.inputs) if value is not None and index >= schema.max_input
    ]
    return f"{', '.join(new)} needs opset {TRANSLATED}" if new else None


def _axes_as_attribute(node: Any) -> str | None:
    """Give a reduction its axes as an attribute; since 18 they are an input."""
    ir = onnx_package("onnx_ir")
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    constant = None if axes is None else ir.convenience.get_const_tensor(axes)
    empty = node.attributes.pop("noop_with_empty_axes", None)
    if (axes is None and empty is not None and empty.as_int()) or (axes is not None and constant is None):
        return f"axes that are no constants need opset {TRANSLATED}"
    if constant is not None:
        node.attributes["axes"] = ir.AttrInt64s("axes", constant.numpy().tolist())
        node.resize_inputs(1)
    return None


def _split_evenly(node: Any) -> str | None:
    """Give a split its sizes, where they are unequal; since 18 the number of parts is enough."""
    ir = onnx_package("onnx_ir")
    number = node.attributes.pop("num_outputs", None)
    if number is None or (len(node.inputs) > 1 and node.inputs[1] is not None):
        return None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    shape, parts = node.inputs[0].shape, number.as_int()
    if shape is None or not isinstance(shape[axis], int):
        return f"a split of a size that varies needs opset {TRANSLATED}"
    if shape[axis] % parts:
        size = -(-shape[axis] // parts)
        sizes = [size] * (parts - 1) + [shape[axis] - size * (parts - 1)]
        constant = ir.node("Constant", [], attributes={"value": ir.tensor(sizes)})
        node.graph.insert_before(node, constant)
        node.resize_inputs(2)
        node.replace_input_with(1, constant.outputs[0])
    return None


_LOWERED: Mapping[str, Callable[[Any], str | None]] = {"Split": _split_evenly}
