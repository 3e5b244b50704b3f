"""Files beside the weights of a checkpoint: all go along with a folded one, but for other forms of its weights and what trained them.

Nothing is judged by what programs are known to read: a directory of sentence-transformers has modules in directories of their
own, a tokenizer its templates, a model its code. So what is skipped is listed here, and all else goes along.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from lora_fx.errors import LoraFxError, listed
from lora_fx.files.safetensors import TensorFile
from lora_fx.folding.checkpoint import Checkpoint

_ANYWHERE: Mapping[str, Sequence[str]] = {
    "a repository or a cache": (
        ".git", ".git/", ".hg/", ".svn/", ".cache/", ".huggingface/", "__pycache__/", ".ipynb_checkpoints/", ".*.partial/",
    ),
}  # fmt: skip
"""Patterns of names, by the reason why such files are skipped; those of directories end in a slash."""

_OLD_WEIGHTS = "old weights in another form"

_BESIDE_WEIGHTS: Mapping[str, Sequence[str]] = {
    "a training state": (
        "optimizer.pt", "optimizer.bin", "optimizer_*/", "scheduler.pt", "scheduler.bin", "scaler.pt", "sampler*.bin",
        "rng_state*.pth", "random_states_*.pkl", "custom_checkpoint_*.pkl", "trainer_state.json", "training_args.bin",
        "pytorch_model_fsdp*", "pytorch_model_fsdp*/", "checkpoint-*/", "tmp-checkpoint-*/", "global_step*/", "runs/",
    ),
    "the settings of a quantisation, which the result has not": ("quantize_config.json", "quant_config.json"),
    "an adapter, which transformers would add to the result": ("adapter_config.json", "adapter_model.*"),
    _OLD_WEIGHTS: (
        *(
            f"{name}.{kind}"
            for name in ("model*", "pytorch_model*", "consolidated*", "weights*", "ggml-*")
            for kind in ("safetensors", "bin", "pt", "pth", "npz")
        ),
        "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data*", "*.onnx.data", "*.ckpt", "*.ckpt.*", "*.tflite",
        "saved_model.pb", "*.pdparams", "*.mlmodel", "*.mlpackage/", "openvino_*model*.xml", "openvino_*model*.bin",
        "onnx/", "openvino/", "original/", "coreml/", "gguf/", "metal/", "tflite/", "saved_model/",
    ),
}  # fmt: skip
"""The same for directories with the weights of the checkpoint; elsewhere these are the weights of other modules."""


@dataclass(frozen=True)
class Companions:
    """What a directory holds beside the weights of its checkpoint, by paths in it with forward slashes.

    Attributes:
        files: that are copied byte by byte.
        directories: that are made, each after the one that it is in.
        skipped: not copied, and why; paths of directories end in a slash.
    """

    files: tuple[str, ...]
    directories: tuple[str, ...]
    skipped: Mapping[str, str]


def companions_of(checkpoint: Checkpoint) -> Companions:
    """List what goes along with a checkpoint, and what is skipped. Links are followed.

    Raises:
        LoraFxError: something that would go along cannot be read: a broken link, a link to a directory that it is in, a file
            without the right to read it, a pipe. All are named.
    """
    found = sorted(_entries(checkpoint, Path(), ()), key=lambda entry: entry.path)
    problems = [f"{entry.path} {entry.problem}" for entry in found if entry.problem]
    if problems:
        raise LoraFxError(
            f"{checkpoint.directory} cannot be copied as a whole, and nothing was written: {listed(problems, _MAX_NAMED, '; ')}."
        )
    return Companions(
        tuple(entry.path for entry in found if not entry.skipped and not entry.path.endswith("/")),
        tuple(entry.path for entry in found if not entry.skipped and entry.path.endswith("/")),
        {entry.path: entry.skipped for entry in found if entry.skipped},
    )


_MAX_NAMED = 10


def skipped_lines(skipped: Mapping[str, str]) -> list[str]:
    """Return a line for each reason why files are skipped."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in skipped.items():
        by_reason.setdefault(reason, []).append(path)
    return [f"not copied ({reason}): {listed(paths, _MAX_NAMED)}" for reason, paths in by_reason.items()]


@dataclass(frozen=True)
class _Entry:
    """A file or a directory: ``skipped`` says why it is not copied, ``problem`` why it cannot be read."""

    path: str
    skipped: str = ""
    problem: str = ""


def _entries(checkpoint: Checkpoint, place: Path, around: tuple[Path, ...]) -> Iterator[_Entry]:
    """Yield what a directory of the checkpoint holds, at any depth; ``around`` are the real directories that it is in."""
    directory = checkpoint.directory / place
    real = directory.resolve()
    if around and real in (*around, *around[0].parents):
        yield _Entry(f"{place.as_posix()}/", problem=f"is a link to {real}, which it is in: remove the link")
        return
    if around:
        yield _Entry(f"{place.as_posix()}/")
    try:
        names = sorted(path.name for path in directory.iterdir())
    except OSError as error:
        yield _Entry(f"{place.as_posix()}/", problem=_unreadable(error))
        return
    shards = {Path(checkpoint.name_of(file)) for file in checkpoint.files}
    for path in (place / name for name in names if place / name not in shards):
        is_directory = _is_directory(checkpoint.directory / path)
        written = f"{path.as_posix()}/" if is_directory else path.as_posix()
        holds_shards = any(path in shard.parents for shard in shards)
        skipped = (
            "" if holds_shards else _skip_reason(checkpoint, path, is_directory, place in {s.parent for s in shards})
        )
        if skipped or not is_directory:
            yield _Entry(written, skipped, "" if skipped else _problem(checkpoint.directory / path))
        else:
            yield from _entries(checkpoint, path, (*around, real))


def _skip_reason(checkpoint: Checkpoint, path: Path, is_directory: bool, beside_weights: bool) -> str:
    """Return why a file or a directory is skipped; an empty text if it goes along."""
    if checkpoint.directory / path == checkpoint.index:
        return ""
    table = {**_ANYWHERE, **_BESIDE_WEIGHTS} if beside_weights or path.parent == Path() else _ANYWHERE
    indexed = _INDEX.fullmatch(path.name)
    name = f"{path.name}/" if is_directory else indexed[1] if indexed else path.name
    for reason, patterns in table.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return reason
    shared = table is not _ANYWHERE and name.endswith(".safetensors") and _shares_names(checkpoint, path)
    return _OLD_WEIGHTS if shared else ""


_INDEX = re.compile(r"(.+)\.index(?:\.[^.]+)?\.json")  # of shards; transformers puts the name of a variant last


def _shares_names(checkpoint: Checkpoint, path: Path) -> bool:
    """Tell whether a file of safetensors has a tensor of a name that the checkpoint has too."""
    try:
        return not checkpoint.tensors.keys().isdisjoint(TensorFile.open(checkpoint.directory / path).entries)
    except LoraFxError:
        return False  # of another format, whatever its name says


def _is_directory(path: Path) -> bool:
    with suppress(OSError):  # Path.is_dir raises some errors
        return stat.S_ISDIR(path.stat().st_mode)
    return False


def _problem(path: Path) -> str:
    """Return why a file cannot be read; an empty text if it can."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "is a pipe, a socket or a device, and no file: remove it"
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        if path.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP):
            return f"is a broken link to {path.readlink()}: download the file again, or remove the link"
        return _unreadable(error)
    return ""


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error}): see to that, or remove it"
