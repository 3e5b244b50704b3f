"""ONNX models with quantised weights: the codes are those of the graph, and onnxruntime computes what it computes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import transformers
from onnx import numpy_helper
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx.errors import ExportError
from lora_fx.graph.graph_module import rebuilt, state_of
from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.numerics.schemes import parse_scheme

SCHEMES = {
    "q_proj": "nf4", "k_proj": "nf4:double:32", "v_proj": "fp4", "o_proj": "int4:32", "gate_proj": "int4:32:asymmetric",
    "up_proj": "int8", "down_proj": "int2:48",
}  # fmt: skip
"""A scheme for each kind of product; groups of 48 are three blocks of 16 in onnxruntime."""


def quantised(graph: Any, schemes: dict[str, str]) -> Any:
    """Return a graph in which weights whose names have these words are quantised."""
    found = {}
    for name, tensor in state_of(graph).tensors.items():
        text = next((text for word, text in schemes.items() if f"{word}.weight" in name), None)
        if text is not None:
            transposed = "conv" in name
            made = QuantisedWeight.of(
                tensor.detach().T.contiguous() if transposed else tensor.detach(), parse_scheme(text)
            )
            found[name] = nn.Parameter(made.t() if transposed else made, requires_grad=False)
    assert len(found) == len(schemes)
    return rebuilt(graph, tensors=found)


@pytest.fixture(scope="module")
def graph() -> Any:
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=144, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=50,
        attention_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return quantised(lora_fx.trace(model, inference=True), SCHEMES)


def test_codes_are_written_as_they_are_with_slots_beside_them(graph: Any, tmp_path: Path) -> None:
    branched = lora_fx.rewrite(graph, rules="all-linear", rank=3, alpha=5)
    path = tmp_path / "model.onnx"
    written = lora_fx.export.onnx(
        branched, path, quantised=True, slots=True
    )  # is compared without an adapter, and with one
    assert written.path == path
    model = onnx.load(path)
    operators = Counter((node.domain, node.op_type) for node in model.graph.node)
    assert operators["com.microsoft", "MatMulBnb4"] == 3
    assert operators["com.microsoft", "MatMulNBits"] == 4
    stored = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    assert not [name for name in stored if name.endswith(("_proj.weight", "_proj.weight.T"))]
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = state_of(graph).tensors[name].stored
    assert stored[f"{name}.codes"].tolist() == weight["codes"].view(-1).tolist()
    assert stored[f"{name}.absmax"].tolist() == weight["absmax"].tolist()
    dense = lora_fx.export.onnx(graph, tmp_path / "dense.onnx")
    assert path.stat().st_size < 0.5 * dense.path.stat().st_size
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids = torch.tensor([[4, 40, 7, 9, 11], [1, 2, 3, 49, 0], [6, 6, 6, 8, 8]])
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    (logits,) = session.run(["logits"], {key: value.numpy() for key, value in inputs.items()})
    expected = graph.eval()(**inputs).logits.detach()
    assert (torch.from_numpy(logits) - expected)[mask.bool()].abs().max() <= 2e-6 * expected.abs().max()


def test_products_of_other_forms_are_written_too(tmp_path: Path) -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.conv, self.shared = nn.Linear(64, 48), Conv1D(32, 48), nn.Linear(32, 32, bias=False)
            nn.init.normal_(self.conv.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(self.flat(x))
            return self.shared(self.shared(y)[None])[0]

    graph = lora_fx.trace(Products(), (torch.randn(5, 64),), inference=True)
    graph = quantised(graph, {"flat": "nf4", "conv": "int4:16", "shared": "int8"})
    lora_fx.export.onnx(graph, tmp_path / "model.onnx", quantised=True, tolerance=1e-6)
    model = onnx.load(tmp_path / "model.onnx")
    operators = Counter(node.op_type for node in model.graph.node)
    assert (operators["MatMulBnb4"], operators["MatMulNBits"], operators["Gemm"]) == (1, 3, 0)


def test_what_onnxruntime_has_no_kernel_for_is_refused_by_name(tmp_path: Path) -> None:
    class Read(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.a, self.b = (nn.Linear(512, 512, dtype=dtype) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)) + self.a.weight[0]

    plain = lora_fx.trace(Read(torch.float32), (torch.randn(2, 512),), inference=True)
    half = lora_fx.trace(Read(torch.bfloat16), (torch.randn(2, 512).bfloat16(),), inference=True)
    cases = [
        (
            quantised(plain, {"a": "nf4:512", "b": "int4:8"}),
            "  a.weight: expected blocks of 256 at most, got nf4:512\n  b.weight: expected groups",
        ),
        (quantised(plain, {"b": "int3:64"}), "b.weight: expected 2, 4 or 8 bits, got int3:64"),
        (quantised(half, {"b": "nf4"}), "b.weight: expected a weight that is float32 when dense, got torch.bfloat16"),
        (plain, "the graph has no quantised weights"),
        (
            quantised(plain, {"a": "nf4"}),
            "expected products alone to read quantised weights, got other operators on a.weight",
        ),
    ]
    for graph, message in cases:
        with pytest.raises(ExportError) as caught:
            lora_fx.export.onnx(graph, tmp_path / "model.onnx", quantised=True)
        assert message in str(caught.value)
    assert not list(tmp_path.iterdir())
