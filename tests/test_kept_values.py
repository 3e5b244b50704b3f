"""What an adapter has of its own is kept: on a graph without weights, on another weight, in a checkpoint, from a directory, in an export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import AdapterError, ExportError
from lora_fx.trainer import AdapterCallback

IDS = torch.arange(12).reshape(2, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(20, 8), nn.Linear(8, 6), nn.Linear(6, 8, bias=False)
        self.head = nn.Linear(8, 20, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(torch.tanh(self.up(x))))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def base(net: Net) -> lora_fx.TracedGraphModule:
    return lora_fx.trace(net, (IDS,))


@pytest.fixture(scope="module")
def empty() -> lora_fx.TracedGraphModule:
    with torch.device("meta"):
        model = Net()
    return lora_fx.trace(model.eval(), (IDS.to("meta"),))


def rules(*more: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"defaults": {"rank": 2, **settings}, "select": [{"target": ["up", "down"]}, *more]}


def trained(graph: lora_fx.TracedGraphModule, seed: int = 1) -> lora_fx.TracedGraphModule:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in graph.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return graph.eval()


KINDS: dict[str, dict[str, Any]] = {
    "lora": rules(),
    "dora": rules(variant="dora"),
    "a bias in B": rules(bias=True),
    "mica": rules(init="mica"),
    "pissa": rules(init="pissa"),
    "olora": rules(init="olora"),
    "a copy": rules({"target": ["head"], "trainable": "all"}),
    "rows": rules({"target": ["embed"], "trainable": [1, 3]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_for_a_graph_leave_the_trained_values_that_it_has(
    kind: str, net: Net, base: lora_fx.TracedGraphModule, empty: lora_fx.TracedGraphModule
) -> None:
    graph = trained(lora_fx.rewrite(base, KINDS[kind], seed=0))
    ready = lora_fx.materialize(lora_fx.transfer(graph, onto=empty), net.state_dict()).eval()
    assert torch.equal(ready(IDS), graph(IDS))
    assert {n for n, p in ready.named_parameters() if p.requires_grad} == {
        n for n, p in graph.named_parameters() if p.requires_grad
    }
    assert torch.equal(lora_fx.unload(ready)(IDS), base(IDS))


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_values_for_one_of_two_factors_are_refused(factor: str, base: lora_fx.TracedGraphModule) -> None:
    graph = trained(lora_fx.rewrite(base, rules(), seed=0))
    given = {name: value for name, value in graph.state_dict().items() if factor not in name}
    with pytest.raises(
        lora_fx.LoraFxError, match=rf"up\.{factor}\.default\.weight.*: expected values for all .*, got some"
    ):
        lora_fx.materialize(copy.deepcopy(graph).to("meta"), given)


@pytest.mark.parametrize("there", [False, True], ids=["new there", "there already"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_split_weight_is_the_one_of_the_graph_that_gets_the_adapter(
    init: str, there: bool, base: lora_fx.TracedGraphModule
) -> None:
    graph = lora_fx.activate(trained(lora_fx.rewrite(base, rules(init=init), adapter="a")), {})
    graph = lora_fx.activate(lora_fx.rewrite(graph, rules(), adapter="b"), {"b": 1.0})
    graph = trained(graph, seed=2)
    onto = lora_fx.fold(graph)
    onto = lora_fx.rewrite(onto, rules(init=init), adapter="a") if there else onto
    moved = lora_fx.transfer(lora_fx.activate(graph, {"a": 1.0}), onto=onto).eval()
    both = lora_fx.combine(graph, {"a": 1.0, "b": 1.0}).eval()
    assert torch.allclose(moved(IDS), both(IDS), atol=1e-5)
    assert not torch.allclose(moved(IDS), lora_fx.activate(graph, {"a": 1.0}).eval()(IDS), atol=1e-2)
    assert torch.allclose(lora_fx.fold(moved)(IDS), both(IDS), atol=1e-5)


def test_a_split_weight_has_the_dtype_of_the_graph_that_gets_the_adapter(
    net: Net, base: lora_fx.TracedGraphModule
) -> None:
    graph = trained(lora_fx.rewrite(base, rules(init="pissa")))
    onto = lora_fx.trace(copy.deepcopy(net).bfloat16(), (IDS,))
    moved = lora_fx.transfer(graph, onto=onto).eval()
    assert moved(IDS).dtype == torch.bfloat16
    assert (moved(IDS).float() - graph(IDS)).abs().max() < 0.02 * graph(IDS).abs().max()
    there = lora_fx.transfer(graph, onto=lora_fx.rewrite(onto, rules(init="pissa"))).eval()
    assert torch.equal(there(IDS), moved(IDS))


@pytest.mark.parametrize("settings", [{"freeze": ["A"]}, {"init": "pissa_niter_1"}, {"init": "pissa"}], ids=str)
def test_a_checkpoint_has_the_frozen_factors_of_an_adapter_that_trains(
    settings: dict[str, Any], base: lora_fx.TracedGraphModule
) -> None:
    first = trained(lora_fx.rewrite(base, rules(**settings), seed=0))
    AdapterCallback().on_init_end(model=first)
    kept = first.state_dict()
    assert not any("lora_rest" in name or name in base.state_dict() for name in kept)
    again = lora_fx.rewrite(base, rules(**settings), seed=5).eval()
    AdapterCallback().on_init_end(model=again)
    again.load_state_dict(kept)
    assert torch.equal(again(IDS), first(IDS))
    frozen = next(name for name in kept if name.startswith("up.lora_start_A" if "init" in settings else "up.lora_A"))
    with pytest.raises(AdapterError, match=rf"{frozen}: expected .*, got none"):
        again.load_state_dict({name: value for name, value in kept.items() if name != frozen})


def test_slots_name_rows_that_they_would_leave_out(base: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    graph = trained(lora_fx.rewrite(base, KINDS["rows"]))
    with pytest.raises(ExportError, match=r"adapter 'default' has trained rows of 'embed\.weight'"):
        lora_fx.export.onnx_adapter(graph, tmp_path / "it.onnx_adapter")


def test_a_start_beside_a_rounded_scale_is_found_again(base: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    settings = {"rank": 4, "alpha": 7, "scaling": "rslora", "init": "pissa"}
    graph = trained(lora_fx.rewrite(base, rules(**settings)))
    lora_fx.save_adapter(graph, tmp_path / "it")
    assert torch.equal(lora_fx.load_adapter(graph, tmp_path / "it").eval()(IDS), graph(IDS))


def test_a_factor_that_an_adapter_freezes_stays_frozen_when_values_come_from_a_directory(
    base: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    graph = lora_fx.rewrite(base, rules(freeze=["A"]))
    trains = {name for name, parameter in graph.named_parameters() if parameter.requires_grad}
    lora_fx.save_adapter(graph, tmp_path / "it")
    loaded = lora_fx.load_adapter(graph, tmp_path / "it", trainable=True)
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trains
