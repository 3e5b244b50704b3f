"""``lora-fx draw``: from a config to a picture, on the terminal or in a file."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import transformers
from architectures import traced
from typer.testing import CliRunner

import lora_fx
from lora_fx.cli import app

pytestmark = pytest.mark.usefixtures("traced_once")

ROOT = Path(__file__).parent.parent
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
COLUMNS = ["layer", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("draw") / "llama"
    transformers.LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    lora_fx.export.pt2(traced("llama"), path, verify=False)
    return path


@pytest.fixture(autouse=True)
def _without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: object) -> NoReturn:
        raise AssertionError(f"asked the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def draw(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["draw", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def refused(*arguments: object, code: int = 3) -> str:
    """Return what an error says, on one line, without the frame of a usage error."""
    said, error = draw(*arguments, code=code)
    assert said == ""
    assert "Traceback" not in error
    return " ".join(error.replace("│", " ").split())


@functools.cache
def printed(*arguments: object) -> str:
    """Return what is printed. Each is drawn once."""
    return draw(*arguments)[0]


def described(*arguments: object) -> dict[str, Any]:
    return json.loads(printed(*arguments, "--format", "json"))


def matrix(text: str) -> list[list[str]]:
    """Return the heading and the rows of the one matrix in a text."""
    lines = text.split("\nmodel.layers\n")[1].split("\n\n")[0].splitlines()
    return [line.split() for line in (lines[0], *lines[2:])]


def statuses(description: dict[str, Any]) -> set[str]:
    return {node["status"] for node in description["nodes"]}


def test_without_an_out_the_counts_and_the_matrix_are_printed(directory: Path) -> None:
    said = printed(directory)
    title, counts = said.splitlines()[:2]
    assert title == "LlamaForCausalLM: traced from llama → rewritten by rules llama"
    data = described(directory)
    numbers = data["counts"]
    assert (numbers["added"], numbers["rewired"], numbers["branches"]) == (20, 4, 4)
    same = numbers["nodes"] - 24
    assert counts == f"{numbers['nodes']} operators: 20 added, 4 rewired, {same} unchanged; 4 branches"
    assert matrix(said) == [COLUMNS, ["0–1", "8", "·", "8", "·", "·", "·", "·"]]


def test_rules_and_rank_are_those_that_are_named(directory: Path, tmp_path: Path) -> None:
    said, _ = draw(directory, "--rules", "all-linear", "--rank", 3)
    assert matrix(said) == [COLUMNS, ["0–1", *"3333333"]]
    (tmp_path / "mine.toml").write_text('[[select]]\ntarget = ["o_proj"]\nlayers = ["1-"]\nrank = 5\n')
    rows = [["0", *"·······"], ["1", *"···5···"]]
    assert matrix(draw(directory, "--rules", "mine", "--rules-dir", tmp_path)[0]) == [COLUMNS, *rows]


def test_json_is_printed_as_it_is_written_and_dot_too_is_printed(directory: Path, tmp_path: Path) -> None:
    draw(directory, "--out", tmp_path / "graph.json")
    said = printed(directory, "--format", "json")
    assert said.rstrip("\n") == (tmp_path / "graph.json").read_text(encoding="utf-8").rstrip("\n")
    assert printed(directory, "--format", "dot").startswith("digraph")


@pytest.mark.parametrize("format", ["html", "svg", "png"])
def test_what_a_terminal_cannot_show_needs_an_out(directory: Path, format: str) -> None:
    assert f"--out names the file that the {format} is written to" in refused(directory, "-f", format, code=2)


@pytest.mark.parametrize(
    ("suffix", "start"),
    [
        ("html", b"<!doctype html>"),
        ("svg", b"<?xml"),
        ("png", b"\x89PNG\r\n"),
        ("txt", b"LlamaForCausalLM: traced from llama"),
    ],
)
def test_the_suffix_of_out_is_the_format_and_one_line_says_what_was_drawn(
    directory: Path, tmp_path: Path, suffix: str, start: bytes
) -> None:
    out = tmp_path / "missing" / "as well" / f"graph.{suffix}"
    said, _ = draw(directory, "--out", out)
    assert out.read_bytes().startswith(start)
    assert said == f"{out}: {printed(directory).splitlines()[1]}\n"
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_before_is_the_model_alone(directory: Path) -> None:
    data = described(directory, "--show", "before")
    assert (data["show"], data["before"], data.get("after")) == ("before", "traced from llama", None)
    assert (statuses(data), data["changes"]) == ({"same"}, [])
    assert not any(group["kind"] == "branch" for group in data["groups"])
    assert {site["state"] for site in data["sites"]} == {"none"}


def test_after_is_the_rewritten_model_alone_with_its_branches(directory: Path) -> None:
    data = described(directory, "--show", "after")
    assert (data["show"], data.get("before"), data["after"]) == ("after", None, "rewritten by rules llama")
    assert statuses(data) == {"same"}
    assert sum(group["kind"] == "branch" for group in data["groups"]) == 4
    assert [site["name"] for site in data["sites"] if site["ranks"]] == [
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qv"
    ]


def test_the_default_is_both_and_what_is_added_and_rewired(directory: Path) -> None:
    data = described(directory)
    assert (data["show"], data["before"], data["after"]) == ("diff", "traced from llama", "rewritten by rules llama")
    assert statuses(data) == {"same", "added", "rewired"}


def test_of_a_fold_nothing_differs_and_the_weights_that_it_merges_into_are_marked(directory: Path) -> None:
    said = printed(directory, "--show", "fold")
    assert said.splitlines()[0].endswith("→ rewritten by rules llama, and folded")
    assert said.splitlines()[1].endswith(" operators: nothing differs")
    assert "LoRA" not in said
    assert matrix(said) == [COLUMNS, ["0–1", "merged", "·", "merged", "·", "·", "·", "·"]]


def test_a_config_alone_is_drawn_and_nothing_is_downloaded_or_written_beside_it(
    directory: Path, tmp_path: Path
) -> None:
    config = tmp_path / "mine" / "config.json"
    config.parent.mkdir()
    shutil.copy(directory / "config.json", config)
    said, _ = draw(config)
    assert said.startswith("LlamaForCausalLM: traced from config.json → ")
    assert said.splitlines()[1:] == printed(directory).splitlines()[1:]
    assert list(config.parent.iterdir()) == [config]


def test_a_program_is_answered_with_the_lines_of_python_that_draw_it(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, error = draw(program, "--rules", "llama", code=3)
    told, *lines = error.splitlines()
    assert said == ""
    assert told.startswith(f"error: {program}: expected a model directory or a config.json, got an exported program")
    assert len(lines) == 2
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines), {"torch": torch, "lora_fx": lora_fx})
    assert (tmp_path / "graph.html").read_bytes().startswith(b"<!doctype html>")
    refused(program, "--out", tmp_path / "other.html")
    assert [path.name for path in tmp_path.iterdir()] == ["graph.html"]


def test_a_file_that_exists_stays_as_it_was_without_overwrite_and_a_format_goes_before_its_suffix(
    directory: Path, tmp_path: Path
) -> None:
    out = tmp_path / "graph.html"
    out.write_text("mine")
    assert f"{out} exists already. Choose another name, or replace it: --overwrite." in refused(
        directory, "--out", out, code=5
    )
    assert out.read_text() == "mine"
    draw(directory, "--out", out, "--overwrite", "--format", "dot")
    assert out.read_text(encoding="utf-8").startswith("digraph")


def test_what_is_not_drawn_leaves_what_out_names_as_it_was(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "graph.dot"
    out.write_text("mine")
    refused(directory, "--rules", "lama", "--out", out, "--overwrite")
    assert out.read_text() == "mine"
    refused(directory, "--rules", "lama", "--out", tmp_path / "new" / "graph.dot")
    assert list(tmp_path.iterdir()) == [out]


def test_errors_are_one_message_and_a_status(directory: Path, tmp_path: Path) -> None:
    assert "did you mean 'llama'" in refused(directory, "--rules", "lama")
    assert "graph.pdf: a picture is a file, and one of .dot, .html," in refused(
        directory, "--out", tmp_path / "graph.pdf", code=2
    )
    assert "Nothing is downloaded" in refused("meta-llama/Llama-3")
    assert "Nothing is downloaded" in refused(tmp_path)
    assert "'sideways' is not one of 'before'" in refused(directory, "--show", "sideways", code=2)
    (tmp_path / "config.json").write_text("[1, 2]")
    assert "cannot read this config" in refused(tmp_path)
    (tmp_path / "file").touch()
    assert "cannot write" in refused(directory, "--out", tmp_path / "file" / "graph.dot", code=5)
    assert "'--rank': Input should be greater than or equal to 1" in refused(directory, "--rank", 0, code=2)


def test_help_has_examples() -> None:
    said = " ".join(draw("--help")[0].split())
    assert "lora-fx draw path/to/model --rules t5 --out graph.html" in said
    assert "lora-fx draw config.json --module model.layers.0 --out layer.svg" in said


def test_the_tool_is_the_command_and_runs_as_a_process_without_a_hub(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "graph.json"
    ran = subprocess.run(
        [
            sys.executable,
            ROOT / "tools" / "visualize.py",
            directory,
            "--rules",
            "llama",
            "--show",
            "diff",
            "--out",
            out,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith(f"{out}: ")
    assert json.loads(out.read_text(encoding="utf-8")) == described(directory)
    assert list(tmp_path.iterdir()) == [out]
