"""Names of adapters: what PEFT takes is taken everywhere, and what could be read two ways is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import peft
import pytest
import torch
from conftest import set_factors
from torch import nn

import lora_fx
from lora_fx.graph.adapter_names import adapters

RULES = {"defaults": {"dropout": 0.1}, "select": [{"target": ["up", "down"], "rank": 2}]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def net() -> Net:
    return Net().eval()


@pytest.mark.parametrize("name", ["my-adapter", "2024-11 run", "0", "keys"])
def test_a_name_with_a_hyphen_a_space_or_digits_goes_everywhere(name: str, net: Net, tmp_path: Path) -> None:
    x = torch.randn(4, 5)
    graph = lora_fx.rewrite(net, RULES, adapter=name, example_inputs=(x,))
    set_factors(graph)
    expected = graph.eval()(x)
    assert adapters(graph) == (name,)
    assert torch.equal(copy.deepcopy(graph)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(graph))(x), expected)
    assert torch.allclose(lora_fx.fold(graph)(x), expected, atol=1e-6)
    assert torch.equal(lora_fx.activate(graph, {name: 1.0})(x), expected)
    assert torch.equal(lora_fx.fuse(graph)(x), expected)
    lora_fx.save_adapter(graph, tmp_path / "saved", name)
    assert torch.equal(lora_fx.from_adapter(net, tmp_path / "saved", name, example_inputs=(x,)).eval()(x), expected)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "saved"))
    assert torch.equal(theirs.eval()(x), expected)
    lora_fx.export.torchscript(graph, tmp_path / "net.pt")
    (found,) = torch.jit.load(tmp_path / "net.pt")(x).values()
    assert torch.equal(found, expected)


def test_a_dot_in_a_name_is_refused_in_one_sentence_as_peft_refuses_it(net: Net) -> None:
    with pytest.raises(KeyError, match=r"module name can.*t contain .*got: v1\.2"):
        peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(target_modules=["up"]), adapter_name="v1.2")
    with pytest.raises(lora_fx.PlanError) as refused:
        lora_fx.rewrite(net, RULES, adapter="v1.2", example_inputs=(torch.randn(4, 5),))
    assert str(refused.value) == (
        "adapter='v1.2' cannot be part of a parameter's name: a dot would let 'lora_A.v1.2.weight' be read two ways. Say 'v1-2'."
    )


def test_the_name_of_rows_without_an_adapter_is_no_adapters(net: Net) -> None:
    with pytest.raises(lora_fx.PlanError) as refused:
        lora_fx.rewrite(net, RULES, adapter="__base__", example_inputs=(torch.randn(4, 5),))
    assert str(refused.value) == (
        "adapter='__base__' is PEFT's name for rows without an adapter (adapter_names). Say 'base'."
    )
