"""Run by the Python of an environment with optimum-onnx: generate with each directory, and print a JSON line for each.

python optimum_client.py DIRECTORY…       # each has the cases that are asked for in its cases.json
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from answering import Answer, answer_all
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSeq2SeqLM

torch.set_num_threads(1)


def generated(model: Any, case: dict[str, Any]) -> list[list[int]]:
    """Return prompts (of a decoder alone) and their tokens, greedy or by beams, in a batch."""
    steps = {"max_new_tokens": case["steps"], "min_new_tokens": case["steps"]}
    ids, mask = torch.tensor(case["ids"]), torch.tensor(case["mask"])
    options = {**steps, "num_beams": case["beams"], "do_sample": False, "pad_token_id": 0, **case["options"]}
    return model.generate(input_ids=ids, attention_mask=mask, **options).tolist()


def loaded(directory: Path) -> Answer:
    """Load the model of a directory."""
    is_decoder = (directory / "model.onnx").exists()
    model = (ORTModelForCausalLM if is_decoder else ORTModelForSeq2SeqLM).from_pretrained(directory)
    return partial(generated, model)


answer_all(loaded)
