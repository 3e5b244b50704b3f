"""PEFT's and transformers' spelling on graphs of transformers models: what PEFT generates, counts, writes and merges."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers
from architectures import few
from conftest import set_factors, unchanged
from torch import nn

import lora_fx
from lora_fx import methods
from lora_fx.graph.info import CHECKPOINTING_SPELLING, PEFT_SPELLING, info_of, with_info

PROMPT = torch.tensor([[37, 21, 8, 59, 11], [5, 44, 70, 23, 9]])
BATCH = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}


def causal() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def sequence() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=3, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


KINDS = {"causal": (causal, ["q_proj", "v_proj", "down_proj"]), "sequence": (sequence, ["q", "v", "wo"])}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A model, PEFT's model of it with an adapter, and the graph with the same adapter."""
    build, targets = KINDS[request.param]
    model = build()
    wrapped: Any = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets)
    ).eval()
    set_factors(wrapped)
    directory = tmp_path_factory.mktemp("adapter")
    wrapped.save_pretrained(directory)
    return model, wrapped, lora_fx.from_adapter(model, directory)


@functools.cache
def trained(kind: str) -> tuple[Any, Any]:
    """A model and a graph of it whose adapter trains; with labels for the second kind. What changes the graph takes a copy."""
    build, targets = KINDS[kind]
    model = build()
    if kind == "sequence":
        model.generation_config = SHORT
    rules = {"select": [{"target": targets}]}
    graph = lora_fx.rewrite(model, rules, rank=3, alpha=5, dropout=0.0, labels=kind == "sequence")
    set_factors(graph)
    return model, graph


SHORT = transformers.GenerationConfig(max_new_tokens=6, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)

WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 30},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_generate_gives_the_tokens_of_peft(pair: Any, way: str) -> None:
    model, wrapped, graph = pair
    found = []
    for each in (wrapped, graph, model):
        torch.manual_seed(3)
        found.append(each.generate(**BATCH, max_new_tokens=8, **WAYS[way]))
    assert torch.equal(found[1], found[0])
    assert not torch.equal(found[2], found[0])


def test_generate_folds_at_the_start_of_each_call_and_keeps_nothing() -> None:
    graph = copy.deepcopy(trained("causal")[1])
    options = {**BATCH, "max_new_tokens": 8, "do_sample": False}
    models = _number_of_models()
    before = graph.generate(**options)
    factor = next(p for name, p in graph.named_parameters() if "lora_B" in name)
    kept = factor.detach().clone()
    factor.data += 3.0
    with unchanged(graph):
        assert not torch.equal(graph.generate(**options), before)
    factor.data = kept
    assert torch.equal(graph.generate(**options), before)
    assert _number_of_models() == models


def _number_of_models() -> int:
    gc.collect()
    return sum(type(each) is transformers.LlamaForCausalLM for each in gc.get_objects())


def test_generate_shares_the_weights_that_no_adapter_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = trained("causal")
    pointers: dict[str, int] = {}

    def generate(self: nn.Module, **_: Any) -> None:
        assert not self.training
        pointers.update({name: parameter.data_ptr() for name, parameter in self.named_parameters()})

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", generate)
    graph.generate(**BATCH)
    assert pointers.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert (pointers[name] == parameter.data_ptr()) != any(part in name for part in KINDS["causal"][1]), name


def test_generate_works_on_a_graph_with_labels() -> None:
    model, graph = trained("sequence")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=KINDS["sequence"][1])
    wrapped: Any = peft.get_peft_model(copy.deepcopy(model), config).eval()
    set_factors(wrapped)
    with_labels = copy.deepcopy(graph).train()
    assert torch.equal(with_labels.generate(**BATCH), wrapped.generate(**BATCH))
    assert with_labels.training


def test_generation_config_is_a_copy_of_its_own_and_can_be_changed_or_replaced() -> None:
    model, graph = trained("sequence")
    graph = pickle.loads(pickle.dumps(graph))
    assert graph.generation_config.to_dict() == model.generation_config.to_dict()
    assert graph.generate(**BATCH).shape[1] == 7
    graph.generation_config.max_new_tokens = 4
    assert graph.generate(**BATCH).shape[1] == 5
    graph.generation_config = transformers.GenerationConfig(
        max_new_tokens=3, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0
    )
    assert copy.deepcopy(graph).generate(**BATCH).shape[1] == 4
    assert model.generation_config.max_new_tokens == 6


def test_merge_and_unload_gives_the_bits_of_peft(pair: Any) -> None:
    model, wrapped, graph = pair
    with unchanged(graph), unchanged(model):
        merged = graph.merge_and_unload()
    assert type(merged) is type(model)
    expected = copy.deepcopy(wrapped).merge_and_unload().state_dict()
    found = merged.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    tokens = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(merged.generate(**BATCH, **tokens), graph.generate(**BATCH, **tokens))


def test_the_merged_model_is_saved_and_loaded_as_any_other(pair: Any, tmp_path: Path) -> None:
    model, _, graph = pair
    merged: Any = graph.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(model).from_pretrained(tmp_path / "merged")
    assert all(torch.equal(value, merged.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_save_pretrained_writes_what_peft_writes(pair: Any, tmp_path: Path) -> None:
    model, wrapped, graph = pair
    lora_fx.load_adapter(graph, _saved(wrapped, tmp_path / "theirs"), "other").save_pretrained(tmp_path / "mine")
    for directory in (tmp_path / "mine", tmp_path / "mine" / "other"):
        read = peft.PeftModel.from_pretrained(copy.deepcopy(model), directory)
        for (name, mine), theirs in zip(read.state_dict().items(), wrapped.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs), name
    graph.save_pretrained(tmp_path / "mine", is_main_process=True)  # over the one that is there, as PEFT writes
    graph.save_pretrained(tmp_path / "not", is_main_process=False)
    assert not (tmp_path / "not").exists()


def _saved(wrapped: Any, directory: Path) -> Path:
    wrapped.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_parameters_are_those_of_peft(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, graph = trained(kind)
    wrapped: Any = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=3, target_modules=KINDS[kind][1]))
    assert graph.get_nb_trainable_parameters() == wrapped.get_nb_trainable_parameters()
    graph.print_trainable_parameters()
    wrapped.print_trainable_parameters()
    mine, theirs = capsys.readouterr().out.splitlines()
    assert mine == theirs
    for options in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
        assert graph.num_parameters(**options) == wrapped.num_parameters(**options)


def test_the_input_embedding_is_the_graphs_own_and_refuses_what_would_do_nothing(pair: Any) -> None:
    model, _, graph = pair
    embedding: Any = graph.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    assert (embedding.num_embeddings, embedding.embedding_dim) == (97, 32)
    assert any(embedding.weight is parameter for parameter in graph.parameters())
    assert torch.equal(embedding(PROMPT), model.get_input_embeddings()(PROMPT))
    for act in (
        lambda: setattr(embedding, "neftune_noise_alpha", 5.0),
        lambda: setattr(embedding, "weight", nn.Parameter(torch.zeros(97, 32))),
        lambda: embedding.register_forward_hook(print),
        lambda: embedding.register_forward_pre_hook(print),
        lambda: embedding.register_full_backward_hook(print),
    ):
        with pytest.raises(lora_fx.LoraFxError, match="on the input embedding: a traced graph is flat"):
            act()


def test_methods_are_there_where_they_mean_something_and_nowhere_else() -> None:
    _, causal_graph = trained("causal")
    for name in (*PEFT_SPELLING, "generation_config"):
        assert hasattr(causal_graph, name), name
        assert name in dir(causal_graph), name
    assert causal_graph.can_generate()
    assert not hasattr(lora_fx.fold(causal_graph), "save_pretrained")
    with pytest.raises(AttributeError, match=r"a graph has no disable_adapter: lora_fx\.activate\(gm, {}\) returns"):
        causal_graph.disable_adapter()
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        causal_graph.nosuch  # noqa: B018
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4
        )
    )
    bert_graph = lora_fx.rewrite(bert, rules="bert", rank=3)
    assert {name for name in PEFT_SPELLING if not hasattr(bert_graph, name)} == {
        "base_model",
        "generate",
        "get_output_embeddings",
    }
    assert not hasattr(bert_graph, "generation_config")
    assert not bert_graph.can_generate()
    plain = lora_fx.trace(nn.Linear(3, 4), (torch.randn(2, 3),))
    wrapped = peft.get_peft_model(causal(), peft.LoraConfig(target_modules=["q_proj"]))
    for graph in (plain, lora_fx.trace(wrapped.eval(), {"input_ids": PROMPT}, inference=True)):
        parts = {name for name, _ in graph.named_children()}  # PEFT's model has a part that is called base_model
        absent = PEFT_SPELLING - CHECKPOINTING_SPELLING - parts
        assert not [name for name in {*absent, "generation_config"} if hasattr(graph, name)]
        assert not absent & set(dir(graph))
        assert set(dir(graph)) >= CHECKPOINTING_SPELLING


def test_every_name_of_the_table_is_a_function_and_is_declared() -> None:
    declared = inspect.getsource(lora_fx.TracedGraphModule).partition("if TYPE_CHECKING:")[2]
    for name in PEFT_SPELLING:
        assert inspect.isfunction(getattr(methods, name)), name
        assert f"        {name}: Callable" in declared, name


def renamed(graph: lora_fx.TracedGraphModule, model_class: str) -> lora_fx.TracedGraphModule:
    other = copy.deepcopy(graph)
    other.meta.update(with_info(other.meta, replace(info_of(other), model_class=model_class)))
    return other


def test_no_second_model_is_made_of_code_from_a_hub_or_of_a_class_that_is_not_found() -> None:
    _, graph = trained("causal")
    hub = renamed(graph, "transformers_modules.somebody.modeling:LlamaForCausalLM")
    lost = renamed(graph, "test_methods:test_something.<locals>.Model")
    assert hub.can_generate()
    assert hub.num_parameters() == graph.num_parameters()
    for act in ("generate", "merge_and_unload", "get_input_embeddings"):
        with pytest.raises(
            lora_fx.LoraFxError, match=r"is code from a hub.*lora_fx.huggingface.write_back\(model, graph\)"
        ):
            getattr(hub, act)()
        with pytest.raises(
            lora_fx.LoraFxError, match=r"expected .*Model of the module test_methods, which was traced, to make"
        ):
            getattr(lost, act)()


def test_a_model_that_was_changed_behind_its_config_is_refused() -> None:
    model: Any = causal()
    model.lm_head = nn.Linear(32, 90, bias=True).eval()
    graph = lora_fx.rewrite(model, {"select": [{"target": ["q_proj"]}]}, rank=3)
    for act in (graph.merge_and_unload, lambda: graph.generate(**BATCH)):
        with pytest.raises(
            lora_fx.LoraFxError,
            match=r"makes another model than the one that was traced: 'lm_head.bias' is in the graph alone; 'lm_head.weight' is "
            r"torch.float32 \(90, 32\) in the graph and torch.float32 \(97, 32\) in the model",
        ):
            act()


def test_a_graph_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = causal()
    graph = lora_fx.trace(model)
    with pytest.raises(lora_fx.LoraFxError, match=r"on the meta device: lora_fx.materialize\(graph, state_dict\)"):
        graph.generate(**BATCH)


def test_a_tied_head_with_an_adapter_generates_and_is_not_merged_in_silence() -> None:
    model: Any = causal()
    model.config.tie_word_embeddings = True
    model = type(model)(model.config).eval()
    wrapped: Any = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=3, target_modules=["lm_head", "v_proj"]))
    graph = lora_fx.rewrite(model, {"select": [{"target": ["lm_head", "v_proj"]}]}, rank=3, alpha=8)
    for each in (wrapped.eval(), graph):
        set_factors(each)
    factors = {name.removeprefix("base_model.model."): p for name, p in wrapped.named_parameters()}
    with torch.no_grad():
        for name, parameter in graph.named_parameters():
            if ".lora_" in name:
                parameter.copy_(factors[name])
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(graph.generate(**BATCH, **options), wrapped.generate(**BATCH, **options))
    with pytest.raises(lora_fx.FoldError, match="unshare=True"):
        graph.merge_and_unload()
    untied = lora_fx.fold(graph, unshare=True)
    assert torch.equal(untied.generate(**BATCH, **options), wrapped.generate(**BATCH, **options))
    with pytest.raises(lora_fx.LoraFxError, match="are one parameter of LlamaForCausalLM, and were untied by fold"):
        untied.merge_and_unload()


def test_a_trained_copy_of_the_head_and_several_adapters_are_merged_as_peft_merges_them(tmp_path: Path) -> None:
    model = causal()
    wrapped: Any = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])
    ).eval()
    set_factors(wrapped)
    with torch.no_grad():
        wrapped.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    graph = lora_fx.from_adapter(model, _saved(wrapped, tmp_path / "theirs"))
    assert graph.num_parameters(exclude_embeddings=True) > 0
    found, expected = graph.merge_and_unload().state_dict(), wrapped.merge_and_unload().state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_seq2seq_trainer_predicts_what_it_predicts_with_peft(tmp_path: Path) -> None:
    model, graph = trained("sequence")
    # PEFT generates by the model's own settings, also where the trainer's arguments have others.
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=KINDS["sequence"][1])
    wrapped: Any = peft.get_peft_model(copy.deepcopy(model), config)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[:3]} for row in PROMPT]
    found = []
    for each in (wrapped, graph):
        set_factors(each)
        arguments = transformers.Seq2SeqTrainingArguments(
            str(tmp_path), predict_with_generate=True, report_to=[], use_cpu=True
        )
        found.append(transformers.Seq2SeqTrainer(each, arguments).predict(rows))
    assert (found[1].predictions == found[0].predictions).all()
    assert found[1].metrics["test_loss"] == found[0].metrics["test_loss"]


def test_tags_go_to_the_merged_model() -> None:
    graph = copy.deepcopy(trained("causal")[1])
    graph.add_model_tags(["trl", "sft"])
    graph.add_model_tags("sft")
    assert graph.merge_and_unload().model_tags == ["trl", "sft"]


@pytest.mark.parametrize("labels", few([False, True], [True]))
def test_the_part_below_the_head_is_that_of_peft_and_trains_the_graphs_own_factors(labels: bool) -> None:
    model = causal()
    wrapped: Any = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"])
    )
    rules = {"select": [{"target": ["q_proj", "down_proj"]}]}
    graph = lora_fx.rewrite(model, rules, rank=3, alpha=8, dropout=0.0, labels=labels)
    # With padding: transformers' own model ignores a mask without, and its last digits are then others.
    batch = {**BATCH, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    found = []
    for each in (wrapped.base_model.model, graph):
        with torch.no_grad():
            for name, parameter in sorted(each.named_parameters()):
                if ".lora_" in name:
                    parameter.copy_(torch.linspace(-0.3, 0.4, parameter.numel()).reshape(parameter.shape))
        hidden = each.base_model(**batch, use_cache=False).last_hidden_state
        head = each.get_output_embeddings()
        loss = torch.nn.functional.linear(hidden, head.weight).logsumexp(-1).sum()
        loss.backward()
        gradients = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
        found.append((hidden, loss, gradients))
    (hidden, loss, gradients), (own_hidden, own_loss, own_gradients) = found
    assert torch.equal(own_hidden, hidden)
    assert torch.equal(own_loss, loss)
    assert own_gradients.keys() == gradients.keys()
    assert all(torch.equal(own_gradients[name], value) for name, value in gradients.items())
    before = graph.base_model(**BATCH).last_hidden_state
    next(p for name, p in graph.named_parameters() if "lora_B" in name).data += 1.0
    assert not torch.equal(graph.base_model(**BATCH).last_hidden_state, before)


def test_a_head_or_an_embedding_with_branches_is_not_taken_for_its_weight() -> None:
    graph = lora_fx.rewrite(causal(), {"select": [{"target": ["lm_head", "embed_tokens"]}]}, rank=3)
    with pytest.raises(lora_fx.LoraFxError, match="adapter 'default' has a branch at the output head 'lm_head'"):
        graph.base_model(**BATCH)
    with pytest.raises(lora_fx.LoraFxError, match="this Embedding has branches of adapters in the graph"):
        graph.get_input_embeddings()(PROMPT)


def test_a_pipeline_generates_with_a_graph() -> None:
    _, graph = trained("causal")
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(3, 97))])}
    words_only = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    words_only.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words_only, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    found = []
    for each in (graph, graph.merge_and_unload()):
        pipeline: Any = transformers.pipeline("text-generation", model=each, tokenizer=tokenizer)
        found.append(pipeline("w37 w21 w8", max_new_tokens=5, do_sample=False)[0]["generated_text"])
    assert found[0] == found[1]
    assert len(found[0].split()) > 3
