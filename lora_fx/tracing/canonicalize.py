"""Normal form of a trace: one flat graph of ATen operators, made from the output of torch.export in passes of one concern each.

The passes edit the given graph, which belongs to the tracer. In their order:

    inline_regions            wrapped sub-graphs (``no_grad`` and disabled-autocast regions of rotary embeddings)
    written_names             (changes nothing) tensors that a model writes to, which is refused but for running statistics
    remove_assertions         metadata assertions; the input checks replace them
    use_first_names           one ``get_attr`` a tensor, under its first name; none for unused tensors
    follow_input_device       device literals → the device of an input
    numbered                  names that do not depend on the history of a graph
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import fx

from lora_fx.errors import TraceError
from lora_fx.graph.aten_kinds import arguments_of
from lora_fx.graph.batch_norms import OPERATORS
from lora_fx.graph.provenance import source_line
from lora_fx.torch_internals import HigherOrderOperator, pytree

aten = torch.ops.aten
higher_order = torch.ops.higher_order


def inline_regions(module: fx.GraphModule, *, training: bool) -> None:
    """Replace calls of wrapped sub-graphs by their nodes.

    Results of a ``no_grad`` region do not require a gradient; a ``detach`` on each of them says so in the flat graph.

    Args:
        module: edited.
        training: whether gradients matter.

    Raises:
        TraceError: a region computes under autocast, or writes where gradients would not know of it, or an operator calls
            sub-graphs in another way.
    """
    graph = module.graph
    _remove_writes_to_itself(graph)
    for node in list(graph.nodes):
        if not isinstance(node.target, HigherOrderOperator):
            continue
        region, operands, detached = _region(module, node)
        inline_regions(region, training=training)
        if training and detached:
            _check_writes(region, operands)
        results = _inline(graph, node, region, operands, detached)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
    for node in list(graph.nodes):
        if (
            node.op == "get_attr"
            and not node.users
            and isinstance(attrgetter(str(node.target))(module), fx.GraphModule)
        ):
            graph.erase_node(node)


def _remove_writes_to_itself(graph: fx.Graph) -> None:
    """Remove ``x.set_(x)``, with which a parametrization begins; a model may register one for the length of a call."""
    for node in graph.find_nodes(op="call_function", target=aten.set_.source_Tensor):
        if node.args[0] is node.args[1]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _region(module: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, tuple[Any, ...], bool]:
    if node.target is higher_order.wrap_with_set_grad_enabled:
        enabled, callee, *operands = node.args
        detached = not enabled
    elif node.target is higher_order.wrap_with_autocast:
        _device, _dtype, enabled, _cache, callee, *operands = node.args
        if enabled:
            raise TraceError(
                f"the model computes a part under its own torch.autocast, which a graph cannot hold{source_line(node)}."
            )
        detached = False
    else:
        raise TraceError(
            f"the model calls {node.target}, an operator on sub-graphs that rewriting does not see into{source_line(node)}. "
            "Trace the parts on either side of it as models of their own."
        )
    assert isinstance(callee, fx.Node)
    region = attrgetter(str(callee.target))(module)
    assert isinstance(region, fx.GraphModule)
    return region, tuple(operands), detached


def _check_writes(region: fx.GraphModule, operands: tuple[Any, ...]) -> None:
    """Refuse writes to the operands of a region; writes to the model's own tensors and inputs are refused anyway."""
    computed = (node for node in operands if isinstance(node, fx.Node) and node.op not in ("get_attr", "placeholder"))
    outside = {storage for node in computed if _is_differentiable(node.meta.get("val")) for storage in _storages(node)}
    for node in region.graph.nodes:
        if not outside.isdisjoint(_written(node)):
            raise TraceError(
                f"the model writes to a tensor under torch.no_grad() that was made outside{source_line(node)}: its gradient passes by "
                "the write, and that of a graph would not. Write to a copy, or use inference=True."
            )


def _inline(
    graph: fx.Graph, call: fx.Node, region: fx.GraphModule, operands: tuple[Any, ...], detached: bool
) -> list[Any]:
    values: dict[fx.Node, Any] = dict(zip(region.graph.find_nodes(op="placeholder"), operands, strict=True))
    with graph.inserting_before(call):
        for node in region.graph.nodes:
            if node.op == "output":
                results: list[Any] = list(fx.map_arg(node.args[0], lambda n: values[n]))
            elif node.op != "placeholder":
                values[node] = graph.node_copy(node, lambda n: values[n])
        return [_detach(graph, result) if detached and result not in operands else result for result in results]


def _detach(graph: fx.Graph, value: Any) -> Any:
    if not isinstance(value, fx.Node) or not _is_differentiable(value.meta.get("val")):
        return value
    node = graph.call_function(aten.detach.default, (value,))
    node.meta = {key: value.meta[key] for key in ("val", "nn_module_stack", "stack_trace") if key in value.meta}
    return node


def _is_differentiable(value: object) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def remove_assertions(graph: fx.Graph) -> None:
    """Remove assertions on the dtype and device of intermediate values, which follow from those of the inputs."""
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(node)


def written_names(graph: fx.Graph, *, training: bool) -> list[str]:
    """Return the names of the tensors and inputs that a graph writes to, in place or as running statistics, but for those of batch norms."""
    names: dict[object, str] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "placeholder"):
            names.update(dict.fromkeys(_storages(node), str(node.target)))
    followed = {node for norm in batch_norms(graph) if training for node in (norm, counter_of(norm))}
    found = (
        names[storage] for node in graph.nodes if node not in followed for storage in _written(node) if storage in names
    )
    return list(dict.fromkeys(found))


def batch_norms(graph: fx.Graph) -> list[fx.Node]:
    """Return the batch norms, and instance norms, that update running statistics of the model."""
    return [
        node
        for node in graph.nodes
        if node.target in OPERATORS
        and node.args[5] is True
        and all(isinstance(each, fx.Node) and each.op == "get_attr" for each in node.args[3:5])
    ]


def counter_of(norm: fx.Node) -> fx.Node | None:
    """Return the node that counts a batch for a batch norm, just before it, or None if it has no such counter."""
    path = str(norm.args[3].target).rpartition(".")[0]  # type: ignore[union-attr]
    name = f"{path}.num_batches_tracked".removeprefix(".")
    node = norm.prev
    while node.target not in OPERATORS and node.op == "call_function":
        if node.target is aten.add_.Tensor and counted_by(node).target == name and node.args[1] == 1:
            return node
        node = node.prev
    return None


def counted_by(counter: fx.Node) -> fx.Node:
    """Return the tensor that a node counts in; further counts are recorded as those of its result."""
    source = counter.args[0]
    assert isinstance(source, fx.Node)
    return counted_by(source) if source.target is counter.target else source


def _written(node: fx.Node) -> Iterator[object]:
    """Yield the storages that an operator writes to. Views share theirs, whatever operators made them."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or node.target is aten.detach_.default:  # detach_ writes no values
        return
    given = arguments_of(node)
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if given.get("training") is True or given.get("use_input_stats") is True:  # schemas do not mark these writes
        written += ["running_mean", "running_var"]
    for operand in pytree.tree_leaves([given.get(name) for name in written]):
        if isinstance(operand, fx.Node):
            yield from _storages(operand)


def _storages(node: fx.Node) -> list[object]:
    values = pytree.tree_leaves(node.meta.get("val"))
    return [value.untyped_storage()._cdata for value in values if isinstance(value, torch.Tensor)]


def use_first_names(graph: fx.Graph, aliases: Mapping[str, str]) -> None:
    """Name each tensor once, by the first of its names, and drop tensors that nothing reads."""
    first: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        target = aliases[str(node.target)]
        if target in first:
            node.replace_all_uses_with(first[target])
        elif node.users:
            node.target = target
            first[target] = node
            continue
        graph.erase_node(node)


def follow_input_device(graph: fx.Graph) -> None:
    """Replace every device literal by the device of the first tensor input, so that a graph runs wherever its inputs are."""
    nodes = [
        n for n in graph.nodes if any(isinstance(leaf, torch.device) for leaf in pytree.tree_leaves((n.args, n.kwargs)))
    ]
    if not nodes:
        return
    source = next((n for n in graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), torch.Tensor)), None)
    if source is None:
        raise TraceError("the graph makes tensors on a fixed device and has no tensor input to take the device from.")
    with graph.inserting_before(next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))):
        device = graph.call_function(getattr, (source, "device"))
    for node in nodes:
        node.args, node.kwargs = pytree.tree_map(
            lambda leaf: device if isinstance(leaf, torch.device) else leaf, (node.args, dict(node.kwargs))
        )


def numbered(graph: fx.Graph) -> fx.Graph:
    """Return a copy in which nodes are named by their operators, and numbered in their order; inputs and tensors keep their names.

    Of torch.export's metadata only the entries that this package reads are kept.
    """
    made = fx.Graph()
    image: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: image[each])
        name = _name(node)
        image[node] = made.create_node(node.op, node.target, args, kwargs, name, node.type)
        image[node].meta = {key: node.meta[key] for key in _KEPT if key in node.meta}
    made.set_codegen(graph._codegen)
    return made


def _name(node: fx.Node) -> str | None:
    """Return the name that a copy of a node is to have; None for a call of a module, which fx names after its path."""
    if node.op == "call_function":
        return _NUMBER.sub("", node.name)
    return None if node.op == "call_module" else node.name


_NUMBER = re.compile(r"(_\d+)+$")
_KEPT = ("val", "nn_module_stack", "stack_trace", "custom")
