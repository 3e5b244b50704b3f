from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import build
from torch import nn

import lora_fx
from lora_fx.graph.records import Features
from lora_fx.planning.plan import Chosen, Plan, Skipped, as_data
from lora_fx.planning.planner import plan_sites
from lora_fx.rules.lookup import load
from lora_fx.rules.vocabulary import Op
from lora_fx.sites.call_sites import Site
from lora_fx.sites.roles import Purpose


def site(name: str, in_features: int = 12, out_features: int = 8, op: Op = "linear", call: int = 0) -> Site:
    path = name.partition("@")[0]
    node = name.replace(".", "_").replace("@", "_")
    return Site(name, path, node, op, op, f"{path}.weight", "out_in", in_features, out_features, call)


SITES = (site("layer.0.q"), site("layer.0.seq"), site("layer.1.q", 16, 24))

FUSED = Purpose(
    ("self_attention.query", "self_attention.key", "self_attention.value"),
    {"query": Features(((0, 4),)), "key": Features(((4, 6),)), "value": Features(((6, 8),))},
)
PURPOSES = {
    "layer.0.qkv": FUSED,
    "layer.1.q": Purpose(("cross_attention.query",)),
    "layer.1.up": Purpose(("mlp.up",)),
    "lm_head": Purpose(("head", "lm_head")),
}
MODEL = (
    site("embed", 97, 12, op="embedding"),
    site("layer.0.qkv"),
    site("layer.1.q", 16, 24),
    site("layer.1.up", 16, 40),
    site("shared@1", call=1),
    site("shared@2", call=2),
    site("lm_head", 12, 97),
)


def planned(*select: dict[str, Any], **defaults: Any) -> Plan:
    return plan_sites(MODEL, load({"defaults": {"rank": 2, **defaults}, "select": list(select)}), PURPOSES)


def names(*select: dict[str, Any]) -> list[str]:
    return [chosen.site.name for chosen in planned(*select).chosen]


def test_every_site_is_decided_with_its_reason() -> None:
    rules = load({"defaults": {"rank": 3, "alpha": 6}, "select": [{"target": ["q"]}, {"target": ["1.q"], "rank": 3}]})
    plan = plan_sites(SITES, rules)
    assert [type(decision) for decision in plan] == [Chosen, Skipped, Chosen]
    assert [decision.parameters for decision in plan.chosen] == [3 * 20, 3 * 40]
    assert plan.parameters == 3 * 20 + 3 * 40
    assert plan.chosen[0].branches[0].setting.scale == 2
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
        match=r"select\[0\] and select\[1\] both claim 'layer\.1\.q', with rank 8, .* and rank 2, .* override = true",
    ):
        plan_sites(SITES, load({"select": [{"target": ["q"]}, {"target": ["1.q"], "rank": 2}]}))


def test_every_predicate_narrows_a_selection() -> None:
    assert names({"target": ["q", "up"]}) == ["layer.1.q", "layer.1.up"]
    assert names({"target": ["layer.*.q*"]}) == ["layer.0.qkv", "layer.1.q"]
    assert names({"regex": r"layer\.\d\.(q|up)"}) == ["layer.1.q", "layer.1.up"]
    assert names({"target": ["layer.*.*"], "layers": [0]}) == ["layer.0.qkv"]
    assert names({"layers": ["1-"]}) == ["layer.1.q", "layer.1.up"]
    assert names({"layers": ["0-"], "exclude": ["up"]}) == ["layer.0.qkv", "layer.1.q"]
    assert names({"role": ["attention.query"]}) == ["layer.0.qkv", "layer.1.q"]
    assert names({"role": ["cross_attention.query"]}) == ["layer.1.q"]
    assert names({"op": ["linear"], "exclude_role": ["lm_head"], "in_features": {"min": 16}}) == [
        "layer.1.q",
        "layer.1.up",
    ]
    assert names({"op": ["linear"], "out_features": {"max": 30, "min": 9}}) == ["layer.1.q"]
    assert names({"op": ["embedding"], "rank": 3}) == ["embed"]
    assert names({"target": ["shared"], "calls": [2]}) == ["shared@2"]
    assert names({"layers": ["0-"], "features": ["value"]}) == ["layer.0.qkv"]


def test_what_is_skipped_says_which_predicate_came_nearest() -> None:
    plan = planned(
        {"target": ["q"], "role": ["attention.query"]},
        {"role": ["mlp.up"], "in_features": {"max": 8}, "optional": True},
        {"target": ["shared"], "calls": [2]},
        {"target": ["qkv"], "features": ["gate"], "optional": True},
    )
    reasons = {decision.site.name: decision.reason for decision in plan if isinstance(decision, Skipped)}
    assert reasons == {
        "embed": "select[1]: its role is not known, not mlp.up",
        "layer.0.qkv": "select[3] names it; it has no part 'gate': its parts are query or key or value",
        "layer.1.up": "select[1]: its in_features 16 are outside ≤ 8",
        "shared@1": "select[2] names it; it is call 1, not 2",
        "lm_head": "select[1]: its role is head or lm_head, not mlp.up",
    }


def test_what_is_skipped_by_its_layer_or_by_exclude_says_so() -> None:
    plan = planned(
        {"target": ["q"], "layers": ["2-"], "optional": True}, {"role": ["attention.query"], "exclude": ["qkv"]}
    )
    reasons = {decision.site.name: decision.reason for decision in plan if isinstance(decision, Skipped)}
    assert reasons["layer.0.qkv"] == "select[1]: exclude has 'qkv'"
    plan = planned({"target": ["q", "embed"], "layers": [0, "2-4"], "optional": True})
    reasons = {decision.site.name: decision.reason for decision in plan if isinstance(decision, Skipped)}
    assert reasons["layer.1.q"] == 'select[0] names it; its layer 1 is not in [0, "2-4"]'
    assert reasons["embed"] == 'select[0] names it; it is in no numbered layer, and layers is [0, "2-4"]'
    assert reasons["layer.1.up"] == "no selection names it"


def test_a_model_without_attention_is_told_so_in_one_sentence_by_rules_that_select_by_its_roles() -> None:
    purposes = {"embed": Purpose(("embedding",)), "layer.1.up": Purpose(("mlp.up",))}
    with pytest.raises(lora_fx.RuleError) as caught:
        plan_sites((MODEL[0], MODEL[3]), load("auto", "fnet"), purposes)
    assert str(caught.value) == (
        "rules='auto': the model has no attention projections, which select[0] asks for by role: name modules, as in rules=['embed', 'up'], "
        "or say rules='all-linear'; its sites end in embed, up"
    )


def test_a_selection_without_a_match_is_an_error_unless_it_is_optional() -> None:
    with pytest.raises(
        lora_fx.RuleError, match=r"select\[1\] matches no call site: of 'layer\.1\.up', its role is mlp\.up, not router"
    ):
        planned({"target": ["q"]}, {"target": ["up"], "role": ["router"]})
    assert len(planned({"target": ["q"]}, {"target": ["up"], "role": ["router"], "optional": True}).chosen) == 1


def test_a_later_selection_replaces_an_earlier_one_only_if_it_says_so() -> None:
    plan = planned({"layers": ["0-"]}, {"target": ["q"], "rank": 4, "scaling": "rslora", "alpha": 6, "override": True})
    settings = {chosen.site.name: chosen.branches[0].setting for chosen in plan.chosen}
    assert (settings["layer.0.qkv"].rank, settings["layer.1.q"].rank) == (2, 4)
    assert settings["layer.1.q"].scale == 3
    same = planned({"layers": ["0-"]}, {"target": ["q"], "rank": 2})
    assert same.chosen[1].rule == "custom:select[0]"


def test_parts_of_one_site_may_have_settings_of_their_own() -> None:
    plan = planned(
        {"target": ["qkv"], "features": ["query"], "rank": 3}, {"target": ["qkv"], "features": ["value"], "rank": 1}
    )
    (chosen,) = plan.chosen
    assert [(b.part, b.setting.rank, b.features) for b in chosen.branches] == [
        ("query", 3, Features(((0, 4),))),
        ("value", 1, Features(((6, 8),))),
    ]
    assert plan.parameters == 3 * (12 + 4) + 1 * (12 + 2)
    assert "chosen: custom:select[0], select[1], query and value" in str(plan)
    with pytest.raises(
        lora_fx.RuleError, match=r"both claim 'layer\.0\.qkv', with rank 2.*for all.* and rank 2.*for query"
    ):
        planned({"target": ["qkv"]}, {"target": ["qkv"], "features": ["query"]})
    (narrow,) = planned({"target": ["qkv"], "features": ["query", "value"], "rank": 3, "alpha": 6}).chosen
    assert [(b.setting.rank, b.setting.rule_rank, b.setting.scale) for b in narrow.branches] == [
        (3, None, 2),
        (2, 3, 2),
    ]


def test_calls_of_one_module_share_a_branch_or_have_one_each() -> None:
    shared, each = planned({"target": ["shared"]}), planned({"target": ["shared"], "calls": "each"})
    assert [chosen.branches[0].owner for chosen in shared.chosen] == ["shared", "shared"]
    assert [chosen.branches[0].owner for chosen in each.chosen] == ["shared@1", "shared@2"]
    assert (shared.parameters, each.parameters) == (2 * 20, 2 * 2 * 20)


def test_all_problems_of_a_plan_are_named_at_once() -> None:
    with pytest.raises(lora_fx.RuleError) as caught:
        planned({"target": ["q"]}, {"target": ["q"], "rank": 1}, {"target": ["nowhere"]}, {"target": ["elsewhere"]})
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_a_rank_of_the_rules_is_lowered_to_the_width_of_a_site_and_its_scale_stays(scaling: str) -> None:
    defaults = {"rank": 9, "alpha": 6, "scaling": scaling}
    rules = load(
        {"defaults": defaults, "select": [{"target": ["0.q"]}, {"target": ["1.q"]}, {"target": ["seq"], "rank": 20}]}
    )
    plan = plan_sites(SITES, rules)
    settings = [chosen.branches[0].setting for chosen in plan.chosen]
    assert [(setting.rank, setting.rule_rank) for setting in settings] == [(8, 9), (8, 20), (9, None)]
    divisors = (9, 20, 9) if scaling == "standard" else (9**0.5, 20**0.5, 3)
    assert [setting.scale for setting in settings] == [6 / divisor for divisor in divisors]
    assert [site["branches"][0]["scale"] for site in as_data(plan)["sites"]] == [setting.scale for setting in settings]
    given = plan_sites(
        SITES, rules.with_overrides(11, None, None)
    )  # a selection's own rank is not what the argument replaces
    settings = [chosen.branches[0].setting for chosen in given.chosen]
    assert [(setting.rank, setting.rule_rank) for setting in settings] == [(11, None), (8, 20), (11, None)]


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
    for name in ("a.b", "", "class", "training", "forward", "a/b", "lora_A", 'a"b', None):
        with pytest.raises(lora_fx.PlanError, match=f"adapter={name!r} cannot be part of a parameter's name"):
            lora_fx.rewrite(graph_module, rules="bert", adapter=name)


def test_a_quantised_weight_is_refused() -> None:
    graph_module = lora_fx.trace(build("bert"))
    query = graph_module.get_submodule("encoder.layer.0.attention.self.query")
    query.weight = torch.nn.Parameter(query.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(lora_fx.PlanError, match=r"query' has a weight of dtype torch\.int8.*Dequantise"):
        lora_fx.rewrite(graph_module, rules="bert")


class Separable(nn.Module):
    """A depthwise convolution, one over all channels, and a linear layer, of no library."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.pointwise = nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1)
        self.hidden, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.hidden(self.pointwise(self.depthwise(x)).mean((2, 3))).relu())


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("all-conv", {"pointwise"}),
        ("all-linear", {"hidden"}),  # out is its head
        ({"select": [{"op": ["conv2d"], "groups": {"min": 2}}]}, {"depthwise"}),
        ({"select": [{"groups": {"max": 1}}]}, {"pointwise", "hidden", "out"}),
    ],
    ids=["all-conv", "all-linear", "in groups", "not in groups"],
)
def test_rules_tell_convolutions_in_groups_in_a_model_of_no_library(rules: Any, expected: set[str]) -> None:
    graph = lora_fx.trace(Separable().eval(), (torch.randn(2, 6, 5, 5),), inference=True)
    assert {chosen.site.module for chosen in lora_fx.plan(graph, rules).chosen} == expected
