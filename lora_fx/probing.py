"""Whether a trace also holds for size 1, found out by running it.

torch.export never distinguishes sizes 0 and 1 of a dynamic dimension from a constant, so it always reports a range that
starts at 2, whether or not the model's Python treats 1 in its own way. The graph and the model are therefore run at size 1.
Where they agree, the range starts at 1; where they do not, or where the model cannot be run (meta weights), it stays at 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.checks import Constraints
from lora_fx.inputs import ExampleInputs

Dimension = tuple[str, int]


def covers_size_one(
    model: nn.Module, graph_module: nn.Module, inputs: ExampleInputs, constraints: Constraints
) -> Constraints:
    """Return the constraints with lower bounds of 2 taken to 1 where graph and model agree there.

    Args:
        model: the traced model, in eval mode.
        graph_module: its graph without input checks, in eval mode.
        inputs: what it was traced with.
        constraints: what torch.export established.
    """
    if any(tensor.is_meta for tensor in model.parameters()):
        return constraints
    groups = _groups(inputs, constraints)
    candidates = [group for group in groups if _agree(model, graph_module, inputs, constraints.ranges, group)]
    together = {dimension for group in candidates for dimension in group}
    if len(candidates) > 1 and not _agree(model, graph_module, inputs, constraints.ranges, together):
        return constraints
    return Constraints(
        {
            name: tuple((1, high) if (name, dim) in together else (low, high) for dim, (low, high) in enumerate(ranges))
            for name, ranges in constraints.ranges.items()
        },
        constraints.dtypes,
        constraints.relations,
    )


def _groups(inputs: ExampleInputs, constraints: Constraints) -> list[set[Dimension]]:
    """Return the dimensions with a lower bound of 2, those together that vary together: one axis name, or one size."""
    groups: dict[object, set[Dimension]] = {}
    values = _named(inputs, constraints)
    for name, ranges in constraints.ranges.items():
        for dim, (low, _) in enumerate(ranges):
            if low == 2:
                axes = inputs.axes.get(name)
                key = axes[dim] if axes else (dim, values[name].size(dim))
                groups.setdefault(key, set()).add((name, dim))
    return list(groups.values())


def _named(inputs: ExampleInputs, constraints: Constraints) -> dict[str, torch.Tensor]:
    return dict(
        zip(constraints.ranges, filter(_is_tensor, pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))), strict=True)
    )


def _agree(
    model: nn.Module, graph_module: nn.Module, inputs: ExampleInputs, names: Iterable[str], dimensions: set[Dimension]
) -> bool:
    args, kwargs = _shrink((inputs.args, dict(inputs.kwargs)), names, dimensions)
    graph_kwargs = {name: value for name, value in kwargs.items() if any(map(_is_tensor, pytree.tree_leaves(value)))}
    with torch.no_grad():
        try:
            expected, found = model(*args, **kwargs), graph_module(*args, **graph_kwargs)
        except Exception:  # the model or its graph has no answer at this size: then the range does not reach it
            return False
    return _equal(pytree.tree_leaves(expected), pytree.tree_leaves(found))


def _shrink(tree: Any, names: Iterable[str], dimensions: set[Dimension]) -> Any:
    """Return the tree of inputs with these dimensions of the tensors called ``names``, in order, cut to size 1."""
    remaining = iter(names)

    def shrink(leaf: Any) -> Any:
        if not _is_tensor(leaf):
            return leaf
        name = next(remaining)
        for dim in range(leaf.dim()):
            leaf = leaf.narrow(dim, 0, 1) if (name, dim) in dimensions else leaf
        return leaf

    return pytree.tree_map(shrink, tree)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _equal(expected: list[Any], found: list[Any]) -> bool:
    try:
        torch.testing.assert_close(found, expected, equal_nan=True)
    except (AssertionError, TypeError):
        return False
    return True
