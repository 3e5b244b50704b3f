"""Comparison of a written file with its graph: both run on the same inputs, at the sizes of the trace and at others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lora_fx.errors import ExportError, VerifyError, first_line, option
from lora_fx.export.prepare import Exportable
from lora_fx.export.trial_inputs import Sizes, Trial, trials
from lora_fx.graph.compare import TOLERANCES, compare_values, described, rounding_tolerance
from lora_fx.graph.provenance import source_line
from lora_fx.graph.sharded import agreed, processes_of
from lora_fx.tracing.train_eval import MODE_ARGUMENTS

Loaded = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""A loaded file, as a function from inputs to outputs by name."""


@dataclass(frozen=True)
class Comparison:
    """The outputs of the file and of the graph at one combination of sizes.

    Attributes:
        sizes: of the axes that vary, by name.
        largest: the largest difference between their outputs, as a part of the largest value of that output.
    """

    sizes: Sizes
    largest: float

    def __str__(self) -> str:
        return f"{self.largest:.1e} at {_as_text(self.sizes)}"


def compare(exportable: Exportable, loaded: Loaded, tolerance: float | None) -> tuple[Comparison, ...]:
    """Run both at the sizes of the trace, at others, and with each axis at 1 where the trace covers that.

    Args:
        exportable: the graph that was written.
        loaded: the file, loaded.
        tolerance: the largest difference that counts as rounding, as a part of the largest value of an output. By default
            1e-9, 1e-4 or 0.05, by the lowest precision among the graph's tensors.

    Raises:
        VerifyError: they differ by more, or the file does not run; the message says at which sizes and in which output.
    """
    _check_repeatable(exportable)
    allowed = _tolerance(exportable) if tolerance is None else tolerance
    groups, found = processes_of(exportable.graph_module), list[Comparison]()
    for trial in trials(exportable):
        largest = agreed(groups, lambda trial=trial: (_difference(trial, loaded, allowed), ""))  # type: ignore[misc]
        found.append(Comparison(trial.sizes, largest))
    return tuple(found)


def check_tolerance(tolerance: float | None) -> None:
    """Raise :class:`ExportError` unless a tolerance is a number of 0 or more."""
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ExportError(
            f"{option('tolerance', '--tolerance')}: expected a number of 0 or more, as a part of an output's largest value, got {tolerance}."
        )


def _check_repeatable(exportable: Exportable) -> None:
    for node in exportable.plain.graph.nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if (
            random and node.target not in MODE_ARGUMENTS
        ):  # MODE_ARGUMENTS has dropout, which drops nothing in evaluation
            raise VerifyError(
                f"the graph draws random numbers by {node.target}{source_line(node)}, so that no file can be compared with it. "
                f"To write it unchecked: {option('verify=False', '--no-verify')}.",
                node.name,
            )


def _tolerance(exportable: Exportable) -> float:
    reals = [tensor for tensor in exportable.plain.state_dict().values() if tensor.is_floating_point()]
    return rounding_tolerance(reals) if reals else TOLERANCES[torch.float32]


def _difference(trial: Trial, loaded: Loaded, allowed: float) -> float:
    at = _as_text(trial.sizes)
    try:
        found = loaded(trial.inputs)
    except Exception as error:
        raise VerifyError(
            f"the written file does not run at {at}: {first_line(str(error), type(error).__name__)}"
        ) from error
    if list(found) != list(trial.expected):
        raise VerifyError(f"outputs of the written file: expected {', '.join(trial.expected)}, got {', '.join(found)}.")
    largest = 0.0
    for name, tensor in trial.expected.items():
        if (tensor.shape, tensor.dtype) != (found[name].shape, found[name].dtype):
            raise VerifyError(
                f"output {name!r} of the written file at {at}: expected {described(tensor)}, got {described(found[name])}.",
                name,
            )
        difference = compare_values(tensor, found[name].to(tensor.device), allowed)
        if difference.message:
            raise VerifyError(
                f"the written file differs from the graph at {at}: {name!r} differs by {difference.relative:.1e} of its largest "
                f"value, and {allowed:.0e} is allowed; {option('tolerance=', '--tolerance')} sets another bound.",
                name,
            )
        largest = max(largest, difference.relative)
    return largest


def _as_text(sizes: Sizes) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items()) or "the sizes of the trace"
