"""Arithmetic of task vectors: tensors of one shape become one, by pruning, election of signs, and a weighted sum.

magnitude   of n elements, keep the ⌊density · n⌋ of the largest magnitude     (TIES, arXiv 2306.01708)
random      keep each with the probability density, and divide it by that      (DARE, arXiv 2311.03099)
election    for each element, one sign: that of the sum, or of most tensors. The mean of those that have it takes the place of the sum
            (TIES)

The order of operations is that of PEFT's ``merge_utils``, so that equal tensors give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Pruning = Literal["magnitude", "random"]
MajoritySign = Literal["total", "frequency"]


@dataclass(frozen=True)
class TaskArithmetic:
    """How several tensors become one.

    Attributes:
        pruning: which elements of each tensor are kept; None keeps all.
        density: the fraction of elements that pruning keeps, above 0 and up to 1.
        majority: what elects the sign of each element, the sum of the values or the number of tensors; None: there is no election.
    """

    pruning: Pruning | None = None
    density: float = 1.0
    majority: MajoritySign | None = None

    def merged(self, tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        """Return one tensor in place of several, of their shape and dtype. Random pruning draws from torch's global generator."""
        stacked = torch.stack([self._pruned(tensor) for tensor in tensors])
        factors = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)
        weighted = stacked * factors.view(-1, *[1] * (stacked.dim() - 1))
        if self.majority is None:
            return weighted.sum(0)
        signs = stacked.sign()
        total = (stacked if self.majority == "total" else signs).sum(0)
        elected = signs == torch.where(total >= 0, 1, -1)
        return (weighted * elected).sum(0) / elected.sum(0).clamp(min=1).to(weighted.dtype)

    def _pruned(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.pruning is None or self.density == 1:
            return tensor
        if self.pruning == "magnitude":
            kept = torch.zeros_like(tensor).flatten()
            kept[tensor.abs().flatten().topk(int(self.density * tensor.numel())).indices] = 1
            return tensor * kept.view_as(tensor)
        drawn = torch.bernoulli(torch.full(tensor.shape, self.density, dtype=tensor.dtype))
        return tensor * drawn.to(tensor.device) / self.density


def nearest_factors(matrix: torch.Tensor, rank: int, clamp: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B whose product is the nearest to a matrix that their rank allows, by its singular values (Eckart–Young).

    ``matrix = U S Vᵀ``; B is ``U S``, A is ``Vᵀ``, both of the largest ``rank`` singular values.

    Args:
        matrix: ``(out, in)``.
        rank: up to the smaller of the two.
        clamp: a quantile of the elements of both factors; all are clamped to it and its negative, which is PEFT's ``svd_clamp``.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    b, a = left[:, :rank] @ torch.diag(values[:rank]), right[:rank]
    if clamp is not None:
        bound = torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp)
        a, b = a.clamp(-bound, bound), b.clamp(-bound, bound)
    return a.contiguous(), b.contiguous()
