from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import lora_fx.demo as demo
from lora_fx.cli import app
from lora_fx.errors import LoraFxError

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")


def test_no_held_out_paragraph_is_trained_on() -> None:
    corpus = demo.read_corpus(demo.SEED)
    train = {p.casefold() for paragraphs in corpus.train.values() for p in paragraphs}
    held_out = [p.casefold() for paragraphs in corpus.held_out.values() for p in paragraphs]
    assert len(held_out) > 150
    assert len(held_out) == len(set(held_out))
    assert train.isdisjoint(held_out)
    assert demo.read_corpus(demo.SEED) == corpus
    assert demo.read_corpus(demo.SEED + 1) != corpus


def test_the_loss_is_the_cross_entropy_to_leave_one_out_means() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(3, 4, 5), dim=-1)
    losses = []
    for topic in range(3):
        for paragraph in range(4):
            means = []
            for other in range(3):
                rest = [vectors[other, i] for i in range(4) if not (other == topic and i == paragraph)]
                means.append(torch.nn.functional.normalize(torch.stack(rest).mean(0), dim=-1))
            similarity = torch.stack(means) @ vectors[topic, paragraph] / demo.TEMPERATURE
            losses.append(-torch.log_softmax(similarity, 0)[topic])
    assert torch.allclose(demo.prototype_loss(vectors), torch.stack(losses).mean(), atol=1e-5)


@pytest.fixture
def _few_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the demo read as many topics as a batch has, and no more of each than that."""
    whole = demo.read_corpus(demo.SEED)
    names = [
        name for name in whole.train if len(whole.train[name]) >= demo.PARAGRAPHS_PER_TOPIC and whole.held_out[name]
    ][: demo.TOPICS_PER_BATCH]
    few = demo.Corpus(
        {name: whole.train[name][: demo.PARAGRAPHS_PER_TOPIC] for name in names},
        {name: whole.held_out[name][:1] for name in names},
    )
    monkeypatch.setattr(demo, "read_corpus", lambda _seed: few)


@pytest.mark.slow
@pytest.mark.usefixtures("_few_topics")
@pytest.mark.xdist_group("demo")
def test_the_whole_path_runs_on_the_pretrained_model(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out"), "--steps", "3"])
    assert result.exit_code == 0, result.output
    assert "all-MiniLM-L6-v2, pretrained" in result.output
    assert "trainable params: 73728 ||" in result.output
    for written in ("TorchScript file", "ONNX file", "pt2 file", "transformers directory"):
        assert f"largest difference to the branched graph, {written}: " in result.output
    written = {"model", "model.torchscript.pt", "model.onnx", "model.pt2", "graph.svg"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written


@pytest.mark.slow
@pytest.mark.usefixtures("_few_topics")
@pytest.mark.xdist_group("demo")
def test_without_the_pretrained_package_it_says_so_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "a_package_that_is_not_there")
    console = Console(record=True, width=200)
    demo.demo(tmp_path / "out", console, steps=2)
    text = console.export_text()
    assert "random weights" in text
    assert "after training, folded" in text


def test_weights_that_are_not_the_pinned_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(LoraFxError, match="not the pinned 0000"):
        demo.load_model(Console(quiet=True), demo.Corpus({}, {}))


def test_help_shows_an_example() -> None:
    result = CliRunner().invoke(app, ["demo", "--help"])
    assert result.exit_code == 0
    assert "Examples:" in result.output
