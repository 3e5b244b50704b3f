"""A name never holds half a result: what ends the writing, and what is left then."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_fx.errors import LoraFxError
from lora_fx.files import atomic as files
from lora_fx.files.atomic import replacing
from lora_fx.files.target import DirectoryKind, Target


def _write_file(beside: Path) -> None:
    beside.write_text("new")


def _write_directory(beside: Path) -> None:
    (beside / "inner").mkdir(parents=True)
    (beside / "inner" / "text").write_text("new")


def _content(path: Path) -> object:
    """Return what is at a path, as data."""
    if path.is_symlink():
        return ("link", str(path.readlink()))
    if path.is_dir():
        return {each.name: _content(each) for each in path.iterdir()}
    return path.read_text() if path.exists() else None


def _file(path: Path, *, overwrite: bool = False) -> Target:
    return Target(path, overwrite)


def _directory(path: Path, *, overwrite: bool = False) -> Target:
    return Target(path, overwrite, kind=DirectoryKind("a result", {"kept", "inner/text", "a"}.__contains__))


def _replace(target: Target, *blocks: Callable[[Path], object]) -> None:
    with replacing(target) as beside:
        for block in blocks:
            block(beside)


def _fail(error: BaseException) -> Callable[[Path], object]:
    def block(_beside: Path) -> None:
        raise error

    return block


WRITERS = [_write_file, _write_directory]
PLACE = {_write_file: _file, _write_directory: _directory}
NEW: dict[Callable[[Path], None], object] = {_write_file: "new", _write_directory: {"inner": {"text": "new"}}}


def _old(target: Path, kind: str) -> None:
    if kind == "file":
        target.write_text("old")
    elif kind == "directory":
        target.mkdir()
        (target / "kept").write_text("old")
    elif kind == "dangling link":
        target.symlink_to("nowhere")
    elif kind == "link to a directory":
        (target.parent / "real").mkdir()
        (target.parent / "real" / "kept").write_text("old")
        target.symlink_to("real")


OLD = ["file", "directory", "dangling link", "link to a directory"]


@pytest.mark.parametrize("write", WRITERS)
def test_what_was_written_is_moved_into_place_and_nothing_else_is_left(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    target = tmp_path / "deep" / "er" / "target"
    with replacing(PLACE[write](target)) as beside:
        (scratch,) = target.parent.iterdir()
        assert scratch.name.startswith(".target.")
        assert scratch.name.endswith(".partial")
        assert beside.parent == scratch
        write(beside)
        assert not target.exists()
    assert _content(target.parent) == {"target": NEW[write]}


@pytest.mark.parametrize("kind", OLD)
def test_what_exists_is_not_replaced_unless_asked(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    _old(target, kind)
    before = _content(tmp_path)
    place = _directory if "directory" in kind else _file
    with pytest.raises(LoraFxError) as caught, replacing(place(target)):
        pytest.fail("it began")
    assert str(caught.value) == f"{target} exists already. Choose another name, or replace it: overwrite=True."
    assert _content(tmp_path) == before


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize(
    ("kind", "write"),
    [
        ("file", _write_file),
        ("dangling link", _write_file),
        ("directory", _write_directory),
        ("dangling link", _write_directory),
        ("link to a directory", _write_directory),
    ],
)
def test_what_exists_is_replaced_if_asked(
    tmp_path: Path, kind: str, write: Callable[[Path], None], exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_LIBC", None)
    target = tmp_path / "target"
    _old(target, kind)
    others = {name: content for name, content in _content(tmp_path).items() if name != "target"}  # type: ignore[attr-defined]
    with replacing(PLACE[write](target, overwrite=True)) as beside:
        write(beside)
    assert _content(tmp_path) == {**others, "target": NEW[write]}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, LoraFxError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path, error: type[BaseException], overwrite: bool) -> None:
    target = tmp_path / "target"
    if overwrite:
        _old(target, "directory")
    before = _content(tmp_path)
    with pytest.raises(error):
        _replace(_directory(target, overwrite=overwrite), _write_directory, _fail(error()))
    assert _content(tmp_path) == before


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Free some space, or write to another disk."),
        (errno.EDQUOT, "Free some space, or write to another disk."),
        (
            errno.EFBIG,
            "Files of that size are not allowed there: raise the limit (ulimit -f), or write to another disk.",
        ),
        (errno.EROFS, "Choose a directory that you may write to."),
        (errno.EACCES, "Choose a directory that you may write to."),
        (errno.EIO, "See to that, or write elsewhere."),
    ],
)
def test_an_error_of_the_system_in_the_block_says_what_could_not_be_written_and_why(
    tmp_path: Path, number: int, advice: str
) -> None:
    target = tmp_path / "target"
    with pytest.raises(LoraFxError) as caught:
        _replace(_directory(target), _write_directory, _fail(OSError(number, os.strerror(number), "somewhere")))
    assert str(caught.value) == f"cannot write {target}: {os.strerror(number)}. {advice}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["_flush_tree", "_move", "_flush_directory"])
def test_an_error_in_moving_is_told_alike(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, step, fail)
    with pytest.raises(LoraFxError, match=r"cannot write .*target: Input/output error\. See to that"):
        _replace(_file(tmp_path / "target"), _write_file)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize(
    ("kind", "write"),
    [
        *((kind, _write_file) for kind in ("file", "dangling link", "nothing")),
        *((kind, _write_directory) for kind in ("directory", "dangling link", "link to a directory", "nothing")),
    ],
)
@pytest.mark.parametrize("error", [OSError(errno.EIO, os.strerror(errno.EIO)), KeyboardInterrupt()])
def test_what_was_there_is_put_back_if_the_move_does_not_reach_the_disk(
    tmp_path: Path,
    error: BaseException,
    kind: str,
    write: Callable[[Path], None],
    exchange: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, flush = tmp_path / "target", files._flush_directory
    if kind != "nothing":
        _old(target, kind)
    before, flushed = _content(tmp_path), []

    def fail(directory: Path) -> None:
        flush(directory)
        if directory == tmp_path:
            flushed.append(_content(target))
            raise error

    if not exchange:
        monkeypatch.setattr(files, "_LIBC", None)
    monkeypatch.setattr(files, "_flush_directory", fail)
    with pytest.raises((LoraFxError, KeyboardInterrupt)):
        _replace(PLACE[write](target, overwrite=True), write)
    assert flushed == [NEW[write]]  # it was in its place
    assert _content(tmp_path) == before


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match="No such file or directory"), replacing(_file(tmp_path / "target")):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file/target", "x" * 300])
def test_a_place_that_cannot_be_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraFxError, match="cannot write"), replacing(_file(tmp_path / name)):
        pytest.fail("it began")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("rename", [True, False])
@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("write", WRITERS)
def test_what_comes_while_the_block_runs_is_not_replaced(
    tmp_path: Path, write: Callable[[Path], None], kind: str, rename: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rename:
        monkeypatch.setattr(files, "_LIBC", None)
    target = tmp_path / "target"
    place = _directory if kind == "directory" else _file
    with pytest.raises(LoraFxError, match="target exists already"):
        _replace(place(target), write, lambda _: _old(target, kind))
    assert _content(tmp_path) == {"target": "old" if kind == "file" else {"kept": "old"}}


# What killed processes leave.


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for name in (
        ".target.abcd1234.partial",
        ".target.more.abcd1234.partial",
        ".target.abcd1234.other",
        "target.partial",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text("")
    with replacing(_file(target)) as first:
        first.write_text("1")
        assert not (tmp_path / ".target.abcd1234.partial").exists()
        with replacing(_file(target)) as second:  # another process at it
            assert first.exists()
            second.write_text("2")
        target.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".target.abcd1234.other", ".target.more.abcd1234.partial", "target", "target.partial",
    ]  # fmt: skip
    assert target.read_text() == "1"


def test_where_a_process_was_killed_between_two_renames_the_old_one_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "target"
    previous = tmp_path / ".target.abcd1234.partial" / "previous"
    previous.mkdir(parents=True)
    (previous / "kept").write_text("old")
    seen: list[object] = []
    with pytest.raises(ValueError, match="no"):
        _replace(_directory(target, overwrite=True), lambda _: seen.append(_content(target)), _fail(ValueError("no")))
    assert seen == [{"kept": "old"}]
    assert _content(tmp_path) == {"target": {"kept": "old"}}


def test_a_second_rename_that_fails_brings_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LIBC", None)
    target = tmp_path / "target"
    _old(target, "directory")
    original = Path.replace

    def move(path: Path, to: Path) -> Path:
        if path.parent.name.endswith(".partial") and path.name == "target":
            raise OSError(errno.EIO, "no")
        return original(path, to)

    monkeypatch.setattr(Path, "replace", move)
    with pytest.raises(LoraFxError, match="cannot write"):
        _replace(_directory(target, overwrite=True), _write_directory)
    assert _content(tmp_path) == {"target": {"kept": "old"}}


@pytest.mark.parametrize("lacking", ["locks of the file system", "fcntl", "EINVAL of renameat2"])
def test_it_works_where_the_system_has_less(tmp_path: Path, lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    if lacking == "fcntl":
        monkeypatch.setattr(files, "fcntl", None)
    elif lacking == "EINVAL of renameat2":
        monkeypatch.setattr(files, "_RENAME_EXCHANGE", 1 << 20)
    else:
        monkeypatch.setattr(fcntl, "flock", fail)
    (tmp_path / ".target.abcd1234.partial").mkdir()
    _old(tmp_path / "target", "directory")
    with replacing(_directory(tmp_path / "target", overwrite=True)) as beside:
        _write_directory(beside)
    assert _content(tmp_path / "target") == NEW[_write_directory]
    left = [] if lacking == "EINVAL of renameat2" else [".target.abcd1234.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*left, "target"]


def test_a_scratch_that_another_process_takes_for_abandoned_is_made_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tempfile.mkdtemp
    names: list[str] = []

    def mkdtemp(**options: Any) -> str:
        names.append(made(**options))
        if len(names) == 1:
            Path(names[0]).rmdir()
        return names[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    with replacing(_file(tmp_path / "target")) as beside:
        assert str(beside.parent) == names[1]
        beside.write_text("new")
    assert len(names) == 2


# At every moment.


def test_all_is_on_the_disk_before_it_is_moved_and_the_move_before_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is asked of the system, in its order."""
    told: list[str] = []
    fsync, renamed = os.fsync, files._renamed

    def record(descriptor: int) -> None:
        told.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def rename(*arguments: object) -> bool:
        told.append("rename")
        return renamed(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(files, "_renamed", rename)
    with replacing(_directory(tmp_path / "target")) as beside:
        _write_directory(beside)
        scratch = beside.parent.name
    assert told == ["text", "inner", "target", scratch, "rename", tmp_path.name]


def test_a_directory_that_is_replaced_is_there_at_every_moment(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    place = _directory(target, overwrite=True)

    def replace() -> None:
        for _ in range(40):
            _replace(place, lambda beside: beside.mkdir(), lambda beside: (beside / "a").write_text("a"))
            _replace(place, _write_directory)

    thread = threading.Thread(target=replace)
    thread.start()
    looked = 0
    while thread.is_alive():
        assert os.path.lexists(target)
        looked += 1
    assert looked > 200
    assert _content(tmp_path) == {"target": NEW[_write_directory]}
