"""The dataflow as each group sees it: edges between its items, and stubs for values from outside.

So a group can be laid out by itself, whatever else is open. A tensor that several layers read (a mask, cos, sin) is a stub at
each use: drawn as edges, it would tie the picture in knots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lora_fx.drawing.describe.difference import Entry, Union
from lora_fx.drawing.describe.module_tree import Group, Item

EdgeStatus = Literal["same", "added", "removed"]

_MAX_READERS = 4
"""How many items of one group may have an edge from a shared tensor; more get stubs."""


@dataclass(frozen=True)
class Stub:
    """A value from outside of a group, and the items in it that read it."""

    source: Entry
    to: tuple[Item, ...]
    status: EdgeStatus
    shared: bool


@dataclass
class Wiring:
    """Edges between the items of one group, and stubs for the values that they read from outside."""

    edges: dict[tuple[Item, Item], EdgeStatus] = field(default_factory=dict)
    stubs: list[Stub] = field(default_factory=list)


def wire(root: Group, union: Union) -> Mapping[Group, Wiring]:
    """Return the wiring of each group."""
    chains = dict(_chains(root, ()))
    shared = _shared(union, chains)
    wirings = {group: _Collected() for group in root.groups()}
    for reader, chain in chains.items():
        for source, status in _read(reader, union):
            _record(source, reader, status, chains[source], chain, wirings, shared=source in shared)
    return {group: collected.wiring() for group, collected in wirings.items()}


@dataclass
class _Collected:
    edges: dict[tuple[Item, Item], EdgeStatus] = field(default_factory=dict)
    of_shared: dict[Entry, dict[Item, EdgeStatus]] = field(
        default_factory=dict
    )  # readers of each shared tensor, with an edge from it
    sources: dict[Entry, Item] = field(default_factory=dict)  # the item that holds such a tensor
    stubs: dict[tuple[Entry, Item | None, EdgeStatus], list[Item]] = field(default_factory=dict)

    def wiring(self) -> Wiring:
        """Return the edges and stubs, after all readers of shared tensors are counted."""
        made = Wiring(dict(self.edges))
        for source, readers in self.of_shared.items():
            for reader, status in readers.items():
                if len(readers) <= _MAX_READERS:
                    made.edges.setdefault((self.sources[source], reader), status)
                else:
                    made.stubs.append(Stub(source, (reader,), status, shared=True))
        for (source, one, status), items in self.stubs.items():
            made.stubs.append(Stub(source, tuple(dict.fromkeys(items)), status, shared=one is not None))
        return made


def _chains(group: Group, around: tuple[Group, ...]) -> Iterator[tuple[Entry, tuple[Group, ...]]]:
    """Yield each operator with the groups around it, from the outside."""
    for item in group.items:
        if isinstance(item, Group):
            yield from _chains(item, (*around, group))
        else:
            yield item, (*around, group)


def _read(reader: Entry, union: Union) -> Iterator[tuple[Entry, EdgeStatus]]:
    """Yield the former and present sources of a node, each with its status."""
    whole: EdgeStatus | None = reader.status if reader.status in ("added", "removed") else None
    gained = union.gained.get(reader, ())
    for source in union.inputs[reader]:
        yield source, whole or ("added" if source in gained else "same")
    for source in union.former.get(reader, ()):
        yield source, "removed"


def _record(
    source: Entry,
    reader: Entry,
    status: EdgeStatus,
    above: tuple[Group, ...],
    chain: tuple[Group, ...],
    wirings: Mapping[Group, _Collected],
    *,
    shared: bool,
) -> None:
    depth = next(
        (d for d, (a, b) in enumerate(zip(above, chain, strict=False)) if a is not b), min(len(above), len(chain))
    )
    here = wirings[chain[depth - 1]]
    start: Item = above[depth] if depth < len(above) else source
    end: Item = chain[depth] if depth < len(chain) else reader
    if shared:
        here.sources[source] = start
        here.of_shared.setdefault(source, {}).setdefault(end, status)
    else:
        here.edges[start, end] = _joined(here.edges.get((start, end)), status)
    for level in range(depth, len(chain)):
        item: Item = chain[level + 1] if level + 1 < len(chain) else reader
        if not shared:
            wirings[chain[level]].stubs.setdefault((source, None, status), []).append(item)
        elif item is reader:  # a closed group does not show values that all layers read
            wirings[chain[level]].stubs.setdefault((source, item, status), []).append(item)


def _joined(known: EdgeStatus | None, status: EdgeStatus) -> EdgeStatus:
    return status if known is None or known == status else "same"


def _shared(union: Union, chains: Mapping[Entry, tuple[Group, ...]]) -> set[Entry]:
    """Return the values that operators in several layers read."""
    layers: dict[Entry, set[Group]] = {}
    for reader, chain in chains.items():
        layer = next((group for group in chain if group.kind == "module" and group.is_layer), None)
        if layer is not None:
            for source in (*union.inputs[reader], *union.former.get(reader, ())):
                layers.setdefault(source, set()).add(layer)
    return {source for source, found in layers.items() if len(found) > 1}
