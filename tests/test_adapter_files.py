"""Adapters in every form in which they are found: pickles, whole state dicts, keys of older transformers, parts of the base."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import set_factors
from safetensors.torch import load_file, save_file
from torch import nn

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


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
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


def test_a_tied_parameter_that_peft_untied_is_told_and_loads_onto_an_untied_model(tmp_path: Path) -> None:
    model = wrapped(llama(tie_word_embeddings=True), modules_to_save=["embed_tokens", "lm_head"])
    model.save_pretrained(tmp_path)
    tied = llama(tie_word_embeddings=True)
    refused(
        lora_fx.trace(tied),
        tmp_path,
        "base_model.model.lm_head.weight: 'lm_head.weight' and 'model.embed_tokens.weight' are one tied parameter of the model, which PEFT "
        "untied (modules_to_save without ensure_weight_tying) and trained to two values. Untie them in the model first: "
        "config.tie_word_embeddings = False, and a parameter of its own for each",
    )
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
