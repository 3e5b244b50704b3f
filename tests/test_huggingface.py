from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, PRIMARY, build, inputs
from conftest import set_factors, unchanged
from torch import nn

import lora_fx
from lora_fx import huggingface


@pytest.fixture(scope="module", params=PRIMARY)
def rewritten(request: pytest.FixtureRequest) -> tuple[str, nn.Module, lora_fx.TracedGraphModule]:
    model = build(request.param)
    graph_module = lora_fx.rewrite(model, rules=ARCHITECTURES[request.param].rules, rank=6, alpha=9)
    set_factors(graph_module)
    return request.param, model, graph_module


def run(name: str, model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(**inputs(name, 3, 11, 5), **ARCHITECTURES[name].constants)[0]
    return output


def test_the_model_computes_with_folded_weights_inside_the_block_only(rewritten: Any) -> None:
    name, model, graph_module = rewritten
    base = run(name, model)
    with torch.no_grad():
        branched = graph_module(**inputs(name, 3, 11, 5))[0]
    with unchanged(model), unchanged(graph_module):
        for graph in (graph_module, lora_fx.fold(graph_module)):
            with huggingface.folded(model, graph) as inside:
                assert inside is model
                assert torch.allclose(run(name, model), branched, rtol=0, atol=1e-5)
            assert torch.equal(run(name, model), base)


def test_a_saved_directory_loads_with_from_pretrained(rewritten: Any, tmp_path: Path) -> None:
    name, model, graph_module = rewritten
    with unchanged(model):
        huggingface.save_pretrained(model, graph_module, tmp_path / "merged")
    loaded = type(model).from_pretrained(tmp_path / "merged", local_files_only=True).eval()
    with torch.no_grad():
        assert torch.equal(run(name, loaded), lora_fx.fold(graph_module)(**inputs(name, 3, 11, 5))[0])
    with pytest.raises(lora_fx.LoraFxError, match="exists already"):
        huggingface.save_pretrained(model, graph_module, tmp_path / "merged")


def test_weights_written_back_leave_the_graph_as_it_was() -> None:
    model = build("gpt2")
    graph_module = lora_fx.rewrite(model, rules="gpt2", rank=6, alpha=9)
    set_factors(graph_module)
    before = graph_module(**inputs("gpt2", 3, 11))[0]
    huggingface.write_back(model, graph_module)
    assert torch.equal(graph_module(**inputs("gpt2", 3, 11))[0], before)
    assert torch.allclose(run("gpt2", model), before, rtol=0, atol=1e-5)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_graph_of_another_model_is_refused() -> None:
    graph_module = lora_fx.rewrite(build("bert"), rules="bert")
    with pytest.raises(
        lora_fx.LoraFxError, match=r"not traced from this GPT2LMHeadModel: .*is in one of them only.*and \d+ more"
    ):
        huggingface.write_back(build("gpt2"), graph_module)
    config = transformers.BertConfig(
        vocab_size=98,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    with pytest.raises(
        lora_fx.LoraFxError,
        match=r"'embeddings.word_embeddings.weight' is torch.float32 \(98, 48\) in the model and torch.float32 \(97, 48\)",
    ):
        huggingface.write_back(transformers.BertModel(config), graph_module)


@pytest.mark.parametrize("state", ["branched", "folded", "base"])
def test_a_model_with_other_weights_or_buffers_is_refused(state: str) -> None:
    model = build("bert")
    graph_module = lora_fx.rewrite(model, rules="bert")
    set_factors(graph_module)
    graph = {"branched": graph_module, "folded": lora_fx.fold(graph_module), "base": lora_fx.trace(model)}[state]

    def refused(other: nn.Module, message: str) -> None:
        with unchanged(other), unchanged(graph):
            with pytest.raises(lora_fx.LoraFxError, match=f"not traced from this BertModel: {message}"):
                huggingface.write_back(other, graph)
            with pytest.raises(lora_fx.LoraFxError, match=message), huggingface.folded(other, graph):
                pass

    torch.manual_seed(5)
    refused(
        transformers.BertModel(model.config), r"'embeddings.word_embeddings.weight' has other values; .*and \d+ more"
    )
    refused(copy.deepcopy(model).half(), r"'.*' is torch.float16 .* in the model and torch.float32")
    other = copy.deepcopy(model)
    other.pooler.dense.bias.data[0] += 1
    refused(other, r"'pooler.dense.bias' has other values. .*load_state_dict")
    other = copy.deepcopy(model)
    other.embeddings.position_ids += 1
    refused(other, "'embeddings.position_ids' has other values")
    other = copy.deepcopy(model)
    other.encoder.layer[0].output.LayerNorm.weight = other.encoder.layer[1].output.LayerNorm.weight
    refused(
        other, "'encoder.layer.1.output.LayerNorm.weight' and 'encoder.layer.0.output.LayerNorm.weight' are one tensor"
    )


def test_a_copy_of_the_model_is_taken_by_its_values(rewritten: Any) -> None:
    name, model, graph_module = rewritten
    other = copy.deepcopy(model)
    for graph in (graph_module, lora_fx.fold(graph_module)):
        with unchanged(other), huggingface.folded(other, graph), huggingface.folded(model, graph):
            assert torch.equal(run(name, other), run(name, model))
    loaded = copy.deepcopy(graph_module)
    loaded.load_state_dict(copy.deepcopy(graph_module.state_dict()))
    with unchanged(model), huggingface.folded(model, loaded), huggingface.folded(other, graph_module):
        assert torch.equal(run(name, other), run(name, model))


def test_ties_of_the_model_are_kept() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.a(x))  # type: ignore[no-any-return]

    model, x = Shares().eval(), torch.randn(3, 4)
    graph_module = lora_fx.rewrite(model, {"select": [{"target": ["a"], "rank": 2}]}, example_inputs=(x,))
    set_factors(graph_module)
    for graph in (graph_module, lora_fx.fold(graph_module)):
        written = copy.deepcopy(model)
        huggingface.write_back(written, graph)
        assert written.a.weight is written.b.weight
        assert torch.allclose(written(x), graph_module(x), atol=1e-5)
    untied = copy.deepcopy(model)
    untied.b.weight = nn.Parameter(untied.a.weight.detach().clone())
    with pytest.raises(lora_fx.LoraFxError, match=r"'b.weight' and 'a.weight' are one tensor in one of them only"):
        huggingface.write_back(untied, graph_module)
