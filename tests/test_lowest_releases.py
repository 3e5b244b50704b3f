"""The constraints of ``make test-lowest`` are the lower bounds of ``pyproject.toml``."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from lowest_releases import EXTRAS, INSTALLABLE, constraints

ROOT = Path(__file__).parents[1]
PROJECT = ROOT / "pyproject.toml"


def test_each_requirement_is_held_at_its_lower_bound() -> None:
    table = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    written = [*table["dependencies"], *(each for extra in EXTRAS for each in table["optional-dependencies"][extra])]
    bounds = dict(re.split(r">=|==", each.partition(",")[0]) for each in written if re.search(r">=|==", each))
    assert {each for each in written if not re.search(r">=|==", each)} == {
        "lora-fx[onnx]",
        *(f"types-{each}" for each in ("jsonschema", "regex", "tqdm")),
    }
    assert constraints(PROJECT) == bounds | INSTALLABLE


def test_the_guide_names_the_same_bounds() -> None:
    lowest = dict(re.findall(r'"(torch|transformers)>=([\d.]+)[,"]', PROJECT.read_text(encoding="utf-8")))
    said = re.findall(r"(torch|transformers) ([\d.]+) or newer", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert said == [(name, lowest[name]) for name in ("torch", "transformers")]


def test_a_requirement_without_one_lower_bound_is_an_error(tmp_path: Path) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\ndependencies = ["torch>=2.11,!=2.12"]\noptional-dependencies = {onnx = [], draw = [], demo = [], dev = []}\n'
    )
    with pytest.raises(
        ValueError, match=re.escape("'torch>=2.11,!=2.12' is not NAME>=RELEASE[,<RELEASE] or NAME==RELEASE")
    ):
        constraints(project)
