"""Weights of two dimensions that PEFT adapts as parameters: loaded, saved, folded and traced as PEFT has them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import set_factors
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx.rules.peft_config.read_config import read_config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Product(nn.Module):
    """A product with a weight of its own, stored (in, out): a class for which PEFT has no layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Transposed(nn.Module):
    """Two products with parameters of one module, of which one is called ``weight``; both are stored in different layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(7, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(nn.functional.linear(x, self.weight)) @ self.other


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Transposed()
        self.lin0, self.lin1, self.lin2 = Product(3, 6), nn.Linear(6, 4), Product(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin2(torch.relu(self.lin1(torch.relu(self.lin0(self.inner(x))))))  # type: ignore[no-any-return]


X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))

CASES: dict[str, dict[str, Any]] = {
    "a bare parameter called weight": {"target_parameters": ["lin0.weight"]},
    "beside a module": {"target_modules": ["lin1"], "target_parameters": ["lin0.weight"]},
    "two of one module": {"target_parameters": ["inner.weight", "inner.other"]},
    "every weight": {"target_parameters": ["weight"], "rank_pattern": {"lin2.weight": 1}, "use_rslora": True},
    "with biases": {"target_parameters": ["lin0.weight", "lin1.weight"], "bias": "all"},
    "beside a module that trains": {"target_parameters": ["lin0.weight"], "modules_to_save": ["lin2"]},
}


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def graph(net: Net) -> lora_fx.TracedGraphModule:
    return lora_fx.trace(net, (X,))


def wrapped(net: nn.Module, **settings: Any) -> Any:
    """Return PEFT's model, with values for all that trains."""
    made = peft.get_peft_model(
        copy.deepcopy(net), peft.LoraConfig(r=2, lora_alpha=3, **{"target_modules": [], **settings})
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return made.eval()


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_a_weight_that_is_a_parameter_for_peft_is_loaded_folded_and_saved_as_peft_has_it(
    settings: dict[str, Any], net: Net, graph: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    theirs = wrapped(net, **settings)
    theirs.save_pretrained(str(tmp_path / "peft"))
    mine = lora_fx.load_adapter(graph, tmp_path / "peft").eval()
    expected = theirs(X)
    assert torch.allclose(mine(X), expected, atol=1e-5)
    assert not torch.allclose(net(X), expected, atol=1e-2)
    lora_fx.save_adapter(mine, tmp_path / "ours")
    saved, given = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "peft"))
    assert saved.keys() == given.keys()
    assert all(torch.equal(saved[key], given[key]) for key in given)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "ours")).eval()
    assert torch.allclose(again(X), expected, atol=1e-5)
    merged, wanted = lora_fx.fold(mine).state_dict(), theirs.merge_and_unload().state_dict()
    assert merged.keys() == wanted.keys()
    assert all(torch.allclose(merged[key], wanted[key], atol=1e-6) for key in wanted)
    assert torch.equal(lora_fx.unload(mine)(X), net(X))


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_a_trace_of_a_model_with_such_layers_folds_to_what_peft_merges(settings: dict[str, Any], net: Net) -> None:
    theirs = wrapped(net, **settings)
    mine = lora_fx.trace(theirs, (X,))
    assert torch.equal(mine(X), theirs(X))
    folded = lora_fx.fold(mine)
    assert not [key for key in folded.state_dict() if "lora_" in key]
    expected = theirs.merge_and_unload()(X)
    assert torch.allclose(folded(X), expected, atol=1e-5)
    assert not torch.allclose(expected, net(X), atol=1e-2)


def test_in_bfloat16_such_a_trace_folds_too(net: Net) -> None:
    theirs = wrapped(net, target_parameters=["lin0.weight", "inner.weight"])
    narrow, x = theirs.to(torch.bfloat16), X.to(torch.bfloat16)
    folded = lora_fx.fold(lora_fx.trace(narrow, (x,)))
    weight = folded.get_parameter("base_model.model.lin0.base_layer.weight")
    wide = copy.deepcopy(narrow).double().merge_and_unload().lin0.weight
    assert torch.equal(weight, wide.to(torch.bfloat16))  # rounded once


def test_a_module_of_a_class_without_a_layer_in_peft_is_saved_by_the_name_of_its_weight(
    net: Net, graph: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    first, second = (
        lora_fx.rewrite(graph, {"select": [{"target": targets, "rank": 2}]}, adapter=name)
        for name, targets in (("a", ["lin0", "lin1"]), ("b", ["lin2"]))
    )
    for mine, name in ((first, "a"), (second, "b")):
        set_factors(mine)
        lora_fx.save_adapter(mine, tmp_path / name, name)
    config = read_config(tmp_path / "a")
    assert (config.target_modules, config.target_parameters) == (("lin1",), ("lin0.weight",))
    assert (read_config(tmp_path / "b").target_modules, read_config(tmp_path / "b").target_parameters) == (
        None,
        ("lin2.weight",),
    )
    for mine, name in ((first, "a"), (second, "b")):
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / name)).eval()
        assert torch.allclose(theirs(X), mine.eval()(X), atol=1e-5)
    both = lora_fx.load_adapter(lora_fx.load_adapter(graph, tmp_path / "a", "a"), tmp_path / "b", "b")
    together = lora_fx.fold(both, {"a": 1.0, "b": 1.0}).state_dict()
    apart = lora_fx.fold(first).state_dict() | {
        "lin2.weight": lora_fx.fold(second).get_parameter("lin2.weight").detach()
    }
    assert all(torch.equal(together[key], apart[key]) for key in apart)


def test_a_parameter_beside_a_conv1d_which_peft_refuses_in_one_adapter_is_not_written(tmp_path: Path) -> None:
    net = nn.Sequential(Conv1D(4, 3), Product(4, 2))
    with pytest.raises(ValueError, match="does not work with fan_in_fan_out"):
        wrapped(net, target_modules=["0"], target_parameters=["1.weight"])
    graph = lora_fx.rewrite(net, ["0", "1"], rank=2, example_inputs=(torch.randn(5, 3),))
    with pytest.raises(
        lora_fx.AdapterError, match=r"1\.weight: adapted as a parameter beside .* Make two adapters of it"
    ):
        lora_fx.save_adapter(graph, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_three_steps_train_the_factors_as_peft_trains_them(
    net: Net, graph: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    theirs = wrapped(net, target_parameters=["lin0.weight", "inner.other"])
    theirs.save_pretrained(str(tmp_path / "peft"))
    mine = lora_fx.load_adapter(graph, tmp_path / "peft")
    for model in (mine.train(), theirs.train()):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
    lora_fx.save_adapter(mine, tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "trained"))
    saved, wanted, before = (
        load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "trained", "peft")
    )
    assert all(torch.allclose(saved[key], wanted[key], atol=1e-5) for key in wanted)
    assert not any(torch.allclose(saved[key], before[key], atol=1e-5) for key in wanted)


def test_a_peft_configuration_that_names_such_a_module_is_refused_as_peft_refuses_it(
    net: Net, graph: lora_fx.TracedGraphModule
) -> None:
    wrong, right = (
        peft.LoraConfig(r=2, target_modules=modules, target_parameters=parameters)
        for modules, parameters in ((["lin0", "lin1"], None), (["lin1"], ["lin0.weight"]))
    )
    with pytest.raises(ValueError, match=r"Target module Product\(\) is not supported"):
        peft.get_peft_model(copy.deepcopy(net), wrong)
    with pytest.raises(lora_fx.RuleError, match=r"'lin0' is a Product, .* under target_parameters: lin0\.weight"):
        lora_fx.plan(graph, wrong)
    mine = lora_fx.rewrite(graph, right).state_dict()
    assert mine["lin0.lora_A.default.weight"].shape == (2, 3)
    assert mine["lin1.lora_A.default.weight"].shape == (2, 6)
