"""Writing a changed checkpoint: one tensor at a time, so that no model is ever in memory.

W' = W + Σ scaling · B A        for each weight that is changed; all else is copied byte by byte

Each file of the result has the header that the one of the checkpoint has, and its tensors in the same places. Tensors that the
checkpoint lacks are behind those of the last file, whose header is longer by whole pages.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from queue import SimpleQueue

import torch

from lora_fx.files.atomic import replacing
from lora_fx.files.direct_io import (
    PAGE,
    PIECE,
    aligned_memory,
    copy_bytes,
    copy_file,
    direct_descriptor,
    place_in_page,
    read_at,
    reading,
    write_at,
)
from lora_fx.files.safetensors import TensorFile, bytes_of, grown_header
from lora_fx.files.target import DirectoryKind, Target
from lora_fx.folding.checkpoint import Changes, Checkpoint, is_weights, size_of
from lora_fx.folding.checkpoint_check import changed_in_files, check_fits, misrounded_share
from lora_fx.folding.checkpoint_files import Companions, companions_of
from lora_fx.folding.report import FoldedWeight, check_finite
from lora_fx.graph.process_state import exclusive
from lora_fx.numerics.lowrank_merge import FOLDABLE, merge_into

WORKERS = 3
"""How many threads read, compute and write: two keep the processor busy while one waits for the disk."""

MEMORY = 3
"""How many times the largest tensor may be taken of memory; of small ones, a little more."""

_SPACE = 2**23  # bytes that a merge needs beside the weight


@dataclass(frozen=True)
class CheckpointReport:
    """Outcome of a fold of a checkpoint.

    Attributes:
        weights: figures for each weight that something was added to, in the order of the files; none if they were not asked for.
        copied_bytes: how many bytes of the files with tensors are those of the checkpoint, as they were.
        merged_bytes: how many are new.
        misrounded: largest share, of any weight in half precision, of elements that are not the exact result rounded once;
            None without ``verify``.
        skipped: files and directories that were not copied, each with the reason, by their paths in the directory.
    """

    weights: tuple[FoldedWeight, ...]
    copied_bytes: int
    merged_bytes: int
    misrounded: float | None
    skipped: Mapping[str, str]


def write_merged(
    checkpoint: Checkpoint,
    changes: Changes,
    out: Path,
    *,
    reads: Collection[Path] = (),
    overwrite: bool = False,
    verify: bool = False,
    report: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> CheckpointReport:
    """Write a checkpoint with some tensors changed, and with the other files of its directory.

    Tensors without a change are copied as bytes. Of changed ones, three at most are in memory at any time. The rest of the
    directory is copied as :func:`~lora_fx.folding.checkpoint_files.companions_of` lists it. A process that is killed leaves
    nothing at ``out``, or what was there.

    Args:
        checkpoint: the one to start from; left as it is.
        changes: merges and replacements of its tensors.
        out: directory to be made.
        reads: further files and directories that are not written over, those of the adapters.
        overwrite: replace a directory that holds nothing but an earlier result.
        verify: read all changed tensors once more, and compare them with the results in float64.
        report: read every weight that something was added to once more, before and after, and measure the update.
        progress: is called with the number of bytes done since its last call; they add up to ``checkpoint.size``.

    Raises:
        FoldError: the changes do not fit the checkpoint, a weight would become non-finite, or was written
            wrongly. Nothing was kept.
        LoraFxError: ``out`` exists or cannot be written, or the checkpoint cannot be read any more.
    """
    check_fits(checkpoint, changes)
    companions = companions_of(checkpoint)
    target = _target(checkpoint, companions, out, overwrite, reads)
    target.check()
    changed = changed_in_files(checkpoint, changes)
    with replacing(target) as beside:
        beside.mkdir()
        for name in companions.directories:
            (beside / name).mkdir()
        for name in companions.files:
            copy_file(checkpoint.directory / name, beside / name)
        _tell_of_additions(checkpoint, changes, beside)
        check_finite(_write_files(checkpoint, changes, changed, beside, progress))
        misrounded = misrounded_share(checkpoint, changes, changed, beside) if verify else None
        weights = tuple(_measured(checkpoint, changes, beside)) if report else ()
    entries = [file.entries[key] for file in checkpoint.files for key in changed[checkpoint.name_of(file)]]
    merged_bytes = sum(entry.size for entry in entries)
    added_bytes = sum(value.nbytes for value in changes.additions.values())
    return CheckpointReport(
        weights, checkpoint.size - merged_bytes, merged_bytes + added_bytes, misrounded, companions.skipped
    )


def _target(
    checkpoint: Checkpoint, companions: Companions, out: Path, overwrite: bool, reads: Collection[Path]
) -> Target:
    """Return the place of a result: apart from the checkpoint, its files, which may be links to elsewhere, and what else is read."""
    copied = [checkpoint.directory / name for name in companions.files]
    read = (checkpoint.directory, *copied, *(file.path for file in checkpoint.files), *reads)
    model = checkpoint.model.relative_to(checkpoint.directory)
    written = {*companions.files, *companions.directories, *(checkpoint.name_of(file) for file in checkpoint.files)}

    def is_written(path: str) -> bool:
        return path in written or (PurePosixPath(path).parent == PurePosixPath(model) and is_weights(path))

    return Target(out, overwrite, read, DirectoryKind("a checkpoint folded from this base", is_written))


# Writing the files with tensors.


@dataclass(frozen=True)
class _Piece:
    """Some bytes of a file of the result: one changed tensor, or a run of others.

    Attributes:
        file: of the checkpoint.
        target: of the result.
        source: where they begin in the file on disk; where they would, of a computed tensor.
        place: where they begin in the file of the result.
        size: how many there are.
        key: of the tensor that changes.
    """

    file: TensorFile
    target: Path
    source: int
    place: int
    size: int
    key: str | None = None


def _pieces(file: TensorFile, target: Path, shift: int, changed: Collection[str]) -> Iterator[_Piece]:
    """Yield the pieces behind the header of a file, in order; runs of untouched tensors in steps of limited size.

    Args:
        file: of the checkpoint.
        target: of the result, in which all is ``shift`` bytes, whole pages, further back.
        shift: see there.
        changed: its tensors that change.
    """
    runs: list[tuple[int, int, int]] = []  # begin on disk, begin in the result, size
    for key, entry in file.entries.items():
        source = file.on_disk.entries[key].start if not file.is_computed(key) else entry.start
        if key in changed:
            yield from _copies(file, target, runs)
            runs.clear()
            yield _Piece(file, target, source, entry.start + shift, entry.size, key)
        elif runs and runs[-1][0] + runs[-1][2] == source:
            begin, place, size = runs.pop()
            runs.append((begin, place, size + entry.size))
        else:
            runs.append((source, entry.start + shift, entry.size))
    yield from _copies(file, target, runs)


def _copies(file: TensorFile, target: Path, runs: Iterable[tuple[int, int, int]]) -> Iterator[_Piece]:
    for source, place, size in runs:
        for start in range(0, size, PIECE):
            yield _Piece(file, target, source + start, place + start, min(PIECE, size - start))


def _write_files(
    checkpoint: Checkpoint,
    changes: Changes,
    changed: Mapping[str, frozenset[str]],
    directory: Path,
    progress: Callable[[int], object],
) -> dict[str, int]:
    """Write all files with tensors, and return for each that is changed how many of its elements are not finite."""
    pieces: list[_Piece] = []
    for file in checkpoint.files:
        name = checkpoint.name_of(file)
        added = changes.additions if file is checkpoint.files[-1] else {}
        header = grown_header(file, added, PAGE) if added else file.header
        shift = len(header) - len(file.header)
        with (directory / name).open("wb") as new:
            new.write(header)
            new.truncate(size_of(file) + shift)
            new.seek(0, os.SEEK_END)
            new.writelines(bytes_of(value) for value in added.values())
        progress(len(file.header))
        pieces += _pieces(file, directory / name, shift, changed[name])
    buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
    size = max((piece.size for piece in pieces if piece.key not in changes.replacements), default=0)
    largest = max((entry.size for _, entry in checkpoint.tensors.values()), default=0)
    for _ in range(max(2, min(WORKERS, MEMORY * largest // (size + _SPACE)))):
        buffers.put(aligned_memory(size))
    non_finite: dict[str, int] = {}
    with _workers() as pool:
        outcomes = pool.map(partial(_write_piece, changes, buffers), pieces)
        for piece, count in zip(pieces, outcomes, strict=True):
            if piece.key is not None:
                non_finite[piece.key] = count
            progress(piece.size)
    return non_finite


def _tell_of_additions(checkpoint: Checkpoint, changes: Changes, directory: Path) -> None:
    """Say in the index which file has which tensors where others come or go, and in the config what else it is to say."""
    if checkpoint.index is not None:
        path = directory / checkpoint.index.relative_to(checkpoint.directory)
        found = json.loads(path.read_text("utf-8"))
        kept = {
            key: file.path.relative_to(checkpoint.model).as_posix() for key, (file, _) in checkpoint.tensors.items()
        }
        added = dict.fromkeys(changes.additions, checkpoint.files[-1].path.relative_to(checkpoint.model).as_posix())
        if added or kept.keys() != found["weight_map"].keys():
            places = found["weight_map"] if kept.keys() == found["weight_map"].keys() else kept
            found["weight_map"] = {**places, **added}
            if isinstance(found.get("metadata", {}).get("total_size"), int):
                sizes = [entry.size for _, entry in checkpoint.tensors.values()]
                found["metadata"]["total_size"] = sum(sizes) + sum(value.nbytes for value in changes.additions.values())
            path.write_text(f"{json.dumps(found, indent=2, ensure_ascii=False)}\n", "utf-8")
    if changes.config or changes.dropped_config:
        path = directory / checkpoint.model.relative_to(checkpoint.directory) / "config.json"
        found = json.loads(path.read_text("utf-8"))
        left = {key: value for key, value in found.items() if key not in changes.dropped_config}
        path.write_text(f"{json.dumps({**left, **changes.config}, indent=2, ensure_ascii=False)}\n", "utf-8")


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


def _write_piece(changes: Changes, buffers: SimpleQueue[torch.Tensor], piece: _Piece) -> int:
    """Write one piece to its file, and return how many elements that are new in it are not finite."""
    with piece.target.open("r+b", buffering=0) as new, direct_descriptor(piece.target) as direct:
        if piece.key is not None and piece.key in changes.replacements:
            value = changes.new_value(piece.file.entries[piece.key])
            write_at(new, bytes_of(value), piece.place)
            return _non_finite(value)
        buffer = buffers.get()  # of a computed tensor too, which is as large: so no more are in memory at a time
        try:
            if piece.key is not None and piece.file.is_computed(piece.key):
                value = piece.file.read(piece.key)
                count = _merge(changes, piece.key, value)
                write_at(new, bytes_of(value), piece.place)
                return count
            with reading(piece.file.path, size_of(piece.file.on_disk)) as file:
                if piece.key is None and direct is None:
                    copy_bytes(file, new, piece.source, piece.source + piece.size, piece.place - piece.source)
                    return 0
                entry = None if piece.key is None else piece.file.entries[piece.key]
                data = place_in_page(buffer, piece.place, piece.size, 1 if entry is None else entry.dtype.itemsize)
                read_at(file, bytes_of(data), piece.source)
            count = 0 if entry is None else _merge(changes, entry.name, data.view(entry.dtype).view(entry.shape))
            write_at(new, bytes_of(data), piece.place, direct)
        finally:
            buffers.put(buffer)
        return count


def _merge(changes: Changes, key: str, weight: torch.Tensor) -> int:
    merge = changes.merges.get(key)
    if merge is None:
        return _non_finite(weight)
    return merge_into(weight, merge, changes.factors_of(merge, weight), weight)


def _non_finite(value: torch.Tensor) -> int:
    if value.dtype not in FOLDABLE:
        return 0
    parts = value.reshape(-1).split(_SPACE // 8)  # torch.isfinite takes several times the memory of its argument
    return sum(int((~torch.isfinite(part)).count_nonzero()) for part in parts)


def _measured(checkpoint: Checkpoint, changes: Changes, directory: Path) -> Iterator[FoldedWeight]:
    """Yield figures for each weight that something was added to, read from both checkpoints."""
    for file in checkpoint.files:
        written = TensorFile.open(directory / checkpoint.name_of(file))
        for key in file.entries:
            if key in changes.merges and checkpoint.tensors[key][0] is file:
                merge = changes.merges[key]
                old = file.read(key)
                yield FoldedWeight.of(old, merge, changes.factors_of(merge, old), written.read(key))
