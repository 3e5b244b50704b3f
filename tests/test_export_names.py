"""Names of inputs, outputs and axes in exported files: of nested inputs, chosen ones, and results that are None."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from architectures import build, few
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

import lora_fx

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")


class Parts(nn.Module):
    """Inputs in a list and in a mapping; results in a tuple and in a mapping, two of which are None."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor, rest: list[torch.Tensor], more: dict[str, torch.Tensor]) -> Any:
        return self.proj(x), None, {"x": rest[0] * 2, "none": None}, rest[1] - more["bias"]


@pytest.fixture(scope="module")
def parts() -> lora_fx.TracedGraphModule:
    batch = {"x": torch.randn(3, 5), "rest": [torch.randn(7), torch.randn(2)], "more": {"bias": torch.randn(2)}}
    return lora_fx.trace(Parts(), batch, inference=True)


def written(path: Path) -> tuple[list[str], list[str]]:
    model = onnx.load(path)
    return [value.name for value in model.graph.input], [value.name for value in model.graph.output]


@pytest.mark.parametrize("write", ["torchscript", "onnx", "pt2"])
def test_results_that_are_none_are_left_out_and_the_report_says_so(
    write: str, parts: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    report = getattr(lora_fx.export, write)(parts, tmp_path / "model.pt2")
    assert report.outputs == ("output_0", "output_2.x", "output_3")
    assert report.left_out == ("output_1", "output_2.none")
    assert "left out, since None: output_1, output_2.none" in str(report).splitlines()
    assert report.largest < 1e-6


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return None, {"none": None}


def test_a_graph_that_returns_no_tensor_is_refused(tmp_path: Path) -> None:
    graph = lora_fx.trace(Nothing(), (torch.randn(3, 5),), inference=True)
    with pytest.raises(
        lora_fx.ExportError, match=r"expected a graph that returns a tensor, got None for output_0, output_1\.none"
    ):
        lora_fx.export.onnx(graph, tmp_path / "model.onnx")


def test_nested_inputs_are_called_by_index_and_key(parts: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    report = lora_fx.export.onnx(parts, tmp_path / "model.onnx", verify=False)
    assert written(report.path)[0] == ["x", "rest.0", "rest.1", "more.bias"] == list(report.inputs)
    assert lora_fx.export.torchscript(parts, tmp_path / "model.pt", verify=False).inputs.keys() == {
        "x",
        "rest_0",
        "rest_1",
        "more_bias",
    }


def test_inputs_and_outputs_are_renamed_by_their_names_or_in_their_order(
    parts: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    report = lora_fx.export.onnx(
        parts,
        tmp_path / "mapping.onnx",
        input_names={"rest.0": "first", "x": "rest.0"},
        output_names={"output_3": "x", "output_2.x": "linear"},  # which the product of the layer is called too
    )
    assert written(report.path) == (["rest.0", "first", "rest.1", "more.bias"], ["output_0", "linear", "x"])
    assert list(report.inputs) == ["rest.0", "first", "rest.1", "more.bias"]
    assert report.inputs["rest.0"] == ("batch", 5)
    assert report.outputs == ("output_0", "linear", "x")
    report = lora_fx.export.onnx(parts, tmp_path / "list.onnx", input_names=["a", "b"], output_names=["y"])
    assert written(report.path) == (["a", "b", "rest.1", "more.bias"], ["y", "output_2.x", "output_3"])
    assert report.largest is not None


def test_a_check_that_fails_names_the_renamed_input(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    graph = lora_fx.trace(Sum(), (torch.randn(3, 5), torch.randn(3, 5)), inference=True)
    lora_fx.export.onnx(graph, tmp_path / "model.onnx", input_names={"x": "left"})
    names = [node.name for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert any("left.size(0) == y.size(0)" in name for name in names), names


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"input_names": {"rest.O": "a"}},
            r"input_names: 'rest\.O' is none of the inputs \(did you mean 'rest\.1' or 'rest\.0'",
        ),
        ({"output_names": {"x": "a"}}, r"output_names: 'x' is none of the outputs.*output_0, output_2\.x, output_3"),
        (
            {"input_names": ["a"] * 5},
            r"expected 4 names at most, for the inputs x, rest\.0, rest\.1, more\.bias, got 5",
        ),
        ({"input_names": ["a", "a"]}, r"input_names: 'a' is the name of another input too"),
        ({"input_names": ["proj.weight"]}, r"input_names: 'proj\.weight' is the name of a weight too"),
        ({"output_names": ["x"]}, r"output_names: 'x' is the name of an input or a weight too"),
        (
            {"output_names": "y"},
            r"output_names: expected a mapping from names to new ones, or a list of new ones, got 'y'",
        ),
        ({"output_names": [None]}, r"output_names: expected a name for 'output_0', got None"),
    ],
)
def test_names_that_cannot_be_are_refused(
    options: dict[str, Any], said: str, parts: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    with pytest.raises(lora_fx.ExportError, match=said):
        lora_fx.export.onnx(parts, tmp_path / "model.onnx", **options)
    assert list(tmp_path.iterdir()) == []


class Sample(nn.Module):
    def forward(self, sample: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sample": sample * 2}


def test_an_output_with_the_name_of_an_input_is_told_of(tmp_path: Path) -> None:
    graph = lora_fx.trace(Sample(), (torch.randn(2, 7),), inference=True)
    report = lora_fx.export.onnx(graph, tmp_path / "model.onnx")
    assert report.renamed == {"sample": "out_sample"}
    assert "the output sample is called out_sample, since an input or a weight has its name" in str(report).splitlines()
    named = lora_fx.export.onnx(graph, tmp_path / "named.onnx", output_names=["noise"])
    assert (named.outputs, named.renamed) == (("noise",), {})


@pytest.mark.parametrize("kind", few(["tuple", "output"], ["tuple"]))
def test_the_axes_of_encoder_outputs_are_batch_and_sequence(kind: str, tmp_path: Path) -> None:
    model = build("t5", layers=1).eval()
    hidden = torch.randn(2, 7, model.config.d_model)
    encoded: Any = (hidden,) if kind == "tuple" else BaseModelOutput(last_hidden_state=hidden)
    batch = {
        "encoder_outputs": encoded,
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
        "decoder_input_ids": torch.randint(0, 50, (2, 5)),
    }
    graph = lora_fx.trace(model, batch, inference=True)
    with torch.no_grad():
        assert torch.equal(graph(**batch).logits, model(**batch, use_cache=False).logits)
    report = lora_fx.export.pt2(graph, tmp_path / "model.pt2", verify=False)
    (name,) = report.inputs.keys() - {"attention_mask", "decoder_input_ids"}
    assert report.inputs[name] == ("batch", "sequence", model.config.d_model)
    assert report.inputs["attention_mask"] == ("batch", "sequence")
