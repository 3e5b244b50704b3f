"""Graphs that take and return a key-value cache, and the sizes of what their layers keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from lora_fx.errors import LoraFxError
from lora_fx.graph.graph_module import TracedGraphModule
from lora_fx.graph.info import info_of, known_info
from lora_fx.graph.signature import signature_of

PAST, PRESENT = "past_key_values", "present"
"""Names of the cache among the inputs and among the outputs."""


@dataclass(frozen=True)
class CacheLayer:
    """Sizes of the keys ``(batch, heads, length, key_size)`` and values ``(batch, heads, length, value_size)`` of a layer.

    Attributes:
        heads: number of heads of keys and values.
        key_size: of a head.
        value_size: of a head.
        dtype: of both.
    """

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype

    def tensors(self, batch: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Return keys and values of zeros."""
        sizes = {"key": self.key_size, "value": self.value_size}
        return {
            name: torch.zeros(batch, self.heads, length, size, dtype=self.dtype, device=device)
            for name, size in sizes.items()
        }


def has_cache(graph_module: TracedGraphModule) -> bool:
    """Tell whether a graph was traced with ``cache=True``."""
    return any(argument.name == PAST and argument.is_input for argument in signature_of(graph_module.graph).arguments)


def check_cache(graph_module: TracedGraphModule) -> None:
    """Raise :class:`LoraFxError` unless a graph was traced with a cache."""
    if not isinstance(graph_module, TracedGraphModule) or not has_cache(graph_module):
        raise LoraFxError(
            "expected a graph with a key-value cache: rewrite, trace or from_adapter with cache=True; a graph that was trained without "
            "goes onto one by lora_fx.transfer(graph, onto=lora_fx.trace(model, cache=True))."
        )


def generation_settings(graph_module: TracedGraphModule) -> GenerationConfig:
    """Return the settings by which the traced model generates; where it has none, those that its config implies."""
    return known_info(graph_module).generation_config or GenerationConfig.from_model_config(graph_module.config)


def takes_positions(graph_module: TracedGraphModule) -> bool:
    """Tell whether ``position_ids`` are an input."""
    return "position_ids" in signature_of(graph_module.graph).inputs


def cache_layers(graph_module: TracedGraphModule) -> list[CacheLayer]:
    """Return the sizes of the layers of a graph with a cache."""
    examples = info_of(graph_module).examples
    tensors = {} if examples is None else examples.tensors
    found: list[CacheLayer] = []
    while (key := tensors.get(f"{PAST}_{len(found)}_key")) is not None:
        value = tensors[f"{PAST}_{len(found)}_value"]
        found.append(CacheLayer(key.size(1), key.size(3), value.size(3), key.dtype))
    return found


def empty_past(graph_module: TracedGraphModule, batch: int) -> list[dict[str, torch.Tensor]]:
    """Return the past of a graph before its first token."""
    return [layer.tensors(batch, 0, graph_module.device) for layer in cache_layers(graph_module)]
