"""Branches for parts of a fused projection, for single calls of a module, and of other scalings and starts."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import families
import peft
import pytest
import torch
from architectures import build, inputs, model, run, traced
from conftest import all_acting, set_factors, unchanged
from graph_diff import first_difference
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx.tracing.example_inputs import example_inputs

RULES: dict[str, Any] = {
    "defaults": {"rank": 3, "alpha": 5, "dropout": 0.2},
    "select": [{"role": ["attention.query"], "features": ["query", "value"]}],
}
FUSED = ("gpt2", "bloom", "gpt_neox", "deberta", "chatglm")


def own(name: str, graph_module: lora_fx.TracedGraphModule) -> torch.Tensor:
    output = run(name, graph_module, 3, 11)
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FUSED])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def rewritten(name: str) -> lora_fx.TracedGraphModule:
    base = traced(name)
    with unchanged(base):
        graph_module = lora_fx.rewrite(base, rules=RULES)
    set_factors(graph_module)
    return graph_module.eval()


def test_a_part_has_factors_of_its_own_and_folds_into_its_rows_alone(name: str) -> None:
    graph_module, base = rewritten(name), traced(name)
    plan = lora_fx.plan(base, rules=RULES)
    with unchanged(graph_module):
        merged = lora_fx.fold(graph_module)
    assert torch.allclose(own(name, merged), own(name, graph_module), rtol=0, atol=1e-5)
    assert not torch.allclose(own(name, merged), own(name, base), rtol=0, atol=1e-3)
    assert first_difference(merged, base) is None
    assert first_difference(lora_fx.unload(graph_module), base) is None
    before, after = base.state_dict(), merged.state_dict()
    assert list(before) == list(after)
    for chosen in plan.chosen:
        site = chosen.site
        assert [branch.part for branch in chosen.branches] == ["query", "value"]
        old, new = (
            weights[site.weight] if site.layout == "out_in" else weights[site.weight].T for weights in (before, after)
        )
        rows = {row for branch in chosen.branches for row in branch.features or ()}
        assert 0 < len(rows) < site.out_features
        changed = {row for row in range(site.out_features) if not torch.equal(old[row], new[row])}
        assert changed == rows
        for branch in chosen.branches:
            assert graph_module.get_parameter(branch.names("default").b).shape == (len(branch.features or ()), 3)


def test_a_dense_adapter_with_zero_rows_gives_the_same(name: str) -> None:
    """As PEFT sees it: one adapter whose rank is the sum of those of the parts, and whose B is zero elsewhere."""
    graph_module, base = rewritten(name), traced(name)
    plan = lora_fx.plan(base, rules=RULES)
    targets = sorted({chosen.site.module for chosen in plan.chosen})
    config = peft.LoraConfig(r=6, lora_alpha=10, target_modules=targets, fan_in_fan_out=name == "gpt2")
    theirs = peft.get_peft_model(copy.deepcopy(model(name)), config).eval()
    with torch.no_grad():
        for chosen in plan.chosen:
            layer = theirs.base_model.model.get_submodule(chosen.site.module)
            layer.lora_B["default"].weight.zero_()
            for index, branch in enumerate(chosen.branches):
                names, span = branch.names("default"), slice(3 * index, 3 * index + 3)
                layer.lora_A["default"].weight[span] = graph_module.get_parameter(names.a)
                layer.lora_B["default"].weight[list(branch.features or ()), span] = graph_module.get_parameter(names.b)
    expected = run(name, theirs, 3, 11)
    expected = expected if isinstance(expected, torch.Tensor) else expected[0]
    assert torch.allclose(own(name, graph_module), expected, rtol=0, atol=1e-6 * max(1.0, float(expected.abs().max())))


def test_parts_come_back_from_the_one_branch_that_is_written(name: str, tmp_path: Path) -> None:
    graph_module = rewritten(name)
    lora_fx.save_adapter(graph_module, tmp_path / "adapter")
    other = copy.deepcopy(graph_module)
    set_factors(other, seed=5)
    loaded = lora_fx.load_adapter(other, tmp_path / "adapter")
    wanted = graph_module.state_dict()
    assert {key: torch.equal(value, wanted[key]) for key, value in loaded.state_dict().items()} == dict.fromkeys(
        wanted, True
    )
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    b = next(key for key in tensors if "lora_B" in key)
    tensors[b] += 1  # not only in the rows that are a part's own
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(lora_fx.AdapterError, match="no branch against rank 6"):
        lora_fx.load_adapter(other, tmp_path / "adapter")


def test_a_part_trains_and_survives_copies(name: str) -> None:
    graph_module = rewritten(name)
    copies = (copy.deepcopy(graph_module), pickle.loads(pickle.dumps(graph_module)))
    for copied in copies:
        assert torch.equal(own(name, copied), own(name, graph_module))
        assert torch.equal(own(name, lora_fx.fold(copied)), own(name, lora_fx.fold(graph_module)))
    graph_module.train()
    own(name, graph_module).square().mean().backward()
    trained = [n for n, p in graph_module.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)]
    assert trained == [n for n, p in graph_module.named_parameters() if p.requires_grad]
    assert all(".lora_" in n for n in trained)
    moved = lora_fx.transfer(graph_module.eval(), onto=traced(name)).eval()
    assert torch.equal(own(name, moved), own(name, graph_module))


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_unequal_parts_of_multi_query_attention(part: str) -> None:
    base = families.traced("falcon-grouped")
    graph_module = lora_fx.rewrite(base, {"select": [{"target": ["query_key_value"], "features": [part], "rank": 2}]})
    set_factors(graph_module)
    batch = {
        key: value
        for key, value in example_inputs(families.build("falcon-grouped"), None).kwargs.items()
        if isinstance(value, torch.Tensor)
    }
    merged = lora_fx.fold(graph_module)
    assert torch.allclose(merged(**batch)[0], graph_module(**batch)[0], rtol=0, atol=1e-5)
    assert not torch.allclose(merged(**batch)[0], base(**batch)[0], rtol=0, atol=1e-4)


def test_parts_of_a_half_precision_base_are_rounded_once() -> None:
    base = lora_fx.trace(build("gpt2").bfloat16(), inference=True)
    graph_module = lora_fx.rewrite(base, rules=RULES)
    set_factors(graph_module)
    assert own("gpt2", graph_module).dtype == torch.bfloat16
    merged, plan = lora_fx.fold(graph_module), lora_fx.plan(base, rules=RULES)
    site, branches = plan.chosen[0].site, plan.chosen[0].branches
    exact = base.get_parameter(site.weight).double().T.clone()
    for branch in branches:
        a, b = (graph_module.get_parameter(n).double() for n in (branch.names("default").a, branch.names("default").b))
        exact[list(branch.features or ())] += branch.setting.scale * b @ a
    assert (exact.bfloat16() != merged.get_parameter(site.weight).T).float().mean() <= 1e-4


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.between = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(torch.tanh(self.between(self.shared(x))))


def test_calls_of_a_module_share_one_adapter_or_train_apart() -> None:
    x = torch.randn(5, 6)
    base = lora_fx.trace(Twice(), (x,))
    shared = lora_fx.rewrite(base, {"select": [{"target": ["shared"], "rank": 2}]})
    assert [n for n, p in shared.named_parameters() if p.requires_grad] == [
        "shared.lora_A.default.weight",
        "shared.lora_B.default.weight",
    ]
    each = lora_fx.rewrite(base, {"select": [{"target": ["shared"], "rank": 2, "calls": "each"}]})
    factors = [n for n, p in each.named_parameters() if p.requires_grad]
    assert factors == [f"shared@{call}.lora_{part}.default.weight" for call in (1, 2) for part in "AB"]
    set_factors(each)
    optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
    each.train()(x).square().mean().backward()
    optimizer.step()
    first, second = (each.get_parameter(f"shared@{call}.lora_B.default.weight") for call in (1, 2))
    assert not torch.equal(first.grad, second.grad)
    assert not torch.equal(first, second)
    with pytest.raises(
        lora_fx.FoldError, match=r"'shared\.weight' is used 2 times, and its uses need different values"
    ):
        lora_fx.fold(each)
    assert torch.allclose(lora_fx.unload(each)(x), base(x))
    set_factors(shared)
    assert torch.allclose(lora_fx.fold(shared)(x), shared(x), atol=1e-6)


def test_one_call_alone_gets_a_branch() -> None:
    x = torch.randn(5, 6)
    base = lora_fx.trace(Twice(), (x,))
    second = lora_fx.rewrite(base, {"select": [{"target": ["shared"], "rank": 2, "calls": [2]}]})
    set_factors(second)
    weight, bias = base.get_parameter("shared.weight"), base.get_parameter("shared.bias")
    a, b = (second.get_parameter(f"shared@2.lora_{part}.default.weight") for part in "AB")
    inner = torch.tanh(
        (x @ weight.T + bias) @ base.get_parameter("between.weight").T + base.get_parameter("between.bias")
    )
    expected = inner @ (weight + 4 * b @ a).T + bias
    assert torch.allclose(second(x), expected, atol=1e-5)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.inner = nn.Module()
        self.inner.table = nn.Parameter(torch.randn(4, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight) @ self.inner.table


def test_a_bare_parameter_is_a_site_under_its_full_name() -> None:
    x = torch.randn(5, 6)
    eager = Bare()
    base = lora_fx.trace(eager, (x,))
    plan = lora_fx.plan(base, {"select": [{"target": ["weight", "table"], "rank": 2}]})
    assert [(c.site.name, c.site.layout, c.site.in_features, c.site.out_features) for c in plan.chosen] == [
        ("weight", "in_out", 6, 4),
        ("inner.table", "in_out", 4, 9),
    ]
    graph_module = lora_fx.rewrite(base, plan.rules)
    assert torch.equal(graph_module(x), eager(x))
    set_factors(graph_module)
    merged = lora_fx.fold(graph_module)
    assert torch.allclose(merged(x), graph_module(x), atol=1e-5)
    assert list(merged.state_dict()) == list(eager.state_dict())


def test_a_buffer_and_a_vector_are_no_places_for_a_branch() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(6, 6))
            self.vector = nn.Parameter(torch.randn(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x @ self.table, self.vector)

    base = lora_fx.trace(Odd(), (torch.randn(5, 6),))
    assert [decision.site.name for decision in lora_fx.plan(base, {"select": [{"target": ["table"], "rank": 2}]})] == [
        "table"
    ]
    with pytest.raises(lora_fx.PlanError, match="'table' multiplies by a buffer, 'table': make it a parameter"):
        lora_fx.rewrite(base, {"select": [{"target": ["table"], "rank": 2}]})


@pytest.mark.parametrize(("scaling", "init"), [("rslora", "kaiming"), ("standard", "gaussian"), ("rslora", "gaussian")])
def test_scaling_and_start_are_those_of_peft(scaling: str, init: str) -> None:
    eager = model("bert")
    rules = {
        "defaults": {"rank": 6, "alpha": 9, "scaling": scaling, "init": init},
        "select": [{"target": ["query", "value"]}],
    }
    graph_module = lora_fx.rewrite(traced("bert"), rules, seed=5)
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=6,
        lora_alpha=9,
        target_modules=["query", "value"],
        use_rslora=scaling == "rslora",
        init_lora_weights=True if init == "kaiming" else "gaussian",
    )
    theirs = peft.get_peft_model(copy.deepcopy(eager), config)
    for name, parameter in theirs.named_parameters():
        if ".lora_" in name:
            assert torch.equal(graph_module.get_parameter(name.removeprefix("base_model.model.")), parameter), name
    set_factors(graph_module)
    set_factors(theirs)
    batch = inputs("bert", 3, 11)
    assert torch.equal(graph_module.eval()(**batch)[0], theirs.eval()(**batch)[0])


def test_the_calls_of_alberts_one_layer_share_their_adapters_or_train_apart() -> None:
    base = families.traced("albert")
    shared = lora_fx.rewrite(base, {"select": [{"role": ["attention.query"], "rank": 2}]})
    layer = "encoder.albert_layer_groups.0.albert_layers.0.attention.query"
    factors = [name for name, _ in shared.named_parameters() if ".lora_" in name]
    assert factors == [f"{layer}.lora_{part}.default.weight" for part in "AB"]
    each = lora_fx.rewrite(base, {"select": [{"role": ["attention.query"], "rank": 2, "calls": "each"}]})
    own = [name for name, _ in each.named_parameters() if ".lora_A." in name]
    assert own == [f"{layer}@{call}.lora_A.default.weight" for call in (1, 2, 3)]
    batch = {
        key: value
        for key, value in example_inputs(families.model("albert"), None).kwargs.items()
        if isinstance(value, torch.Tensor)
    }
    set_factors(shared)
    assert torch.allclose(lora_fx.fold(shared)(**batch)[0], shared(**batch)[0], atol=1e-5)
    set_factors(each)
    for parameter in each.parameters():
        parameter.requires_grad_(True)
    each(**batch)[0].square().mean().backward()
    gradients = [each.get_parameter(name).grad for name in own]
    assert not torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[1], gradients[2])


def test_a_weight_that_is_used_both_ways_has_no_shared_branch() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lin(x) @ self.lin.weight

    x = torch.randn(5, 6)
    base = lora_fx.trace(Both(), (x,))
    with pytest.raises(lora_fx.PlanError, match="the calls of 'lin' multiply by its weight in both layouts"):
        lora_fx.rewrite(base, {"select": [{"target": ["lin"], "rank": 2}]})
    each = lora_fx.rewrite(base, {"select": [{"target": ["lin"], "rank": 2, "calls": "each"}]})
    assert torch.equal(each(x), base(x))
    assert each.get_parameter("lin@1.lora_A.default.weight").shape == (2, 6)
    assert each.get_parameter("lin@2.lora_A.default.weight").shape == (2, 4)


def test_roles_and_parts_of_a_graph_that_has_branches_are_those_of_its_base() -> None:
    base = traced("gpt2")
    first = lora_fx.rewrite(base, {"select": [{"target": ["c_attn", "c_fc"], "rank": 4}]})
    bare, branched = lora_fx.plan(base, rules=RULES), lora_fx.plan(first, rules=RULES)
    assert [(d.site.name, d.purpose) for d in branched] == [(d.site.name, d.purpose) for d in bare]
    second = all_acting(lora_fx.rewrite(first, rules=RULES, adapter="second"))
    set_factors(second)
    assert len(lora_fx.fold_report(second, lora_fx.fold(second))) == 4
    assert torch.allclose(own("gpt2", lora_fx.fold(second)), own("gpt2", second.eval()), rtol=0, atol=1e-5)
