"""``lora-fx demo --generate``, with a smaller model and few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

import lora_fx
import lora_fx.demo_generation as demo
from lora_fx import runtime
from lora_fx.cli import app
from lora_fx.generation import generator


def test_the_source_code_has_neither_comments_nor_docstrings() -> None:
    source = demo.read_source()
    assert demo.SOURCE_BYTES < len(source) < 2 * demo.SOURCE_BYTES
    assert "\nclass " in source
    assert "\n#" not in source
    assert '    """' not in source


def test_a_prompt_is_continued_without_and_with_either_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.CONFIG, "num_hidden_layers", 1)
    monkeypatch.setattr(demo, "TOKENS", 12)
    monkeypatch.setattr(demo, "read_source", lambda: "for x in y:\n    return x\n" * 99)
    models: list[transformers.LlamaForCausalLM] = []

    def build(config: transformers.LlamaConfig) -> transformers.LlamaForCausalLM:
        models.append(transformers.LlamaForCausalLM(config))
        return models[-1]

    monkeypatch.setattr(demo, "LlamaForCausalLM", build)
    result = CliRunner().invoke(app, ["demo", "--generate", "--out", str(tmp_path), "--steps", "2"])
    assert result.exit_code == 0, result.output
    for told in ("without an adapter: ", "with the adapter code: ", "with the adapter upper: "):
        assert told in result.output
    assert result.output.count("tokens/s by onnxruntime") == 3
    assert {path.name for path in tmp_path.iterdir()} == {
        *("code", "code.onnx_adapter", "upper", "upper.onnx_adapter", "generation"),
    }
    session = runtime.OnnxSession(tmp_path / "generation" / "model.onnx")
    session.load("code", tmp_path / "code.onnx_adapter")
    empty = demo.empty_past({value.name: value.shape for value in session.session.get_inputs()})
    for name in (None, "code"):
        found = demo.generate(lambda inputs, name=name: session.run(inputs, name), empty, "for ", 9, temperature=0)
        graph = lora_fx.trace(models[0], cache=True, inference=True)
        graph = graph if name is None else lora_fx.load_adapter(graph, tmp_path / name)
        ids = torch.tensor([list(b"for ")])
        options = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert generator(graph).generate(ids, **options)[0, 4:].tolist() == list(found.tokens)


def test_unlikely_tokens_are_rarely_drawn() -> None:
    chooser = np.random.default_rng(1)
    logits = np.log(np.array([0.2, 0.8], np.float32))
    assert demo._chosen(logits, 0, chooser) == 1
    drawn = [demo._chosen(logits, 1.0, chooser) for _ in range(2000)]
    assert abs(np.mean(drawn) - 0.8) < 0.03
