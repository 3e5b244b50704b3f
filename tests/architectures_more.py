"""More small models, to be merged into :mod:`architectures`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import transformers
from architectures import VOCABULARY, Architecture
from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from torch import nn

IMAGE_SIZE, IMAGE_TOKEN, IMAGE_TOKENS = 12, 95, 3


def _mt5() -> nn.Module:
    config = transformers.MT5Config(
        vocab_size=VOCABULARY, d_model=40, d_kv=12, d_ff=72, num_layers=3, num_decoder_layers=4, num_heads=4
    )
    return transformers.MT5ForConditionalGeneration(config)


def _bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=48,
        encoder_ffn_dim=80,
        decoder_ffn_dim=88,
        encoder_layers=3,
        decoder_layers=4,
        encoder_attention_heads=4,
        decoder_attention_heads=6,
        max_position_embeddings=64,
    )
    return transformers.BartForConditionalGeneration(config)


def _bloom() -> nn.Module:
    # Six heads: the slopes of ALiBi are made in another way where their number is no power of two.
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=3, n_head=6)
    return transformers.BloomForCausalLM(config)


def _blip_2(text: transformers.PreTrainedConfig) -> nn.Module:
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(
            hidden_size=40,
            intermediate_size=56,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=4,
            initializer_range=0.02,
        ),
        qformer_config=transformers.Blip2QFormerConfig(
            vocab_size=VOCABULARY,
            hidden_size=36,
            intermediate_size=60,
            num_hidden_layers=3,
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
            num_hidden_layers=3,
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
            num_layers=3,
            num_decoder_layers=4,
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
        num_hidden_layers=3,
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
        n_layer=3,
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
        num_hidden_layers=3,
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
        num_layers=4,
        attention_types=[[["global", "local"], 2]],
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
        num_hidden_layers=3,
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
        num_hidden_layers=3,
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
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return transformers.ElectraForPreTraining(config)


def _deberta_v2() -> nn.Module:
    config = transformers.DebertaV2Config(  # as of deberta-v3-base
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
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
        num_hidden_layers=3,
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
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        max_2d_position_embeddings=72,
    )
    return transformers.LayoutLMModel(config)


def _chatglm() -> nn.Module:
    config = ChatGLMConfig(
        vocab_size=VOCABULARY, hidden_size=48, inner_hidden_size=80, num_layers=3, num_attention_heads=4
    )
    return ChatGLMForConditionalGeneration(config)


MORE: Mapping[str, Architecture] = {
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


def add_image(made: dict[str, torch.Tensor], seed: int = 8) -> dict[str, torch.Tensor]:
    """Return the text inputs of BLIP-2 with an image, and with the tokens that the image's features replace."""
    input_ids = made["input_ids"].clone()
    input_ids[input_ids == IMAGE_TOKEN] = 0
    input_ids[:, :IMAGE_TOKENS] = IMAGE_TOKEN
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(len(input_ids), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {"pixel_values": pixels, **made, "input_ids": input_ids}
