"""Generation with a prefix by the model's own ``generate``: the prefix is put into each cache that has no past yet, as PEFT does it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from lora_fx.errors import InputError
from lora_fx.tracing.prefixed_forward import behind_prefix, without_past
from lora_fx.transformers_releases import CACHE, CACHE_NAMES, cache_in, cache_name, check_cache_name, without_cache

_OTHER_WAYS = ("assistant_model", "prompt_lookup_num_tokens", "cache_implementation", *CACHE_NAMES)
"""Options of ``generate`` by which a cache is cut, or is another than one that grows."""


def check_options(model: Any, options: Mapping[str, Any], kind: str) -> None:
    """Raise :class:`InputError` for options of ``generate``, or of its configuration, by which a prefix or a prompt would be lost or cut.

    So is a transformers that passes its cache by a name that is not known.

    Args:
        model: that generates.
        options: of the call.
        kind: whether it is a prefix or a prompt.
    """
    check_cache_name()
    config = options.get("generation_config") or model.generation_config
    settings = {name: getattr(config, name, None) for name in _OTHER_WAYS} | dict(options)
    given = [name for name in _OTHER_WAYS if settings.get(name) is not None]
    if given:
        raise InputError(
            f"{given[0]} was given, and a {kind} is in a cache that grows from the first step on. Leave it out."
        )


@contextmanager
def behind(model: Any, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Let a model of transformers compute with a prefix inside the block.

    Args:
        model: whose ``forward`` is replaced.
        pairs: of each layer the keys and values of the prefix, ``(heads, tokens, size)``.
    """
    inner, tokens = model.forward, pairs[0][0].size(1)
    name = cache_name(inner) or CACHE
    names, decodes = inspect.signature(inner).parameters, bool(model.config.is_encoder_decoder)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        text = given.get("decoder_input_ids" if decodes else "input_ids")
        if not isinstance(text, torch.Tensor):
            raise InputError("expected input_ids: a prefix is put in front of tokens, got none.")
        batch = text.size(0)
        cache = cache_in(given)
        kept = cache is not None
        if not kept:  # every step has the whole text
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if decodes else DynamicCache()
        own = cache.self_attention_cache if decodes else cache
        if not own.get_seq_length():
            for index, (key, value) in enumerate(pairs):
                own.update(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), index)
        mask, length = given.get("attention_mask"), own.get_seq_length() + text.size(1)
        if not decodes and isinstance(mask, torch.Tensor) and mask.size(-1) + tokens != length:
            raise InputError(
                f"expected a cache of {mask.size(-1) + tokens - text.size(1)} positions, got {length - text.size(1)}."
            )
        output = inner(**behind_prefix({**without_cache(given), name: cache}, tokens, batch, decodes=decodes))
        return output if kept else without_past(output)

    forward.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]
    model.forward = forward
    try:
        yield
    finally:
        del model.forward


@contextmanager
def behind_prompt(model: Any, prompt: torch.Tensor) -> Iterator[None]:
    """Let a model of transformers compute with a prompt in front of the embeddings of its ids inside the block, as PEFT does it.

    Args:
        model: whose ``forward`` is replaced; of an encoder-decoder model that of the encoder, too.
        prompt: ``(tokens, width)``.
    """
    tokens, embed = prompt.size(0), model.get_input_embeddings()
    reader = model.get_encoder() if model.config.is_encoder_decoder else model

    def ahead(module: Any) -> Any:
        inner, names = module.forward, inspect.signature(module.forward).parameters

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            given.pop("position_ids", None)  # which the model counts from the beginning of the prompt
            cache, mask = cache_in(given), given.get("attention_mask")
            if isinstance(mask, torch.Tensor):
                given = behind_prefix(given, tokens, mask.size(0), decodes=False)
            if module is reader and (cache is None or not cache.get_seq_length()):
                ids = given.get("input_ids")
                if not isinstance(ids, torch.Tensor):
                    raise InputError("expected input_ids: a prompt is put in front of tokens, got none.")
                rows = prompt.expand(ids.size(0), -1, -1)
                given |= {"input_ids": None, "inputs_embeds": torch.cat([rows, embed(ids)], 1)}
            return inner(**given)

        forward.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]
        return forward

    replaced = {module: ahead(module) for module in (reader, model)}
    for module, forward in replaced.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in replaced:
            del module.forward
