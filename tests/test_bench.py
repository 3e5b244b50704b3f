"""The benchmarks run at tiny sizes, measure what they say, and write the same table for the same results.

How fast anything is, is not asked here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "tools"), str(ROOT / "tools" / "bench")]

import checkpoint_fold  # noqa: E402
import checkpointing  # noqa: E402
import compiling  # noqa: E402
import contenders  # noqa: E402
import folds  # noqa: E402
import generation  # noqa: E402
import gpu  # noqa: E402
import guides  # noqa: E402
import inference  # noqa: E402
import large_graph  # noqa: E402
import loading  # noqa: E402
import measuring  # noqa: E402
import nesting  # noqa: E402
import tracing  # noqa: E402
import training  # noqa: E402
from results import Conditions, Goal, Measured, Result, load, save, table  # noqa: E402
from shapes import batch_of, built  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

HERE = Conditions("2026-01-02", "abacus, 3 cores", 1, {"torch": "2.0"})


def in_this_process(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def check(result: Result, path: Path, row: str) -> None:
    """Write a row as JSON, look at its fields, and read it again."""
    save(path, [result])
    (data,) = json.loads(path.read_text(encoding="utf-8"))
    assert set(data) == {"row", "shape", "contenders", "goals", "conditions", "notes"}
    assert data["row"] == row
    assert set(data["conditions"]) == {"day", "machine", "threads", "versions"}
    for contender in data["contenders"]:
        assert set(contender) == {"name", "seconds", "saved", "peak", "resident", "difference", "against"}
        assert contender["seconds"]
        assert all(second > 0 for second in contender["seconds"])
    for goal in data["goals"]:
        assert {"contender", "quantity", "bound", "against", "text", "found", "met"} == set(goal)
    (again,) = load(path)
    assert dataclasses.replace(again, goals=()) == dataclasses.replace(result, goals=())
    assert list(again.goals) == result.asked()
    assert table([again]) == table([result])


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=[] if row.name == "C1" else pytest.mark.matrix)
        for row in training.ROWS
        if row.name != "C2"  # that of C1, when it is tiny
    ],
)
def test_a_training_row_compares_and_measures_every_contender(
    row: training.Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "apart", in_this_process)
    result = training.measured(row.tiny())
    check(result, tmp_path / "row.json", row.name)
    assert [each.name for each in result.contenders] == ["PEFT", "plain", "fused", "frozen"]
    assert result["plain"].difference == 0 == result.saved("frozen")
    assert all(each.peak and each.saved for each in result.contenders)
    assert all(
        (each.resident is not None) == (row.name == "C1" and each.name in training.RESIDENT)
        for each in result.contenders
    )


@pytest.mark.matrix
def test_nested_graphs_are_measured_beside_flat_ones_and_checkpointed_ones_beside_pefts() -> None:
    found = nesting.measured("gpt2", 1)
    assert isinstance(found.again, nesting.Pair)
    assert found.apart == 0.0
    cells = found.line("gpt2").split("|")
    assert len(cells) == len(nesting.HEADER[0].split("|"))
    assert all(cell.strip() for cell in cells[1:-1])


def test_activation_checkpointing_is_measured_beside_that_of_peft(tmp_path: Path) -> None:
    result = checkpointing.measured(dataclasses.replace(checkpointing.ROW.tiny(), repetitions=1))
    check(result, tmp_path / "row.json", "K1")
    assert len(result.asked()) == len(result.goals)
    assert all(each.difference == 0 for each in result.contenders if "fused" not in each.name)
    assert result["nested, again"].saved < result["plain"].saved


@pytest.mark.parametrize("row", [pytest.param("H1", marks=pytest.mark.matrix), "H2", "H3"])
def test_a_row_for_a_gpu_runs_on_a_cpu_at_tiny_sizes(row: str, tmp_path: Path) -> None:
    result = gpu.measured(row, "cpu", None, 2, compiled=False, tiny=True)
    check(result, tmp_path / "row.json", row)
    if row != "H3":
        assert result["plain"].difference == 0  # also of H1, whose graphs were traced without weights


def test_without_a_gpu_its_rows_are_refused_in_plain_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cpu"):
        with pytest.raises(typer.Exit) as error:
            gpu.main(["H1"], device=device)
        assert error.value.exit_code == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert all("--tiny" in line for line in told)


@pytest.mark.parametrize("gigabytes", [12, 24, 40, 80, 141])
def test_more_memory_and_fewer_tokens_hold_more_layers(gigabytes: int) -> None:
    short, long = (gpu.layers_that_fit(gigabytes * 10**9, tokens) for tokens in (512, 8192))
    assert 1 <= long <= short <= 32
    assert short >= gpu.layers_that_fit(gigabytes * 10**9 // 2, 512)


def test_tracing_is_measured_in_full_and_stamped_which_give_the_same_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(function: Callable[..., Any], *arguments: Any) -> Any:
        times = function is tracing.seconds and not arguments[0].inference  # of both modes, which take twice as long
        compared = function is tracing.unlike and arguments[1]
        return 1.5 if times else None if compared else function(*arguments)

    monkeypatch.setattr(tracing, "apart", run)
    for row, goals in {"C8": 2, "W3": 1}.items():
        result = tracing.measured(row, 1, tracing.LLAMA_8B.tiny(4), tracing.LLAMA_70B.tiny(5))
        check(result, tmp_path / "row.json", row)
        assert len(result.asked()) == len(result.goals) == goals


@pytest.mark.matrix
def test_the_first_compiled_step_is_timed_and_computes_what_pefts_does(tmp_path: Path) -> None:
    result = compiling.measured(compiling.ROW.tiny(), backend="eager")
    check(result, tmp_path / "row.json", "W7")
    assert len(result.asked()) == len(result.goals) == 3
    assert result[compiling.NESTED].difference == 0


def test_loads_of_adapters_are_measured_beside_those_of_peft_with_equal_logits(tmp_path: Path) -> None:
    result = loading.measured(loading.MODEL.tiny(), 3, 2)
    check(result, tmp_path / "row.json", "W9")
    assert len(result.asked()) == len(result.goals) == 2
    assert [len(each.seconds) for each in result.contenders] == [3, 3, 2, 2, 2]
    assert result[loading.LOADS].difference == 0


def test_the_passes_over_a_large_graph_are_a_row(tmp_path: Path) -> None:
    result = large_graph.measured(600)
    check(result, tmp_path / "row.json", "W10")
    assert len(result.asked()) == len(result.goals) == len(result.contenders) == 5


@pytest.mark.parametrize(
    "row",
    [inference.ROWS[0], *(pytest.param(row, marks=pytest.mark.matrix) for row in inference.ROWS[1:])],
    ids=lambda row: row.name,
)
def test_folded_inference_is_measured_beside_the_model(row: inference.Row, tmp_path: Path) -> None:
    result = inference.measured(dataclasses.replace(row.tiny(), compiled=False))
    check(result, tmp_path / "row.json", row.name)
    assert result["folded"].difference == 0


def test_folds_are_rows_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_fold, "apart", in_this_process)
    check(folds.in_memory(0.02, 1), tmp_path / "memory.json", "C6")
    for result in folds.beside_bounds(0.02, 1):
        check(result, tmp_path / "memory.json", result.row)
    result = folds.on_disk(0.02, 1, directory=tmp_path)
    check(result, tmp_path / "disk.json", "W6")
    assert len(result.asked()) == len(result.goals) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.json", "memory.json"]


def test_wrong_numbers_are_not_timed() -> None:
    row = training.ROWS[0].tiny()
    pair = training.contenders_of(row, ("PEFT", "plain"))
    factor = next(p for name, p in pair[1].module.named_parameters() if ".lora_B." in name)
    assert contenders.compared(pair, row.tolerance) == {"PEFT": 0, "plain": 0}
    with torch.no_grad():
        factor.mul_(1 + 1e-6)
    assert contenders.compared(pair, row.tolerance, exact=False)["plain"] > 0
    with pytest.raises(SystemExit, match="plain is"):
        contenders.compared(pair, row.tolerance)
    with torch.no_grad():
        factor.mul_(1.01)
    with pytest.raises(SystemExit, match="plain is"):
        contenders.compared(pair, row.tolerance, exact=False)


def test_what_is_kept_for_backward_is_counted_once_and_without_weights() -> None:
    weight, x = nn.Parameter(torch.ones(100, 50)), torch.ones(10, 100, requires_grad=True)
    module = nn.Module()
    module.weight = weight
    # The product keeps x and the weight; exp its result, of which the last product reads a view.
    kept = measuring.saved_bytes(lambda: ((x @ weight).exp()[:5] * 2).square(), module)
    assert kept == 4 * (10 * 100 + 10 * 50 + 5 * 50)


def test_the_peak_of_memory_is_exact() -> None:
    million = torch.ones(10**6)

    def step() -> torch.Tensor:
        first = million + 1
        second = first + 1
        del first
        return second + 1

    assert 8e6 <= measuring.peak_bytes(step) <= 8e6 + 1000
    assert measuring.peak_bytes(step) == measuring.peak_bytes(step)


def test_steps_take_turns_and_what_is_done_before_them_is_not_timed() -> None:
    ran: list[str] = []
    steps = {name: (lambda name=name: ran.append(name)) for name in ("a", "b", "c")}
    times = measuring.alternating(steps, 2, warm_up=1, before={"b": lambda: ran.append("before b")})
    assert ran == ["a", "before b", "b", "c", "before b", "b", "c", "a", "c", "a", "before b", "b"]
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_limit_leaves_three_repetitions() -> None:
    times = measuring.alternating({"a": lambda: None, "b": lambda: None}, 9, warm_up=1, limit=0.0)
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}


def made() -> Result:
    return Result(
        "C0",
        "Something small",
        (
            Measured("PEFT", (0.3, 0.1, 0.2), saved=30_000_000, peak=50_000_000, difference=0.0),
            Measured("fused", (0.16, 0.16, 9.0), 12_000_000, 20_000_000, 5_250_000, 1e-7, against="PEFT"),
            Measured("frozen", (0.1,), saved=10_000_000, against="PEFT"),
        ),
        (
            Goal("fused", "speed", 1.25, "PEFT"),
            Goal("fused", "overhead", 0.5, "PEFT"),
            Goal("fused", "saved", 0.1, "PEFT"),
            Goal("fused", "peak", 0.5, "PEFT"),
            Goal("fused", "time", 0.8, "PEFT"),
            Goal("fused", "seconds", 0.1),
            Goal("fused", "noise", 1.0, "PEFT"),
            Goal("compiled", "speed", 1.0, "PEFT"),
        ),
        HERE,
        ("A note",),
    )


def test_the_table_says_what_was_found_and_which_goals_are_met() -> None:
    expected = """\
| row | | time | speed | Ω | saved, MB | peak, MB | resident, MB | goal | met |
|---|---|---:|---:|---:|---:|---:|---:|---|---|
| C0 | PEFT | 200 ms |  | 100.0% | 20 | 50 |  |  |  |
|  | fused | 160 ms | 1.25× | 60.0% | 2.0 | 20 | 5.2 | speed ≥ 1.25× PEFT; Ω ≤ 0.5× PEFT; \
saved ≤ 0.1× PEFT; peak ≤ 0.5× PEFT; time ≤ 0.8× PEFT; ≤ 0.1 s; within noise of PEFT | \
yes, 1.25; **no**, 0.60; yes, 0.10; yes, 0.40; yes, 0.80; **no**, 0.16; yes, 0.64 |
|  | frozen | 100 ms | 2.00× |  | 0.0 |  |  |  |  |

- **C0**: Something small. A note.

2026-01-02, abacus, 3 cores, 1 thread, torch 2.0."""
    assert table([made()]) == expected
    elsewhere = dataclasses.replace(made(), row="C9", conditions=dataclasses.replace(HERE, threads=2))
    assert table([made(), elsewhere, made()]).splitlines()[-2:] == [
        "C0, C0: 2026-01-02, abacus, 3 cores, 1 thread, torch 2.0.  ",
        "C9: 2026-01-02, abacus, 3 cores, 2 threads, torch 2.0.  ",
    ]


def test_all_rows_that_were_found_make_the_table_and_a_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("every_row", ROOT / "tools" / "bench" / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    every = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(every)

    def run(row: str, path: Path, *, tiny: bool) -> str | None:
        if row == "C3":
            return "C3: it broke"
        save(path, [dataclasses.replace(made(), row=row)])
        return None

    monkeypatch.setattr(every, "run", run)
    save(tmp_path / "H2.json", [dataclasses.replace(made(), row="H2")])
    every.main(["C9", "C2"], out=tmp_path)
    assert [result.row for result in every.found_in(tmp_path)] == ["C2", "C9", "H2"]
    assert capsys.readouterr().out == table(every.found_in(tmp_path)) + "\n"
    with pytest.raises(typer.Exit) as error:
        every.main(["C3", "C1"], out=tmp_path, write=True)  # and the guide is left as it is
    assert error.value.exit_code == 1
    assert "C3: it broke" in capsys.readouterr().err
    with pytest.raises(typer.BadParameter, match="C0"):
        every.main(["C0"], out=tmp_path)
    assert {(ROOT / "tools" / "bench" / tool).is_file() for tool, *_ in (every.ROWS | every.MORE).values()} == {True}
    guide = (ROOT / "tools" / "bench" / "README.md").read_text(encoding="utf-8")
    assert [row for row, (tool, *_) in every.MORE.items() if f"<!-- made by tools/bench/{tool} -->" not in guide] == []


def test_every_row_finds_what_it_imports_when_it_is_started_from_another_directory(tmp_path: Path) -> None:
    """Of one process, which imports torch once; the tests themselves have the directories of the tools in their path."""
    started = """
import runpy, sys
from pathlib import Path

tools, paths = Path(sys.argv[1]), sys.path[1:]
for script in sorted((tools / "bench").glob("*.py")):
    sys.path[:] = [str(script.parent), *paths]
    for name, module in list(sys.modules.items()):
        if name != "__main__" and Path(getattr(module, "__file__", None) or "/").is_relative_to(tools):
            del sys.modules[name]
    try:
        runpy.run_path(str(script))
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime_genai":  # of an extra
            print(script.name, error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", started, str(ROOT / "tools")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_a_table_is_put_between_its_markers_alone(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- made by x.py -->\nold\n\nold\n<!-- end -->\nb\n<!-- made by y.py -->\n<!-- end -->\n")
    guides.write("x.py", r"new \1", [path])
    guides.write("y.py", "other", [path])
    text = "a\n<!-- made by x.py -->\nnew \\1\n<!-- end -->\nb\n<!-- made by y.py -->\nother\n<!-- end -->\n"
    assert path.read_text() == text
    with pytest.raises(SystemExit, match=r"expected '<!-- made by z\.py -->' once .* got it 0 times"):
        guides.write("z.py", "none", [path])
    assert path.read_text() == text


@pytest.mark.matrix
@pytest.mark.parametrize("row", ["G1"])
def test_all_ways_to_generate_write_the_same_text(row: str, tmp_path: Path) -> None:
    with torch.no_grad():
        result, directory = generation.measured(generation.SHAPE.tiny(), 4, 1, tmp_path)
    check(result, tmp_path / "row.json", row)
    ours = ["folded, TorchScript", "folded, onnxruntime", "slots, onnxruntime", "no cache, onnxruntime"]
    assert {"PEFT, eager", "folded, eager", *ours} <= {each.name for each in result.contenders}
    assert "All wrote the same 4 tokens" in result.notes
    checked = generation.checked_step(directory, 5, 3)
    check(checked, tmp_path / "row.json", "G2")
    assert checked.notes[0].endswith("nodes without checks")


def test_texts_agree_up_to_the_first_other_token() -> None:
    assert generation.agreement([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert generation.agreement([1, 2], [1, 2]) == 2


def test_a_batch_is_the_same_every_time_and_has_the_padding_that_is_asked() -> None:
    model = built(training.ROWS[0].model.tiny(), torch.float32)
    first, second = (batch_of(model, 2, 8, padding=3) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["attention_mask"].tolist() == [[0] * 3 + [1] * 5] * 2
