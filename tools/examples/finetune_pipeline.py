"""Fine-tune a small Llama in two stages of a pipeline, a process each, with the 1F1B schedule of ``torch.distributed.pipelining``.

Nothing is downloaded: the weights are random, the text is Python's own reference, by characters. Processes talk by gloo on CPUs, and with
``--nccl`` each has a GPU.

Example:  torchrun --standalone --nproc_per_node 2 tools/examples/finetune_pipeline.py --steps 20 --out finetuned
"""

from __future__ import annotations

import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import torch
import transformers
import typer
from torch import distributed
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.functional import cross_entropy

import lora_fx
from lora_fx.cli.printing import run_script

SEQUENCE, PARTS = 64, 4
CONFIG = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 6}


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the loss of predicting each character from those before it."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def collect(graph: lora_fx.TracedGraphModule, stage: torch.nn.Module, rank: int) -> None:
    """Give the first process the parameters that the others trained (in place)."""
    trained = {name for name, each in graph.named_parameters() if each.requires_grad}
    own = {id(each) for each in stage.parameters()}
    values = {
        name: each.detach().cpu() for name, each in graph.named_parameters() if name in trained and id(each) in own
    }
    found: list[dict[str, torch.Tensor] | None] = [None] * distributed.get_world_size()
    distributed.gather_object(values, found if rank == 0 else None)
    if rank == 0:
        graph.load_state_dict({name: value for each in found if each for name, value in each.items()}, strict=False)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps.")] = 20,
    out: Annotated[Path, typer.Option(help="Directory for the adapter.")] = Path("finetuned"),
    nccl: Annotated[bool, typer.Option("--nccl", help="On GPUs, one for each process.")] = False,
) -> None:
    """Fine-tune a small Llama in two stages of a pipeline."""
    distributed.init_process_group("nccl" if nccl else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if nccl else torch.device("cpu")
    if nccl:
        torch.cuda.set_device(device)
    text = torch.tensor(list("\n".join(topics.values()).encode("ascii", "replace")))
    torch.manual_seed(0)  # the same weights in all processes
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=128, **CONFIG))
    graph = lora_fx.rewrite(model, "all-linear", rank=8, alpha=16, seed=0).train()
    splits = [f"model.layers.{CONFIG['num_hidden_layers'] * n // world}" for n in range(1, world)]
    module = lora_fx.parallel.stage_module(graph, splits, rank).to(device)
    schedule = Schedule1F1B(PipelineStage(module, rank, world, device), PARTS, loss_fn=loss_of)
    optimizer = torch.optim.AdamW([each for each in module.parameters() if each.requires_grad], lr=5e-3)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(text) - SEQUENCE, (4 * PARTS,), generator=generator)
        ids = torch.stack([text[start : start + SEQUENCE] for start in starts.tolist()]).to(device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        own = {name: batch[name] for name in lora_fx.parallel.inputs_of(module)}
        losses: list[torch.Tensor] = []
        if rank == world - 1:
            schedule.step(**own, target=ids, losses=losses)
            if step % max(1, steps // 4) == 0 or step == steps - 1:
                print(f"step {step}: loss {torch.stack(losses).mean().item():.4f}", flush=True)
        else:
            schedule.step(**own)
        optimizer.step()
        optimizer.zero_grad()
    collect(graph, module, rank)
    if rank == 0:
        lora_fx.save_adapter(graph, out / "adapter", overwrite=True)
        print(f"adapter in {out}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
