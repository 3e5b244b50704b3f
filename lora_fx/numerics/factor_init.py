"""Initial values of the two factors of a new branch, drawn as PEFT draws them, so that equal seeds give equal adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.numerics.schemes import CodebookScheme
from lora_fx.rules.vocabulary import Op, Start


def initial_factors(
    shapes: Sequence[Sequence[int]],
    rank: int,
    like: torch.Tensor,
    *,
    computed: torch.dtype | None = None,
    op: Op = "linear",
    init: Start = "kaiming",
) -> tuple[nn.Parameter, ...]:
    """Return A and B of a new branch, and the bias of B if it has one.

    One factor is random and the rest zero, so that the branch starts as zero; with ``"random"`` all are random.

    They are drawn on the CPU from torch's global generator, in the order of draws that PEFT has (each factor is first
    initialised as its layer is, then once more), and rounded as PEFT rounds them, so that equal seeds give equal factors.

    Args:
        shapes: of A and of B, and of the bias of B if it has one.
        rank: of the update.
        like: the weight that the branch goes beside: gives the device and the dtype.
        computed: the dtype in which the site multiplies, if that is not the weight's. Factors are float32 beside half precision.
        op: of the site. Beside an embedding A is zero and B is normal, else B is zero.
        init: of A otherwise: Kaiming-uniform with ``a = √5``, or normal with a standard deviation of ``1 / rank``; both factors as
            their layers start (``"random"``); or ``"orthogonal"``, of an even rank.
    """
    a, b, *biases = (torch.empty(*shape) for shape in shapes)
    if op == "embedding":
        for factor in (a, b) if init == "random" else (a, b, b):
            nn.init.normal_(factor)
        if init != "random":
            a.zero_()
    else:
        for factor in (a, b):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        for bias in biases:  # as its layer starts
            bound = 1 / math.sqrt(b[0].numel())
            nn.init.uniform_(bias, -bound, bound)
        if init == "kaiming":
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if init == "gaussian":
            nn.init.normal_(a, std=1 / rank)
        if init == "orthogonal":
            a, b = _orthogonal(rank, a.shape[1], b.shape[0])
        for factor in biases if init == "orthogonal" else (b, *biases) if init != "random" else ():
            factor.zero_()
    dtype = adapter_dtype(computed or like.dtype)
    return tuple(nn.Parameter(each.to(like.device, like.dtype).to(dtype)) for each in (a, b, *biases))


def adapter_dtype(computed: torch.dtype) -> torch.dtype:
    """Return the dtype of the factors beside a site that computes in a dtype: float32 for half precision, else that."""
    return torch.float32 if computed in (torch.float16, torch.bfloat16) else computed


def _orthogonal(rank: int, wide: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random A and B with ``B A = 0`` but for rounding: their inner spaces are the odd and the even rows of one orthogonal matrix."""
    inner, _ = torch.linalg.qr(torch.randn(rank, rank))
    a = torch.randn(wide, rank // 2).mm(inner[0::2]).T / 10.0
    b = torch.randn(rank // 2, high).T.mm(inner[1::2]) / 10.0
    return a.contiguous(), b.contiguous()


@dataclass(frozen=True)
class Split:
    """A weight as the sum of a product and a rest: ``W = rest + scale · B A``.

    Attributes:
        a: ``(rank, in)``, float32.
        b: ``(out, rank)``, float32.
        rest: ``(out, in)``, rounded to the dtype of the weight.
    """

    a: torch.Tensor
    b: torch.Tensor
    rest: torch.Tensor


def split(weight: torch.Tensor, rank: int, scale: float, start: Start) -> Split:
    """Split a weight ``(out, in)`` as PEFT does, in float32.

    PiSSA (arXiv 2404.02948, section 3): ``B A`` has the largest singular values, of which each factor has the root; with
    ``pissa_niter_<n>`` from a randomised decomposition, which draws from torch's random state. OLoRA (arXiv 2406.01775): ``Q`` and ``R`` of a
    QR decomposition, cut to the rank.
    """
    wide = weight.to(torch.float32)
    if start == "olora":
        q, r = torch.linalg.qr(wide)
        a, b = r[:rank].contiguous(), q[:, :rank].contiguous()
    else:
        if start == "pissa":
            left, values, right = torch.linalg.svd(wide, full_matrices=False)
            left, values, right = left[:, :rank], values[:rank], right[:rank]
        else:
            left, values, right = torch.svd_lowrank(wide, rank, niter=int(start.rpartition("_")[2]))
            right = right.t()
        roots = torch.diag(torch.sqrt(values / scale))
        a, b = roots @ right, left @ roots
    return Split(a, b, (wide - scale * b @ a).to(weight.dtype))


def minor_factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A of zeros, and B of the left singular vectors of a weight ``(out, in)`` of its smallest singular values (arXiv 2604.01694)."""
    left, _, _ = torch.linalg.svd(weight.to(torch.float32), full_matrices=False)
    return torch.zeros(rank, weight.shape[1], device=weight.device), left[:, -rank:].contiguous()


def casts_first(weight: torch.Tensor) -> bool:
    """Tell whether PEFT casts an update before the sum: its layers for bitsandbytes do, all others add in the wider dtype."""
    return isinstance(weight, QuantisedWeight) and isinstance(weight.scheme, CodebookScheme)
