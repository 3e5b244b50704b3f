"""Rows H1 to H3, on a GPU: a training step of a Llama of the widths of 8B, one branch, and a fold in device memory.

    python tools/bench/gpu.py H1 H2 H3                 # some minutes
    python tools/bench/gpu.py H1 --compile             # with torch.compile of PEFT and of the fused graph: minutes more
    python tools/bench/gpu.py H1-long --layers 12      # 8192 tokens
    python tools/bench/gpu.py H1 H2 H3 --device cpu --tiny    # do they run at all?

Base weights are random and bfloat16, factors float32 of rank 16 beside all linears. H1 has as many of the 32 layers as the
memory at hand should hold for PEFT's step, without recomputation. H2 is one projection of 4096 × 4096 with its branch, forward and
backward, over 8192 tokens. H3 folds the model of H1 into new weights; *copy* clones the weights that it changes.

The batch of H1 has a token of padding. Without any, transformers' eager attention leaves the mask out, as it may look at values, and
takes kernels that a graph, which always has the mask, does not get: *PEFT, no padding* shows what that is worth.

Graphs are traced on the meta device, and given the weights of the model that PEFT wraps. Gradients are compared before anything
is timed; kernels of a GPU may add in any order, so the plain graph's bits are not asked for. Memory is what torch's allocator counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import transformers
import typer
from contenders import PREFIX, Adapter, Contender, compared, contenders, set_factors
from measuring import alternating, peak_bytes, shown
from results import Conditions, Goal, Measured, Result, report
from shapes import Llama, batch_of, built
from torch import nn
from tracing import LLAMA_8B

import lora_fx
from lora_fx.cli.printing import run_script

ADAPTER = Adapter("all-linear", "all-linear", rank=16, alpha=32)
NAMES = ("PEFT", "plain", "fused", "frozen")
TOLERANCE = 0.2
"""How far gradients in bfloat16 through that many layers may be apart by rounding; wrong ones are apart by about one."""

BYTES_PER_TOKEN = 400e3
"""That PEFT keeps in a layer for the backward pass: about a hundred vectors of its width."""

BYTES_PER_LOGIT = 12
"""Logits, their copy in float32, and the gradients of both."""


def layers_that_fit(memory: int, tokens: int, shape: Llama = LLAMA_8B) -> int:
    """Return how many layers memory should hold with PEFT's step, at least one and at most all."""
    attention = 2 * shape.width**2 * (1 + (shape.groups or shape.heads) / shape.heads)
    layer = 2 * (attention + 3 * shape.width * shape.inner) + BYTES_PER_TOKEN * tokens
    rest = 4 * shape.vocabulary * shape.width + BYTES_PER_LOGIT * tokens * shape.vocabulary
    return max(1, min(shape.layers, int((0.85 * memory - rest) / layer)))


def training(row: str, shape: Llama, tokens: int, repetitions: int, device: str, *, compiled: bool) -> Result:
    """Measure a step on one sequence."""
    torch.manual_seed(0)
    model, empty = (built(shape, torch.bfloat16, where) for where in (device, "meta"))
    found = contenders(model, ADAPTER, batch_of(model, 1, tokens, device, padding=1), NAMES, empty)
    if compiled:
        found += [each.compiled() for each in found if each.name in ("PEFT", "fused")]
    found.append(replace(found[0], name="PEFT, no padding", inputs=batch_of(model, 1, tokens, device)))
    goals = [
        Goal("fused", "speed", 1.0, "PEFT"),
        Goal("fused", "peak", 1.0, "PEFT"),
        Goal("fused, compiled", "speed", 1.0, "PEFT, compiled"),
    ]
    says = f"Llama of the widths of 8B with {shape.layers} of 32 layers, 1 × {tokens}, bfloat16, all-linear, r=16, dropout 0"
    result = steps_of(row, says, found, goals, repetitions, device)
    rates = ", ".join(f"{each.name} {tokens / each.median:,.0f}" for each in result.contenders)
    return replace(result, notes=(*result.notes, f"Tokens a second: {rates}"))


class Projection(nn.Module):
    """One linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the projection."""
        projected: torch.Tensor = self.proj(x)
        return projected


def branch(tokens: int, width: int, repetitions: int, device: str) -> Result:
    """Measure one projection with its branch, forward and backward."""
    torch.manual_seed(0)
    model = Projection(width).to(device, torch.bfloat16).requires_grad_(False).train()
    x = torch.randn(tokens, width).to(device, torch.bfloat16).requires_grad_()
    gradient = torch.randn(tokens, width).to(device, torch.bfloat16)
    base = lora_fx.trace(model, {"x": x[:16].detach().contiguous()})
    plain = lora_fx.rewrite(base, {"select": [{"target": ["proj"]}]}, rank=16, alpha=32, seed=0)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["proj"])
    modules = {"plain": plain, "fused": lora_fx.fuse(plain), "PEFT": peft.get_peft_model(model, config)}
    set_factors(*modules.values())
    inputs = {"x": x}
    found = [Contender(name, module.train(), inputs, module, gradient) for name, module in modules.items()]
    found.append(Contender("frozen", base, dict(inputs), base, gradient))
    goals = [Goal("fused", "speed", 1.0, name) for name in ("plain", "PEFT")]
    says = f"One projection of {width} × {width} with a branch, r=16, forward and backward, {tokens} tokens, bfloat16"
    return steps_of("H2", says, found, goals, repetitions, device)


def steps_of(
    row: str, says: str, found: Collection[Contender], goals: Collection[Goal], repetitions: int, device: str
) -> Result:
    """Compare and measure those who take the same step."""
    found = list(found)
    apart = compared(found, TOLERANCE, exact=False)
    saved = {each.name: each.saved() for each in found}
    peaks = {each.name: peak_bytes(each.step, device) for each in found}
    for each in found:
        each.clear()
    times = alternating({each.name: each.step for each in found}, repetitions, device=device, says=row)
    first = found[0].name
    every = [
        Measured(
            name, times[name], saved[name], peaks[name], None, apart.get(name), against="" if name == first else first
        )
        for name in times
    ]
    unlike = ", ".join(f"{name} {shown(apart[name])}" for name in apart if name != first)
    notes = (f"Gradients against those of {first}: {unlike}", f"{repetitions} repetitions")
    return Result(row, says, tuple(every), tuple(goals), _conditions(device), notes)


def fold(shape: Llama, repetitions: int, device: str) -> Result:
    """Measure a fold in device memory."""
    torch.manual_seed(0)
    model, empty = (built(shape, torch.bfloat16, where) for where in (device, "meta"))
    graph = lora_fx.rewrite(empty.eval(), ADAPTER.rules, **ADAPTER.options())
    branched = lora_fx.materialize(graph, model.state_dict(), like=model)
    wrapped: Any = peft.get_peft_model(model, ADAPTER.peft_config())
    set_factors(branched, wrapped)
    weights = {merge.weight: branched.get_parameter(merge.weight).detach() for merge in lora_fx.recipe(branched)}
    name = next(iter(weights))
    layer = wrapped.get_submodule(PREFIX + name.removesuffix(".weight"))
    _check_fold(lora_fx.fold(branched).get_parameter(name), layer)
    held: list[object] = []  # the last result: to release it is not timed
    steps: Mapping[str, Callable[[], object]] = {
        "copy": lambda: held.append([weight.clone() for weight in weights.values()]),
        "fold": lambda: held.append(lora_fx.fold(branched)),
        "PEFT, merge_adapter": wrapped.merge_adapter,
    }

    def restored() -> None:
        held.clear()
        if layer.merged:
            wrapped.unmerge_adapter()

    times = alternating(steps, repetitions, before=dict.fromkeys(steps, restored), device=device, says="H3")
    size = sum(weight.nbytes for weight in weights.values())
    every = [Measured(name, times[name], against="" if name == "copy" else "copy") for name in times]
    rates = ", ".join(f"{each.name} {size / each.median / 1e9:.1f}" for each in every)
    goals = (Goal("fold", "speed", 0.8, "copy"), Goal("fold", "speed", 1.0, "PEFT, merge_adapter"))
    says = f"Fold of {size / 1e9:.2f} GB of bfloat16 weights, r=16, in the memory of the device"
    return Result("H3", says, tuple(every), goals, _conditions(device), (f"GB a second: {rates}",))


def _check_fold(weight: torch.Tensor, layer: Any) -> None:
    """Fail unless a weight is what PEFT would merge, but for a rounding."""
    expected = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    if not torch.allclose(weight.float(), expected, rtol=2**-7, atol=1e-4):
        raise SystemExit("a folded weight is not what PEFT merges: there is nothing to time.")


def _conditions(device: str) -> Conditions:
    return Conditions.present(device=torch.cuda.get_device_name() if device == "cuda" else "")


def measured(row: str, device: str, layers: int | None, repetitions: int, *, compiled: bool, tiny: bool) -> Result:
    """Measure the row of this name."""
    tokens, width = {"H1": 512, "H1-long": 8192, "H2": 8192, "H3": 512}[row], LLAMA_8B.width
    if tiny:
        tokens, width = 8, 32
    if row == "H2":
        return branch(tokens, width, repetitions, device)
    memory = torch.cuda.mem_get_info()[0] if device == "cuda" else 0
    shape = LLAMA_8B.tiny() if tiny else replace(LLAMA_8B, layers=layers or layers_that_fit(memory, tokens))
    if row == "H3":
        return fold(shape, repetitions, device)
    return training(row, shape, tokens, repetitions, device, compiled=compiled)


def main(
    rows: Annotated[list[str], typer.Argument(help="Which rows: H1, H1-long, H2, H3.")],
    device: Annotated[str, typer.Option(help="cuda, or with --tiny cpu.")] = "cuda",
    layers: Annotated[int | None, typer.Option(min=1, help="Of H1 and H3; by default as many as fit.")] = None,
    repetitions: Annotated[int, typer.Option(min=2, help="Of each, in alternation.")] = 20,
    compiled: Annotated[
        bool, typer.Option("--compile", help="H1 with torch.compile too, which takes minutes.")
    ] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="With sizes that take no time, and show nothing.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write what was found here.")] = None,
) -> None:
    """Measure on a GPU."""
    unknown = [row for row in rows if row not in ("H1", "H1-long", "H2", "H3")]
    if unknown or device not in ("cuda", "cpu"):
        raise typer.BadParameter(
            f"{', '.join(unknown) or device}: rows are H1, H1-long, H2 and H3, devices cuda and cpu."
        )
    if device == "cuda" and not torch.cuda.is_available():
        print(
            "torch finds no GPU here, and these rows are about one. To see that they run: --device cpu --tiny.",
            file=sys.stderr,
        )
        raise typer.Exit(1)
    if device == "cpu" and not tiny:
        print(
            "On a CPU these sizes would take hours: add --tiny, or see training.py for rows C1 to C5.", file=sys.stderr
        )
        raise typer.Exit(1)
    transformers.logging.set_verbosity_error()
    found = []
    for row in rows:
        try:
            found.append(measured(row, device, layers, repetitions, compiled=compiled, tiny=tiny))
        except torch.OutOfMemoryError as error:
            raise SystemExit(
                f"{row} does not fit into the memory of the GPU; take fewer layers by --layers. {error}"
            ) from error
        if device == "cuda":
            torch.cuda.empty_cache()
    report(found, json)


EXAMPLES = (
    "Examples:  python tools/bench/gpu.py H1 H1-long H2 H3 --json found.json   ·   python tools/bench/gpu.py H1 --compile   ·   "
    "python tools/bench/gpu.py H1 H2 H3 --device cpu --tiny"
)

if __name__ == "__main__":
    run_script(main, epilog=EXAMPLES)
