"""Activation checkpointing: layers of a graph are computed again in the backward pass, instead of kept from the forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_fx.graph.graph_module import TracedGraphModule
from lora_fx.graph.info import known_info
from lora_fx.graph.layers import Checkpointing
from lora_fx.graph.nested import nest_in_place


def activation_checkpointing_enable(
    graph_module: TracedGraphModule,
    activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
    every_n_layers: int = 1,
    offload: bool = False,
) -> None:
    """Compute layers again in the backward pass, as the method of transformers' models does (in place). A flat graph is nested for it.

    Of each layer only its inputs are kept. Outputs and gradients are those without it, bit for bit, also with dropout: the random state
    is restored for the second computation. The graph stays the same object, with the same ``Parameter`` objects and hooks.

    Args:
        graph_module: is changed.
        activation_checkpointing_kwargs: of ``torch.utils.checkpoint.checkpoint``: with ``context_fn``, such as
            ``functools.partial(create_selective_checkpoint_contexts, operators)``, the results of some operators are kept.
        every_n_layers: only the first of so many layers is computed again.
        offload: hold what is kept in the memory of the host.

    Raises:
        LoraFxError: the arguments would change gradients, or see :func:`lora_fx.nest`; the graph is as it was.
    """
    nest_in_place(graph_module, Checkpointing.of(activation_checkpointing_kwargs, every_n_layers, offload=offload))


def activation_checkpointing_disable(graph_module: TracedGraphModule) -> None:
    """Keep the activations of all layers from the forward pass (in place). The graph stays nested."""
    if known_info(graph_module).checkpointing is not None:
        nest_in_place(graph_module, None)


def gradient_checkpointing_enable(
    graph_module: TracedGraphModule,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    every_n_layers: int = 1,
    offload: bool = False,
) -> None:
    """Do as :func:`activation_checkpointing_enable`, by its older name."""
    activation_checkpointing_enable(graph_module, gradient_checkpointing_kwargs, every_n_layers, offload)


gradient_checkpointing_disable = activation_checkpointing_disable
