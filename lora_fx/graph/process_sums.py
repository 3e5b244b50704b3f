"""Tensor parallelism in a graph: sums over the processes of a group, and the record of which tensors each process has a part of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import distributed, fx, nn

from lora_fx.graph.pickling import GraphRecord
from lora_fx.torch_internals import all_gather_into_tensor, all_reduce, resolve_process_group, wait_tensor


class _OverProcesses(nn.Module):
    """An operator over the processes of a group, which is known by its name."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self.group = group


class SumOverProcesses(_OverProcesses):
    """The sum of a value over the processes of a group; its gradient, the same on all, is passed on (Megatron's g, arXiv 1909.08053)."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the shape of ``value``."""
        if not (torch.is_grad_enabled() and value.requires_grad):
            return _summed(value, self.group)
        summed: torch.Tensor = _SumWithSameGradient.apply(value, self.group)  # type: ignore[no-untyped-call]
        return summed


class SumOfGradients(_OverProcesses):
    """A value that processes go on to compute parts with, unchanged; its gradient is the sum of theirs (Megatron's f, arXiv 1909.08053)."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the shape of ``value``."""
        if not (torch.is_grad_enabled() and value.requires_grad):
            return value
        same: torch.Tensor = _SumOfGradients.apply(value, self.group)  # type: ignore[no-untyped-call]
        return same


def _summed(value: torch.Tensor, group: str) -> torch.Tensor:
    found: torch.Tensor = wait_tensor(all_reduce(value.contiguous(), "sum", group))
    return found


class _SumWithSameGradient(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, value: torch.Tensor, group: str) -> torch.Tensor:
        return _summed(value, group)

    @staticmethod
    def backward(_ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: str) -> torch.Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _summed(gradient, ctx.group), None


@dataclass(frozen=True)
class Shard:
    """How a dimension is divided: each of its blocks in equal parts, of which process r has the r-th of each.

    Attributes:
        dim: from 0.
        blocks: sizes whose sum is that of the dimension: one, or those of query, key and value in one weight.
    """

    dim: int
    blocks: tuple[int, ...]

    def divides(self, world: int) -> bool:
        """Tell whether so many processes get equal parts."""
        return all(size % world == 0 for size in self.blocks)

    def part(self, whole: torch.Tensor, rank: int, world: int) -> torch.Tensor:
        """Return the part of one process, in storage of its own."""
        blocks = whole.detach().split(list(self.blocks), self.dim)
        return torch.cat([block.chunk(world, self.dim)[rank] for block in blocks], self.dim)

    def whole(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return the tensor of which these are the parts, in the order of the processes."""
        sizes = [size // len(parts) for size in self.blocks]
        columns = zip(*(part.split(sizes, self.dim) for part in parts), strict=True)
        return torch.cat([piece for pieces in columns for piece in pieces], self.dim)


@dataclass(frozen=True)
class RankShards:
    """The share of one process in a graph.

    Attributes:
        rank: of the process in its group.
        world: size of the group.
        group: its name.
        shards: the first names of the tensors that are divided.
        whole: the nodes of the whole graph; None after a fold, which has no adapter to be saved.
    """

    rank: int
    world: int
    group: str
    shards: Mapping[str, Shard]
    whole: GraphRecord | None

    @property
    def folded(self) -> RankShards:
        """The same share of a folded graph."""
        return replace(self, whole=None)

    def process_group(self) -> distributed.ProcessGroup:
        """Return the group of the processes."""
        group: distributed.ProcessGroup = resolve_process_group(self.group)  # type: ignore[arg-type]
        return group

    def gather(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """Return a whole tensor of this name. All processes call this, in the same order."""
        shard = self.shards.get(name)
        if shard is None:
            return part.detach()
        joined = all_gather_into_tensor(part.detach().contiguous(), self.world, self.group)
        return shard.whole(list(wait_tensor(joined).chunk(self.world)))


def gradient_sums_of(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes that compute nothing but sums of gradients."""
    calls = graph_module.graph.find_nodes(op="call_module")
    return [node for node in calls if isinstance(graph_module.get_submodule(str(node.target)), SumOfGradients)]
