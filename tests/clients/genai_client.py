"""Run by the Python of an environment with onnxruntime-genai: generate with each directory, and print a JSON line for each.

    python genai_client.py DIRECTORY…       # each has the cases that are asked for in its cases.json

A case without an adapter asks for the base of a model with slots, where the directory has any ``.onnx_adapter``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
from answering import Answer, answer_all


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


def loaded(directory: Path) -> Answer:
    """Load the model of a directory, and its adapters."""
    model = og.Model(str(directory))
    adapters = og.Adapters(model)
    for path in directory.glob("*.onnx_adapter"):
        adapters.load(str(path), path.stem)

    def answer(case: dict[str, Any]) -> list[list[int]]:
        adapter = (adapters, case["adapter"]) if case["adapter"] else None
        return generated(model, case["ids"], case["steps"], adapter)

    return answer


answer_all(loaded)
