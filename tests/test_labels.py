"""Graphs that are traced with labels return the model's loss, and are for training alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, build, few
from conftest import set_factors, unchanged
from torch import nn

import lora_fx
from lora_fx import huggingface
from lora_fx.graph.info import info_of

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def tokens(batch: int, length: int, below: int = 97) -> torch.Tensor:
    return torch.randint(3, below, (batch, length))


def text(batch: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, -2:] = 0
    return {"input_ids": tokens(batch, length), "attention_mask": mask}


def ignoring(labels: torch.Tensor) -> torch.Tensor:
    labels[0, :2] = -100
    return labels


def decoder(name: str) -> nn.Module:
    model = build(name, layers=1)
    model.config.decoder_start_token_id, model.config.pad_token_id = 0, 0
    return model


def bert(head: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**SIZES, **settings)).eval()


HEADS: Mapping[str, tuple[str, Callable[[], nn.Module], Callable[[], Mapping[str, torch.Tensor]]]] = {
    "llama": ("llama", lambda: build("llama", layers=1), lambda: {"labels": ignoring(tokens(3, 9))}),
    "gpt2": ("gpt2", lambda: build("gpt2", layers=1), lambda: {"labels": ignoring(tokens(3, 9))}),
    "t5": ("t5", lambda: decoder("t5"), lambda: {"labels": ignoring(tokens(3, 6))}),
    "bart": ("bart", lambda: decoder("bart"), lambda: {"labels": ignoring(tokens(3, 6))}),
    "masked": ("bert", bert("MaskedLM"), lambda: {"labels": ignoring(tokens(3, 9))}),
    "tokens": ("bert", bert("TokenClassification", num_labels=5), lambda: {"labels": ignoring(tokens(3, 9, 5))}),
    "classes": ("bert", bert("SequenceClassification", num_labels=5), lambda: {"labels": torch.tensor([0, 4, 2])}),
    "regression": ("bert", bert("SequenceClassification", num_labels=1), lambda: {"labels": torch.randn(3)}),
    "multi-label": (
        "bert",
        bert("SequenceClassification", num_labels=4, problem_type="multi_label_classification"),
        lambda: {"labels": torch.rand(3, 4).round()},
    ),
    "answers": (
        "bert",
        bert("QuestionAnswering"),
        lambda: {"start_positions": torch.tensor([0, 3, 8]), "end_positions": torch.tensor([1, 2, 8])},
    ),
}


@pytest.mark.parametrize("name", few(HEADS, ("gpt2", "bart", "masked", "multi-label", "answers")))
def test_the_loss_and_its_gradients_are_those_of_the_model(name: str) -> None:
    rules, make, labels = HEADS[name]
    model = make().requires_grad_(False)
    config = model.config.to_dict()
    with unchanged(model):
        graph = lora_fx.rewrite(model, rules=rules, labels=True, dropout=0.0)
    assert model.config.to_dict() == config
    inputs = {**text(), **labels()}
    assert "decoder_input_ids" not in inspect.signature(graph.forward).parameters
    found, wanted = graph(**inputs), model(**inputs)  # B = 0: the graph computes what the model does
    assert type(found) is type(wanted)
    assert torch.equal(found.loss, wanted.loss)
    set_factors(graph)
    graph(**inputs).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in graph.parameters() if p.requires_grad)
    assert graph.config.model_type == model.config.model_type


def test_a_graph_with_labels_goes_on_to_one_without_by_site(tmp_path: Path) -> None:
    model = decoder("t5").requires_grad_(False)
    trained = lora_fx.rewrite(model, rules="t5", labels=True, dropout=0.0)
    set_factors(trained)
    onto = lora_fx.rewrite(model, rules="t5", dropout=0.0)
    graph = lora_fx.transfer(trained, onto=onto).eval()
    inputs = {**(given := text()), "labels": tokens(3, 6)}
    shifted = torch.cat([torch.zeros(3, 1, dtype=torch.int64), inputs["labels"][:, :-1]], dim=1)
    without_labels = {**given, "decoder_input_ids": shifted}
    assert torch.equal(graph(**without_labels).logits, trained.eval()(**inputs).logits)
    with pytest.raises(lora_fx.FoldError, match=r"traced with labels, for training.*lora_fx\.transfer"):
        lora_fx.fold(trained)
    with pytest.raises(lora_fx.ExportError, match=r"traced with labels, for training.*lora_fx\.transfer"):
        lora_fx.export.torchscript(trained, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())
    merged = lora_fx.fold(graph)
    assert info_of(merged).labels is False
    assert lora_fx.recipe(trained) == lora_fx.recipe(graph)
    with torch.no_grad(), huggingface.folded(model, trained):  # weights are enough
        assert torch.equal(model(**inputs).logits, merged(**without_labels).logits)
    written = copy.deepcopy(model)
    huggingface.write_back(written, trained)
    for name, parameter in written.named_parameters():
        assert torch.equal(parameter, merged.get_parameter(name))
    huggingface.save_pretrained(model, trained, tmp_path / "merged")
    loaded_model = type(model).from_pretrained(tmp_path / "merged")
    assert all(torch.equal(a, b) for a, b in zip(loaded_model.parameters(), written.parameters(), strict=True))
    lora_fx.save_adapter(trained, tmp_path / "adapter")
    loaded = lora_fx.load_adapter(onto, tmp_path / "adapter", "loaded")
    for name, parameter in loaded.named_parameters():
        if ".loaded." in name:
            assert torch.equal(parameter, trained.get_parameter(name.replace(".loaded.", ".default.")))


def test_labels_of_ones_own_stay_as_they_are() -> None:
    model = build("gpt2", layers=1)
    given = {"input_ids": tokens(2, 7), "labels": tokens(2, 7)}
    graph = lora_fx.trace(model, given, labels=True)
    assert list(inspect.signature(graph.forward).parameters) == [
        "input_ids",
        "labels",
        "use_cache",
        "num_items_in_batch",
    ]
    longer = {"input_ids": tokens(4, 5), "labels": tokens(4, 5)}
    assert torch.equal(graph(**longer).loss, model(**longer, use_cache=False).loss)


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        (
            bert("PreTraining"),
            "BertForPreTraining returns no loss for input_ids, attention_mask, use_cache, labels: let",
        ),
        (bert("MultipleChoice"), "what the labels of BertForMultipleChoice are like is not known: let example_inputs"),
        (lambda: build("bert", layers=1), "BertModel takes no labels: leave labels=True out"),
        (lambda: nn.Linear(3, 4), "Linear is not a transformers model, so its inputs do not follow from a config"),
    ],
)
def test_what_has_no_loss_is_refused(head: Callable[[], nn.Module], problem: str) -> None:
    with pytest.raises(lora_fx.TraceError, match=problem):
        lora_fx.rewrite(head(), rules={"select": [{"target": ["query"]}]}, labels=True)


def test_labels_are_made_like_the_inputs_that_are_given() -> None:
    model = build("gpt2", layers=1)
    graph = lora_fx.trace(model, {"input_ids": tokens(2, 5)}, labels=True)
    assert "labels" in inspect.signature(graph.forward).parameters
    with pytest.raises(
        lora_fx.TraceError, match="labels are made like 'input_ids', and example_inputs have no such keyword"
    ):
        lora_fx.trace(model, {"inputs_embeds": torch.randn(2, 5, 48)}, labels=True)


def test_a_model_on_the_meta_device_is_traced_with_labels() -> None:
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(build("gpt2", layers=1).config)
    graph = lora_fx.rewrite(model, rules="gpt2", labels=True)
    ready = lora_fx.materialize(graph, build("gpt2", layers=1).state_dict())
    inputs = {"input_ids": tokens(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.int64), "labels": tokens(2, 7)}
    assert torch.equal(ready.eval()(**inputs).loss, build("gpt2", layers=1)(**inputs, use_cache=False).loss)


def test_a_graph_has_what_a_trainer_looks_for() -> None:
    graph = lora_fx.rewrite(build("bert", layers=1), rules=ARCHITECTURES["bert"].rules)
    assert graph.config.hidden_size == 48
    assert graph.device == torch.device("cpu")
    assert graph.accepts_loss_kwargs is False
    assert graph.is_activation_checkpointing is graph.is_gradient_checkpointing is False
    own = lora_fx.trace(nn.Linear(3, 4), (torch.randn(2, 3),))
    assert not hasattr(own, "config")
