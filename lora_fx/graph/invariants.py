"""What is legal in a graph, by the state that it is in. Every pass checks what it returns, which is linear in the nodes.

    state       from                          legal in it
    base        trace, unload, materialize    plain nodes over the graph's own tensors, each named once; all is frozen
    branched    rewrite, transfer             the same, and branches that can be taken out again, to which every factor belongs
    fused       fuse                          the same, with branches in nodes that compute several at a time
    folded      fold                          as base, and no tensor of an adapter is left that nothing reads

A model may bring branches of its own (PEFT's layers); they are part of its base graph, and are not looked at before a fold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch

from lora_fx.branches.find import find_branches
from lora_fx.branches.lower import lower
from lora_fx.errors import StateError
from lora_fx.graph.adapter_names import is_factor, is_of_adapter
from lora_fx.graph.graph_module import State, TracedGraphModule, state_of
from lora_fx.numerics.fused_branch import add_update, reduce_features

GraphState = Literal["base", "branched", "fused", "folded"]


def checked(graph_module: TracedGraphModule, state: GraphState) -> TracedGraphModule:
    """Return a graph that a pass made, if it is legal in the state that the pass leaves it in.

    Raises:
        StateError: it is not. That is a fault of lora_fx, never of a model.
    """
    tensors = state_of(graph_module)
    problems = [problem for rule in _RULES[state] for problem in rule(graph_module, tensors)]
    if problems:
        raise StateError(
            f"a pass of lora_fx left a graph that is not legal in state {state!r}: {'; '.join(problems[:5])}. "
            "Please report this, with the model and the rules."
        )
    return graph_module


def _nodes_are_plain(graph_module: TracedGraphModule, state: State) -> Iterator[str]:
    """Operators of torch, numbers computed from sizes, and leaf modules."""
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and str(node.target) not in state.modules:
            yield f"{node.name} calls {node.target!r}, which the graph does not have"
        elif node.op == "call_function" and not (_is_plain(node.target) or _is_fused(node.target)):
            yield f"{node.name} calls {node.target}, which is no operator of torch"
        elif node.op == "call_method":
            yield f"{node.name} calls the method {node.target!r}"


def _is_plain(target: object) -> bool:
    module = str(getattr(target, "__module__", ""))
    return isinstance(target, torch._ops.OpOverload) or module in ("_operator", "builtins", "math", "torch")


def _is_fused(target: object) -> bool:
    return target in (reduce_features, add_update)


def _nothing_is_fused(graph_module: TracedGraphModule, _state: State) -> Iterator[str]:
    for node in graph_module.graph.nodes:
        if _is_fused(node.target):
            yield f"{node.name} computes a fused branch"


def _tensors_are_named_once(graph_module: TracedGraphModule, state: State) -> Iterator[str]:
    """One ``get_attr`` a tensor, under the first of its names."""
    aliases = state.aliases()
    seen: set[str] = set()
    for node in graph_module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if aliases.get(name) != name:
            yield f"{node.name} reads {name!r}, which is named {aliases.get(name)!r} first"
        if name in seen:
            yield f"{name!r} is read by several nodes"
        seen.add(name)


def _all_is_frozen(graph_module: TracedGraphModule, _state: State) -> Iterator[str]:
    for name, parameter in graph_module.named_parameters():
        if parameter.requires_grad:
            yield f"{name!r} requires a gradient"


def _factors_are_in_branches(graph_module: TracedGraphModule, state: State) -> Iterator[str]:
    """The branches can be found, and no factor is outside of them."""
    aliases = state.aliases()
    used = {
        aliases[name] for found in find_branches(lower(graph_module)) for each in found.updates for name in each.names
    }
    for name, first in aliases.items():
        if is_factor(name) and first not in used:
            yield f"{name!r} is in no branch"


def _nothing_is_left(graph_module: TracedGraphModule, state: State) -> Iterator[str]:
    """What a fold took out has no tensors any more; branches that it was not asked for stay."""
    read = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
    for name, first in state.aliases().items():
        if is_of_adapter(name) and first not in read:
            yield f"{name!r} is left"


Rule = Callable[[TracedGraphModule, State], Iterator[str]]

_PLAIN: tuple[Rule, ...] = (_nodes_are_plain, _tensors_are_named_once)
_RULES: Mapping[GraphState, tuple[Rule, ...]] = {
    "base": (*_PLAIN, _nothing_is_fused, _all_is_frozen),
    "branched": (*_PLAIN, _nothing_is_fused, _factors_are_in_branches),
    "fused": (*_PLAIN, _factors_are_in_branches),
    "folded": (*_PLAIN, _nothing_is_fused, _all_is_frozen, _nothing_is_left),
}
