"""Clients that users have, in environments and processes of their own: do they generate what transformers generates?

    make test-clients                                   # all rows; writes tests/clients.md
    .venv/bin/python tests/clients llama gpt2           # these rows, printed
    .venv/bin/python tests/clients --client optimum t5

The models are those of test_cache.py and test_cache_encoder_decoder.py. lora_fx exports each with its adapter folded in, or with slots and
the adapter in a file beside it; a client loads the directory; its tokens are compared with those of transformers' own ``generate`` with the
folded weights. The environments are made of the package index, below .venv-clients, and kept for the next run. What cannot be
installed, loaded or run is a row that failed, with the client's own words.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.append(str(HERE.parent))

import test_cache as decoders  # noqa: E402
import test_cache_encoder_decoder as encoder_decoders  # noqa: E402

import lora_fx  # noqa: E402
from lora_fx.cli.printing import run_script  # noqa: E402

ENVIRONMENTS = ROOT / ".venv-clients"
TABLE = HERE.parent / "clients.md"
SLOTTED = ("llama", "gpt2", "gemma3_text")
"""Models that are exported with slots too."""

TRANSLATORS = tuple(name for name in encoder_decoders.NAMES if name != "whisper")
"""Encoder-decoders of text."""

NAMES = (*decoders.NAMES, *TRANSLATORS)


@dataclass(frozen=True)
class Client:
    """A client in an environment of its own.

    Attributes:
        name: in the table.
        environment: name of its directory.
        requirements: what pip installs there, group after group: torch first, whose pin names a CPU build where one is at hand.
        script: beside this file, which that environment's Python runs.
        cases: what it is asked for: names of the prompts of test_cache.py, each with a number of beams.
        slots: whether it takes adapters.
        translates: whether it is asked for encoder-decoders.
    """

    name: str
    environment: str
    requirements: tuple[tuple[str, ...], ...]
    script: str
    cases: tuple[tuple[str, int], ...]
    slots: bool = False
    translates: bool = False


UNPADDED = ("batch 3", "batch 1", "prompt of 1", "longer than the window")
CLIENTS = (
    Client(
        "onnxruntime-genai",
        "genai",
        (("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "numpy==2.4.6"),),
        "genai_client.py",
        tuple((prompt, 1) for prompt in UNPADDED),
        slots=True,
    ),
    Client(
        "optimum",
        "optimum",
        (("torch==2.13.0",), ("optimum-onnx[onnxruntime]==0.1.0", "onnxruntime==1.32.0", "numpy==2.4.6")),
        "optimum_client.py",
        tuple((prompt, beams) for beams in (1, 3) for prompt in (*UNPADDED, "left-padded")),
        translates=True,
    ),
)


def python_of(client: Client) -> Path:
    """Return the Python of a client's environment, which is made where there is none.

    Raises:
        subprocess.CalledProcessError: pip cannot install something.
    """
    place = ENVIRONMENTS / client.environment
    python, stamp = place / "bin" / "python", place / ".installed"
    wanted = json.dumps(client.requirements)
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        for group in client.requirements:
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *group], check=True, stderr=subprocess.PIPE)
        stamp.write_text(wanted)
    return python


def write_cases(client: Client, name: str, directory: Path, adapter: str | None) -> None:
    """Write what a client is asked for, and the tokens that transformers generates."""
    cases: dict[str, dict[str, Any]] = {}
    for source, chosen in ((decoders.merged(name), adapter), (decoders.model(name), None)):
        if chosen is None and adapter is None and cases:
            break  # without slots there is only the folded model
        for prompt, beams in client.cases:
            ids, mask = decoders.prompts()[prompt]
            tokens = decoders.generated(source, ids, mask, num_beams=beams).sequences
            told = f"{prompt}, {beams} beams" if beams > 1 else prompt
            cases[f"{told}, {'adapter' if chosen else 'base'}" if adapter else told] = {
                **{"ids": ids.tolist(), "mask": mask.tolist(), "tokens": tokens.tolist()},
                **{"steps": decoders.STEPS, "beams": beams, "adapter": chosen, "options": {}},
            }
    directory.mkdir()
    (directory / "cases.json").write_text(json.dumps(cases))


def write_translations(name: str, directory: Path) -> None:
    """Write what a client is asked for of an encoder-decoder, greedy and by three beams."""
    cases: dict[str, dict[str, Any]] = {}
    for beams in (1, 3):
        for prompt in ("batch 3", "padded", "one token"):
            given = encoder_decoders.inputs(name)[prompt]
            found = encoder_decoders.generated(encoder_decoders.merged(name), **given, num_beams=beams).sequences
            cases[f"{prompt}, {beams} beams" if beams > 1 else prompt] = {
                **{"ids": given["input_ids"].tolist(), "mask": given["attention_mask"].tolist()},
                **{"tokens": found.tolist(), "steps": encoder_decoders.STEPS, "beams": beams, "adapter": None},
                "options": {"eos_token_id": 2, "decoder_start_token_id": 1},
            }
    directory.mkdir()
    (directory / "cases.json").write_text(json.dumps(cases))


def write_directories(name: str, clients: Sequence[Client], place: Path) -> Iterator[tuple[Client, Path]]:
    """Export a model for clients: folded, and for those that take adapters with slots too."""
    if name in TRANSLATORS:
        for client in (each for each in clients if each.translates):
            directory = place / client.environment / name
            directory.parent.mkdir(exist_ok=True)
            write_translations(name, directory)
            lora_fx.export.generation(encoder_decoders.folded(name), place / name, verify=False)
            for path in (place / name).iterdir():
                os.link(path, directory / path.name)
            yield client, directory
        return
    kinds = (False, True) if name in SLOTTED and any(client.slots for client in clients) else (False,)
    for slots in kinds:
        exported = place / f"{name}{', slots' if slots else ''}"
        graph = decoders.branched(name) if slots else decoders.folded(name)
        lora_fx.export.generation(graph, exported, slots=slots, verify=False)
        if slots:
            lora_fx.export.onnx_adapter(graph, exported / "tuned.onnx_adapter")
        for client in clients:
            if client.slots or not slots:
                directory = place / client.environment / exported.name
                directory.parent.mkdir(exist_ok=True)
                write_cases(client, name, directory, "tuned" if slots else None)
                for path in exported.iterdir():
                    os.link(path, directory / path.name)
                yield client, directory


def answers(client: Client, directories: Sequence[Path]) -> dict[str, dict[str, str] | str]:
    """Return what a client says of each directory: the outcome of each case, or why there is none."""
    try:
        python = python_of(client)
    except subprocess.CalledProcessError as error:
        told = (error.stderr or b"").decode(errors="replace").strip() or str(error)
        return {each.name: f"not installed: {told.splitlines()[-1]}" for each in directories}
    found: dict[str, dict[str, str] | str] = {}
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    while missing := [each for each in directories if each.name not in found]:
        command = [str(python), str(HERE / client.script), *map(str, missing)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"directory"')]
        found |= {line["directory"]: line.get("found", line.get("error", "")) for line in lines}
        if len(lines) < len(missing):  # it ended at the first of those that are missing now
            last = (done.stderr.strip().splitlines() or [""])[-1]
            found[missing[len(lines)].name] = f"the process ended with {done.returncode}: {last}"
    return found


def cell(answer: dict[str, str] | str, notes: list[str]) -> str:
    """Return a cell of the table, and add what it says at length to the notes."""
    if isinstance(answer, str):
        return f"**failed** ({_note(answer, notes)})"
    wrong = {case: told for case, told in answer.items() if told != "equal"}
    equal = f"{len(answer) - len(wrong)} of {len(answer)}"
    if not wrong:
        return f"{equal} equal"
    told = "; ".join(f"{case}: {told}" for case, told in list(wrong.items())[:1])
    return f"**{equal}** ({_note(told, notes)})"


def _note(text: str, notes: list[str]) -> str:
    line = " ".join(text.split())[:400].replace("|", "\\|")
    if line not in notes:
        notes.append(line)
    return str(notes.index(line) + 1)


def table(found: dict[str, dict[str, dict[str, str] | str]]) -> str:
    """Return the table: a row for each model, a column for each client."""
    names = [name for client in CLIENTS if (name := client.name) in found]
    rows = list(dict.fromkeys(row for name in names for row in found[name]))
    notes: list[str] = []
    lines = [f"| model | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for row in rows:
        cells = [cell(found[name][row], notes) if row in found[name] else "" for name in names]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]).rstrip()


HEAD = f"""# Clients

[lora_fx](../README.md) › [tests](README.md) › clients.md

Made by `make test-clients`. The models of `test_cache.py` and `test_cache_encoder_decoder.py`, exported by
`lora_fx.export.generation`, are loaded by clients in environments of their own, which are installed from the package index, and in
processes of their own. A cell counts the cases in which a client's tokens are those of transformers' `generate` with the folded
weights, over {decoders.STEPS} steps: onnxruntime-genai greedy, unpadded, of a batch of 3, of 1, prompts of one token, and prompts longer than the
window; optimum the same and left-padded, greedy and with three beams (encoder-decoders: a batch of 3, padded, and of one token).
*slots* is one file with the base and an adapter in a file of its own, asked for with and without it.

optimum takes the number of heads of a cache from a list of model types in its own code, on which Phi-3, Mixtral and others are missing,
and the size of a head as `hidden_size / num_attention_heads` for all but a few, whatever `head_dim` says (huggingface/optimum#2379).
Where that is not so, it makes an empty cache of other sizes than the model's and fails; the models here have fewer heads of keys
than of queries, and widths that differ, so that it shows. The first failure of a cell is numbered below.
"""


def main(
    rows: Annotated[list[str] | None, typer.Argument(help="Which models; all by default.")] = None,
    client: Annotated[list[str] | None, typer.Option(help="Which clients; all by default.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write tests/clients.md.")] = False,
) -> None:
    """Ask the clients, and print the table."""
    torch.set_num_threads(1)
    clients = [each for each in CLIENTS if not client or each.environment in client]
    unknown = sorted({*(rows or ())} - {*NAMES}) + sorted({*(client or ())} - {c.environment for c in CLIENTS})
    if unknown:
        environments = ", ".join(each.environment for each in CLIENTS)
        raise typer.BadParameter(f"{', '.join(unknown)}: models are {', '.join(NAMES)}; clients {environments}")
    with tempfile.TemporaryDirectory() as place:
        made: dict[Client, list[Path]] = {each: [] for each in clients}
        for name in tqdm(rows or NAMES, desc="exporting"):
            for each, directory in write_directories(name, clients, Path(place)):
                made[each].append(directory)
        found = {each.name: answers(each, directories) for each, directories in made.items()}
    versions = "; ".join(" ".join(word for group in each.requirements for word in group) for each in clients)
    text = table(found)
    print(text)
    if write:
        TABLE.write_text(f"{HEAD}\n{text}\n\nInstalled: {versions}.\n", encoding="utf-8")


EXAMPLES = "Examples:  python tests/clients --write   ·   python tests/clients llama --client genai"

if __name__ == "__main__":
    run_script(main, epilog=EXAMPLES)
