from __future__ import annotations

from typing import Any

import architectures
import pytest
import torch
import transformers
from conftest import unchanged
from families import IMAGE_TOKEN, IMAGE_TOKENS, build
from torch import nn

import lora_fx
from lora_fx.tracing.example_inputs import BATCH, SEQUENCE, TARGET_SEQUENCE, ExampleInputs, example_inputs, graph_inputs

TEXT = dict.fromkeys(("input_ids", "attention_mask"), (("batch", "sequence"), (BATCH, SEQUENCE)))
IMAGE = {"pixel_values": (("batch", None, None, None), (BATCH, 3, 12, 12))}
MADE = {
    "mistral": TEXT,
    "vit": IMAGE,
    "siglip_vision_model": IMAGE,
    "clip": TEXT | IMAGE,
    "siglip": TEXT | IMAGE,
    "gemma3": IMAGE
    | dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), (("batch", "sequence"), (BATCH, IMAGE_TOKENS + SEQUENCE))
    ),
    "gemma4": TEXT,  # its config does not say how many tokens an image takes
    "whisper": {
        "input_features": (("batch", None, None), (BATCH, 10, 22)),
        "decoder_input_ids": (("batch", "target_sequence"), (BATCH, TARGET_SEQUENCE)),
    },
    "wav2vec2": {"input_values": (("batch", "sequence"), (BATCH, 47))},
}


@pytest.mark.parametrize("name", MADE)
def test_inputs_and_their_axes_follow_from_the_config(name: str) -> None:
    model = build(name)
    with unchanged(model):
        made = example_inputs(model, None)
    tensors = graph_inputs(made)
    assert {name: (made.axes[name], tuple(tensor.shape)) for name, tensor in tensors.items()} == MADE[name]
    with torch.no_grad():
        model(**made.kwargs)


def test_the_samples_give_as_many_frames_as_a_text_has_tokens() -> None:
    model = build("wav2vec2")
    assert model(**example_inputs(model, None).kwargs).last_hidden_state.size(1) == SEQUENCE


def test_an_image_stands_before_the_text_and_nowhere_else() -> None:
    made = example_inputs(build("gemma3"), None).kwargs
    is_image = made["input_ids"] == IMAGE_TOKEN
    assert is_image[:, :IMAGE_TOKENS].all()
    assert not is_image[:, IMAGE_TOKENS:].any()
    assert torch.equal(made["token_type_ids"], is_image.long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_images_have_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    assert example_inputs(build("vit").to(dtype), None).kwargs["pixel_values"].dtype == dtype


def test_the_encoder_alone_is_given_no_text_to_decode() -> None:
    encoder = build("whisper").get_encoder()
    assert list(graph_inputs(example_inputs(encoder, None))) == ["input_features"]


def test_what_is_given_is_taken() -> None:
    model, batch = build("whisper"), {"input_features": torch.zeros(3, 10, 22)}
    made = example_inputs(model, batch)
    assert made == ExampleInputs(kwargs={**batch, "use_cache": False}, axes={"input_features": ("batch", None, None)})


SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def _blip_2() -> nn.Module:
    config = transformers.Blip2Config(
        vision_config={**SMALL, "image_size": 4, "patch_size": 4},
        qformer_config=SMALL,
        text_config={"model_type": "opt", **SMALL, "ffn_dim": 8, "vocab_size": 9, "max_position_embeddings": 16},
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    model.config.image_token_id = None
    return model


def _resnet() -> nn.Module:
    return transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))


def _siglip_2() -> nn.Module:
    return transformers.Siglip2Model(transformers.Siglip2Config(text_config=SMALL, vision_config=SMALL))


def _speech_to_text() -> nn.Module:
    layers = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    return transformers.Speech2TextModel(transformers.Speech2TextConfig(vocab_size=9, d_model=8, **layers))


def _audio_spectrogram() -> nn.Module:
    return transformers.ASTModel(transformers.ASTConfig(**SMALL, max_length=32, num_mel_bins=16))


class TakesPatches(transformers.ViTModel):  # type: ignore[misc]
    main_input_name = "flattened_patches"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(2, 2), "Linear is not a transformers model"),
        (lambda: TakesPatches(build("vit").config), "its main input 'flattened_patches' is not made"),
        (_resnet, "config of ResNetModel does not say by image_size what 'pixel_values' is like"),
        (_siglip_2, "config of Siglip2Model does not say by image_size what 'pixel_values' is like"),
        (_speech_to_text, "by num_mel_bins and max_source_positions what 'input_features' is like"),
        (_audio_spectrogram, "by conv_kernel and conv_stride what 'input_values' is like"),
        (_blip_2, "by num_query_tokens or mm_tokens_per_image, and image_token_id, which tokens an image takes"),
    ],
    ids=["plain", "patches", "image", "image-and-text", "spectrogram", "waveform", "image-in-text"],
)
def test_what_a_config_does_not_say_is_asked_for(model: Any, message: str) -> None:
    with pytest.raises(lora_fx.TraceError, match=f"{message}.*pass example_inputs"):
        example_inputs(model(), None)


def test_texts_and_images_are_batches_of_their_own_in_clip() -> None:
    model = build("clip").requires_grad_(False)
    batch = {
        "input_ids": torch.randint(3, 90, (5, 9)),
        "attention_mask": torch.ones(5, 9, dtype=torch.int64),
        "pixel_values": torch.randn(3, 3, 12, 12),
    }
    found, expected = lora_fx.trace(model, inference=True)(**batch), model(**batch)
    assert torch.equal(found.logits_per_image, expected.logits_per_image)
    assert found.logits_per_image.shape == (3, 5)


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("whisper", {"input_features": (3, 10, 22), "decoder_input_ids": (3, 4)}),
        ("wav2vec2", {"input_values": (3, 80)}),
        ("vit", {"pixel_values": (1, 3, 12, 12)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_graph_of_made_inputs_takes_other_sizes(name: str, batch: dict[str, tuple[int, ...]]) -> None:
    model = build(name).requires_grad_(False)
    given = {
        key: torch.randint(3, 90, shape) if key.endswith("ids") else torch.randn(shape) for key, shape in batch.items()
    }
    constants = {"use_cache": False} if name == "whisper" else {}
    assert torch.equal(lora_fx.trace(model, inference=True)(**given)[0], model(**given, **constants)[0])


@pytest.mark.parametrize("sequence", [1, 6])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_one_example_of_one_token_or_more_is_enough_for_any_number_of_both(name: str, sequence: int) -> None:
    model = architectures.model(name).eval()
    one = architectures.inputs(name, 1, sequence, sequence)
    before = {key: value.clone() for key, value in one.items()}
    graph_module = lora_fx.trace(model, example_inputs=one, inference=True)
    assert all(torch.equal(one[key], value) for key, value in before.items())
    for size in ((1, 1, 1), (1, 7, 5), (3, 11, 4)):
        batch = architectures.inputs(name, *size)
        expected = model(**batch, **architectures.ARCHITECTURES[name].constants)[0]
        assert torch.equal(graph_module(**batch)[0], expected)


def test_a_dimension_of_size_one_that_is_to_vary_does_and_no_other() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x * y

    given = {"x": torch.randn(1, 3), "y": torch.randn(1, 3)}
    graph_module = lora_fx.trace(Scaled(), example_inputs=given, dynamic={"x": (0,)})
    batch = {"x": torch.randn(5, 3), "y": torch.randn(1, 3)}
    assert torch.equal(graph_module(**batch), batch["x"] * batch["y"])
    with pytest.raises(lora_fx.InputError, match=r"'y' has size 5 in dimension 0, expected 1 alone"):
        graph_module(x=torch.randn(5, 3), y=torch.randn(5, 3))
