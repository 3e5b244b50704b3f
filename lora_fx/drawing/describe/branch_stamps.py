"""Branches that lora_fx wrote into a graph: the nodes of each by their stamps, and its recorded settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from lora_fx.graph.adapter_names import is_factor
from lora_fx.graph.info import known_info
from lora_fx.graph.provenance import stamp_of

AHEAD = ("prefix", "prompt")
"""Sites of what stands in front of the text, and has no factors."""


@dataclass(frozen=True)
class StampedBranch:
    """One branch, of one site.

    Attributes:
        site: name of the site.
        adapter: name of the adapter.
        factors: names of its factors, which tell the branches of one site and adapter apart.
    """

    site: str
    adapter: str
    factors: tuple[str, ...]

    @property
    def word(self) -> str:
        """What pictures call it."""
        return self.site if not self.factors and self.site in AHEAD else "LoRA"


def branches_of(graph_module: fx.GraphModule) -> Mapping[fx.Node, StampedBranch]:
    """Return the branch of each stamped node: connected nodes of one site and adapter are one branch.

    A branch may be added to the end of another.
    """
    stamped = [node for node in graph_module.graph.nodes if node.op != "get_attr" and stamp_of(node)]
    owner = {node: (_stamp(node, "site"), _stamp(node, "adapter")) for node in stamped}
    merged: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while node in merged:
            node = merged[node]
        return node

    for node in stamped:
        for source in _summands(node):
            if owner.get(source) == owner[node] and root(source) is not root(node):
                merged[root(node)] = root(source)
    factors: dict[fx.Node, set[str]] = {}
    for node in stamped:
        factors.setdefault(root(node), set()).update(_factors(node))
    return {node: StampedBranch(*owner[node], tuple(sorted(factors[root(node)]))) for node in stamped}


def settings_of(graph_module: fx.GraphModule, branches: Iterable[StampedBranch]) -> dict[StampedBranch, dict[str, Any]]:
    """Return the settings of each branch: site, adapter, and from the graph's record rule, rank and the rest."""
    recorded: dict[tuple[str, str], dict[str, Any]] = {}
    for adapter, record in known_info(graph_module).adapters.items():
        for rule, planned in record.branches.values():
            setting = planned.setting
            known: dict[str, Any] = {"rule": rule, "rank": setting.rank, "alpha": setting.alpha}
            known |= {"scaling": setting.scale, "dropout": setting.dropout}
            known |= {} if planned.part is None else {"part": planned.part}
            names = planned.names(adapter)
            recorded |= {(adapter, names.a): known, (adapter, names.b): known}
    return {
        branch: {
            "site": branch.site,
            "adapter": branch.adapter,
            **next(
                (recorded[branch.adapter, name] for name in branch.factors if (branch.adapter, name) in recorded), {}
            ),
        }
        for branch in branches
    }


def _stamp(node: fx.Node, key: str) -> str:
    return str(stamp_of(node).get(key, ""))


def _summands(node: fx.Node) -> Sequence[fx.Node]:
    """Return the nodes of its own branch that a node reads: of a sum, not the value to which the branch is added."""
    if _stamp(node, "part") == "add":
        return [source for source in node.args[1:] if isinstance(source, fx.Node)]
    return node.all_input_nodes


def _factors(node: fx.Node) -> set[str]:
    """Return the factors that a node reads, directly or through views."""
    found: set[str] = set()
    for source in node.all_input_nodes:
        if source.op == "get_attr" and is_factor(str(source.target)):
            found.add(str(source.target))
        elif len(source.all_input_nodes) == 1 and source.all_input_nodes[0].op == "get_attr":
            found |= _factors(source)
    return found
