"""Several adapters on one graph: activated, combined and folded by a selection, as PEFT does where it can."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from architectures import FOUR, SIZES, build, few, model, rows, run, traced
from conftest import set_factors, unchanged
from graph_diff import first_difference
from torch import fx, nn

import lora_fx
from lora_fx.folding.fold import recipe
from lora_fx.graph.info import info_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SIZE = (3, 11, 5)
STRENGTHS = {"a": 1.0, "b": 0.5}


@functools.cache
def base(name: str, dtype: torch.dtype) -> lora_fx.TracedGraphModule:
    return traced(name) if dtype == torch.float32 else lora_fx.trace(build(name).to(dtype), inference=True)


def two(name: str = "bert", dtype: torch.dtype = torch.float32) -> lora_fx.TracedGraphModule:
    """Return a graph in which two adapters of different ranks and scalings act on overlapping sites."""
    first = lora_fx.rewrite(base(name, dtype), name if name != "blip-2-t5" else "blip-2", rank=3, alpha=5, adapter="a")
    both = lora_fx.rewrite(
        first,
        {"select": [{"role": ["attention.query", "attention.output"], "rank": 5, "alpha": 4, "scaling": "rslora"}]},
        adapter="b",
    )
    set_factors(both)
    return lora_fx.activate(both.eval(), {"a": 1.0, "b": 1.0})


def logits(graph: nn.Module, name: str = "bert") -> torch.Tensor:
    return run(name, graph, *SIZE)[0]  # type: ignore[no-any-return]


def factors(graph: nn.Module) -> dict[str, torch.Tensor]:
    return {key: p for key, p in graph.named_parameters() if ".lora_" in key}


def test_activate_keeps_just_these_branches_at_their_strengths() -> None:
    both = two()
    with unchanged(both):
        half, only_a, none = (lora_fx.activate(both, s) for s in (STRENGTHS, {"a": 1.0}, {}))
    assert first_difference(lora_fx.activate(both, {"b": 1.0, "a": 1.0}), both) is None
    assert [node.format_node() for node in none.graph.nodes] == [n.format_node() for n in traced("bert").graph.nodes]
    assert first_difference(lora_fx.unload(none), traced("bert")) is None
    assert torch.equal(logits(none), logits(traced("bert").eval()))
    assert factors(only_a).keys() == factors(both).keys()
    assert not any(".b." in str(node.target) for node in only_a.graph.nodes)
    halved = copy.deepcopy(both)
    for key, parameter in factors(halved).items():
        if ".lora_B.b." in key:
            parameter.data.mul_(0.5)
    assert torch.allclose(logits(half), logits(halved), atol=1e-6)
    assert not torch.allclose(logits(half), logits(both), atol=1e-4)
    for graph, adapters in ((half, ("a", "b")), (only_a, ("a",)), (none, ())):
        for key, parameter in factors(graph).items():
            assert parameter.data_ptr() == both.get_parameter(key).data_ptr()
            assert parameter.requires_grad == any(f".{adapter}." in key for adapter in adapters)


def test_a_strength_is_not_relative_to_the_one_before() -> None:
    both = two()
    weaker = lora_fx.activate(both, {"a": 0.25, "b": -2.0})
    assert first_difference(lora_fx.activate(weaker, {"a": 1.0, "b": 1.0}), both) is None
    assert torch.equal(logits(lora_fx.activate(weaker, STRENGTHS)), logits(lora_fx.activate(both, STRENGTHS)))


@pytest.mark.parametrize("name", FOUR)
def test_two_adapters_of_different_rank_equal_two_active_ones_of_peft(name: str) -> None:
    both = two(name)
    wrapped = copy.deepcopy(model(name))
    for adapter, rank, alpha, rslora in (("a", 3, 5, False), ("b", 5, 4, True)):
        modules = sorted({key.partition(".lora_A")[0] for key in factors(both) if f".lora_A.{adapter}." in key})
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, use_rslora=rslora)
        if adapter == "a":
            wrapped = peft.get_peft_model(wrapped, config, adapter_name="a")  # type: ignore[assignment]
        else:
            wrapped.add_adapter("b", config)
    theirs: Any = wrapped
    theirs.base_model.set_adapter(["a", "b"])
    set_factors(theirs.base_model.model)
    for size in SIZES[:2]:
        found, expected = (run(name, each, *size)[0] for each in (both, theirs.eval()))
        assert torch.equal(found, expected)
    assert not torch.equal(logits(both, name), logits(model(name), name))


@pytest.mark.parametrize("dtype", few([torch.float32, torch.float64, torch.bfloat16], [torch.float32]), ids=str)
def test_activate_then_fold_equals_fold_with_a_selection(dtype: torch.dtype) -> None:
    both = two("gpt2", dtype)
    for strengths in (STRENGTHS, {"b": 1.0}, {"a": -0.3}, {}):
        with unchanged(both):
            found, expected = lora_fx.fold(both, strengths), lora_fx.fold(lora_fx.activate(both, strengths))
        assert first_difference(found, expected) is None
        assert all(torch.equal(v, expected.state_dict()[k]) for k, v in found.state_dict().items())
        assert recipe(both, strengths) == recipe(lora_fx.activate(both, strengths))
        assert found.state_dict().keys() == build("gpt2").state_dict().keys()


def test_folding_one_leaves_the_other_working() -> None:
    both = two()
    expected = logits(both)
    merged = lora_fx.fold(both, {"a": 1.0})
    assert torch.equal(logits(both), expected)
    alone = lora_fx.activate(both, {"b": 1.0})
    onto = lora_fx.transfer(alone, onto=merged)
    assert not any(".lora_A.a." in key for key in factors(onto))
    assert torch.allclose(logits(onto), expected, atol=2e-6)
    assert torch.allclose(logits(lora_fx.fold(onto)), logits(lora_fx.fold(both)), atol=2e-6)
    assert not torch.allclose(logits(merged), expected, atol=1e-3)


@pytest.mark.parametrize("name", rows(("bert", "gpt2", "t5", "llama"), ("gpt2",)))
def test_cat_is_exact(name: str) -> None:
    both = two(name, torch.float64)
    for strengths in ({"a": 1.0, "b": 1.0}, {"a": 0.7, "b": -1.3}, {"b": 2.0}):
        with unchanged(both):
            combined = lora_fx.combine(both, strengths)
        kept = {adapter: 1.0 for adapter in ("a", "b") if adapter not in strengths}
        expected = lora_fx.activate(both, {**kept, **strengths})
        assert torch.allclose(logits(combined, name), logits(expected, name), atol=1e-13, rtol=1e-12)
        acts = {state.name: state.acts for state in lora_fx.parameter_summary(combined).adapters}
        assert acts == {"a": "a" in kept, "b": "b" in kept, "combined": True}


def test_combining_gives_the_factors_that_peft_gives() -> None:
    base = model("bert")
    theirs: Any = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "value"]), adapter_name="a"
    )
    theirs.add_adapter("b", peft.LoraConfig(r=5, lora_alpha=4, target_modules=["query", "value"]))
    theirs.add_adapter("c", peft.LoraConfig(r=3, lora_alpha=4, target_modules=["query", "value"]))
    set_factors(theirs.base_model.model)
    mine = traced("bert")
    for adapter, rank, alpha in (("a", 3, 5), ("b", 5, 4), ("c", 3, 4)):
        mine = lora_fx.rewrite(mine, "bert", rank=rank, alpha=alpha, dropout=0.0, adapter=adapter)
    set_factors(mine)
    for method, strengths in (("cat", {"a": 0.7, "b": -1.3}), ("linear", {"a": 0.7, "c": -1.3})):
        theirs.add_weighted_adapter(list(strengths), list(strengths.values()), method, combination_type=method)
        combined = lora_fx.combine(mine, strengths, adapter=method, method=method)  # type: ignore[arg-type]
        expected = {
            key.removeprefix("base_model.model."): p
            for key, p in theirs.named_parameters()
            if f".{method}." in key and ".lora_" in key
        }
        found = {key: p for key, p in factors(combined).items() if f".{method}." in key}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


class Kinds(nn.Module):
    """A convolution in groups, an embedding and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(19, 12)
        self.conv = nn.Conv1d(12, 8, 3, groups=2, padding=1)
        self.proj = nn.Linear(8, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.proj(self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2))  # type: ignore[no-any-return]


def test_every_kind_of_factor_is_combined() -> None:
    ids = torch.randint(0, 19, (3, 7))
    graph = lora_fx.trace(Kinds().double(), (ids,))
    for adapter, rank in (("a", 2), ("b", 4)):
        graph = lora_fx.rewrite(
            graph, {"select": [{"target": ["table", "conv", "proj"], "rank": rank}]}, adapter=adapter
        )
    set_factors(graph)
    graph = lora_fx.activate(graph.eval(), {"a": 1.0, "b": 1.0})
    combined = lora_fx.combine(graph, {"a": 0.5, "b": 3.0})
    expected = lora_fx.activate(graph, {"a": 0.5, "b": 3.0})
    assert torch.allclose(combined(ids), expected(ids), atol=1e-13)
    assert not torch.allclose(combined(ids), graph(ids), atol=1e-3)
    assert torch.allclose(lora_fx.fold(combined)(ids), expected(ids), atol=1e-13)


def test_stacked_experts_are_combined() -> None:
    config = transformers.MixtralConfig(
        vocab_size=60, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    mixtral = transformers.MixtralForCausalLM(config).eval()
    graph = lora_fx.trace(mixtral, inference=True)
    for adapter, rank in (("a", 4), ("b", 8)):
        graph = lora_fx.rewrite(
            graph, {"select": [{"role": ["expert.up", "expert.down"], "rank": rank}]}, adapter=adapter
        )
    set_factors(graph, scale=0.05)
    batch = {"input_ids": torch.randint(0, 60, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    combined = lora_fx.combine(graph, {"a": 0.5, "b": 3.0})
    expected = lora_fx.activate(graph, {"a": 0.5, "b": 3.0})
    assert torch.allclose(combined(**batch).logits, expected(**batch).logits, atol=1e-6)
    assert not torch.allclose(combined(**batch).logits, graph(**batch).logits, atol=1e-4)


def test_parts_of_a_projection_are_combined_part_by_part() -> None:
    graph = lora_fx.trace(build("gpt2").double())
    for adapter, parts in (("a", ["query", "value"]), ("b", ["query"])):
        rules = {"select": [{"role": ["attention.query"], "features": parts, "rank": 2}]}
        graph = lora_fx.rewrite(graph, rules, adapter=adapter)
    set_factors(graph)
    graph.eval()
    combined = lora_fx.combine(graph, {"a": 0.5, "b": 3.0})
    expected = lora_fx.activate(graph, {"a": 0.5, "b": 3.0})
    assert torch.allclose(logits(combined, "gpt2"), logits(expected, "gpt2"), atol=1e-12)


def test_what_was_combined_is_saved_as_one_adapter(tmp_path: Path) -> None:
    both = two()
    combined = lora_fx.combine(both, STRENGTHS, adapter="mixed")
    lora_fx.save_adapter(combined, tmp_path / "mixed", "mixed")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model("bert")), str(tmp_path / "mixed")).eval()
    assert torch.equal(logits(theirs), logits(combined))
    weaker = lora_fx.activate(both, {"a": 0.3})
    lora_fx.save_adapter(weaker, tmp_path / "weaker", "a")
    again = lora_fx.from_adapter(traced("bert"), tmp_path / "weaker")
    assert torch.equal(logits(again.eval()), logits(weaker))


def trained() -> lora_fx.TracedGraphModule:
    rules = {"select": [{"target": ["query"]}, {"target": ["pooler"], "trainable": "all"}]}
    graph = lora_fx.rewrite(traced("bert"), rules, adapter="t")
    graph = lora_fx.rewrite(graph, "bert", adapter="u")
    set_factors(graph)
    with torch.no_grad():
        graph.get_parameter("pooler.dense.trained_copy.t.weight").add_(0.1)
    return lora_fx.activate(graph.eval(), {"t": 1.0, "u": 1.0})


def test_trained_copies_come_and_go_with_their_adapter() -> None:
    graph = trained()
    with_it, without = (lora_fx.activate(graph, {name: 1.0}) for name in ("t", "u"))
    pooled = [run("bert", each, *SIZE).pooler_output for each in (with_it, without)]
    assert not torch.allclose(*pooled, atol=1e-3)
    assert not any("trained_copy" in str(node.target) for node in without.graph.nodes)
    combined = lora_fx.combine(graph, {"t": 1.0, "u": 0.5})
    expected = lora_fx.activate(graph, {"t": 1.0, "u": 0.5})
    assert torch.allclose(
        run("bert", combined, *SIZE).pooler_output, run("bert", expected, *SIZE).pooler_output, atol=1e-6
    )
    merged = lora_fx.fold(graph, {"t": 1.0}).get_parameter("pooler.dense.weight")
    assert torch.equal(merged, graph.get_parameter("pooler.dense.trained_copy.t.weight"))


@pytest.mark.parametrize(
    "half",
    [
        pytest.param(np.float32(0.5), marks=pytest.mark.matrix),
        np.float16(0.5),
        pytest.param(np.array(0.5), marks=pytest.mark.matrix),
        pytest.param(torch.tensor(0.5), marks=pytest.mark.matrix),
        torch.tensor(0.5).half(),
    ],
)
def test_strengths_may_be_numbers_of_numpy_and_tensors(half: Any) -> None:
    both, one = two(), np.int64(1)
    found, expected = lora_fx.activate(both, {"b": half, "a": one}), lora_fx.activate(both, {"a": 1.0, "b": 0.5})
    assert torch.equal(logits(found), logits(expected))
    assert {type(b.setting.strength) for _, b in info_of(found).adapters["b"].branches.values()} == {float}
    mine, wanted = (lora_fx.fold(both, each).state_dict() for each in ({"b": half}, {"b": 0.5}))
    assert all(torch.equal(mine[key], wanted[key]) for key in wanted)
    combined, usual = (lora_fx.combine(both, {"a": a, "b": b}) for a, b in ((one, half), (1.0, 0.5)))
    assert all(torch.equal(value, usual.state_dict()[key]) for key, value in combined.state_dict().items())
    assert info_of(combined).adapters["combined"].origin == info_of(usual).adapters["combined"].origin


def test_ranks_and_scalings_may_be_numbers_of_numpy() -> None:
    numbers: dict[str, Any] = {"rank": np.int64(3), "alpha": np.float32(5.0), "dropout": torch.tensor(0.25)}
    plain = {"rank": 3, "alpha": 5.0, "dropout": 0.25}
    settings = [
        [chosen.branches[0].setting for chosen in lora_fx.plan(traced("bert"), rules, **overrides).chosen]
        for rules, overrides in (
            ("bert", numbers),
            ({"select": [{"target": ["query", "value"], **numbers}]}, {}),
            ("bert", plain),
        )
    ]
    assert settings[0] == settings[1] == settings[2]
    with pytest.raises(lora_fx.RuleError, match=r"rank: expected an integer ≥ 1, found"):
        lora_fx.plan(traced("bert"), "bert", rank=np.float32(3.0))  # type: ignore[arg-type]


def test_what_cannot_be_selected_is_refused() -> None:
    both = two()
    for call in (lora_fx.activate, lora_fx.fold, lora_fx.recipe, lora_fx.combine):
        with unchanged(both), pytest.raises(lora_fx.PlanError, match=r"no adapter 'c'.*; it has: a, b"):
            call(both, {"a": 1.0, "c": 1.0})  # type: ignore[operator]
        with pytest.raises(lora_fx.PlanError, match="cannot have the strength nan"):
            call(both, {"a": float("nan")})  # type: ignore[operator]
    for wrong in (
        "1",
        None,
        1j,
        torch.ones(1),
        torch.tensor(1.0, requires_grad=True),
        torch.tensor(torch.inf),
        10**400,
    ):
        with pytest.raises(lora_fx.PlanError, match="cannot have the strength"):
            lora_fx.activate(both, {"a": wrong})  # type: ignore[dict-item]
    with pytest.raises(lora_fx.PlanError, match=r"expected strengths by the names of adapters, as .*, got \['a'\]"):
        lora_fx.activate(both, ["a"])  # type: ignore[arg-type]
    for problem, settings in (
        (r"expected a method of cat, linear, .*, got 'tiess'", {"method": "tiess"}),
        (r"must have one rank, and those of .* are 3, 5", {"method": "linear"}),
    ):
        with pytest.raises(lora_fx.PlanError, match=problem):
            lora_fx.combine(both, STRENGTHS, **settings)  # type: ignore[arg-type]
    with pytest.raises(lora_fx.PlanError, match="expected at least one adapter"):
        lora_fx.combine(both, {})
    with pytest.raises(lora_fx.PlanError, match="the graph already has an adapter 'b'"):
        lora_fx.combine(both, {"a": 1.0}, adapter="b")
    lost = fx.GraphModule(both, copy.deepcopy(both.graph))
    with pytest.raises(lora_fx.PlanError, match=r"its record was lost: lora_fx\.fold folds it as it is"):
        lora_fx.activate(lost, {"a": 1.0})
