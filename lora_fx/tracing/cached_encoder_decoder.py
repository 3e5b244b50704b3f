"""Calls of an encoder-decoder model as functions of tensors: its encoder, the first step of its decoder, and every later one.

    encoder   input_ids, attention_mask (or input_features) → last_hidden_state
    first     input_ids, encoder_attention_mask, encoder_hidden_states → logits, present
    later     input_ids, encoder_attention_mask, past_key_values → logits, present

The first step computes the keys and values over the encoder too, once for all: the later ones take them, and return those of the
decoder alone, which have grown. Inputs and outputs are called as optimum's clients call them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from lora_fx.errors import TraceError
from lora_fx.graph.cached_graphs import PAST, PRESENT, CacheLayer
from lora_fx.tracing.cached_forward import (
    BATCH_AXIS,
    PAST_AXIS,
    SEQUENCE_AXIS,
    CachedCall,
    TensorCache,
    check_logits,
    check_positions,
    instead,
    layers_of,
    number,
    with_cache,
)
from lora_fx.tracing.example_inputs import ExampleInputs, example_inputs
from lora_fx.tracing.input_kinds import BATCH, random_tokens
from lora_fx.transformers_releases import CACHE, cache_name

ENCODER_AXIS = "encoder_sequence"

_PAST_LENGTH, _LENGTH = 5, 3  # of the example: distinct from each other and from the length of the encoder

Pairs = Sequence[Mapping[str, Mapping[str, torch.Tensor]]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of what an encoder-decoder model hands from call to call, from one call of it.

    Attributes:
        encoder: example inputs of the encoder.
        hidden: what it returns for them, ``(batch, encoder_sequence, hidden)``.
        masked: whether the decoder takes the mask of the encoder's inputs.
        own: the layers of the decoder's self-attention.
        cross: those of its attention over the encoder.
    """

    encoder: ExampleInputs
    hidden: torch.Tensor
    masked: bool
    own: Sequence[CacheLayer]
    cross: Sequence[CacheLayer]

    @property
    def hidden_axes(self) -> tuple[str | None, ...]:
        """Axes of what the encoder returns: without a mask its length is fixed."""
        return (BATCH_AXIS, ENCODER_AXIS if self.masked else None, None)

    def inputs(
        self, model: nn.Module, more: Mapping[str, Any], axes: Mapping[str, tuple[str | None, ...]]
    ) -> ExampleInputs:
        """Return example inputs of a step of the decoder."""
        generator = torch.Generator().manual_seed(1)
        device = self.hidden.device
        kwargs: dict[str, Any] = {"input_ids": random_tokens(model, _LENGTH, generator).to(device)}
        named: dict[str, tuple[str | None, ...]] = {"input_ids": (BATCH_AXIS, SEQUENCE_AXIS)}
        if self.masked:
            kwargs["encoder_attention_mask"] = torch.ones(self.hidden.shape[:2], dtype=torch.int64, device=device)
            named["encoder_attention_mask"] = (BATCH_AXIS, ENCODER_AXIS)
        return ExampleInputs(kwargs={**kwargs, **more}, axes={**named, **axes})


def is_encoder_decoder(model: nn.Module) -> bool:
    """Tell whether a model of transformers has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def sizes_of(model: nn.Module) -> Sizes:
    """Return the sizes of an encoder-decoder model.

    Raises:
        TraceError: it has no encoder of tokens or sounds beside a decoder of tokens, or keeps a cache of another kind.
    """
    name, main = type(model).__name__, str(getattr(model, "main_input_name", ""))
    check_positions(model)
    parameters = inspect.signature(type(model).forward).parameters
    beside = {"input_ids": ("attention_mask",), "input_features": ()}.get(main)
    try:
        made = example_inputs(model, None)
    except TraceError:  # which asks for example_inputs
        beside = None
    if beside is None or not {"decoder_input_ids", "encoder_outputs"} <= set(parameters):
        raise TraceError(
            f"{with_cache()}: {name} has no encoder of tokens, or of sounds as Whisper's, beside a decoder of tokens. {instead()}"
        )
    kept = {key: value for key, value in made.kwargs.items() if key in (main, *beside)}
    axes = {key: _encoder_axes(made.axes.get(key, ()), kept[key]) for key in kept}
    generator = torch.Generator().manual_seed(0)
    ids = random_tokens(model, _LENGTH, generator).to(kept[main].device)
    try:
        with torch.no_grad():
            found: Any = model(**kept, decoder_input_ids=ids, use_cache=True)
        check_logits(model, found)
        hidden, cache = found.encoder_last_hidden_state, getattr(found, CACHE)
    except (TypeError, AttributeError, ValueError) as error:
        raise TraceError(f"{with_cache()}: {name} returns no cache ({error}). {instead()}") from error
    if "attention_mask" not in beside and _reads_mask(model, kept[main], ids, found.logits):
        raise TraceError(
            f"{with_cache()}: the encoder of {name} reads an attention_mask beside {main}, which the graphs of sounds do not take. {instead()}"
        )
    if type(cache) is not EncoderDecoderCache:
        raise TraceError(
            f"{with_cache()}: {name} keeps a cache of another kind ({type(cache).__name__}), and graphs have keys and values over the decoder "
            f"and the encoder. {instead()}"
        )
    own, cross = layers_of(model, cache.self_attention_cache), layers_of(model, cache.cross_attention_cache)
    over: list[Any] = list(cache.cross_attention_cache.layers)
    lengths = {layer.keys.size(2) for layer in over}
    if len(own) != len(cross) or lengths != {hidden.size(1)}:
        raise TraceError(
            f"{with_cache()}: the decoder of {name} keeps keys and values over other positions than those that its encoder returns. "
            f"{instead()}"
        )
    return Sizes(ExampleInputs(kwargs=kept, axes=axes), hidden, "attention_mask" in kept, own, cross)


def _reads_mask(model: nn.Module, sounds: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor) -> bool:
    """Tell whether a mask over sounds, ``(batch, frames, features)`` or ``(batch, features, frames)``, changes what a model computes."""
    if logits.is_meta:
        return False
    for length in sounds.shape[1:]:
        mask = torch.ones(sounds.size(0), length, dtype=torch.int64, device=sounds.device)
        mask[:, length // 2 :] = 0
        try:
            with torch.no_grad():
                masked: Any = model(sounds, attention_mask=mask, decoder_input_ids=ids)
        except (TypeError, ValueError, IndexError, RuntimeError):  # a mask over the other dimension
            continue
        if not torch.equal(masked.logits, logits):
            return True
    return False


def _encoder_axes(axes: Sequence[str | None], value: torch.Tensor) -> tuple[str | None, ...]:
    if value.is_floating_point():  # of sounds: as many frames as the positions of the encoder
        return (BATCH_AXIS, *[None] * (value.dim() - 1))
    return tuple(ENCODER_AXIS if axis == SEQUENCE_AXIS else axis for axis in axes)


class EncoderCall:
    """The call of the encoder. It passes its layers nothing but arguments."""

    forward: Callable[..., Any]

    def __init__(self, model: nn.Module, sizes: Sizes) -> None:
        self.inputs = sizes.encoder
        self._encoder: Any = model.get_encoder()  # type: ignore[operator]
        self.forward = (
            self._of_sounds
            if "input_features" in sizes.encoder.kwargs
            else self._masked
            if sizes.masked
            else self._unmasked
        )

    def begin(self, _path: str) -> list[torch.Tensor]:
        """Return nothing."""
        return []

    def end(self) -> list[torch.Tensor]:
        """Return nothing."""
        return []

    def replace(self, _path: str, _returned: Sequence[torch.Tensor]) -> None:
        """Change nothing."""

    def _of_sounds(self, input_features: Any) -> dict[str, Any]:
        return {"last_hidden_state": self._encoder(input_features).last_hidden_state}

    def _masked(self, input_ids: Any, attention_mask: Any) -> dict[str, Any]:
        found = self._encoder(input_ids=input_ids, attention_mask=attention_mask)
        return {"last_hidden_state": found.last_hidden_state}

    def _unmasked(self, input_ids: Any) -> dict[str, Any]:
        return {"last_hidden_state": self._encoder(input_ids=input_ids).last_hidden_state}


class _StepCall:
    """A call of the decoder, with a cache over itself and one over the encoder."""

    forward: Callable[..., Any]

    def __init__(self, model: nn.Module, inputs: ExampleInputs) -> None:
        self.inputs = inputs
        self._original = model.forward
        self._name = cache_name(model.forward) or CACHE
        self._cache = BothCaches(TensorCache(()), TensorCache(()), from_encoder=False)

    def begin(self, path: str) -> list[torch.Tensor]:
        """Return past keys and values of a layer, over the decoder and over the encoder."""
        return [tensor for cache in self._cache.both for tensor in cache.begin(number(path))]

    def end(self) -> list[torch.Tensor]:
        """Return its present keys and values, over the decoder and (in a first step) over the encoder."""
        return [tensor for cache in self._cache.both for tensor in cache.end()]

    def replace(self, path: str, returned: Sequence[torch.Tensor]) -> None:
        """Take these for the present keys and values of a layer."""
        for cache, pair in zip(self._cache.both, (returned[:2], returned[2:]), strict=True):
            cache.replace(number(path), pair)

    def _step(self, ids: Any, mask: Any, hidden: torch.Tensor) -> torch.Tensor:
        given: dict[str, Any] = (
            {self._name: self._cache} if mask is None else {self._name: self._cache, "attention_mask": mask}
        )
        encoded = BaseModelOutput(last_hidden_state=hidden)
        found = self._original(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=True, **given)
        return found.logits  # type: ignore[no-any-return]


class FirstCall(_StepCall):
    """The first step of the decoder, which computes keys and values over the encoder."""

    def __init__(self, model: nn.Module, sizes: Sizes) -> None:
        hidden = "encoder_hidden_states"
        super().__init__(model, sizes.inputs(model, {hidden: sizes.hidden.clone()}, {hidden: sizes.hidden_axes}))
        self._layers = len(sizes.own)
        self.forward = self._masked if sizes.masked else self._unmasked

    def _masked(self, input_ids: Any, encoder_attention_mask: Any, encoder_hidden_states: Any) -> dict[str, Any]:
        _check_sizes(input_ids, encoder_attention_mask, encoder_hidden_states)
        return self._call(input_ids, encoder_attention_mask, encoder_hidden_states)

    def _unmasked(self, input_ids: Any, encoder_hidden_states: Any) -> dict[str, Any]:
        return self._call(input_ids, None, encoder_hidden_states)

    def _call(self, ids: Any, mask: Any, hidden: Any) -> dict[str, Any]:
        empty = [None] * self._layers
        self._cache = BothCaches(TensorCache(empty), TensorCache(empty), from_encoder=False)
        logits = self._step(ids, mask, hidden)
        own, cross = (cache.present() for cache in self._cache.both)
        pairs = zip(own, cross, strict=True)
        return {"logits": logits, PRESENT: [{"decoder": decoder, "encoder": encoder} for decoder, encoder in pairs]}


class LaterCall(_StepCall):
    """A later step of the decoder, which takes the keys and values over the encoder."""

    def __init__(self, model: nn.Module, sizes: Sizes) -> None:
        generator = torch.Generator().manual_seed(2)

        def pair(layer: CacheLayer, length: int) -> dict[str, torch.Tensor]:
            zeros = layer.tensors(BATCH, length, sizes.hidden.device)
            return {key: torch.randn(value.shape, generator=generator).to(value) for key, value in zeros.items()}

        past: list[Any] = []
        axes: dict[str, tuple[str | None, ...]] = {}
        for index, (own, cross) in enumerate(zip(sizes.own, sizes.cross, strict=True)):
            past.append({"decoder": pair(own, _PAST_LENGTH), "encoder": pair(cross, sizes.hidden.size(1))})
            for of, axis in (("decoder", PAST_AXIS), ("encoder", sizes.hidden_axes[1])):
                axes |= {f"{PAST}_{index}_{of}_{key}": (BATCH_AXIS, None, axis, None) for key in ("key", "value")}
        super().__init__(model, sizes.inputs(model, {PAST: past}, axes))
        self._width = sizes.hidden.size(2)
        self.forward = self._masked if sizes.masked else self._unmasked

    def _masked(self, input_ids: Any, encoder_attention_mask: Any, past_key_values: Pairs) -> dict[str, Any]:
        return self._call(input_ids, encoder_attention_mask, past_key_values)

    def _unmasked(self, input_ids: Any, past_key_values: Pairs) -> dict[str, Any]:
        return self._call(input_ids, None, past_key_values)

    def _call(self, ids: Any, mask: Any, past: Pairs) -> dict[str, Any]:
        key = past[0]["encoder"]["key"]
        _check_sizes(ids, mask, key.transpose(1, 2))
        for of in ("decoder", "encoder"):
            tensors = [tensor for layer in past for tensor in layer[of].values()]
            if any(each.size(0) != ids.size(0) or each.size(2) != past[0][of]["key"].size(2) for each in tensors):
                raise ValueError(f"the past of all layers over the {of} has one batch and length")
        own, cross = ([layer[of] for layer in past] for of in ("decoder", "encoder"))
        self._cache = BothCaches(TensorCache(own), TensorCache(cross), from_encoder=True)
        unread = key.new_zeros((key.size(0), key.size(2), self._width))  # the model asks for its size alone
        logits = self._step(ids, mask, unread)
        return {"logits": logits, PRESENT: [{"decoder": pair} for pair in self._cache.both[0].present()]}


CALLS: Mapping[str, Callable[[nn.Module, Sizes], CachedCall]] = {
    "encoder": EncoderCall,
    "first": FirstCall,
    "later": LaterCall,
}
"""The call that each of the graphs is traced from."""


def _check_sizes(ids: torch.Tensor, mask: torch.Tensor | None, encoded: torch.Tensor) -> None:
    """Compare sizes in Python, by which a trace knows from the start which ones are equal."""
    if ids.size(0) != encoded.size(0) or (mask is not None and mask.shape != encoded.shape[:2]):
        raise ValueError(
            "expected the batch of input_ids, and the batch and length of encoder_attention_mask, in all that is encoded"
        )


class BothCaches(EncoderDecoderCache):
    """The two caches of a decoder. Whether that over the encoder is there is a constant, and no question by the number of a layer."""

    def __init__(self, own: TensorCache, cross: TensorCache, *, from_encoder: bool) -> None:
        super().__init__(own, cross)
        self.is_updated: Any = _OneValue(from_encoder)
        self.both = own, cross


class _OneValue:
    """A mapping with one value for all keys, whatever is put there."""

    def __init__(self, value: bool) -> None:
        self._value = value

    def get(self, _key: Any) -> bool:
        return self._value

    def __setitem__(self, _key: Any, _value: Any) -> None:
        pass
