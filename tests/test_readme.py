from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_the_code_runs_and_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks("python"):
        capsys.readouterr()
        exec(compile(block, "README.md", "exec"), names)
        printed = capsys.readouterr().out
        for line in re.findall(r"^# (.*)$", block, flags=re.MULTILINE):
            assert line in printed
    assert len(blocks("python")) == 4


def test_the_rule_file_shown_is_the_one_there_is() -> None:
    assert blocks("toml") == [(ROOT / "rules" / "t5.toml").read_text(encoding="utf-8")]


def test_every_file_it_names_is_there() -> None:
    for name in re.findall(r"`(\w+\.py)`", README):
        assert (ROOT / "lora_fx" / name).is_file(), name
    for command in re.findall(r"pytest (tests/\w+\.py)", README):
        assert (ROOT / command).is_file()
