"""``--example-inputs``: models whose inputs do not follow from their config, given by name in a safetensors file."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
import transformers
from conftest import set_factors
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lora_fx
from lora_fx.cli import app

SIZES = {
    "num_input_channels": 2,
    "context_length": 16,
    "patch_length": 4,
    "patch_stride": 4,
    "d_model": 16,
    "num_attention_heads": 2,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "do_mask_input": False,
}
RULES = '[defaults]\nrank = 2\n\n[[select]]\ntarget = ["q_proj", "v_proj"]\n'


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of time series, an adapter, rules, and inputs."""
    root = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    model = transformers.PatchTSTModel(transformers.PatchTSTConfig(**SIZES)).eval()
    model.save_pretrained(root / "base")
    asking = transformers.TimesFmConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4
    )
    transformers.TimesFmModel(asking).save_pretrained(root / "asking")
    (root / "mine.toml").write_text(RULES)
    inputs = {"past_values": torch.randn(2, 16, 2)}
    save_file(inputs, root / "inputs.safetensors")
    graph = lora_fx.rewrite(model, root / "mine.toml", example_inputs=inputs, inference=True)
    set_factors(graph)
    lora_fx.save_adapter(graph, root / "adapter")
    return root


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def given(root: Path) -> tuple[object, ...]:
    return "--example-inputs", root / "inputs.safetensors"


def test_without_inputs_that_cannot_be_made_each_command_asks_for_them(root: Path, tmp_path: Path) -> None:
    for arguments in (
        ("plan", root / "asking"),
        ("draw", root / "asking"),
        ("export", root / "asking", tmp_path / "model.onnx", "-f", "onnx"),
        ("fold", root / "asking", root / "adapter", tmp_path / "merged"),
    ):
        said = call(*arguments, code=4)
        assert "'freq' cannot be made from its signature and config: pass --example-inputs FILE.safetensors" in said
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_planned_and_drawn(root: Path) -> None:
    rules = ("--rules", root / "mine.toml")
    data = json.loads(call("plan", root / "base", *rules, *given(root), "--json"))
    assert data["chosen"] == 4
    drawn = json.loads(call("draw", root / "base", *rules, *given(root), "--format", "json"))
    assert "past_values" in {node["name"] for node in drawn["nodes"]}
    assert any(node["status"] == "added" for node in drawn["nodes"])


def test_a_model_is_exported(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    adapter = ("--adapter", root / "adapter")
    said = call("export", root / "base", out, "-f", "onnx", *adapter, *given(root))
    assert "past_values (batch, 16, 2) → last_hidden_state" in said
    model = transformers.PatchTSTModel.from_pretrained(root / "base").eval()
    example = load_file(root / "inputs.safetensors")
    graph = lora_fx.from_adapter(model, root / "adapter", example_inputs=example, inference=True)
    batch = torch.randn(5, 16, 2)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(["last_hidden_state"], {"past_values": batch.numpy()})[0])
    assert torch.allclose(found, lora_fx.fold(graph)(past_values=batch).last_hidden_state, rtol=0, atol=1e-5)


def test_a_checkpoint_is_folded(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    said = call("fold", root / "base", root / "adapter", out, *given(root), "--report")
    assert "4 weights" in said
    model = transformers.PatchTSTModel.from_pretrained(root / "base").eval()
    example = load_file(root / "inputs.safetensors")
    merged = lora_fx.fold(lora_fx.from_adapter(model, root / "adapter", example_inputs=example, inference=True))
    expected, found = merged.state_dict(), load_file(out / "model.safetensors")
    assert sum(not torch.equal(found[name], model.state_dict()[name]) for name in found) == 4
    assert all(torch.equal(found[name], expected[name]) for name in found if name in expected)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["past_value"], "'past_value', which is no input of the model (did you mean 'past_values'"),
        (["past_value"], "it lacks 'past_values'"),
        (["past_values", "kwargs"], "it has 'kwargs', which is no input of the model"),
        (["past_observed_mask"], "it lacks 'past_values'"),
        ([], "it lacks 'past_values'"),
    ],
)
def test_names_that_do_not_fit_the_model_are_refused(root: Path, tmp_path: Path, names: list[str], said: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({name: torch.randn(2, 16, 2) for name in names}, path)
    error = call("plan", root / "base", "--example-inputs", path, code=3)
    assert f"{path}: expected example inputs of PatchTSTModel, which takes past_values, past_observed_mask," in error
    assert said in error
    base, adapter, out = root / "base", root / "adapter", tmp_path / "out"
    assert said in call("fold", base, adapter, out, "--example-inputs", path, code=3)
    assert not out.exists()


def test_the_main_input_of_a_text_model_has_to_be_there_or_its_embeddings(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        architectures=["BertModel"],
    )
    config.save_pretrained(tmp_path)
    path = tmp_path / "inputs.safetensors"
    save_file({"token_type_ids": torch.zeros(2, 7, dtype=torch.int64)}, path)
    assert "it lacks 'input_ids'" in call("plan", tmp_path, "--example-inputs", path, code=3)
    save_file({"inputs_embeds": torch.randn(2, 7, 16)}, path)
    assert "4 of " in call("plan", tmp_path, "--rules", "bert", "--example-inputs", path)


def test_a_file_that_is_no_safetensors_file_is_refused(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "inputs.safetensors"
    assert f"{path} does not exist" in call("plan", root / "base", "--example-inputs", path, code=3)
    torch.save({"past_values": torch.randn(2, 16, 2)}, path)
    assert f"{path}" in call("plan", root / "base", "--example-inputs", path, code=3)
