"""What was exported, run by programs that have neither lora_fx nor transformers: bit for bit, or as near as their arithmetic is."""

from __future__ import annotations

import functools
import itertools
import os
import site
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import architectures
import families
import numpy as np
import pytest
import torch
from conftest import set_factors
from torch import nn
from torch.utils import cpp_extension

import lora_fx

SIZES = ((3, 11, 4), (1, 6, 2), (4, 1, 3))
"""Batch, sequence and target sequence; none is what the models were traced at."""


@functools.cache
def graphs(name: str) -> Mapping[str, lora_fx.TracedGraphModule]:
    """Return a graph with branches, and folded. Not to be changed."""
    module: Any = architectures if name in architectures.ARCHITECTURES else families
    graph_module = lora_fx.rewrite(module.traced(name), rules=name, rank=6, alpha=9)
    set_factors(graph_module)
    return {"branched": graph_module.eval(), "folded": lora_fx.fold(graph_module)}


MODELS = [
    pytest.param(row.values[0], state, format, marks=row.marks)
    for state, format, representatives in (
        ("branched", "torchscript", ()),
        ("branched", "onnx", ()),
        ("branched", "pt2", ("bert",)),
        ("folded", "torchscript", ("mixtral",)),
        ("folded", "onnx", ()),
        ("folded", "pt2", ()),
    )
    for row in architectures.rows(("bert",) if state == "branched" else ("bert", "t5", "mixtral"), representatives)
]


@functools.cache
def batches(name: str) -> list[dict[str, torch.Tensor]]:
    return [architectures.inputs(name if name == "t5" else "llama", *size) for size in SIZES]


def expected(graph_module: lora_fx.TracedGraphModule, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {name: value.numpy() for name, value in graph_module(**batch).items()}


def same_bits(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> bool:
    """Tell whether two runs gave the same names, shapes, types and bytes."""
    return list(found) == list(wanted) and all(
        (value.shape, value.dtype, value.tobytes()) == (found[key].shape, found[key].dtype, found[key].tobytes())
        for key, value in wanted.items()
    )


# Processes that import torch, or onnxruntime, alone.


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with all that is installed, except transformers and lora_fx, and what tells Python where they are."""
    directory = tmp_path_factory.mktemp("packages")
    for installed in (
        path for each in site.getsitepackages() if Path(each).is_dir() for path in sorted(Path(each).iterdir())
    ):
        kept = not installed.name.startswith(("transformers", "lora_fx")) and installed.suffix != ".pth"
        if kept and not (directory / installed.name).exists():
            (directory / installed.name).symlink_to(installed)
    return directory


FRESH = """
import importlib.util, sys
assert importlib.util.find_spec("transformers") is None and importlib.util.find_spec("lora_fx") is None
import numpy as np
path, count = sys.argv[1], int(sys.argv[2])
{load}
for index in range(count):
    found = run(dict(np.load(f"in-{{index}}.npz")))
    np.savez(f"out-{{index}}.npz", **found)
print(sorted({{"torch", "transformers", "lora_fx"}} & set(sys.modules)))
"""

LOADS = {
    "torchscript": """
import torch
torch.set_num_threads(1)
model = torch.jit.load(path)
def run(inputs):
    with torch.no_grad(), torch.jit.optimized_execution(False):
        found = model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    return {name: value.numpy() for name, value in found.items()}
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
def run(inputs):
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs)))
""",
    "pt2": """
import torch
torch.set_num_threads(1)
model = torch.export.load(path).module()
def run(inputs):
    with torch.no_grad():
        found = model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    return {name: value.numpy() for name, value in found.items()}
""",
}

SUFFIXES = {"torchscript": ".pt", "onnx": ".onnx", "pt2": ".pt2"}


def fresh(
    packages: Path, directory: Path, format: str, path: Path, batches: list[dict[str, torch.Tensor]]
) -> subprocess.CompletedProcess[str]:
    """Run a file on inputs in a new process, which writes what it found into the directory that it runs in."""
    for index, batch in enumerate(batches):
        np.savez(directory / f"in-{index}.npz", **{name: value.numpy() for name, value in batch.items()})
    code = FRESH.format(load=LOADS[format])
    return subprocess.run(
        [sys.executable, "-S", "-c", code, str(path), str(len(batches))],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("name", "state", "format"), MODELS)
def test_a_file_computes_what_its_graph_computes_where_neither_lora_fx_nor_transformers_is(
    packages: Path, tmp_path: Path, name: str, state: str, format: str
) -> None:
    graph_module = graphs(name)[state]
    path, elsewhere = tmp_path / f"model{SUFFIXES[format]}", tmp_path / "elsewhere"
    elsewhere.mkdir()
    getattr(lora_fx.export, format)(graph_module, path, verify=False)
    done = fresh(packages, elsewhere, format, path, batches(name))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ("[]" if format == "onnx" else "['torch']")
    for index, batch in enumerate(batches(name)):
        wanted = expected(graph_module, batch)
        with np.load(elsewhere / f"out-{index}.npz") as archive:
            found = dict(archive)
        if format != "onnx":
            assert same_bits(found, wanted), SIZES[index]
            continue
        assert list(found) == list(wanted)
        for key, value in wanted.items():
            assert (found[key].shape, found[key].dtype) == (value.shape, value.dtype)
            assert np.abs(found[key] - value).max() <= 2e-6 * np.abs(value).max(), (key, SIZES[index])


@pytest.mark.xdist_group("mixtral")
def test_the_trace_of_a_mixture_of_experts_has_an_operator_that_transformers_registers() -> None:
    """What the tests with mixtral rest on."""
    targets = {str(node.target) for node in graphs("mixtral")["folded"].graph.nodes if node.op == "call_function"}
    assert [target for target in targets if target.startswith("transformers.")] == [
        "transformers.grouped_mm_fallback.default"
    ]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stacked = nn.Parameter(torch.randn(2, 8, 12))

    def forward(self, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return torch.ops.transformers.grouped_mm_fallback(rows, self.stacked, ends)


def test_a_file_that_needs_transformers_does_not_load_there(packages: Path, tmp_path: Path) -> None:
    """The processes of these tests do not have it by some other way: torch.export's own file of the same operator fails."""
    batch = {"rows": torch.randn(5, 8), "ends": torch.tensor([2, 5], dtype=torch.int32)}
    torch.export.save(torch.export.export(Experts(), (), batch), tmp_path / "model.pt2")
    done = fresh(packages, tmp_path, "pt2", tmp_path / "model.pt2", [batch])
    assert done.returncode == 1
    assert "grouped_mm_fallback" in done.stderr
    assert not (tmp_path / "out-0.npz").exists()


# A program without Python.

PROGRAM = r"""
#include <ATen/Parallel.h>
#include <torch/script.h>
#include <fstream>
#include <iostream>

// Run a script on counted inputs: PROGRAM script exact|optimised batch length ... Each output goes to <batch>-<length>.<name>.
int main(int argc, char** argv) {
  at::set_num_threads(1);
  torch::jit::setGraphExecutorOptimize(std::string(argv[2]) == "optimised");
  c10::InferenceMode guard;
  auto script = torch::jit::load(argv[1]);
  std::cout << "training " << script.is_training() << "\n";
  for (int i = 3; i + 1 < argc; i += 2) {
    int64_t batch = std::stol(argv[i]), length = std::stol(argv[i + 1]);
    auto ids = torch::arange(batch * length).mul(37).add(5).remainder(97).view({batch, length});
    auto mask = torch::ones({batch, length}, torch::kLong);
    mask.select(0, 0).slice(0, length / 2 + 1).zero_();
    try {
      c10::Dict<c10::IValue, c10::IValue> found = c10::impl::toGenericDict(script.forward({ids, mask}).toGenericDict());
      for (const auto& entry : found) {
        auto tensor = entry.value().toTensor().contiguous();
        auto name = std::to_string(batch) + "-" + std::to_string(length) + "." + entry.key().toStringRef();
        std::ofstream(name, std::ios::binary).write(static_cast<const char*>(tensor.data_ptr()), tensor.nbytes());
        std::cout << name << " " << tensor.scalar_type() << " " << tensor.sizes() << "\n";
      }
    } catch (const std::exception& error) {
      std::cout << "refused " << batch << " " << length << "\n" << error.what() << "\n";
    }
  }
}
"""


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the program, built against the libtorch of the installed torch."""
    directory = tmp_path_factory.mktemp("cpp")
    source, libraries = directory / "program.cpp", Path(torch.__file__).parent / "lib"
    source.write_text(PROGRAM)
    command = [
        *("g++", "-std=c++20", "-O0", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"),
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),
        *(str(source), "-o", str(directory / "program"), f"-L{libraries}", f"-Wl,-rpath,{libraries}"),
        *("-ltorch", "-ltorch_cpu", "-lc10"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return directory / "program"


def counted(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Return the inputs that the program makes."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length // 2 + 1 :] = 0
    return {
        "input_ids": (torch.arange(batch * length) * 37 + 5).remainder(97).view(batch, length),
        "attention_mask": mask,
    }


def run_program(program: Path, script: Path, mode: str, *sizes: tuple[int, int]) -> list[str]:
    """Return the lines that the program prints. It has nothing of Python's in its environment."""
    command = [program, script, mode, *(str(size) for pair in sizes for size in pair)]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, check=False, env={})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.xdist_group("bert")
@pytest.mark.parametrize(
    ("name", "state"),
    architectures.few(itertools.product(("bert", "mixtral"), ("branched", "folded")), [("bert", "branched")]),
)
def test_a_script_runs_in_a_program_written_in_cpp(program: Path, tmp_path: Path, name: str, state: str) -> None:
    sizes = ((3, 11), (1, 6))
    graph_module, script = graphs(name)[state], tmp_path / "model.pt"
    wanted = {size: expected(graph_module, counted(*size)) for size in sizes}
    lora_fx.export.torchscript(graph_module, script, verify=False)
    # The optimiser of run time, from the second call of a size on, forms some products in another order.
    for mode, runs, allowed in (("exact", sizes, 0.0), ("optimised", sizes * 3, 2e-6)):
        said = run_program(program, script, mode, *runs)
        assert said == [
            "training 0",
            *(
                f"{size[0]}-{size[1]}.{key} Float [{', '.join(map(str, value.shape))}]"
                for size in runs
                for key, value in wanted[size].items()
            ),
        ]
        for size in sizes:
            for key, value in wanted[size].items():
                file = tmp_path / f"{size[0]}-{size[1]}.{key}"
                found = np.frombuffer(file.read_bytes(), value.dtype).reshape(value.shape)
                assert (
                    found.tobytes() == value.tobytes() or np.abs(found - value).max() <= allowed * np.abs(value).max()
                )
                assert mode != "exact" or found.tobytes() == value.tobytes()
                file.unlink()


@pytest.mark.slow
@pytest.mark.xdist_group("bert")
def test_a_program_written_in_cpp_is_told_which_size_the_trace_does_not_cover(program: Path, tmp_path: Path) -> None:
    lora_fx.export.torchscript(graphs("bert")["folded"], tmp_path / "model.pt", verify=False)
    with pytest.raises(lora_fx.InputError) as caught:
        graphs("bert")["folded"](**counted(3, 65))
    said = "\n".join(run_program(program, tmp_path / "model.pt", "exact", (3, 65), (2, 64)))
    assert "refused 3 65\n" in said
    assert "size 65 in dimension 1" in str(caught.value)
    assert str(caught.value) in said
    assert not list(tmp_path.glob("3-65.*"))
    assert (tmp_path / "2-64.last_hidden_state").stat().st_size == 2 * 64 * 48 * 4  # it goes on
