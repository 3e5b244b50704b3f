"""Prompt tuning beside PEFT's: the same bits, steps, tokens and files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import rows
from test_prefix import EMBEDDING, MODELS, TOKENS, given, inputs, llama, made, trained
from transformers_releases import peft_takes_caches

import lora_fx
from lora_fx.errors import (
    AdapterError,
    ExportError,
    FoldError,
    InputError,
    LoraFxError,
    PlanError,
    RuleError,
    TraceError,
)

RULES: dict[str, Any] = {"prompt": [{"tokens": TOKENS}]}
SIZES = ((3, 9), (1, 4), (2, 13))


def peft_model(model: Any, task: str, **settings: Any) -> Any:
    torch.manual_seed(3)
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=TOKENS, **settings)
    return peft.get_peft_model(copy.deepcopy(model), config)


@pytest.fixture(scope="module")
def model() -> Any:
    return made(llama)


@pytest.fixture(scope="module")
def graph(model: Any) -> lora_fx.TracedGraphModule:
    return lora_fx.rewrite(model, RULES, seed=1)


def same_as_peft(model: Any, task: str, mine: lora_fx.TracedGraphModule, theirs: Any, directory: Path) -> None:
    """Compare logits, ten steps, tokens and files of a graph and of PEFT's model with one prompt."""
    given(theirs, mine)
    mine.eval(), theirs.eval()
    with torch.no_grad():
        for sizes in SIZES:
            batch = inputs(model, *sizes)
            found = mine(**batch).logits
            assert torch.equal(found, theirs(**batch).logits), sizes
            assert found.size(1) == (TOKENS + sizes[1] if task == "CAUSAL_LM" else model(**batch).logits.size(1))
            assert torch.equal(lora_fx.activate(mine, {})(**batch).logits, model(**batch).logits)
    batch = inputs(model, 3, 9)
    assert trained(mine, batch) == pytest.approx(trained(theirs, batch), rel=1e-5)
    theirs.save_pretrained(directory / "theirs")
    lora_fx.save_adapter(mine, directory / "mine")
    with torch.no_grad():
        read = peft.PeftModel.from_pretrained(copy.deepcopy(model), directory / "mine").eval()
        assert torch.equal(read(**batch).logits, mine(**batch).logits)
        assert torch.equal(lora_fx.load_adapter(mine, directory / "theirs")(**batch).logits, theirs(**batch).logits)
    written, known = (json.loads((directory / each / "adapter_config.json").read_text()) for each in ("mine", "theirs"))
    known["modules_to_save"] = known["modules_to_save"] and ["classifier"]
    same = {"num_layers": None, "num_attention_heads": None}  # which PEFT reads off the model
    assert written == {**known, **same}


def generated_as_peft(model: Any, mine: lora_fx.TracedGraphModule, theirs: Any) -> None:
    given(theirs, mine)
    batch = {name: value for name, value in inputs(model, 3, 8).items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "min_new_tokens": 7}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    for more in ({}, {"num_beams": 3}, {"use_cache": False}):
        expected = theirs.eval().generate(**batch, **options, **(more if "use_cache" not in more else {}))
        found, without = (each.generate(**batch, **options, **more) for each in (mine, lora_fx.activate(mine, {})))
        assert torch.equal(found.sequences, expected.sequences), more
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-5)
        assert not torch.allclose(without.logits[0], expected.logits[0], atol=1e-4)


def test_logits_steps_and_files_are_those_of_peft(model: Any, graph: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    theirs = peft_model(model, "CAUSAL_LM")
    same_as_peft(model, "CAUSAL_LM", copy.deepcopy(graph), theirs, tmp_path)


@pytest.mark.parametrize("name", rows([name for name in MODELS if name != "llama"], ()))
def test_logits_steps_and_files_of_each_model_are_those_of_peft(name: str, tmp_path: Path) -> None:
    build, task = MODELS[name]
    model = made(build)
    mine = lora_fx.rewrite(model, RULES, task_type=task)
    same_as_peft(model, task, mine, peft_model(model, task, num_transformer_submodules=1), tmp_path)


@peft_takes_caches
def test_tokens_that_are_generated_are_those_of_peft(model: Any, graph: lora_fx.TracedGraphModule) -> None:
    generated_as_peft(model, copy.deepcopy(graph), peft_model(model, "CAUSAL_LM"))


@pytest.mark.parametrize("name", rows([name for name in MODELS if name not in ("llama", "bert")], ()))
def test_tokens_of_each_model_are_those_of_peft(name: str) -> None:
    build, task = MODELS[name]
    model = made(build)
    mine = lora_fx.rewrite(model, RULES, inference=True)
    generated_as_peft(model, mine, peft_model(model, task, num_transformer_submodules=1))


@pytest.mark.parametrize("name", rows(("t5",), ()))
def test_of_a_file_with_embeddings_for_the_decoder_those_in_front_are_read_as_peft_reads_them(
    name: str, tmp_path: Path
) -> None:
    model = made(MODELS[name][0])
    theirs = peft_model(model, "SEQ_2_SEQ_LM").eval()
    theirs.save_pretrained(tmp_path)
    mine = lora_fx.from_adapter(model, tmp_path, inference=True)
    assert mine.get_parameter(EMBEDDING).shape == (TOKENS, 32)
    batch = inputs(model, 3, 9)
    assert torch.equal(mine(**batch).logits, theirs(**batch).logits)


def test_it_starts_as_embeddings_of_given_tokens_over_and_over(model: Any, graph: lora_fx.TracedGraphModule) -> None:
    base = lora_fx.unload(graph)
    ids = [7, 81, 7, 2]
    mine = lora_fx.rewrite(base, {"prompt": [{"tokens": TOKENS, "init_ids": ids}]})
    expected = model.get_input_embeddings()(torch.tensor([*ids, *ids])[:TOKENS])
    assert torch.equal(mine.get_parameter(EMBEDDING), expected)
    batch = inputs(model, 3, 9)
    whole = {
        "input_ids": torch.cat([torch.tensor([*ids, *ids])[:TOKENS].repeat(3, 1), batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones(3, TOKENS, dtype=torch.int64), batch["attention_mask"]], 1),
    }
    assert torch.equal(mine(**batch).logits, model(**whole).logits)
    with pytest.raises(PlanError, match="init_ids: expected ids below 90, found 90"):
        lora_fx.rewrite(base, {"prompt": [{"tokens": 2, "init_ids": [90]}]})


@pytest.mark.parametrize("name", rows(("llama",), ()))
def test_the_loss_of_labels_is_that_of_peft(name: str, model: Any) -> None:
    del name
    mine = lora_fx.rewrite(model, {**RULES, "select": [{"target": ["q_proj"]}]}, labels=True)
    assert [str(each) for each in mine.adapters] == ["default (acts, trains)", "default-prefix (acts, trains)"]
    theirs = peft_model(model, "CAUSAL_LM").eval()
    with torch.no_grad():
        own = EMBEDDING.replace("default", "default-prefix")
        mine.get_parameter(own).copy_(theirs.prompt_encoder.default.embedding.weight)
        batch = inputs(model, 3, 9)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        found = mine.eval()(**batch, labels=labels)
        torch.testing.assert_close(found.loss, theirs(**batch, labels=labels).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", rows(("llama",), ()))
def test_files_for_other_runtimes_have_the_prompt(name: str, graph: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    del name
    lora_fx.export.torchscript(graph, tmp_path / "m.ts")  # each is compared with its graph at several sizes
    lora_fx.export.onnx(graph, tmp_path / "m.onnx")


def test_a_prompt_is_told_carried_over_and_never_folded(model: Any, graph: lora_fx.TracedGraphModule) -> None:
    assert lora_fx.parameter_summary(graph).trainable == TOKENS * 32
    assert "a prompt of 6 tokens" in repr(graph)
    assert "a prompt of 6 tokens, 192 parameters" in str(lora_fx.plan(lora_fx.unload(graph), RULES))
    batch = inputs(model, 3, 9)
    kept = lora_fx.fold(graph, keep_prefix=True)
    for each in (kept, lora_fx.transfer(graph, onto=lora_fx.unload(graph)), lora_fx.nest(copy.deepcopy(graph))):
        assert torch.equal(each(**batch).logits, graph(**batch).logits)
    with pytest.raises(FoldError, match="'default' cannot be folded: a prompt is embeddings in front of those"):
        lora_fx.fold(graph)


def test_what_a_prompt_cannot_be_is_refused_in_one_line(
    model: Any, graph: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    def refused(error: type[Exception], match: str, call: Callable[[], object]) -> None:
        with pytest.raises(error, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)

    base = lora_fx.unload(graph)
    refused(
        RuleError,
        "text: unknown key; a text to start from is given by its ids",
        lambda: lora_fx.rewrite(base, {"prompt": [{"text": "a"}]}),
    )
    refused(RuleError, "prompt: expected none beside", lambda: lora_fx.rewrite(base, {"prompt": [{}], "prefix": [{}]}))
    refused(
        RuleError, "prompt: expected one table at most, found 2", lambda: lora_fx.rewrite(base, {"prompt": [{}, {}]})
    )
    refused(
        PlanError,
        r"\[\[prefix\]\] needs a graph that can take a prefix",
        lambda: lora_fx.rewrite(base, {"prefix": [{}]}),
    )
    refused(TraceError, "prefix=True ask for", lambda: lora_fx.trace(base, prefix=True))
    refused(TraceError, "a prompt is no past", lambda: lora_fx.trace(model, cache=True, prefix="prompt"))
    lora_fx.save_adapter(graph, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "token_dim": 16}))
    with pytest.raises(AdapterError) as caught:
        lora_fx.load_adapter(base, tmp_path / "a")
    assert "token_dim: expected 32 as in the model, found 16" in str(caught.value)
    assert "prompt_embeddings: expected shape (6, 16) by adapter_config.json, found (6, 32)" in str(caught.value)


def test_messages_call_a_prompt_a_prompt(model: Any, graph: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    lora_fx.save_adapter(graph, tmp_path / "a")
    second = lora_fx.load_adapter(graph, tmp_path / "a", "second")
    ids = inputs(model, 2, 5)["input_ids"]
    init = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "prompt_tuning_init": "TEXT"}
    for error, told, call in (
        (PlanError, "have a prompt each", lambda: lora_fx.activate(second, {"default": 1, "second": 1})),
        (PlanError, "it has a prompt, which acts", lambda: lora_fx.activate(graph, {"default": 0.5})),
        (PlanError, "combined: it has a prompt", lambda: lora_fx.combine(second, {"second": 1}, adapter="sum")),
        (ExportError, "has a prompt, which", lambda: lora_fx.export.onnx(graph, tmp_path / "m.onnx", slots=True)),
        (InputError, "and a prompt is in a cache", lambda: graph.generate(ids, prompt_lookup_num_tokens=2)),
        (AdapterError, "adapter is a prompt", lambda: lora_fx.save_adapter(graph, tmp_path / "b", format="kohya")),
        (RuleError, "not supported with a prompt", lambda: lora_fx.rewrite(lora_fx.unload(graph), init)),
        (
            LoraFxError,
            "the prompt of adapter 'default' acts",
            lambda: lora_fx.parallel.stage_module(copy.deepcopy(graph), ["model.layers.1"], 0),
        ),
    ):
        with pytest.raises(error, match=told) as caught:
            call()
        assert "prefix" not in str(caught.value)


@pytest.mark.parametrize("name", rows(("llama",), ()))
def test_a_model_that_reads_the_ids_beyond_their_embeddings_is_refused(name: str) -> None:
    del name
    config = transformers.LlamaConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, pad_token_id=0
    )
    heads = made(lambda: transformers.LlamaForSequenceClassification(config))
    with pytest.raises(TraceError, match="computes of inputs_embeds other numbers than of input_ids"):
        lora_fx.trace(heads, prefix="prompt")
    ids = torch.randint(1, 90, (2, 7))
    with pytest.raises(TraceError, match="without positions, found position_ids"):
        lora_fx.trace(made(llama), {"input_ids": ids, "position_ids": torch.arange(7).repeat(2, 1)}, prefix="prompt")


@pytest.mark.parametrize("name", rows(("llama",), ()))
def test_a_graph_with_a_cache_takes_no_prompt(
    name: str, model: Any, graph: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    del name
    lora_fx.save_adapter(graph, tmp_path / "a")
    cached = lora_fx.trace(model, cache=True)
    for call in (
        lambda: lora_fx.rewrite(cached, RULES),
        lambda: lora_fx.load_adapter(cached, tmp_path / "a"),
        lambda: lora_fx.transfer(graph, onto=cached),
    ):
        with pytest.raises(PlanError, match="a graph with a cache takes no prompt"):
            call()
