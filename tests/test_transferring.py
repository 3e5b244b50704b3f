from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import branched, build, inputs, traced
from conftest import set_factors, unchanged

import lora_fx
from lora_fx.graph.info import info_of


def test_trained_adapters_move_onto_another_trace() -> None:
    model = build("llama")
    trained = branched("llama")
    trained = lora_fx.rewrite(trained, {"select": [{"target": ["up_proj"]}]}, rank=2, alpha=3, adapter="second")
    set_factors(trained)
    expected = trained.eval()(**inputs("llama", 3, 11))[0]
    base = lora_fx.trace(model, inference=True)
    fresh = branched("llama")
    for onto in (base, fresh):
        with unchanged(trained), unchanged(onto):
            moved = lora_fx.transfer(trained, onto=onto)
        assert torch.equal(moved.eval()(**inputs("llama", 3, 11))[0], expected)
        assert lora_fx.parameter_summary(moved).trainable == lora_fx.parameter_summary(onto).trainable or onto is fresh
        assert info_of(moved).adapters == info_of(trained).adapters
    assert lora_fx.parameter_summary(lora_fx.transfer(trained, onto=base)).trainable == 0


def test_adapters_that_do_not_fit_are_refused() -> None:
    trained = branched("llama")
    with pytest.raises(
        lora_fx.PlanError,
        match=r"adapter 'default' has branches at model\.layers\.0\.self_attn\.q_proj.*which the other graph has not",
    ):
        lora_fx.transfer(trained, onto=traced("bert"))
    other = branched("llama", rank=4)
    with pytest.raises(
        lora_fx.PlanError, match=r"q_proj\.lora_A\.default\.weight: torch\.float32 \(6, 48\) against .* \(4, 48\)"
    ):
        lora_fx.transfer(trained, onto=other)


@pytest.mark.parametrize(
    ("rules", "difference"),
    [
        ({"defaults": {"alpha": 64}, "select": [{"target": ["q_proj"]}]}, "scale 1, .* against rank 8, scale 8"),
        ({"select": [{"target": ["q_proj", "v_proj"]}]}, r"self_attn\.v_proj: no branch against rank 8"),
    ],
)
def test_an_adapter_that_computes_something_else_there_is_refused(rules: dict[str, Any], difference: str) -> None:
    base = traced("llama")
    trained = lora_fx.rewrite(base, {"select": [{"target": ["q_proj"]}]})
    with pytest.raises(lora_fx.PlanError, match=difference):
        lora_fx.transfer(trained, onto=lora_fx.rewrite(base, rules))


@pytest.mark.parametrize("copied", ["given", "onto"])
def test_an_adapter_with_a_trained_copy_in_one_graph_alone_is_refused(copied: str) -> None:
    base, attention = traced("llama"), {"target": ["q_proj"]}
    plain = lora_fx.rewrite(base, {"select": [attention]})
    trains_head = lora_fx.rewrite(base, {"select": [attention, {"target": ["lm_head"], "trainable": "all"}]})
    given, onto = (trains_head, plain) if copied == "given" else (plain, trains_head)
    with pytest.raises(lora_fx.PlanError, match=r"lm_head\S*weight\S*: .*(no trained copy against one|no such site)"):
        lora_fx.transfer(given, onto=onto)
