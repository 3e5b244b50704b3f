"""Operators that formats lack, written with others: complex numbers, bfloat16 amid float32, checks of values, idle squeezes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import onnxruntime
import pytest
import torch
from architectures import rows
from test_adapter_files import llava
from torch import nn

import lora_fx

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")


class Rotary(nn.Module):
    """A product with complex numbers, as Llama 4 turns its queries."""

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        turns = torch.polar(torch.ones_like(angles), angles) * 0.5
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        turned = pairs * turns[:, :, None, :].transpose(-1, -2).transpose(2, -1)
        return torch.view_as_real(turned * angles[:, :, None, :]).flatten(-2)


class Rounded(nn.Module):
    """Products of bfloat16 in a model of float32, as Falcon's positions; of integers that bfloat16 does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = self.slopes[:, None].bfloat16() * x
        return ((rounded + 0.1 * rounded.abs()) / 3).float()


class OneNumber(nn.Module):
    """Sums and products of bfloat16 with one number, which torch rounds or not."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(7.12345))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, scale = x.bfloat16(), self.scale
        sums = (a + scale, scale + a, a - scale, scale - a, a + 7.12345, a - 7.12345, a + x.int())
        products = (a * scale, scale * a, a / scale, scale / a, 7.12345 * a, a / 7.12345, a * scale.double())
        return tuple(result.float() for result in (*sums, *products))


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.add(x.bfloat16(), y.bfloat16(), alpha=3).float()


class ComplexNumbers(nn.Module):
    """Products with complex numbers of Python: of real tensors, integers and complex ones."""

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        turns = (x * (0.5 + 2j)) * (n * 1j)
        return torch.view_as_real(turns * (3 - 1j))


class RealPart(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.polar(x.abs(), x).to(torch.float32)


class FromReal(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.polar(x.abs(), x) * x.to(torch.complex64))


class Reversed(nn.Module):
    """A mask of integers the other way round, as XLNet's."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x * (1.0 - mask)[..., None] + torch.rsub(mask, 2.5, alpha=3)[..., None]


class Squeezed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 2).squeeze(1)


class Checked(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._check_tensor_all(x > 0, lambda: "expected positive numbers")
        return x.log()


def test_products_of_complex_numbers_are_written_with_pairs_in_onnx(tmp_path: Path) -> None:
    batch = {"x": torch.randn(2, 7, 3, 8), "angles": torch.randn(2, 7, 4)}
    report = lora_fx.export.onnx(lora_fx.trace(Rotary(), batch, inference=True), tmp_path / "model.onnx")
    assert report.largest is not None
    assert report.largest < 1e-6


def test_products_of_bfloat16_keep_their_bits_in_onnx(tmp_path: Path) -> None:
    graph = lora_fx.trace(Rounded(), (torch.randint(0, 5000, (3, 1, 7)),), inference=True)
    assert lora_fx.export.onnx(graph, tmp_path / "model.onnx").largest == 0


def test_single_numbers_beside_bfloat16_are_rounded_in_onnx_where_torch_rounds_them(tmp_path: Path) -> None:
    graph = lora_fx.trace(OneNumber(), (torch.randn(64, 5) * 3,), inference=True)
    assert lora_fx.export.onnx(graph, tmp_path / "model.onnx").largest == 0


def test_a_scaled_sum_of_bfloat16_is_left_to_the_runtime(tmp_path: Path) -> None:
    graph = lora_fx.trace(Scaled(), (torch.randn(3, 5), torch.randn(3, 5)), inference=True)
    with pytest.raises(lora_fx.ExportError, match=r"does not load the written file.*Its CPU kernels want float32"):
        lora_fx.export.onnx(graph, tmp_path / "model.onnx")


def test_products_with_complex_numbers_of_python_are_written_in_onnx(tmp_path: Path) -> None:
    batch = {"x": torch.randn(2, 7), "n": torch.randint(1, 5, (2, 7))}
    report = lora_fx.export.onnx(lora_fx.trace(ComplexNumbers(), batch, inference=True), tmp_path / "model.onnx")
    assert report.largest is not None
    assert report.largest < 1e-6


def test_the_cast_of_complex_numbers_to_their_real_parts_is_refused_in_onnx(tmp_path: Path) -> None:
    graph = lora_fx.trace(RealPart(), (torch.randn(2, 7),), inference=True)
    with pytest.raises(lora_fx.ExportError, match="complex"):
        lora_fx.export.onnx(graph, tmp_path / "model.onnx", verify=False)
    assert not (tmp_path / "model.onnx").exists()


def test_real_numbers_become_complex_ones_in_onnx(tmp_path: Path) -> None:
    graph = lora_fx.trace(FromReal(), (torch.randn(2, 7),), inference=True)
    report = lora_fx.export.onnx(graph, tmp_path / "model.onnx")
    assert report.largest is not None
    assert report.largest < 1e-6


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_a_number_minus_integers_is_written_in_onnx(dtype: torch.dtype | None, tmp_path: Path) -> None:
    batch = {"x": torch.randn(3, 7, 5), "mask": torch.randint(0, 2, (3, 7))}
    report = lora_fx.export.onnx(lora_fx.trace(Reversed(), batch, inference=True), tmp_path / "m.onnx", dtype=dtype)
    assert report.largest is not None
    assert report.largest < (2e-3 if dtype else 1e-6)


def test_a_squeeze_of_another_size_than_1_does_nothing_in_onnx(tmp_path: Path) -> None:
    graph = lora_fx.trace(Squeezed(), (torch.randn(3, 7, 2),), dynamic={"x": (0,)}, inference=True)
    assert lora_fx.export.onnx(graph, tmp_path / "model.onnx").largest == 0
    varying = lora_fx.trace(
        Squeezed(), (torch.randn(3, 7, 2),), inference=True
    )  # its rank at size 1 is no rank of a file
    with pytest.raises(
        lora_fx.VerifyError, match=r"does not run at batch 3, x_1 1.*indices element out of data bounds"
    ):
        lora_fx.export.onnx(varying, tmp_path / "varying.onnx")


@pytest.mark.parametrize("write", ["torchscript", "onnx", "pt2"])
def test_a_value_that_the_model_refuses_is_refused_by_the_file(write: str, tmp_path: Path) -> None:
    graph = lora_fx.trace(Checked(), (torch.rand(3, 7) + 1,), inference=True)
    path = getattr(lora_fx.export, write)(graph, tmp_path / "model.pt2").path
    run: Any
    if write == "onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        run = lambda x: torch.tensor(session.run(None, {"x": x.numpy()})[0])  # noqa: E731
    else:
        loaded = torch.jit.load(path) if write == "torchscript" else torch.export.load(path).module()
        run = lambda x: loaded(x=x)["output"]  # noqa: E731
    assert torch.allclose(run(torch.full((4, 5), 3.0)), torch.full((4, 5), 3.0).log())
    with pytest.raises(Exception, match=r"condition of the model holds|indices element out of data bounds|u0|assert"):
        run(torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        pytest.param(row.values[0], write, marks=row.marks)
        for write, representatives in {"torchscript": ("llava",), "onnx": ()}.items()
        for row in rows(("gemma3", "llama4", "llama4_text", "falcon-multi-head", "llava"), representatives)
    ],
)
def test_models_with_such_operators_are_written(name: str, write: str, tmp_path: Path) -> None:
    graph = lora_fx.trace(llava(), inference=True) if name == "llava" else families.traced(name)
    report = getattr(lora_fx.export, write)(graph, tmp_path / "model.pt2")
    assert report.largest < 2e-6
