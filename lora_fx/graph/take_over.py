"""A graph that becomes another one in place, with the parameter objects that it has: for methods that PEFT's users know."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lora_fx.graph.graph_module import TracedGraphModule, copy_graph, install, state_in_parts, state_of
from lora_fx.graph.input_checks import InputCheck, RelationCheck
from lora_fx.graph.state import State, with_value
from lora_fx.numerics.quantised_weight import QuantisedWeight


def take_over(graph_module: TracedGraphModule, other: TracedGraphModule) -> None:
    """Give a graph the nodes, the tensors and the record of another one (in place).

    Its parameters stay the objects that they are, so that an optimizer made before goes on; one whose value differs gets the
    storage of the other's. Leaf modules of the same class stay too. What is new is in the mode of the graph.

    Args:
        graph_module: is changed.
        other: made from it; of no use afterwards, since both share tensors.
    """
    mine, theirs = state_of(graph_module), state_of(other)
    known = {name for name, _ in graph_module.named_modules()}
    for name, tensor in theirs.tensors.items():
        own = mine.tensors.get(name)
        if isinstance(own, nn.Parameter) and not isinstance(own, QuantisedWeight):  # which no optimizer has
            if own.data_ptr() != tensor.data_ptr():
                with_value(own, tensor.detach(), assign=True)
            own.requires_grad_(tensor.requires_grad)
    modules = {
        name: module for name, module in theirs.modules.items() if type(module) is not type(mine.modules.get(name))
    }
    kept = {name for name, own in mine.tensors.items() if not isinstance(own, QuantisedWeight)}
    tensors = {name: tensor for name, tensor in theirs.tensors.items() if name not in kept}
    _remove(graph_module, mine.tensors.keys() - theirs.tensors.keys())
    graph, _ = copy_graph(other.graph)
    install(graph_module, State(tensors, theirs.non_persistent, modules))
    graph_module.meta.update(other.meta)
    graph_module.graph = graph
    _remove(graph_module, mine.modules.keys() - theirs.modules.keys())
    for name, module in graph_module.named_modules():
        if name not in known or name in modules:
            module.training = graph_module.training


def take_checks(graph_module: TracedGraphModule, other: TracedGraphModule) -> None:
    """Give a graph the input checks of another one, which has its nodes otherwise (in place).

    Args:
        graph_module: is changed; may be sharded.
        other: of no use afterwards, since both share modules.
    """
    mine, theirs = (_checks(module) for module in (graph_module, other))
    graph, _ = copy_graph(other.graph)
    install(graph_module, State({}, modules=theirs))
    graph_module.graph = graph
    _remove(graph_module, mine.keys() - theirs.keys())


def _checks(graph_module: TracedGraphModule) -> dict[str, nn.Module]:
    modules = state_in_parts(graph_module).modules.items()
    return {name: module for name, module in modules if isinstance(module, InputCheck | RelationCheck)}


def _remove(module: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        path, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(path), leaf)
