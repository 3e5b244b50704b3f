"""Peak memory of two processes that load their parts of a base, and train a step, above what each has after a trace of one layer.

    python tools/bench/sharded_loading.py              # a base of 1 GB, in files of 100 MB; a minute or two
    python tools/bench/sharded_loading.py --files 5GB  # in one file

The base is a Llama in float32, no tensor of which is over 5% of it. The model is traced on the meta device, and
``lora_fx.parallel.load_sharded`` reads the parts. The peak is that of the resident memory, with pages of files; the allocator is told to
give back what is freed.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import transformers
import typer
from measuring import status
from torch import distributed

import lora_fx
from lora_fx.cli.printing import run_script

MAX_PART = 0.65
"""What part of the base a process may hold at most."""


def config_of(layers: int, width: int) -> transformers.LlamaConfig:
    """Return the config of a Llama whose largest tensor is its embedding."""
    return transformers.LlamaConfig(
        vocab_size=8 * width,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )


def graph_of(config: transformers.LlamaConfig) -> lora_fx.TracedGraphModule:
    """Return a graph without weights."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    return lora_fx.rewrite(model, "all-linear", rank=8).train()


def peak() -> int:
    """Return the most bytes of this process that were ever in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step(graph: Any) -> None:
    """Train a step."""
    ids = torch.arange(64).reshape(2, 32)
    graph(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().mean().backward()


def process(directory: Path) -> None:
    """Load a part of the base in each of several processes, and print the peaks of all."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    config = transformers.LlamaConfig.from_pretrained(directory)
    graph = graph_of(transformers.LlamaConfig.from_pretrained(directory / "warm"))
    lora_fx.parallel.load_sharded(graph, directory / "warm", seed=0)
    step(graph)
    del graph
    before = status("VmRSS")
    graph = graph_of(config)
    lora_fx.parallel.load_sharded(graph, directory, seed=0)
    loaded = peak()
    graph.activation_checkpointing_enable()
    step(graph)
    base = sum(each.numel() * each.element_size() for each in graph.parameters() if not each.requires_grad)
    largest = max(each.numel() * each.element_size() for each in graph.parameters()) / base
    found = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, ((loaded - before) / base, (peak() - before) / base))
    if distributed.get_rank() == 0:
        print(f"base {base / 1e9:.2f} GB, largest tensor {largest:.1%} of it")
        for rank, each in enumerate(found):
            assert each is not None
            print(
                f"process {rank}: peak {each[0]:.2f} x the base loaded (at most {MAX_PART}), {each[1]:.2f} x after a step"
            )
            assert each[0] < MAX_PART
    distributed.destroy_process_group()


def main(
    layers: Annotated[int, typer.Option(min=1, help="Of the model.")] = 18,
    width: Annotated[int, typer.Option(min=128, help="Of the model.")] = 1024,
    files: Annotated[str, typer.Option(help="Size of the files of the checkpoint.")] = "100MB",
    part: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure the memory in which a sharded base is loaded."""
    if part is not None:
        process(part)
        return
    with TemporaryDirectory() as directory:
        transformers.LlamaForCausalLM(config_of(1, 128)).save_pretrained(Path(directory, "warm"))
        transformers.LlamaForCausalLM(config_of(layers, width)).save_pretrained(directory, max_shard_size=files)
        # Otherwise glibc keeps most of what FSDP frees: tensors of some megabytes.
        kept = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        subprocess.run([*launch, __file__, "--part", directory], check=True, env={**os.environ, **kept})


if __name__ == "__main__":
    run_script(main)
