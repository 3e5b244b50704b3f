"""Every architecture in TorchScript and ONNX, branched and folded, at sizes that it was not traced at."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import architectures
import families
import onnx
import onnxruntime
import pytest
import torch
from architectures import few, rows
from conftest import set_factors, unchanged

import lora_fx
from lora_fx.export.onnx_weights import TRANSPOSED_KEY
from lora_fx.graph.info import info_of

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")

OTHERS = ("qwen3", "gemma3_text", "mixtral", "phi3", "whisper", "vit")
FEW = ("t5", "gpt2", "llama", "bert", "mixtral")
"""Those that stand for all where a test is slow: encoder-decoder, Conv1D, grouped queries, encoder, stacked experts."""

ALL = (*architectures.ARCHITECTURES, *OTHERS)
SCRIPTS = [
    pytest.param(row.values[0], state, marks=row.marks)
    for state, representatives in {
        "branched": ("gpt2", "llama", "bloom", "deberta-v2"),
        "folded": ("t5", "bert", "mixtral", "deberta", "blip-2", "whisper", "vit"),
    }.items()
    for row in rows(ALL, representatives)
]
"""Architectures and states of their graphs."""

STATES = [
    pytest.param(row.values[0], state, marks=row.marks)
    for state, representatives in {"branched": ("t5",), "folded": ("bert",)}.items()
    for row in rows(ALL, representatives)
]
"""The same, for a format that takes long to write."""

PROGRAMS = [
    pytest.param(row.values[0], state, marks=row.marks)
    for state, representatives in {"branched": ("llama",), "folded": ("gpt2",)}.items()
    for row in rows(FEW, representatives)
]
"""The same, for pt2."""

Written = Callable[[str, str, str], lora_fx.export.Exported]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Return a function of an architecture, a state of its graph and a format, which writes that file once and returns its report."""
    directory = tmp_path_factory.mktemp("written")

    @functools.cache
    def write(name: str, state: str, format: str) -> lora_fx.export.Exported:
        graph = graphs(name)[state]
        with unchanged(graph):
            report: lora_fx.export.Exported = getattr(lora_fx.export, format)(
                graph, directory / f"{name}-{state}-{format}.pt2", verify=False
            )
        return report

    return write


def traced(name: str) -> lora_fx.TracedGraphModule:
    return architectures.traced(name) if name in architectures.ARCHITECTURES else families.traced(name)


@functools.cache
def graphs(name: str) -> Mapping[str, lora_fx.TracedGraphModule]:
    """Return the graph of an architecture in three states. Not to be changed."""
    rules = (architectures.ARCHITECTURES if name in architectures.ARCHITECTURES else families.FAMILIES)[name].rules
    branched = lora_fx.rewrite(traced(name), rules=rules, rank=6, alpha=9)
    set_factors(branched, scale=0.1)
    return {"base": traced(name), "branched": branched.train(), "folded": lora_fx.fold(branched)}


def inputs(name: str, *size: int) -> dict[str, torch.Tensor]:
    module: Any = architectures if name in architectures.ARCHITECTURES else families
    made: dict[str, torch.Tensor] = module.inputs(name, *size)
    return made


def outputs(graph_module: lora_fx.TracedGraphModule, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what a graph computes in evaluation, by the names of transformers; nested ones as the exporters call them."""
    evaluated = lora_fx.trace(graph_module).eval()
    with torch.no_grad():
        found = evaluated(**batch)
    flat: dict[str, torch.Tensor] = {}
    for key, value in found.items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat


@pytest.mark.parametrize(("name", "state"), SCRIPTS)
def test_a_script_computes_the_bits_of_its_graph_at_other_sizes(name: str, state: str, written: Written) -> None:
    graph = graphs(name)[state]
    script = torch.jit.load(written(name, state, "torchscript").path)
    for size in architectures.SIZES:
        batch = inputs(name, *size)
        expected = outputs(graph, batch)
        with torch.no_grad(), torch.jit.optimized_execution(False):
            found = script(**batch)
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("name", rows(FEW, FEW))
def test_torchs_optimiser_changes_a_script_by_rounding_at_most(name: str, written: Written) -> None:
    """It forms some products in another order, from the second call on."""
    script = torch.jit.load(written(name, "branched", "torchscript").path)
    for size in architectures.SIZES:
        batch = inputs(name, *size)
        with torch.no_grad():
            found = script(**batch)
        for key, tensor in outputs(graphs(name)["branched"], batch).items():
            assert (found[key] - tensor).abs().max() < 2e-6 * tensor.abs().max(), key


@pytest.mark.parametrize(("name", "state"), STATES)
def test_onnxruntime_computes_what_the_graph_computes_at_other_sizes(name: str, state: str, written: Written) -> None:
    graph = graphs(name)[state]
    path = written(name, state, "onnx").path
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for size in architectures.SIZES:
        batch = inputs(name, *size)
        expected = outputs(graph, batch)
        found = session.run(list(expected), {key: tensor.numpy() for key, tensor in batch.items()})
        for value, (key, tensor) in zip(found, expected.items(), strict=True):
            difference = (torch.from_numpy(value) - tensor).abs().max() / tensor.abs().max()
            assert difference < 2e-6, (size, key)
    _check_names(onnx.load(path), graph, batch, list(expected))


@pytest.mark.parametrize("write", ["torchscript", "onnx", "pt2"])
@pytest.mark.parametrize("name", rows(FEW[:4], ("gpt2", "bert")))
def test_rows_without_anything_to_attend_to_are_those_of_the_graph(name: str, write: str, written: Written) -> None:
    """Padding on the left of a causal model, and a row that is nothing but padding."""
    graph = graphs(name)["folded"]
    batch = inputs(name, 4, 9, 5)
    batch["attention_mask"][1, :4] = 0
    batch["attention_mask"][2] = 0
    expected, found = outputs(graph, batch), load(write, written(name, "folded", write).path)(batch)
    for key, tensor in expected.items():
        assert (found[key] - tensor).abs().max() < 2e-6 * tensor.abs().max(), key


def _check_names(
    model: onnx.ModelProto, graph: lora_fx.TracedGraphModule, batch: Mapping[str, torch.Tensor], names: list[str]
) -> None:
    """Inputs, outputs and axes are called as in the model, and every weight as in its state dict, whose values they have."""
    axes = info_of(graph).examples.axes
    for value in model.graph.input:
        named = [dim.dim_param or None for dim in value.type.tensor_type.shape.dim]
        assert tuple(named) == axes[value.name]
    assert {value.name for value in model.graph.input} == set(batch)
    assert [value.name for value in model.graph.output] == names
    assert all(value.type.tensor_type.shape.dim[0].dim_param == "batch" for value in model.graph.output)
    state = dict(graph.named_parameters(remove_duplicate=False)) | dict(graph.named_buffers(remove_duplicate=False))
    keys = json.loads({entry.key: entry.value for entry in model.metadata_props}.get(TRANSPOSED_KEY, "{}"))
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {keys.get(name, name): value.T if name in keys else value for name, value in arrays.items()}
    assert all(name == f"{key}.T" for name, key in keys.items())
    assert len(weights) == len(arrays)
    assert weights.keys() <= state.keys()
    assert all(torch.equal(torch.tensor(value), state[key]) for key, value in weights.items())
    read = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    assert read == weights.keys()


@pytest.mark.parametrize(("name", "state"), PROGRAMS)
def test_a_pt2_computes_the_bits_of_its_graph_at_other_sizes(name: str, state: str, written: Written) -> None:
    graph = graphs(name)[state]
    module = torch.export.load(written(name, state, "pt2").path).module()
    for size in architectures.SIZES:
        batch = inputs(name, *size)
        expected = outputs(graph, batch)
        with torch.no_grad():
            found = module(**batch)
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.xdist_group("bert")
def test_a_branched_pt2_comes_back_as_a_graph_that_folds(written: Written) -> None:
    loaded = lora_fx.trace(torch.export.load(written("bert", "branched", "pt2").path), inference=True)
    folded, expected = lora_fx.fold(loaded), graphs("bert")["folded"]
    query = "encoder.layer.1.attention.self.query.weight"
    assert torch.equal(folded.get_parameter(query), expected.get_parameter(query))
    assert not any("lora_" in key for key in folded.state_dict())


@pytest.mark.parametrize("name", rows(ALL, FEW[:4]))
def test_a_folded_script_has_the_operators_of_the_untouched_model(name: str, written: Written) -> None:
    kinds = {}
    for state in graphs(name):
        script = torch.jit.load(written(name, state, "torchscript").path)
        kinds[state] = Counter(node.kind() for node in script.inlined_graph.nodes())
    assert kinds["folded"] == kinds["base"] != kinds["branched"]
    assert kinds["branched"]["aten::linear"] > kinds["base"]["aten::linear"]


@pytest.mark.parametrize("name", rows(FEW, ("bert",)))
def test_a_folded_model_in_onnx_and_pt2_has_the_operators_of_the_untouched_model(name: str, written: Written) -> None:
    operators, targets = {}, {}
    for state in ("base", "folded"):
        operators[state] = Counter(node.op_type for node in onnx.load(written(name, state, "onnx").path).graph.node)
        program = torch.export.load(written(name, state, "pt2").path)
        targets[state] = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert operators["folded"] == operators["base"]
    assert targets["folded"] == targets["base"]
    assert operators["base"]["MatMul"] + operators["base"]["Gemm"] > 10


@pytest.mark.xdist_group("llama")
@pytest.mark.parametrize("write", few(["torchscript", "onnx", "pt2"], ("torchscript", "onnx")))
def test_a_fused_graph_is_written_as_the_branched_one(write: str, tmp_path: Path, written: Written) -> None:
    """Names of values differ, so what they compute is compared: bit for bit, since the operators are the same."""
    fused = lora_fx.fuse(graphs("llama")["branched"])
    reports = [
        written("llama", "branched", write),
        getattr(lora_fx.export, write)(fused, tmp_path / "fused.pt2", verify=False),
    ]
    assert reports[0].outputs == reports[1].outputs == ("logits",)
    assert reports[0].inputs == reports[1].inputs
    batch = inputs("llama", 3, 11)
    first, second = (load(write, report.path)(batch) for report in reports)
    assert torch.equal(first["logits"], second["logits"])


def load(write: str, path: Path) -> Any:
    if write == "onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        return lambda batch: {
            name: torch.from_numpy(value)
            for name, value in zip(names, session.run(None, {k: v.numpy() for k, v in batch.items()}), strict=True)
        }
    module: Any = torch.jit.load(path) if write == "torchscript" else torch.export.load(path).module()
    return lambda batch: module(**batch)
