"""Generation with a key-value cache: transformers' own ``generate`` over a graph that was traced with one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from lora_fx.graph.cached_graphs import PAST, PRESENT, check_cache, empty_past, generation_settings, takes_positions
from lora_fx.graph.graph_module import TracedGraphModule


class Generator(nn.Module, GenerationMixin):
    """A causal graph with a cache as transformers' ``generate`` drives a model: greedy, sampling, beams.

    It holds no tensors of its own: what is trained in the graph counts in the next call.

    Attributes:
        graph: that computes.
        config: of the model that was traced.
        generation_config: defaults of ``generate``.
    """

    main_input_name = "input_ids"
    input_modalities = ("text",)
    base_model_prefix = ""
    _is_stateful = False

    def __init__(self, graph: TracedGraphModule, generation_config: GenerationConfig) -> None:
        super().__init__()
        self.graph = graph
        self.config = graph.config
        self.generation_config = generation_config

    @property
    def device(self) -> torch.device:
        """Where the graph's tensors are."""
        return self.graph.device

    def can_generate(self) -> bool:
        """Tell transformers that it may."""
        return True

    def is_remote_code(self) -> bool:
        """Tell transformers that the code of this class is not from a hub."""
        return False

    def get_experts_implementation(self) -> None:
        """Tell transformers that there is no kernel of experts to exchange while it decodes."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers' ``GenerationMixin.generate`` does, with a cache that grows; without gradients."""
        if kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = DynamicCache()  # no config: all layers grow, and the graph's masks do windows
        training = self.graph.training
        try:
            self.graph.eval()
            model: Any = self  # with what generate needs of a PreTrainedModel
            return GenerationMixin.generate(model, *args, **kwargs)
        finally:
            self.graph.train(training)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits ``(batch, sequence, vocabulary)``, and let the cache have the new positions.

        Args:
            input_ids: ``(batch, sequence)``.
            attention_mask: ``(batch, past_sequence + sequence)``; all ones by default.
            position_ids: ``(batch, sequence)``; counted over the mask by default.
            past_key_values: a cache, changed in place.
        """
        cache = DynamicCache() if past_key_values is None else past_key_values
        layers: list[Any] = list(cache.layers)
        past = (
            [{"key": layer.keys, "value": layer.values} for layer in layers]
            if cache.get_seq_length()
            else empty_past(self.graph, input_ids.size(0))
        )
        length = past[0]["key"].size(2) + input_ids.size(1)
        mask = attention_mask if attention_mask is not None else input_ids.new_ones(input_ids.size(0), length)
        inputs = {"input_ids": input_ids, "attention_mask": mask, PAST: past}
        if takes_positions(self.graph):
            counted = (mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.size(1) :]
            inputs["position_ids"] = counted if position_ids is None else position_ids
        outputs = self.graph(**inputs)
        for index, layer in enumerate(outputs[PRESENT]):
            if index < len(layers) and layers[index].is_initialized:
                layers[index].keys, layers[index].values = layer["key"], layer["value"]
            else:
                cache.update(layer["key"], layer["value"], index)
        return CausalLMOutputWithPast(logits=outputs["logits"], past_key_values=cache)


def generator(graph_module: TracedGraphModule) -> Generator:
    """Return an object on which transformers' ``generate`` runs: greedy search, sampling, beams, streaming.

    Args:
        graph_module: traced with ``cache=True``: base, branched, fused or folded. It is held, not copied; the values that it has when
            ``generate`` is called count.

    Raises:
        LoraFxError: the graph has no cache.
    """
    check_cache(graph_module)
    return Generator(graph_module, generation_settings(graph_module))
