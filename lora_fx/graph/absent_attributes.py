"""Attributes that a graph lacks, where others ask for them and then do something else in silence, or expect those of PEFT."""

from __future__ import annotations

import os

from torch import distributed

from lora_fx.errors import LoraFxError, warn
from lora_fx.graph.info import EMBEDDINGS, GraphInfo

_OF_DDP = "_ddp_params_and_buffers_to_ignore"  # asked for by the constructor of DistributedDataParallel alone

_INSTEAD = {
    "active_adapter": "gm.adapters says which act",
    "active_adapters": "gm.adapters says which act",
    "add_adapter": 'lora_fx.rewrite(gm, rules, adapter="b") returns a graph with one more',
    "add_weighted_adapter": 'lora_fx.combine(gm, {"a": 1.0, "b": 0.5}, adapter="ab") returns a graph with their sum',
    "disable_adapter": "lora_fx.activate(gm, {}) returns a graph in which none acts",
    "disable_adapters": "lora_fx.activate(gm, {}) returns a graph in which none acts",
    "get_base_model": "lora_fx.unload(gm) returns a graph without adapters",
    "merge_adapter": "lora_fx.huggingface.folded(model, gm) lends the merged weights for a block",
    "peft_config": "gm.adapters and print(gm) say what the adapters are",
    "unload": "lora_fx.unload(gm) returns a graph without adapters",
    "unmerge_adapter": "lora_fx.huggingface.folded(model, gm) lends the merged weights for a block",
}
"""Names of PEFT's methods that graphs lack, and what does the same."""

SAID_ABSENT = EMBEDDINGS | {_OF_DDP} | _INSTEAD.keys()
"""Names of such attributes."""


def say_absent(name: str, info: GraphInfo) -> None:
    """Say what the absence of an attribute means, where it means something.

    Args:
        name: of the attribute.
        info: the record of the graph.

    Raises:
        LoraFxError: DistributedDataParallel would give all processes the parts of the first.
        AttributeError: the graph lacks a method because it is nested, or has something else in place of one of PEFT's.
    """
    if name in _INSTEAD:
        raise AttributeError(f"a graph has no {name}: {_INSTEAD[name]}.")
    if name in EMBEDDINGS and info.nested:
        raise AttributeError(
            f"a nested graph has no {name}: FSDP would shard such a module on its own, while the graph reads the weight outside of it. "
            "lora_fx.flatten(graph) has it."
        )
    if name == _OF_DDP and info.shards is not None:
        raise LoraFxError(
            "this graph has one process's parts of the weights (lora_fx.parallel.shard), and DistributedDataParallel, which Trainer makes too, "
            "would overwrite them with those of the first process. Train it as it is, with equal batches on all processes."
        )
    # Accelerate sets the variable, also for Trainer.
    if name == _OF_DDP and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not distributed.get_rank():
        warn(
            "FSDP was asked for, and accelerate makes DistributedDataParallel of it, as it does on CPUs: every process holds the whole graph. "
            "Call lora_fx.parallel.fully_shard(graph) instead, or run on accelerators."
        )
