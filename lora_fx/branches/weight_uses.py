"""Weights with several uses: the values that they need after a fold, and the names of these.

The uses of a weight are counted before it is changed. Those with equal updates go on to share a value; where that is not
all of them, the weight is untied if the caller asked for that, and refused otherwise. Names after untying:

1. a name that the weight has in the module that uses it (``lm_head.weight`` for the head, of an embedding and a head);
2. else, for the first of the values, all names that no other value claims;
3. else a new one: the site's name and the parameter's own, ``shared@2.weight`` for the second call of ``shared``.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from lora_fx.branches.affine import COLUMN
from lora_fx.branches.found import FoundBranch, replaced_nodes, unexpected
from lora_fx.branches.selected import not_always
from lora_fx.errors import FoldError, listed
from lora_fx.graph.adapter_names import adapter_of, is_factor, original_name
from lora_fx.graph.aten_kinds import flattened
from lora_fx.graph.erasing import erase_unread
from lora_fx.graph.graph_module import state_of
from lora_fx.graph.info import known_info
from lora_fx.graph.provenance import module_path
from lora_fx.graph.state import State
from lora_fx.numerics.lowrank_merge import Merge, RowWrite
from lora_fx.numerics.update import Update
from lora_fx.numerics.weight_view import AS_STORED, SWAP, View
from lora_fx.sites.call_sites import sites
from lora_fx.sites.stored_weight import stored, written_rows
from lora_fx.sites.weight_ops import readers


@dataclass(frozen=True)
class Use:
    """One use of a weight.

    Attributes:
        reader: the node that computes with it.
        weight: the ``get_attr`` that it reads; None for a module that holds the weight.
        between: the transposes and casts between the two.
        site: name of the site; the module path, if the reader is no site.
        updates: of the branches beside it.
        view: the view of the weight in which these are.
    """

    reader: fx.Node
    weight: fx.Node | None
    between: tuple[fx.Node, ...]
    site: str
    updates: tuple[Update, ...] = ()
    view: View = AS_STORED

    @property
    def writes(self) -> tuple[RowWrite, ...]:
        """The rows of the weight that are written over between the two."""
        return tuple(write for node in self.between if (write := written_rows(node)) is not None)

    @property
    def changes(self) -> bool:
        """Whether the reader computes with another value than the weight's."""
        return bool(self.updates or self.writes)


@dataclass(frozen=True)
class Value:
    """A value that a weight has after folding: all uses of it that have equal updates.

    Attributes:
        weight: first name of the weight.
        uses: the uses that read it.
        names: in the state dict.
    """

    weight: str
    uses: tuple[Use, ...]
    names: tuple[str, ...] = ()

    @property
    def updates(self) -> tuple[Update, ...]:
        """The updates of the weight."""
        return self.uses[0].updates

    @property
    def merge(self) -> Merge:
        """The value as data, without graph nodes."""
        return Merge(self.weight, self.names, self.updates, self.uses[0].view, self.uses[0].writes)

    @property
    def changes(self) -> bool:
        """Whether it is another value than the weight has."""
        return self.uses[0].changes


def values_of(graph_module: fx.GraphModule, found: Sequence[FoundBranch], *, unshare: bool) -> tuple[Value, ...]:
    """Return the values of every weight that has a branch at one of its uses, or rows that an adapter writes over.

    Raises:
        FoldError: a branch acts for a part of the tokens; branches add a constant to the output of a site without a bias; or uses of a
            weight need different values, and ``unshare`` is not set, or it is not known which name belongs to which value. The message
            names all such weights.
    """
    state = state_of(graph_module)
    names, aliases = state.names(), state.aliases()
    partial = next((each for each in found if each.partial), None)
    if partial is not None:
        factors = [name for update in partial.updates for name in update.names if is_factor(name)]
        acting = sorted({str(adapter_of(name)) for name in factors})
        records = known_info(graph_module).adapters
        told = [
            name
            for name in acting
            if name in records and any(b.setting.invocation_tokens for _, b in records[name].branches.values())
        ]
        raise not_always(" and ".join(map(repr, told or acting)), factors[0].partition(".lora_")[0])
    lacking = next((each.bias for each in found if each.bias is not None and each.bias.node is None), None)
    if lacking is not None:
        raise unexpected(lacking.reader, "it adds a constant to the output of a site that has no bias to hold it")
    problems: list[str] = []
    values: list[Value] = []
    for weight, uses in _uses(graph_module, found, state).items():
        groups: dict[object, list[Use]] = {}
        for use in uses:
            groups.setdefault((_in_one_layout(use), _written_text(use, state)), []).append(use)
        distinct = [Value(weight, tuple(group)) for group in groups.values()]
        twice = next((use for use in uses if use.updates and _read_count(use.reader, weight, aliases) > 1), None)
        if twice is not None:
            problems.append(
                f"{twice.reader.name} reads {weight!r} twice, but only once with a branch. Give the model two weights, or adapt neither use."
            )
        elif len(distinct) > 1 and not unshare:
            problems.append(
                f"{weight!r} is used {len(uses)} times, and its uses need different values after folding: {_uses_text(uses)}. "
                "Adapt all uses alike, give the model separate weights before the rewrite, or untie them with unshare=True."
            )
        else:
            values += _with_names(distinct, original_names(names[weight]), state.tensors.keys(), problems)
    if problems:
        raise FoldError(" ".join(problems))
    return tuple(values)


def _in_one_layout(use: Use) -> object:
    """Return the updates at a use and the view that they are in, equal for uses that add the same to a weight, in whichever layout.

    An embedding reads the table as ``(dim, rows)``, and the head that is tied to it as ``(rows, dim)``: ``(B A)ᵀ = Aᵀ Bᵀ``.
    """
    updates, view = use.updates, use.view
    if view.steps[-1:] == (SWAP,) and all(update.can_be_transposed for update in updates):
        updates, view = tuple(update.transposed for update in updates), view.then(SWAP)
    return frozenset(Counter(updates).items()), view


def _written_text(use: Use, state: State) -> tuple[tuple[str, str], ...]:
    """Return the rows that are written over at a use, by their numbers: each call of a module may have these in a tensor of its own."""
    rows = ((state.tensors[write.rows], write) for write in use.writes)
    return tuple((write.rows if each.is_meta else str(each.tolist()), write.values) for each, write in rows)


def original_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the model's parameters, also for trained copies that replace them."""
    return tuple(original_name(name) or name for name in names)


def separate(graph: fx.Graph, values: Sequence[Value], copies: Mapping[fx.Node, fx.Node]) -> None:
    """Give every value of an untied weight a ``get_attr`` of its own (in place).

    Args:
        graph: a copy of the graph that the values are of.
        values: of every weight that has a branch.
        copies: nodes of that graph → nodes of ``graph``.
    """
    values_per_weight = Counter(value.weight for value in values)
    named = {str(node.target): node for node in graph.find_nodes(op="get_attr")}
    left: dict[fx.Node, None] = {}
    for value in values:
        if values_per_weight[value.weight] == 1:
            continue
        for use in value.uses:
            if use.weight is None or value.names[0] in original_names([str(use.weight.target)]):
                continue
            path = [copies[node] for node in (use.weight, *use.between)]
            reader = copies[use.reader]
            reader.replace_input_with(path[-1], copy_path(graph, named, path, value.names[0]))
            left.update(dict.fromkeys(reversed(path)))
    for node in left:  # paths copied for some uses may still serve others
        erase_unread(graph, node)


def copy_path(graph: fx.Graph, named: dict[str, fx.Node], path: Sequence[fx.Node], name: str) -> fx.Node:
    """Return the end of a path from a ``get_attr``, copied for another tensor; new ``get_attr`` nodes go into ``named``."""
    first, *between = path
    if name not in named:
        with graph.inserting_after(first):
            named[name] = graph.get_attr(name)
        named[name].meta = dict(first.meta)
    node: Any = named[name]
    for original in between:
        with graph.inserting_after(original):
            copied = graph.node_copy(original, lambda n, last=node: last if n in path else n)  # type: ignore[misc]
        node = copied
    return node  # type: ignore[no-any-return]


def _uses(graph_module: fx.GraphModule, found: Sequence[FoundBranch], state: State) -> dict[str, list[Use]]:
    """Return all uses of every weight that has a branch at one of them, in the order of the graph."""
    aliases, dead = state.aliases(), replaced_nodes(graph_module.graph, found)
    name_of = {site.node: site.name for site in sites(graph_module)}
    at: dict[tuple[fx.Node, str], tuple[tuple[Update, ...], View]] = {}
    for branch in found:
        at[branch.site, aliases[str(branch.weight.target)]] = branch.updates, branch.view
        if branch.bias is not None and branch.bias.node is not None:
            at[branch.bias.reader, aliases[str(branch.bias.node.target)]] = branch.bias.updates, COLUMN
    uses: dict[str, list[Use]] = {weight: [] for _, weight in at}
    computed = {branch.weight: branch.computed for branch in found if branch.computed is not None}
    for node in written_nodes(graph_module.graph):
        own = stored(node)
        assert own is not None
        uses.setdefault(aliases[str(own.node.target)], [])
    held = _tensors_of_modules(state, aliases)
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and aliases.get(str(node.target)) in uses:
            weight = aliases[str(node.target)]
            through = readers(computed[node]) if node in computed else ()
            for reader, between in (*readers(node), *through):
                if reader in dead and (reader, weight) not in at:
                    continue
                site = name_of.get(reader.name, module_path(reader))
                updates, view = at.get((reader, weight), ((), AS_STORED))
                uses[weight].append(Use(reader, node, between, site, updates, view))
        elif node.op == "call_module":
            for weight in held[str(node.target)] & uses.keys():
                uses[weight].append(Use(node, None, (), str(node.target)))
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    return {weight: sorted(each, key=lambda use: order[use.reader]) for weight, each in uses.items()}


def written_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes of a graph that write rows of an adapter over those of a weight."""
    nodes = graph.find_nodes(op="call_function", target=torch.ops.aten.index_copy.default)
    return [node for node in nodes if written_rows(node) is not None]


def _tensors_of_modules(state: State, aliases: Mapping[str, str]) -> Mapping[str, set[str]]:
    """Map every leaf module to the tensors that it holds, by their first names."""
    held: dict[str, set[str]] = {name: set() for name in state.modules}
    for name, first in aliases.items():
        for end in (place for place, letter in enumerate(name) if letter == "."):
            if name[:end] in held:
                held[name[:end]].add(first)
    return held


_MAX_NAMED = 5


def _with_names(
    values: Sequence[Value], names: tuple[str, ...], taken: Collection[str], problems: list[str]
) -> list[Value]:
    """Return the values of one weight with their names."""
    if len(values) == 1:
        return [replace(values[0], names=names)]
    owner: dict[str, int] = {}
    for index, value in enumerate(values):
        paths = {module_path(use.reader) for use in value.uses}
        for name in names:
            if name.rpartition(".")[0] in paths:
                owner.setdefault(name, index)
    if len(names) > 1 and not owner:
        places = [use.reader.name for value in values for use in value.uses]
        problems.append(
            f"{' and '.join(names)} are one tensor, and none of its uses ({listed(places, _MAX_NAMED)}) is known to be in a call of "
            "one of these modules, as with products in functional form and in a copy of a graph without metadata: untying cannot tell which "
            "name goes with which value. Adapt all uses alike, or give the model separate weights before the rewrite."
        )
    plain = next((index for index, value in enumerate(values) if not value.changes), 0)
    first = plain if plain not in owner.values() else 0
    for name in names:
        owner.setdefault(name, first)
    owned = [tuple(name for name in names if owner[name] == index) for index in range(len(values))]
    return [
        replace(value, names=own or (_new_name(value.uses[0].site, names[0], taken),))
        for value, own in zip(values, owned, strict=True)
    ]


def _new_name(site: str, name: str, taken: Collection[str]) -> str:
    """Return a new name for a value without any of the weight's names: the site's name, and the parameter's own."""
    module, _, call = (site or name).partition("@")
    own = "" if module == name else f".{name.rpartition('.')[2]}"
    first = int(call or 2)
    candidates = (f"{module}@{number}{own}" for number in itertools.count(first))
    return next(candidate for candidate in candidates if candidate not in taken)


def _read_count(reader: fx.Node, weight: str, aliases: Mapping[str, str]) -> int:
    """Return the number of a node's arguments that are a weight, or a view of it."""
    found = [stored(argument) for argument in flattened((reader.args, list(reader.kwargs.values())))]
    return sum(each is not None and aliases.get(str(each.node.target)) == weight for each in found)


def _uses_text(uses: Sequence[Use]) -> str:
    return "; ".join(f"{use.reader.name} ({use.site}, {_use_text(use)})" for use in uses)


def _use_text(use: Use) -> str:
    rows = f"with rows of {' and '.join(write.values for write in use.writes)}"
    return rows if use.writes else f"{'with' if use.updates else 'without'} a branch"
