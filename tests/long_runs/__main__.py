"""Long runs in one process: what memory, caches and times do over many rounds, as a table with the bound of each.

make long-runs                                # all
python tests/long_runs rounds --times 500     # rewrite, train a step, fold, release
python tests/long_runs adapters --times 200   # adapters on one graph
python tests/long_runs requests --times 10000 # onnxruntime from eight threads, while adapters come and go
python tests/long_runs trainer --times 300    # seconds of Trainer, with evaluation and checkpoints
"""

from __future__ import annotations

import functools
import gc
import logging
import math
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

HERE = Path(__file__).parent
sys.path += [str(HERE.parent), str(HERE.parent.parent / "tools")]

from slotted import adapted, batch, expected, exported, near  # noqa: E402

import lora_fx  # noqa: E402
from lora_fx.cli.printing import run_script  # noqa: E402
from lora_fx.runtime import OnnxSession  # noqa: E402

THREADS = 8
PAGE = 4096


@dataclass(frozen=True)
class Measured:
    """A row of the table.

    Attributes:
        what: was measured.
        value: in numbers.
        most: that is allowed.
        more: said beside the value.
    """

    what: str
    value: float
    most: float
    more: str

    @property
    def good(self) -> bool:
        return self.value <= self.most

    def row(self, run: str) -> str:
        return f"| {run} | {self.what} | {self.value:.3g} | {self.most:g} | {self.more} |"


def growth(what: str, values: Sequence[float], most: float) -> Measured:
    """Return by how much values grow from one to the next, by a linear fit."""
    return Measured(
        what, float(np.polyfit(range(len(values)), values, 1)[0]), most, f"from {values[0]:.0f} to {values[-1]:.0f}"
    )


def resident() -> int:
    """Return the bytes of memory that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def cached() -> int:
    """Return how many entries the caches of functions have, of all modules together."""
    wrappers = [each for each in gc.get_objects() if type(each) is functools._lru_cache_wrapper]
    return sum(each.cache_info().currsize for each in wrappers)


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Return by which power of the size a time grows."""
    return float(np.polyfit([math.log(size) for size in sizes], [math.log(each) for each in seconds], 1)[0])


class Small(nn.Module):
    """Two linears and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(24, 32), nn.LayerNorm(32), nn.Linear(32, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(torch.tanh(self.norm(self.first(x))))
        return result


def one_round(number: int) -> None:
    """Rewrite, train a step, fold, release."""
    torch.manual_seed(number)
    x = torch.randn(5, 24)
    graph = lora_fx.rewrite(Small(), ["first", "last"], rank=4, example_inputs=(x,))
    optimizer = torch.optim.AdamW([each for each in graph.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(2):
        graph(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert torch.allclose(lora_fx.fold(graph)(x), graph(x), atol=1e-5)


def rounds(times: int) -> Sequence[Measured]:
    """Measure memory, objects and caches over rounds, from a fifth of them on.

    Of each graph whose code it generates, torch keeps the source, for tracebacks: four objects, 16 times a round.
    """
    memory, objects, entries = [], [], []
    for number in range(times):
        one_round(number)
        if number >= times // 5:
            gc.collect()
            memory.append(resident() / 1024)
            objects.append(float(len(gc.get_objects())))
            entries.append(float(cached()))
    return [
        growth("memory, KiB a round", memory, 64),
        growth("objects a round", objects, 100),
        growth("entries of caches a round", entries, 10),
    ]


def adapters(times: int) -> Sequence[Measured]:
    """Measure how long the n-th adapter of a graph takes to be added, chosen and saved."""
    x = torch.randn(5, 24)
    graph = lora_fx.trace(Small(), (x,), inference=True)
    sizes, spent = [], {"attach": [], "activate": [], "save": []}  # type: ignore[var-annotated]
    with tempfile.TemporaryDirectory() as place:
        for number in range(1, times + 1):
            start = time.process_time()
            graph = lora_fx.rewrite(graph, ["first", "last"], rank=2, adapter=f"a{number}")
            if number % 10:
                continue
            sizes.append(number)
            spent["attach"].append(time.process_time() - start)
            start = time.process_time()
            chosen = lora_fx.activate(graph, {f"a{number}": 1.0})
            spent["activate"].append(time.process_time() - start)
            start = time.process_time()
            lora_fx.save_adapter(chosen, Path(place) / str(number), f"a{number}")
            spent["save"].append(time.process_time() - start)
    return [
        Measured(
            f"{what} one of n: power of n", exponent(sizes, seconds), 1.2, f"{1000 * seconds[-1]:.0f} ms at n = {times}"
        )
        for what, seconds in spent.items()
    ]


def requests(times: int) -> Sequence[Measured]:
    """Count wrong answers of a session that eight threads ask, while a ninth loads and drops adapters."""
    names, wrong, done = [f"a{number}" for number in range(4)], [], threading.Event()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        session = OnnxSession(exported(root / "slots.onnx"))
        wanted = {}
        for number, name in enumerate(names):
            graph = adapted(seed=number)
            lora_fx.export.onnx_adapter(graph, root / name)
            wanted[name] = expected(graph)
            session.load(name, root / name)
        loaded = 0

        def come_and_go() -> None:
            nonlocal loaded
            while not done.is_set():
                session.load("guest", root / names[loaded % 4])
                session.unload("guest")
                loaded += 1

        memory: list[float] = []

        def ask(thread: int) -> None:
            for number in range(times // THREADS):
                name = names[(thread + number) % 4]
                if not near(session.run(batch(), name)["y"], wanted[name]):
                    wrong.append((thread, number))
                if thread == 0 and number >= times // THREADS // 5:
                    memory.append(resident() / 1024)

        workers = [threading.Thread(target=ask, args=(thread,)) for thread in range(THREADS)]
        guest = threading.Thread(target=come_and_go)
        for each in (guest, *workers):
            each.start()
        for each in workers:
            each.join()
        done.set()
        guest.join()
    asked = f"of {times // THREADS * THREADS}, {loaded} loads and drops beside them"
    return [
        Measured("wrong answers", len(wrong), 0, asked),
        growth(f"memory, KiB for {THREADS} requests", memory, 1),
    ]


def trainer(seconds: int) -> Sequence[Measured]:
    """Train by transformers' Trainer for some seconds, with evaluation and checkpoints, and watch memory."""
    import transformers

    from lora_fx.trainer import prepare

    config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2)
    graph = lora_fx.rewrite(transformers.GPT2LMHeadModel(config), rules="gpt2", labels=True, seed=0)
    ids = torch.randint(100, (16, 9))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    memory: list[float] = []
    begun = time.monotonic()

    class Watch(transformers.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            gc.collect()
            memory.append(resident() / 1024)
            control.should_training_stop = time.monotonic() - begun > seconds
            return control

    with tempfile.TemporaryDirectory() as place:
        options = transformers.TrainingArguments(
            place,
            max_steps=10**6,
            save_steps=20,
            eval_steps=20,
            eval_strategy="steps",
            save_total_limit=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=1000,
        )
        running = transformers.Trainer(graph, options, train_dataset=data, eval_dataset=data[:4], callbacks=[Watch()])
        prepare(running)
        running.train()
        steps = running.state.global_step
    late = memory[len(memory) // 5 :]
    return [
        growth(f"memory, KiB a checkpoint, in {steps} steps and {len(memory)} checkpoints", late, 16),
    ]


RUNS: dict[str, tuple[Callable[[int], Sequence[Measured]], int]] = {
    "rounds": (rounds, 500),
    "adapters": (adapters, 200),
    "requests": (requests, 10_000),
    "trainer": (trainer, 1800),
}


def main(
    which: Annotated[
        list[str] | None, typer.Argument(help="rounds, adapters, requests or trainer; all by default.")
    ] = None,
    times: Annotated[int | None, typer.Option(help="How often; of trainer, how many seconds.")] = None,
) -> None:
    """Run long, and print what memory, caches and times did; the exit code is 1 where a value is over its bound."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    unknown = {*(which or ())} - {*RUNS}
    if unknown:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: expected one of {', '.join(RUNS)}")
    good = True
    print("| run | measured | found | at most | |\n|---|---|---:|---:|---|", flush=True)
    for name in which or RUNS:
        run, usual = RUNS[name]
        for measured in run(times or usual):
            good &= measured.good
            print(measured.row(f"{name}, {times or usual}"), flush=True)
    raise typer.Exit(not good)


EXAMPLES = "Examples:  make long-runs   ·   python tests/long_runs rounds --times 500"

if __name__ == "__main__":
    run_script(main, epilog=EXAMPLES)
