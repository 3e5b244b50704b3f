"""Portable operators, for processes that have torch alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from lora_fx.errors import ExportError
from lora_fx.graph.provenance import source_line
from lora_fx.torch_internals import OpOverload

GROUPED_MM = torch.ops.aten._grouped_mm.default
OF_TRANSFORMERS = "transformers.grouped_mm_fallback.default"
"""Computes the same bits; traced unless weights are bfloat16. Found by name, since old transformers do not register it."""


def grouped_products(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes that multiply grouped rows with stacked experts."""
    for node in graph.nodes:
        if node.op == "call_function" and (node.target is GROUPED_MM or str(node.target) == OF_TRANSFORMERS):
            yield node


def use_torch_alone(graph: fx.Graph) -> None:
    """Replace grouped products by torch's own operator (in place), and refuse operators that other packages register.

    Raises:
        ExportError: the graph has such an operator, or torch's own does not take the dtype of the experts.
    """
    for node in grouped_products(graph):
        if node.meta["val"].dtype is torch.float64:
            raise ExportError(
                f"experts: expected a dtype that torch's grouped_mm takes, got torch.float64, which only ONNX has{source_line(node)}. "
                "Convert the model to torch.float32 and trace it again."
            )
        if node.target is not GROUPED_MM:
            node.target, node.args, node.kwargs = GROUPED_MM, (*node.args, *node.kwargs.values()), {}
    for node in graph.nodes:
        if isinstance(node.target, OpOverload) and node.target.namespace not in _TORCH_NAMESPACES:
            raise ExportError(
                f"the operator {node.target} is not torch's own, so that a process with torch alone cannot run it{source_line(node)}. "
                "Write that line of the model with torch's operators."
            )


_TORCH_NAMESPACES = ("aten", "prims", "prim", "quantized", "_c10d_functional")  # the last: sums over processes
