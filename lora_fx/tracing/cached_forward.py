"""Forward of a causal language model as a function of tensors, its key-value cache among them.

A trace sees tensors, no cache objects. So for the length of a trace the model's ``forward`` takes the keys and values of all
layers and returns those with the new positions added. It is the model's own method that computes: names of modules, and with them
rules and adapters, stay as they are.

One graph serves the prompt (no past) and every further token, since the length of the past is read off the tensors, and is never a
question to Python. Layers with a sliding window grow too: the mask does the window.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lora_fx.errors import TraceError, listed, option
from lora_fx.graph.cached_graphs import PAST, PRESENT, CacheLayer
from lora_fx.graph.example_sizes import SUM
from lora_fx.graph.prefix_slot import PrefixSlot
from lora_fx.tracing.example_inputs import ExampleInputs
from lora_fx.tracing.input_kinds import BATCH, random_tokens
from lora_fx.tracing.repeated_layers.stubs import Carried
from lora_fx.transformers_releases import CACHE, cache_name

BATCH_AXIS, SEQUENCE_AXIS, PAST_AXIS = "batch", "sequence", "past_sequence"


def with_cache() -> str:
    """Return how messages name what was asked for."""
    return option("cache=True", "--with-cache")


def instead() -> str:
    """Return the way that works where a graph has no cache."""
    folded = "Trace it without a cache, and generate with the model and folded weights: lora_fx.huggingface.folded(model, graph)."
    return option(folded, "Export it without a cache, or generate from a folded checkpoint: lora-fx fold.")


_PAST_LENGTH, _LENGTH = 5, 3  # of the example: distinct from each other, the batch and their sum


class GrowingLayer(DynamicLayer):
    """A layer of a cache that holds its past from the start, or is told that it has none.

    transformers asks a layer by Python whether it is empty; this one has a length, 0 or more, by the size of its keys.
    """

    def __init__(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Return the number of positions."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep new positions, and return all."""
        self.keys, self.values = self.extended(key_states, value_states)
        return self.keys, self.values

    def extended(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the past with new positions behind it."""
        if self.keys is None or self.values is None:
            return keys, values
        return torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)


class CallState:
    """State of a cache during a call: it has no ``__dict__``, so that layers that are given the cache are given equal things.

    Attributes:
        layer: that computes now, where its own number is not to be asked.
        present: keys and values of layers that were computed so.
    """

    __slots__ = ("layer", "present")

    def __init__(self) -> None:
        self.layer: int | None = None
        self.present: dict[int, Sequence[torch.Tensor]] = {}


class _Layers(list[Any]):
    """The layers of a cache, of which the one that computes now is found by any number."""

    def __init__(self, layers: Iterable[Any], state: CallState) -> None:
        super().__init__(layers)
        self._state = state

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index if self._state.layer is None else self._state.layer)


class TensorCache(DynamicCache):
    """A cache over given keys and values; ``None`` for a layer without a past."""

    def __init__(self, past: Sequence[Mapping[str, torch.Tensor] | None]) -> None:
        super().__init__()
        self.state = CallState()
        layers = (GrowingLayer() if layer is None else GrowingLayer(layer["key"], layer["value"]) for layer in past)
        self.layers: list[Any] = _Layers(layers, self.state)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions of a layer."""
        return self.layers[layer_idx].get_seq_length()  # type: ignore[no-any-return]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep new positions of a layer, and return all."""
        layer: GrowingLayer = self.layers[layer_idx]
        if self.state.layer is None:
            return layer.update(key_states, value_states)
        self.state.present[self.state.layer] = found = layer.extended(key_states, value_states)
        return found

    def present(self) -> list[dict[str, torch.Tensor]]:
        """Return the keys and values of all layers."""
        pairs = ((layer.keys, layer.values) for layer in self.layers)
        return [
            dict(zip(("key", "value"), self.state.present.get(index, pair), strict=True))
            for index, pair in enumerate(pairs)
        ]

    def begin(self, layer: int) -> list[torch.Tensor]:
        """Return past keys and values of a layer, which is the one that computes until :meth:`end`."""
        self.state.layer = layer
        past: GrowingLayer = self.layers[layer]
        return [] if past.keys is None or past.values is None else [past.keys, past.values]

    def end(self) -> list[torch.Tensor]:
        """Return its present keys and values; nothing if it keeps none."""
        layer, self.state.layer = self.state.layer, None
        assert layer is not None
        return list(self.state.present.get(layer, ()))

    def replace(self, layer: int, returned: Sequence[torch.Tensor]) -> None:
        """Take these for the present keys and values of a layer."""
        self.state.layer = None
        if returned:
            self.state.present[layer] = returned


class CachedCall(Carried, Protocol):
    """A call with a cache of tensors that takes the place of ``model.forward``, and what layers take from the cache and put there."""

    inputs: ExampleInputs
    forward: Callable[..., Any]


class CausalCall:
    """The :class:`CachedCall` of a causal language model. A layer's number is its place in its ``ModuleList``."""

    forward: Callable[..., Any]

    def __init__(self, model: nn.Module) -> None:
        layers = cache_layers(model)
        self.inputs, self.slot = _inputs(model, layers), _slot(layers)
        self._original = model.forward
        self._name = cache_name(model.forward) or CACHE
        self._cache = TensorCache(())
        self.forward = self._with_positions if _takes_positions(model) else self._without_positions

    def begin(self, path: str) -> list[torch.Tensor]:
        """Return past keys and values of a layer."""
        return self._cache.begin(number(path))

    def end(self) -> list[torch.Tensor]:
        """Return its present keys and values."""
        return self._cache.end()

    def replace(self, path: str, returned: Sequence[torch.Tensor]) -> None:
        """Take these for the present keys and values of a layer."""
        self._cache.replace(number(path), returned)

    def _with_positions(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, past_key_values: Any
    ) -> dict[str, Any]:
        return self._call(
            past_key_values, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
        )

    def _without_positions(self, input_ids: Any, attention_mask: Any, past_key_values: Any) -> dict[str, Any]:
        return self._call(past_key_values, input_ids=input_ids, attention_mask=attention_mask)

    def _call(self, past: Sequence[Mapping[str, torch.Tensor]], **inputs: torch.Tensor) -> dict[str, Any]:
        _check_lengths(past, inputs)
        self._cache = TensorCache(past)
        logits = self._original(**inputs, **{self._name: self._cache}, use_cache=True).logits
        return {"logits": logits, PRESENT: self._cache.present()}


def _slot(layers: Sequence[CacheLayer]) -> PrefixSlot | None:
    """Return the sizes of a prefix, which is the past of a first call; None where keys and values have several sizes."""
    first = layers[0]
    if first.key_size != first.value_size or any(layer != first for layer in layers):
        return None
    return PrefixSlot(len(layers), first.heads, first.key_size, first.dtype, len(layers), past=True)


def _check_lengths(past: Sequence[Mapping[str, torch.Tensor]], inputs: Mapping[str, torch.Tensor]) -> None:
    """Compare sizes in Python, by which a trace knows from the start which ones are equal, and all layers are given equal sizes."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    batch, length = ids.size(0), past[0]["key"].size(2)
    tensors = [tensor for layer in past for tensor in layer.values()]
    if any(tensor.size(0) != batch or tensor.size(2) != length for tensor in tensors) or (
        mask.size(1) != length + ids.size(1)
    ):
        raise ValueError(
            "the past of all layers has one batch and length, and the mask that length and the one of input_ids"
        )


def number(path: str) -> int:
    """Return the number of a layer by its path."""
    return int(path.rpartition(".")[2])


@contextmanager
def replaced_forward(model: nn.Module, call: CachedCall) -> Iterator[CachedCall]:
    """Let ``model.forward`` be a call with a cache inside the block; yield the call."""
    own = vars(model).get("forward")
    model.forward = call.forward
    try:
        yield call
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def _inputs(model: nn.Module, layers: Sequence[CacheLayer]) -> ExampleInputs:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def past(layer: CacheLayer, size: int) -> torch.Tensor:
        values = torch.randn(BATCH, layer.heads, _PAST_LENGTH, size, generator=generator)
        return values.to(device, layer.dtype)

    inputs: dict[str, Any] = {
        "input_ids": random_tokens(model, _LENGTH, generator).to(device),
        "attention_mask": torch.ones(BATCH, _PAST_LENGTH + _LENGTH, dtype=torch.int64, device=device),
    }
    axes: dict[str, tuple[str | None, ...]] = {
        "input_ids": (BATCH_AXIS, SEQUENCE_AXIS),
        "attention_mask": (BATCH_AXIS, f"{PAST_AXIS}{SUM}{SEQUENCE_AXIS}"),
    }
    if _takes_positions(model):
        inputs["position_ids"] = torch.arange(_PAST_LENGTH, _PAST_LENGTH + _LENGTH, device=device).repeat(BATCH, 1)
        axes["position_ids"] = (BATCH_AXIS, SEQUENCE_AXIS)
    inputs[PAST] = [{"key": past(layer, layer.key_size), "value": past(layer, layer.value_size)} for layer in layers]
    for index in range(len(layers)):
        axes |= dict.fromkeys((f"{PAST}_{index}_key", f"{PAST}_{index}_value"), (BATCH_AXIS, None, PAST_AXIS, None))
    return ExampleInputs(kwargs=inputs, axes=axes)


def cache_layers(model: nn.Module) -> list[CacheLayer]:
    """Return the sizes of a model's cache, from one call with two tokens.

    Raises:
        TraceError: the model is no causal language model, or keeps something else than keys and values of all positions.
    """
    name = type(model).__name__
    check_positions(model)
    if "input_ids" not in _parameters(model):
        raise TraceError(f"{with_cache()}: {name} is not a causal language model of transformers. {instead()}")
    ids = torch.ones(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            found: Any = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        cache = getattr(found, CACHE)
    except (TypeError, AttributeError, ValueError) as error:
        raise TraceError(f"{with_cache()}: {name} returns no cache ({error}). {instead()}") from error
    check_logits(model, found)
    if cache is None:
        raise TraceError(f"{with_cache()}: {name} returns no cache. {instead()}")
    return layers_of(model, cache)


def check_logits(model: nn.Module, outputs: Any) -> None:
    """Raise :class:`TraceError` for a model without a head."""
    if getattr(outputs, "logits", None) is None:
        raise TraceError(
            f"{with_cache()}: {type(model).__name__} returns no logits to generate from. Trace the model with its head, or this one without a "
            "cache."
        )


def layers_of(model: nn.Module, cache: Any) -> list[CacheLayer]:
    """Return the sizes of a cache that a model returned.

    Raises:
        TraceError: it keeps something else than keys and values of all positions.
    """
    layers: list[Any] = list(getattr(cache, "layers", ()))
    kinds = {type(layer).__name__: type(layer) for layer in layers}
    other = [kind for kind, each in kinds.items() if each not in (DynamicLayer, DynamicSlidingWindowLayer)]
    if type(cache) is not DynamicCache or not kinds or other:
        found = listed(other, 3) or type(cache).__name__
        raise TraceError(
            f"{with_cache()}: {type(model).__name__} keeps a cache of another kind ({found}), and a graph has keys and values of all "
            f"positions. {instead()}"
        )
    if not all(layer.is_initialized for layer in layers):
        raise TraceError(
            f"{with_cache()}: {type(model).__name__} leaves layers of its cache empty in a call. {instead()}"
        )
    return [
        CacheLayer(layer.keys.size(1), layer.keys.size(3), layer.values.size(3), layer.keys.dtype) for layer in layers
    ]


def check_positions(model: nn.Module) -> None:
    """Refuse positions whose frequencies the model chooses anew in Python, by the length."""
    config = getattr(model, "config", None)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, Mapping)}
    chosen = [kind for kind in ("dynamic", "longrope") if kind in kinds]
    if chosen:
        raise TraceError(
            f"{with_cache()}: {type(model).__name__} has rope_type={chosen[0]!r}, whose frequencies the model chooses by the length of the "
            f"text: the keys of a cache would have been made by others. {instead()}"
        )


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(model).forward).parameters


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in _parameters(model)
