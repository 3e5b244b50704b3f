"""The difference of two graphs as a picture in DOT: groups on the way to a change are open, all others closed."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lora_fx.drawing.render.text import MARKS, captions, counts_of, heading, marked, plural, visible
from lora_fx.drawing.render.view import IndexedDescription, Routes, Shown

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
    for all. A whole model beyond a page has its layers closed, and says so.
    """
    view = IndexedDescription(description)
    shown = Shown(view)
    smaller = IndexedDescription(description, closed=True)
    closed = "root" not in description and shown.beyond_a_page and smaller.wanted < view.wanted
    if closed:
        view, shown = smaller, Shown(smaller)
    routes = Routes(view, shown)
    lines = [
        f'digraph "{re.sub(r"[^A-Za-z0-9_. -]", "_", visible(description["title"]))}" {{',
        f"graph [{_GRAPH}]",
        f"node [{_NODE}]",
        f"edge [{_EDGE}]",
        f"graph [label={_heading(description, shown, routes, closed=closed)}]",
        *_content(view.root, view, shown, routes),
        *_edges(view, shown, routes),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _content(identity: str, view: IndexedDescription, shown: Shown, routes: Routes) -> Iterator[str]:
    """Yield the nodes and the clusters within an open group."""
    for item in shown.inside[identity]:
        if item in shown.boxes:
            yield _box(item, view, shown, routes)
        elif item in shown.inside:
            yield from _cluster(item, view, shown, routes)
            continue
        elif item.startswith("g"):
            yield _closed(item, view, shown)
        else:
            yield _operator(item, view, routes)
        yield from _pills(item, view, routes)


def _box(item: str, view: IndexedDescription, shown: Shown, routes: Routes) -> str:
    items = shown.boxes[item]
    if item not in shown.chains:
        return f"{_id(item)} [label={_quoted('… ' + plural(view.operators(items), 'more operator'))} style=dotted]"
    labels = [visible(view.node(each)["label"], 30) for each in items]
    lines = [" → ".join(labels if len(labels) <= 4 else [*labels[:2], "…", labels[-1]])]
    lines += [plural(len(items), "operator")] if len(items) > 4 else []
    lines += [visible(view.node(items[-1])["name"])] if item in routes.sources else []
    return f"{_id(item)} [label={_quoted(*lines)}]"


def _cluster(identity: str, view: IndexedDescription, shown: Shown, routes: Routes) -> Iterator[str]:
    group = view.group(identity)
    first, second = _group_lines(group)
    looks = 'color="#c4c4c4" bgcolor="#ffffff"'
    if group["kind"] == "branch" or _status(group) != "same":
        line, _ = _COLOURS[_status(group)]
        looks = (
            f'color="{line}" bgcolor="#f5f9ff"' if _status(group) == "added" else f'color="{line}" bgcolor="#fffaf5"'
        )
        looks += " style=dashed" if _status(group) == "removed" else ""
    # The branches in an open module can be seen; the number of their copies cannot.
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
    yield from _content(identity, view, shown, routes)
    yield "} }" if group["kind"] == "repeat" else "}"


def _group_lines(group: Mapping[str, Any]) -> tuple[str, str]:
    name, kind = visible(group["name"]), visible(group.get("type", ""), 40)
    return f"{name} · {kind}" if kind else name, visible(group.get("note", ""))


def _status(group: Mapping[str, Any]) -> str:
    """Return the status that all nodes of a group have."""
    counts = group["counts"]
    return next((status for status in MARKS if counts["nodes"] and counts.get(status) == counts["nodes"]), "same")


def _closed(identity: str, view: IndexedDescription, shown: Shown) -> str:
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
    if changes:  # changes inside show at the border
        line, _ = _COLOURS[next(each for each in MARKS if group["counts"].get(each))]
        looks = f'color="{line}"'
    return f"{_id(identity)} [label={_quoted(mark + name, second)} {looks} {stack}]"


def _operator(identity: str, view: IndexedDescription, routes: Routes) -> str:
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
    if identity in routes.sources:
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


def _pills(item: str, view: IndexedDescription, routes: Routes) -> Iterator[str]:
    """Yield the names of values from afar: one each above an operator, one for all above a closed group."""
    pills = routes.pills.get(item, {})
    ids = list(dict.fromkeys(_pill(source, item) for source in pills))
    reader = view.node(item) if item.startswith("n") else {}
    names = [_source_name(source, view, routes.shown, reader.get("called", {}).get(source, "")) for source in pills]
    if len(ids) < len(names):
        names = [visible(", ".join(names))]
    if item in routes.more:
        ids.append(f"more:{item}")
        names.append(f"and {plural(routes.more[item], 'more value')}")
    if not ids:
        return
    nodes = " ".join(f"{_id(pill)} [label={_quoted(name)}]" for pill, name in zip(ids, names, strict=True))
    edges = " ".join(f"{_id(pill)} -> {_id(item)}" for pill in ids)
    yield f"{{ node [{_PILL}] edge [{_FAINT} weight=5] {nodes} {edges} }}"


def _pill(source: str, item: str) -> str:
    return f"{source}:{item}" if item.startswith("n") else f"pills:{item}"


def _source_name(source: str, view: IndexedDescription, shown: Shown, called: str) -> str:
    """Return the name of a value as the model's code has it where it is read, or else its own, and the closed group it comes from."""
    name = visible(called or view.node(source)["name"], 30)
    standing = shown.standing_for(source, view)
    if standing is None or not standing.startswith("g") or standing in shown.boxes:
        return name
    return f"{visible(view.group(standing)['name'], 30)} · {name}"


def _edges(view: IndexedDescription, shown: Shown, routes: Routes) -> Iterator[str]:
    for source, item, status in routes.edges:
        looks = f" [{_LINES[status]}]" if status in _LINES else ""
        yield f"{_id(source)} -> {_id(item)}{looks}"
    drawn: dict[tuple[str, str], None] = {}
    for source, uses in routes.sources.items():
        around = set(shown.clusters(source, view))
        for item in uses:
            cluster = next((group for group in shown.clusters(item, view) if group not in around), None)
            if cluster is not None:
                drawn[source, cluster] = None
    for source, cluster in drawn:  # values named by the pills in a cluster are above it
        stack = "_stack" if view.group(cluster)["kind"] == "repeat" else ""
        yield f"{_id(source)} -> {_id(shown.first_in(cluster))} [lhead=cluster_{cluster}{stack} {_FAINT}]"


def _heading(description: Mapping[str, Any], shown: Shown, routes: Routes, *, closed: bool) -> str:
    """Return the title, the legend and the number of hidden items as an HTML-like label of DOT, the only one that sets text in a row."""
    title = _html(heading(description))
    sides = _html(captions(description))
    counts = counts_of(description) if description.get("show", "diff") in ("diff", "fold") else {}
    cells = [
        _cell(
            status, f"{MARKS.get(status, '')} {counts[status]:,} {'unchanged' if status == 'same' else status}".strip()
        )
        for status in _COLOURS
        if counts.get(status)
    ]
    if any(status == "removed" for _, _, status in routes.edges) and not counts.get("removed"):
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
            plural(routes.left_out, "edge") + " left out" if routes.left_out else "",
        )
        if part
    )
    if closed:
        layer = next(
            (
                each
                for each in description["groups"]
                if each.get("path") and each["kind"] == "module" and _has_index(each)
            ),
            None,
        )
        part = f" Of a module: module={layer['path']!r}, --module {layer['path']}." if layer else ""
        rows.append(_remark(f"Beyond a page: the layers are closed.{part} A page (.html) has all."))
    if hidden:
        rows.append(_remark(f"Not all is shown: {hidden}. A page (.html) has all."))
    return f'<<table border="0" cellborder="0" cellspacing="0" cellpadding="2">{"".join(rows)}</table>>'


def _has_index(group: Mapping[str, Any]) -> bool:
    """Tell whether a module is one of several layers."""
    return str(group["path"]).rpartition(".")[2].isdecimal()


def _remark(text: str) -> str:
    return f'<tr><td><font color="#a05000">{_html(text)}</font></td></tr>'


def _cell(status: str, text: str) -> str:
    line, filling = _COLOURS[status]
    form = {"added": ' border="2"', "removed": ' border="1" style="dashed"'}.get(status, ' border="1"')
    return f'<td{form} color="{line}" bgcolor="{filling}">{text}</td>'


def _html(text: str) -> str:
    """Escape a text for an HTML-like label of DOT, in which escapes by backslash hold too."""
    return html.escape(text.replace("\\", "\\\\"))


def _id(item: str) -> str:
    return item if re.fullmatch(r"\w+", item, re.ASCII) else f'"{item}"'


def _quoted(*lines: str, end: str = "") -> str:
    """Return lines as a quoted string of DOT without escapes or entities of their own.

    Args:
        lines: the text.
        end: of each line, if not centred: an escape of DOT.
    """
    escaped = (line.replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;") for line in lines)
    text = "".join(line + end for line in escaped) if end else "\\n".join(escaped)
    return f'"{text}"'
