"""``lora-fx export --slots`` and ``lora-fx export-adapter``: from directories to files, and what is said of others."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, inputs
from conftest import set_factors
from slotted import near
from typer.testing import CliRunner

import lora_fx
from lora_fx.cli import app
from lora_fx.runtime import OnnxSession


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, two adapters of it, and the model with slots."""
    made = tmp_path_factory.mktemp("cli")
    model = build("bert", layers=1)
    model.save_pretrained(made / "base")
    for name, rank, seed in (("style", 2, 1), ("facts", 5, 2)):
        graph = lora_fx.rewrite(traced(), rules="bert", rank=rank, alpha=6)
        set_factors(graph, seed, scale=0.1)
        lora_fx.save_adapter(graph, made / name)
    said = lora("export", made / "base", "--rules", "bert", "--slots", made / "slots.onnx")
    assert "input_ids (batch, sequence), attention_mask (batch, sequence)" in said
    assert "largest difference to the graph: " in said
    return made


def lora(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def computed(root: Path, adapter: Path) -> Any:
    session = OnnxSession(root / "slots.onnx")
    session.load("a", adapter)
    return session.run({key: value.numpy() for key, value in inputs("bert", 3, 11).items()}, "a")["last_hidden_state"]


@functools.cache
def traced() -> lora_fx.TracedGraphModule:
    return lora_fx.trace(build("bert", layers=1), inference=True)


def folded(root: Path, **strengths: float) -> torch.Tensor:
    graph = traced()
    for name in strengths:
        graph = lora_fx.load_adapter(graph, root / name, name)
    with torch.no_grad():
        found: torch.Tensor = lora_fx.fold(graph, strengths)(**inputs("bert", 3, 11)).last_hidden_state
    return found


def test_a_directory_becomes_a_model_with_slots_and_adapters_of_it_files(root: Path, tmp_path: Path) -> None:
    for name, rank in (("style", 2), ("facts", 5)):
        out = tmp_path / "new" / f"{name}.onnx_adapter"
        said = lora("export-adapter", root / name, root / "slots.onnx", out)
        assert f"{out.name}: 2 slots, rank {rank}, for the base " in said
        assert near(computed(root, out), folded(root, **{name: 1.0}))
        assert "exists already" in lora("export-adapter", root / name, root / "slots.onnx", out, code=5)
        lora("export-adapter", root / name, root / "slots.onnx", out, "--overwrite")


def test_adapters_at_strengths_become_one_file(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.onnx_adapter"
    strengths = ("--strength", 1, "--strength", 0.5)
    said = lora("export-adapter", root / "style", root / "facts", root / "slots.onnx", out, *strengths)
    assert "2 slots, rank 7" in said
    assert near(computed(root, out), folded(root, style=1.0, facts=0.5))


def test_slots_may_be_where_adapters_have_branches(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "slots.onnx"
    lora("export", root / "base", out, "--slots", "--adapter", root / "style", "--no-verify")
    assert out.read_bytes() == (root / "slots.onnx").read_bytes()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--slots", "--branched", "--adapter", "a"), 2, "leave out --format"),
        (("--slots", "--format", "pt2"), 2, "leave out --format"),
        (("--slots", "--adapter", "a", "--strength", "2"), 2, "leave out --format"),
        (("--format", "onnx", "--rules", "bert"), 2, "--rules choose the sites of --slots, which was not given"),
        (("--slots", "--rules", "brt"), 3, "did you mean 'bert'"),
        (("--slots", "--dtype", "bfloat16"), 5, "computes in torch.bfloat16"),
    ],
    ids=["branched", "format", "strength", "rules", "no such rules", "half precision"],
)
def test_options_that_do_not_go_together_are_told(
    root: Path, tmp_path: Path, options: tuple[str, ...], code: int, said: str
) -> None:
    assert said in lora("export", root / "base", tmp_path / "out.onnx", *options, code=code)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_go_together_is_told_of_adapters(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "name one adapter or more" in lora("export-adapter", root / "style", root / "slots.onnx", code=2)
    given = ("export-adapter", root / "style", root / "slots.onnx", out)
    assert "give one for each, or none" in lora(*given, "--strength", 1, "--strength", 2, code=2)
    assert "expected a PEFT adapter" in lora("export-adapter", root / "base", root / "slots.onnx", out, code=3)
    assert "expected an ONNX model with slots" in lora(
        "export-adapter", root / "style", root / "none.onnx", out, code=3
    )
    graph = lora_fx.rewrite(build("bert", seed=1, layers=1), rules="bert", rank=2)
    lora_fx.save_adapter(graph, tmp_path / "other")
    said = lora("export-adapter", tmp_path / "other", root / "slots.onnx", out, code=3)
    assert "the adapter was trained on another base" in said
    assert "pass that model, or --no-strict" in said
    told = lora("export-adapter", tmp_path / "other", root / "slots.onnx", out, "--no-strict")
    assert told.startswith(f"warning: {tmp_path / 'other'}: the adapter was trained on another base")
    assert out.is_file()
