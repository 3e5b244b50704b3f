"""An adapter is saved as a whole or not at all."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from architectures import traced
from conftest import limited, set_factors
from killed import TRIALS, Server, check_killed, server

import lora_fx

SETUP = """
import torch
from torch import nn
import lora_fx
torch.set_num_threads(1)
model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)))
graph = lora_fx.rewrite(model, {"select": [{"op": ["linear"], "rank": 256}]}, example_inputs=(torch.randn(3, 1024),), seed=5)

def act(out, overwrite):
    lora_fx.save_adapter(graph, out, overwrite=overwrite)
"""

NAMES = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def act() -> Iterator[Server]:
    with server(SETUP) as saving:
        yield saving


@pytest.mark.slow
@pytest.mark.parametrize("trials", TRIALS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_process_that_is_killed_while_it_saves_leaves_no_half_adapter(
    tmp_path: Path, act: Server, overwrite: bool, trials: int
) -> None:
    place, reference, before = (tmp_path / name for name in ("place", "reference", "before"))
    place.mkdir()
    before.mkdir()
    for name in NAMES:
        (before / name).write_text("old")

    def same(path: Path, other: Path) -> bool:
        names = sorted(each.name for each in path.iterdir())
        return names == NAMES and all(filecmp.cmp(path / name, other / name, shallow=False) for name in NAMES)

    assert act(reference, overwrite=False)[0] == 0
    assert (reference / NAMES[1]).stat().st_size > 8_000_000
    check_killed(
        act,
        place,
        overwrite=overwrite,
        old=lambda out: shutil.copytree(before, out),
        new=lambda out: same(out, reference),
        same_as_old=lambda out: same(out, before),
        remove=shutil.rmtree,
        trials=trials,
    )


def test_a_disk_that_is_full_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    graph = lora_fx.rewrite(traced("bert"), "bert", rank=40)
    set_factors(graph)
    with limited(), pytest.raises(lora_fx.LoraFxError, match=r"cannot write .*adapter: File too large"):
        lora_fx.save_adapter(graph, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []
    lora_fx.save_adapter(graph, tmp_path / "adapter")
    assert lora_fx.load_adapter(traced("bert"), tmp_path / "adapter")
