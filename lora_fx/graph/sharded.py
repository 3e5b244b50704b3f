"""Graphs that FSDP shards over processes: their whole tensors, gathered once."""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from lora_fx.graph.graph_module import TracedGraphModule, assemble, copy_graph, trainable_names
from lora_fx.graph.info import known_info, with_info
from lora_fx.graph.state import State, leaf_modules, non_persistent_names, sharded_name


def gathered(graph_module: TracedGraphModule) -> TracedGraphModule | None:
    """Return a flat graph with whole tensors on the first process, and None on the others; a graph that is not sharded itself.

    All processes have to call it. They gather a tensor at a time, and the first keeps it.
    """
    tensors: dict[str, torch.Tensor] = dict(graph_module.named_parameters(remove_duplicate=False))
    tensors.update(graph_module.named_buffers(remove_duplicate=False))
    if sharded_name(tensors) is None:
        return graph_module
    whole: dict[int, torch.Tensor] = {}
    is_first = distributed.get_rank() == 0
    for tensor in {id(tensor): tensor for tensor in tensors.values()}.values():
        value = tensor.detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if is_first:
            whole[id(tensor)] = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value
    if not is_first:
        return None
    state = State(
        {name: whole[id(tensor)] for name, tensor in tensors.items()},
        frozenset(non_persistent_names(graph_module)),
        dict(leaf_modules(graph_module)),
    )
    return assemble(
        copy_graph(graph_module.graph)[0],
        state,
        meta=with_info(graph_module.meta, known_info(graph_module).flat),
        training=graph_module.training,
        trainable=trainable_names(graph_module),
    )
