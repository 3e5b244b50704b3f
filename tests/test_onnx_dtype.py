"""Half precision in ONNX files, written from graphs in single precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from architectures import rows, traced
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


@pytest.mark.parametrize("dtype", list(HALF), ids=str)
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
    assert {tensor.data_type for tensor in weights.values()} == {HALF[dtype]}
    whole = {tensor.name: tensor for tensor in onnx.load(tmp_path / "whole.onnx").graph.initializer}
    for name, tensor in weights.items():
        expected = torch.tensor(onnx.numpy_helper.to_array(whole[name])).to(dtype).float()
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


def test_a_weight_that_the_dtype_does_not_hold_is_named(tmp_path: Path) -> None:
    linear = nn.Linear(6, 5)
    with torch.no_grad():
        linear.weight[2, 3] = 7e4
    graph = lora_fx.trace(linear, (torch.randn(3, 6),), inference=True)
    with pytest.raises(lora_fx.ExportError, match=r"within ±65504, which float16 holds: weight has 7e\+04"):
        lora_fx.export.onnx(graph, tmp_path / "model.onnx", dtype=torch.float16)
    lora_fx.export.onnx(graph, tmp_path / "model.onnx", dtype=torch.bfloat16, verify=False)


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


@pytest.mark.parametrize("name", rows(("bert", "llama", "t5", "gpt2", "mixtral", "deberta-v2", "blip-2"), ()))
def test_architectures_in_float16_are_near_their_graphs(name: str, tmp_path: Path) -> None:
    report = lora_fx.export.onnx(traced(name), tmp_path / "model.onnx", dtype=torch.float16)
    assert report.largest is not None
    assert report.largest < 2e-2
