"""What the nodes of a fused graph compute: branches in few passes over memory; knows no graph.

z = y + s · h Bᵀ,   h = x Aᵀ

dh = s · dz B        dB = s · dzᵀ h        dA = dhᵀ x        dx = Σ dh A        dy = dz

Autograd's own operators do just that, and keep x, h and factors. Only where precisions mix (half-precision weights, factors of
single precision) would they keep x in the wide type, and cast dz there and back: functions of our own keep x as it is, and
cast it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def reduce_features(
    x: torch.Tensor, factors: Sequence[torch.Tensor], wide: torch.dtype | None = None
) -> tuple[torch.Tensor, ...]:
    """Return ``x Aᵀ`` for every factor A.

    Args:
        x: features are its last dimension.
        factors: ``(rank, in)`` each.
        wide: to which x is cast before, or None.
    """
    if wide is None:
        return _products(x, factors)
    return _ReduceFeatures.apply(x, wide, *factors)  # type: ignore[no-any-return, no-untyped-call]


def add_update(
    base: torch.Tensor,
    reduced: torch.Tensor,
    factor: torch.Tensor,
    scaling: float,
    narrow: torch.dtype | None = None,
) -> torch.Tensor:
    """Return ``base + scaling · reduced Bᵀ``.

    Args:
        base: the output of a site, or its sum with other updates.
        reduced: what :func:`reduce_features` returned for the branch.
        factor: B, ``(out, rank)``.
        scaling: of the branch.
        narrow: to which the sum is cast, or None.
    """
    if narrow is None:
        return _sum(base, reduced, factor, scaling)
    return _AddUpdate.apply(base, reduced, factor, scaling, narrow)  # type: ignore[no-any-return, no-untyped-call]


def _products(x: torch.Tensor, factors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    if len(factors) == 1:
        return (linear(x, factors[0]),)
    ranks = [factor.shape[0] for factor in factors]
    return torch.split(linear(x, torch.cat(list(factors))), ranks, -1)


def _sum(base: torch.Tensor, reduced: torch.Tensor, factor: torch.Tensor, scaling: float) -> torch.Tensor:
    if (base.dtype, base.shape[:-1]) != (reduced.dtype, reduced.shape[:-1]):  # autocast may have made them differ
        return base + scaling * linear(reduced, factor)
    return torch.addmm(_rows(base), _rows(reduced), factor.t(), alpha=scaling).view(base.shape)


def _rows(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1, value.shape[-1])


class _ReduceFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, wide: torch.dtype, *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        needs_x, _, *needs_factors = ctx.needs_input_grad
        ctx.save_for_backward(x if any(needs_factors) else None, *(factors if needs_x else ()))
        ctx.wide, ctx.narrow, ctx.shape, ctx.ranks = wide, x.dtype, x.shape, [factor.shape[0] for factor in factors]
        return _products(x.to(wide), factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        gradient = _rows(torch.cat(gradients, -1).to(ctx.wide))
        of_x = (gradient @ torch.cat(factors)).to(ctx.narrow).view(ctx.shape) if factors else None
        if x is None:
            return (of_x, None, *(None for _ in gradients))
        return (of_x, None, *(gradient.t() @ _rows(x.to(ctx.wide))).split(ctx.ranks))


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        reduced: torch.Tensor,
        factor: torch.Tensor,
        scaling: float,
        narrow: torch.dtype,
    ) -> torch.Tensor:
        _, needs_reduced, needs_factor, *_ = ctx.needs_input_grad
        ctx.save_for_backward(reduced if needs_factor else None, factor if needs_reduced else None)
        ctx.scaling, ctx.wide, ctx.base = scaling, factor.dtype, base.dtype
        return _sum(base.to(factor.dtype), reduced, factor, scaling).to(narrow)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        reduced, factor = ctx.saved_tensors
        rows = _rows(gradient).to(ctx.wide)
        of_reduced = of_factor = None
        if factor is not None:
            of_reduced = (rows @ factor).mul_(ctx.scaling).view(*gradient.shape[:-1], factor.shape[1])
        if reduced is not None:
            of_factor = (rows.t() @ _rows(reduced).to(ctx.wide)).mul_(ctx.scaling)
        return gradient.to(ctx.base), of_reduced, of_factor, None, None
