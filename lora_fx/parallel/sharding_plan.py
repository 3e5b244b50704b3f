"""Sharding plans: which linear sites processes divide by output, and which by input, as data; and the tensors that follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from lora_fx.adapters.activate import activate
from lora_fx.errors import PlanError, listed
from lora_fx.graph.graph_module import TracedGraphModule, state_of
from lora_fx.graph.info import info_of
from lora_fx.graph.process_sums import Shard
from lora_fx.graph.records import BranchSpec
from lora_fx.rules.dotted_names import ends_in
from lora_fx.rules.vocabulary import Role
from lora_fx.sites.call_sites import Site, sites
from lora_fx.sites.roles import Purpose, purposes
from lora_fx.sites.weight_ops import WeightOp, weight_op

_COLUMNS: frozenset[Role] = frozenset(
    {
        *("self_attention.query", "self_attention.key", "self_attention.value"),
        *("cross_attention.query", "cross_attention.key", "cross_attention.value", "mlp.gate", "mlp.up"),
    }
)
_ROWS: frozenset[Role] = frozenset({"self_attention.output", "cross_attention.output", "mlp.down"})


@dataclass(frozen=True)
class ShardingPlan:
    """The linear sites that processes divide. Names are whole dotted names or their ends, with ``*`` for anything within a part, as in rules.

    Attributes:
        columns: sites of which each process has a part of the outputs: queries, keys, values, gate and up.
        rows: sites of which each process has a part of the inputs, and whose outputs are summed: the output of an attention, down.
    """

    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Divided:
    """What follows from a plan.

    Attributes:
        shards: by the first names of parameters.
        sites: the sites, by the first names of these parameters.
    """

    shards: Mapping[str, Shard] = field(default_factory=dict)
    sites: Mapping[str, str] = field(default_factory=dict)


def divided(graph_module: TracedGraphModule, plan: ShardingPlan | None) -> Divided:
    """Return how the parameters of a graph are divided.

    Args:
        graph_module: a flat graph.
        plan: None finds the sites by their roles.

    Raises:
        PlanError: a name of the plan means no linear site, a site is meant both ways, or has a branch that cannot be divided.
    """
    # Roles follow from the dataflow of the model, without branches.
    bare = activate(graph_module, {}) if info_of(graph_module).adapters else graph_module
    known = sites(bare)
    roles = purposes(bare, known)
    nodes = {node.name: node for node in graph_module.graph.nodes}
    aliases, tensors = state_of(graph_module).aliases(), state_of(graph_module).tensors
    shards: dict[str, Shard] = {}
    of: dict[str, str] = {}
    for site, by_output in _chosen(known, roles, plan):
        for name, shard in _of_site(graph_module, site, nodes[site.node], by_output, roles[site.name], tensors):
            first = aliases[name]
            if shards.setdefault(first, shard) != shard:
                raise PlanError(f"{first!r} would be divided in two ways: by {of[first]} and by {site.name}.")
            of.setdefault(first, site.name)
    if not shards:
        raise PlanError("no site of the graph is divided: name some, lora_fx.parallel.ShardingPlan(columns=…, rows=…).")
    return Divided(shards, of)


def _chosen(
    known: Sequence[Site], roles: Mapping[str, Purpose], plan: ShardingPlan | None
) -> Iterator[tuple[Site, bool]]:
    """Yield the sites of a plan, each with whether it is divided by output."""
    linear = [site for site in known if site.op == "linear"]
    if plan is not None:
        unknown = [
            name for name in (*plan.columns, *plan.rows) if not any(ends_in(site.module, (name,)) for site in linear)
        ]
        if unknown:
            names = [site.module for site in linear]
            raise PlanError(f"{unknown[0]!r} is the name of no linear site; there are {listed(names, 6)}.")
    for site in linear:
        if plan is None:
            found = set(roles[site.name].roles)
            column, row = bool(found & _COLUMNS), bool(found & _ROWS)
        else:
            column, row = ends_in(site.module, plan.columns), ends_in(site.module, plan.rows)
        if column and row:
            raise PlanError(f"{site.name} would be divided by output and by input.")
        if column or row:
            yield site, column


def _of_site(
    graph_module: TracedGraphModule,
    site: Site,
    node: fx.Node,
    by_output: bool,
    purpose: Purpose,
    tensors: Mapping[str, torch.Tensor],
) -> Iterator[tuple[str, Shard]]:
    """Yield the parameters of a site and of its branches that are divided."""
    product = weight_op(node)
    assert product is not None
    blocks = _blocks(purpose, site.out_features) if by_output else (site.in_features,)
    if tensors[site.weight].dim() != 2 or product.layout is None:
        raise PlanError(f"{site.name}: its weight is no matrix as it is stored, and cannot be divided.")
    yield site.weight, Shard(int(by_output == (site.layout == "in_out")), blocks)
    if by_output and (bias := _bias(product)) is not None:
        yield bias, Shard(0, blocks)
    for adapter, record in info_of(graph_module).adapters.items():
        for _, spec in record.branches.values():
            if spec.owner in (site.name, site.module):
                _check_branch(site, spec)
                names = spec.names(adapter)
                yield (names.b, Shard(0, blocks)) if by_output else (names.a, Shard(1, blocks))
                if by_output and spec.setting.bias:
                    yield names.bias, Shard(0, blocks)


def _bias(product: WeightOp) -> str | None:
    addend = product.addend
    return str(addend.target) if addend is not None and addend.op == "get_attr" else None


def _blocks(purpose: Purpose, width: int) -> tuple[int, ...]:
    """Return the sizes of the parts of a fused projection where they lie one after the other, and else the width."""
    ranges = sorted(each for features in purpose.parts.values() for each in features.ranges)
    whole = len(ranges) == len(purpose.parts) > 1
    ends = [0, *(past for _, past in ranges)]
    if not whole or [first for first, _ in ranges] != ends[:-1] or ends[-1] != width:
        return (width,)
    return tuple(past - first for first, past in ranges)


def _check_branch(site: Site, spec: BranchSpec) -> None:
    kind = None
    if spec.setting.variant == "dora":
        kind = "is DoRA, whose norms are of whole rows of the weight"
    elif spec.features is not None:
        kind = "is for a part of the features"
    elif spec.splits:
        kind = "starts with a part of the weight (PiSSA, OLoRA)"
    if kind is not None:
        raise PlanError(
            f"the branch at {site.name} {kind}: it is not divided over processes. Train it with FSDP or DDP."
        )
