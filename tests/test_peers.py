"""``make test-peers`` without the libraries: what it makes of the rows of its processes. What came of the models is in peers.md."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent / "peers"
SCRIPT = """
import json, os, sys
for name in sys.argv[2:]:
    if name == "crash":
        os._exit(7)
    print("a line of the library's own")
    print(json.dumps({"row": name, "cells": {"trace": "bit-equal", "fold": "failed"}, "notes": {"fold": "E: a | b"}, "seconds": 1}), flush=True)
"""


@pytest.fixture(scope="module")
def peers() -> Any:
    spec = importlib.util.spec_from_file_location("peers_main", HERE / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers_main"] = module
    spec.loader.exec_module(module)
    return module


def test_a_model_that_ends_its_process_is_a_failed_row_and_the_others_go_on(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "check.py").write_text(SCRIPT)
    monkeypatch.setattr(peers, "HERE", tmp_path)
    found = [("timm", *each) for each in peers.rows_of("timm", ["one", "crash", "two"])]
    row = "|  | bit-equal |  |  | **failed** (1) |  |  |  |  |"
    assert peers.table(found).splitlines()[2:] == [
        f"| timm | one {row}",
        "| timm | crash | **failed** (2) |  |  |  |  |  |  |  |  |",
        f"| timm | two {row}",
        "",
        "1. E: a \\| b",
        "2. the process ended with 7",
    ]


def test_rows_that_are_written_anew_leave_the_others(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = peers.TABLE.read_text().splitlines()
    monkeypatch.setattr(peers, "TABLE", tmp_path / "peers.md")
    peers.TABLE.write_text("\n".join(committed))
    made = {"cells": {"trace": "of today"}, "notes": {}, "seconds": 1}
    monkeypatch.setattr(peers, "rows_of", lambda library, names: [(name, made) for name in names])
    monkeypatch.setattr(peers, "version", lambda package: "1.0")
    peers.main(["torchvision/resnet18"], write=True)
    written = peers.TABLE.read_text().splitlines()
    changed = [(old, new) for old, new in zip(committed, written, strict=True) if old != new]
    assert changed[0][1] == "| torchvision | resnet18 |  | of today |  |  |  |  |  |  |  |"
    assert changed[0][0].startswith("| torchvision | resnet18 |")
    assert [new for _, new in changed[1:]] == [line for line in written if line.startswith("With torch 1.0,")]


def test_the_committed_table_has_a_row_for_every_model(peers: Any) -> None:
    lines = (line.split("|") for line in peers.TABLE.read_text().splitlines() if line.startswith("| "))
    rows = {(library.strip(), name.strip()) for _, library, name, *_ in lines}
    models = peers.models.PEERS
    assert rows >= {(library, name) for library, each in models.items() for name in each}
    assert {library: len(each) for library, each in models.items()} == {
        **{"timm": 20, "torchvision": 10, "diffusers": 5},
        **{"open_clip": 1, "sentence-transformers": 1},
    }
