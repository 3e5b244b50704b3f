from __future__ import annotations

import itertools
from typing import Any

import architectures
import pytest
import torch
import transformers
from conftest import unchanged
from families import IMAGE_TOKEN, IMAGE_TOKENS, build
from torch import nn

import lora_fx
from lora_fx.tracing import input_trials
from lora_fx.tracing.example_inputs import ExampleInputs, example_inputs, graph_inputs
from lora_fx.tracing.input_kinds import BATCH, SEQUENCE, TARGET_SEQUENCE

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
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])
    return transformers.ResNetModel(config)


def _siglip_2() -> nn.Module:
    return transformers.Siglip2Model(transformers.Siglip2Config(text_config=SMALL, vision_config=SMALL))


def _speech_to_text() -> nn.Module:
    layers = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    return transformers.Speech2TextModel(transformers.Speech2TextConfig(vocab_size=9, d_model=8, **layers))


def _audio_spectrogram() -> nn.Module:
    return transformers.ASTModel(transformers.ASTConfig(**SMALL, max_length=32, num_mel_bins=16))


def _time_series() -> nn.Module:
    sizes = {"prediction_length": 4, "context_length": 6, "lags_sequence": [1, 3], "num_time_features": 2, "d_model": 8}
    return transformers.InformerModel(transformers.InformerConfig(**sizes, encoder_layers=1, decoder_layers=1))


def _decisions() -> nn.Module:
    sizes = {"state_dim": 3, "act_dim": 2, "hidden_size": 8, "n_layer": 1, "n_head": 2}
    return transformers.DecisionTransformerModel(transformers.DecisionTransformerConfig(**sizes))


def _regions() -> nn.Module:
    layers = {"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 6, "visual_pos_dim": 4}
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 9}
    return transformers.LxmertModel(transformers.LxmertConfig(**sizes, **layers))


def _boxes() -> nn.Module:
    return transformers.BrosModel(transformers.BrosConfig(**{**SMALL, "hidden_size": 64}, vocab_size=9))


def _film() -> nn.Module:
    sizes = {"image_size": 8, "patch_size": 4, "num_frames": 4, "tubelet_size": 2}
    return transformers.VideoMAEModel(transformers.VideoMAEConfig(**SMALL, **sizes))


def _characters() -> nn.Module:
    return transformers.CanineModel(transformers.CanineConfig(**SMALL, num_hash_buckets=16, local_transformer_stride=8))


KINDS = {
    "image without a size": (_resnet, {"pixel_values": (2, 3, 224, 224)}),
    "flat patches": (
        _siglip_2,
        {"pixel_values": (2, 16, 768), "pixel_attention_mask": (2, 16), "spatial_shapes": (2, 2)},
    ),
    "frames first": (_speech_to_text, {"input_features": (2, 64, 80), "decoder_input_ids": (2, 5)}),
    "spectrogram": (_audio_spectrogram, {"input_values": (2, 32, 16)}),
    "film": (_film, {"pixel_values": (2, 4, 3, 8, 8)}),
    "time series": (_time_series, {"past_values": (2, 9), "past_time_features": (2, 9, 2), "future_values": (2, 4)}),
    "trajectory": (_decisions, {"states": (2, 7, 3), "actions": (2, 7, 2), "timesteps": (2, 7)}),
    "regions": (_regions, {"input_ids": (2, 7), "visual_feats": (2, 5, 6), "visual_pos": (2, 5, 4)}),
    "boxes on a page": (_boxes, {"input_ids": (2, 7), "bbox": (2, 7, 4)}),
    "characters": (_characters, {"input_ids": (2, 7)}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_each_kind_are_made_and_taken_and_the_model_stays_as_it_is(kind: str) -> None:
    build_model, expected = KINDS[kind]
    torch.manual_seed(0)
    model = build_model()  # in train mode, in which batch norms would count
    model.alias = next(iter(model.children()))  # whose tensors have two names
    with unchanged(model):
        made = example_inputs(model, None)
    shapes = {name: tuple(value.shape) for name, value in graph_inputs(made).items()}
    assert {name: shapes.get(name) for name in expected} == expected
    assert set(made.made) == shapes.keys()
    with torch.no_grad():
        model.eval()(**made.kwargs)


def test_the_trace_says_which_inputs_it_made(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lora_fx.tracing"):
        graph_module = lora_fx.trace(_resnet(), inference=True)
    assert "inputs of ResNetModel are made from its config: pixel_values (2, 3, 224, 224)" in caplog.text
    model = _resnet().eval()
    caplog.clear()
    given = {"pixel_values": torch.randn(3, 3, 32, 48)}
    with caplog.at_level("INFO", "lora_fx.tracing"):
        lora_fx.trace(model, given, inference=True)
    assert "made from its config" not in caplog.text
    assert graph_module.training


class TakesFrequency(transformers.ViTModel):  # type: ignore[misc]
    def forward(self, pixel_values: torch.Tensor, frequency: torch.Tensor) -> Any:
        return super().forward(pixel_values * frequency)


class TakesNone(transformers.ViTModel):  # type: ignore[misc]
    def forward(self, pixel_values: torch.Tensor) -> Any:
        raise ValueError(f"no image of {pixel_values.shape[-1]} pixels, please")


class TakesNoFlag(transformers.ViTModel):  # type: ignore[misc]
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        assert not kwargs
        return super().forward(pixel_values)


def test_a_flag_that_the_model_does_not_take_is_left_out() -> None:
    model = TakesNoFlag(build("vit").config)
    model.config.use_cache = True
    assert example_inputs(model, None).kwargs.keys() == {"pixel_values"}


BOTH_WAYS = r"pass example_inputs="


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(2, 2), "Linear is not a transformers model.*pass example_inputs"),
        (
            lambda: TakesFrequency(build("vit").config),
            f"takes pixel_values, frequency; 'frequency' cannot be made from its signature and config: {BOTH_WAYS}",
        ),
        (
            lambda: TakesNone(build("vit").config),
            r"what 'pixel_values' is like does not follow from its config; with pixel_values \(2, 3, 12, 12\) it says: "
            f"ValueError: no image of 12 pixels, please. For other inputs, {BOTH_WAYS}",
        ),
        (_blip_2, f"what 'pixel_values', 'input_ids' are like does not follow from its config; .*{BOTH_WAYS}"),
    ],
    ids=["plain", "unknown-argument", "takes-none", "image-in-text"],
)
def test_an_argument_that_cannot_be_made_is_asked_for_by_its_name(model: Any, message: str) -> None:
    with pytest.raises(lora_fx.TraceError, match=message):
        example_inputs(model(), None)


def test_a_model_without_values_is_tried_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = _speech_to_text()
    made = graph_inputs(example_inputs(model, None))
    assert made["input_features"].shape == (2, 64, 80)
    assert all(value.is_meta for value in made.values())


def test_a_large_model_is_tried_on_the_meta_device_and_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_trials, "MAX_ELEMENTS", 0)
    model = _resnet()
    model.alias = next(iter(model.children()))
    with unchanged(model):
        made = example_inputs(model, None).kwargs["pixel_values"]
    assert made.shape == (2, 3, 224, 224)
    assert made.device.type == "cpu"
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_trials_end_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_trials, "MAX_SECONDS", 0.0)
    with pytest.raises(lora_fx.TraceError, match=r"the run takes too long \(no more were tried after 0 s\)"):
        example_inputs(build("vit"), None)


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
        pytest.param("whisper", {"input_features": (3, 10, 22), "decoder_input_ids": (3, 4)}, marks=pytest.mark.matrix),
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


@pytest.mark.parametrize(
    ("name", "sequence"),
    architectures.few(itertools.product(("llama", "bert", "t5"), (1, 6)), (("llama", 1), ("t5", 6))),
)
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


class Strange(transformers.PretrainedConfig):
    model_type = "strange"


class TakesImages(transformers.PreTrainedModel):
    config_class, main_input_name = Strange, "pixel_values"

    def __init__(self, config: Any, features: int = 4) -> None:
        super().__init__(config)
        self.fc = nn.Linear(features, 5)

    def forward(self, pixel_values: Any = None) -> Any:
        return self.fc(pixel_values[..., :4])


class TakesPatches(TakesImages):
    def forward(self, pixel_values: Any = None, grid_thw: Any = None) -> Any:
        return self.fc(pixel_values[..., :4])


class TakesTokens(TakesImages):
    main_input_name = "input_ids"

    def forward(self, input_ids: Any = None) -> Any:
        return self.fc(input_ids.float())


@pytest.mark.parametrize(
    ("model", "fields", "told"),
    [
        (TakesTokens, {"vocab_size": 0}, "random_ expects"),
        (TakesImages, {"image_size": 10**5}, r"at most 134,217,728 elements, got \(2, 3, 100000, 100000\)"),
        (TakesImages, {"image_size": -1}, "negative dimension"),
        (TakesPatches, {"patch_size": [2, 16, 16]}, "too many values"),
    ],
)
def test_a_config_whose_fields_make_no_inputs_is_refused(model: Any, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(
        lora_fx.TraceError, match=rf"no inputs can be made of its config: .*{told}.*pass example_inputs="
    ):
        example_inputs(model(Strange(**fields)), None)


def test_a_model_without_parameters_gets_its_inputs_on_the_cpu() -> None:
    class Bare(TakesTokens):
        def __init__(self, config: Any) -> None:
            transformers.PreTrainedModel.__init__(self, config)

        def forward(self, input_ids: Any = None) -> Any:
            return input_ids * 2

    assert example_inputs(Bare(Strange(vocab_size=9)), None).kwargs["input_ids"].device.type == "cpu"


def test_dynamic_that_is_no_mapping_is_refused_in_a_sentence() -> None:
    with pytest.raises(
        lora_fx.TraceError, match=r"dynamic=: expected a mapping from inputs to their dimensions, got False"
    ):
        lora_fx.trace(nn.Linear(3, 4), (torch.randn(2, 3),), dynamic=False)  # type: ignore[call-overload]
