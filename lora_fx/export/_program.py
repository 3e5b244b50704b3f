"""A plain graph as an ``ExportedProgram`` of torch.export, from which ONNX and pt2 are made."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import fx

from lora_fx.errors import ExportError, TraceError
from lora_fx.export._exportable import Exportable, explain
from lora_fx.exporting import export
from lora_fx.inputs import ExampleInputs
from lora_fx.relations import as_guard


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
    _check_same(exportable.plain.graph, program.graph)
    # torch.export takes it for granted that no size is 0 or 1, and has guards that exclude more than the trace does, or less.
    program._guards_code[:] = map(as_guard, exportable.constraints.conditions())
    return program


def _check_same(plain: fx.Graph, exported: fx.Graph) -> None:
    """Raise :class:`ExportError` unless both call the same operators; one that a size decided on would need guards of its own."""
    mine, theirs = (
        [
            node.target
            for node in graph.nodes
            if isinstance(node.target, torch._ops.OpOverload) and node.target not in _BESIDE_VALUES
        ]
        for graph in (plain, exported)
    )
    for ours, found in zip_longest(mine, theirs):
        if ours is not found:
            raise ExportError(
                f"torch.export made {found} of {ours} when it exported the graph once more: what it wrote might hold for other sizes. "
                "Export to TorchScript, and please report this with the model."
            )


_BESIDE_VALUES = (torch.ops.aten.sym_size.int, torch.ops.aten._assert_tensor_metadata.default)


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
