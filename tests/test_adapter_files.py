"""Adapters in every form in which they are found: pickles, whole state dicts, keys of older transformers, parts of the base."""

from __future__ import annotations

import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import few
from conftest import set_factors
from safetensors.torch import load_file, save_file
from torch import nn
from transformers_releases import PEFT_FINDS_OLDER_VISION_LANGUAGE_MODELS

import lora_fx
from lora_fx.folding.checkpoint_plan import fold_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

IDS = torch.arange(3, 15).reshape(2, 6)
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
SIZES = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}


def llama(**changes: Any) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "attention_bias": True, **changes})
    ).eval()


def classifier() -> transformers.BertForSequenceClassification:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3)).eval()


def wrapped(base: nn.Module, **config: Any) -> peft.PeftModel:
    """Return PEFT's model with an adapter whose B is not zero, and whose trained copies have other values than the base."""
    said = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**said)).eval()
    set_factors(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter.dtype))
    return model


def loaded_by_peft(base: nn.Module, directory: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), directory).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


@pytest.fixture(scope="module")
def base() -> lora_fx.TracedGraphModule:
    return lora_fx.trace(llama())


@pytest.fixture(scope="module")
def model() -> peft.PeftModel:
    return wrapped(llama())


@pytest.fixture
def directory(model: peft.PeftModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# The file.


def as_pickle(directory: Path, tensors: Any, **options: Any) -> Path:
    (directory / "adapter_model.safetensors").unlink(missing_ok=True)
    torch.save(tensors, directory / "adapter_model.bin", **options)
    return directory


def refused(base: lora_fx.TracedGraphModule, directory: Path, *messages: str) -> None:
    with pytest.raises(lora_fx.AdapterError) as caught:
        lora_fx.load_adapter(base, directory)
    for message in messages:
        assert message in str(caught.value), str(caught.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_pickle_is_read_as_peft_reads_it(
    base: lora_fx.TracedGraphModule, model: peft.PeftModel, directory: Path, zipped: bool
) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    as_pickle(directory, tensors, _use_new_zipfile_serialization=zipped)
    graph = lora_fx.load_adapter(base, directory)
    assert torch.equal(logits(graph), logits(loaded_by_peft(llama(), directory)))
    assert torch.equal(logits(graph), logits(model))


class _Code:
    """What a pickle could run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_with_code_is_refused_and_not_run(
    base: lora_fx.TracedGraphModule, directory: Path, tmp_path: Path
) -> None:
    as_pickle(directory, {"a": torch.ones(2), "b": _Code(tmp_path / "ran")})
    refused(
        base,
        directory,
        "adapter_model.bin: expected a file of torch.save with tensors alone, since no code in it is run",
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "adapter_model.bin: expected tensors by their keys, got list"),
        ({"a": 3}, "adapter_model.bin: 'a': expected a dense tensor with values, got int"),
        ({5: torch.ones(2)}, "adapter_model.bin: 5: expected a dense tensor with values"),
        (
            {"a": torch.ones(2).to_sparse()},
            "adapter_model.bin: 'a': expected a dense tensor with values, got a torch.sparse_coo tensor",
        ),
    ],
    ids=["a list", "a number", "a key that is no text", "sparse"],
)
def test_a_pickle_of_anything_but_tensors_is_refused(
    base: lora_fx.TracedGraphModule, directory: Path, content: Any, message: str
) -> None:
    refused(base, as_pickle(directory, content), message)


def test_a_pickle_that_is_cut_off_is_refused(base: lora_fx.TracedGraphModule, directory: Path) -> None:
    path = as_pickle(directory, {"a": torch.ones(2)}) / "adapter_model.bin"
    path.write_bytes(path.read_bytes()[:300])
    refused(base, directory, "adapter_model.bin: expected a file of torch.save with tensors alone")


def test_a_view_that_claims_to_be_huge_is_refused_by_its_shape(
    base: lora_fx.TracedGraphModule, model: peft.PeftModel, directory: Path
) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    key = next(iter(tensors))
    huge = {"base_model.model.lm_head.weight": torch.ones(1).expand(2**30, 2**20)}
    as_pickle(directory, {**tensors, **huge, key: torch.ones(1).expand(2**40, 24)})
    refused(base, directory, "got (1099511627776, 24)")


# The keys.


def named(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key.replace(".weight", f".{name}.weight"): value for key, value in tensors.items()}


@pytest.mark.parametrize("name", ["default", "my-adapter", "weight"])
def test_keys_with_the_name_of_the_adapter_are_read(
    base: lora_fx.TracedGraphModule, model: peft.PeftModel, directory: Path, name: str
) -> None:
    path = directory / "adapter_model.safetensors"
    save_file(named(load_file(path), name), path)
    assert torch.equal(logits(lora_fx.load_adapter(base, directory)), logits(model))


def test_a_whole_state_dict_of_a_peft_model_is_read_and_its_base_is_compared(
    base: lora_fx.TracedGraphModule, model: peft.PeftModel, directory: Path
) -> None:
    whole = dict(model.state_dict())
    as_pickle(directory, whole)
    assert torch.equal(logits(lora_fx.load_adapter(base, directory)), logits(model))
    as_pickle(directory, {f"module.{key}": value for key, value in whole.items()})
    assert torch.equal(logits(lora_fx.load_adapter(base, directory)), logits(model))
    half = {key: value if ".lora_" in key else value.bfloat16() for key, value in whole.items()}
    assert torch.equal(logits(lora_fx.load_adapter(base, as_pickle(directory, half))), logits(model))
    key = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    as_pickle(directory, {**whole, key: whole[key] + 1})
    refused(base, directory, f"{key}: another value than the model's 'model.layers.0.self_attn.q_proj.weight'")


def test_a_whole_state_dict_with_a_trained_head_and_embeddings_is_read(tmp_path: Path) -> None:
    task = {"task_type": "SEQ_CLS", "target_modules": ["query", "word_embeddings"]}
    model = wrapped(classifier(), **task)
    model.save_pretrained(tmp_path)
    graph = lora_fx.from_adapter(classifier(), as_pickle(tmp_path, dict(model.state_dict())))
    assert torch.equal(logits(graph), logits(model))


def test_the_tensors_of_two_adapters_are_refused_by_their_names(
    base: lora_fx.TracedGraphModule, directory: Path
) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**named(tensors, "style"), **named(copy.deepcopy(tensors), "facts")}, path)
    refused(
        base, directory, "adapter_model.safetensors: expected one adapter, got factors of 'facts', 'style'. Save each"
    )
    save_file({**named(tensors, "style"), **copy.deepcopy(tensors)}, path)
    refused(base, directory, "lora_A.style.weight and ", "are one tensor")


# Values.


@pytest.fixture(scope="module")
def half_base() -> lora_fx.TracedGraphModule:
    return lora_fx.trace(classifier().to(torch.bfloat16))


def test_a_head_in_float32_beside_half_precision_is_rounded_with_a_warning(
    half_base: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    wrapped(classifier(), target_modules=["query"], task_type="SEQ_CLS").save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match="classifier.weight, classifier.bias: saved in float32, rounded to bfloat16, the dtype"
    ) as caught:
        graph = lora_fx.load_adapter(half_base, tmp_path)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert torch.equal(logits(graph), logits(loaded_by_peft(classifier().to(torch.bfloat16), tmp_path)))


def test_a_value_that_half_precision_has_not_is_refused(tmp_path: Path) -> None:
    base = lora_fx.trace(classifier().to(torch.float16))
    wrapped(classifier(), target_modules=["query"], task_type="SEQ_CLS").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.classifier.bias"][1] = 70_000
    save_file(tensors, path)
    refused(base, tmp_path, "classifier.bias: expected numbers within ±65504, which torch.float16 has, found 1 beyond")


def test_a_checkpoint_fold_reads_all_forms_and_says_what_it_rounds(tmp_path: Path) -> None:
    classifier().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = wrapped(classifier(), target_modules=["query"], task_type="SEQ_CLS")
    model.save_pretrained(tmp_path / "adapter")
    as_pickle(tmp_path / "adapter", dict(model.state_dict()))
    with pytest.warns(UserWarning, match="classifier.weight, classifier.bias: saved in float32, rounded to bfloat16"):
        fold_checkpoint(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out", verify=True)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(merged["classifier.weight"], head.detach().to(torch.bfloat16))


# Embeddings and heads.


def resized(tie: bool = False, seed: int = 0) -> transformers.LlamaForCausalLM:
    """Return a model with 7 tokens more than its config had, whose new rows depend on the seed."""
    model = llama(tie_word_embeddings=tie)
    torch.manual_seed(seed)
    model.resize_token_embeddings(67, mean_resizing=False)
    return model


def test_a_model_with_a_resized_vocabulary_has_the_mode_that_it_was_given() -> None:
    assert not lora_fx.trace(resized()).training
    mixed = resized()
    mixed.model.layers[0].train()
    with pytest.raises(lora_fx.TraceError, match=r"in train mode are model\.layers\.0, model\.layers\.0\.self_attn"):
        lora_fx.trace(mixed)


@pytest.mark.parametrize("tie", few([False, True], [True]), ids=["untied", "tied"])
def test_resized_embeddings_are_trained_copies(tie: bool, tmp_path: Path) -> None:
    model = wrapped(resized(tie))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    other = resized(tie, seed=5).eval()
    with pytest.warns(
        UserWarning, match=r"model\.embed_tokens\.weight: other values than the model's, as of a resized"
    ) as caught:
        graph = lora_fx.from_adapter(other, tmp_path)
    assert len(caught) == 1
    assert torch.equal(logits(graph), logits(loaded_by_peft(other, tmp_path)))
    assert torch.equal(logits(graph), logits(model))
    folded = lora_fx.fold(graph, unshare=tie)
    assert torch.allclose(logits(folded), logits(graph), atol=1e-5)
    lora_fx.save_adapter(graph, tmp_path / "again")
    assert torch.equal(logits(lora_fx.from_adapter(other, tmp_path / "again")), logits(graph))
    assert torch.equal(logits(loaded_by_peft(other, tmp_path / "again")), logits(graph))


def test_resized_embeddings_are_folded_into_a_checkpoint(tmp_path: Path) -> None:
    model = wrapped(resized())
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    other = resized(seed=5)
    other.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"lm_head.weight, model.embed_tokens.weight: other values than the model's"):
        fold_checkpoint(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out", verify=True)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)
    assert torch.equal(merged.lm_head.weight, model.get_output_embeddings().weight)


def test_resized_embeddings_with_a_branch_beside_them_are_refused(tmp_path: Path) -> None:
    model = wrapped(resized(), target_modules=["q_proj", "embed_tokens"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    refused(
        lora_fx.trace(resized(seed=5).eval()),
        tmp_path,
        "embed_tokens.base_layer.weight: another value than the model's 'model.embed_tokens.weight', as of a resized vocabulary, and a "
        "branch beside it. Give the model this value before it is traced",
    )
    given = resized(seed=5).eval()
    given.model.embed_tokens, given.lm_head = model.get_input_embeddings().base_layer, model.get_output_embeddings()
    assert torch.equal(logits(lora_fx.from_adapter(given, tmp_path)), logits(model))


def test_an_embedding_of_another_size_says_how_to_resize(base: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    wrapped(resized()).save_pretrained(tmp_path, save_embedding_layers=True)
    refused(
        base,
        tmp_path,
        "base_model.model.model.embed_tokens.weight: expected shape (60, 24), as model.embed_tokens.weight in the graph, got (67, 24). If "
        "the vocabulary was resized in training, resize it before the trace: model.resize_token_embeddings(67)",
    )


def test_a_tied_parameter_that_trains_as_one_is_one_copy(tmp_path: Path) -> None:
    model = wrapped(
        llama(tie_word_embeddings=True), modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True
    )
    model.save_pretrained(tmp_path)
    graph = lora_fx.from_adapter(llama(tie_word_embeddings=True), tmp_path)
    assert torch.equal(logits(graph), logits(model))
    assert torch.equal(logits(lora_fx.fold(graph)).argmax(-1), logits(model).argmax(-1))


def test_a_tied_parameter_that_peft_untied_loads_onto_a_tied_and_an_untied_model(tmp_path: Path) -> None:
    model = wrapped(llama(tie_word_embeddings=True), modules_to_save=["embed_tokens", "lm_head"])
    model.save_pretrained(tmp_path)
    tied = llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="training and fold untie them"):
        assert torch.equal(logits(lora_fx.from_adapter(tied, tmp_path)), logits(model))
    tied.config.tie_word_embeddings = False
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    assert torch.equal(logits(lora_fx.from_adapter(tied, tmp_path)), logits(model))


def test_a_branch_at_a_module_that_is_never_called_is_left_out_with_a_warning(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=60, d_model=24, d_kv=8, d_ff=40, num_layers=1, num_heads=3)
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    model = wrapped(t5, target_modules=["shared", "q"])
    model.save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match="has branches at shared, which the model never computes with; they are left out"
    ):
        graph = lora_fx.from_adapter(t5, tmp_path)
    inputs = {**INPUTS, "decoder_input_ids": IDS[:, :4]}
    with torch.no_grad():
        assert torch.equal(graph(**inputs).logits, model(**inputs).logits)


# Names that transformers changed.


def moved(directory: Path, old: str, new: str, **config: Any) -> Path:
    """Rename a part of the keys, and say other things in the config."""
    path = directory / "adapter_model.safetensors"
    save_file({key.replace(old, new, 1): value for key, value in load_file(path).items()}, path)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return directory


@pytest.mark.parametrize(
    "prefix",
    ["base_model.model.layers", "base_model.model.model.model.layers", "model.layers", "base_model.model.model.layers"],
    ids=["model missing", "model twice", "without PEFT's own", "as it is"],
)
def test_prefixes_are_those_that_transformers_adds_and_drops(
    base: lora_fx.TracedGraphModule, model: peft.PeftModel, directory: Path, prefix: str
) -> None:
    moved(directory, "base_model.model.model.layers", prefix)
    assert torch.equal(logits(lora_fx.load_adapter(base, directory)), logits(model))


def llava() -> nn.Module:
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
        image_token_index=59,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_an_adapter_of_an_older_vision_language_model_is_read_by_its_old_names(tmp_path: Path) -> None:
    targets = r".*language_model.*\.(q_proj|v_proj)"
    model = wrapped(llava(), target_modules=targets, rank_pattern={"layers.1.self_attn.q_proj": 5})
    model.save_pretrained(tmp_path)
    graph = lora_fx.trace(llava())
    before = logits(lora_fx.load_adapter(graph, tmp_path))
    assert torch.equal(before, logits(model))
    moved(tmp_path, "model.language_model.layers", "language_model.model.layers")
    if PEFT_FINDS_OLDER_VISION_LANGUAGE_MODELS:
        assert torch.equal(logits(loaded_by_peft(llava(), tmp_path)), before)
    else:  # PEFT says so, and goes on without the adapter
        with pytest.warns(UserWarning, match="missing adapter keys"):
            peft.PeftModel.from_pretrained(llava(), tmp_path)
    assert torch.equal(logits(lora_fx.load_adapter(graph, tmp_path)), before)
    old = r"language_model\.model\.layers\.(0|1)\.self_attn\.(q_proj|v_proj)"  # in which PEFT finds no module any more
    moved(
        tmp_path, "", "", target_modules=old, rank_pattern={r"language_model\.model\.layers\.1\.self_attn\.q_proj": 5}
    )
    assert torch.equal(logits(lora_fx.load_adapter(graph, tmp_path)), before)


def test_a_prefix_that_fits_nothing_is_one_line_with_both_prefixes(
    base: lora_fx.TracedGraphModule, directory: Path
) -> None:
    moved(directory, "base_model.model.model.", "base_model.model.thinker.text.")
    refused(
        base,
        directory,
        "adapter_model.safetensors: none of its 8 factors is at a module of the graph: the modules are under 'thinker.text.', those of the "
        "graph under 'model.'. Is it the adapter of another model?",
    )
    moved(directory, "layers.", "h.")
    with pytest.raises(lora_fx.AdapterError) as caught:
        lora_fx.load_adapter(base, directory)
    assert str(caught.value).count("\n") == 0


def test_an_old_and_a_new_key_of_one_module_are_refused(base: lora_fx.TracedGraphModule, directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    old = key.replace("model.model.model.", "model.model.")
    save_file({**tensors, old: torch.ones(3, 24)}, path)
    refused(base, directory, f"{old} and {key} are both for 'model.layers.0.self_attn.q_proj'")


# Experts that were modules of their own.


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    moe = {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **moe)).eval()


def qwen() -> nn.Module:
    torch.manual_seed(0)
    moe = {
        "num_key_value_heads": 2,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 6,
    }
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **moe)).eval()


def expert_tensors(owner: str, shapes: dict[str, tuple[int, int]], rank: int = 3) -> dict[str, torch.Tensor]:
    """Return the factors of all experts, and of the router, of two layers as PEFT wrote them beside transformers 4."""
    torch.manual_seed(4)
    names = [(f"{owner}.experts.{e}.{leaf}", shape) for e in range(3) for leaf, shape in shapes.items()]
    names.append((f"{owner}.gate", (3, 24)))
    tensors = {}
    for layer in range(2):
        for name, (out, into) in names:
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, into)
            tensors[f"{key}.lora_B.weight"] = 0.1 * torch.randn(out, rank)
    return tensors


W = {"w1": (40, 24), "w2": (24, 40), "w3": (40, 24)}
PROJECTIONS = {"gate_proj": (16, 24), "up_proj": (16, 24), "down_proj": (24, 16)}


def expert_adapter(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none", "base_model_name_or_path": "", **config}
    (directory / "adapter_config.json").write_text(json.dumps(said))
    return directory


@pytest.fixture(scope="module")
def stacked() -> lora_fx.TracedGraphModule:
    return lora_fx.trace(mixtral())


@pytest.mark.parametrize(
    ("make", "owner", "shapes"),
    [(mixtral, "block_sparse_moe", W), pytest.param(qwen, "mlp", PROJECTIONS, marks=pytest.mark.matrix)],
    ids=["mixtral", "qwen3_moe"],
)
def test_factors_of_single_experts_and_routers_are_stacked_as_peft_does(
    make: Any, owner: str, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    expert_adapter(tmp_path / "a", expert_tensors(owner, shapes), target_modules=[*shapes, "gate"])
    graph = lora_fx.from_adapter(make(), tmp_path / "a")
    theirs = logits(loaded_by_peft(make(), tmp_path / "a"))
    torch.testing.assert_close(logits(graph), theirs, atol=1e-6, rtol=1e-5)
    assert (theirs - logits(make())).abs().max() > 1e-3
    lora_fx.save_adapter(graph, tmp_path / "b")
    torch.testing.assert_close(logits(loaded_by_peft(make(), tmp_path / "b")), theirs, atol=1e-6, rtol=1e-5)
    make().save_pretrained(tmp_path / "base", save_original_format=False)
    fold_checkpoint(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "merged", verify=True)
    merged = type(make()).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), theirs, atol=1e-5, rtol=1e-4)


def merged_by_hand(tensors: dict[str, torch.Tensor], scale_of: Any) -> nn.Module:
    """Return Mixtral with the product of every pair of factors added to the part of the stack that was its module."""
    model = mixtral()
    rows = {"w1": slice(0, 40), "w3": slice(40, 80), "w2": slice(None)}
    with torch.no_grad():
        for key, a in tensors.items():
            if ".experts." not in key or ".lora_A." not in key:
                continue
            _, _, _, _, layer, _, _, expert, leaf, _, _ = key.split(".")
            experts = model.model.layers[int(layer)].mlp.experts
            stack = experts.down_proj if leaf == "w2" else experts.gate_up_proj
            product = scale_of(leaf, len(a)) * tensors[key.replace("lora_A", "lora_B")] @ a
            stack[int(expert), rows[leaf]] += product
    return model


@pytest.mark.parametrize(
    ("config", "leaves", "scale_of"),
    [
        ({"use_rslora": True}, W, lambda leaf, rank: 6 / rank**0.5),
        ({}, {"w1": W["w1"]}, lambda leaf, rank: 6 / rank),
        ({"alpha_pattern": {"w3": 9}}, W, lambda leaf, rank: (9 if leaf == "w3" else 6) / rank),
        ({"rank_pattern": {"w3": 2, r"experts\.1\.w2": 1}}, W, lambda leaf, rank: 6 / rank),
    ],
    ids=["rslora", "one projection of two", "another alpha", "other ranks"],
)
def test_where_peft_is_mistaken_or_refuses_experts_are_what_the_config_says(
    stacked: lora_fx.TracedGraphModule, config: dict[str, Any], leaves: Any, scale_of: Any, tmp_path: Path
) -> None:
    tensors = {k: v for k, v in expert_tensors("block_sparse_moe", leaves).items() if ".gate." not in k}
    ranks = {".w3.": 2, ".experts.1.w2.": 1} if "rank_pattern" in config else {}
    for key, value in tensors.items():
        for part, rank in ranks.items():
            if part in key:
                tensors[key] = (value[:rank] if ".lora_A." in key else value[:, :rank]).contiguous()
    expert_adapter(tmp_path, tensors, target_modules=list(leaves), **config)
    mine = logits(lora_fx.load_adapter(stacked, tmp_path))
    torch.testing.assert_close(mine, logits(merged_by_hand(tensors, scale_of)), atol=2e-6, rtol=1e-5)


def test_what_is_missing_of_experts_is_named(stacked: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    tensors = {k: v for k, v in expert_tensors("block_sparse_moe", W).items() if ".gate." not in k}
    key = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w1.lora_B.weight"
    expert_adapter(tmp_path, {k: v for k, v in tensors.items() if k != key}, target_modules=[*W])
    selects = "adapter_config.json selects 'model.layers.1.block_sparse_moe.experts.2.w1'"
    refused(stacked, tmp_path, f"{key}: missing in adapter_model.safetensors: {selects}")
    expert_adapter(tmp_path, {**tensors, key: torch.ones(39, 3)}, target_modules=[*W])
    shape = "expected shape (40, 3), of expert 2 of model.layers.1.mlp.experts.gate_up_proj, got (39, 3)"
    refused(stacked, tmp_path, f"{key}: {shape}")
    expert_adapter(tmp_path, {k: v for k, v in tensors.items() if ".layers.0." in k}, target_modules=[*W])
    refused(
        stacked,
        tmp_path,
        "model.layers.1.block_sparse_moe.experts.0.w1: missing in adapter_model.safetensors: adapter_config.json selects it, for "
        "model.layers.1.mlp.experts.gate_up_proj",
    )
    whole = {"base_model.model.model.layers.0.mlp.experts.lora_A.weight": torch.ones(9, 40)}
    expert_adapter(tmp_path, {**tensors, **whole}, target_modules=[*W])
    refused(
        stacked,
        tmp_path,
        "experts.lora_A.weight: the factors of all experts of model.layers.0.mlp.experts.down_proj, and there are",
    )
    ninth = {k.replace("experts.2.", "experts.8."): v for k, v in tensors.items()}
    expert_adapter(tmp_path, ninth, target_modules=[*W])
    refused(
        stacked,
        tmp_path,
        "expected an expert below 3, the number of experts of model.layers.0.mlp.experts.gate_up_proj",
    )


# Heads of several adapters.


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], lora_fx.TracedGraphModule]:
    """Two adapters with a head each, a and b, and one without, c: their directory, PEFT's logits, and the graph that has all."""
    root, base = tmp_path_factory.mktemp("heads"), classifier()
    graph, theirs = lora_fx.trace(base), {}
    for name, config in {
        "a": {"target_modules": ["query"], "task_type": "SEQ_CLS"},
        "b": {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "r": 2},
        "c": {"target_modules": ["query"]},
    }.items():
        model = wrapped(base, **config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(ord(name) - 95)  # not the values of the others
        model.save_pretrained(root / name)
        theirs[name] = logits(model)
        graph = lora_fx.load_adapter(graph, root / name, name)
    return root, theirs, graph


def test_two_adapters_with_a_head_each_keep_theirs_and_activate_chooses(heads: Any, tmp_path: Path) -> None:
    _, theirs, graph = heads
    for name in ("a", "b", "a"):
        graph = lora_fx.activate(graph, {name: 1.0})
        assert torch.equal(logits(graph), theirs[name])
        assert torch.allclose(logits(lora_fx.fold(graph)), theirs[name], atol=1e-6)
        lora_fx.save_adapter(graph, tmp_path / name, name, overwrite=True)
        assert torch.equal(logits(loaded_by_peft(classifier(), tmp_path / name)), theirs[name])


def test_combine_keeps_the_trained_head_which_peft_leaves_behind(heads: Any) -> None:
    root, theirs, graph = heads
    combined = lora_fx.combine(graph, {"a": 1.0}, adapter="m")
    assert torch.allclose(logits(combined), theirs["a"], atol=1e-6)
    model = peft.PeftModel.from_pretrained(classifier(), root / "a", "a").eval()
    model.add_weighted_adapter(["a"], [1.0], "m", combination_type="cat")
    model.set_adapter("m")
    assert (logits(model) - theirs["a"]).abs().max() > 0.1  # PEFT's has the branches, and the head of the base
    mixed = lora_fx.combine(graph, {"a": 1.0, "c": 0.5}, adapter="m")
    assert torch.allclose(logits(mixed), logits(lora_fx.activate(graph, {"a": 1.0, "c": 0.5})), atol=1e-6)
    assert not torch.allclose(logits(mixed), theirs["a"], atol=2e-5)


def test_combine_refuses_two_heads_that_differ(heads: Any) -> None:
    root, theirs, graph = heads
    with pytest.raises(lora_fx.PlanError) as caught:
        lora_fx.combine(graph, {"a": 1.0, "b": 1.0}, adapter="m")
    assert str(caught.value) == (
        "'a' and 'b' have different trained copies of classifier.weight, classifier.bias, and a copy is taken whole. Combine adapters of "
        "which one alone has a copy, or give them one value."
    )
    twice = lora_fx.load_adapter(graph, root / "a", "again")
    halves = lora_fx.combine(twice, {"a": 0.5, "again": 0.5}, adapter="m")
    assert torch.allclose(logits(halves), theirs["a"], atol=1e-6)
