"""How long it takes to fold an adapter of all linears into a checkpoint on disk, beside copying it and beside PEFT, and in how much memory.

Example:  python tools/bench/checkpoint_fold.py --gigabytes 4 --repetitions 3

makes a checkpoint of the shape of Llama in bfloat16, with an adapter of rank 16, and removes it afterwards.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from lora_fx.cli.printing import run_script
from lora_fx.files.atomic import replacing
from lora_fx.files.safetensors import TensorFile, bytes_of, write_tensors
from lora_fx.files.target import DirectoryKind, Target
from lora_fx.folding.checkpoint import INDEX, Checkpoint
from lora_fx.folding.checkpoint_plan import plan_checkpoint_fold
from lora_fx.numerics.lowrank_merge import rounded

RANK, ALPHA = 16, 32
SHARD = 10**9
SAMPLE = 4  # weights that are compared with float64
PREFIX = "base_model.model."


# The checkpoint and the adapter.


def shape_of(gigabytes: float) -> Any:
    """Return a config of Llama of about that many bytes: of Llama 2's width, or a narrow one if that is little."""
    import transformers

    wide = gigabytes >= 2
    hidden, inner, words = (4096, 11008, 32000) if wide else (1024, 2816, 8000)
    rest = gigabytes * 1e9 - 2 * 2 * words * hidden
    layers = max(1, round(rest / (2 * (4 * hidden * hidden + 3 * hidden * inner))))
    return transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        vocab_size=words,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def make(base: Path, adapter: Path, gigabytes: float) -> list[str]:
    """Write a checkpoint with random weights and an adapter for all linears of its layers; return the keys of these."""
    import transformers

    config = shape_of(gigabytes)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    base.mkdir()
    config.save_pretrained(base)
    generator = torch.Generator().manual_seed(1)
    _write_shards(base, dict(model.state_dict()), generator)
    linears = [name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    factors = {}
    for name in linears:
        outputs, inputs = model.model.get_submodule(name).weight.shape
        key = f"{PREFIX}model.{name}"
        factors[f"{key}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator) / inputs**0.5
        factors[f"{key}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator) * 1e-3
    adapter.mkdir()
    write_tensors(adapter / "adapter_model.safetensors", factors, {"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({name.rpartition(".")[2] for name in linears}),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return [f"model.{name}.weight" for name in linears]


def _write_shards(base: Path, tensors: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    """Write random values tensor by tensor, so that the weights are never all in memory."""
    shards: list[list[str]] = [[]]
    for name, tensor in tensors.items():
        if sum(tensors[other].nbytes for other in shards[-1]) + tensor.nbytes > SHARD and shards[-1]:
            shards.append([])
        shards[-1].append(name)
    places = {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        places.update(dict.fromkeys(names, file_name))
        with (base / file_name).open("wb") as file:
            file.write(_header({name: tensors[name] for name in names}))
            for name in names:
                values = torch.randn(tensors[name].shape, generator=generator).mul_(0.02).bfloat16()
                file.write(bytes_of(values))
    total = sum(tensor.nbytes for tensor in tensors.values())
    (base / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))


def _header(tensors: dict[str, torch.Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


# What is measured.


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        seconds: from reading the first header to the last file on the disk.
        memory: anonymous bytes at most, more than before.
    """

    seconds: float
    memory: int


def planning(base: Path, adapter: Path) -> Measured:
    """Plan the fold alone."""
    return measured(lambda: plan_checkpoint_fold(base, [(adapter, 1.0)]))


def fold(base: Path, adapter: Path, out: Path) -> Measured:
    """Fold as lora_fx does; memory counts from when the model was traced."""
    start = time.perf_counter()
    planned = plan_checkpoint_fold(base, [(adapter, 1.0)])
    print(f"lora_fx: config traced and adapter fitted in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return measured(lambda: planned.write(out))


def fold_by_peft(base: Path, adapter: Path, out: Path) -> Measured:
    """Fold as PEFT does."""
    import peft
    import transformers

    transformers.utils.logging.disable_progress_bar()

    def run() -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        with replacing(
            Target(out, kind=DirectoryKind("a copy", lambda _: True))
        ) as beside:  # on the disk when it ends, as with the others
            merged.save_pretrained(beside, max_shard_size=SHARD)

    return measured(run)


def copy(base: Path, out: Path) -> Measured:
    """Copy with ``cp``, and wait until all is on the disk."""

    def run() -> None:
        out.mkdir()
        subprocess.run(["cp", "--reflink=never", *map(str, sorted(base.iterdir())), str(out)], check=True)
        for path in out.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    return measured(run)


def measured(run: Callable[[], object]) -> Measured:
    """Return how long a call takes and how much memory beyond the present one."""
    before, largest, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.01):
            largest = max(largest, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        run()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    return Measured(seconds, max(0, largest - before))


def anonymous() -> int:
    """Return how many bytes of this process are in memory and not of a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def apart(function: Callable[..., Measured], *arguments: Path) -> Measured:
    """Call in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def warmed(base: Path) -> None:
    """Bring the checkpoint into the page cache, and what is still to be written to the disk."""
    for path in base.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass
    os.sync()


def cooled(base: Path) -> None:
    """Drop the checkpoint from the page cache, as far as the system does when it is asked."""
    os.sync()
    for path in base.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def misrounded(base: Path, adapter: Path, out: Path, keys: list[str]) -> float:
    """Return the share of elements that are not the exact result rounded once, of some weights."""
    old, new, factors = (
        Checkpoint.open(base),
        Checkpoint.open(out),
        TensorFile.open(adapter / "adapter_model.safetensors"),
    )
    wrong = total = 0
    for key in keys[:: max(1, len(keys) // SAMPLE)][:SAMPLE]:
        module = f"{PREFIX}{key.removesuffix('.weight')}"
        a, b = (factors.read(f"{module}.lora_{side}.weight").double() for side in "AB")
        for found, weight, rows in zip(*(x.split(1024) for x in (new.read(key), old.read(key), b)), strict=True):
            exact = weight.double() + ALPHA / RANK * rows @ a
            wrong += int((found != rounded(exact, torch.bfloat16)).count_nonzero())
            total += found.numel()
    return wrong / total


# The table.


@contextmanager
def place(directory: Path | None) -> Iterator[Path]:
    """Yield a new directory, which is removed afterwards."""
    made = Path(tempfile.mkdtemp(prefix="checkpoint-fold-", dir=directory))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def main(
    gigabytes: Annotated[float, typer.Option(help="Size of the checkpoint.")] = 4.0,
    repetitions: Annotated[int, typer.Option(help="How often it is copied and folded, in turn.")] = 3,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where to write; by default the system's place.")
    ] = None,
    peft: Annotated[bool, typer.Option(help="Whether PEFT folds it too, once.")] = True,
) -> None:
    """Fold an adapter of rank 16 of all linears into a checkpoint on disk, beside `cp` of it and beside PEFT.

    Example:  python tools/bench/checkpoint_fold.py --gigabytes 4 --repetitions 3
    """
    console = Console()
    with place(directory) as where:
        base, adapter, out = where / "base", where / "adapter", where / "out"
        keys = make(base, adapter, gigabytes)
        checkpoint = Checkpoint.open(base)
        largest = max(entry.size for _, entry in checkpoint.tensors.values())
        changed = sum(checkpoint.tensors[key][1].size for key in keys)
        console.print(
            f"{checkpoint.size / 1e9:.2f} GB in {len(checkpoint.files)} files, {changed / 1e9:.2f} GB of them changed, largest tensor "
            f"{largest / 1e6:.0f} MB; {os.cpu_count()} cores; page cache warm: all files are read before each run"
        )
        runs: dict[str, list[Measured]] = {"cp": [], "lora_fx": [], "PEFT": []}
        wrong: dict[str, float] = {}
        for number in range(repetitions):
            calls: list[tuple[str, Callable[[], Measured]]] = [
                ("cp", lambda: copy(base, out)),
                ("lora_fx", lambda: apart(fold, base, adapter, out)),
            ]
            if peft and number == 0:
                calls.append(("PEFT", lambda: apart(fold_by_peft, base, adapter, out)))
            for name, call in calls:
                warmed(base)
                runs[name].append(call())
                if name != "cp" and name not in wrong:
                    wrong[name] = misrounded(base, adapter, out, keys)
                shutil.rmtree(out)
        console.print(_table(runs, wrong, largest))


def _table(runs: dict[str, list[Measured]], wrong: dict[str, float], largest: int) -> Table:
    table = Table(
        "", "seconds (median)", "all", "÷ cp", "anonymous memory", "÷ largest tensor", "not rounded correctly"
    )
    copied = statistics.median(run.seconds for run in runs["cp"])
    for name, own in runs.items():
        if not own:
            continue
        seconds, memory = statistics.median(run.seconds for run in own), max(run.memory for run in own)
        table.add_row(
            f"{name} + fsync",
            f"{seconds:.2f}",
            " ".join(f"{run.seconds:.2f}" for run in own),
            f"{seconds / copied:.2f}",
            "" if name == "cp" else f"{memory / 1e6:.0f} MB",
            "" if name == "cp" else f"{memory / largest:.2f}",
            f"{wrong[name]:.1e}" if name in wrong else "",
        )
    return table


if __name__ == "__main__":
    run_script(main)
