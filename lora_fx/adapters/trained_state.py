"""State dict of a graph in a ``Trainer``: what trains, and adapters that do, so that checkpoints have no copy of the frozen base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.adapters.peft_format.directories import (
    MAX_NAMED,
    first_trainable_names,
    other_adapters,
    ranks_in,
    ranks_of,
    updated_names,
)
from lora_fx.adapters.recorded import branches_of
from lora_fx.adapters.starts import rests
from lora_fx.errors import AdapterError, shortened
from lora_fx.graph.adapter_names import adapter_of, adapters, is_of_adapter, is_of_branch, is_of_start, original_name
from lora_fx.graph.compare import described
from lora_fx.graph.graph_module import TracedGraphModule, state_in_parts, state_of
from lora_fx.graph.info import info_of
from lora_fx.sites.call_sites import sites


def is_restricted(graph: nn.Module) -> bool:
    """Tell whether the state dict of a graph has only what trains."""
    return _keep_trained in graph._state_dict_hooks.values()


def restrict(graph: nn.Module) -> None:
    """Restrict the state dict of a graph to what trains, once; loading one misses nothing, and other adapters are refused."""
    if not is_restricted(graph):
        graph.register_state_dict_post_hook(_keep_trained)
        graph.register_load_state_dict_pre_hook(_check_adapters)
        graph.register_load_state_dict_post_hook(_miss_no_frozen)


def kept_names(graph: nn.Module) -> set[str]:
    """Return the first name of each parameter that trains, and of the frozen factors of adapters that train: A may be a random draw.

    What a start left of a weight is left out, as it follows from the weight and the first factors.
    """
    trained = first_trainable_names(graph)
    training = {adapter_of(name) for name in trained} - {None}
    state = state_in_parts(graph)
    own = (name for name in state.names().keys() - state.non_persistent if adapter_of(name) in training)
    return trained | {name for name in own if is_of_branch(name) or (is_of_start(name) and original_name(name) is None)}


def _keep_trained(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    kept = {f"{prefix}{name}" for name in kept_names(module) | updated_names(module)}
    for name in [name for name in state_dict if name.startswith(prefix) and name not in kept]:
        del state_dict[name]


def _miss_no_frozen(module: nn.Module, keys: Any) -> None:
    kept = kept_names(module)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in kept]


def _check_adapters(module: TracedGraphModule, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    tensors = state_in_parts(module).tensors
    given = {
        name: value
        for key, value in state_dict.items()
        if key.startswith(prefix) and is_of_adapter(name := key[len(prefix) :])
    }
    problems = [
        f"{name}: expected {described(tensors[name])}, got {described(given[name]) if name in given else 'none'}"
        for name in sorted(kept_names(module))
        if is_of_adapter(name) and (name not in given or given[name].shape != tensors[name].shape)
    ]
    problems += [f"{name}: the graph has no such tensor" for name in given if name not in tensors]
    if problems:
        told = other_adapters(ranks_of(given, module), ranks_in(module))
        raise AdapterError("the state dict that is loaded", [told, *shortened(problems, MAX_NAMED, "tensors")])
    _split_again(module, given)


def _split_again(module: TracedGraphModule, given: Mapping[str, torch.Tensor]) -> None:
    """Give a graph what other first factors leave of its weights (in place)."""
    splitting = [
        (adapter, branch)
        for adapter in info_of(module).adapters.keys() & set(adapters(module))
        for _, branch in branches_of(module, adapter).values()
        if branch.splits
    ]
    if not splitting:
        return
    tensors = state_of(module).tensors
    other = [
        (adapter, branch)
        for adapter, branch in splitting
        if any(
            name in given and not torch.equal(given[name].to(tensors[name]), tensors[name])
            for name in branch.names(adapter).starts
        )
    ]
    for name, rest in rests(other, sites(module), {**tensors, **given}).items() if other else ():
        tensors[name].data.copy_(rest)
