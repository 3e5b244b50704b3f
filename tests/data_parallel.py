"""Trains small graphs, in one process, or in several that ``torch.distributed.run`` starts, each on its part of every batch::

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/data_parallel.py DIRECTORY

where ``DIRECTORY`` has traces, ``<architecture>-<dtype>.trace``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, inputs
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import lora_fx

BATCH, STEPS = 4, 8


def train(name: str, trace: lora_fx.TracedGraphModule, out: Path, rank: int = 0, world: int = 1) -> list[float]:
    """Train a rewrite of ``trace``, save the adapter from rank 0, and return the losses over whole batches.

    Each rank draws factors of its own; those of rank 0 are what is trained.
    """
    rules = ARCHITECTURES[name].rules
    graph_module = lora_fx.rewrite(trace, rules=rules, rank=4, alpha=8, dropout=0.0, seed=rank).train()
    module = DistributedDataParallel(graph_module) if world > 1 else graph_module
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for step in range(STEPS):
        batch = {key: value.chunk(world)[rank] for key, value in inputs(name, BATCH, 5 + step % 3, seed=step).items()}
        loss = module(**batch)[0].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(_mean(loss.detach(), world))
    if world > 1:
        _check_same(trained)
        _check_refuses(module, name)
    if rank == 0:
        lora_fx.save_adapter(graph_module, out)
    return losses


def _mean(loss: torch.Tensor, world: int) -> float:
    if world > 1:
        distributed.all_reduce(loss)
    return loss.item() / world


def _check_same(parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        value = parameter.detach().clone()
        distributed.broadcast(value, 0)
        assert torch.equal(value, parameter)


def _check_refuses(module: DistributedDataParallel, name: str) -> None:
    longer = inputs(name, 2, 6)["attention_mask"]
    with pytest.raises(lora_fx.InputError, match=r"input_ids.size\(1\) == attention_mask.size\(1\)"):
        module(**{**inputs(name, 2, 5), "attention_mask": longer})


def main(directory: Path) -> None:
    """Train every trace in ``directory``; rank 0 writes the losses."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    losses = {}
    for path in sorted(directory.glob("*.trace")):
        trace = torch.load(path, weights_only=False)
        losses[path.stem] = train(path.stem.split("-")[0], trace, path.with_suffix(".adapter"), rank, world)
    if rank == 0:
        (directory / "losses.json").write_text(json.dumps(losses))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
