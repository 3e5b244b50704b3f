"""Export every small model of the tests to every format, and print what came of it as the tables of tests/README.md.

Each export is compared with its graph by the exporter itself, at the sizes of the trace, at others, and with each axis at 1. Products in
int8 are counted in what onnxruntime's quantize_dynamic makes of the folded ONNX file.

Example:  python tools/check_exports.py --write
          python tools/check_exports.py --kept rows.jsonl --write                  # a run that is interrupted goes on where it was
          python tools/check_exports.py --again llama4 --again gemma3 --write      # these rows anew, the others as they are
          python tools/check_exports.py --again t5 --format ONNX --write           # and of these rows the columns of ONNX alone
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import guides
import typer
from rich.progress import track

from lora_fx.cli.printing import run_script

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

FORMATS = {"TorchScript": "torchscript", "ONNX": "onnx", "pt2": "pt2"}
STATES = ("branched", "folded")
HALF, INT8 = "ONNX, float16, folded", "ONNX, products in int8"
COLUMNS = (*(f"{name}, {state}" for name in FORMATS for state in STATES), HALF, INT8)
HEADER = (f"| model | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|")
REFUSED = ("| model | format | reason |", "|---|---|---|")

Row = tuple[str, dict[str, str], list[str]]
"""A model, its cells by column, and what the formats did not take."""


def check(name: str, formats: Collection[str]) -> Row:
    """Export one model in these formats and every state; a model of the second table folded, and in the dtype of its graph."""
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
    promised = name in names()[0]
    states = STATES if promised else STATES[1:]
    cells: dict[str, str] = {}
    refused: list[str] = []
    with tempfile.TemporaryDirectory() as directory:

        def export(column: str, shown: str, state: str, file: str, **options: Any) -> None:
            try:
                exported = getattr(lora_fx.export, FORMATS[shown])(graphs[state], Path(directory) / file, **options)
            except lora_fx.LoraFxError as error:
                reason = re.sub(r"at \S*/site-packages/", "at ", str(error)).replace("|", "\\|").replace("\n", " ")
                if state == STATES[1]:
                    refused.append(f"| {name} | {column.removesuffix(', folded')} | {reason} |")
                cells[column] = "refused"
            else:
                cells[column] = "bit-equal" if exported.largest == 0 else f"{exported.largest:.0e}"

        for shown in FORMATS:
            for state in states if shown in formats else ():
                export(f"{shown}, {state}", shown, state, f"{shown}-{state}.pt2")
        if promised and "ONNX" in formats:
            export(HALF, "ONNX", "folded", "half.onnx", dtype=torch.float16)
            written = Path(directory) / "ONNX-folded.pt2"
            cells[INT8] = quantised(written) if written.exists() else "refused"
    return name, cells, refused


def quantised(path: Path) -> str:
    """Return how many products with weights onnxruntime's ``quantize_dynamic`` computes in int8, of how many."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(path).graph
    of_weights = {tensor.name for tensor in graph.initializer}
    products = 0
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
            products += not of_weights.isdisjoint(node.input[:2])
        elif node.op_type in ("Transpose", "Split", "Squeeze", "Reshape", "Cast") and node.input[0] in of_weights:
            of_weights.update(node.output)
    written = path.with_name("quantised.onnx")
    quantize_dynamic(path, written, weight_type=QuantType.QUInt8)  # onnxruntime's convolutions take no other
    onnxruntime.InferenceSession(str(written), providers=["CPUExecutionProvider"])
    found = [node.op_type for node in onnx.load(written).graph.node]
    return f"{found.count('MatMulInteger') + found.count('ConvInteger')} of {products}"


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
    shown = [
        f"| {name} | {' | '.join(cells.get(column, '') for column in COLUMNS)} |"
        for name, cells, _ in made
        if name in promised
    ]
    refused = [line for _, _, lines in made for line in lines]
    others = [lines for name, _, lines in made if name not in promised]
    said = "all but those below were" if any(others) else "all were"
    between = f"\nOf {len(others)} more models of the tests, folded, {said} written and compared." if others else ""
    return "\n".join([*HEADER, *shown, between, *(["\nRefused:\n", *REFUSED, *refused] if refused else [])])


def present() -> list[Row]:
    """Return the rows of the tables that tests/README.md has; of a model of the second table, without its cells."""
    lines = guides.made("tools/check_exports.py").splitlines()
    between = lines.index(REFUSED[0]) if REFUSED[0] in lines else len(lines)
    refused: dict[str, list[str]] = {}
    for line in lines[between + len(REFUSED) :]:
        refused.setdefault(line.split(" | ")[0].removeprefix("| "), []).append(line)
    promised, others = names()
    head, _, *shown = (
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[:between] if line.startswith("|")
    )
    cells = {name: dict(zip(head[1:], rest, strict=False)) for name, *rest in shown}
    counted = re.search(r"^Of (\d+) more models", "\n".join(lines), flags=re.MULTILINE)
    missing = [name for name in promised if name not in cells]
    if missing or counted is None or int(counted[1]) != len(others):
        raise SystemExit(
            "the models of the tests are not those that the tables were made of: make them without --again."
        )
    return [(name, cells.get(name, {}), refused.get(name, [])) for name in (*promised, *others)]


def renewed(row: Row, anew: Row, formats: Collection[str]) -> Row:
    """Return a row with the cells and refusals of some formats made anew."""
    others = [line for line in row[2] if line.split(" | ")[1].split(",")[0] not in formats]
    return row[0], {**row[1], **anew[1]}, [*others, *anew[2]]


def rows_of(chosen: Iterable[str], formats: Collection[str], kept: Path | None, jobs: int) -> dict[str, Row]:
    """Return the rows of models by name, with those that a file keeps; new ones are added to it."""
    lines = kept.read_text(encoding="utf-8").splitlines() if kept is not None and kept.exists() else []
    rows: dict[str, Row] = {row[0]: tuple(row) for row in map(json.loads, lines)}
    missing = [name for name in chosen if name not in rows]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for row in track(pool.map(check, missing, repeat(formats)), total=len(missing), description="exporting"):
            rows[row[0]] = row
            if kept is not None:
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    return rows


def main(
    only: Annotated[list[str] | None, typer.Option(help="Just these models. May be repeated.")] = None,
    again: Annotated[
        list[str] | None, typer.Option(help="These models anew, in the tables that there are. May be repeated.")
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(help=f"With --again, just the columns of these: {', '.join(FORMATS)}. May be repeated."),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Put the tables into tests/README.md; else print them.")
    ] = False,
    kept: Annotated[
        Path | None,
        typer.Option(help="Keep each row in this file (JSON lines) once it is made; those in it are not made again."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Number of processes.")] = os.cpu_count() or 1,
) -> None:
    """Export every small model of the tests to every format, and print what came of it."""
    promised, others = names()
    chosen = again or only or [*promised, *others]
    formats = tuple(format or FORMATS) if again else tuple(FORMATS)
    taken = rows_of(chosen, formats, kept, jobs)
    rows = [taken[name] for name in chosen]
    if again:
        rows = [renewed(row, taken[row[0]], formats) if row[0] in taken else row for row in present()]
    made = tables(rows, promised)
    if write:
        guides.write("tools/check_exports.py", made)
    else:
        print(made)


if __name__ == "__main__":
    run_script(main)
