"""Remembered results of operators on fake tensors: the same graphs, and nothing remembered of what a description does not determine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import architectures
import families
import pytest
import torch
from graph_diff import first_difference
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lora_fx
from lora_fx.export.prepare import prepare
from lora_fx.export.torch_program import export_plain
from lora_fx.tracing.fake_results import FakeResults, _is_determined, _Recipe
from lora_fx.tracing.torch_export import with_results

aten = torch.ops.aten


class Model(nn.Module):
    """Equal layers, views, a size that is asked for in one mode, and an operator that writes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.last = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(layer(x) + other, 0.2, self.training)
        if not self.training and x.size(1) > 40:
            raise ValueError("too long")
        joined = torch.cat([x, x.clone().mul_(2)], dim=-1).transpose(1, 2).reshape(x.size(0), 12, -1)
        return self.last(joined.transpose(1, 2)).split([2, 3], dim=-1)[1]


def _example() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 7, 6), "other": torch.randn(2, 7, 6)}


@contextmanager
def _nothing(_results: FakeResults) -> Iterator[None]:
    yield


@pytest.mark.parametrize("name", architectures.rows(architectures.ARCHITECTURES, ("gpt2",)))
def test_a_graph_is_the_same_with_remembered_results_and_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered = architectures.traced(name)
    monkeypatch.setattr(FakeResults, "used", _nothing)
    computed = lora_fx.trace(architectures.model(name))
    assert first_difference(computed, remembered) is None
    assert computed.code == remembered.code


def test_the_second_mode_takes_the_results_of_the_first_and_all_its_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[_Recipe] = []
    original = _Recipe.made
    monkeypatch.setattr(_Recipe, "made", lambda recipe, *args: [made.append(recipe), original(recipe, *args)][1])
    model = Model()
    remembered = lora_fx.trace(model, _example())
    assert len(made) > 20
    monkeypatch.setattr(FakeResults, "used", _nothing)
    computed = lora_fx.trace(model, _example())
    assert first_difference(computed, remembered) is None
    assert str(remembered.input_checks) == str(computed.input_checks)
    for graph in (computed, remembered):
        graph(**{key: value[:, :4] for key, value in _example().items()})
        with pytest.raises(lora_fx.InputError):
            graph(torch.randn(2, 41, 6), torch.randn(2, 41, 6))
        with pytest.raises(lora_fx.InputError):
            graph(torch.randn(2, 7, 6), torch.randn(2, 8, 6))


@pytest.mark.parametrize("name", architectures.rows(("three layers", "t5", "mixtral", "bert"), ("three layers",)))
def test_an_onnx_file_has_the_same_bytes_with_remembered_results_and_without(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    graph = (
        (architectures if name in architectures.ARCHITECTURES else families).traced(name)
        if name != "three layers"
        else lora_fx.trace(Model(), _example(), inference=True)
    )
    made: list[_Recipe] = []
    original = _Recipe.made
    monkeypatch.setattr(_Recipe, "made", lambda recipe, *args: [made.append(recipe), original(recipe, *args)][1])
    export_plain(prepare(graph))
    exported = len(made)
    made.clear()
    remembered = lora_fx.export.onnx(graph, tmp_path / "remembered.onnx", verify=False)
    assert len(made) > exported > 0  # in torch.export as just now, and in the decompositions of torch.onnx
    monkeypatch.setattr(FakeResults, "used", _nothing)
    computed = lora_fx.export.onnx(graph, tmp_path / "computed.onnx", verify=False)
    assert remembered.path.read_bytes() == computed.path.read_bytes()


def test_what_lacks_the_memory_of_a_remembered_result_is_done_again_without() -> None:
    remembering: list[bool] = []
    before = FakeTensorMode._dispatch_impl

    def run() -> int:
        remembering.append(FakeTensorMode._dispatch_impl is not before)
        if remembering[-1]:
            try:
                torch.empty(0).set_(torch.empty(0).untyped_storage()).as_strided((2,), (1,))
            except RuntimeError as error:
                raise ValueError("torch.onnx wraps what failed") from error
        return 5

    assert with_results(FakeResults(), run) == 5
    assert remembering == [True, False]
    with pytest.raises(ZeroDivisionError):
        with_results(FakeResults(), lambda: 1 // 0)


@pytest.mark.parametrize(
    "operator",
    [
        aten.add_.Tensor,
        aten.set_.source_Tensor,
        aten.unsqueeze_.default,
        aten.nonzero.default,
        aten._local_scalar_dense.default,
    ],
    ids=str,
)
def test_operators_that_write_or_look_at_values_are_always_computed(operator: object) -> None:
    assert _is_determined(aten.add.Tensor)
    assert _is_determined(aten.unsqueeze.default)
    assert not _is_determined(operator)


def test_torch_is_as_before_after_a_trace() -> None:
    before = FakeTensorMode._dispatch_impl
    lora_fx.trace(nn.Linear(3, 5), {"input": torch.randn(2, 3)})
    assert FakeTensorMode._dispatch_impl is before


def test_without_the_private_name_of_torch_a_trace_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model().eval()
    expected = lora_fx.trace(model, _example())
    monkeypatch.setattr("lora_fx.tracing.fake_results.FakeTensorMode", type("Renamed", (), {}))
    assert first_difference(expected, lora_fx.trace(model, _example())) is None
