"""Two processes train what one trains: ``DistributedDataParallel`` around a graph, started as users start it."""

from __future__ import annotations

import json
import subprocess
import sys
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


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the traces of some runs, where two processes left their losses and the adapters."""
    directory = tmp_path_factory.mktemp("data-parallel")
    for name, dtype in request.param:
        torch.save(without_dropout(lora_fx.trace(build(name).to(dtype))), _trace(directory, name, dtype))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, SCRIPT, directory], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return directory


def _trace(directory: Path, name: str, dtype: torch.dtype) -> Path:
    return directory / f"{name}-{str(dtype).removeprefix('torch.')}.trace"


@pytest.mark.parametrize(
    ("trained", "name", "dtype"),
    [
        *((RUNS, *run) for run in RUNS),
        *(pytest.param(MORE, *run, marks=pytest.mark.matrix) for run in MORE),
    ],
    indirect=["trained"],
    ids=lambda value: "" if isinstance(value, tuple) else str(value),
)
def test_two_processes_train_what_one_trains(name: str, dtype: torch.dtype, trained: Path, tmp_path: Path) -> None:
    path = _trace(trained, name, dtype)
    losses = train(name, torch.load(path, weights_only=False), tmp_path / "one")
    assert losses[-1] < 0.97 * losses[0]
    assert json.loads((trained / "losses.json").read_text())[path.stem] == pytest.approx(losses, rel=TOLERANCE[dtype])
    found, expected = (
        load_file(folder / "adapter_model.safetensors") for folder in (path.with_suffix(".adapter"), tmp_path / "one")
    )
    assert list(found) == list(expected)
    # Adam divides by the size of a gradient, however small that is: of factors the tolerance is wider.
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=0, atol=10 * TOLERANCE[dtype]), key


def test_a_sharded_graph_is_refused(tmp_path: Path) -> None:
    """In a process of its own: a group of processes, if only of one, cannot be taken down without a trace."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from torch import distributed\n"
        "from torch.distributed.fsdp import fully_shard\n"
        "import lora_fx\n"
        "from architectures import branched\n"
        "distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)\n"
        "graph = branched('bert')\n"
        "fully_shard(graph)\n"
        "for use in (lora_fx.fold, lora_fx.fuse, lambda g: lora_fx.save_adapter(g, sys.argv[2])):\n"
        "    try:\n"
        "        use(graph)\n"
        "    except lora_fx.LoraFxError as error:\n"
        "        print(error)\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("is sharded over several devices (FSDP), and lora_fx reads whole tensors") == 3
    assert not (tmp_path / "adapter").exists()
