"""Recognition of a file in a form of other tools, by its contents."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lora_fx.adapters.peft_format.foreign_formats.diffusers import read_diffusers
from lora_fx.adapters.peft_format.foreign_formats.foreign_file import FILE_NAME, ForeignFile
from lora_fx.adapters.peft_format.foreign_formats.kohya import is_kohyas, read_kohya
from lora_fx.adapters.peft_format.keys import PREFIX
from lora_fx.adapters.peft_format.tensors import FILE_NAME as PEFT_FILE_NAME
from lora_fx.adapters.peft_format.tensors import stored
from lora_fx.errors import AdapterError, listed
from lora_fx.rules.peft_config.config import CONFIG_NAME


def read_foreign(path: Path, ignored: Collection[str] = ()) -> ForeignFile | None:
    """Read an adapter in diffusers' or kohya's form; None for a directory without one, which is PEFT's or nothing.

    Args:
        path: a safetensors file; or a directory without PEFT's config that has ``pytorch_lora_weights.safetensors``, or one such file
            under another name.
        ignored: keys of a configuration in the metadata that have no effect on the result.

    Raises:
        AdapterError: it is malformed, of an unsupported kind, or there are several.
    """
    if path.is_file():
        return _read(path, ignored)
    if (path / CONFIG_NAME).exists() or not path.is_dir():
        return None
    usual = path / FILE_NAME
    files = [usual] if usual.is_file() else sorted(path.glob("*.safetensors"))
    found = [file for file in files if file.name != PEFT_FILE_NAME and any("lora" in key for key in stored(file)[1])]
    if len(found) > 1:
        told = listed([file.name for file in found], _MAX_NAMED)
        raise AdapterError(str(path), [f"expected one adapter, got {told}. Give one of these files"])
    return _read(found[0], ignored) if found else None


def _read(path: Path, ignored: Collection[str]) -> ForeignFile:
    try:
        metadata, entries = stored(path)
    except AdapterError as error:
        if path.suffix == ".safetensors":
            raise
        problem = f"expected a directory with {CONFIG_NAME}, or a safetensors file in diffusers' or kohya's form"
        raise AdapterError(str(path), [problem]) from error
    if not entries:
        raise AdapterError(str(path), ["expected the factors of an adapter, got a file without tensors"])
    if any(key.startswith(PREFIX) for key in entries):
        problem = f"has PEFT's keys, which need {CONFIG_NAME} beside them: expected the directory with both, got a file"
        raise AdapterError(str(path), [problem])
    if any(map(is_kohyas, entries)):
        return read_kohya(path, metadata, entries)
    return read_diffusers(path, metadata, entries, ignored)


_MAX_NAMED = 5
