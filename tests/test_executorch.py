"""ExecuTorch programs: compared with their graphs and with eager models, sizes that they refuse, and messages where nothing is written."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import architectures
import families
import pytest
import torch
from conftest import set_factors
from torch import nn

import lora_fx
from lora_fx import huggingface
from lora_fx.errors import ExportError

pytestmark = pytest.mark.filterwarnings("ignore")


def of_programs(test: Any) -> Any:
    """Mark a test that writes a program, which takes half a minute: of ``make test-all``, which installs the extra."""
    installed = find_spec("executorch") is not None
    return pytest.mark.matrix(pytest.mark.skipif(not installed, reason="needs lora-fx[executorch]")(test))


class Positions(nn.Module):
    """Tokens and positions, of which a table of 9 bounds the length, and a second input of their sizes, which would broadcast."""

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


def loaded(path: Path) -> Any:
    from executorch.runtime import Runtime

    return Runtime.get().load_program(path)


@pytest.fixture(scope="module")
def program(branched: lora_fx.TracedGraphModule, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("executorch") / "model.pte"
    report = lora_fx.export.executorch(branched, path, max_sizes={"batch": 4})
    assert (report.format, report.outputs) == ("ExecuTorch", ("out",))
    assert report.largest is not None
    assert report.largest < 1e-6
    assert {tuple(each.sizes.values()) for each in report.comparisons} >= {(3, 5), (1, 5), (3, 1), (1, 1)}
    return loaded(path)


@of_programs
def test_a_program_computes_the_graph_up_to_its_largest_sizes_and_says_its_names(branched: Any, program: Any) -> None:
    ids, weights = torch.randint(11, (4, 9)), torch.randn(4, 9)
    [expected] = branched(ids, weights).values()
    [found] = program.load_method("forward").execute([ids, weights])
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    assert program.load_method("input_names").execute([]) == ["ids", "weights"]
    assert program.load_method("output_names").execute([]) == ["out"]


@of_programs
@pytest.mark.parametrize(
    ("ids", "weights"),
    [
        pytest.param((3, 10), (3, 10), id="longer than the trace covers"),
        pytest.param((5, 2), (5, 2), id="more than max_sizes, in fewer values"),
        pytest.param((3, 5), (3, 4), id="other lengths"),
        pytest.param((3, 5), (3, 1), id="a length that broadcasts"),
        pytest.param((3, 5), (1, 5), id="a batch that broadcasts"),
        pytest.param((1, 5), (3, 5), id="the other batch that broadcasts"),
        pytest.param((0, 5), (0, 5), id="empty"),
        pytest.param((3, 5, 1), (3, 5), id="another rank"),
    ],
)
def test_a_program_refuses_sizes_that_the_trace_does_not_cover(
    ids: tuple[int, ...], weights: tuple[int, ...], program: Any
) -> None:
    method = program.load_method("forward")
    with pytest.raises(RuntimeError, match=r"failed with error"):
        method.execute([torch.zeros(ids, dtype=torch.int64), torch.zeros(weights)])


@of_programs
def test_a_program_refuses_other_dtypes(program: Any) -> None:
    with pytest.raises(RuntimeError, match=r"failed with error"):
        program.load_method("forward").execute(
            [torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.float64)]
        )


@of_programs
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_programs_of_architectures_compute_what_the_eager_model_does(name: str, tmp_path: Path) -> None:
    model = architectures.build(name)
    graph = lora_fx.rewrite(model, name, rank=3).eval()
    set_factors(graph)
    report = lora_fx.export.executorch(lora_fx.fold(graph), tmp_path / "x.pte", max_sizes={"batch": 6, "sequence": 16})
    assert len(report.comparisons) > 3
    assert report.largest is not None
    assert report.largest < 1e-6
    batch = architectures.inputs(name, 5, 11)
    with huggingface.folded(model, graph), torch.no_grad():
        expected = model(**batch)[report.outputs[0]]
    found = loaded(tmp_path / "x.pte").load_method("forward").execute([batch[each] for each in report.inputs])
    assert torch.allclose(found[0], expected, rtol=0, atol=float(expected.abs().max()) * 1e-6)


@of_programs
def test_a_program_of_a_vit_computes_the_eager_model_and_refuses_other_image_sizes(tmp_path: Path) -> None:
    model = families.build("vit")
    # With a branch at every linear, eager float32 itself is 5e-5 from float64 in this model.
    graph = lora_fx.rewrite(model, ["q_proj", "v_proj"], rank=3).eval()
    set_factors(graph)
    report = lora_fx.export.executorch(lora_fx.fold(graph), tmp_path / "x.pte", max_sizes={"batch": 6})
    assert report.largest is not None
    assert report.largest < 1e-6
    _, channels, height, width = report.inputs["pixel_values"]
    assert isinstance(height, int)
    images = torch.randn(5, channels, height, width)
    with huggingface.folded(model, graph), torch.no_grad():
        expected = model(images).last_hidden_state
    method = loaded(tmp_path / "x.pte").load_method("forward")
    found = method.execute([images])[report.outputs.index("last_hidden_state")]
    assert torch.allclose(found, expected, rtol=0, atol=float(expected.abs().max()) * 1e-6)
    with pytest.raises(RuntimeError, match=r"failed with error"):
        method.execute([torch.randn(2, channels, height // 2, width)])  # fewer values than memory is planned for


@of_programs
def test_an_axis_whose_largest_size_is_1_has_that_size_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3)).eval()
    graph = lora_fx.trace(module, example_inputs=(torch.randn(4, 6),))
    report = lora_fx.export.executorch(graph, tmp_path / "x.pte", max_sizes={"batch": 1})
    assert report.inputs == {"input": (1, 6)}
    method, given = loaded(tmp_path / "x.pte").load_method("forward"), torch.randn(1, 6)
    assert torch.allclose(method.execute([given])[0], module(given), rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"failed with error"):
        method.execute([torch.randn(2, 6)])


class Sorted(nn.Module):
    """A sort, of which ExecuTorch has no kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sort(x, dim=1)[0]


class Accumulated(nn.Module):
    """An operator that is no core operator, and has no decomposition into such."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cummax(x, dim=1)[0]


@of_programs
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            Sorted(),
            r"ExecuTorch's runtime has no kernel for aten::sort\.values\. The operator is aten\.sort.*test_executorch\.py",
        ),
        (Accumulated(), r"ExecuTorch does not take this graph: .* The operator is aten\.cummax.*test_executorch\.py"),
    ],
    ids=["no kernel", "no core operator"],
)
def test_operators_that_executorch_lacks_are_named_with_their_line(
    module: nn.Module, message: str, tmp_path: Path
) -> None:
    graph = lora_fx.trace(module, example_inputs=(torch.randn(3, 5),))
    with pytest.raises(ExportError, match=message):
        lora_fx.export.executorch(graph, tmp_path / "x.pte", max_sizes={"batch": 4, "x_1": 6})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("max_sizes", "message"),
    [
        (None, "the trace has no largest size of batch. Give one for each, such as max_sizes={'batch': 8}"),
        ({"batch": 4, "sequences": 3}, "max_sizes names 'sequences', expected axes that vary: batch, ids_1"),
        ({"batch": 0}, "max_sizes for 'batch': expected a size that the trace covers, 1 or more, got 0"),
        ({"batch": 4, "ids_1": 10}, "max_sizes for 'ids_1': expected a size that the trace covers, 1 to 9, got 10"),
        ({"batch": 4.0}, "max_sizes for 'batch': expected a size that the trace covers, 1 or more, got 4.0"),
    ],
)
def test_largest_sizes_that_are_missing_or_mean_nothing_are_refused(
    max_sizes: Any, message: str, branched: Any, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=re.escape(message)):
        lora_fx.export.executorch(branched, tmp_path / "x.pte", max_sizes=max_sizes)
    assert not list(tmp_path.iterdir())


def test_an_environment_without_executorch_is_told_the_extra(
    branched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(ExportError, match=r"need executorch: pip install 'lora-fx\[executorch\]'"):
        lora_fx.export.executorch(branched, tmp_path / "x.pte", max_sizes={"batch": 4})
    assert not list(tmp_path.iterdir())


def test_a_program_ends_in_pte(branched: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.pt2: expected a name that ends in \.pte"):
        lora_fx.export.executorch(branched, tmp_path / "model.pt2")
