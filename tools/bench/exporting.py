"""Time of an ONNX export beside torch.onnx.export of the same model: a BERT of base size, and a Llama.

    python tools/bench/exporting.py                  # prints a table, of models of 12 layers, row by row
    python tools/bench/exporting.py --repetitions 1 --layers 4

Processor time of this process, of exports in alternation. Before, models of one layer are exported, which imports and registers what
exports need. The trace of the graph is made before too, as it is for every other use of the graph. torch.onnx.export takes the model
itself, and the same dynamic dimensions.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from measuring import alternating
from results import Conditions

import lora_fx
from lora_fx.cli.printing import run_script


def models(layers: int) -> dict[str, Any]:
    """Return models of so many layers; the Llama is narrow, since its operators take the time."""
    llama = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        use_cache=False,
    )
    return {
        "BERT": transformers.BertModel(transformers.BertConfig(num_hidden_layers=layers)).eval(),
        "Llama": transformers.LlamaForCausalLM(llama).eval(),
    }


def exports(model: Any, directory: Path) -> dict[str, Callable[[], object]]:
    """Return the exports that are compared, the one of torch first."""
    graph = lora_fx.trace(model, inference=True)
    batch = {"input_ids": torch.randint(0, 100, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    dynamic = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in batch}
    path = directory / "model.onnx"
    return {
        "torch.onnx.export": lambda: torch.onnx.export(
            model, (), str(path), kwargs=batch, dynamo=True, verbose=False, dynamic_shapes=dynamic
        ),
        "export.onnx(…, verify=False)": lambda: lora_fx.export.onnx(graph, path, overwrite=True, verify=False),
        "export.onnx, compared": lambda: lora_fx.export.onnx(graph, path, overwrite=True),
    }


def seconds(runs: dict[str, Callable[[], object]], repetitions: int, name: str) -> dict[str, float]:
    """Return the median processor time of each."""
    times = alternating(runs, repetitions, warm_up=0, clock=lambda _: time.process_time(), says=name)
    return {name: statistics.median(found) for name, found in times.items()}


def main(
    repetitions: Annotated[int, typer.Option(help="Timed exports of each kind.")] = 3,
    layers: Annotated[int, typer.Option(help="Layers of each model.")] = 12,
) -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        for model in models(layers=1).values():
            runs = exports(model, Path(directory))
            for run in runs.values():
                run()
        print(f"| model | {' | '.join(runs)} |\n|---|{'---:|' * len(runs)}", flush=True)
        for name, model in models(layers).items():
            times = seconds(exports(model, Path(directory)), repetitions, name)
            of_torch = next(iter(times.values()))
            cells = [f"{each:.1f} s ({each / of_torch:.2f}×)" for each in times.values()]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(f"\n{Conditions.present(('torch', 'onnxruntime'))}; processor time, medians of {repetitions}.")


if __name__ == "__main__":
    run_script(main)
