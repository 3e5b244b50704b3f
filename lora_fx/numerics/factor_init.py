"""Initial values of the two factors of a new branch, drawn as PEFT draws them, so that equal seeds give equal adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from lora_fx.rules.vocabulary import Draw, Op


def initial_factors(
    shapes: tuple[Sequence[int], Sequence[int]],
    rank: int,
    like: torch.Tensor,
    *,
    computed: torch.dtype | None = None,
    op: Op = "linear",
    init: Draw = "kaiming",
) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A and B of a new branch, one random and one zero, so that the branch starts as zero; with ``"random"`` both random.

    They are drawn on the CPU from torch's global generator, in the order of draws that PEFT has (each factor is first
    initialised as its layer is, then once more), and rounded as PEFT rounds them, so that equal seeds give equal factors.

    Args:
        shapes: of A and of B.
        rank: of the update.
        like: the weight that the branch goes beside: gives the device and the dtype.
        computed: the dtype in which the site multiplies, if that is not the weight's. Factors are float32 beside half precision.
        op: of the site. Beside an embedding A is zero and B is normal, else B is zero.
        init: of A otherwise: Kaiming-uniform with ``a = √5``, or normal with a standard deviation of ``1 / rank``; or both factors as
            their layers start.
    """
    a, b = (torch.empty(*shape) for shape in shapes)
    if op == "embedding":
        for factor in (a, b) if init == "random" else (a, b, b):
            nn.init.normal_(factor)
        if init != "random":
            a.zero_()
    else:
        for factor in (a, b, a) if init == "kaiming" else (a, b):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        if init == "gaussian":
            nn.init.normal_(a, std=1 / rank)
        if init != "random":
            b.zero_()
    dtype = adapter_dtype(computed or like.dtype)
    a, b = (factor.to(like.device, like.dtype).to(dtype) for factor in (a, b))
    return nn.Parameter(a), nn.Parameter(b)


def adapter_dtype(computed: torch.dtype) -> torch.dtype:
    """Return the dtype of the factors beside a site that computes in a dtype: float32 for half precision, else that."""
    return torch.float32 if computed in (torch.float16, torch.bfloat16) else computed
