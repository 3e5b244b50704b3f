"""Operators that a process has which imports torch alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from lora_fx.errors import ExportError
from lora_fx.graph.provenance import source_line

GROUPED_MM = torch.ops.aten._grouped_mm.default
OF_TRANSFORMERS = "transformers.grouped_mm_fallback.default"
"""Computes the same bits. A trace has it unless weights are bfloat16; by name, since old transformers do not register it."""


def grouped_products(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes that multiply grouped rows with stacked experts."""
    for node in graph.nodes:
        if node.op == "call_function" and (node.target is GROUPED_MM or str(node.target) == OF_TRANSFORMERS):
            yield node


def use_torch_alone(graph: fx.Graph) -> None:
    """Let torch's own operator compute experts (in place), and refuse operators that other packages register.

    Raises:
        ExportError: there is such an operator, or torch's does not take the dtype of the experts.
    """
    for node in grouped_products(graph):
        if node.meta["val"].dtype is torch.float64:
            raise ExportError(
                f"experts in torch.float64 can be exported to ONNX alone: torch's grouped_mm takes no such tensors{source_line(node)}. "
                "Convert the model to torch.float32 and trace it again."
            )
        if node.target is not GROUPED_MM:
            node.target, node.args, node.kwargs = GROUPED_MM, (*node.args, *node.kwargs.values()), {}
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in _TORCHS:
            raise ExportError(
                f"the operator {node.target} is not torch's own, and is missing where torch alone is imported{source_line(node)}. "
                "Write that line of the model with torch's operators."
            )


_TORCHS = ("aten", "prims", "prim", "quantized")
