"""The MiniLM of the demo in every format: size on disk, and latency beside eager transformers.

    python tools/bench/exports.py                    # prints a table
    python tools/bench/exports.py --write            # puts it into the guide, with the machine and the date

All run the folded weights, in one process, on the threads that torch takes by default, in alternation: each repetition times
every format once, beginning with another, and the ratio is that of the medians. What is first called at a size is warmed up before.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import onnxruntime
import torch
import transformers
import typer
from measuring import alternating
from results import Conditions
from rich.console import Console

sys.path.append(str(Path(__file__).parent.parent))

import guides

import lora_fx
from lora_fx.cli.printing import run_script
from lora_fx.demo import SEED, load_model, read_corpus

SIZES = ((1, 16), (1, 128), (16, 64))
"""Batch and sequence."""

Run = Callable[[Mapping[str, torch.Tensor]], Any]


def folded() -> tuple[Any, lora_fx.TracedGraphModule]:
    """Return the pretrained model, and its graph with an adapter folded in that is not zero."""
    model, _ = load_model(Console(stderr=True), read_corpus(SEED))
    branched = lora_fx.rewrite(model, rules="bert", seed=SEED)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in branched.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02, generator=generator)
    return model, lora_fx.fold(branched.eval())


def formats(model: Any, graph: lora_fx.TracedGraphModule, directory: Path) -> dict[str, tuple[Path, Run]]:
    """Write the graph in every format, and return where each is and what runs it."""
    lora_fx.huggingface.save_pretrained(model, graph, directory / "model")
    script, program, onnx = directory / "model.pt", directory / "model.pt2", directory / "model.onnx"
    lora_fx.export.torchscript(graph, script)
    lora_fx.export.pt2(graph, program)
    lora_fx.export.onnx(graph, onnx)
    eager = transformers.AutoModel.from_pretrained(directory / "model", local_files_only=True).eval()
    scripted, exported = torch.jit.load(script), torch.export.load(program).module()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on spinning when it is done, and slow down what is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])
    return {
        "transformers, eager": (directory / "model", lambda batch: eager(**batch)),
        "folded graph": (directory / "model", lambda batch: graph(**batch)),
        "TorchScript": (script, lambda batch: scripted(**batch)),
        "pt2": (program, lambda batch: exported(**batch)),
        "ONNX, onnxruntime": (onnx, lambda batch: session.run(None, {k: v.numpy() for k, v in batch.items()})),
    }


def latencies(runs: Mapping[str, Run], batch: int, sequence: int, repetitions: int) -> dict[str, float]:
    """Return the median seconds of one call of each."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = {
        "input_ids": torch.randint(1000, 20000, (batch, sequence), generator=generator),
        "attention_mask": torch.ones(batch, sequence, dtype=torch.int64),
    }
    steps = {name: partial(run, inputs) for name, run in runs.items()}
    times = alternating(steps, repetitions, warm_up=3, says=f"batch {batch}, sequence {sequence}")
    return {name: statistics.median(found) for name, found in times.items()}


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of the weights in a directory."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size


def main(
    repetitions: Annotated[int, typer.Option(help="Timed calls of each format at each size.")] = 40,
    write: Annotated[bool, typer.Option("--write", help="Put the table into the guide.")] = False,
) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode(False), torch.no_grad():
        model, graph = folded()
        made = formats(model, graph, Path(directory))
        runs = {name: run for name, (_, run) in made.items()}
        found = [latencies(runs, *size, repetitions) for size in SIZES]
        sizes = {name: size_of(path) for name, (path, _) in made.items()}
    first = next(iter(runs))
    lines = [
        f"| format | MB | {' | '.join(f'batch {batch} × {sequence}' for batch, sequence in SIZES)} |",
        "|---|---:|" + "---:|" * len(SIZES),
    ]
    for name in runs:
        cells = [f"{times[name] * 1e3:.1f} ms ({times[first] / times[name]:.2f}×)" for times in found]
        lines.append(f"| {name} | {sizes[name] / 1e6:.1f} | {' | '.join(cells)} |")
    conditions = Conditions.present(("torch", "onnxruntime"))
    lines.append(f"\n{conditions}; medians of {repetitions}.")
    text = "\n".join(lines)
    print(text)
    if write:
        guides.write("tools/bench/exports.py", text)


if __name__ == "__main__":
    run_script(main)
