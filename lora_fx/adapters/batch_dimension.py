"""Where the batch is in the values of a graph: the first dimension, alone or merged with those that follow it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)


@dataclass(frozen=True)
class BatchFirst:
    """A value whose first dimension begins with the batch.

    Attributes:
        source: the value with the batch alone in its first dimension, of which it is a reshape; or the value itself.
        merged: whether the first dimension is the batch and others in one.
    """

    source: fx.Node
    merged: bool


def shown_shape(node: fx.Node) -> tuple[Any, ...] | str:
    """Return the shape of a value in the trace, for messages."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else "unknown sizes"


def size_of_batch(node: fx.Node) -> Any:
    """Return the first size of a value in the trace, an expression where it varies; None if it has none."""
    value = node.meta.get("val")
    return _expression(value.shape[0]) if isinstance(value, torch.Tensor) and value.dim() else None


def batch_first(node: fx.Node, batch: Any) -> BatchFirst | None:
    """Return where the batch is in a value; None if its first dimension has nothing of the batch.

    Args:
        node: the value.
        batch: the size of the batch, as :func:`size_of_batch` gives it.
    """
    if size_of_batch(node) == batch:
        return BatchFirst(node, False)
    source = node
    while source.target in _RESHAPES and isinstance(source.args[0], fx.Node):
        source = source.args[0]
        if size_of_batch(source) == batch:  # a reshape keeps the order: all of one row stays together
            value = node.meta["val"]
            fixed = all(isinstance(size, int) for size in value.shape[1:])
            return BatchFirst(source, True) if fixed and _divides(batch, _expression(value.shape[0])) else None
    return None


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _divides(batch: Any, size: Any) -> bool:
    if isinstance(size, int):
        return isinstance(batch, int) and batch > 0 and size % batch == 0
    return bool((size / batch).is_integer)
