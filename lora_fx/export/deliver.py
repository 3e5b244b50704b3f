"""The way of every export: prepare the graph, write it beside its target, load what was written, compare, move it into place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Protocol

import torch
from tqdm.auto import tqdm

from lora_fx.errors import ExportError, LoraFxError
from lora_fx.export.compare import Comparison, Loaded, check_tolerance, compare
from lora_fx.export.prepare import Exportable, prepare
from lora_fx.files.atomic import check_file, replacing
from lora_fx.graph.graph_module import TracedGraphModule


class Format(Protocol):
    """A format that graphs are written in: one module each."""

    name: str

    def write(self, exportable: Exportable, path: Path, step: Step) -> None:
        """Write a graph to ``path``; what else it needs goes beside it, in the same directory."""

    def load(self, path: Path) -> Loaded:
        """Load what was written, as its users would."""


Step = Callable[[str], None]
"""Tells what an export is about to do."""

STEPS = 7
"""So many steps an export has at most."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares with its graph. ``str(exported)`` says it in a few lines.

    Attributes:
        path: of the file.
        format: ``"TorchScript"``, ``"ONNX"`` or ``"pt2"``.
        files: what was written, with sizes in bytes; more than one where a format keeps large weights apart.
        inputs: name of an input → names of its dimensions, or sizes of those that are fixed.
        outputs: names of the results.
        comparisons: one for each size that was tried; empty with ``verify=False``.
    """

    path: Path
    format: str
    files: Mapping[Path, int]
    inputs: Mapping[str, tuple[str | int, ...]]
    outputs: tuple[str, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def largest(self) -> float | None:
        """The largest difference to the graph, as a part of the largest value of its output; None if it was not looked at."""
        return max((comparison.largest for comparison in self.comparisons), default=None)

    def __str__(self) -> str:
        lines = [f"{path}: {self.format}, {size / 1e6:.1f} MB" for path, size in self.files.items()]
        shown = ", ".join(f"{name} ({', '.join(map(str, axes))})" for name, axes in self.inputs.items())
        lines.append(f"{shown} → {', '.join(self.outputs)}")
        if not self.comparisons:
            return "\n".join([*lines, "not compared with the graph"])
        lines.append(f"largest difference to the graph: {self.largest:.1e} of the largest value of an output")
        return "\n".join([*lines, *(f"  {comparison}" for comparison in self.comparisons)])


def deliver(
    format: Format,
    graph_module: TracedGraphModule,
    path: str | Path,
    *,
    overwrite: bool,
    verify: bool,
    tolerance: float | None,
    example_inputs: Mapping[str, torch.Tensor] | None,
) -> Exported:
    """Write a graph in a format; ``path`` is absent, as it was, or whole and compared, at every moment.

    Raises:
        ExportError: the format does not take the graph; the message names the operator and the line of the model that has it.
        VerifyError: what was written computes something else than the graph.
        LoraFxError: the path exists or cannot be written.
    """
    path = Path(path)
    check_file(path, overwrite=overwrite)
    if path.is_dir():
        raise LoraFxError(f"{path} is a directory, and {format.name} is written to a file. Choose another name.")
    check_tolerance(tolerance)
    if torch.get_default_device().type == "meta":
        raise ExportError(
            "inside of torch.device('meta') nothing can be computed, and so nothing exported. Leave that block."
        )
    with _ONE_AT_A_TIME, _own_precision(), _progress(format.name) as step:
        step("preparing")
        exportable = prepare(graph_module, example_inputs)
        with replacing(path, overwrite=overwrite) as beside, torch.no_grad():
            format.write(exportable, beside, step)
            sizes = {path.parent / file.name: file.stat().st_size for file in sorted(beside.parent.iterdir())}
            comparisons: tuple[Comparison, ...] = ()
            if verify:
                step("comparing")
                comparisons = compare(exportable, format.load(beside), tolerance)
            step("moving into place")
    return Exported(path, format.name, sizes, _axes(exportable), exportable.outputs, comparisons)


_ONE_AT_A_TIME = RLock()
"""Torch's tracers keep their state in the process."""


@contextmanager
def _own_precision() -> Iterator[None]:
    """Leave an autocast that is on around the export: what is written runs without."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _axes(exportable: Exportable) -> dict[str, tuple[str | int, ...]]:
    names = exportable.axes
    return {
        name: tuple(names[name].get(dim, size) for dim, size in enumerate(tensor.shape))
        for name, tensor in exportable.examples.tensors.items()
    }


@contextmanager
def _progress(name: str) -> Iterator[Step]:
    """Show what is being done, on a terminal."""
    with tqdm(total=STEPS, desc=f"exporting to {name}", disable=None, leave=False, bar_format=_BAR) as bar:

        def step(what: str) -> None:
            bar.set_postfix_str(what)
            bar.update()

        yield step


_BAR = "{desc}: {bar:20} {elapsed} {postfix}"
