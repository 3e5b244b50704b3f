from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, PRIMARY, SIZES, build, inputs
from conftest import set_factors, unchanged
from torch import nn

import lora_fx

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")


@pytest.fixture(scope="module", params=PRIMARY)
def branched(request: pytest.FixtureRequest) -> tuple[str, lora_fx.TracedGraphModule]:
    graph_module = lora_fx.rewrite(build(request.param), rules=ARCHITECTURES[request.param].rules, rank=6, alpha=9)
    set_factors(graph_module)
    return request.param, graph_module.train()


@pytest.mark.parametrize("state", ["branched", "folded"])
def test_a_script_computes_what_its_graph_computes_at_other_sizes(branched: Any, state: str, tmp_path: Path) -> None:
    name, graph_module = branched
    graph = graph_module if state == "branched" else lora_fx.fold(graph_module)
    with unchanged(graph):
        lora_fx.export.torchscript(graph, tmp_path / "model.pt")
    script, optimised_script = (torch.jit.load(tmp_path / "model.pt") for _ in range(2))
    graph = copy.deepcopy(graph).eval()
    for size in SIZES:
        batch = inputs(name, *size)
        with torch.no_grad():
            expected = graph(**batch)
            with torch.jit.optimized_execution(False):
                exact = script(**batch)
            # TorchScript's run-time optimiser forms some products in another order, from the second call on.
            optimised = optimised_script(**batch)
        assert list(exact) == list(expected)
        assert all(torch.equal(exact[key], expected[key]) for key in exact)
        assert all(torch.allclose(optimised[key], expected[key], rtol=0, atol=1e-6) for key in exact)


def test_a_script_loads_where_neither_lora_fx_nor_transformers_is(tmp_path: Path) -> None:
    graph_module = lora_fx.fold(lora_fx.rewrite(build("bert"), rules="bert"))
    lora_fx.export.torchscript(graph_module, tmp_path / "model.pt")
    code = """
        import sys
        sys.modules["lora_fx"] = sys.modules["transformers"] = None
        import torch
        model = torch.jit.load("model.pt")
        print(model(torch.ones(3, 5, dtype=torch.int64), torch.ones(3, 5, dtype=torch.int64))["last_hidden_state"].shape)
        try:
            model(torch.ones(3, 65, dtype=torch.int64), torch.ones(3, 65, dtype=torch.int64))
        except torch.jit.Error as error:
            print("size 65 in dimension 1" in str(error))
    """
    run = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.split("\n")[:2] == ["torch.Size([3, 5, 48])", "True"]


class Counts(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"doubled": x * 2, "length": x.size(1)}


class Nested(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"all": (x * 2, x + 1)}


def test_what_is_not_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    graph_module = lora_fx.trace(Counts(), (torch.randn(2, 7),))
    with pytest.raises(lora_fx.ExportError, match="output 'length' is not a tensor"):
        lora_fx.export.torchscript(graph_module, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_nested_outputs_are_named_by_position(tmp_path: Path) -> None:
    lora_fx.export.torchscript(lora_fx.trace(Nested(), (torch.randn(2, 7),)), tmp_path / "model.pt")
    x = torch.randn(3, 4)
    found = torch.jit.load(tmp_path / "model.pt")(x)
    assert list(found) == ["all.0", "all.1"]
    assert torch.equal(found["all.1"], x + 1)


def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    graph_module = lora_fx.trace(Nested(), (torch.randn(2, 7),))
    target = tmp_path / "new" / "model.pt"
    lora_fx.export.torchscript(graph_module, target)
    written = target.read_bytes()
    with pytest.raises(lora_fx.LoraFxError, match="exists already"):
        lora_fx.export.torchscript(graph_module, target)
    lora_fx.export.torchscript(graph_module, target, overwrite=True)
    assert [path.name for path in target.parent.iterdir()] == ["model.pt"]
    assert len(target.read_bytes()) == len(written)
