"""Files of the safetensors format: where each tensor lies in them, and writing new ones, always of the same bytes.

A file is ``<u64 length><JSON header><bytes of the tensors>``, little-endian, without gaps. Nothing in it is ever executed.
A header is checked against the size of the file before anything is allocated by it.
"""

from __future__ import annotations

import json
import math
import reprlib
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from lora_fx.errors import LoraFxError

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""Dtypes of the format for which torch has one whose elements are whole bytes, in the order in which the format sorts them."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(DTYPES.values())}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a file.

    Attributes:
        name: of the tensor.
        dtype: of its elements.
        shape: of the tensor.
        start: where its bytes begin in the file.
        end: where they end.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Number of its bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file, of which only the header was read.

    Attributes:
        path: of the file.
        metadata: texts that its writer put in.
        entries: its tensors by name, in the order of their bytes.
        header: all bytes before those of the tensors.
    """

    path: Path
    metadata: Mapping[str, str]
    entries: Mapping[str, TensorEntry]
    header: bytes

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read and check the header of a file.

        Raises:
            LoraFxError: there is no such file, it cannot be read, is of another format, or its header and its size do not
                fit each other.
        """
        try:
            if not path.is_file():
                kind = "is not a file" if path.exists() else "does not exist"
                raise LoraFxError(f"{path} {kind}; a safetensors file was expected.")
            size = path.stat().st_size
            header = _read_header(path, size)
        except OSError as error:
            raise LoraFxError(f"cannot read {path}: {error.strerror or error}.") from error
        metadata, entries = _parsed(path, header, size)
        try:
            with safe_open(path, framework="numpy"):
                pass  # opening is the library's check of the header
        except (SafetensorError, OSError) as error:
            raise LoraFxError(f"{path} is not a valid safetensors file: {error}. {_AGAIN}") from error
        return cls(path, metadata, entries, header)

    @property
    def on_disk(self) -> TensorFile:
        """The file as it lies on disk: this one, but for a :class:`~lora_fx.files.computed_file.ComputedFile`."""
        return self

    def is_computed(self, name: str) -> bool:  # noqa: ARG002
        """Tell whether a tensor is not on disk as it is read, see :class:`~lora_fx.files.computed_file.ComputedFile`."""
        return False

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in memory of its own.

        Raises:
            LoraFxError: the file has no such tensor, or does not have all of its bytes any more.
        """
        entry = self._entry(name)
        return self._elements(entry, entry.start, entry.end).reshape(entry.shape)

    def pieces(self, name: str, elements: int) -> Iterator[torch.Tensor]:
        """Yield the elements of a tensor in order, in flat tensors of ``elements`` of them at most; it raises as ``read``."""
        entry = self._entry(name)
        step = elements * entry.dtype.itemsize
        for start in range(entry.start, entry.end, step):
            yield self._elements(entry, start, min(start + step, entry.end))

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise LoraFxError(f"{self.path} has no tensor {name!r}.")
        return self.entries[name]

    def _elements(self, entry: TensorEntry, start: int, end: int) -> torch.Tensor:
        data = torch.empty(end - start, dtype=torch.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(start)
                fill(data.numpy().data, file.readinto)
        except EOFError as error:
            raise LoraFxError(
                f"{self.path} became shorter while it was read: {entry.name!r} is not there any more."
            ) from error
        except OSError as error:
            raise LoraFxError(f"cannot read {entry.name!r} in {self.path}: {error.strerror or error}.") from error
        return data.view(entry.dtype)


def equal_in_files(
    one: tuple[TensorFile, TensorEntry], other: tuple[TensorFile, TensorEntry], dtype: torch.dtype | None = None
) -> bool:
    """Tell whether two tensors in files have one shape and equal values, of which little is in memory at a time.

    Args:
        one: a file, and the place of a tensor there.
        other: the same of the other tensor.
        dtype: in which their values are compared; by default their dtypes are compared, and their bytes.
    """
    (file, entry), (second, like) = one, other
    if entry.shape != like.shape or (dtype is None and entry.dtype != like.dtype):
        return False
    pairs = zip(file.pieces(entry.name, _PIECE), second.pieces(like.name, _PIECE), strict=True)
    if dtype is None:
        return all(bytes_of(mine) == bytes_of(theirs) for mine, theirs in pairs)
    return all(torch.equal(mine.to(dtype), theirs.to(dtype)) for mine, theirs in pairs)


_PIECE = 2**22  # elements that are compared at a time


def fill(buffer: memoryview, readinto: Any) -> None:
    """Call ``readinto`` until a buffer is full.

    Raises:
        EOFError: there is not as much to read.
    """
    done = 0
    while done < len(buffer):
        count = readinto(buffer[done:])
        if not count:
            raise EOFError
        done += count


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, as a view of its memory."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file, of bytes that depend on nothing but the arguments: not on the order of either mapping.

    Args:
        path: of the file, which is written in place: see :func:`~lora_fx.files.atomic.replacing`.
        tensors: by name. They may lie anywhere in memory and on any device but meta.
        metadata: texts to put in.

    Raises:
        LoraFxError: a tensor has no values, or is of a dtype or layout that the format does not have.
    """
    for name, tensor in tensors.items():
        _check_writable(path, name, tensor)
    layout, entries = layout_of(
        path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, metadata
    )
    with path.open("wb") as file:
        file.write(layout)
        for name in entries:
            file.write(bytes_of(tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()))


def layout_of(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorEntry]]:
    """Return the header of a new file, and its entries in the order of their bytes: by size of their elements, then by name.

    Args:
        path: of the file, for messages.
        tensors: dtype and shape by name, in any order.
        metadata: texts to put in.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-_ORDER[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    layout = struct.pack("<Q", len(text)) + text
    return layout, _parsed(path, layout, len(layout) + end)[1]


def grown_header(file: TensorFile, added: Mapping[str, torch.Tensor], multiple: int) -> bytes:
    """Return the header of a file that has further tensors behind its own, whose bytes follow in the order of ``added``.

    Args:
        file: to grow.
        added: tensors of names that it does not have.
        multiple: the header becomes longer by so many bytes, or several times as many.
    """
    header = json.loads(file.header[8:].decode())
    end = max((entry.end for entry in file.entries.values()), default=len(file.header)) - len(file.header)
    for name, tensor in added.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * ((len(file.header) - 8 - len(text)) % multiple)
    return struct.pack("<Q", len(text)) + text


def _check_writable(path: Path, name: str, tensor: torch.Tensor) -> None:
    problem = None
    if name == "__metadata__":
        problem = "is called as the format calls its metadata. Rename it"
    elif tensor.is_meta:
        problem = "is on the meta device and has no values. Load it first"
    elif tensor.layout != torch.strided:
        problem = f"is stored as {tensor.layout}, which the format does not have. Make it dense first"
    elif tensor.dtype not in _NAMES:
        problem = f"is {tensor.dtype}, which the format does not have. Convert or dequantise it first"
    if problem is not None:
        raise LoraFxError(f"cannot write {path}: the tensor {name!r} {problem}.")


# Reading a header.

_AGAIN = "Copy or download it again."


def _read_header(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        first = file.read(9)
        length = int.from_bytes(first[:8], "little")
        if len(first) < 9 or first[8:] != b"{":
            raise LoraFxError(_no_header(path, first, size))
        if length > size - 8:
            raise LoraFxError(
                f"{path} is cut off, or no safetensors file: its header is to have {length} bytes, but the file has {size}. {_AGAIN}"
            )
        if length > _MAX_HEADER:
            raise LoraFxError(
                f"{path}: the header has {length} bytes; at most {_MAX_HEADER} are allowed. Split the file into shards."
            )
        file.seek(0)
        return file.read(8 + length)


def _no_header(path: Path, first: bytes, size: int) -> str:
    if first[:4] == b"PK\x03\x04" or (first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return (
            f"{path} is a pickle of torch.save, not a safetensors file. Pickles are not read, since they can run any code. "
            "Convert it: safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
        )
    found = f"has {size} bytes only" if size < 9 else f"begins with {first!r}"
    return f"{path} is cut off, or no safetensors file: the length of a header and '{{' were expected, it {found}. {_AGAIN}"


def _parsed(path: Path, header: bytes, size: int) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    try:
        found = json.loads(header[8:].decode(), object_pairs_hook=_without_duplicates)
    except _DuplicateError as error:
        raise LoraFxError(f"{path}: the header has the key {error.args[0]!r} twice. Write the file again.") from error
    except (ValueError, RecursionError) as error:
        raise LoraFxError(f"{path}: the header is not JSON: {error}. {_AGAIN}") from error
    if not isinstance(found, dict):
        raise LoraFxError(f"{path}: the header is not a JSON object. {_AGAIN}")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise LoraFxError(f"{path}: __metadata__ in the header has to be an object of texts. Write the file again.")
    entries = [_entry(path, len(header), name, value) for name, value in found.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    _check_places(path, entries, len(header), size)
    return metadata, {entry.name: entry for entry in entries}


class _DuplicateError(Exception):
    """A JSON object has a key twice."""


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise _DuplicateError(key)
        made[key] = value
    return made


def _entry(path: Path, base: int, name: str, value: Any) -> TensorEntry:
    def refuse(problem: str) -> NoReturn:
        raise LoraFxError(f"{path}: the tensor {name!r} {problem}")

    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        refuse(f"has no dtype, shape and data_offsets in the header. {_AGAIN}")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        refuse(
            f"is of dtype {_shown(kind)}, which torch does not have. Known are {', '.join(DTYPES)}: convert it to one of them."
        )
    if not _are_sizes(shape):
        refuse(f"has the shape {_shown(shape)}; a list of sizes was expected. {_AGAIN}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(f"has the data_offsets {_shown(offsets)}; where it begins and where it ends were expected. {_AGAIN}")
    dtype = DTYPES[kind]
    expected = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != expected:
        refuse(f"has {offsets[1] - offsets[0]} bytes; its shape {shape} in {kind} takes {expected}. {_AGAIN}")
    return TensorEntry(name, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _shown(value: Any) -> str:
    """Return a value of a header, of bounded length; an integer of thousands of digits has no text."""
    text = reprlib.repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


_MAX_SHOWN = 200


def _are_sizes(value: Any) -> bool:
    """Tell whether these are numbers that torch takes for sizes, also those of an empty tensor."""
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        return False
    product = 1
    for number in value:
        if type(number) is not int or number < 0:
            return False
        product *= max(number, 1)
        if product >= 2**60:  # at once: products of many hostile numbers take hours
            return False
    return True


_MAX_DIMENSIONS = 64  # of torch


def _check_places(path: Path, entries: Iterable[TensorEntry], base: int, size: int) -> None:
    last, end = "the header", base
    for entry in entries:
        if entry.end > size:
            raise LoraFxError(
                f"{path} is cut off: the tensor {entry.name!r} ends at byte {entry.end}, the file at byte {size}. {_AGAIN}"
            )
        if entry.start < end:
            raise LoraFxError(f"{path}: the tensor {entry.name!r} overlaps {last}. Write the file again.")
        if entry.start > end:
            raise LoraFxError(
                f"{path}: between {last} and the tensor {entry.name!r} are {entry.start - end} bytes of no tensor. Write the file again."
            )
        last, end = f"the tensor {entry.name!r}", entry.end
    if end != size:
        raise LoraFxError(f"{path}: after {last} are {size - end} bytes of no tensor. Write the file again.")
