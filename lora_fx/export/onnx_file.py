"""ONNX: a model with dynamic axes, in which inputs, outputs, axes and weights have the names that they have in the model."""

from __future__ import annotations

import hashlib
import importlib
import re
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_fx.errors import ExportError
from lora_fx.export.compare import Loaded, compare
from lora_fx.export.deliver import Exported, Options, Step, deliver
from lora_fx.export.onnx_input_checks import add_checks
from lora_fx.export.onnx_ops import attention, grouped_mm
from lora_fx.export.onnx_slots import Slots
from lora_fx.export.portable_ops import grouped_products
from lora_fx.export.prepare import Exportable, prepare
from lora_fx.export.torch_program import export_plain
from lora_fx.files.atomic import check_file, writable
from lora_fx.graph.graph_module import TracedGraphModule
from lora_fx.graph.provenance import source_line
from lora_fx.tracing.torch_export import quiet

LARGE = 10**9
"""Weights of more bytes go into a file of their own: protobuf holds two gigabytes at most."""


def onnx(
    graph_module: TracedGraphModule,
    path: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    tolerance: float | None = None,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
    slots: bool = False,
) -> Exported:
    """Write a graph as an ONNX model, in evaluation mode. Needs the extra ``lora-fx[onnx]``.

    Inputs and outputs have the model's names, weights those of its ``state_dict``, and dimensions that vary the names of
    their axes (``batch``, ``sequence``). Sizes that the trace does not cover fail a node whose name says what it holds for.
    Weights of more than 1 GB go into one file beside ``path``, ``<name>.<digest>.data``, which has to stay beside it.

    Args:
        graph_module: base, branched, fused or folded; left as it is.
        path: of the file to write.
        overwrite: replace a file that exists, and its file of weights.
        verify: run what was written by onnxruntime on the CPU, and compare it with the graph before it is moved to ``path``.
        tolerance: the largest difference that is allowed, as a part of the largest value of an output. By default 1e-9,
            1e-4 or 0.05, by the lowest precision of the weights.
        example_inputs: traced and compared with these, and with other sizes of them, instead of the inputs of the trace.
        slots: write the base, with a slot for an adapter at each site that has a branch, see :func:`onnx_adapter`; of the
            branches themselves nothing is written. Without an adapter, the model computes the bits of the base, or a rounding
            of them where onnxruntime at its higher optimisation levels makes one operator of what a slot is between (a product
            and the GELU or the layer norm behind it). It is compared without an adapter, and with one that is made up.

    Returns:
        What was written, and how it compares.

    Raises:
        ExportError: ONNX does not take the graph; the message names the operator and the model's line. Or it has a branch
            for which there are no slots.
        VerifyError: what was written computes something else, or onnxruntime does not run it.
        LoraFxError: the path exists or cannot be written.
    """
    for name in ("onnx", "onnx_ir", "onnxscript", *(["onnxruntime"] if verify else [])):
        _import(name)
    check_file(Path(path), overwrite=overwrite)
    former = _data_beside(Path(path))
    with_slots = Slots.of(graph_module) if slots else None
    options = Options(overwrite, verify, tolerance, example_inputs)
    written = with_slots.probe if with_slots else graph_module
    exported = deliver(_Onnx(with_slots, options), written, path, options)
    _remove_unnamed(former, exported.path)
    return exported


@dataclass(frozen=True)
class _Onnx:
    slots: Slots | None
    options: Options
    name = "ONNX"

    def write(self, exportable: Exportable, path: Path, step: Step) -> None:
        _check_names(exportable)
        written = exportable if self.slots is None else self.slots.as_inputs(exportable)
        step("exporting")
        program = export_plain(written)
        step("translating")
        model = _translate(written, program)
        step("cleaning up")
        _clean_up(model)
        add_checks(model, exportable.constraints)
        if self.slots is not None:
            self.slots.register(model)
        step("writing")
        _write(model, path)
        try:
            _import("onnx").checker.check_model(str(path), full_check=True)
        except Exception as error:
            raise ExportError(f"onnx.checker refuses what was written: {error}") from error

    def load(self, path: Path) -> Loaded:
        runtime = _import("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised, too
        try:
            session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(
                f"onnxruntime {runtime.__version__} does not load what was written: {error} "
                "Its CPU kernels want float32 (--dtype float32); where another runtime is to run it: verify=False (--no-verify)."
            ) from error
        names = [output.name for output in session.get_outputs()]

        def run(inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
            found = session.run(None, {name: tensor.cpu().numpy() for name, tensor in inputs.items()})
            return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

        if self.slots is None:
            return run
        compare(prepare(self.slots.base, self.options.example_inputs), run, self.options.tolerance)
        values = self.slots.values
        return lambda inputs: run({**inputs, **values})


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f"{name} is needed to write and check ONNX: pip install 'lora-fx[onnx]'. {error}") from error


def _check_names(exportable: Exportable) -> None:
    taken = {*exportable.inputs, *(str(node.target) for node in exportable.plain.graph.find_nodes(op="get_attr"))}
    for name in exportable.outputs:
        if name in taken:
            raise ExportError(
                f"an output and an input or a weight are both called {name!r}, and in ONNX each value has a name of its own. "
                "Trace a module that names its output otherwise."
            )


def _translate(exportable: Exportable, program: torch.export.ExportedProgram) -> Any:
    table: dict[Any, Callable[..., Any]] = {torch.ops.aten.scaled_dot_product_attention.default: attention}
    table |= {node.target: grouped_mm for node in grouped_products(program.graph)}
    try:
        with quiet():
            translated = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                # What it optimises loses the names of weights: transposes are folded, equal tensors merged, zeros dropped.
                optimize=False,
                output_names=list(exportable.outputs),
                custom_translation_table=table,
            )
    except Exception as error:
        raise ExportError(
            f"torch.onnx does not take this graph: {_reasons(error)}{_where(error)} "
            "Export it to TorchScript or pt2, or write that line of the model with other operators."
        ) from error
    assert translated is not None
    translated.rename_axes(_symbols(exportable, program))
    return translated.model


def _reasons(error: BaseException | None) -> str:
    """Return the first lines of an error and of what caused it; torch.onnx's own say little."""
    found: list[str] = []
    while error is not None:
        lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", str(error)).splitlines() if line.strip()]
        if lines and not lines[0].startswith(("Failed to", "Error when ", "Error calling ", "Error constructing ")):
            found.append(lines[0].rstrip("."))
        error = error.__cause__
    return ". ".join(dict.fromkeys(found)) + "."


def _where(error: BaseException | None) -> str:
    """Return the operator, and the model's line, that was translated; only the frames of torch.onnx hold its node."""
    found = None
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            node = frame.f_locals.get("node")
            found = node if isinstance(node, torch.fx.Node) else found
        error = error.__cause__
    return "" if found is None else f" The operator is {found.target}{source_line(found)}."


def _symbols(exportable: Exportable, program: torch.export.ExportedProgram) -> dict[Any, str]:
    """Map the symbols of the exported sizes to the names of axes."""
    names: dict[Any, str] = {}
    placeholders = {str(node.target): node for node in program.graph.find_nodes(op="placeholder")}
    for name, axes in exportable.axes.items():
        for dim, axis in axes.items():
            names.setdefault(str(placeholders[name].meta["val"].shape[dim]), axis)
    return names


def _clean_up(model: Any) -> None:
    """Compute what is constant, and drop what is computed twice or for nothing (in place). Weights keep names and values."""
    passes, optimizer = _import("onnx_ir.passes.common"), _import("onnxscript.optimizer")
    weights = set(model.graph.initializers.values())
    described = [(value.type, value.shape) for value in model.graph.outputs]
    optimizer.fold_constants(
        model, should_fold=lambda node: None if weights.isdisjoint(node.inputs) else False, onnx_shape_inference=False
    )
    _remove_identities(model)
    _write_as_nodes(model, {name: value for name, value in model.graph.initializers.items() if value not in weights})
    for each in (
        passes.RemoveUnusedNodesPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),
        passes.NameFixPass(),
    ):
        each(model)
    for value, (type_, shape) in zip(model.graph.outputs, described, strict=True):
        value.type, value.shape = type_, shape  # which are lost where an output is computed twice


def _remove_identities(model: Any) -> None:
    """Let what reads a copy read the original (in place). onnx_ir's own pass loses an output that is a copy of another."""
    ir = _import("onnx_ir")
    for node in list(model.graph):
        if node.op_type == "Identity" and not node.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            model.graph.remove(node, safe=True)


def _write_as_nodes(model: Any, constants: Mapping[str, Any]) -> None:
    """Let constants that were computed be nodes (in place), so that initializers are weights alone."""
    ir = _import("onnx_ir")
    for name, value in constants.items():
        node = ir.node("Constant", [], attributes={"value": value.const_value})
        model.graph.insert_before(model.graph[0], node)
        ir.convenience.replace_all_uses_with(value, node.outputs[0])
        del model.graph.initializers[name]
        node.outputs[0].name = name


def _write(model: Any, path: Path) -> None:
    ir = _import("onnx_ir")
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size <= LARGE:
        with writable(path) as file:
            file.write(ir.to_proto(model).SerializeToString(deterministic=True))
        return
    data = path.with_name(f"{path.name}.{_digest(model)}.data")
    ir.save(model, str(path), format="protobuf", external_data=data.name)


def _digest(model: Any) -> str:
    """Return what tells these weights from others: a model never finds those of another under the name that it knows."""
    digest = hashlib.sha256()
    for name, value in sorted(model.graph.initializers.items()):
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(value.const_value.tobytes())
    return digest.hexdigest()[:8]


def _data_beside(path: Path) -> set[Path]:
    """Return the files of weights of models that were written to a path."""
    name = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{8}}\.data")
    with suppress(OSError):  # there is no such directory yet, or it may not be listed
        return {file for file in path.parent.iterdir() if name.fullmatch(file.name)}
    return set()


def _remove_unnamed(files: set[Path], path: Path) -> None:
    """Remove the files of weights that the model at a path does not name."""
    if not files:
        return
    model = _import("onnx").load(str(path), format="protobuf", load_external_data=False)
    named = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    for file in files:
        if file.name not in named:
            with suppress(OSError):
                file.unlink()
