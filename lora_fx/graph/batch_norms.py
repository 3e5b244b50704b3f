"""Batch norms of a graph: modules at the paths that they have in the model, which follow the mode. So are instance norms with statistics.

The tensors of such a norm are read by nodes, as all others are, and passed to the module, so that passes over graphs see them. In train
mode it normalises by the statistics of the batch and updates the running ones, which belong to the graph alone.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from lora_fx.graph.adapter_names import original_name
from lora_fx.torch_internals import BatchNormBase, NormBase

TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
"""Tensors of a batch norm, in the order in which a node passes them behind the input."""


class GivenBatchNorm(BatchNormBase):
    """A batch norm that is given its tensors with its input; those that it holds are the same, under its own names."""

    operator: Any = torch.ops.aten.batch_norm.default

    def __init__(self, features: int, eps: float, momentum: float | None, *, affine: bool) -> None:
        super().__init__(features, eps, momentum, affine=False, track_running_stats=False)
        self.affine, self.track_running_stats = affine, True

    def forward(  # type: ignore[override]
        self,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        num_batches_tracked: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the normalised input, ``(batch, features, …)``; in train mode, update the running statistics."""
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
            if self.momentum is None:  # the average over all batches
                factor = 1.0 / float(num_batches_tracked)
        return functional.batch_norm(input, running_mean, running_var, weight, bias, self.training, factor, self.eps)

    def _load_from_state_dict(self, *args: Any) -> None:
        # torch's own puts a counter into state dicts of old versions, which here may have no place.
        kind = nn.Module if self._buffers.get("num_batches_tracked") is None else NormBase
        kind._load_from_state_dict(self, *args)

    def bare(self) -> GivenBatchNorm:
        """Return a copy that holds no tensors and no parts."""
        held = (*self.parameters(recurse=False), *self.buffers(recurse=False), *self.children())
        made = copy.deepcopy(self, {id(each): None for each in held})
        made._modules.clear()
        return made


class GivenBatchNorm1d(GivenBatchNorm, nn.BatchNorm1d):
    """Of an input without or with one spatial dimension."""


class GivenBatchNorm2d(GivenBatchNorm, nn.BatchNorm2d):
    """Of images."""


class GivenBatchNorm3d(GivenBatchNorm, nn.BatchNorm3d):
    """Of volumes."""


class GivenInstanceNorm(GivenBatchNorm):
    """An instance norm with running statistics, which counts no batches: each example is normalised alone in train mode."""

    operator: Any = torch.ops.aten.instance_norm.default

    def forward(  # type: ignore[override]
        self,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        num_batches_tracked: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the normalised input, ``(batch, features, …)``; in train mode, update the running statistics."""
        del num_batches_tracked
        momentum = 0.0 if self.momentum is None else self.momentum
        return functional.instance_norm(
            input, running_mean, running_var, weight, bias, self.training, momentum, self.eps
        )


OPERATORS = (GivenBatchNorm.operator, GivenInstanceNorm.operator)
"""Operators of norms with running statistics; their first nine arguments mean the same."""

_BY_RANK: Mapping[int, type[GivenBatchNorm]] = {4: GivenBatchNorm2d, 5: GivenBatchNorm3d}


def batch_norm(
    operator: Any, rank: int, features: int, eps: float, momentum: float | None, *, affine: bool
) -> GivenBatchNorm:
    """Return the norm that an operator of :data:`OPERATORS` is, for inputs with so many dimensions."""
    by_rank = _BY_RANK.get(rank, GivenBatchNorm1d)
    kind = GivenInstanceNorm if operator is GivenInstanceNorm.operator else by_rank
    return kind(features, eps, momentum, affine=affine)


def whole_norms(
    graph: fx.Graph, modules: Mapping[str, nn.Module], parameters: Collection[str], buffers: Collection[str]
) -> list[str]:
    """Return the names of the running statistics of norms that have parameters, all of them among these, in graphs of both kinds."""
    found: list[str] = []
    for node in graph.nodes:
        is_module = node.op == "call_module" and isinstance(modules.get(str(node.target)), GivenBatchNorm)
        if is_module or node.target in OPERATORS:
            own, measured = (_names(node.args[first:last]) for first, last in ((1, 3), (3, 6 if is_module else 5)))
            if own and set(own) <= set(parameters):
                count = f"{measured[0].rpartition('.')[0]}.num_batches_tracked".removeprefix(".") if measured else ""
                found += [*measured, *[name for name in (count,) if name in buffers]]
    return list(dict.fromkeys(found))


def _names(nodes: Iterable[object]) -> list[str]:
    return [original_name(str(node.target)) or str(node.target) for node in nodes if isinstance(node, fx.Node)]


def copied_leaf(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a copy of a module that a graph calls; a batch norm gets its tensors where it is installed."""
    return module.bare() if isinstance(module, GivenBatchNorm) else copy.deepcopy(module, memo)


def statistics(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the names of the running statistics that a graph updates in train mode, and the path of the norm of each.

    Args:
        graph: of the norms.
        modules: that it calls, by their paths.
    """
    found: dict[str, str] = {}
    for node in graph.find_nodes(op="call_module"):
        if isinstance(modules.get(str(node.target)), GivenBatchNorm):
            read = [source for source in node.args[3:] if isinstance(source, fx.Node)]
            found.update((str(source.target), str(node.target)) for source in read)
    return found
