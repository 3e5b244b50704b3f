"""The API reference."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import make_docs


def test_the_reference_has_every_public_name_and_no_warning_and_no_link_that_leads_nowhere(tmp_path: Path) -> None:
    assert make_docs.build(tmp_path) == []
    names = set(make_docs.public_names())
    assert {("lora_fx", name) for name in importlib.import_module("lora_fx").__all__} - names == {
        ("lora_fx", "export"),
        ("lora_fx", "generation"),
        ("lora_fx", "huggingface"),
        ("lora_fx", "parallel"),
    }
    assert {module for module, _ in names} == {
        "lora_fx",
        "lora_fx.export",
        "lora_fx.generation",
        "lora_fx.huggingface",
        "lora_fx.parallel",
        "lora_fx.runtime",
        "lora_fx.trainer",
    }
    page = (tmp_path / "lora_fx.html").read_text(encoding="utf-8")
    assert re.search(r'id="fold".*?unshare.*?Arguments:.*?Raises:', page, re.DOTALL)


def test_links_and_references_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "lora_fx.html").write_text(
        '<i id="fold"></i><a href="#fold">a</a><a href="#gone">b</a><a href="gone.html">c</a><code>lora_fx.branches.lower()</code>'
    )
    problems = [problem.partition(": ")[2] for problem in make_docs.problems_of(tmp_path) if ": " in problem]
    assert problems == [
        "the link to '#gone' leads nowhere",
        "the link to 'gone.html' leads nowhere",
        "lora_fx.branches.lower is named, but it is not public",
    ]
