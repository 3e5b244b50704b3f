"""Row Q2: a training step on a base in 4 bits (QLoRA), beside PEFT's with bitsandbytes: its time, and the memory of the process.

    python tools/bench/quantised.py                    # a table
    python tools/bench/quantised.py --json found.json

The base has 1 GB in float32, and is in NF4 with quantised scales. Before anything is timed, loss and gradients are compared: they are
PEFT's, bit for bit. Times are of the processor, on one thread. Memory is measured in a process for each, beyond what it has after all
imports and a trace of a model of one layer.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import transformers
import typer
from contenders import Adapter, Contender, compared, set_factors
from measuring import alternating, apart, shown, status
from results import Conditions, Goal, Measured, Result, report
from shapes import Llama, Timed, batch_of

import lora_fx
from lora_fx.cli.printing import run_script

ADAPTER = Adapter("all-linear", "all-linear", rank=16, alpha=32)
MAX_REWRITE = 300e6
"""The bytes that a rewrite may take beyond the loaded model."""


@dataclass(frozen=True)
class Row(Timed):
    """What is measured."""

    @property
    def shape(self) -> str:
        """The row in words."""
        own = self.model
        return (
            f"{type(own).__name__}, width {own.width}, inner {own.inner}, {own.layers} layers, in NF4 with quantised scales, computed in "
            f"float32, batch {self.batch} × {self.sequence}, all-linear, r={ADAPTER.rank}"
        )

    def tiny(self) -> Row:
        """Return the same with sizes that take no time; bitsandbytes' kernel for the CPU needs widths of whole blocks."""
        own = Llama(width=64, inner=128, layers=1, heads=2)
        return replace(self, model=own, batch=2, sequence=8, repetitions=3)


ROW = Row("Q2", Llama(width=1536, inner=4096, layers=9, heads=12), 2, 128, 15)


def quantised(shape: Llama, place: Path) -> Path:
    """Write a checkpoint of a model with random weights in 4 bits, and return its directory."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    shape.build().save_pretrained(place / "dense")
    model = transformers.LlamaForCausalLM.from_pretrained(
        place / "dense", quantization_config=settings, device_map="cpu", dtype=torch.float32
    )
    shutil.rmtree(place / "dense")
    model.save_pretrained(place / "quantised")
    return place / "quantised"


def loaded(directory: Path) -> Any:
    """Return a model in 4 bits, in train mode, as all of its calls have to be."""
    return transformers.LlamaForCausalLM.from_pretrained(directory, device_map="cpu", dtype=torch.float32).train()


def prepared(name: str, model: Any) -> Any:
    """Return what trains of a loaded model."""
    if name == "PEFT":
        return peft.get_peft_model(model, ADAPTER.peft_config()).train()
    return lora_fx.rewrite(model, ADAPTER.rules, labels=True, **ADAPTER.options())


def memory(name: str, row: Row, directory: Path, one_layer: Path) -> tuple[int, int, int]:
    """Return the bytes of this process after a model is loaded, at the peak of what makes it trainable, and at the peak of a step."""
    transformers.logging.set_verbosity_error()
    prepared("plain", loaded(one_layer))
    before = _resident()
    model = loaded(directory)
    for parameter in model.parameters():  # of a file that is mapped, a page is in memory once it was read
        parameter.data.max()
    after = _resident() - before
    _forget_peak()
    trained = prepared(name, model)
    made = status("VmHWM") - before
    batch = batch_of(model, row.batch, row.sequence, padding=3)
    step = Contender(name, trained, batch, trained).step
    step()
    _resident()
    _forget_peak()
    step()
    return after, made, status("VmHWM") - before


def _resident() -> int:
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status("VmRSS")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def processor_time(_device: str) -> float:
    """Return the processor time of this process, which other programs on the machine change less than time on the clock."""
    return time.process_time()


def measured(row: Row, directory: Path, one_layer: Path) -> Result:
    """Measure the row."""
    batch = batch_of(loaded(directory), row.batch, row.sequence, padding=3)
    modules = {name: prepared(name, loaded(directory)) for name in ("PEFT", "plain")}
    set_factors(*modules.values())
    found = [Contender(name, module, batch, module) for name, module in modules.items()]
    unlike = compared(found, 0.0)
    steps = {each.name: each.step for each in found}
    times = alternating(steps, row.repetitions, clock=processor_time, says=row.name)
    bytes_ = {name: apart(memory, name, row, directory, one_layer) for name in modules}
    after, made, _ = bytes_["plain"]
    notes = (
        f"Resident is the peak of a step beyond imports and a trace; the loaded model is {after / 1e6:.0f} MB of it, and the peak of rewrite "
        f"{(made - after) / 1e6:.0f} MB more (at most {MAX_REWRITE / 1e6:.0f}: {'yes' if made - after <= MAX_REWRITE else '**no**'})",
        f"Loss and gradients are {shown(unlike['plain'])} to PEFT's",
        f"Processor time, medians of {row.repetitions} pairs",
    )
    contenders = tuple(
        Measured(
            name,
            times[name],
            resident=bytes_[name][2],
            difference=unlike[name],
            against="" if name == "PEFT" else "PEFT",
        )
        for name in modules
    )
    goals = (Goal("plain", "time", 1.05, "PEFT"), Goal("plain", "resident", 1.0, "PEFT"))
    conditions = Conditions.present(("torch", "transformers", "peft", "bitsandbytes"))
    return Result(row.name, row.shape, contenders, goals, conditions, notes)


def main(
    tiny: Annotated[bool, typer.Option("--tiny", help="With sizes that take little time, and show nothing.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write what was found here.")] = None,
) -> None:
    """Measure a training step on a base in 4 bits."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    row = ROW.tiny() if tiny else ROW
    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        directories = [quantised(each.model, Path(place) / name) for name, each in (("base", row), ("one", ROW.tiny()))]
        report([measured(row, *directories)], json)


EXAMPLES = "Example:  python tools/bench/quantised.py --json found.json"

if __name__ == "__main__":
    run_script(main, epilog=EXAMPLES)
