"""Small models of every family that has a rule file beside the mapping of architectures.py, and of others whose layers are peculiar.

Two layers or more, widths that differ from each other, grouped-query attention where the family has it, windows shorter than
the sequences that graphs are run at. Inputs are those that ``lora_fx.trace`` makes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

import lora_fx
from lora_fx.graph.info import info_of

VOCABULARY = 97
IMAGE_SIZE, IMAGE_TOKEN, IMAGE_TOKENS = 12, 95, 4


@dataclass(frozen=True)
class Family:
    """One family, or one variant of its layers.

    Attributes:
        rules: name of its rule file; empty where there is none.
        build: makes the model, weights random.
        target_modules: what PEFT is told; a string is a regular expression.
        fan_in_fan_out: what PEFT has to be told about Conv1D.
        dynamic: what ``lora_fx.trace`` has to be told where a model fixes its sequence.
    """

    rules: str
    build: Callable[[], nn.Module]
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    fan_in_fan_out: bool = False
    dynamic: Mapping[str, tuple[int, ...]] | None = None


def _model(name: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """Return what makes a transformers model by the names of its class and of that of its config."""
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**settings))


# The names that most configs agree on. Token ids lie in the vocabulary.
WIDTHS = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6}
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ENCODER = {**WIDTHS, **TOKENS, "max_position_embeddings": 64}
GROUPED = {**ENCODER, "num_key_value_heads": 2}
WIDE_HEADS = {**GROUPED, "head_dim": 12}  # query and output are wider than the hidden size
EXPERTS = {"moe_intermediate_size": 28, "num_experts_per_tok": 2}
SLIDING = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
VISION = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": 3,
}

_falcon = functools.partial(
    _model,
    "FalconForCausalLM",
    "FalconConfig",
    **TOKENS,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=6,
    ffn_hidden_size=88,
    bias=True,
)
_gpt_bigcode = functools.partial(
    _model,
    "GPTBigCodeForCausalLM",
    "GPTBigCodeConfig",
    **TOKENS,
    n_positions=64,
    n_embd=48,
    n_inner=88,
    n_layer=3,
    n_head=4,
)
_deepseek_v3 = functools.partial(
    _model,
    "DeepseekV3ForCausalLM",
    "DeepseekV3Config",
    **ENCODER,
    **EXPERTS,
    num_key_value_heads=6,
    n_routed_experts=8,
    n_shared_experts=1,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    kv_lora_rank=20,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=10,
)

FAMILIES: Mapping[str, Family] = {
    "llama4_text": Family(
        "llama4",
        _model(
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            **WIDE_HEADS,
            intermediate_size_mlp=72,
            num_local_experts=4,
            interleave_moe_layer_step=2,
            attention_chunk_size=4,
            no_rope_layer_interval=3,
        ),
    ),
    "llama4": Family(
        "llama4",
        _model(
            "Llama4ForConditionalGeneration",
            "Llama4Config",
            text_config={**WIDE_HEADS, "intermediate_size_mlp": 72, "num_local_experts": 4},
            vision_config={
                **VISION,
                "hidden_size": 32,
                "intermediate_size": 128,  # of the shuffled pixels too: four times the hidden size
                "vision_output_dim": 36,
                "projector_input_dim": 36,
                "projector_output_dim": 36,
            },
            boi_token_index=93,
            eoi_token_index=94,
            image_token_index=IMAGE_TOKEN,
        ),
    ),
    "gpt_bigcode": Family("gpt_bigcode", _gpt_bigcode(multi_query=True), ("c_attn",)),
    "gpt_bigcode-multi-head": Family("gpt_bigcode", _gpt_bigcode(multi_query=False), ("c_attn",)),
    "mpt": Family(
        "mpt",
        _model(
            "MptForCausalLM",
            "MptConfig",
            **TOKENS,
            d_model=48,
            n_heads=6,
            n_layers=3,
            expansion_ratio=2,
            max_seq_len=64,
        ),
        ("Wqkv",),
    ),
    "falcon": Family("falcon", _falcon(multi_query=True), ("query_key_value",)),
    "falcon-grouped": Family("falcon", _falcon(new_decoder_architecture=True, num_kv_heads=2), ("query_key_value",)),
    "falcon-multi-head": Family(
        "falcon", _falcon(multi_query=False, alibi=True, parallel_attn=False), ("query_key_value",)
    ),
    "codegen": Family(
        "codegen",
        _model(
            "CodeGenForCausalLM",
            "CodeGenConfig",
            **TOKENS,
            n_positions=64,
            n_embd=48,
            n_inner=88,
            n_layer=3,
            n_head=4,
            rotary_dim=8,
        ),
        ("qkv_proj",),
    ),
    "mistral": Family("mistral", _model("MistralForCausalLM", "MistralConfig", **WIDE_HEADS, sliding_window=3)),
    "mixtral": Family(
        "mixtral",
        _model("MixtralForCausalLM", "MixtralConfig", **WIDE_HEADS, num_local_experts=4, num_experts_per_tok=2),
    ),
    "stablelm": Family(
        "stablelm", _model("StableLmForCausalLM", "StableLmConfig", **GROUPED, use_qkv_bias=True, qk_layernorm=True)
    ),
    "phi": Family("phi", _model("PhiForCausalLM", "PhiConfig", **GROUPED), ("q_proj", "v_proj", "fc1", "fc2")),
    "phi3": Family(
        "phi3",
        _model("Phi3ForCausalLM", "Phi3Config", **GROUPED, original_max_position_embeddings=64),
        ("qkv_proj",),
    ),
    "gemma": Family("gemma", _model("GemmaForCausalLM", "GemmaConfig", **WIDE_HEADS)),
    "gemma2": Family("gemma2", _model("Gemma2ForCausalLM", "Gemma2Config", **WIDE_HEADS, **SLIDING)),
    "gemma3_text": Family("gemma3_text", _model("Gemma3ForCausalLM", "Gemma3TextConfig", **WIDE_HEADS, **SLIDING)),
    "gemma3": Family(
        "gemma3",
        _model(
            "Gemma3ForConditionalGeneration",
            "Gemma3Config",
            text_config={**WIDE_HEADS, **SLIDING},
            vision_config=VISION,
            mm_tokens_per_image=IMAGE_TOKENS,
            boi_token_index=93,
            eoi_token_index=94,
            image_token_index=IMAGE_TOKEN,
        ),
        r".*language_model\..*\.(q_proj|v_proj)",
    ),
    "gemma4": Family(
        "gemma4",
        _model(
            "Gemma4ForConditionalGeneration",
            "Gemma4Config",
            text_config={
                **WIDE_HEADS,
                "sliding_window": 3,
                "num_hidden_layers": 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_kv_shared_layers": 2,  # the last two layers have no key and value of their own
                "global_head_dim": 16,
                "hidden_size_per_layer_input": 20,
                "vocab_size_per_layer_input": VOCABULARY,
            },
            vision_config={
                "hidden_size": 40,
                "intermediate_size": 56,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 10,
                "patch_size": 4,
                "position_embedding_size": 64,
            },
            image_token_id=IMAGE_TOKEN,
            video_token_id=94,
            audio_token_id=93,
        ),
        r".*language_model\..*\.(q_proj|v_proj)",
    ),
    "qwen2": Family("qwen2", _model("Qwen2ForCausalLM", "Qwen2Config", **GROUPED)),
    "qwen2_moe": Family(
        "",
        _model(
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            **GROUPED,
            **EXPERTS,
            num_experts=4,
            shared_expert_intermediate_size=36,
        ),
    ),
    "qwen3": Family("qwen3", _model("Qwen3ForCausalLM", "Qwen3Config", **WIDE_HEADS)),
    "qwen3_moe": Family(
        "qwen3_moe", _model("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **WIDE_HEADS, **EXPERTS, num_experts=4)
    ),
    "nemotron_h": Family(
        "nemotron_h",
        _model(
            "NemotronHForCausalLM",
            "NemotronHConfig",
            **{name: value for name, value in WIDE_HEADS.items() if name != "num_hidden_layers"},
            **EXPERTS,
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
            mtp_layers_block_type=[],
            n_routed_experts=4,
            moe_shared_expert_intermediate_size=36,
            ssm_state_size=10,
            mamba_num_heads=4,
            mamba_head_dim=14,
            n_groups=2,
            chunk_size=32,  # no longer sequence is traced than one chunk
        ),
        ("q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    "rwkv": Family(
        "rwkv",
        _model(
            "RwkvForCausalLM",
            "RwkvConfig",
            **TOKENS,
            context_length=64,
            hidden_size=48,
            attention_hidden_size=56,
            intermediate_size=80,
            num_hidden_layers=3,
            rescale_every=0,  # otherwise the first run in eval mode divides the weights in place
        ),
        ("key", "value", "receptance", "output"),
        dynamic={"input_ids": (0,), "attention_mask": (0,)},  # it unrolls over the sequence
    ),
    "glm": Family("glm", _model("GlmForCausalLM", "GlmConfig", **WIDE_HEADS)),
    "glm4": Family("glm4", _model("Glm4ForCausalLM", "Glm4Config", **WIDE_HEADS)),
    "olmo2": Family("olmo2", _model("Olmo2ForCausalLM", "Olmo2Config", **GROUPED)),
    "cohere2": Family("cohere2", _model("Cohere2ForCausalLM", "Cohere2Config", **GROUPED, **SLIDING)),
    "deepseek_v3": Family("deepseek_v3", _deepseek_v3(q_lora_rank=22), ("q_proj", "q_b_proj", "kv_b_proj")),
    "deepseek_v3-full-query": Family(
        "deepseek_v3", _deepseek_v3(q_lora_rank=None), ("q_proj", "q_b_proj", "kv_b_proj")
    ),
    "gpt_oss": Family(
        "gpt_oss",
        _model(
            "GptOssForCausalLM", "GptOssConfig", **WIDE_HEADS, **SLIDING, num_local_experts=4, num_experts_per_tok=2
        ),
    ),
    "whisper": Family(
        "whisper",
        _model(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **TOKENS,
            num_mel_bins=10,
            d_model=48,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=6,
            encoder_ffn_dim=80,
            decoder_ffn_dim=88,
            max_source_positions=11,
            max_target_positions=64,
            decoder_start_token_id=1,
        ),
    ),
    "vit": Family("vit", _model("ViTModel", "ViTConfig", **VISION), ("q_proj", "v_proj", "query", "value")),
    "clip": Family(
        "clip",
        _model("CLIPModel", "CLIPConfig", text_config=ENCODER, vision_config=VISION, projection_dim=36),
    ),
    "clip_vision_model": Family("clip", _model("CLIPVisionModel", "CLIPVisionConfig", **VISION)),
    "siglip": Family(
        "siglip",
        _model("SiglipModel", "SiglipConfig", text_config={**ENCODER, "projection_size": 40}, vision_config=VISION),
    ),
    "siglip_vision_model": Family("siglip", _model("SiglipVisionModel", "SiglipVisionConfig", **VISION)),
    "wav2vec2": Family(
        "wav2vec2",
        _model(
            "Wav2Vec2Model",
            "Wav2Vec2Config",
            **WIDTHS,
            conv_dim=[12, 14],
            conv_kernel=[5, 3],
            conv_stride=[3, 2],
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=4,
            apply_spec_augment=False,  # in training it draws its masks with numpy
            layerdrop=0.0,  # and leaves out layers by chance
        ),
    ),
    "modernbert": Family(
        "modernbert",
        _model(
            "ModernBertModel",
            "ModernBertConfig",
            **ENCODER,
            local_attention=6,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        ),
        ("Wqkv",),
    ),
    "distilbert": Family(
        "distilbert",
        _model(
            "DistilBertModel",
            "DistilBertConfig",
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            dim=48,
            hidden_dim=80,
            n_layers=3,
            n_heads=6,
        ),
        ("q_lin", "v_lin"),
    ),
    "squeezebert": Family(
        "", _model("SqueezeBertModel", "SqueezeBertConfig", **ENCODER, embedding_size=48), ("query", "value")
    ),
    "albert": Family("", _model("AlbertModel", "AlbertConfig", **ENCODER, embedding_size=32), ("query", "value")),
}


REPRESENTATIVES = (
    "falcon-grouped",  # a fused projection of unequal parts
    "mixtral",  # stacked experts
    "gemma4",  # layers that share keys and values; text, images and sounds
    "whisper",  # sounds, convolutions
    "vit",
    "squeezebert",  # pointwise convolutions
    "albert",  # one layer, called several times
)
"""One of each kind of layer that the architectures do not have, but for those that take longest to trace: experts beside dense layers
(``llama4_text``), layers of four kinds (``nemotron_h``), projections of low rank (``deepseek_v3``), no attention (``rwkv``).
"""


def build(name: str, seed: int = 0) -> nn.Module:
    """Return a model in eval mode whose vectors (biases, norms) and constant parameters are perturbed away from 0 and 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[name].build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1 or bool((parameter == parameter.flatten()[0]).all()):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@functools.cache
def model(name: str) -> nn.Module:
    """Return the one model of a family in this process, frozen. Not to be changed."""
    return build(name).requires_grad_(False)


@functools.cache
def traced(name: str) -> lora_fx.TracedGraphModule:
    """Return the one trace of :func:`model`, for inference. Not to be changed."""
    return lora_fx.trace(model(name), inference=True, dynamic=FAMILIES[name].dynamic)


def inputs(name: str, batch: int, sequence: int, target: int = 3, seed: int = 7) -> dict[str, torch.Tensor]:
    """Return inputs of other sizes than those of the trace, with a padded attention mask; not for models with image tokens."""
    generator = torch.Generator().manual_seed(seed)
    examples = info_of(traced(name)).examples
    sizes = {"batch": batch, "sequence": sequence, "target_sequence": target}
    made: dict[str, torch.Tensor] = {}
    for key, tensor in examples.tensors.items():
        shape = [sizes.get(axis, size) for axis, size in zip(examples.axes[key], tensor.shape, strict=True)]
        if tensor.is_floating_point():
            made[key] = torch.randn(shape, generator=generator)
        elif "mask" in key:
            made[key] = torch.ones(shape, dtype=torch.int64)
            made[key][0, shape[1] // 2 + 1 :] = 0
        else:
            made[key] = torch.randint(0, VOCABULARY, shape, generator=generator)
    return made
