"""Serving a model with slots: what onnxruntime does in silence, and what is said instead."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx_ir
import onnx_ir.passes.common
import onnxruntime
import pytest
from slotted import adapted, base, batch, expected, exported, near, parameters, quiet, write

import lora_fx
from lora_fx import runtime
from lora_fx.errors import AdapterError, ExportError, InputError
from lora_fx.runtime import OnnxSession


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with slots, and two adapters for it."""
    root = tmp_path_factory.mktemp("runtime")
    exported(root / "slots.onnx")
    for name, seed in (("a", 1), ("b", 2)):
        lora_fx.export.onnx_adapter(adapted(seed=seed), root / name)
    return root


@pytest.fixture
def session(directory: Path) -> OnnxSession:
    made = OnnxSession(directory / "slots.onnx")
    for name in ("a", "b"):
        made.load(name, directory / name)
    return made


def loaded(path: Path) -> Any:
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(path))
    return adapter


def activated(*adapters: Any) -> Any:
    options = onnxruntime.RunOptions()
    for adapter in adapters:
        options.add_active_adapter(adapter)
    return options


def test_each_call_runs_with_the_adapter_that_it_names(session: OnnxSession) -> None:
    for _ in range(2):
        for name, seed in (("a", 1), ("b", 2)):
            assert near(session.run(batch(), adapter=name)["y"], expected(adapted(seed=seed)))
        assert near(session.run(batch())["y"], expected(base()))
    assert session.adapters == ("a", "b")
    assert list(session.run(batch(), "a", outputs=["y"])) == ["y"]


# Hazards, each shown first, so that it is known when one goes away.


def test_bound_inputs_are_refused_where_onnxruntime_ignores_the_adapter(session: OnnxSession, directory: Path) -> None:
    plain, adapter = session.session, loaded(directory / "a")
    binding = plain.io_binding()
    binding.bind_cpu_input("x", batch()["x"])
    binding.bind_output("y")
    plain.run_with_iobinding(binding, activated(adapter))
    assert np.array_equal(binding.copy_outputs_to_cpu()[0], session.run(batch())["y"])
    for method in (session.io_binding, session.run_with_iobinding):
        with pytest.raises(ExportError, match=r"onnxruntime ignores adapters.*Call run"):
            method(binding)


def test_calls_that_do_not_wait_are_refused_where_onnxruntime_ignores_the_adapter(
    session: OnnxSession, directory: Path
) -> None:
    done, found = threading.Event(), []

    def finish(results: Any, _data: Any, error: str) -> None:
        found.append((results, error))
        done.set()

    adapter = loaded(directory / "a")
    session.session.run_async(None, batch(), finish, None, activated(adapter))
    assert done.wait(60)
    assert np.array_equal(found[0][0][0], session.run(batch())["y"])
    with pytest.raises(ExportError, match="in run_async onnxruntime ignores adapters"):
        session.run_async(None, batch(), finish, None)


def test_two_adapters_are_refused_where_onnxruntime_takes_the_first(session: OnnxSession, directory: Path) -> None:
    a, b = loaded(directory / "a"), loaded(directory / "b")
    both = session.session.run(None, batch(), activated(a, b))[0]
    assert np.array_equal(both, session.run(batch(), "a")["y"])
    with pytest.raises(InputError, match=r"one adapter is expected, by its name.*lora_fx.export.onnx_adapter"):
        session.run(batch(), adapter=["a", "b"])  # type: ignore[arg-type]


def test_values_for_a_slot_are_refused_where_onnxruntime_drops_them(session: OnnxSession, directory: Path) -> None:
    feed = {**batch(), "first.scaling": np.float32([100])}
    adapter = loaded(directory / "a")
    found = session.session.run(None, feed, activated(adapter))[0]
    assert np.array_equal(found, session.run(batch(), "a")["y"])
    with pytest.raises(InputError, match=r"'first.scaling' is an input of a slot.*Load the values as an adapter"):
        session.run(feed, "a")


def test_an_adapter_of_another_base_is_refused_where_onnxruntime_takes_it(
    session: OnnxSession, directory: Path, tmp_path: Path
) -> None:
    lora_fx.export.onnx_adapter(adapted(of=1), tmp_path / "other")
    adapter = loaded(tmp_path / "other")
    assert not np.array_equal(session.session.run(None, batch(), activated(adapter))[0], session.run(batch())["y"])
    with pytest.raises(AdapterError, match=r"it is for the base \d+, and this model is \d+: other weights"):
        session.load("other", tmp_path / "other")
    assert session.adapters == ("a", "b")


def test_an_adapter_that_is_unloaded_meanwhile_lives_until_the_call_ends(session: OnnxSession) -> None:
    """The options of a run do not keep it."""
    options = onnxruntime.RunOptions()
    adapter = session._adapters["a"]
    before = sys.getrefcount(adapter)
    options.add_active_adapter(adapter)
    assert sys.getrefcount(adapter) == before
    wanted, plain, held = session.run(batch(), "a")["y"], session.session, []

    class Unloading:
        """Takes the adapter away when the run begins."""

        def run(self, *arguments: Any) -> Any:
            session.unload("a")
            gc.collect()
            held.append(sys.getrefcount(adapter))
            return plain.run(*arguments)

    with mock.patch.object(session, "session", Unloading()):
        assert np.array_equal(session.run(batch(), "a")["y"], wanted)
    assert held == [before]  # the one of the table is gone, and the call has one
    with pytest.raises(InputError, match=r"no adapter 'a' is loaded.*loaded: b"):
        session.run(batch(), "a")


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
def test_no_optimisation_of_onnxruntimes_folds_the_defaults(directory: Path, level: str, tmp_path: Path) -> None:
    """Neither in the session, nor in the model that it saves."""
    options = quiet()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(tmp_path / "saved.onnx")
    sessions = [OnnxSession(directory / "slots.onnx", options=options), OnnxSession(tmp_path / "saved.onnx")]
    for made in sessions:
        made.load("a", directory / "a")
        assert near(made.run(batch(), "a")["y"], expected(adapted(seed=1)))
        assert near(made.run(batch())["y"], expected(base()))


def test_slots_that_an_optimiser_made_constants_are_missed(directory: Path, tmp_path: Path) -> None:
    model = onnx_ir.load(directory / "slots.onnx")
    onnx_ir.passes.common.RemoveInitializersFromInputsPass()(model)
    onnx_ir.save(model, tmp_path / "constant.onnx")
    with pytest.raises(
        ExportError, match=r"9 inputs of slots are not there any more, first.lora_A.weight the first: an"
    ):
        OnnxSession(tmp_path / "constant.onnx")


def test_slots_are_no_inputs_that_a_caller_has_to_know(session: OnnxSession) -> None:
    assert [value.name for value in session.session.get_inputs()] == ["x"]
    assert {value.name for value in session.session.get_overridable_initializers()} == session.slots.names


def test_no_slot_is_warned_of_while_a_model_is_loaded(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    OnnxSession(directory / "slots.onnx")
    assert capfd.readouterr().err == ""


# Files that do not fit.


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda values: {key: value for key, value in values.items() if key != name}


def replaced(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda values: {key: change(value) if key == name else value for key, value in values.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("last.lora_B.weight"), "last.lora_B.weight: missing beside last.lora_A.weight, last.scaling"),
        (without("last.lora_A.weight"), "last.lora_A.weight: missing beside last.lora_B.weight, last.scaling"),
        (without("last.scaling"), "last.scaling: missing beside last.lora_A.weight, last.lora_B.weight"),
        (
            replaced("last.lora_A.weight", lambda a: a[:, :9].copy()),
            r"last.lora_A.weight: expected shape \(3, 11\), of a site of 11 and 5 features and A of rank 3, got \(3, 9\)",
        ),
        (replaced("last.lora_A.weight", lambda a: a[:2].copy()), r"last.lora_B.weight: expected shape \(5, 2\)"),
        (replaced("last.lora_B.weight", lambda b: b.T.copy()), r"last.lora_B.weight: expected shape \(5, 3\)"),
        (
            replaced("last.lora_B.weight", lambda b: b.astype(np.float16)),
            r"last.lora_B.weight: expected tensor\(float\), got tensor\(float16\)",
        ),
        (replaced("last.scaling", lambda s: np.float32([s[0], s[0]])), r"last.scaling: expected shape \(1,\)"),
        (
            lambda values: values | {"lost.scaling": np.float32([1])},
            r"lost.scaling: the model has no such slot \(did you mean .*'last.scaling'",
        ),
        (lambda _values: {}, "it has no parameters"),
        (
            replaced("last.lora_B.weight", lambda b: np.where(b == b[2, 1], np.float32("nan"), b)),
            "last.lora_B.weight: expected finite numbers, got 1 that are not",
        ),
        (
            replaced("last.lora_A.weight", lambda a: np.full_like(a, np.inf)),
            "last.lora_A.weight: expected finite numbers, got 33 that are not",
        ),
        (
            replaced("last.scaling", lambda s: -np.inf * s),
            "last.scaling: expected finite numbers, got 1 that are not",
        ),
    ],
    ids=[
        "no B",
        "no A",
        "no scaling",
        "width",
        "ranks",
        "turned",
        "dtype",
        "scaling",
        "unknown",
        "empty",
        "nan",
        "inf",
        "scaling of inf",
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_onnxruntime_sees_it(
    session: OnnxSession, directory: Path, tmp_path: Path, change: Any, said: str
) -> None:
    path = write(tmp_path / "bad", change(parameters(directory / "a")), session.slots.version)
    with pytest.raises(AdapterError, match=said):
        session.load("bad", path)
    assert session.adapters == ("a", "b")


def test_of_many_problems_the_first_are_told(session: OnnxSession, tmp_path: Path) -> None:
    values = {f"unknown_{index}": np.float32([1]) for index in range(500)}
    with pytest.raises(AdapterError, match="and 490 more problems"):
        session.load("bad", write(tmp_path / "bad", values, session.slots.version))


def test_a_file_of_another_tool_is_refused(session: OnnxSession, directory: Path, tmp_path: Path) -> None:
    write(tmp_path / "theirs", parameters(directory / "a"), session.slots.version, adapter_version=7)
    with pytest.raises(AdapterError, match="expected an adapter of lora_fx, of version 1, found version 7"):
        session.load("theirs", tmp_path / "theirs")


@pytest.mark.parametrize("content", [b"", b"no adapter", None], ids=["empty", "text", "cut"])
def test_a_file_of_another_format_is_refused(
    session: OnnxSession, directory: Path, tmp_path: Path, content: bytes | None
) -> None:
    whole = (directory / "a").read_bytes()
    (tmp_path / "bad").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(
        AdapterError, match=r"expected a file of onnxruntime's adapter format: .*lora-fx export-adapter"
    ):
        session.load("bad", tmp_path / "bad")
    with pytest.raises(AdapterError, match="cannot be read: No such file"):
        session.load("bad", tmp_path / "none")


def test_a_file_that_is_replaced_while_it_is_loaded_is_refused(
    session: OnnxSession, directory: Path, tmp_path: Path
) -> None:
    """What was looked at would not be what is loaded."""
    path = tmp_path / "adapter"
    path.write_bytes((directory / "a").read_bytes())
    original = runtime._check

    def replacing(*arguments: Any) -> None:
        original(*arguments)
        lora_fx.export.onnx_adapter(adapted(of=1), path, overwrite=True)

    with mock.patch.object(runtime, "_check", replacing), pytest.raises(AdapterError, match="it was replaced while"):
        session.load("c", path)


def test_a_loaded_file_may_be_replaced(session: OnnxSession, directory: Path, tmp_path: Path) -> None:
    """By another, as all of ours are written."""
    lora_fx.export.onnx_adapter(adapted(seed=1), tmp_path / "c")
    session.load("c", tmp_path / "c")
    lora_fx.export.onnx_adapter(adapted(seed=2), tmp_path / "c", overwrite=True)
    assert np.array_equal(session.run(batch(), "c")["y"], session.run(batch(), "a")["y"])
    with pytest.raises(AdapterError, match=r"an adapter 'c' is loaded already. Unload it, or choose another name"):
        session.load("c", tmp_path / "c")
    session.unload("c")
    session.load("c", tmp_path / "c")
    assert np.array_equal(session.run(batch(), "c")["y"], session.run(batch(), "b")["y"])


# Calls that do not fit.


@pytest.mark.parametrize(
    ("inputs", "options", "said"),
    [
        ({}, {}, "no value for x: the model takes x"),
        ({"x": batch()["x"], "y": batch()["x"]}, {}, "no input y: the model takes x"),
        ({"x": batch()["x"].astype(np.float64)}, {}, r"onnxruntime does not run the model on these inputs: .*double"),
        ({"x": batch()["x"][:, :3]}, {}, r"onnxruntime does not run the model on these inputs: .*dimensions"),
        (batch(), {"adapter": "c"}, "no adapter 'c' is loaded; loaded: a, b"),
        (batch(), {"outputs": ["z"]}, "the model has no output 'z'; it has y"),
    ],
    ids=["missing", "unknown", "dtype", "shape", "adapter", "output"],
)
def test_a_call_that_does_not_fit_is_refused(
    session: OnnxSession, inputs: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        session.run(inputs, **options)


def test_a_model_that_cannot_be_served_is_refused(directory: Path, tmp_path: Path) -> None:
    lora_fx.export.onnx(base(), tmp_path / "plain.onnx", verify=False)
    for path, said in (
        (tmp_path / "plain.onnx", "has no slots for adapters. Export it with slots"),
        (tmp_path / "none.onnx", "does not load"),
        (directory / "a", "does not load"),
    ):
        with pytest.raises(ExportError, match=said):
            OnnxSession(path)


def test_loading_and_unloading_disturb_no_call(session: OnnxSession, directory: Path) -> None:
    wanted = session.run(batch(), "b")["y"]
    wrong: list[Any] = []
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            if not np.array_equal(session.run(batch(), "b")["y"], wanted):
                wrong.append("other values")

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(100):
        session.load(f"c{turn}", directory / "a")
        session.run(batch(), f"c{turn}")
        session.unload(f"c{turn}")
    over.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert session.adapters == ("a", "b")


def test_serving_needs_no_torch(directory: Path) -> None:
    code = f"""
        import sys
        import numpy
        from lora_fx.runtime import OnnxSession
        session = OnnxSession({str(directory / "slots.onnx")!r})
        session.load("a", {str(directory / "a")!r})
        print(session.run({{"x": numpy.ones((2, 7), numpy.float32)}}, "a")["y"].shape)
        print(sorted({{"torch", "transformers", "onnx"}} & set(sys.modules)))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["(2, 5)", "[]"]


def test_the_model_is_an_ordinary_one_for_onnx(directory: Path) -> None:
    onnx.checker.check_model(str(directory / "slots.onnx"), full_check=True)
