"""Nothing that is printed may fail: for want of a character, of a reader, or of a stream."""

from __future__ import annotations

import ast
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TextIO, cast

import pytest
import torch
import transformers
from conftest import set_factors
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm
from typer.testing import CliRunner

import lora_fx
from lora_fx.cli import app, demo_command
from lora_fx.cli.printing import STAND_INS, Output, shown

pytestmark = [
    pytest.mark.xdist_group("printing"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning"),
]

ROOT = Path(__file__).parent.parent
SIZES = {
    "vocab_size": 41, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 3,
    "num_key_value_heads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base and its adapter, and with a model with slots and an adapter of that."""
    path = tmp_path_factory.mktemp("printing")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    model.save_pretrained(path / "base")
    graph = lora_fx.rewrite(model, rules="llama", rank=2, alpha=3)
    set_factors(graph)
    lora_fx.save_adapter(graph, path / "adapter")
    linear = nn.Sequential(nn.Linear(5, 3), nn.Tanh()).eval()
    small = lora_fx.rewrite(
        linear, rules={"select": [{"target": ["0"], "rank": 2}]}, example_inputs=(torch.ones(4, 5),)
    )
    lora_fx.export.onnx(small, path / "slots.onnx", slots=True, verify=False)
    lora_fx.save_adapter(small, path / "small")
    return path


MADE: dict[object, Any] = {}


@pytest.fixture(autouse=True)
def _trace_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let equal commands plan and draw once: what is printed is tested here, and where."""
    for name in (
        "lora_fx.planning.planner.plan",
        "lora_fx.drawing.draw.describe_model",
        "lora_fx.folding.checkpoint_plan.plan_checkpoint_fold",
    ):
        original = resolve_name(name)

        def make(*given: Any, original: Callable[..., Any] = original, **options: Any) -> Any:
            key = original, str(given), options.get("rank")
            if key not in MADE:
                MADE[key] = original(*given, **options)
            return MADE[key]

        monkeypatch.setattr(name, make)


@dataclass(frozen=True)
class Printed:
    """Exit code, bytes of both streams, and their text."""

    code: int
    out: bytes
    error: bytes


def run(encoding: str, *arguments: object) -> Printed:
    """Run a command whose streams are strict and in an encoding, as those of a pipe."""
    out, error = io.BytesIO(), io.BytesIO()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (io.TextIOWrapper(each, encoding, errors="strict") for each in (out, error))
    streams = sys.stdout, sys.stderr  # what holds them, holds their bytes
    try:
        app([*map(str, arguments)])
    except SystemExit as exit:
        code = exit.code
    finally:
        sys.stdout, sys.stderr = before
    for stream in streams:
        stream.flush()
    assert isinstance(code, int)
    return Printed(code, out.getvalue(), error.getvalue())


ENCODINGS = ["cp1252", "latin-1", "gbk", "ascii"]


# Characters.


def strings(path: Path, *, docstrings: bool) -> Iterator[str]:
    """Yield the texts in the code of a file; docstrings, and such texts below attributes, only if asked."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    documentation = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and (docstrings or id(node) not in documentation)
        ):
            yield node.value


def test_every_sign_that_is_printed_has_a_stand_in() -> None:
    files = [path for path in (ROOT / "lora_fx").rglob("*.py") if path.name != "printing.py"]
    told = {
        each: path.name
        for path in files
        for text in strings(path, docstrings="cli" in path.parts)
        for each in text
        if not each.isascii()
    }
    assert {"→", "×", "…", "⇄"} <= told.keys()
    assert {each: name for each, name in told.items() if each not in STAND_INS} == {}
    assert all(each.isascii() for each in STAND_INS.values())


@pytest.mark.parametrize(
    ("text", "encoding", "expected"),
    [
        ("━━ 2 × 3 → 4 · …", "utf-8", "━━ 2 × 3 → 4 · …"),
        ("━━ 2 × 3 → 4 · …", "cp1252", "-- 2 × 3 -> 4 · …"),
        ("━━ 2 × 3 → 4 · …", "latin-1", "-- 2 × 3 -> 4 · ..."),
        ("─┼│ ≥ 中é–", "ascii", r"-+| >= \u4e2d\xe9-"),
        ("─ × → 中 é", "gbk", "─ × → 中 é"),
        ("ɐ ⠋", "gbk", r"\u0250 *"),
        ("caf\udcff", "utf-8", r"caf\udcff"),  # the name of a file that is no UTF-8
        ("\U0001f600", "latin-1", r"\U0001f600"),
    ],
)
def test_what_an_encoding_lacks_is_shown_by_signs_that_it_has(text: str, encoding: str, expected: str) -> None:
    assert shown(text, encoding) == expected
    assert shown(text, encoding).encode(encoding)


# Commands.


COMMANDS: dict[str, tuple[str, ...]] = {
    "help": ("--help",),
    "help of a command": ("fold", "--help"),
    "plan": ("plan", "@base", "--rank", "2"),
    "plan as JSON": ("plan", "@base", "--rank", "2", "--json"),
    "draw": ("draw", "@base", "--rank", "2"),
    "draw to a file": ("draw", "@base", "--rank", "2", "--out", "%graph.html"),
    "dry run": ("fold", "@base", "@adapter", "%out", "--dry-run"),
    "fold": ("fold", "@base", "@adapter", "%out", "--report", "--verify"),
    "export": ("export", "@base", "%out.pt", "--adapter", "@adapter", "--format", "torchscript"),
    "export-adapter": ("export-adapter", "@small", "@slots.onnx", "%out.onnx_adapter"),
}
SAID = {
    "help": "LoRA as graph surgery",
    "help of a command": "Merge adapters into a checkpoint on disk",
    "plan": "2 of 9 sites chosen by rules 'llama', 80 parameters added",
    "dry run": "nothing was written; without --dry-run the result goes to ",
    "draw": "LlamaForCausalLM: traced from base -> rewritten by rules llama",
    "fold": "MB copied",
    "export": "input_ids (batch, sequence), attention_mask (batch, sequence) -> logits",
    "export-adapter": "1 slots, rank 2",
}
WITH_EACH = ["help of a command", "plan", "fold"]
CASES = [(name, "ascii") for name in COMMANDS] + [(name, each) for name in WITH_EACH for each in ENCODINGS[:-1]]


def arguments_of(name: str, root: Path, place: Path) -> list[str]:
    """Return the arguments of a command; ``@`` stands for the directory of inputs, ``%`` for that of results."""
    roots = {"@": root, "%": place}
    return [str(roots[each[0]] / each[1:]) if each[0] in roots else each for each in COMMANDS[name]]


@pytest.mark.parametrize(("name", "encoding"), CASES)
def test_every_command_prints_to_a_stream_of_any_encoding(root: Path, name: str, encoding: str, tmp_path: Path) -> None:
    printed = run(encoding, *arguments_of(name, root, tmp_path))
    assert (printed.code, b"Error" in printed.error) == (0, False), printed.error
    told = printed.out.decode(encoding)
    assert told
    if encoding == "ascii":
        assert SAID.get(name, "") in told
    made = [each for each in COMMANDS[name] if each.startswith("%")]
    assert all((tmp_path / each[1:]).exists() for each in made) is (name != "dry run" or not made)


def test_a_table_lines_up_in_an_encoding_without_its_lines(root: Path) -> None:
    whole, plain = (
        run(each, "plan", root / "base", "--rank", 2, "--all").out.decode(each).splitlines()
        for each in ("utf-8", "ascii")
    )
    assert [len(line) for line in whole] == [len(line) for line in plain]
    assert any(set(line.strip()) == {"-"} for line in plain)


def test_json_and_dot_say_the_same_in_every_encoding(root: Path) -> None:
    for format in ("json", "dot"):
        whole, plain = (run(each, "draw", root / "base", "--rank", 2, "-f", format) for each in ("utf-8", "ascii"))
        if format == "json":
            assert json.loads(whole.out) == json.loads(plain.out)
        else:
            assert whole.out.decode().encode("ascii", "xmlcharrefreplace") == plain.out


def test_an_error_names_a_path_that_the_encoding_lacks(tmp_path: Path) -> None:
    printed = run("ascii", "plan", tmp_path / "modèle")
    assert printed.code == 3
    assert "mod\\xe8le: expected a model directory with a config.json, or such a file." in printed.error.decode("ascii")
    printed = run("utf-8", "plan", os.fsdecode(b"caf\xff"))
    assert printed.error.decode() == (
        "error: caf\\udcff: expected a model directory with a config.json, or such a file. Nothing is downloaded.\n"
    )


def test_the_demo_prints_tables_and_bars_in_any_encoding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def demo(_out: Path, console: Console, *, steps: int) -> None:
        table = Table(title="recall@1 – held out", title_justify="left")
        table.add_row("before → after", f"{steps}")
        console.print(table)
        for _ in tqdm(range(3), desc="training … ×3", unit="step"):
            pass

    monkeypatch.setattr("lora_fx.demo.demo", demo)
    assert demo_command.demo is not demo
    for encoding in ENCODINGS:
        printed = run(encoding, "demo", "--out", tmp_path / "out")
        assert (printed.code, b"recall@1" in printed.out, b"training" in printed.error) == (0, True, True)


def test_every_script_of_the_tools_prints_by_the_same_means() -> None:
    scripts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tools").rglob("*.py")}
    run_ones = {path: text for path, text in scripts.items() if "__main__" in text}
    assert len(run_ones) > 15
    lacking = [
        path.name for path, text in run_ones.items() if "run_script(" not in text and "with printable():" not in text
    ]
    assert lacking == []
    assert [path.name for path, text in scripts.items() if "typer.run(" in text or "typer.echo(" in text] == []


# Readers that go, and streams that are not there.


def run_on(out: TextIO | None, error: TextIO | None, *arguments: object) -> int:
    """Run a command on two streams, and return its exit code."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, error)
    try:
        with pytest.raises(SystemExit) as exit:
            app([*map(str, arguments)])
        assert (sys.stdout, sys.stderr) == (out, error)
    finally:
        sys.stdout, sys.stderr = before
    assert isinstance(exit.value.code, int)
    return exit.value.code


def without_reader() -> TextIO:
    """Return a pipe whose reading end is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w", encoding="utf-8")


def on_a_full_disk() -> TextIO:
    return Path("/dev/full").open("w", encoding="utf-8")


LOST: dict[str, tuple[Callable[[], TextIO], str]] = {
    "no reader": (without_reader, ""),
    "full disk": (on_a_full_disk, "No space left on device"),
}


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.parametrize("name", ["plan", "dry run", "help"])
def test_a_result_that_cannot_be_printed_is_exit_5_without_a_traceback(
    root: Path, name: str, kind: str, tmp_path: Path
) -> None:
    opened, reason = LOST[kind]
    with closing(opened()) as out, io.StringIO() as error:
        expected = 1 if (name, kind) == ("help", "no reader") else 5  # of click's own, which prints the help
        assert run_on(out, error, *arguments_of(name, root, tmp_path)) == expected
        assert error.getvalue() == (f"error: cannot print the result: {reason}.\n" if reason else "")


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.parametrize("name", ["fold", "draw to a file"])
def test_what_was_written_is_exit_0_whatever_becomes_of_the_lines_about_it(
    root: Path, name: str, kind: str, tmp_path: Path
) -> None:
    opened, reason = LOST[kind]
    with closing(opened()) as out, io.StringIO() as error:
        assert run_on(out, error, *arguments_of(name, root, tmp_path)) == 0
        lines = [line for line in error.getvalue().splitlines() if line.startswith(("warning", "error"))]
        assert lines == ([f"warning: all was written, but not what is printed about it: {reason}."] if reason else [])
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", LOST)
def test_progress_that_nobody_reads_stops_nothing(root: Path, kind: str, tmp_path: Path) -> None:
    with closing(LOST[kind][0]()) as error, io.StringIO() as out:
        assert run_on(out, error, *arguments_of("fold", root, tmp_path)) == 0
        assert "MB copied" in out.getvalue()
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["help", "plan", "fold"])
def test_there_may_be_no_streams_at_all(root: Path, name: str, tmp_path: Path) -> None:
    assert run_on(None, None, *arguments_of(name, root, tmp_path)) == 0
    assert (tmp_path / "out").exists() is (name == "fold")


def test_a_stream_that_fails_tells_it_once() -> None:
    closed = io.StringIO()
    closed.close()
    out = Output(closed, strict=True)
    with pytest.raises(OSError, match="closed file"):
        out.write("x")
    assert out.write("y") == 1
    out.flush()
    assert Output(closed, strict=False).write("z") == 1


# Options that were dropped in silence.


def test_a_dry_run_has_nothing_to_report_on(root: Path, tmp_path: Path) -> None:
    for option in ("--report", "--verify"):
        ran = CliRunner().invoke(
            app,
            ["fold", *(str(root / each) for each in ("base", "adapter")), str(tmp_path / "out"), "--dry-run", option],
        )
        told = " ".join(ran.stderr.replace("│", " ").split())
        expected = "--report and --verify look at what was written, and --dry-run writes nothing: leave out one of them"
        assert (ran.exit_code, expected in told) == (2, True), told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            ("--rules", "t5", "--rank", "3", "--out", "p.svg", "--show", "before", "--module", "encoder", "--overwrite"),
            ["lora_fx.draw(graph, lora_fx.rewrite(graph, rules='t5', rank=3), 'p.svg', show='before', module='encoder', overwrite=True)"],
        ),
        (
            ("--show", "fold", "--format", "text"),
            ["branched = lora_fx.rewrite(graph, rules='auto')", "lora_fx.draw(branched, lora_fx.fold(branched), 'graph.txt')"],
        ),
        (
            ("--rules", "mine", "--rules-dir", "more", "--out", "plan.log", "--format", "dot"),
            ["lora_fx.draw(graph, lora_fx.rewrite(graph, rules=load('mine', directories=['more'])), 'plan.log.dot')"],
        ),
    ],
)  # fmt: skip
def test_the_lines_that_draw_a_program_do_what_the_options_say(
    options: tuple[str, ...], lines: list[str], tmp_path: Path
) -> None:
    program = tmp_path / "x.pt2"
    told = " ".join(CliRunner().invoke(app, ["draw", str(program), *options]).stderr.split())
    assert (
        told
        == f"error: {program}: expected a model directory with a config.json, or such a file. Nothing is downloaded."
    )
    program.write_bytes(b"")
    ran = CliRunner().invoke(app, ["draw", str(program), *options])
    first, *rest = ran.stderr.splitlines()
    imports = "import lora_fx, torch" + ("; from lora_fx.rules.lookup import load" if "--rules-dir" in options else "")
    assert first.endswith(f"if you trust it, draw it in Python, after `{imports}`:")
    assert rest == [f"graph = lora_fx.trace(torch.export.load({str(program)!r}), inference=True)", *lines]
