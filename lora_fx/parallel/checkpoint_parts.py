"""A base that no single memory holds: each process reads its parts of a graph, traced on meta, from a safetensors checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lora_fx.adapters.covered_sizes import covered_sizes, stand_ins, with_checks
from lora_fx.adapters.materialize import check_filled, check_layers_keep_names, computed_buffers, initial_values
from lora_fx.branches.remove import unload
from lora_fx.errors import PlanError
from lora_fx.folding.checkpoint import Checkpoint
from lora_fx.graph.adapter_names import is_of_adapter, is_placement
from lora_fx.graph.graph_module import TracedGraphModule, as_traced, install, rebuilt, state_in_parts, state_of
from lora_fx.graph.info import info_of, with_info
from lora_fx.graph.nested import flatten
from lora_fx.graph.process_state import forked_random_state
from lora_fx.graph.sharded import agreed, from_first_process, groups_of, mesh_of
from lora_fx.graph.state import State, part_of
from lora_fx.graph.take_over import take_checks
from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.parallel.checkpoint_sources import Sources
from lora_fx.parallel.fsdp import fully_shard
from lora_fx.tracing.transformers_models import traced_class


def load_sharded(
    graph_module: TracedGraphModule,
    directory: str | os.PathLike[str],
    mesh: DeviceMesh | None = None,
    *,
    seed: int | None = None,
    like: nn.Module | None = None,
    **options: Any,
) -> None:
    """Shard a graph that was traced on the meta device, as :func:`fully_shard` does, and give it its weights (in place).

    No process ever holds the base: each reads its parts of the tensors from the files. Factors are those that one process would draw, and
    what else an adapter starts with follows from one gathered weight at a time. The result computes the bits of a graph that was made of
    the model with its weights, and takes the same sizes: the model is run once on the device at sizes that a trace on meta excludes, with
    made-up weights in almost no memory::

        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        graph = lora_fx.rewrite(model, rules="auto")
        lora_fx.parallel.load_sharded(graph, "checkpoint", seed=0)

    Args:
        graph_module: is changed; all of its parameters are on the meta device.
        directory: with ``model.safetensors``, or an index and its files, as transformers writes and loads them: keys may have other names
            than in the model, and experts of which the model has one stack may be matrices of their own.
        mesh: as for :func:`fully_shard`.
        seed: of the factors that are drawn; by default they follow from the random state of the first process.
        like: a module of the traced class with values for the buffers that no checkpoint has; see :func:`lora_fx.materialize`.
        options: of torch's ``fully_shard``.

    Raises:
        LoraFxError: the checkpoint does not fit the graph, with all problems, or see :func:`fully_shard`; the graph is as it was.
        PlanError: the graph has weights already, or an adapter that starts from whole weights in a way that is not known here.
    """
    source = agreed(groups_of(mesh), lambda: (_source(graph_module, directory, mesh, like), str(seed)))
    empty, before, checkpoint, sources = source.empty, state_of(source.empty), source.checkpoint, source.sources
    fully_shard(graph_module, mesh, **options)
    sharded = state_in_parts(graph_module)
    made_for = mesh_of(graph_module)
    assert made_for is not None
    device = torch.device(made_for.device_type)
    values = {name: _empty_like(sharded.tensors[name], device) for name in (*sources.plain, *sources.stacks)}
    for portion in _portions(sources.plain, checkpoint):
        load(
            {sources.plain[name]: values[name] for name in portion},
            storage_reader=HuggingFaceStorageReader(str(checkpoint.model)),
        )
    for name in sources.stacks:
        sources.fill(name, values[name], checkpoint)
    missing = {
        name: tensor for name, tensor in before.tensors.items() if name not in before.non_persistent and tensor.is_meta
    }
    missing = {name: tensor for name, tensor in missing.items() if is_of_adapter(name)}
    first = before.aliases()
    by_name = {name: values[alias] for name, alias in first.items() if alias in values}
    # The order in which tensors are asked for is that of the graph, and so the same in all processes.
    whole = _Whole({**before.tensors, **by_name})
    random = from_first_process(graph_module, torch.get_rng_state)
    with forked_random_state(seed=seed):
        if seed is None:
            torch.set_rng_state(random)
        started = initial_values(empty, missing, whole, device, None)
    values |= {name: _part(value, sharded.tensors[name]) for name, value in started.items()}
    graph_module.load_state_dict(values, strict=False, assign=True)
    plain = computed_buffers(before, source.like, device)
    plain |= {name: tensor.to(device) for name, tensor in before.tensors.items() if is_placement(name)}
    install(graph_module, State(plain, before.non_persistent))
    now = state_in_parts(graph_module)
    check_filled(now.tensors)
    info = info_of(graph_module)
    info = replace(info, statistics={name: now.tensors[name].clone() for name in info.statistics})
    if source.covering is not None:
        info = replace(info, examples=info_of(source.covering).examples)
    graph_module.meta.update(with_info(graph_module.meta, info))
    if source.covering is not None:
        take_checks(graph_module, source.covering)


@dataclass(frozen=True)
class _Source:
    """What the weights of a graph are read from.

    Attributes:
        empty: the graph, flat, on the meta device.
        checkpoint: that has its weights.
        sources: where these are in the checkpoint.
        like: a module with the buffers that no checkpoint has, if there is one.
        covering: the graph with other checks of sizes, if there are other ones.
    """

    empty: TracedGraphModule
    checkpoint: Checkpoint
    sources: Sources
    like: nn.Module | None
    covering: TracedGraphModule | None


def _source(
    graph_module: TracedGraphModule, directory: str | os.PathLike[str], mesh: DeviceMesh | None, like: nn.Module | None
) -> _Source:
    """Check that a graph gets its weights from a checkpoint; see :func:`load_sharded`."""
    empty = flatten(as_traced(graph_module))
    if any(not parameter.is_meta for parameter in empty.parameters()):
        raise PlanError(
            "expected a graph on the meta device, got one with weights: lora_fx.parallel.fully_shard shards these."
        )
    check_layers_keep_names(empty)
    checkpoint = Checkpoint.open(Path(directory))
    like = like if like is not None else traced_class(empty)
    sources = Sources.of(state_of(empty), checkpoint, like)
    return _Source(empty, checkpoint, sources, like, None if like is None else _covering(empty, like, mesh))


def _covering(empty: TracedGraphModule, like: nn.Module, mesh: DeviceMesh | None) -> TracedGraphModule | None:
    """Return a graph on the meta device with the checks that it would have, had it been traced with its weights; None where that is not known."""
    base = unload(empty)
    state = state_of(base)
    if any(isinstance(tensor, QuantisedWeight) for tensor in state.tensors.values()):  # which fully_shard refuses
        return None
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = device if mesh is None else torch.device(mesh.device_type)
    values = {**stand_ins(state, device), **computed_buffers(state, like, device)}
    if any(
        tensor.is_meta for name, tensor in state.tensors.items() if name not in values
    ):  # no weights, and so not made up
        return None
    covered = covered_sizes(rebuilt(base, tensors=values, training=False), like)
    return None if covered is None else with_checks(empty, *covered)


class _Whole(Mapping[str, torch.Tensor]):
    """Tensors by name, of which each is gathered when it is asked for, and not kept."""

    def __init__(self, parts: Mapping[str, torch.Tensor]) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> torch.Tensor:
        part = self._parts[name]
        return part.full_tensor() if isinstance(part, DTensor) else part

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _empty_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return torch.empty_like(tensor, device=device)
    local = torch.empty_like(tensor.to_local(), device=device)
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _part(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return part_of(value.detach(), like) if isinstance(like, DTensor) else value.detach()


def _portions(keys: Mapping[str, str], checkpoint: Checkpoint) -> list[list[str]]:
    """Return the names of tensors in portions, since what is read of a file stays in memory until the file is closed."""
    sizes = {name: checkpoint.tensors[key][1].size for name, key in keys.items()}
    limit, portions, held = sum(sizes.values()) / PORTIONS, list[list[str]](), 0
    for name, size in sizes.items():
        if not portions or held + size > limit:
            portions, held = [*portions, []], 0
        portions[-1].append(name)
        held += size
    return portions


PORTIONS = 20
"""In about how many portions a checkpoint is read."""
