"""The house in order: what a linter does not check of where code stands and what it is called."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_fx"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 60
PUBLIC_PACKAGES = {PACKAGE, PACKAGE / "export", PACKAGE / "generation", PACKAGE / "parallel", PACKAGE / "cli"}


def nodes(*kinds: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds):
                yield str(path.relative_to(PACKAGE)), node


def test_no_file_is_long() -> None:
    lengths = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8").count("\n") for path in FILES}
    assert len(lengths) > 100
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_long_but_for_its_docstring() -> None:
    found = {}
    for name, node in nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        first = node.body[0]
        documented = ast.get_docstring(node, clean=False) is not None
        docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
        found[f"{name}:{node.name}"] = (node.end_lineno or 0) - node.lineno + 1 - docstring
    assert len(found) > 1000
    assert {name: length for name, length in found.items() if length > MAX_FUNCTION_LINES} == {}


def test_no_class_name_stands_twice() -> None:
    names = Counter(node.name for _, node in nodes(ast.ClassDef) if isinstance(node, ast.ClassDef))
    assert len(names) > 100
    assert [name for name, count in names.items() if count > 1] == []


def test_the_record_of_a_graph_is_read_in_one_file() -> None:
    """``graph.meta["lora_fx"]`` (or ``.get``, ``.setdefault``) has one accessor; stamps of nodes are in ``node.meta["custom"]``."""
    found = []
    for name, node in nodes(ast.Subscript, ast.Call):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="meta"), slice=ast.Constant(value="lora_fx")):
                found.append(name)
            case ast.Call(
                func=ast.Attribute(value=ast.Attribute(attr="meta")), args=[ast.Constant(value="lora_fx"), *_]
            ):
                found.append(name)
            case _:
                pass
    assert set(found) <= {"graph/info.py"}


def test_init_files_are_empty_but_for_public_packages() -> None:
    written = {path.parent for path in FILES if path.name == "__init__.py" and path.read_text(encoding="utf-8").strip()}
    assert written == PUBLIC_PACKAGES


def test_there_is_no_module_of_odds_and_ends() -> None:
    assert {path.stem for path in FILES} & {"utils", "util", "helpers", "common", "misc"} == set()


def test_the_tree_in_the_guide_is_that_of_the_package() -> None:
    guide = (PACKAGE / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"```text\nlora_fx/\n(.*?)```", guide, re.DOTALL)
    assert tree is not None
    listed: set[str] = set()
    package = folder = PACKAGE
    for line in tree[1].splitlines():
        indent, words = len(line) - len(line.lstrip()), line.partition("#")[0].split()
        if indent == 2:
            package = folder = PACKAGE
        if words[0].endswith("/"):
            folder = package / words.pop(0)
            package = folder if indent == 2 else package
        listed |= {str((folder / word).relative_to(PACKAGE)) for word in words}
    modules = {str(path.relative_to(PACKAGE).with_suffix("")) for path in FILES if path.name != "__init__.py"}
    assert listed - modules == {"drawing/render/assets"}  # no Python
    assert modules - listed == set()


def test_all_of_a_file_runs_in_one_process(request: pytest.FixtureRequest) -> None:
    """xdist reads off the end of an id which tests belong together; else each process makes all fixtures and traces."""
    if request.config.getoption("loadgroup", False):
        assert request.node.nodeid.endswith(f"@{Path(__file__).name}")
