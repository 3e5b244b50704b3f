"""The tensors of an adapter's file, of either format, under the keys that PEFT writes today.

A whole ``PeftModel.state_dict()``, as trainers write it, has the name of the adapter in its keys:

    ….lora_A.default.weight, ….lora_embedding_A.default     is    ….lora_A.weight, ….lora_embedding_A
    ….modules_to_save.default.weight                        is    ….weight
    _fsdp_wrapped_module., _orig_mod., module. in front     of wrappers, is dropped

Only headers are read here, of ``adapter_model.bin`` the pickle of its index too: by ``torch.load(weights_only=True)``, which executes
nothing that the file says.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_fx.errors import AdapterError, LoraFxError, first_line, listed
from lora_fx.files.safetensors import TensorFile
from lora_fx.rules.validation import shown

FILE_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor of an adapter's file, which is read when it is asked for.

    Attributes:
        dtype: of its elements.
        shape: of the tensor.
        read: returns it on the CPU, in memory of its own.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of an adapter.

    Attributes:
        path: of the file.
        metadata: texts that its writer put in; a pickle has none.
        entries: the tensors by PEFT's keys.
    """

    path: Path
    metadata: Mapping[str, str]
    entries: Mapping[str, AdapterTensor]

    def read(self, key: str) -> torch.Tensor:
        """Return a tensor in memory of its own."""
        return self.entries[key].read()


def open_tensors(directory: Path) -> AdapterTensors:
    """Open the file of an adapter directory; of the two formats safetensors, if both are there, as PEFT does.

    Raises:
        AdapterError: there is none, or it is malformed, or has several adapters.
    """
    usual, pickled = directory / FILE_NAME, directory / PICKLE_NAME
    if usual.is_file():
        metadata, entries = stored(usual)
        return AdapterTensors(usual, metadata, _as_peft_writes(usual, entries))
    if pickled.is_file():
        return AdapterTensors(pickled, {}, _as_peft_writes(pickled, _pickled(pickled)))
    raise AdapterError(str(directory), [f"expected {FILE_NAME} or {PICKLE_NAME}, neither of which is there"])


def stored(path: Path) -> tuple[Mapping[str, str], dict[str, AdapterTensor]]:
    """Return the metadata and the tensors of a safetensors file by its own keys.

    Raises:
        AdapterError: it is malformed.
    """
    try:
        file = TensorFile.open(path)
    except LoraFxError as error:
        raise AdapterError(str(path), [str(error).removeprefix(f"{path} ")]) from error
    entries = {
        key: AdapterTensor(entry.dtype, entry.shape, partial(file.read, key)) for key, entry in file.entries.items()
    }
    return file.metadata, entries


def _pickled(path: Path) -> dict[str, AdapterTensor]:
    """Return the tensors of a file of ``torch.save``, of which nothing is executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of storage types that old files name
            loaded = _loaded(path)
    except Exception as error:  # a hostile file fails in any way
        said = first_line(str(error), type(error).__name__)
        problem = f"{path.name}: expected a file of torch.save with tensors alone, since no code in it is run: {said}"
        raise AdapterError(str(path.parent), [problem]) from error
    if not isinstance(loaded, Mapping):
        problem = f"{path.name}: expected tensors by their keys, got {type(loaded).__name__}"
        raise AdapterError(str(path.parent), [problem])
    problems = [
        f"{path.name}: {shown(key)}: expected a dense tensor with values, got {_kind(value)}"
        for key, value in loaded.items()
        if not (isinstance(key, str) and _is_dense(value))
    ]
    if problems:
        raise AdapterError(str(path.parent), problems)
    return {
        key: AdapterTensor(value.dtype, tuple(value.shape), partial(_own_copy, value)) for key, value in loaded.items()
    }


def _loaded(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files from before torch 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def _is_dense(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_meta
        and type(value) in (torch.Tensor, torch.nn.Parameter)
    )


def _kind(value: object) -> str:
    return f"a {value.layout} tensor" if isinstance(value, torch.Tensor) else type(value).__name__


def _own_copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().clone(memory_format=torch.contiguous_format)


def _as_peft_writes(path: Path, entries: Mapping[str, AdapterTensor]) -> dict[str, AdapterTensor]:
    """Return the tensors by the keys that PEFT writes, without the name of the adapter and the prefixes of wrappers."""
    bare = {key: _WRAPPERS.sub("", key) for key in entries}
    names = {found["name"] for key in bare.values() if (found := _NAMED_FACTOR.fullmatch(key))}
    if len(names) > 1:
        told = listed(sorted(map(shown, names)), _MAX_NAMED)
        problem = f"{path.name}: expected one adapter, got factors of {told}. Save each by itself, with save_pretrained"
        raise AdapterError(str(path.parent), [problem])
    present = set(bare.values())
    meant = {key: _without_name(plain, names, present) for key, plain in bare.items()}
    by_key: dict[str, list[str]] = {}
    for key, plain in meant.items():
        by_key.setdefault(plain, []).append(key)
    twice = [f"{path.name}: {' and '.join(keys)} are one tensor" for keys in by_key.values() if len(keys) > 1]
    if twice:
        raise AdapterError(str(path.parent), twice)
    return {meant[key]: tensor for key, tensor in entries.items()}


def _without_name(key: str, names: Collection[str], present: Collection[str]) -> str:
    """Return a key without the name of the adapter.

    A copy of a module that trains as a whole keeps its longer key where the file has the shorter one as well: it is compared then.
    """
    if factor := _NAMED_FACTOR.fullmatch(key):
        return factor["before"] + (factor["after"] or "")
    module, found, rest = key.partition(".modules_to_save.")
    name, _, parameter = rest.partition(".")
    plain = f"{module}.{parameter}"
    return plain if found and parameter and name in names and plain not in present else key


_NAMED_FACTOR = re.compile(
    r"(?P<before>.*\.(?:lora_(?:[AB](?=\.[^.]+\.(?:weight|bias))|embedding_[AB]|magnitude_vector(?!\.weight))|trainable_tokens_delta))"
    r"\.(?P<name>[^.]+)(?P<after>\.(?:weight|bias))?"
)
_WRAPPERS = re.compile(
    r"^module\.(?=base_model\.)|(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\."
)
_MAX_NAMED = 5
