"""New memory in large pages, where Linux gives them on request: to touch small ones first takes longer than to merge a weight into them."""

from __future__ import annotations

import ctypes
import mmap

import torch

_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # of Linux alone
_MIN_BYTES = 2**22
"""Two large pages: below, none may lie inside."""


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape, dtype, strides and device with values of no meaning, as ``torch.empty_like`` does.

    Large pages are a wish: where the system does not know it, or does not grant it, the memory is as it always is.
    """
    made = torch.empty_like(tensor)
    if made.device.type == "cpu" and made.nbytes >= _MIN_BYTES and _ADVICE is not None:
        # Only whole pages of the tensor's own may be advised on; transparent_hugepage/enabled is "madvise" on most distributions.
        start = -(-made.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (made.data_ptr() + made.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _ADVICE)
    return made
