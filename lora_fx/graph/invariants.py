"""Invariants of graphs: rules that every pass checks in what it returns, and those of a base graph.

A base graph has plain nodes over its own tensors, each named once, and all is frozen. Rules about branches are in
:mod:`lora_fx.branches.invariants`. A model may bring branches of its own (PEFT's layers); they are part of its base graph, and are
not looked at before a fold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lora_fx.errors import StateError, listed
from lora_fx.graph.graph_module import TracedGraphModule, state_of
from lora_fx.graph.module_tensors import parameters_of_module
from lora_fx.graph.state import State
from lora_fx.numerics.fused_branch import add_update, reduce_features
from lora_fx.torch_internals import OpOverload

Rule = Callable[[TracedGraphModule, State], Iterator[str]]
"""A rule yields its violations in a graph, in words. It takes time linear in the nodes."""


def checked_base(graph_module: TracedGraphModule) -> TracedGraphModule:
    """Return a base graph that a pass made, if it is legal. Raises as :func:`checked_by` does."""
    return checked_by(graph_module, "base", BASE)


def checked_by(graph_module: TracedGraphModule, state: str, rules: Sequence[Rule]) -> TracedGraphModule:
    """Return a graph that a pass made, if no rule of the state in which the pass leaves it is violated.

    Raises:
        StateError: one is. That is a fault of lora_fx, never of a model.
    """
    tensors = state_of(graph_module)
    problems = [problem for rule in rules for problem in rule(graph_module, tensors)]
    if problems:
        raise StateError(
            f"a pass of lora_fx left a graph that is not legal in state {state!r}: {listed(problems, 5, '; ')}. "
            "Please report this, with the model and the rules."
        )
    return graph_module


def nodes_are_plain(graph_module: TracedGraphModule, state: State) -> Iterator[str]:
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
    return isinstance(target, OpOverload) or module in ("_operator", "builtins", "math", "torch")


def _is_fused(target: object) -> bool:
    return target in (reduce_features, add_update)


def nothing_is_fused(graph_module: TracedGraphModule, _state: State) -> Iterator[str]:
    """No node computes several branches at a time."""
    for node in graph_module.graph.nodes:
        if _is_fused(node.target):
            yield f"{node.name} computes a fused branch"


def tensors_are_named_once(graph_module: TracedGraphModule, state: State) -> Iterator[str]:
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


def all_is_frozen(graph_module: TracedGraphModule, _state: State) -> Iterator[str]:
    """No parameter requires a gradient."""
    for name, parameter in parameters_of_module(graph_module).items():
        if parameter.requires_grad:
            yield f"{name!r} requires a gradient"


PLAIN: tuple[Rule, ...] = (nodes_are_plain, tensors_are_named_once)
BASE: tuple[Rule, ...] = (*PLAIN, nothing_is_fused, all_is_frozen)
