from __future__ import annotations

import pytest
import torch
from architectures import build

import lora_fx
from lora_fx.planning import Chosen, Skipped, plan_sites
from lora_fx.ruleset import load
from lora_fx.sites import Site


def site(name: str, in_features: int = 12, out_features: int = 8) -> Site:
    return Site(name, name, name.replace(".", "_"), "linear", f"{name}.weight", "out_in", in_features, out_features)


SITES = (site("layer.0.q"), site("layer.0.seq"), site("layer.1.q", 16, 24))


def test_every_site_is_decided_with_its_reason() -> None:
    rules = load({"defaults": {"rank": 3, "alpha": 6}, "select": [{"target": ["q"]}, {"target": ["1.q"], "rank": 3}]})
    plan = plan_sites(SITES, rules)
    assert [type(decision) for decision in plan] == [Chosen, Skipped, Chosen]
    assert [decision.parameters for decision in plan.chosen] == [3 * 20, 3 * 40]
    assert plan.parameters == 3 * 20 + 3 * 40
    assert plan.chosen[0].branch.scaling == 2
    assert plan.decisions[1] == Skipped(SITES[1], "no selection names it")


def test_a_plan_prints_as_a_table_that_lines_up() -> None:
    lines = str(plan_sites(SITES, load({"select": [{"target": ["q"]}]}))).splitlines()
    column = lines[0].index("decision")
    assert [line[column:].split(":")[0] for line in lines[2:5]] == ["chosen", "skipped", "chosen"]
    assert lines[-1] == "2 of 3 sites chosen by rules 'custom', 480 parameters added"


def test_a_selection_that_matches_nothing_says_what_there_is() -> None:
    with pytest.raises(
        lora_fx.RuleError,
        match=r"select\[1\] matches no call site: target = \['sea'\] \(did you mean 'seq'\?\); the model's sites end in q, seq",
    ):
        plan_sites(SITES, load({"select": [{"target": ["q"]}, {"target": ["sea"]}]}))


def test_two_selections_that_disagree_on_a_site_are_named() -> None:
    with pytest.raises(
        lora_fx.RuleError,
        match=r"select\[0\] and select\[1\] both claim 'layer\.1\.q', with Branch\(rank=8.*Branch\(rank=2",
    ):
        plan_sites(SITES, load({"select": [{"target": ["q"]}, {"target": ["1.q"], "rank": 2}]}))


def test_a_rank_above_that_of_the_weight_is_refused() -> None:
    with pytest.raises(
        lora_fx.PlanError,
        match=r"site 'layer\.0\.q' rank 9, which is more than its weight of 8 × 12 can have\. Choose rank ≤ 8",
    ):
        plan_sites(SITES, load({"defaults": {"rank": 9}, "select": [{"target": ["q"]}]}))


def test_the_layout_of_a_weight_is_read_off_the_operator() -> None:
    plan = lora_fx.plan(build("gpt2"), rules="gpt2")
    layouts = {
        decision.site.name: (
            decision.site.operator,
            decision.site.layout,
            decision.site.in_features,
            decision.site.out_features,
        )
        for decision in plan
    }
    assert layouts["transformer.h.0.attn.c_attn"] == ("addmm", "in_out", 48, 144)
    assert layouts["lm_head"] == ("linear", "out_in", 48, 97)


def test_the_same_adapter_name_twice_is_refused() -> None:
    graph_module = lora_fx.rewrite(build("bert"), rules="auto")
    with pytest.raises(lora_fx.PlanError, match="already has an adapter 'default'"):
        lora_fx.rewrite(graph_module, rules="bert")
    with pytest.raises(lora_fx.PlanError, match=r"adapter='a\.b' cannot be part of a parameter's name"):
        lora_fx.rewrite(graph_module, rules="bert", adapter="a.b")


def test_a_quantised_weight_is_refused() -> None:
    graph_module = lora_fx.trace(build("bert"))
    query = graph_module.get_submodule("encoder.layer.0.attention.self.query")
    query.weight = torch.nn.Parameter(query.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(lora_fx.PlanError, match=r"query' has a weight of dtype torch\.int8.*Dequantise"):
        lora_fx.rewrite(graph_module, rules="bert")
