"""Writing files and directories so that a name never holds half a result."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_fx.errors import LoraFxError


@contextmanager
def replacing(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a path beside ``target`` to write a file or a directory to; move it into place if the block succeeds.

    Args:
        target: the final path; its directory is made where it is missing.
        overwrite: replace what is there.

    Raises:
        LoraFxError: something exists at ``target`` and is not to be replaced, or its directory cannot be written.
    """
    if target.exists() and not overwrite:
        raise LoraFxError(f"{target} exists already. Choose another name, or remove it first.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise LoraFxError(f"cannot write {target}: {error.strerror}.") from error
    try:
        written = scratch / target.name
        yield written
        if overwrite and target.is_dir():
            target.replace(scratch / "previous")
        written.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
