"""Export of a plain graph by torch.export: the ``ExportedProgram`` from which ONNX and pt2 are made."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from lora_fx.errors import ExportError, TraceError
from lora_fx.export.prepare import Exportable, explain
from lora_fx.export.trial_inputs import larger_examples
from lora_fx.graph.input_checks import Constraints
from lora_fx.torch_internals import OpOverload, ValueRanges
from lora_fx.tracing.example_inputs import ExampleInputs
from lora_fx.tracing.torch_export import export


def export_plain(exportable: Exportable) -> torch.export.ExportedProgram:
    """Export a plain graph once more; its nodes keep module paths, lines of the model, and stamps. Input checks become guards.

    Raises:
        ExportError: torch.export refuses the graph.
    """
    inputs = ExampleInputs(kwargs=larger_examples(exportable))
    try:
        with _interpreted(exportable.plain):
            program = export(exportable.plain, inputs, exportable.dynamic, training=False)
    except TraceError as error:
        raise ExportError(f"torch.export does not take this graph: {error}{explain(exportable, str(error))}") from error
    constraints = exportable.constraints
    conditions = [relation.guard for relation in (*constraints.fixed_sizes(), *constraints.conditions)]
    if _same_operators(exportable.plain.graph, program.graph):
        # torch.export assumes that sizes 0 and 1 do not occur: its guards exclude more than the trace does.
        program._guards_code.clear()
        _widen_ranges(program, constraints)
    ranks = [f"len(L['{name}'].size()) == {len(ranges)}" for name, ranges in constraints.ranges.items()]
    program._guards_code.extend([*ranks, *conditions])
    return program


def _widen_ranges(program: torch.export.ExportedProgram, constraints: Constraints) -> None:
    """Let sizes that are sums of others be as small as the trace covers: torch.export takes each addend for 2 or more (in place)."""
    for node in program.graph.find_nodes(op="placeholder"):
        sizes = getattr(node.meta.get("val"), "shape", ())
        for (low, _), size in zip(constraints.ranges.get(str(node.target), ()), sizes, strict=False):
            known = None if isinstance(size, int) else program.range_constraints.get(size.node.expr)
            if known is not None and not size.node.expr.is_symbol and known.lower > low:
                program.range_constraints[size.node.expr] = ValueRanges(low, known.upper)


def _same_operators(plain: fx.Graph, exported: fx.Graph) -> bool:
    """Tell whether both call the same operators. If not, a size may have chosen one, and torch.export's guards are kept."""
    plain_operators, exported_operators = (
        [
            node.target
            for node in graph.nodes
            if isinstance(node.target, OpOverload) and node.target not in _SIZES_AND_CHECKS
        ]
        for graph in (plain, exported)
    )
    return plain_operators == exported_operators


aten = torch.ops.aten
_SIZES_AND_CHECKS = (aten.sym_size.int, aten._assert_tensor_metadata.default, aten._assert_scalar.default)


@contextmanager
def _interpreted(plain: fx.GraphModule) -> Iterator[None]:
    """Interpret a graph node by node where it is called, so that torch.export knows which node it records."""
    signature = inspect.signature(plain.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return fx.Interpreter(plain).run(*signature.bind(*args, **kwargs).arguments.values())

    forward.__signature__ = signature  # type: ignore[attr-defined]
    plain.forward = forward
    try:
        yield
    finally:
        del plain.forward
