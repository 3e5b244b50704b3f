"""The graphs of an encoder-decoder model side by side in one graph, and apart again.

A pass that adds branches, takes them out, or merges them into weights has to see all uses of a weight: those of the encoder, of the first step
of the decoder and of every later one. It is given one graph that takes the inputs of all three and returns the outputs of
all three. A module of the decoder is then one that is called twice, which passes know: its calls have one branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import fx, nn

from lora_fx.errors import PlanError, listed
from lora_fx.graph.cached_graphs import CachedGraphs
from lora_fx.graph.graph_module import TracedGraphModule, assemble, state_of
from lora_fx.graph.info import info_of, known_info, with_info
from lora_fx.graph.input_checks import PREFIX
from lora_fx.graph.invariants import PLAIN, checked_by
from lora_fx.graph.signature import Argument, InputCodeGen, Leaf, Signature, signature_of
from lora_fx.graph.state import State
from lora_fx.torch_internals import pytree

Graphs = TypeVar("Graphs", bound=TracedGraphModule | CachedGraphs)
Graph = TypeVar("Graph", bound=nn.Module)


def through(graphs: Graphs, function: Callable[[TracedGraphModule], TracedGraphModule]) -> Graphs:
    """Return what a pass makes of a graph; of the graphs of an encoder-decoder model it makes all together."""
    if isinstance(graphs, CachedGraphs):
        return apart(function(joined(graphs)), graphs)  # type: ignore[return-value]  # of one kind, as mypy cannot tell
    return function(graphs)  # type: ignore[return-value]


def whole(graphs: Graph | CachedGraphs) -> Graph | TracedGraphModule:
    """Return a graph as it is, and one of all graphs of an encoder-decoder model."""
    return joined(graphs) if isinstance(graphs, CachedGraphs) else graphs


def joined(graphs: CachedGraphs) -> TracedGraphModule:
    """Return one graph of all graphs, over their tensors. Its nodes, inputs and outputs are called after the part that they are of."""
    graph, attributes = fx.Graph(), dict[str, fx.Node]()
    state, arguments, inputs = State({}), list[Argument](), list[str]()
    nodes: dict[str, dict[fx.Node, fx.Node]] = {part: {} for part in graphs.parts}
    for part, module in graphs.parts.items():
        own, signature = state_of(module), signature_of(module.graph)
        modules = {_joint_name(part, name): each for name, each in own.modules.items()}
        state = State(
            {**own.tensors, **state.tensors}, state.non_persistent | own.non_persistent, {**modules, **state.modules}
        )
        names = dict.fromkeys(signature.inputs)
        _, spec = pytree.tree_flatten(names)
        arguments.append(Argument(part, False, True, spec, (Leaf.TENSOR,) * len(names)))
        inputs += [f"{part}__{name}" for name in names]
        for node in module.graph.find_nodes(op="placeholder"):
            made = graph.placeholder(f"{part}__{node.target}")
            made.meta, nodes[part][node] = dict(node.meta), made
    for part, module in graphs.parts.items():
        for node in module.graph.find_nodes(op="get_attr"):
            known = attributes.get(str(node.target))
            nodes[part][node] = attributes[str(node.target)] = known or _copied(graph, node, node.name, {}, part)
    results: dict[str, Any] = {}
    for part, module in graphs.parts.items():
        for node in module.graph.nodes:
            if node.op == "output":
                results[part] = fx.map_arg(node.args[0], nodes[part].__getitem__)
            elif node not in nodes[part]:
                made = _copied(graph, node, f"{part}__{node.name}", nodes[part], part)
                if node.op == "call_module":
                    made.target = _joint_name(part, str(node.target))
                nodes[part][node] = made
    leaves, out_spec = pytree.tree_flatten({part: list(each) for part, each in results.items()})
    graph.output(leaves)
    graph.set_codegen(InputCodeGen(Signature(tuple(arguments), tuple(inputs)), out_spec))
    graph.lint()
    first = graphs.first
    info = replace(info_of(first), part="", examples=None, constants={})
    return assemble(graph, state, meta=with_info(first.meta, info), training=first.training, trainable=frozenset())


def is_joined(graph: fx.Graph) -> bool:
    """Tell whether a graph is one from :func:`joined`, or made of it."""
    inputs = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    taken = [argument.name for argument in signature_of(graph).arguments]
    return taken == ["encoder", "first", "later"] and all(name.partition("__")[0] in taken for name in inputs)


def apart(joint: TracedGraphModule, like: CachedGraphs) -> CachedGraphs:
    """Return the graphs of a joined one, as another pass may have changed it.

    Args:
        joint: from :func:`joined`, or made of it.
        like: the graphs that were joined.

    Raises:
        PlanError: an adapter has a branch for one of several calls of a module alone, of which the calls here are others.
    """
    single = [
        branch.owner
        for record in info_of(joint).adapters.values()
        for _, branch in record.branches.values()
        if "@" in branch.owner
    ]
    if single:
        raise PlanError(
            f"branches at {listed(single, 3)} are for one of several calls of a module, and a decoder with a cache calls each module once a "
            'step. Leave calls = "each" out, or use graphs without a cache.'
        )
    members = _members(joint.graph, like)
    parts = {
        part: _part(joint, part, module, members[part], [each for each in like.parts.values() if each is not module])
        for part, module in like.parts.items()
    }
    return CachedGraphs(**parts).sharing()


def _members(graph: fx.Graph, like: CachedGraphs) -> dict[str, set[fx.Node]]:
    """Return the nodes of each part: all that is connected with its inputs, its results or its checks other than by a tensor of the graph."""
    of: dict[fx.Node, str] = {}
    results = _results(graph)
    placeholders = iter(graph.find_nodes(op="placeholder"))
    for part, module in like.parts.items():
        seeds = [next(placeholders) for _ in signature_of(module.graph).inputs]
        seeds += [leaf for leaf in pytree.tree_leaves(results[part]) if isinstance(leaf, fx.Node)]
        while seeds:
            node = seeds.pop()
            if node.op not in ("get_attr", "output") and node not in of:
                of[node] = part
                seeds += [*node.all_input_nodes, *node.users]
    return {part: {node for node, own in of.items() if own == part} for part in like.parts}


def _part(
    joint: TracedGraphModule,
    part: str,
    like: TracedGraphModule,
    members: set[fx.Node],
    others: Sequence[TracedGraphModule],
) -> TracedGraphModule:
    graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = [node for node in joint.graph.find_nodes(op="placeholder") if node in members]
    body = [node for node in joint.graph.nodes if node in members and node.op != "placeholder"]
    own_names = {str(node.target): node.name for node in like.graph.find_nodes(op="get_attr")}
    tensors = [node for node in _in_order(joint.graph, own_names) if not members.isdisjoint(node.users)]
    for node in (*inputs, *tensors, *body):
        name = (
            own_names.get(str(node.target), node.name) if node.op == "get_attr" else node.name.removeprefix(f"{part}__")
        )
        nodes[node] = made = _copied(graph, node, name, nodes)
        if node.op == "call_module":
            made.target = _own_name(part, str(node.target))
        elif node.op == "placeholder":
            made.target = str(node.target).removeprefix(f"{part}__")
    graph.output(tuple(nodes[each] for each in _results(joint.graph)[part]))
    graph.set_codegen(like.graph._codegen)
    graph.lint()
    called = {str(node.target) for node in graph.find_nodes(op="call_module")}
    whole, own = state_of(joint), state_of(like).tensors
    foreign = {name for other in others for name in state_of(other).tensors if name not in own}  # their constants
    modules = {_own_name(part, name): each for name, each in whole.modules.items()}
    state = replace(whole.without(foreign), modules={name: each for name, each in modules.items() if name in called})
    known = known_info(like)
    info = replace(info_of(joint), part=part, examples=known.examples, constants=known.constants)
    module = assemble(graph, state, meta=with_info(joint.meta, info), training=joint.training, trainable=frozenset())
    return checked_by(module, f"part {part!r}", PLAIN)


def _in_order(graph: fx.Graph, known: Iterable[str]) -> Iterator[fx.Node]:
    """Yield the nodes that read tensors: those of known tensors in their order, each with the new ones that stand behind it."""
    groups: dict[str, list[fx.Node]] = {"": [], **{name: [] for name in known}}
    current = ""
    for node in graph.find_nodes(op="get_attr"):
        current = str(node.target) if node.target in groups else current
        groups[current].append(node)
    for nodes in groups.values():
        yield from nodes


def _results(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """Return the outputs of each part in a joined graph."""
    leaves: Any = graph.output_node().args[0]
    spec = graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    return pytree.tree_unflatten(leaves, spec)  # type: ignore[no-any-return]


def _joint_name(part: str, name: str) -> str:
    """Return the name of a called module in a joined graph: checks are of one part, dropouts of a branch."""
    return name.replace(f"{PREFIX}.", f"{PREFIX}.{part}_", 1) if name.startswith(f"{PREFIX}.") else name


def _own_name(part: str, name: str) -> str:
    return name.replace(f"{PREFIX}.{part}_", f"{PREFIX}.", 1) if name.startswith(f"{PREFIX}.") else name


def _copied(graph: fx.Graph, node: fx.Node, name: str, nodes: Mapping[fx.Node, fx.Node], part: str = "") -> fx.Node:
    """Copy a node into a graph. The calls of modules that recorded it are told apart by the part, if one is given."""
    args: Any = fx.map_arg(node.args, nodes.__getitem__)
    kwargs: Any = fx.map_arg(node.kwargs, nodes.__getitem__)
    made = graph.create_node(node.op, node.target, args, kwargs, name=name, type_expr=node.type)
    made.meta = dict(node.meta)
    if "nn_module_stack" in made.meta:
        calls = {call.rpartition(_OF)[2]: module for call, module in node.meta["nn_module_stack"].items()}
        made.meta["nn_module_stack"] = {f"{part}{_OF}{call}" if part else call: each for call, each in calls.items()}
    return made


_OF = "__of__"
