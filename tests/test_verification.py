from __future__ import annotations

import copy
import gc
import itertools
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, EACH, PRIMARY, branched, build, few, inputs, traced
from conftest import all_acting, set_factors, unchanged
from torch import fx, nn

import lora_fx

aten = torch.ops.aten

LAYER_1 = {
    "t5": "encoder.block.1.layer.0.SelfAttention.q.weight",
    "gpt2": "transformer.h.1.attn.c_attn.weight",
    "llama": "model.layers.1.self_attn.v_proj.weight",
    "bert": "encoder.layer.1.attention.self.value.weight",
}
"""A weight with a branch, in the middle of each model."""

X = torch.tensor([[0.5, -1.2, 0.3, 2.0, 1.0], [-0.4, 0.8, 1.1, -0.7, 0.2], [0.1, 0.9, -2.2, 0.6, -1.5]])


@pytest.fixture(scope="module", params=PRIMARY)
def rewritten(request: pytest.FixtureRequest) -> tuple[str, lora_fx.TracedGraphModule]:
    graph_module = branched(request.param).eval()
    set_factors(graph_module, scale=0.05)
    return request.param, graph_module


def small(forward: Callable[..., Any], dtype: torch.dtype = torch.float32, **parts: Any) -> lora_fx.TracedGraphModule:
    """Return a rewrite of a module with this forward, whose linear layer ``lin`` from 5 to 7 features has a branch of rank 2."""
    model: Any = type("Made", (nn.Module,), {"forward": forward})()
    model.lin = nn.Linear(5, 7)
    for name, part in parts.items():
        setattr(model, name, part)
    rules = {"select": [{"target": ["lin"]}]}
    graph_module = lora_fx.rewrite(model.eval().to(dtype), rules, example_inputs=(X.to(dtype),), rank=2, alpha=3)
    set_factors(graph_module)
    return graph_module


def calling(graph_module: fx.GraphModule, target: Any) -> fx.Node:
    """Return the one node that calls an operator."""
    (node,) = graph_module.graph.find_nodes(op="call_function", target=target)
    return node


def reading(graph_module: fx.GraphModule, weight: str) -> str:
    """Return the name of the one node that reads a weight."""
    (attribute,) = (node for node in graph_module.graph.find_nodes(op="get_attr") if node.target == weight)
    (user,) = attribute.users
    return user.name


def tampered(graph_module: lora_fx.TracedGraphModule, weight: str) -> lora_fx.TracedGraphModule:
    """Return a copy with another value in one element of a weight."""
    changed = copy.deepcopy(graph_module)
    with torch.no_grad():
        changed.get_parameter(weight)[1, 2] += 0.5
    return changed


def departure(graph_module: Any, merged: Any, given: Any = (X,), **settings: Any) -> lora_fx.VerifyError:
    with unchanged(graph_module), unchanged(merged), pytest.raises(lora_fx.VerifyError) as raised:
        lora_fx.verify(graph_module, merged, given, **settings)
    return raised.value


# What passes.


def test_a_fold_passes_at_sizes_that_were_not_traced(rewritten: Any) -> None:
    name, graph_module = rewritten
    merged = lora_fx.fold(graph_module)
    for size in ((3, 11, 5), (1, 4, 2)):
        with unchanged(graph_module), unchanged(merged):
            agreement = lora_fx.verify(graph_module, merged, inputs(name, *size))
        assert agreement.nodes > 100
        assert 0 < agreement.largest < 1e-5
        assert agreement.node in {node.name for node in merged.graph.nodes}


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_the_fold_of_every_architecture_passes(name: str) -> None:
    graph_module = branched(name)
    set_factors(graph_module, scale=0.05)
    lora_fx.verify(graph_module, lora_fx.fold(graph_module), inputs(name, 3, 11, 5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "name"),
    few(
        itertools.product((torch.bfloat16, torch.float16, torch.float64), ("gpt2", "llama")),
        ((torch.bfloat16, "gpt2"), (torch.float16, "llama"), (torch.float64, "llama")),
    ),
    ids=str,
)
def test_the_precision_of_the_model_sets_the_tolerance(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    graph_module = lora_fx.rewrite(model, rules=ARCHITECTURES[name].rules, rank=6, alpha=9, inference=True)
    set_factors(graph_module, scale=0.05)
    agreement = lora_fx.verify(graph_module, lora_fx.fold(graph_module), inputs(name, 3, 11, 5))
    assert agreement.largest < 1e-12 if dtype is torch.float64 else 1e-4 < agreement.largest < 5e-2


def test_a_graph_without_branches_passes_to_the_last_bit() -> None:
    base = traced("bert")
    assert lora_fx.verify(base, lora_fx.fold(base), inputs("bert", 3, 11)).largest == 0


def test_inputs_are_given_by_position_or_by_name() -> None:
    graph_module = small(lambda self, x: torch.relu(self.lin(x)))
    merged = lora_fx.fold(graph_module)
    assert lora_fx.verify(graph_module, merged, (X,)) == lora_fx.verify(graph_module, merged, {"x": X})
    with pytest.raises(lora_fx.InputError, match=r"expected a mapping of keyword inputs, or a tuple, got Tensor"):
        lora_fx.verify(graph_module, merged, X)  # type: ignore[arg-type]


def test_two_adapters_pass_together() -> None:
    graph_module = lora_fx.rewrite(branched("gpt2"), {"select": [{"target": ["c_fc"]}]}, rank=3, adapter="second")
    graph_module = all_acting(graph_module)
    set_factors(graph_module, scale=0.05)
    lora_fx.verify(graph_module, lora_fx.fold(graph_module), inputs("gpt2", 3, 11))


def test_a_branch_may_be_added_behind_nodes_that_do_not_read_its_site() -> None:
    graph_module = small(lambda self, x: self.lin(x) * self.other(x), other=nn.Linear(5, 7))
    first, second = reading(graph_module, "lin.weight"), reading(graph_module, "other.weight")
    nodes = {node.name: node for node in graph_module.graph.nodes}
    (end,) = nodes[first].users
    nodes[second].append(end)
    graph_module.recompile()
    merged = lora_fx.fold(graph_module)
    lora_fx.verify(graph_module, merged, (X,))
    assert departure(graph_module, tampered(merged, "lin.weight")).node == first
    assert departure(graph_module, tampered(merged, "other.weight")).node == second


def test_writes_in_place_stay_within_each_graph() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        y.add_(1.0)
        y[:, 1:3].mul_(3.0)
        return y

    graph_module = small(forward)
    merged = lora_fx.fold(graph_module)
    assert any(node.target is aten.add_.Tensor for node in merged.graph.nodes)
    lora_fx.verify(graph_module, merged, (X,))
    first = departure(graph_module, tampered(merged, "lin.weight")).node
    assert first == reading(merged, "lin.weight")


def test_inputs_are_not_written_to() -> None:
    graph_module = small(lambda self, x: self.lin(x))
    (node,) = graph_module.graph.find_nodes(op="placeholder")
    with graph_module.graph.inserting_after(node):
        written = graph_module.graph.call_function(aten.add_.Tensor, (node, 1.0))
    node.replace_all_uses_with(written, delete_user_cb=lambda user: user is not written)
    graph_module.recompile()
    given = X.clone()
    lora_fx.verify(graph_module, lora_fx.fold(graph_module), (given,))
    assert torch.equal(given, X)


def test_buffers_are_not_written_to() -> None:
    graph_module = small(lambda self, x: self.lin(x) + self.counter, counter=nn.Buffer(torch.tensor([0.5])))
    (counter,) = (node for node in graph_module.graph.find_nodes(op="get_attr") if node.target == "counter")
    with graph_module.graph.inserting_after(counter):
        graph_module.graph.call_function(aten.add_.Tensor, (counter, 1.0))
    graph_module.recompile()
    merged = lora_fx.fold(graph_module)
    with unchanged(graph_module), unchanged(merged):
        lora_fx.verify(graph_module, merged, (X,))


def test_both_graphs_draw_the_same_random_numbers_and_the_random_state_stays() -> None:
    graph_module = small(lambda self, x: torch.rand_like(x[:, :1]) * self.lin(x) + torch.rand_like(x[:, :1]))
    merged = lora_fx.fold(graph_module)
    with unchanged(graph_module):
        lora_fx.verify(graph_module, merged, (X,))


def test_memory_that_is_yet_to_be_written_is_not_compared() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        made = torch.empty_like(y)
        made[:, :3] = y[:, :3]
        made[:, 3:] = y[:, 3:] + 1
        return made

    graph_module = small(forward)
    lora_fx.verify(graph_module, lora_fx.fold(graph_module), (X,))


def test_infinities_and_nans_equal_themselves() -> None:
    graph_module = small(lambda self, x: (self.lin(x).log(), self.lin(x).masked_fill(x[:, :1] > 0.3, float("-inf"))))
    merged = lora_fx.fold(graph_module)
    assert any(value.isnan().any() for value in merged(X))
    lora_fx.verify(graph_module, merged, (X,))


def test_weights_that_were_untied_are_not_compared_themselves() -> None:
    graph_module = small(lambda self, x: x @ self.lin.weight.T)
    merged = lora_fx.fold(graph_module)
    merged.untied = nn.Parameter(merged.lin.weight.detach().clone(), requires_grad=False)
    product = calling(merged, aten.matmul.default)
    with merged.graph.inserting_before(product):
        weight = merged.graph.get_attr("untied")
        product.update_arg(1, merged.graph.call_function(aten.transpose.int, (weight, 0, 1)))
    merged.recompile()
    lora_fx.verify(graph_module, merged, (X,))
    assert departure(graph_module, tampered(merged, "untied")).node == product.name


def test_a_fold_that_unshares_a_weight_passes() -> None:
    graph_module = lora_fx.rewrite(traced("gpt2"), {"select": [{"target": ["lm_head"]}]}, rank=6, alpha=9)
    set_factors(graph_module)
    merged = lora_fx.fold(graph_module, unshare=True)
    lora_fx.verify(graph_module, merged, inputs("gpt2", 3, 11))
    changed = tampered(merged, "lm_head.weight")
    assert departure(graph_module, changed, inputs("gpt2", 3, 11)).node == reading(merged, "lm_head.weight")


class Handmade(nn.Module):
    """A model with a branch of its own, whose factors have other names."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7)
        self.down = nn.Linear(5, 2, bias=False)
        self.up = nn.Linear(2, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.lin(x) + self.up(self.down(x)) * 1.5)


def branches(name: str) -> bool:
    return name in ("down.weight", "up.weight")


def test_branches_are_named_as_for_fold() -> None:
    graph_module = lora_fx.trace(Handmade().eval(), (X,))
    merged = lora_fx.fold(graph_module, branches=branches)
    assert lora_fx.verify(graph_module, merged, (X,), branches=branches).largest < 1e-6
    error = departure(graph_module, tampered(merged, "lin.weight"), branches=branches)
    assert error.node == reading(merged, "lin.weight")


def test_a_graph_that_lora_fx_did_not_make_is_called_as_its_own_forward_is() -> None:
    graph_module = torch.export.export(Handmade().eval(), (X,)).module()
    assert isinstance(graph_module, fx.GraphModule)
    graph_module.graph.erase_node(next(node for node in graph_module.graph.nodes if node.name == "_guards_fn"))
    graph_module.recompile()
    merged = lora_fx.fold(graph_module, branches=branches)
    for given in ((X,), {"x": X}):
        assert lora_fx.verify(graph_module, merged, given, branches=branches).largest < 1e-6
    with pytest.raises(lora_fx.InputError, match=r"the graph does not take these inputs: .*'x'"):
        lora_fx.verify(graph_module, merged, {"y": X}, branches=branches)


def test_graphs_in_train_mode_are_compared_in_evaluation_and_keep_their_modes(rewritten: Any) -> None:
    name, evaluated = rewritten
    graph_module = copy.deepcopy(evaluated).train()
    merged = lora_fx.fold(graph_module)
    dropout = next(part for part in graph_module.modules() if isinstance(part, nn.Dropout))
    dropout.eval()
    with unchanged(graph_module), unchanged(merged):
        given = inputs(name, 3, 11, 5)
        assert lora_fx.verify(graph_module, merged, given) == lora_fx.verify(evaluated, merged, given)
    assert graph_module.training
    assert not dropout.training


def test_values_are_freed_when_nothing_reads_them_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        for _ in range(40):
            y = torch.sin(y) + 0.1
        return y

    graph_module = small(forward)
    merged = lora_fx.fold(graph_module)
    run_node = fx.Interpreter.run_node
    values: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def counting(self: fx.Interpreter, node: fx.Node) -> Any:
        value = run_node(self, node)
        if node.op == "call_function" and isinstance(value, torch.Tensor):
            values.append(weakref.ref(value))
            alive.append(sum(reference() is not None for reference in values))
        return value

    monkeypatch.setattr(fx.Interpreter, "run_node", counting)
    gc.collect()
    lora_fx.verify(graph_module, merged, (X,))
    assert len(values) > 160
    assert max(alive) < 10


# What departs.


def test_a_weight_with_another_value_is_reported_at_its_site_and_not_behind_it(rewritten: Any) -> None:
    name, graph_module = rewritten
    merged = tampered(lora_fx.fold(graph_module), LAYER_1[name])
    error = departure(graph_module, merged, inputs(name, 3, 11, 5))
    assert error.node == reading(merged, LAYER_1[name])
    assert f"differs first at {error.node} (aten." in str(error)


def test_a_weight_without_a_branch_is_reported_too() -> None:
    graph_module = branched("bert")
    weight = "encoder.layer.1.attention.output.dense.weight"
    merged = tampered(lora_fx.fold(graph_module), weight)
    assert departure(graph_module, merged, inputs("bert", 3, 11)).node == reading(merged, weight)


def test_the_message_says_where_how_much_and_what_to_do() -> None:
    graph_module = branched("bert")
    set_factors(graph_module, scale=0.05)
    merged = tampered(lora_fx.fold(graph_module), LAYER_1["bert"])
    message = str(departure(graph_module, merged, inputs("bert", 3, 11)))
    for part in (
        r"at linear_8 \(aten.linear.default, in encoder.layer.1.attention.self.value, with branches add_tensor_3\)",
        r", at .*modeling_bert.py:\d+: .*value",
        r"the largest difference is \d\.\d+ at \(\d, \d+, 1\): expected -?\d.*, got -?\d",
        r"the tolerance is 0\.0001 of the largest value, \d",
        r"Fold again if .* else keep it unfolded",
    ):
        assert re.search(part, message), message


def test_a_graph_that_trained_on_departs_from_its_former_fold() -> None:
    graph_module = small(lambda self, x: torch.relu(self.lin(x)))
    merged = lora_fx.fold(graph_module)
    with torch.no_grad():
        graph_module.lin.lora_B.default.weight.mul_(1.1)
    assert departure(graph_module, merged).node == reading(merged, "lin.weight")
    lora_fx.verify(graph_module, lora_fx.fold(graph_module), (X,))


def test_another_constant_of_an_operator_is_reported_at_that_operator() -> None:
    graph_module = small(lambda self, x: torch.relu(torch.clamp(self.lin(x), -0.5, 0.5) - 0.25))
    merged = lora_fx.fold(graph_module)
    clamp = calling(merged, aten.clamp.default)
    clamp.update_arg(2, 0.4)
    merged.recompile()
    error = departure(graph_module, merged)
    assert error.node == clamp.name
    assert "clamp.default" in str(error)


def test_integers_and_truth_values_have_to_be_equal() -> None:
    graph_module = small(lambda self, x: (self.lin(x), torch.arange(x.shape[1]) * 3, x > 0.25))
    for target, constant in ((aten.mul.Tensor, 4), (aten.gt.Scalar, 0.15)):
        merged = lora_fx.fold(graph_module)
        (node,) = merged.graph.find_nodes(op="call_function", target=target)
        node.update_arg(1, constant)
        merged.recompile()
        error = departure(graph_module, merged, tolerance=10.0)
        assert error.node == node.name
        assert "values differ, which have to be equal; the first is" in str(error)


def test_another_shape_or_dtype_is_a_departure() -> None:
    graph_module = small(lambda self, x: self.lin(x).sum(dim=1, keepdim=True).to(torch.float64))
    for target, edit, message in (
        (
            aten.sum.dim_IntList,
            lambda node: node.update_arg(2, False),
            r"expected torch.float32 \(3, 1\), got torch.float32 \(3,\)",
        ),
        (
            aten.to.dtype,
            lambda node: node.update_arg(1, torch.float32),
            r"expected torch.float64 .* got torch.float32",
        ),
    ):
        merged = lora_fx.fold(graph_module)
        node = calling(merged, target)
        edit(node)
        merged.recompile()
        with pytest.raises(lora_fx.VerifyError, match=rf"differs first at {node.name} .*{message}"):
            lora_fx.verify(graph_module, merged, (X,))


def test_the_tolerance_can_be_given() -> None:
    graph_module = small(lambda self, x: self.lin(x))
    merged = lora_fx.fold(graph_module)
    departure(graph_module, merged, tolerance=0.0)
    changed = tampered(merged, "lin.weight")
    relative = ((changed(X) - graph_module(X)).abs().max() / graph_module(X).abs().max()).item()
    departure(graph_module, changed, tolerance=0.99 * relative)
    assert lora_fx.verify(graph_module, changed, (X,), tolerance=1.01 * relative).largest == pytest.approx(relative)


def test_what_comes_after_half_precision_has_its_tolerance_and_what_comes_before_has_not() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.lin(x.float().sub(0.1).to(x.dtype)).float())

    graph_module = small(forward, torch.bfloat16)
    merged = lora_fx.fold(graph_module)
    given = (X.to(torch.bfloat16),)
    assert 1e-3 < lora_fx.verify(graph_module, merged, given).largest < 5e-2
    before = calling(merged, aten.sub.Tensor)
    before.update_arg(1, 0.101)
    merged.recompile()
    error = departure(graph_module, merged, given)
    assert error.node == before.name
    assert "the tolerance is 0.0001 of the largest value" in str(error)


def test_what_is_written_in_half_precision_keeps_its_tolerance() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        made = torch.zeros(x.shape[0], 7, dtype=torch.float32, device=x.device)
        made[:, :] = self.lin(x)
        return made * 2

    graph_module = small(forward, torch.bfloat16)
    assert lora_fx.verify(graph_module, lora_fx.fold(graph_module), (X.to(torch.bfloat16),)).largest > 1e-3


# What is refused.


def test_a_fold_of_another_model_is_refused() -> None:
    error = departure(branched("bert"), lora_fx.fold(branched("gpt2")), inputs("gpt2", 3, 11))
    assert "the folded graph was not made from this graph: it has" in str(error)


def test_a_graph_that_still_has_branches_is_refused() -> None:
    graph_module = small(lambda self, x: self.lin(x))
    assert "has a branch at 'add_tensor'. Pass the result of lora_fx.fold" in str(departure(graph_module, graph_module))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda merged: setattr(calling(merged, aten.relu.default), "target", aten.gelu.default),
            "where the graph has.*relu",
        ),
        (
            lambda merged: setattr(calling(merged, aten.relu.default), "name", "other"),
            "%other.*which the graph lacks",
        ),
        (
            lambda merged: calling(merged, aten.exp.default).append(calling(merged, aten.relu.default)),
            "%relu .*, behind exp, which comes later in the graph",
        ),
    ],
    ids=["operator", "name", "order"],
)
def test_a_graph_that_does_not_correspond_is_refused_by_node(edit: Callable[[Any], None], message: str) -> None:
    graph_module = small(lambda self, x: (torch.relu(self.lin(x)), torch.exp(x)))
    merged = lora_fx.fold(graph_module)
    edit(merged)
    merged.recompile()
    with pytest.raises(lora_fx.VerifyError, match=rf"was not made from this graph: it has .*{message}"):
        lora_fx.verify(graph_module, merged, (X,))


def test_inputs_that_the_trace_does_not_cover_are_refused_as_in_a_call() -> None:
    graph_module = small(lambda self, x: self.lin(x)).train()
    merged = lora_fx.fold(graph_module)
    with unchanged(graph_module), pytest.raises(lora_fx.InputError, match="has size 4 in dimension 1"):
        lora_fx.verify(graph_module, merged, (X[:, :4],))
    with pytest.raises(lora_fx.InputError, match="there is no input 'y'"):
        lora_fx.verify(graph_module, merged, {"y": X})


def test_weights_without_values_are_refused() -> None:
    graph_module = small(lambda self, x: self.lin(x))
    merged = lora_fx.fold(graph_module)
    for pair in ((graph_module, copy.deepcopy(merged).to("meta")), (copy.deepcopy(graph_module).to("meta"), merged)):
        with pytest.raises(lora_fx.LoraFxError, match=r"'lin.weight' of the .*graph is on the meta device"):
            lora_fx.verify(*pair, (X,))
