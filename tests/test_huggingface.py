from __future__ import annotations

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
        lora_fx.LoraFxError, match=r"not traced from this GPT2LMHeadModel: they differ in \d+ parameters"
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
        lora_fx.LoraFxError, match=r"differ in 1 parameters, such as 'embeddings.word_embeddings.weight'"
    ):
        huggingface.write_back(transformers.BertModel(config), graph_module)
