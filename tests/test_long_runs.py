"""Nothing of a trace stays behind its graph, and long runs see what grows."""

from __future__ import annotations

import gc

import long_runs.__main__ as long_runs
import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import lora_fx


def test_what_a_trace_made_goes_with_its_graph() -> None:
    """torch keeps the sizes and values of every export of a process, in the caches of its class and behind C++."""
    left = []
    for _ in range(3):
        graph = lora_fx.trace(long_runs.Small(), (torch.randn(5, 24),), inference=True)
        del graph
        gc.collect()
        left.append(sum(type(each) is ShapeEnv for each in gc.get_objects()))
    assert left[0] == left[1] == left[2]


def test_a_long_run_sees_what_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[list[int]] = []
    monkeypatch.setattr(long_runs, "one_round", lambda number: kept.extend([number] for _ in range(500)))
    memory, objects, entries = long_runs.rounds(5)
    assert not objects.good
    assert objects.value == pytest.approx(500, abs=20)
    assert entries.good
    assert memory.what == "memory, KiB a round"


def test_a_time_that_grows_as_the_square_is_no_line() -> None:
    sizes = [10, 20, 40, 80]
    assert long_runs.exponent(sizes, [3.0 * size for size in sizes]) == pytest.approx(1)
    assert long_runs.exponent(sizes, [0.1 * size**2 for size in sizes]) == pytest.approx(2)
