"""ExecuTorch: a program for phones and small devices, its products by XNNPACK on the CPU, in the memory that its largest sizes need.

The runtime plans all memory before the first call, so that each axis that varies needs a largest size.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_fx.errors import ExportError, first_line, listed, option
from lora_fx.export.compare import Loaded
from lora_fx.export.deliver import Exported, Options, deliver
from lora_fx.export.executorch_checks import with_checks
from lora_fx.export.portable_ops import use_torch_alone
from lora_fx.export.prepare import Exportable, explain
from lora_fx.export.torch_program import export_plain
from lora_fx.export.trial_inputs import cut_examples
from lora_fx.files.atomic import writable
from lora_fx.graph.example_sizes import Examples
from lora_fx.graph.graph_module import TracedGraphModule
from lora_fx.graph.input_checks import Constraints
from lora_fx.graph.process_state import quiet
from lora_fx.graph.size_relations import UNBOUNDED
from lora_fx.progress import step
from lora_fx.torch_internals import ValueRanges


def executorch(
    graph_module: TracedGraphModule,
    path: str | Path,
    *,
    max_sizes: Mapping[str, int] | None = None,
    overwrite: bool = False,
    verify: bool = True,
    tolerance: float | None = None,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
) -> Exported:
    """Write a graph as an ExecuTorch program, in evaluation mode. Needs the extra ``lora-fx[executorch]``.

    Its method ``forward`` takes the tensors that the graph was traced with by position, in the order of the report's ``inputs``,
    contiguous, and returns the outputs in the order of its ``outputs``; the methods ``input_names`` and ``output_names`` of the program
    return these names. Sizes that the trace does not cover, or over ``max_sizes``, fail. What XNNPACK has kernels for runs there, all else by
    ExecuTorch's portable kernels.

    Args:
        graph_module: base, branched, fused or folded; not changed.
        path: of the file to write; ends in ``.pte``.
        max_sizes: axis (``batch``, ``sequence``) → its largest size, for which memory is planned. Needed for each axis that varies and
            that the trace leaves without bound. At 1 the axis has this one size.
        overwrite: replace a file that exists.
        verify: run the written file by ExecuTorch's runtime, and compare it with the graph before it is moved to ``path``.
        tolerance: the largest difference that is allowed, as a part of the largest value of an output. By default 1e-9,
            1e-4 or 0.05, by the lowest precision of the weights.
        example_inputs: traced and compared with these, and with other sizes of them, instead of the inputs of the trace. They are cut to
            ``max_sizes``.

    Returns:
        The written files and their comparison with the graph.

    Raises:
        ExportError: an axis has no largest size, or torch.export or ExecuTorch does not take the graph, or it is not installed.
        VerifyError: the written file does not compute the same.
        WriteError: the path exists or cannot be written.
    """
    if Path(path).suffix != ".pte":
        raise ExportError(
            f"{path}: expected a name that ends in .pte, as ExecuTorch's programs do. Choose another name."
        )
    return deliver(
        _ExecuTorch(max_sizes or {}, verify), graph_module, path, Options(overwrite, verify, tolerance, example_inputs)
    )


def _package(name: str) -> Any:
    """Import a part of ExecuTorch, which only the extra ``lora-fx[executorch]`` installs.

    Raises:
        ExportError: it cannot be imported.
    """
    try:
        with quiet():
            return importlib.import_module(f"executorch.{name}")
    except ImportError as error:
        raise ExportError(f"ExecuTorch programs need executorch: pip install 'lora-fx[executorch]'. {error}") from error


def _partitioner(exportable: Exportable) -> Any:
    """Return what chooses the operators for XNNPACK: without ``unsqueeze`` where several axes vary.

    ExecuTorch 1.5 chooses it there too, and then raises that XNNPACK reshapes one dynamic dimension alone.
    """
    configs = _package("backends.xnnpack.partition.config").ALL_PARTITIONER_CONFIGS
    if len(exportable.groups) > 1:
        configs = [each for each in configs if each.target_name != "unsqueeze_copy.default"]
    return _package("backends.xnnpack.partition.xnnpack_partitioner").XnnpackPartitioner(configs=configs)


@dataclass(frozen=True)
class _ExecuTorch:
    max_sizes: Mapping[str, int]
    verify: bool
    name = "ExecuTorch"

    def prepared(self, exportable: Exportable) -> Exportable:
        """Return the graph with a largest size for each axis, and examples that are no larger."""
        devices = {tensor.device.type for tensor in exportable.plain.state_dict().values()}
        devices |= {tensor.device.type for tensor in exportable.examples.tensors.values()}
        if devices - {"cpu"}:
            raise ExportError(
                f"ExecuTorch: expected a graph on the CPU, got one on {', '.join(sorted(devices))}. Move it: graph.to('cpu')."
            )
        limits = _limits(exportable, self.max_sizes)
        examples = Examples(cut_examples(exportable, limits), exportable.examples.axes)
        ranges = {name: list(dims) for name, dims in exportable.constraints.ranges.items()}
        largest = {
            place: limits[axis] for axis, group in exportable.groups.items() if axis in limits for place in group
        }
        for (name, dim), size in exportable.examples.with_sums(largest).items():
            ranges[name][dim] = ranges[name][dim][0], size
        constraints = replace(exportable.constraints, ranges={name: tuple(dims) for name, dims in ranges.items()})
        return replace(exportable, constraints=constraints, examples=examples)

    def write(self, exportable: Exportable, path: Path) -> None:
        exir = _package("exir")
        if self.verify:
            _package("runtime")
        partitioner = _partitioner(exportable)
        step("exporting")
        checked = with_checks(exportable)
        program = export_plain(checked)
        use_torch_alone(program.graph)
        _bound(program, exportable.constraints)
        names = {"input_names": list(exportable.inputs), "output_names": list(exportable.outputs)}
        step("lowering")
        try:
            with quiet():
                lowered = exir.to_edge_transform_and_lower(program, partitioner=[partitioner], constant_methods=names)
                built = lowered.to_executorch()
        except Exception as error:  # ExecuTorch raises many kinds
            reason = first_line(str(error).replace("torch._ops.", ""), type(error).__name__).rstrip('.:"')
            raise ExportError(
                f"ExecuTorch does not take this graph: {reason}.{explain(checked, reason)} "
                "Write that line of the model with other operators, or export to ONNX, TorchScript or pt2."
            ) from error
        if self.verify:
            _check_kernels(built, checked)
        step("writing")
        with writable(path) as file:
            built.write_to_file(file)

    def load(self, path: Path, exportable: Exportable) -> Loaded:
        try:
            method = _package("runtime").Runtime.get().load_program(path).load_method("forward")
        except RuntimeError as error:
            raise ExportError(
                f"ExecuTorch's runtime does not load the written file: {first_line(str(error), 'no reason given')}. "
                f"For another runtime: {option('verify=False', '--no-verify')}."
            ) from error

        def run(inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
            found = method.execute([inputs[name].contiguous() for name in exportable.inputs])
            return dict(zip(exportable.outputs, found, strict=True))

        return run


def _limits(exportable: Exportable, given: Mapping[str, int]) -> dict[str, int]:
    """Return the largest size of each axis that varies: as given, or as the trace bounds it.

    Raises:
        ExportError: an axis has none, there is no such axis, or the trace does not cover the size.
    """
    sums, ranges = exportable.examples.sums, exportable.constraints.ranges
    groups = {axis: group for axis, group in exportable.groups.items() if min(group) not in sums}
    argument = option("max_sizes", "--max-size")
    unknown = [name for name in given if name not in groups]
    if unknown:
        raise ExportError(
            f"{argument} names {unknown[0]!r}, expected axes that vary: {', '.join(groups) or 'this graph has none'}."
        )
    limits, missing = {}, []
    for axis, group in groups.items():
        low = max(ranges[name][dim][0] for name, dim in group)
        high = min((high for name, dim in group if (high := ranges[name][dim][1]) != UNBOUNDED), default=UNBOUNDED)
        size = given.get(axis, high)
        if axis in given and (type(size) is not int or size < max(low, 1) or UNBOUNDED != high < size):
            covered = f"{max(low, 1)} or more" if high == UNBOUNDED else f"{max(low, 1)} to {high}"
            raise ExportError(
                f"{argument} for {axis!r}: expected a size that the trace covers, {covered}, got {size!r}."
            )
        if size == UNBOUNDED:
            missing.append(axis)
        limits[axis] = size
    if missing:
        example = ", ".join(f"{axis!r}: {8 if axis == 'batch' else 128}" for axis in missing)
        flags = " ".join(f"--max-size {axis}={8 if axis == 'batch' else 128}" for axis in missing)
        raise ExportError(
            f"ExecuTorch plans its memory for the largest inputs, and the trace has no largest size of {listed(missing, 5)}. "
            f"Give one for each, such as {option(f'max_sizes={{{example}}}', flags)}."
        )
    return limits


def _bound(program: torch.export.ExportedProgram, constraints: Constraints) -> None:
    """Let every size of an input have the largest value of its range, for which ExecuTorch plans memory (in place).

    Where a size has no bound, ExecuTorch takes that of the example, and a larger input fails.
    """
    bounded = set()
    sizes = []
    for node in program.graph.find_nodes(op="placeholder"):
        for (_, high), size in zip(
            constraints.ranges.get(str(node.target), ()), getattr(node.meta.get("val"), "shape", ()), strict=False
        ):
            if isinstance(size, int):
                continue
            sizes.append((node, size))
            symbol = size.node.expr
            if symbol.is_symbol:
                known = size.node.shape_env.var_to_range[symbol]
                size.node.shape_env.var_to_range[symbol] = ValueRanges(known.lower, high)
                program.range_constraints[symbol] = ValueRanges(program.range_constraints[symbol].lower, high)
                bounded.add(symbol)
    for node, size in sizes:
        if not size.node.expr.free_symbols <= bounded:
            raise ExportError(
                f"ExecuTorch: a size of {str(node.target)!r} is {size.node.expr} for torch.export, of which no largest value follows from "
                f"{option('max_sizes', '--max-size')}. Trace with dynamic= that leaves this dimension fixed."
            )


def _check_kernels(built: Any, exportable: Exportable) -> None:
    """Raise :class:`ExportError` if the runtime by which the file is compared has no kernel for an operator of it."""
    known = _package("runtime").Runtime.get().operator_registry.operator_names
    plan = next(plan for plan in built.executorch_program.execution_plan if plan.name == "forward")
    names = {f"{each.name}.{each.overload}".rstrip("."): each.name for each in plan.operators}
    missing = {name: operator for name, operator in names.items() if name not in known}
    if missing:
        raise ExportError(
            f"ExecuTorch's runtime has no kernel for {listed(list(missing), 3)}.{explain(exportable, next(iter(missing.values())))} "
            "Write that line of the model with other operators; for a runtime that has one: "
            f"{option('verify=False', '--no-verify')}."
        )
