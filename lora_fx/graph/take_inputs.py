"""Signature of an exported graph: that of its model's ``forward``, with the inputs of the trace."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from lora_fx.errors import TraceError
from lora_fx.graph.provenance import source_line
from lora_fx.graph.signature import Argument, InputCodeGen, Leaf, Signature
from lora_fx.torch_internals import PyTreeCodeGen, pytree


def take_inputs(graph: fx.Graph, forward: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Give an exported graph the signature of the model's ``forward``; its placeholders are the tensors, in that order.

    Args:
        graph: changed in place; it has one placeholder for each leaf of its inputs.
        forward: the signature of the model's ``forward``.
        args: the positional example inputs.
        kwargs: the keyword example inputs.

    Raises:
        TraceError: the graph reads an input that is not a tensor.
    """
    codegen = graph._codegen
    assert isinstance(codegen, PyTreeCodeGen)
    by_position = _argument_names(graph)[: len(args)]
    given = {**dict(zip(by_position, args, strict=True)), **kwargs}
    nodes = iter(graph.find_nodes(op="placeholder"))
    in_order = [*by_position, *codegen.pytree_info.in_spec.child(1).context]  # torch.export's order of keywords
    of_argument = {name: [next(nodes) for _ in pytree.tree_leaves(given[name])] for name in in_order}
    arguments = tuple(_arguments(forward, by_position, given))
    kept: list[fx.Node] = []
    for argument in arguments:
        for node, leaf in zip(of_argument.get(argument.name, ()), argument.leaves, strict=False):
            if leaf is Leaf.TENSOR:
                kept.append(node)
            else:
                _erase_constant(graph, node)
    inputs = tuple(str(node.target) for node in kept)
    for node in reversed(kept):
        node.target = node.name  # fx has made sure that the generated code does not need it
        first = next(iter(graph.nodes))
        if node is not first:
            first.prepend(node)
    graph.set_codegen(InputCodeGen(Signature(arguments, inputs), codegen.pytree_info.out_spec))


def _erase_constant(graph: fx.Graph, node: fx.Node) -> None:
    if node.users:
        raise TraceError(
            f"input {str(node.target)!r} is not a tensor, but the graph reads it{source_line(next(iter(node.users)))}. "
            "Only tensors can be inputs of a graph: pass one."
        )
    graph.erase_node(node)


def _arguments(forward: inspect.Signature, by_position: Sequence[str], given: Mapping[str, Any]) -> Iterator[Argument]:
    named = forward.parameters
    for parameter in named.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            yield from (_traced(name, given[name], True) for name in by_position if name not in named)
        elif parameter.kind is parameter.VAR_KEYWORD:
            more = [name for name in given if name not in named and name not in by_position]
            yield from (_traced(name, given[name], False) for name in more)
        elif parameter.name in given:
            yield _traced(parameter.name, given[parameter.name], parameter.kind is not parameter.KEYWORD_ONLY)
        else:
            yield _omitted(parameter)


def _traced(name: str, value: Any, positional: bool) -> Argument:
    leaves, spec = pytree.tree_flatten(value)
    marked = tuple(Leaf.TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    return Argument(name, positional, True, spec, marked)


def _omitted(parameter: inspect.Parameter) -> Argument:
    leaves, spec = pytree.tree_flatten(parameter.default)
    if not all(isinstance(leaf, bool | int | float | complex | str | None) for leaf in leaves):
        leaves, spec = pytree.tree_flatten(Leaf.OTHER)
    return Argument(parameter.name, parameter.kind is not parameter.KEYWORD_ONLY, False, spec, tuple(leaves))


def _argument_names(graph: fx.Graph) -> list[str]:
    """Return the names of the arguments of an exported graph's ``forward``, without ``self``."""
    codegen = graph._codegen
    assert isinstance(codegen, PyTreeCodeGen)
    return [name for name in codegen.pytree_info.orig_args if name != "self"]
