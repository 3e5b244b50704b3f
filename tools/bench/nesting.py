"""Time of a training step of nested graphs beside flat ones, and with activation checkpointing beside PEFT's, for each architecture.

    python tools/bench/nesting.py --write              # all of the tests' small models; some minutes, most of them traces
    python tools/bench/nesting.py llama vit            # these

The models are those of the tests, of two layers or three and widths below 100, in which a step is calls more than arithmetic: what calls of
layers cost shows there as nowhere else. Each pair takes its steps in turns, and the number of a pair is the median of the ratios of its
turns, in time of the processor. Before that loss and gradients of both are compared, with dropout, under one random state: a nested graph
has the bits of the flat one.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import transformers
import typer
from contenders import trained
from measuring import alternating, difference, shown
from results import Conditions
from torch import nn
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx.cli.printing import run_script

sys.path += [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent / "tests")]

import architectures
import families
import guides
from conftest import set_factors

NAMES = (*architectures.ARCHITECTURES, "qwen3_moe", "phi3", "whisper", "vit")
BATCH, SEQUENCE, TARGET, DROPOUT = 16, 48, 24, 0.1
NESTED, AGAIN = 1.02, 1.05
"""At most so many times the time of the flat graph, and of PEFT's model that computes its layers again as well."""

HEADER = (
    "| model | flat | nested | ≤ 1.02× flat | PEFT, again | nested, again | ≤ 1.05× PEFT, again | gradients against PEFT's |",
    "|---|---:|---:|---|---:|---:|---|---|",
)


@dataclass(frozen=True)
class Pair:
    """Two that took turns.

    Attributes:
        seconds: the median time of each.
        ratio: the median of the second's time in parts of the first's, turn by turn.
    """

    seconds: tuple[float, float]
    ratio: float


@dataclass(frozen=True)
class Found:
    """What was measured of one model.

    Attributes:
        nested: the flat graph, and the nested one.
        again: PEFT's model and the nested graph, which compute their layers again; or why PEFT's does not.
        apart: largest relative difference of loss and gradients between these.
    """

    nested: Pair
    again: Pair | str
    apart: float = 0.0

    def line(self, name: str) -> str:
        """Return the line of the table."""
        cells = [name, *_cells(self.nested, NESTED)]
        cells += (
            [self.again, "", "", ""] if isinstance(self.again, str) else [*_cells(self.again, AGAIN), shown(self.apart)]
        )
        return f"| {' | '.join(cells)} |"


def measured(name: str, repetitions: int) -> Found:
    """Measure a step of one model."""
    tests, known = _known(name)
    model = tests.build(name).requires_grad_(False)
    model.config.use_cache = False
    flat = lora_fx.rewrite(model, known.rules, rank=6, alpha=9, dropout=DROPOUT).train()
    nested, again = lora_fx.nest(flat), lora_fx.nest(flat)
    again.activation_checkpointing_enable()
    theirs: Any = peft.get_peft_model(copy.deepcopy(model), _peft_config(known)).train()
    set_factors(flat, scale=0.05)
    set_factors(theirs.base_model.model, scale=0.05)
    inputs = tests.inputs(name, BATCH, SEQUENCE, TARGET)
    expected = _answers(flat, inputs)
    for each in (nested, again):
        if difference(_answers(each, inputs), expected):
            raise SystemExit(f"{name}: the nested graph has other bits than the flat one: there is nothing to time.")
    first = _pair(flat, nested, inputs, repetitions)
    if not theirs.base_model.model.supports_gradient_checkpointing:
        return Found(first, "has none")
    theirs.base_model.model.activation_checkpointing_enable()
    apart = difference(expected, _answers(theirs, inputs))
    return Found(first, _pair(theirs, again, inputs, repetitions), apart)


def _known(name: str) -> tuple[Any, Any]:
    """Return the module of the tests that makes a model, and what it says of it."""
    module: Any = architectures if name in architectures.ARCHITECTURES else families
    return module, (architectures.ARCHITECTURES | families.FAMILIES)[name]


def _peft_config(known: Any) -> peft.LoraConfig:
    targets = known.target_modules
    return peft.LoraConfig(
        r=6,
        lora_alpha=9,
        lora_dropout=DROPOUT,
        target_modules=targets if isinstance(targets, str) else list(targets),
        fan_in_fan_out=known.fan_in_fan_out,
    )


def _loss(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    leaves = [each for each in pytree.tree_leaves(module(**inputs)) if isinstance(each, torch.Tensor)]
    return torch.stack([each.square().mean() for each in leaves if each.requires_grad]).sum()


def _step(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    module.zero_grad()
    loss = _loss(module, inputs)
    loss.backward()
    return loss


def _answers(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return loss and gradients under a known random state."""
    torch.manual_seed(5)
    found = {"": _step(module, inputs).detach()}
    found |= {key: each.grad for key, each in trained(module).items() if each.grad is not None}
    module.zero_grad()
    return found


def _pair(one: nn.Module, other: nn.Module, inputs: Mapping[str, torch.Tensor], repetitions: int) -> Pair:
    steps = {"one": lambda: _step(one, inputs), "other": lambda: _step(other, inputs)}
    times = alternating(steps, repetitions, warm_up=3, clock=lambda _: time.process_time())
    ratios = [theirs / mine for mine, theirs in zip(times["one"], times["other"], strict=True)]
    return Pair((statistics.median(times["one"]), statistics.median(times["other"])), statistics.median(ratios))


def _cells(pair: Pair, bound: float) -> list[str]:
    met = "yes" if pair.ratio <= bound else "**no**"
    return [*(f"{seconds * 1e3:.1f} ms" for seconds in pair.seconds), f"{met}, {pair.ratio:.2f}"]


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Which models; all by default.")] = None,
    repetitions: Annotated[int, typer.Option(min=3, help="Turns of each pair.")] = 41,
    write: Annotated[bool, typer.Option("--write", help="Put the table into the guide.")] = False,
) -> None:
    """Print the table."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    lines = [*HEADER]
    for name in names or NAMES:
        lines.append(measured(name, repetitions).line(name))
        print(lines[-1], file=sys.stderr, flush=True)
    lines += ["", f"{Conditions.present()}; medians of {repetitions} turns."]
    text = "\n".join(lines)
    print(text)
    if write:
        guides.write("tools/bench/nesting.py", text)


if __name__ == "__main__":
    run_script(main)
