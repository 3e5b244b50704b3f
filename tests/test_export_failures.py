"""A file that is exported is there whole, or not at all, or as it was: what ends an export, what is said, and what is left then."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import errno
import functools
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from conftest import limited, set_factors
from killed import Server, server
from torch import nn

import lora_fx
from lora_fx.export import compare as _comparing
from lora_fx.export import deliver as _delivering
from lora_fx.export import onnx_file as _onnx
from lora_fx.export import pt2_file as _pt2
from lora_fx.export import torchscript_file as _torchscript
from lora_fx.files import atomic as files
from lora_fx.graph.info import info_of

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")

FORMATS = ("torchscript", "onnx", "pt2")
KINDS = (*FORMATS, "onnx in two files")
NAMES = {"torchscript": "model.pt", "onnx": "model.onnx", "pt2": "model.pt2", "onnx in two files": "model.onnx"}
PAIR = "onnx in two files"
MOMENTS = ("exporting", "loading", "comparing", "moving")


class Heads(nn.Module):
    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, wide), nn.Linear(width, 13)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"first": self.first(x), "second": self.second(x)}


@functools.cache
def heads(seed: int = 0, width: int = 23, wide: int = 17) -> lora_fx.TracedGraphModule:
    """Return a branched graph. Not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        traced = lora_fx.trace(Heads(width, wide), (torch.randn(2, width),), inference=True)
        graph_module = lora_fx.rewrite(traced, {"select": [{"op": ["linear"], "rank": 3}]})
    set_factors(graph_module, seed)
    return graph_module


def export(kind: str, graph_module: lora_fx.TracedGraphModule, path: Path, **options: Any) -> lora_fx.export.Exported:
    with mock.patch.object(_onnx, "MAX_INLINE_BYTES", 300 if kind == PAIR else 10**9):
        exported: lora_fx.export.Exported = getattr(lora_fx.export, kind.split()[0])(graph_module, path, **options)
        return exported


def run(kind: str, path: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Load what is at a path, and run it."""
    if kind.startswith("onnx"):
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found = session.run(None, {"x": x.numpy()})
        names = [output.name for output in session.get_outputs()]
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}
    module = torch.jit.load(path) if kind == "torchscript" else torch.export.load(path).module()
    with torch.no_grad():
        return dict(module(x=x))


def computes(kind: str, path: Path, graph_module: lora_fx.TracedGraphModule) -> bool:
    """Tell whether what is at a path gives what a graph gives; any damage to it raises."""
    x = torch.randn(6, info_of(graph_module).examples.tensors["x"].size(1))
    with torch.no_grad():
        expected = graph_module(x)
    found = run(kind, path, x)
    assert list(found) == list(expected)
    return all(bool((found[name] - value).abs().max() <= 2e-6 * value.abs().max()) for name, value in expected.items())


def content(directory: Path) -> dict[str, bytes]:
    """Return all that is below a directory, hidden files too."""
    found = {str(path.relative_to(directory)): path for path in directory.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else b"directory" for name, path in sorted(found.items())}


class Reached(BaseException):
    """What should not have been called was."""


def reach(*_args: Any, **_options: Any) -> None:
    raise Reached


@contextlib.contextmanager
def nothing_costly() -> Iterator[None]:
    """Let no graph be compiled, exported or translated; an export that comes so far raises."""
    heads()
    with (
        mock.patch.object(torch.jit, "script", reach),
        mock.patch.object(torch.export, "export", reach),
        mock.patch.object(torch.onnx, "export", reach),
    ):
        yield


# Places that cannot be written to.


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_exists_is_refused_at_once_and_left_as_it_was(tmp_path: Path, format: str) -> None:
    path = tmp_path / NAMES[format]
    path.write_text("old")
    before = path.stat()
    with nothing_costly():
        with pytest.raises(lora_fx.LoraFxError) as caught:
            export(format, heads(), path)
        with (
            mock.patch.object(_delivering, "prepare", reach),
            pytest.raises(lora_fx.LoraFxError, match="exists already"),
        ):
            export(format, heads(), path)
        with pytest.raises(Reached):
            export(format, heads(), tmp_path / f"other-{path.name}")
    assert str(caught.value) == f"{path} exists already. Choose another name, or replace it: overwrite=True."
    assert content(tmp_path) == {path.name: b"old"}
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("format", FORMATS)
def test_a_directory_of_that_name_is_refused_at_once_and_left_as_it_was(tmp_path: Path, format: str) -> None:
    path = tmp_path / NAMES[format]
    heads()
    path.mkdir()
    (path / "kept").write_text("old")
    for overwrite in (False, True):
        refused = pytest.raises(lora_fx.LoraFxError, match="is a directory, and a file is not written in place of one")
        with mock.patch.object(_delivering, "prepare", reach), refused:
            export(format, heads(), path, overwrite=overwrite)
        assert content(tmp_path) == {path.name: b"directory", f"{path.name}/kept": b"old"}


@pytest.mark.parametrize("between", ["", "between/"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_file_in_place_of_the_directory_is_told_before_the_graph_is_written(
    tmp_path: Path, format: str, between: str
) -> None:
    (tmp_path / "file").write_text("old")
    path = tmp_path / "file" / f"{between}{NAMES[format]}"
    with nothing_costly(), pytest.raises(lora_fx.LoraFxError) as caught:
        export(format, heads(), path)
    said = (
        f"Not a directory ({path.parent}). Choose another name."
        if between
        else f"File exists ({path.parent}). See to that, or write elsewhere."
    )
    assert str(caught.value) == f"cannot write {path}: {said}"
    assert content(tmp_path) == {"file": b"old"}


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Take the capabilities from this thread, if it has any: without them root, too, may write only where the mode says so."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    had, none = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()  # twice effective, permitted, inheritable
    assert libc.capget(header, had) == 0
    none[:] = had[:]
    none[0] = none[3] = 0
    assert libc.capset(header, none) == 0
    try:
        yield
    finally:
        assert libc.capset(header, had) == 0


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_directory_that_may_not_be_written_to_is_told_before_the_graph_is_written(
    tmp_path: Path, format: str, deep: bool
) -> None:
    (tmp_path / "locked").mkdir()
    path = tmp_path / "locked" / ("deep" if deep else "") / NAMES[format]
    (tmp_path / "locked").chmod(0o555)
    try:
        with without_privileges(), nothing_costly(), pytest.raises(lora_fx.LoraFxError) as caught:
            export(format, heads(), path)
    finally:
        (tmp_path / "locked").chmod(0o755)
    assert str(caught.value) == f"cannot write {path}: Permission denied. Choose a directory that you may write to."
    assert content(tmp_path) == {"locked": b"directory"}


# Full disks.


def export_twice(kind: str, place: Path, limit: Callable[[], Any]) -> tuple[list[str], list[bool]]:
    """Export what does not fit to a new name, and in place of what is there; return what was said, and whether all was as before."""
    path, larger = place / NAMES[kind], heads(1, 400, 250)
    said, same = [], []
    for overwrite in (False, True):
        if overwrite:
            export(kind, heads(), path)
        before = content(place)
        try:
            with limit():
                export(kind, larger, path, overwrite=overwrite)
        except lora_fx.LoraFxError as error:
            said.append(str(error))
        same.append(content(place) == before and len(before) == (0 if not overwrite else 1 + (kind == PAIR)))
    return said, same


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_on_the_size_of_files_is_an_error_and_leaves_what_was_there(tmp_path: Path, kind: str) -> None:
    said, same = export_twice(kind, tmp_path, limited)
    assert (
        said
        == [
            f"cannot write {tmp_path / NAMES[kind]}: File too large. Files of that size are not allowed there: raise the limit (ulimit -f), "
            "or write to another disk."
        ]
        * 2
    )
    assert same == [True, True]
    assert computes(kind, tmp_path / NAMES[kind], heads())


ON_A_SMALL_DISK = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_export_failures import *
    done = {{}}
    for kind in KINDS:
        (place := Path(sys.argv[1]) / kind).mkdir()
        done[kind] = (*export_twice(kind, place, contextlib.nullcontext if sys.argv[2] == "full" else limited),)
        shutil.rmtree(place)
    print(json.dumps(done))
"""


@pytest.fixture(scope="module")
def on_a_small_disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """Return what :func:`export_twice` found on a file system of 300 kB, or under a limit on files where none may be mounted."""
    place = tmp_path_factory.mktemp("small")
    mounted = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=300k tmpfs "$0" && exec "$@"', str(place)]
    can = (
        shutil.which("unshare") and subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode == 0
    )
    script = textwrap.dedent(ON_A_SMALL_DISK).format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", script, str(place), "full" if can else "limited"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*(mounted if can else []), *command], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    reason = "No space left on device. Free some space, or write to another disk." if can else "File too large. "
    return place, reason, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.xdist_group("small disk")
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_disk_that_is_full_is_an_error_and_leaves_what_was_there(
    on_a_small_disk: tuple[Path, str, dict[str, Any]], kind: str
) -> None:
    place, reason, found = on_a_small_disk
    said, same = found[kind]
    assert len(said) == 2
    assert all(each.startswith(f"cannot write {place / kind / NAMES[kind]}: {reason}") for each in said), said
    assert same == [True, True]


# Interrupts and kills, at the moments of an export.


def at(kind: str, moment: str, blow: Callable[[], None]) -> Any:
    """Return a patch by which something happens at a moment of an export."""

    def instead(*_args: Any, **_options: Any) -> None:
        blow()

    def after(function: Callable[..., Any]) -> Callable[..., None]:
        def both(*args: Any, **options: Any) -> None:
            function(*args, **options)
            blow()

        return both

    def half(file: Any, data: Any) -> None:
        rest = memoryview(data).cast("B")
        if next(writes) == (17 if kind == "pt2" else 0):  # pt2 is written in many pieces
            rest = rest[: rest.nbytes // 2]
            io.FileIO.write(file, rest)
            blow()
            pytest.fail("it went on")
        write(file, rest)

    def half_of_the_weights(model: Any, path: str, *, format: str, external_data: str) -> None:
        saved(model, path, format=format, external_data=external_data)
        os.truncate(Path(path).with_name(external_data), 1_000)
        blow()

    format, saved, write, writes = kind.split()[0], onnx_ir.save, files._Recording.write_all, itertools.count()
    owner, name, function = {
        "exporting": (torch.jit, "script", instead) if format == "torchscript" else (torch.export, "export", instead),
        "writing": (onnx_ir, "save", half_of_the_weights) if kind == PAIR else (files._Recording, "write_all", half),
        "loading": {
            "torchscript": (torch.jit, "load", instead),
            "onnx": (onnxruntime, "InferenceSession", instead),
            "pt2": (torch.export, "load", instead),
        }[format],
        "comparing": (_comparing, "compare_values", instead),
        "moving": (files, "_move", instead),
        "moved": (files, "_move", after(files._move)),
        "cleaning up": (_onnx, "_remove_unnamed", instead),
    }[moment]
    return mock.patch.object(owner, name, function)


def interrupt() -> None:
    raise KeyboardInterrupt("on the way")


@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        pytest.param(kind, moment, marks=[] if moment == standing else pytest.mark.matrix)
        for kind, standing in zip(KINDS, MOMENTS, strict=True)
        for moment in MOMENTS
    ],
)
def test_an_interrupt_passes_through_and_leaves_what_was_there(tmp_path: Path, kind: str, moment: str) -> None:
    path = tmp_path / NAMES[kind]
    with at(kind, moment, interrupt), pytest.raises(KeyboardInterrupt, match="on the way"):
        export(kind, heads(1), path)
    assert content(tmp_path) == {}
    path.write_text("old")
    with at(kind, moment, interrupt), pytest.raises(KeyboardInterrupt, match="on the way"):
        export(kind, heads(1), path, overwrite=True)
    assert content(tmp_path) == {path.name: b"old"}
    if moment == "exporting":  # torch's own state is as before
        export(kind, heads(1), path, overwrite=True)
        assert computes(kind, path, heads(1))


@pytest.mark.parametrize(
    ("kind", "overwrite"),
    [
        pytest.param(kind, overwrite, marks=pytest.mark.matrix if (kind == "onnx") == overwrite else [])
        for kind in KINDS
        for overwrite in (False, True)
    ],
)
def test_an_interrupt_right_after_the_move_leaves_the_new_one_whole(tmp_path: Path, kind: str, overwrite: bool) -> None:
    path = tmp_path / NAMES[kind]
    if overwrite:
        export(kind, heads(), path)
    with at(kind, "moved", interrupt), pytest.raises(KeyboardInterrupt, match="on the way"):
        export(kind, heads(1), path, overwrite=overwrite)
    assert computes(kind, path, heads(1))
    assert not list(tmp_path.glob(".*"))


INTERRUPTED = 42
"""The exit code of a process that an interrupt reached as such."""

SETUP = """
import gc
from test_export_failures import *
torch.set_num_threads(1)
plan = Path(sys.argv[1])
warm = Path(sys.argv[2])
for kind in KINDS:
    export(kind, heads(1), warm / NAMES[kind], overwrite=True)

def act(out, overwrite):
    kind, moment, end = json.loads(plan.read_text())
    blow = interrupt if end == "interrupt" else lambda: os.kill(os.getpid(), signal.SIGKILL)
    try:
        with at(kind, moment, blow) if moment else contextlib.nullcontext():
            export(kind, heads(1), out, overwrite=overwrite)
    except KeyboardInterrupt:
        gc.collect()
        os._exit(INTERRUPTED)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., int]]:
    """Return what exports in another process, which is killed or interrupted at a moment; it returns the exit code."""
    plan = tmp_path_factory.mktemp("killed") / "plan"

    def act(kind: str, moment: str, out: Path, *, overwrite: bool, end: str = "kill") -> int:
        plan.write_text(json.dumps([kind, moment, end]))
        code, _ = process(out, overwrite=overwrite)
        return code

    process: Server
    with server(SETUP, plan, tmp_path_factory.mktemp("warm")) as process:
        yield act


@pytest.mark.xdist_group("killed exports")
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_while_it_writes_passes_through_and_leaves_what_was_there(
    tmp_path: Path, killed: Callable[..., int], kind: str
) -> None:
    """In another process, since an exception in the middle of torch's own writing may end the process."""
    path = tmp_path / NAMES[kind]
    assert (
        killed(kind, "writing", path, overwrite=False, end="interrupt") == INTERRUPTED
    )  # as Python ends of an interrupt
    assert content(tmp_path) == {}
    path.write_text("old")
    assert killed(kind, "writing", path, overwrite=True, end="interrupt") == INTERRUPTED
    assert content(tmp_path) == {path.name: b"old"}


@pytest.mark.slow
@pytest.mark.xdist_group("killed exports")
@pytest.mark.parametrize(
    ("kind", "overwrite"),
    [
        pytest.param(
            *(kind, overwrite),
            marks=[] if kind != PAIR and (kind == "torchscript") != overwrite else pytest.mark.matrix,
        )
        for kind in KINDS
        for overwrite in (False, True)
    ],
)
def test_a_process_that_is_killed_leaves_no_half_file_and_the_next_one_cleans_up(
    tmp_path: Path, killed: Callable[..., int], kind: str, overwrite: bool
) -> None:
    place, old = tmp_path / "place", tmp_path / "old"
    path = place / NAMES[kind]
    if overwrite:
        export(kind, heads(), old / path.name)
    moments = ["writing", "loading", "comparing", "moving", "moved", *(["cleaning up"] if kind == PAIR else [])]
    for moment in moments if overwrite else ("writing", "moving", "moved"):
        if overwrite:
            shutil.copytree(old, place, dirs_exist_ok=True)
        assert killed(kind, moment, path, overwrite=overwrite) == -signal.SIGKILL
        if moment in ("moved", "cleaning up"):
            assert computes(kind, path, heads(1)), moment
        elif overwrite:
            assert computes(kind, path, heads()), moment
        else:
            assert not os.path.lexists(path)
        assert list(place.glob(f".{path.name}.*.partial")) or moment == "cleaning up"
    assert killed(kind, "", path, overwrite=True) == 0
    assert computes(kind, path, heads(1))
    assert set(content(place)) == {path.name, *([data_of(path).name] if kind == PAIR else [])}


# Two files.


def data_of(path: Path) -> Path:
    """Return the file of weights that an ONNX file names, and only that."""
    model = onnx.load(path, load_external_data=False)
    (name,) = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    return path.with_name(name)


def test_large_weights_of_onnx_lie_in_a_second_file_which_is_reported_and_moves_with_the_first(tmp_path: Path) -> None:
    path = tmp_path / "first" / "model.onnx"
    exported = export(PAIR, heads(), path)
    data = data_of(path)
    assert re.fullmatch(r"model\.onnx\.[0-9a-f]{8}\.data", data.name)
    assert sorted(path.parent.iterdir()) == [path, data]
    assert exported.files == {path: path.stat().st_size, data: data.stat().st_size}
    assert data.stat().st_size >= 23 * 17 * 4 > path.stat().st_size // 8
    assert f"{data}: ONNX" in str(exported)
    assert computes(PAIR, path, heads())
    moved = tmp_path / "second" / path.name
    path.parent.rename(moved.parent)
    onnx.checker.check_model(str(moved), full_check=True)
    assert computes(PAIR, moved, heads())


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for kind in ("onnx", PAIR):
        for number in (1, 2):
            export(kind, heads(), tmp_path / kind / str(number) / "model.onnx", verify=False)
        assert content(tmp_path / kind / "1") == content(tmp_path / kind / "2")
    export(PAIR, heads(), tmp_path / PAIR / "1" / "model.onnx", overwrite=True)
    assert content(tmp_path / PAIR / "1") == content(tmp_path / PAIR / "2")
    assert len(content(tmp_path / PAIR / "1")) == 2


@pytest.mark.parametrize("kind", [PAIR, pytest.param("onnx", marks=pytest.mark.matrix)])
def test_other_weights_take_the_place_of_both_files(tmp_path: Path, kind: str) -> None:
    path, beside = tmp_path / "model.onnx", ["model.onnx.backup.data", "other.onnx.0123abcd.data"]
    for name in beside:
        (tmp_path / name).write_text("kept")
    export(PAIR, heads(), path)
    old = data_of(path)
    exported = export(kind, heads(1), path, overwrite=True)
    assert not old.exists()
    assert set(tmp_path.iterdir()) == {*exported.files, *(tmp_path / name for name in beside)}
    assert len(exported.files) == (2 if kind == PAIR else 1)
    assert computes(kind, path, heads(1))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.matrix)])
def test_a_last_move_that_fails_leaves_both_old_files_and_no_new_one(tmp_path: Path, seed: int) -> None:
    """Seed 0 has the weights that are there already."""

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if seed:
        with at(PAIR, "moving", fail), pytest.raises(lora_fx.LoraFxError, match=r"cannot write .*: Input/output error"):
            export(PAIR, heads(), tmp_path / "model.onnx")
        assert content(tmp_path) == {}
    export(PAIR, heads(), tmp_path / "model.onnx")
    before = content(tmp_path)
    with at(PAIR, "moving", fail), pytest.raises(lora_fx.LoraFxError, match=r"cannot write .*: Input/output error"):
        export(PAIR, heads(seed), tmp_path / "model.onnx", overwrite=True)
    assert content(tmp_path) == before
    assert len(before) == 2
    assert computes(PAIR, tmp_path / "model.onnx", heads())


def test_an_export_does_not_remove_the_weights_of_another_that_came_after_it(tmp_path: Path) -> None:
    """Of two processes that export to one path, as of any two writers, the last wins; what it wrote is whole."""
    path, cleaned = tmp_path / "model.onnx", _onnx._remove_unnamed

    def another_first(former: set[Path], exported: Path) -> None:
        with mock.patch.object(_onnx, "_remove_unnamed", cleaned):
            export(PAIR, heads(1), path, overwrite=True)
        cleaned(former, exported)

    with mock.patch.object(_onnx, "_remove_unnamed", another_first):
        export(PAIR, heads(), path)
    assert data_of(path).exists()
    assert computes(PAIR, path, heads(1))


# What was written is something else.


@contextlib.contextmanager
def one_weight_changed(format: str) -> Iterator[None]:
    """Let a format write one weight that is one per cent larger."""
    writer = {"torchscript": _torchscript._TorchScript, "onnx": _onnx._Onnx, "pt2": _pt2._Pt2}[format]
    write = writer.write

    def changed(self: Any, exportable: Any, path: Path) -> None:
        plain = copy.deepcopy(exportable.plain)
        (weight,) = (parameter for name, parameter in plain.named_parameters() if name.endswith("second.weight"))
        weight.data.mul_(1.01)
        write(self, dataclasses.replace(exportable, plain=plain), path)

    with mock.patch.object(writer, "write", changed):
        yield


@pytest.mark.parametrize("kind", [*FORMATS, pytest.param(PAIR, marks=pytest.mark.matrix)])
def test_a_file_that_computes_something_else_is_an_error_that_names_output_and_sizes(tmp_path: Path, kind: str) -> None:
    path = tmp_path / NAMES[kind]
    told = (
        r"the written file differs from the graph at batch 2: 'second' differs by \d\.\de-0[23] of its largest value, "
        r"and 1e-04 is allowed; tolerance= sets another bound\."
    )
    with one_weight_changed(kind.split()[0]), pytest.raises(lora_fx.VerifyError, match=told) as caught:
        export(kind, heads(), path)
    assert caught.value.node == "second"
    assert content(tmp_path) == {}
    path.write_text("old")
    with one_weight_changed(kind.split()[0]), pytest.raises(lora_fx.VerifyError, match=told):
        export(kind, heads(), path, overwrite=True)
    assert content(tmp_path) == {path.name: b"old"}


@pytest.mark.parametrize("kind", KINDS)
def test_unverified_it_is_written_and_its_report_says_that_it_was_not_compared(tmp_path: Path, kind: str) -> None:
    path = tmp_path / NAMES[kind]
    with one_weight_changed(kind.split()[0]):
        exported = export(kind, heads(), path, verify=False)
    assert (exported.comparisons, exported.largest) == ((), None)
    assert str(exported).endswith("\nnot compared with the graph")
    x = torch.randn(4, 23)
    with torch.no_grad():
        expected = heads()(x)
    found = run(kind, path, x)
    assert (found["first"] - expected["first"]).abs().max() <= 2e-6 * expected["first"].abs().max()
    assert (found["second"] - expected["second"]).abs().max() > 1e-3 * expected["second"].abs().max()
