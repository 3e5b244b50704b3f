"""Example inputs of a trace, and inputs of other sizes made from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

SUM = " + "
"""Between the names of axes whose sum a dimension is."""

Dimension = tuple[str, int]
"""An input, by the name of its placeholder, and one of its dimensions."""


@dataclass(frozen=True)
class Examples:
    """Example inputs of a trace.

    Attributes:
        tensors: placeholder → its value.
        axes: placeholder → the names of its dimensions (``None``: without one); only those that have names. ``"a + b"`` is the sum
            of two axes, of which the first may be empty.
    """

    tensors: Mapping[str, torch.Tensor]
    axes: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)

    @cached_property
    def sums(self) -> Mapping[Dimension, tuple[str, ...]]:
        """The dimensions that are sums, and the axes that are added."""
        return {
            (name, dim): tuple(axis.split(SUM))
            for name, axes in self.axes.items()
            for dim, axis in enumerate(axes)
            if axis is not None and SUM in axis and name in self.tensors
        }

    def with_sums(self, sizes: Mapping[Dimension, int]) -> dict[Dimension, int]:
        """Return sizes, of which some dimensions have another than in the example, with all sums of axes of those."""
        if not self.sums:
            return dict(sizes)
        current = {
            axis: sizes.get((name, dim), self.tensors[name].size(dim))
            for name, axes in self.axes.items()
            for dim, axis in enumerate(axes)
            if axis is not None and name in self.tensors and (name, dim) not in self.sums
        }
        return {**sizes, **{place: sum(current[axis] for axis in axes) for place, axes in self.sums.items()}}

    def together(self, dimensions: Iterable[Dimension]) -> dict[str, set[Dimension]]:
        """Group dimensions that vary together, by the name of their axis.

        Without names, those of one position and size do. The first dimension of the first input is then called ``batch``.
        """
        groups: dict[object, set[Dimension]] = {}
        order = list(self.tensors)
        for name, dim in sorted(dimensions, key=lambda dimension: (dimension[1], order.index(dimension[0]))):
            axis = self.axes[name][dim] if name in self.axes else None
            groups.setdefault(axis or (dim, self.tensors[name].size(dim)), set()).add((name, dim))
        named: dict[str, set[Dimension]] = {}
        for key, group in groups.items():
            first, dim = min(group, key=lambda dimension: (order.index(dimension[0]), dimension[1]))
            label = key if isinstance(key, str) else "batch" if dim == 0 else f"{first}_{dim}"
            named[label if label not in named else f"{first}_{dim}"] = group
        return named


def cut_or_repeated(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return the tensor, cut or repeated to a shape."""
    for dim, size in enumerate(shape):
        if size == 0:
            tensor = tensor.narrow(dim, 0, 0)
        elif size != tensor.size(dim):
            tensor = tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.size(dim))
    return tensor


def other_values(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return noise where the tensor is real (zeros hide what they are multiplied by), and else values between its own."""
    generator = torch.Generator().manual_seed(0)
    if tensor.is_floating_point() or tensor.is_complex():
        return torch.randn(shape, generator=generator, device="cpu").to(tensor)
    if tensor.dtype is torch.bool or tensor.numel() == 0:
        return cut_or_repeated(tensor, shape)
    low, high = int(tensor.min()), int(tensor.max())
    return torch.randint(low, high + 1, shape, generator=generator, device="cpu").to(tensor)
