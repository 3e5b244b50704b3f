"""Kinds of inputs of transformers models: what an argument of ``forward`` may be, by its name and the fields of the config.

transformers spells arguments and fields of configs in few ways, so the name of an argument says its kind (tokens, an image, a
spectrogram, embeddings, a mask) and the fields say its sizes. Where they leave several readings, all are yielded, the likeliest first.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

# Small, distinct, and no divisors of each other, so that a size taken for another shows.
BATCH, SEQUENCE, TARGET_SEQUENCE = 2, 7, 5

LONG_SEQUENCE = 64
"""Length for models that work on windows, or shorten the sequence before they compute."""

IMAGE_SIZES = ((224, 224), (64, 64), (48, 320), (512, 512))
"""Height and width of images where no config names a size that the model takes: of ImageNet first, of one line of text among them."""

SAMPLES = (3200, 24000, 1920)
"""Lengths of sounds where no config says how many samples are one frame: a multiple of the usual frames, and a second."""

FRAMES, MEL_BINS = (64, 128, 1024), (80, 128)
"""Frames of a spectrogram, and frequencies of each, where no config says them."""

MAX_ELEMENTS = 2**27
"""Elements of an input: a config whose sizes ask for more is not believed."""

_CHOICES = 3

Made = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class WantedInput:
    """An argument of ``forward``, and the inputs that are made before it."""

    name: str
    made: Made


def arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of the transformers model that ``model`` is, or wraps: a wrapper passes all on by ``**kwargs``."""
    own = (module for module in model.modules() if hasattr(type(module), "main_input_name"))
    return inspect.signature(next(own, model).forward).parameters


def random_tokens(model: Any, length: int, generator: torch.Generator, *, decoder: bool = False) -> torch.Tensor:
    """Return tokens ``(BATCH, length)`` of a transformers model's vocabulary.

    Args:
        model: with a config; of a vocabulary that this does not say, its embedding has as many rows.
        length: of each text.
        generator: of the draws.
        decoder: the vocabulary of the decoder (True) or the encoder (False), where they have configs of their own.
    """
    return torch.randint(0, _vocabulary(model, decoder), (BATCH, length), generator=generator)


_CHARACTERS = 256
"""Tokens of a model without vocabulary and embedding, which hashes them."""


def text_config(config: Any, *, decoder: bool = False) -> Any:
    """Return the part of a config that is of the text; where encoder and decoder have a text each, as in MusicGen, of one of them."""
    try:
        return config.get_text_config()
    except ValueError:  # transformers cannot tell the main one
        return config.get_text_config(decoder=decoder, encoder=not decoder)


def _vocabulary(model: Any, decoder: bool) -> int:
    config = text_config(model.config, decoder=decoder)
    size = getattr(config, "vocab_size", None)
    if isinstance(size, int):
        return size
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError, TypeError):
        return _CHARACTERS


def _bounded(*shape: int) -> tuple[int, ...]:
    if math.prod(shape) > MAX_ELEMENTS:
        raise ValueError(f"expected sizes of inputs with at most {MAX_ELEMENTS:,} elements, got {shape}")
    return shape


class Maker:
    """Makes the inputs of one model, with random numbers of its own, so that the caller's random state stays."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config
        self.takes = arguments(model)
        self.generator = torch.Generator().manual_seed(0)
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def noise(self, *shape: int) -> torch.Tensor:
        """Return random numbers ``(BATCH, *shape)`` in the dtype of the model."""
        return torch.randn(_bounded(BATCH, *shape), generator=self.generator).to(self.dtype)

    def chosen(self, *shape: int, below: int) -> torch.Tensor:
        """Return integers ``(BATCH, *shape)`` from 0 on."""
        return torch.randint(0, below, _bounded(BATCH, *shape), generator=self.generator)

    def first_width(self) -> list[int]:
        """Return the width of the input of the model's first layer, if that is linear or a convolution over a sequence."""
        layers = (m for m in self.model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d))
        first = next(layers, None)
        if isinstance(first, nn.Linear):
            return [first.in_features]
        return [first.in_channels] if isinstance(first, nn.Conv1d) else []

    def fields(self, *names: str, part: str = "") -> list[Any]:
        """Return the values of these fields, of the config's part for this kind of input first, each value once."""
        found = [getattr(each, name, None) for each in _parts(self.config, part) for name in names]
        distinct: list[Any] = []
        distinct.extend(value for value in found if value is not None and value not in distinct)
        return distinct


def _parts(config: Any, kind: str) -> Iterator[Any]:
    """Yield a config and the configs inside it, the ones whose field names this kind of input first."""
    inside = {
        name: value
        for name, value in vars(config).items()
        if hasattr(value, "model_type") and hasattr(value, "to_dict")
    }
    named = {name: value for name, value in inside.items() if kind and re.search(kind, name)}
    for value in named.values():
        yield from _parts(value, kind)
    yield config
    for name, value in inside.items():
        if name not in named:
            yield from _parts(value, kind)


Kind = Callable[[Maker, WantedInput], Iterable[Mapping[str, torch.Tensor]]]


def _tokens(maker: Maker, wanted: WantedInput) -> Iterator[Mapping[str, torch.Tensor]]:
    """Tokens, with a mask and boxes beside the main ones; also those of several codebooks."""
    decoder = wanted.name.startswith("decoder_")
    lengths = (TARGET_SEQUENCE,) if decoder else (SEQUENCE, LONG_SEQUENCE)
    for length in lengths:
        tokens = random_tokens(maker.model, length, maker.generator, decoder=decoder)
        if wanted.name != "input_ids":
            yield {wanted.name: tokens}
            continue
        texts = {wanted.name: tokens}
        if "attention_mask" in maker.takes or any(p.kind is p.VAR_KEYWORD for p in maker.takes.values()):
            texts["attention_mask"] = torch.ones(BATCH, length, dtype=torch.int64)
        if "bbox" not in maker.takes:
            yield texts
        else:
            for boxes in _boxes(maker, WantedInput("bbox", texts)):
                yield {**texts, **boxes}
    if not decoder:  # several texts for each example, as the answers of a choice
        choices = random_tokens(maker.model, SEQUENCE * _CHOICES, maker.generator).view(BATCH, _CHOICES, SEQUENCE)
        yield {
            wanted.name: choices,
            **({"attention_mask": torch.ones_like(choices)} if wanted.name == "input_ids" else {}),
        }
    for count in maker.fields("num_codebooks", "num_channels", part="decoder" if decoder else ""):
        if isinstance(count, int):
            size = maker.fields("codebook_size", "vocab_size", part="decoder" if decoder else "")[0]
            for several in (count, count + 1):
                yield {wanted.name: maker.chosen(lengths[0], several, below=size)}
            yield {wanted.name: maker.chosen(count, lengths[0], below=size).flatten(0, 1)}


def _boxes(maker: Maker, wanted: WantedInput) -> Iterator[Mapping[str, torch.Tensor]]:
    """Left, top, right and bottom of each token: on a grid if the config has its size, or parts of the page."""
    length = wanted.made["input_ids"].size(1)
    for maximum in maker.fields("max_2d_position_embeddings"):
        corner = torch.randint(0, maximum // 2, (BATCH, length, 2), generator=maker.generator)
        yield {wanted.name: torch.cat([corner, 2 * corner], dim=-1)}
    corners = torch.rand(BATCH, length, 2, generator=maker.generator) / 2
    yield {wanted.name: torch.cat([corners, 2 * corners], dim=-1).to(maker.dtype)}


def _sides(value: Any) -> tuple[int, int] | None:
    """Return height and width as a config says them: a number, a pair, or a mapping."""
    if isinstance(value, Mapping):
        value = [value.get("height"), value.get("width")]
    if isinstance(value, int):
        return value, value
    pair = tuple(value) if isinstance(value, list | tuple) else ()
    return (pair[0], pair[1]) if len(pair) == 2 and all(isinstance(side, int) for side in pair) else None


_VISION = "vision|image|backbone|encoder"


def _images(maker: Maker, wanted: WantedInput) -> Iterator[Mapping[str, torch.Tensor]]:
    """Images ``(BATCH, channels, height, width)``; several for each example; and patches that are flat already."""
    said = [sides for value in maker.fields("image_size", part=_VISION) if (sides := _sides(value)) is not None]
    channels = [
        count
        for count in maker.fields("num_channels", "in_channels", "in_chans", part=_VISION)
        if isinstance(count, int)
    ]
    channels = list(dict.fromkeys([*channels[:1], 3, *channels[1:]]))
    frames = [count for count in maker.fields("num_frames", part=_VISION) if isinstance(count, int)]
    shapes = [(count, *sides) for sides, count in product(dict.fromkeys((*said, *IMAGE_SIZES)), channels)]
    if maker.takes.keys() & {"spatial_shapes", "pixel_position_ids", *_GRIDS}:
        yield from _patches(maker, wanted)
    films = [(count, *shape) for count, shape in product(frames or (2,), shapes)]
    for shape in [*films, *shapes] if frames else [*shapes, *films]:
        yield {wanted.name: maker.noise(*shape)}


_GRIDS = ("grid_thw", "image_grid_thw")
_SIDE = 4


def _patches(maker: Maker, wanted: WantedInput) -> Iterator[Mapping[str, torch.Tensor]]:
    """Rows of pixels, one for each patch of an image of 4 × 4 patches, with the place of each.

    A model that takes grids (frames, rows and columns of each image) takes the patches of all images behind one another.
    """
    channels = maker.fields("num_channels", "in_channels", "in_chans", part=_VISION)[:1] or [3]
    times = maker.fields("temporal_patch_size", part=_VISION)[:1] or [1]
    rows, columns = torch.arange(_SIDE).repeat_interleave(_SIDE), torch.arange(_SIDE).repeat(_SIDE)
    count = _SIDE * _SIDE
    for side in maker.fields("patch_size", part=_VISION):
        height, width = side if isinstance(side, list | tuple) else (side, side)
        grids = {name: torch.tensor([[1, _SIDE, _SIDE]] * BATCH) for name in _GRIDS if name in maker.takes}
        if grids:
            for shape in ((channels[0] * times[0] * height * width,), (channels[0], height, width)):
                yield {wanted.name: maker.noise(count, *shape).flatten(0, 1), **grids}
            continue
        places = {
            "pixel_attention_mask": torch.ones(BATCH, count, dtype=torch.int64),
            "spatial_shapes": torch.full((BATCH, 2), _SIDE),
            "pixel_position_ids": torch.stack([columns, rows], dim=-1).repeat(BATCH, 1, 1),
        }
        beside = {key: value for key, value in places.items() if key in maker.takes}
        yield {wanted.name: maker.noise(count, channels[0] * height * width), **beside}


def _videos(maker: Maker, wanted: WantedInput) -> Iterator[Mapping[str, torch.Tensor]]:
    """Films ``(BATCH, frames, channels, height, width)``."""
    said = [sides for value in maker.fields("image_size", "crop_size", part=_VISION) if (sides := _sides(value))]
    channels = maker.fields("num_channels", "in_channels", "in_chans", part=_VISION)[:1] or [3]
    counts = maker.fields("frames_per_clip", "num_frames", part=_VISION) or [4]
    for frames, sides in product(counts, said or IMAGE_SIZES):
        yield {wanted.name: maker.noise(frames, channels[0], *sides)}


_SOUND = "audio|speech|encoder"
_BINS = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_feat_size", "feature_size")


def _spectrograms(maker: Maker, wanted: WantedInput) -> Iterator[Mapping[str, torch.Tensor]]:
    """Frequencies of a sound: ``(BATCH, bins, frames)``, ``(BATCH, frames, bins)``, or as an image of one channel.

    An encoder with a position for each frame, as Whisper's, takes one length alone, and halves it by its second convolution.
    """
    bins = [count for count in maker.fields(*_BINS, part=_SOUND) if isinstance(count, int)]
    stacked = [count * times for count in bins for times in maker.fields("num_stacked_frames", part=_SOUND)]
    positions = maker.fields("max_source_positions", part=_SOUND) if maker.fields("num_mel_bins", part=_SOUND) else []
    for count, length in product(bins, positions):
        yield {wanted.name: maker.noise(count, 2 * length)}
    windows = [2 * each for each in maker.fields("n_window", part=_SOUND)]
    for frames, count in product(
        (*windows, *FRAMES), dict.fromkeys((*stacked, *bins, *maker.first_width(), *MEL_BINS))
    ):
        yield {wanted.name: maker.noise(frames, count)}
        yield {wanted.name: maker.noise(count, frames)}
        yield {wanted.name: maker.noise(1, frames, count)}


def _sounds(maker: Maker, wanted: WantedInput) -> Iterator[Mapping[str, torch.Tensor]]:
    """Samples of a sound, with or without a channel: as many as the convolutions of wav2vec 2.0 and its kin make few frames of."""
    bins, longest = maker.fields("num_mel_bins"), maker.fields("max_length")
    for kernels, strides in zip(maker.fields("conv_kernel"), maker.fields("conv_stride"), strict=False):
        length = SEQUENCE
        for kernel, stride in reversed(list(zip(kernels, strides, strict=True))):
            length = (length - 1) * stride + kernel
        yield {wanted.name: maker.noise(length)}
    for count, frames in product(bins, longest):  # not a sound, but its frequencies
        yield {wanted.name: maker.noise(frames, count)}
    ratios = maker.fields("downsampling_ratios", "upsampling_ratios", part=_SOUND)
    hops = [each for each in maker.fields("hop_length", part=_SOUND) if isinstance(each, int)]
    one = [*hops, *(math.prod(each) for each in ratios if isinstance(each, list | tuple))]
    for length in dict.fromkeys((*(SEQUENCE * each for each in one), *(64 * each for each in one), *SAMPLES)):
        yield {wanted.name: maker.noise(length)}
        yield {wanted.name: maker.noise(1, length)}


_WIDTHS = ("hidden_size", "d_model", "encoder_hidden_size", "codebook_dim", "upsample_hidden_size")


def _embeddings(maker: Maker, wanted: WantedInput) -> Iterator[Mapping[str, torch.Tensor]]:
    """Vectors ``(BATCH, sequence, width)``, or with the sequence last; of a sequence of one dimension where the model has channels."""
    if maker.takes.keys() & {*_GRIDS}:
        yield from _patches(maker, wanted)
    widths = [width for width in maker.fields(*_WIDTHS) if isinstance(width, int)]
    for width in widths:
        yield {wanted.name: maker.noise(SEQUENCE, width)}
    for width in widths:
        yield {wanted.name: maker.noise(width, SEQUENCE)}
    for length in SAMPLES:
        yield {wanted.name: maker.noise(1, length)}


def _any(maker: Maker, wanted: WantedInput) -> Iterator[Mapping[str, torch.Tensor]]:
    """Inputs of a model that takes several kinds: tokens, vectors, a sound or an image."""
    yield {wanted.name: random_tokens(maker.model, SEQUENCE, maker.generator)}
    yield from _embeddings(maker, wanted)
    yield from _sounds(maker, wanted)


def _mask(maker: Maker, wanted: WantedInput) -> Iterator[Mapping[str, torch.Tensor]]:
    """A mask of ones, over some leading dimensions of the input that it is for."""
    stem = re.sub(r"_masks?$|_padding$", "", wanted.name)
    floating = (value for value in wanted.made.values() if value.is_floating_point())
    base = wanted.made.get(stem, next(floating, next(iter(wanted.made.values()))))
    shapes = dict.fromkeys(
        (tuple(base.shape[:2]), (BATCH, base.shape[-1]), tuple(base.shape), (BATCH, *base.shape[-2:]))
    )
    for shape, dtype in product(shapes, (torch.int64, torch.bool, maker.dtype)):
        yield {wanted.name: torch.ones(shape, dtype=dtype)}


def _past(maker: Maker, wanted: WantedInput) -> Iterator[Mapping[str, torch.Tensor]]:
    """The past of time series: as far back as the config looks, with what is known of each time beside it."""
    lengths = maker.fields("context_length")
    lags = maker.fields("lags_sequence")
    farthest = max(lags[0]) if lags and lags[0] else 0
    for length in lengths:
        total = length + farthest
        times = maker.fields("num_time_features")[:1] or [0]
        ahead = maker.fields("prediction_length")[:1] or [1]
        real, classes = (maker.fields(f"num_static_{kind}_features")[:1] or [0] for kind in ("real", "categorical"))
        beside = {
            "past_time_features": maker.noise(total, times[0]),
            "past_observed_mask": torch.ones(BATCH, total, dtype=maker.dtype),
            "static_real_features": maker.noise(real[0]) if real[0] else None,
            "static_categorical_features": maker.chosen(classes[0], below=1) if classes[0] else None,
            "future_values": maker.noise(ahead[0]),
            "future_time_features": maker.noise(ahead[0], times[0]),
        }
        series = "past_time_features" in maker.takes
        taken = {key: value for key, value in beside.items() if key in maker.takes and value is not None}
        if series:
            yield {wanted.name: maker.noise(total), **taken}
        for channels in maker.fields("num_input_channels", "input_size"):
            yield {wanted.name: maker.noise(total, channels)}
        yield {wanted.name: maker.noise(total)}


def _trajectory(maker: Maker, wanted: WantedInput) -> Iterator[Mapping[str, torch.Tensor]]:
    """States, actions and rewards of a sequence of steps."""
    field = {"states": "state_dim", "state": "max_state_dim", "actions": "act_dim"}.get(wanted.name)
    (width,) = maker.fields(field)[:1] or [1] if field else [1]
    values = {wanted.name: maker.noise(SEQUENCE, width)}
    if wanted.name == "states":
        steps = torch.arange(SEQUENCE).repeat(BATCH, 1)
        values |= {"timesteps": steps, "attention_mask": torch.ones(BATCH, SEQUENCE, dtype=torch.int64)}
    yield values


def _regions(maker: Maker, wanted: WantedInput) -> Iterator[Mapping[str, torch.Tensor]]:
    """Features and places of the regions of an image."""
    for width in maker.fields({"visual_feats": "visual_feat_dim", "visual_pos": "visual_pos_dim"}[wanted.name]):
        yield {wanted.name: maker.noise(TARGET_SEQUENCE, width)}


def _numbered_patches(maker: Maker, wanted: WantedInput) -> Iterator[Mapping[str, torch.Tensor]]:
    """Pixels of patches behind their row and column, which count from 1."""
    for width in maker.fields("patch_embed_hidden_size", part=_VISION):
        places = torch.arange(1, SEQUENCE + 1).repeat(BATCH, 1)[..., None].expand(BATCH, SEQUENCE, 2)
        yield {wanted.name: torch.cat([places.to(maker.dtype), maker.noise(SEQUENCE, width)], dim=-1)}


def _like_image(maker: Maker, wanted: WantedInput) -> Iterator[Mapping[str, torch.Tensor]]:
    yield {wanted.name: torch.randn(wanted.made["pixel_values"].shape, generator=maker.generator).to(maker.dtype)}


_KINDS: Sequence[tuple[re.Pattern[str], Kind]] = [
    (re.compile(pattern), kind)
    for pattern, kind in (
        ("prompt_pixel_values|prompt_masks", _like_image),
        (r"pixel_values_videos|video_values", _videos),
        (r"pixel_values", _images),
        (r"(\w+_)?input_ids|task_inputs", _tokens),
        (r"input_features|audio_mel", _spectrograms),
        (r"input_values|(\w+_)?waveform", _sounds),
        (r"past_values|past_time_features", _past),
        (r"states?|actions|rewards|returns_to_go", _trajectory),
        (r"visual_(feats|pos)", _regions),
        (r"flattened_patches", _numbered_patches),
        (r"bbox", _boxes),
        (r"(\w+_)?(embeds|hidden_states)|latents", _embeddings),
        (r"(\w+_)?masks?|past_values_padding", _mask),
        (r"(image_)?grid_thw|spatial_shapes|pixel_position_ids", _patches),  # made along with the patches
        (r"inputs", _any),
    )
]
"""Spelling of an argument → what makes it. The first pattern that fits decides."""


def kind_of(name: str) -> Kind | None:
    """Return what makes an argument of this name, or None if its spelling is of no known kind."""
    return next((kind for pattern, kind in _KINDS if pattern.fullmatch(name)), None)


def is_mask(name: str) -> bool:
    """Tell whether an argument of this name is a mask of another."""
    return kind_of(name) is _mask
