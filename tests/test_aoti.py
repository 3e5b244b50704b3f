"""AOTInductor packages: compared with their graphs, inputs that they refuse, and messages where nothing is compiled."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from conftest import set_factors
from torch import nn

import lora_fx
from lora_fx.errors import ExportError
from lora_fx.torch_internals import aoti_load_package, inductor_config

LARGEST = {"bert": 1e-6, "llama": 1e-6, "t5": 2e-5}
"""Differences to the graph. The compiled T5 is the less exact one: its graph is within 4e-7 of float64."""


class Positions(nn.Module):
    """Tokens and positions, of which a table of 9 bounds the length, and a second input of their sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.q = nn.Embedding(11, 6), nn.Embedding(9, 6), nn.Linear(6, 10)

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        summed = self.tokens(ids) + self.positions.weight[: ids.size(1)]
        return {"out": self.q(summed) * weights.unsqueeze(-1)}


@pytest.fixture(scope="module")
def branched() -> lora_fx.TracedGraphModule:
    torch.manual_seed(0)
    given = {"ids": torch.randint(11, (3, 5)), "weights": torch.randn(3, 5)}
    graph = lora_fx.rewrite(Positions(), {"select": [{"target": ["q"]}]}, example_inputs=given, rank=2).eval()
    set_factors(graph)
    return graph


@pytest.fixture(scope="module")
def package(
    branched: lora_fx.TracedGraphModule, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Mapping[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("aoti") / "model.pt2"
    report = lora_fx.export.aoti(branched, path)
    assert report.format == "AOTInductor"
    assert report.largest is not None
    assert report.largest < 1e-6
    assert {tuple(each.sizes.values()) for each in report.comparisons} >= {(3, 5), (1, 5), (3, 1), (1, 1)}
    loaded: Any = aoti_load_package(str(path))
    return loaded  # type: ignore[no-any-return]


@pytest.mark.matrix
def test_a_package_computes_the_graph_for_inputs_of_any_strides(branched: Any, package: Any) -> None:
    ids, weights = torch.randint(11, (7, 4)), torch.randn(7, 4)
    [expected] = branched(ids, weights).values()
    spread = torch.randn(7, 8)
    spread[:, ::2] = weights
    for each in (weights, weights.T.contiguous().T, spread[:, ::2]):
        [found] = package(ids=ids.T.contiguous().T, weights=each).values()
        assert torch.allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        pytest.param((3, 10), (3, 10), "ids.size(1) <= 9, which the trace covers, got ids (3, 10), weights (3, 10)"),
        pytest.param((3, 5), (3, 4), "ids.size(1) == weights.size(1)"),
        pytest.param((3, 5), (2, 5), "ids.size(0) == weights.size(0)"),
        pytest.param((0, 5), (0, 5), "ids.size(0) >= 1"),
        pytest.param((3, 5, 1), (3, 5), "ids with 2 dimensions"),
        pytest.param((5,), (3, 5), "ids with 2 dimensions"),
    ],
)
def test_a_package_refuses_sizes_that_the_trace_does_not_cover(
    ids: tuple[int, ...], weights: tuple[int, ...], message: str, package: Any
) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        package(ids=torch.zeros(ids, dtype=torch.int64), weights=torch.zeros(weights))


@pytest.mark.matrix
def test_a_package_refuses_other_dtypes(package: Any) -> None:
    with pytest.raises(RuntimeError, match="expected weights of dtype float32, which the trace covers"):
        package(ids=torch.zeros(3, 5, dtype=torch.int64), weights=torch.zeros(3, 5, dtype=torch.float64))


@pytest.mark.matrix
@pytest.mark.parametrize("name", LARGEST)
def test_packages_of_architectures_are_within_rounding_of_their_graphs(name: str, tmp_path: Path) -> None:
    graph = lora_fx.rewrite(architectures.build(name), name, rank=3).eval()
    set_factors(graph)
    report = lora_fx.export.aoti(lora_fx.fold(graph), tmp_path / "model.pt2")
    assert len(report.comparisons) > 3
    assert report.largest is not None
    assert report.largest < LARGEST[name]


def test_a_machine_without_a_compiler_is_told_so_before_any_work(branched: Any, tmp_path: Path) -> None:
    lacking = inductor_config.patch({"cpp.cxx": (None, "no-such-c++")})
    with lacking, pytest.raises(ExportError, match=r"there is no compiler: looked for no-such-c\+\+ on the PATH"):
        lora_fx.export.aoti(branched, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_package_ends_in_pt2_as_torch_wants_it(branched: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.so: expected a name that ends in \.pt2"):
        lora_fx.export.aoti(branched, tmp_path / "model.so")
