"""Safetensors files: what is read of them, what is refused, and that what is written is always the same bytes."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.files import safetensors as tensor_files
from lora_fx.files.safetensors import DTYPES, TensorEntry, TensorFile, equal_in_files, write_tensors

AGAIN = "Copy or download it again."


def _file(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _entry(dtype: str = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _tensors() -> dict[str, torch.Tensor]:
    """Return one tensor of every dtype, and of every awkward shape."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (3, 2, 16), generator=generator, dtype=torch.uint8)
    made = {
        name: raw[..., : dtype.itemsize].contiguous().view(dtype) for name, dtype in DTYPES.items() if name != "BOOL"
    }
    made["BOOL"] = raw[..., 0] > 128
    return {**made, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "é": torch.ones(1, dtype=torch.bfloat16)}


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor_files.bytes_of(tensor.contiguous()))


# Reading.


def test_a_file_of_the_library_is_read_as_it_was_written(tmp_path: Path) -> None:
    tensors, path = _tensors(), tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    file = TensorFile.open(path)
    assert file.path == path
    assert file.metadata == {"format": "pt"}
    assert file.entries.keys() == tensors.keys()
    assert path.read_bytes().startswith(file.header)
    end = len(file.header)
    for name, entry in file.entries.items():
        tensor = tensors[name]
        assert entry == TensorEntry(name, tensor.dtype, tuple(tensor.shape), end, end + tensor.nbytes)
        assert entry.size == tensor.nbytes
        found, end = file.read(name), entry.end
        assert (found.dtype, found.shape, _bits(found)) == (tensor.dtype, tensor.shape, _bits(tensor))
    assert end == path.stat().st_size


def test_what_was_read_is_memory_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tensors(path, {"a": torch.ones(3)}, {})
    file = TensorFile.open(path)
    file.read("a").zero_()
    assert file.read("a").tolist() == [1, 1, 1]


def test_entries_are_in_the_order_of_their_bytes_whatever_that_of_the_header(tmp_path: Path) -> None:
    header = {"b": _entry(offsets=[4, 8]), "z": _entry(shape=[0], offsets=[4, 4]), "a": _entry(offsets=[0, 4])}
    file = TensorFile.open(_file(tmp_path / "x", header, bytes(range(8))))
    assert list(file.entries) == ["a", "z", "b"]
    assert file.read("b").tolist() == [4, 5, 6, 7]
    assert file.read("z").shape == (0,)


def test_a_file_without_tensors_is_one(tmp_path: Path) -> None:
    file = TensorFile.open(_file(tmp_path / "x", {}))
    assert (file.metadata, file.entries, file.header) == ({}, {}, b"\2" + bytes(7) + b"{}")


# Refusals.


def _refusal(path: Path) -> str:
    with pytest.raises(LoraFxError) as caught:
        TensorFile.open(path)
    return str(caught.value)


HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "gap": ({"a": _entry(), "b": _entry(offsets=(6, 10))}, bytes(10),
        "between the tensor 'a' and the tensor 'b' are 2 bytes of no tensor. Write the file again."),
    "gap at the start": ({"a": _entry(offsets=(2, 6))}, bytes(6),
        "between the header and the tensor 'a' are 2 bytes of no tensor. Write the file again."),
    "rest": ({"a": _entry()}, bytes(6), "after the tensor 'a' are 2 bytes of no tensor. Write the file again."),
    "overlap": ({"a": _entry(), "b": _entry(offsets=(2, 6))}, bytes(6),
        "the tensor 'b' overlaps the tensor 'a'. Write the file again."),
    "the same bytes twice": ({"a": _entry(), "b": _entry()}, bytes(4),
        "the tensor 'b' overlaps the tensor 'a'. Write the file again."),
    "shape": ({"a": _entry("BF16", [3])}, bytes(4), f"the tensor 'a' has 4 bytes; its shape [3] in BF16 takes 6. {AGAIN}"),
    "dtype": ({"a": _entry("F4")}, bytes(4), "the tensor 'a' is of dtype 'F4', which torch does not have. Known are "
        f"{', '.join(DTYPES)}: convert it to one of them."),
    "dtype of no text": ({"a": _entry(["F32"])}, bytes(4),  # type: ignore[arg-type]
        "the tensor 'a' is of dtype ['F32'], which torch does not have. Known are "
        f"{', '.join(DTYPES)}: convert it to one of them."),
    "negative size": ({"a": _entry(shape=[-2, -2])}, bytes(4),
        f"the tensor 'a' has the shape [-2, -2]; a list of sizes was expected. {AGAIN}"),
    "sizes of no number": ({"a": _entry(shape=[True, "4"])}, bytes(4),
        f"the tensor 'a' has the shape [True, '4']; a list of sizes was expected. {AGAIN}"),
    "no list": ({"a": _entry(shape=4)}, bytes(4), f"the tensor 'a' has the shape 4; a list of sizes was expected. {AGAIN}"),
    "sizes too large for torch": ({"a": _entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}, b"",
        f"the tensor 'a' has the shape [{2**62}, {2**62}, 0]; a list of sizes was expected. {AGAIN}"),
    "offsets": ({"a": _entry(offsets=[4, 0])}, bytes(4),
        f"the tensor 'a' has the data_offsets [4, 0]; where it begins and where it ends were expected. {AGAIN}"),
    "three offsets": ({"a": _entry(offsets=[0, 4, 4])}, bytes(4),
        f"the tensor 'a' has the data_offsets [0, 4, 4]; where it begins and where it ends were expected. {AGAIN}"),
    "entry": ({"a": 3}, bytes(4), f"the tensor 'a' has no dtype, shape and data_offsets in the header. {AGAIN}"),
    "lacking": ({"a": {"dtype": "U8"}}, bytes(4), f"the tensor 'a' has no dtype, shape and data_offsets in the header. {AGAIN}"),
    "metadata": ({"__metadata__": {"a": 3}}, b"", "__metadata__ in the header has to be an object of texts. Write the file again."),
    "key twice": (b'{"a":' + json.dumps(_entry()).encode() + b',"a":' + json.dumps(_entry()).encode() + b"}", bytes(4),
        "the header has the key 'a' twice. Write the file again."),
    "key of an entry twice": (b'{"a":{"dtype":"U8","dtype":"U8"}}', b"", "the header has the key 'dtype' twice. Write the file again."),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_does_not_fit_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    header, data, said = HEADERS[kind]
    path = _file(tmp_path / "x", header, data)
    assert _refusal(path) == f"{path}: {said}"


def test_a_tensor_beyond_the_end_is_one_of_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = _file(tmp_path / "x", {"a": _entry()}, bytes(3))
    size = path.stat().st_size
    assert (
        _refusal(path) == f"{path} is cut off: the tensor 'a' ends at byte {size + 1}, the file at byte {size}. {AGAIN}"
    )
    huge = _file(tmp_path / "y", {"a": _entry("F64", [2**50], [0, 2**53])}, bytes(3))
    assert "is cut off: the tensor 'a' ends at byte 9007199254" in _refusal(huge)


@pytest.mark.parametrize("length", [3, 2**40, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    path = _file(tmp_path / "x", b"{}", length=length)
    assert _refusal(path) == (
        f"{path} is cut off, or no safetensors file: its header is to have {length} bytes, but the file has 10. {AGAIN}"
    )


def test_a_header_larger_than_the_library_reads_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(200_000_000)
    assert (
        _refusal(path)
        == f"{path}: the header has 100000001 bytes; at most 100000000 are allowed. Split the file into shards."
    )


@pytest.mark.parametrize("data", [b"", b"\x10\0\0", bytes(8)])
def test_a_file_of_a_few_bytes_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    assert _refusal(path) == (
        f"{path} is cut off, or no safetensors file: the length of a header and '{{' were expected, it has {len(data)} bytes only. {AGAIN}"
    )


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"GGUF, or a text that is none of it")
    assert _refusal(path) == (
        f"{path} is cut off, or no safetensors file: the length of a header and '{{' were expected, it begins with b'GGUF, or '. {AGAIN}"
    )


@pytest.mark.parametrize("text", [b"{]", b"{\xff}", b'{"a": ' + b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_header_that_is_no_json_is_refused(tmp_path: Path, text: bytes) -> None:
    path = _file(tmp_path / "x", text)
    said = _refusal(path)
    assert said.startswith(f"{path}: the header is not JSON: ")
    assert said.endswith(AGAIN)


def test_what_only_the_library_refuses_is_refused_in_its_words(tmp_path: Path) -> None:
    path = _file(tmp_path / "x", b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1")
    said = _refusal(path)
    assert said.startswith(f"{path} is not a valid safetensors file: ")
    assert said.endswith(f". {AGAIN}")


class _Runs:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_a_pickle_is_refused_and_not_executed(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    if kind == "plain":
        path.write_bytes(pickle.dumps(_Runs()))
    else:
        torch.save({"a": torch.ones(3), "b": _Runs()}, path, _use_new_zipfile_serialization=kind == "zip")
    assert _refusal(path) == (
        f"{path} is a pickle of torch.save, not a safetensors file. Pickles are not read, since they can run any code. Convert it: "
        "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
    )
    assert not (tmp_path / "executed").exists()


def test_a_file_that_is_not_there_or_none_is_refused(tmp_path: Path) -> None:
    for path, kind in (
        (tmp_path / "x", "does not exist"),
        (tmp_path, "is not a file"),
        (tmp_path / "pipe", "is not a file"),
    ):
        if path.name == "pipe":
            os.mkfifo(path)
        assert _refusal(path) == f"{path} {kind}; a safetensors file was expected."


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _file(tmp_path / "x", {})

    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", fail)
    assert _refusal(path) == f"cannot read {path}: Permission denied."


def test_a_tensor_that_is_not_there_or_not_any_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tensors(path, {"a": torch.ones(3), "b": torch.ones(3)}, {})
    file = TensorFile.open(path)
    os.truncate(path, path.stat().st_size - 1)
    for name, said in (
        ("c", f"{path} has no tensor 'c'."),
        ("b", f"{path} became shorter while it was read: 'b' is not there any more."),
    ):
        with pytest.raises(LoraFxError) as caught:
            file.read(name)
        assert str(caught.value) == said
    assert file.read("a").tolist() == [1, 1, 1]
    path.unlink()
    with pytest.raises(LoraFxError, match=r"cannot read 'a' in .*: No such file or directory"):
        file.read("a")


def test_a_damaged_header_is_an_error_of_ours_whatever_the_damage(tmp_path: Path) -> None:
    path, source = tmp_path / "x", random.Random(5)
    write_tensors(path, {"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, {"format": "pt"})
    whole = path.read_bytes()
    refused = []
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(source.randint(1, 3)):
            damaged[source.randrange(len(damaged))] = source.choice(
                b'0129{}[]",:\x00\xffx' + bytes([source.randrange(256)])
            )
        if source.random() < 0.3:
            del damaged[source.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        try:
            file = TensorFile.open(path)
            for name in file.entries:
                file.read(name)
        except LoraFxError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert all(str(path) in said for said in refused)


# Writing.


def test_what_is_written_is_what_the_library_reads_and_writes(tmp_path: Path) -> None:
    tensors = _tensors()
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_tensors(ours, tensors, {"format": "pt"})
    safetensors.torch.save_file(tensors, theirs, {"format": "pt"})
    assert ours.read_bytes() == theirs.read_bytes()
    loaded = safetensors.torch.load_file(ours)
    assert {name: _bits(tensor) for name, tensor in loaded.items()} == {name: _bits(t) for name, t in tensors.items()}


def test_the_bytes_depend_on_no_order(tmp_path: Path) -> None:
    tensors, metadata = _tensors(), {"format": "pt", "a": "é", "z": "1"}
    written = set()
    for seed in range(5):
        names, keys = list(tensors), list(metadata)
        random.Random(seed).shuffle(names)
        random.Random(seed).shuffle(keys)
        write_tensors(tmp_path / "x", {n: tensors[n] for n in names}, {key: metadata[key] for key in keys})
        written.add((tmp_path / "x").read_bytes())
    assert len(written) == 1
    file = TensorFile.open(tmp_path / "x")
    assert file.metadata == metadata
    assert list(file.metadata) == ["a", "format", "z"]
    assert file.header[8:].startswith(b'{"__metadata__":{"a":"\xc3\xa9"')
    assert len(file.header) % 8 == 0


@pytest.mark.parametrize("elements", [1, 5, 100])
def test_tensors_in_files_are_compared_piece_by_piece(
    tmp_path: Path, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "_PIECE", elements)
    values = torch.linspace(-1, 1, 12).view(3, 4)
    other = values.clone()
    other[2, 3] += 1e-6
    write_tensors(tmp_path / "one", {"a": values, **_tensors()}, {})
    write_tensors(
        tmp_path / "two",
        {"same": values, "other": other, "turned": values.reshape(4, 3), "half": values.bfloat16(), **_tensors()},
        {},
    )
    one, two = TensorFile.open(tmp_path / "one"), TensorFile.open(tmp_path / "two")

    def equal(name: str, second: str, dtype: torch.dtype | None = None) -> bool:
        return equal_in_files((one, one.entries[name]), (two, two.entries[second]), dtype)

    assert [equal("a", name) for name in ("same", "other", "turned", "half")] == [True, False, False, False]
    assert [equal("a", name, torch.bfloat16) for name in ("same", "other", "turned", "half")] == [
        True,
        True,
        False,
        True,
    ]
    assert all(equal(name, name) for name in _tensors())  # of every dtype and shape
    assert torch.equal(torch.cat(list(one.pieces("a", elements))), values.flatten())


def test_without_metadata_or_tensors_there_is_still_a_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {}, {})
    assert TensorFile.open(tmp_path / "x").header == b"\x08" + bytes(7) + b"{}      "


def test_tensors_may_lie_anywhere_in_memory(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    tensors = {
        "transposed": base.T,
        "part": base[1:3, ::2],
        "expanded": base[:1].expand(3, 6),
        "parameter": nn.Parameter(base),
        "conjugate": torch.view_as_complex(base.view(12, 2)).conj(),
    }
    write_tensors(tmp_path / "x", tensors, {})
    for name, tensor in safetensors.torch.load_file(tmp_path / "x").items():
        assert torch.equal(tensor, tensors[name].detach().resolve_conj()), name


REFUSED = {
    "meta": (torch.empty(2, device="meta"), "is on the meta device and has no values. Load it first"),
    "sparse": (
        torch.eye(2).to_sparse(),
        "is stored as torch.sparse_coo, which the format does not have. Make it dense first",
    ),
    "complex128": (
        torch.zeros(2, dtype=torch.complex128),
        "is torch.complex128, which the format does not have. Convert or dequantise it first",
    ),
    "__metadata__": (torch.ones(1), "is called as the format calls its metadata. Rename it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_format_does_not_have_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x"
    with pytest.raises(LoraFxError) as caught:
        write_tensors(path, {"a": torch.ones(1), name: REFUSED[name][0]}, {})
    assert str(caught.value) == f"cannot write {path}: the tensor {name!r} {REFUSED[name][1]}."
    assert not path.exists()
