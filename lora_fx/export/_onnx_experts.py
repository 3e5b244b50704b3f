"""The product of grouped rows with stacked experts, for ONNX, which has no such operator."""

from __future__ import annotations

import importlib
from typing import Any


def grouped_mm(x: Any, stacked: Any, offsets: Any, bias: Any = None, out_dtype: Any = None) -> Any:
    """Translate ``aten._grouped_mm``: rows ``offsets[i - 1]`` to ``offsets[i]`` are multiplied with expert ``i``.

    The weight is split once, where a gather by row would copy one weight per token. Rows behind the last offset are zero.

    Args:
        x: ``(rows, in)``, sorted by expert.
        stacked: ``(experts, in, out)``.
        offsets: ``(experts,)``, where the rows of each expert end.
        bias: is not given.
        out_dtype: is not given.
    """
    op: Any = importlib.import_module("onnxscript").opset18

    if bias is not None or out_dtype is not None or len(x.shape) != 2 or len(stacked.shape) != 3:
        raise ValueError("aten._grouped_mm: rows of one matrix and a stack of weights are expected, and nothing else.")
    experts, _, width = stacked.shape
    zero, one = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    weights = op.Split(stacked, num_outputs=experts, axis=0)
    ends = op.Split(op.Cast(offsets, to=_INT64), num_outputs=experts, axis=0)
    products = []
    start = zero
    for weight, end in zip(weights, ends, strict=True):
        products.append(op.MatMul(op.Slice(x, start, end, zero, one), op.Squeeze(weight, zero)))
        start = end
    rest = op.Sub(op.Shape(x, start=0, end=1), start)
    zeros = op.Expand(
        op.CastLike(op.Constant(value_float=0.0), x), op.Concat(rest, op.Constant(value_ints=[int(width)]), axis=0)
    )
    return op.Concat(*products, zeros, axis=0)


_INT64 = 7
"""The number of the type in ONNX."""
