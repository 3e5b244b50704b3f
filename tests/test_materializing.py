from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, SIZES, build, few, inputs, rows, traced
from conftest import set_factors, unchanged
from torch import nn

import lora_fx


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return ARCHITECTURES[name].build()


@functools.cache
def empty(name: str) -> lora_fx.TracedGraphModule:
    """Return the trace of a model without weights. Not to be changed."""
    return lora_fx.trace(on_meta(name))


@pytest.mark.parametrize("name", rows(("t5", "gpt2", "llama", "bert"), ("gpt2",)))
def test_a_graph_traced_on_meta_runs_on_cpu_with_the_models_bits(name: str) -> None:
    model = build(name).requires_grad_(False)
    with unchanged(model):
        graph_module = lora_fx.materialize(empty(name), model.state_dict()).eval()
    assert not any(tensor.is_meta for tensor in (*graph_module.parameters(), *graph_module.buffers()))
    assert all(p.is_meta for p in empty(name).parameters())
    assert set(graph_module.state_dict()) == set(model.state_dict())
    for size in SIZES:
        batch = inputs(name, *size)
        expected = model(**batch, **ARCHITECTURES[name].constants)[0]
        assert torch.equal(graph_module(**batch)[0], expected)


def test_factors_are_initialised_or_taken() -> None:
    model = build("llama")
    branched = lora_fx.rewrite(traced("llama"), rules="llama", seed=3)
    on_no_device = lora_fx.rewrite(empty("llama"), rules="llama")
    assert all(p.is_meta for p in on_no_device.parameters())
    fresh = lora_fx.materialize(on_no_device, model.state_dict(), seed=3)
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
        n for n, p in branched.named_parameters() if p.requires_grad
    }
    for name, parameter in branched.named_parameters():
        assert torch.equal(fresh.get_parameter(name), parameter)
    set_factors(branched)
    taken = lora_fx.materialize(on_no_device, branched.state_dict())
    batch = inputs("llama", 3, 11)
    assert torch.equal(taken.eval()(**batch)[0], branched.eval()(**batch)[0])


def test_a_state_dict_that_does_not_fit_is_refused_with_all_problems() -> None:
    without = lora_fx.trace(on_meta("bert"), inference=True)
    weights: dict[str, Any] = dict(build("bert").state_dict())
    weights["extra"] = torch.zeros(3)
    weights["pooler.dense.bias"] = torch.zeros(7)
    weights["pooler.dense.weight"] = weights["pooler.dense.weight"].half()
    del weights["embeddings.LayerNorm.bias"]
    with pytest.raises(lora_fx.LoraFxError) as caught:
        lora_fx.materialize(without, weights)
    for problem in (
        "'embeddings.LayerNorm.bias' is missing",
        "'extra' is unknown",
        "'pooler.dense.bias' is torch.float32 (7,), not torch.float32 (48,)",
        "'pooler.dense.weight' is torch.float16 (48, 48), not torch.float32 (48, 48)",
    ):
        assert problem in str(caught.value)
    with pytest.raises(lora_fx.LoraFxError, match=r"expected a mapping .*, got a BertModel: pass its state_dict\(\)"):
        lora_fx.materialize(without, build("bert"))  # type: ignore[arg-type]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.register_buffer("scale", torch.arange(5.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale


def test_buffers_of_a_plain_module_come_from_one_like_it() -> None:
    with torch.device("meta"):
        empty = lora_fx.trace(Scaled(), (torch.empty(2, 6),))
    model = Scaled()
    with pytest.raises(lora_fx.LoraFxError, match="scale have no values: pass like="):
        lora_fx.materialize(empty, model.state_dict())
    graph_module = lora_fx.materialize(empty, model.state_dict(), like=model)
    x = torch.randn(3, 6)
    assert torch.equal(graph_module(x), model(x))
    assert "scale" not in graph_module.state_dict()


@pytest.mark.parametrize(("sizes", "dynamic"), few([((1, 8), (1,)), ((2, 8), (0,)), ((2, 8), (1,))], [((1, 8), (1,))]))
def test_a_graph_that_was_traced_on_meta_for_one_size_alone_is_compared_at_that_size(
    sizes: tuple[int, int], dynamic: tuple[int]
) -> None:
    names = ("input_ids", "attention_mask")
    examples = {name: torch.ones(sizes, dtype=torch.int64, device="meta") for name in names}
    empty = lora_fx.trace(on_meta("llama"), example_inputs=examples, dynamic=dict.fromkeys(names, dynamic))
    model = build("llama").eval()
    ready = lora_fx.materialize(empty, model.state_dict()).eval()
    for more in (0, 3):
        shape = [size + more * (dim in dynamic) for dim, size in enumerate(sizes)]
        given = {name: torch.ones(shape, dtype=torch.int64) for name in names}
        assert torch.equal(ready(**given)[0], model(**given, use_cache=False)[0])
    with pytest.raises(lora_fx.InputError):
        ready(**{name: torch.ones(sizes[0] + 1, sizes[1] + 1, dtype=torch.int64) for name in names})


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Linear(5, 7)
        # After a model of transformers was loaded in this process, torch.device("meta") no longer reaches torch.linspace.
        self.register_buffer("angles", torch.linspace(0.1, 1.3, 7, device=self.turn.weight.device), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.turn(x) * self.angles


def test_a_graph_in_bfloat16_gets_the_factors_and_buffers_of_one_with_weights() -> None:
    model = Turned().bfloat16()
    with torch.device("meta"):
        without = Turned().bfloat16()
    mine, theirs = (
        lora_fx.rewrite(
            each, ["turn"], rank=3, seed=4, example_inputs=(torch.ones(2, 5, dtype=torch.bfloat16, device=device),)
        )
        for each, device in ((without, "meta"), (model, "cpu"))
    )
    filled = lora_fx.materialize(mine, model.state_dict(), like=Turned(), seed=4)
    expected = dict([*theirs.named_parameters(), *theirs.named_buffers()])
    for name, value in (*filled.named_parameters(), *filled.named_buffers()):
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name
