"""AOTInductor: a package of machine code that torch's compiler makes of a graph, which torch loads in Python and in C++.

Compiled code checks nothing, and reads memory by the sizes and strides that it was compiled for. So every input goes through an operator
whose C++ is compiled into the package: it refuses dtypes and sizes that the trace does not cover, and copies the input to contiguous memory.
"""

from __future__ import annotations

import json
import operator
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from lora_fx.errors import ExportError, first_line
from lora_fx.export.compare import Loaded
from lora_fx.export.deliver import Exported, Options, deliver
from lora_fx.export.portable_ops import use_torch_alone
from lora_fx.export.prepare import Exportable, check_alone, explain
from lora_fx.export.torch_program import export_plain
from lora_fx.files.atomic import writable
from lora_fx.graph.graph_module import TracedGraphModule
from lora_fx.graph.input_checks import Constraints
from lora_fx.graph.process_state import quiet
from lora_fx.progress import step

_library = torch.library.Library("lora_fx", "FRAGMENT")  # the registrations live as long as this object
_library.define("checked(Tensor given, Tensor[] inputs) -> Tensor")
CHECKED = torch.ops.lora_fx.checked.default


def _contiguous(given: torch.Tensor, _inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.empty_like(given, memory_format=torch.contiguous_format)


torch.library.register_fake(CHECKED, _contiguous, lib=_library)


def aoti(
    graph_module: TracedGraphModule,
    path: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    tolerance: float | None = None,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
) -> Exported:
    """Write a graph as an AOTInductor package, in evaluation mode: compiled for this processor and this release of torch.

    ``torch._inductor.aoti_load_package(path)`` takes the tensors that the graph was traced with by name, in any size that the trace
    covers, and returns a dictionary from output names to tensors. Other sizes and dtypes raise an error; strides may be any.

    Args:
        graph_module: base, branched, fused or folded; not changed.
        path: of the file to write; ends in ``.pt2``.
        overwrite: replace a file that exists.
        verify: load the written file and compare it with the graph before it is moved to ``path``.
        tolerance: the largest difference that is allowed, as a part of the largest value of an output. By default 1e-9,
            1e-4 or 0.05, by the lowest precision of the weights: compiled code adds in another order.
        example_inputs: traced and compared with these, and with other sizes of them, instead of the inputs of the trace.

    Returns:
        The written files and their comparison with the graph.

    Raises:
        ExportError: there is no C++ compiler, or torch.export or AOTInductor does not take the graph.
        VerifyError: the written file does not compute the same.
        WriteError: the path exists or cannot be written.
    """
    if Path(path).suffix != ".pt2":
        raise ExportError(
            f"{path}: expected a name that ends in .pt2, as torch wants it to load the package. Choose another name."
        )
    _check_compiler()
    return deliver(_Aoti(), graph_module, path, Options(overwrite, verify, tolerance, example_inputs))


class _Aoti:
    name = "AOTInductor"

    def prepared(self, exportable: Exportable) -> Exportable:
        """Return the graph as it is, on the one device that packages were tried on."""
        check_alone(exportable)
        devices = {tensor.device.type for tensor in exportable.plain.state_dict().values()}
        devices |= {tensor.device.type for tensor in exportable.examples.tensors.values()}
        if devices - {"cpu"}:
            raise ExportError(
                f"AOTInductor: expected a graph on the CPU, for which its input checks are written, got one on {', '.join(sorted(devices))}. "
                "Move it, graph.to('cpu'), or export to ONNX, TorchScript or pt2."
            )
        return exportable

    def write(self, exportable: Exportable, path: Path) -> None:
        from lora_fx.torch_internals import aoti_compile_and_package  # torch's compiler takes seconds to import

        step("exporting")
        program = export_plain(exportable)
        use_torch_alone(program.graph)
        _add_checks(program.graph, exportable.inputs)
        step("compiling")
        options = {
            "aot_inductor.custom_ops_to_c_shims": {CHECKED: [_checks_in_cpp(exportable.constraints)]},
            "aot_inductor.precompile_headers": False,  # pays from the second package on
            "cpp.dynamic_threads": True,  # as many as the process has that runs it, not as the one that compiles
        }
        with writable(path) as file, quiet():
            try:
                aoti_compile_and_package(program, package_path=file, inductor_configs=options)
            except OSError:
                raise
            except Exception as error:  # torch's compiler raises many kinds
                reason = first_line(str(error), type(error).__name__).rstrip(".:")
                raise ExportError(
                    f"AOTInductor does not take this graph: {reason}.{explain(exportable, str(error))} "
                    "Write that line of the model with other operators, or export to pt2, which torch.compile takes too."
                ) from error

    def load(self, path: Path, _exportable: Exportable) -> Loaded:
        from lora_fx.torch_internals import aoti_load_package

        loaded = aoti_load_package(str(path))

        def run(inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
            found: Mapping[str, torch.Tensor] = loaded(**inputs)
            return found

        return run


def _check_compiler() -> None:
    """Raise :class:`ExportError` unless one of the compilers is there that torch looks for: ``CXX``, or g++ (on macOS clang++)."""
    from lora_fx.torch_internals import inductor_config

    names = [name for name in inductor_config.cpp.cxx if name]  # torch reads CXX when it is imported
    if not any(shutil.which(name) for name in names):
        raise ExportError(
            f"AOTInductor compiles C++, and there is no compiler: looked for {' and '.join(names)} on the PATH. Install g++, or name a "
            "compiler by the environment variable CXX before the process starts, or export to pt2, which needs none."
        )


def _add_checks(graph: fx.Graph, names: Sequence[str]) -> None:
    """Let everything that reads an input read a checked copy of it (in place)."""
    inputs = [node for node in graph.find_nodes(op="placeholder") if str(node.target) in names]
    inputs.sort(key=lambda node: names.index(str(node.target)))
    users = {node: list(node.users) for node in inputs}
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        for node in inputs:
            copy = graph.call_function(CHECKED, (node, inputs))
            copy.meta["val"] = _contiguous(node.meta["val"], ())
            for user in users[node]:
                user.replace_input_with(node, copy)


def _checks_in_cpp(constraints: Constraints) -> str:
    """Return the C++ function that an AOTInductor package calls for ``CHECKED``.

    Sizes are computed in double precision, which holds every size exactly, and in which a division by zero ends no process.
    """
    names = list(constraints.ranges)
    kinds = []
    for index, (name, ranges) in enumerate(constraints.ranges.items()):
        dtype = str(constraints.dtypes[name]).removeprefix("torch.")
        kinds += [
            f"aoti_torch_get_dtype(inputs[{index}], &dtype);",
            f"require(dtype == aoti_torch_dtype_{dtype}(), {json.dumps(f'{name} of dtype {dtype}')});",
            f"require(ranks[{index}] == {len(ranges)}, {json.dumps(f'{name} with {len(ranges)} dimensions')});",
        ]
    conditions = [
        f"require({relation.interpret(lambda name, dim: f'double(sizes[{names.index(name)}][{dim}])', _number, _apply)}, "
        f"{json.dumps(str(relation))});"
        for relation in (*constraints.fixed_sizes(), *constraints.conditions)
    ]
    declared = f"    const char* names[] = {{{', '.join(map(json.dumps, names))}}};"
    checks = "\n".join(f"    {line}" for line in (*kinds, *conditions))
    return f"{_BEGIN}{declared}{_REQUIRE}{checks}{_COPY}"


_BEGIN = """AOTITorchError aoti_torch_cpu_checked(
    AtenTensorHandle given, const AtenTensorHandle* inputs, int64_t count, AtenTensorHandle* copy
) {
"""

_REQUIRE = """
    std::vector<int64_t> ranks(count);
    std::vector<int64_t*> sizes(count);
    for (int64_t i = 0; i < count; ++i) {
        aoti_torch_get_dim(inputs[i], &ranks[i]);
        aoti_torch_get_sizes(inputs[i], &sizes[i]);
    }
    auto require = [&](bool holds, const char* expected) {
        if (holds) return;
        std::string message = std::string("expected ") + expected + ", which the trace covers, got ";
        for (int64_t i = 0; i < count; ++i) {
            message += std::string(i ? ", " : "") + names[i] + " (";
            for (int64_t d = 0; d < ranks[i]; ++d) message += (d ? ", " : "") + std::to_string(sizes[i][d]);
            message += ")";
        }
        throw std::runtime_error(message + ". Trace again with example_inputs of this kind.");
    };
    int32_t dtype;
"""

_COPY = """
    int64_t rank;
    int64_t* shape;
    aoti_torch_get_dim(given, &rank);
    aoti_torch_get_sizes(given, &shape);
    aoti_torch_get_dtype(given, &dtype);
    std::vector<int64_t> strides(rank, 1);
    for (int64_t d = rank - 2; d >= 0; --d) strides[d] = strides[d + 1] * std::max<int64_t>(shape[d + 1], 1);
    AOTITorchError failed = aoti_torch_empty_strided(
        rank, shape, strides.data(), dtype, aoti_torch_device_type_cpu(), 0, copy
    );
    return failed ? failed : aoti_torch_copy_(*copy, given, 0);
}"""


def _number(value: int) -> str:
    return f"double({value})"


def _apply(function: Callable[..., Any], operands: Sequence[str]) -> str:
    if function is operator.neg:
        return f"(-{operands[0]})"
    left, right = operands
    if function is operator.floordiv:
        return f"std::floor({left} / {right})"
    if function is operator.mod:
        return f"({left} - std::floor({left} / {right}) * {right})"
    if function in _CALLS:
        return f"{_CALLS[function]}({left}, {right})"
    return f"({left} {_OPERATORS[function]} {right})"


_CALLS: Mapping[Callable[..., Any], str] = {torch.sym_min: "std::min", torch.sym_max: "std::max"}
_OPERATORS: Mapping[Callable[..., Any], str] = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.and_: "&&",
    operator.or_: "||",
}
