"""Forward of a causal language model as a function of tensors, its key-value cache among them.

A trace sees tensors, no cache objects. So for the length of a trace the model's ``forward`` takes the keys and values of all
layers and returns those with the new positions added. It is the model's own method that computes: names of modules, and with them
rules and adapters, stay as they are.

One graph serves the prompt (no past) and every further token, since the length of the past is read off the tensors, and is never a
question to Python. Layers with a sliding window grow too: the mask does the window.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lora_fx.errors import TraceError, listed
from lora_fx.graph.cached_graphs import PAST, PRESENT, CacheLayer
from lora_fx.graph.example_sizes import SUM
from lora_fx.tracing.example_inputs import BATCH, ExampleInputs, random_tokens

BATCH_AXIS, SEQUENCE_AXIS, PAST_AXIS = "batch", "sequence", "past_sequence"

_PAST_LENGTH, _LENGTH = 5, 3  # of the example: distinct from each other, the batch and their sum


class _GrowingLayer(DynamicLayer):
    """A layer of a cache that holds its past from the start.

    transformers asks a layer by Python whether it is empty; this one has a length, 0 or more, by the size of its keys.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: torch.Tensor = keys
        self.values: torch.Tensor = values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def get_seq_length(self) -> int:
        return self.keys.shape[-2]


class _State:
    """What changes in a cache during a call: it has no ``__dict__``, so that layers that are given the cache are given equal things.

    Attributes:
        layer: that computes now, where its own number is not to be asked.
        present: keys and values of layers that were computed so.
    """

    __slots__ = ("layer", "present")

    def __init__(self) -> None:
        self.layer: int | None = None
        self.present: dict[int, Sequence[torch.Tensor]] = {}


class _TensorCache(DynamicCache):
    """A cache over given keys and values."""

    def __init__(self, past: Sequence[Mapping[str, torch.Tensor]]) -> None:
        super().__init__()
        self.layers: list[Any] = [_GrowingLayer(layer["key"], layer["value"]) for layer in past]
        self.state = _State()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.state.layer is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        past = self.layers[self.state.layer]
        keys, values = torch.cat([past.keys, key_states], -2), torch.cat([past.values, value_states], -2)
        self.state.present[self.state.layer] = keys, values
        return keys, values

    def present(self) -> list[dict[str, torch.Tensor]]:
        """Return the keys and values of all layers."""
        pairs = ((layer.keys, layer.values) for layer in self.layers)
        return [
            dict(zip(("key", "value"), self.state.present.get(index, pair), strict=True))
            for index, pair in enumerate(pairs)
        ]


class CachedCall:
    """``model.forward`` with a cache of tensors, and what its layers take from the cache and put there.

    It is ``Carried`` of :mod:`lora_fx.tracing.repeated_layers.stubs`. A layer's number is its place in its ``ModuleList``.

    Attributes:
        inputs: examples.
        forward: in the place of the model's own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.inputs = _inputs(model, cache_layers(model))
        self._original = model.forward
        self._cache = _TensorCache(())
        self.forward = self._with_positions if _takes_positions(model) else self._without_positions

    def begin(self, path: str) -> list[torch.Tensor]:
        """Return past keys and values of a layer."""
        self._cache.state.layer = _number(path)
        layer = self._cache.layers[_number(path)]
        return [layer.keys, layer.values]

    def end(self) -> list[torch.Tensor]:
        """Return its present keys and values; nothing if it keeps none."""
        state = self._cache.state
        assert state.layer is not None
        found = list(state.present.get(state.layer, ()))
        state.layer = None
        return found

    def replace(self, path: str, returned: Sequence[torch.Tensor]) -> None:
        """Take these for the present keys and values of a layer."""
        state = self._cache.state
        state.layer = None
        if returned:
            state.present[_number(path)] = returned

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
        self._cache = _TensorCache(past)
        logits = self._original(**inputs, past_key_values=self._cache, use_cache=True).logits
        return {"logits": logits, PRESENT: self._cache.present()}


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


def _number(path: str) -> int:
    return int(path.rpartition(".")[2])


@contextmanager
def cached_forward(model: nn.Module) -> Iterator[CachedCall]:
    """Let ``model.forward`` take and return the cache as tensors inside the block; yield the call.

    Its arguments are ``input_ids (batch, sequence)``, ``attention_mask (batch, past_sequence + sequence)``, ``position_ids
    (batch, sequence)`` where the model takes those, and ``past_key_values``, a ``{"key", "value"}`` for each layer. It returns
    ``{"logits", "present"}``.

    Raises:
        TraceError: the model is no causal language model, or has a cache of another kind.
    """
    call = CachedCall(model)
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
    _check_positions(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or "input_ids" not in _parameters(model):
        raise TraceError(
            f"cache=True: {name} is not a causal language model of transformers. Trace it without a cache."
        )
    ids = torch.ones(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            cache: Any = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    except (TypeError, AttributeError) as error:
        raise TraceError(f"cache=True: {name} returns no cache ({error}). Trace it without.") from error
    if cache is None:
        raise TraceError(f"cache=True: {name} returns no cache. Trace it without.")
    layers: list[Any] = list(getattr(cache, "layers", ()))
    kinds = {type(layer).__name__: type(layer) for layer in layers}
    other = [kind for kind, each in kinds.items() if each not in (DynamicLayer, DynamicSlidingWindowLayer)]
    if type(cache) is not DynamicCache or not kinds or other:
        found = listed(other, 3) or type(cache).__name__
        raise TraceError(
            f"cache=True: {name} keeps a cache of another kind ({found}), and a graph has keys and values of all positions. Trace it "
            "without a cache."
        )
    return [
        CacheLayer(layer.keys.size(1), layer.keys.size(3), layer.values.size(3), layer.keys.dtype) for layer in layers
    ]


def _check_positions(model: nn.Module) -> None:
    """Refuse positions whose frequencies the model chooses anew in Python, by the length."""
    config = getattr(model, "config", None)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, Mapping)}
    chosen = [kind for kind in ("dynamic", "longrope") if kind in kinds]
    if chosen:
        raise TraceError(
            f"cache=True: {type(model).__name__} has rope_type={chosen[0]!r}, whose frequencies the model chooses by the length of the "
            "text: the keys of a cache would have been made by others. Generate with the model itself, its weights folded: "
            "lora_fx.huggingface.folded."
        )


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(model).forward).parameters


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in _parameters(model)
