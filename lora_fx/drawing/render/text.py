"""The difference of two graphs as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from lora_fx.errors import printable
from lora_fx.text_table import new_table, text_lines

MARKS = {"added": "+", "removed": "−", "rewired": "⇄", "changed": "~"}
_CHANGES_LISTED = 50
_COLUMNS_SHOWN = 24
_GROUPS_SHOWN = 300


def visible(text: object, limit: int = 60) -> str:
    """Return a name on one line without control or direction characters, at most ``limit`` characters long."""
    shown = printable(str(text)[: limit + 1])
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def plural(count: int, noun: str) -> str:
    """Return ``"1 operator"`` or ``"1,234 operators"``."""
    return f"{count:,} {noun}{'' if count == 1 else 's' if not noun.endswith('ch') else 'es'}"


def captions(description: Mapping[str, Any]) -> str:
    """Return ``"traced → rewritten"``, or the only one of the two."""
    sides = [visible(description[side]) for side in ("before", "after") if description.get(side)]
    return " → ".join(sides)


def on_the_way(description: Mapping[str, Any]) -> set[str]:
    """Return the groups that are open in the first view: the ones around a change, and changed branches."""
    around = {item: f"g{index}" for index, group in enumerate(description["groups"]) for item in group["items"]}
    found: set[str] = set()
    for start in (*description["open"], *description.get("changes", ())):
        item: str | None = start
        while item is not None and item not in found:
            found.add(item)
            item = around.get(item)
    return {item for item in found if item.startswith("g")}


def text(description: Mapping[str, Any]) -> str:
    """Return a description as text: the counts, the tree of modules, the sites with their ranks, and the other changes."""
    sections = [
        [_title(description), in_words(description)],
        list(_tree(description)),
        *(_matrix(matrix, description["sites"]) for matrix in description.get("coverage", ())),
        list(_elsewhere(description)),
        list(_changes(description)),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def heading(description: Mapping[str, Any]) -> str:
    """Return the class of the model, and the path of the module that is shown, unless it is the whole model."""
    root = description.get("root")
    module = f" · {description['groups'][int(root[1:])]['path']}" if root else ""
    return visible(f"{description['title']}{module}", 120)


def counts_of(description: Mapping[str, Any]) -> Mapping[str, int]:
    """Return the number of shown operators of each status, and of shown branches."""
    root = description.get("root")
    if root is None:
        counts: Mapping[str, int] = description["counts"]
        return counts
    inside = [root]
    for group in inside:
        inside += [item for item in description["groups"][int(group[1:])]["items"] if item.startswith("g")]
    groups = [description["groups"][int(group[1:])] for group in inside]
    counts = groups[0]["counts"]
    same = counts["nodes"] - sum(counts.get(status, 0) for status in MARKS)
    return {**counts, "same": same, "branches": sum(group["kind"] == "branch" for group in groups)}


def _title(description: Mapping[str, Any]) -> str:
    sides = captions(description)
    return f"{heading(description)}{f': {sides}' if sides else ''}"


def in_words(description: Mapping[str, Any]) -> str:
    """Return the difference in numbers: ``"641 operators: 110 added, 22 rewired, 509 unchanged; 22 branches"``."""
    counts = counts_of(description)
    differ = {status: counts.get(status, 0) for status in MARKS}
    parts = [f"{count} {status}" for status, count in differ.items() if count]
    if parts:
        same = counts.get("same", counts["nodes"] - sum(differ.values()))
        parts += [f"{same} unchanged"] if same else []
    else:
        parts = ["nothing differs"] if description.get("show", "diff") in ("diff", "fold") else []
    operators = "1 operator" if counts["nodes"] == 1 else f"{counts['nodes']} operators"
    branches = counts.get("branches", 0)
    tail = f"; {branches} branch{'es' if branches != 1 else ''}" if branches else ""
    return f"{operators}{': ' if parts else ''}{', '.join(parts)}{tail}"


def marked(counts: Mapping[str, int]) -> str:
    """Return ``"+14 ⇄3"`` for the counts of a group."""
    return " ".join(f"{mark}{counts[status]:,}" for status, mark in MARKS.items() if counts.get(status))


def _tree(description: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each group that is shown; of a repeat the content of its first item stands for all."""
    groups, opened = description["groups"], on_the_way(description)
    rows: list[tuple[str, str, str, str, str]] = []
    waiting = [(description.get("root", "g0"), 0)]
    while waiting:
        identity, depth = waiting.pop()
        group = groups[int(identity[1:])]
        rows.append(_row(group, depth))
        if identity in opened and group["kind"] != "branch":
            waiting += [(item, depth + 1) for item in reversed(_inside(group, groups)) if item.startswith("g")]
    shown = rows[:_GROUPS_SHOWN]
    yield from text_lines(_table(("module", "class", "operators", "changes", "branches"), shown, right=(2,)))
    if len(rows) > len(shown):
        yield f"… and {plural(len(rows) - len(shown), 'more group')}"


def _row(group: Mapping[str, Any], depth: int) -> tuple[str, str, str, str, str]:
    name = visible(group["name"])
    return (
        "  " * depth + name,
        visible(group.get("type", ""), 40),
        str(group["counts"]["nodes"]),
        marked(group["counts"]),
        visible(group.get("note", "")),
    )


def _inside(group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the items of a group; of a repeat, the items of its first item."""
    items: list[str] = group["items"]
    if group["kind"] == "repeat" and items and items[0].startswith("g"):
        return list(groups[int(items[0][1:])]["items"])
    return items[:1] if group["kind"] == "repeat" else items


def _matrix(matrix: Mapping[str, Any], sites: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the ranks of a stack of layers; equal rows in sequence are one."""
    columns = matrix["columns"]
    merged: list[tuple[str, str, list[str]]] = []
    for row in matrix["rows"]:
        cells = [_rank(sites, index) for index in row["cells"]]
        if merged and merged[-1][2] == cells:
            merged[-1] = (merged[-1][0], row["layer"], cells)
        else:
            merged.append((row["layer"], row["layer"], cells))
    headings = ["layer", *(visible(column, 40) for column in _short(columns)[:_COLUMNS_SHOWN])]
    rows = [
        [visible(first if first == last else f"{first}–{last}"), *cells[:_COLUMNS_SHOWN]]
        for first, last, cells in merged
    ]
    lines = [visible(matrix["stack"], 100), *text_lines(_table(headings, rows, right=range(1, len(headings))))]
    hidden = columns[_COLUMNS_SHOWN:]
    return [*lines, f"… and {plural(len(hidden), 'more column')}"] if hidden else lines


def _short(columns: Sequence[str]) -> list[str]:
    """Return the last part of each name, with as many more parts as tell it from the others."""
    parts = [column.split(".") for column in columns]
    short = []
    for mine in parts:
        count = 1
        while count < len(mine) and sum(other[-count:] == mine[-count:] for other in parts) > 1:
            count += 1
        short.append(".".join(mine[-count:]))
    return short


def _rank(sites: Sequence[Mapping[str, Any]], index: int | None) -> str:
    if index is None:
        return ""
    site = sites[index]
    ranks = "+".join(str(rank) for rank in site["ranks"])
    return ranks or ("merged" if site["state"] == "merged" else "·")


def _elsewhere(description: Mapping[str, Any]) -> Iterator[str]:
    sites = [description["sites"][index] for index in description.get("elsewhere", ())]
    if not sites:
        return
    rows = [
        (
            visible(site["name"], 80),
            visible(site["op"]),
            f"{site.get('in', '')}",
            f"{site.get('out', '')}",
            _rank([site], 0),
            visible(site.get("decision") or site.get("reason", ""), 100),
        )
        for site in sites
    ]
    yield "sites elsewhere" if description.get("coverage") else "sites"
    yield from text_lines(_table(("site", "operator", "in", "out", "rank", "decision"), rows, right=(2, 3, 4)))


def _changes(description: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each change that is no branch."""
    changed: dict[str, list[Mapping[str, Any]]] = {}
    first_copy = _first_copies(description["groups"])
    for item in description.get("changes", ()):
        if item.startswith("n"):
            changed.setdefault(first_copy.get(item, item), []).append(description["nodes"][int(item[1:])])
    if not changed:
        return
    yield "other changes" if description["counts"].get("branches") else "changes"
    rows = [
        (
            f"{MARKS.get(node['status'], ' ')} {visible(node['name'])}",
            visible(node["op"]),
            visible(node.get("path", "")),
            f"×{len(alike)}" if len(alike) > 1 else "",
            _what_differs(node),
        )
        for node, *more in list(changed.values())[:_CHANGES_LISTED]
        for alike in ([node, *more],)
    ]
    yield from text_lines(_table(("operator", "kind", "module", "alike", "difference"), rows))
    if len(changed) > _CHANGES_LISTED:
        yield f"… and {len(changed) - _CHANGES_LISTED:,} more"


def _first_copies(groups: Sequence[Mapping[str, Any]]) -> Mapping[str, str]:
    """Return, of each item in a later copy of a repeat, the item at its place in the first copy."""
    first: dict[str, str] = {}
    pairs = [(item, group["items"][0]) for group in groups if group["kind"] == "repeat" for item in group["items"][1:]]
    while pairs:
        item, at_first = pairs.pop()
        first.setdefault(item, at_first)
        if item.startswith("g") and at_first.startswith("g"):
            pairs += zip(groups[int(item[1:])]["items"], groups[int(at_first[1:])]["items"], strict=False)
    for item, at_first in first.items():  # of repeats in repeats
        while at_first in first:
            at_first = first[at_first]
        first[item] = at_first
    return first


def _what_differs(node: Mapping[str, Any]) -> str:
    differences = [
        f"{visible(each['what'])}: {visible(each.get('before', ''))} → {visible(each.get('after', ''))}"
        for each in node.get("differences", ())
    ]
    return visible("; ".join(differences), 200)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> Table:
    """Return a table in which no name is taken for markup, without its empty columns."""
    kept = [index for index in range(len(headings)) if index == 0 or any(row[index] for row in rows)]
    table = new_table()
    to_the_right = set(right)
    for index in kept:
        justify = "right" if index in to_the_right else "left"
        table.add_column(Text(headings[index]), justify=justify, no_wrap=True, overflow="ignore")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(row[index]) for index in kept))
    return table
