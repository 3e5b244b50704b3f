"""Union of two graphs: every node of either once, with its status.

Nodes are matched by their origin: those of branches by their stamps, tensors and inputs by their names, and all others by their
place among the operators of one call of a module, in order. Matched nodes are compared argument by argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from lora_fx.drawing.describe.align import aligned
from lora_fx.drawing.describe.branch_stamps import StampedBranch, branches_of
from lora_fx.drawing.describe.node_text import Reader
from lora_fx.graph.adapter_names import original_name
from lora_fx.graph.aten_kinds import size_of
from lora_fx.graph.compare import same_values
from lora_fx.graph.provenance import code_of, stamp_of
from lora_fx.torch_internals import pytree

Status = Literal["same", "added", "removed", "rewired", "changed"]


@dataclass(frozen=True)
class Difference:
    """One difference of a node between two graphs; ``wiring`` if it reads another node."""

    what: str
    before: str
    after: str
    wiring: bool = False


@dataclass(frozen=True, eq=False)
class Entry:
    """One node of the union of two graphs.

    Attributes:
        node: of the graph after; a removed node, of the graph before.
        reader: of that graph.
        status: its status in the difference.
        differences: between the two graphs, for a node of both.
        hidden: whether it is a weight, size or check of both graphs, which stands in the labels of its readers.
    """

    node: fx.Node
    reader: Reader
    status: Status
    differences: tuple[Difference, ...] = ()
    hidden: bool = False


@dataclass(frozen=True)
class Union:
    """Two graphs as one.

    Attributes:
        entries: in the order of the graph after; removed nodes follow their predecessors.
        inputs: the drawn nodes that a node reads, in the order of its arguments.
        gained: those of them that it did not read before, for nodes of both graphs.
        former: the nodes that it read before, and no longer reads.
    """

    entries: tuple[Entry, ...]
    inputs: Mapping[Entry, tuple[Entry, ...]]
    gained: Mapping[Entry, tuple[Entry, ...]]
    former: Mapping[Entry, tuple[Entry, ...]]


def single(graph: Reader) -> Union:
    """Return one graph alone, without any difference."""
    entries = {node: Entry(node, graph, "same", hidden=graph.is_quiet(node)) for node in graph.graph_module.graph.nodes}
    inputs = {entry: _drawn(node.all_input_nodes, entries) for node, entry in entries.items()}
    return Union(tuple(entries.values()), inputs, {}, {})


def unite(before: Reader, after: Reader) -> Union:
    """Return two graphs as one."""
    image = _match(before, after)
    origin = {new: old for old, new in image.items()}
    compared = {new: _compare(old, new, image, before, after) for old, new in image.items()}
    entries: dict[fx.Node, Entry] = {}
    for node in after.graph_module.graph.nodes:
        status, differences = compared.get(node, ("added", ()))
        entries[node] = Entry(node, after, status, differences, _is_hidden(node, after, status))
    removed: dict[fx.Node | None, list[Entry]] = {}
    last: fx.Node | None = None
    for node in before.graph_module.graph.nodes:
        if node in image:
            entries[node] = entries[image[node]]
            last = image[node]
        else:
            entries[node] = Entry(node, before, "removed", hidden=_is_hidden(node, before, "removed"))
            removed.setdefault(last, []).append(entries[node])
    ordered = list(removed.get(None, ()))
    for node in after.graph_module.graph.nodes:
        ordered += [entries[node], *removed.get(node, ())]
    inputs = {entry: _drawn(entry.node.all_input_nodes, entries) for entry in ordered}
    gained, former = {}, {}
    for new, old in origin.items():
        now, then = inputs[entries[new]], _drawn(old.all_input_nodes, entries)
        gained[entries[new]] = tuple(source for source in now if source not in then)
        former[entries[new]] = tuple(source for source in then if source not in now)
    return Union(tuple(ordered), inputs, *({e: read for e, read in each.items() if read} for each in (gained, former)))


def _is_hidden(node: fx.Node, reader: Reader, status: Status) -> bool:
    return node.op == "get_attr" or (status == "same" and reader.is_quiet(node))


def _drawn(nodes: Sequence[fx.Node], entries: Mapping[fx.Node, Entry]) -> tuple[Entry, ...]:
    return tuple(dict.fromkeys(entries[node] for node in nodes if not entries[node].hidden))


def _match(before: Reader, after: Reader) -> dict[fx.Node, fx.Node]:
    """Return the counterparts in the graph after for nodes of the graph before."""
    nested = all(any(reader.frames(n) for n in reader.graph_module.graph.nodes) for reader in (before, after))
    old, new = (_nodes_by_origin(reader, nested=nested) for reader in (before, after))
    matched: dict[fx.Node, fx.Node] = {}
    for origin, nodes in old.items():
        others = new.get(origin, [])
        for with_code in (True, False):  # operators of the same line of code match first, then those whose line changed
            mine = [_key(node, before, with_code) for node in nodes]
            theirs = [_key(node, after, with_code) for node in others]
            found = {nodes[left]: others[right] for left, right in aligned(mine, theirs)}
            matched.update(found)
            taken = set(found.values())
            nodes, others = [n for n in nodes if n not in found], [n for n in others if n not in taken]
    return matched


def _nodes_by_origin(reader: Reader, *, nested: bool) -> dict[tuple[str, ...], list[fx.Node]]:
    branches = branches_of(reader.graph_module)
    by_origin: dict[tuple[str, ...], list[fx.Node]] = {}
    for node in reader.graph_module.graph.nodes:
        by_origin.setdefault(_origin_of(node, reader, branches.get(node), nested=nested), []).append(node)
    return by_origin


def _origin_of(node: fx.Node, reader: Reader, branch: StampedBranch | None, *, nested: bool) -> tuple[str, ...]:
    """Return the origin of a node, by which it is looked up in the other graph; nodes of one origin match in order.

    Args:
        node: of a graph.
        reader: of that graph.
        branch: the branch of the node, if any.
        nested: whether both graphs record the modules of their nodes.
    """
    if node.op == "get_attr":
        return "tensor", reader.own_name(original_name(str(node.target)) or str(node.target))
    if node.op == "placeholder":
        return "input", str(node.target)
    if node.op == "output":
        return ("output",)
    if reader.is_quiet(node):
        return "size", reader.operator(node), reader.arguments(node)
    if branch is not None:
        return "branch", branch.site, branch.adapter, *branch.factors
    frames = reader.frames(node) if nested else ()
    path = reader.own_name(frames[-1].path) if frames else ""
    return ("call", path, str(frames[-1].call)) if path else ("call",)


def _key(node: fx.Node, reader: Reader, with_code: bool) -> tuple[str, ...]:
    """Return the key by which nodes of one origin match: operator, weights, part in a branch, and on request line of code."""
    if node.op in ("get_attr", "placeholder", "output") or reader.is_quiet(node):
        return ()  # its origin identifies it
    weights = (str(source.target) for source in node.all_input_nodes if source.op == "get_attr")
    part = str(stamp_of(node).get("part", ""))
    own = (reader.own_name(original_name(name) or name) for name in weights)
    return node.op, reader.operator(node), part, code_of(node) if with_code else "", *own


def _compare(
    old: fx.Node, new: fx.Node, image: Mapping[fx.Node, fx.Node], before: Reader, after: Reader
) -> tuple[Status, tuple[Difference, ...]]:
    """Return status and differences of a node of both graphs. Weights are compared at the nodes that read them."""
    if new.op == "get_attr":
        return "same", ()
    changed, rewired = [], []
    for what, mine, theirs in _argument_differences(old, new, image):
        values = all(isinstance(each, fx.Node) and each.op != "get_attr" for each in (mine, theirs))
        if values:
            rewired.append(Difference(what, mine.name, theirs.name, wiring=True))
        else:
            changed.append(Difference(what, before.argument(mine), after.argument(theirs)))
    for source in old.all_input_nodes:
        if source.op == "get_attr" and image.get(source) in new.all_input_nodes:
            changed += _weight_difference(source, image[source], before, after)
    if old.op == "call_module" and (mine := _module_text(old, before)) != (theirs := _module_text(new, after)):
        changed.append(Difference("module", mine, theirs))
    if not _same_value(old, new, before, after):
        changed.append(Difference("value", before.value(old), after.value(new)))
    status: Status = "changed" if changed else "rewired" if rewired else "same"
    return status, tuple(changed + rewired)


def _weight_difference(old: fx.Node, new: fx.Node, before: Reader, after: Reader) -> list[Difference]:
    mine, theirs = before.weight(str(old.target)), after.weight(str(new.target))
    if (before.own_name(mine.name), mine.value) != (after.own_name(theirs.name), theirs.value):
        return [Difference("weight", f"{mine.name} {mine.value}".strip(), f"{theirs.name} {theirs.value}".strip())]
    values = before.constant(mine.name), after.constant(theirs.name)
    if None not in values and not any(value.is_meta for value in values if value is not None):
        left, right = values
        assert left is not None
        assert right is not None
        if not same_values(left, right):
            return [Difference("weight", f"{mine.name} {mine.value}", f"{theirs.name} of other values")]
    return []


def _argument_differences(
    old: fx.Node, new: fx.Node, image: Mapping[fx.Node, fx.Node]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the arguments in which two nodes differ: position, value before, value after."""
    mine, mine_spec = pytree.tree_flatten((old.args, dict(sorted(old.kwargs.items()))))
    theirs, theirs_spec = pytree.tree_flatten((new.args, dict(sorted(new.kwargs.items()))))
    if mine_spec != theirs_spec:
        yield "arguments", (old.args, dict(old.kwargs)), (new.args, dict(new.kwargs))
        return
    for index, (left, right) in enumerate(zip(mine, theirs, strict=True)):
        moved: Any = fx.map_arg(left, lambda node: image.get(node, node)) if isinstance(left, fx.Node | slice) else left
        same = type(moved) is type(right) and (moved == right or (moved != moved and right != right))
        if not (moved is right or same):
            yield f"argument {index}", left, right


def _module_text(node: fx.Node, reader: Reader) -> str:
    return repr(reader.graph_module.get_submodule(str(node.target)))


def _same_value(old: fx.Node, new: fx.Node, before: Reader, after: Reader) -> bool:
    """Tell whether two values have one dtype and shape, by their expressions or by the sizes of their traces."""
    left, right = before.value(old), after.value(new)
    if left == right or not left or not right:
        return True
    sizes = _traced_sizes(old)
    return sizes is not None and sizes == _traced_sizes(new)


def _traced_sizes(node: fx.Node) -> Any:
    """Return dtype and sizes of a value in the trace, or None if it has none."""
    value = node.meta.get("val")
    leaves = pytree.tree_leaves(value)
    if not all(isinstance(leaf, torch.Tensor | torch.SymInt | int) for leaf in leaves):
        return None
    return [
        (leaf.dtype, *(size_of(size) for size in leaf.shape)) if isinstance(leaf, torch.Tensor) else size_of(leaf)
        for leaf in leaves
    ]
