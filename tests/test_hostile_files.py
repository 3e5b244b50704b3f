"""Whatever a file holds, it is read or refused in one message, in bounded time; a pipe or a device is not waited for."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from fuzz.__main__ import NAMES
from fuzz.readers import READERS, check, safetensors
from fuzz.seeds import hostile, valid

import lora_fx
from lora_fx.adapters.peft_format.tensors import open_tensors
from lora_fx.files.bounded import read_bounded
from lora_fx.folding.checkpoint import Checkpoint
from lora_fx.rules.lookup import load
from lora_fx.rules.peft_config.read_config import read_config
from lora_fx.tracing.transformers_models import load_model, read_model_config

HOSTILE = hostile()


def test_every_reader_is_fuzzed() -> None:
    assert tuple(READERS) == NAMES


@pytest.mark.parametrize("reader", READERS)
def test_the_files_that_a_fuzzer_starts_from_are_read(tmp_path: Path, reader: str) -> None:
    assert [check(reader, data, tmp_path) for data in valid()[reader]] == ["read"] * len(valid()[reader])


@pytest.mark.parametrize(("reader", "data"), [pytest.param(r, d, id=f"{r}: {name}") for r, name, d in HOSTILE])
def test_a_hostile_file_is_refused_in_time(tmp_path: Path, reader: str, data: bytes) -> None:
    assert check(reader, data, tmp_path) != "read"


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_cut_off_or_has_other_bytes_is_read_or_refused(tmp_path: Path, reader: str) -> None:
    for data in valid()[reader]:
        for place in range(0, len(data), max(1, len(data) // 25)):
            check(reader, data[:place], tmp_path)
            check(reader, data[:place] + b"\xff" + data[place + 1 :], tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("adapter_config.json", lambda path: read_config(path.parent)),
        ("rules.toml", load),
        ("rules.json", load),
        ("model.safetensors.index.json", lambda path: Checkpoint.open(path.parent)),
    ],
    ids=["config", "rules", "rules of PEFT", "index"],
)
def test_a_pipe_or_a_device_in_place_of_a_file_is_refused_and_not_waited_for(
    tmp_path: Path, name: str, read: Callable[[Path], object], kind: str
) -> None:
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(lora_fx.LoraFxError, match="a pipe, a socket or a device, and no file"):
        read(path)


JSON_READERS: Mapping[str, Callable[[Path], object]] = {
    "adapter_config.json": lambda path: read_config(path.parent),
    "rules.toml": load,
    "rules.json": load,
    "model.safetensors.index.json": lambda path: Checkpoint.open(path.parent),
    "config.json": read_model_config,
    "generation_config.json": lambda path: load_model(path.parent),
}


@pytest.mark.parametrize("name", JSON_READERS)
def test_of_a_text_of_terabytes_nothing_is_read_and_size_and_bound_are_told(tmp_path: Path, name: str) -> None:
    path, size = tmp_path / name, 2**40  # without blocks; to read it as a whole would be a MemoryError
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with path.open("wb") as file:
        file.truncate(size)
    with pytest.raises(lora_fx.LoraFxError, match=rf"{name}.* it has {size:,} bytes, and at most [0-9,]+ are read"):
        JSON_READERS[name](path)


def test_a_file_that_grows_while_it_is_read_is_not_read_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rules.json"
    path.write_bytes(b"123456")
    found = os.stat_result([stat.S_IFREG, *[0] * 9])  # as it was when it was opened
    monkeypatch.setattr(os, "fstat", lambda descriptor: found)
    with pytest.raises(OSError, match="it has 5 bytes, and at most 4 are read"):
        read_bounded(path, 4)


def test_a_file_of_many_tensors_takes_time_in_proportion(tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        path = tmp_path / "adapter_model.safetensors"
        path.write_bytes(safetensors({f"base_model.model.q{number}.lora_A.weight": 1 for number in range(count)}))
        started = time.process_time()
        assert len(open_tensors(tmp_path).entries) == count
        (tmp_path / "model.safetensors").write_bytes(path.read_bytes())
        assert len(Checkpoint.open(tmp_path).tensors) == count
        return time.process_time() - started

    few = min(seconds(1_000) for _ in range(3))
    assert seconds(8_000) < 32 * few  # 8 times as many: quadratic would be 64


def test_more_problems_than_a_person_reads_are_counted_in_the_message_and_all_of_them_kept() -> None:
    error = lora_fx.RuleError("rules.toml", [f"problem {number}" for number in range(103)])
    assert len(error.problems) == 103
    assert str(error).splitlines()[-1].strip() == "and 3 more problems"
