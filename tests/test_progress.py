"""Progress of what takes seconds: one bar as transformers shows its own, and none where its switches say so."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils import logging

import lora_fx
from lora_fx import progress
from lora_fx.errors import of_a_command

X = (torch.ones(2, 3),)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let bars appear at once, and bring transformers' switch back."""
    was = logging.is_progress_bar_enabled()
    monkeypatch.setattr(progress, "DELAY", 0.0)
    logging.enable_progress_bar()
    yield
    (logging.enable_progress_bar if was else logging.disable_progress_bar)()


class Slow(nn.Linear):
    """A linear layer whose Python takes its time in a trace."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return super().forward(x)


def bars(capsys: Any) -> str:
    return str(capsys.readouterr().err)


def test_traces_rewrites_folds_and_exports_show_what_they_do(capsys: Any, tmp_path: Any) -> None:
    base = lora_fx.trace(Slow(3, 4).eval(), X)
    assert "tracing Slow: 00:0" in bars(capsys)
    graph = lora_fx.rewrite(Slow(3, 4).eval(), ["*"], example_inputs=X)
    told = bars(capsys)
    assert "rewriting Slow: 00:0" in told
    assert "exporting in training mode" in told
    assert "tracing" not in told.replace("tracing Slow\r", "")  # within a rewrite it is a step
    del base
    with progress.shown("folding a graph"):
        time.sleep(0.1)
        lora_fx.fold(graph)
    assert "weight 1 of 1" in bars(capsys)
    lora_fx.export.pt2(graph.eval(), tmp_path / "x.pt2")
    assert "exporting to pt2: 00:0" in bars(capsys)


def test_a_bar_appears_while_one_step_takes_all_the_time(capsys: Any) -> None:
    with progress.shown("waiting"):
        progress.step("the only step")
        time.sleep(0.3)
        assert "waiting: 00:00, the only step" in bars(capsys)


def test_the_time_is_that_of_the_work_and_goes_on_within_a_step(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 1.1)
    monkeypatch.setattr(progress, "_TICK", 0.2)
    with progress.shown("waiting"):
        progress.step("the only step")
        time.sleep(2.3)
    told = bars(capsys)
    assert "00:00" not in told
    assert "waiting: 00:01, the only step" in told
    assert "waiting: 00:02, the only step" in told


def test_the_switches_of_transformers_turn_it_off_and_commands_have_their_own(capsys: Any) -> None:
    logging.disable_progress_bar()
    with progress.shown("quiet"):
        time.sleep(0.1)
    logging.enable_progress_bar()
    with of_a_command(), progress.shown("command"):
        time.sleep(0.1)
    assert bars(capsys) == ""


def test_what_ends_within_two_seconds_shows_nothing(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 2.0)
    with progress.shown("short"):
        progress.step("one")
    assert bars(capsys) == ""
