"""Versions of ONNX's operators: 17 and later, where the operators of the graph allow it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from architectures import few, rows, traced
from torch import nn

import lora_fx
from lora_fx.export.onnx_opset import DEFAULT_OPSET


class Changed(nn.Module):
    """Operators that opset 18 changed: reductions, splits into equal and unequal parts, padding; a GELU, which came with 20."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = nn.Linear(7, 5), nn.RMSNorm(5)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.norm(nn.functional.gelu(self.proj(x)))
        a, b, c = y.chunk(3, dim=-1)
        return {
            "mean": y.square().mean(-1),
            "largest": nn.functional.pad(y.amax(1), (1, 2), value=3.0),
            "product": x.prod(0),
            "parts": a * c + b,
            "all": x.square().mean(),
        }


@pytest.fixture(scope="module")
def changed() -> lora_fx.TracedGraphModule:
    torch.manual_seed(3)
    return lora_fx.trace(Changed(), (torch.randn(2, 3, 7),), inference=True)


@pytest.mark.parametrize("opset", few([17, 18, 21, 23, 24], (17, 24)))
def test_a_model_is_written_in_the_opset_that_is_asked_for(
    opset: int, changed: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    report = lora_fx.export.onnx(changed, tmp_path / "model.onnx", opset=opset)  # which compares it by onnxruntime
    model = onnx.load(report.path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert report.largest is not None
    assert report.largest < 1e-6
    assert any(node.op_type == "Gelu" for node in model.graph.node) == (opset >= 20)


def test_the_default_is_what_onnxruntime_and_tensorrt_take(changed: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    lora_fx.export.onnx(changed, tmp_path / "model.onnx", verify=False)
    model = onnx.load(tmp_path / "model.onnx")
    assert [entry.version for entry in model.opset_import] == [DEFAULT_OPSET] == [23]
    assert model.ir_version == onnx.helper.find_min_ir_version_for(model.opset_import)


class Bits(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x & 3) | (x[:1] & 4)


def test_operators_that_need_a_later_opset_are_named(tmp_path: Path) -> None:
    graph = lora_fx.trace(Bits(), (torch.randint(0, 9, (2, 3)),), inference=True)
    with pytest.raises(lora_fx.ExportError) as caught:
        lora_fx.export.onnx(graph, tmp_path / "model.onnx", opset=17)
    lines = str(caught.value).splitlines()
    assert lines[0] == "opset 17 lacks operators of this graph:"
    assert any(line.startswith("  BitwiseAnd (") and line.endswith("): needs opset 18") for line in lines)
    assert any(line.startswith("  BitwiseOr (") for line in lines)
    assert lines[-1] == "Write it with opset=18 or later."
    assert list(tmp_path.iterdir()) == []
    lora_fx.export.onnx(graph, tmp_path / "model.onnx", opset=18)


@pytest.mark.parametrize("opset", [16, 99, "17", True])
def test_what_is_no_opset_is_refused(opset: Any, changed: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    with pytest.raises(lora_fx.ExportError, match=r"opset: expected a number from 17 to \d\d, got"):
        lora_fx.export.onnx(changed, tmp_path / "model.onnx", opset=opset)


@pytest.mark.parametrize("name", rows(("bert", "llama", "t5", "mixtral", "blip-2"), ("llama",)))
def test_architectures_are_written_in_opset_17(name: str, tmp_path: Path) -> None:
    report = lora_fx.export.onnx(traced(name), tmp_path / "model.onnx", opset=17)
    assert report.largest is not None
    assert report.largest < 2e-6
