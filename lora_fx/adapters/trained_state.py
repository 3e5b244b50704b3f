"""State dict of a graph in a ``Trainer``: restricted to what trains, so that checkpoints have no copy of the frozen base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_fx.adapters.peft_format.directories import (
    MAX_NAMED,
    first_trainable_names,
    other_adapters,
    ranks_in,
    ranks_of,
    updated_names,
)
from lora_fx.errors import AdapterError, shortened
from lora_fx.graph.adapter_names import is_of_adapter
from lora_fx.graph.compare import described
from lora_fx.graph.graph_module import TracedGraphModule, state_of


def is_restricted(graph: nn.Module) -> bool:
    """Tell whether the state dict of a graph has only what trains."""
    return _keep_trained in graph._state_dict_hooks.values()


def restrict(graph: nn.Module) -> None:
    """Restrict the state dict of a graph to what trains, once; loading one misses nothing, and other adapters are refused."""
    if not is_restricted(graph):
        graph.register_state_dict_post_hook(_keep_trained)
        graph.register_load_state_dict_pre_hook(_check_adapters)
        graph.register_load_state_dict_post_hook(_miss_no_frozen)


def _keep_trained(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    kept = {f"{prefix}{name}" for name in first_trainable_names(module) | updated_names(module)}
    for name in [name for name in state_dict if name.startswith(prefix) and name not in kept]:
        del state_dict[name]


def _miss_no_frozen(module: nn.Module, keys: Any) -> None:
    trained = first_trainable_names(module)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in trained]


def _check_adapters(module: TracedGraphModule, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    tensors = state_of(module).tensors
    given = {
        name: value
        for key, value in state_dict.items()
        if key.startswith(prefix) and is_of_adapter(name := key[len(prefix) :])
    }
    problems = [
        f"{name}: expected {described(tensors[name])}, got {described(given[name]) if name in given else 'none'}"
        for name in sorted(first_trainable_names(module))
        if is_of_adapter(name) and (name not in given or given[name].shape != tensors[name].shape)
    ]
    problems += [f"{name}: the graph has no such tensor" for name in given if name not in tensors]
    if problems:
        told = other_adapters(ranks_of(given, module), ranks_in(module))
        raise AdapterError("the state dict that is loaded", [told, *shortened(problems, MAX_NAMED, "tensors")])
