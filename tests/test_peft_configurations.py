"""PEFT's own LoRA configurations, with PEFT beside them: representatives here, all of them by ``python tests/peft_table.py``."""

from __future__ import annotations

import pytest
from peft_configurations import ROWS
from peft_table import Kind, check, verdict

BY_NAME = {str(row): row for row in ROWS}

REPRESENTATIVES = (
    "custom_models: mlp: target_modules=[lin0], lora_alpha=4, lora_dropout=0.1",
    "custom_models: mlp: target_modules=[lin0], target_parameters=[lin1.weight]",
    "custom_models: embedding: target_modules=[emb, conv1d]",
    "custom_models: conv2d: target_modules=[conv2d, lin0]",
    "custom_models: conv3d: target_modules=[conv3d]",
    "custom_models: deep mlp: ",
    "custom_models: embedding with sibling: target_modules=[embed_tokens], init_lora_weights=False",
    "decoder_models: gpt2: task_type=CAUSAL_LM, r=8, lora_alpha=32, lora_dropout=0.05, bias=none",
    "target_parameters: llama4: target_parameters=[feed_forward.experts.gate_up_proj], r=8",
    "initialization: parts: target_modules=[linear, embed, conv2d], rank_pattern={'embed': 9, 'conv2d': 16}, "
    "alpha_pattern={'linear': 11, 'conv2d': 13}, lora_alpha=17, r=25, use_rslora=True",
    "initialization: parts: target_modules=[linear, conv2d], bias=lora_only",
    "tuners_utils: paths: target_modules=[baz], layers_to_transform=[1], layers_pattern=[bar]",
    "tuners_utils: nested: target_modules=all-linear, rank_pattern={'^foo': 16, '^module.foo': 24}",
)
"""How the names of rows begin that stand for the others: one of each kind of layer, of target and of pattern."""


@pytest.mark.parametrize("beginning", REPRESENTATIVES)
def test_a_configuration_of_peft_holds_in_full(beginning: str) -> None:
    name = next(name for name in BY_NAME if name.startswith(beginning))
    found = check(BY_NAME[name])
    assert verdict(found) == "in full", found
    assert not [each for each in found.values() if each.kind is Kind.REFUSED and "init_lora_weights" not in each.text]
