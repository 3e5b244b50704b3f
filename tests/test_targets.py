"""What a write may replace: every writer at every place where something could be lost, killed at ten moments, and beside another process."""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import transformers
from architectures import few
from conftest import set_factors
from torch import nn
from typer.testing import CliRunner

import lora_fx
from lora_fx import huggingface
from lora_fx.cli import app
from lora_fx.cli.console import CODES
from lora_fx.errors import LoraFxError
from lora_fx.export import onnx_file
from lora_fx.export.onnx_adapter_file import onnx_adapter_from_peft
from lora_fx.files.atomic import replacing
from lora_fx.files.target import DirectoryKind, Target
from lora_fx.folding.checkpoint_plan import plan_checkpoint_fold

pytestmark = pytest.mark.xdist_group("targets")

SMALL = {
    "vocab_size": 40, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 3,
    "num_key_value_heads": 1,
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """Inputs on the disk, and what was made of them once.

    Attributes:
        root: a directory with ``base``, ``adapter``, ``slots.onnx`` and ``rules.toml``.
        model: loaded from ``base``.
        graph: of it, with the adapter.
        small: a graph of one linear with an adapter, for the exports.
        plan: of a fold on disk.
    """

    root: Path
    model: Any
    graph: lora_fx.TracedGraphModule
    small: lora_fx.TracedGraphModule
    plan: Any

    @functools.cached_property
    def cached(self) -> lora_fx.TracedGraphModule:
        """The model with a cache."""
        return lora_fx.trace(self.model, cache=True)

    def command(self, *arguments: object) -> None:
        """Run a command, and raise what it prints if it fails."""
        done = CliRunner().invoke(app, [str(each) for each in arguments], env={"TERMINAL_WIDTH": "500"})
        if done.exit_code:
            raise LoraFxError(done.output)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world") / "inputs"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(root / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(root / "base").eval()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(root / "base"), config).save_pretrained(
        root / "adapter"
    )
    graph = lora_fx.from_adapter(model, root / "adapter")
    linear = nn.Sequential(nn.Linear(33, 17), nn.Tanh()).eval()
    rules = {"defaults": {"rank": 2, "alpha": 3}, "select": [{"target": ["0"]}]}
    small = lora_fx.rewrite(linear, rules=rules, example_inputs=(torch.randn(4, 33),))
    set_factors(small)
    lora_fx.export.onnx(small, root / "slots.onnx", slots=True, verify=False)
    lora_fx.save_adapter(small, root / "small_adapter")
    (root / "rules.toml").write_text('[[select]]\ntarget = ["q_proj"]\nrank = 2\n')
    return World(root, model, graph, small, plan_checkpoint_fold(root / "base", [(root / "adapter", 1.0)]))


@dataclass(frozen=True)
class Writer:
    """A public call that writes.

    Attributes:
        write: to a path, with the permission to replace.
        name: of the result.
        reads: the inputs, by their names in the root.
        noun: of a directory in messages; empty for a file.
    """

    write: Callable[[World, Path], object]
    name: str
    reads: tuple[str, ...] = ()
    noun: str = ""


def _by_command(*arguments: str, last: bool = True) -> Callable[[World, Path], object]:
    """Return a writer that runs a command; inputs are named ``@name``, and the result is the last argument or a named option."""

    def write(world: World, out: Path) -> None:
        given = [world.root / each[1:] if each.startswith("@") else each for each in arguments]
        world.command(*given, *([out] if last else ["--out", out]), "--overwrite")

    return write


WRITERS: Mapping[str, Writer] = {
    "fold": Writer(
        lambda world, out: world.plan.write(out, overwrite=True),
        "merged", ("base", "adapter"), "a checkpoint folded from this base",
    ),
    "save_pretrained": Writer(
        lambda world, out: huggingface.save_pretrained(world.model, world.graph, out, overwrite=True, verify=False),
        "merged", ("base",), "a transformers model",
    ),
    "save_adapter": Writer(
        lambda world, out: lora_fx.save_adapter(world.graph, out, overwrite=True), "saved", (), "an adapter"
    ),
    "save_adapter, diffusers": Writer(
        lambda world, out: lora_fx.save_adapter(world.small, out, format="diffusers", overwrite=True), "saved", (), "an adapter"
    ),
    "save_adapter, kohya": Writer(
        lambda world, out: lora_fx.save_adapter(world.small, out, format="kohya", overwrite=True), "saved", (), "an adapter"
    ),
    "torchscript": Writer(
        lambda world, out: lora_fx.export.torchscript(world.small, out, overwrite=True, verify=False), "model.pt"
    ),
    "pt2": Writer(lambda world, out: lora_fx.export.pt2(world.small, out, overwrite=True, verify=False), "model.pt2"),
    "onnx": Writer(lambda world, out: lora_fx.export.onnx(world.small, out, overwrite=True, verify=False), "model.onnx"),
    "onnx_adapter": Writer(
        lambda world, out: lora_fx.export.onnx_adapter(world.small, out, overwrite=True), "small.onnx_adapter"
    ),
    "onnx_adapter_from_peft": Writer(
        lambda world, out: onnx_adapter_from_peft(
            world.root / "small_adapter", world.root / "slots.onnx", out, overwrite=True
        ),
        "small.onnx_adapter", ("slots.onnx", "small_adapter"),
    ),
    "draw": Writer(lambda world, out: lora_fx.draw(world.small, world.small, out, overwrite=True), "graph.json"),
}  # fmt: skip

COMMANDS: Mapping[str, Writer] = {
    "lora-fx fold": Writer(_by_command("fold", "@base", "@adapter"), "merged", ("base", "adapter"), "a folded checkpoint"),
    "lora-fx export": Writer(
        _by_command("export", "@base", "--format", "torchscript", "--adapter", "@adapter"), "model.pt", ("base", "adapter")
    ),
    "lora-fx export-adapter": Writer(
        _by_command("export-adapter", "@small_adapter", "@slots.onnx"), "a", ("slots.onnx", "small_adapter")
    ),
    "lora-fx draw": Writer(
        _by_command("draw", "@base", "--rules", "@rules.toml", "--format", "json", last=False), "graph.json", ("base", "rules.toml")
    ),
}  # fmt: skip
"""Here, what stops them does so before a model is read, so that each is a matter of milliseconds."""


def _snapshot(directory: Path) -> dict[str, object]:
    """Return all that a directory holds, as data."""
    found: dict[str, object] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        found[name] = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def _check_refused(world: World, writer: Writer, out: Path, *expected: str) -> None:
    """Fail unless a write is refused in these words, and nothing under the root and its parent is other than before."""
    before = _snapshot(world.root.parent)
    with pytest.raises(LoraFxError) as caught:
        writer.write(world, out)
    told = " ".join(str(caught.value).replace("│", "").split())
    for text in expected:
        assert " ".join(text.split()) in told, told
    assert _snapshot(world.root.parent) == before


def _in_two_files(world: World, out: Path) -> object:
    with mock.patch.object(onnx_file, "MAX_INLINE_BYTES", 10):
        return lora_fx.export.onnx(world.small, out, overwrite=True, verify=False)


LARGE: Mapping[str, Writer] = {
    "onnx in two files": Writer(_in_two_files, "model.onnx"),
    "generation": Writer(
        lambda world, out: lora_fx.export.generation(world.cached, out, overwrite=True, verify=False),
        "directory", (), "a directory for generation",
    ),
}  # fmt: skip
"""Writers of several files, whose every write takes seconds; what they may replace has tests of its own."""

FAULTY = {**WRITERS, **LARGE}
EVERY = {**WRITERS, **COMMANDS}
READING = [(name, read) for name, writer in EVERY.items() for read in writer.reads]


@pytest.mark.parametrize(("name", "read"), READING)
def test_an_input_is_not_written_over(world: World, name: str, read: str) -> None:
    writer, out = EVERY[name], world.root / read
    if out.is_dir() and not writer.noun:
        _check_refused(world, writer, out, f"{out} is read to make the result, and is not written over.")
    elif name == "lora-fx fold" and read == "adapter":
        _check_refused(world, writer, out, f"{out} is an adapter directory", "Was OUT_DIR forgotten?")
    else:
        _check_refused(world, writer, out, "is read to make the result, and is not written over. Choose another name.")


@pytest.mark.parametrize(("name", "read"), READING)
def test_a_link_to_an_input_is_the_input(world: World, name: str, read: str) -> None:
    link = world.root / "link"
    link.symlink_to(world.root / read, target_is_directory=(world.root / read).is_dir())
    try:
        told = (
            "Was OUT_DIR forgotten?" if (name, read) == ("lora-fx fold", "adapter") else f"{link} is the same place as"
        )
        _check_refused(world, EVERY[name], link, told)
    finally:
        link.unlink()


@pytest.mark.parametrize(("name", "read"), [(name, read) for name, read in READING if EVERY[name].noun])
def test_a_directory_that_holds_an_input_is_not_replaced(world: World, name: str, read: str) -> None:
    _check_refused(world, EVERY[name], world.root, f"{world.root} holds", "which is read to make the result.")


@pytest.mark.parametrize(("name", "read"), READING)
def test_nothing_in_an_input_is_written_over(world: World, name: str, read: str) -> None:
    writer, place = EVERY[name], world.root / read
    if place.is_file():
        with pytest.raises(LoraFxError):
            writer.write(world, place / writer.name)  # a file holds nothing
        assert place.is_file()
        return
    inside = place / writer.name if writer.noun else sorted(place.iterdir())[0]  # a new directory; a file that is there
    told = f"{inside} lies in {place}, which is read to make the result. Choose another name."
    _check_refused(world, writer, inside, told)


def test_a_new_file_in_a_directory_that_is_read_writes_over_nothing(world: World) -> None:
    out = world.root / "small_adapter" / "small.onnx_adapter"
    before = _snapshot(world.root)
    try:
        EVERY["onnx_adapter_from_peft"].write(world, out)
        after = _snapshot(world.root)
        assert after.pop("small_adapter/small.onnx_adapter")
        assert after == before
    finally:
        out.unlink(missing_ok=True)


@pytest.mark.parametrize("name", [name for name, writer in EVERY.items() if writer.noun])
def test_a_directory_with_foreign_files_is_not_replaced(world: World, name: str, tmp_path: Path) -> None:
    writer, out = EVERY[name], tmp_path / "out"
    writer.write(world, out)
    writer.write(world, out)  # an earlier result is replaced
    (out / "dataset.jsonl").write_text("{}")
    (out / "runs" / "deep").mkdir(parents=True)
    (out / "runs" / "log").write_text("")
    before = _snapshot(tmp_path)
    with pytest.raises(LoraFxError) as caught:
        writer.write(world, out)
    told = " ".join(str(caught.value).split())
    assert "dataset.jsonl, runs/deep/, runs/log. Nothing was touched: move that away, or choose another name." in told
    assert "holds more than " in told
    assert _snapshot(tmp_path) == before


@pytest.mark.parametrize("name", EVERY)
def test_a_file_is_no_directory_and_a_directory_no_file(world: World, name: str, tmp_path: Path) -> None:
    writer, out = EVERY[name], tmp_path / EVERY[name].name
    if writer.noun:
        out.write_text("kept")
        expected = f"{out} is a file, and {writer.noun} is a directory. Choose another name."
    else:
        out.mkdir()
        (out / "kept").write_text("kept")
        expected = f"{out} is a directory, and a file is not written in place of one. Choose another name."
    before = _snapshot(tmp_path)
    _check_refused(world, writer, out, expected)
    assert _snapshot(tmp_path) == before


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("name", [name for name, writer in EVERY.items() if writer.noun])
def test_the_working_directory_is_not_replaced(
    world: World, name: str, above: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "out" / "inner" if above else tmp_path / "out"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    told = "holds" if above else "is"
    expected = f"{tmp_path / 'out'} {told} the working directory, which is not replaced."
    _check_refused(world, EVERY[name], tmp_path / "out", expected)
    assert here.is_dir()


# Killed at ten moments.

MOMENTS = 10
_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "shutil.copyfile")


def _way_here() -> str:
    """Return a digest of the lines of the package that lead to the caller's caller."""
    frame, lines = sys._getframe(2), hashlib.sha256()
    while frame is not None:
        if "/lora_fx/" in frame.f_code.co_filename:
            lines.update(f"{frame.f_code.co_filename}:{frame.f_lineno}".encode())
        frame = frame.f_back  # type: ignore[assignment]
    return lines.hexdigest()[:8]


def _in_child(act: Callable[[], object], place: Path, stop: int | None) -> list[str] | None:
    """Act in a forked process, and end that with its n-th touch of a directory; return from where each was, or None where it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(100)
        code, ways = 1, list[str]()

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in _EVENTS and str(place) in str(arguments[0]):
                if len(ways) == stop:
                    os.kill(os.getpid(), signal.SIGKILL)
                ways.append(_way_here())

        sys.addaudithook(hook)
        try:
            act()
            os.write(writing, " ".join(ways).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    told = os.read(reading, 2**16).decode()
    os.close(reading)
    assert os.waitstatus_to_exitcode(status) == (0 if told else -signal.SIGKILL)
    return told.split() if told else None


def _settled(directory: Path) -> dict[str, object]:
    """Return what a directory holds, but for the scratch of killed processes; of a pt2 file, which has new names each time, the size."""
    found = {path: content for path, content in _snapshot(directory).items() if ".partial" not in path}
    return {
        path: len(content) if path.endswith(".pt2") and isinstance(content, bytes) else content
        for path, content in found.items()
    }


_KILLED_IN_MATRIX = {"onnx", "save_pretrained", "save_adapter, diffusers", "save_adapter, kohya"}


@pytest.mark.parametrize("name", few([*WRITERS, "generation"], set(WRITERS) - _KILLED_IN_MATRIX))
def test_a_writer_that_is_killed_leaves_the_old_result_or_the_new(world: World, name: str, tmp_path: Path) -> None:
    writer = FAULTY[name]
    out = tmp_path / "place" / writer.name
    other = tmp_path / "place" / "other"
    other.mkdir(parents=True)
    (other / "kept").write_text("kept")
    if name in LARGE:
        writer.write(world, out)  # what is traced and imported once is there before the forks
    ways = _in_child(lambda: writer.write(world, out), tmp_path, None)
    assert ways is not None
    touches = len(ways)
    assert touches >= 3
    new = _settled(out.parent)
    moments = sorted({touches * number // MOMENTS for number in range(MOMENTS)})
    outcomes = set()
    for moment in moments:
        if writer.noun:  # an older result: with another content, of the same files
            first = sorted(path for path in out.rglob("*") if path.is_file())[0]
            first.write_bytes(b"old")
        else:
            out.write_bytes(b"old")
        old = _settled(out.parent)
        assert _in_child(lambda: writer.write(world, out), tmp_path, moment) is None
        left = _settled(out.parent)
        assert left in (old, new), f"neither the old nor the new after {moment} of {touches}"
        outcomes.add("old" if left == old else "new")
    assert "old" in outcomes
    writer.write(world, out)
    assert _settled(out.parent) == new
    assert not list(out.parent.glob(".*.partial"))  # nothing that was killed is left


# Faults of the disk, and Ctrl-C, at every touch of a directory.

FAULTS: Mapping[str, Callable[[str], BaseException]] = {
    "no space": lambda path: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path),
    "no permission": lambda path: PermissionError(errno.EACCES, os.strerror(errno.EACCES), path),
    "an error of the disk": lambda path: OSError(errno.EIO, os.strerror(errno.EIO), path),
    "Ctrl-C": lambda path: KeyboardInterrupt(),
}


def _outcome_of_fault(act: Callable[[], object], place: Path, stop: int, fault: Callable[[str], BaseException]) -> str:
    """Act in a forked process, whose n-th touch of a directory fails; return what is raised: a class, and the first line of its message."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(100)
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event in _EVENTS and str(place) in str(arguments[0]):
                count += 1
                if count == stop + 1:
                    raise fault(str(arguments[0]))

        sys.addaudithook(hook)
        told = "nothing"
        try:
            act()
        except LoraFxError as error:
            code = next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)
            told = f"code {code}: {str(error).splitlines()[0]}"
        except BaseException as error:
            told = type(error).__name__
        finally:
            os.write(writing, told.encode()[:1000])
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    told = os.read(reading, 1000).decode()
    os.close(reading)
    return told


@pytest.mark.parametrize(
    "name", [name if name == "save_adapter" else pytest.param(name, marks=pytest.mark.matrix) for name in WRITERS]
)
def test_a_fault_at_any_touch_leaves_the_old_result_or_the_new_and_is_one_message(
    world: World, name: str, tmp_path: Path
) -> None:
    """Of touches that the same lines of the package lead to, the first and the last fail: those between meet what the last one does."""
    writer = WRITERS[name]
    out = tmp_path / "place" / writer.name
    out.parent.mkdir()
    ways = _in_child(lambda: writer.write(world, out), tmp_path, None)
    assert ways is not None
    new = _settled(out.parent)
    moments = sorted({place for way in set(ways) for place in (ways.index(way), len(ways) - 1 - ways[::-1].index(way))})
    said: dict[str, set[str]] = {fault: set() for fault in FAULTS}
    for moment, fault in itertools.product(moments, FAULTS):
        if writer.noun:
            first = sorted(path for path in out.rglob("*") if path.is_file())[0]
            first.write_bytes(b"old")
        else:
            out.write_bytes(b"old")
        old = _settled(out.parent)
        told = _outcome_of_fault(lambda: writer.write(world, out), tmp_path, moment, FAULTS[fault])
        left = _settled(out.parent)
        at = f"{fault} at {moment} of {len(ways)}"
        assert left in (old, new), f"{at}: neither the old nor the new"
        assert left == new or told != "nothing", f"{at}: the old is left, and nothing is said"
        said[fault].add(told.partition(":")[0])
    for fault, words in said.items():
        assert words <= ({"KeyboardInterrupt", "nothing"} if fault == "Ctrl-C" else {"code 5", "code 3", "nothing"}), (
            said
        )
        assert words != {"nothing"}, said
    writer.write(world, out)
    assert _settled(out.parent) == new
    assert not list(out.parent.glob(".*.partial"))


# Two processes on one place.


@pytest.fixture(scope="module")
def stronger(world: World) -> World:
    """The same, with twice the update."""
    return replace(
        world,
        graph=lora_fx.activate(world.graph, {"default": 2.0}),
        small=lora_fx.activate(world.small, {"default": 2.0}),
        plan=plan_checkpoint_fold(world.root / "base", [(world.root / "adapter", 2.0)]),
    )


@pytest.mark.parametrize(
    "name",
    [name if name in ("save_adapter", "fold") else pytest.param(name, marks=pytest.mark.matrix) for name in FAULTY],
)
def test_of_two_processes_that_write_to_one_place_either_leaves_its_whole_result(
    world: World, stronger: World, name: str, tmp_path: Path
) -> None:
    writer, results = FAULTY[name], []
    if name in LARGE:
        writer.write(world, tmp_path / writer.name)
    for number, each in enumerate((world, stronger)):
        alone = tmp_path / str(number) / writer.name
        alone.parent.mkdir()
        assert _in_child(lambda: writer.write(each, alone), tmp_path, None)  # noqa: B023 -- at once
        results.append(_settled(alone.parent))
    assert any(path.endswith(".data") for path in results[0]) == (name == "onnx in two files")
    assert name == "onnx_adapter_from_peft" or name.endswith("pt2") or results[0] != results[1]
    out = tmp_path / "place" / writer.name
    out.parent.mkdir()
    children = [_forked(functools.partial(writer.write, each, out)) for each in (world, stronger, world, stronger)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0, 0]
    left = _settled(out.parent)
    assert any(result.items() <= left.items() for result in results), left.keys()
    assert not list(out.parent.glob(".*.partial"))


def _forked(act: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        code = 1
        try:
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


# The rule itself.


def test_an_input_is_found_by_what_paths_resolve_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").write_text("")
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    read = (tmp_path / "a" / "file",)
    for path in ("a/file", "a/b/../file", "link/file", "./link/b/../file"):
        with pytest.raises(LoraFxError, match=r"is the same place as .* is not written over"):
            Target(Path(path), True, read).check()
    kind = DirectoryKind("a result", lambda _: True)
    with pytest.raises(LoraFxError, match=r"link holds .*file, which is read to make the result"):
        Target(Path("link"), True, read, kind).check()
    with pytest.raises(LoraFxError, match="lies in"):
        Target(Path("link/b/new"), False, (tmp_path / "a",), kind).check()
    (tmp_path / "a" / "away").symlink_to("/nowhere")  # a link that lies in an input, wherever it leads
    with pytest.raises(LoraFxError, match="lies in"):
        Target(Path("a/away"), True, (tmp_path / "a",)).check()
    Target(Path("a/new"), False, (*read, tmp_path / "a")).check()
    Target(Path("ab"), False, (tmp_path / "a",)).check()  # a longer name is another one


def test_an_input_may_have_two_names(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("")
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    with pytest.raises(LoraFxError, match=r"two is the same place as .*one"):
        Target(tmp_path / "two", True, (tmp_path / "one",)).check()


def test_a_directory_that_cannot_be_listed_counts_as_foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "closed").mkdir(parents=True)
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(LoraFxError, match=r"holds more than a result: closed/\. Nothing was touched"):
        Target(tmp_path / "out", True, kind=DirectoryKind("a result", {"a"}.__contains__)).check()


def test_what_comes_into_an_old_result_while_the_new_one_is_written_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("old")

    def write() -> None:
        with replacing(Target(out, True, (), DirectoryKind("a result", {"a"}.__contains__))) as new:
            new.mkdir()
            (out / "notes").write_text("")

    with pytest.raises(LoraFxError, match="holds more than a result: notes"):
        write()
    assert _snapshot(tmp_path) == {"out": None, "out/a": b"old", "out/notes": b""}


def test_an_input_that_is_reached_through_a_link_in_the_target_is_held_by_it(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "base").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").symlink_to("../elsewhere")
    read = tmp_path / "out" / "model.safetensors" / "base"
    with pytest.raises(LoraFxError, match=r"out holds .*base, which is read"):
        Target(tmp_path / "out", True, (read,), DirectoryKind("a result", lambda _: True)).check()
