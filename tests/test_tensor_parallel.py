"""Tensor parallelism: two processes with half the weights of the layers each compute, save and fold as one process does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import inputs, traced, without_dropout
from conftest import set_factors
from safetensors.torch import load_file

import lora_fx

pytestmark = pytest.mark.xdist_group("divided")

SCRIPT = Path(__file__).parent / "divided.py"
TARGETS = {"llama": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"]}


def branched(name: str, **settings: Any) -> lora_fx.TracedGraphModule:
    rules = {"select": [{"target": TARGETS[name]}]}
    graph = lora_fx.rewrite(traced(name), rules, **{"rank": 3, "dropout": 0.0, "seed": 0, **settings})
    return without_dropout(graph)


def prepare(name: str, directory: Path) -> None:
    """Write a graph whose factors and biases are not zero."""
    graph = branched(name).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in graph.parameters():
            if parameter.dim() == 1:  # biases, which are zero in fresh models, and weights of norms
                parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape, generator=generator))
    set_factors(graph)
    torch.save(graph, directory / f"{name}.graph")
    torch.save(inputs(name, 3, 7, seed=1), directory / f"{name}.inputs")


def launch(directory: Path, name: str) -> None:
    """Let two processes leave what they find."""
    # A process that waits for another forever would end here.
    done = subprocess.run(
        [sys.executable, SCRIPT, directory, name], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.matrix)])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def directory(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a graph, and with what two processes found."""
    directory = tmp_path_factory.mktemp("divided")
    prepare(name, directory)
    launch(directory, name)
    return directory


def found(directory: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(directory / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_processes_compute_the_outputs_and_the_gradients_of_one(name: str, directory: Path) -> None:
    graph = torch.load(directory / f"{name}.graph", weights_only=False)
    logits = graph(**torch.load(directory / f"{name}.inputs")).logits
    logits.square().mean().backward()
    expected = {key: value.grad for key, value in graph.named_parameters() if value.grad is not None}
    assert all(gradient.abs().max() > 1e-5 for gradient in expected.values())
    for each in found(directory, name):
        for values in (each["logits"], *each["again"]):
            assert torch.allclose(values, logits.detach(), rtol=0, atol=1e-6)
        assert each["gradients"].keys() == expected.keys()
        for key, gradient in expected.items():
            assert torch.allclose(each["gradients"][key], gradient, rtol=0, atol=1e-5), key


def test_each_process_has_half_of_the_divided_weights_and_folds_its_own(name: str, directory: Path) -> None:
    graph = torch.load(directory / f"{name}.graph", weights_only=False)
    whole = {key: value.untyped_storage().nbytes() for key, value in graph.named_parameters()}
    matrices = [
        key
        for key in whole
        if key.endswith(".weight") and "lora" not in key and any(end in key for end in ("proj", "c_attn", "c_fc"))
    ]
    merged = lora_fx.fold(graph).state_dict()
    for rank, each in enumerate(found(directory, name)):
        assert matrices
        assert set(matrices) <= set(each["divided"])
        assert {key: 2 * each["sizes"][key] for key in each["divided"]} == {key: whole[key] for key in each["divided"]}
        assert each["merged"].keys() == merged.keys()
        for key, value in merged.items():
            dim, blocks = each["parts"].get(key, (0, ()))
            halves = [block.chunk(2, dim)[rank] for block in value.split(list(blocks), dim)] if blocks else [value]
            assert torch.equal(each["merged"][key], torch.cat(halves, dim)), key


def test_the_adapter_that_two_processes_save_is_the_file_of_one(name: str, directory: Path, tmp_path: Path) -> None:
    graph = torch.load(directory / f"{name}.graph", weights_only=False)
    lora_fx.save_adapter(graph, tmp_path / "one")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (directory / f"{name}-adapter" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    assert load_file(tmp_path / "one" / "adapter_model.safetensors")


@pytest.mark.matrix
def test_all_processes_refuse_where_one_does_and_name_the_node(tmp_path: Path) -> None:
    prepare("llama", tmp_path)
    torch.save(lora_fx.rewrite(traced("llama"), "auto", dropout=0.1, seed=0), tmp_path / "dropped.graph")
    dora = {"defaults": {"variant": "dora"}, "select": [{"target": TARGETS["llama"]}]}
    torch.save(without_dropout(lora_fx.rewrite(traced("llama"), dora, dropout=0.0, seed=0)), tmp_path / "dora.graph")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
    )
    torch.save(lora_fx.trace(transformers.LlamaForCausalLM(config)), tmp_path / "odd.graph")
    torch.save(lora_fx.trace(transformers.LlamaForCausalLM(config), prefix=True), tmp_path / "prompt.graph")
    (tmp_path / "full").mkdir()
    (tmp_path / "full.pt2").touch()
    launch(tmp_path, "refusals")
    first, second = found(tmp_path, "refusals")
    assert first["other"].startswith("process 1 has another graph than process 0, by a digest")
    assert second["other"].startswith("process 0 has another graph than process 1, by a digest")
    assert second["one"].endswith("set p = 0 of each nn.Dropout in graph.modules().")
    assert first["one"] == f"process 1 refused: LoraFxError: {second['one']}"
    for each in (first, second):
        assert "dimension 2 has size 3, which 2 processes cannot share equally" in each["heads"]
        assert each["name"].startswith("'query' is the name of no linear site; there are model.layers.0")
        assert "where the other value is split" in each["column alone"]
        assert "its weight is divided by input, and its input" in each["row alone"]
        assert "lm_head_weight cannot be computed by 2 processes in parts: dimension 0 has size 97" in each["head"]
        assert each["dora"].endswith("it is not divided over processes. Train it with FSDP or DDP.")
        assert each["prompt"].startswith("a graph that takes a prefix or a prompt is not divided")
        assert each["nested"].startswith("expected a flat graph, got a nested one")
        assert float(each["named"]) <= 1e-6
        assert each["ddp"].startswith("this graph has one process's parts of the weights")
        assert each["target"].partition("refused: ")[2 * (each is second)]
        for refused in ("twice", "rewrite", "fully_shard", "stage", "transfer"):
            assert each[refused].startswith("expected a whole graph, got that of process")
        assert each["export"].startswith("expected a whole graph, got that of one of several processes")
        assert "part.pt2: several processes would write this file" in each["one path"]
        assert "full.pt2 exists" in each["one of two paths"]


@pytest.mark.matrix
def test_each_process_exports_its_part_and_the_files_compute_together_what_one_graph_does(tmp_path: Path) -> None:
    prepare("llama", tmp_path)
    launch(tmp_path, "exported")
    graph = torch.load(tmp_path / "llama.graph", weights_only=False).eval()
    with torch.no_grad():
        expected = graph(**torch.load(tmp_path / "llama.inputs")).logits
    whole = [value.numel() for key, value in graph.named_parameters() if key.endswith("down_proj.weight")]
    for each in found(tmp_path, "exported"):
        for file in (each["branched"], each["folded"]):
            assert torch.allclose(file["logits"], expected, rtol=0, atol=1e-6)
            assert [2 * size for size in file["sizes"]] == whole
            assert file["compared"] > 2


def test_a_graph_is_divided_among_processes_alone() -> None:
    with pytest.raises(lora_fx.LoraFxError, match=r"call torch\.distributed\.init_process_group first"):
        lora_fx.parallel.shard(traced("llama"))
