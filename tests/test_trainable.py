"""Parameters of the model that train beside the branches: PEFT's ``bias`` and ``modules_to_save``."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import traced
from conftest import set_factors, unchanged
from graph_diff import first_difference
from torch import nn

import lora_fx

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

BRANCHES = {"target": ["query", "value"]}
BATCH = {"input_ids": torch.arange(24).view(3, 8) % 90, "attention_mask": torch.ones(3, 8, dtype=torch.int64)}


def classifier() -> nn.Module:
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


@functools.cache
def base() -> lora_fx.TracedGraphModule:
    """Return the trace of :func:`classifier`. Not to be changed."""
    return lora_fx.trace(classifier())


def rewritten(*select: dict[str, Any]) -> lora_fx.TracedGraphModule:
    rules = {"defaults": {"rank": 4, "alpha": 6}, "select": [BRANCHES, *select]}
    with unchanged(base()):
        return lora_fx.rewrite(base(), rules)


def trained(module: Any, steps: int = 3) -> torch.Tensor:
    """Train a few steps from known factors; return the logits."""
    set_factors(module, scale=0.1)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        logits = module.train()(**BATCH).logits
        nn.functional.cross_entropy(logits, torch.tensor([4, 0, 2])).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return module.eval()(**BATCH).logits


@pytest.mark.parametrize(
    ("select", "settings"),
    [
        ({"target": ["classifier"], "trainable": "all"}, {"modules_to_save": ["classifier"]}),
        ({"target": ["query", "value"], "trainable": "bias"}, {"bias": "lora_only"}),
        ({"regex": ".*", "trainable": "bias"}, {"bias": "all"}),
    ],
)
def test_training_is_that_of_peft(select: dict[str, Any], settings: dict[str, Any]) -> None:
    model = classifier()
    ours = rewritten(select)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"], **settings)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    counts = [sum(p.numel() for p in module.parameters() if p.requires_grad) for module in (ours, theirs)]
    assert counts[0] == counts[1]
    before = ours.eval()(**BATCH).logits
    found, expected = trained(ours), trained(theirs)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, before, atol=1e-3)


def test_what_trains_is_a_copy_that_fold_keeps_and_unload_drops() -> None:
    model = classifier()
    rules = {"defaults": {"rank": 4, "alpha": 6}, "select": [BRANCHES, {"target": ["classifier"], "trainable": "all"}]}
    with unchanged(model):
        ours = lora_fx.rewrite(model, rules)
    own = [name for name, p in ours.named_parameters() if p.requires_grad and ".lora_" not in name]
    assert own == ["classifier.trained_copy.default.weight", "classifier.trained_copy.default.bias"]
    with unchanged(model):
        logits = trained(ours)
    inference = lora_fx.trace(model, inference=True)
    with unchanged(ours):
        merged, back = lora_fx.fold(ours), lora_fx.unload(ours)
    assert torch.allclose(merged(**BATCH).logits, logits, atol=1e-5)
    assert torch.equal(back.eval()(**BATCH).logits, inference.eval()(**BATCH).logits)
    assert list(merged.state_dict()) == list(back.state_dict()) == list(model.state_dict())
    assert first_difference(lora_fx.unload(rewritten({"target": ["classifier"], "trainable": "all"})), base()) is None
    assert torch.equal(merged.get_parameter("classifier.weight"), ours.get_parameter(own[0]))
    assert merged.get_parameter("classifier.weight").data_ptr() != ours.get_parameter(own[0]).data_ptr()
    for copied in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        lora_fx.transfer(ours, onto=base()),
    ):
        assert torch.equal(copied.eval()(**BATCH).logits, logits)


def test_a_selection_of_the_models_own_parameters_is_planned() -> None:
    plan = lora_fx.plan(base(), {"select": [BRANCHES, {"role": ["head"], "trainable": "all"}]})
    assert [(each.name, each.elements, each.rule) for each in plan.trained] == [
        ("classifier.weight", 5 * 48, "custom:select[1]"),
        ("classifier.bias", 5, "custom:select[1]"),
    ]
    assert str(plan).endswith("245 of the model's own train too: classifier.weight, classifier.bias")
    excluded = {"target": ["encoder"], "exclude": ["attention", "output"], "layers": [1], "trainable": "bias"}
    plan = lora_fx.plan(base(), {"select": [excluded]})
    assert [each.name for each in plan.trained] == ["bert.encoder.layer.1.intermediate.dense.bias"]
    assert plan.chosen == ()


@pytest.mark.parametrize(
    ("select", "problem"),
    [
        ({"target": ["query"], "trainable": "all"}, "query.weight' would both train and get a branch"),
        ({"target": ["nowhere"], "trainable": "all"}, r"select\[1\] matches no parameter that the model uses"),
    ],
)
def test_what_cannot_train_is_refused(select: dict[str, Any], problem: str) -> None:
    with pytest.raises(lora_fx.LoraFxError, match=problem):
        lora_fx.rewrite(traced("bert"), {"select": [BRANCHES, select]})


def test_a_tied_head_does_not_train_alone() -> None:
    gpt2 = traced("gpt2")
    with pytest.raises(lora_fx.PlanError, match=r"transformer\.wte\.weight and lm_head\.weight are one tied parameter"):
        lora_fx.rewrite(gpt2, {"select": [{"target": ["c_attn"]}, {"target": ["lm_head"], "trainable": "all"}]})
