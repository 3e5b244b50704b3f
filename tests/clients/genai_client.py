"""Run by the Python of an environment with onnxruntime-genai: generate with each directory, and print a JSON line for each.

    python genai_client.py DIRECTORY…       # each has the cases that are asked for in its cases.json

A case without an adapter asks for the base of a model with slots, where the directory has any ``.onnx_adapter``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og


def generated(model: Any, ids: list[list[int]], steps: int, adapter: tuple[Any, str] | None) -> list[list[int]]:
    """Return prompts and as many greedy tokens, in a batch."""
    rows, length = np.asarray(ids).shape
    parameters = og.GeneratorParams(model)
    length += steps
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=rows)
    generator = og.Generator(model, parameters)
    if adapter is not None:
        generator.set_active_adapter(*adapter)
    generator.append_tokens(np.asarray(ids, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(row)] for row in range(rows)]


def outcome(directory: Path) -> dict[str, str]:
    """Return what came of each case."""
    model = og.Model(str(directory))
    adapters = og.Adapters(model)
    for path in directory.glob("*.onnx_adapter"):
        adapters.load(str(path), path.stem)
    found = {}
    for name, case in json.loads((directory / "cases.json").read_text()).items():
        adapter = (adapters, case["adapter"]) if case["adapter"] else None
        try:
            tokens = generated(model, case["ids"], case["steps"], adapter)
            found[name] = "equal" if tokens == case["tokens"] else "other tokens"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


for path in map(Path, sys.argv[1:]):
    try:
        print(json.dumps({"directory": path.name, "found": outcome(path)}), flush=True)
    except Exception as error:
        print(json.dumps({"directory": path.name, "error": f"{type(error).__name__}: {error}"}), flush=True)
