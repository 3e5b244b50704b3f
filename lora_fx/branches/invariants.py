"""Invariants of graphs with branches, by the state that a graph is in. Every pass checks what it returns, linear in the nodes.

state       from                   legal in it
base        unload, materialize    see lora_fx.graph.invariants
branched    rewrite, transfer      plain nodes, and branches that can be taken out again, to which every factor of an
                                   adapter that acts belongs; no node reads what is of another
fused       fuse                   the same, with branches in nodes that compute several at a time
waiting     attach                 the nodes of a legal graph, beside tensors of one more adapter, which does not act
folded      fold                   as base, and no tensor of an adapter is left that nothing reads
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from lora_fx.branches.find import find_branches
from lora_fx.branches.lower import lower
from lora_fx.graph.adapter_names import adapter_of, is_of_adapter, is_of_branch, is_token_values
from lora_fx.graph.adapter_states import waiting
from lora_fx.graph.graph_module import TracedGraphModule
from lora_fx.graph.invariants import BASE, PLAIN, Rule, checked_by, nothing_is_fused
from lora_fx.graph.state import State

GraphState = Literal["base", "branched", "waiting", "fused", "folded"]


def checked(graph_module: TracedGraphModule, state: GraphState) -> TracedGraphModule:
    """Return a graph that a pass made, if it is legal in the state that the pass leaves it in.

    Raises:
        StateError: it is not. That is a fault of lora_fx, never of a model.
    """
    return checked_by(graph_module, state, _RULES[state])


def _factors_are_in_branches(graph_module: TracedGraphModule, state: State) -> Iterator[str]:
    """The branches can be found, and no factor of an adapter that acts is outside of them."""
    aliases, resting = state.aliases(), frozenset(waiting(graph_module))
    used = {
        aliases[name]
        for found in find_branches(lower(graph_module))
        for each in found.all_updates
        for name in each.names
    }
    for name, first in aliases.items():
        nominates = is_of_branch(name) and not is_token_values(name)
        if nominates and first not in used and adapter_of(name) not in resting:
            yield f"{name!r} is in no branch"
    nodes = graph_module.graph.find_nodes(op="get_attr")
    read = {aliases[str(node.target)] for node in nodes if is_token_values(str(node.target))}
    for name, first in aliases.items():
        if is_token_values(name) and first not in read and adapter_of(name) not in resting:
            yield f"{name!r} is written over no weight"


def _what_rests_is_unread(graph_module: TracedGraphModule, state: State) -> Iterator[str]:
    """No node reads a tensor of an adapter that does not act, and none of its parameters trains."""
    resting = frozenset(waiting(graph_module))
    for node in graph_module.graph.find_nodes(op="get_attr"):
        if adapter_of(str(node.target)) in resting:
            yield f"{node.name} reads {node.target!r}, of an adapter that does not act"
    for name, tensor in state.tensors.items():
        if tensor.requires_grad and adapter_of(name) in resting:
            yield f"{name!r} requires a gradient, and its adapter does not act"


def _nothing_is_left(graph_module: TracedGraphModule, state: State) -> Iterator[str]:
    """What a fold took out has no tensors any more; branches that it was not asked for stay."""
    read = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
    for name, first in state.aliases().items():
        if is_of_adapter(name) and first not in read:
            yield f"{name!r} is left"


_RULES: Mapping[GraphState, tuple[Rule, ...]] = {
    "base": BASE,
    "branched": (*PLAIN, nothing_is_fused, _factors_are_in_branches, _what_rests_is_unread),
    "waiting": (_what_rests_is_unread,),
    "fused": (*PLAIN, _factors_are_in_branches, _what_rests_is_unread),
    "folded": (*BASE, _nothing_is_left),
}
