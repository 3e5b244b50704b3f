"""Operators of a fused graph: branches in few passes over memory; knows no graph.

z = y + s · h Bᵀ,   h = D(x) Aᵀ   where D drops, or is the identity

dh = s · dz B        dB = s · dzᵀ h        dA = dhᵀ D(x)        dx = Σ D(dh A)        dy = dz

Autograd's own operators compute this, and keep x, h and the factors. Where precisions mix (half-precision weights, factors of
single precision) they would keep x in the wide type, and cast dz there and back: the autograd functions here keep x as it is,
and cast it again. With dropout they would keep D(x) and a mask as large for each branch: the functions here keep x, and the
mask as bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import dropout, linear, pad
from torch.overrides import handle_torch_function, has_torch_function_unary

from lora_fx.numerics.bit_dropout import dropped, mask_of


def reduce_features(
    x: torch.Tensor, factors: Sequence[torch.Tensor], wide: torch.dtype | None = None, rates: Sequence[float] = ()
) -> tuple[torch.Tensor, ...]:
    """Return ``dropout(x) Aᵀ`` for every factor A; masks are drawn in the order of the factors, one for each that drops.

    Args:
        x: features are its last dimension.
        factors: ``(rank, in)`` each.
        wide: the dtype to which x is cast before the product, or None.
        rates: of the dropout before each factor; empty without any dropout.
    """
    if has_torch_function_unary(x):  # as of the proxy of a graph that is being written
        return handle_torch_function(reduce_features, (x,), x, factors, wide, rates)
    if any(rates):
        if torch.compiler.is_compiling():  # a compiler decides itself what it keeps of a mask
            value = x if wide is None else x.to(wide)
            return tuple(linear(dropout(value, rate), a) for a, rate in zip(factors, rates, strict=True))
        return _ReduceDropped.apply(x, wide, rates, *factors)  # type: ignore[no-any-return, no-untyped-call]
    if wide is None:
        return _products(x, factors)
    return _ReduceFeatures.apply(x, wide, *factors)  # type: ignore[no-any-return, no-untyped-call]


def add_update(
    base: torch.Tensor,
    reduced: torch.Tensor,
    factor: torch.Tensor,
    scaling: float,
    narrow: torch.dtype | None = None,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``base + scaling · reduced Bᵀ``.

    Args:
        base: the output of a site, or its sum with other updates.
        reduced: the result of :func:`reduce_features` for the branch.
        factor: B, ``(out, rank)``.
        scaling: of the branch.
        narrow: the dtype to which the sum is cast, or None.
        places: for each output feature the row of B that belongs to it, or the number of rows for none; None where each has
            its own.
    """
    if has_torch_function_unary(base):
        return handle_torch_function(add_update, (base,), base, reduced, factor, scaling, narrow, places)
    if places is not None:
        factor = pad(factor, (0, 0, 0, 1)).index_select(0, places)
    if narrow is None:
        return _sum(base, reduced, factor, scaling)
    return _AddUpdate.apply(base, reduced, factor, scaling, narrow)  # type: ignore[no-any-return, no-untyped-call]


def _products(x: torch.Tensor, factors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    if len(factors) == 1:
        return (linear(x, factors[0]),)
    ranks = [factor.shape[0] for factor in factors]
    return torch.split(linear(x, torch.cat(list(factors))), ranks, -1)


MIN_ELEMENTS = 2**16
"""Smallest output to which a product is added in place: for a smaller one that takes longer than two operators do."""


def _sum(base: torch.Tensor, reduced: torch.Tensor, factor: torch.Tensor, scaling: float) -> torch.Tensor:
    alike = (base.dtype, base.shape[:-1]) == (reduced.dtype, reduced.shape[:-1])  # autocast may have made them differ
    if torch.compiler.is_compiling() or base.numel() < MIN_ELEMENTS or not alike:
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


class _ReduceDropped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, wide: torch.dtype | None, rates: Sequence[float], *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        value = x if wide is None else x.to(wide)
        reduced: list[torch.Tensor] = []
        masks: list[torch.Tensor | None] = []
        for factor, rate in zip(factors, rates, strict=True):
            kept, mask = dropped(value, rate) if rate else (value, None)
            reduced.append(linear(kept, factor))
            masks.append(mask)
        _, _, _, *needs_factors = ctx.needs_input_grad
        ctx.save_for_backward(x if any(needs_factors) else None, *masks, *factors)
        ctx.rates, ctx.narrow, ctx.shape = rates, x.dtype, x.shape
        return tuple(reduced)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        masks, factors = tensors[: len(gradients)], tensors[len(gradients) :]
        dtype, shape = factors[0].dtype, (*_rows(gradients[0]).shape[:1], ctx.shape[-1])
        value = None if x is None else _rows(x).to(dtype)
        of_x: torch.Tensor | None = None
        of_factors: list[torch.Tensor | None] = []
        for gradient, packed, factor, rate in zip(gradients, masks, factors, ctx.rates, strict=True):
            mask = None if packed is None else mask_of(packed, shape, dtype)
            reduced = _rows(gradient).to(dtype)
            if 0 < rate < 1:
                reduced = reduced / (1 - rate)
            if needs_x:
                of_x = _accumulated(of_x, reduced @ factor, mask)
            if value is not None:
                of_factors.append(reduced.t() @ (value if mask is None else mask.mul_(value)))
        of_x = None if of_x is None else of_x.to(ctx.narrow).view(ctx.shape)
        return (of_x, None, None, *(of_factors or [None for _ in factors]))


def _accumulated(total: torch.Tensor | None, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Add a value to a sum, where there is one, and where the mask is one; either may be overwritten."""
    if total is None:
        return value if mask is None else value.mul_(mask)
    return total.add_(value) if mask is None else total.addcmul_(value, mask)


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
        wide = base.to(factor.dtype, memory_format=torch.contiguous_format)
        if wide is base or wide.dtype != reduced.dtype:  # under autocast
            return _sum(wide, reduced, factor, scaling).to(narrow)
        _rows(wide).addmm_(_rows(reduced), factor.t(), alpha=scaling)
        return wide.to(narrow)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        reduced, factor = ctx.saved_tensors
        rows = _rows(gradient).to(ctx.wide)
        of_reduced = of_factor = None
        if factor is not None:
            of_reduced = (rows @ factor).mul_(ctx.scaling).view(*gradient.shape[:-1], factor.shape[1])
        if reduced is not None:
            of_factor = (_rows(reduced).to(ctx.wide).t() @ rows).mul_(ctx.scaling).t()  # faster than rows first
        return gradient.to(ctx.base), of_reduced, of_factor, None, None
