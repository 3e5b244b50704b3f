"""Quantised weights in an ONNX model: products whose codes onnxruntime reads as they are.

    weight ─► Transpose ─► MatMul(x, ·)      becomes      MatMulBnb4(x, codes, absmax)            NF4, FP4
                                                          MatMulNBits(x, codes, scales, zeros)    integers

Both are operators of onnxruntime (``com.microsoft``), of which its CPU has kernels for float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lora_fx.errors import ExportError, listed, shortened
from lora_fx.export.onnx_ops import onnx_package
from lora_fx.graph.graph_module import TracedGraphModule, state_of
from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.numerics.schemes import CodebookScheme, UniformScheme, scheme_text

DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Product:
    """A product of onnxruntime with a quantised matrix.

    Attributes:
        operator: its name.
        attributes: of it.
        tensors: its further inputs in their order, each under the name that its initializer has behind that of the weight.
        transposed: whether the graph's weight is the transpose of the matrix that was quantised, as of GPT-2.
    """

    operator: str
    attributes: Mapping[str, int]
    tensors: Mapping[str, torch.Tensor]
    transposed: bool


def products_of(graph_module: TracedGraphModule) -> dict[str, Product]:
    """Return the product for each quantised weight of a graph, by the weight's name.

    Raises:
        ExportError: there is none, or onnxruntime has no kernel for one. All such are named.
    """
    found: dict[str, Product] = {}
    problems: list[str] = []
    state = state_of(graph_module)
    for name in state.names():
        weight = state.tensors[name]
        if isinstance(weight, QuantisedWeight):
            problem = _problem(weight)
            if problem is None:
                found[name] = _product(weight)
            else:
                problems.append(f"{name}: {problem}")
    if problems:
        advice = "Leave quantised=True out, which writes dense weights."
        told = "\n  ".join(shortened(problems, _MAX_NAMED, "weights"))
        raise ExportError(f"onnxruntime's CPU has no kernel for these quantised weights:\n  {told}\n{advice}")
    if not found:
        raise ExportError("quantised=True: the graph has no quantised weights. Leave it out.")
    return found


_MAX_NAMED = 10


def _problem(weight: QuantisedWeight) -> str | None:
    """Return why onnxruntime multiplies by no such weight."""
    text = scheme_text(weight.scheme)
    if weight.dtype != torch.float32 or weight.is_cast:
        return f"expected a weight that is float32 when dense, got {weight.dtype}"
    match weight.scheme:
        case CodebookScheme(_, blocksize, _):
            return None if blocksize <= 256 else f"expected blocks of 256 at most, got {text}"
        case UniformScheme(bits, _, _, _, _):
            zero = weight.stored.get("zero")
            if bits not in (2, 4, 8):
                return f"expected 2, 4 or 8 bits, got {text}"
            if "columns" in weight.stored or (zero is not None and zero.is_floating_point()):
                return f"expected consecutive groups with integers for zero points, got {text}"
            if weight.scheme.group is not None and _block(weight.scheme) < 16:
                return f"expected groups that are multiples of 16, got {text}"
    return None


def _block(scheme: UniformScheme) -> int:
    """Return the block of onnxruntime: a power of two that divides a group, or any for a scale that a whole row shares."""
    return 128 if scheme.group is None else scheme.group & -scheme.group


def _product(weight: QuantisedWeight) -> Product:
    rows, columns = reversed(weight.shape) if weight.is_transposed else weight.shape
    sizes = {"K": columns, "N": rows}
    stored = {name: tensor.cpu() for name, tensor in weight.stored.items()}
    scheme = weight.scheme
    if isinstance(scheme, CodebookScheme):
        attributes = {
            **sizes,
            "block_size": scheme.blocksize,
            "quant_type": int(scheme.codebook == "nf4"),
            "training_mode": 0,
        }
        tensors = {"codes": stored["codes"].reshape(-1).view(torch.uint8), "absmax": scheme.absmax(stored)}
        return Product("MatMulBnb4", attributes, tensors, weight.is_transposed)
    block, middle = _block(scheme), 2 ** (scheme.bits - 1)
    signed = stored["codes"].dtype == torch.int8
    codes = (stored["codes"].short() + (middle if signed else 0)).to(torch.uint8)
    codes = functional.pad(codes, (0, -columns % block)).view(rows, -1, block)
    repeats = block if scheme.group is None else scheme.group
    groups = [column * block // repeats if scheme.group else 0 for column in range(codes.shape[1])]
    tensors = {"codes": _packed(codes, scheme.bits), "scale": stored["scale"].float()[:, groups].reshape(-1)}
    zero = stored.get("zero")
    if zero is not None or not signed:
        points = torch.zeros(rows, len(groups)) if zero is None else zero[:, groups]
        points = (points.short() + (middle if signed else 0)).to(torch.uint8)
        tensors["zero"] = _packed(points, scheme.bits).reshape(-1)
    attributes = {**sizes, "bits": scheme.bits, "block_size": block, "accuracy_level": 1}  # of 1: products in float32
    return Product("MatMulNBits", attributes, tensors, weight.is_transposed)


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return integers packed to bytes along the last dimension, the first in the low bits."""
    count = 8 // bits
    parts = functional.pad(codes, (0, -codes.shape[-1] % count)).unflatten(-1, (-1, count))
    packed = torch.zeros(parts.shape[:-1], dtype=torch.uint8)
    for place in range(count):
        packed |= parts[..., place] << bits * place
    return packed


def store_quantised(model: Any, products: Mapping[str, Product]) -> None:
    """Give products the codes of their weights in the place of dense ones (in place of an ``onnx_ir`` model).

    Raises:
        ExportError: something else than a product reads one of the weights.
    """
    initializers = model.graph.initializers
    readers = {name: _readers(initializers[name], products[name]) for name in products if name in initializers}
    others = [name for name, found in readers.items() if found is None]
    if others:
        raise ExportError(
            f"quantised=True: expected products alone to read quantised weights, got other operators on "
            f"{listed(others, _MAX_NAMED)}. Leave it out, which writes dense weights."
        )
    for name, found in readers.items():
        stored = _initializers(model, name, products[name])
        for node in found or ():
            _replace(model, node, products[name], stored)
        for use in list(initializers[name].uses()):
            model.graph.remove(use.node, safe=True)
        del initializers[name]
    model.graph.opset_imports[DOMAIN] = 1


def _initializers(model: Any, name: str, product: Product) -> list[Any]:
    """Add codes and scales of a weight to a model, and return them."""
    ir = onnx_package("onnx_ir")
    added = []
    for kind, tensor in product.tensors.items():
        content = ir.tensor(tensor.contiguous().numpy(), name=f"{name}.{kind}")
        value = ir.Value(name=content.name, shape=content.shape, type=ir.TensorType(content.dtype), const_value=content)
        model.graph.register_initializer(value)
        added.append(value)
    return added


def _replace(model: Any, node: Any, product: Product, stored: list[Any]) -> None:
    """Put a product with codes in the place of one with a dense weight; the bias of a Gemm is added behind it."""
    ir = onnx_package("onnx_ir")
    attributes = [ir.AttrInt64(key, value) for key, value in product.attributes.items()]
    inputs = [node.inputs[0], *stored]
    if len(stored) == 2 and product.operator == "MatMulNBits":
        inputs.append(None)  # no zero points: the middle of the codes
    made = [ir.Node(DOMAIN, product.operator, inputs, attributes)]
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        made.append(ir.Node("", "Add", [made[0].outputs[0], node.inputs[2]]))
    old, new = node.outputs[0], made[-1].outputs[0]
    for each in made:
        each.outputs[0].shape, each.outputs[0].type = old.shape, old.type
    new.name, old.name = old.name, None
    model.graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def _readers(weight: Any, product: Product) -> list[Any] | None:
    """Return the products that multiply by a weight, along the rows of its codes; None if anything else reads it."""
    found: list[Any] = []
    for node, index in weight.uses():
        if node.op_type == "Transpose" and not product.transposed and not node.outputs[0].is_graph_output():
            uses = node.outputs[0].uses()
            if any(other.op_type != "MatMul" or place != 1 for other, place in uses):
                return None
            found += [other for other, _ in uses]
        elif (index == 1 and node.op_type == "MatMul" and product.transposed) or (
            index == 1 and node.op_type == "Gemm" and _is_plain(node, product)
        ):
            found.append(node)
        else:
            return None
    return found


def _is_plain(gemm: Any, product: Product) -> bool:
    """Tell whether a Gemm is ``x Wᵀ + b`` of the matrix that was quantised."""

    def given(name: str, default: float) -> Any:
        return gemm.attributes[name].value if name in gemm.attributes else default

    plain = given("alpha", 1.0) == 1.0 and given("beta", 1.0) == 1.0 and not given("transA", 0)
    return plain and bool(given("transB", 0)) != product.transposed
