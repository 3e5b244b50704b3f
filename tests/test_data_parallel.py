"""Two processes train what one trains: ``DistributedDataParallel`` around a graph, started as users start it."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from architectures import build, without_dropout
from data_parallel import train
from safetensors.torch import load_file

import lora_fx

pytestmark = [pytest.mark.xdist_group("data-parallel"), pytest.mark.filterwarnings("ignore::FutureWarning")]

SCRIPT = Path(__file__).parent / "data_parallel.py"
RUNS = (("t5", torch.float64), ("llama", torch.float32))
MORE = (("llama", torch.float64), ("bert", torch.float64), ("gpt2", torch.float64), ("gpt2", torch.float32))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


Runs = Sequence[tuple[str, torch.dtype]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Runs], Path]:
    """Return a function of runs, which returns the directory of their traces, where two processes left losses and adapters."""

    @functools.cache
    def launched(runs: Runs) -> Path:
        directory = tmp_path_factory.mktemp("data-parallel")
        for name, dtype in runs:
            model = build(name).to(dtype)
            torch.save(without_dropout(lora_fx.trace(model)), _trace(directory, name, dtype))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run([*launch, SCRIPT, directory], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return directory

    return launched


def _trace(directory: Path, name: str, dtype: torch.dtype) -> Path:
    return directory / f"{name}-{str(dtype).removeprefix('torch.')}.trace"


@pytest.mark.parametrize(
    ("runs", "name", "dtype"),
    [
        *((RUNS, *run) for run in RUNS),
        *(pytest.param(MORE, *run, marks=pytest.mark.matrix) for run in MORE),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else str(value),
)
def test_two_processes_train_what_one_trains(
    runs: Runs, name: str, dtype: torch.dtype, trained: Callable[[Runs], Path], tmp_path: Path
) -> None:
    directory = trained(runs)
    path = _trace(directory, name, dtype)
    losses = train(name, torch.load(path, weights_only=False), tmp_path / "one")
    assert losses[-1] < 0.97 * losses[0]
    assert json.loads((directory / "losses.json").read_text())[path.stem] == pytest.approx(losses, rel=TOLERANCE[dtype])
    found, expected = (
        load_file(folder / "adapter_model.safetensors") for folder in (path.with_suffix(".adapter"), tmp_path / "one")
    )
    assert list(found) == list(expected)
    # Adam divides by the size of a gradient, however small that is: of factors the tolerance is wider.
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=0, atol=10 * TOLERANCE[dtype]), key
