"""Checkpoints of transformers on disk: opening, the index, its shards, and changes to one as data. Only headers are read."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lora_fx.errors import LoraFxError, did_you_mean, hub_hint, listed
from lora_fx.files.bounded import read_bounded
from lora_fx.files.safetensors import TensorEntry, TensorFile
from lora_fx.numerics.lowrank_merge import FOLDABLE, Merge, rounded
from lora_fx.rules.validation import shown

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A directory with the weights of a transformers model, of which only headers were read.

    Attributes:
        directory: where it is; of a directory of sentence-transformers, the whole.
        model: the directory in it, or itself, that has the config and the weights.
        files: those with tensors, in the order of their names, in which transformers reads them.
        index: the file that says which tensor is in which of them, or None where there is one only.
        shards: what it says: for each key the path of its file, in the directory and with forward slashes.
    """

    directory: Path
    model: Path
    files: tuple[TensorFile, ...]
    index: Path | None = None
    shards: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Find the weights in a directory: ``model.safetensors``, or the files that ``model.safetensors.index.json`` lists.

        They may be in the module of sentence-transformers that is a transformer (``0_Transformer``), as ``modules.json`` says.

        Raises:
            LoraFxError: there are none, or two kinds of them, a file is missing or damaged, or the index does not fit.
        """
        if not directory.is_dir():
            kind = "is not a directory" if directory.exists() else "does not exist"
            raise LoraFxError(
                f"{directory} {kind}; a directory with {SINGLE} or {INDEX} was expected.{hub_hint(directory)}"
            )
        model = _model_directory(directory)
        single, index = model / SINGLE, model / INDEX
        if single.exists() and index.exists():
            raise LoraFxError(
                f"{model} has both {SINGLE} and {INDEX}, which may hold different weights; transformers reads the "
                "former only. Remove the one that is not meant."
            )
        if index.exists():
            places = _weight_map(index)
            names = {key: (model / name).relative_to(directory).as_posix() for key, name in places.items()}
            return cls(directory, model, _files(index, places), index, names)
        if not single.exists():
            raise LoraFxError(_no_weights(model))
        return cls(directory, model, (TensorFile.open(single),))

    @cached_property
    def tensors(self) -> Mapping[str, tuple[TensorFile, TensorEntry]]:
        """For each key, the file that it is in and its place there; of several files, the one that the index names."""
        return {
            key: (file, entry)
            for file in self.files
            for key, entry in file.entries.items()
            if self.shards.get(key) in (None, self.name_of(file))
        }

    def name_of(self, file: TensorFile) -> str:
        """Return the path of one of the files in the directory, with forward slashes."""
        return file.path.relative_to(self.directory).as_posix()

    def others_with(self, key: str) -> tuple[TensorFile, ...]:
        """Return further files that have a tensor of that name, in the order in which transformers reads them."""
        return tuple(file for file in self.files if key in file.entries and file is not self.tensors[key][0])

    @property
    def size(self) -> int:
        """Number of bytes of all files with tensors."""
        return sum(map(size_of, self.files))

    @property
    def usual_dtype(self) -> torch.dtype:
        """Dtype in which it gets further weights."""
        dtypes = (entry.dtype for _, entry in self.tensors.values() if entry.dtype in FOLDABLE)
        return next(dtypes, torch.float32)

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


def is_weights(path: str) -> bool:
    """Tell whether transformers gives a file of weights, or the index of several, such a name."""
    return _WEIGHTS.fullmatch(posixpath.basename(path)) is not None


_WEIGHTS = re.compile(
    r"model(\.[\w-]+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.[\w-]+)?\.json)?"
)  # with a variant, or without


def size_of(file: TensorFile) -> int:
    """Return the number of bytes of a file with tensors, as its header says."""
    return max((entry.end for entry in file.entries.values()), default=len(file.header))


def _model_directory(directory: Path) -> Path:
    """Return the module of sentence-transformers that is a transformer, where the directory has no config of its own."""
    listing = directory / "modules.json"
    if (directory / "config.json").exists() or not listing.is_file():
        return directory
    modules = _json(listing)
    found = [
        directory / path
        for module in (modules if isinstance(modules, list) else [])
        if isinstance(module, dict)
        and str(module.get("type")).endswith(".Transformer")
        and isinstance(path := module.get("path"), str)
        and path not in ("", ".", "..")
        and not {"/", "\\", "\0"} & set(path)
    ]
    return found[0] if len(found) == 1 and found[0].is_dir() else directory


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

_MAX_NAMED = 10


def _files(index: Path, places: Mapping[str, str]) -> tuple[TensorFile, ...]:
    names = sorted(set(places.values()))
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise LoraFxError(
            f"{index.parent} lacks {listed(missing, _MAX_NAMED)}, which {index.name} lists. Download it again."
        )
    files = tuple(TensorFile.open(index.parent / name) for name in names)
    found: dict[str, list[str]] = {}
    for name, file in zip(names, files, strict=True):
        for key in file.entries:
            found.setdefault(key, []).append(name)
    for key, name in places.items():
        if name not in found.get(key, ()):
            where = f"it is in {found[key][0]}" if key in found else "it is in none"
            raise LoraFxError(f"{index}: {key!r} is to be in {name}, but {where}. Write the checkpoint again.")
    unlisted = [key for key in found if key not in places]
    if unlisted:
        raise LoraFxError(
            f"{index} does not list {unlisted[0]!r}, which is in {found[unlisted[0]][0]}. Write the checkpoint again."
        )
    return files


_MAX_JSON = 2**26  # bytes: the index of the largest models, of 150,000 tensors, has 15 million


def _json(path: Path) -> Any:
    try:
        data = read_bounded(path, _MAX_JSON)
        return json.loads(data.decode("utf-8"))
    except OSError as error:
        raise LoraFxError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise LoraFxError(f"{path} is not JSON: {error}. Download it again.") from error


def _weight_map(index: Path) -> dict[str, str]:
    found = _json(index)
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise LoraFxError(f"{index} has no weight_map from the names of tensors to those of files. Download it again.")
    paths = {name: _below(index, name) for name in set(places.values())}
    return {key: paths[name] for key, name in places.items()}


def _below(index: Path, name: str) -> str:
    """Return the path of a shard, normalised, if it stays in the directory of the index; links may lead elsewhere."""
    path = posixpath.normpath(name)
    inside = path not in (".", "..") and not path.startswith(("/", "../")) and not {"\\", "\0"} & set(name)
    given = index.parent / name if inside else index.parent
    try:
        inside = inside and (not given.exists() or given.samefile(index.parent / path))  # "a/../b", where a is a link
    except OSError as error:  # a name that no file can have
        raise LoraFxError(
            f"{index}: {shown(name)} is not the path of a file: {error.strerror or error}. Correct the weight_map."
        ) from error
    if not inside:
        raise LoraFxError(
            f"{index}: {name!r} is not the path of a file in its directory, and none elsewhere is read. Correct the weight_map."
        )
    return path


@dataclass(frozen=True)
class Changes:
    """Changes to a checkpoint, as data.

    Attributes:
        merges: the updates to add, by the key of the tensor. ``Merge.weight`` and ``Merge.names`` are for reports only.
        replacements: new values of the same shape, by the key of the tensor.
        tensors: the factors, and all else that updates name.
        additions: values of tensors that the checkpoint lacks, on the CPU, by their keys.
        config: values in config.json, by their keys.
        dropped_config: keys that config.json no longer has.
    """

    merges: Mapping[str, Merge] = field(default_factory=dict)
    replacements: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    additions: Mapping[str, torch.Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    dropped_config: tuple[str, ...] = ()

    def factors_of(self, merge: Merge, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors that the updates of a merge name, on the CPU; its own weight may be one of them."""
        others = (name for name in merge.read if name != merge.weight)
        return {**{name: self.tensors[name].cpu() for name in others}, merge.weight: weight}

    def new_value(self, entry: TensorEntry) -> torch.Tensor:
        """Return the new value of a tensor that is replaced, on the CPU and in its dtype."""
        return rounded(self.replacements[entry.name].detach().cpu(), entry.dtype).contiguous()
