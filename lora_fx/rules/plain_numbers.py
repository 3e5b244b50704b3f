"""Numbers of numpy and tensors without dimensions, as Python's own: what a sweep, a configuration or a checkpoint hands over."""

from __future__ import annotations

import math
from numbers import Real


def plain_number(value: object) -> object:
    """Return a real number of numpy, or a tensor or array without dimensions, as a number of Python's; anything else as it is.

    A tensor that requires a gradient is left: the number would be cut off from it.
    """
    without_dimensions = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    if without_dimensions and not getattr(value, "requires_grad", False) and not getattr(value, "is_meta", False):
        value = value.item()  # type: ignore[attr-defined]
    return float(value) if isinstance(value, Real) and not isinstance(value, int | float) else value


def finite_number(value: object) -> float | None:
    """Return a finite real number as a float, see :func:`plain_number`; None for anything else."""
    number = plain_number(value)
    if not isinstance(number, int | float):
        return None
    try:
        return float(number) if math.isfinite(number) else None
    except OverflowError:  # an integer beyond all floats
        return None
