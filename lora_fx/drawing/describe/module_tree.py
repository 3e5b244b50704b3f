"""The tree of groups around the operators: calls of modules, branches, repeats, and runs of steps where there are too many."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lora_fx.drawing.describe.branch_stamps import StampedBranch, branches_of
from lora_fx.drawing.describe.difference import Entry, Union
from lora_fx.drawing.describe.node_text import Frame
from lora_fx.graph.provenance import stamp_of

GroupKind = Literal["model", "module", "repeat", "branch", "steps"]

_MAX_ITEMS = 120  # that a group shows at once; a chain of layers is easier to lay out, and to read
_MAX_COPIES = 400
_STEPS = 60  # operators in each part of a group with too many
_SHORTEST_RUN = 6

_INDEXED = re.compile(r"(?:.*\.)?\d+")


@dataclass(eq=False)
class Group:
    """A group of operators and further groups.

    Attributes:
        kind: what holds it together.
        name: relative to the group around it.
        path: of the module; empty for the model itself, and where it is no module.
        type: class of the module.
        items: what is in it, in graph order.
        call: of the module, counted from 1.
        copies: of a repeat, how many there are.
        branch: that it is.
        sums: of a branch, the operators that add it to the output of its site. They are beside it, as the site is.
    """

    kind: GroupKind
    name: str
    path: str = ""
    type: str = ""
    items: list[Item] = field(default_factory=list)
    call: int = 1
    copies: int = 0
    branch: StampedBranch | None = None
    sums: list[Entry] = field(default_factory=list)

    def entries(self) -> Iterator[Entry]:
        """Yield all operators in it, at any depth."""
        for item in self.items:
            if isinstance(item, Group):
                yield from item.entries()
            else:
                yield item

    def groups(self) -> Iterator[Group]:
        """Yield it and all groups in it, from the outside."""
        yield self
        for item in self.items:
            if isinstance(item, Group):
                yield from item.groups()

    @property
    def is_layer(self) -> bool:
        """Whether it is one of several by an index, as layers are."""
        return self.kind == "repeat" or (
            self.kind == "module" and _INDEXED.fullmatch(self.name.split("@")[0]) is not None
        )


Item = Entry | Group


def modules_of(union: Union, title: str) -> Group:
    """Return the tree of modules around the operators that are drawn, with the branches in it as groups of their own."""
    root = Group("model", title)
    branches = {
        reader: branches_of(reader.graph_module) for reader in dict.fromkeys(entry.reader for entry in union.entries)
    }
    made: dict[tuple[Frame, ...], Group] = {(): root}
    opened: dict[StampedBranch, Group] = {}
    for entry in union.entries:
        if entry.hidden:
            continue
        group = _module(entry, made, root)
        branch = branches[entry.reader].get(entry.node)
        if branch is not None:
            if branch not in opened:
                opened[branch] = Group("branch", f"{branch.word} {branch.adapter}", branch=branch)
                group.items.append(opened[branch])
            if stamp_of(entry.node).get("part") == "add":
                opened[branch].sums.append(entry)
            else:
                group = opened[branch]
        group.items.append(entry)
    return root


def _module(entry: Entry, made: dict[tuple[Frame, ...], Group], root: Group) -> Group:
    key: tuple[Frame, ...] = ()
    group = root
    for frame in entry.reader.frames(entry.node):
        key = (*key, frame)
        if key not in made:
            name = frame.path.removeprefix(f"{group.path}.") if group.path else frame.path
            again = (
                f"@{frame.call}" if frame.call != group.call else ""
            )  # a second call of a module around it says the same
            made[key] = Group("module", f"{name}{again}", frame.path, frame.type, call=frame.call)
            group.items.append(made[key])
        group = made[key]
    return group


def inline_single(group: Group) -> Mapping[Entry, str]:
    """Put operators that are alone in their module in its place (in place); return the names of these modules."""
    names: dict[Entry, str] = {}
    for index, item in enumerate(group.items):
        if not isinstance(item, Group):
            continue
        names.update(inline_single(item))
        if item.kind == "module" and len(item.items) == 1 and isinstance(item.items[0], Entry) and not item.is_layer:
            entry = item.items[0]
            names[entry] = item.name
            group.items[index] = entry
    return names


def gather_steps(group: Group) -> None:
    """Split groups with too many items to be seen at once into steps (in place).

    In a module that holds layers, runs of plain operators (of masks and positions) become one group each; anywhere, so do parts of
    more items than a person or a layout can take in.
    """
    for item in group.items:
        if isinstance(item, Group):
            gather_steps(item)
    if any(inner.is_layer for item in group.items if isinstance(item, Group) for inner in item.groups()):
        group.items = list(_runs(group.items))
    while len(group.items) > (_MAX_COPIES if group.kind == "repeat" else _MAX_ITEMS):
        group.items = [
            Group(
                "steps",
                f"steps {start + 1}–{min(start + _STEPS, len(group.items))}",
                items=group.items[start : start + _STEPS],
            )
            for start in range(0, len(group.items), _STEPS)
        ]


def _runs(items: Iterable[Item]) -> Iterator[Item]:
    run: list[Item] = []
    for item in items:
        if isinstance(item, Entry) and item.status == "same" and item.node.op not in ("placeholder", "output"):
            run.append(item)
            continue
        yield from _gathered(run)
        run = []
        yield item
    yield from _gathered(run)


def _gathered(run: list[Item]) -> Iterator[Item]:
    if len(run) < _SHORTEST_RUN:
        yield from run
    else:
        first, last = (item.node.name for item in (run[0], run[-1]) if isinstance(item, Entry))
        yield Group("steps", f"{first} … {last}", items=run)
