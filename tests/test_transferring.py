from __future__ import annotations

import pytest
import torch
from architectures import build, inputs
from conftest import set_factors, unchanged

import lora_fx


def test_trained_adapters_move_onto_another_trace() -> None:
    model = build("llama")
    trained = lora_fx.rewrite(model, rules="llama", rank=6, alpha=9)
    trained = lora_fx.rewrite(trained, {"select": [{"target": ["up_proj"]}]}, rank=2, alpha=3, adapter="second")
    set_factors(trained)
    expected = trained.eval()(**inputs("llama", 3, 11))[0]
    base = lora_fx.trace(model, inference=True)
    fresh = lora_fx.rewrite(model, rules="llama", rank=6, alpha=9)
    for onto in (base, fresh):
        with unchanged(trained), unchanged(onto):
            moved = lora_fx.transfer(trained, onto=onto)
        assert torch.equal(moved.eval()(**inputs("llama", 3, 11))[0], expected)
        assert lora_fx.parameter_summary(moved).trainable == lora_fx.parameter_summary(onto).trainable or onto is fresh
        assert moved.meta["lora_fx"]["adapters"] == trained.meta["lora_fx"]["adapters"]
    assert lora_fx.parameter_summary(lora_fx.transfer(trained, onto=base)).trainable == 0


def test_adapters_that_do_not_fit_are_refused() -> None:
    trained = lora_fx.rewrite(build("llama"), rules="llama", rank=6)
    with pytest.raises(
        lora_fx.PlanError,
        match=r"adapter 'default' has branches at model\.layers\.0\.self_attn\.q_proj.*which the other graph has not",
    ):
        lora_fx.transfer(trained, onto=lora_fx.trace(build("bert")))
    with pytest.raises(lora_fx.PlanError, match=r"q_proj\.lora_A\.default\.weight: \(6, 48\) against \(4, 48\)"):
        lora_fx.transfer(trained, onto=lora_fx.rewrite(build("llama"), rules="llama", rank=4))
