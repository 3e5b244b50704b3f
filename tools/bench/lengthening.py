"""A traced decoder made longer: its last layer repeated as nodes, since ``torch.export`` takes minutes for so many layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from lora_fx.graph.graph_module import TracedGraphModule, assemble, copy_graph, state_of
from lora_fx.graph.provenance import module_path


def lengthened(graph_module: TracedGraphModule, layers: int, more: int) -> TracedGraphModule:
    """Return a Llama of so many layers with more of them: each new one reads the one before, with copies of the last one's weights."""
    graph, _ = copy_graph(graph_module.graph)
    path = f"model.layers.{layers - 1}"
    before, last = nodes_in(graph, f"model.layers.{layers - 2}"), nodes_in(graph, path)
    readers = {user for node in last for user in node.users} - set(last)
    state = state_of(graph_module)
    weights = {name: tensor for name, tensor in state.tensors.items() if name.startswith(f"{path}.")}
    added = {}
    latest = last
    with graph.inserting_before(last[-1].next):
        for layer in range(layers, more):
            new = f"model.layers.{layer}"
            mapping = dict(zip(before, latest, strict=True))
            latest = [copied(graph, node, mapping, path, new) for node in last]
            for name, weight in weights.items():
                added[name.replace(path, new, 1)] = nn.Parameter(weight.detach().clone())
    for reader in readers:
        for node, newest in zip(last, latest, strict=True):
            reader.replace_input_with(node, newest)
    graph.lint()
    return assemble(graph, state.with_tensors(added), meta=graph_module.meta, training=False, trainable=frozenset())


def nodes_in(graph: fx.Graph, path: str) -> list[fx.Node]:
    """Return the operators and the weights of a module."""
    return [
        node
        for node in graph.nodes
        if f"{node.target if node.op == 'get_attr' else module_path(node)}.".startswith(f"{path}.")
    ]


def copied(graph: fx.Graph, node: fx.Node, mapping: dict[fx.Node, fx.Node], path: str, new: str) -> fx.Node:
    """Return a copy of a node, also noted in ``mapping``, that belongs to another module."""
    made = mapping[node] = graph.node_copy(node, lambda read: mapping.get(read, read))
    if node.op == "get_attr":
        made.target = str(node.target).replace(path, new, 1)
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack", {})
    made.meta["nn_module_stack"] = {
        key.replace(path, new): (name.replace(path, new, 1), kind) for key, (name, kind) in stack.items()
    }
    return made
