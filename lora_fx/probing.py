"""Which exclusions of a trace are artefacts, found out by running what they exclude.

torch.export never distinguishes sizes 0 and 1 from constants, so it reports ranges that start at 2, and guards such as
``x.size(1) // 3 != 1``, whether or not the model's Python treats those sizes in its own way. Slices of a buffer exclude its
exact length likewise. So the graph and the model are run at the excluded sizes. Where they agree, the exclusion goes; where
they do not, it stays. Without weights nothing can be run: then it waits for ``materialize``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lora_fx.checks import UNBOUNDED, Constraints, excludes, holds, references
from lora_fx.inputs import ExampleInputs, graph_inputs

Dimension = tuple[str, int]

LARGEST, MOST = 4096, 4
"""An exclusion is taken for an artefact only if it excludes at most ``MOST`` sizes, all below ``LARGEST``, and each was run."""


def without_artefacts(
    model: Callable[..., Any], graph_module: Callable[..., Any], inputs: ExampleInputs, constraints: Constraints
) -> Constraints:
    """Return the constraints without those exclusions under which graph and model agree.

    Args:
        model: the traced model, in eval mode, with weights.
        graph_module: its graph without input checks, in eval mode.
        inputs: what it was traced with.
        constraints: what torch.export established.
    """
    leaves = filter(_is_tensor, pytree.tree_leaves((inputs.args, dict(inputs.kwargs))))
    prober = _Prober(model, graph_module, inputs, dict(zip(constraints.ranges, leaves, strict=True)))
    return prober.without_points(prober.without_lower_bounds(constraints))


@dataclass(frozen=True)
class _Prober:
    model: Callable[..., Any]
    graph_module: Callable[..., Any]
    inputs: ExampleInputs
    tensors: Mapping[str, torch.Tensor]

    def without_lower_bounds(self, constraints: Constraints) -> Constraints:
        """Take lower bounds of 2 to 1, for all axes that agree at 1, alone and all together."""
        bounded = {
            (name, dim)
            for name, ranges in constraints.ranges.items()
            for dim, (low, high) in enumerate(ranges)
            if low == 2 != high
        }
        agreed = [axis for axis in self._axes(bounded) if self._agree(dict.fromkeys(axis, 1))]
        together = {dimension for axis in agreed for dimension in axis}
        if len(agreed) > 1 and not self._agree(dict.fromkeys(together, 1)):
            return constraints
        ranges = {
            name: tuple((1, high) if (name, dim) in together else (low, high) for dim, (low, high) in enumerate(ranges))
            for name, ranges in constraints.ranges.items()
        }
        return replace(constraints, ranges=ranges)

    def without_points(self, constraints: Constraints) -> Constraints:
        """Drop relations that exclude a few sizes of one axis, all of which agree."""
        kept = tuple(relation for relation in constraints.relations if not self._is_artefact(relation, constraints))
        return replace(constraints, relations=kept)

    def _is_artefact(self, relation: str, constraints: Constraints) -> bool:
        if not excludes(relation):
            return False
        dynamic = {(name, dim) for name, ranges in constraints.ranges.items() for dim in range(len(ranges))}
        axes = [axis for axis in self._axes(dynamic) if axis & references(relation)]
        if len(axes) != 1:
            return False
        sizes = list(self._excluded(relation, axes[0], constraints))
        if not 0 < len(sizes) <= MOST or sizes[-1] == LARGEST:
            return False
        return all(self._agree(dict.fromkeys(axes[0], size)) for size in sizes)

    def _excluded(self, relation: str, axis: set[Dimension], constraints: Constraints) -> Iterator[int]:
        """Yield the sizes of an axis that this relation excludes and nothing else does."""
        current = {(name, dim): size for name, tensor in self.tensors.items() for dim, size in enumerate(tensor.shape)}
        firm = [other for other in constraints.relations if not excludes(other)]
        low = max(constraints.ranges[name][dim][0] for name, dim in axis)
        highs = [high for name, dim in axis if (high := constraints.ranges[name][dim][1]) != UNBOUNDED]
        for size in range(low, min([LARGEST, *highs]) + 1):
            sizes = {**current, **dict.fromkeys(axis, size)}
            if not holds(relation, sizes) and all(holds(other, sizes) for other in firm):
                yield size

    def _axes(self, dimensions: Iterable[Dimension]) -> list[set[Dimension]]:
        """Group dimensions that vary together: those of one axis name, or, without names, of one position and size."""
        groups: dict[object, set[Dimension]] = {}
        for name, dim in sorted(dimensions):
            axes = self.inputs.axes.get(name)
            groups.setdefault(axes[dim] if axes else (dim, self.tensors[name].size(dim)), set()).add((name, dim))
        return list(groups.values())

    def _agree(self, sizes: Mapping[Dimension, int]) -> bool:
        """Tell whether model and graph agree on the example inputs, cut or repeated to these sizes."""
        names = iter(self.tensors)
        args, kwargs = pytree.tree_map(
            lambda leaf: _resized(leaf, next(names), sizes) if _is_tensor(leaf) else leaf,
            (self.inputs.args, dict(self.inputs.kwargs)),
        )
        tensors = {name: kwargs[name] for name in graph_inputs(self.inputs)}
        with torch.no_grad():
            try:
                expected, found = self.model(*args, **kwargs), self.graph_module(*args, **tensors)
            except Exception:  # the model or its graph has no answer at this size: then the trace does not reach it
                return False
        return _equal(pytree.tree_leaves(expected), pytree.tree_leaves(found))


def _resized(tensor: torch.Tensor, name: str, sizes: Mapping[Dimension, int]) -> torch.Tensor:
    for dim in range(tensor.dim()):
        size = sizes.get((name, dim), tensor.size(dim))
        if size != tensor.size(dim):
            tensor = tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.size(dim))
    return tensor


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _equal(expected: list[Any], found: list[Any]) -> bool:
    try:
        torch.testing.assert_close(found, expected, equal_nan=True)
    except (AssertionError, TypeError):
        return False
    return True
