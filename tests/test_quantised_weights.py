"""Weights over codes by themselves: what a file may not make of them, shared memory, and folds around them."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import set_factors
from quantised import MODELS, batch, loaded, saved
from torch import nn

import lora_fx
from lora_fx.folding.checkpoint_plan import fold_checkpoint
from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.numerics.schemes import parse_scheme

pytestmark = pytest.mark.filterwarnings("ignore")


def layers(scheme: str = "nf4:double") -> nn.Sequential:
    """Return two quantised layers and a dense one."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(80, 48), nn.Tanh(), nn.Linear(48, 80, bias=False), nn.Tanh(), nn.Linear(80, 20))
    for index in (0, 2):
        weight = QuantisedWeight.of(model[index].weight, parse_scheme(scheme))
        model[index].weight = nn.Parameter(weight, requires_grad=False)
    return model


X = torch.randn(5, 80, generator=torch.Generator().manual_seed(4))


def test_dense_layers_beside_quantised_ones_are_folded_in_place() -> None:
    graph = lora_fx.rewrite(layers(), ["4"], rank=3, example_inputs=(X,)).eval()
    set_factors(graph)
    expected = lora_fx.fold(graph)(X)
    assert torch.equal(lora_fx.fold(graph, inplace=True)(X), expected)


@pytest.mark.parametrize("scheme", ["nf4:double", "int4:16"])
def test_codes_and_scales_go_to_shared_memory(scheme: str) -> None:
    graph = lora_fx.rewrite(layers(scheme), ["0"], rank=3, example_inputs=(X,))
    set_factors(graph)
    expected = graph(X)
    graph.share_memory()
    weight = graph.get_parameter("0.weight")
    assert isinstance(weight, QuantisedWeight)
    assert all(tensor.is_shared() for tensor in weight.stored.values())
    assert weight.is_shared()
    assert torch.equal(graph(X), expected)


def test_a_weight_without_an_update_stays_as_it_is_where_it_would_be_quantised_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    graph = lora_fx.rewrite(layers(), ["0", "2"], rank=3, example_inputs=(X,)).eval()
    with caplog.at_level(logging.WARNING):
        folded = lora_fx.fold(graph, quantised="requantise")
    assert caplog.text == ""
    assert torch.equal(folded(X), graph(X))
    assert "inf" not in str(lora_fx.fold_report(graph, folded))


@pytest.mark.parametrize("scheme", ["nf4", "fp4:double:128", "int8", "int4:16:asymmetric", "int4:rows"])
def test_a_pickle_with_other_codes_and_scales_than_the_scheme_has_is_refused(scheme: str) -> None:
    weight = QuantisedWeight.of(torch.randn(48, 80), parse_scheme(scheme))
    assert torch.equal(of_file(weight).dequantize(), weight.dequantize())
    assert torch.equal(pickle.loads(pickle.dumps(weight)).dequantize(), weight.dequantize())
    for name, tensor in weight.stored.items():
        for other in (tensor[:-1] if tensor.dim() else tensor[None], tensor.double().bool()):
            with pytest.raises(lora_fx.LoraFxError, match=f"{name}: expected torch.*, got torch.*Save the state"):
                of_file(QuantisedWeight({**weight.stored, name: other}, *weight._form))
    without = {name: weight.stored[name] for name in weight.stored if name != "codes"}
    with pytest.raises(lora_fx.LoraFxError, match=r"codes: expected .*, got none"):
        of_file(QuantisedWeight(without, *weight._form))
    with pytest.raises(lora_fx.LoraFxError, match="further: expected no such tensor"):
        of_file(QuantisedWeight({**weight.stored, "further": torch.ones(2)}, *weight._form))


def of_file(weight: QuantisedWeight) -> Any:
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_pickle_with_numbers_that_no_scheme_has_is_refused() -> None:
    scheme = parse_scheme("nf4")
    weight = QuantisedWeight.of(torch.randn(48, 80), scheme)
    hostile = copy.copy(scheme)
    object.__setattr__(hostile, "blocksize", -64)
    for form, message in (
        ((hostile, (48, 80), torch.float32), "a blocksize of 32, .*, got 'nf4' and -64"),
        ((scheme, (48, 80), torch.int32), "a floating-point dtype, got"),
        ((scheme, (48, 81), torch.float32), r"codes: expected torch.uint8 \[1944, 1\], got torch.uint8 \[1920, 1\]"),
    ):
        with pytest.raises(lora_fx.LoraFxError, match=message):
            of_file(QuantisedWeight(weight.stored, *form))


def test_a_state_dict_with_other_scales_is_refused() -> None:
    graph = lora_fx.trace(layers("nf4"), (X,))
    weight = graph.get_parameter("0.weight")
    assert isinstance(weight, QuantisedWeight)
    fewer = QuantisedWeight({**weight.stored, "absmax": weight.stored["absmax"][:1]}, *weight._form)
    with pytest.raises(
        lora_fx.LoraFxError, match=r"'0.weight' is a weight in nf4 .*, with codes and scales of other shapes"
    ):
        graph.load_state_dict({**graph.state_dict(), "0.weight": nn.Parameter(fewer, requires_grad=False)})


def test_an_adapter_that_split_dense_weights_is_not_read_onto_quantised_ones(tmp_path: Path) -> None:
    base = saved("gpt2", torch.float32, tmp_path / "base")
    dense = transformers.GPT2LMHeadModel.from_pretrained(base)
    config = peft.LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    )
    peft.get_peft_model(dense, config).save_pretrained(tmp_path / "adapter")
    message = (
        r"splitting dense weights, expected these, got transformer\.h\.0\.attn\.c_attn\.weight, .*c_fc\.weight quantised.*"
        r"path_initial_model_for_weight_conversion"
    )
    with pytest.raises(lora_fx.AdapterError, match=message):
        lora_fx.from_adapter(loaded("gpt2", base, "nf4", torch.float32), tmp_path / "adapter")
    with pytest.raises(lora_fx.AdapterError, match=message):
        fold_checkpoint(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out", quantised="nf4")
    assert not (tmp_path / "out").exists()
    kept = ["c_attn", "c_fc", "lm_head"]  # dense, as they were
    fold_checkpoint(base, [(tmp_path / "adapter", 1.0)], tmp_path / "out", quantised="nf4", not_quantised=kept)


def test_a_merged_gpt2_has_quantised_weights_the_way_its_conv1d_stores_them(tmp_path: Path) -> None:
    base = saved("gpt2", torch.float32, tmp_path / "base")
    graph = lora_fx.rewrite(loaded("gpt2", base, "nf4", torch.float32), MODELS["gpt2"][1], rank=5, alpha=8)
    set_factors(graph)
    graph.eval()
    ids = batch("gpt2")
    with torch.no_grad():
        for each in (graph, lora_fx.dequantise(graph), lora_fx.unload(graph), lora_fx.fold(graph)):
            merged = each.merge_and_unload()
            assert merged.transformer.h[0].attn.c_attn.weight.shape == (64, 192)
            torch.testing.assert_close(merged(**ids).logits, each(**ids).logits, rtol=1e-4, atol=1e-5)
        prompt = ids["input_ids"][1:2, :3]
        expected = graph.merge_and_unload().generate(prompt, max_new_tokens=4, do_sample=False)
        assert torch.equal(graph.generate(prompt, max_new_tokens=4, do_sample=False), expected)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(again(**ids).logits, merged(**ids).logits)
