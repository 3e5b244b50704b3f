"""Candidates for the inputs of a transformers model, from the arguments of its ``forward``, its main input and its config.

Which of the readings of an argument is right, and whether an optional one is needed, the model says in a run.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

from lora_fx.errors import first_line
from lora_fx.tracing.input_kinds import BATCH, Made, Maker, WantedInput, arguments, is_mask, kind_of, text_config

MAX_CANDIDATES = 100
"""Readings that are tried for one set of arguments."""


def candidates(model: nn.Module) -> Iterator[dict[str, torch.Tensor] | str]:
    """Yield inputs that a model may take, the likeliest first: what it needs alone, then with optional ones.

    Where a field of the config is of no use for inputs, why takes their place, and that of the readings after them.
    Nothing is yielded if an argument without a default is of no kind that is known; see :func:`unknown_arguments`.
    """
    if unknown_arguments(model):
        return
    needed, optional = needed_arguments(model), _optional(model)
    further = [[], *([name] for name in optional), *([optional] if len(optional) > 1 else [])]
    for names in further:
        try:
            yield from islice(_combined(Maker(model), [*needed, *names], {}), MAX_CANDIDATES)
        except Exception as error:  # of fields with any values
            yield f"{type(error).__name__}: {first_line(str(error), 'nothing')}"


def unknown_arguments(model: nn.Module) -> list[str]:
    """Return the arguments that a model needs and that are of no known kind; of a model without named ones, its main input."""
    needed = needed_arguments(model)
    return [name for name in needed if kind_of(name) is None] or ([] if needed else _main_inputs(model) or ["input"])


def needed_arguments(model: nn.Module) -> list[str]:
    """Return the arguments that a model is given in any case: its main input, those without a default, a text to decode."""
    parameters = arguments(model)
    named = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    main = [name for name in _main_inputs(model) if name in named]
    required = [name for name in named if parameters[name].default is inspect.Parameter.empty]
    if not main and not required:
        main = [name for name in named if kind_of(name) is not None][:1]
    decodes = getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in named
    text = ["decoder_input_ids"] if decodes else []  # and not for the encoder alone
    return list(dict.fromkeys([*main, *_beside(model, main), *sorted(required, key=is_mask), *text]))


def _main_inputs(model: Any) -> list[str]:
    main = getattr(model, "main_input_name", None)
    return [main] if isinstance(main, str) else list(main or ())


def _beside(model: Any, main: Sequence[str]) -> list[str]:
    """Return the names of further inputs: the text to an image, and the image to a text.

    A language model that takes images in place of tokens also runs without one, and is traced so where its config does not
    say how many tokens an image takes.
    """
    takes, config = arguments(model), model.config
    if list(main) == ["pixel_values"]:
        return ["input_ids"] if "input_ids" in takes else []
    sees = "pixel_values" in takes and getattr(config, "vision_config", None) is not None
    return ["pixel_values"] if sees and (not _has_image_tokens(config) or _image_tokens(config)) else []


_OTHERWISE = re.compile(
    r"(?!encoder_)(\w+_)?(embeds|hidden_states|masks?|ids|values_videos|past_\w+)|labels|future_\w+"
)


def _optional(model: nn.Module) -> list[str]:
    """Return further arguments of a known kind, but for those that stand for others, or go along with them."""
    needed = needed_arguments(model)
    others = [name for name in arguments(model) if name not in needed and kind_of(name) is not None]
    masks = [name for name in others if is_mask(name) and name != "attention_mask"]
    return [*(name for name in others if name == "input_ids" or not _OTHERWISE.fullmatch(name)), *masks]


def _combined(maker: Maker, names: Sequence[str], made: Made) -> Iterator[dict[str, torch.Tensor]]:
    """Yield every combination of what the arguments may be, the last one varying fastest."""
    if not names:
        if {"input_ids", "pixel_values"} <= made.keys() and _has_image_tokens(maker.config):
            yield from _with_image_tokens(maker, made)
        yield dict(made)
        return
    name, *rest = names
    if name in made:
        yield from _combined(maker, rest, made)
        return
    kind = kind_of(name)
    assert kind is not None
    for inputs in kind(maker, WantedInput(name, made)):
        yield from _combined(maker, rest, {**made, **inputs})


_IMAGE_LENGTHS = ("num_query_tokens", "mm_tokens_per_image")  # BLIP-2's and Gemma 3's


def _has_image_tokens(config: Any) -> bool:
    """Tell whether the features of an image take the place of tokens in the text, as in BLIP-2, and not as in CLIP."""
    return hasattr(config, "image_token_id")


def _image_tokens(config: Any) -> tuple[int, int] | None:
    """Return how many tokens an image takes the place of, and which token stands for it, if the config says so."""
    lengths = [length for name in _IMAGE_LENGTHS if (length := getattr(config, name, None)) is not None]
    token = getattr(config, "image_token_id", None)
    return (lengths[0], token) if lengths and token is not None else None


def _with_image_tokens(maker: Maker, made: Made) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the text with the tokens of one image before it, and nowhere else."""
    found = _image_tokens(maker.config)
    if found is None:
        return
    count, token = found
    size = text_config(maker.config).vocab_size
    text = made["input_ids"].masked_fill(made["input_ids"] == token, (token + 1) % size)
    tokens = torch.cat([torch.full((BATCH, count), token), text], dim=1)
    texts = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if "token_type_ids" in maker.takes:
        texts["token_type_ids"] = (tokens == token).long()  # the tokens of an image attend to each other both ways
    yield {**made, **texts}
