"""Cases of the directories that a client is given, answered one by one; imported by the clients, in environments of their own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = Callable[[dict[str, Any]], list[list[int]]]
"""From a case to the tokens that a client generates."""


def _outcome(directory: Path, loaded: Callable[[Path], Answer]) -> dict[str, str]:
    answer, found = loaded(directory), {}
    for name, case in json.loads((directory / "cases.json").read_text()).items():
        try:
            found[name] = "equal" if answer(case) == case["tokens"] else "other tokens"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def answer_all(loaded: Callable[[Path], Answer]) -> None:
    """Print a JSON line for each directory among the arguments: what came of each of its cases, or why it was not loaded.

    Args:
        loaded: loads a directory.
    """
    for path in map(Path, sys.argv[1:]):
        try:
            print(json.dumps({"directory": path.name, "found": _outcome(path, loaded)}), flush=True)
        except Exception as error:
            print(json.dumps({"directory": path.name, "error": f"{type(error).__name__}: {error}"}), flush=True)
