from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lora_fx
from lora_fx.cli import app
from lora_fx.errors import hub_hint, listed


@pytest.mark.parametrize(
    ("items", "most", "separator", "text"),
    [
        ((), 2, ", ", ""),
        (("a",), 2, ", ", "a"),
        (("a", "b"), 2, ", ", "a, b"),
        (("a", "b", "c", "d", "e"), 2, ", ", "a, b and 3 more"),
        (("a is b", "c is d", "e is f"), 2, "; ", "a is b; c is d, and 1 more"),
    ],
)
def test_a_list_names_the_first_items_and_counts_the_rest(
    items: tuple[str, ...], most: int, separator: str, text: str
) -> None:
    assert listed(items, most, separator) == text


def test_an_id_on_the_hub_where_a_directory_is_expected_is_told_with_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    told = (
        " If it is an id on the Hugging Face hub, from which nothing is downloaded: run hf download org/base-7b --local-dir base-7b, "
        "and give base-7b."
    )
    with pytest.raises(lora_fx.AdapterError) as adapter:
        lora_fx.load_adapter(lora_fx.trace(torch.nn.Linear(3, 4), (torch.ones(2, 3),)), "org/base-7b")
    assert str(adapter.value) == (
        f"org/base-7b: expected a PEFT adapter, with adapter_config.json: No such file or directory.{told}"
    )
    for arguments in (
        ["fold", "org/base-7b", "adapter", "out"],
        ["export", "org/base-7b", "out.onnx", "--format", "onnx"],
        ["plan", "org/base-7b"],
        ["draw", "org/base-7b"],
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 3
        assert " ".join(done.stderr.split()).endswith(told), arguments
    for path in ("models/base", "/org/base", "./base/x/y", "a/b/c", "model.json", "base.pt2", "-x", "..", "org/mod:1"):
        assert hub_hint(path) == "", path
    assert "hf download gpt2 --local-dir gpt2" in hub_hint("gpt2")
