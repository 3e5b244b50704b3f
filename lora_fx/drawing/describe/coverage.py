"""Coverage of call sites: the branches of each, their ranks and rules or the reason for none; as a matrix layer × projection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lora_fx.branches.find import find_branches
from lora_fx.branches.lower import lower
from lora_fx.drawing.describe.branch_stamps import branches_of, settings_of
from lora_fx.drawing.describe.node_text import Reader
from lora_fx.errors import FoldError
from lora_fx.graph.adapter_names import adapters
from lora_fx.graph.graph_module import state_of
from lora_fx.graph.info import known_info
from lora_fx.numerics.lowrank_merge import Merge
from lora_fx.numerics.update import Update
from lora_fx.sites.call_sites import Site, sites


@dataclass(frozen=True)
class Covered:
    """One call site, and the branches beside it.

    Attributes:
        site: the site.
        state: whether it has a branch, or had one that is merged into its weight.
        ranks: of its branches.
        rule: the rule that chose it, if known.
        reason: the reason why it was skipped, if known.
    """

    site: Site
    state: Literal["branch", "merged", "none"]
    ranks: tuple[int, ...] = ()
    rule: str = ""
    reason: str = ""


def coverage(graph: Reader, merges: Iterable[Merge]) -> tuple[Covered, ...]:
    """Return all call sites of a graph, in order.

    Args:
        graph: a graph with branches, or a folded one.
        merges: the merges that a fold made in its weights, or would make.
    """
    module = graph.graph_module
    merged = {name for merge in merges for name in merge.names}
    reasons: dict[str, str] = {}
    for record in known_info(module).adapters.values():
        reasons.update(record.skipped if record.acts else {})
    found = sites(module)
    branched = _branched(graph, found)
    covered = []
    for site in found:
        if site.node in branched:
            ranks, rule = branched[site.node]
            covered.append(Covered(site, "branch", ranks, rule))
        elif site.weight in merged:
            covered.append(Covered(site, "merged"))
        else:
            covered.append(Covered(site, "none", reason=reasons.get(site.name, "")))
    return tuple(covered)


def _branched(graph: Reader, found: Sequence[Site]) -> Mapping[str, tuple[tuple[int, ...], str]]:
    """Return ranks and rules of the branches at each site, by the name of its node."""
    module = graph.graph_module
    if not adapters(module):
        return {}
    try:
        branches = find_branches(lower(module))
    except (
        FoldError
    ):  # such a graph can be drawn all the same: the branches that lora_fx wrote are known by their stamps
        return _branched_by_stamps(graph, found)
    rules = {site: rule for site, (_, rule) in _branched_by_stamps(graph, found).items()}
    tensors = state_of(module).tensors
    return {branch.site.name: (_ranks(branch.updates, tensors), rules.get(branch.site.name, "")) for branch in branches}


def _branched_by_stamps(graph: Reader, found: Sequence[Site]) -> Mapping[str, tuple[tuple[int, ...], str]]:
    node_of = {site.name: site.node for site in found}
    ranks: dict[str, tuple[int, ...]] = {}
    rules: dict[str, list[str]] = {}
    branches = dict.fromkeys(branches_of(graph.graph_module).values())
    for branch, known in settings_of(graph.graph_module, branches).items():
        if branch.site in node_of:
            node = node_of[branch.site]
            ranks[node] = (*ranks.get(node, ()), *([known["rank"]] if "rank" in known else []))
            rules.setdefault(node, []).append(known.get("rule", ""))
    return {node: (found, ", ".join(dict.fromkeys(filter(None, rules[node])))) for node, found in ranks.items()}


def _ranks(updates: Iterable[Update], tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    ranks = []
    for update in updates:
        first = update.factors[0]
        if first.name in tensors:
            ranks.append(first.view.apply(tensors[first.name].to("meta")).shape[-2])
    return tuple(ranks)


@dataclass(frozen=True)
class Matrix:
    """The sites in one stack of layers: a row for each layer, with positions in the list of all sites; None where it has no site."""

    stack: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[int | None, ...]], ...]


def matrices(covered: Sequence[Covered]) -> tuple[tuple[Matrix, ...], tuple[int, ...]]:
    """Return a matrix for each stack of layers, and the sites outside of all stacks."""
    stacks: dict[str, dict[str, dict[str, int]]] = {}
    elsewhere = []
    for position, each in enumerate(covered):
        parts = each.site.name.split(".")
        index = next((place for place, part in enumerate(parts[:-1]) if part.isdigit()), None)
        if index is None:
            elsewhere.append(position)
        else:
            stack, projection = ".".join(parts[:index]), ".".join(parts[index + 1 :])
            stacks.setdefault(stack, {}).setdefault(parts[index], {})[projection] = position
    made = []
    for stack, layers in stacks.items():
        columns = tuple(dict.fromkeys(projection for cells in layers.values() for projection in cells))
        rows = tuple((index, tuple(cells.get(column) for column in columns)) for index, cells in layers.items())
        made.append(Matrix(stack, columns, rows))
    return tuple(made), tuple(elsewhere)
