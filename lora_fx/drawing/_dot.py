"""The difference of two graphs as a picture in DOT: what is on the way to a change is open, all else is closed."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_fx.drawing._text import MARKS, captions, marked, on_the_way, plural, visible

# More is no picture any more, and takes Graphviz minutes.
_NODES = 400
_EDGES = 1200
_EDGES_IN = 8
# So many closed groups may each have an edge from one shared value; more have its name in a pill.
_FEW = 4
# Siblings of so many operators that are alike, such as every second layer, are opened once.
_SIZEABLE = 16
# So many operators in a row that say nothing but their names are one box.
_CHAIN = 3

_COLOURS = {  # of a status: line, filling, text
    "added": ("#1f5fbf", "#dbe9ff"),
    "removed": ("#c2571a", "#fdebdd"),
    "rewired": ("#7a3fb0", "#f1e6fb"),
    "changed": ("#9a7200", "#fbf2cf"),
    "same": ("#9a9a9a", "#f6f6f6"),
}
_LEFT = r"\l"
_STYLES = {
    "added": 'color="#1f5fbf" fillcolor="#dbe9ff" penwidth=2',
    "removed": 'color="#c2571a" fillcolor="#fdebdd" style="rounded,filled,dashed"',
    "rewired": 'color="#7a3fb0" fillcolor="#f1e6fb" penwidth=1.5',
    "changed": 'color="#9a7200" fillcolor="#fbf2cf" penwidth=1.5',
    "same": "",
}
_LINES = {
    "added": 'color="#1f5fbf" penwidth=1.8',
    "removed": 'color="#c2571a" style=dashed',
}
_GRAPH = 'compound=true fontname="Helvetica" fontsize=11 labelloc=t nodesep=0.22 ranksep=0.3 pad=0.25 bgcolor=white'
_NODE = (
    'shape=box style="rounded,filled" color="#9a9a9a" fillcolor="#f6f6f6" fontname="Helvetica" fontsize=10 '
    'margin="0.12,0.045" height=0.25 width=0.3'
)
_EDGE = 'color="#8c8c8c" arrowsize=0.5'
_PILL = 'style="rounded,filled" color="#efefef" fillcolor="#efefef" fontcolor="#666666" fontsize=8 margin="0.06,0.02" height=0.16'
_ENDS = "fillcolor=white"
_FAINT = 'color="#c4c4c4" arrowsize=0.4'


def dot(description: Mapping[str, Any]) -> str:
    """Return the picture of a description as DOT.

    Open are the groups of its first view and those around a change, as long as they fit; of a repeat the first item stands
    for all.
    """
    view = _View(description)
    shown = _Shown(view)
    wiring = _Wiring(view, shown)
    lines = [
        f'digraph "{re.sub(r"[^A-Za-z0-9_. -]", "_", visible(description["title"]))}" {{',
        f"graph [{_GRAPH}]",
        f"node [{_NODE}]",
        f"edge [{_EDGE}]",
        f"graph [label={_heading(description, shown, wiring)}]",
        *_content("g0", view, shown, wiring),
        *_edges(view, shown, wiring),
        "}",
    ]
    return "\n".join(lines) + "\n"


class _View:
    """A description, and what is asked of it over and over."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        self.nodes: Sequence[Mapping[str, Any]] = description["nodes"]
        self.groups: Sequence[Mapping[str, Any]] = description["groups"]
        self.wanted = self._wanted(description)
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
        return self.groups[int(identity[1:])]

    def node(self, identity: str) -> Mapping[str, Any]:
        return self.nodes[int(identity[1:])]

    def _wanted(self, description: Mapping[str, Any]) -> set[str]:
        """Return the groups to open: of the repeats those with a change."""
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
        """Return what an open group shows."""
        first = self.first(identity)
        if first is not None:
            return self.content(first)
        items: Sequence[str] = self.group(identity)["items"]
        return items[:1] if self.group(identity)["kind"] == "repeat" else items

    def differs(self, item: str) -> bool:
        if item.startswith("g"):
            return bool(marked(self.group(item)["counts"]))
        status: str = self.node(item)["status"]
        return status != "same"

    def operators(self, items: Iterable[str]) -> int:
        return sum(self.group(item)["counts"]["nodes"] if item.startswith("g") else 1 for item in items)

    def form(self, item: str, *, outermost: bool = True) -> int:
        """Return a number that items have in common which are equal but for their names and what they read from outside."""
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
        """Yield items in order, those together that are a plain chain: each reads, and is read by, one other; none differs."""
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
        """Return what an item reads, perhaps nothing, if it is an operator of at most one input that only its name tells of."""
        if not item.startswith("n"):
            return None
        node = self.node(item)
        plain = node["kind"] == "operator" and node["status"] == "same" and not node.get("weights")
        inputs = node.get("inputs", ())
        return (inputs[0] if inputs else "") if plain and len(inputs) <= 1 else None


class _Shown:
    """What of a description is in the picture.

    Attributes:
        inside: what each open group shows.
        gathered: of an item that is not shown, the box that stands for it and others.
        boxes: the items for which such a box stands.
        chains: those of the boxes that are plain chains of operators.
        alike: of a group that could be open, the sibling that is open and exactly alike.
        closed: how many groups should be open, and have no room.
    """

    def __init__(self, view: _View) -> None:
        self.inside: dict[str, list[str]] = {}
        self.gathered: dict[str, str] = {}
        self.boxes: dict[str, list[str]] = {}
        self.chains: set[str] = set()
        self.alike: dict[str, str] = {}
        self.closed = 0
        self._room = _NODES
        self._open("g0", view)

    def _open(self, identity: str, view: _View) -> None:
        """Open a group and those inside of it, in the order of the graph, as long as there is room."""
        chains = list(view.chains(view.content(identity)))
        content = [chain[0] for chain in chains]
        items: Sequence[str] = content
        if self._needs(content, view) > self._room:
            kept = self._room // 5
            if kept < 10 and identity != "g0":
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

    def _needs(self, items: Sequence[str], view: _View) -> int:
        """Return how many nodes of a picture these items are, with the pills that stand above them."""
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
        """Return what is shown of a group: of its chains those that are kept, and boxes that stand for all others."""
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

    def standing_for(self, node: str, view: _View) -> str | None:
        """Return the item of the picture that a node is, or is in; in a repeat, that of the first item."""
        way = view.way(node)
        here = way[0]
        for item in way[1:]:
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

    def clusters(self, item: str, view: _View) -> list[str]:
        """Return the clusters around an item of the picture, the outermost first."""
        around = [item.split(":")[0]] if item in self.boxes else view.way(item)[:-1]
        if item in self.boxes:
            around = view.way(around[0])
        return [group for group in around if group in self.inside and not self._is_flat(group, view)]

    @staticmethod
    def _is_flat(group: str, view: _View) -> bool:
        """Tell whether a group is the item that stands for its repeat, whose cluster is that of the repeat."""
        return group in view.around and view.first(view.around[group]) == group


def _most_telling(items: Sequence[str], count: int, view: _View) -> list[str]:
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
class _Wiring:
    """How what is shown is connected.

    Attributes:
        edges: between items of the picture, with their status.
        pills: above an item, the names of values that come from afar.
        sources: items of the picture whose values stand in pills, and above which items.
        more: how many further values an item reads than have edges.
        left_out: how many edges have no room.
    """

    view: _View
    shown: _Shown
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
                self._connect(item, read, as_pill=read.shared and (single or boxes[read.source] > _FEW))
            self._limit(item)
        kept = list(self.edges)[:_EDGES]
        self.left_out = len(self.edges) - len(kept)
        self.edges = dict.fromkeys(kept)

    def _limit(self, item: str) -> None:
        """Leave out edges to an item that reads very many: those without a change, the oldest first."""
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
        """Yield what an item of the picture reads from outside of it."""
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
            # Of what is in a group, its edges say only that it is read, which it may have been before.
            status = "added" if self.view.node(source)["status"] == "added" else status
            yield _Read(source, status, bool(stub.get("shared")))
        for source in node.get("former", ()):
            yield _Read(source, "removed", shared=False)

    def _position_beside(self, source: str, item: str) -> int | None:
        """Return the position, in the group of an item, of what holds a source."""
        way = self.view.way(source)
        group = self.view.around[item]
        return self.view.position[way[way.index(group) + 1]] if group in way[:-1] else None


def _content(identity: str, view: _View, shown: _Shown, wiring: _Wiring) -> Iterator[str]:
    """Yield the nodes and the clusters within an open group."""
    for item in shown.inside[identity]:
        if item in shown.boxes:
            yield _box(item, view, shown, wiring)
        elif item in shown.inside:
            yield from _cluster(item, view, shown, wiring)
            continue
        elif item.startswith("g"):
            yield _closed(item, view, shown)
        else:
            yield _operator(item, view, wiring)
        yield from _pills(item, view, wiring)


def _box(item: str, view: _View, shown: _Shown, wiring: _Wiring) -> str:
    items = shown.boxes[item]
    if item not in shown.chains:
        return f"{_id(item)} [label={_quoted('… ' + plural(view.operators(items), 'more operator'))} style=dotted]"
    labels = [visible(view.node(each)["label"], 30) for each in items]
    lines = [" → ".join(labels if len(labels) <= 4 else [*labels[:2], "…", labels[-1]])]
    lines += [plural(len(items), "operator")] if len(items) > 4 else []
    lines += [visible(view.node(items[-1])["name"])] if item in wiring.sources else []
    return f"{_id(item)} [label={_quoted(*lines)}]"


def _cluster(identity: str, view: _View, shown: _Shown, wiring: _Wiring) -> Iterator[str]:
    group = view.group(identity)
    first, second = _group_lines(group)
    looks = 'color="#c4c4c4" bgcolor="#ffffff"'
    if group["kind"] == "branch" or _status(group) != "same":
        line, _ = _COLOURS[_status(group)]
        looks = (
            f'color="{line}" bgcolor="#f5f9ff"' if _status(group) == "added" else f'color="{line}" bgcolor="#fffaf5"'
        )
        looks += " style=dashed" if _status(group) == "removed" else ""
    # The branches in an open module can be seen; how many copies of them there are can not.
    if group["kind"] == "repeat":
        item = view.first(identity)
        note = view.group(item).get("note") if item is not None else None
        second = f"each {visible(note)}" if note else second
    lines = [first, second] if second and group["kind"] in ("branch", "repeat") else [first]
    label = f"label={_quoted(*lines, end=_LEFT)} labeljust=l fontsize=10 margin=9"
    if group["kind"] == "repeat":  # a cluster has one border: two of them look like a stack
        yield f"subgraph {_id('cluster_' + identity + '_stack')} {{ graph [{label} {looks} margin=5]"
        yield f'subgraph {_id("cluster_" + identity)} {{ graph [label="" {looks} margin=9]'
    else:
        yield f"subgraph {_id('cluster_' + identity)} {{ graph [{label} {looks}]"
    yield from _content(identity, view, shown, wiring)
    yield "} }" if group["kind"] == "repeat" else "}"


def _group_lines(group: Mapping[str, Any]) -> tuple[str, str]:
    name, kind = visible(group["name"]), visible(group.get("type", ""), 40)
    return f"{name} · {kind}" if kind else name, visible(group.get("note", ""))


def _status(group: Mapping[str, Any]) -> str:
    """Return the status that all nodes of a group have."""
    counts = group["counts"]
    return next((status for status in MARKS if counts["nodes"] and counts.get(status) == counts["nodes"]), "same")


def _closed(identity: str, view: _View, shown: _Shown) -> str:
    group = view.group(identity)
    name, note = _group_lines(group)
    status = _status(group)
    count = plural(group["counts"]["nodes"], "operator")
    changes = "" if status != "same" else marked(group["counts"])
    mark = f"{MARKS[status]} " if status != "same" else ""
    alike = f"like {visible(view.group(shown.alike[identity])['name'])}" if identity in shown.alike else ""
    second = " · ".join(part for part in (count, changes, note, alike) if part)
    stack = "peripheries=2" if group["kind"] == "repeat" else ""
    looks = _STYLES[status]
    if changes:  # what is to be seen inside shows at its border
        line, _ = _COLOURS[next(each for each in MARKS if group["counts"].get(each))]
        looks = f'color="{line}"'
    return f"{_id(identity)} [label={_quoted(mark + name, second)} {looks} {stack}]"


def _operator(identity: str, view: _View, wiring: _Wiring) -> str:
    node = view.node(identity)
    status = node["status"]
    mark = f"{MARKS[status]} " if status != "same" else ""
    if node["kind"] in ("input", "output"):
        value = [visible(node["value"])] if "value" in node else []
        name = visible(node["name"] if node["kind"] == "input" else "output")
        return f"{_id(identity)} [label={_quoted(mark + name, *value)} {_STYLES[status]} {_ENDS if status == 'same' else ''}]"
    part = f"{visible(node['part'], 20)} · " if node.get("part") and node["part"] != node["label"] else ""
    lines = [
        f"{mark}{part}{visible(node['label'])}",
        *(_weight(weight) for weight in node.get("weights", ())),
    ]
    if identity in wiring.sources:
        lines.append(visible(node["name"]))
    lines += [
        f"{visible(each['what'], 30)}: {visible(each.get('before', ''), 30)} → {visible(each.get('after', ''), 30)}"
        for each in node.get("differences", ())[:3]
        if status == "changed"
    ]
    return f"{_id(identity)} [label={_quoted(*lines)} {_STYLES[status]}]"


def _weight(weight: Mapping[str, Any]) -> str:
    """Return a weight as its short name and its shape."""
    shape = re.search(r"\[.*\]", weight.get("value", ""))
    return visible(f"{weight['short']} {shape[0]}" if shape else weight["short"])


def _pills(item: str, view: _View, wiring: _Wiring) -> Iterator[str]:
    """Yield the names of values from afar: one each above an operator, one for all above a closed group."""
    pills = wiring.pills.get(item, {})
    ids = list(dict.fromkeys(_pill(source, item) for source in pills))
    names = [_source_name(source, view, wiring.shown) for source in pills]
    if len(ids) < len(names):
        names = [visible(", ".join(names))]
    if item in wiring.more:
        ids.append(f"more:{item}")
        names.append(f"and {plural(wiring.more[item], 'more value')}")
    if not ids:
        return
    nodes = " ".join(f"{_id(pill)} [label={_quoted(name)}]" for pill, name in zip(ids, names, strict=True))
    edges = " ".join(f"{_id(pill)} -> {_id(item)}" for pill in ids)
    yield f"{{ node [{_PILL}] edge [{_FAINT} weight=5] {nodes} {edges} }}"


def _pill(source: str, item: str) -> str:
    return f"{source}:{item}" if item.startswith("n") else f"pills:{item}"


def _source_name(source: str, view: _View, shown: _Shown) -> str:
    """Return the name of a value, and the closed group it comes from."""
    name = visible(view.node(source)["name"], 30)
    standing = shown.standing_for(source, view)
    if standing is None or not standing.startswith("g") or standing in shown.boxes:
        return name
    return f"{visible(view.group(standing)['name'], 30)} · {name}"


def _edges(view: _View, shown: _Shown, wiring: _Wiring) -> Iterator[str]:
    for source, item, status in wiring.edges:
        looks = f" [{_LINES[status]}]" if status in _LINES else ""
        yield f"{_id(source)} -> {_id(item)}{looks}"
    drawn: dict[tuple[str, str], None] = {}
    for source, uses in wiring.sources.items():
        around = set(shown.clusters(source, view))
        for item in uses:
            cluster = next((group for group in shown.clusters(item, view) if group not in around), None)
            if cluster is not None:
                drawn[source, cluster] = None
    for source, cluster in drawn:  # what the pills in a cluster name is above it
        stack = "_stack" if view.group(cluster)["kind"] == "repeat" else ""
        yield f"{_id(source)} -> {_id(shown.first_in(cluster))} [lhead=cluster_{cluster}{stack} {_FAINT}]"


def _heading(description: Mapping[str, Any], shown: _Shown, wiring: _Wiring) -> str:
    """Return the title, the legend, and what is not shown, as a label of DOT like HTML: it alone sets text in a row."""
    title = _html(visible(description["title"]))
    sides = _html(captions(description))
    counts = description["counts"]
    cells = [
        _cell(
            status, f"{MARKS.get(status, '')} {counts[status]:,} {'unchanged' if status == 'same' else status}".strip()
        )
        for status in _COLOURS
        if counts.get(status)
    ]
    if any(status == "removed" for _, _, status in wiring.edges) and not counts.get("removed"):
        cells.append(_cell("removed", "− read before"))
    rows = [f'<tr><td><font point-size="15">{title}</font></td></tr>']
    rows += [f"<tr><td>{sides}</td></tr>"] if sides else []
    if cells:
        rows.append(
            f'<tr><td><table border="0" cellspacing="5" cellpadding="3"><tr>{"".join(cells)}</tr></table></td></tr>'
        )
    hidden = ", ".join(
        part
        for part in (
            plural(shown.closed, "group") + " with changes closed" if shown.closed else "",
            "… stands for operators left out" if shown.boxes.keys() > shown.chains else "",
            plural(wiring.left_out, "edge") + " left out" if wiring.left_out else "",
        )
        if part
    )
    if hidden:
        rows.append(
            f'<tr><td><font color="#a05000">Not all is shown: {hidden}. A page (.html) has all.</font></td></tr>'
        )
    return f'<<table border="0" cellborder="0" cellspacing="0" cellpadding="2">{"".join(rows)}</table>>'


def _cell(status: str, text: str) -> str:
    line, filling = _COLOURS[status]
    form = {"added": ' border="2"', "removed": ' border="1" style="dashed"'}.get(status, ' border="1"')
    return f'<td{form} color="{line}" bgcolor="{filling}">{text}</td>'


def _html(text: str) -> str:
    """Escape a text for a label of DOT like HTML, in which escapes by backslash hold too."""
    return html.escape(text.replace("\\", "\\\\"))


def _id(item: str) -> str:
    return item if re.fullmatch(r"\w+", item, re.ASCII) else f'"{item}"'


def _quoted(*lines: str, end: str = "") -> str:
    """Return lines as a quoted string of DOT, where nothing of them is an escape or an entity.

    Args:
        lines: the text.
        end: of each line, if not centred: an escape of DOT.
    """
    escaped = (line.replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;") for line in lines)
    text = "".join(line + end for line in escaped) if end else "\\n".join(escaped)
    return f'"{text}"'
