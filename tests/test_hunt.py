"""The hunt in small: one of its programs goes the whole way, a fault in a pass is found, and a run goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path

import hunt.__main__ as driver
import pytest
from hunt.outcome import Outcome

import lora_fx

SEED = 13
"""A convolution, a shared linear and a product by einsum on an embedding, in float64; with training and TorchScript."""


def test_a_random_program_is_what_peft_and_float64_compute_whatever_is_asked_of_it() -> None:
    outcome = driver.check(SEED)
    assert {result for _, result, _ in outcome.results} == {"equal"}
    asked = {what for what, _, _ in outcome.results}
    assert asked >= {
        "PEFT",
        "rewrite",
        "training",
        "gradients",
        "fold",
        "transfer, fold",
        "unload",
        "loaded by PEFT",
        "torchscript",
    }
    assert "float64" in outcome.kinds
    assert 0 < outcome.worst < 1e-9


def test_a_fold_that_loses_an_adapter_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_fx, "fold", lambda graph, **_: lora_fx.unload(graph))
    wrong = {what for what, _ in driver.check(SEED, exports=False).wrong}
    assert wrong == {"fold", "fold, in the model", "fold in place", "fold two", "off and on, fold", "transfer, fold"}


def test_a_hunt_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run: list[int] = []

    def timed(seed: int, limit: int, *, exports: bool) -> Outcome:
        run.append(seed)
        results = {
            5: [],
            6: [("fold", "equal", "1e-16")],
            7: [("fold", "wrong", "0.5")],
            8: [("fold", "refused", "why")],
        }
        return Outcome(seed, ["float64"], results[seed], 1e-16, 0.1)

    monkeypatch.setattr(driver, "timed", timed)
    path = tmp_path / "hunt.jsonl"
    driver.hunt(1, 5, 10, exports=True, results=path)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"seed": 7, "ki')  # killed while it wrote
    done = driver.hunt(3, 5, 10, exports=True, results=path)
    assert run == [5, 6, 7, 8]
    assert [each.seed for each in done] == [6, 7, 8]
    assert "3/3 seed 8" in capfd.readouterr().err
    assert driver.counts(done).splitlines()[2:] == ["| fold | 1 | 1 | 1 | 0 |", "| **3 models** | 1 | 1 | 1 | 0 |"]
    assert driver.refusals(done) == "1 ×, first by seed 8: fold: why"
    again = driver.hunt(3, 5, 10, exports=True, results=path)
    assert (run[4:], again) == ([], done)
