"""Inputs for comparing a file with its graph: the examples of the trace, and others of other sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, product

import torch

from lora_fx.adapters.invocation import IDS, acting_invocations
from lora_fx.errors import ExportError, InputError, option
from lora_fx.export.prepare import Exportable
from lora_fx.graph.example_sizes import Dimension, cut_or_repeated, other_values

Sizes = Mapping[str, int]
"""The size of each axis that varies, by name."""

DISTANCES = (4, 3, 2, 1, -1, 0)
"""Differences from the traced size that are tried, the best first."""

MAX_COMBINATIONS = 10_000
"""Largest number of combinations of sizes that are checked against the constraints."""


@dataclass(frozen=True)
class Trial:
    """Inputs, and the outputs of the graph for them."""

    sizes: Sizes
    inputs: Mapping[str, torch.Tensor]
    expected: Mapping[str, torch.Tensor]


def trials(exportable: Exportable) -> Iterator[Trial]:
    """Yield the examples, inputs of other sizes along every axis, of size 1 along each and along all, and of size 0 along a past.

    Where a mask is all ones in the examples, some rows of it are not at other sizes. Invocation tokens of branches that act are written
    into the examples once more: without these, the branches add nothing.
    """
    axes = _Axes(exportable)
    yield Trial(axes.traced, exportable.examples.tensors, exportable.run(exportable.examples.tensors))
    for inputs in _invoked(exportable):
        expected = _answer(exportable, inputs)
        if expected is not None:
            yield Trial(axes.traced, inputs, expected)
    others = axes.others()
    wanted = [] if others is None else [others]
    wanted += [{**axes.traced, axis: 1} for axis in axes.traced]
    wanted += [dict.fromkeys(axes.traced, 1)]
    wanted += [{**sizes, axis: 0} for axis in axes.empty for sizes in (axes.traced, dict.fromkeys(axes.traced, 1))]
    tried = [axes.traced]
    for sizes in wanted:
        if sizes in tried or not axes.cover(sizes):
            continue
        tried.append(sizes)
        for inputs in axes.made(sizes, masked=sizes is others):
            expected = _answer(exportable, inputs)
            if expected is not None:
                yield Trial(sizes, inputs, expected)
                break


def larger_examples(exportable: Exportable) -> Mapping[str, torch.Tensor]:
    """Return the examples, or larger ones where an axis that varies has size 1, which torch.export takes for a constant."""
    axes = _Axes(exportable)
    if 1 not in axes.traced.values():
        return exportable.examples.tensors
    others = axes.others(least=2)
    if others is None:
        raise ExportError(
            f"the examples have size 1 along an axis that varies ({', '.join(axes.traced)}). "
            f"Pass {option('example_inputs', '--example-inputs')} of size 2 or more."
        )
    return axes.resized(others, cut_or_repeated)


def cut_examples(exportable: Exportable, limits: Mapping[str, int]) -> Mapping[str, torch.Tensor]:
    """Return the examples, cut where they are larger than these sizes of axes."""
    axes = _Axes(exportable)
    return axes.resized({axis: min(size, limits[axis]) for axis, size in axes.traced.items()}, cut_or_repeated)


@dataclass(frozen=True)
class _Axes:
    """The axes of a graph that may vary, and inputs of any size along them."""

    exportable: Exportable

    @cached_property
    def dimensions(self) -> Mapping[str, set[Dimension]]:
        return self.exportable.groups

    @cached_property
    def traced(self) -> Sizes:
        examples = self.exportable.examples
        groups = ((axis, min(group)) for axis, group in self.dimensions.items())
        return {
            axis: examples.tensors[name].size(dim) for axis, (name, dim) in groups if (name, dim) not in examples.sums
        }

    @cached_property
    def empty(self) -> list[str]:
        """The axes that may be empty: to whose size another is added."""
        return sorted({added[0] for added in self.exportable.examples.sums.values()} & self.traced.keys())

    def others(self, least: int = 1) -> Sizes | None:
        """Return sizes that the trace covers, as far as possible from its own."""
        candidates = [[size + step for step in DISTANCES if size + step >= least] for size in self.traced.values()]
        for sizes in islice(product(*candidates), MAX_COMBINATIONS):
            chosen = dict(zip(self.traced, sizes, strict=True))
            if chosen != self.traced and self.cover(chosen):
                return chosen
        return None

    def cover(self, sizes: Sizes) -> bool:
        """Tell whether the trace covers these sizes."""
        tensors, constraints = self.exportable.examples.tensors, self.exportable.constraints
        every = {(name, dim): size for name, tensor in tensors.items() for dim, size in enumerate(tensor.shape)}
        every |= self._by_dimension(sizes)
        return all(condition.holds(every) for condition in constraints.conditions)

    def made(self, sizes: Sizes, *, masked: bool) -> Iterator[Mapping[str, torch.Tensor]]:
        """Yield inputs of these sizes with new values, then, for a model that refuses those, with the values of the examples."""
        other = self.resized(sizes, other_values)
        if masked:
            yield {name: _masked(tensor) for name, tensor in other.items()}
        yield other
        yield self.resized(sizes, cut_or_repeated)

    def resized(
        self, sizes: Sizes, values: Callable[[torch.Tensor, torch.Size], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return inputs of these sizes."""
        by_dimension = self._by_dimension(sizes)
        return {
            name: values(tensor, torch.Size(by_dimension.get((name, d), size) for d, size in enumerate(tensor.shape)))
            for name, tensor in self.exportable.examples.tensors.items()
        }

    def _by_dimension(self, sizes: Sizes) -> dict[Dimension, int]:
        groups = ((axis, group) for axis, group in self.dimensions.items() if axis in sizes)
        return self.exportable.examples.with_sums({each: sizes[axis] for axis, group in groups for each in group})


def _invoked(exportable: Exportable) -> Iterator[Mapping[str, torch.Tensor]]:
    """Yield, for the tokens of each invocation that acts, the examples with these in the middle of all rows that are long enough."""
    given = exportable.examples.tensors
    for tokens in acting_invocations(exportable.graph_module):
        ids = given[IDS].clone()
        start = (ids.size(1) - len(tokens)) // 2
        if start >= 0:
            ids[:, start : start + len(tokens)] = ids.new_tensor(tokens)
            yield {**given, IDS: ids}


def _masked(tensor: torch.Tensor) -> torch.Tensor:
    """Return a mask of ones with a first row of zeros, and a second that begins with zeros; another tensor as it is."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dim() < 2 or not bool((tensor == 1).all()):
        return tensor
    masked = tensor.clone()
    masked[0] = 0
    masked[1:2, : tensor.size(1) // 2] = 0
    return masked


def _answer(exportable: Exportable, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor] | None:
    """Return the outputs of the graph for made-up inputs, or None where it takes no such values."""
    try:
        return exportable.run(inputs)
    except (InputError, RuntimeError, IndexError, ValueError):
        return None
