"""Principal components of rows that come batch by batch (incremental PCA, Ross et al. 2008), as PEFT's EVA computes them.

Written out on ``torch.svd_lowrank``: scikit-learn's ``IncrementalPCA`` decomposes in full and on the CPU alone, and the package that PEFT
took its code from would be a dependency for these lines. The order of operations is PEFT's, so that ranks and factors come out equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Components:
    """Principal components of the rows so far.

    Attributes:
        count: of rows.
        mean: of the rows, ``(width,)``.
        spread: sum of the squared differences from it, ``(width,)``.
        vectors: unit vectors, ``(number, width)``, the largest first.
        values: singular value of each.
    """

    count: int
    mean: torch.Tensor
    spread: torch.Tensor
    vectors: torch.Tensor
    values: torch.Tensor

    @property
    def ratios(self) -> torch.Tensor:
        """The part of all variance that each vector explains."""
        return self.values**2 / self.spread.sum()


def extended(known: Components | None, rows: torch.Tensor, number: int) -> Components:
    """Return the components of the rows so far and of more rows; draws from torch's random state.

    ``[S V; X - mean(X); √(n m / (n + m)) (mean - mean(X))]`` has the right singular vectors of all rows without their mean.

    Args:
        known: those of ``n`` rows; None at first.
        rows: ``X``, ``(m, width)``, float32; at least ``number``.
        number: of components to keep.
    """
    own_mean = torch.mean(rows, dim=0)
    total = rows.sum(dim=0, dtype=torch.float64)
    apart = rows - total / len(rows)
    spread = apart.square().sum(dim=0, dtype=torch.float64)
    spread -= apart.sum(dim=0, dtype=torch.float64).square() / len(rows)
    if known is None:
        count, mean = len(rows), total / len(rows)
        stacked = (rows - mean).to(rows.dtype)
    else:
        count = known.count + len(rows)
        mean = (known.mean * known.count + total) / count
        over = known.count / len(rows)
        spread = known.spread + spread + over / count * (known.mean * known.count / over - total).square()
        shift = (known.count / count * len(rows)) ** 0.5 * (known.mean - own_mean)
        stacked = torch.vstack((known.values.view(-1, 1) * known.vectors, rows - own_mean, shift))
    _, values, right = torch.svd_lowrank(stacked, q=min(2 * number, *stacked.shape), niter=4)
    vectors = right.t()
    signs = torch.sign(vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)))
    return Components(count, mean, spread, (vectors * signs)[:number], values[:number])
