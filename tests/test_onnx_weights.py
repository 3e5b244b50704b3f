"""Weights of ONNX models as other tools want them: products whose second operand is an initializer are quantised and fused."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, build, inputs, rows, traced
from conftest import set_factors
from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic
from onnxruntime.transformers import optimizer
from torch import nn

import lora_fx
from lora_fx.export.onnx_weights import TRANSPOSED_KEY


@dataclass(frozen=True)
class Files:
    """The file of a folded graph, the one that torch.onnx writes of the model itself, and a batch of other sizes."""

    name: str
    ours: Path
    torchs: Path
    batch: dict[str, torch.Tensor]


def resnet() -> nn.Module:
    torch.manual_seed(4)
    config = transformers.ResNetConfig(
        embedding_size=10, hidden_sizes=[10, 14], depths=[2, 1], layer_type="basic", num_labels=7
    )
    model = transformers.ResNetForImageClassification(config).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() == 1:  # a variance stays above 0
                tensor.add_(torch.rand_like(tensor) * 0.3 if name.endswith("var") else torch.randn_like(tensor) * 0.1)
    return model


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=rows(("bert", "llama", "vit", "resnet", "t5"), ("bert", "resnet")))
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    name, directory = request.param, tmp_path_factory.mktemp("files")
    rules = {"resnet": "all-conv"}.get(name, name)
    if name == "resnet":
        model, small, large = resnet(), {"pixel_values": images(2)}, {"pixel_values": images(5)}
        graph = lora_fx.trace(model, small, inference=True)
    elif name == "vit":
        model, graph = families.build(name).eval(), families.traced(name)
        small, large = families.inputs(name, 2, 7), families.inputs(name, 5, 7)
    else:
        model, graph, small, large = build(name).eval(), traced(name), inputs(name, 2, 7), inputs(name, 3, 11)
    if name == "t5":  # of whose attention by an operator torch.onnx.export (2.13) makes a view that does not fit
        model.set_attn_implementation("eager")
    branched = lora_fx.rewrite(graph, rules=rules, rank=4, alpha=6)
    set_factors(branched, scale=0.05)
    report = lora_fx.export.onnx(lora_fx.fold(branched), directory / "ours.onnx", verify=False)
    constants = dict(ARCHITECTURES[name].constants) if name in ARCHITECTURES else {}
    axes: dict[str, Any] = dict.fromkeys(constants) | {
        key: {dim: torch.export.Dim.DYNAMIC for dim, axis in enumerate(report.inputs[key]) if isinstance(axis, str)}
        for key in small
    }
    torch.onnx.export(
        model,
        (),
        str(directory / "torch.onnx"),
        kwargs=small | constants,
        dynamo=True,
        verbose=False,
        dynamic_shapes=axes,
    )
    return Files(name, directory / "ours.onnx", directory / "torch.onnx", large)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def outputs(path: Path, batch: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = {value.name for value in session.get_inputs()}
    found = session.run(None, {key: tensor.numpy() for key, tensor in batch.items() if key in taken})
    return np.asarray(found[0])


def test_as_many_products_are_quantised_as_in_torchs_own_file(files: Files, tmp_path: Path) -> None:
    errors, quantised = list[float](), list[int]()
    for path in (files.ours, files.torchs):
        written = tmp_path / path.name
        kind = (
            QuantType.QUInt8 if files.name == "resnet" else QuantType.QInt8
        )  # onnxruntime's convolutions take no other
        quantize_dynamic(path, written, weight_type=kind)
        whole = outputs(path, files.batch)
        errors.append(float(np.abs(outputs(written, files.batch) - whole).max() / np.abs(whole).max()))
        found = operators(written)
        quantised.append(found["MatMulInteger"] + found["ConvInteger"])
    tied = files.name == "t5"  # its head is the embedding: one tensor, as it is, of which torch's file has a second one
    assert quantised[0] == quantised[1] - tied
    assert quantised[0] >= max(9, 0.95 * quantised[1])
    assert 0 < errors[0] < 2 * errors[1]  # torch's file has other weights: those before the fold


def test_tools_of_onnxruntime_infer_shapes_and_fuse_as_in_torchs_own_file(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the inference fails, it writes the model into the working directory
    # The sequence of BERT's token types has the size min(64, sequence): torch's own file does not pass the symbolic inference either.
    quant_pre_process(files.ours, tmp_path / "processed.onnx", skip_symbolic_shape=files.name == "bert")
    found = outputs(tmp_path / "processed.onnx", files.batch)
    assert np.allclose(found, outputs(files.ours, files.batch), rtol=0, atol=1e-5)
    norms = []
    for path in (files.ours, files.torchs):
        fused = optimizer.optimize_model(str(path), model_type="bert", num_heads=0, hidden_size=0)
        statistics = fused.get_fused_operator_statistics()
        norms.append({skip: (statistics[skip], statistics[skip.removeprefix("Skip")]) for skip in SKIPS})
    for skip in SKIPS:
        (skipped, plain), (skipped_there, plain_there) = (each[skip] for each in norms)
        assert skipped + plain == skipped_there + plain_there
        assert skipped >= skipped_there - 1
    assert (files.name == "resnet") == (sum(map(sum, norms[0].values())) == 0)


SKIPS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


class Layers(nn.Module):
    """Products with a matrix of its own, with one that is used twice, and with one that is an embedding too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.own, self.twice = nn.Embedding(11, 6), nn.Linear(6, 5), nn.Linear(5, 5, bias=False)
        self.back = nn.Linear(5, 6, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.twice(self.twice(self.own(self.embed(ids)).tanh()).tanh())
        return nn.functional.linear(self.back(hidden), self.embed.weight)


def test_matrices_are_stored_as_products_read_them_and_the_file_says_whose_they_are(tmp_path: Path) -> None:
    torch.manual_seed(2)
    graph = lora_fx.trace(Layers(), (torch.randint(0, 11, (2, 3)),), inference=True)
    lora_fx.export.onnx(graph, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    (told,) = (entry.value for entry in model.metadata_props if entry.key == TRANSPOSED_KEY)
    assert json.loads(told) == {
        "own.weight.T": "own.weight",
        "twice.weight.T": "twice.weight",
        "back.weight.T": "back.weight",
    }
    assert arrays.keys() == {"embed.weight", "own.weight.T", "own.bias", "twice.weight.T", "back.weight.T"}
    assert np.array_equal(arrays["own.weight.T"], graph.get_parameter("own.weight").detach().numpy().T)

    lora_fx.export.onnx(graph, tmp_path / "plain.onnx", transpose_weights=False)
    plain = onnx.load(tmp_path / "plain.onnx")
    assert {tensor.name for tensor in plain.graph.initializer} == graph.state_dict().keys()
    assert TRANSPOSED_KEY not in {entry.key for entry in plain.metadata_props}
    batch = {"ids": torch.randint(0, 11, (4, 7))}
    assert np.array_equal(outputs(tmp_path / "model.onnx", batch), outputs(tmp_path / "plain.onnx", batch))
