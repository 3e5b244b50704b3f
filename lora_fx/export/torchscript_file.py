"""TorchScript: a scripted module with dynamic sizes. The package uses ``torch.jit``, which torch deprecates, here alone.

The graph is written once more as plain Python that TorchScript compiles: operator packets in place of overloads, sizes by
``aten.size``, arguments by the model's own names, a ``Dict[str, Tensor]`` as result. Input checks are scripted with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx

from lora_fx.errors import ExportError, first_line, listed
from lora_fx.export.compare import Loaded
from lora_fx.export.deliver import Exported, Options, deliver
from lora_fx.export.portable_ops import use_torch_alone
from lora_fx.export.prepare import Exportable, check_alone, explain, prepare
from lora_fx.export.rewritten_ops import value_checks
from lora_fx.files.atomic import writable
from lora_fx.graph.graph_module import TracedGraphModule, copy_graph
from lora_fx.progress import step
from lora_fx.torch_internals import OpOverload


def torchscript(
    graph_module: TracedGraphModule,
    path: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    tolerance: float | None = None,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
) -> Exported:
    """Write a graph as TorchScript, in evaluation mode.

    The file is loaded by ``torch.jit.load``, in Python or C++. It takes the tensors that the graph was traced with, by name
    or in the order of the model's arguments, in any size that the trace covers, and returns a dictionary from output names
    to tensors; values nested in an output are named ``<output>.<index>``. Other sizes than the trace covers raise an error.

    Args:
        graph_module: base, branched, fused or folded; not changed.
        path: of the file to write.
        overwrite: replace a file that exists.
        verify: load the written file and compare it with the graph before it is moved to ``path``.
        tolerance: the largest difference that is allowed, as a part of the largest value of an output. By default 1e-9,
            1e-4 or 0.05, by the lowest precision of the weights.
        example_inputs: compared on these, and on other sizes of them, instead of the inputs of the trace.

    Returns:
        The written files and their comparison with the graph.

    Raises:
        ExportError: TorchScript does not take the graph; the message names the operator and the model's line.
        VerifyError: the written file does not compute the same.
        WriteError: the path exists or cannot be written.
    """
    return deliver(_TorchScript(), graph_module, path, Options(overwrite, verify, tolerance, example_inputs))


def _not(value: bool) -> bool:
    return not value


def _choose(condition: bool, yes: int, no: int) -> int:
    return yes if condition else no


def _require(holds: torch.Tensor, message: str) -> None:
    if not bool(holds):
        raise RuntimeError(message)


_COUNTERPARTS: Mapping[object, Callable[..., Any]] = {
    torch.ops.aten.sym_size.int: torch.ops.aten.size,
    torch.sym_min: min,
    torch.sym_max: max,
    torch.sym_not: _not,
    torch.sym_ite: _choose,
}


class _TorchScript:
    name = "TorchScript"

    def prepared(self, exportable: Exportable) -> Exportable:
        """Return the graph as it is."""
        check_alone(exportable)
        return exportable

    def write(self, exportable: Exportable, path: Path) -> None:
        _check_names(exportable)
        step("compiling")
        compilable = _compilable(exportable)
        with _undeprecated():
            try:
                scripted = torch.jit.script(compilable)
            except (RuntimeError, NotImplementedError, torch.jit.frontend.FrontendError) as error:
                reason = first_line(str(error), type(error).__name__).rstrip(".:")
                raise ExportError(
                    f"TorchScript does not take this graph: {reason}.{explain(exportable, str(error))} "
                    "Write that line of the model with other operators."
                ) from error
            step("writing")
            with writable(path) as file:
                torch.jit.save(scripted, file)

    def load(self, path: Path, _exportable: Exportable) -> Loaded:
        with _undeprecated():
            loaded = torch.jit.load(str(path))

        def run(inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
            found: Mapping[str, torch.Tensor] = loaded(**inputs)
            return found

        return run


def scriptable(graph_module: TracedGraphModule) -> fx.GraphModule:
    """Return the module that :func:`torchscript` compiles, over the same parameters, for ``torch.jit.script`` of a graph.

    Raises:
        ExportError: the graph is in training mode, or cannot be exported.
    """
    if graph_module.training:
        raise ExportError(
            "torch.jit.script: expected a graph in evaluation mode, the only one that its script computes in, got one in training mode. "
            "Call eval() on it first."
        )
    exportable = prepare(graph_module)
    check_alone(exportable)
    _check_names(exportable)
    return _compilable(exportable)


def _compilable(exportable: Exportable) -> fx.GraphModule:
    graph, _ = copy_graph(exportable.plain.graph)
    use_torch_alone(graph)
    for holds, message in value_checks(graph):
        with graph.inserting_after(holds):
            graph.call_function(_require, (holds, message))
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _counterpart(node)
    return fx.GraphModule(exportable.plain, graph).eval()


def _check_names(exportable: Exportable) -> None:
    """Refuse names that torch.jit.save writes as octal escapes which torch.jit.load does not read: any letter beyond ASCII."""
    nodes = [node for node in exportable.plain.graph.nodes if node.op in ("get_attr", "call_module")]
    names = dict.fromkeys(str(node.target) for node in nodes if not str(node.target).isascii())
    if names:
        raise ExportError(
            f"TorchScript loads no names with letters beyond ASCII, and the graph has {listed(list(map(repr, names)), 3)}. Rename these "
            "parts or adapters."
        )


@contextmanager
def _undeprecated() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\..* is deprecated", category=DeprecationWarning)
        warnings.filterwarnings(
            "ignore", message=".*instance-level annotations", category=UserWarning
        )  # from the annotations of GraphModule
        yield


def _counterpart(node: fx.Node) -> Any:
    if node.target in _COUNTERPARTS:
        return _COUNTERPARTS[node.target]
    return node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
