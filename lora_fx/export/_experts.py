"""Products of grouped rows with stacked experts where there is no transformers, whose own operator a trace has."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from lora_fx.errors import ExportError
from lora_fx.provenance import source_line

TORCHS = torch.ops.aten._grouped_mm.default
TRANSFORMERS = "transformers.grouped_mm_fallback.default"
"""Computes the same bits. A trace has it unless weights are bfloat16; by name, since old transformers do not register it."""


def grouped_products(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes that multiply grouped rows with stacked experts."""
    for node in graph.nodes:
        if node.op == "call_function" and (node.target is TORCHS or str(node.target) == TRANSFORMERS):
            yield node


def compute_experts_by_torch(graph: fx.Graph) -> None:
    """Let torch's own operator compute experts (in place).

    Raises:
        ExportError: it does not take their dtype.
    """
    for node in grouped_products(graph):
        if node.meta["val"].dtype is torch.float64:
            raise ExportError(
                f"experts in torch.float64 can be exported to ONNX alone: torch's grouped_mm takes no such tensors{source_line(node)}. "
                "Convert the model to torch.float32 and trace it again."
            )
        if node.target is not TORCHS:
            node.target, node.args, node.kwargs = TORCHS, (*node.args, *node.kwargs.values()), {}
