"""What passes do does not grow faster than the graph: counted, not timed. Times are in ``tools/bench/scaling.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lora_fx
from lora_fx.adapters import attach as attaching
from lora_fx.adapters import fake_values
from lora_fx.adapters.attach import attach
from lora_fx.adapters.fake_values import FakeValues
from lora_fx.branches import find as branches
from lora_fx.graph.state import State
from lora_fx.planning import matching
from lora_fx.planning.planner import plan_graph
from lora_fx.rules.lookup import load

aten = torch.ops.aten
RULES = {"defaults": {"rank": 2, "dropout": 0.1}, "select": [{"op": ["linear"]}]}
SIZES = (2, 7)


def traced(layers: int, dtype: torch.dtype = torch.float32) -> lora_fx.TracedGraphModule:
    """Return the trace of so many equal layers, of any batch size."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, dtype=dtype) for _ in range(layers)))
    return lora_fx.trace(model, (torch.randn(3, 4, dtype=dtype),), inference=True)


@pytest.fixture(scope="module")
def graphs() -> list[lora_fx.TracedGraphModule]:
    return [traced(layers) for layers in SIZES]


def rewritten(graph: lora_fx.TracedGraphModule) -> lora_fx.TracedGraphModule:
    return attach(graph, plan_graph(graph, load(RULES)), seed=0)


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Callable[[Callable[[], Any]], int]:
    """Return what counts how often a call of something calls a function."""
    calls: list[None] = []
    function = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)

    def count(run: Callable[[], Any]) -> int:
        calls.clear()
        run()
        return len(calls)

    return count


def test_values_of_equal_layers_are_computed_once(
    graphs: list[lora_fx.TracedGraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = counted(monkeypatch, fake_values, "_run")
    few, many = (count(lambda graph=graph: rewritten(graph)) for graph in graphs)  # type: ignore[misc]
    assert 0 < few == many


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_was_computed_for_another_node_is_that_of_this_one(dtype: torch.dtype) -> None:
    branched = rewritten(traced(3, dtype))
    added = [node for node in branched.graph.nodes if "lora_fx" in node.meta.get("custom", {})]
    assert len(added) > 3
    for node in added:
        value = node.meta["val"]
        if node.op == "get_attr":
            assert (value.shape, value.dtype) == (branched.get_parameter(node.target).shape, torch.float32)
        elif node.op == "call_function":
            with value.fake_mode:
                expected = node.target(*fx.map_arg(node.args, lambda n: n.meta["val"]))
            assert [str(size) for size in value.shape] == [str(size) for size in expected.shape]
            assert (value.dtype, value.stride()) == (expected.dtype, expected.stride())


def test_arguments_that_are_equal_and_of_different_types_have_values_of_their_own() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    with FakeTensorMode() as mode:
        x.meta["val"] = torch.empty(2, dtype=torch.int64)
    fakes = FakeValues(State({}))
    products = [graph.call_function(aten.mul.Tensor, (x, number)) for number in (1, 1.0)]
    for product in products:
        fakes.record(product, x)
    assert [product.meta["val"].dtype for product in products] == [torch.int64, torch.float32]
    assert products[0].meta["val"].fake_mode is mode


def test_a_fold_looks_up_which_tensors_are_tied_as_often_whatever_the_number_of_branches(
    graphs: list[lora_fx.TracedGraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    branched = [rewritten(graph) for graph in graphs]
    count = counted(monkeypatch, State, "aliases")
    few, many = (count(lambda graph=graph: lora_fx.fold(graph)) for graph in branched)  # type: ignore[misc]
    assert 0 < few == many


def test_loading_weights_looks_it_up_as_often_whatever_the_number_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    count = counted(monkeypatch, State, "aliases")

    def load_into_meta(layers: int) -> int:
        with torch.device("meta"):
            graph = lora_fx.trace(
                nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))), (torch.empty(3, 4),), inference=True
            )
        values = {name: torch.zeros(tensor.shape) for name, tensor in graph.state_dict().items()}
        return count(lambda: graph.load_state_dict(values, assign=True))

    few, many = map(load_into_meta, SIZES)
    assert 0 < few == many


def test_where_there_is_no_factor_nothing_is_walked_through(
    graphs: list[lora_fx.TracedGraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    branched = rewritten(graphs[0])
    count = counted(monkeypatch, branches._BranchFinder, "step")
    assert count(lambda: branches.find_branches(graphs[0])) == 0
    assert count(lambda: branches.find_branches(branched)) == len(branched.graph.nodes)


def test_what_trains_is_asked_of_each_site_once_and_not_for_each_parameter(
    graphs: list[lora_fx.TracedGraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = load({"defaults": {"rank": 2}, "select": [{"trainable": "bias", "op": ["linear"]}]})
    count = counted(monkeypatch, matching, "refusal")
    found = [count(lambda graph=graph: plan_graph(graph, rules)) for graph in graphs]  # type: ignore[misc]
    assert found == list(SIZES)


def test_on_the_meta_device_no_factor_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        graph = lora_fx.trace(nn.Sequential(nn.Linear(4, 4)), (torch.empty(3, 4),), inference=True)
    count = counted(monkeypatch, attaching, "initial_factors")
    branched = rewritten(graph)
    assert count(lambda: rewritten(graph)) == 0
    shapes = {name: tuple(p.shape) for name, p in branched.named_parameters() if "lora_" in name}
    assert shapes == {"0.lora_A.default.weight": (2, 4), "0.lora_B.default.weight": (4, 2)}
    assert all(parameter.is_meta for parameter in branched.parameters())
