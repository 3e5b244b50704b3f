"""Forward of a transformers model as a function of its inputs and a prefix: learned keys and values in front of those of all attentions.

A prefix is a past (so PEFT computes it, too): the model is called with a cache that holds it, and its own code extends masks, shifts
positions, and lays sliding windows and position biases over both. So a graph computes what PEFT computes, for every model that takes a
past, and no attention has to be known; inserted nodes would have to guess all this for each of them. Encoders are called with a past too where their
attention takes one (BERT). The prefix is an input of the trace, of any length, and then becomes a slot of the graph: see
:mod:`lora_fx.graph.prefix_slot`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from lora_fx.errors import TraceError, first_line
from lora_fx.graph.example_sizes import Examples
from lora_fx.graph.info import GraphInfo
from lora_fx.graph.prefix_slot import AXIS, EMPTY, INPUT, PrefixSlot
from lora_fx.graph.state import State
from lora_fx.tracing.cached_encoder_decoder import BothCaches, is_encoder_decoder
from lora_fx.tracing.cached_forward import CachedCall, TensorCache, number
from lora_fx.tracing.example_inputs import ExampleInputs, is_pretrained
from lora_fx.transformers_releases import CACHE, CACHE_NAMES, cache_name, without_cache

_TOKENS = 7  # of the example: distinct from its batch and lengths


class _Recorder(DynamicCache):
    """An empty cache that keeps nothing, and remembers the keys and values that each layer offers it."""

    def __init__(self) -> None:
        super().__init__()
        self.offered: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Remember keys and values, and return them."""
        self.offered[layer_idx] = key_states, value_states
        return key_states, value_states


class PrefixedCall:
    """A call of a model with a prefix, in the place of ``model.forward``: a :class:`CachedCall` whose cache is no output.

    Attributes:
        inputs: of the trace, the prefix among them.
        slot: sizes of the prefix.
    """

    forward: Callable[..., Any]

    def __init__(self, model: nn.Module, inputs: ExampleInputs) -> None:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise TraceError(
                "prefix=True: expected a model with weights, got one on the meta device. Load its weights first."
            )
        self._original = model.forward
        self._parameters = inspect.signature(model.forward).parameters
        self._holder = self._taking(model)
        self._name = cache_name((self._holder or model).forward) or CACHE
        self._decodes = is_encoder_decoder(model)
        self._layers = _layers_path(model) if self._decodes else ""
        # Without a mask, attentions that look both ways make one of the text's length, when they are traced.
        self._masks = not self._decodes and any(getattr(each, "is_causal", None) is False for each in model.modules())
        self._cache: TensorCache | BothCaches = TensorCache(())
        given = {**dict(zip(self._parameters, inputs.args, strict=False)), **inputs.kwargs}
        self.slot = self._measured(model, given)
        self.inputs = self._with_prefix(replace(inputs, args=(), kwargs=given))
        self.forward = self._signed()

    def begin(self, path: str) -> list[torch.Tensor]:
        """Return the prefix of a layer, as keys and values; nothing for a layer of the encoder."""
        return [tensor for cache in self._caches(path) for tensor in cache.begin(number(path))]

    def end(self) -> list[torch.Tensor]:
        """Return nothing: what a layer keeps is not read again."""
        for cache in self._caches(self._layers):
            if cache.state.layer is not None:
                cache.end()
        return []

    def replace(self, path: str, _returned: Sequence[torch.Tensor]) -> None:
        """Take nothing."""
        for cache in self._caches(path):
            cache.replace(number(path), ())

    def _taking(self, model: nn.Module) -> nn.Module | None:
        return _taking_past(model)

    def _caches(self, path: str) -> tuple[TensorCache, ...]:
        if not path.startswith(self._layers):
            return ()
        return self._cache.both if isinstance(self._cache, BothCaches) else (self._cache,)

    def _measured(self, model: Any, given: Mapping[str, Any]) -> PrefixSlot:
        """Return the sizes of keys and values, from a call of the model with a cache that records them."""
        name, recorder = type(model).__name__, _Recorder()
        cache = EncoderDecoderCache(recorder, DynamicCache()) if self._decodes else recorder
        try:
            with torch.no_grad():
                self._called(dict(given), cache, lambda values: values)
        except (TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
            raise TraceError(
                f"prefix=True: {name} takes no keys and values before its own ({first_line(str(error), type(error).__name__)}). {_INSTEAD}"
            ) from error
        offered = recorder.offered
        if not offered:
            raise TraceError(f"prefix=True: no attention of {name} takes keys and values before its own. {_INSTEAD}")
        sizes = {(key.size(1), key.size(3), value.size(3), key.dtype) for key, value in offered.values()}
        layers = [*range(len(offered))]
        if len(sizes) > 1 or sorted(offered) != layers or any(size != also for _, size, also, _ in sizes):
            raise TraceError(
                f"prefix=True: the attentions of {name} keep keys and values of several sizes, or share them between layers, and a prefix has "
                f"one size for all layers. {_INSTEAD}"
            )
        heads, size, _, dtype = sizes.pop()
        return PrefixSlot(len(layers), heads, size, dtype, _counted(model.config, len(layers)), self._decodes)

    def _with_prefix(self, inputs: ExampleInputs) -> ExampleInputs:
        if any(inputs.kwargs.get(name) is not None for name in (INPUT, *CACHE_NAMES)):
            raise TraceError(
                f"prefix=True: expected example_inputs without {INPUT!r} and {CACHE!r}, which hold the prefix."
            )
        like = next(leaf for leaf in inputs.kwargs.values() if isinstance(leaf, torch.Tensor))
        noise = torch.randn(_TOKENS, self.slot.width, generator=torch.Generator().manual_seed(3))
        prefix = noise.to(like.device, self.slot.dtype)
        axes = {**inputs.axes, INPUT: (AXIS, None)}
        return replace(inputs, kwargs={**inputs.kwargs, INPUT: prefix}, axes=axes)

    def _signed(self) -> Callable[..., Any]:
        """Return the call with the signature of ``model.forward``, and the prefix as one more argument."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
            prefix = given.pop(INPUT, None)
            text = next(each for each in given.values() if isinstance(each, torch.Tensor))
            if prefix is None:
                prefix = text.new_empty(0, self.slot.width, dtype=self.slot.dtype)
            return self._behind(given, prefix, text.size(0))

        named = [p for p in self._parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [p for p in self._parameters.values() if p.kind is p.VAR_KEYWORD]
        own = inspect.Parameter(INPUT, inspect.Parameter.KEYWORD_ONLY, default=None)
        forward.__signature__ = inspect.Signature([*named, own, *more])  # type: ignore[attr-defined]
        return forward

    def _behind(self, given: dict[str, Any], prefix: torch.Tensor, batch: int) -> Any:
        """Call the model behind a prefix."""
        own = self._past(prefix, batch)
        empty: list[None] = [None] * len(own)
        self._cache = BothCaches(own, TensorCache(empty), from_encoder=False) if self._decodes else own
        return self._called(given, self._cache, lambda values: self._shifted(values, prefix.size(0), batch))

    def _shifted(self, given: dict[str, Any], tokens: int, batch: int) -> dict[str, Any]:
        kind = "decoder_" if self._decodes else ""
        mask, text = given.get(f"{kind}attention_mask"), given.get(f"{kind}input_ids")
        if (
            isinstance(mask, torch.Tensor)
            and isinstance(text, torch.Tensor)
            and mask.dim() == 2
            and mask.shape != text.shape
        ):
            raise ValueError(
                f"{kind}attention_mask has the sizes of the text"
            )  # compared: so a trace knows it from the start
        if mask is None and self._masks and isinstance(text, torch.Tensor):
            given = {**given, "attention_mask": torch.ones_like(text)}
        return behind_prefix(given, tokens, batch, decodes=self._decodes)

    def _past(self, prefix: torch.Tensor, batch: int) -> TensorCache:
        """Return a cache with the prefix of each layer, for every row of a batch, as PEFT lays them out."""
        slot = self.slot
        rows = prefix.view(-1, slot.layers * 2, slot.heads, slot.size).permute(1, 2, 0, 3)
        # Copies, since equal layers are traced once if they are given tensors of equal strides and offsets.
        own = [
            rows[index].clone(memory_format=torch.contiguous_format).expand(batch, -1, -1, -1)
            for index in range(2 * slot.layers)
        ]
        return TensorCache([{"key": key, "value": value} for key, value in zip(own[::2], own[1::2], strict=True)])

    def _called(self, given: dict[str, Any], cache: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
        """Call the model with a cache, given to the module that takes one, and the inputs of that changed."""
        holder, given = self._holder, without_cache(given)
        if holder is None:
            return without_past(self._original(**change({**given, self._name: cache})))
        inner: Any = holder.forward
        names = inspect.signature(inner).parameters

        def forward(*args: Any, **kwargs: Any) -> Any:
            own = without_cache({**dict(zip(names, args, strict=False)), **kwargs}) | {self._name: cache}
            return inner(**change(own))

        holder.forward = forward
        try:
            return self._original(**given)
        finally:
            del holder.forward


def without_past(output: Any) -> Any:
    """Return an output without the cache, as the model returns it when it keeps none."""
    if isinstance(output, Mapping):
        return type(output)(**without_cache(output))
    return tuple(each for each in output if not isinstance(each, Cache)) if isinstance(output, tuple) else output


_INSTEAD = "Use LoRA, which needs no past."


def returns_cache(call: CachedCall | None) -> bool:
    """Tell whether the graph of a call returns the cache."""
    return not isinstance(call, PrefixedCall | None)


def without_prefix(inputs: ExampleInputs) -> ExampleInputs:
    """Return the inputs of a trace as those of its graph, which holds the prefix itself."""
    return replace(inputs, kwargs={name: value for name, value in inputs.kwargs.items() if name != INPUT})


def with_empty_slot(state: State, info: GraphInfo, slot: PrefixSlot) -> tuple[State, GraphInfo]:
    """Return the state of a graph with the empty tensor of its slot, and its record with that of the slot."""
    like = next(iter(state.tensors.values()))
    empty = torch.empty(0, slot.width, dtype=slot.dtype, device=like.device)
    state = State({**state.tensors, EMPTY: empty}, state.non_persistent | {EMPTY}, state.modules)
    of_inputs = info.examples or Examples({})
    tensors = {name: value for name, value in of_inputs.tensors.items() if name != INPUT}
    axes = {name: value for name, value in of_inputs.axes.items() if name != INPUT}
    return state, replace(info, prefix_slot=slot, examples=Examples(tensors, axes))


def behind_prefix(given: dict[str, Any], tokens: int, batch: int, *, decodes: bool) -> dict[str, Any]:
    """Return inputs of a model with a mask that admits a prefix, and positions behind it, as PEFT has them.

    Args:
        given: by their names.
        tokens: of the prefix.
        batch: rows.
        decodes: whether the prefix is that of a decoder behind an encoder.

    Raises:
        TraceError: the mask is one for each pair of positions.
    """
    name = "decoder_attention_mask" if decodes else "attention_mask"
    mask, positions = given.get(name), given.get("position_ids")
    if isinstance(mask, torch.Tensor):
        if mask.dim() != 2:
            raise TraceError(
                f"a prefix or a prompt extends {name} of shape (batch, sequence), got {tuple(mask.shape)}."
            )
        given = {**given, name: torch.cat([mask.new_ones(batch, tokens), mask], 1)}
    if isinstance(positions, torch.Tensor):
        given = {**given, "position_ids": positions + tokens}
    return given


def _taking_past(model: Any) -> nn.Module | None:
    """Return the base model of a model with a head that takes no past; None where the model takes it itself.

    Raises:
        TraceError: neither does.
    """
    name = type(model).__name__
    if is_pretrained(model):
        if cache_name(model.forward):
            return None
        base = getattr(model, model.base_model_prefix, None)
        takes = isinstance(base, nn.Module) and cache_name(base.forward)
        if takes and not is_encoder_decoder(model):
            return base
    raise TraceError(
        f"prefix=True: {name} takes no key-value cache, and is no model of transformers whose base model does. {_INSTEAD}"
    )


def _layers_path(model: Any) -> str:
    """Return how the paths of the modules in the decoder begin."""
    decoder = model.get_decoder()
    return next(f"{path}." for path, module in model.named_modules() if module is decoder)


def _counted(config: Any, layers: int) -> int:
    """Return the number of layers that PEFT reads off a config."""
    for name in ("num_hidden_layers", "num_layers", "n_layer"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    return layers
