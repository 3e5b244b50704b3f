"""Graphs that FSDP or tensor parallelism shards over processes: their whole tensors, gathered once, and a first process that acts for all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lora_fx.errors import LoraFxError
from lora_fx.graph.graph_module import TracedGraphModule, assemble, copy_graph, state_in_parts, state_of
from lora_fx.graph.info import known_info, with_info
from lora_fx.graph.module_tensors import trainable_names
from lora_fx.graph.pickling import restore
from lora_fx.graph.process_sums import RankShards

Result = TypeVar("Result")


def mesh_of(module: nn.Module) -> DeviceMesh | None:
    """Return the processes that a graph is sharded over, or None where it is not."""
    return next((each.device_mesh for each in module.parameters() if isinstance(each, DTensor)), None)


def is_sharded(module: nn.Module) -> bool:
    """Tell whether several processes have parts of a graph, by FSDP or by tensor parallelism."""
    return mesh_of(module) is not None or known_info(module).shards is not None


def on_first_process(graph_module: TracedGraphModule, function: Callable[[TracedGraphModule], Result]) -> Result | None:
    """Return what a function returns of a sharded graph with its tensors whole: on the first process, and None on the others.

    Every process has to call this. The tensors are gathered one by one, and the first process keeps them, in the memory of the host. The others
    wait for the function, and where it raises, all of them raise. A graph that is not sharded is given to the function as it is::

        lora_fx.parallel.on_first_process(graph, lambda whole: torch.save(lora_fx.fold(whole).state_dict(), "merged.pt"))

    Args:
        graph_module: sharded by :func:`lora_fx.parallel.fully_shard`, :func:`lora_fx.parallel.shard`, torch or accelerate; not changed.
        function: takes the whole graph, which is flat.

    Raises:
        LoraFxError: the function raises on the first process, and this is another; the first raises what the function does.
    """
    results: list[Result] = []
    told_by_first(graph_module, lambda whole: results.append(function(whole)))
    return results[0] if results else None


def told_by_first(graph_module: TracedGraphModule, function: Callable[[TracedGraphModule], Result]) -> Result:
    """Return on all processes what a function returns of the whole graph on the first; see :func:`on_first_process`.

    Args:
        graph_module: not changed.
        function: what it returns is pickled.
    """
    whole = gathered(graph_module)
    return from_first_process(graph_module, lambda: function(cast(TracedGraphModule, whole)))


def from_first_process(graph_module: nn.Module, function: Callable[[], Result]) -> Result:
    """Return on all processes of a sharded graph what a function returns on the first, or raise on all. It is called there alone.

    Args:
        graph_module: a graph that is not sharded is of one process.
        function: what it returns is pickled.
    """
    groups = processes_of(graph_module)
    if not groups:
        return function()
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if not any(group.rank() for group in groups):
        try:
            outcome = [None, function()]
        except Exception as caught:  # whatever it is, no process is left waiting
            error, outcome = caught, [f"{type(caught).__name__}: {caught}", None]
    for group in groups:
        distributed.broadcast_object_list(outcome, group=group, group_src=0)
    message, result = outcome
    if error is not None:
        raise error
    if message is not None:
        raise LoraFxError(f"the first process refused: {message}")
    return result  # type: ignore[no-any-return]


def agreed(groups: Sequence[distributed.ProcessGroup], function: Callable[[], tuple[Result, str]]) -> Result:
    """Return what a function returns in each of several processes, or raise in all of them. All have to call this.

    Args:
        groups: of the processes, as :func:`groups_of` and :func:`processes_of` return them; none for one process alone.
        function: returns a result, and a digest that is the same in all processes where they are given the same.

    Raises:
        LoraFxError: the function raised in another process, or another has another digest; here it raises what the function does.
    """
    error: Exception | None = None
    told, digest, rank = "", "", distributed.get_rank() if groups else 0
    try:
        result, digest = function()
    except Exception as caught:  # whatever it is, no process is left waiting
        error, told = caught, f"process {rank} refused: {type(caught).__name__}: {caught}"
    for group in groups:
        every = [(told, digest, rank)] * group.size()
        distributed.all_gather_object(every, (told, digest, rank), group=group)
        refused = [message for message, *_ in every if message]
        other = next((number for _, theirs, number in every if theirs != digest), None)
        if refused:
            told = refused[0]
        elif other is not None:
            told = (
                f"process {other} has another graph than process {rank}, by a digest of its nodes and tensors: give all the same weights, "
                "rules and seed (rewrite(…, seed=0))."
            )
    if error is not None:
        raise error
    if told:
        raise LoraFxError(told)
    return result


def digest_of(graph_module: TracedGraphModule) -> str:
    """Return a digest of the nodes of a graph and of up to 4096 elements of each tensor."""
    digest = hashlib.sha256()
    for node in graph_module.graph.nodes:
        digest.update(f"{node.op} {node.target} {node.args} {node.kwargs}\n".encode())
    state = state_of(graph_module)
    for name in state.names():
        tensor = state.tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {state.tensors[name].requires_grad}".encode())
        if not tensor.is_meta:
            flat = tensor.reshape(-1)
            chosen = flat[:: max(1, len(flat) // _SAMPLES)].cpu().contiguous()
            digest.update(chosen.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_SAMPLES = 4096
"""How many elements of a tensor are in a digest, about."""


def gathered(graph_module: TracedGraphModule) -> TracedGraphModule | None:
    """Return a flat graph with whole tensors on the first process, and None on the others; a graph that is not sharded itself.

    All processes have to call it.
    """
    mesh, shards = mesh_of(graph_module), known_info(graph_module).shards
    if shards is not None:
        return _gathered_parts(graph_module, shards)
    if mesh is None:
        return graph_module
    state = state_in_parts(graph_module)
    whole: dict[int, torch.Tensor] = {}
    for tensor in {id(tensor): tensor for tensor in state.tensors.values()}.values():
        value = tensor.detach()
        if isinstance(value, DTensor):
            part: Any = value.to(mesh.device_type)
            value = part.full_tensor()  # with CPUOffloadPolicy the parts are elsewhere
        if _is_first(mesh):
            value = value.cpu()
            whole[id(tensor)] = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value
    if not _is_first(mesh):
        return None
    return assemble(
        copy_graph(graph_module.graph)[0],
        state.with_tensors({name: whole[id(tensor)] for name, tensor in state.tensors.items()}),
        meta=with_info(graph_module.meta, known_info(graph_module).flat),
        training=graph_module.training,
        trainable=trainable_names(graph_module),
    )


def _gathered_parts(graph_module: TracedGraphModule, shards: RankShards) -> TracedGraphModule | None:
    """Return the whole graph of which this one computes parts, on the first process, and None on the others."""
    if shards.whole is None:
        raise LoraFxError(
            f"this is the folded graph of process {shards.rank} of {shards.world}, which does not know the whole one: gather before the fold."
        )
    state, whole = state_in_parts(graph_module), dict[int, torch.Tensor]()
    for first in state.names():
        tensor = state.tensors[first]
        value = shards.gather(first, tensor)
        if shards.rank == 0:
            whole[id(tensor)] = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value
    if shards.rank:
        return None
    graph = restore(shards.whole)
    called = {str(node.target) for node in graph.find_nodes(op="call_module")}
    tensors = {name: whole[id(tensor)] for name, tensor in state.tensors.items()}
    return assemble(
        graph,
        state.without({name for name in state.modules if name not in called}).with_tensors(tensors),
        meta=with_info(graph_module.meta, replace(known_info(graph_module), shards=None)),
        training=graph_module.training,
        trainable=trainable_names(graph_module),
    )


def processes_of(module: nn.Module) -> list[distributed.ProcessGroup]:
    """Return the groups of the processes that have parts of a graph, from the first of a row to all of it, and from these to their columns."""
    mesh, shards = mesh_of(module), known_info(module).shards
    if shards is not None:
        return [shards.process_group()]
    return [] if mesh is None else groups_of(mesh)


def groups_of(mesh: DeviceMesh | None) -> list[distributed.ProcessGroup]:
    """Return the groups along the dimensions of a mesh; without one, the group of all processes, if there is one."""
    if mesh is not None:
        return [mesh.get_group(dim) for dim in range(mesh.ndim)]
    everyone = distributed.group.WORLD if distributed.is_available() and distributed.is_initialized() else None
    return [] if everyone is None else [everyone]


def _is_first(mesh: DeviceMesh) -> bool:
    return not any(mesh.get_coordinate() or ())
