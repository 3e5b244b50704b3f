"""A plain graph as an ``ExportedProgram`` of torch.export, from which ONNX and pt2 are made."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from lora_fx.errors import ExportError, TraceError
from lora_fx.export._exportable import Exportable, explain
from lora_fx.exporting import export
from lora_fx.inputs import ExampleInputs


def export_plain(exportable: Exportable) -> torch.export.ExportedProgram:
    """Export a plain graph once more; its nodes keep module paths, lines of the model, and stamps. Input checks become guards.

    Raises:
        ExportError: torch.export refuses the graph.
    """
    inputs = ExampleInputs(kwargs=exportable.examples.tensors)
    try:
        with _interpreted(exportable.plain):
            program = export(exportable.plain, inputs, exportable.dynamic, training=False)
    except TraceError as error:
        raise ExportError(f"torch.export does not take this graph: {error}{explain(exportable, str(error))}") from error
    # torch.export takes it for granted that no size is 0 or 1, and so leaves out guards that exclude just those.
    program._guards_code.extend(
        f"L['{name}'].size()[{dim}] >= {low}"
        for name, ranges in exportable.constraints.ranges.items()
        for dim, (low, high) in enumerate(ranges)
        if low == 2 != high
    )
    return program


@contextmanager
def _interpreted(plain: fx.GraphModule) -> Iterator[None]:
    """Let a graph be interpreted, node by node, where it is called: torch.export then knows which node it records."""
    signature = inspect.signature(plain.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return fx.Interpreter(plain).run(*signature.bind(*args, **kwargs).arguments.values())

    forward.__signature__ = signature  # type: ignore[attr-defined]
    plain.forward = forward
    try:
        yield
    finally:
        del plain.forward
