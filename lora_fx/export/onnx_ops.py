"""Translations to ONNX of operators that torch.onnx lacks or translates wrongly; the packages for ONNX, imported on demand."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np

from lora_fx.errors import ExportError


def onnx_package(name: str) -> Any:
    """Import one of the packages for ONNX, which only the extra ``lora-fx[onnx]`` installs.

    Raises:
        ExportError: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(
            f"ONNX models and their adapters need {name}: pip install 'lora-fx[onnx]'. {error}"
        ) from error


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Translate ``aten.scaled_dot_product_attention``: ``softmax(scale · Q Kᵀ + mask) V``, and 0 in rows that are entirely masked.

    torch.onnx masks by the smallest finite number, which leaves the mean of V in such a row: where padding fills a whole
    window, or stands on the left in a causal model.

    Args:
        query: ``(…, heads, length, width)``.
        key: ``(…, heads, source, width)``.
        value: ``(…, heads, source, width of values)``.
        attn_mask: boolean or real, broadcast to ``(…, heads, length, source)``.
        dropout_p: 0 in evaluation.
        is_causal: mask later positions; ``attn_mask`` is then None.
        scale: by default ``1 / √width``.
        enable_gqa: whether key and value may have fewer heads, each shared by a group of queries.
    """
    op: Any = onnx_package("onnxscript").opset18
    ir: Any = onnx_package("onnx_ir")
    if dropout_p:
        raise ValueError(f"attention: expected dropout_p=0 in evaluation, got {dropout_p}.")

    def number(constant: float) -> Any:
        return op.Constant(value=ir.tensor(constant, dtype=query.dtype))

    rank = len(query.shape)
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        if not isinstance(query.shape[-3], int) or not isinstance(key.shape[-3], int):
            raise ValueError("attention: expected fixed numbers of heads. Trace with dynamic= without them.")
        key, value = (_repeated(op, each, query.shape[-3] // key.shape[-3]) for each in (key, value))
    transposed = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    width = query.shape[-1]
    if scale is not None or isinstance(width, int):
        factor = number(1 / math.sqrt(width) if scale is None else scale)
    else:
        factor = op.Reciprocal(op.Sqrt(op.CastLike(op.Shape(query, start=rank - 1, end=rank), query)))
    scaled = op.Mul(query, factor)
    scores = op.MatMul(scaled, transposed)
    if is_causal:
        ends = [op.Shape(each, start=rank - 2, end=rank - 1) for each in (query, key)]
        ones = op.Expand(op.Constant(value=ir.tensor([[1]])), op.Concat(*ends, axis=0))
        attn_mask = op.Cast(op.Trilu(ones, upper=0), to=ir.DataType.BOOL)
    if attn_mask is None:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    infinite = number(-math.inf)
    masked = (
        op.Where(attn_mask, scores, infinite)
        if is_causal or attn_mask.dtype == ir.DataType.BOOL
        else op.Add(scores, attn_mask)
    )
    # A sum, since onnxruntime's shape inference stops at other reductions over a given axis.
    unmasked = op.CastLike(op.Not(op.Equal(masked, infinite)), query)
    count = op.ReduceSum(unmasked, op.Constant(value_ints=[-1]), keepdims=1)
    weights = op.Where(op.Equal(count, number(0.0)), number(0.0), op.Softmax(masked, axis=-1))
    return op.MatMul(weights, value)


def _repeated(op: Any, tensor: Any, times: int) -> Any:
    """Repeat each head of ``(batch, heads, …)``, the copies next to each other."""
    _, heads, _, width = tensor.shape
    wide = op.Expand(op.Unsqueeze(tensor, op.Constant(value_ints=[2])), op.Constant(value_ints=[1, 1, times, 1, 1]))
    return op.Reshape(wide, op.Constant(value_ints=[0, heads * times, -1, width]))


def grouped_mm(x: Any, stacked: Any, offsets: Any, bias: Any = None, out_dtype: Any = None) -> Any:
    """Translate ``aten._grouped_mm``: rows ``offsets[i - 1]`` to ``offsets[i]`` are multiplied by expert ``i``.

    The weight is split once: a gather by row would copy one weight per token. Rows behind the last offset are zero.

    Args:
        x: ``(rows, in)``, sorted by expert.
        stacked: ``(experts, in, out)``.
        offsets: ``(experts,)``, where the rows of each expert end.
        bias: always None.
        out_dtype: always None.
    """
    op: Any = onnx_package("onnxscript").opset18
    ir: Any = onnx_package("onnx_ir")
    if bias is not None or out_dtype is not None or len(x.shape) != 2 or len(stacked.shape) != 3:
        raise ValueError(
            "grouped_mm: expected a matrix (rows, in) and a stack (experts, in, out), without bias and dtype, "
            f"got ranks {len(x.shape)} and {len(stacked.shape)}, bias {bias} and dtype {out_dtype}."
        )
    experts, _, width = stacked.shape
    zero, one = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    weights = op.Split(stacked, num_outputs=experts, axis=0)
    ends = op.Split(op.Cast(offsets, to=ir.DataType.INT64), num_outputs=experts, axis=0)
    products = []
    start = zero
    for weight, end in zip(weights, ends, strict=True):
        products.append(op.MatMul(op.Slice(x, start, end, zero, one), op.Squeeze(weight, zero)))
        start = end
    rest = op.Sub(op.Shape(x, start=0, end=1), start)
    zeros = op.Expand(
        op.Constant(value=ir.tensor(0.0, dtype=x.dtype)), op.Concat(rest, op.Constant(value_ints=[int(width)]), axis=0)
    )
    return op.Concat(*products, zeros, axis=0)


def scalar_tensor(s: Any, dtype: int = -1, **_: Any) -> Any:
    """Translate ``aten.scalar_tensor`` of real numbers, in all digits of its dtype; torch.onnx rounds each number to float32.

    Args:
        s: a number, or a size as a value.
        dtype: of ONNX; -1 is float32.
    """
    op: Any = onnx_package("onnxscript").opset18
    ir: Any = onnx_package("onnx_ir")
    kind = ir.DataType.FLOAT if dtype == -1 else ir.DataType(dtype)
    if isinstance(s, int | float):
        return op.Constant(value=ir.tensor(np.asarray(s).astype(kind.numpy())))
    return op.Cast(s, to=kind)
