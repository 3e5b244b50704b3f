"""Gradient accumulation over rows of unequal length: a graph divides its loss by the number of items as the model does."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import few
from conftest import set_factors
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

import lora_fx
from lora_fx.tracing.item_count import loss_uses_count

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.xdist_group("item count")]

SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
RULES = {
    "select": [{"target": ["q_proj", "v_proj", "query", "value", "q", "v"], "alternatives": True}],
    "defaults": {"rank": 3, "alpha": 5.0},
}
NAME = "num_items_in_batch"


def llama(**settings: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True, **settings)
    )


def t5() -> nn.Module:
    sizes = {"vocab_size": 53, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForMaskedLM(config)


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "t5": t5,
    "bert": bert,
}


def made(name: str) -> nn.Module:
    """Return a model whose biases and norms are not 0 and 1; frozen, as in a graph."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@functools.cache
def traced(name: str) -> lora_fx.TracedGraphModule:
    return lora_fx.trace(made(name), labels=True)


@functools.cache
def rewritten(name: str) -> lora_fx.TracedGraphModule:
    graph = lora_fx.rewrite(traced(name), rules=RULES, dropout=0.0)
    set_factors(graph, scale=0.1)
    return graph.train()


def wrapped(name: str) -> nn.Module:
    targets = ["q", "v"] if name == "t5" else ["query", "value"] if name == "bert" else ["q_proj", "v_proj"]
    model = peft.get_peft_model(made(name), peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    set_factors(model.base_model.model, scale=0.1)
    return model.train()


def rows(count: int = 24) -> list[dict[str, torch.Tensor]]:
    """Return rows of 4 to 27 tokens, no two alike, since transformers drops a mask without padding, and torch takes another kernel.

    Their first labels do not count.
    """
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 53, (4 + index * 7 % 24,), generator=generator) for index in range(count)]
    labels = [torch.where(torch.arange(len(each)) < index % 3, -100, each) for index, each in enumerate(ids)]
    return [
        {"input_ids": each, "attention_mask": torch.ones_like(each), "labels": label}
        for each, label in zip(ids, labels, strict=True)
    ]


def collated(examples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: nn.utils.rnn.pad_sequence([each[name] for each in examples], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }


def curve(model: nn.Module, directory: Path, **options: Any) -> list[dict[str, float]]:
    """Train three steps of three batches, and return losses, gradient norms and evaluation losses."""
    arguments = transformers.TrainingArguments(
        str(directory),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=3,
        gradient_accumulation_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows(), eval_dataset=rows(6), data_collator=collated
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    kept = ("loss", "grad_norm", "eval_loss", "step")
    return [{key: entry[key] for key in kept if key in entry} for entry in trainer.state.log_history[:-1]]


def factors(module: nn.Module) -> dict[str, torch.Tensor]:
    named = ((name.removeprefix("base_model.model."), p) for name, p in module.named_parameters())
    return {name: p.detach().clone() for name, p in named if ".lora_" in name}


def batch(start: int = 0) -> dict[str, torch.Tensor]:
    return collated(rows()[start : start + 3])


@pytest.mark.parametrize("name", few(MODELS, ("llama", "t5")))
def test_accumulation_over_uneven_rows_gives_the_curve_of_peft(name: str, tmp_path: Path) -> None:
    mine, theirs = copy.deepcopy(rewritten(name)), wrapped(name)
    found, wanted = curve(mine, tmp_path), curve(theirs, tmp_path)
    assert found == wanted
    assert len({entry["grad_norm"] for entry in found if "grad_norm" in entry}) == 3
    assert sum("eval_loss" in entry for entry in found) == 2
    expected = factors(theirs)
    assert {key: torch.equal(value, expected[key]) for key, value in factors(mine).items()} == dict.fromkeys(
        expected, True
    )


def test_autocast_gives_the_curve_of_peft(tmp_path: Path) -> None:
    assert curve(copy.deepcopy(rewritten("llama")), tmp_path, bf16=True) == curve(wrapped("llama"), tmp_path, bf16=True)


def test_accumulated_gradients_are_those_of_one_batch() -> None:
    graph = copy.deepcopy(rewritten("llama"))
    parts = [rows()[start : start + 2] for start in range(0, 6, 2)]
    graph(**collated([row for part in parts for row in part])).loss.backward()
    whole = [p.grad.clone() for p in graph.parameters() if p.requires_grad]
    graph.zero_grad()
    count = sum(int(row["labels"][1:].ne(-100).sum()) for part in parts for row in part)
    for part in parts:
        graph(**collated(part), num_items_in_batch=count).loss.backward()
    for expected, parameter in zip(whole, [p for p in graph.parameters() if p.requires_grad], strict=True):
        torch.testing.assert_close(parameter.grad, expected)


COUNTS = {
    "none": None,
    "Trainer's": torch.tensor(31.0),
    "int64": torch.tensor(31),
    "float64": torch.tensor(31.0, dtype=torch.float64),
    "DataParallel's": torch.tensor([[31.0]]),
    "int": 31,
    "float": 31.0,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_models_with_any_count_and_without(name: str, training: bool) -> None:
    graph, model = copy.deepcopy(rewritten(name)).train(training), wrapped(name).train(training)
    for count in COUNTS.values():
        found, wanted = graph(**batch(), num_items_in_batch=count), model(**batch(), num_items_in_batch=count)
        assert (found.loss.dtype, found.loss.shape) == (wanted.loss.dtype, wanted.loss.shape)
        assert torch.equal(found.loss, wanted.loss)
        for module, loss in ((graph, found.loss), (model, wanted.loss)):
            module.zero_grad()
            (loss.sum() * 0.7).backward()
        expected = {n: p.grad for n, p in model.base_model.model.named_parameters() if p.grad is not None}
        gradients = {n: p.grad for n, p in graph.named_parameters() if p.grad is not None}
        assert gradients.keys() == expected.keys()
        assert all(torch.equal(gradient, expected[n]) for n, gradient in gradients.items())
    assert torch.equal(graph(**batch()).loss, model(**batch()).loss)


def compiled(graph: nn.Module) -> Any:
    return torch.compile(graph, backend="aot_eager", fullgraph=True)


CHANGES: Mapping[str, Callable[[lora_fx.TracedGraphModule], Any]] = {
    "copied": copy.deepcopy,
    "pickled": lambda graph: pickle.loads(pickle.dumps(graph)),
    "traced again": lora_fx.trace,
    "compiled": compiled,
    "activated": lambda graph: lora_fx.activate(graph, {"default": 1.0}),
    "transferred": lambda graph: lora_fx.transfer(
        graph, onto=lora_fx.rewrite(traced("llama"), rules=RULES, dropout=0.0)
    ),
}


@pytest.mark.parametrize("change", few(CHANGES, CHANGES.keys() - {"compiled"}))
def test_what_is_made_of_a_graph_takes_the_count(change: str) -> None:
    graph = copy.deepcopy(rewritten("llama"))
    other = CHANGES[change](graph)
    for count in (None, torch.tensor(31.0), torch.tensor(17.0), 31):
        assert torch.equal(
            other(**batch(), num_items_in_batch=count).loss, graph(**batch(), num_items_in_batch=count).loss
        )
    assert torch.equal(other(**batch()).loss, graph(**batch()).loss)
    if change != "compiled":
        assert (other.accepts_loss_kwargs, other.loss_type, loss_uses_count(other)) == (True, "ForCausalLM", True)


def test_a_fused_graph_takes_the_count() -> None:
    graph = rewritten("llama")
    fused = lora_fx.fuse(graph)
    for count in (None, 31):
        torch.testing.assert_close(
            fused(**batch(), num_items_in_batch=count).loss, graph(**batch(), num_items_in_batch=count).loss
        )


@pytest.mark.parametrize("given", [{}, {NAME: torch.tensor(31.0)}], ids=["without", "with"])
def test_torch_exports_a_graph_with_and_without_a_count(given: Mapping[str, torch.Tensor]) -> None:
    graph = copy.deepcopy(rewritten("llama"))
    program = torch.export.export(graph, (), {**batch(), **given}, strict=False)
    assert torch.equal(program.module()(**batch(), **given).loss, graph(**batch(), **given).loss)


def test_a_model_of_peft_is_traced_with_a_count() -> None:
    model = wrapped("llama")
    graph = lora_fx.trace(model, labels=True)
    assert (graph.accepts_loss_kwargs, graph.loss_type) == (True, "ForCausalLM")
    for count in (None, 31):
        found, wanted = (module(**batch(), num_items_in_batch=count).loss for module in (graph, model))
        assert torch.equal(found, wanted)


def test_a_model_on_the_meta_device_is_traced_with_a_count() -> None:
    with torch.device("meta"):
        graph = lora_fx.trace(llama(), labels=True)
    ready, model = lora_fx.materialize(graph, made("llama").state_dict()).eval(), made("llama").eval()
    for count in (None, 31):
        found, wanted = (module(**batch(), num_items_in_batch=count).loss for module in (ready, model))
        assert torch.equal(found, wanted)


def test_a_picture_shows_the_choice(tmp_path: Path) -> None:
    lora_fx.draw(traced("llama"), rewritten("llama"), tmp_path / "graph.json")
    shown = (tmp_path / "graph.json").read_text()
    assert all(name in shown for name in (NAME, "Reduction", "PerItem"))


@pytest.mark.parametrize(("name", "used"), [("llama", True), ("t5", False), ("bert", False)])
def test_a_graph_answers_as_trainer_finds_it_for_the_model(name: str, used: bool, tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    answers = []
    for model in (rewritten(name), wrapped(name)):
        trainer = transformers.Trainer(model=model, args=arguments)
        answers.append((trainer.model_accepts_loss_kwargs, trainer._loss_shifts_labels, trainer.label_names))
    assert answers[0] == answers[1]
    assert answers[0][0] is True
    assert loss_uses_count(rewritten(name)) is used


def test_a_model_that_says_no_is_traced_without_a_count() -> None:
    model = made("llama")
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    for each in (model, peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))):
        graph = lora_fx.trace(each, labels=True)
        assert (graph.accepts_loss_kwargs, loss_uses_count(graph)) == (False, False)
        with pytest.raises(lora_fx.InputError, match=f"there is no input '{NAME}'"):
            graph(**batch(), num_items_in_batch=31)


def test_a_graph_without_labels_takes_no_count() -> None:
    graph = lora_fx.trace(made("llama"))
    assert (graph.accepts_loss_kwargs, loss_uses_count(graph), graph.loss_type) == (False, False, "ForCausalLM")
    assert NAME not in inspect.signature(graph.forward).parameters


def test_a_count_that_is_no_number_is_refused() -> None:
    with pytest.raises(
        lora_fx.InputError,
        match=r"^input 'num_items_in_batch' is '31', expected a number or a tensor of one\. Pass that, or leave it out: the loss is "
        r"then the mean over the batch\.$",
    ):
        rewritten("llama")(**batch(), num_items_in_batch="31")
    with pytest.raises(lora_fx.InputError, match=r"input 'labels' is missing, but the graph was traced with it"):
        rewritten("llama")(**{**batch(), "labels": None}, num_items_in_batch=31)


class Head(nn.Module):
    """A decoder whose loss weights tokens, and takes the count in a way of its own."""

    main_input_name = "input_ids"

    def __init__(self, passes: bool) -> None:
        super().__init__()
        self.config = transformers.LlamaConfig(vocab_size=53)
        self.embed, self.lm_head = nn.Embedding(53, 8), nn.Linear(8, 53)
        self.passes = passes

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> CausalLMOutput:
        logits = self.lm_head(self.embed(input_ids))
        kwargs.pop("use_cache", None)
        if self.passes:
            nn.functional.relu(logits, **kwargs)
        each = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        count = kwargs.get(NAME)
        return CausalLMOutput(loss=each.mean() if count is None else each.sum() / (count + 1.0), logits=logits)


def test_a_count_that_is_read_in_another_way_has_to_be_given() -> None:
    model = Head(False)
    ids = torch.randint(3, 53, (2, 7))
    graph = lora_fx.trace(model, {"input_ids": ids}, labels=True)
    assert (graph.accepts_loss_kwargs, loss_uses_count(graph)) == (True, True)
    count = torch.tensor(9.0)
    given = {"input_ids": ids[:, :5], "labels": ids[:, :5], NAME: count}
    assert torch.equal(graph(**given).loss, model(**given).loss)
    with pytest.raises(
        lora_fx.InputError, match="input 'num_items_in_batch' is missing, but the graph was traced with it"
    ):
        graph(ids, ids)


def test_a_model_that_fails_with_a_count_is_refused_with_a_way_out() -> None:
    model = Head(True)
    ids = {"input_ids": torch.randint(3, 53, (2, 7))}
    with pytest.raises(
        lora_fx.TraceError,
        match=r"Head.forward has \*\*kwargs, so that transformers' Trainer passes num_items_in_batch, and the model fails with it: "
        r".*num_items_in_batch.*\. Set model.accepts_loss_kwargs = False, by which Trainer goes too, or let forward take it\.",
    ):
        lora_fx.trace(model, ids, labels=True)
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    assert lora_fx.trace(model, ids, labels=True).accepts_loss_kwargs is False
