"""What was written is loaded and run beside the graph, at the sizes of the trace and at others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product

import torch

from lora_fx.checks import Constraints
from lora_fx.errors import InputError, VerifyError
from lora_fx.examples import Dimension, cut_or_repeated, other_values
from lora_fx.export._exportable import Exportable
from lora_fx.graph_module import described
from lora_fx.relations import UNBOUNDED, holds
from lora_fx.verification import COARSE, TOLERANCES

Loaded = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""What was written, as a function from inputs to outputs by name."""

STEPS = (4, 3, 2, 1, -1, 0)
"""How far from that of the trace a size is tried, the best first."""

MOST = 10_000
"""So many combinations of them are looked at."""


@dataclass(frozen=True)
class Comparison:
    """A run of what was written beside the graph.

    Attributes:
        sizes: of the axes that vary, by name.
        largest: the largest difference between their outputs, as a part of the largest value of that output.
    """

    sizes: Mapping[str, int]
    largest: float

    def __str__(self) -> str:
        at = ", ".join(f"{axis} {size}" for axis, size in self.sizes.items()) or "the sizes of the trace"
        return f"{self.largest:.1e} at {at}"


def compare(exportable: Exportable, loaded: Loaded, tolerance: float | None) -> tuple[Comparison, ...]:
    """Run both at the sizes of the trace, at others, and with each axis at 1 where the trace covers that.

    Args:
        exportable: what was written.
        loaded: the same, loaded.
        tolerance: the largest difference that is taken for rounding, as a part of the largest value of an output. By default
            1e-9, 1e-4 or 0.05, by the lowest precision among the graph's tensors.

    Raises:
        VerifyError: they differ by more, or what was written does not run; the message says at which sizes and in which output.
    """
    allowed = _tolerance(exportable) if tolerance is None else tolerance
    made: list[Comparison] = []
    with torch.no_grad():
        for sizes, inputs in _trials(exportable):
            expected = exportable.run(inputs) if not made else _answer(exportable, inputs)
            if expected is None:
                continue
            made.append(Comparison(sizes, _difference(expected, loaded, inputs, sizes, allowed)))
    return tuple(made)


def _tolerance(exportable: Exportable) -> float:
    dtypes = {tensor.dtype for tensor in exportable.plain.state_dict().values() if tensor.is_floating_point()}
    return max((TOLERANCES.get(dtype, COARSE) for dtype in dtypes), default=TOLERANCES[torch.float32])


def _answer(exportable: Exportable, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Return what the graph computes of inputs that were made up, or None where it takes no such values."""
    try:
        return exportable.run(inputs)
    except (InputError, RuntimeError, IndexError, ValueError):
        return None


def _difference(
    expected: Mapping[str, torch.Tensor],
    loaded: Loaded,
    inputs: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int],
    allowed: float,
) -> float:
    at = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    try:
        found = loaded(inputs)
    except Exception as error:
        raise VerifyError(f"what was written does not run at {at}: {_first_line(error)}") from error
    if list(found) != list(expected):
        raise VerifyError(f"what was written returns {', '.join(found)}, and the graph {', '.join(expected)}.")
    largest = 0.0
    for name, tensor in expected.items():
        if (tensor.shape, tensor.dtype) != (found[name].shape, found[name].dtype):
            raise VerifyError(
                f"what was written gives {name!r} as {described(found[name])} at {at}, and the graph as {described(tensor)}.",
                name,
            )
        difference = _relative(tensor, found[name].to(tensor.device))
        if not difference <= allowed:
            raise VerifyError(
                f"what was written departs from the graph at {at}: {name!r} differs by {difference:.1e} of its largest value, "
                f"and {allowed:.0e} is allowed (tolerance=).",
                name,
            )
        largest = max(largest, difference)
    return largest


def _relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(expected, found) else float("inf")
    same = (expected == found) | (expected.isnan() & found.isnan())
    if bool(same.all()):
        return 0.0
    wide, other = (
        torch.where(same, 0, value).to(torch.complex128 if value.is_complex() else torch.float64)
        for value in (expected, found)
    )
    largest = expected[expected.isfinite()].abs().max().double().item() if bool(expected.isfinite().any()) else 0.0
    difference = (wide - other).abs().max().item()
    return difference / largest if largest else float("inf")


def _trials(exportable: Exportable) -> Iterator[tuple[dict[str, int], dict[str, torch.Tensor]]]:
    """Yield inputs: the examples, those of other sizes along every axis, and of size 1 along one or all."""
    examples = exportable.examples
    axes = examples.together((name, dim) for name, dims in exportable.dynamic.items() for dim in dims)
    traced = {axis: examples.tensors[name].size(dim) for axis, group in axes.items() for name, dim in [min(group)]}
    yield traced, dict(examples.tensors)
    wanted = [other for other in [_others(exportable.constraints, axes, traced, examples.tensors)] if other is not None]
    wanted += [{**traced, axis: 1} for axis in axes]
    wanted += [dict.fromkeys(axes, 1)]
    tried = [traced]
    for sizes in wanted:
        by_dimension = _spread(axes, sizes)
        if sizes in tried or not _covered(exportable.constraints, by_dimension, examples.tensors):
            continue
        tried.append(sizes)
        for values in (other_values, cut_or_repeated):
            inputs = {
                name: values(
                    tensor, torch.Size(by_dimension.get((name, dim), size) for dim, size in enumerate(tensor.shape))
                )
                for name, tensor in examples.tensors.items()
            }
            if _answer(exportable, inputs) is not None:
                yield sizes, inputs
                break


def _others(
    constraints: Constraints,
    axes: Mapping[str, set[Dimension]],
    traced: Mapping[str, int],
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, int] | None:
    """Return sizes as far as possible from those of the trace that it covers."""
    candidates = [[size + step for step in STEPS if size + step > 0] for size in traced.values()]
    for sizes in islice(product(*candidates), MOST):
        chosen = dict(zip(traced, sizes, strict=True))
        if chosen != traced and _covered(constraints, _spread(axes, chosen), tensors):
            return chosen
    return None


def _spread(axes: Mapping[str, set[Dimension]], sizes: Mapping[str, int]) -> dict[Dimension, int]:
    return {dimension: sizes[axis] for axis, group in axes.items() for dimension in group}


def _covered(constraints: Constraints, sizes: Mapping[Dimension, int], tensors: Mapping[str, torch.Tensor]) -> bool:
    every = {(name, dim): size for name, tensor in tensors.items() for dim, size in enumerate(tensor.shape)} | dict(
        sizes
    )
    within = all(
        low <= every[name, dim] and (high == UNBOUNDED or every[name, dim] <= high)
        for name, ranges in constraints.ranges.items()
        for dim, (low, high) in enumerate(ranges)
    )
    return within and all(holds(relation, every) for relation in constraints.relations)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
