"""Modules that adapters train as a whole, each row of a batch with that of its adapter: heads, for the most part.

Such a module is one product, as PEFT asks for too: a linear, a convolution or an embedding. It is computed on the rows of each adapter with
the adapter's copies, and their outputs are written over those of the model's own::

    y = x W^T + b    →    x → index_select rows → linear with the copies → index_copy over the rows of y
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx

from lora_fx.adapters.branch_nodes import Rows
from lora_fx.branches.lower import describe
from lora_fx.graph.adapter_names import copy_name
from lora_fx.graph.records import Trained
from lora_fx.graph.state import State
from lora_fx.sites.weight_ops import weight_op


@dataclass(frozen=True)
class RowModule:
    """A module of which adapters have copies.

    Attributes:
        node: that computes it.
        parameters: the ``get_attr`` nodes of its weight and its bias, by their names.
    """

    node: fx.Node
    parameters: Mapping[str, fx.Node]


def row_modules(graph: fx.Graph, state: State, trained: Sequence[Trained]) -> dict[str, RowModule] | str:
    """Return the modules of trained parameters by their paths; or the name of a parameter that is in none that can have rows.

    Args:
        graph: in which no adapter acts.
        state: of the graph.
        trained: the parameters of which an adapter has copies.
    """
    read = {str(node.target): node for node in graph.find_nodes(op="get_attr")}
    names, found = {each.name for each in trained}, dict[str, RowModule]()
    for name in sorted(names):
        path = name.rpartition(".")[0]
        own = {each for each in names if each.rpartition(".")[0] == path}
        weight = read.get(f"{path}.weight")
        node = next(iter(weight.users)) if weight is not None and len(weight.users) == 1 else None
        product = None if node is None else weight_op(node)
        tied = any(len(state.names()[state.aliases()[each]]) > 1 for each in own)
        if node is None or product is None or product.weight is not weight or node.kwargs:
            return name
        if product.op == "expert" or tied:
            return name
        parameters = {str(each.target): each for each in node.all_input_nodes if each.op == "get_attr"}
        if own - parameters.keys() or any(len(each.users) > 1 for each in parameters.values()):
            return name
        found[path] = RowModule(node, parameters)
    return found


def write_modules(
    graph: fx.Graph, modules: Mapping[str, RowModule], rows: Mapping[str, Rows], copies: Mapping[str, Collection[str]]
) -> None:
    """Write the modules of rows into a graph (in place).

    Args:
        graph: with the modules.
        modules: by their paths.
        rows: of each adapter, and of those without one.
        copies: of each adapter, the names of the parameters that it has copies of.
    """
    for module in modules.values():
        node = end = module.node
        product = weight_op(node)
        assert product is not None
        own, users = module.parameters.keys(), list(node.users)
        with graph.inserting_before(node.next):
            for adapter, chosen in rows.items():
                trained = own & set(copies.get(adapter, ()))
                if not trained and adapter in copies:
                    continue
                emit = partial(_emit, graph, node)
                given = {each: each for each in node.all_input_nodes}
                given[product.input] = chosen.of(emit, product.input, product.input)
                for name in sorted(trained):
                    given[module.parameters[name]] = graph.get_attr(copy_name(name, adapter))
                arguments: Any = fx.map_arg(node.args, given.__getitem__)
                value = emit("module", node.target, *arguments)
                end = chosen.put(emit, end, value, node)
        for user in users:
            user.replace_input_with(node, end)


def _emit(graph: fx.Graph, like: fx.Node, _part: str, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    describe(node, like, None)
    return node
