"""Kinds of models that people have: sites as PEFT, training as PEFT step for step, fold, load back.

Of each kind a model of its own is in test_batch_norms, test_training_only, test_modes and test_tracing; here are those of transformers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import rows
from conftest import set_factors
from graph_diff import first_difference

import lora_fx

T = transformers
KINDS: dict[str, tuple[Callable[[], Any], list[str], dict[str, Any]]] = {
    # batch norms
    "resnet": (
        lambda: T.ResNetForImageClassification(
            T.ResNetConfig(embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic")
        ),
        ["convolution"],
        {"pixel_values": torch.randn(4, 3, 32, 32)},
    ),
    "regnet": (
        lambda: T.RegNetForImageClassification(
            T.RegNetConfig(embedding_size=6, hidden_sizes=[8, 12], depths=[1, 1], groups_width=4)
        ),
        ["attention.0", "attention.2"],
        {"pixel_values": torch.randn(4, 3, 32, 32)},
    ),
    # stochastic depth; a window as large as the image, for which Swin sets its shift to 0 at each call
    "swin": (
        lambda: T.SwinForImageClassification(
            T.SwinConfig(
                image_size=16,
                patch_size=4,
                embed_dim=8,
                depths=[1, 2],
                num_heads=[2, 2],
                window_size=2,
                drop_path_rate=0.4,
            )
        ),
        ["q_proj", "v_proj"],
        {"pixel_values": torch.randn(4, 3, 16, 16)},
    ),
    "beit": (
        lambda: T.BeitForImageClassification(
            T.BeitConfig(
                hidden_size=12,
                intermediate_size=20,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
                drop_path_rate=0.4,
            )
        ),
        ["q_proj", "v_proj"],
        {"pixel_values": torch.randn(4, 3, 16, 16)},
    ),
    "convnext": (
        lambda: T.ConvNextForImageClassification(
            T.ConvNextConfig(
                hidden_sizes=[6, 8], depths=[1, 1], num_stages=2, drop_path_rate=0.4, layer_scale_init_value=0.5
            )
        ),
        ["pwconv1", "pwconv2"],
        {"pixel_values": torch.randn(4, 3, 16, 16)},
    ),
    # layer drop and SpecAugment at 0
    "wav2vec2": (
        lambda: T.Wav2Vec2ForSequenceClassification(
            T.Wav2Vec2Config(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=24,
                conv_dim=[8, 8],
                conv_stride=[5, 2],
                conv_kernel=[10, 3],
                num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=2,
                layerdrop=0.0,
                apply_spec_augment=False,
            )
        ),
        ["q_proj", "v_proj"],
        {"input_values": torch.randn(3, 400)},
    ),
}


def built(name: str) -> Any:
    torch.manual_seed(8)
    return KINDS[name][0]().eval()


@functools.cache
def traced(name: str) -> lora_fx.TracedGraphModule:
    return lora_fx.trace(built(name), KINDS[name][2])


def trained(module: Any, batch: dict[str, Any], steps: int = 3) -> list[torch.Tensor]:
    """Return the outputs of some steps of SGD, each under a random state of its own."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)
    outputs = []
    for step in range(steps):
        torch.manual_seed(step)
        logits = module(**batch).logits
        outputs.append(logits.detach().clone())
        logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return outputs


@pytest.mark.parametrize("name", rows(KINDS, ("resnet", "wav2vec2")))
def test_a_model_trains_as_with_peft_folds_to_its_trace_and_loads_back(name: str, tmp_path: Path) -> None:
    _, targets, batch = KINDS[name]
    theirs: Any = peft.get_peft_model(built(name), peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets))
    graph = lora_fx.rewrite(traced(name), {"defaults": {"rank": 2, "alpha": 3}, "select": [{"target": targets}]})
    summary = lora_fx.parameter_summary(graph)
    assert (summary.trainable, summary.total) == theirs.get_nb_trainable_parameters()
    for module in (theirs, graph):
        set_factors(module)
        module.train()
    for mine, other in zip(trained(graph, batch), trained(theirs, batch), strict=True):
        assert torch.equal(mine, other)
    graph.eval(), theirs.eval()
    merged = lora_fx.fold(graph)
    assert first_difference(merged, traced(name)) is None
    torch.testing.assert_close(merged(**batch).logits, graph(**batch).logits, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = lora_fx.from_adapter(traced(name), tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(built(name), tmp_path / "theirs").eval()
    torch.testing.assert_close(loaded(**batch).logits, again(**batch).logits, rtol=1e-5, atol=1e-6)


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}


def _text(*shape: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 50, shape), "attention_mask": torch.ones(shape, dtype=torch.int64)}


def test_big_bird_has_the_attention_of_the_traced_lengths_and_refuses_those_that_take_another() -> None:
    config = T.BigBirdConfig(**SMALL, block_size=2, num_random_blocks=1)  # blocks from 15 tokens on
    torch.manual_seed(0)
    model = T.BigBirdModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    graph = lora_fx.trace(model, inference=True)
    batch = _text(3, 14)
    assert torch.equal(graph(**batch)[0], model(**batch)[0])
    with pytest.raises(lora_fx.InputError, match="'input_ids' has size 15 in dimension 1, expected 1 to 14"):
        graph(**_text(3, 15))


def test_rotary_embeddings_in_complex_numbers_are_traced() -> None:
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 1}
    config = T.DeepseekV2Config(**SMALL, **ranks, **experts, first_k_dense_replace=0, topk_method="greedy")
    torch.manual_seed(0)
    model = T.DeepseekV2ForCausalLM(config).eval().requires_grad_(False)
    graph = lora_fx.trace(model, inference=True)
    batch = _text(3, 9)
    assert torch.equal(graph(**batch)[0], model(**batch, use_cache=False)[0])


def test_a_choice_by_the_values_of_a_mask_is_refused_in_one_sentence() -> None:
    sizes = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = T.FSMTConfig(langs=["a", "b"], src_vocab_size=50, tgt_vocab_size=50, d_model=8, **sizes)
    with pytest.raises(lora_fx.TraceError) as caught:
        lora_fx.trace(T.FSMTForConditionalGeneration(config).eval())
    assert re.fullmatch(
        r"FSMTForConditionalGeneration cannot be traced at \S+modeling_fsmt\.py:\d+: its Python asks for the values of a tensor there, or "
        r"branches by them \(.*\), and a graph has one course\. Write it with operators, as torch\.where\..*",
        str(caught.value),
    )
    assert not re.search("graph\\(|file an issue|call_function", str(caught.value))
