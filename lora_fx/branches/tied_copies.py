"""Trained copies of a tied parameter for one of its modules alone, as PEFT has them where nothing asks it to keep a tie.

The uses of the parameter inside that module compute with the copy; all others go on with the parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import fx, nn

from lora_fx.branches.weight_uses import copy_path
from lora_fx.errors import PlanError, listed
from lora_fx.graph.adapter_names import adapter_of, copy_name, original_name
from lora_fx.graph.erasing import erase_unread
from lora_fx.graph.graph_module import copy_graph, rebuilt, state_of
from lora_fx.graph.info import known_info
from lora_fx.graph.provenance import module_path
from lora_fx.sites.weight_ops import readers


def untied_copies(graph_module: nn.Module) -> Mapping[str, str]:
    """Return the trained copies for one module alone, by their names, each with that of the parameter."""
    records = known_info(graph_module).adapters
    return {copy_name(name, adapter): name for adapter, record in records.items() for name in record.untied}


def why_not_untied(graph_module: fx.GraphModule, names: Collection[str], name: str) -> str:
    """Return why a module cannot have a trained copy of a tied parameter for itself alone, or nothing.

    Args:
        graph_module: with the nodes.
        names: all names of the parameter.
        name: the one that it has in that module.
    """
    nodes = graph_module.graph.find_nodes(op="get_attr")
    own = [node for node in nodes if (original_name(str(node.target)) or str(node.target)) in names]
    modules = [module_path(reader) for node in own for reader, _ in readers(node)]
    paths = {each.rpartition(".")[0] for each in names}
    outside = next((path for path in modules if path not in paths), None)
    if outside is not None:
        return f"it is read outside of the modules that have it, in {outside or 'the model itself'}"
    return "" if name.rpartition(".")[0] in modules else f"the model does not call {name.rpartition('.')[0]}"


def untie(graph: fx.Graph, names: Collection[str], copies: Mapping[str, str]) -> None:
    """Let the modules of some names of a tied parameter read other tensors (in place).

    Args:
        graph: of plain nodes.
        names: all names of the parameter.
        copies: by one of these names, the tensor that its module is to read.
    """
    if not copies:
        return
    for node in [node for node in graph.find_nodes(op="get_attr") if node.target in names]:
        moved = {name: list(_paths_inside(node, name)) for name in copies}
        if sum(map(len, moved.values())) == sum(1 for _ in readers(node)):  # the node itself serves the first of them
            first = next(name for name, paths in moved.items() if paths)
            node.target = copies[first]
            del moved[first]
        named = {str(each.target): each for each in graph.find_nodes(op="get_attr")}
        for name, paths in moved.items():
            for reader, path in paths:
                reader.replace_input_with(path[-1], copy_path(graph, named, path, copies[name]))
                erase_unread(graph, path[-1])


def rejoin(graph: fx.Graph, joined: Mapping[fx.Node, str]) -> None:
    """Let nodes that read copies of a tied parameter read it by its first name, one node for all of them (in place).

    Args:
        graph: of plain nodes.
        joined: these nodes, each with that name.
    """
    kept: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        name = joined.get(node, str(node.target))
        if name not in joined.values():
            continue
        node.target = name
        if name in kept and node in joined:
            node.replace_all_uses_with(kept[name])
            graph.erase_node(node)
        else:
            kept.setdefault(name, node)


def with_apart_parameters(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return the graph with a parameter of its own for each trained copy that acts for one module alone; itself if none does."""
    read = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
    apart = [name for copied, name in untied_copies(graph_module).items() if copied in read]
    if not apart:
        return graph_module
    state = state_of(graph_module)
    names, first = state.names(), state.aliases()
    own = {name: nn.Parameter(state.tensors[name].detach(), state.tensors[name].requires_grad) for name in apart}
    graph, _ = copy_graph(graph_module.graph)
    for node in graph.find_nodes(op="get_attr"):
        if node.target in apart:  # read by modules of the parameter's other names
            rest = [name for name in names[first[str(node.target)]] if name not in apart]
            node.target = rest[0] if rest else node.target
    return rebuilt(graph_module, graph, state=state.with_tensors(own))


def covered_names(graph_module: fx.GraphModule) -> dict[str, str]:
    """Return the parameters, by all of their names, of which the graph computes with a trained copy, each with the copy's adapter."""
    untied, state = untied_copies(graph_module), state_of(graph_module)
    names, first = state.names(), state.aliases()
    found: dict[str, str] = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        copied = str(node.target)
        original, adapter = original_name(copied), adapter_of(copied)
        if original is not None and adapter is not None:
            own = (original,) if copied in untied else names.get(first.get(original, original), (original,))
            found |= dict.fromkeys(own, adapter)
    return found


def check_copied_once(
    graph_module: fx.GraphModule, adapter: str, copies: Iterable[str], untied: Collection[str]
) -> None:
    """Refuse a second adapter that acts with a trained copy of a parameter."""
    originals = [original for name in copies if (original := original_name(name)) is not None]
    if not originals:
        return
    other, state = covered_names(graph_module), state_of(graph_module)
    names_of, first = state.names(), state.aliases()
    covered = (name for each in originals for name in ((each,) if each in untied else names_of[first[each]]))
    shared = [name for name in covered if name in other]
    if shared:
        names = sorted({other[name] for name in shared})
        raise PlanError(
            f"adapter {adapter!r} has trained copies of {listed(sorted(shared), 5)}, and so has {' and '.join(map(repr, names))}, which "
            "acts: a graph computes with one copy of a parameter. Let one of them act at a time: "
            f'lora_fx.activate(graph, {{"{adapter}": 1.0}}).'
        )


def _paths_inside(node: fx.Node, name: str) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Yield the readers of a weight in the module that a name is in, each with the way from the ``get_attr`` to it."""
    module = name.rpartition(".")[0]
    for reader, between in readers(node):
        if module_path(reader) == module:
            yield reader, [node, *between]
