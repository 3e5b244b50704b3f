"""Bytes between files and memory: past the page cache where the system can, and by the kernel alone where nothing changes.

Copying to the page cache, and finding memory for it, takes the processor longer than merging a weight does.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

import torch

from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import write_back_early
from lora_fx.files.safetensors import fill

PIECE = 2**23
"""How many bytes are copied in one step, and written in one call."""

PAGE = 4096
"""Alignment of places in a file and in memory between which bytes go without a copy."""


@contextmanager
def reading(path: Path, size: int | None = None) -> Iterator[FileIO]:
    """Yield a file of the checkpoint, which is still of its size. An error of it is not one of writing."""
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise LoraFxError(f"cannot read {path}: {error.strerror or error}.") from error
    with file:
        found = os.fstat(file.fileno()).st_size
        if size is not None and found != size:
            raise LoraFxError(
                f"{path} changed while it was read: it had {size} bytes, and has {found}. Fold once more."
            )
        yield file


def read_at(file: FileIO, buffer: memoryview, start: int) -> None:
    """Fill a buffer with the bytes of a file from a place on. An error says that it is the reading that failed."""
    try:
        file.seek(start)
        fill(buffer, file.readinto)
    except EOFError as error:
        raise LoraFxError(f"{file.name} became shorter while it was read. Fold once more.") from error
    except OSError as error:
        raise LoraFxError(f"cannot read {file.name}: {error.strerror or error}.") from error


def aligned_memory(size: int) -> torch.Tensor:
    """Return memory for that many bytes, which may begin anywhere in its first page."""
    memory = torch.empty(size + 2 * PAGE, dtype=torch.uint8)
    return memory[-memory.data_ptr() % PAGE :]


def place_in_page(buffer: torch.Tensor, start: int, size: int, itemsize: int = 1) -> torch.Tensor:
    """Return memory for some bytes of a file, at the same place within its page as theirs if elements may lie there.

    Args:
        buffer: see :func:`aligned_memory`.
        start: where the bytes begin in the file.
        size: how many there are.
        itemsize: of the elements that they are.
    """
    return buffer[0 if start % itemsize else start % PAGE :][:size]


@contextmanager
def direct_descriptor(path: Path) -> Iterator[int | None]:
    """Yield a descriptor to write whole pages past the page cache, or None where the system or the file system cannot.

    Copying to the page cache, and finding memory for it, takes the processor longer than all else that is done here.
    """
    descriptor = None
    if hasattr(os, "O_DIRECT"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def write_at(new: FileIO, buffer: memoryview, start: int, direct: int | None = None) -> None:
    """Write some bytes: whole pages directly where that is possible, and all else as usual."""
    done, whole = min(-start % PAGE, len(buffer)), len(buffer) - (start + len(buffer)) % PAGE
    _write_usually(new, buffer[:done], start)
    if direct is not None:
        with suppress(OSError):  # where it cannot after all, or the disk is full: that will be seen without it too
            while done < whole:
                done += os.pwrite(direct, buffer[done : min(whole, done + PIECE)], start + done)
    _write_usually(new, buffer[done:], start + done)


def _write_usually(new: FileIO, buffer: memoryview, start: int) -> None:
    done = 0
    new.seek(start)
    while done < len(buffer):
        count = new.write(buffer[done : done + PIECE]) or 0
        write_back_early(new.fileno(), start + done, count)
        done += count


def copy_bytes(file: FileIO, new: FileIO, start: int, end: int, shift: int = 0) -> None:
    """Copy some bytes to another file, ``shift`` bytes further back: within the kernel where it can, else through a small buffer."""
    done = _copied_by_kernel(file.fileno(), new.fileno(), start, end, shift)
    buffer = memoryview(bytearray(min(2**20, end - done)))
    while done < end:
        part = buffer[: end - done]
        read_at(file, part, done)
        write_at(new, part, done + shift)
        done += len(part)


def _copied_by_kernel(file: int, new: int, start: int, end: int, shift: int) -> int:
    """Return up to where the kernel copied."""
    done = start
    while done < end and hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(file, new, min(PIECE, end - done), done, done + shift)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            break  # it cannot, or which side failed will be seen without it
        if count == 0:
            break
        write_back_early(new, done + shift, count)
        done += count
    return done


def copy_file(source: Path, target: Path) -> None:
    """Copy all bytes of a file."""
    with reading(source) as file, target.open("wb", buffering=0) as new:
        copy_bytes(file, new, 0, os.fstat(file.fileno()).st_size)
