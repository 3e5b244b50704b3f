"""``make test-clients`` without the clients: what it makes of their answers. What they answer is in clients.md."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent / "clients"
SCRIPT = """
import json, os, sys
from pathlib import Path
for path in map(Path, sys.argv[1:]):
    told = (path / "cases.json").read_text()
    if told == "crash":
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(7)
    print(json.dumps({"directory": path.name, **json.loads(told)}), flush=True)
"""


@pytest.fixture(scope="module")
def clients() -> Any:
    spec = importlib.util.spec_from_file_location("clients_main", HERE / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["clients_main"] = module
    spec.loader.exec_module(module)
    return module


def test_a_client_that_breaks_is_a_failed_row_and_the_others_are_asked(
    clients: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(clients, "HERE", tmp_path)
    monkeypatch.setattr(clients, "python_of", lambda _client: Path(sys.executable))
    told = {
        "llama": json.dumps({"found": {"batch 1": "equal", "batch 3": "equal"}}),
        "gpt2": "crash",
        "phi3": json.dumps({"error": "ValueError: not in | its list"}),
        "opt": json.dumps({"found": {"batch 1": "equal", "batch 3": "other tokens"}}),
    }
    for name, text in told.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "cases.json").write_text(text)
    client = clients.Client("optimum", "optimum", (), "script.py", ())
    found = clients.answers(client, [tmp_path / name for name in told])
    assert clients.table({"optimum": found}).splitlines() == [
        *("| model | optimum |", "|---|---|"),
        "| llama | 2 of 2 equal |",
        *("| gpt2 | **failed** (1) |", "| phi3 | **failed** (2) |", "| opt | **1 of 2** (3) |", ""),
        "1. the process ended with 7: out of luck",
        "2. ValueError: not in \\| its list",
        "3. batch 3: other tokens",
    ]


def test_a_client_that_cannot_be_installed_is_a_failed_row(
    clients: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_client: Any) -> Path:
        raise subprocess.CalledProcessError(1, "pip", stderr=b"ERROR: old\nERROR: No matching distribution found")

    monkeypatch.setattr(clients, "python_of", refuse)
    found = clients.answers(clients.CLIENTS[0], [tmp_path / "llama"])
    assert found == {"llama": "not installed: ERROR: No matching distribution found"}


def test_the_committed_table_has_a_row_for_every_model(clients: Any) -> None:
    rows = {line.split("|")[1].strip() for line in clients.TABLE.read_text().splitlines() if line.startswith("| ")}
    assert rows >= {*clients.NAMES, *(f"{name}, slots" for name in clients.SLOTTED)}
