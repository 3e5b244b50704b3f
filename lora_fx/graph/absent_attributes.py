"""Attributes that a graph lacks, where others ask for them and then do something else in silence."""

from __future__ import annotations

import os

from torch import distributed

from lora_fx.errors import warn
from lora_fx.graph.info import EMBEDDINGS, GraphInfo

_OF_DDP = "_ddp_params_and_buffers_to_ignore"  # asked for by the constructor of DistributedDataParallel alone

SAID_ABSENT = EMBEDDINGS | {_OF_DDP}
"""Names of such attributes."""


def say_absent(name: str, info: GraphInfo) -> None:
    """Say what the absence of an attribute means, where it means something.

    Args:
        name: of the attribute.
        info: the record of the graph.

    Raises:
        AttributeError: the graph lacks a method because it is nested.
    """
    if name in EMBEDDINGS and info.nested:
        raise AttributeError(
            f"a nested graph has no {name}: FSDP would shard such a module on its own, while the graph reads the weight outside of it. "
            "lora_fx.flatten(graph) has it."
        )
    # Accelerate sets the variable, also for Trainer.
    if name == _OF_DDP and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not distributed.get_rank():
        warn(
            "FSDP was asked for, and accelerate makes DistributedDataParallel of it, as it does on CPUs: every process holds the whole graph. "
            "Call lora_fx.parallel.fully_shard(graph) instead, or run on accelerators."
        )
