"""Writing files and directories so that a name never holds half a result, whatever ends the writing."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from lora_fx.errors import WriteError
from lora_fx.files.target import Target

try:
    import fcntl
except ImportError:  # not on Windows: there what a killed process leaves is not looked for
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(target: Target) -> Iterator[Path]:
    """Yield a path beside a target to write a file or a directory to; move it into place if the block succeeds.

    All bytes are on the disk before the move. At every moment the target is the old one or the new one, whole, also when the
    process is killed or the machine stops; the scratch beside it is removed when the block fails, and at the next call for the
    same target if the process was killed.

    Companions that the block writes into the directory of that path are moved beside the target first. Their names should be
    free there, or belong to the same companion.

    Args:
        target: the final path, and what may be replaced there, which is checked before the block and once more before the move;
            its directory is made where it is missing.

    Raises:
        WriteError: see :meth:`~lora_fx.files.target.Target.check`; or something cannot be written, there or within the block.
    """
    path = target.path
    try:
        target.check()
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        with _scratch(path) as scratch:
            written = scratch / path.name
            yield written
            _flush_tree(scratch)
            with _moved_beside(written, path):
                restore = _move(written, target)
                try:
                    _flush_directory(path.parent)
                except BaseException:
                    restore()
                    raise
    except OSError as error:
        raise WriteError(_unwritable(path, error)) from error


def write_back_early(file: int, start: int, size: int) -> None:
    """Let the system begin to write a part of an open file to the disk, where it can be asked to; wait for nothing.

    Args:
        file: its descriptor.
        start: first byte of the part.
        size: of the part; 0 for all that follows.
    """
    if _LIBC is not None and hasattr(_LIBC, "sync_file_range"):
        _LIBC.sync_file_range(file, ctypes.c_int64(start), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)


_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE, _SYNC_FILE_RANGE_WRITE = -100, 1, 2, 2
_PREVIOUS = "previous"


def _unwritable(target: Path, error: OSError) -> str:
    advice = _ADVICE.get(error.errno or 0, "See to that, or write elsewhere.")
    where = f" ({error.filename})" if error.errno in (errno.EEXIST, errno.ENOTDIR) and error.filename else ""
    return f"cannot write {target}: {error.strerror or error}{where}. {advice}"


_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space, or write to another disk."),
    errno.EFBIG: "Files of that size are not allowed there: raise the limit (ulimit -f), or write to another disk.",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Choose a directory that you may write to."),
    **dict.fromkeys((errno.ENOTDIR, errno.ENAMETOOLONG), "Choose another name."),
}


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """Yield a new directory beside ``target``, which is gone afterwards. While it is in use its lock is held."""
    scratch, lock = _locked_scratch(target)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_scratch(target: Path) -> tuple[Path, int | None]:
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        if fcntl is None:
            return scratch, None
        try:
            lock = _locked(scratch)
            if os.path.samestat(os.fstat(lock), scratch.stat()):
                return scratch, lock
        except (
            BlockingIOError,
            FileNotFoundError,
        ):  # another process takes a scratch that is not locked yet for abandoned
            continue
        except OSError:  # a file system without locks
            return scratch, None


def _locked(directory: Path) -> int:
    """Return a descriptor of a directory under a lock, which ends with the process."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove_abandoned(target: Path) -> None:
    """Remove what killed processes left beside ``target``: their locks went with them."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]+\.partial")
    found: list[Path] = []
    if fcntl is not None:
        with suppress(OSError):  # a directory may be written to and yet not be listed
            found = [path for path in target.parent.iterdir() if name.fullmatch(path.name)]
    for scratch in found:
        with suppress(OSError):  # it is in use, or another user's
            lock = _locked(scratch)
            try:
                if os.path.lexists(scratch / _PREVIOUS) and not os.path.lexists(target):
                    (scratch / _PREVIOUS).rename(target)  # killed between two renames
                shutil.rmtree(scratch)
            finally:
                os.close(lock)


def _move(written: Path, target: Target) -> Callable[[], object]:
    """Move a result into place; return what moves it back, and in its place what was there."""
    target.check()  # once more: the block may have taken hours
    path, previous = target.path, written.parent / _PREVIOUS
    if not target.overwrite:
        _move_to_new(written, target)
        return partial(path.rename, written)
    if not os.path.lexists(path):
        written.rename(path)
        return partial(path.rename, written)
    if _renamed(written, path, _RENAME_EXCHANGE):
        return partial(_renamed, written, path, _RENAME_EXCHANGE)
    _set_aside(path, previous, keep_name=not written.is_dir())
    try:
        written.replace(path)
    except BaseException:
        previous.replace(path)
        raise
    return partial(_restore_previous, written, path, previous)


def _set_aside(path: Path, previous: Path, *, keep_name: bool) -> None:
    """Give a path another name, beside its own if it may keep that: a file or link then has one at every moment."""
    if keep_name and (path.is_symlink() or not path.is_dir()):
        try:
            os.link(path, previous, follow_symlinks=False)
        except (OSError, NotImplementedError):  # a file system without them
            path.rename(previous)
    else:
        path.rename(previous)


def _restore_previous(written: Path, path: Path, previous: Path) -> None:
    path.rename(written)
    previous.rename(path)


@contextmanager
def _moved_beside(written: Path, target: Path) -> Iterator[None]:
    """Move the companions of ``written`` beside ``target``; new ones are removed if the block fails."""
    new, made = [], written.lstat()
    try:
        for companion in written.parent.iterdir():
            if companion != written:
                beside = target.with_name(companion.name)
                new += [] if beside.exists() else [beside]
                companion.replace(beside)
        yield
    except BaseException:
        in_place = os.path.lexists(target) and os.path.samestat(target.lstat(), made)  # with what belongs to it
        for path in () if in_place else new:
            path.unlink(missing_ok=True)
        raise


def _move_to_new(written: Path, target: Target) -> None:
    try:
        if not _renamed(written, target.path, _RENAME_NOREPLACE):
            target.check()
            written.rename(target.path)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # it came between the check and the move
            target.check()
        raise


def _renamed(source: Path, target: Path, flag: int) -> bool:
    """Rename in one step, with a flag of Linux; tell whether the system has that."""
    if _LIBC is None or not hasattr(_LIBC, "renameat2"):
        return False
    if _LIBC.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):  # the kernel or the file system is without
        return False
    raise OSError(number, os.strerror(number), str(target))


def _flush_tree(directory: Path) -> None:
    """Wait until all below a directory, and its names, are on the disk."""
    for parent, _, files in os.walk(directory, topdown=False):
        for file in (Path(parent, name) for name in files):
            if file.is_file() and not file.is_symlink():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        _flush_directory(Path(parent))


def _flush_directory(directory: Path) -> None:
    if os.name != "posix":
        return
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except PermissionError:  # it may be written to, and not be read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has nothing of the kind
            raise
    finally:
        os.close(descriptor)


@contextmanager
def writable(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file for a library in another language, which an exception within a write would leave in disorder.

    The error or interrupt that stops a write is kept; the library goes on, and it is raised when the block ends.

    Raises:
        OSError: something could not be written.
    """
    with _Recording(path, "xb") as file:
        try:
            yield file
        except Exception:
            if file.stopped is not None:
                raise file.stopped from None
            raise
        if file.stopped is not None:
            raise file.stopped


class _Recording(io.FileIO):
    """A file that writes all bytes that it is given, until an error or an interrupt stops it."""

    stopped: BaseException | None = None

    def write(self, data: Any, /) -> int:
        try:
            if self.stopped is None:
                self.write_all(data)
        except BaseException as error:
            self.stopped = error
        return memoryview(data).nbytes

    def write_all(self, data: Any) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[super().write(rest) :]
