"""Small models of real architectures: two layers of each stack or more, widths that differ from each other, biases that are not zero."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from torch import nn

import lora_fx
from lora_fx.tracing.train_eval import ModeSwitch

VOCABULARY = 97
IMAGE_SIZE, IMAGE_TOKEN, IMAGE_TOKENS = 12, 95, 3


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
        vocab_size=VOCABULARY, d_model=40, d_kv=12, d_ff=72, num_layers=2, num_decoder_layers=2, num_heads=4
    )
    return transformers.T5ForConditionalGeneration(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=48,
        n_inner=88,
        n_layer=2,
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
        num_hidden_layers=2,
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
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return transformers.BertModel(config)


def _mt5() -> nn.Module:
    config = transformers.MT5Config(
        vocab_size=VOCABULARY, d_model=40, d_kv=12, d_ff=72, num_layers=2, num_decoder_layers=3, num_heads=4
    )
    return transformers.MT5ForConditionalGeneration(config)


def _bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=48,
        encoder_ffn_dim=80,
        decoder_ffn_dim=88,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=6,
        max_position_embeddings=64,
    )
    return transformers.BartForConditionalGeneration(config)


def _bloom() -> nn.Module:
    # Six heads: the slopes of ALiBi are made in another way where their number is no power of two.
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=6)
    return transformers.BloomForCausalLM(config)


def _blip_2(text: transformers.PreTrainedConfig) -> nn.Module:
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(
            hidden_size=40,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=4,
            initializer_range=0.02,
        ),
        qformer_config=transformers.Blip2QFormerConfig(
            vocab_size=VOCABULARY,
            hidden_size=36,
            intermediate_size=60,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=64,
        ),
        text_config=text,
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=IMAGE_TOKEN,
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens)  # as made they are zeros, and all see the same
    return model


def _blip_2_opt() -> nn.Module:
    return _blip_2(
        transformers.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            ffn_dim=88,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )


def _blip_2_t5() -> nn.Module:
    return _blip_2(
        transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=44,
            d_kv=12,
            d_ff=72,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def _opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        word_embed_proj_dim=40,
        ffn_dim=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return transformers.OPTForCausalLM(config)


def _gptj() -> nn.Module:
    config = transformers.GPTJConfig(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=48,
        n_inner=88,
        n_layer=2,
        n_head=4,
        rotary_dim=8,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPTJForCausalLM(config)


def _gpt_neox() -> nn.Module:
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return transformers.GPTNeoXForCausalLM(config)


def _gpt_neo() -> nn.Module:
    # The window of the local layer is shorter than the sequences that graphs are run at.
    config = transformers.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=4,
        window_size=3,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPTNeoForCausalLM(config)


def _roberta() -> nn.Module:
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=66,
        type_vocab_size=1,
    )
    return transformers.RobertaForMaskedLM(config)


def _xlm_roberta() -> nn.Module:
    config = transformers.XLMRobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=66,
        type_vocab_size=1,
    )
    return transformers.XLMRobertaModel(config)


def _electra() -> nn.Module:
    config = transformers.ElectraConfig(
        vocab_size=VOCABULARY,
        embedding_size=32,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return transformers.ElectraForPreTraining(config)


def _deberta_v2() -> nn.Module:
    config = transformers.DebertaV2Config(  # as of deberta-v3-base
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        relative_attention=True,
        position_buckets=6,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    )
    return transformers.DebertaV2Model(config)


def _deberta() -> nn.Module:
    config = transformers.DebertaConfig(  # as of deberta-base
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_biased_input=False,
    )
    return transformers.DebertaModel(config)


def _layoutlm() -> nn.Module:
    config = transformers.LayoutLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        max_2d_position_embeddings=72,
    )
    return transformers.LayoutLMModel(config)


def _chatglm() -> nn.Module:
    config = ChatGLMConfig(
        vocab_size=VOCABULARY, hidden_size=48, inner_hidden_size=80, num_layers=2, num_attention_heads=4
    )
    return ChatGLMForConditionalGeneration(config)


ARCHITECTURES: Mapping[str, Architecture] = {
    "t5": Architecture("t5", _t5, ("q", "v"), encoder_decoder=True),
    "gpt2": Architecture("gpt2", _gpt2, ("c_attn",), fan_in_fan_out=True),
    "llama": Architecture("llama", _llama, ("q_proj", "v_proj")),
    "bert": Architecture("bert", _bert, ("query", "value"), constants={}),
    "mt5": Architecture("mt5", _mt5, ("q", "v"), encoder_decoder=True),
    "bart": Architecture("bart", _bart, ("q_proj", "v_proj"), encoder_decoder=True),
    "bloom": Architecture("bloom", _bloom, ("query_key_value",)),
    "blip-2": Architecture("blip-2", _blip_2_opt, ("q", "v", "q_proj", "v_proj")),
    "blip-2-t5": Architecture("blip-2", _blip_2_t5, ("q", "v", "q_proj", "v_proj"), encoder_decoder=True),
    "opt": Architecture("opt", _opt, ("q_proj", "v_proj")),
    "gptj": Architecture("gptj", _gptj, ("q_proj", "v_proj")),
    "gpt_neox": Architecture("gpt_neox", _gpt_neox, ("query_key_value",)),
    "gpt_neo": Architecture("gpt_neo", _gpt_neo, ("q_proj", "v_proj")),
    "roberta": Architecture("roberta", _roberta, ("query", "value"), constants={}),
    "xlm-roberta": Architecture("xlm-roberta", _xlm_roberta, ("query", "value"), constants={}),
    "electra": Architecture("electra", _electra, ("query", "value"), constants={}),
    "deberta-v2": Architecture("deberta-v2", _deberta_v2, ("query_proj", "value_proj"), constants={}),
    "deberta": Architecture("deberta", _deberta, ("in_proj",), constants={}),
    "layoutlm": Architecture("layoutlm", _layoutlm, ("query", "value"), constants={}),
    "chatglm": Architecture("chatglm", _chatglm, ("query_key_value",), constants={}),
}


DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def build(name: str, seed: int = 0, *, layers: int | None = None) -> nn.Module:
    """Return a model in eval mode whose one-dimensional parameters (biases, norms) are perturbed away from 0 and 1.

    Where depth does not matter, ``layers`` of each stack are enough.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ARCHITECTURES[name].build().eval()
        settings = model.config.to_dict()
        if layers is not None and "attention_types" not in settings:  # GPT Neo's says of each layer what it is
            config = type(model.config).from_dict(settings | {key: layers for key in DEPTHS if key in settings})
            model = type(model)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(name: str, batch: int, sequence: int, target: int = 3, seed: int = 7) -> dict[str, torch.Tensor]:
    """Return inputs with a padded attention mask; for BLIP-2 with an image and its tokens before the text."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, sequence, dtype=torch.int64)
    mask[0, sequence // 2 + 1 :] = 0
    made = {"input_ids": torch.randint(0, VOCABULARY, (batch, sequence), generator=generator), "attention_mask": mask}
    if ARCHITECTURES[name].encoder_decoder:
        made["decoder_input_ids"] = torch.randint(0, VOCABULARY, (batch, target), generator=generator)
    if name == "layoutlm":
        made["bbox"] = torch.randint(0, 20, (batch, sequence, 4), generator=generator).cumsum(-1)
    if ARCHITECTURES[name].rules == "blip-2":
        text = made["input_ids"].masked_fill(made["input_ids"] == IMAGE_TOKEN, 0)
        made["input_ids"] = torch.cat([torch.full((batch, IMAGE_TOKENS), IMAGE_TOKEN), text], dim=1)
        made["attention_mask"] = torch.cat([torch.ones(batch, IMAGE_TOKENS, dtype=torch.int64), mask], dim=1)
        made["pixel_values"] = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return made


SIZES = ((1, 4, 2), (3, 11, 5), (4, 9, 1), (1, 1, 1))
"""Batch, sequence and target sequence that graphs are run at; none is what they were traced at."""


def rows(names: Iterable[str], representatives: Collection[str]) -> list[Any]:
    """Return the rows of a matrix as parameters: all but the representatives run in ``make test-all`` alone.

    The tests of a row stay in one process, which traces it once.
    """
    return [
        pytest.param(
            name, marks=[pytest.mark.xdist_group(name), *([] if name in representatives else [pytest.mark.matrix])]
        )
        for name in names
    ]


def few(values: Iterable[Any], representatives: Collection[Any]) -> list[Any]:
    """Return values of a parameter, or tuples of several, as rows that are in no process of their own.

    All but the representatives run in ``make test-all`` alone.
    """
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=[] if value in representatives else pytest.mark.matrix,
        )
        for value in values
    ]


REPRESENTATIVES = ("t5", "gpt2", "llama", "bert", "bloom", "blip-2", "deberta-v2", "deberta", "chatglm")
"""One of each kind: encoder-decoder with relative positions, Conv1D, grouped queries with rotary positions, encoder, fused
projection by heads, image and text, one weight at two sites, sizes computed from values, code from outside of transformers.
"""

EACH = rows(ARCHITECTURES, REPRESENTATIVES)
"""Every architecture as a parameter."""

FOUR = rows(ARCHITECTURES, ("t5", "gpt2", "llama", "bert"))
"""The same, where what tells the other representatives apart matters little."""

PRIMARY = [each for each in EACH if each.values[0] in ("t5", "gpt2", "llama", "bert")]
"""The architectures for which the slower promises are tested."""

TWO = rows(("t5", "gpt2", "llama", "bert"), ("gpt2", "llama"))
"""The same, two of which stand for the others."""


@functools.cache
def model(name: str) -> nn.Module:
    """Return the one model of an architecture in this process. Not to be changed; frozen, as in a graph: torch's attention
    chooses its kernel by what requires a gradient.
    """
    return build(name).requires_grad_(False)


@functools.cache
def traced(name: str) -> lora_fx.TracedGraphModule:
    """Return the one trace of :func:`model`. Not to be changed."""
    return lora_fx.trace(model(name))


def branched(name: str, *, rank: int = 6, alpha: float = 9, **settings: Any) -> lora_fx.TracedGraphModule:
    """Return a new rewrite of :func:`traced`; the scaling of 1.5 is not a power of two."""
    return lora_fx.rewrite(traced(name), rules=ARCHITECTURES[name].rules, rank=rank, alpha=alpha, **settings)


def run(name: str, module: Any, *size: int) -> Any:
    """Return what a graph or a model gives for :func:`inputs` of this size."""
    constants = {} if isinstance(module, lora_fx.TracedGraphModule) else ARCHITECTURES[name].constants
    return module(**inputs(name, *size), **constants)


def without_dropout(graph_module: lora_fx.TracedGraphModule) -> lora_fx.TracedGraphModule:
    """Let a graph drop nothing in training either (in place), and return it."""
    for module in graph_module.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, ModeSwitch):
            module.train_value = module.eval_value
    return graph_module
