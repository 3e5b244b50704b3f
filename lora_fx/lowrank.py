"""Tensor arithmetic of low-rank adaptation (LoRA, arXiv 2106.09685); knows no graph.

y = x W^T + scaling · dropout(x) A^T B^T        A: (rank, in), B: (out, rank)
W' = W + scaling · B A                          for W: (out, in); transposed for W: (in, out)

For one part of a fused projection B has a row for each feature of the part, and the rows of W of other features stay.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import nn

from lora_fx.vocabulary import Init


@dataclass(frozen=True)
class Update:
    """One low-rank update ``scaling · … M₂ M₁``, of LoRA ``scaling · B A``.

    Attributes:
        factors: in the order in which they are applied to ``x``: ``(rank, in)``, then ``(out, rank)``.
        scaling: factor of the product.
        places: for each output feature the row of the product that is added to it, or the number of rows where none is;
            None where the product has a row for every feature.
    """

    factors: tuple[torch.Tensor, ...]
    scaling: float
    places: torch.Tensor | None = None

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the update as an ``(out, in)`` matrix, computed in ``dtype``."""
        first, *rest = (factor.detach().to(dtype) for factor in self.factors)
        product = self.scaling * reduce(lambda product, factor: factor @ product, rest, first)
        return product if self.places is None else nn.functional.pad(product, (0, 0, 0, 1))[self.places]

    def touched(self) -> torch.Tensor | None:
        """Return a mask of the output features that the update changes, or None if it changes all."""
        return None if self.places is None else self.places < self.factors[-1].shape[0]


def initial_factors(
    in_features: int, out_features: int, rank: int, like: torch.Tensor, init: Init = "kaiming"
) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A and B of a new branch: A random, B zero, so that the branch starts as zero.

    They are drawn on the CPU from torch's global generator, in the order of draws that PEFT has (each factor is first
    initialised as an ``nn.Linear``, then A once more), so that equal seeds give equal factors.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: of the update.
        like: the weight that the branch goes beside: gives the device, and the dtype unless that is a half-precision
            one, for which the factors are float32.
        init: of A: Kaiming-uniform with ``a = √5``, or normal with a standard deviation of ``1 / rank``.

    Returns:
        A of shape ``(rank, in_features)`` and B of shape ``(out_features, rank)``.
    """
    a, b = torch.empty(rank, in_features), torch.empty(out_features, rank)
    for factor in (a, b, a) if init == "kaiming" else (a, b):
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
    if init == "gaussian":
        nn.init.normal_(a, std=1 / rank)
    dtype = adapter_dtype(like.dtype)
    return nn.Parameter(a.to(like.device, dtype)), nn.Parameter(torch.zeros_like(b, dtype=dtype, device=like.device))


def adapter_dtype(weight: torch.dtype) -> torch.dtype:
    """Return the dtype of the factors beside a weight: float32 for half precision, else the weight's."""
    return torch.float32 if weight in (torch.float16, torch.bfloat16) else weight


def merged_weight(weight: torch.Tensor, updates: Sequence[Update], *, transposed: bool) -> torch.Tensor:
    """Return ``W + Σ scaling · B A``, rounded to the weight's dtype once.

    Products and sums are formed in float32 for float32 and bfloat16 weights, in float64 for float64 and float16 ones.

    Args:
        weight: ``(out, in)``, or ``(in, out)`` if ``transposed``.
        updates: the low-rank updates to add.
        transposed: the layout of the weight.
    """
    precision = torch.float32 if weight.dtype in (torch.float32, torch.bfloat16) else torch.float64
    total = reduce(operator.add, (update.product(precision) for update in updates))
    merged = (weight.detach().to(precision) + (total.T if transposed else total)).to(weight.dtype)
    masks = [update.touched() for update in updates]
    if any(mask is None for mask in masks):
        return merged
    touched = reduce(operator.or_, (mask for mask in masks if mask is not None))
    return torch.where(touched if transposed else touched[:, None], merged, weight.detach())
