"""Graphs that take and return a key-value cache, and the sizes of what their layers keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig

from lora_fx.errors import LoraFxError, PlanError
from lora_fx.graph.graph_module import TracedGraphModule, install, state_of
from lora_fx.graph.info import info_of, known_info
from lora_fx.graph.signature import signature_of
from lora_fx.graph.state import State

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


@dataclass(frozen=True)
class CachedGraphs:
    """The graphs of an encoder-decoder model with a key-value cache: ``trace`` and ``rewrite`` return them with ``cache=True``.

    They have the same ``Parameter`` objects, of the whole model. ``plan``, ``rewrite``, ``transfer``, ``activate``, ``combine``,
    ``load_adapter``, ``save_adapter``, ``fold``, ``recipe``, ``unload``, ``huggingface.*``, ``generation.generator`` and ``export.generation``
    take them together; ``draw``, ``parameter_summary`` and ``export.onnx`` take one of them, and ``fuse`` none.

    Attributes:
        encoder: ``input_ids`` and ``attention_mask``, or ``input_features`` → ``{"last_hidden_state"}``.
        first: ``input_ids (batch, sequence)`` of the decoder, ``encoder_attention_mask``, ``encoder_hidden_states`` →
            ``{"logits", "present"}``, a list with ``{"decoder": {"key", "value"}, "encoder": {"key", "value"}}`` of each layer. Without
            a mask of the encoder where the model takes sounds.
        later: ``input_ids``, ``encoder_attention_mask``, ``past_key_values``, a list as ``first`` returns it → ``{"logits", "present"}``,
            a list with ``{"decoder": {"key", "value"}}``.
    """

    encoder: TracedGraphModule
    first: TracedGraphModule
    later: TracedGraphModule

    @property
    def parts(self) -> dict[str, TracedGraphModule]:
        """The graphs by their names."""
        return {"encoder": self.encoder, "first": self.first, "later": self.later}

    def sharing(self) -> CachedGraphs:
        """Let the graphs have the same tensors (in place), those of the first graph that has them."""
        tensors: dict[str, torch.Tensor] = {}
        for part in self.parts.values():
            own = state_of(part)
            shared = {name: tensors.setdefault(name, tensor) for name, tensor in own.tensors.items()}
            install(part, State(shared, own.non_persistent))
        return self


def check_whole(graph_module: nn.Module) -> None:
    """Raise :class:`PlanError` for one of :class:`CachedGraphs` alone, whose adapters and weights the others would not have."""
    info = known_info(graph_module)
    if info.part:
        raise PlanError(
            f"expected the graphs of {info.class_name} together, got {info.part!r} alone: pass the CachedGraphs that hold it, since "
            "their parameters are shared."
        )


def check_undivided(graph_module: nn.Module) -> None:
    """Raise :class:`PlanError` for the graph of one of several processes, of which a pass would change a part alone."""
    shards = known_info(graph_module).shards
    if shards is not None:
        raise PlanError(
            f"expected a whole graph, got that of process {shards.rank} of {shards.world}, which has parts of the weights: do this before "
            "lora_fx.parallel.shard."
        )


def check_changeable(graph_module: nn.Module) -> None:
    """Raise :class:`PlanError` for a graph of which another pass would have to change others too: see the two checks."""
    check_whole(graph_module)
    check_undivided(graph_module)


def has_cache(graph_module: TracedGraphModule) -> bool:
    """Tell whether a graph was traced with ``cache=True``."""
    return any(argument.name == PAST and argument.is_input for argument in signature_of(graph_module.graph).arguments)


def check_cache(graph_module: TracedGraphModule) -> None:
    """Raise :class:`LoraFxError` unless a graph was traced with a cache, and is that of the whole model."""
    if isinstance(graph_module, TracedGraphModule):
        check_whole(graph_module)
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
