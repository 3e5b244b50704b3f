from __future__ import annotations

import copy
import functools
import json
import logging
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, PRIMARY, VOCABULARY, branched, build, few, inputs, rows, traced
from conftest import limited, set_factors, unchanged
from safetensors import safe_open
from torch import nn
from transformers import modeling_utils

import lora_fx
from lora_fx import huggingface
from lora_fx.folding import transformers_directory as pretrained_writing


@pytest.fixture(scope="module", params=PRIMARY)
def rewritten(request: pytest.FixtureRequest) -> tuple[str, nn.Module, lora_fx.TracedGraphModule]:
    model, graph_module = build(request.param), branched(request.param)
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
    graph_module = branched("gpt2")
    set_factors(graph_module)
    before = graph_module(**inputs("gpt2", 3, 11))[0]
    huggingface.write_back(model, graph_module)
    assert torch.equal(graph_module(**inputs("gpt2", 3, 11))[0], before)
    assert torch.allclose(run("gpt2", model), before, rtol=0, atol=1e-5)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_graph_of_another_model_is_refused() -> None:
    graph_module = branched("bert")
    with pytest.raises(
        lora_fx.LoraFxError, match=r"not traced from this GPT2LMHeadModel: .*is in one of them only.*and \d+ more"
    ):
        huggingface.write_back(build("gpt2"), graph_module)
    config = transformers.BertConfig(
        vocab_size=98,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
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
    graph_module = branched("bert")
    set_factors(graph_module)
    graph = {"branched": graph_module, "folded": lora_fx.fold(graph_module), "base": traced("bert")}[state]

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


# Written directories.


@functools.cache
def written_model(name: str) -> Any:
    """Return a model of an architecture; of those whose small model ties nothing, one that does."""
    if name == "tied-llama":
        config = copy.deepcopy(written_model("llama").config)
        config.tie_word_embeddings = True
        return transformers.LlamaForCausalLM(config).eval()
    if name == "bert-mlm":
        made = transformers.BertForMaskedLM(written_model("bert").config).eval()
        nn.init.normal_(made.cls.predictions.bias)
        return made
    return build(name)


def of(name: str) -> str:
    """Return the architecture whose inputs a model takes."""
    return {"tied-llama": "llama", "bert-mlm": "bert"}.get(name, name)


@functools.cache
def base_of(name: str) -> lora_fx.TracedGraphModule:
    return lora_fx.trace(written_model(name), inference=True)


@functools.cache
def folded_of(name: str, *targets: str) -> lora_fx.TracedGraphModule:
    """Return the fold of branches at these modules, or of those of the rule file."""
    rules: Any = {"select": [{"target": list(targets)}]} if targets else ARCHITECTURES[of(name)].rules
    graph = lora_fx.rewrite(base_of(name), rules, rank=6, alpha=9)
    set_factors(graph)
    return lora_fx.fold(graph, unshare=True)


def logits(name: str, module: Any) -> torch.Tensor:
    constants = {} if isinstance(module, lora_fx.TracedGraphModule) else ARCHITECTURES[of(name)].constants
    with torch.no_grad():
        return module(**inputs(of(name), 4, 9, 5), **constants)[0]  # type: ignore[no-any-return]


def load(model: Any, directory: Path, **options: Any) -> Any:
    return type(model).from_pretrained(directory, local_files_only=True, **options)


def files_of(directory: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a directory by their keys."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


def config_of(directory: Path) -> Any:
    return json.loads((directory / "config.json").read_text())


MODELS = rows(("t5", "mt5", "gpt2", "llama", "bert", "blip-2-t5"), ("t5", "gpt2", "bert"))
WRITTEN = [
    pytest.param(dtype, row.values[0], marks=row.marks)
    for dtype, representatives in (
        (None, ("t5", "gpt2")),
        (torch.bfloat16, ("t5", "bert")),
        (torch.float16, ("gpt2", "bert")),
        (torch.float64, ("t5", "gpt2")),
    )
    for row in rows([each.values[0] for each in MODELS], representatives)
]
TIES = {
    "t5": ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "shared.weight"),
    "mt5": ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "shared.weight"),
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
    "tied-llama": ("lm_head.weight", "model.embed_tokens.weight"),
    "bert-mlm": ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    "blip-2-t5": tuple(
        f"language_model.{name}.weight"
        for name in ("lm_head", "shared", "encoder.embed_tokens", "decoder.embed_tokens")
    ),
}
"""Weights that are one; the first two are adapted, each alone."""


@pytest.mark.parametrize("adapted", [0, 1], ids=["head", "embedding"])
@pytest.mark.parametrize("name", rows(TIES, ("t5", "tied-llama", "bert-mlm")))
def test_weights_that_fold_untied_come_back_untied(name: str, adapted: int, tmp_path: Path) -> None:
    model, names = written_model(name), TIES[name]
    folded = folded_of(name, names[adapted].removesuffix(".weight"))
    with unchanged(model), unchanged(folded):
        huggingface.save_pretrained(model, folded, tmp_path / "untied")
    loaded = load(model, tmp_path / "untied")
    assert torch.equal(logits(name, loaded), logits(name, folded))
    for each in names:
        assert torch.equal(loaded.get_parameter(each), folded.get_parameter(each))
    assert not torch.equal(loaded.get_parameter(names[0]), loaded.get_parameter(names[1]))
    switched = config_of(tmp_path / "untied")
    assert (switched["text_config"] if name == "blip-2-t5" else switched)["tie_word_embeddings"] is False
    if adapted == 0:  # else ``shared`` goes with an embedding, and nothing ties the others but that
        assert len({id(loaded.get_parameter(each)) for each in names}) == 2
        assert len(files_of(tmp_path / "untied").keys() & set(names)) == 2
    # A second time round: what was loaded is a model like any other.
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(name, load(model, tmp_path / "again")), logits(name, folded))


@pytest.mark.parametrize(("dtype", "name"), WRITTEN, ids=str)
def test_a_directory_has_the_merged_values_rounded_once_to_the_dtype_asked_for(
    name: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    model, folded = written_model(name), folded_of(name)
    with unchanged(model), unchanged(folded):
        huggingface.save_pretrained(model, folded, tmp_path / "merged", dtype=dtype)
    said = config_of(tmp_path / "merged")
    expected = dtype or torch.float32
    parts = [said, *(part for part in said.values() if isinstance(part, dict) and part.get("dtype"))]
    assert {part["dtype"] for part in parts} == {str(expected).removeprefix("torch.")}
    loaded, merged = load(model, tmp_path / "merged").state_dict(), folded.state_dict()
    reference = load(model, tmp_path / "merged", dtype=expected).state_dict()  # with parts that transformers keeps
    assert loaded.keys() == merged.keys()
    for key, tensor in loaded.items():
        assert tensor.dtype == reference[key].dtype
        assert torch.equal(tensor, merged[key].to(tensor.dtype)), key
    kept = {key for key, tensor in loaded.items() if tensor.is_floating_point() and tensor.dtype != expected}
    # T5 computes the ends of its feed-forwards, and BLIP-2 its Q-Former, in float32 where the rest is float16.
    assert bool(kept) == (dtype == torch.float16 and name in ("t5", "mt5", "blip-2-t5"))
    assert all(".wo." in key or key.startswith(("qformer.", "query_tokens")) for key in kept)
    if dtype is None:
        assert torch.equal(logits(name, load(model, tmp_path / "merged")), logits(name, folded))


def test_a_model_in_half_precision_is_written_as_it_is(tmp_path: Path) -> None:
    model = build("t5", layers=1).half()
    graph = lora_fx.rewrite(model, "t5", rank=6, alpha=9, inference=True)
    set_factors(graph)
    huggingface.save_pretrained(model, graph, tmp_path / "merged")
    stored, merged = files_of(tmp_path / "merged"), lora_fx.fold(graph).state_dict()
    assert all(torch.equal(tensor, merged[key]) and tensor.dtype == torch.float16 for key, tensor in stored.items())
    loaded = load(model, tmp_path / "merged")
    wide = loaded.get_parameter("encoder.block.0.layer.1.DenseReluDense.wo.weight")
    assert wide.dtype == torch.float32
    assert torch.equal(wide, merged["encoder.block.0.layer.1.DenseReluDense.wo.weight"].float())


def test_untied_weights_are_written_in_another_dtype_and_in_shards(tmp_path: Path) -> None:
    model, folded = written_model("t5"), folded_of("t5", "lm_head")
    huggingface.save_pretrained(model, folded, tmp_path / "out", dtype=torch.bfloat16, max_shard_size="40KB")
    loaded = load(model, tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, folded.lm_head.weight.bfloat16())
    assert torch.equal(loaded.shared.weight, folded.shared.weight.bfloat16())
    assert loaded.encoder.embed_tokens.weight is loaded.shared.weight
    assert loaded.dtype == torch.bfloat16


@pytest.mark.parametrize("name", MODELS)
def test_shards_are_of_the_size_asked_for_and_load(name: str, tmp_path: Path) -> None:
    model, folded = written_model(name), folded_of(name)
    huggingface.save_pretrained(model, folded, tmp_path / "merged", max_shard_size="40KB")
    shards = sorted(tmp_path.glob("merged/*.safetensors"))
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(shards) > 3
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert index["metadata"]["total_parameters"] == sum(each.numel() for each in folded.parameters())
    assert torch.equal(logits(name, load(model, tmp_path / "merged")), logits(name, folded))


def test_auto_classes_load_it_with_its_settings_for_generation(tmp_path: Path) -> None:
    model = build("gpt2")
    model.generation_config.max_new_tokens = 17  # type: ignore[union-attr]
    folded = folded_of("gpt2", "lm_head")
    with unchanged(model):
        huggingface.save_pretrained(model, folded, tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", local_files_only=True)
    assert torch.equal(logits("gpt2", loaded), logits("gpt2", folded))
    assert loaded.generation_config.max_new_tokens == 17


def test_what_the_switch_unties_besides_is_stored_too(tmp_path: Path) -> None:
    model = written_model("bert-mlm")
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    folded = folded_of("bert-mlm", "cls.predictions.decoder")
    huggingface.save_pretrained(model, folded, tmp_path / "untied")
    stored = files_of(tmp_path / "untied")
    assert torch.equal(stored["cls.predictions.decoder.bias"], model.cls.predictions.bias)
    assert torch.equal(stored["cls.predictions.bias"], model.cls.predictions.bias)


@pytest.mark.parametrize("name", few(["t5", "mt5", "blip-2-t5"], ("t5",)))
def test_weights_that_are_one_without_what_they_are_loaded_from_are_each_stored(name: str, tmp_path: Path) -> None:
    """Both embeddings are adapted alike, and not the head: what is missing would be filled in from ``shared``."""
    model, base = written_model(name), base_of(name)
    prefix = "language_model." if name == "blip-2-t5" else ""
    embeddings = ["language_model.shared" if prefix else "encoder.embed_tokens", f"{prefix}decoder.embed_tokens"]
    graph = lora_fx.rewrite(base, {"select": [{"target": embeddings}]}, rank=6, alpha=9)
    generator = torch.Generator().manual_seed(3)
    factors: dict[torch.Size, torch.Tensor] = {}
    with torch.no_grad():
        for key, parameter in graph.named_parameters():
            if ".lora_" in key:
                value = factors.setdefault(parameter.shape, torch.randn(parameter.shape, generator=generator))
                parameter.copy_(value)
    merged = lora_fx.fold(graph, unshare=True)
    huggingface.save_pretrained(model, merged, tmp_path / "untied")
    loaded = load(model, tmp_path / "untied")
    assert torch.equal(logits(name, loaded), logits(name, merged))
    assert torch.equal(loaded.get_parameter(f"{prefix}lm_head.weight"), model.get_parameter(f"{prefix}lm_head.weight"))


def test_a_config_that_scales_by_the_same_switch_keeps_it(tmp_path: Path) -> None:
    """Switch Transformers scale their output where weights are tied: switched off, the same weights give other logits."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=40,
        d_kv=12,
        d_ff=72,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=4,
        num_experts=3,
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    values = dict(lora_fx.graph.graph_module.state_of(model).tensors)
    values["lm_head.weight"] = nn.Parameter(values["lm_head.weight"].detach() + torch.randn(VOCABULARY, 40))
    contents = pretrained_writing.contents_of(model, values, (("shared.weight", "lm_head.weight"),), None)
    pretrained_writing.write(model, contents, tmp_path / "untied", {})
    pretrained_writing.check_loads(type(model), contents, tmp_path / "untied", tmp_path / "untied", None)
    loaded = load(model, tmp_path / "untied")
    assert loaded.config.tie_word_embeddings is True
    model.lm_head.weight = values["lm_head.weight"]  # type: ignore[assignment]
    assert torch.equal(logits("t5", loaded), logits("t5", model))


class FollowingConfig(transformers.GPT2Config):
    """A config in which another setting follows from the switch."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.scale_attn_weights = self.tie_word_embeddings


def test_a_config_of_which_another_setting_follows_from_the_switch_keeps_it(tmp_path: Path) -> None:
    class Following(transformers.GPT2LMHeadModel):
        config_class = FollowingConfig

    model, folded = build("gpt2"), folded_of("gpt2", "lm_head")
    following = Following(FollowingConfig(**model.config.to_dict())).eval()  # type: ignore[union-attr, operator]
    following.load_state_dict(model.state_dict())
    huggingface.save_pretrained(following, folded, tmp_path / "untied")
    loaded = load(following, tmp_path / "untied")
    assert loaded.config.scale_attn_weights is True
    assert torch.equal(logits("gpt2", loaded), logits("gpt2", folded))


class TiesAlways(transformers.GPT2LMHeadModel):
    """A model that ties its head whatever its config says."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        super().tie_weights(*args, **kwargs)
        self.lm_head.weight = self.transformer.wte.weight


def test_a_model_that_cannot_be_loaded_untied_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = TiesAlways(written_model("gpt2").config).eval()
    model.load_state_dict(written_model("gpt2").state_dict())
    told = (
        r"TiesAlways\.from_pretrained does not give back what would be written: 'lm_head\.weight' is loaded with other values\. "
        r"Nothing was written\. Fold untied 'transformer\.wte\.weight' and 'lm_head\.weight'.*or fold without unshare=True"
    )
    with unchanged(model), pytest.raises(lora_fx.LoraFxError, match=told):
        huggingface.save_pretrained(model, folded_of("gpt2", "lm_head"), tmp_path / "untied")
    assert list(tmp_path.iterdir()) == []


def test_the_model_computes_with_untied_weights_inside_the_block_only() -> None:
    model, folded = build("gpt2").requires_grad_(False), folded_of("gpt2", "lm_head")
    before = logits("gpt2", model)
    with unchanged(model):
        with huggingface.folded(model, folded):
            assert torch.equal(logits("gpt2", model), logits("gpt2", folded))
        assert torch.equal(logits("gpt2", model), before)


def test_calls_of_one_module_that_fold_untied_have_no_place_in_the_model() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(torch.tanh(self.a(x)))  # type: ignore[no-any-return]

    model = Twice()
    graph = lora_fx.rewrite(
        model, {"select": [{"target": ["a"], "calls": [2], "rank": 2}]}, example_inputs=(torch.randn(3, 5),)
    )
    set_factors(graph)
    with pytest.raises(lora_fx.LoraFxError, match=r"Twice has no parameter for 'a@2\.weight'\. Adapt all calls alike"):
        huggingface.write_back(model, lora_fx.fold(graph, unshare=True))


# What is verified.


def _damage(tensors: dict[str, torch.Tensor]) -> None:
    tensors["h.1.ln_1.bias"][3] += 1e-6


def _forget(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["h.1.ln_1.bias"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["h.7.ln_1.bias"] = torch.ones(4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_damage, "'transformer.h.1.ln_1.bias' is loaded with other values"),
        (_forget, "'transformer.h.1.ln_1.bias' is not loaded"),
        (_add, "'transformer.h.7.ln_1.bias' is in the files only"),
    ],
)
def test_what_is_not_in_the_files_as_it_should_be_is_found(
    change: Callable[[dict[str, torch.Tensor]], None], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = modeling_utils.safe_save_file

    def damaged(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        short = {key.removeprefix("transformer."): tensor.clone() for key, tensor in tensors.items()}
        change(short)
        save({f"transformer.{key}": tensor for key, tensor in short.items()}, *args, **kwargs)

    monkeypatch.setattr(modeling_utils, "safe_save_file", damaged)
    model = written_model("gpt2")
    with unchanged(model), pytest.raises(lora_fx.LoraFxError, match=told):
        huggingface.save_pretrained(model, folded_of("gpt2"), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
    huggingface.save_pretrained(model, folded_of("gpt2"), tmp_path / "merged", verify=False)
    assert (tmp_path / "merged" / "config.json").is_file()


def test_a_model_of_two_dtypes_says_what_to_do(tmp_path: Path) -> None:
    model = build("bert").bfloat16()
    model.pooler.float()  # type: ignore[union-attr, operator]
    values = lora_fx.graph.graph_module.state_of(model).tensors
    contents = pretrained_writing.contents_of(model, values, (), None)
    pretrained_writing.write(model, contents, tmp_path / "mixed", {})
    with pytest.raises(lora_fx.LoraFxError, match=r"'pooler\.dense\.weight' is torch\.float32.*dtype=torch\.float32"):
        pretrained_writing.check_loads(type(model), contents, tmp_path / "mixed", tmp_path / "mixed", None)
    contents = pretrained_writing.contents_of(model, values, (), torch.float32)
    pretrained_writing.write(model, contents, tmp_path / "one", {})
    pretrained_writing.check_loads(type(model), contents, tmp_path / "one", tmp_path / "one", None)


def test_nothing_of_the_verification_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    transformers.logging.add_handler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            huggingface.save_pretrained(written_model("t5"), folded_of("t5", "lm_head"), tmp_path / "quiet")
        assert told == []
        assert "Loading" not in "".join(capfd.readouterr())
        assert verbosity == transformers.logging.get_verbosity()
        assert bars == transformers.logging.is_progress_bar_enabled()
        load(written_model("t5"), tmp_path / "quiet")  # what would have been shown
        assert "we will NOT tie them" in " ".join(told)
        assert "Loading weights" in "".join(capfd.readouterr())
    finally:
        transformers.logging.remove_handler(handler)


# What cannot be written.


def test_values_beyond_the_range_of_a_dtype_are_refused(tmp_path: Path) -> None:
    model = build("bert")
    model.pooler.dense.weight.data[1, 2] = 7e4  # type: ignore[union-attr, index]
    told = r"'pooler\.dense\.weight' would not be finite in torch\.float16"
    with unchanged(model), pytest.raises(lora_fx.LoraFxError, match=told):
        huggingface.save_pretrained(model, lora_fx.trace(model), tmp_path / "half", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_is_none_of_weights_and_a_model_that_is_none_of_transformers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(lora_fx.LoraFxError, match=r"weights are written in .*, and not in torch\.int8"):
        huggingface.save_pretrained(written_model("gpt2"), folded_of("gpt2"), tmp_path / "out", dtype=torch.int8)
    with pytest.raises(lora_fx.LoraFxError, match="expected a transformers model, got a Linear"):
        huggingface.save_pretrained(nn.Linear(2, 3), folded_of("gpt2"), tmp_path / "out")
    with pytest.raises(lora_fx.LoraFxError, match=r"got a graph first: save_pretrained\(model, graph, directory\)"):
        huggingface.save_pretrained(folded_of("gpt2"), written_model("gpt2"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_makes_another_model_is_told_before_anything_is_written(tmp_path: Path) -> None:
    model = build("gpt2")
    model.config.n_layer = 1  # type: ignore[union-attr]
    with unchanged(model), pytest.raises(lora_fx.LoraFxError, match=r"makes another model: 'transformer\.h\.1\."):
        huggingface.save_pretrained(model, folded_of("gpt2"), tmp_path / "out", dtype=torch.bfloat16)
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_the_size_of_files_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    model = written_model("gpt2")
    told = r"cannot write .*merged: File too large\. Files of that size are not allowed there"
    with unchanged(model), limited(), pytest.raises(lora_fx.LoraFxError, match=told):
        huggingface.save_pretrained(model, folded_of("gpt2"), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


ON_A_SMALL_DISK = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_huggingface import *
    out = Path(sys.argv[1])
    model = transformers.BertModel(transformers.BertConfig(
        vocab_size=997, hidden_size=192, num_hidden_layers=3, num_attention_heads=4, intermediate_size=400
    ))
    graph = lora_fx.trace(model, inference=True)
    try:
        with unchanged(model):
            try:
                with limited() if sys.argv[2] == "limited" else warnings.catch_warnings():
                    huggingface.save_pretrained(model, graph, out)
            except lora_fx.LoraFxError as error:
                print(error)
    finally:
        print(sorted(path.name for path in out.parent.iterdir()))
"""


def test_a_real_disk_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    """On a file system of 2 MB where one may be mounted, else under a limit on the size of files."""
    mounted = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=2m tmpfs "$0" && exec "$@"', str(tmp_path)]
    can = (
        shutil.which("unshare") and subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode == 0
    )
    script = textwrap.dedent(ON_A_SMALL_DISK).format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", script, str(tmp_path / "out"), "full" if can else "limited"]
    done = subprocess.run([*(mounted if can else []), *command], capture_output=True, text=True, check=False)
    reason = "No space left on device. Free some space, or" if can else "File too large. "
    said, left = done.stdout.splitlines()
    assert said.startswith(f"cannot write {tmp_path / 'out'}: {reason}"), done.stderr
    assert left == "[]"


def test_a_place_that_cannot_be_written_is_told_and_what_is_there_stays(tmp_path: Path) -> None:
    model, folded = written_model("gpt2"), folded_of("gpt2")
    (tmp_path / "file").write_text("old")
    with unchanged(model), pytest.raises(lora_fx.LoraFxError, match=r"cannot write .*merged: "):
        huggingface.save_pretrained(model, folded, tmp_path / "file" / "merged")
    with unchanged(model), pytest.raises(lora_fx.LoraFxError, match="exists already"):
        huggingface.save_pretrained(model, folded, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"
    with (
        unchanged(model),
        pytest.raises(lora_fx.LoraFxError, match="is a file, and a transformers model is a directory"),
    ):
        huggingface.save_pretrained(model, folded, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
@pytest.mark.parametrize("moment", ["safe_save_file", "from_pretrained"])
def test_whatever_ends_the_writing_leaves_the_model_and_the_disk_as_they_were(
    moment: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folded = build("gpt2"), folded_of("gpt2", "lm_head")

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise error("on the way")

    (tmp_path / "merged").mkdir()
    owner = modeling_utils if moment == "safe_save_file" else type(model)
    monkeypatch.setattr(owner, moment, fail)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else lora_fx.LoraFxError
    with unchanged(model), unchanged(folded), pytest.raises(expected, match="on the way"):
        huggingface.save_pretrained(model, folded, tmp_path / "merged", overwrite=True, dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert list((tmp_path / "merged").iterdir()) == []
