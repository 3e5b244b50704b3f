"""The code of a graph calls the operators that its nodes name, by shorter ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from architectures import EACH, branched, run, traced
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from lora_fx.graph import codegen as generated_code
from lora_fx.graph.codegen import BINDINGS

aten = torch.ops.aten


class Calls(TorchDispatchMode):
    """Remembers each operator that is called, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {key: value for key, value in (kwargs or {}).items() if key != "generator"}
        described = pytree.tree_map_only(torch.Tensor, lambda t: (t.dtype, *t.shape), (args, known))
        self.made.append((str(func), repr(described)))
        return func(*args, **(kwargs or {}))


def calls(function: Callable[[], Any]) -> tuple[list[Any], Any]:
    with Calls() as seen:
        found = function()
    return seen.made, found


@contextmanager
def without_bindings(graph_module: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(generated_code, "BINDINGS", {})
        graph_module.recompile()
        yield
    graph_module.recompile()


@pytest.mark.parametrize("name", EACH)
def test_the_operators_that_run_are_those_that_the_nodes_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module = branched(name).train()
    assert "torch.linear" not in graph_module.code
    assert "torch._C._nn.linear(" in graph_module.code

    def answer() -> torch.Tensor:
        torch.manual_seed(0)
        return run(name, graph_module, 3, 11, 5)[0]  # type: ignore[no-any-return]

    mine, found = calls(answer)
    with without_bindings(graph_module, monkeypatch):
        assert "torch.ops.aten.linear.default(" in graph_module.code
        plain, expected = calls(answer)
    assert mine == plain
    assert torch.equal(found, expected)


X, Y, V = torch.rand(2, 3, 4), torch.randn(2, 3, 4), torch.randn(4)
M, N, I = torch.randn(3, 4), torch.randn(4, 5), torch.tensor([[0, 2], [1, 1]])  # noqa: E741
UNARY: list[tuple[Any, ...]] = [(X,)]
ARGUMENTS: Mapping[Any, list[tuple[Any, ...]]] = {
    aten.add.Tensor: [(X, Y), (X, 1), (X, 1.5), (X, True), (X, V, {"alpha": 2})],
    aten.addmm.default: [(torch.randn(5), M, N), (torch.randn(3, 5), M, N, {"beta": 2, "alpha": 0.5})],
    aten.bmm.default: [(X, Y.transpose(1, 2))],
    aten.cat.default: [([X, Y],), ([X, Y], -1)],
    aten.contiguous.default: [(X,), (X.transpose(0, 1), {"memory_format": torch.contiguous_format})],
    aten.cos.default: UNARY,
    aten.div.Tensor: [(X, Y), (X, 3), (X, 1.5)],
    aten.embedding.default: [(M, I), (M, I, 1), (M, I, -1, False, False)],
    aten.expand.default: [(V, [2, 3, 4]), (V, [2, -1], {"implicit": True})],
    aten.gelu.default: [(X,), (X, {"approximate": "tanh"})],
    aten.index_select.default: [(X, -1, torch.tensor([1, 0]))],
    aten.layer_norm.default: [(X, [4]), (X, [4], V, V, 1e-3), (X, [4], V, None, 1e-3, False)],
    aten.linear.default: [(X, M), (X, M, torch.randn(3)), (X, M, None)],
    aten.matmul.default: [(X, N), (V, V), (M, N)],
    aten.mean.dim: [(X, [-1]), (X, [0, 1], True), (X, None), (X, [-1], False, {"dtype": torch.float64})],
    aten.mul.Tensor: [(X, Y), (X, 2), (X, 0.5), (X, False)],
    aten.neg.default: UNARY,
    aten.permute.default: [(X, [2, 0, 1])],
    aten.pow.Tensor_Scalar: [(X, 2), (X, 2.0), (X, 0.5)],
    aten.relu.default: UNARY,
    aten.reshape.default: [(X, [6, 4]), (X, [-1]), (V[0], [])],
    aten.rsqrt.default: UNARY,
    aten.scaled_dot_product_attention.default: [
        (X, Y, Y),
        (X, Y, Y, torch.randn(3, 3)),
        (X, Y, Y, None, 0.0, True),
        (X, Y, Y, torch.randn(3, 3), 0.0, False, {"scale": 0.3}),
        (X[:, None], Y[:, None], Y[:, None], None, 0.0, True, {"scale": 1.0, "enable_gqa": True}),
    ],
    aten.select.int: [(X, 1, 2), (X, -1, -1)],
    aten.silu.default: UNARY,
    aten.sin.default: UNARY,
    aten.softmax.int: [(X, -1), (X, 1, torch.float64), (X, 1, None)],
    aten.sub.Tensor: [(X, Y), (X, 1), (X, 1.5, {"alpha": 2})],
    aten.tanh.default: UNARY,
    aten.to.dtype: [
        (X, torch.float64),
        (X, torch.float32),
        (X, torch.float32, False, True),
    ],
    aten.transpose.int: [(X, 0, -1)],
    aten.unsqueeze.default: [(X, 0), (X, -1)],
    aten.view.default: [(X, [6, 4]), (X, [-1]), (V[0], [])],
}


@pytest.mark.parametrize("operator", BINDINGS, ids=str)
def test_a_binding_is_the_operator_for_all_kinds_of_arguments(operator: Any) -> None:
    binding = eval(BINDINGS[operator], {"torch": torch})
    for given in ARGUMENTS[operator]:
        args, kwargs = (given[:-1], given[-1]) if isinstance(given[-1], dict) else (given, {})
        mine, found = calls(lambda args=args, kwargs=kwargs: binding(*args, **kwargs))  # type: ignore[misc]
        plain, expected = calls(lambda args=args, kwargs=kwargs: operator(*args, **kwargs))  # type: ignore[misc]
        assert mine == plain
        assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
        assert torch.equal(found, expected)


@pytest.mark.parametrize("by", ["keyword", "position"])
def test_arguments_that_only_the_operator_takes_are_given_to_it(by: str) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    graph_module = lora_fx.trace(Model(), example_inputs=(torch.rand(2, 3),))
    (node,) = graph_module.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    (x,) = graph_module.graph.find_nodes(op="placeholder")
    if by == "keyword":
        node.args, node.kwargs = (), {"self": x, "other": 1}
    else:
        node.target, node.args = aten.to.dtype, (x, torch.float64, False, False, torch.contiguous_format)
    graph_module.recompile()
    given = torch.rand(2, 3)
    assert torch.equal(graph_module(given), given + 1 if by == "keyword" else given.double())


def test_each_module_is_looked_up_once_in_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module = traced("llama").eval()
    looked_up: list[str] = []
    original = nn.Module.__getattr__

    def counted(self: nn.Module, name: str) -> Any:
        looked_up.append(name)
        return original(self, name)

    monkeypatch.setattr(nn.Module, "__getattr__", counted)
    with torch.no_grad():
        run("llama", graph_module, 3, 11)
    inside = [name for name, module in graph_module.named_modules() if type(module) is nn.Module and name]
    read = graph_module.graph.find_nodes(op="get_attr") + graph_module.graph.find_nodes(op="call_module")
    assert len(looked_up) <= len(inside) + len(read) + 2


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._module_0 = nn.Linear(3, 3)
        self.add_module("a b", nn.ModuleDict({"0": nn.Linear(3, 4), "torch": nn.Linear(4, 3)}))

    def forward(self, _module_1: torch.Tensor) -> torch.Tensor:
        first, second = self.get_submodule("a b").values()
        return self._module_0(second(first(self._module_0(_module_1))))  # type: ignore[no-any-return]


def test_names_of_a_model_do_not_get_in_the_way() -> None:
    model = Odd()
    graph_module = lora_fx.trace(model, example_inputs=(torch.randn(2, 3),))
    x = torch.randn(5, 3)
    assert torch.equal(graph_module(x), model(x))
    branch = lora_fx.rewrite(model, {"select": [{"target": ["0"]}]}, rank=2, example_inputs=(torch.randn(2, 3),))
    assert torch.equal(branch(x), model(x))


def test_a_tensor_that_takes_the_place_of_another_is_read_at_the_next_call() -> None:
    graph_module = lora_fx.trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), example_inputs=(torch.randn(2, 3),))
    x = torch.randn(5, 3)
    before = graph_module(x)
    first = graph_module.get_submodule("0")
    first.weight = nn.Parameter(first.weight * 2)
    assert not torch.equal(graph_module(x), before)
    new = nn.Linear(3, 4)
    graph_module.add_module("0", new)
    assert torch.equal(
        graph_module(x), graph_module.get_submodule("1").bias + new(x) @ graph_module.get_parameter("1.weight").t()
    )


def test_what_is_printed_for_a_person_names_the_operators() -> None:
    printed = traced("bert").print_readable(print_output=False)
    assert "torch.ops.aten.linear.default(" in printed
    assert "torch._C._nn.linear(" not in printed


def test_transformers_of_code_are_still_asked() -> None:
    graph_module = lora_fx.trace(nn.Linear(3, 4), example_inputs=(torch.randn(2, 3),))
    with graph_module.graph.on_generate_code(lambda _: lambda body: ["assert False, 'asked'\n", *body]):
        graph_module.recompile()
        with pytest.raises(AssertionError, match="asked"):
            graph_module(torch.randn(2, 3))
    graph_module.recompile()
    graph_module(torch.randn(2, 3))
