"""Selection of the items and edges of a description that a static picture shows; knows nothing of DOT.

What is on the way to a change is open, all else is closed; of a repeat the first item stands for all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_fx.drawing.render.text import marked, on_the_way

# More items do not fit a page.
_PAGE = 100
# More items are unreadable, and take Graphviz minutes.
_NODES = 400
_EDGES = 1200
_EDGES_IN = 8
# So many closed groups may each have an edge from one shared value; more have its name in a pill.
_MAX_EDGES_OF_SHARED = 4
# Equal siblings with this many operators, such as every second layer, are opened once.
_SIZEABLE = 16
# This many operators in a row with nothing to show but their names are one box.
_CHAIN = 3


class IndexedDescription:
    """A description with indices for frequent questions.

    Args:
        description: the description.
        closed: whether only the groups of its first view are to be opened, and not those on the way to a change.
    """

    def __init__(self, description: Mapping[str, Any], *, closed: bool = False) -> None:
        self.nodes: Sequence[Mapping[str, Any]] = description["nodes"]
        self.groups: Sequence[Mapping[str, Any]] = description["groups"]
        self.root: str = description.get("root", "g0")
        self.wanted = self._wanted({**description, "changes": ()} if closed else description)
        self.around: dict[str, str] = {}
        self.position: dict[str, int] = {}
        self._forms: dict[Any, int] = {}
        self._ways: dict[str, list[str]] = {}
        self.readers: dict[str, set[str]] = {}
        for index, node in enumerate(self.nodes):
            for source in (*node.get("inputs", ()), *node.get("former", ())):
                self.readers.setdefault(source, set()).add(f"n{index}")
        for index, group in enumerate(self.groups):
            for position, item in enumerate(group["items"]):
                self.around[item] = f"g{index}"
                self.position[item] = position

    def group(self, identity: str) -> Mapping[str, Any]:
        """Return a group of the description."""
        return self.groups[int(identity[1:])]

    def node(self, identity: str) -> Mapping[str, Any]:
        """Return a node of the description."""
        return self.nodes[int(identity[1:])]

    def _wanted(self, description: Mapping[str, Any]) -> set[str]:
        """Return the groups to open; of repeats, only the ones with a change."""
        return {
            identity
            for identity in on_the_way(description)
            if self.group(identity)["kind"] != "repeat" or marked(self.group(identity)["counts"])
        }

    def first(self, identity: str) -> str | None:
        """Return the item of a repeat whose content stands for it, if that is a group."""
        group = self.group(identity)
        if group["kind"] != "repeat" or not group["items"] or not group["items"][0].startswith("g"):
            return None
        return str(group["items"][0])

    def content(self, identity: str) -> Sequence[str]:
        """Return the items that an open group shows."""
        first = self.first(identity)
        if first is not None:
            return self.content(first)
        items: Sequence[str] = self.group(identity)["items"]
        return items[:1] if self.group(identity)["kind"] == "repeat" else items

    def differs(self, item: str) -> bool:
        """Return whether a node or anything in a group differs between the two graphs."""
        if item.startswith("g"):
            return bool(marked(self.group(item)["counts"]))
        status: str = self.node(item)["status"]
        return status != "same"

    def operators(self, items: Iterable[str]) -> int:
        """Return how many nodes items hold."""
        return sum(self.group(item)["counts"]["nodes"] if item.startswith("g") else 1 for item in items)

    def form(self, item: str, *, outermost: bool = True) -> int:
        """Return a number that is the same for items that are equal but for their names and their sources outside."""
        if item.startswith("n"):
            node = self.node(item)
            weights = tuple((weight["short"], weight.get("value")) for weight in node.get("weights", ()))
            content: Any = (node["op"], node["status"], node.get("part"), node.get("value"), weights)
        else:
            group = self.group(item)
            content = (
                group["kind"],
                None if outermost else group["name"],
                group.get("type"),
                group.get("note"),
                tuple(self.form(inner, outermost=False) for inner in group["items"]),
                tuple(tuple(edge) for edge in group.get("edges", ())),
            )
        return self._forms.setdefault(content, len(self._forms))

    def members(self, item: str) -> list[str]:
        """Return the nodes in an item, at any depth."""
        if item.startswith("n"):
            return [item]
        return [node for inner in self.group(item)["items"] for node in self.members(inner)]

    def way(self, item: str) -> list[str]:
        """Return the groups around an item, the outermost first, and the item."""
        if item not in self._ways:
            self._ways[item] = [*(self.way(self.around[item]) if item in self.around else ()), item]
        return self._ways[item]

    def chains(self, items: Sequence[str]) -> Iterator[list[str]]:
        """Yield items in order, plain chains together: each item has one source and one reader; none differs."""
        chain_of: dict[str, list[str]] = {}
        for item in items:
            before = self._plain(item)
            chain = chain_of.get(before, []) if before and len(self.readers[before]) == 1 else []
            chain.append(item)
            if before is not None:
                chain_of[item] = chain
        for item in items:
            chain = chain_of.get(item, [])
            if len(chain) < _CHAIN:
                yield [item]
            elif item == chain[0]:
                yield chain

    def _plain(self, item: str) -> str | None:
        """Return the sources of an item, perhaps none, if it is an operator with at most one input and nothing to show but its name."""
        if not item.startswith("n"):
            return None
        node = self.node(item)
        plain = node["kind"] == "operator" and node["status"] == "same" and not node.get("weights")
        inputs = node.get("inputs", ())
        return (inputs[0] if inputs else "") if plain and len(inputs) <= 1 else None


class Shown:
    """The part of a description that is in the picture.

    Attributes:
        inside: what each open group shows.
        gathered: of an item that is not shown, the box that stands for it and others.
        boxes: the items for which such a box stands.
        chains: those of the boxes that are plain chains of operators.
        alike: of a group that could be open, the sibling that is open and exactly alike.
        closed: how many groups should be open, and have no room.
    """

    def __init__(self, view: IndexedDescription) -> None:
        self.inside: dict[str, list[str]] = {}
        self.gathered: dict[str, str] = {}
        self.boxes: dict[str, list[str]] = {}
        self.chains: set[str] = set()
        self.alike: dict[str, str] = {}
        self.closed = 0
        self._room = _NODES
        self._open(view.root, view)

    @property
    def beyond_a_page(self) -> bool:
        """Whether a page has no room for so many items."""
        return _NODES - self._room > _PAGE

    def _open(self, identity: str, view: IndexedDescription) -> None:
        """Open a group and those inside of it, in the order of the graph, as long as there is room."""
        chains = list(view.chains(view.content(identity)))
        content = [chain[0] for chain in chains]
        items: Sequence[str] = content
        if self._needs(content, view) > self._room:
            kept = self._room // 5
            if kept < 10 and identity != view.root:
                self.closed += 1
                return
            items = _most_telling(content, kept, view)
        self.inside[identity] = self._with_boxes(identity, chains, set(items))
        first = view.first(identity)
        while first is not None:
            self.inside[first] = self.inside[identity]
            first = view.first(first)
        self._room -= self._needs(items, view) - 1 + len(self.inside[identity]) - len(items)
        opened: dict[int, str] = {}
        for item in items:
            if item not in view.wanted:
                continue
            if view.operators([item]) < _SIZEABLE or view.group(item)["kind"] == "repeat":
                self._open(item, view)
            elif (form := view.form(item)) in opened:
                self.alike[item] = opened[form]
            else:
                self._open(item, view)
                opened |= {form: item} if item in self.inside else {}

    def _needs(self, items: Sequence[str], view: IndexedDescription) -> int:
        """Return the number of nodes of a picture for these items, with the pills above them."""
        if not items:
            return 0
        group, among = (
            view.group(view.around[items[0]]),
            {view.position[item] for item in items if item.startswith("n")},
        )
        pills = sum(len(among.intersection(stub["to"])) for stub in group.get("stubs", ()) if stub.get("shared"))
        pills += sum(len(view.node(item).get("inputs", ())) > _EDGES_IN + 1 for item in items if item.startswith("n"))
        return len(items) + pills

    def _with_boxes(self, identity: str, chains: Iterable[Sequence[str]], kept: set[str]) -> list[str]:
        """Return the shown items of a group: the chains that are kept, and boxes in place of all others."""
        shown: list[str] = []
        for chain in chains:
            is_kept = chain[0] in kept
            if is_kept and len(chain) == 1:
                shown.append(chain[0])
                continue
            if is_kept or not shown or shown[-1] not in self.boxes or shown[-1] in self.chains:
                shown.append(f"{identity}:{len(shown)}")
                self.boxes[shown[-1]] = []
                self.chains |= {shown[-1]} if is_kept else set()
            self.boxes[shown[-1]] += chain
            self.gathered |= dict.fromkeys(chain, shown[-1])
        return shown

    def standing_for(self, node: str, view: IndexedDescription) -> str | None:
        """Return the item of the picture that is or holds a node; in a repeat, the one of the first item.

        Of a node outside of the picture, None.
        """
        way = view.way(node)
        if view.root not in way:
            return None
        here = view.root
        for item in way[way.index(here) + 1 :]:
            if here not in self.inside:
                return here
            group = view.group(here)
            position = 0 if group["kind"] == "repeat" else view.position[item]
            if position >= len(group["items"]):
                return None
            here = group["items"][position]
            if here in self.gathered:
                return self.gathered[here]
        return here

    def first_in(self, cluster: str) -> str:
        """Return the first item in an open group that is no open group itself."""
        first = self.inside[cluster][0]
        return self.first_in(first) if first in self.inside else first

    def clusters(self, item: str, view: IndexedDescription) -> list[str]:
        """Return the clusters around an item of the picture, the outermost first."""
        around = [item.split(":")[0]] if item in self.boxes else view.way(item)[:-1]
        if item in self.boxes:
            around = view.way(around[0])
        return [group for group in around if group in self.inside and not self._is_flat(group, view)]

    @staticmethod
    def _is_flat(group: str, view: IndexedDescription) -> bool:
        """Tell whether a group stands for its repeat, and so shares its cluster."""
        return group in view.around and view.first(view.around[group]) == group


def _most_telling(items: Sequence[str], count: int, view: IndexedDescription) -> list[str]:
    """Return as many items, in order: first those with a change, then those nearest to the start."""
    chosen = [item for item in items if view.differs(item)][:count]
    chosen += [item for item in items if not view.differs(item)][: count - len(chosen)]
    kept = set(chosen)
    return [item for item in items if item in kept]


@dataclass(frozen=True)
class _Read:
    source: str
    status: str
    shared: bool


@dataclass
class Routes:
    """Edges between the shown items.

    Attributes:
        edges: between items of the picture, with their status.
        pills: above an item, the names of values that come from afar.
        sources: items of the picture whose values stand in pills, and above which items.
        more: how many further values an item reads than have edges.
        left_out: how many edges have no room.
    """

    view: IndexedDescription
    shown: Shown
    edges: dict[tuple[str, str, str], None] = field(default_factory=dict)
    pills: dict[str, dict[str, str]] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    more: dict[str, int] = field(default_factory=dict)
    left_out: int = 0

    def __post_init__(self) -> None:
        items = [
            item for identity, inside in self.shown.inside.items() for item in inside if item not in self.shown.inside
        ]
        reads = {item: list(self._reads(item)) for item in dict.fromkeys(items)}
        boxes = Counter(
            source
            for item in reads
            if not item.startswith("n")
            for source in {read.source for read in reads[item] if read.shared}
        )
        for item, found in reads.items():
            single = item.startswith("n") or item in self.shown.chains
            for read in found:
                self._connect(item, read, as_pill=read.shared and (single or boxes[read.source] > _MAX_EDGES_OF_SHARED))
            self._limit(item)
        kept = list(self.edges)[:_EDGES]
        self.left_out = len(self.edges) - len(kept)
        self.edges = dict.fromkeys(kept)

    def _limit(self, item: str) -> None:
        """Drop edges to an item with very many sources: unchanged ones, the oldest first."""
        edges = [edge for edge in self.edges if edge[1] == item]
        excess = len(edges) - _EDGES_IN
        if excess <= 1:
            return
        out = sorted(edges, key=lambda edge: edge[2] != "same")[:excess]
        for edge in out:
            del self.edges[edge]
        self.more[item] = len(out)

    def _connect(self, item: str, read: _Read, *, as_pill: bool) -> None:
        source = self.shown.standing_for(read.source, self.view)
        if source == item:
            return
        if source is not None and not as_pill:
            self.edges[source, item, read.status] = None
            return
        self.pills.setdefault(item, {})[read.source] = read.status
        if source is not None:
            self.sources.setdefault(source, []).append(item)

    def _reads(self, item: str) -> Iterator[_Read]:
        """Yield the sources of an item of the picture outside of it."""
        if item in self.shown.boxes:
            yield from dict.fromkeys(read for each in self.shown.boxes[item] for read in self._reads(each))
        elif item.startswith("g"):
            found = (read for node in self.view.members(item) for read in self._reads_of_node(node))
            yield from dict.fromkeys(read for read in found if item not in self.view.way(read.source))
        else:
            yield from self._reads_of_node(item)

    def _reads_of_node(self, item: str) -> Iterator[_Read]:
        node, group = self.view.node(item), self.view.group(self.view.around[item])
        here = self.view.position[item]
        stubs = {stub["source"]: stub for stub in group.get("stubs", ()) if here in stub["to"]}
        statuses = {
            source: status for source, to, status in group.get("edges", ()) if to == here and status != "removed"
        }
        for source in node.get("inputs", ()):
            stub = stubs.get(source, {})
            status = stub.get("status") or statuses.get(self._position_beside(source, item), "same")
            # An edge from a group says only that something in it is read, which may have been so before.
            status = "added" if self.view.node(source)["status"] == "added" else status
            yield _Read(source, status, bool(stub.get("shared")))
        for source in node.get("former", ()):
            yield _Read(source, "removed", shared=False)

    def _position_beside(self, source: str, item: str) -> int | None:
        """Return the position, in the group of an item, of the item that holds a source."""
        way = self.view.way(source)
        group = self.view.around[item]
        return self.view.position[way[way.index(group) + 1]] if group in way[:-1] else None
