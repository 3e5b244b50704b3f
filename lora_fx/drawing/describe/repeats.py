"""Layers that are exactly alike become one group: ``layers.0–31 ×32``.

Consecutive siblings are alike if their operators, arguments, shapes, wiring, difference and branches are equal, but for their
index: what one reads of the layer before it, the next reads of it. So are tensors that are constants of the code; weights and
other persistent tensors may have any values. A hash finds candidates; equality decides. Layers that alternate are one group by
their period: ``layers.0–23 ×24 by 6``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import fx

from lora_fx.drawing.describe.difference import Difference, Entry, Union
from lora_fx.drawing.describe.module_tree import Group, Item
from lora_fx.drawing.describe.node_text import Reader
from lora_fx.graph.compare import same_values
from lora_fx.graph.provenance import stamp_of

_UNBACKED = re.compile(r"\bu\d+\b")  # sizes that depend on data are numbered through all layers
_LIFTED = re.compile(r"((?:^|\.)lifted_tensor)_\d+$")
_INDEX = re.compile(r"(?P<stem>(?:.*\.)?)(?P<index>\d+)")


@dataclass(frozen=True)
class _Form:
    """A group without its index.

    Attributes:
        tree: the groups within it.
        tokens: one for each operator: what it is, and where in the group it reads from.
        readers: by the position of each operator that is read outside, what reads it.
        outside: what it reads from elsewhere, in the order in which it first does.
        positions: of its operators.
    """

    tree: Any
    tokens: tuple[Any, ...]
    readers: Mapping[int, tuple[Entry, ...]]
    outside: tuple[Entry, ...]
    positions: Mapping[Entry, int]

    @cached_property
    def content(self) -> tuple[Any, ...]:
        return self.tree, self.tokens

    @cached_property
    def digest(self) -> int:
        return hash(self.content)


def collapse(root: Group, union: Union, settings: Mapping[Entry, Mapping[str, Any]]) -> None:
    """Put runs of groups that are exactly alike into a repeat (in place).

    Args:
        root: the tree of modules.
        union: whose operators are in it.
        settings: what else must be equal of operators: the settings of their branches.
    """
    readers: dict[Entry, list[Entry]] = {}
    for sources in (union.inputs, union.former):
        for entry, read in sources.items():
            for source in () if entry.hidden else read:
                readers.setdefault(source, []).append(entry)

    @cache
    def form_of(group: Group) -> _Form:
        return _form(group, union, readers, settings)

    _collapse(root, form_of)


def _collapse(group: Group, form_of: Callable[[Group], _Form]) -> None:
    items: list[Item] = []
    for run, period in _runs(group.items, form_of):
        members = [item for item in run if isinstance(item, Group)]
        if len(run) > period:
            units = members if period == 1 else [_unit(members[at : at + period]) for at in range(0, len(run), period)]
            name = _named(members, "" if period == 1 else f" by {period}")
            items.append(Group("repeat", name, type=members[0].type, items=list(units), copies=len(units)))
        else:
            items += run
        for item in members:
            _collapse(item, form_of)
    group.items = items


def _unit(members: Sequence[Group]) -> Group:
    """Return the layers of one period, which are repeated together."""
    return Group("steps", f"{members[0].name.partition('@')[0]}–{_last_part(members[-1])}", items=list(members))


def _last_part(group: Group) -> str:
    end = _index(group)
    return str(group.call if end is None else end[1])


_MAX_PERIOD = 8  # Gemma 3 has one layer of full attention behind five with a window


def _runs(items: Sequence[Item], form_of: Callable[[Group], _Form]) -> Iterator[tuple[list[Item], int]]:
    """Yield the items in order, equal neighbours together, or layers that alternate: with their period, which is else 1."""
    at = 0
    while at < len(items):
        chain = _chain(items[at:])
        forms = [form_of(group) for group in chain] if len(chain) > 1 else []
        run = _alike_from(forms, 1)
        periods = range(2, min(_MAX_PERIOD, len(chain) // 2) + 1) if run < len(chain) else ()
        longest = max(((_alternating(chain, forms, period), -period) for period in periods), default=(0, 0))
        if longest[0] > run:
            yield list(chain[: longest[0]]), -longest[1]
            at += longest[0]
        else:
            for part in _parted(list(items[at : at + run]), forms[:run]):
                yield part, 1
            at += run


def _chain(items: Sequence[Item]) -> Sequence[Group]:
    """Return the groups at the beginning of which each follows the one before it."""
    chain: list[Group] = []
    for item in items:
        if not isinstance(item, Group) or (chain and not _follows(chain[-1], item)):
            break
        chain.append(item)
    return chain


def _alike_from(forms: Sequence[_Form], period: int) -> int:
    """Return how many items from the first on are alike, each to the one a period before it; at least one."""
    count = period
    while count < len(forms) and _is_alike(forms[:count], forms[count], period):
        count += 1
    return count


def _alternating(chain: Sequence[Group], forms: Sequence[_Form], period: int) -> int:
    """Return how many items are whole periods that are alike, also in what reads them; 0 for fewer than two periods."""
    count = _alike_from(forms, period) // period * period
    if count < 2 * period or next(_parted(list(chain[:count]), forms[:count], period)) != list(chain[:count]):
        return 0
    return count


def _parted(run: list[Item], forms: Sequence[_Form], period: int = 1) -> Iterator[list[Item]]:
    """Yield a run in parts with equal readers: later items at one distance, or one reader outside.

    The last, behind which there are none that read them, may be read by others.
    """
    if len(run) < 2:
        yield from [run] * bool(run)
        return
    read = [set(_readers(forms, index)) for index in range(len(forms))]
    part = run[:period]
    for index in range(period, len(run)):
        before, here = read[index - period], read[index]
        # A reader at a distance that is behind the end of the run for the next item: another may read that instead, or none.
        beyond = {each for each in before if isinstance(each[1], int) and index + each[1] >= len(run)}
        gained = here - before
        if (
            before - here == beyond
            and {position for position, *_ in gained} <= {position for position, *_ in beyond}
            and not any(isinstance(who, int) for _, who, _ in gained)
        ):
            part.append(run[index])
        else:
            yield part
            part = [run[index]]
    yield part


def _readers(forms: Sequence[_Form], index: int) -> Iterator[tuple[int, int | Entry, int]]:
    """Yield who reads a member of a run: position read, distance and position of the reader, or the reader outside and 0."""
    for position, found in forms[index].readers.items():
        for reader in found:
            inside = next((d for d, form in enumerate(forms[index + 1 :], 1) if reader in form.positions), None)
            if inside is None:
                yield position, reader, 0
            else:
                yield position, inside, forms[index + inside].positions[reader]


def _follows(group: Group, other: Group) -> bool:
    """Tell whether two groups are neighbours by their index, or two calls of one module after each other."""
    if group.kind != "module" or other.kind != "module" or group.type != other.type:
        return False
    if group.path == other.path:
        return group.call + 1 == other.call
    mine, theirs = _index(group), _index(other)
    return (
        mine is not None
        and theirs is not None
        and (mine[0], mine[1] + 1, group.call) == (theirs[0], theirs[1], other.call)
    )


def _index(group: Group) -> tuple[str, int] | None:
    match = _INDEX.fullmatch(group.name.partition("@")[0])
    return (match["stem"], int(match["index"])) if match else None


def _named(members: Sequence[Group], period: str) -> str:
    """Return the name of a repeat: ``layers.0–31 ×32``, or of layers that alternate, ``layers.0–31 ×32 by 2``."""
    first, last = members[0], members[-1]
    name = first.name.partition("@")[0]
    if first.path == last.path:
        return f"{name}@{first.call}–{last.call} ×{len(members)}{period}"
    end = _index(last)
    assert end is not None
    return f"{name}–{end[1]} ×{len(members)}{period}"


def _is_alike(forms: Sequence[_Form], form: _Form, period: int) -> bool:
    """Tell whether a group continues a run of groups, each equal to the one a period before it."""
    last = forms[-period]
    if form.digest != last.digest or form.content != last.content:
        return False
    for mine, theirs in zip(last.outside, form.outside, strict=True):
        here, there = _source(forms[:-period], mine), _source(forms, theirs)
        if here == there:
            continue
        # An early item reads from before the run what later ones read from within it, at one distance.
        if not isinstance(there, tuple) or isinstance(here, tuple) or len(forms) - period >= there[0]:
            return False
    return True


def _source(forms: Sequence[_Form], entry: Entry) -> Entry | tuple[int, int]:
    """Return how far back in the run a source is, and its position there; or the source itself where it is outside of the run."""
    for distance, form in enumerate(reversed(forms), 1):
        if entry in form.positions:
            return distance, form.positions[entry]
    return entry


def _form(
    group: Group, union: Union, readers: Mapping[Entry, Sequence[Entry]], settings: Mapping[Entry, Mapping[str, Any]]
) -> _Form:
    ordered = list(group.entries())
    positions = {entry: index for index, entry in enumerate(ordered)}
    outside: dict[Entry, int] = {}

    def place(entry: Entry) -> tuple[str, int]:
        if entry in positions:
            return "inside", positions[entry]
        return "outside", outside.setdefault(entry, len(outside))

    by_node = {
        source.node: source for entry in ordered for source in (*union.inputs[entry], *union.former.get(entry, ()))
    }
    tokens = tuple(_token(entry, group, place, by_node, union, settings.get(entry)) for entry in ordered)
    read = {
        position: tuple(reader for reader in readers.get(entry, ()) if reader not in positions)
        for entry, position in positions.items()
    }
    read = {position: found for position, found in read.items() if found}
    return _Form(_tree(group, top=True), tokens, read, tuple(outside), positions)


def _tree(group: Group, *, top: bool = False) -> Any:
    inner = tuple(_tree(item) if isinstance(item, Group) else "" for item in group.items)
    return group.kind, "" if top else group.name.partition("@")[0], group.type, inner


def _token(
    entry: Entry,
    group: Group,
    place: Callable[[Entry], tuple[str, int]],
    by_node: Mapping[fx.Node, Entry],
    union: Union,
    setting: Mapping[str, Any] | None,
) -> tuple[Any, ...]:
    """Return everything that tells an operator from others, without the index of the group."""
    reader, node = entry.reader, entry.node

    def name_of(argument: fx.Node) -> str:
        if argument in by_node:
            return "%{}:{}".format(*place(by_node[argument]))
        return f"%{_own_name(str(argument.target), group)}" if argument.op == "get_attr" else reader.value(argument)

    stamp = stamp_of(node)
    return (
        reader.operator(node),
        _UNBACKED.sub("u", reader.arguments(node, name_of, longest=None)),
        _UNBACKED.sub("u", reader.value(node)),
        tuple(
            (_own_name(weight.name, group), weight.value, weight.trainable, _constant(weight.name, group, reader))
            for weight in reader.weights(node)
        ),
        repr(reader.graph_module.get_submodule(str(node.target))) if node.op == "call_module" else "",
        entry.status,
        tuple(_own_difference(difference, group) for difference in entry.differences),
        tuple(place(source) for source in union.former.get(entry, ())),
        (stamp.get("adapter"), stamp.get("part"), stamp.get("rule")),
        tuple(sorted(setting.items())) if setting else (),
    )


def _own_difference(difference: Difference, group: Group) -> tuple[str, ...]:
    """Return a difference without the index of the group. Former and present inputs are compared by the wiring."""
    if difference.wiring:
        return (difference.what,)
    return difference.what, *(text.replace(f"{group.path}.", "") for text in (difference.before, difference.after))


@dataclass(frozen=True, eq=False)
class _Constant:
    """A tensor of the model's code; equal to another of equal values, and to none where its values are not known."""

    value: torch.Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constant) and same_values(self.value, other.value)

    def __hash__(self) -> int:
        return hash(self.value.shape)


def _constant(weight: str, group: Group, reader: Reader) -> _Constant | None:
    value = reader.constant(weight) if weight.startswith(f"{group.path}.") else None
    return None if value is None else _Constant(value)


def _own_name(weight: str, group: Group) -> str:
    """Return the name of a weight within a group, without the running number that torch.export gives to constants in code."""
    return _LIFTED.sub(r"\1", weight.removeprefix(f"{group.path}."))
