"""Two graphs as one: every node of either once, with what became of it.

Nodes are matched by where they come from: those of branches by their stamps, tensors by their names, inputs by theirs, and all
others by their place among the operators of one call of a module, in order. What is matched is compared argument by argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lora_fx.drawing._reading import Reader, stamp_of
from lora_fx.factors import original_name
from lora_fx.operators import size_of
from lora_fx.provenance import source_of

Status = Literal["same", "added", "removed", "rewired", "changed"]

_LARGEST = 4_000_000  # pairs of operators that are compared; where there would be more, names decide


@dataclass(frozen=True)
class Difference:
    """One thing in which a node differs between two graphs."""

    what: str
    before: str
    after: str


@dataclass(frozen=True, eq=False)
class Entry:
    """One node of the union of two graphs.

    Attributes:
        node: of the graph after; of the graph before where it was removed.
        reader: of that graph.
        status: what became of it.
        differences: what the two graphs have different; for nodes that both have.
        hidden: weights, sizes and checks that are in both: they stand in the labels of what reads them.
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
        entries: in the order of the graph after, removed nodes behind what they followed.
        inputs: what a node reads that is drawn, in the order of its arguments.
        gained: what of that it did not read before; of nodes that are in both graphs.
        former: what it read before, and reads no more.
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
    """Return for nodes of the graph before what they are in the graph after."""
    nested = all(any(reader.frames(n) for n in reader.graph_module.graph.nodes) for reader in (before, after))
    old, new = (_by_place(reader, nested=nested) for reader in (before, after))
    matched: dict[fx.Node, fx.Node] = {}
    for place, nodes in old.items():
        matched.update(_align(nodes, new.get(place, [])))
    return matched


def _by_place(reader: Reader, *, nested: bool) -> dict[tuple[str, ...], list[fx.Node]]:
    places: dict[tuple[str, ...], list[fx.Node]] = {}
    for node in reader.graph_module.graph.nodes:
        places.setdefault(_place(node, reader, nested), []).append(node)
    return places


def _place(node: fx.Node, reader: Reader, nested: bool) -> tuple[str, ...]:
    """Return where a node is looked for in the other graph; within a place, order decides.

    Args:
        node: of a graph.
        reader: of that graph.
        nested: whether both graphs know the modules that their nodes come from.
    """
    if node.op == "get_attr":
        return "tensor", original_name(str(node.target)) or str(node.target)
    if node.op == "placeholder":
        return "input", str(node.target)
    if node.op == "output":
        return ("output",)
    if (stamp := stamp_of(node)) is not None:
        return "branch", stamp.get("site", ""), stamp.get("adapter", ""), stamp.get("part", "")
    frames = reader.frames(node) if nested else ()
    return ("call", frames[-1].path, str(frames[-1].call)) if frames else ("call",)


def _align(old: Sequence[fx.Node], new: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield the pairs of nodes, of two sequences in one place, that are one and the same operator."""
    mine, theirs = [_kind(node) for node in old], [_kind(node) for node in new]
    start, shorter = 0, min(len(mine), len(theirs))
    while start < shorter and mine[start] == theirs[start]:
        start += 1
    end = 0
    while end < shorter - start and mine[-1 - end] == theirs[-1 - end]:
        end += 1
    if len(mine) == len(theirs) == start + end:
        yield from zip(old, new, strict=True)
        return
    # Lines of source tell operators of one kind apart; which of these remain at both ends, they say too.
    yield from _align_middle(old, new)


def _align_middle(old: Sequence[fx.Node], new: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    if len(old) * len(new) > _LARGEST:
        named = {(node.name, _kind(node)): node for node in new}
        yield from ((node, named[node.name, _kind(node)]) for node in old if (node.name, _kind(node)) in named)
        return
    with_lines = all(any(source_of(node) for node in nodes) for nodes in (old, new))
    mine, theirs = ([(*_kind(n), source_of(n) if with_lines else "") for n in nodes] for nodes in (old, new))
    for block in SequenceMatcher(None, mine, theirs, autojunk=False).get_matching_blocks():
        yield from zip(old[block.a : block.a + block.size], new[block.b : block.b + block.size], strict=True)


def _kind(node: fx.Node) -> tuple[str, str]:
    return node.op, str(node.target) if isinstance(node.target, str | torch._ops.OpOverload) else repr(node.target)


def _compare(
    old: fx.Node, new: fx.Node, image: Mapping[fx.Node, fx.Node], before: Reader, after: Reader
) -> tuple[Status, tuple[Difference, ...]]:
    """Return what became of a node that both graphs have."""
    if new.op == "get_attr":
        same = str(old.target) == str(new.target) and _same_value(old, new, before, after)
        return ("same" if same else "changed"), ()
    changed, rewired = [], []
    for what, mine, theirs in _arguments(old, new, image):
        if isinstance(mine, fx.Node) and isinstance(theirs, fx.Node):
            if not (mine.op == theirs.op == "get_attr"):  # weights are compared by themselves
                rewired.append(Difference(what, mine.name, theirs.name))
        else:
            changed.append(Difference(what, before.argument(mine), after.argument(theirs)))
    mine_weights, new_weights = before.weights(old), after.weights(new)
    for weight, other in zip(mine_weights, new_weights, strict=False):
        if (weight.name, weight.value) != (other.name, other.value):
            changed.append(
                Difference("weight", f"{weight.name} {weight.value}".strip(), f"{other.name} {other.value}".strip())
            )
    if old.op == "call_module" and (mine := _module(old, before)) != (theirs := _module(new, after)):
        changed.append(Difference("module", mine, theirs))
    if not _same_value(old, new, before, after):
        changed.append(Difference("value", before.value(old), after.value(new)))
    status: Status = "changed" if changed else "rewired" if rewired else "same"
    return status, tuple(changed + rewired)


def _arguments(old: fx.Node, new: fx.Node, image: Mapping[fx.Node, fx.Node]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the arguments in which two nodes differ: where, the one before, the one after."""
    mine, mine_spec = pytree.tree_flatten((old.args, dict(old.kwargs)))
    theirs, theirs_spec = pytree.tree_flatten((new.args, dict(new.kwargs)))
    if mine_spec != theirs_spec:
        yield "arguments", (old.args, dict(old.kwargs)), (new.args, dict(new.kwargs))
        return
    for index, (left, right) in enumerate(zip(mine, theirs, strict=True)):
        moved: Any = fx.map_arg(left, lambda node: image.get(node, node)) if isinstance(left, fx.Node | slice) else left
        if not (moved is right or (type(moved) is type(right) and moved == right)):
            yield f"argument {index}", left, right


def _module(node: fx.Node, reader: Reader) -> str:
    return repr(reader.graph_module.get_submodule(str(node.target)))


def _same_value(old: fx.Node, new: fx.Node, before: Reader, after: Reader) -> bool:
    """Tell whether two values have one dtype and shape: by their expressions, or by the sizes of their traces."""
    left, right = before.value(old), after.value(new)
    return left == right or not (left and right) or _sizes(old) == _sizes(new) is not None


def _sizes(node: fx.Node) -> Any:
    """Return dtype and sizes of a value as they were in the trace, or None where there are none."""
    value = node.meta.get("val")
    leaves = pytree.tree_leaves(value)
    if not all(isinstance(leaf, torch.Tensor | torch.SymInt | int) for leaf in leaves):
        return None
    return [
        (leaf.dtype, *(size_of(size) for size in leaf.shape)) if isinstance(leaf, torch.Tensor) else size_of(leaf)
        for leaf in leaves
    ]
