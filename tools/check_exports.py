"""Export every small model of the tests to every format, and print what came of it as the tables of tests/README.md.

Each export is compared with its graph by the exporter itself, at the sizes of the trace, at others, and with each axis at 1.

Example:  python tools/check_exports.py --write
          python tools/check_exports.py --again llama4 --again gemma3 --write      # these rows anew, the others as they are
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import guides
import typer
from rich.progress import track

from lora_fx.cli.printing import run_script

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

FORMATS = {"TorchScript": "torchscript", "ONNX": "onnx", "pt2": "pt2"}
STATES = ("branched", "folded")
HEADER = (
    "| model | " + " | ".join(f"{name}, {state}" for name in FORMATS for state in STATES) + " |",
    "|---" * 7 + "|",
)
REFUSED = ("| model | format | reason |", "|---|---|---|")

Row = tuple[str, list[str], list[str]]
"""A model, a cell for each format and state, and what the formats did not take."""


def check(name: str) -> Row:
    """Export one model in every format and state."""
    import architectures
    import families
    import torch
    from conftest import set_factors

    import lora_fx

    torch.set_num_threads(1)
    module = architectures if name in architectures.ARCHITECTURES else families
    rules = (module.ARCHITECTURES if module is architectures else module.FAMILIES)[name].rules or "auto"
    traced = lora_fx.trace(module.model(name), inference=True) if module is architectures else module.traced(name)
    branched = lora_fx.rewrite(traced, rules=rules, rank=8, alpha=9)  # a rank that groups divide
    set_factors(branched, scale=0.1)
    graphs = {"branched": branched, "folded": lora_fx.fold(branched)}
    cells, refused = [], []
    with tempfile.TemporaryDirectory() as directory:
        for shown, function in FORMATS.items():
            for state in STATES if name in names()[0] else STATES[1:]:
                try:
                    exported = getattr(lora_fx.export, function)(
                        graphs[state], Path(directory) / "model.pt2", overwrite=True
                    )
                    cells.append("bit-equal" if exported.largest == 0 else f"{exported.largest:.0e}")
                except lora_fx.LoraFxError as error:
                    cells.append("refused")
                    reason = re.sub(r"at \S*/site-packages/", "at ", str(error)).replace("|", "\\|").replace("\n", " ")
                    if state == STATES[1]:
                        refused.append(f"| {name} | {shown} | {reason} |")
    return name, cells, refused


def names() -> tuple[list[str], list[str]]:
    """Return the models of the mapping, with those that tests/README.md promises beside them, and all others."""
    import architectures
    import families

    promised = [*architectures.ARCHITECTURES, "qwen3", "gemma3_text", "mixtral", "phi3", "whisper", "vit"]
    return promised, [name for name in families.FAMILIES if name not in promised]


def tables(rows: Iterable[Row], promised: Iterable[str]) -> str:
    """Return the two tables: what was compared, and what a format does not take."""
    promised = set(promised)
    made = list(rows)
    shown = [f"| {name} | {' | '.join(cells)} |" for name, cells, _ in made if name in promised]
    refused = [line for _, _, lines in made for line in lines]
    others = sum(name not in promised for name, _, _ in made)
    between = (
        f"\nOf {others} more models of the tests, folded, these are the refusals; all else was written and compared:\n"
    )
    return "\n".join([*HEADER, *shown, between if others else "", *([*REFUSED, *refused] if refused or others else [])])


def present() -> list[Row]:
    """Return the rows of the tables that tests/README.md has; of a model of the second table, without its cells."""
    lines = guides.made("tools/check_exports.py").splitlines()
    between = lines.index(REFUSED[0]) if REFUSED[0] in lines else len(lines)
    refused: dict[str, list[str]] = {}
    for line in lines[between + len(REFUSED) :]:
        refused.setdefault(line.split(" | ")[0].removeprefix("| "), []).append(line)
    promised, others = names()
    cells = {
        name: rest
        for name, *rest in (line.strip("| ").split(" | ") for line in lines[:between] if line.startswith("| "))
    }
    counted = re.search(r"^Of (\d+) more models", "\n".join(lines), flags=re.MULTILINE)
    missing = [name for name in promised if name not in cells]
    if missing or counted is None or int(counted[1]) != len(others):
        raise SystemExit(
            "the models of the tests are not those that the tables were made of: make them without --again."
        )
    return [(name, cells.get(name, []), refused.get(name, [])) for name in (*promised, *others)]


def main(
    only: Annotated[list[str] | None, typer.Option(help="Just these models. May be repeated.")] = None,
    again: Annotated[
        list[str] | None, typer.Option(help="These models anew, in the tables that there are. May be repeated.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Put the tables into tests/README.md; else print them.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Number of processes.")] = os.cpu_count() or 1,
) -> None:
    """Export every small model of the tests to every format, and print what came of it."""
    promised, others = names()
    chosen = again or only or [*promised, *others]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        rows = list(track(pool.map(check, chosen), total=len(chosen), description="exporting"))
    taken = {row[0]: row for row in rows}
    made = tables([taken.get(row[0], row) for row in present()] if again else rows, promised)
    if write:
        guides.write("tools/check_exports.py", made)
    else:
        print(made)


if __name__ == "__main__":
    run_script(main)
