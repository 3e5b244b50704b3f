from __future__ import annotations

import copy
import functools
import operator
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from architectures import PRIMARY, build, few, rows, run, traced
from conftest import all_acting, set_factors, unchanged
from graph_diff import first_difference
from made import X, module
from torch import nn

import lora_fx
from lora_fx.branches.lower import lower
from lora_fx.graph.aten_kinds import shape_of
from lora_fx.numerics.fused_branch import add_update, reduce_features

EVERY = {
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "key", "value", "dense"],
}


EITHER = [
    pytest.param(row.values[0], dtype, marks=row.marks)
    for dtype, names, representatives in (
        (torch.float32, EVERY, ("t5", "bert")),
        (torch.bfloat16, ("llama", "bert"), ("bert",)),
    )
    for row in rows(names, representatives)
]


def branched(name: str, model: nn.Module, **settings: Any) -> lora_fx.TracedGraphModule:
    """Return a graph with a branch beside every linear site of the layers; the scaling of 1.5 is not a power of two."""
    rules = {"defaults": {"rank": 6, "alpha": 9}, "select": [{"target": EVERY[name]}]}
    graph_module = lora_fx.rewrite(model, rules=rules, **settings)
    set_factors(graph_module, scale=0.05)
    return graph_module


@functools.cache
def plain(name: str, dtype: torch.dtype = torch.float32) -> lora_fx.TracedGraphModule:
    """Return the one such graph of an architecture, in eval mode. Not to be changed."""
    return branched(name, traced(name) if dtype == torch.float32 else build(name).to(dtype))


@functools.cache
def exact(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return what the graph of the same weights gives in double precision."""
    graph_module = branched(name, build(name).to(dtype).double(), inference=True)
    for key, parameter in graph_module.named_parameters():
        parameter.requires_grad_(".lora_" in key)
    return results(name, graph_module)


def results(name: str, graph_module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the output and the gradients of all factors."""
    return outcome(run(name, graph_module, 3, 11, 5)[0], dict(graph_module.named_parameters()))


def outcome(output: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return an output and the gradients that it gives to those of these tensors that have one."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.dtype)
    trained = {key: tensor for key, tensor in tensors.items() if tensor.requires_grad}
    gradients = torch.autograd.grad((output * weight).sum(), list(trained.values()), allow_unused=True)
    found = {key: value for key, value in zip(trained, gradients, strict=True) if value is not None}
    return {"output": output.detach(), **found}


def kept(graph_module: nn.Module, x: torch.Tensor) -> int:
    """Return the bytes that a graph keeps for its backward pass, beside its parameters."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = graph_module(x)
    assert outputs[0].requires_grad
    own = {p.untyped_storage().data_ptr() for p in graph_module.parameters()}
    return sum(tensor.untyped_storage().nbytes() for key, tensor in storages.items() if key not in own)


def distances(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the relative distance of each result from the exact one."""
    assert list(found) == list(expected)
    return torch.stack([(found[key] - value).norm() / value.norm() for key, value in expected.items()])


def count(graph_module: lora_fx.TracedGraphModule, target: Callable[..., Any]) -> int:
    return len(graph_module.graph.find_nodes(op="call_function", target=target))


def nodes_of_factors(graph_module: lora_fx.TracedGraphModule) -> list[Any]:
    return [
        node.target
        for node in graph_module.graph.nodes
        if any(source.op == "get_attr" and ".lora_" in str(source.target) for source in node.all_input_nodes)
    ]


@pytest.mark.parametrize(("name", "dtype"), EITHER)
def test_outputs_and_gradients_are_no_farther_from_fp64_than_those_of_the_plain_graph(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_fx.numerics.fused_branch.MIN_ELEMENTS", 0)  # as if all were large
    before, after = (
        distances(results(name, graph), exact(name, dtype))
        for graph in (plain(name, dtype), lora_fx.fuse(plain(name, dtype)))
    )
    assert after.square().mean().sqrt() <= 1.1 * before.square().mean().sqrt()
    assert (after <= 2 * before).all()
    assert before.max() < (1e-5 if dtype == torch.float32 else 0.5)


@pytest.mark.parametrize("name", PRIMARY)
def test_without_gradients_outputs_are_the_same_to_rounding(name: str) -> None:
    with torch.no_grad():
        for size in ((1, 4, 2), (4, 9, 1)):
            before, after = (run(name, graph, *size)[0] for graph in (plain(name), lora_fx.fuse(plain(name))))
            assert torch.allclose(before, after, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "groups", "branches"),
    [
        ("llama", 2 * len(["q k v", "o", "gate up", "down"]), 2 * 7),
        ("gpt2", 2 * 4, 2 * 4),
        ("bert", 2 * len(["query key value", "output", "up", "down"]) + 1, 2 * 6 + 1),
        ("t5", 2 * 4 + 2 * len(["q k v", "o", "cross q", "cross o", "wi", "wo"]) + 1, 2 * 6 + 2 * 10),
    ],
)
def test_branches_that_read_one_input_share_one_product(name: str, groups: int, branches: int) -> None:
    fused = lora_fx.fuse(plain(name))
    assert (count(fused, reduce_features), count(fused, add_update)) == (groups, branches)
    assert set(nodes_of_factors(fused)) == {reduce_features, add_update}


def test_q_k_and_v_of_llama_are_one_group_and_gate_and_up_another() -> None:
    grouped = [
        [str(factor.target).split(".lora_A.")[0] for factor in node.args[1]]
        for node in lora_fx.fuse(plain("llama")).graph.find_nodes(op="call_function", target=reduce_features)
    ]
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert grouped[:4] == [
        [f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"],
        [f"{attention}.o_proj"],
        [f"{mlp}.gate_proj", f"{mlp}.up_proj"],
        [f"{mlp}.down_proj"],
    ]


@pytest.mark.parametrize(("name", "dtype"), EITHER)
def test_lowered_is_the_plain_graph_node_for_node_with_its_metadata(name: str, dtype: torch.dtype) -> None:
    assert_same_nodes(lower(lora_fx.fuse(plain(name, dtype))), plain(name, dtype))


def assert_same_nodes(graph_module: lora_fx.TracedGraphModule, expected: lora_fx.TracedGraphModule) -> None:
    """Fail unless two graphs are the same node for node, metadata included."""
    assert first_difference(graph_module, expected) is None
    for node, other in zip(graph_module.graph.nodes, expected.graph.nodes, strict=True):
        for key in ("custom", "nn_module_stack", "stack_trace"):
            assert node.meta.get(key) == other.meta.get(key)
        mine, theirs = node.meta.get("val"), other.meta.get("val")
        assert type(mine) is type(theirs)
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == theirs.dtype
            assert shape_of(node) == shape_of(other)


def test_a_graph_that_is_not_fused_is_lowered_to_itself() -> None:
    assert lower(plain("llama")) is plain("llama")


@pytest.mark.parametrize("through", [copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))])
def test_copies_compute_the_same_and_lower_to_the_same_nodes(through: Callable[[Any], Any]) -> None:
    fused = lora_fx.fuse(plain("llama", torch.bfloat16))
    copied = through(fused)
    mine, theirs = results("llama", fused), results("llama", copied)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert first_difference(lower(copied), plain("llama", torch.bfloat16)) is None


@pytest.mark.parametrize("name", PRIMARY)
def test_fold_after_fuse_gives_the_same_graph_and_the_same_weights_bit_for_bit(name: str) -> None:
    expected, found = lora_fx.fold(plain(name)), lora_fx.fold(lower(lora_fx.fuse(plain(name))))
    assert first_difference(expected, found) is None
    weights = expected.state_dict()
    assert list(weights) == list(found.state_dict())
    assert all(torch.equal(tensor, weights[key]) for key, tensor in found.state_dict().items())
    assert first_difference(lora_fx.unload(lower(lora_fx.fuse(plain(name)))), lora_fx.unload(plain(name))) is None


def test_lowering_needs_no_metadata() -> None:
    fused = lora_fx.fuse(plain("llama", torch.bfloat16))
    for node in fused.graph.nodes:
        node.meta.clear()
    expected = lora_fx.fold(plain("llama", torch.bfloat16)).state_dict()
    found = lora_fx.fold(lower(fused)).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_neither_fuse_nor_lower_changes_its_argument() -> None:
    with unchanged(plain("llama")):
        fused = lora_fx.fuse(plain("llama"))
    with unchanged(fused):
        lower(fused)
        lora_fx.fuse(fused)


@pytest.mark.parametrize("training", few([False, True], [True]))
def test_parameters_keep_their_names_storage_mode_and_what_trains(training: bool) -> None:
    graph_module = branched("llama", build("llama").train(training))
    graph_module.get_parameter("model.layers.1.self_attn.q_proj.lora_A.default.weight").requires_grad_(False)
    fused = lora_fx.fuse(graph_module)
    for result in (fused, lower(fused)):
        mine, theirs = (list(each.named_parameters(remove_duplicate=False)) for each in (graph_module, result))
        assert [(name, p.data_ptr(), p.requires_grad) for name, p in mine] == [
            (name, p.data_ptr(), p.requires_grad) for name, p in theirs
        ]
        assert not {id(p) for _, p in mine} & {id(p) for _, p in theirs}
        assert result.training == training
        assert result.meta == graph_module.meta
        assert str(lora_fx.parameter_summary(result)) == str(lora_fx.parameter_summary(graph_module))


def test_fusing_once_more_changes_nothing() -> None:
    fused = lora_fx.fuse(plain("llama"))
    assert first_difference(lora_fx.fuse(fused), fused) is None


def test_branches_with_dropout_and_without_share_a_group() -> None:
    rules = {
        "defaults": {"rank": 6, "alpha": 9},
        "select": [{"target": ["q_proj", "v_proj"]}, {"target": ["k_proj", "o_proj"], "dropout": 0.1}],
    }
    graph_module = lora_fx.rewrite(build("llama").train(), rules=rules)
    set_factors(graph_module, scale=0.05)
    fused = lora_fx.fuse(graph_module)
    assert (count(fused, reduce_features), count(fused, add_update)) == (4, 8)
    assert first_difference(lower(fused), graph_module) is None
    outputs = []
    for graph in (graph_module, fused):
        torch.manual_seed(3)
        outputs.append(run("llama", graph, 3, 11)[0])
    assert torch.allclose(*outputs, rtol=0, atol=1e-5)
    assert not torch.allclose(outputs[1], run("llama", fused.eval(), 3, 11)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", few([torch.float32, torch.bfloat16], [torch.float32]), ids=str)
def test_branches_of_parts_are_fused_and_lowered_as_others_are(dtype: torch.dtype) -> None:
    rules = {
        "defaults": {"rank": 6, "alpha": 9, "dropout": 0.1},
        "select": [{"role": ["attention.query"], "features": ["query", "value"]}],
    }
    graph_module = lora_fx.rewrite(build("gpt2").to(dtype), rules=rules)
    set_factors(graph_module, scale=0.05)
    assert any(".lora_places." in name for name, _ in graph_module.named_buffers())
    fused = lora_fx.fuse(graph_module)
    assert (count(fused, reduce_features), count(fused, add_update)) == (2, 4)
    assert set(nodes_of_factors(fused)) == {reduce_features, add_update}
    assert_same_nodes(lower(fused), graph_module)
    for training in (False, True):
        found = []
        for graph in (graph_module, fused):
            torch.manual_seed(3)
            found.append(results("gpt2", graph.train(training)))
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        assert distances(found[1], found[0]).max() < tolerance


def test_two_adapters_beside_one_site_share_the_product_too() -> None:
    graph_module = lora_fx.rewrite(
        plain("llama"), rules={"select": [{"target": ["q_proj", "v_proj"]}]}, rank=3, adapter="b"
    )
    graph_module = all_acting(graph_module)
    set_factors(graph_module, scale=0.05)
    fused = lora_fx.fuse(graph_module)
    assert (count(fused, reduce_features), count(fused, add_update)) == (8, 14 + 4)
    assert first_difference(lower(fused), graph_module) is None
    with torch.no_grad():
        assert torch.allclose(run("llama", graph_module, 3, 11)[0], run("llama", fused, 3, 11)[0], rtol=0, atol=1e-5)


def two(
    model: nn.Module, *inputs: torch.Tensor, **settings: Any
) -> tuple[lora_fx.TracedGraphModule, lora_fx.TracedGraphModule]:
    """Return a graph with branches beside ``lin`` and ``other``, and the same fused."""
    rules = {"defaults": {"rank": 3, "alpha": 4.5}, "select": [{"target": ["lin", "other"]}]}
    graph_module = lora_fx.rewrite(model, rules=rules, example_inputs=inputs, **settings)
    set_factors(graph_module)
    return graph_module, lora_fx.fuse(graph_module)


def test_what_is_written_to_between_two_sites_is_read_twice() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        first = self.lin(x)
        x.add_(1)
        return torch.cat([first, self.other(x)], dim=-1)

    graph_module, fused = two(module(forward, other=nn.Linear(4, 5)).eval(), X, inference=True)
    assert (count(fused, reduce_features), count(fused, add_update)) == (2, 2)
    assert torch.allclose(graph_module(X), fused(X), rtol=0, atol=1e-5)


def test_what_is_written_to_before_the_sum_is_read_before_that() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        first = x @ self.weight.T
        x.add_(1)
        return torch.cat([first + self.bias, self.other(x)], dim=-1)

    parts = {"weight": nn.Parameter(torch.randn(5, 4)), "bias": nn.Parameter(torch.randn(5)), "other": nn.Linear(4, 3)}
    rules = {"defaults": {"rank": 3, "alpha": 4.5}, "select": [{"target": ["weight", "other"]}]}
    graph_module = lora_fx.rewrite(module(forward, **parts).eval(), rules=rules, example_inputs=(X,), inference=True)
    set_factors(graph_module)
    fused = lora_fx.fuse(graph_module)
    assert (count(fused, reduce_features), count(fused, add_update)) == (2, 2)
    assert torch.allclose(graph_module(X), fused(X), rtol=0, atol=1e-5)
    assert first_difference(lower(fused), graph_module) is None


def test_the_output_of_one_site_may_be_read_before_the_next_one() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.other(x + 0 * self.lin(x).sum()) + self.other(x) * self.lin(x).sum()

    graph_module, fused = two(module(forward, other=nn.Linear(4, 5)).eval(), X)
    assert (count(fused, reduce_features), count(fused, add_update)) == (2, 4)
    assert torch.allclose(graph_module(X), fused(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("least", [0, 2**16])
def test_gradients_come_to_whatever_needs_them_at_every_number_of_dimensions(
    dtype: torch.dtype, shape: tuple[int, ...], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_fx.numerics.fused_branch.MIN_ELEMENTS", least)

    def forward(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lin(x), self.other(x)

    example = torch.randn(shape).to(dtype)
    pair = two(module(forward, other=nn.Linear(4, 5)).to(dtype).eval(), example)
    value, weights = torch.randn(shape).to(dtype), (torch.randn(*shape[:-1], 4), torch.randn(*shape[:-1], 5))
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert count(pair[1], reduce_features) == 1
    for frozen in ("none", "lin.lora_A", "lin.lora_B", "lora_A", "lora_B", "lora_"):
        for input_needs in (False, True):
            found = []
            for graph in pair:
                for key, parameter in graph.named_parameters():
                    parameter.requires_grad_(".lora_" in key and frozen not in key)
                x = value.clone().requires_grad_(input_needs)
                outputs = graph(x)
                leaves = [*([x] if input_needs else []), *(p for p in graph.parameters() if p.requires_grad)]
                loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
                found.append([*outputs, *(torch.autograd.grad(loss, leaves) if leaves else ())])
            for mine, theirs in zip(*found, strict=True):
                assert mine.dtype == theirs.dtype
                assert torch.allclose(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_site_may_read_the_output_of_another(dtype: torch.dtype) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.lin(x))

    graph_module, fused = two(module(forward, other=nn.Linear(4, 5)).to(dtype).eval(), X.to(dtype))
    assert (count(fused, reduce_features), count(fused, add_update)) == (2, 2)
    assert torch.allclose(graph_module(X.to(dtype)), fused(X.to(dtype)), rtol=1e-2, atol=1e-5)
    assert first_difference(lower(fused), graph_module) is None


def test_an_output_that_goes_unused_has_no_gradient() -> None:
    def forward(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lin(x), self.other(x)

    for dtype in (torch.float32, torch.bfloat16):
        _, fused = two(module(forward, other=nn.Linear(4, 5)).to(dtype).eval(), X.to(dtype))
        fused(X.to(dtype))[0].sum().backward()
        assert fused.get_parameter("lin.lora_A.default.weight").grad.norm() > 0
        other = fused.get_parameter("other.lora_A.default.weight").grad
        assert other is None or not other.any()


@pytest.mark.parametrize("dtype", few([torch.float32, torch.bfloat16], [torch.bfloat16]), ids=str)
def test_autocast_gives_what_it_gives_the_plain_graph(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        before, after = (
            results("llama", graph) for graph in (plain("llama", dtype), lora_fx.fuse(plain("llama", dtype)))
        )
    assert {key: value.dtype for key, value in before.items()} == {key: value.dtype for key, value in after.items()}
    wrong = [distances(found, exact("llama", dtype)).square().mean().sqrt() for found in (before, after)]
    assert wrong[1] <= 1.1 * wrong[0]


def test_beside_half_precision_the_input_is_kept_once_and_in_half_precision() -> None:
    def forward(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lin(x), self.other(x)

    x = torch.randn(7, 11, 4).bfloat16()
    graphs = two(module(forward, other=nn.Linear(4, 5)).bfloat16().eval(), x)
    before, after = (kept(graph, x) for graph in graphs)
    small = 2 * 7 * 11 * 3 * 4
    assert after == x.nbytes + small
    assert before >= 2 * 2 * x.nbytes + small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fused_graph_compiles_whole(dtype: torch.dtype) -> None:
    def forward(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lin(x), self.other(x)

    x = torch.randn(7, 11, 4).to(dtype)
    _, fused = two(module(forward, other=nn.Linear(4, 5)).to(dtype).eval(), x)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    found = []
    for call in (fused, compiled):
        outputs = call(x)
        loss = sum(output.float().square().sum() for output in outputs)
        found.append([*outputs, *torch.autograd.grad(loss, [p for p in fused.parameters() if p.requires_grad])])
    assert all(torch.allclose(mine, theirs, rtol=1e-2, atol=1e-2) for mine, theirs in zip(*found, strict=True))


def test_no_node_of_a_fused_graph_is_left_unread() -> None:
    for node in lora_fx.fuse(plain("t5")).graph.nodes:
        assert node.users or node.op in ("placeholder", "output") or node.target is not operator.getitem


@pytest.mark.parametrize("wide", [None, torch.float32], ids=str)
def test_there_may_be_no_positions(wide: torch.dtype | None) -> None:
    dtype = torch.float32 if wide is None else torch.bfloat16
    x, base = torch.empty(0, 3, 4, dtype=dtype, requires_grad=True), torch.empty(0, 3, 5, dtype=dtype)
    a, b = torch.randn(2, 4, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    output = add_update(base, reduce_features(x, [a, a], wide)[1], b, 1.5, None if wide is None else dtype)
    output.sum().backward()
    assert (output.shape, x.grad.shape) == (base.shape, x.shape)
    assert not a.grad.any()
    assert not b.grad.any()


def test_a_fused_graph_gets_one_more_adapter_as_the_plain_one_does() -> None:
    rules = {"defaults": {"rank": 3}, "select": [{"target": ["q_proj", "o_proj"]}]}
    fused = lora_fx.fuse(plain("llama"))
    mine, theirs = (lora_fx.rewrite(graph, rules=rules, adapter="more", seed=1) for graph in (fused, plain("llama")))
    mine, theirs = all_acting(mine), all_acting(theirs)
    assert first_difference(mine, theirs) is None
    assert torch.equal(run("llama", mine, 3, 11)[0], run("llama", theirs, 3, 11)[0])
