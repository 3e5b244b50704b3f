"""Small models of real architectures: at least three layers, widths that differ from each other, biases that are not zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 97


@dataclass(frozen=True)
class Architecture:
    """One architecture of the mapping.

    Attributes:
        rules: name of its rule file.
        build: makes the model, weights random.
        target_modules: what PEFT is told.
        fan_in_fan_out: what PEFT has to be told about Conv1D.
        maximum: longest sequence that the model takes, if it has one.
    """

    rules: str
    build: Callable[[], nn.Module]
    target_modules: tuple[str, ...]
    fan_in_fan_out: bool = False
    encoder_decoder: bool = False
    constants: Mapping[str, Any] = field(default_factory=lambda: {"use_cache": False})


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=40, d_kv=12, d_ff=72, num_layers=3, num_decoder_layers=4, num_heads=4
    )
    return transformers.T5ForConditionalGeneration(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=48,
        n_inner=88,
        n_layer=3,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config)


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return transformers.BertModel(config)


ARCHITECTURES: Mapping[str, Architecture] = {
    "t5": Architecture("t5", _t5, ("q", "v"), encoder_decoder=True),
    "gpt2": Architecture("gpt2", _gpt2, ("c_attn",), fan_in_fan_out=True),
    "llama": Architecture("llama", _llama, ("q_proj", "v_proj")),
    "bert": Architecture("bert", _bert, ("query", "value"), constants={}),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """Return a model in eval mode whose one-dimensional parameters (biases, norms) are perturbed away from 0 and 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ARCHITECTURES[name].build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(name: str, batch: int, sequence: int, target: int = 3, seed: int = 7) -> dict[str, torch.Tensor]:
    """Return inputs with a padded attention mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, sequence, dtype=torch.int64)
    mask[0, sequence // 2 + 1 :] = 0
    made = {"input_ids": torch.randint(0, VOCABULARY, (batch, sequence), generator=generator), "attention_mask": mask}
    if ARCHITECTURES[name].encoder_decoder:
        made["decoder_input_ids"] = torch.randint(0, VOCABULARY, (batch, target), generator=generator)
    return made


SIZES = ((1, 4, 2), (3, 11, 5), (4, 9, 1), (1, 1, 1))
"""Batch, sequence and target sequence that graphs are run at; none is what they were traced at."""
