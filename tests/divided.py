"""Computes small graphs by two processes with a part of the weights each::

    python tests/divided.py DIRECTORY llama gpt2 refusals

where ``DIRECTORY`` has rewritten graphs, ``<name>.graph``, and inputs, ``<name>.inputs``. What is found is left there, as ``<name>-<rank>.pt``.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn

import lora_fx
from lora_fx.graph.info import info_of
from lora_fx.parallel import ShardingPlan


def said(function: Any) -> str:
    """Return what is said where a function is refused."""
    try:
        function()
    except lora_fx.LoraFxError as error:
        return str(error)
    return "nothing"


def computed(name: str, directory: Path) -> dict[str, Any]:
    """Return outputs, gathered gradients, the names and sizes of parameters, and the folded weights of a process."""
    graph = torch.load(directory / f"{name}.graph", weights_only=False)
    part = lora_fx.parallel.shard(graph)
    batch = torch.load(directory / f"{name}.inputs")
    shards = info_of(part).shards
    assert shards is not None
    logits = part(**batch).logits
    logits.square().mean().backward()
    gradients = {
        key: shards.gather(key, value.grad) for key, value in part.named_parameters() if value.grad is not None
    }
    lora_fx.save_adapter(part, directory / f"{name}-adapter")
    folded = lora_fx.fold(part)
    copied = copy.deepcopy(part)
    with torch.no_grad():
        again = [each.eval()(**batch).logits for each in (folded, copied)]
    return {
        "logits": logits.detach(),
        "again": again,
        "gradients": gradients,
        "sizes": {key: value.untyped_storage().nbytes() for key, value in part.named_parameters()},
        "divided": sorted(shards.shards),
        "merged": dict(folded.state_dict()),
        "parts": {key: (shard.dim, shard.blocks) for key, shard in shards.shards.items()},
    }


def refusals(directory: Path, rank: int) -> dict[str, str]:
    """Return what every process says where one refuses or all do; none waits for another forever."""
    shard = lora_fx.parallel.shard
    graph = torch.load(directory / "llama.graph", weights_only=False)
    other = copy.deepcopy(graph)
    if rank:
        next(each for each in other.parameters() if each.requires_grad).data.add_(1)
    dropped = torch.load(directory / "dropped.graph", weights_only=False)
    part = shard(graph)
    found = {
        "other": said(lambda: shard(other)),
        "one": said(lambda: shard(dropped if rank else graph)),
        "heads": said(lambda: shard(torch.load(directory / "odd.graph", weights_only=False))),
        "name": said(lambda: shard(graph, ShardingPlan(columns=("query",)))),
        "column alone": said(lambda: shard(graph, ShardingPlan(columns=("up_proj",)))),
        "row alone": said(lambda: shard(graph, ShardingPlan(rows=("down_proj",)))),
        "head": said(lambda: shard(graph, ShardingPlan(columns=("lm_head",)))),
        "dora": said(lambda: shard(torch.load(directory / "dora.graph", weights_only=False))),
        "prompt": said(lambda: shard(torch.load(directory / "prompt.graph", weights_only=False))),
        "nested": said(lambda: shard(lora_fx.nest(graph))),
        "twice": said(lambda: shard(part)),
        "rewrite": said(lambda: lora_fx.rewrite(part, "auto", adapter="b")),
        "fully_shard": said(lambda: lora_fx.parallel.fully_shard(part)),
        "stage": said(lambda: lora_fx.parallel.stage_module(part, ["model.layers.1"], 0)),
        "transfer": said(lambda: lora_fx.transfer(part, onto=graph)),
        "export": said(lambda: lora_fx.export.torchscript(part, directory / f"{rank}.pt")),
        "one path": said(lambda: lora_fx.export.pt2(part, directory / "part.pt2")),
        "one of two paths": said(lambda: lora_fx.export.pt2(part, directory / ("full.pt2" if rank else "0.pt2"))),
        "ddp": said(lambda: nn.parallel.DistributedDataParallel(part)),
        "target": said(lambda: lora_fx.save_adapter(part, directory / "full")),
    }
    by_name = ShardingPlan(columns=("gate_proj", "mlp.up_proj"), rows=("layers.*.mlp.down_proj",))
    batch = torch.load(directory / "llama.inputs")
    with torch.no_grad():
        unlike = shard(graph, by_name)(**batch).logits - graph(**batch).logits
    return {**found, "named": str(unlike.abs().max().item())}


def exported(directory: Path, rank: int) -> dict[str, Any]:
    """Return what the files of the parts compute, branched and folded."""
    part = lora_fx.parallel.shard(torch.load(directory / "llama.graph", weights_only=False))
    batch, found = torch.load(directory / "llama.inputs"), dict[str, Any]()
    for name, graph in (("branched", part), ("folded", lora_fx.fold(part))):
        path = directory / f"{name}-{rank}.pt2"
        compared = lora_fx.export.pt2(graph, path).comparisons
        program = torch.export.load(path)
        sizes = [value.numel() for key, value in program.state_dict.items() if key.endswith("down_proj.weight")]
        found[name] = {"logits": program.module()(**batch)["logits"], "sizes": sizes, "compared": len(compared)}
    return found


def main(rank: int, directory: Path, names: list[str]) -> None:
    """Run what is named in one of two processes, and leave what is found."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{directory}/{names[0]}.store", rank=rank, world_size=2)
    for name in names:
        special = {"refusals": refusals, "exported": exported}.get(name)
        found = computed(name, directory) if special is None else special(directory, rank)
        torch.save(found, directory / f"{name}-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    # Forked, the two have imported everything already.
    multiprocessing.start_processes(main, (Path(sys.argv[1]).resolve(), sys.argv[2:]), 2, start_method="fork")
