"""What any graph becomes in any format: names, checks, refusals, and the report."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import onnxruntime
import pytest
import torch
from architectures import few
from torch import nn
from torch.nn import functional as F  # noqa: N812

import lora_fx
from lora_fx.graph.example_sizes import Examples
from lora_fx.graph.info import info_of, with_info

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")

FORMATS = ("torchscript", "onnx", "pt2")
EACH = pytest.mark.parametrize("write", FORMATS)
Loaded = Callable[..., Mapping[str, torch.Tensor]]


def export(write: str, graph: Any, path: Path, **options: Any) -> tuple[lora_fx.export.Exported, Loaded]:
    """Write a graph and load it as its users do."""
    target = path / "model.pt2"
    exported = getattr(lora_fx.export, write)(graph, target, overwrite=True, **options)
    if write == "onnx":
        session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]

        def run(**batch: torch.Tensor) -> dict[str, torch.Tensor]:
            found = session.run(None, {key: tensor.numpy() for key, tensor in batch.items()})
            return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

        return exported, run
    module: Any = torch.jit.load(target) if write == "torchscript" else torch.export.load(target).module()
    return exported, module


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class Nested(nn.Module):
    def forward(self, x: torch.Tensor, rest: list[torch.Tensor]) -> dict[str, Any]:
        doubled = x * 2
        return {"all": (doubled, {"sum": rest[0].sum()}), "same": doubled, "input": x, "again": x * 2}


@EACH
def test_nested_results_have_names_and_one_tensor_may_be_several(write: str, tmp_path: Path) -> None:
    graph = lora_fx.trace(Nested(), {"x": torch.randn(2, 7), "rest": [torch.randn(3)]}, inference=True)
    exported, run = export(write, graph, tmp_path)
    x, rest = torch.randn(3, 4), torch.randn(6)
    nested = "rest.0" if write == "onnx" else "rest_0"  # an argument of Python has no dots
    found = run(**{"x": x, nested: rest})
    assert exported.inputs == {"x": ("batch", "x_1"), nested: ("rest_0_0",)}
    assert list(found) == list(exported.outputs) == ["all.0", "all.1.sum", "same", "input", "again"]
    for key, value in {"all.0": x * 2, "all.1.sum": rest.sum(), "same": x * 2, "input": x, "again": x * 2}.items():
        assert torch.allclose(found[key], value, rtol=0, atol=1e-6), key


class Named(nn.Module):
    def forward(self, input: torch.Tensor, max_length: torch.Tensor, type: torch.Tensor) -> torch.Tensor:
        return input * max_length + type


@EACH
def test_inputs_keep_names_that_python_has_for_something_else(write: str, tmp_path: Path) -> None:
    batch = {"input": torch.randn(3, 5), "max_length": torch.randn(5), "type": torch.randn(3, 5)}
    _, run = export(write, lora_fx.trace(Named(), batch, inference=True), tmp_path)
    assert torch.allclose(run(**batch)["output"], batch["input"] * batch["max_length"] + batch["type"])


class NamedAsCode(nn.Module):
    def forward(self, torch: Any, getattr: Any) -> Any:
        return torch * getattr.sum(0)


class PartNamed(nn.Module):
    """A module, or a parameter, under a name of the test's."""

    def __init__(self, name: str, *, parameter: bool = False) -> None:
        super().__init__()
        self.name, self.inner = name, nn.Module()
        if parameter:
            self.inner.register_parameter(name, nn.Parameter(torch.randn(4, 5)))
        else:
            self.inner.add_module(name, nn.Linear(5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self.inner._parameters.get(self.name)
        return self.inner._modules[self.name](x) if own is None else F.linear(x, own)


REFUSED = {
    "torchscript": ["é", "重"],
    "pt2": ["a,b", "a;b", "a(b", "a]b"],
}
"""The names that torch writes, and cannot load."""


@pytest.mark.parametrize(("write", "name"), [(write, name) for write in REFUSED for name in REFUSED[write]])
def test_a_name_that_a_format_cannot_load_is_refused_before_the_graph_is_compiled(
    write: str, name: str, tmp_path: Path
) -> None:
    graph = lora_fx.trace(PartNamed(name), (torch.randn(3, 5),), inference=True)
    heavy = {"torchscript": "torch.jit.script", "pt2": "lora_fx.export.pt2_file.export_plain"}
    with (
        mock.patch(heavy[write], side_effect=AssertionError),
        pytest.raises(lora_fx.ExportError, match=re.escape(f"'inner.{name}")) as caught,
    ):
        export(write, graph, tmp_path)
    assert "loads no names" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("write", "name", "parameter"),
    [
        ("torchscript", "a,b;(c", False),
        ("torchscript", "a,b", True),
        ("pt2", "é", False),
        ("pt2", "a(b,c)", False),
        ("pt2", "a,b", True),
        ("onnx", "é a,b;(c", False),
    ],
)
def test_other_names_are_names_whatever_they_say(write: str, name: str, parameter: bool, tmp_path: Path) -> None:
    model, x = PartNamed(name, parameter=parameter).eval(), torch.randn(3, 5)
    _, run = export(write, lora_fx.trace(model, (x,), inference=True), tmp_path)
    assert torch.allclose(run(x=x)["output"], model(x), atol=1e-6)


def test_torchscript_refuses_the_name_of_an_adapter_that_it_cannot_load(tmp_path: Path) -> None:
    rules = {"select": [{"target": ["proj"], "rank": 2}]}
    graph = lora_fx.rewrite(Linear(), rules, adapter="é", example_inputs=(torch.randn(3, 5),), inference=True)
    with pytest.raises(lora_fx.ExportError, match=r"beyond ASCII, and the graph has 'proj\.lora_A\.é\.weight'"):
        export("torchscript", graph, tmp_path)
    assert export("torchscript", lora_fx.fold(graph), tmp_path)


@EACH
def test_inputs_with_names_that_the_code_needs_get_a_number(write: str, tmp_path: Path) -> None:
    graph = lora_fx.trace(NamedAsCode(), (torch.randn(3, 5), torch.randn(2, 5)), inference=True)
    exported, run = export(write, graph, tmp_path)
    assert list(exported.inputs) == ["torch_1", "getattr_1"]
    x, y = torch.randn(4, 6), torch.randn(3, 6)
    assert torch.allclose(run(torch_1=x, getattr_1=y)["output"], x * y.sum(0), rtol=0, atol=1e-5)
    with pytest.raises(Exception, match=r".*size"):
        run(torch_1=x, getattr_1=torch.randn(3, 1))


class Pair(nn.Module):
    """Holds for equal lengths between 3 and 9 that are not 7, and whole pairs of rows."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        torch._check(x.size(1) >= 3)
        torch._check(x.size(1) <= 9)
        if x.size(1) == 7:
            return x.view(x.size(0) // 2, 2, -1).sum(1) - y.sum()
        return x.view(x.size(0) // 2, 2, -1).sum(1) + y.sum(0)


@EACH
def test_sizes_that_the_trace_does_not_cover_are_refused_where_it_is_deployed(write: str, tmp_path: Path) -> None:
    graph = lora_fx.trace(Pair(), {"x": torch.randn(4, 5), "y": torch.randn(3, 5)}, inference=True)
    exported, run = export(write, graph, tmp_path)
    compared = [dict(comparison.sizes) for comparison in exported.comparisons]
    assert compared[:2] == [{"batch": 4, "y_0": 3, "x_1": 5}, {"batch": 8, "y_0": 7, "x_1": 9}]
    for rows, length, others in ((2, 3, 3), (8, 9, 6), (6, 8, 1)):
        x, y = torch.randn(rows, length), torch.randn(others, length)
        assert torch.allclose(run(x=x, y=y)["output"], graph(x, y), rtol=0, atol=1e-6)
    refused = {
        ((4, 2), (3, 2)): r"x\.size\(1\) >= 3|size 2 in dimension 1|x\.size\(\)\[1\] >= 3",
        ((4, 10), (3, 10)): r"x\.size\(1\) <= 9|size 10 in dimension 1|x\.size\(\)\[1\] <= 9",
        ((4, 7), (3, 7)): "!= 7",
        (
            (4, 5),
            (3, 6),
        ): r"x\.size\(1\) == y\.size\(1\)|x\.size\(\)\[1\] == y\.size|y\.size\(\)\[1\] == x\.size",
        ((3, 5), (3, 5)): "% 2|2 \\*|2\\*",
    }
    for (left, right), said in refused.items():
        with pytest.raises(Exception, match=said):
            run(x=torch.randn(left), y=torch.randn(right))


class Centred(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0, keepdim=True) if x.size(0) > 1 else x * 2


@EACH
def test_a_single_row_is_refused_where_the_model_does_something_else_with_it(write: str, tmp_path: Path) -> None:
    graph = lora_fx.trace(Centred(), (torch.randn(3, 5),), inference=True)
    _, run = export(write, graph, tmp_path)
    assert torch.allclose(run(x=torch.ones(2, 6))["output"], torch.zeros(2, 6))
    with pytest.raises(Exception, match=r"size 1 in dimension 0|size\(0\) >= 2|size\(\)\[0\] >= 2"):
        run(x=torch.ones(1, 6))


def test_a_failing_check_of_onnx_says_what_the_trace_holds_for(tmp_path: Path) -> None:
    graph = lora_fx.trace(Centred(), (torch.randn(3, 5),), inference=True)
    _, run = export("onnx", graph, tmp_path)
    with pytest.raises(
        Exception, match=re.escape("expected x.size(0) >= 2, which the trace covers; trace again with example_inputs")
    ):
        run(x=torch.ones(1, 6))


class Attention(nn.Module):
    """Four heads of queries over two of keys, which are 5 wide, or as many."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.kind == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) + mask.sum()
        if self.kind == "none":
            return F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True) + mask.sum()
        chosen = mask[:, None] > 0
        if self.kind == "float":
            chosen = torch.where(chosen, mask[:, None], -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=chosen, enable_gqa=True)


@pytest.mark.parametrize(
    ("write", "kind"),
    few(
        itertools.product(FORMATS, ("causal", "none", "bool", "float")),
        [
            *itertools.product(["torchscript"], ("causal", "none", "bool", "float")),
            *(("onnx", "causal"), ("onnx", "float"), ("pt2", "none"), ("pt2", "bool")),
        ],
    ),
)
def test_attention_is_zero_where_all_is_masked(write: str, kind: str, tmp_path: Path) -> None:
    def batch(rows: int, length: int, source: int) -> dict[str, torch.Tensor]:
        return {
            "q": torch.randn(rows, 4, length, 6),
            "k": torch.randn(rows, 2, source, 6),
            "v": torch.randn(rows, 2, source, 5),
            "mask": torch.randn(rows, length, source),
        }

    dynamic = {"q": (0, 2), "k": (0, 2), "v": (0, 2), "mask": (0, 1, 2)}
    graph = lora_fx.trace(Attention(kind), batch(3, 7, 5), inference=True, dynamic=dynamic)
    _, run = export(write, graph, tmp_path)
    inputs = batch(2, 9, 4)
    inputs["mask"][0, 2] = inputs["mask"][1, :5, :] = -1.0
    expected = graph(**inputs)
    assert torch.allclose(run(**inputs)["output"], expected, rtol=0, atol=2e-6)
    if kind in ("bool", "float"):
        assert not expected[0, :, 2].any()
        assert expected[0, :, 1].all()


class Scaled(nn.Module):
    def forward(self, scale: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scaled": x * scale, "sum": x.sum()}


@EACH
def test_inputs_and_outputs_may_be_without_dimensions(write: str, tmp_path: Path) -> None:
    graph = lora_fx.trace(Scaled(), (torch.tensor(3.0), torch.randn(2, 7)), inference=True)
    _, run = export(write, graph, tmp_path)
    x = torch.randn(3, 5)
    found = run(scale=torch.tensor(2.0), x=x)
    assert torch.equal(found["scaled"], x * 2)
    assert torch.allclose(found["sum"], x.sum())
    assert found["sum"].shape == ()


@EACH
def test_empty_inputs_and_other_dtypes_are_refused_as_by_the_graph(write: str, tmp_path: Path) -> None:
    graph = lora_fx.trace(Scaled(), (torch.tensor(3.0), torch.randn(2, 7)), inference=True)
    _, run = export(write, graph, tmp_path)
    for x in (torch.randn(0, 5), torch.randn(2, 5).double(), torch.ones(2, 5, dtype=torch.int64), torch.randn(2, 5, 1)):
        with pytest.raises(Exception, match=r".") as caught:
            run(scale=torch.tensor(2.0), x=x)
        assert not isinstance(caught.value, IndexError | TypeError)


@EACH
def test_examples_of_size_1_do_not_fix_it(write: str, tmp_path: Path) -> None:
    graph = lora_fx.trace(Linear(), (torch.randn(3, 5),), inference=True)
    _, run = export(write, graph, tmp_path, example_inputs={"x": torch.randn(1, 5)})
    for rows in (1, 2, 6):
        x = torch.randn(rows, 5)
        assert torch.allclose(run(x=x)["output"], graph(x), rtol=0, atol=1e-6)


@EACH
def test_nodes_that_a_user_added_are_exported_too(write: str, tmp_path: Path) -> None:
    graph = lora_fx.trace(Linear(), (torch.randn(3, 5),), inference=True)
    output = graph.graph.output_node()
    (result,) = output.args[0]
    with graph.graph.inserting_before(output):
        doubled = graph.graph.call_method("mul", (graph.graph.call_function(torch.add, (result, 1.0)), 2.0))
    output.args = ((doubled,),)
    graph.recompile()
    _, run = export(write, graph, tmp_path)
    x = torch.randn(2, 5)
    assert torch.allclose(
        run(x=x)["output"], (F.linear(x, graph.proj.weight, graph.proj.bias) + 1) * 2, rtol=0, atol=1e-5
    )


@EACH
def test_a_graph_without_its_input_checks_is_refused(write: str, tmp_path: Path) -> None:
    graph = lora_fx.trace(Linear(), (torch.randn(3, 5),), inference=True)
    for node in graph.graph.find_nodes(op="call_module", target="input_checks.input_0"):
        graph.graph.erase_node(node)
    graph.recompile()
    with pytest.raises(lora_fx.ExportError, match="has lost its input check of 'x'"):
        export(write, graph, tmp_path)


@EACH
def test_what_is_on_around_an_export_is_not_in_it(write: str, tmp_path: Path) -> None:
    graph = lora_fx.trace(Linear(), (torch.randn(3, 5),), inference=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        _, run = export(write, graph, tmp_path)
    x = torch.randn(2, 5)
    assert torch.allclose(run(x=x)["output"], graph(x), rtol=0, atol=1e-6)
    with torch.device("meta"), pytest.raises(lora_fx.ExportError, match="Leave that block"):
        export(write, graph, tmp_path)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
@EACH
def test_a_tolerance_is_a_number(write: str, wrong: float, tmp_path: Path) -> None:
    graph = lora_fx.trace(Linear(), (torch.randn(3, 5),), inference=True)
    with pytest.raises(lora_fx.ExportError, match="expected a number of 0 or more"):
        export(write, graph, tmp_path, tolerance=wrong)


@EACH
def test_graphs_are_exported_from_several_threads(write: str, tmp_path: Path) -> None:
    graph = lora_fx.trace(Linear(), (torch.randn(3, 5),), inference=True)
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(getattr(lora_fx.export, write), graph, tmp_path / f"{n}.pt2") for n in range(3)]
    assert [job.result().largest < 1e-6 for job in jobs] == [True] * 3


class Divided(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"quotient": x // y, "rest": x % y, "again": x % y}


@EACH
def test_results_of_which_one_is_part_of_another_are_all_there(write: str, tmp_path: Path) -> None:
    x, y = torch.arange(-6, 6).view(3, 4), torch.tensor([[2, -3, 4, 5]]).expand(3, 4).contiguous()
    _, run = export(write, lora_fx.trace(Divided(), (x, y), inference=True), tmp_path)
    found = run(x=x[:2], y=y[:2])
    assert torch.equal(found["quotient"], x[:2] // y[:2])
    assert torch.equal(found["rest"], x[:2] % y[:2])
    assert torch.equal(found["again"], x[:2] % y[:2])


class Counts(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"doubled": x * 2, "length": x.size(1)}


@EACH
def test_what_is_not_a_tensor_is_refused_by_name(write: str, tmp_path: Path) -> None:
    graph_module = lora_fx.trace(Counts(), (torch.randn(2, 7),), inference=True)
    with pytest.raises(
        lora_fx.ExportError, match=r"output 'length': expected a tensor, got .* Trace a module that does not return it"
    ):
        export(write, graph_module, tmp_path)
    assert list(tmp_path.iterdir()) == []


class Clash(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": x * 2, "weight": x * self.weight, "out_weight": x - self.weight}


def test_in_onnx_an_output_with_the_name_of_an_input_or_a_weight_gets_another(tmp_path: Path) -> None:
    graph = lora_fx.trace(Clash(), (torch.randn(2, 7),), inference=True)
    exported, _ = export("onnx", graph, tmp_path)  # which compares the file with the graph, output by output
    assert exported.outputs == ("out_x", "out_out_weight", "out_weight")


class Svd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(x)


class Complex(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_complex(x)


@torch.library.custom_op("lora_fx_tests::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@triple.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Foreign(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.lora_fx_tests.triple(x)


@pytest.mark.parametrize(
    ("write", "module", "said"),
    [
        (
            "onnx",
            Svd(),
            r"aten\._linalg_svd.*torch\.linalg\.svdvals\(x\).*Write that line of the model with other operators",
        ),
        ("onnx", Foreign(), r"lora_fx_tests\.triple.*torch\.ops\.lora_fx_tests\.triple\(x\)"),
        (
            "torchscript",
            Foreign(),
            r"lora_fx_tests\.triple\.default is not torch's own.*torch\.ops\.lora_fx_tests\.triple\(x\)",
        ),
        (
            "pt2",
            Foreign(),
            r"lora_fx_tests\.triple\.default is not torch's own.*torch\.ops\.lora_fx_tests\.triple\(x\)",
        ),
    ],
    ids=["onnx-svd", "onnx-foreign", "torchscript-foreign", "pt2-foreign"],
)
def test_an_operator_that_a_format_does_not_have_is_named_with_the_models_line(
    write: str, module: nn.Module, said: str, tmp_path: Path
) -> None:
    graph = lora_fx.trace(module, (torch.randn(3, 2),), inference=True)
    with pytest.raises(lora_fx.ExportError) as caught:
        export(write, graph, tmp_path)
    assert re.search(said, str(caught.value)), str(caught.value)
    assert f"{Path(__file__)}:" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_complex_results_are_no_results_of_onnx(tmp_path: Path) -> None:
    graph = lora_fx.trace(Complex(), (torch.randn(3, 2),), inference=True)
    with pytest.raises(
        lora_fx.LoraFxError, match=r"'output' .* expected torch\.complex64 .* got torch\.float32|complex"
    ):
        export("onnx", graph, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@EACH
def test_dtypes_are_kept_and_compared_where_a_runtime_has_them(write: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(3)
    graph = lora_fx.trace(Linear().to(dtype), (torch.randn(3, 5).to(dtype),), inference=True)
    x = torch.randn(2, 5).to(dtype)
    if write == "onnx" and dtype is torch.bfloat16:
        with pytest.raises(lora_fx.ExportError, match=r"onnxruntime .* does not load .* verify=False"):
            export(write, graph, tmp_path)
        exported = lora_fx.export.onnx(graph, tmp_path / "model.onnx", verify=False)
        assert exported.comparisons == ()
        assert "not compared" in str(exported)
        (weight, _) = onnx.load(tmp_path / "model.onnx").graph.initializer
        assert weight.data_type == onnx.TensorProto.BFLOAT16
        return
    exported, run = export(write, graph, tmp_path)
    found = run(x=x)["output"]
    assert found.dtype is dtype
    assert torch.allclose(found, graph(x), rtol=0, atol={torch.float64: 1e-12, torch.float16: 2e-3}.get(dtype, 0))
    assert exported.largest is not None
    assert exported.largest < 2e-3


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


@EACH
def test_tied_weights_are_written_once_under_the_first_name(write: str, tmp_path: Path) -> None:
    graph = lora_fx.trace(Tied(), (torch.randint(0, 11, (2, 3)),), inference=True)
    _, run = export(write, graph, tmp_path)
    ids = torch.randint(0, 11, (4, 7))
    assert torch.allclose(run(ids=ids)["output"], graph(ids), rtol=0, atol=1e-6)
    if write == "onnx":
        names = [tensor.name for tensor in onnx.load(tmp_path / "model.pt2").graph.initializer]
    else:
        loaded: Any = torch.jit.load if write == "torchscript" else torch.export.load
        found = loaded(tmp_path / "model.pt2").state_dict
        names = list(found if isinstance(found, Mapping) else found())
    assert names == ["embed.weight"]


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.proj(x), 0.5, self.training)


@EACH
def test_what_is_written_is_the_evaluation_mode_of_a_graph_that_trains(write: str, tmp_path: Path) -> None:
    graph = lora_fx.trace(Dropping().train(), (torch.randn(3, 5),))
    assert graph.training
    _, run = export(write, graph, tmp_path)
    assert graph.training
    x = torch.randn(2, 5)
    assert torch.allclose(run(x=x)["output"], F.linear(x, graph.proj.weight, graph.proj.bias), rtol=0, atol=1e-6)


@EACH
def test_a_graph_without_values_is_refused(write: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        module = Linear()
    graph = lora_fx.trace(module, (torch.randn(3, 5, device="meta"),), inference=True)
    with pytest.raises(lora_fx.ExportError, match=r"'proj\.weight' .* no values.*lora_fx\.materialize"):
        export(write, graph, tmp_path)


@EACH
def test_what_is_no_graph_is_refused(write: str, tmp_path: Path) -> None:
    with pytest.raises(lora_fx.ExportError, match=r"got Linear: trace it, lora_fx\.trace"):
        export(write, Linear(), tmp_path)


@EACH
def test_example_inputs_take_the_place_of_those_of_the_trace(write: str, tmp_path: Path) -> None:
    graph = lora_fx.trace(Linear(), (torch.randn(3, 5),), inference=True)
    graph.meta.update(with_info({}, replace(info_of(graph), examples=None)))
    with pytest.raises(lora_fx.ExportError, match=r"no example values for 'x'\. Pass example_inputs"):
        export(write, graph, tmp_path)
    exported, _ = export(write, graph, tmp_path, example_inputs={"x": torch.randn(8, 5)})
    assert exported.comparisons[0].sizes == {"batch": 8}
    for wrong, said in (
        ({"y": torch.randn(8, 5)}, "no example values for 'x'"),
        ({"x": torch.randn(8, 5), "y": torch.randn(1)}, "example_inputs has names that the graph does not take: 'y'"),
        ({"x": torch.randn(8, 6)}, r"the example for 'x': expected .*, got torch\.float32 of shape \(8, 6\)"),
        ({"x": torch.randn(8, 5).double()}, r"the example for 'x': expected torch\.float32 .*, got torch\.float64"),
        ({"x": [1.0]}, "a mapping from x to tensors"),
        ((torch.randn(8, 5),), "a mapping from x to tensors"),
    ):
        with pytest.raises(lora_fx.ExportError, match=said):
            export(write, graph, tmp_path, example_inputs=wrong)


def test_axes_have_names_also_where_the_model_has_none() -> None:
    examples = Examples({"x": torch.zeros(2, 7), "y": torch.zeros(3, 7), "z": torch.zeros(2)})
    dimensions = [("x", 0), ("x", 1), ("y", 0), ("y", 1), ("z", 0)]
    assert examples.together(dimensions) == {
        "batch": {("x", 0), ("z", 0)},
        "x_1": {("x", 1), ("y", 1)},
        "y_0": {("y", 0)},
    }


@EACH
def test_a_report_says_what_was_written_and_compared(write: str, tmp_path: Path) -> None:
    graph = lora_fx.trace(Linear(), (torch.randn(3, 5),), inference=True)
    exported, _ = export(write, graph, tmp_path)
    path = tmp_path / "model.pt2"
    assert exported.files == {path: path.stat().st_size}
    assert [dict(comparison.sizes) for comparison in exported.comparisons] == [{"batch": 3}, {"batch": 7}, {"batch": 1}]
    lines = str(exported).splitlines()
    assert lines[0].startswith(f"{path}: {exported.format}, 0.0")
    assert lines[1] == "x (batch, 5) → output"
    assert re.fullmatch(r"largest difference to the graph: \d\.\de[-+]\d\d of the largest value of an output", lines[2])
    assert re.fullmatch(r"  \d\.\de[-+]\d\d at batch 7", lines[4])


def test_nothing_is_warned_of_and_nothing_logged(tmp_path: Path) -> None:
    code = f"""
import sys, torch, lora_fx
graph = lora_fx.trace(torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.GELU()), (torch.randn(3, 5),), inference=True)
for format in {FORMATS}:
    getattr(lora_fx.export, format)(graph, format + ".pt2")
    print("wrote", format, flush=True)
    print("wrote", format, file=sys.stderr, flush=True)
"""
    env = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # a bar of its own appears where an export takes seconds
    command = [sys.executable, "-W", "default", "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == run.stderr.splitlines() == [f"wrote {format}" for format in FORMATS]


@EACH
def test_a_graph_that_draws_random_numbers_cannot_be_compared(write: str, tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = lora_fx.trace(Noisy(), (torch.randn(3, 5),), inference=True)
    older: dict[str, Any] = {"opset": 21} if write == "onnx" else {}  # onnxruntime has no kernels for those of opset 22
    with pytest.raises(lora_fx.VerifyError, match=r"by aten\.rand_like\.default, at .*rand_like\(x\).*verify=False"):
        export(write, graph, tmp_path, **older)
    if older:
        with pytest.raises(lora_fx.ExportError, match="those for random numbers opset=21 at most"):
            export(write, graph, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.json", "model.txt", "model"])
def test_an_onnx_file_is_onnx_whatever_its_name(name: str, tmp_path: Path) -> None:
    graph = lora_fx.trace(Linear(), (torch.randn(3, 5),), inference=True)
    lora_fx.export.onnx(graph, tmp_path / name)
    assert onnx.load(tmp_path / name, format="protobuf").graph.output[0].name == "output"


def test_a_pt2_has_a_name_that_torch_loads(tmp_path: Path) -> None:
    graph = lora_fx.trace(Linear(), (torch.randn(3, 5),), inference=True)
    with pytest.raises(lora_fx.ExportError, match=r"ends in \.pt2"):
        lora_fx.export.pt2(graph, tmp_path / "model.pt")
