"""Checkpoints of transformers on disk, and writing changed ones: one tensor at a time, so that no model is ever in memory.

W' = W + Σ scaling · B A        for each weight that is changed; all else is copied byte by byte

Each file of the result has the header that the one of the checkpoint has, and its tensors in the same places.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from lora_fx.errors import FoldError, LoraFxError, did_you_mean
from lora_fx.files.atomic import replacing, write_back_early
from lora_fx.files.safetensors import TensorEntry, TensorFile, bytes_of, fill
from lora_fx.folding.report import FoldedWeight, check_finite
from lora_fx.graph.process_state import exclusive
from lora_fx.numerics.lowrank_merge import FOLDABLE, Merge, Merged, Update, exact_blocks, merge_into, rounded

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

PIECE = 2**23
"""How many bytes are copied in one step, and written in one call."""

WORKERS = 3
"""How many threads read, compute and write: two keep the processor busy while one waits for the disk."""

MEMORY = 3
"""How many times the largest tensor may be taken of memory; of small ones, a little more."""

_SPACE = 2**23  # what a merge needs beside the weight

MISROUNDED = 1e-4
"""Largest share of the elements of a weight in half precision that may be the neighbour of the exact one rounded once."""


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
        return sum(map(_size, self.files))

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


def _size(file: TensorFile) -> int:
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


# Changing one.


@dataclass(frozen=True)
class Changes:
    """What is to become of a checkpoint, as data.

    Attributes:
        merges: by the key of a tensor, what is added to it. ``Merge.weight`` and ``Merge.names`` are for reports only.
        replacements: by the key of a tensor, its new value, of the same shape.
        tensors: the factors, and all else that updates name.
    """

    merges: Mapping[str, Merge] = field(default_factory=dict)
    replacements: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointReport:
    """What was written.

    Attributes:
        weights: what was done to each weight that something was added to, in the order of the files.
        copied_bytes: how many bytes of the files with tensors are those of the checkpoint, as they were.
        merged_bytes: how many are new.
        misrounded: largest share, of any weight in half precision, of elements that are not the exact result rounded once;
            None if that was not looked at.
        skipped: what of the directory was not copied.
    """

    weights: tuple[FoldedWeight, ...]
    copied_bytes: int
    merged_bytes: int
    misrounded: float | None
    skipped: tuple[str, ...]


def write_merged(
    checkpoint: Checkpoint,
    changes: Changes,
    out: Path,
    *,
    overwrite: bool = False,
    verify: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> CheckpointReport:
    """Write a checkpoint with some tensors changed, and with the other files of its directory.

    Tensors that are not changed are copied as bytes. Of those that are, three at most are in memory at any time. What else
    is in the directory is copied, but for directories, hidden files, and weights in other files than those of the
    checkpoint. A process that is killed leaves nothing at ``out``, or what was there.

    Args:
        checkpoint: the one to start from; left as it is.
        changes: what becomes of which tensor.
        out: directory to be made.
        overwrite: replace a directory that exists.
        verify: read all that was changed once more, and compare it with what float64 gives.
        progress: is called with the number of bytes done since its last call; they add up to ``checkpoint.size``.

    Raises:
        FoldError: the changes do not fit the checkpoint, a weight would become non-finite, or is not what was to be
            written. Nothing was written.
        LoraFxError: ``out`` exists or cannot be written, or the checkpoint cannot be read any more.
    """
    _check_fits(checkpoint, changes)
    copied, skipped = _other_files(checkpoint)
    _check_apart(checkpoint, copied, out)
    changed = {**changes.merges, **changes.replacements}
    with replacing(out, overwrite=overwrite) as beside:
        beside.mkdir()
        for path in copied:
            _copy_file(path, beside / path.name)
        report = _write_files(checkpoint, changes, beside, progress)
        check_finite(report)
        misrounded = _misrounded(checkpoint, changes, beside) if verify else None
    merged_bytes = sum(checkpoint.tensors[key][1].size for key in changed)
    weights = tuple(report[key] for key in checkpoint.tensors if key in changes.merges)
    return CheckpointReport(weights, checkpoint.size - merged_bytes, merged_bytes, misrounded, skipped)


# What is refused before anything is written.


def _check_fits(checkpoint: Checkpoint, changes: Changes) -> None:
    problems = [f"{key!r} is to be both added to and replaced" for key in changes.merges if key in changes.replacements]
    for key in (*changes.merges, *changes.replacements):
        if key not in checkpoint.tensors:
            problems.append(f"there is no {key!r}{did_you_mean(key, checkpoint.tensors)}")
    for key, merge in changes.merges.items():
        if key in checkpoint.tensors:
            problems += _merge_problems(key, merge, checkpoint.tensors[key][1], changes.tensors)
    for key, value in changes.replacements.items():
        if key in checkpoint.tensors:
            problems += _replacement_problems(key, value, checkpoint.tensors[key][1])
    if problems:
        raise FoldError(f"{checkpoint.directory} cannot be changed so: {'; '.join(dict.fromkeys(problems))}.")


def _merge_problems(key: str, merge: Merge, entry: TensorEntry, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    if entry.dtype not in FOLDABLE:
        yield f"{key!r} is {entry.dtype}, to which nothing can be added: dequantise the checkpoint first"
        return
    if not merge.updates:
        yield f"nothing is to be added to {key!r}"
    for update in merge.updates:
        lacking = [name for name in update.names if name not in tensors]
        yield from (f"{name!r}, which is to be added to {key!r}, is missing" for name in lacking)
        empty = [name for name in update.names if name in tensors and tensors[name].is_meta]
        yield from (f"{name!r} is on the meta device: load it first" for name in empty)
        if not lacking and not empty:
            problem = _shape_problem(merge, update, entry, tensors)
            if problem:
                yield f"what is to be added to {key!r} does not fit: {problem}"


def _shape_problem(merge: Merge, update: Update, entry: TensorEntry, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return why the product of an update is not of the weight's shape; None if it is."""
    try:
        weight = merge.stack(torch.empty(entry.shape, device="meta"))
        product: torch.Tensor | None = None
        for factor in update.factors:
            tensor = factor.view.apply(torch.empty(tensors[factor.name].shape, device="meta"))
            tensor = tensor if tensor.dim() == 3 else tensor[None]
            product = tensor if product is None else tensor @ product
    except (RuntimeError, IndexError, ValueError) as error:
        return str(error).splitlines()[0]
    if product is None or product.dim() != 3:
        return "it is not a matrix or a stack of them"
    matrices, rows, columns = product.shape
    if update.places is not None:
        rows = tensors[update.places].numel()
    found = (matrices, columns, rows) if merge.layout == "in_out" else (matrices, rows, columns)
    return None if found == tuple(weight.shape) else f"it is {list(found)}, the weight {list(weight.shape)}"


def _replacement_problems(key: str, value: torch.Tensor, entry: TensorEntry) -> Iterator[str]:
    if tuple(value.shape) != entry.shape:
        yield f"the new value of {key!r} is {list(value.shape)}, the old one {list(entry.shape)}"
    if value.is_meta:
        yield f"the new value of {key!r} is on the meta device: load it first"
    if value.dtype != entry.dtype and not {value.dtype, entry.dtype} <= FOLDABLE:
        yield f"the new value of {key!r} is {value.dtype}, the old one {entry.dtype}: convert it first"


def _check_apart(checkpoint: Checkpoint, copied: Sequence[Path], out: Path) -> None:
    """Refuse to replace a directory that holds what is read."""
    place = out.resolve()
    read = [checkpoint.directory, *copied, *(file.path for file in checkpoint.files)]  # may be links to somewhere else
    if any(place in (path.resolve(), *path.resolve().parents) for path in read):
        raise FoldError(f"{out} holds the checkpoint {checkpoint.directory} itself. Write to another directory.")


# Files beside those with tensors.

_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".tflite",
    ".ot",
)
_ADAPTER = "adapter_config.json"  # transformers would look for the adapter beside it


def _other_files(checkpoint: Checkpoint) -> tuple[list[Path], tuple[str, ...]]:
    """Return the files to be copied as they are, and the names of what is not."""
    copied, skipped = [], []
    own = {file.path.name for file in checkpoint.files}
    for path in sorted(checkpoint.directory.iterdir()):
        if path.name in own:
            continue
        weights = (
            path.name.endswith((*_WEIGHTS, *(f"{end}.index.json" for end in _WEIGHTS))) and path != checkpoint.index
        )
        if not path.is_file() or path.name.startswith(".") or path.name == _ADAPTER or weights:
            skipped.append(f"{path.name}/" if path.is_dir() else path.name)
        else:
            copied.append(path)
    return copied, tuple(skipped)


def _copy_file(source: Path, target: Path) -> None:
    with _reading(source) as file, target.open("wb", buffering=0) as new:
        _copy(file, new, 0, os.fstat(file.fileno()).st_size)


# Writing the files with tensors.


@dataclass(frozen=True)
class _Piece:
    """Some bytes of a file with tensors: those of one that is changed, or a run of others."""

    file: TensorFile
    start: int
    end: int
    key: str | None = None


def _pieces(file: TensorFile, changed: Mapping[str, Any]) -> Iterator[_Piece]:
    """Yield what is behind the header of a file, in order; runs of untouched tensors in steps of limited size."""
    start = len(file.header)
    ends = [entry for key, entry in file.entries.items() if key in changed]
    for entry in [*ends, None]:
        end = _size(file) if entry is None else entry.start
        for first in range(start, end, PIECE):
            yield _Piece(file, first, min(first + PIECE, end))
        if entry is not None:
            yield _Piece(file, entry.start, entry.end, entry.name)
            start = entry.end


def _write_files(
    checkpoint: Checkpoint, changes: Changes, directory: Path, progress: Callable[[int], object]
) -> dict[str, FoldedWeight]:
    changed = {**changes.merges, **changes.replacements}
    for file in checkpoint.files:
        with (directory / file.path.name).open("wb") as new:
            new.write(file.header)
            new.truncate(_size(file))
        progress(len(file.header))
    pieces = [piece for file in checkpoint.files for piece in _pieces(file, changed)]
    buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
    size = max((piece.end - piece.start for piece in pieces if piece.key not in changes.replacements), default=0)
    largest = max((entry.size for _, entry in checkpoint.tensors.values()), default=0)
    for _ in range(max(2, min(WORKERS, MEMORY * largest // (size + _SPACE)))):
        buffers.put(_aligned(size))
    report: dict[str, FoldedWeight] = {}
    with _workers() as pool:
        outcomes = pool.map(partial(_write_piece, changes, directory, buffers), pieces)
        for piece, outcome in zip(pieces, outcomes, strict=True):
            if piece.key is not None and outcome is not None:
                report[piece.key] = outcome
            progress(piece.end - piece.start)
    return report


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Yield threads that share the cores: each reads, computes and writes by itself, so that none waits for another."""
    with exclusive():
        threads = torch.get_num_threads()
        share = max(1, threads // WORKERS)
        try:
            with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(share,)) as pool:
                yield pool
        finally:
            torch.set_num_threads(threads)  # libraries below torch have one number for all threads


def _write_piece(
    changes: Changes, directory: Path, buffers: SimpleQueue[torch.Tensor], piece: _Piece
) -> FoldedWeight | None:
    """Write one piece to the file of the same name, and return what there is to report of it."""
    path, new_path = piece.file.path, directory / piece.file.path.name
    with new_path.open("r+b", buffering=0) as new, _direct(new_path) as direct:
        if piece.key is not None and piece.key in changes.replacements:
            value = _new_value(changes.replacements[piece.key], piece.file.entries[piece.key])
            _write(new, bytes_of(value), piece.start)
            return _replaced(piece.key, value)
        buffer = buffers.get()
        try:
            with _reading(path, _size(piece.file)) as file:
                if piece.key is None and direct is None:
                    _copy(file, new, piece.start, piece.end)
                    return None
                data = _place(buffer, piece)
                _read(file, bytes_of(data), piece.start)
            report = None if piece.key is None else _merge(changes, piece.file.entries[piece.key], data)
            _write(new, bytes_of(data), piece.start, direct)
        finally:
            buffers.put(buffer)
        return report


def _merge(changes: Changes, entry: TensorEntry, data: torch.Tensor) -> FoldedWeight:
    merge = changes.merges[entry.name]
    weight = data.view(entry.dtype).view(entry.shape)
    merged = merge_into(weight, merge, _factors(merge, changes), weight)
    return FoldedWeight(merge, merged, str(entry.dtype).removeprefix("torch."))


def _factors(merge: Merge, changes: Changes) -> dict[str, torch.Tensor]:
    return {name: changes.tensors[name].cpu() for update in merge.updates for name in update.names}


def _new_value(value: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    return rounded(value.detach().cpu(), entry.dtype).contiguous()


def _replaced(key: str, value: torch.Tensor) -> FoldedWeight:
    """Return an entry for a tensor that is replaced, so that its infinities are told like those of others."""
    bad = int((~torch.isfinite(value)).count_nonzero()) if value.dtype in FOLDABLE else 0
    return FoldedWeight(Merge(key, (key,), ()), Merged(non_finite=bad), str(value.dtype).removeprefix("torch."))


# Bytes.


@contextmanager
def _reading(path: Path, size: int | None = None) -> Iterator[FileIO]:
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


def _read(file: FileIO, buffer: memoryview, start: int) -> None:
    try:
        file.seek(start)
        fill(buffer, file.readinto)
    except EOFError as error:
        raise LoraFxError(f"{file.name} became shorter while it was read. Fold once more.") from error
    except OSError as error:
        raise LoraFxError(f"cannot read {file.name}: {error.strerror or error}.") from error


_PAGE = 4096
"""What places in a file and in memory are multiples of, where bytes go from one to the other without a copy between."""


def _aligned(size: int) -> torch.Tensor:
    """Return memory for that many bytes, which may begin anywhere in its first page."""
    memory = torch.empty(size + 2 * _PAGE, dtype=torch.uint8)
    return memory[-memory.data_ptr() % _PAGE :]


def _place(buffer: torch.Tensor, piece: _Piece) -> torch.Tensor:
    """Return as much memory as a piece has bytes, which lies in its page as they do in theirs if elements may lie so."""
    entry = None if piece.key is None else piece.file.entries[piece.key]
    apart = entry is not None and piece.start % entry.dtype.itemsize
    return buffer[0 if apart else piece.start % _PAGE :][: piece.end - piece.start]


@contextmanager
def _direct(path: Path) -> Iterator[int | None]:
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


def _write(new: FileIO, buffer: memoryview, start: int, direct: int | None = None) -> None:
    """Write some bytes: whole pages directly where that is possible, and all else as usual."""
    done, whole = min(-start % _PAGE, len(buffer)), len(buffer) - (start + len(buffer)) % _PAGE
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


def _copy(file: FileIO, new: FileIO, start: int, end: int) -> None:
    """Copy some bytes to the same place of another file: within the kernel where it can, else through a small buffer."""
    done = _copied_by_kernel(file.fileno(), new.fileno(), start, end)
    buffer = memoryview(bytearray(min(2**20, end - done)))
    while done < end:
        part = buffer[: end - done]
        _read(file, part, done)
        _write(new, part, done)
        done += len(part)


def _copied_by_kernel(file: int, new: int, start: int, end: int) -> int:
    """Return up to where the kernel copied."""
    done = start
    while done < end and hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(file, new, min(PIECE, end - done), done, done)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            break  # it cannot, or which side failed will be seen without it
        if count == 0:
            break
        write_back_early(new, done, count)
        done += count
    return done


# Looking at what was written.


def _misrounded(checkpoint: Checkpoint, changes: Changes, directory: Path) -> float:
    """Return the largest share of a weight in half precision that is not the exact result rounded once; refuse what is wrong."""
    largest = 0.0
    for file in checkpoint.files:
        written = TensorFile.open(directory / file.path.name)
        for key, entry in written.entries.items():
            if key in changes.replacements:
                expected = _new_value(changes.replacements[key], entry)
                if bytes_of(expected) != bytes_of(written.read(key)):
                    raise FoldError(_wrong(key, "it is not the value that was to be put in"))
            if key in changes.merges:
                merge = changes.merges[key]
                share = _share(key, file.read(key), written.read(key), merge, _factors(merge, changes))
                largest = max(largest, share)
    return largest


def _share(key: str, old: torch.Tensor, new: torch.Tensor, merge: Merge, tensors: Mapping[str, torch.Tensor]) -> float:
    wrong, stack = 0, merge.stack(new)
    source = merge.stack(old)
    for index, rows, exact in exact_blocks(old, merge, tensors):
        found = stack[index, rows]
        if not found.numel():
            continue
        steps = (_steps(found) - _steps(rounded(exact, new.dtype))).abs()
        wrong += int(steps.count_nonzero())
        update = (exact - source[index, rows].double()).abs().max()
        far = (steps > 1) & ((found.double() - exact).abs() > UNITS * update)
        if far.any():
            row, column = (int(place) for place in far.nonzero()[0])
            where = f"row {rows.start + row}, column {column}"
            raise FoldError(
                _wrong(key, f"at {where} it is {found[row, column].item()}, exactly {exact[row, column].item()}")
            )
    if new.dtype.itemsize > 2:
        return 0.0  # its sums are formed in its own precision, and are not exact to the last digit
    elements = max(1, new.numel())
    if wrong > MISROUNDED * elements + FEW:
        raise FoldError(_wrong(key, f"{wrong} of {elements} elements are not the exact ones rounded once"))
    return wrong / elements


UNITS = 2.0**-18
"""Part of the largest update of a block by which float32 may be off: where old value and update cancel, of many steps."""

FEW = 4
"""How many elements that are not correctly rounded are nothing to wonder at in the smallest weight."""


def _steps(values: torch.Tensor) -> torch.Tensor:
    """Return whole numbers of which neighbouring values of a floating-point type have neighbouring ones; -0 is 0."""
    bits = values.contiguous().view(_INTEGERS[values.dtype.itemsize]).long()
    least = torch.iinfo(_INTEGERS[values.dtype.itemsize]).min
    return torch.where(bits < 0, least - bits, bits)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _wrong(key: str, problem: str) -> str:
    return (
        f"{key!r} was not written as it should be: {problem}. Nothing was kept. Write again; if it happens again, "
        "memory or disk are faulty, or lora_fx is."
    )
