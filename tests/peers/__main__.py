"""Models of other libraries, taken the whole way: traced, rewritten, trained beside PEFT, folded, saved, exported.

    make test-peers                                           # all rows, in an environment of their own; writes tests/peers.md
    .venv-peers/bin/python tests/peers timm/resnet10t         # these rows, printed
    .venv-peers/bin/python tests/peers diffusers              # all of a library
    .venv-peers/bin/python tests/peers diffusers --write      # these rows anew, in tests/peers.md

Each library has a process of its own. What fails is a row that says so; a process that ends is a failed row, and the next one goes on.
The environment is that of the extra ``peers``: these libraries are large, and no part of `make test`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).parent
sys.path.append(str(HERE))

import models  # noqa: E402

from lora_fx.cli.printing import run_script  # noqa: E402

TABLE = HERE.parent / "peers.md"
COLUMNS = ("sites", "trace", "PEFT", "training", "fold", "graph", "adapter", "TorchScript", "ONNX")
PACKAGES = {"open_clip": "open_clip_torch"}
"""Libraries that the package index has under another name."""

Row = Mapping[str, Any]
"""What came of a model: ``cells`` and ``notes`` by column, an ``error``, or its ``line`` of the table; ``seconds`` of computing."""


def rows_of(library: str, names: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """Yield what comes of each of these models, in a process, or in several if one ends."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    missing = list(names)
    while missing:
        command = [sys.executable, str(HERE / "check.py"), library, *missing]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        ) as run:
            for line in run.stdout or ():
                if line.startswith('{"row"'):
                    found = json.loads(line)
                    missing.remove(found["row"])
                    yield found["row"], found
        if missing and run.returncode:
            yield missing.pop(0), {"error": f"the process ended with {run.returncode}", "seconds": 0}


def table(found: Iterable[tuple[str, str, Row]]) -> str:
    """Return the table, a row for each model of a library, and what is said at length below it."""
    notes: list[str] = []
    lines = [f"| library | model | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for library, name, row in found:
        if "line" in row:
            lines.append(row["line"])
            continue
        if "error" in row:
            cells = [f"**failed** ({_noted(row['error'], notes)})", *[""] * (len(COLUMNS) - 1)]
        else:
            cells = [_cell(column, row, notes) for column in COLUMNS]
        lines.append(f"| {library} | {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]).rstrip()


def settled_lines() -> dict[str, str]:
    """Return the lines of the table as it is, by library and model, but for those that refer to a note below it."""
    cells = {
        line: line.split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    }
    return {f"{first[2:]}/{name}": line for line, (first, name, *_) in cells.items() if "(" not in line}


def _cell(column: str, row: Row, notes: list[str]) -> str:
    text = row["cells"].get(column, "")
    said = row["notes"].get(column)
    shown = f"**{text}**" if text == "failed" else text
    return shown if said is None else f"{shown} ({_noted(said, notes)})"


def _noted(text: str, notes: list[str]) -> str:
    line = " ".join(text.split())[:400].replace("|", "\\|")
    if line not in notes:
        notes.append(line)
    return str(notes.index(line) + 1)


HEAD = """# Models of other libraries

[lora_fx](../README.md) › [tests](README.md) › peers.md

Made by `make test-peers`. Small or shortened models, without weights of theirs but for MiniLM, with biases, norms and running statistics
that are not those they start with, taken the whole way. Numbers are largest differences of outputs, as a part of the largest value:

- *sites* that the rules choose, with as many parameters as PEFT's;
- *trace*, the graph to the model, at two sizes of batch; *PEFT*, the branched graph to the model that PEFT wrapped, with the same factors;
- *training*, three steps of both in train mode (dropout, stochastic depth and running statistics among it), and the outputs after them;
- *fold*, the folded graph to the branched one, and whether its *graph* is node by node that of the trace;
- *adapter*, saved and loaded back; of diffusers' models also what its own loaders and writers make of it;
- *TorchScript* and *ONNX*, the written file to the folded graph, at several sizes.

Where a trace is not bit-equal, eager uses kernels of its own: `nn.MultiheadAttention`'s fast path, or attention without gradients. diffusers
multiplies kohya's alpha into A for FLUX, a rounding apart; it ignores alphas that differ from module to module for a U-Net, and
has no reader of these keys for Stable Diffusion 3. `SwinTransformer` of torchvision is traced with `dynamic={"x": (0,)}`, for images of one
size: the windows of others follow conditions that torch.export cannot keep apart. Its rules name the MLPs, as those of `VisionTransformer`
do: torchvision multiplies with the weights of `qkv` and `out_proj` outside of their modules, where PEFT's layers never act.
"""


def _parts(name: str) -> tuple[str, str]:
    library, _, model = name.partition("/")
    return library, model


def main(
    rows: Annotated[list[str] | None, typer.Argument(help="LIBRARY or LIBRARY/MODEL; all by default.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write tests/peers.md, where other rows stay.")] = False,
) -> None:
    """Take models of other libraries the whole way, and print the table."""
    known = [f"{library}/{name}" for library, peers in models.PEERS.items() for name in peers]
    chosen = [each for each in known if not rows or {each, each.partition("/")[0]} & set(rows)]
    unknown = {*(rows or ())} - {*known, *models.PEERS}
    if unknown:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: expected one of {', '.join((*models.PEERS, *known))}")
    kept = {name: line for name, line in settled_lines().items() if name not in chosen} if rows and write else {}
    chosen = [name for name in known if name not in kept] if rows and write else chosen
    made: dict[str, Row] = {name: {"line": line} for name, line in kept.items()}
    for library in models.PEERS:
        names = [each.partition("/")[2] for each in chosen if each.startswith(f"{library}/")]
        for name, row in rows_of(library, names):
            print(f"{library}/{name}: {row['seconds']} s", file=sys.stderr, flush=True)
            made[f"{library}/{name}"] = row
    text = table((*_parts(name), made[name]) for name in known if name in made)
    print(text)
    if write:
        packages = ("torch", *(PACKAGES.get(library, library) for library in models.PEERS), "transformers", "peft")
        versions = ", ".join(f"{package} {version(package)}" for package in packages)
        TABLE.write_text(f"{HEAD}\n{text}\n\nWith {versions}.\n", encoding="utf-8")


EXAMPLES = "Examples:  python tests/peers --write   ·   python tests/peers diffusers timm/resnet10t"

if __name__ == "__main__":
    run_script(main, epilog=EXAMPLES)
