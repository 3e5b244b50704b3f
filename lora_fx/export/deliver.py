"""Delivery of an exported file: prepare the graph, write beside the target, load the file, compare, move it into place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import distributed

from lora_fx.errors import ExportError, listed
from lora_fx.export.compare import Comparison, Loaded, check_tolerance, compare
from lora_fx.export.prepare import Exportable, prepare
from lora_fx.files.atomic import replacing
from lora_fx.files.target import Target
from lora_fx.graph.graph_module import TracedGraphModule
from lora_fx.graph.info import known_info
from lora_fx.graph.process_state import exclusive
from lora_fx.graph.sharded import agreed, processes_of
from lora_fx.progress import shown, step

Result = TypeVar("Result")


class Format(Protocol):
    """A file format; each has a module of its own.

    Attributes:
        name: in summaries and messages.
    """

    name: str

    def prepared(self, exportable: Exportable) -> Exportable:
        """Return the graph as the format has it, with other names for some inputs and outputs."""

    def write(self, exportable: Exportable, path: Path) -> None:
        """Write a graph to ``path``; further files go beside it, in the same directory."""

    def load(self, path: Path, exportable: Exportable) -> Loaded:
        """Load the written file as its users would."""


@dataclass(frozen=True)
class Options:
    """The options that all exporters take.

    Attributes:
        overwrite: replace a file that exists.
        verify: load the written file and compare it with the graph before it is moved to its path.
        tolerance: the largest difference that is allowed, as a part of the largest value of an output; None for 1e-9, 1e-4 or
            0.05, by the lowest precision of the weights.
        example_inputs: traced and compared with these, and with other sizes of them, instead of the inputs of the trace.
    """

    overwrite: bool
    verify: bool
    tolerance: float | None
    example_inputs: Mapping[str, torch.Tensor] | None


@dataclass(frozen=True)
class Exported:
    """A written file and its comparison with the graph. ``str(exported)`` is a summary of a few lines.

    Attributes:
        path: of the file, or of the directory (:func:`lora_fx.export.generation`).
        format: ``"TorchScript"``, ``"ONNX"``, ``"pt2"``, ``"AOTInductor"`` or ``"ExecuTorch"``.
        files: all that were written, with sizes in bytes; more than one where a format keeps large weights apart.
        inputs: name of an input → one entry per dimension: the name of its axis, or its size where that is fixed.
        outputs: names of the results.
        renamed: results that an input or a weight shares its name with → their names in the file.
        left_out: names of results that are None, which the file does not have.
        comparisons: one per combination of sizes that was tried; empty with ``verify=False``.
    """

    path: Path
    format: str
    files: Mapping[Path, int]
    inputs: Mapping[str, tuple[str | int, ...]]
    outputs: tuple[str, ...]
    renamed: Mapping[str, str]
    left_out: tuple[str, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def largest(self) -> float | None:
        """The largest difference to the graph, as a part of the largest value of its output; None without comparisons."""
        return max((comparison.largest for comparison in self.comparisons), default=None)

    def __str__(self) -> str:
        if self.path in self.files:
            lines = [f"{path}: {self.format}, {size / 1e6:.1f} MB" for path, size in self.files.items()]
        else:
            size, names = sum(self.files.values()), ", ".join(path.name for path in self.files)
            lines = [f"{self.path}: {self.format}, {size / 1e6:.1f} MB ({names})"]
        inputs = [f"{name} ({', '.join(map(str, axes))})" for name, axes in self.inputs.items()]
        lines.append(f"{listed(inputs, _MAX_NAMED)} → {listed(self.outputs, _MAX_NAMED)}")
        for name, other in self.renamed.items():
            lines.append(f"the output {name} is called {other}, since an input or a weight has its name")
        if self.left_out:
            lines.append(f"left out, since None: {listed(self.left_out, _MAX_NAMED)}")
        if not self.comparisons:
            return "\n".join([*lines, "not compared with the graph"])
        lines.append(f"largest difference to the graph: {self.largest:.1e} of the largest value of an output")
        return "\n".join([*lines, *(f"  {comparison}" for comparison in self.comparisons)])


_MAX_NAMED = 8  # of the inputs, and of the outputs: a cache has two for each layer


def deliver(format: Format, graph_module: TracedGraphModule, path: str | Path, options: Options) -> Exported:
    """Write a graph in a format; at every moment ``path`` is absent, unchanged, or complete and compared.

    The graphs of several processes are delivered by all together, each to a path of its own, and where one raises, all do.

    Raises:
        ExportError: the format does not take the graph; the message names the operator and its line in the model.
        VerifyError: the written file does not compute the same as the graph.
        WriteError: the path exists or cannot be written.
    """
    path = Path(path)
    target = Target(path, options.overwrite)
    divided = isinstance(graph_module, TracedGraphModule) and known_info(graph_module).shards is not None
    groups = processes_of(graph_module) if divided else []

    def agree(function: Callable[[], Result]) -> Result:
        return agreed(groups, lambda: (function(), ""))

    agree(target.check)
    _check_own_path(path, groups)
    check_tolerance(options.tolerance)
    if torch.get_default_device().type == "meta":
        raise ExportError(
            "nothing can be computed inside of torch.device('meta'), which an export has to do. Leave that block."
        )
    with exclusive(), _own_precision(), shown(f"exporting to {format.name}"):
        step("preparing")
        exportable = agree(lambda: format.prepared(prepare(graph_module, options.example_inputs)))
        with replacing(target) as beside, torch.no_grad():
            agree(lambda: format.write(exportable, beside))
            sizes = {path.parent / file.name: file.stat().st_size for file in sorted(beside.parent.iterdir())}
            comparisons: tuple[Comparison, ...] = ()
            if options.verify:
                step("comparing")
                comparisons = compare(exportable, agree(lambda: format.load(beside, exportable)), options.tolerance)
            step("moving into place")
    names = exportable.outputs, exportable.evaded, exportable.left_out
    return Exported(path, format.name, sizes, _axes(exportable), *names, comparisons)


def _check_own_path(path: Path, groups: Sequence[distributed.ProcessGroup]) -> None:
    """Raise :class:`ExportError` in all of several processes where some would write to one path."""
    for group in groups:
        paths = [path] * group.size()
        distributed.all_gather_object(paths, path, group=group)
        if len(set(paths)) < len(paths):
            raise ExportError(
                f"{path}: several processes would write this file, and each has another part. Give each a name of its own: f'part-{{rank}}.pt2'."
            )


@contextmanager
def _own_precision() -> Iterator[None]:
    """Switch off an autocast around the export: the written file runs without one."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _axes(exportable: Exportable) -> dict[str, tuple[str | int, ...]]:
    names = exportable.axes
    return {
        exportable.file_names.get(name, name): tuple(
            names[name].get(dim, size) for dim, size in enumerate(tensor.shape)
        )
        for name, tensor in exportable.examples.tensors.items()
    }
