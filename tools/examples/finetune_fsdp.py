"""Fine-tune a small Llama by FSDP2, sharded over processes; each reads its part of the base from a checkpoint.

Nothing is downloaded: the weights are random, the text is Python's own reference, by characters. The checkpoint is written on the first
run. Processes talk by gloo on CPUs, and with ``--nccl`` each has a GPU.

Example:  torchrun --standalone --nproc_per_node 2 tools/examples/finetune_fsdp.py --steps 20 --out finetuned
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

import lora_fx
from lora_fx.cli.printing import run_script

SEQUENCE = 64
CONFIG = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 6}


def batch_of(text: torch.Tensor, rows: int, step: int) -> dict[str, torch.Tensor]:
    """Return this process's part of the batch of a step."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - SEQUENCE, (rows * distributed.get_world_size(),), generator=generator)
    own = starts.chunk(distributed.get_world_size())[distributed.get_rank()]
    ids = torch.stack([text[start : start + SEQUENCE] for start in own.tolist()])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def main(
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps.")] = 20,
    rows: Annotated[int, typer.Option(min=2, help="Rows of a batch in each process.")] = 4,
    out: Annotated[Path, typer.Option(help="Directory for the base and the adapter.")] = Path("finetuned"),
    nccl: Annotated[bool, typer.Option("--nccl", help="On GPUs, one for each process.")] = False,
) -> None:
    """Fine-tune a small Llama, sharded over processes."""
    distributed.init_process_group("nccl" if nccl else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if nccl else torch.device("cpu")
    if nccl:
        torch.cuda.set_device(device)
    is_first = distributed.get_rank() == 0
    text = torch.tensor(list("\n".join(topics.values()).encode("ascii", "replace")), device=device)
    config = transformers.LlamaConfig(vocab_size=128, **CONFIG)
    if is_first and not (out / "base").exists():
        transformers.LlamaForCausalLM(config).save_pretrained(out / "base")
    distributed.barrier()

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)  # no process ever has the whole base
    graph = lora_fx.rewrite(model, "all-linear", rank=8, alpha=16, labels=True).train()
    lora_fx.parallel.load_sharded(graph, out / "base", seed=0)
    graph.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW([each for each in graph.parameters() if each.requires_grad], lr=5e-3)
    for step in range(steps):
        loss = graph(**batch_of(text, rows, step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 4) == 0 or step == steps - 1:
            distributed.all_reduce(mean := loss.detach().clone())
            if is_first:
                print(f"step {step}: loss {mean.item() / distributed.get_world_size():.4f}")
    lora_fx.save_adapter(graph, out / "adapter", overwrite=True)  # every process gives its part, the first writes
    if is_first:
        print(f"base and adapter in {out}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
