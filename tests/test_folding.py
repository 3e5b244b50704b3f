from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, EACH, SIZES, branched, build, inputs, model, rows, run, traced
from conftest import all_acting, set_factors, unchanged
from graph_diff import first_difference
from torch import fx, nn

import lora_fx

aten = torch.ops.aten


@pytest.fixture(scope="module", params=EACH)
def rewritten(request: pytest.FixtureRequest) -> tuple[str, nn.Module, lora_fx.TracedGraphModule]:
    graph_module = branched(request.param).eval()
    set_factors(graph_module, scale=0.05)
    return request.param, model(request.param), graph_module


def rounding(value: torch.Tensor) -> float:
    """Return 1e-5, or a millionth of the largest value where that is more: mT5's logits here reach 25."""
    return max(1e-5, 1e-6 * value.abs().max().item())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_folded_computes_what_the_branched_graph_computes(rewritten: Any, size: tuple[int, int, int]) -> None:
    name, _, graph_module = rewritten
    with torch.no_grad():
        before, after, base = (
            run(name, module, *size)[0] for module in (graph_module, lora_fx.fold(graph_module), traced(name))
        )
    assert torch.allclose(before, after, rtol=0, atol=rounding(before))
    assert not torch.allclose(before, base, rtol=0, atol=2 * rounding(before))  # the branches matter


@pytest.mark.parametrize("name", rows(("t5", "gpt2", "llama", "bert", "mt5"), ("gpt2",)))
def test_in_fp64_folded_and_branched_are_the_same_to_1e_12(name: str) -> None:
    graph_module = lora_fx.rewrite(
        build(name).double(), rules=ARCHITECTURES[name].rules, rank=6, alpha=9, inference=True
    )
    set_factors(graph_module)
    with torch.no_grad():
        before, after = (run(name, module, 3, 11, 5)[0] for module in (graph_module, lora_fx.fold(graph_module)))
    assert before.dtype == torch.float64
    assert torch.allclose(before, after, rtol=0, atol=1e-12)


def test_fold_and_unload_give_back_the_traced_graph_node_for_node(rewritten: Any) -> None:
    name, frozen, graph_module = rewritten
    base = traced(name)
    for restored in (lora_fx.fold(graph_module), lora_fx.unload(graph_module), lora_fx.fold(base)):
        assert first_difference(base, restored) is None
        assert list(restored.state_dict()) == list(base.state_dict())
        assert not any("lora" in name for name, _ in restored.named_modules())
    assert set(base.state_dict()) == set(frozen.state_dict())


def test_unload_gives_back_the_traced_weights(rewritten: Any) -> None:
    _, frozen, graph_module = rewritten
    weights = frozen.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in lora_fx.unload(graph_module).state_dict().items())


def test_folded_weights_load_into_the_model_and_eager_agrees(rewritten: Any) -> None:
    name, frozen, graph_module = rewritten
    folded = lora_fx.fold(graph_module)
    loaded = copy.deepcopy(frozen)
    loaded.load_state_dict(folded.state_dict(), assign=True)
    with torch.no_grad():
        eager = run(name, loaded.requires_grad_(False), 3, 11, 5)[0]
        assert torch.equal(eager, run(name, folded, 3, 11, 5)[0])
        assert torch.allclose(eager, run(name, graph_module, 3, 11, 5)[0], rtol=0, atol=rounding(eager))


def test_merged_weights_equal_the_fp64_formula(rewritten: Any) -> None:
    name, frozen, graph_module = rewritten
    factors = dict(graph_module.named_parameters())
    weights = dict(frozen.named_parameters(remove_duplicate=False))
    adapted = set()
    for key, merged in lora_fx.fold(graph_module).named_parameters(remove_duplicate=False):
        site = key.removesuffix(".weight")
        if f"{site}.lora_A.default.weight" in factors:
            a, b = (factors[f"{site}.lora_{part}.default.weight"].double() for part in "AB")
            update = 1.5 * b @ a
            expected = weights[key].double() + (update.T if ARCHITECTURES[name].fan_in_fan_out else update)
            assert torch.allclose(merged.double(), expected, rtol=0, atol=1e-6)
            assert not torch.equal(merged, weights[key])
            adapted.add(site)
        else:
            assert torch.equal(merged, weights[key])
    assert adapted == {key.split(".lora_A.")[0] for key in factors if ".lora_A." in key}


@pytest.mark.parametrize("name", rows(("t5", "gpt2", "llama", "bert"), ("gpt2",)))
def test_public_functions_change_neither_the_model_nor_the_graph(name: str) -> None:
    model = build(name)
    rules = ARCHITECTURES[name].rules
    model.train()
    with unchanged(model):
        base = lora_fx.trace(model)
        graph_module = lora_fx.rewrite(model, rules=rules)
        lora_fx.plan(model, rules=rules)
    model.eval()
    set_factors(graph_module)
    for graph in (base, graph_module):
        with unchanged(graph):
            lora_fx.fold(graph)
            lora_fx.unload(graph)
            lora_fx.rewrite(graph, rules=rules, adapter="other")
            lora_fx.plan(graph, rules=rules)
            lora_fx.trace(graph)
            lora_fx.parameter_summary(graph)
            lora_fx.activate(graph, {})
            copy.deepcopy(graph)


def test_training_and_moving_a_graph_leave_the_model_alone(rewritten: Any) -> None:
    name, frozen, _ = rewritten
    graph_module = branched(name)
    with unchanged(frozen), unchanged(traced(name)):
        graph_module.requires_grad_(True)
        graph_module.to("meta")
    assert all(p.device.type == "cpu" for p in frozen.parameters())


def test_nothing_is_copied_but_the_adapted_weights(rewritten: Any) -> None:
    _, frozen, graph_module = rewritten
    storage = {name: p.data_ptr() for name, p in frozen.named_parameters(remove_duplicate=False)}
    shared = {
        name: p.data_ptr() for name, p in graph_module.named_parameters(remove_duplicate=False) if ".lora_" not in name
    }
    assert shared == storage
    folded = {name: p.data_ptr() for name, p in lora_fx.fold(graph_module).named_parameters(remove_duplicate=False)}
    changed = {name for name in storage if storage[name] != folded[name]}
    assert changed == {
        name.replace(".lora_A.default", "") for name in dict(graph_module.named_parameters()) if ".lora_A." in name
    }


def test_fold_survives_a_deep_copy(rewritten: Any) -> None:
    _, _, graph_module = rewritten
    mine, theirs = lora_fx.fold(graph_module), lora_fx.fold(copy.deepcopy(graph_module))
    assert first_difference(mine, theirs) is None
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in mine.state_dict().items())


def test_two_adapters_fold_together() -> None:
    model = build("gpt2")
    graph_module = lora_fx.rewrite(model, rules="gpt2", rank=6, alpha=9)
    graph_module = lora_fx.rewrite(
        graph_module, rules={"select": [{"target": ["c_attn", "c_fc"]}]}, rank=3, alpha=2, adapter="second"
    )
    graph_module = all_acting(graph_module)
    set_factors(graph_module)
    batch = inputs("gpt2", 3, 11)
    folded = lora_fx.fold(graph_module)
    assert torch.allclose(graph_module(**batch)[0], folded(**batch)[0], rtol=0, atol=1e-5)
    assert first_difference(traced("gpt2"), folded) is None


# What must not be folded. Each graph is small enough to be written here.


class Tied(nn.Module):
    """One weight at two sites of two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


class Twice(nn.Module):
    """One module, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(torch.relu(self.shared(x)))


class Decoys(nn.Module):
    """Linear in ``x`` in ways that look like a branch, without being one."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Linear(5, 5)
        self.down = nn.Linear(5, 2, bias=False)
        self.up = nn.Linear(2, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.main(x) + self.up(self.down(x)) * 0.5


class Parallel(nn.Module):
    """Two linears of one input, added: each is the other's decoy."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Linear(5, 5)
        self.other = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x) + self.other(x)


class Residual(nn.Module):
    """A residual block of low rank, written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Linear(5, 2)
        self.back = nn.Linear(2, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * self.back(self.main(x))


def small(model: nn.Module, target: str, **settings: Any) -> lora_fx.TracedGraphModule:
    rules = {"select": [{"target": [target]}]}
    graph_module = lora_fx.rewrite(
        model.eval(), rules, example_inputs=(torch.randn(3, 5),), rank=2, alpha=3, **settings
    )
    set_factors(graph_module)
    return graph_module


def test_a_weight_with_an_unadapted_use_is_refused() -> None:
    with pytest.raises(
        lora_fx.FoldError,
        match=r"'first.weight' is used 2 times.*need different values.*with a branch.*without a branch",
    ):
        lora_fx.fold(small(Tied(), "first"))


def test_a_module_called_twice_shares_its_branch_and_folds_once() -> None:
    model = Twice()
    graph_module = small(model, "shared")
    assert sum(".lora_A." in name for name, _ in graph_module.named_parameters()) == 1
    x = torch.randn(7, 5)
    folded = lora_fx.fold(graph_module)
    assert torch.allclose(graph_module(x), folded(x), rtol=0, atol=1e-6)
    assert not torch.allclose(model(x), folded(x), atol=1e-3)
    assert [d.site.name for d in lora_fx.plan(graph_module, {"select": [{"target": ["shared"]}]}, rank=2)] == [
        "shared@1",
        "shared@2",
    ]


@pytest.mark.parametrize("decoy", [Decoys, Parallel, Residual])
def test_what_only_looks_like_a_branch_is_left_alone(decoy: type[nn.Module]) -> None:
    model = decoy()
    base = lora_fx.trace(model.eval(), (torch.randn(3, 5),))
    assert first_difference(base, lora_fx.fold(base)) is None
    graph_module = small(model, "main")
    assert first_difference(base, lora_fx.unload(graph_module)) is None
    x = torch.randn(7, 5)
    folded = lora_fx.fold(graph_module)
    assert first_difference(base, folded) is None
    assert torch.allclose(graph_module(x), folded(x), rtol=0, atol=1e-6)
    assert not torch.allclose(model(x), folded(x), atol=1e-3)
    for name, parameter in model.named_parameters():
        assert torch.equal(folded.get_parameter(name), parameter) is (name != "main.weight")


# Tied and shared weights of real models.


def test_an_adapter_on_a_tied_head_is_refused_where_peft_merges_it_into_the_embedding_too() -> None:
    eager = build("gpt2").requires_grad_(False)
    graph_module = lora_fx.rewrite(traced("gpt2"), {"select": [{"target": ["lm_head"]}]}, rank=6, alpha=9)
    wrapped = peft.get_peft_model(copy.deepcopy(eager), peft.LoraConfig(r=6, lora_alpha=9, target_modules=["lm_head"]))
    set_factors(graph_module)
    set_factors(wrapped.base_model.model)
    branched_logits = run("gpt2", graph_module, 3, 11)[0]
    assert torch.equal(run("gpt2", wrapped, 3, 11)[0], branched_logits)
    assert not torch.allclose(run("gpt2", wrapped.merge_and_unload(), 3, 11)[0], branched_logits, atol=1e-2)
    with pytest.raises(
        lora_fx.FoldError,
        match=r"'transformer.wte.weight' is used 2 times.*embedding \(transformer.wte, without a branch\); linear \(lm_head, with a branch\)",
    ):
        lora_fx.fold(graph_module)


def test_a_layer_that_a_model_calls_several_times_has_one_adapter_and_folds_once() -> None:
    config = transformers.AlbertConfig(
        vocab_size=97,
        embedding_size=20,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    eager = transformers.AlbertModel(config).eval().requires_grad_(False)
    graph_module = lora_fx.rewrite(eager, {"select": [{"target": ["query", "value"]}]}, rank=6, alpha=9)
    wrapped = peft.get_peft_model(
        copy.deepcopy(eager), peft.LoraConfig(r=6, lora_alpha=9, target_modules=["query", "value"])
    )
    set_factors(graph_module, scale=0.05)
    set_factors(wrapped.base_model.model, scale=0.05)
    names = [
        decision.site.name
        for decision in lora_fx.plan(graph_module, {"select": [{"target": ["query"]}]})
        if "query" in decision.site.name
    ]
    assert [name.rpartition("@")[2] for name in names] == ["1", "2", "3"]
    summary = lora_fx.parameter_summary(graph_module)
    assert (summary.trainable, summary.total) == wrapped.get_nb_trainable_parameters()
    batch = inputs("bert", 3, 11)
    expected = wrapped.eval()(**batch)[0]
    assert torch.equal(graph_module.eval()(**batch)[0], expected)
    folded = lora_fx.fold(graph_module)
    assert torch.allclose(folded(**batch)[0], expected, rtol=0, atol=1e-5)
    assert first_difference(lora_fx.trace(eager), folded) is None


def _edit(graph_module: lora_fx.TracedGraphModule, part: str, target: Any, *extra: Any) -> None:
    """Put another operator behind the node of a branch with this part."""
    node = next(n for n in graph_module.graph.nodes if n.meta.get("custom", {}).get("lora_fx", {}).get("part") == part)
    with graph_module.graph.inserting_after(node):
        new = graph_module.graph.call_function(target, (node, *extra))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    graph_module.recompile()


@pytest.mark.parametrize(
    ("part", "target", "extra"),
    [
        ("A", aten.gelu.default, ()),
        ("B", aten.relu.default, ()),
        ("scale", aten.add.Tensor, (1.0,)),
        ("B", aten.dropout.default, (0.5, True)),
    ],
    ids=["gelu", "relu", "shift", "foreign dropout"],
)
def test_a_branch_that_computes_something_else_is_refused_by_node(
    part: str, target: Any, extra: tuple[Any, ...]
) -> None:
    graph_module = small(Decoys(), "main")
    _edit(graph_module, part, target, *extra)
    with pytest.raises(lora_fx.FoldError, match=rf"a branch cannot be folded: .*{target._schema.name.split('::')[1]}"):
        lora_fx.fold(graph_module)


def test_an_output_that_is_read_before_its_branch_is_added_is_refused() -> None:
    graph_module = small(Decoys(), "main")
    site = next(n for n in graph_module.graph.nodes if n.name == "linear")
    end = next(n for n in graph_module.graph.nodes if n.meta.get("custom", {}).get("lora_fx", {}).get("part") == "add")
    user = next(iter(end.users))
    user.replace_input_with(end, site)
    with graph_module.graph.inserting_after(user):
        again = graph_module.graph.call_function(aten.add.Tensor, (user, end))
    user.replace_all_uses_with(again, delete_user_cb=lambda u: u is not again)
    graph_module.recompile()
    with pytest.raises(lora_fx.FoldError, match="before all branches are added"):
        lora_fx.fold(graph_module)


def test_meta_weights_and_non_finite_results_are_refused() -> None:
    with pytest.raises(lora_fx.FoldError, match="meta device"):
        lora_fx.fold(small(Decoys(), "main").to("meta"))
    graph_module = small(Decoys(), "main")
    with torch.no_grad():
        graph_module.main.lora_B.default.weight[0, 0] = float("nan")
    with pytest.raises(lora_fx.FoldError, match=r"'main.weight' non-finite"):
        lora_fx.fold(graph_module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_base_gets_fp32_factors_and_folds_with_one_rounding(dtype: torch.dtype) -> None:
    model = Decoys().to(dtype)
    rules = {"select": [{"target": ["main"]}]}
    graph_module = lora_fx.rewrite(model, rules, example_inputs=(torch.randn(3, 5).to(dtype),), rank=2, alpha=3)
    set_factors(graph_module)
    a, b = graph_module.main.lora_A.default.weight, graph_module.main.lora_B.default.weight
    assert a.dtype == b.dtype == torch.float32
    folded = lora_fx.fold(graph_module)
    exact = model.main.weight.double() + 1.5 * b.double() @ a.double()
    assert torch.equal(folded.main.weight, exact.to(dtype))
    assert first_difference(lora_fx.trace(model, (torch.randn(3, 5).to(dtype),)), folded) is None
    x = torch.randn(7, 5).to(dtype)
    assert graph_module(x).dtype == dtype
    assert torch.allclose(graph_module(x).float(), folded(x).float(), atol=0.1)


def test_a_graph_that_was_copied_by_fx_folds_too() -> None:
    graph_module = small(Decoys(), "main", inference=True)
    expected = lora_fx.fold(graph_module)
    graph_module.graph = fx.Transformer(graph_module).transform().graph
    graph_module.graph.eliminate_dead_code()
    x = torch.randn(7, 5)
    assert torch.equal(lora_fx.fold(graph_module)(x), expected(x))
