"""pt2: the archive of ``torch.export``, for processes with torch alone to load, compile or lower further."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lora_fx.errors import ExportError, listed
from lora_fx.export.compare import Loaded
from lora_fx.export.deliver import Exported, Options, deliver
from lora_fx.export.portable_ops import use_torch_alone
from lora_fx.export.prepare import Exportable
from lora_fx.export.torch_program import export_plain
from lora_fx.files.atomic import writable
from lora_fx.graph.graph_module import TracedGraphModule
from lora_fx.graph.process_state import quiet
from lora_fx.progress import step


def pt2(
    graph_module: TracedGraphModule,
    path: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    tolerance: float | None = None,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
) -> Exported:
    """Write a graph as an ``ExportedProgram``, in evaluation mode.

    ``torch.export.load(path).module()`` takes the tensors that the graph was traced with by name, in any size that the trace
    covers, and returns a dictionary from output names to tensors. Sizes that the trace does not cover fail a guard.
    ``lora_fx.trace(torch.export.load(path), inference=True)`` gives a graph again, in which branches can be folded.

    Of a graph that :func:`lora_fx.parallel.shard` divided, all processes call this, each with a path of its own. The files are run together, by
    as many processes in a group of the same name, as the group of all processes has.

    Args:
        graph_module: base, branched, fused or folded; not changed.
        path: of the file to write; ends in ``.pt2``.
        overwrite: replace a file that exists.
        verify: load the written file and compare it with the graph before it is moved to ``path``.
        tolerance: the largest difference that is allowed, as a part of the largest value of an output. By default 1e-9,
            1e-4 or 0.05, by the lowest precision of the weights.
        example_inputs: traced and compared with these, and with other sizes of them, instead of the inputs of the trace.

    Returns:
        The written files and their comparison with the graph.

    Raises:
        ExportError: torch.export does not take the graph; the message names the model's line.
        VerifyError: the written file does not compute the same.
        WriteError: the path exists or cannot be written.
    """
    if Path(path).suffix != ".pt2":
        raise ExportError(
            f"{path}: expected a name that ends in .pt2, as torch.export wants it to load the file. Choose another name."
        )
    return deliver(_Pt2(), graph_module, path, Options(overwrite, verify, tolerance, example_inputs))


class _Pt2:
    name = "pt2"

    def prepared(self, exportable: Exportable) -> Exportable:
        """Return the graph as it is."""
        return exportable

    def write(self, exportable: Exportable, path: Path) -> None:
        _check_names(exportable)
        step("exporting")
        program = export_plain(exportable)
        use_torch_alone(program.graph)  # after the export: torch.export has no fake of grouped_mm in single precision
        _check_dtypes(program, exportable)
        step("writing")
        with writable(path) as file, quiet():
            torch.export.save(program, file)

    def load(self, path: Path, _exportable: Exportable) -> Loaded:
        with path.open("rb") as file:
            module = torch.export.load(file).module()

        def run(inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
            found: Mapping[str, torch.Tensor] = module(**inputs)
            return found

        return run


def _check_names(exportable: Exportable) -> None:
    """Refuse paths of modules that torch.export.load splits where they are one: it reads ``key,path,class;key,path,class;…``."""
    stacks = (node.meta.get("nn_module_stack") or {} for node in exportable.plain.graph.nodes)
    paths = dict.fromkeys(path for stack in stacks for path, _ in stack.values())
    names = [path for path in paths if _is_split(path)]
    if names:
        raise ExportError(
            f"torch.export loads no names of modules with a comma, a semicolon or a bracket alone, and the graph has "
            f"{listed(list(map(repr, names)), 3)}. Rename these modules."
        )


def _is_split(path: str) -> bool:
    depth = 0
    for letter in path:
        if letter == ";" or (letter == "," and depth == 0):
            return True
        depth += (letter in "[(") - (letter in "])")
    return depth != 0


def _check_dtypes(program: torch.export.ExportedProgram, exportable: Exportable) -> None:
    """Insert torch.export's own assertions on dtypes (in place): its guards check sizes alone."""
    graph = program.graph
    inputs = [node for node in graph.find_nodes(op="placeholder") if str(node.target) in exportable.constraints.dtypes]
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        for node in inputs:
            dtype = exportable.constraints.dtypes[str(node.target)]
            check = graph.call_function(torch.ops.aten._assert_tensor_metadata.default, (node,), {"dtype": dtype})
            check.meta = {"val": None}
