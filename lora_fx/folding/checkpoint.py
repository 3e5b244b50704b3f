"""Checkpoints of transformers on disk: opening, the index, its shards, and changes to one as data. Only headers are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from lora_fx.errors import LoraFxError, did_you_mean
from lora_fx.files.safetensors import TensorEntry, TensorFile
from lora_fx.numerics.lowrank_merge import Merge, rounded

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A directory with the weights of a transformers model, of which only headers were read.

    Attributes:
        directory: where it is.
        files: those with tensors, by name.
        index: the file that says which tensor is in which of them, or None where there is one only.
    """

    directory: Path
    files: tuple[TensorFile, ...]
    index: Path | None = None

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Find the weights in a directory: ``model.safetensors``, or the files that ``model.safetensors.index.json`` lists.

        Raises:
            LoraFxError: there are none, or two kinds of them, a file is missing or damaged, or the index does not fit.
        """
        if not directory.is_dir():
            kind = "is not a directory" if directory.exists() else "does not exist"
            raise LoraFxError(f"{directory} {kind}; a directory with {SINGLE} or {INDEX} was expected.")
        single, index = directory / SINGLE, directory / INDEX
        if single.exists() and index.exists():
            raise LoraFxError(
                f"{directory} has both {SINGLE} and {INDEX}, which may hold different weights; transformers reads the "
                "former only. Remove the one that is not meant."
            )
        if index.exists():
            return cls(directory, _shards(index), index)
        if not single.exists():
            raise LoraFxError(_no_weights(directory))
        return cls(directory, (TensorFile.open(single),))

    @cached_property
    def tensors(self) -> Mapping[str, tuple[TensorFile, TensorEntry]]:
        """For each key, the file that it is in and its place there."""
        return {key: (file, entry) for file in self.files for key, entry in file.entries.items()}

    @property
    def size(self) -> int:
        """Number of bytes of all files with tensors."""
        return sum(map(size_of, self.files))

    def find(self, key: str) -> tuple[TensorFile, TensorEntry]:
        """Return the file that a tensor is in, and its place there.

        Raises:
            LoraFxError: the checkpoint does not have it.
        """
        if key not in self.tensors:
            raise LoraFxError(f"{self.directory} has no tensor {key!r}{did_you_mean(key, self.tensors)}.")
        return self.tensors[key]

    def read(self, key: str) -> torch.Tensor:
        """Return a tensor in memory of its own.

        Raises:
            LoraFxError: the checkpoint does not have it, or not any more.
        """
        return self.find(key)[0].read(key)


def size_of(file: TensorFile) -> int:
    """Return the number of bytes of a file with tensors, as its header says."""
    return max((entry.end for entry in file.entries.values()), default=len(file.header))


def _no_weights(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    pickles = [
        name for name in names if name.startswith("pytorch_model") and name.endswith((".bin", ".bin.index.json"))
    ]
    if pickles:
        return (
            f"{directory} has its weights in {pickles[0]} only, a pickle. Pickles are not read, since they can run any code. "
            "Convert it: AutoModel.from_pretrained(directory).save_pretrained(other, safe_serialization=True)."
        )
    near = did_you_mean(SINGLE, [name for name in names if name.endswith((".safetensors", ".json"))])
    return f"{directory} has no weights: {SINGLE} or {INDEX} was expected{near}."


# An index and its shards.


def _shards(index: Path) -> tuple[TensorFile, ...]:
    places = _weight_map(index)
    names = sorted(set(places.values()))
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise LoraFxError(
                f"{index}: {name!r} is not the name of a file beside it, and none elsewhere is read. Correct the weight_map."
            )
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise LoraFxError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} lists. Download it again.")
    files = tuple(TensorFile.open(index.parent / name) for name in names)
    found: dict[str, str] = {}
    for file in files:
        for key in file.entries:
            if key in found:
                raise LoraFxError(
                    f"{index.parent}: {key!r} is in both {found[key]} and {file.path.name}. Write the checkpoint again."
                )
            found[key] = file.path.name
    for key, name in places.items():
        if found.get(key) != name:
            where = f"it is in {found[key]}" if key in found else "it is in none"
            raise LoraFxError(f"{index}: {key!r} is to be in {name}, but {where}. Write the checkpoint again.")
    unlisted = [key for key in found if key not in places]
    if unlisted:
        raise LoraFxError(
            f"{index} does not list {unlisted[0]!r}, which is in {found[unlisted[0]]}. Write the checkpoint again."
        )
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text("utf-8"))
    except OSError as error:
        raise LoraFxError(f"cannot read {index}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise LoraFxError(f"{index} is not JSON: {error}. Download it again.") from error
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise LoraFxError(f"{index} has no weight_map from the names of tensors to those of files. Download it again.")
    return places


@dataclass(frozen=True)
class Changes:
    """Changes to a checkpoint, as data.

    Attributes:
        merges: the updates to add, by the key of the tensor. ``Merge.weight`` and ``Merge.names`` are for reports only.
        replacements: new values of the same shape, by the key of the tensor.
        tensors: the factors, and all else that updates name.
    """

    merges: Mapping[str, Merge] = field(default_factory=dict)
    replacements: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def factors_of(self, merge: Merge) -> dict[str, torch.Tensor]:
        """Return the tensors that the updates of a merge name, on the CPU."""
        return {name: self.tensors[name].cpu() for update in merge.updates for name in update.names}

    def new_value(self, entry: TensorEntry) -> torch.Tensor:
        """Return the new value of a tensor that is replaced, on the CPU and in its dtype."""
        return rounded(self.replacements[entry.name].detach().cpu(), entry.dtype).contiguous()
