"""The modes of a model's modules: those whose mode means nothing, and norms that keep their statistics while the rest trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from architectures import build
from made import agrees, module
from torch import nn

import lora_fx


class OwnNorm(nn.Module):
    """A norm of the model's own, without a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@pytest.mark.parametrize(
    "part",
    [
        nn.Linear(4, 4),
        nn.LayerNorm(4),
        nn.GELU(),
        OwnNorm(),
        transformers.pytorch_utils.Conv1D(4, 4),
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)),
    ],
    ids=lambda part: type(part).__name__,
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_part_without_a_mode_may_be_in_any(part: nn.Module, training: bool) -> None:
    model = module(lambda self, x: self.part(self.drop(self.lin(x))), part=part, drop=nn.Dropout(0.5)).train(training)
    part.train(not training)
    assert agrees(model, inference=not training).training in (True, False)


def test_an_embedding_that_was_resized_and_a_classifier_that_was_replaced_leave_the_mode_of_the_model() -> None:
    model: Any = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
    ).eval()
    model.resize_token_embeddings(70)
    model.classifier = nn.Linear(16, 5)
    graph = lora_fx.rewrite(model, rules="bert", rank=2, task_type="SEQ_CLS")
    batch = {"input_ids": torch.randint(0, 70, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    assert not graph.training
    assert torch.equal(graph(**batch).logits, model.requires_grad_(False)(**batch).logits)


def test_dropout_in_another_mode_than_the_model_is_refused_by_name() -> None:
    model: Any = build("bert").eval()
    model.embeddings.dropout.train()
    with pytest.raises(lora_fx.TraceError, match=r"in train mode is embeddings\.dropout\. Call model\.train\(\)"):
        lora_fx.trace(model)


def test_a_transformer_layer_is_traced_and_compared_without_its_fused_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, batch_first=True), 2)
    model = module(lambda self, x, padding: self.encoder(self.lin(x), src_key_padding_mask=padding), encoder=encoder)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    enabled, x = torch.backends.mha.get_fastpath_enabled(), torch.randn(3, 5, 4)
    graph = lora_fx.trace(model, (x, padding)).eval()
    assert torch.backends.mha.get_fastpath_enabled() is enabled
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    assert torch.equal(graph(x, padding), model.eval().requires_grad_(False)(x, padding))
