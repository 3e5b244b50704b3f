"""Weights of ONNX models as other tools want them: products whose second operand is an initializer are quantised and fused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from architectures import build, inputs, traced
from onnxruntime.quantization import quant_pre_process, quantize_dynamic
from onnxruntime.transformers import optimizer
from torch import nn

import lora_fx
from lora_fx.export.onnx_weights import TRANSPOSED_KEY


@pytest.fixture(scope="module", params=["bert", "llama"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Return an architecture, its file, and the one that torch.onnx writes of the model itself."""
    name, directory = request.param, tmp_path_factory.mktemp("files")
    lora_fx.export.onnx(traced(name), directory / "ours.onnx", verify=False)
    model, batch = build(name).eval(), inputs(name, 2, 7)
    model.config.use_cache = False
    axes = {key: {0: "batch", 1: "sequence"} for key in batch}
    torch.onnx.export(
        model, (), str(directory / "torch.onnx"), kwargs=batch, dynamo=True, verbose=False, dynamic_shapes=axes
    )
    return name, directory / "ours.onnx", directory / "torch.onnx"


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def outputs(path: Path, batch: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = {value.name for value in session.get_inputs()}
    found = session.run(None, {key: tensor.numpy() for key, tensor in batch.items() if key in taken})
    return np.asarray(found[0])


def test_as_many_products_are_quantised_as_in_torchs_own_file(files: tuple[str, Path, Path], tmp_path: Path) -> None:
    name, *paths = files
    batch, errors, quantised = inputs(name, 3, 11), list[float](), list[int]()
    for path in paths:
        written = tmp_path / path.name
        quantize_dynamic(path, written)
        whole = outputs(path, batch)
        errors.append(float(np.abs(outputs(written, batch) - whole).max() / np.abs(whole).max()))
        quantised.append(operators(written)["MatMulInteger"])
    assert quantised[0] == quantised[1] > 10
    assert 0 < errors[0] < 1.2 * errors[1]


def test_tools_of_onnxruntime_infer_shapes_and_fuse_as_in_torchs_own_file(
    files: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, ours, torchs = files
    monkeypatch.chdir(tmp_path)  # where the inference fails, it writes the model into the working directory
    # The sequence of BERT's token types has the size min(64, sequence): torch's own file does not pass the symbolic inference either.
    quant_pre_process(ours, tmp_path / "processed.onnx", skip_symbolic_shape=name == "bert")
    batch = inputs(name, 3, 11)
    assert np.allclose(outputs(tmp_path / "processed.onnx", batch), outputs(ours, batch), rtol=0, atol=1e-5)
    found = []
    for path in (ours, torchs):
        fused = optimizer.optimize_model(str(path), model_type="bert", num_heads=0, hidden_size=0)
        statistics = fused.get_fused_operator_statistics()
        skip = {"bert": "SkipLayerNormalization", "llama": "SkipSimplifiedLayerNormalization"}[name]
        found.append((statistics[skip], statistics[skip] + statistics[skip.removeprefix("Skip")]))
    assert found[0][1] == found[1][1] > 4
    assert found[0][0] >= found[1][0] - 1 > 2


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
