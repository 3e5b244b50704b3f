"""Generation with a key-value cache: transformers' own ``generate`` over graphs that were traced with one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationMixin
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from lora_fx.adapters.prefix import acting_past, keys_and_values
from lora_fx.errors import InputError
from lora_fx.graph.adapter_names import adapters
from lora_fx.graph.adapter_rows import ADAPTER_NAMES, BASE, check_count
from lora_fx.graph.adapter_states import acting
from lora_fx.graph.cached_graphs import (
    PAST,
    PRESENT,
    CachedGraphs,
    check_cache,
    empty_past,
    generation_settings,
    takes_positions,
)
from lora_fx.graph.graph_module import TracedGraphModule
from lora_fx.graph.info import info_of
from lora_fx.graph.signature import signature_of
from lora_fx.transformers_releases import CACHE, cache_in, check_cache_name, without_cache


class _RowNames:
    """The adapters of the rows of the batch that a call of ``generate`` is given; nothing where it names none."""

    def __init__(self) -> None:
        self.names: Any = None

    def take(self, names: Any, rows: Any, name: str, adapters: Sequence[str]) -> None:
        """Take the names of a call.

        Args:
            names: for each row; None for all calls that name none.
            rows: the input whose rows are meant.
            name: of that input.
            adapters: that the graph has for rows.

        Raises:
            InputError: there are more names than rows, or fewer, or no such input.
        """
        if names is not None and not isinstance(rows, torch.Tensor):
            raise InputError(f"{ADAPTER_NAMES} was given without '{name}', whose rows have these adapters. Pass it.")
        if isinstance(names, list | tuple):
            check_count(len(names), rows.size(0), name, adapters)
        self.names = names

    def of(self, value: torch.Tensor) -> dict[str, Any]:
        """Return them for a value whose rows are beams, or several sequences, of the rows of that batch."""
        if not isinstance(self.names, list | tuple):  # none, or what the graph refuses
            return {} if self.names is None else {ADAPTER_NAMES: self.names}
        repeats = value.size(0) // max(1, len(self.names))
        return {ADAPTER_NAMES: [name for name in self.names for _ in range(repeats)]}


class Generator(nn.Module, GenerationMixin):
    """Graphs with a cache as transformers' ``generate`` drives a model: greedy, sampling, beams.

    It holds no tensors of its own: what is trained in a graph counts in the next call.

    Attributes:
        config: of the model that was traced.
        generation_config: defaults of ``generate``.
    """

    main_input_name = "input_ids"
    input_modalities = ("text",)
    base_model_prefix = ""
    _is_stateful = False

    def __init__(self, graphs: Sequence[TracedGraphModule]) -> None:
        super().__init__()
        self._graphs = tuple(graphs)
        self.config = graphs[0].config
        self.generation_config = generation_settings(graphs[0])
        self._rows = _RowNames()

    @property
    def device(self) -> torch.device:
        """Where the graphs' tensors are."""
        return self._graphs[0].device

    def can_generate(self) -> bool:
        """Tell transformers that it may."""
        return True

    def is_remote_code(self) -> bool:
        """Tell transformers that the code of this class is not from a hub."""
        return False

    def get_experts_implementation(self) -> None:
        """Tell transformers that there is no kernel of experts to exchange while it decodes."""

    def empty_cache(self) -> Cache:
        """Return a cache without a past, all of whose layers grow: the graphs' masks do windows."""
        return DynamicCache()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers' ``GenerationMixin.generate`` does, with a cache that grows; without gradients.

        Whether the settings say ``use_cache`` is of no matter: a graph with a cache has no other way. Graphs of
        :func:`~lora_fx.activate_by_row` take ``adapter_names``, a name for each row that is given; beams of a row have its adapter.

        Raises:
            InputError: attentions or hidden states are asked for, a cache is given that does not keep all positions, or this transformers
                passes it by a name that is not known.
        """
        check_cache_name()
        for asked in ("output_attentions", "output_hidden_states"):
            if kwargs.get(asked) or getattr(kwargs.get("generation_config", self.generation_config), asked, False):
                raise InputError(
                    f"{asked} was asked for, and a graph returns its logits and cache alone. Ask the model itself."
                )
        names = kwargs.pop(ADAPTER_NAMES, None)
        cache = self.empty_cache() if (given_cache := cache_in(kwargs)) is None else given_cache
        _check_grows(cache)
        kwargs = {**without_cache(kwargs), CACHE: cache}
        # With use_cache=False, transformers gives all tokens at every step, which the graph would take for new ones behind its past.
        kwargs |= {"use_cache": True, "cache_implementation": None}
        modes = {module: module.training for graph in self._graphs for module in graph.modules()}
        given = next((kwargs[key] for key in ("inputs", self.main_input_name) if kwargs.get(key) is not None), None)
        first = self._graphs[0]
        by_row = info_of(first).by_row
        self._rows.take(names, args[0] if args else given, self.main_input_name, by_row or adapters(first))
        if not by_row and not acting(first) and isinstance(names, list | tuple) and {*names} == {BASE}:
            self._rows.names = None  # all rows have the base anyway
        try:
            for graph in self._graphs:
                graph.eval()
            model: Any = self  # with what generate needs of a PreTrainedModel
            return GenerationMixin.generate(model, *args, **kwargs)
        finally:
            self._rows.names = None
            for module, training in modes.items():
                module.training = training


class CausalGenerator(Generator):
    """A :class:`Generator` over the graph of a causal language model.

    Attributes:
        graph: that computes.
    """

    def __init__(self, graph: TracedGraphModule) -> None:
        super().__init__((graph,))
        self.graph = graph

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        cache: DynamicCache | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits ``(batch, sequence, vocabulary)``, and let the cache have the new positions.

        Args:
            input_ids: ``(batch, sequence)``.
            attention_mask: ``(batch, past_sequence + sequence)``; all ones by default. A prefix, with which the past begins, is not counted.
            position_ids: ``(batch, sequence)``; counted over the mask by default.
            past_key_values: a cache, changed in place.
            cache: the same, by its name from transformers 5.24 on.
        """
        past_key_values = cache if past_key_values is None else past_key_values
        cache = DynamicCache() if past_key_values is None else past_key_values
        _check_grows(cache)
        adapter = acting_past(self.graph)
        prefix = None if adapter is None else info_of(self.graph).adapters[adapter].prefix
        tokens = 0 if prefix is None else prefix.tokens
        past = _pairs(cache) if cache.get_seq_length() else self._first_past(adapter, input_ids.size(0))
        length = past[0]["key"].size(2) + input_ids.size(1) - tokens
        mask = attention_mask if attention_mask is not None else input_ids.new_ones(input_ids.size(0), length)
        whole = torch.cat([mask.new_ones(mask.size(0), tokens), mask], 1) if tokens else mask
        inputs = {"input_ids": input_ids, "attention_mask": whole, PAST: past}
        if takes_positions(self.graph):
            counted = (mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.size(1) :]
            inputs["position_ids"] = (counted if position_ids is None else position_ids) + tokens
        outputs = self.graph(**inputs, **self._rows.of(input_ids))
        _put(cache, outputs[PRESENT])
        returned: dict[str, Any] = {CACHE: cache}
        return CausalLMOutputWithPast(logits=outputs["logits"], **returned)

    def _first_past(self, adapter: str | None, batch: int) -> list[dict[str, torch.Tensor]]:
        """Return the past before the first token, which is the prefix of an adapter if one acts."""
        if adapter is None:
            return empty_past(self.graph, batch)
        pairs = [[each.expand(batch, -1, -1, -1) for each in pair] for pair in keys_and_values(self.graph, adapter)]
        return [{"key": key, "value": value} for key, value in pairs]


class EncoderDecoderGenerator(Generator):
    """A :class:`Generator` over the graphs of a model with an encoder and a decoder.

    Attributes:
        graphs: that compute.
    """

    def __init__(self, graphs: CachedGraphs) -> None:
        super().__init__(tuple(graphs.parts.values()))
        self.graphs = graphs
        self.main_input_name = info_of(graphs.encoder).main_input
        self.encoder = _Encoder(graphs.encoder, self.main_input_name, self._rows)
        self._masked = "encoder_attention_mask" in signature_of(graphs.first.graph).inputs

    def empty_cache(self) -> Cache:
        """Return a cache without a past, over the decoder and over the encoder."""
        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def get_encoder(self) -> nn.Module:
        """Return the encoder, as ``generate`` calls it."""
        return self.encoder

    def forward(
        self,
        decoder_input_ids: torch.Tensor,
        encoder_outputs: BaseModelOutput,
        attention_mask: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        cache: EncoderDecoderCache | None = None,
        **_: Any,
    ) -> Seq2SeqLMOutput:
        """Compute logits ``(batch, sequence, vocabulary)``, and let the cache have the new positions.

        Args:
            decoder_input_ids: ``(batch, sequence)``.
            encoder_outputs: with ``last_hidden_state (batch, encoder_sequence, hidden)``.
            attention_mask: of the encoder's inputs, ``(batch, encoder_sequence)``; all ones by default.
            decoder_attention_mask: all ones, since the graphs take none.
            past_key_values: a cache, changed in place.
            cache: the same, by its name from transformers 5.24 on.

        Raises:
            InputError: positions of the decoder are masked.
        """
        if decoder_attention_mask is not None and not bool((decoder_attention_mask == 1).all()):
            raise InputError(
                "decoder_attention_mask has zeros, and the graphs of an encoder-decoder model take decoder_input_ids of one length: "
                "generate for those of each length on their own."
            )
        past_key_values = cache if past_key_values is None else past_key_values
        past: Any = self.empty_cache() if past_key_values is None else past_key_values
        _check_grows(past)
        hidden: Any = encoder_outputs.last_hidden_state
        inputs: dict[str, Any] = {"input_ids": decoder_input_ids, **self._rows.of(decoder_input_ids)}
        if self._masked:
            ones = decoder_input_ids.new_ones(hidden.shape[:2])
            inputs["encoder_attention_mask"] = ones if attention_mask is None else attention_mask
        both = {"decoder": past.self_attention_cache, "encoder": past.cross_attention_cache}
        if past.get_seq_length():
            layers = zip(*map(_pairs, both.values()), strict=True)
            outputs = self.graphs.later(**inputs, **{PAST: [dict(zip(both, pairs, strict=True)) for pairs in layers]})
        else:
            outputs = self.graphs.first(**inputs, encoder_hidden_states=hidden)
        for of in outputs[PRESENT][0]:
            _put(both[of], [layer[of] for layer in outputs[PRESENT]])
        return Seq2SeqLMOutput(logits=outputs["logits"], **{CACHE: past}, encoder_last_hidden_state=hidden)


class _Encoder(nn.Module):
    """An encoder as ``generate`` calls one: with its inputs by keyword."""

    def __init__(self, graph: TracedGraphModule, main_input_name: str, rows: _RowNames) -> None:
        super().__init__()
        self._rows = rows
        self.main_input_name = main_input_name
        self._graph = graph
        self._inputs = signature_of(graph.graph).inputs

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        mask = attention_mask if input_ids is None or attention_mask is not None else torch.ones_like(input_ids)
        given = {"input_ids": input_ids, "attention_mask": mask, "input_features": input_features}
        inputs: dict[str, Any] = {name: given[name] for name in self._inputs if name != ADAPTER_NAMES}
        return BaseModelOutput(**self._graph(**inputs, **self._rows.of(inputs[self.main_input_name])))


def _check_grows(cache: Cache) -> None:
    """Raise :class:`InputError` unless all layers of a cache keep all positions: the mask of a graph does the window of a layer."""
    parts = (
        (cache.self_attention_cache, cache.cross_attention_cache)
        if isinstance(cache, EncoderDecoderCache)
        else (cache,)
    )
    other = {
        type(layer).__name__
        for part in parts
        for layer in getattr(part, "layers", ())
        if type(layer) is not DynamicLayer
    }
    if other or not all(isinstance(part, DynamicCache) for part in parts):
        found = ", ".join(sorted(other)) or type(cache).__name__
        raise InputError(
            f"past_key_values: expected a transformers.DynamicCache() whose layers all grow, got {found}. Leave out config= (the mask of "
            "the graph does the window of a layer), or leave out past_key_values."
        )


def _pairs(cache: Cache) -> list[dict[str, torch.Tensor]]:
    layers: list[Any] = list(cache.layers)
    return [{"key": layer.keys, "value": layer.values} for layer in layers]


def _put(cache: Cache, present: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Give the layers of a cache these keys and values (in place)."""
    layers: list[Any] = list(cache.layers)
    for index, pair in enumerate(present):
        if index < len(layers) and layers[index].is_initialized:
            layers[index].keys, layers[index].values = pair["key"], pair["value"]
        else:
            cache.update(pair["key"], pair["value"], index)


def generator(graph_module: TracedGraphModule | CachedGraphs) -> Generator:
    """Return an object on which transformers' ``generate`` runs: greedy search, sampling, beams, streaming.

    What a model's class does around ``generate`` is not part of it: of Whisper, the tokens of language and task are given as
    ``decoder_input_ids``, and sounds are no longer than one window.

    Args:
        graph_module: traced with ``cache=True``: base, branched, fused or folded. It is held, not copied; the values that it has when
            ``generate`` is called count.

    Raises:
        LoraFxError: the graph has no cache.
    """
    if isinstance(graph_module, CachedGraphs):
        return EncoderDecoderGenerator(graph_module)
    check_cache(graph_module)
    return CausalGenerator(graph_module)
