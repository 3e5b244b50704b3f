"""Half precision in ONNX files, written from graphs in single precision; all digits of numbers in double precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from architectures import few, rows, traced
from conftest import set_factors
from torch import nn

import lora_fx

HALF = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}


class Block(nn.Module):
    """A mask with the least number, a norm of numbers whose squares float16 does not hold, and positions beyond 2048."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 5), nn.RMSNorm(5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        hidden = self.first(x) * 900
        hidden = self.norm(hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt())
        least = torch.finfo(torch.float32).min
        bias = torch.where(mask[:, None, :], 0.0, least)
        weights = (hidden @ hidden.transpose(-1, -2) + bias).softmax(-1)
        hidden = nn.functional.scaled_dot_product_attention(hidden, hidden, hidden, bias)
        angles = (torch.arange(x.shape[1], device=x.device) + 5000).float()[:, None] * 0.7
        return {"out": self.last(weights @ hidden), "angles": angles.cos() + x[:1, :, :1].abs() * 0}


@pytest.fixture(scope="module")
def block() -> lora_fx.TracedGraphModule:
    torch.manual_seed(4)
    batch = {"x": torch.randn(3, 7, 6), "mask": torch.ones(3, 7, dtype=torch.bool)}
    batch["mask"][0] = False
    batch["mask"][1, :3] = False
    return lora_fx.trace(Block(), batch, inference=True)


def test_a_file_in_float16_is_near_its_graph_with_full_masks_large_numbers_and_far_positions(
    block: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    report = lora_fx.export.onnx(block, tmp_path / "model.onnx", dtype=torch.float16)
    assert report.largest is not None
    assert 0 < report.largest < 3e-3
    assert block.dtype is torch.float32


@pytest.mark.parametrize("dtype", few(HALF, [torch.float16]), ids=str)
def test_weights_and_products_are_in_the_dtype_and_inputs_and_outputs_are_not(
    dtype: torch.dtype, block: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    lora_fx.export.onnx(block, tmp_path / "model.onnx", dtype=dtype, verify=False)
    lora_fx.export.onnx(block, tmp_path / "whole.onnx", verify=False)
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx"), strict_mode=True)
    graph = model.graph
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.BOOL,
    }
    weights = {tensor.name: tensor for tensor in graph.initializer}
    assert {name for name, tensor in weights.items() if tensor.data_type == HALF[dtype]} == {
        "first.weight.T",
        "last.weight.T",
    }
    whole = {tensor.name: tensor for tensor in onnx.load(tmp_path / "whole.onnx").graph.initializer}
    for name, tensor in weights.items():
        expected = torch.tensor(onnx.numpy_helper.to_array(whole[name]))
        if tensor.data_type == HALF[dtype]:
            expected = expected.to(dtype).float()
        assert torch.equal(torch.tensor(onnx.numpy_helper.to_array(tensor).astype(np.float32)), expected)
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    products = [types[node.output[0]] for node in graph.node if node.op_type == "MatMul"]
    assert products == [HALF[dtype]] * 6
    norms = [node for node in graph.node if node.op_type in ("RMSNormalization", "Softmax", "Cos", "Pow", "ReduceMean")]
    assert {types[node.output[0]] for node in norms} == {onnx.TensorProto.FLOAT}


def test_bfloat16_is_not_compared_where_onnxruntime_has_no_kernels(
    block: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    with pytest.raises(lora_fx.ExportError, match=r"onnxruntime .* does not load .* verify=False"):
        lora_fx.export.onnx(block, tmp_path / "model.onnx", dtype=torch.bfloat16)


class Parts(nn.Module):
    """What half precision cannot hold, each on its way to an output or a product."""

    inverse: torch.Tensor
    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.table = nn.Linear(6, 4), nn.Linear(4, 5), nn.Embedding(33, 4)
        self.large = nn.Linear(4, 3)
        with torch.no_grad():
            self.large.weight[2, 3] = 7e4
        self.register_buffer("inverse", 1.0 / 10000 ** (torch.arange(0, 4, 2) / 4), persistent=False)
        self.register_buffer("mask", torch.triu(torch.full((300, 300), -1e9), 1), persistent=False)

    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> Any:
        length = x.shape[1]
        positions = torch.arange(length, device=x.device)
        far = (positions.float() * 10)[None, None, :]
        angles = (self.inverse[None, :, None].expand(x.shape[0], -1, 1) @ far.expand(x.shape[0], -1, -1)).transpose(
            1, 2
        )
        distance = (positions + 8).float()
        buckets = 8 + ((distance / 8).log() / math.log(16) * 8).long()
        hidden = self.first(x) * torch.cat((angles.cos(), angles.sin()), -1)
        scores = hidden @ hidden.transpose(-1, -2) + self.mask[:length, :length]
        positive = hidden.relu() * kept[..., None]
        return {
            "rotated": hidden,
            "attended": self.last(scores.softmax(-1) @ hidden),
            "buckets": buckets,
            "rounded": (distance * 0.37).round().long() + (distance * 0.11).floor().long(),
            "looked_up": self.last(self.table(buckets.clamp(max=32))),
            "share": self.last(positive / (positive.sum(-1, keepdim=True) + 1e-20)),
            "mean": self.last((hidden * kept[..., None]).sum(1) / kept.sum(1, keepdim=True).clamp(min=1e-9)),
            "length": self.last(hidden * torch.rsqrt(positive.pow(2).mean(-1, keepdim=True) + 1e-12)),
            "masked": hidden.masked_fill(kept[..., None] == 0, torch.finfo(torch.float32).min),
            "highest": self.last(torch.where(kept[..., None] == 0, -1e30, hidden).amax(1)),
            "beside": torch.cat(
                (x.new_zeros(x.shape[0], 1, 4), self.table(buckets.clamp(max=32))[None].expand(x.shape[0], -1, -1)), 1
            ),
            "large": self.large(hidden),
        }


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return what the file and the model compute for 270 positions, some rows masked entirely."""
    torch.manual_seed(5)
    model = Parts()
    graph = lora_fx.trace(model, {"x": torch.randn(3, 7, 6), "kept": torch.ones(3, 7)}, inference=True)
    path = tmp_path_factory.mktemp("parts") / "model.onnx"
    lora_fx.export.onnx(graph, path, dtype=torch.float16, verify=False)
    inputs = {"x": torch.randn(2, 270, 6), "kept": torch.ones(2, 270)}
    inputs["kept"][0, 3:9] = 0
    inputs["kept"][1] = 0
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        expected = model(**inputs)
    names = [output.name for output in session.get_outputs()]
    return {name: (torch.from_numpy(value), expected[name]) for name, value in zip(names, found, strict=True)}


@pytest.mark.parametrize("name", ["buckets", "rounded"])
def test_integers_computed_from_real_numbers_are_those_of_the_graph(
    name: str, parts: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    found, expected = parts[name]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["rotated", "attended", "looked_up", "beside"])
def test_rotations_far_out_masks_in_buffers_and_zeros_of_varying_sizes_are_near_those_of_the_graph(
    name: str, parts: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    found, expected = parts[name]
    assert (found - expected).abs().max() < 3e-3 * expected.abs().max()


@pytest.mark.parametrize("name", ["share", "mean"])
def test_constants_that_would_become_zero_guard_divisions_as_in_the_graph(
    name: str, parts: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    found, expected = parts[name]
    assert (found - expected).abs().max() < 3e-3 * expected.abs().max()


def test_quotients_beyond_the_dtype_are_clipped_where_a_product_reads_them(
    parts: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> None:
    found, expected = parts["length"]
    assert expected[1].abs().max() > 7e4
    assert found.isfinite().all()
    near = expected[0].abs().amax(-1) < 1e3
    assert (found[0][near] - expected[0][near]).abs().max() < 3e-3 * expected[0][near].abs().max()


@pytest.mark.parametrize("name", ["masked", "highest", "large"])
def test_numbers_that_the_dtype_does_not_hold_stay_in_outputs_and_before_products(
    name: str, parts: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    found, expected = parts[name]
    assert (found.double() - expected.double()).abs().max() < 3e-3 * expected.double().abs().max()
    lowest = torch.finfo(torch.float32).min
    if name == "masked":
        assert torch.equal(found == lowest, expected == lowest)
        rest = expected != lowest
        assert (found[rest] - expected[rest]).abs().max() < 3e-3 * expected[rest].abs().max()


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_graph_of_another_dtype_than_float32_is_refused(own: torch.dtype, tmp_path: Path) -> None:
    graph = lora_fx.trace(nn.Linear(6, 5, dtype=own), (torch.randn(3, 6, dtype=own),), inference=True)
    with pytest.raises(
        lora_fx.ExportError, match=r"for graphs in float32, got .*weight.* trace the model after `\.float\(\)`"
    ):
        lora_fx.export.onnx(graph, tmp_path / "model.onnx", dtype=torch.float16, verify=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": torch.float64}, r"expected torch\.float16 or torch\.bfloat16, got torch\.float64"),
        ({"dtype": torch.float16, "slots": True}, r"slots=True: adapters and codes are for float32"),
        ({"dtype": torch.float16, "quantised": True}, r"quantised=True: adapters and codes are for float32"),
    ],
)
def test_other_dtypes_and_options_are_refused(
    options: dict[str, Any], said: str, block: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    with pytest.raises(lora_fx.ExportError, match=said):
        lora_fx.export.onnx(block, tmp_path / "model.onnx", **options)


class Cast(nn.Module):
    """A product in bfloat16, as under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = torch.bfloat16
        return nn.functional.linear(x.to(low), self.layer.weight.to(low), self.layer.bias.to(low))


def test_a_graph_with_results_in_half_precision_is_refused(tmp_path: Path) -> None:
    graph = lora_fx.trace(Cast(), (torch.randn(3, 6),), inference=True)
    with pytest.raises(lora_fx.ExportError, match=r"got .*bfloat16.* without autocast"):
        lora_fx.export.onnx(graph, tmp_path / "model.onnx", dtype=torch.bfloat16, verify=False)


@pytest.mark.parametrize("name", rows(("bert", "llama", "t5", "gpt2", "deberta-v2", "blip-2"), ()))
def test_architectures_in_float16_are_near_their_graphs(name: str, tmp_path: Path) -> None:
    report = lora_fx.export.onnx(traced(name), tmp_path / "model.onnx", dtype=torch.float16)
    assert report.largest is not None
    assert report.largest < 2e-2


class Numbers(nn.Module):
    """A linear layer among numbers that float32 does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x * 0.3) / 0.7 - 1 / 3
        return torch.where(y > 0.1, y, 0.9).clamp(-0.6, 1.1)


def test_numbers_in_a_file_of_a_float64_graph_have_all_their_digits(tmp_path: Path) -> None:
    """torch.onnx rounds them to float32: 4e-8 of a result. rsLoRA's scale is 1 / √3."""
    x = torch.randn(4, 5, dtype=torch.float64)
    rules = {"select": [{"target": ["inner"], "rank": 3, "alpha": 1, "scaling": "rslora"}]}
    graph = lora_fx.rewrite(Numbers().double().eval(), rules, example_inputs=(x,), inference=True)
    set_factors(graph)
    lora_fx.export.onnx(graph, tmp_path / "m.onnx", tolerance=1e-14)
    found = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x.numpy()})[0]
    with torch.no_grad():
        assert np.abs(found - graph(x).numpy()).max() < 1e-14
