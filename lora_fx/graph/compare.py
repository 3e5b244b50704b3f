"""Comparison of what two graphs compute: nested values by their structure, tensors up to rounding.

Tracing compares a graph with its model, folding a graph with what it was folded from, export a file with its graph. They ask
one function, so that a NaN, an infinity or a tensor of zeros is the same case in all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.torch_internals import pytree

TOLERANCES: Mapping[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference that is taken for rounding, as a part of the largest value."""

COARSE_TOLERANCE = 5e-2
"""The same for half precision, and for every dtype of fewer bits."""


@dataclass(frozen=True)
class ValueDifference:
    """The comparison of two values.

    Attributes:
        relative: the largest difference of two reals, as a part of the largest value; infinite where there is no such number.
        message: how the values differ, by more than the tolerance; empty where they do not.
        part: the path to the tensor or number that differs, such as ``"['logits']"``; empty for a value that is not nested.
    """

    relative: float = 0.0
    message: str = ""
    part: str = ""


def compare_values(expected: Any, found: Any, tolerance: float | None) -> ValueDifference:
    """Compare two nested values, up to the first tensor or number that differs by more than the tolerance.

    Args:
        expected: tensors and constants in any nesting.
        found: the same, computed by the other.
        tolerance: the largest difference between reals, as a part of the largest value of their tensor. None for the tolerance
            of ``torch.testing``, element by element, with equal constants.
    """
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    found_leaves, found_spec = pytree.tree_flatten(found)
    if expected_spec != found_spec:
        return ValueDifference(torch.inf, f"expected the structure {expected_spec}, got {found_spec}")
    largest = 0.0
    for index, (value, other) in enumerate(zip(expected_leaves, found_leaves, strict=True)):
        compared = _compare_leaves(value, other, tolerance)
        if compared.message:
            return ValueDifference(compared.relative, compared.message, _path(expected, index))
        largest = max(largest, compared.relative)
    return ValueDifference(largest)


def rounding_tolerance(value: Any) -> float:
    """Return the tolerance for the lowest precision in a nested value; 0 where there are no reals in it."""
    found = 0.0
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and _is_real(leaf):
            found = max(found, TOLERANCES.get(leaf.dtype.to_real(), COARSE_TOLERANCE))
        elif isinstance(leaf, float):
            found = max(found, TOLERANCES[torch.float64])
    return found


def described(tensor: torch.Tensor) -> str:
    """Return dtype and shape of a tensor for messages."""
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def same_values(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Tell whether two tensors have the same shape, dtype and values, also on different devices; a NaN equals a NaN."""
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    if left.is_meta or right.is_meta:
        return left is right
    if isinstance(left, QuantisedWeight) or isinstance(right, QuantisedWeight):
        return left is right or torch.equal(left, right)
    if (left.device, left.data_ptr(), left.stride()) == (right.device, right.data_ptr(), right.stride()):
        return True
    left, right = left.detach().to(right.device), right.detach()
    return torch.equal(left, right) or bool(torch.all((left == right) | ((left != left) & (right != right))))


def _path(tree: Any, index: int) -> str:
    try:
        path, _ = pytree.tree_leaves_with_path(tree)[index]
    except ValueError:  # a class that is registered without names for its parts
        return f"[{index}]"
    return pytree.keystr(path)


def _compare_leaves(expected: Any, found: Any, tolerance: float | None) -> ValueDifference:
    if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        return (
            _compare_elementwise(expected, found) if tolerance is None else _compare_tensors(expected, found, tolerance)
        )
    if isinstance(expected, float) and isinstance(found, float) and tolerance is not None:
        return _compare_reals(_scalar(expected), _scalar(found), tolerance)
    if type(expected) is type(found) and expected == found:
        return ValueDifference()
    return ValueDifference(torch.inf, f"expected {expected!r}, got {found!r}")


def _compare_elementwise(expected: torch.Tensor, found: torch.Tensor) -> ValueDifference:
    try:
        torch.testing.assert_close(found, expected, equal_nan=True)
    except AssertionError as error:
        return ValueDifference(torch.inf, " ".join(str(error).split()))
    return ValueDifference()


def _compare_tensors(expected: torch.Tensor, found: torch.Tensor, tolerance: float) -> ValueDifference:
    if described(expected) != described(found):
        return ValueDifference(torch.inf, f"expected {described(expected)}, got {described(found)}")
    return _compare_reals(expected, found, tolerance) if _is_real(expected) else _compare_exactly(expected, found)


def _compare_exactly(expected: torch.Tensor, found: torch.Tensor) -> ValueDifference:
    if torch.equal(expected, found):
        return ValueDifference()
    differing = (expected != found).nonzero()
    first = tuple(differing[0].tolist())
    message = (
        f"{len(differing)} of {expected.numel()} values differ, which have to be equal; the first is {found[first].item()}"
        f"{_place(first)}, expected {expected[first].item()}"
    )
    return ValueDifference(torch.inf, message)


def _compare_reals(expected: torch.Tensor, found: torch.Tensor, tolerance: float) -> ValueDifference:
    if torch.equal(expected, found):
        return ValueDifference()
    left, right = _widened(expected), _widened(found)
    # Infinities and NaNs equal themselves: their difference would be a NaN, which no tolerance allows.
    same = (left == right) | (left.isnan() & right.isnan())
    if bool(same.all()):
        return ValueDifference()
    gaps = (left - right).abs().masked_fill(same, 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf)
    scale = float(left.abs().masked_fill(~left.isfinite(), 0.0).max())
    gap = float(gaps.max())
    relative = gap / scale if scale else torch.inf
    if gap <= tolerance * scale:
        return ValueDifference(relative)
    worst = tuple(int(index) for index in torch.unravel_index(gaps.argmax(), gaps.shape))
    message = (
        f"the largest difference is {gap:.3g}{_place(worst)}: expected {expected[worst].item():.6g}, got {found[worst].item():.6g}; "
        f"the tolerance is {tolerance:.3g} of the largest value, {scale:.3g}"
    )
    return ValueDifference(relative, message)


def _is_real(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that can be subtracted without leaving its range: half precision as single."""
    return tensor if tensor.is_complex() or tensor.dtype in TOLERANCES else tensor.float()


def _place(index: tuple[int, ...]) -> str:
    return f" at {index}" if index else ""
