"""Small models of the architectures of transformers, made from their default configs: nothing is downloaded.

The fields of a config are recognised by their names, which transformers spells in few ways. What that does not get right is in
``EXCEPTIONS``, as data.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

MAPPINGS = (
    "IMAGE_TEXT_TO_TEXT",
    "SPEECH_SEQ_2_SEQ",
    "MULTIMODAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "TEXT_TO_WAVEFORM",
    "CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
    "CTC",
    "AUDIO_CLASSIFICATION",
)
"""The auto-model mappings, the more specific before the less; what is in none of them is taken from the base mapping."""

VOCABULARY, HEADS, SEED, SPREAD = 1009, 4, 0, 0.02
TOKENS = {"pad": 0, "bos": 1, "eos": 2}

SIZES = tuple(
    (re.compile(pattern), size)
    for pattern, size in (
        (r"type_vocab_size", 2),
        (r"(\w+_)?vocab_size(_\w+)?", VOCABULARY),
        (r"(\w+_)?codebook_size|num_embeddings", 64),
        (r"(num|n)_(hidden_|encoder_|decoder_)?layers?|(\w+_)?num_(hidden_)?layers|(\w+_)?(layers|depth)", 2),
        (r"qk_rope_head_dim|rotary_dim", 8),
        (r"(\w+_)?(head_dim|kv_channels|d_kv|d_head|dim_head)", 16),
        (r"(\w+_)?num_(key_value|kv)_heads", 2),
        (r"(\w+_)?(num_|n_)?(attention_|attn_)?heads?", HEADS),
        (r"moe_(intermediate|hidden)_size|expert_ffn_hidden_size|shared_expert_intermediate_size", 32),
        (r"(\w+_)?(intermediate|ffn?|mlp|inner)_(size|dim)|d_ff|n_inner|(\w+_)?ffn_(hidden_)?(size|dim)", 96),
        (r"(\w+_)?intermediate_size(_\w+)?|(\w+_)?dim_feedforward|d_inner", 96),
        (r"(\w+_)?(hidden|embedding|embed|emb|projection|projector|model|output|state)_?(size|dim|dims)", 64),
        (r"d_model|n_embd|dim|word_embed_proj_dim|(\w+_)?(hidden|embed)_dimension", 64),
        (r"(\w+_)?projection_(in|out)put_dim|output_channels", 64),
        (r"(\w+_)?lora_rank", 24),
        (r"(\w+_)?(num|n)_(local_|routed_)?experts|moe_num_experts", 4),
        (r"num_experts_per_tok(en)?|moe_top_?k|top_k_experts|moe_k|n_group", 2),
        (r"topk_group", 1),
        (r"(\w+_)?max_position_embeddings|n_positions|n_ctx", 64),
        (r"max_sequence_length|max_seq_len|max_(source|target)_positions", 64),
        (r"num_filters|mm_tokens_per_image", 4),
        (r"base_channels", 32),
        (r"upsample_groups|upsample_initial_channel", 64),
        (r"context_size", 32),
        (r"image_size|pretrain_image_size", 32),
        (r"patch_size", 8),
        (r"(num|n)_queries|num_query_tokens", 8),
    )
)
"""Name of a field → the size that it has at most. The first pattern that fits decides."""

DEPTHS = SIZES[:4]
"""Of these the sizes of vocabularies, and the numbers of layers: widths that have to fit each other stay as they are."""


@dataclasses.dataclass(frozen=True)
class Shrinking:
    """How small a config becomes.

    Attributes:
        sizes: that fields have at most.
        widths: whether lists of widths become smaller too, keeping their proportions.
        exceptions: whether the table of exceptions holds.
    """

    sizes: tuple[tuple[re.Pattern[str], int], ...] = SIZES
    widths: bool = True
    exceptions: bool = True


SHRINKINGS = (
    Shrinking(),
    Shrinking(DEPTHS, widths=False),
    Shrinking(DEPTHS, False, False),
    Shrinking((), False, False),
)
"""From the smallest to the config as it is: fields that fit each other in one may not in the one before."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    model_type: fields
    for model_types_of, fields in (
        # Fields without which a default config is not one that a model is made of.
        ("autoformer informer time_series_transformer", {"prediction_length": 4}),
        ("bailing_hybrid deepseek_v2 kimi_linear", {"num_experts_per_tok": 2}),
        ("chameleon", {"vocabulary_map": {"<image>": 1000}}),
        ("cohere_compass_text", {"rope_parameters": {"full_attention": _ROPE}}),
        ("deepseek_ocr2_text", {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]}),
        ("diffusion_gemma_text", {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}),
        ("dots1", {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}),
        ("emu3", {"vocabulary_map": {"<image>": 1000, "<|extra_200|>": 999}}),
        ("esm", {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}),
        ("hunyuan_v1_dense hunyuan_v1_moe ministral", {"head_dim": 16}),
        ("lfm2_moe", {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
        ("moonshine_streaming", {"num_key_value_heads": 4}),
        ("nemotron", {"num_key_value_heads": 2}),
        ("step3p5", {"sliding_window": 4}),
        ("wav2vec2-bert wav2vec2-conformer", {"vocab_size": 97}),
        ("xmod", {"default_language": "en_XX"}),
        (
            "qwen4_exp_text",
            {
                "indexer_n_heads": 4,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 16,
                "indexer_budget": 8,
                "indexer_compress_ratio": 2,
                "ngram_vocab_size_base": 97,
                "split_ngram_parts": 2,
            },
        ),
        # Backbones of timm, which is not a dependency of transformers.
        (
            "conditional_detr dab-detr detr table-transformer",
            {"backbone_config": {"model_type": "resnet", "out_features": ["stage4"]}},
        ),
        (
            "deformable_detr",
            {
                "num_feature_levels": 3,
                "backbone_config": {"model_type": "resnet", "out_features": ["stage3", "stage4"]},
            },
        ),
        (
            "rt_detr rt_detr_v2",
            {"backbone_config": {"model_type": "rt_detr_resnet", "out_features": ["stage2", "stage3", "stage4"]}},
        ),
        (
            "d_fine pp_doclayout_v3 pp_doclayout_v4",
            {"backbone_config": {"model_type": "hgnet_v2", "out_features": ["stage2", "stage3", "stage4"]}},
        ),
        # Sizes that have to fit each other.
        (
            "cosmos3_edge_text glm4v_text glm_image_text glm_ocr_text paddleocr_vl_text qwen2_vl_text qwen2_5_vl_text",
            {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
        ),
        ("glm4v_moe_text", {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}),
        ("hunyuan_vl_text", {"head_dim": 16, "rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}}),
        ("bamba granitemoehybrid", {"mamba_n_heads": 8}),
        ("falcon_h1", {"mamba_d_ssm": 64, "mamba_d_head": 16}),
        ("mamba2", {"num_heads": 8}),
        ("nemotron_h", {"n_groups": 2, "mamba_num_heads": 8, "mamba_head_dim": 16}),
        ("zamba2", {"n_mamba_heads": 8}),
        ("blt", {"encoder_hash_byte_group_vocab": 97}),
        ("blt_local_decoder blt_local_encoder", {"hidden_size_global": 64}),
        ("fun_asr_nano", {"adaptor_config": {"intermediate_size": 16}}),
        ("gemma3n_text", {"num_kv_shared_layers": 0, "intermediate_size": 96}),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}),
        ("gradium_phonon_tts pocket_tts", {"flow_head_config": {"condition_dim": 64}}),
        ("lilt", {"hidden_size": 48}),
        ("longcat_flash", {"zero_expert_num": 2, "qk_head_dim": 24, "head_dim": 8}),
        ("markuplm", {"tag_pad_id": 216, "subs_pad_id": 1001}),
        ("molmo2", {"adapter_config": {"vision_feature_layer": [1, 0]}}),
        ("reformer", {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (8, 8), "attn_layers": ["local", "lsh"]}),
        ("xlnet", {"d_head": 16}),
        # Images and sounds.
        ("swin swinv2 donut-swin maskformer-swin swin2sr", {"embed_dim": 24, "image_size": 64, "window_size": 2}),
        ("blip-2 instructblip instructblipvideo", {"image_token_index": 1000, "video_token_index": 1000}),
        ("vjepa2", {"crop_size": 32, "frames_per_clip": 4}),
        ("timm_wrapper", {"architecture": "resnet18"}),
        ("timm_backbone", {"backbone": "resnet18"}),
        ("bit", {"num_groups": 4}),
        ("clap_audio_model", {"patch_embeds_hidden_size": 32}),
        ("dac", {"encoder_hidden_size": 4, "decoder_hidden_size": 64}),
        ("deepseek_ocr2_sam_vision_model", {"downsample_channels": [64, 64]}),
        ("depth_pro", {"patch_size": 32}),
        ("efficientloftr", {"out_features": [8, 16, 32, 64], "stage_num_blocks": [1, 1, 1, 1]}),
        (
            "efficientnet",
            {"width_coefficient": 1.0, "hidden_dim": 1280, "in_channels": [32, *[16] * 6], "out_channels": [16] * 7},
        ),
        ("layoutlmv3", {"coordinate_size": 8, "shape_size": 16}),
        ("levit", {"image_size": 64, "patch_size": 16}),
        ("lw_detr_vit", {"num_windows": 4}),
        ("mgp-str", {"num_bpe_labels": 97, "num_wordpiece_labels": 89}),
        ("mobilevit", {"hidden_sizes": [32, 48, 64]}),
        ("mobilevitv2", {"image_size": 64}),
        ("muse_spark", {"audio_config": {"out_hidden_size": 64}}),
        ("muse_spark_audio", {"num_hidden_layers": 4}),
        ("perceiver", {"d_latents": 64, "num_self_attends_per_block": 2, "num_latents": 16, "train_size": (32, 32)}),
        ("sam_vision_model sam_hq_vision_model", {"num_pos_feats": 32}),
        ("sam2_hiera_det_model", {"hidden_size": 12}),
        ("seggpt", {"merge_index": 0, "intermediate_hidden_state_indices": (0, 1), "image_size": (32, 16)}),
        ("textnet", {"stem_out_channels": 8, "image_size": 64}),
    )
    for model_type in model_types_of.split()
}
"""Model type → fields of its config that the table of sizes does not get right; a mapping is for the config inside."""

_BASE = {field.name for field in dataclasses.fields(PreTrainedConfig)}
_TOKEN = re.compile(r"(?P<name>\w+?)(_token_id|_token_index|_id)")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "depth")
_WIDTHS = re.compile(r"\w*(hidden_sizes|channels|dims?|widths?|channel_list)|embed_dim_per_stage")
_FACTOR = 8  # widths that are listed stage by stage keep their proportions, which fit each other


def model_types() -> dict[str, str]:
    """Return model type → the class that is taken for it, in the order of transformers' configs."""
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES") for head in MAPPINGS]
    mappings.append(modeling_auto.MODEL_MAPPING_NAMES)
    found = {}
    for model_type in CONFIG_MAPPING:
        name = next((mapping[model_type] for mapping in mappings if model_type in mapping), None)
        if name is not None:
            found[model_type] = name if isinstance(name, str) else name[0]
    return found


def small_model(model_type: str, model_class: str, largest: int, shrinking: Shrinking = SHRINKINGS[0]) -> nn.Module:
    """Build a model with random weights, biases and norms among them, in evaluation mode.

    Raises:
        ValueError: it would have more than ``largest`` parameters.
    """
    config = small_config(CONFIG_MAPPING[model_type](), shrinking)
    cls = getattr(transformers, model_class)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
    if count > largest:
        raise ValueError(f"{count / 1e6:.0f} M parameters")
    torch.manual_seed(SEED)
    model: nn.Module = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=SPREAD)
    return model.eval().requires_grad_(False)


def small_config(
    config: PreTrainedConfig,
    shrinking: Shrinking,
    overrides: Mapping[str, Any] | None = None,
    tokens: dict[str, int] | None = None,
) -> PreTrainedConfig:
    """Return a small config of the class of ``config``.

    Args:
        config: with its defaults, or what a config around it has instead of them.
        shrinking: how small.
        overrides: fields that have other values; a mapping is for the config inside.
        tokens: the ids given to special tokens so far: they are the same in all parts of a config.
    """
    cls = type(config)
    tokens = dict(TOKENS) if tokens is None else tokens
    overrides = {**(EXCEPTIONS.get(cls.model_type, {}) if shrinking.exceptions else {}), **(overrides or {})}
    stored = {field.name: cls.attribute_map.get(field.name, field.name) for field in dataclasses.fields(cls)}
    values = {name: config.__dict__.get(attribute) for name, attribute in stored.items()}
    defaults = _defaults(cls)
    made: dict[str, Any] = {}
    kept = _kept_layers(values) if shrinking.sizes else None
    for name, value in values.items():
        given = overrides.get(name)
        if isinstance(value, PreTrainedConfig) or (isinstance(given, Mapping) and "model_type" in given):
            made[name] = _small_part(value, shrinking, given or {}, tokens)
        elif name in _BASE:
            continue
        elif kept and _is_by_layer(value, kept.total):
            made[name] = type(value)(value[index] for index in kept.layers)
        elif (
            shrinking.widths
            and name == "num_key_value_heads"
            and value is not None
            and value == values.get("num_attention_heads")
        ):
            made[name] = min(value, HEADS)
        elif (size := _small(name, value, shrinking, kept, tokens)) is not None:
            made[name] = size
        elif value != defaults.get(name):
            made[name] = value
    settings = {name: value for name, value in overrides.items() if not isinstance(made.get(name), PreTrainedConfig)}
    return cls(**{**made, **settings})


def _small_part(
    config: PreTrainedConfig | None, shrinking: Shrinking, given: Mapping[str, Any], tokens: dict[str, int]
) -> PreTrainedConfig:
    """Return the small config inside another, of the type that is given for it if there is one."""
    if "model_type" in given:
        config = CONFIG_MAPPING[given["model_type"]]()
    assert config is not None
    return small_config(
        config, shrinking, {name: value for name, value in given.items() if name != "model_type"}, tokens
    )


def _defaults(cls: type[PreTrainedConfig]) -> Mapping[str, Any]:
    try:
        return cls().__dict__
    except Exception:  # a config that stands inside another only
        return {}


@dataclasses.dataclass(frozen=True)
class _Kept:
    """The layers that are kept of all: the first of each kind."""

    total: int
    layers: tuple[int, ...]


def _kept_layers(values: Mapping[str, Any]) -> _Kept | None:
    total = next((values[name] for name in _LAYERS if isinstance(values.get(name), int)), 0)
    kinds = [value for value in values.values() if _is_by_layer(value, total) and isinstance(value[0], str)]
    if not kinds:
        return None
    first: dict[tuple[str, ...], int] = {}
    for index, kind in enumerate(zip(*kinds, strict=True)):
        first.setdefault(kind, index)
    layers = sorted(first.values())
    return _Kept(total, tuple(layers) if len(layers) > 1 else (layers[0], layers[0]))


def _is_by_layer(value: Any, total: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == total > 4


def _small(name: str, value: Any, shrinking: Shrinking, kept: _Kept | None, tokens: dict[str, int]) -> Any:
    """Return what a field is set to, or None if it stays."""
    if isinstance(value, bool) or not shrinking.sizes:
        return None
    if kept and name in _LAYERS and value == kept.total:
        return len(kept.layers)
    if isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
        if name == "depths" or name.endswith("layer_depths"):
            return type(value)(1 for _ in value)
        if shrinking.widths and _WIDTHS.fullmatch(name):
            return type(value)(max(item // _FACTOR, min(item, 4)) for item in value)
    if not isinstance(value, int):
        return None
    if (match := _TOKEN.fullmatch(name)) and value >= 0:
        return tokens.setdefault(match["name"], VOCABULARY - 1 - len(tokens))
    return next((min(value, size) for pattern, size in shrinking.sizes if pattern.fullmatch(name)), None)
