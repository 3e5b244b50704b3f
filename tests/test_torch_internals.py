"""The private names of torch are in one list, and one that is gone is named, with what needs it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import lora_fx
from lora_fx import torch_internals

PACKAGE = Path(lora_fx.__file__).parent
OF_TRANSFORMERS = {"_gradient_checkpointing_func", "_get_dtype_plan", "_custom_modules", "_keep_in_fp32_modules"}
OF_PYTHON = {"_getframe"}


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _own_names(trees: list[ast.AST]) -> set[str]:
    """Private names that the package itself defines: functions, classes, fields, attributes of self, variables."""
    names = set()
    for node in (each for tree in trees for each in ast.walk(tree)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def _uses(path: Path, own: set[str]) -> Iterator[str]:
    """Private names of other packages in a file: modules and names that it imports, and attributes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if not module.startswith(("lora_fx", "__future__")):
                if any(_private(part) for part in [*module.split("."), *(each.name for each in names)]):
                    yield module
            case ast.Import(names=names):
                yield from (each.name for each in names if any(map(_private, each.name.split("."))))
            case ast.Attribute(attr=name) if _private(name) and name not in own:
                yield name


def test_every_private_name_of_torch_is_in_the_list() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "torch_internals.py"]
    own = _own_names([ast.parse(path.read_text(encoding="utf-8")) for path in files])
    listed = {name for _, _, names, _ in torch_internals.ATTRIBUTES for name in names} | torch_internals.OPTIONAL
    unlisted = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in files
        for name in _uses(path, own)
        if name not in listed | OF_TRANSFORMERS | OF_PYTHON
    }
    assert not unlisted


@pytest.mark.parametrize("name", torch_internals.NAMES)
def test_a_private_name_that_is_gone_is_an_import_error_with_what_needs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = torch_internals.NAMES[name]
    assert getattr(torch_internals, name) is not None
    renamed = (
        replace(private, name=f"{private.name}_renamed")
        if private.name
        else replace(private, module=f"{private.module}_renamed")
    )
    monkeypatch.setitem(torch_internals.NAMES, name, renamed)
    with pytest.raises(
        ImportError, match=re.escape(f"lacks {renamed.path} ({private.purpose}), on which lora_fx depends")
    ):
        getattr(torch_internals, name)


def test_all_private_attributes_that_are_gone_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(shown, SimpleNamespace(), names, purpose) for shown, _, names, purpose in torch_internals.ATTRIBUTES]
    monkeypatch.setattr(torch_internals, "ATTRIBUTES", rows)
    with pytest.raises(ImportError) as found:
        torch_internals.check_attributes()
    assert all(f"{shown}.{name} ({purpose})" in str(found.value) for shown, _, names, purpose in rows for name in names)


def test_a_name_outside_the_list_is_an_attribute_error() -> None:
    assert not hasattr(torch_internals, "NoSuchName")
