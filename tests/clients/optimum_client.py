"""Run by the Python of an environment with optimum-onnx: generate with each directory, and print a JSON line for each.

python optimum_client.py DIRECTORY…       # each has the cases that are asked for in its cases.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSeq2SeqLM

torch.set_num_threads(1)


def generated(model: Any, case: dict[str, Any]) -> list[list[int]]:
    """Return prompts (of a decoder alone) and their tokens, greedy or by beams, in a batch."""
    steps = {"max_new_tokens": case["steps"], "min_new_tokens": case["steps"]}
    ids, mask = torch.tensor(case["ids"]), torch.tensor(case["mask"])
    options = {**steps, "num_beams": case["beams"], "do_sample": False, "pad_token_id": 0, **case["options"]}
    return model.generate(input_ids=ids, attention_mask=mask, **options).tolist()


def outcome(directory: Path) -> dict[str, str]:
    """Return what came of each case."""
    is_decoder = (directory / "model.onnx").exists()
    model = (ORTModelForCausalLM if is_decoder else ORTModelForSeq2SeqLM).from_pretrained(directory)
    found = {}
    for name, case in json.loads((directory / "cases.json").read_text()).items():
        try:
            found[name] = "equal" if generated(model, case) == case["tokens"] else "other tokens"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


for path in map(Path, sys.argv[1:]):
    try:
        print(json.dumps({"directory": path.name, "found": outcome(path)}), flush=True)
    except Exception as error:
        print(json.dumps({"directory": path.name, "error": f"{type(error).__name__}: {error}"}), flush=True)
