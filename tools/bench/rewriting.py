"""Rows W1 and W2: a rewrite, in both modes and with all its checks, beside one torch.export of the model in eval mode.

    python tools/bench/rewriting.py W1                 # a BERT of the base size
    python tools/bench/rewriting.py W2 --json found.json

Both run in one process and take turns, with what is imported and made on first use left out. Times are of the processor: one thread
of Python does most of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from results import Conditions, Goal, Measured, Result, report
from torch import nn

import lora_fx
from lora_fx.cli.printing import run_script

EXPORT, REWRITE = "torch.export, eval mode", "rewrite"
TINY = {"vocab_size": 97, "num_heads": 4, "num_attention_heads": 4}


def bert(*, tiny: bool) -> nn.Module:
    """Return a BERT of 12 layers."""
    widths = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4} if tiny else {}
    return transformers.BertModel(transformers.BertConfig(**widths, **(TINY if tiny else {}))).eval()


def t5(*, tiny: bool) -> nn.Module:
    """Return a T5 of 3 and 3 layers, of which none is stamped."""
    widths = {"d_model": 40, "d_kv": 12, "d_ff": 72} if tiny else {}
    layers = {"num_layers": 1 if tiny else 3, "num_decoder_layers": 1 if tiny else 3}
    config = transformers.T5Config(**widths, **layers, **(TINY if tiny else {}))
    return transformers.T5ForConditionalGeneration(config).eval()


ROWS: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...], str, Goal]] = {
    "W1": (bert, ("input_ids", "attention_mask"), "BERT-base, 12 layers", Goal(REWRITE, "time", 1.5, EXPORT)),
    "W2": (
        t5,
        ("input_ids", "attention_mask", "decoder_input_ids"),
        "T5 of the small widths, 3 and 3 layers",
        Goal(REWRITE, "seconds", 2.2),
    ),
}
"""Row → what makes its model, the inputs, its shape in words, and its goal."""


def exported(model: nn.Module, names: tuple[str, ...]) -> torch.export.ExportedProgram:
    """Export a model with any batch and sequence."""
    made = {name: torch.ones(2, 5 if name.startswith("decoder") else 7, dtype=torch.int64) for name in names}
    dynamic: dict[str, Any] = {name: dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC) for name in names}
    shapes, inputs = {**dynamic, "use_cache": None}, {**made, "use_cache": False}
    if not model.config.is_encoder_decoder:
        shapes, inputs = dynamic, made
    return torch.export.export(model, (), inputs, strict=False, dynamic_shapes=shapes)


def measured(row: str, repetitions: int, *, tiny: bool = False) -> Result:
    """Measure a row."""
    make, names, shape, goal = ROWS[row]
    model = make(tiny=tiny)
    steps: dict[str, Callable[[], object]] = {
        EXPORT: lambda: exported(model, names),
        REWRITE: lambda: lora_fx.rewrite(model, "auto", rank=8),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repetitions + 1):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            if repetition:
                times[name].append(time.process_time() - begin)
    found = tuple(Measured(name, tuple(taken), against=EXPORT) for name, taken in times.items())
    notes = (
        f"Processor time, medians of {repetitions}; the rewrite is of both modes, with the comparison with the model",
    )
    return Result(row, f"Rewrite of a {shape}, with weights", found, (goal,), Conditions.present(), notes)


def main(
    row: Annotated[str, typer.Argument(help="W1 or W2.")],
    repetitions: Annotated[int, typer.Option(min=1, help="Of each, in turns.")] = 5,
    tiny: Annotated[bool, typer.Option("--tiny", help="With sizes that take little time, and show nothing.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write what was found here.")] = None,
) -> None:
    """Measure a rewrite."""
    torch.set_num_threads(1)
    report([measured(row, 1 if tiny else repetitions, tiny=tiny)], json)


EXAMPLES = "Example:  python tools/bench/rewriting.py W1 --json found.json"

if __name__ == "__main__":
    run_script(main, epilog=EXAMPLES)
