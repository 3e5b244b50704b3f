"""The part of a graph below its output head, for trainers that compute head and loss together, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx
from transformers.modeling_outputs import BaseModelOutput

from lora_fx.errors import LoraFxError
from lora_fx.graph.graph_module import TracedGraphModule, copy_graph
from lora_fx.graph.info import info_of
from lora_fx.graph.input_checks import InputCheck, RelationCheck
from lora_fx.graph.layers import nesting
from lora_fx.graph.signature import ITEM_COUNT, InputCodeGen, signature_of
from lora_fx.torch_internals import pytree

aten = torch.ops.aten


def below_head(graph_module: TracedGraphModule, weight: str) -> fx.GraphModule:
    """Return a module that computes what the output head of a graph reads, as ``last_hidden_state`` of a model output.

    It takes the inputs of the graph without labels, and has the graph's own ``Parameter`` objects and modules: what trains there
    trains here. Layers are computed again where those of the graph are.

    Args:
        graph_module: not changed.
        weight: the name under which the graph reads the weight of the head.

    Raises:
        LoraFxError: the head has branches, which a product by its weight alone would leave out; it is not one linear product; or
            what it reads depends on labels.
    """
    graph, _ = copy_graph(graph_module.graph)
    heads = [
        node
        for node in graph.find_nodes(op="call_function", target=aten.linear.default)
        if isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr" and node.args[1].target == weight
    ]
    if len(heads) != 1:
        raise LoraFxError(
            f"expected one linear product by {weight!r}, the weight of the output head, got {len(heads)}."
        )
    _check_plain(graph_module, graph, weight)
    (hidden,) = heads[0].all_input_nodes[:1]
    graph.output_node().args = ((hidden,),)
    _erase(graph_module, graph, set())
    signature = signature_of(graph)
    dropped = {"labels", ITEM_COUNT} if info_of(graph_module).labels else set()
    behind = set(_behind(graph, dropped))
    if hidden in behind:
        raise LoraFxError("the input of the output head depends on labels: trace the graph without labels=True.")
    _erase(graph_module, graph, behind)
    signature = replace(
        signature,
        arguments=tuple(argument for argument in signature.arguments if argument.name not in dropped),
        inputs=tuple(name for name in signature.inputs if name not in dropped),
    )
    _, spec = pytree.tree_flatten(BaseModelOutput(last_hidden_state=torch.empty(0)))
    graph.set_codegen(InputCodeGen(signature, spec))
    made = fx.GraphModule(graph_module, graph)
    checkpointing = info_of(graph_module).checkpointing
    if checkpointing is not None:
        parts = nesting(made, graph)
        parts.install(made, checkpointing)
        assert parts.outer is not None
        made.graph = parts.outer
    return made


def _check_plain(graph_module: TracedGraphModule, graph: fx.Graph, weight: str) -> None:
    read = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    for adapter, record in info_of(graph_module).adapters.items():
        for _, branch in record.branches.values():
            if f"{branch.owner.partition('@')[0]}.weight" == weight and branch.names(adapter).a in read:
                raise LoraFxError(
                    f"adapter {adapter!r} has a branch at the output head {branch.owner!r}, and the head is asked for by its weight "
                    "alone, so that the branch would not train. Leave the head out of the rules, or train a copy of it "
                    "(modules_to_save)."
                )


def _behind(graph: fx.Graph, inputs: set[str]) -> Iterator[fx.Node]:
    """Yield the placeholders of these inputs, and all nodes that read them, directly or not."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if (node.op == "placeholder" and str(node.target) in inputs) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
            yield node


def _erase(graph_module: TracedGraphModule, graph: fx.Graph, nodes: set[fx.Node]) -> None:
    """Erase these nodes, and all that nothing reads but for checks of the inputs."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output") and node not in nodes:
            continue
        is_check = node.op == "call_module" and isinstance(
            graph_module.get_submodule(str(node.target)), InputCheck | RelationCheck
        )
        if not node.users and (node in nodes or not is_check):
            graph.erase_node(node)
