"""Whatever a file holds, it is read or refused in one message, in bounded time; a pipe or a device is not waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz.__main__ import NAMES
from fuzz.readers import READERS, check
from fuzz.seeds import hostile, valid

import lora_fx
from lora_fx.folding.checkpoint import Checkpoint
from lora_fx.rules.lookup import load
from lora_fx.rules.peft_config.read_config import read_config

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


def test_more_problems_than_a_person_reads_are_counted_in_the_message_and_all_of_them_kept() -> None:
    error = lora_fx.RuleError("rules.toml", [f"problem {number}" for number in range(103)])
    assert len(error.problems) == 103
    assert str(error).splitlines()[-1].strip() == "and 3 more problems"
