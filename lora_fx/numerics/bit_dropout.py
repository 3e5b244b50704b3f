"""Dropout with a mask of one bit for each element, for the backward pass; knows no graph.

Autograd keeps the mask as a tensor of the input's size, and the result as another. Drawing the mask a second time, from the
saved random state, would keep nothing; but drawing is most of the cost of dropout on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn


class DropoutRate(nn.Dropout):
    """The dropout of a branch whose node does the dropping itself, and asks at which rate."""

    def forward(self) -> float:  # type: ignore[override]
        """Return ``p`` in training, and zero in evaluation."""
        return self.p if self.training else 0.0


def dropped(x: torch.Tensor, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result of ``nn.Dropout`` from the same random state, bit for bit, and its mask as bits for :func:`mask_of`.

    Args:
        x: of floating point.
        rate: above 0. Elements that stay are divided by ``1 - rate``.
    """
    draws = rate < 1 and x.numel() > 0
    if draws and x.device.type in ("cuda", "xpu"):  # there torch draws, drops and scales in one pass
        value, kept = torch.native_dropout(x, rate, True)
        return value, _packed(kept)
    kept = torch.empty_like(x, dtype=torch.uint8)  # elements are drawn in the order of memory, so with the strides of x
    if not draws:
        return x * 0, _packed(kept.zero_())
    kept.bernoulli_(1 - rate)
    return kept.to(x.dtype).div_(1 - rate).mul_(x), _packed(kept)  # in place: fresh memory costs more than the product


def mask_of(packed: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return one for each element that stayed, and zero for each that was dropped.

    Args:
        packed: from :func:`dropped`.
        shape: of the mask: that of the dropped tensor, or its rows.
        dtype: of the mask.
    """
    words = packed.to(torch.int64).mul_(_EACH).bitwise_and_(_DIAGONAL).add_(_BELOW).bitwise_right_shift_(7)
    flat = words.bitwise_and_(_EACH).view(torch.uint8)
    return flat[: math.prod(shape)].view(*shape).to(dtype)


# Eight bytes in a word, the first in its lowest bits.
_EACH = 0x0101010101010101
_DIAGONAL = 0x8040201008040201 - 2**64  # of byte n the n-th bit
_BELOW = 0x7F7F7F7F7F7F7F7F  # added to a byte with at most one bit, it sets the highest if there is one
_GATHER = 0x0102040810204080  # moves the lowest bit of byte n to bit n of the highest byte


def _packed(kept: torch.Tensor) -> torch.Tensor:
    """Return eight bytes of zero or one in the bits of one."""
    flat = kept.view(torch.uint8).reshape(-1)
    if flat.numel() % 8:
        flat = nn.functional.pad(flat, (0, -flat.numel() % 8))
    return flat.view(torch.int64).mul(_GATHER).bitwise_right_shift_(56).to(torch.uint8)
