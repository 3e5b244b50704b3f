"""The rule files of all families against PEFT, which is told the same names; and ``all-linear`` against PEFT's."""

from __future__ import annotations

import copy
import logging
from typing import Any

import architectures
import families
import peft
import pytest
import torch
from architectures import rows
from conftest import set_factors
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn

import lora_fx
from lora_fx.graph.graph_module import state_of
from lora_fx.rules.lookup import load
from lora_fx.sites.call_sites import sites
from lora_fx.tracing.example_inputs import example_inputs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

RULED = rows([name for name, family in families.FAMILIES.items() if family.rules], families.REPRESENTATIVES)
ALL = rows(
    (*architectures.ARCHITECTURES, *families.FAMILIES), (*architectures.REPRESENTATIVES, *families.REPRESENTATIVES)
)

# What PEFT wraps and the traced computation does not reach, or reaches in another way.
NOT_CALLED = {
    "llama4": "vision_model.",  # its inputs are made of text alone
    "gemma4": "vision_tower.",
}


def model(name: str) -> nn.Module:
    return architectures.model(name) if name in architectures.ARCHITECTURES else families.model(name)


def traced(name: str) -> lora_fx.TracedGraphModule:
    return architectures.traced(name) if name in architectures.ARCHITECTURES else families.traced(name)


def wrap(name: str, target_modules: Any, *, fan_in_fan_out: bool = False) -> Any:
    if not isinstance(target_modules, str):
        target_modules = list(target_modules)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=target_modules, fan_in_fan_out=fan_in_fan_out)
    return peft.get_peft_model(copy.deepcopy(model(name)), config).eval()


@pytest.mark.parametrize("name", RULED)
def test_a_family_has_the_sites_counts_and_logits_of_peft(name: str) -> None:
    family = families.FAMILIES[name]
    ours = lora_fx.rewrite(traced(name), rules=family.rules, rank=4, alpha=6, dropout=0.0)
    theirs = wrap(name, family.target_modules, fan_in_fan_out=family.fan_in_fan_out)
    factors = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters() if ".lora_" in n}
    called = {n: p for n, p in factors.items() if NOT_CALLED.get(name, "nothing") not in n}
    mine = {n: p for n, p in ours.named_parameters() if ".lora_" in n}
    assert {n: p.shape for n, p in mine.items()} == {n: p.shape for n, p in called.items()}
    assert sum(p.numel() for p in mine.values()) == sum(p.numel() for p in called.values())
    set_factors(ours, scale=0.05)
    with torch.no_grad():
        for n, p in called.items():
            p.copy_(mine[n])
    given = example_inputs(model(name), None)
    batch = {k: v for k, v in given.kwargs.items() if isinstance(v, torch.Tensor)}
    with torch.no_grad():
        expected, found = theirs(**given.kwargs)[0], ours.eval()(**batch)[0]
        base = traced(name)(**batch)[0]
    assert torch.equal(found, expected)
    assert not torch.equal(found, base)


@pytest.mark.parametrize("name", ALL)
def test_all_linear_is_that_of_peft_but_for_heads_routers_and_single_outputs(name: str) -> None:
    plan = lora_fx.plan(traced(name), rules="all-linear", rank=1)
    mine = {chosen.site.module for chosen in plan.chosen}
    # The modules that PEFT means, before it drops some again (DeepSeek's MLP) or refuses the model (Nemotron-H).
    theirs = set(
        _maybe_include_all_linear_layers(peft.LoraConfig(target_modules="all-linear"), model(name)).target_modules
    )
    used = {n.removesuffix(".weight") for n in state_of(traced(name)).tensors} & {
        site.module for site in sites(traced(name))
    }
    never_called = theirs - used
    assert all(isinstance(model(name).get_submodule(n), nn.Linear) for n in never_called)
    left_out = {
        decision.site.module
        for decision in plan
        if {"router", "head"} & set(decision.purpose.roles) or decision.site.out_features == 1
    }
    bare = {decision.site.module for decision in plan if decision.site.module == decision.site.weight}
    assert mine - bare == theirs - never_called - left_out


def test_auto_falls_back_on_roles_where_there_is_no_file(caplog: pytest.LogCaptureFixture) -> None:
    albert = traced("albert")
    caplog.clear()  # tracing, where this test is the first to, has things to say too
    with caplog.at_level(logging.INFO, logger="lora_fx"):
        plan = lora_fx.plan(albert, rules=load("auto", "albert"))
    assert len(caplog.messages) == 1
    assert "no rule file is for model type 'albert'" in caplog.messages[0]
    assert {chosen.site.module.rpartition(".")[2] for chosen in plan.chosen} == {"query", "value"}
