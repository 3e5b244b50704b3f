"""A graph owns its tensors: loading a state dict keeps its ties and its parameters, and never writes to the model's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import set_factors, unchanged
from torch import nn

import lora_fx


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.c = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("hidden", torch.ones(4), persistent=False)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)) * self.scale * self.hidden) + self.steps  # type: ignore[no-any-return, operator]


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
RULES: dict[str, Any] = {"select": [{"target": ["c"], "rank": 2}]}


def rewritten(model: nn.Module) -> lora_fx.TracedGraphModule:
    graph_module = lora_fx.rewrite(model, RULES, example_inputs=(X,))
    set_factors(graph_module)
    return graph_module


def others(graph_module: nn.Module) -> dict[str, torch.Tensor]:
    """Return other values for a state dict, tied like the old ones."""
    new: dict[int, torch.Tensor] = {}
    return {
        name: new.setdefault(tensor.data_ptr(), torch.randn_like(tensor))
        for name, tensor in graph_module.state_dict().items()
    }


def load(graph_module: nn.Module, values: dict[str, torch.Tensor], nested: bool, **options: Any) -> Any:
    if nested:
        values = {f"inner.{name}": value for name, value in values.items()}
        return Holder(graph_module).load_state_dict(values, **options)
    return graph_module.load_state_dict(values, **options)


@pytest.fixture(params=[False, True], ids=["alone", "nested"])
def nested(request: pytest.FixtureRequest) -> bool:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=[False, True], ids=["copied", "assigned"])
def assign(request: pytest.FixtureRequest) -> bool:
    return request.param  # type: ignore[no-any-return]


def test_loading_writes_to_no_other_module(nested: bool, assign: bool) -> None:
    model = Tied().eval()
    graph_module = rewritten(model)
    other = lora_fx.trace(graph_module)
    values = others(graph_module)
    given = {name: value.clone() for name, value in values.items()}
    with unchanged(model), unchanged(other):
        result = load(graph_module, values, nested, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for name, value in graph_module.state_dict().items():
        assert torch.equal(value, given[name]), name
        assert (value.data_ptr() == values[name].data_ptr()) is assign


def test_loading_keeps_parameters_and_ties(nested: bool, assign: bool) -> None:
    graph_module = rewritten(Tied().eval())
    parameters = dict(graph_module.named_parameters(remove_duplicate=False))
    trained = {name: p.requires_grad for name, p in parameters.items()}
    optimizer = torch.optim.SGD([p for p in graph_module.parameters() if p.requires_grad], lr=0.1)
    values = {name: value.clone() for name, value in others(graph_module).items()}  # untied, with equal values
    load(graph_module, values, nested, assign=assign)
    for name, parameter in graph_module.named_parameters(remove_duplicate=False):
        assert parameter is parameters[name]
        assert parameter.requires_grad == trained[name]
    assert graph_module.a.weight is graph_module.b.weight
    before = graph_module(X)
    assert torch.allclose(lora_fx.fold(graph_module)(X), before, atol=1e-5)
    before.sum().backward()
    optimizer.step()
    assert not torch.equal(graph_module(X), before)


def test_what_a_tied_graph_computes_after_a_load_is_what_the_model_does(assign: bool) -> None:
    model = Tied().eval()
    graph_module = lora_fx.rewrite(model, {"select": [{"target": ["c"], "rank": 2}]}, example_inputs=(X,))
    before = graph_module(X)
    graph_module.load_state_dict(copy.deepcopy(graph_module.state_dict()), assign=assign)
    assert torch.equal(lora_fx.fold(graph_module)(X), before)
    assert torch.equal(graph_module(X), before)


def test_different_values_for_tied_names_are_refused(nested: bool, assign: bool) -> None:
    graph_module = rewritten(Tied().eval())
    values = others(graph_module)
    values["b.weight"] = values["b.weight"] + 1
    with (
        unchanged(graph_module),
        pytest.raises(lora_fx.LoraFxError, match=r"'a.weight' and 'b.weight' are one tensor of the graph"),
    ):
        load(graph_module, values, nested, assign=assign)


def test_one_of_the_tied_names_is_enough_where_loading_is_not_strict(nested: bool, assign: bool) -> None:
    graph_module = rewritten(Tied().eval())
    values = others(graph_module)
    del values["a.weight"]
    result = load(graph_module, values, nested, assign=assign, strict=False)
    assert [name.removeprefix("inner.") for name in result.missing_keys] == ["a.weight"]
    assert torch.equal(graph_module.a.weight, values["b.weight"])
    assert graph_module.a.weight is graph_module.b.weight


def test_what_does_not_fit_is_reported_as_torch_does(nested: bool, assign: bool) -> None:
    graph_module, values = rewritten(Tied().eval()), others(rewritten(Tied().eval()))
    del values["c.bias"]
    for broken, message in (
        (values, r"Missing key\(s\) in state_dict: .*c\.bias"),
        ({**others(graph_module), "more": torch.ones(1)}, r"Unexpected key\(s\) in state_dict: .*more"),
        ({**others(graph_module), "hidden": torch.ones(4)}, r"Unexpected key\(s\) in state_dict: .*hidden"),
        ({**others(graph_module), "c.bias": torch.ones(5)}, r"size mismatch for .*c\.bias"),
        ({**others(graph_module), "c.bias": "text"}, r"c\.bias.*expected torch\.Tensor"),
    ):
        with pytest.raises(RuntimeError, match=message):
            load(graph_module, broken, nested, assign=assign)


def test_a_value_of_another_dtype_is_converted_or_refused(nested: bool) -> None:
    graph_module = rewritten(Tied().eval())
    values = {name: value.double() for name, value in others(graph_module).items()}
    with (
        unchanged(graph_module),
        pytest.raises(lora_fx.LoraFxError, match=r"torch.float32 in the graph.*torch.float64"),
    ):
        load(graph_module, values, nested, assign=True)
    load(graph_module, values, nested)
    assert all(tensor.dtype == torch.float32 for tensor in graph_module.state_dict().values())
    assert torch.equal(graph_module.c.bias, values["c.bias"].float())


def test_a_single_element_is_taken_for_a_scalar_as_torch_does(assign: bool) -> None:
    graph_module = rewritten(Tied().eval())
    graph_module.load_state_dict({**others(graph_module), "steps": torch.tensor([5.0])}, assign=assign)
    assert graph_module.steps.shape == ()
    assert graph_module.steps == 5


def test_a_graph_without_weights_takes_those_of_a_state_dict(nested: bool) -> None:
    model = Tied().eval()
    with torch.device("meta"):
        graph_module = lora_fx.trace(Tied().eval(), (torch.empty(3, 4),))
    values = model.state_dict()
    with pytest.warns(UserWarning, match="copying from a non-meta parameter"):
        load(graph_module, values, nested)
    assert graph_module.c.weight.is_meta
    load(graph_module, values, nested, assign=True)
    assert graph_module.a.weight is graph_module.b.weight
    assert isinstance(graph_module.c.weight, nn.Parameter)
    assert not any(tensor.is_meta for tensor in graph_module.state_dict().values())


def test_a_hook_that_renames_comes_before_the_values_are_taken() -> None:
    model = Tied().eval()
    graph_module = lora_fx.trace(model, (X,))

    def rename(module: nn.Module, values: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in [name for name in values if name.startswith("old.")]:
            values[name.removeprefix("old.")] = values.pop(name)

    graph_module.register_load_state_dict_pre_hook(rename)
    values = others(graph_module)
    with unchanged(model):
        graph_module.load_state_dict({f"old.{name}": value for name, value in values.items()})
    assert torch.equal(graph_module.c.weight, values["c.weight"])
    assert len(graph_module._load_state_dict_pre_hooks) == 1


def test_a_backward_over_values_that_were_replaced_is_refused(assign: bool) -> None:
    graph_module = rewritten(Tied().eval())
    output = graph_module(X).sum()
    graph_module.load_state_dict(others(graph_module), assign=assign)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


# Copies keep hooks.


def test_a_copy_keeps_the_hooks_of_the_graph_and_its_modules() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(self.linear(x))  # type: ignore[no-any-return]

    graph_module = lora_fx.trace(Drops().eval(), (X,))
    calls: list[str] = []
    graph_module.register_forward_hook(lambda *_: calls.append("after"))
    graph_module.register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True)
    graph_module.drop.register_forward_hook(lambda *_: calls.append("leaf"))
    graph_module.register_state_dict_post_hook(lambda *_: calls.append("state"))
    graph_module.linear.register_state_dict_post_hook(lambda *_: calls.append("inner state"))
    graph_module.register_full_backward_hook(lambda *_: calls.append("backward"))
    copied = copy.deepcopy(graph_module)
    copied(X.clone().requires_grad_()).sum().backward()
    copied.state_dict()
    assert calls == ["before", "leaf", "after", "backward", "inner state", "state"]
    copied.register_forward_hook(lambda *_: calls.append("more"))
    assert len(graph_module._forward_hooks) == 1


def test_a_tensor_cannot_have_names_below_it() -> None:
    model = Tied().eval()
    graph_module = lora_fx.trace(model, (X,))
    state = lora_fx.graph.graph_module.state_of(graph_module).with_tensors({"c.weight.lora_A": torch.ones(1)})
    with pytest.raises(lora_fx.LoraFxError, match=r"'c.weight.lora_A' cannot be a name in a graph"):
        lora_fx.graph.graph_module.assemble(
            lora_fx.graph.graph_module.copy_graph(graph_module.graph)[0],
            state,
            meta={},
            training=False,
            trainable=frozenset(),
        )
