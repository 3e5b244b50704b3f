"""Check every architecture of the mapping against PEFT and print what was found as the table of tests/README.md.

Example:  python tools/check_architectures.py --write
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Annotated, Any

import guides
import peft
import torch
import transformers
import typer
from rich.progress import track

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import architectures  # noqa: E402
from conftest import set_factors  # noqa: E402
from graph_diff import first_difference  # noqa: E402

import lora_fx  # noqa: E402
from lora_fx.cli.printing import run_script  # noqa: E402

HEADER = (
    "| model | targets | sites | logits against PEFT | gradients | training | fold | graph |",
    "|---|---|---:|---|---|---|---|---|",
)


def check(name: str) -> str:
    """Run the checks of one architecture and return its row."""
    architecture = architectures.ARCHITECTURES[name]
    graph_module = architectures.branched(name, dropout=0.3)
    config = peft.LoraConfig(
        r=6,
        lora_alpha=9,
        lora_dropout=0.3,
        target_modules=list(architecture.target_modules),
        fan_in_fan_out=architecture.fan_in_fan_out,
    )
    wrapped: Any = peft.get_peft_model(copy.deepcopy(architectures.model(name)), config)
    set_factors(graph_module, scale=0.05)
    set_factors(wrapped.base_model.model, scale=0.05)
    folded = lora_fx.fold(graph_module)
    logits, fold = [], []
    with torch.no_grad():
        for size in architectures.SIZES:
            mine, theirs, merged = (
                architectures.run(name, module.eval(), *size)[0] for module in (graph_module, wrapped, folded)
            )
            logits.append((mine - theirs).abs().max().item())
            fold.append((mine - merged).abs().max().item())
    summary = lora_fx.parameter_summary(graph_module)
    assert (summary.trainable, summary.total) == wrapped.get_nb_trainable_parameters()
    branches = sum(".lora_A." in key for key, _ in graph_module.named_parameters())
    unlike = first_difference(architectures.traced(name), folded)
    cells = (
        name,
        ", ".join(f"`{target}`" for target in architecture.target_modules),
        str(branches),
        _difference(max(logits)),
        _difference(_gradients(name, graph_module.eval(), wrapped.eval())),
        _difference(_training(name, graph_module.train(), wrapped.train())),
        f"{max(fold):.0e}",
        "the trace" if unlike is None else unlike,
    )
    return f"| {' | '.join(cells)} |"


def _difference(value: float) -> str:
    return "bit-equal" if value == 0 else f"{value:.0e}"


def _gradients(name: str, mine: Any, theirs: Any) -> float:
    for module in (mine, theirs):
        module.zero_grad()
        architectures.run(name, module, 3, 11, 5)[0].square().sum().backward()
    expected = {
        key.removeprefix("base_model.model."): p.grad for key, p in theirs.named_parameters() if p.requires_grad
    }
    found = {key: p.grad for key, p in mine.named_parameters() if p.requires_grad}
    assert set(found) == set(expected)
    return max(((found[key] - expected[key]).norm() / expected[key].norm()).item() for key in expected)


def _training(name: str, mine: Any, theirs: Any) -> float:
    outputs = []
    for module in (mine, theirs):
        torch.manual_seed(3)
        outputs.append(architectures.run(name, module, 3, 11, 5)[0])
    return (outputs[0] - outputs[1]).abs().max().item()


def main(
    write: Annotated[bool, typer.Option(help="Put the table into tests/README.md instead of printing it.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Check these architectures alone.")] = None,
) -> None:
    """Check every architecture of the mapping against PEFT and make the table of tests/README.md."""
    transformers.logging.set_verbosity_error()
    names = only or list(architectures.ARCHITECTURES)
    rows = [check(name) for name in track(names, "checking", disable=not sys.stderr.isatty())]
    table = "\n".join([*HEADER, *rows])
    if write:
        guides.write("tools/check_architectures.py", table)
    else:
        print(table)


if __name__ == "__main__":
    run_script(main)
