"""Neutral description of one graph, or of the difference of two: data for JSON, without any layout.

Every writer reads this and nothing else. Its keys::

    format, title, show, before, after      its subject
    counts, changes                         the difference in numbers, and the changed nodes and branches, in graph order
    nodes                                   operators, in graph order; ``"n<position>"`` names one
    groups                                  modules, repeats, branches, steps; ``"g<position>"`` names one, ``"g0"`` the model
    open                                    the groups that are open in the first view
    root                                    the group that is drawn, if it is not the whole model
    sites, coverage, elsewhere              call sites, as a matrix for each stack of layers, and those in no stack
    lines                                   lines of the model's source, to which nodes refer by position

Keys without a value are left out. Same graphs, same description.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from lora_fx.drawing.describe.branch_stamps import AHEAD, settings_of
from lora_fx.drawing.describe.coverage import coverage, matrices
from lora_fx.drawing.describe.difference import Entry, Status, Union, single, unite
from lora_fx.drawing.describe.module_tree import Group, Item, gather_steps, inline_single, modules_of
from lora_fx.drawing.describe.node_text import Reader, type_of_root
from lora_fx.drawing.describe.read_names import name_read
from lora_fx.drawing.describe.repeats import collapse
from lora_fx.drawing.describe.wiring import Wiring, wire
from lora_fx.errors import LoraFxError, did_you_mean
from lora_fx.graph.info import known_info
from lora_fx.graph.provenance import source_of, stamp_of
from lora_fx.numerics.lowrank_merge import Merge

Description = Mapping[str, Any]
"""The result of :func:`describe`."""

Show = Literal["before", "after", "diff", "fold"]

FORMAT = 1

_STATUSES: tuple[Status, ...] = ("added", "removed", "rewired", "changed")
_MAX_FIRST_VIEW = 120  # items of all open groups together


def describe_graph(graph_module: fx.GraphModule, show: Show = "after") -> Description:
    """Return the description of one graph alone. See :func:`describe`."""
    reader = Reader(graph_module)
    return _description(single(reader), reader, show, _merges(graph_module))


def describe(
    before: fx.GraphModule,
    after: fx.GraphModule,
    *,
    show: Show = "diff",
    merges: Iterable[Merge] | None = None,
) -> Description:
    """Return the description of two graphs as one, with their differences.

    Nodes are matched by their origin: the call of a module, the operator, their order there; those of branches by their
    stamps. A node of both graphs is ``changed`` if an argument, weight, shape or dtype differs, and ``rewired`` if it only
    reads other nodes.

    Args:
        before: a graph, for instance of ``trace``.
        after: the result of a pass, or another trace.
        show: the value of the key ``show``.
        merges: the merges that a fold made in the weights of ``after``; by default those that the graph records.

    Returns:
        Data for JSON, as described at the head of this module.
    """
    after_reader = Reader(after)
    union = unite(Reader(before), after_reader)
    return _description(union, after_reader, show, _merges(after) if merges is None else merges)


def within(description: Description, module: str) -> Description:
    """Return a description rooted at one module; the data of the rest is kept.

    Raises:
        LoraFxError: there is no such module in the graph, or it is a single operator.
    """
    if not module:
        return description
    groups = {
        group["path"]: f"g{index}"
        for index, group in reversed(list(enumerate(description["groups"])))
        if "path" in group
    }
    if module not in groups:
        raise LoraFxError(
            f"no module {module!r} of several operators is in the graph{did_you_mean(module, groups)}. "
            "The names are those of model.named_modules(); the text format lists them."
        )
    return {**description, "root": groups[module]}


def _merges(graph_module: fx.GraphModule) -> tuple[Merge, ...]:
    return known_info(graph_module).folded


def _description(union: Union, graph: Reader, show: Show, merges: Iterable[Merge]) -> Description:
    title = type_of_root(graph.graph_module)
    root = modules_of(union, title)
    settings = _settings(root, union)
    collapse(root, union, {e: {**known, "site": ""} for group, known in settings.items() for e in group.entries()})
    gather_steps(root)
    names = inline_single(root)
    covered = coverage(graph, merges)
    writer = _DescriptionWriter(
        union, root, names, settings, {each.site.node: i for i, each in enumerate(covered)}, graph
    )
    stacks, elsewhere = matrices(covered)
    groups = writer.groups()
    return _filled(
        {
            "format": FORMAT,
            "title": title,
            "show": show,
            "counts": writer.totals(),
            "open": [writer.ids[group] for group in _first_view(root)],
            "changes": writer.changes(),
            "nodes": writer.nodes(),
            "groups": groups,
            "lines": list(writer.lines),
            "sites": [{**_site_data(each), "node": writer.node_ids[each.site.node]} for each in covered],
            "coverage": [
                {
                    "stack": matrix.stack,
                    "columns": list(matrix.columns),
                    "rows": [{"layer": layer, "cells": list(cells)} for layer, cells in matrix.rows],
                }
                for matrix in stacks
            ],
            "elsewhere": list(elsewhere),
        },
        always=_ALWAYS,
    )


_ALWAYS = ("counts", "open", "changes", "nodes", "groups", "lines", "sites", "coverage", "elsewhere")


def _settings(root: Group, union: Union) -> dict[Group, dict[str, Any]]:
    """Return the settings of each branch."""
    modules = [
        entry.reader.graph_module for entry in reversed(union.entries)
    ]  # the graph after comes first: its record wins
    groups = {group: group.branch for group in root.groups() if group.branch is not None}
    known = [settings_of(graph, groups.values()) for graph in dict.fromkeys(modules)]
    # A branch that only one of the graphs has is recorded there.
    return {group: max((each[branch] for each in known), key=len) for group, branch in groups.items()}


def _first_view(root: Group) -> Iterator[Group]:
    """Yield the groups that are open at first: those around the layers, up to a readable number of items."""
    left = _MAX_FIRST_VIEW
    level = [root]
    while level:
        following: list[Group] = []
        for group in level:
            holds_layers = any(inner.is_layer for inner in group.groups() if inner is not group)
            if group is not root and (group.is_layer or group.kind != "module" or not holds_layers):
                continue
            if group is root or len(group.items) <= left:
                left -= len(group.items)
                yield group
                following += [item for item in group.items if isinstance(item, Group)]
        level = following


def _site_data(each: Any) -> dict[str, Any]:
    site = each.site
    data = {"name": site.name, "op": site.op, "in": site.in_features, "out": site.out_features, "weight": site.weight}
    data |= {"state": each.state, "decision": each.rule, "reason": each.reason}
    return {**_filled(data), "ranks": list(each.ranks)}


def _filled(data: Mapping[str, Any], always: Sequence[str] = ()) -> dict[str, Any]:
    """Return data without keys of empty value."""
    return {key: value for key, value in data.items() if key in always or value not in (None, "", [], {}, False)}


@dataclass
class _DescriptionWriter:
    """Writes nodes and groups as data, with an identifier for each."""

    union: Union
    root: Group
    names: Mapping[Entry, str]
    settings: Mapping[Group, Mapping[str, Any]]
    site_of: Mapping[str, int]
    graph: Reader
    ids: dict[Item, str] = field(default_factory=dict)
    node_ids: dict[str, str] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    called: Mapping[Entry, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._drawn = [entry for entry in self.union.entries if not entry.hidden]
        self.ids.update({entry: f"n{index}" for index, entry in enumerate(self._drawn)})
        self._order = {entry: index for index, entry in enumerate(self._drawn)}
        self._groups = list(self.root.groups())
        self.ids.update({group: f"g{index}" for index, group in enumerate(self._groups)})
        self.node_ids.update({e.node.name: self.ids[e] for e in self._drawn if e.reader is self.graph})
        self._around = {item: group for group in self._groups for item in group.items}
        self.called = {entry: self._called(entry) for entry in self._drawn}
        self._readers: dict[Entry, list[Entry]] = {}
        for entry in self._drawn:
            for source in self.union.inputs[entry]:
                self._readers.setdefault(source, []).append(entry)

    def nodes(self) -> list[dict[str, Any]]:
        """Return all operators."""
        return [self._node(entry) for entry in self._drawn]

    def _node(self, entry: Entry) -> dict[str, Any]:
        node, reader = entry.node, entry.reader
        operator = reader.operator(node)
        stamp = stamp_of(node)
        line = source_of(node)
        line = line.rpartition("/site-packages/")[2]  # the rest of the path differs between machines
        frames = reader.frames(node)
        path = frames[-1].path if frames else ""
        is_site = reader is self.graph and entry.status != "removed"
        return _filled(
            {
                "name": node.name,
                "op": operator,
                "label": self._label(entry, operator),
                "kind": _KINDS.get(node.op, "operator"),
                "status": entry.status,
                "group": self.ids[self._around[entry]],
                "value": reader.value(node),
                "args": reader.arguments(node) if node.op != "placeholder" else "",
                "weights": [
                    _filled(
                        {
                            "name": weight.name,
                            "short": weight.name.removeprefix(f"{path}.") if path else weight.name,
                            "value": weight.value,
                            "trainable": weight.trainable,
                        }
                    )
                    for weight in reader.weights(node)
                ],
                "inputs": [self.ids[source] for source in self.union.inputs[entry]],
                "called": self.called[entry],
                "former": [self.ids[source] for source in self.union.former.get(entry, ())],
                "line": self.lines.setdefault(line, len(self.lines)) if line else None,
                "path": path,
                "part": stamp.get("part"),
                "differences": [
                    {"what": each.what, "before": each.before, "after": each.after} for each in entry.differences
                ],
                "site": self.site_of.get(node.name) if is_site else None,
            },
        )

    def _called(self, entry: Entry) -> dict[str, str]:
        """Return the name that the model's code has for the value that an operator reads, if it reads one and from another module."""
        sources = [source for source in self.union.inputs[entry] if not source.hidden]
        if len(sources) != 1 or self._around.get(sources[0]) is self._around[entry]:
            return {}
        name = name_read(entry, sources[0])
        return {self.ids[sources[0]]: name} if name else {}

    def _name_inside(self, source: Entry, group: Group) -> str:
        """Return the name by which the first operator in a group that reads a value has it; an empty string where that is not plain."""
        reader = next((each for each in self._readers.get(source, ()) if group in self._ways(each)), None)
        return "" if reader is None else self.called[reader].get(self.ids[source], "")

    def _ways(self, entry: Entry) -> Iterator[Group]:
        around: Group | None = self._around[entry]
        while around is not None:
            yield around
            around = self._around.get(around)

    def _label(self, entry: Entry, operator: str) -> str:
        if entry.node.op in ("placeholder", "output"):
            return str(entry.node.target)
        name = operator.split(".")[1] if operator.startswith("aten.") else operator.rpartition(".")[2]
        return f"{self.names[entry]} · {name}" if entry in self.names else name

    def groups(self) -> list[dict[str, Any]]:
        """Return all groups, each before its inner groups."""
        wirings = wire(self.root, self.union)
        counts: dict[Group, dict[str, int]] = {}
        branches: dict[Group, list[Mapping[str, Any]]] = {}
        for group in reversed(self._groups):  # the inner ones first
            count = dict.fromkeys(("nodes", *_STATUSES), 0)
            held: list[Mapping[str, Any]] = []
            for item in group.items:
                if isinstance(item, Group):
                    count = {key: number + counts[item][key] for key, number in count.items()}
                    held += branches[item]
                else:
                    count["nodes"] += 1
                    if item.status != "same":
                        count[item.status] += 1
            if group.kind == "branch":
                held = [self.settings[group]] if count["removed"] < count["nodes"] else []
            counts[group], branches[group] = count, held
        return [self._group(group, wirings[group], counts[group], branches[group]) for group in self._groups]

    def _group(
        self, group: Group, wiring: Wiring, counts: Mapping[str, int], branches: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        position = {item: index for index, item in enumerate(group.items)}
        edges = sorted((position[a], position[b], status) for (a, b), status in wiring.edges.items())
        stubs = sorted(
            # Not by their sources first, whose order differs between layers that are alike.
            (sorted(position[item] for item in stub.to), stub.status, stub.shared, self._order[stub.source])
            for stub in wiring.stubs
        )
        around = self._around.get(group)
        return _filled(
            {
                "kind": group.kind,
                "name": group.name,
                "path": group.path,
                "type": group.type,
                "note": _branches_note(branches) if group.branch is None else _branch_note(self.settings[group]),
                "parent": None if around is None else self.ids[around],
                "counts": dict(counts),
                "items": [self.ids[item] for item in group.items],
                "edges": [list(edge) for edge in edges],
                "stubs": [
                    _filled(
                        {
                            "source": f"n{source}",
                            "to": to,
                            "status": status,
                            "shared": shared,
                            "called": self._name_inside(self._drawn[source], group),
                        }
                    )
                    for to, status, shared, source in stubs
                ],
                "copies": group.copies or None,
                "branch": None if group.branch is None else dict(self.settings[group]),
            },
            always=("items", "edges", "stubs", "counts", "name"),
        )

    def totals(self) -> dict[str, int]:
        """Return the number of operators of each status, and of branches."""
        found = dict.fromkeys(("nodes", *_STATUSES, "same"), 0)
        found["nodes"] = len(self._drawn)
        for entry in self._drawn:
            found[entry.status] += 1
        return {**found, "branches": sum(map(_has_branch, self._groups))}

    def changes(self) -> list[str]:
        """Return the changes to visit: whole branches, and operators outside of branches."""
        found: dict[str, None] = {}
        summed = {entry: group for group in self._groups for entry in group.sums}
        for entry in self._drawn:
            if entry.status != "same":
                around = summed.get(entry, self._around[entry])
                found.setdefault(self.ids[around if around.kind == "branch" else entry])
        return list(found)


def _has_branch(group: Group) -> bool:
    return group.branch is not None and any(entry.status != "removed" for entry in group.entries())


_KINDS: Mapping[str, str] = {"placeholder": "input", "output": "output", "call_module": "module"}


def _branches_note(branches: Sequence[Mapping[str, Any]]) -> str:
    if not branches:
        return ""
    ahead = [branch["site"] for branch in branches if "rank" not in branch and branch["site"] in AHEAD]
    ranks = sorted({branch["rank"] for branch in branches if "rank" in branch})
    notes = [f"LoRA ×{len(branches) - len(ahead)}"] if len(branches) > len(ahead) else []
    notes += [f"rank {', '.join(map(str, ranks))}"] if ranks else []
    return ", ".join([*notes, *dict.fromkeys(ahead)])


def _branch_note(branch: Mapping[str, Any]) -> str:
    words = {key: branch[key] for key in ("rank", "alpha", "scaling") if key in branch}
    texts = [f"{key} {value:g}" for key, value in words.items()]
    return ", ".join([*texts, str(branch["part"])] if "part" in branch else texts)
