"""Small integers that lie several to a word of 32 bits, as GPTQ's and AWQ's checkpoints have them."""

from __future__ import annotations

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of eight neighbouring output features in a word of AWQ's GEMM format, from the low bits up."""


def unpacked(words: torch.Tensor, bits: int, dim: int, count: int) -> torch.Tensor:
    """Return the integers of which words are made, uint8, in a matrix that is ``32 / bits`` times as long along one dimension.

    The words along that dimension are one sequence of bits, the lowest first, in which every ``bits`` are an integer. So a word may end
    within an integer of 3 bits.

    Args:
        words: int32, of shape ``(rows, columns)``.
        bits: of an integer, 1 to 8.
        dim: along which integers are packed, 0 or 1.
        count: how many there are; more may fit into the last word.
    """
    lines = words.movedim(dim, 0)
    found = torch.empty((count, lines.shape[1]), dtype=torch.uint8, device=words.device)
    step = max(1, _PART // max(1, lines.shape[1]))
    for start in range(0, count, step):  # in parts, since each integer takes 8 bytes here
        places = torch.arange(start, min(start + step, count), device=words.device) * bits
        word, shift = places // 32, places % 32
        low = lines[word].long() & 0xFFFFFFFF
        high = lines[(word + 1).clamp(max=len(lines) - 1)].long() & 0xFFFFFFFF
        both = low >> shift[:, None] | high << (32 - shift[:, None])
        found[start : start + step] = (both & (1 << bits) - 1).to(torch.uint8)
    return found.movedim(0, dim)


_PART = 2**20


def in_awq_order(codes: torch.Tensor) -> torch.Tensor:
    """Return output features in their order, of a matrix ``(in, out)`` whose words of eight have them as :data:`AWQ_ORDER` says."""
    inverse = [AWQ_ORDER.index(place) for place in range(8)]
    words: torch.Tensor = codes.view(len(codes), -1, 8)
    return words[:, :, inverse].flatten(1)
