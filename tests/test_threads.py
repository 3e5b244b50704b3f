"""Several threads at once: each gets the graphs and bits of one thread, and the process is afterwards as it was."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_diff import first_difference
from torch import nn

import lora_fx
from lora_fx.graph.process_state import exclusive, quiet

RULES = {"defaults": {"rank": 2, "alpha": 3}, "select": [{"op": ["linear"]}]}
THREADS, ROUNDS = 3, 3


def model(thread: int) -> tuple[nn.Module, torch.Tensor]:
    """Return a model of other sizes for each thread, and its input."""
    generator = torch.Generator().manual_seed(thread)
    sizes = 5 + thread, 7 + thread, 3 + thread
    made = nn.Sequential(nn.Linear(*sizes[:2]), nn.ReLU(), nn.Dropout(0.5), nn.Linear(*sizes[1:]))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made, torch.randn(4, sizes[0], generator=generator)


def work(made: nn.Module, x: torch.Tensor, seed: int, path: Path) -> tuple[Any, ...]:
    """Trace, rewrite, fold and export once."""
    base = lora_fx.trace(made, (x,))
    gm = lora_fx.rewrite(made, RULES, seed=seed, example_inputs=(x,))
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.25)
    merged = lora_fx.fold(gm.eval())
    write: dict[str, Callable[..., Any]] = {
        ".onnx": lora_fx.export.onnx,
        ".pt2": lora_fx.export.pt2,
        ".pt": lora_fx.export.torchscript,
    }
    exported = write[path.suffix](merged, path)
    return base, gm, merged, exported.largest, merged(x)


def in_threads(run: Callable[[int], None]) -> list[BaseException]:
    failed: list[BaseException] = []
    start = threading.Barrier(THREADS)

    def guarded(thread: int) -> None:
        start.wait()
        try:
            run(thread)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(thread,)) for thread in range(THREADS)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return failed


def process_state() -> tuple[Any, ...]:
    loggers = {name: each for name, each in logging.root.manager.loggerDict.items() if isinstance(each, logging.Logger)}
    logs = {name: (each.level, each.disabled, *each.filters, *each.handlers) for name, each in loggers.items()}
    logs["handlers"] = tuple((each, *each.filters) for each in logging.root.handlers)
    return logging.root.manager.disable, logs, gc.isenabled(), list(warnings.filters), torch.get_num_threads()


def test_threads_that_trace_rewrite_fold_and_export_get_the_graphs_and_bits_of_one_thread(tmp_path: Path) -> None:
    models = [model(thread) for thread in range(THREADS)]
    files = ["a.onnx", "a.pt2", *(f"{number}.pt" for number in range(ROUNDS - 2))]
    alone = {
        (thread, file): work(*models[thread], 10 * thread + number, tmp_path / f"alone-{thread}-{file}")
        for thread in range(THREADS)
        for number, file in enumerate(files)
    }
    together: dict[tuple[int, str], tuple[Any, ...]] = {}
    before, drawn = process_state(), torch.get_rng_state()

    def run(thread: int) -> None:
        for number, file in enumerate(files):
            together[thread, file] = work(*models[thread], 10 * thread + number, tmp_path / f"{thread}-{file}")

    assert in_threads(run) == []
    assert len(together) == THREADS * ROUNDS
    assert process_state() == before
    assert torch.equal(torch.get_rng_state(), drawn)
    for key, (base, gm, merged, largest, result) in together.items():
        expected = alone[key]
        for mine, other in zip((base, gm, merged), expected[:3], strict=True):
            assert first_difference(mine, other) is None
            for name, tensor in mine.state_dict().items():
                assert torch.equal(tensor, other.state_dict()[name]), (key, name)
        assert largest == expected[3]
        assert torch.equal(result, expected[4])


def test_after_traces_that_fail_in_several_threads_the_process_is_as_it_was() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x * 3

    before, failed = (
        process_state(),
        in_threads(lambda thread: lora_fx.trace(Branching(), (torch.ones(2, 3 + thread),))),
    )
    assert [type(error).__name__ for error in failed] == ["TraceError"] * THREADS
    assert process_state() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_child_that_is_forked_while_another_thread_traces_may_trace() -> None:
    holding, done = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive():
            holding.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for the lock
        with exclusive(), exclusive():
            os._exit(7)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 7


def test_while_a_thread_traces_others_log_and_torch_does_not(caplog: pytest.LogCaptureFixture) -> None:
    spoken = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    own = logging.getLogger("somebody")
    caplog.set_level(logging.WARNING)
    spoken.addHandler(caplog.handler)  # torch's loggers do not propagate
    try:
        with quiet():
            spoken.warning("of this thread")
            own.warning("somebody else")
            logging.getLogger("torch.made_inside").warning("of this thread, and a new logger")
            other = threading.Thread(target=spoken.warning, args=("of another thread",))
            other.start()
            other.join()
        spoken.warning("afterwards")
    finally:
        spoken.removeHandler(caplog.handler)
    said = dict.fromkeys(record.getMessage() for record in caplog.records)
    assert list(said) == ["somebody else", "of another thread", "afterwards"]
