"""ONNX: a model with dynamic axes; its inputs, outputs, axes and weights keep their names."""

from __future__ import annotations

import hashlib
import re
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_fx.errors import ExportError, option
from lora_fx.export.compare import Loaded, compare
from lora_fx.export.deliver import Exported, Options, deliver
from lora_fx.export.onnx_dtype import check_dtype, convert_dtype
from lora_fx.export.onnx_input_checks import add_checks
from lora_fx.export.onnx_names import Names, name_values, with_names
from lora_fx.export.onnx_ops import attention, grouped_mm, onnx_package, scalar_tensor
from lora_fx.export.onnx_opset import DEFAULT_OPSET, TRANSLATED, check_opset, set_opset
from lora_fx.export.onnx_quantised import Product, products_of, store_quantised
from lora_fx.export.onnx_slots import Slots
from lora_fx.export.onnx_weights import store_transposed
from lora_fx.export.portable_ops import grouped_products
from lora_fx.export.prepare import Exportable, check_alone, prepare
from lora_fx.export.rewritten_ops import for_onnx
from lora_fx.export.torch_program import export_plain
from lora_fx.files.atomic import writable
from lora_fx.files.target import Target
from lora_fx.folding.dequantise import dequantise
from lora_fx.graph.compare import COARSE_TOLERANCE
from lora_fx.graph.graph_module import TracedGraphModule, as_traced
from lora_fx.graph.process_state import quiet
from lora_fx.graph.provenance import source_line
from lora_fx.progress import step
from lora_fx.tracing.fake_results import FakeResults
from lora_fx.tracing.torch_export import with_results

MAX_INLINE_BYTES = 10**9
"""Weights of more bytes go into a file of their own: protobuf holds two gigabytes at most."""


def onnx(
    graph_module: TracedGraphModule,
    path: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    tolerance: float | None = None,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
    input_names: Names | None = None,
    output_names: Names | None = None,
    slots: bool = False,
    opset: int = DEFAULT_OPSET,
    dtype: torch.dtype | None = None,
    transpose_weights: bool = True,
    quantised: bool = False,
) -> Exported:
    """Write a graph as an ONNX model, in evaluation mode. Needs the extra ``lora-fx[onnx]``.

    Inputs and outputs have the model's names, weights those of its ``state_dict`` (see ``transpose_weights``), and dimensions that
    vary the names of their axes (``batch``, ``sequence``). Sizes that the trace does not cover fail at a node whose name says which sizes it covers.
    Weights of more than 1 GB go into one file beside ``path``, ``<name>.<digest>.data``, which has to stay beside it.

    Args:
        graph_module: base, branched, fused or folded; not changed.
        path: of the file to write.
        overwrite: replace a file that exists, and its file of weights.
        verify: run the written file by onnxruntime on the CPU, and compare it with the graph before it is moved to ``path``.
        tolerance: the largest difference that is allowed, as a part of the largest value of an output. By default 1e-9,
            1e-4 or 0.05, by the lowest precision of the weights.
        example_inputs: traced and compared with these, and with other sizes of them, instead of the inputs of the trace.
        input_names: new names: a mapping from the names that the report has without it (those of the model; an input within a list or
            mapping is ``<input>.<index>`` or ``<input>.<key>``), or, as torch.onnx.export takes them, a list for the first inputs in their order.
        output_names: new names of outputs, given in the same way. An output that an input or a weight shares its name with is else called
            ``out_<name>``.
        slots: write the base, with a slot for an adapter at each site that has a branch, see :func:`onnx_adapter`; the branches
            themselves are not written. Without an adapter, the model computes the bits of the base; up to rounding where a slot
            stands between two operators that onnxruntime fuses at its higher optimisation levels (a product and the GELU or the
            layer norm behind it). It is compared without an adapter, and with a made-up one.
        opset: version of ONNX's operators, 17 or later. By default the newest that releases of onnxruntime and TensorRT of the last year take.
        dtype: ``torch.float16`` or ``torch.bfloat16``, for a graph in float32, which keeps its dtype: products, the weights and tables that
            they read, and sums and gates between them have it in the file. Inputs, outputs and all else stay float32 (norms, Softmax, masks,
            positions, residual sums), so do products of numbers that the dtype does not hold. The default ``tolerance`` is then 0.05.
            onnxruntime's CPU computes float16 with casts; of bfloat16 it has few kernels.
        transpose_weights: store a matrix that a product alone reads, transposed, as the initializer ``<key>.T``, for tools that
            quantise or fuse products: they skip those behind a Transpose. The model's metadata maps the names to the keys
            (``lora_fx.transposed_weights``, a JSON object). False stores each weight under its key, as it is.
        quantised: keep the codes of quantised weights, as ``<key>.codes``, ``.absmax``, ``.scale`` and ``.zero``, for operators that
            onnxruntime alone has (``com.microsoft``): MatMulBnb4 for NF4 and FP4, MatMulNBits for integers of 2, 4 and 8 bits. Its CPU
            has them for float32. False writes dense weights.

    Returns:
        The written files and their comparison with the graph.

    Raises:
        ExportError: ONNX does not take the graph; the message names the operator and the model's line. Or it has a branch
            that no slot takes, a quantised weight for whose product there is no kernel, or, with ``dtype``, weights or inputs that are
            not float32, or an operator that holds a graph (If, Loop, Scan).
        VerifyError: the written file does not compute the same, or onnxruntime does not run it.
        WriteError: the path exists or cannot be written.
    """
    for name in ("onnx", "onnx_ir", "onnxscript", *(["onnxruntime"] if verify else [])):
        onnx_package(name)
    Target(Path(path), overwrite).check()
    check_opset(opset)
    check_dtype(dtype, slots, quantised)
    if dtype is not None and tolerance is None:
        tolerance = COARSE_TOLERANCE
    previous = _data_beside(Path(path))
    products: Mapping[str, Product] = {}
    if quantised:
        products, graph_module = products_of(as_traced(graph_module)), dequantise(graph_module)
    with_slots = Slots.of(graph_module) if slots else None
    options = Options(overwrite, verify, tolerance, example_inputs)
    written = with_slots.probe if with_slots else graph_module
    format = _Onnx(with_slots, options, transpose_weights, products, input_names, output_names, opset, dtype)
    exported = deliver(format, written, path, options)
    _remove_unnamed(previous, exported.path)
    return exported


@dataclass(frozen=True)
class _Onnx:
    slots: Slots | None
    options: Options
    transpose_weights: bool
    products: Mapping[str, Product]
    input_names: Names | None
    output_names: Names | None
    opset: int
    dtype: torch.dtype | None
    name = "ONNX"

    def prepared(self, exportable: Exportable) -> Exportable:
        """Return the graph with names that ONNX takes."""
        check_alone(exportable)
        return with_names(for_onnx(exportable), self.input_names, self.output_names)

    def write(self, exportable: Exportable, path: Path) -> None:
        written = exportable if self.slots is None else self.slots.as_inputs(exportable)
        step("exporting")
        program = export_plain(written)
        step("translating")
        model = _translate(written, program, max(self.opset, TRANSLATED))
        step("cleaning up")
        _clean_up(model)
        if self.products:
            store_quantised(model, self.products)
        if self.transpose_weights:
            store_transposed(model)
        if self.dtype is not None:
            convert_dtype(model, self.dtype)
        add_checks(model, exportable.constraints, exportable.file_names)
        set_opset(model, self.opset)
        name_values(model, exportable)
        if self.slots is not None:
            self.slots.register(model)
        step("writing")
        _write(model, path)
        try:
            onnx_package("onnx").checker.check_model(str(path), full_check=True)
        except Exception as error:
            raise ExportError(f"onnx.checker refuses the written file: {error}") from error

    def load(self, path: Path, exportable: Exportable) -> Loaded:
        runtime = onnx_package("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 4  # errors are raised as well as logged
        try:
            session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(
                f"onnxruntime {runtime.__version__} does not load the written file: {error} "
                f"Its CPU kernels want float32{option('', ' (--dtype float32)')}, "
                f"and those for random numbers {option('opset=21', '--opset 21')} at most; "
                f"for another runtime: {option('verify=False', '--no-verify')}."
            ) from error
        names = [output.name for output in session.get_outputs()]

        def run(inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
            given = {exportable.file_names.get(name, name): tensor.cpu().numpy() for name, tensor in inputs.items()}
            found = session.run(None, given)
            return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

        if self.slots is None:
            return run
        compare(self.prepared(prepare(self.slots.base, self.options.example_inputs)), run, self.options.tolerance)
        values = self.slots.values
        return lambda inputs: run({**inputs, **values})


def _translate(exportable: Exportable, program: torch.export.ExportedProgram, opset: int) -> Any:
    table: dict[Any, Callable[..., Any]] = {torch.ops.aten.scaled_dot_product_attention.default: attention}
    table |= {node.target: grouped_mm for node in grouped_products(program.graph)}
    values = (node.meta.get("val") for node in program.graph.nodes)
    dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    if torch.float64 in dtypes and not any(dtype.is_complex for dtype in dtypes):
        table[torch.ops.aten.scalar_tensor.default] = scalar_tensor
    try:
        with quiet():
            # Its decompositions run the graph on fake tensors once more, under another rule for sizes than torch.export's.
            translated = with_results(
                FakeResults(),
                lambda: torch.onnx.export(
                    program,
                    dynamo=True,
                    verbose=False,
                    # Its optimiser loses the names of weights: it folds transposes, merges equal tensors, drops zeros.
                    optimize=False,
                    output_names=list(exportable.outputs),
                    opset_version=opset,
                    custom_translation_table=table,
                ),
            )
    except Exception as error:
        raise ExportError(
            f"torch.onnx does not take this graph: {_reasons(error)}{_where(error)} Write that line of the model with other operators."
        ) from error
    assert translated is not None
    translated.rename_axes(_symbols(exportable, program))
    return translated.model


def _reasons(error: BaseException | None) -> str:
    """Return the first lines of an error and of its causes; those of torch.onnx alone say little."""
    found: list[str] = []
    while error is not None:
        lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", str(error)).splitlines() if line.strip()]
        if lines and not lines[0].startswith(("Failed to", "Error when ", "Error calling ", "Error constructing ")):
            found.append(lines[0].rstrip("."))
        error = error.__cause__
    return ". ".join(dict.fromkeys(found)) + "."


def _where(error: BaseException | None) -> str:
    """Return the operator that failed and its line in the model; only the frames of torch.onnx hold its node."""
    found = None
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            node = frame.f_locals.get("node")
            found = node if isinstance(node, torch.fx.Node) else found
        error = error.__cause__
    return "" if found is None else f" The operator is {found.target}{source_line(found)}."


def _symbols(exportable: Exportable, program: torch.export.ExportedProgram) -> dict[Any, str]:
    """Map the symbols of the exported sizes to the names of their axes."""
    names: dict[Any, str] = {}
    placeholders = {str(node.target): node for node in program.graph.find_nodes(op="placeholder")}
    for name, axes in exportable.axes.items():
        for dim, axis in axes.items():
            names.setdefault(str(placeholders[name].meta["val"].shape[dim]), axis)
    return names


def _clean_up(model: Any) -> None:
    """Fold constants and remove duplicate and unused nodes (in place). Weights keep names and values."""
    passes, optimizer = onnx_package("onnx_ir.passes.common"), onnx_package("onnxscript.optimizer")
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
    _constants_as_tensors(model)
    for value, (type_, shape) in zip(model.graph.outputs, described, strict=True):
        value.type, value.shape = type_, shape  # lost where an output was computed twice


def _remove_identities(model: Any) -> None:
    """Replace copies by their originals (in place). onnx_ir's own pass loses an output that is a copy of another."""
    ir = onnx_package("onnx_ir")
    for node in list(model.graph):
        if node.op_type == "Identity" and not node.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            model.graph.remove(node, safe=True)


def _write_as_nodes(model: Any, constants: Mapping[str, Any]) -> None:
    """Turn computed constants into nodes (in place), so that initializers are weights alone."""
    ir = onnx_package("onnx_ir")
    for name, value in constants.items():
        node = ir.node("Constant", [], attributes={"value": value.const_value})
        model.graph.insert_before(model.graph[0], node)
        ir.convenience.replace_all_uses_with(value, node.outputs[0])
        del model.graph.initializers[name]
        node.outputs[0].name = name


def _constants_as_tensors(model: Any) -> None:
    """Write numbers and lists of constants as tensors (in place): onnxruntime's shape inference reads no others."""
    ir = onnx_package("onnx_ir")
    for node in model.graph.all_nodes():
        if node.op_type == "Constant":
            tensor = ir.convenience.get_const_tensor(node.outputs[0])
            if tensor is not None and "value" not in node.attributes:
                node.attributes.clear()
                node.attributes["value"] = ir.AttrTensor("value", tensor)


def _write(model: Any, path: Path) -> None:
    ir = onnx_package("onnx_ir")
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size <= MAX_INLINE_BYTES:
        with writable(path) as file:
            file.write(ir.to_proto(model).SerializeToString(deterministic=True))
        return
    data = path.with_name(f"{path.name}.{_digest(model)}.data")
    ir.save(model, str(path), format="protobuf", external_data=data.name)


def _digest(model: Any) -> str:
    """Return a digest of the weights, for the name of their file: a model never opens the weights of another."""
    digest = hashlib.sha256()
    for name, value in sorted(model.graph.initializers.items()):
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(value.const_value.tobytes())
    return digest.hexdigest()[:8]


def _data_beside(path: Path) -> set[Path]:
    """Return the files of weights that earlier exports to a path left beside it."""
    name = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{8}}\.data")
    with suppress(OSError):  # no such directory yet, or no right to list it
        return {file for file in path.parent.iterdir() if name.fullmatch(file.name)}
    return set()


def _remove_unnamed(files: set[Path], path: Path) -> None:
    """Remove those of the files that the model at a path does not name."""
    if not files:
        return
    model = onnx_package("onnx").load(str(path), format="protobuf", load_external_data=False)
    named = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    for file in files:
        if file.name not in named:
            with suppress(OSError):
                file.unlink()
