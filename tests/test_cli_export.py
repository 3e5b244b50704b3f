"""``lora-fx export``: from a directory to a file, and directories of strangers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from architectures import build, inputs
from conftest import set_factors
from typer.testing import CliRunner

import lora_fx
from lora_fx.cli import app

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and an adapter of it."""
    root = tmp_path_factory.mktemp("export")
    model = build("llama", layers=1)
    model.save_pretrained(root / "base")
    graph = lora_fx.rewrite(model, rules="llama", rank=4, alpha=6)
    set_factors(graph)
    lora_fx.save_adapter(graph, root / "adapter")
    return root


@pytest.fixture(scope="module")
def expected(base: Path) -> torch.Tensor:
    """The logits of the model with its adapter folded at three quarters."""
    graph = lora_fx.from_adapter(build("llama", layers=1), base / "adapter", "tuned", inference=True)
    return lora_fx.fold(graph, {"tuned": 0.75}).eval()(**inputs("llama", 3, 11)).logits  # type: ignore[no-any-return]


def export(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("format", ["torchscript", "onnx", "pt2"])
def test_a_directory_is_exported_with_its_adapters_folded(
    base: Path, expected: torch.Tensor, format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "new" / "model.pt2"
    adapter = ("--adapter", base / "adapter")
    strengths = ("--strength", 0.5, "--strength", 0.25)
    said = export(base / "base", out, "--format", format, *adapter, *adapter, *strengths)
    assert "input_ids (batch, sequence), attention_mask (batch, sequence) → logits" in said
    assert "largest difference to the graph: " in said
    assert not any("does not act" in message for message in caplog.messages)  # advice on Python calls
    batch = inputs("llama", 3, 11)
    if format == "onnx":
        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {key: value.numpy() for key, value in batch.items()})[0])
    else:
        loaded: Any = torch.jit.load(out) if format == "torchscript" else torch.export.load(out).module()
        found = loaded(**batch)["logits"]
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert "exists already" in export(base / "base", out, "--format", format, code=5)


def test_a_directory_for_generation_has_the_adapter_and_the_tokenizer(
    base: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    model, out = shutil.copytree(base / "base", tmp_path / "base"), tmp_path / "new" / "directory"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_text(f'"{name}"')
    adapter = ("--adapter", base / "adapter", "--strength", 0.75)
    said = export(model, out, "--format", "onnx", "--with-cache", *adapter)
    assert "MB (config.json, genai_config.json, generation_config.json, model.onnx, tokenizer.json" in said
    assert "attention_mask (batch, past_sequence + sequence), position_ids (batch, sequence), past_key" in said
    assert "largest difference to the graph: " in said
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "genai_config.json", "generation_config.json", "model.onnx"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    ids, whole = (value.numpy() for value in inputs("llama", 3, 11).values())
    past = {value.name: np.zeros((3, 2, 0, 8), np.float32) for value in session.get_inputs() if "past" in value.name}
    found = []
    for start, end in ((0, 7), (7, 8), (8, 11)):  # the prompt, a token, several
        positions = np.broadcast_to(np.arange(start, end), (3, end - start))
        given = {"input_ids": ids[:, start:end], "attention_mask": whole[:, :end], "position_ids": positions}
        values = session.run(None, {**given, **past})
        outputs = dict(zip((value.name for value in session.get_outputs()), values, strict=True))
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        found.append(torch.from_numpy(outputs["logits"]))
    assert torch.allclose(torch.cat(found, 1), expected, rtol=0, atol=1e-5)
    assert "exists already" in export(model, out, "-f", "onnx", "--with-cache", code=5)
    assert "is read to make the result" in export(model, model, "-f", "onnx", "--with-cache", "--overwrite", code=5)
    assert "is a directory, and a file" in export(
        model, out, "-f", "torchscript", "--with-cache", "--overwrite", code=5
    )


def test_combinations_with_a_cache_that_mean_nothing_are_refused(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "says no" in export(base / "base", out, "--with-cache", code=2)
    given = ("-f", "onnx", "--with-cache", "--example-inputs", tmp_path / "inputs.safetensors")
    assert "--with-cache makes its own inputs" in export(base / "base", out, *given, code=2)
    build("bert").save_pretrained(tmp_path / "bert")
    assert "BertModel returns no logits to generate from" in export(
        tmp_path / "bert", out, "-f", "onnx", "--with-cache", code=4
    )
    (tmp_path / "file").touch()
    said = export(base / "base", tmp_path / "file", "-f", "onnx", "--with-cache", "--overwrite", code=5)
    assert "is a file, and a directory for generation is a directory" in said
    assert not out.exists()


def test_branches_stay_where_they_are_asked_for(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    options = ("--adapter", base / "adapter", "--branched", "--no-verify", "--opset", 17)
    export(base / "base", out, "-f", "onnx", *options)
    model = onnx.load(out)
    assert [entry.version for entry in model.opset_import] == [17]
    names = [tensor.name for tensor in model.graph.initializer]
    assert "model.layers.0.self_attn.q_proj.lora_A.adapter_0.weight.T" in names


def test_an_export_of_something_else_is_told_apart(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.pt2"
    assert "--branched leaves adapters" in export(base / "base", out, "-f", "pt2", "--branched", code=2)
    assert "end in .pt2" in export(base / "base", tmp_path / "model.pt", "-f", "pt2", code=2)
    assert "end in .pt2" in export(base / "base", tmp_path / "model.so", "-f", "aoti", code=2)
    assert "programs end in .pte" in export(base / "base", out, "-f", "executorch", code=2)
    assert "--max-size is for ExecuTorch" in export(base / "base", out, "-f", "pt2", "--max-size", "batch=8", code=2)
    program = tmp_path / "model.pte"
    assert "expected an axis and its largest" in export(base / "base", program, "--max-size", "batch", code=2)
    assert "names batch twice" in export(base / "base", program, *["--max-size", "batch=8"] * 2, code=2)
    assert "give one for each, or none" in export(base / "base", out, "-f", "pt2", "--strength", 1, code=2)
    assert "greater than or equal to 0" in export(base / "base", out, "-f", "pt2", "--tolerance", "nan", code=2)
    assert "--opset is the version of ONNX's" in export(base / "base", out, "-f", "pt2", "--opset", 21, code=2)
    assert "expected a model directory with a config.json" in export(tmp_path, out, "-f", "pt2", code=3)
    assert "such as --max-size batch=8 --max-size sequence=128" in export(base / "base", program, code=5)
    assert not out.exists()
    assert not program.exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"architectures": ["EvilForCausalLM"]}, "says architectures ['EvilForCausalLM'], of which transformers"),
        ({"architectures": 5}, "says architectures 5"),
        ({"architectures": None}, "values for lm_head.weight, which would be lost"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "no values for score.weight, which would be random"),
        ({"_attn_implementation": "someone/kernel"}, "asks for the code 'someone/kernel'"),
        ({"attn_implementation": "someone/kernel"}, "asks for the code 'someone/kernel'"),
        ({"num_attention_heads": 0}, "cannot"),
        ({"hidden_size": "x"}, "cannot read this config"),
        ({"vocab_size": 98}, "cannot load this model"),
    ],
    ids=lambda value: str(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit_or_asks_for_code_is_refused(
    base: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    directory = shutil.copytree(base / "base", tmp_path / "base")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changed}))
    assert said in export(directory, tmp_path / "model.onnx", "-f", "onnx", code=3)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_pickled_weights_are_not_read(base: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(base / "base", tmp_path / "base")
    (directory / "model.safetensors").unlink()
    torch.save(build("llama", layers=1).state_dict(), directory / "pytorch_model.bin")
    assert "cannot load this model" in export(directory, tmp_path / "model.onnx", "-f", "onnx", code=3)


@pytest.mark.parametrize(("name", "expected"), [("m.onnx", "onnx"), ("m.pt", "torchscript"), ("m.pt2", "pt2")])
def test_the_format_follows_from_the_name_of_the_file(name: str, expected: str) -> None:
    from lora_fx.cli.export_commands import _export_format

    assert _export_format(None, Path(name), slots=False, opset=None) == expected
