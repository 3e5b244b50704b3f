"""The comparison of values that tracing, folding and export share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from lora_fx.graph.compare import compare_values, rounding_tolerance

NAN, INF = float("nan"), float("inf")


class Pair:
    """A container that is registered without names for its parts."""

    def __init__(self, left: Any, right: Any) -> None:
        self.left, self.right = left, right


pytree.register_pytree_node(Pair, lambda pair: ([pair.left, pair.right], None), lambda parts, _: Pair(*parts))


def test_the_difference_is_a_part_of_the_largest_finite_value() -> None:
    expected = torch.tensor([1.0, -4.0, INF, NAN])
    found = torch.tensor([1.5, -4.0, INF, NAN])
    assert compare_values(expected, found, 0.2).relative == 0.125
    assert compare_values(expected, found, 0.2).message == ""
    message = compare_values(expected, found, 0.1).message
    assert message == (
        "the largest difference is 0.5 at (0,): expected 1, got 1.5; the tolerance is 0.1 of the largest value, 4"
    )


@pytest.mark.parametrize(
    ("expected", "found"),
    [([0.0, 0.0], [0.0, 1e-30]), ([1.0, NAN], [1.0, 2.0]), ([1.0, 2.0], [1.0, NAN]), ([1.0, INF], [1.0, -INF])],
    ids=["zeros", "no NaN", "a NaN", "infinities"],
)
def test_no_tolerance_allows_what_has_no_relative_size(expected: list[float], found: list[float]) -> None:
    compared = compare_values(torch.tensor(expected), torch.tensor(found), 1e9)
    assert compared.message
    assert compared.relative == INF


def test_half_precision_is_subtracted_in_single() -> None:
    large = torch.tensor([60000.0], dtype=torch.float16)
    assert compare_values(large, -large, 2.0).relative == 2.0


@pytest.mark.parametrize("tolerance", [None, 0.1])
def test_the_part_that_differs_is_named(tolerance: float | None) -> None:
    value, other = torch.ones(2), torch.zeros(2)
    for expected, found, part in (
        (value, other, ""),
        ((value, {"b": value}), (value, {"b": other}), "[1]['b']"),
        (Pair(value, value), Pair(value, other), "[1]"),
    ):
        compared = compare_values(expected, found, tolerance)
        assert compared.message
        assert compared.part == part
    message = compare_values([value], (value,), tolerance).message
    assert message.startswith("expected the structure ")


def test_constants_and_integers_have_to_be_equal() -> None:
    assert compare_values(3, 4, 10.0).message == "expected 3, got 4"
    assert compare_values(1, True, 10.0).message == "expected 1, got True"
    assert compare_values(1.0, 1.5, 0.6).relative == 0.5
    assert compare_values(1.0, 1.5, None).message == "expected 1.0, got 1.5"
    compared = compare_values(torch.tensor([1, 2, 3]), torch.tensor([1, 5, 4]), 10.0)
    assert compared.message == "2 of 3 values differ, which have to be equal; the first is 5 at (1,), expected 2"
    compared = compare_values(torch.ones(2), torch.ones(2, dtype=torch.float64), 10.0)
    assert compared.message == "expected torch.float32 (2,), got torch.float64 (2,)"


def test_the_lowest_precision_sets_the_tolerance() -> None:
    single, half = torch.ones(1), torch.ones(1, dtype=torch.bfloat16)
    assert rounding_tolerance([single.double(), 1.0]) == 1e-9
    assert rounding_tolerance({"a": single.double(), "b": single}) == 1e-4
    assert rounding_tolerance((single, half)) == 5e-2
    assert rounding_tolerance(single.to(torch.complex64)) == 1e-4
    assert rounding_tolerance((torch.ones(1, dtype=torch.int64), 3, None)) == 0.0
