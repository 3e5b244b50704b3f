"""One model with slots and an adapter a request, beside a folded model of each adapter, and PEFT in eager mode.

    python tools/bench/slots.py                      # prints a table
    python tools/bench/slots.py --write              # puts it into the guide, with the machine and the date

A GPT-2 of 12 layers and width 768, of random weights and a vocabulary of 1000, with adapters of ranks 8 and 16 beside every
c_attn. All run in one process, on the threads that torch takes by default, in alternation: each repetition times every
contender once, beginning with another. "swapped" takes the other adapter in every call.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import onnxruntime
import peft
import torch
import transformers
import typer
from results import Conditions
from tqdm.auto import tqdm

sys.path.append(str(Path(__file__).parent.parent))

import guides

import lora_fx
from lora_fx.cli.printing import run_script
from lora_fx.runtime import OnnxSession

SIZES = ((1, 1), (1, 16), (1, 128), (4, 32))
"""Batch and sequence."""

RANKS = {"style": 8, "facts": 16}
VOCABULARY = 1000
Run = Callable[[Mapping[str, torch.Tensor]], Any]


def model(layers: int) -> transformers.GPT2LMHeadModel:
    """Return a model of random weights."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_layer=layers, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)


def wrapped(base: Any, directory: Path) -> Any:
    """Return the model as PEFT wraps it, with adapters that are not zero, and write these to directories."""
    for name, rank in RANKS.items():
        config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)
        base = peft.get_peft_model(base, config, name) if name == "style" else base
        if name != "style":
            base.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    base.save_pretrained(directory)
    return base.eval()


def options() -> onnxruntime.SessionOptions:
    """Return the options of a session whose threads do not go on spinning, and slow down what is timed next."""
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = torch.get_num_threads()
    made.add_session_config_entry("session.intra_op.allow_spinning", "0")
    made.log_severity_level = 3
    return made


def contenders(layers: int, directory: Path) -> tuple[dict[str, Run], dict[str, float]]:
    """Return what runs a batch in each way, and the seconds and bytes that are told beside."""
    traced = lora_fx.trace(model(layers), inference=True)
    theirs = wrapped(model(layers), directory)
    graph = traced
    for name in RANKS:
        graph = lora_fx.load_adapter(graph, directory / name, name)
    lora_fx.export.onnx(graph, directory / "slots.onnx", slots=True, verify=False)
    lora_fx.export.onnx(lora_fx.fold(graph, {"style": 1.0}), directory / "folded.onnx", verify=False)
    for name in RANKS:
        lora_fx.export.onnx_adapter_from_peft(directory / name, directory / "slots.onnx", directory / f"{name}.file")
    folded = onnxruntime.InferenceSession(str(directory / "folded.onnx"), options(), providers=["CPUExecutionProvider"])
    session = OnnxSession(directory / "slots.onnx", options=options())
    start = time.perf_counter()
    for name in RANKS:
        session.load(name, directory / f"{name}.file")
    beside = {"load": (time.perf_counter() - start) / len(RANKS), **activation(directory / "style.file", theirs)}
    beside["bytes"] = (directory / "facts.file").stat().st_size
    names, others = cycle(RANKS), cycle(RANKS)

    def swapped_by_peft(batch: Mapping[str, torch.Tensor]) -> Any:
        theirs.set_adapter(next(others))
        return theirs(**batch, use_cache=False)

    def eager(batch: Mapping[str, torch.Tensor]) -> Any:
        return theirs(**batch, use_cache=False)

    runs: dict[str, Run] = {
        "folded, onnxruntime": lambda batch: folded.run(None, arrays(batch)),
        "slots, no adapter": lambda batch: session.run(arrays(batch)),
        "slots, one adapter": lambda batch: session.run(arrays(batch), "style"),
        "slots, swapped": lambda batch: session.run(arrays(batch), next(names)),
        "PEFT, eager, one adapter": eager,
        "PEFT, eager, swapped": swapped_by_peft,
    }
    check(runs, theirs)
    return runs, beside


def activation(path: Path, theirs: Any) -> dict[str, float]:
    """Return the seconds that choosing an adapter takes by itself."""
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(path))
    turns = cycle(RANKS)

    def choose() -> None:
        onnxruntime.RunOptions().add_active_adapter(adapter)

    return {name: each(run) for name, run in (("choose", choose), ("set", lambda: theirs.set_adapter(next(turns))))}


def each(run: Callable[[], None], calls: int = 50) -> float:
    """Return the median seconds of a call."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def check(runs: Mapping[str, Run], theirs: Any) -> None:
    """Fail unless all that run with the first adapter compute the same."""
    batch = inputs(2, 9)
    theirs.set_adapter("style")
    expected = runs["PEFT, eager, one adapter"](batch).logits
    for found in (runs["folded, onnxruntime"](batch)[0], runs["slots, one adapter"](batch)["logits"]):
        assert (torch.from_numpy(found) - expected).abs().max() < 1e-5 * expected.abs().max()


def arrays(batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return a batch as onnxruntime takes it."""
    return {name: tensor.numpy() for name, tensor in batch.items()}


def inputs(batch: int, sequence: int) -> dict[str, torch.Tensor]:
    """Return a batch."""
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(0, VOCABULARY, (batch, sequence), generator=generator),
        "attention_mask": torch.ones(batch, sequence, dtype=torch.int64),
    }


def latencies(runs: Mapping[str, Run], batch: int, sequence: int, seconds: float) -> tuple[dict[str, float], int]:
    """Return the median seconds of one call of each, and how often each was timed."""
    given = inputs(batch, sequence)
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, end, turn = list(runs), time.perf_counter() + seconds, 0
    with tqdm(desc=f"batch {batch}, sequence {sequence}", leave=False) as bar:
        while time.perf_counter() < end or turn < 8:
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                start = time.perf_counter()
                runs[name](given)
                if turn >= 3:  # what is first called at a size is warmed up before
                    times[name].append(time.perf_counter() - start)
            turn += 1
            bar.update()
    return {name: statistics.median(found) for name, found in times.items()}, turn - 3


def main(
    layers: Annotated[int, typer.Option(help="Of the model.")] = 12,
    seconds: Annotated[float, typer.Option(help="Of timing at each size.")] = 15,
    write: Annotated[bool, typer.Option("--write", help="Put the table into the guide.")] = False,
) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        runs, beside = contenders(layers, Path(directory))
        found = [latencies(runs, *size, seconds) for size in SIZES]
    first = next(iter(runs))
    lines = [
        f"| | {' | '.join(f'batch {batch} × {sequence}' for batch, sequence in SIZES)} |",
        "|---|" + "---:|" * len(SIZES),
    ]
    for name in runs:
        cells = [f"{times[name] * 1e3:.2f} ms ({times[name] / times[first]:.2f}×)" for times, _ in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(
        f"\nChoosing an adapter takes onnxruntime {beside['choose'] * 1e6:.0f} µs a call, and PEFT's set_adapter "
        f"{beside['set'] * 1e3:.1f} ms. Loading one, with all checks, takes {beside['load'] * 1e3:.1f} ms; that of rank "
        f"{RANKS['facts']} has {beside['bytes'] / 1e6:.1f} MB."
    )
    counts = [count for _, count in found]
    conditions = Conditions.present(("torch", "onnxruntime", "peft"))
    lines.append(f"\n{conditions}; medians of {min(counts)} to {max(counts)}.")
    text = "\n".join(lines)
    print(text)
    if write:
        guides.write("tools/bench/slots.py", text)


if __name__ == "__main__":
    run_script(main)
