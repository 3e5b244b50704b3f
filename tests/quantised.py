"""Small models that are quantised by bitsandbytes, torchao, HQQ and quanto, beside PEFT's wrapping of the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

VOCABULARY = 97

RANK, ALPHA = 5, 8  # the scaling 1.6 is not a power of two


def _llama(layers: int = 4) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=64,
        n_inner=192,
        n_layer=1,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=32,
        d_ff=192,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=4,
        dropout_rate=0.0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    return transformers.MixtralForCausalLM(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (_llama, ["q_proj", "v_proj", "o_proj", "down_proj"]),
    "llama-1": (partial(_llama, 1), ["q_proj", "v_proj", "o_proj", "down_proj"]),
    "gpt2": (_gpt2, ["c_attn", "c_fc", "c_proj"]),
    "t5": (_t5, ["q", "v", "wi", "wo"]),
    "mixtral": (_mixtral, ["q_proj", "v_proj", "o_proj"]),
}
"""Model → how it is made, and the modules that get branches. Widths are multiples of 64, which bitsandbytes' kernel for the CPU needs."""


def saved(name: str, dtype: torch.dtype, directory: Path) -> Path:
    """Write a model with random weights and biases, in a dtype."""
    torch.manual_seed(3)
    model = MODELS[name][0]().to(dtype)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return directory


def quantisation(scheme: str, dtype: torch.dtype) -> Any:
    """Return the configuration of transformers for a scheme, by its text."""
    kind, _, more = scheme.partition(":")
    if kind in ("nf4", "fp4"):
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=more == "double",
            bnb_4bit_compute_dtype=dtype,
        )
    if kind == "quanto":
        return transformers.QuantoConfig(weights="int8")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if kind == "int8":
        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return transformers.TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(int(more))))


def loaded(name: str, directory: Path, scheme: str, dtype: torch.dtype, computed: torch.dtype | None = None) -> Any:
    """Load a model as transformers quantises it, in train mode: bitsandbytes repacks weights that are called in eval mode."""
    if scheme.startswith("hqq"):  # which transformers 5 does not load
        return _hqq(type(MODELS[name][0]()).from_pretrained(directory, dtype=dtype), int(scheme[3:]), dtype).train()
    return (
        type(MODELS[name][0]())
        .from_pretrained(
            directory, quantization_config=quantisation(scheme, computed or dtype), device_map="cpu", dtype=dtype
        )
        .train()
    )


def _hqq(model: Any, bits: int, dtype: torch.dtype) -> Any:
    """Put layers of HQQ in the place of the linear layers of a model, but for its head."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=64)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            model.set_submodule(path, HQQLinear(module, config, compute_dtype=dtype, device="cpu"))
    return model


def wrapped(name: str, model: nn.Module, dropout: float = 0.0) -> Any:
    """Return PEFT's wrapping of a model."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=MODELS[name][1])
    return peft.get_peft_model(model, config).train()


def batch(name: str) -> dict[str, torch.Tensor]:
    """Return inputs with padding: without, transformers computes with another attention kernel."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[1, 4:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (3, 5), generator=generator)
    return inputs


def gradients(module: nn.Module, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradients of a random function of the logits, by the names of the factors in a graph."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    factors = dict(_factors(module))
    found = torch.autograd.grad((logits.float() * weights).sum(), list(factors.values()))
    return dict(zip(factors, found, strict=True))


def _factors(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            yield name.removeprefix("base_model.model."), parameter
