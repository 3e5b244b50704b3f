"""Artefacts among the exclusions of a trace, found by running the excluded sizes.

torch.export never distinguishes sizes 0 and 1 from constants, so it reports ranges that start at 2, and guards such as
``x.size(1) // 3 != 1``, whether or not the model's Python treats those sizes in its own way. Slices of a buffer exclude its
exact length in the same way. So the graph and the model are run at the excluded sizes. Where they agree, the exclusion goes; where
they do not, it stays. Without weights nothing can be run: then it waits for ``materialize``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch

from lora_fx.graph.example_sizes import Dimension, Examples, cut_or_repeated, other_values
from lora_fx.graph.input_checks import Constraints
from lora_fx.graph.prefix_slot import AXIS as PREFIX_AXIS
from lora_fx.graph.size_relations import UNBOUNDED, Relation
from lora_fx.torch_internals import pytree
from lora_fx.tracing.example_inputs import ExampleInputs
from lora_fx.tracing.parity import GraphFailed, ModelFailed, difference, map_tensors

MAX_SIZE, MAX_SIZES = 4096, 4
"""An exclusion may be an artefact only if it excludes at most ``MAX_SIZES`` sizes, all below ``MAX_SIZE``; each of them is run."""


def without_artefacts(
    model: Callable[..., Any],
    graph_module: Callable[..., Any],
    inputs: ExampleInputs,
    constraints: Constraints,
    set_training: Callable[[bool], object] | None = None,
) -> Constraints:
    """Return the constraints without exclusions of sizes at which graph and model agree.

    Args:
        model: the traced model, in eval mode, with weights.
        graph_module: its graph without input checks, in eval mode.
        inputs: of the trace.
        constraints: as torch.export established them.
        set_training: switches both to train mode, and back; by default they are run in eval mode alone.
    """
    prober = _Prober(model, graph_module, inputs, examples_of(inputs, constraints), set_training)
    return prober.without_points(prober.without_lower_bounds(constraints))


def examples_of(inputs: ExampleInputs, constraints: Constraints) -> Examples:
    """Return the tensors among the inputs of a trace, by their names in its constraints."""
    leaves = [leaf for leaf in pytree.tree_leaves((inputs.args, dict(inputs.kwargs))) if isinstance(leaf, torch.Tensor)]
    return Examples(dict(zip(constraints.ranges, [leaf.detach() for leaf in leaves], strict=True)), inputs.axes)


def _failure(run: Callable[..., Any], inputs: ExampleInputs) -> str | None:
    try:
        run(*inputs.args, **inputs.kwargs)
    except ValueError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class _Prober:
    model: Callable[..., Any]
    graph_module: Callable[..., Any]
    inputs: ExampleInputs
    examples: Examples
    set_training: Callable[[bool], object] | None

    def without_lower_bounds(self, constraints: Constraints) -> Constraints:
        """Lower bounds of 2 to 1 for all axes at whose size 1 model and graph agree: alone, in pairs, and all together."""
        sums = self.examples.sums
        bounded = {
            (name, dim)
            for name, ranges in constraints.ranges.items()
            for dim, (low, high) in enumerate(ranges)
            if low == 2 != high and (name, dim) not in sums
        }
        axes = self.examples.together(bounded)
        agreed = {name: axis for name, axis in axes.items() if self._agree(dict.fromkeys(axis, 1))}
        together = {dimension for axis in agreed.values() for dimension in axis}
        joint = [a | b for a, b in combinations(agreed.values(), 2)]
        joint += [together] if len(agreed) > 2 else []
        if not all(self._agree(dict.fromkeys(axes, 1)) for axes in joint):
            return constraints
        lows = dict.fromkeys(together, 1)
        for empty in {PREFIX_AXIS, *(added[0] for added in sums.values())} & agreed.keys():
            lows |= self._empty(agreed[empty], [axis for name, axis in agreed.items() if name != empty])
        lows = self.examples.with_sums(lows)
        constraints = _with_bounds(constraints, lows, {})
        prefix = agreed.get(PREFIX_AXIS, set())
        return self._beside_empty(constraints, prefix) if prefix and not any(map(lows.get, prefix)) else constraints

    def _beside_empty(self, constraints: Constraints, prefix: set[Dimension]) -> Constraints:
        """Raise upper bounds by 2 where model and graph agree there beside an empty prefix: torch.export left room for one of 2 tokens."""
        bounded = {
            (name, dim)
            for name, ranges in constraints.ranges.items()
            for dim, (low, high) in enumerate(ranges)
            if low < high and (name, dim) not in prefix
        }
        highs: dict[Dimension, int] = {}
        for axis in self.examples.together(bounded).values():
            raised = max(constraints.ranges[name][dim][1] for name, dim in axis) + 2
            if raised <= MAX_SIZE and self._agree({**dict.fromkeys(prefix, 0), **dict.fromkeys(axis, raised)}):
                highs |= dict.fromkeys(axis, raised)
        return _with_bounds(constraints, {}, highs)

    def _empty(self, axis: set[Dimension], others: Sequence[set[Dimension]]) -> dict[Dimension, int]:
        """Return the lower bound 0 for an axis without which model and graph agree: alone, with each other axis of size 1, and with all."""
        empty = dict.fromkeys(axis, 0)
        ones = [{}, *(dict.fromkeys(other, 1) for other in others), {d: 1 for other in others for d in other}]
        return empty if all(self._agree({**empty, **sizes}) for sizes in ones) else {}

    def without_points(self, constraints: Constraints) -> Constraints:
        """Drop relations that exclude a few sizes of one axis, at all of which model and graph agree."""
        kept = tuple(relation for relation in constraints.relations if not self._is_artefact(relation, constraints))
        return replace(constraints, relations=kept)

    def _is_artefact(self, relation: Relation, constraints: Constraints) -> bool:
        if not relation.is_exclusion:
            return False
        dynamic = {(name, dim) for name, ranges in constraints.ranges.items() for dim in range(len(ranges))}
        axes = [axis for axis in self.examples.together(dynamic).values() if axis & relation.references]
        if len(axes) != 1:
            return False
        sizes = list(self._excluded(relation, axes[0], constraints))
        if not 0 < len(sizes) <= MAX_SIZES or sizes[-1] == MAX_SIZE:
            return False
        return all(self._agree(dict.fromkeys(axes[0], size)) for size in sizes)

    def _excluded(self, relation: Relation, axis: set[Dimension], constraints: Constraints) -> Iterator[int]:
        """Yield the sizes of an axis that this relation alone excludes."""
        current = {
            (name, dim): size for name, tensor in self.examples.tensors.items() for dim, size in enumerate(tensor.shape)
        }
        firm = [other for other in constraints.relations if not other.is_exclusion]
        low = max(constraints.ranges[name][dim][0] for name, dim in axis)
        highs = [high for name, dim in axis if (high := constraints.ranges[name][dim][1]) != UNBOUNDED]
        for size in range(low, min([MAX_SIZE, *highs]) + 1):
            sizes = {**current, **dict.fromkeys(axis, size)}
            if not relation.holds(sizes) and all(other.holds(sizes) for other in firm):
                yield size

    def _agree(self, sizes: Mapping[Dimension, int]) -> bool:
        """Tell whether model and graph agree at these sizes, in every mode of the graph."""
        if not self._same(sizes):
            return False
        if self.set_training is None:
            return True
        with ExitStack() as stack:
            stack.callback(self.set_training, False)
            self.set_training(True)
            return self._same(sizes) or self._both_refuse(sizes)

    def _same(self, sizes: Mapping[Dimension, int]) -> bool:
        """Run both on new values, and, where the model does not take any values, on those of the example."""
        with torch.no_grad():
            for values in (other_values, cut_or_repeated):
                try:
                    return difference(self.model, self.graph_module, self._resized(sizes, values)) is None
                except GraphFailed:
                    return False
                except ModelFailed:
                    continue
        return False

    def _both_refuse(self, sizes: Mapping[Dimension, int]) -> bool:
        """Tell whether both fail in one way, as a batch norm does that trains on one value."""
        inputs = self._resized(sizes, cut_or_repeated)
        with torch.no_grad():
            told = [_failure(run, inputs) for run in (self.model, self.graph_module)]
        return told[0] is not None and told[0] == told[1]

    def _resized(
        self, sizes: Mapping[Dimension, int], values: Callable[[torch.Tensor, torch.Size], torch.Tensor]
    ) -> ExampleInputs:
        names = iter(self.examples.tensors)
        sizes = self.examples.with_sums(sizes)

        def resize(tensor: torch.Tensor) -> torch.Tensor:
            name = next(names)
            return values(tensor, torch.Size(sizes.get((name, dim), size) for dim, size in enumerate(tensor.shape)))

        return map_tensors(resize, self.inputs)


def _with_bounds(
    constraints: Constraints, lows: Mapping[Dimension, int], highs: Mapping[Dimension, int]
) -> Constraints:
    """Return constraints with other bounds for some dimensions."""
    ranges = {
        name: tuple((lows.get((name, dim), low), highs.get((name, dim), high)) for dim, (low, high) in enumerate(dims))
        for name, dims in constraints.ranges.items()
    }
    return replace(constraints, ranges=ranges)
