"""Whole small files that strangers give: never a pipe or a device, and never more of them than a limit."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_bounded(path: Path, most: int) -> bytes:
    """Return the bytes of a file, and one more than ``most`` of them at most, by which one that is too large is told.

    Raises:
        OSError: it cannot be read, or is no regular file: opening a pipe would wait for a writer, and a device has no end.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:  # noqa: PTH123 -- of a descriptor
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, and no file", str(path))
        return file.read(most + 1)
