"""Whole small files that strangers give: never a pipe or a device, and never more of them than a limit."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

CONFIG_BYTES = 2**24
"""Of a config at most: one with 21,000 labels has a million."""


def read_bounded(path: Path, most: int) -> bytes:
    """Return the bytes of a file, of which there are ``most`` at most: of a larger one nothing is kept.

    Raises:
        OSError: it cannot be read, is larger, or is no regular file: opening a pipe would wait for a writer, and a device has no end.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:  # noqa: PTH123 -- of a descriptor
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, and no file", str(path))
        data = b"" if found.st_size > most else file.read(most + 1)
        size = max(found.st_size, len(data))  # it may grow meanwhile
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {most:,} are read", str(path))
        return data
