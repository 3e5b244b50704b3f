"""Starts from the weight itself: PiSSA and OLoRA, which split it, and MiCA.

PiSSA and OLoRA take ``s · B₀ A₀`` out of a weight ``W``, and the branch computes beside the rest. ``W`` stays in the graph, over the model's
storage. The rest is the adapter's own frozen tensor, which the graph reads in place of ``W`` while the adapter acts, and so are A₀ and B₀: by
them the adapter is ``W + s (B A - B₀ A₀)``, an update of ``W`` of twice the rank, as it is saved, combined and exported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import fx, nn

from lora_fx.errors import PlanError, listed
from lora_fx.graph.adapter_names import original_name, rest_name
from lora_fx.graph.info import AdapterRecord
from lora_fx.graph.records import BranchSpec
from lora_fx.graph.state import State
from lora_fx.numerics.factor_init import Split, adapter_dtype, initial_factors, minor_factors, split
from lora_fx.planning.plan import Chosen, Decision, Plan, factor_shapes, owners_of
from lora_fx.sites.call_sites import Site
from lora_fx.sites.weight_ops import readers

GivenStart = Callable[[Site], tuple[torch.Tensor, torch.Tensor] | None]
"""Gives first factors for a call site: A ``(rank, in)`` and B ``(out, rank)``; or None, for those of the rules."""

SPLITTABLE = (torch.float32, torch.float16, torch.bfloat16)


def is_from_weight(branch: BranchSpec) -> bool:
    """Tell whether the values of a new branch are made of the weight that it goes beside."""
    return branch.splits or (branch.op == "linear" and branch.setting.init == "mica")


def model_weight(site: Site) -> str:
    """Return the name of the model's weight at a site, also where the graph reads an adapter's in its place."""
    return original_name(site.weight) or site.weight


def start_values(
    site: Site, branch: BranchSpec, adapter: str, weight: torch.Tensor, given: tuple[torch.Tensor, torch.Tensor] | None
) -> dict[str, torch.Tensor] | None:
    """Return the parameters of a new branch that starts from the weight of its site, or with given factors, by their names; else None.

    Args:
        site: that the branch goes beside.
        branch: see :func:`is_from_weight`.
        adapter: that it belongs to.
        weight: the model's, as it is stored.
        given: its first factors.
    """
    if given is None and not is_from_weight(branch):
        return None
    names, setting = branch.names(adapter), branch.setting
    initial_factors(
        factor_shapes(branch, site), setting.rank, like=weight, init="random"
    )  # PEFT draws these, too, and drops them
    if given is not None:
        a, b = (factor.detach().to(weight.device, torch.float32) for factor in given)
        frozen = {}
        if branch.splits:
            frozen = frozen_values(site, branch, adapter, Split(a, b, _rest(site, branch, weight, a, b)))
    elif setting.init == "mica":
        dense = weight.detach().t() if site.layout == "in_out" else weight.detach()
        (a, b), frozen = minor_factors(dense, setting.rank), {}
    else:
        found = split_at(site, branch, weight)
        a, b, frozen = found.a, found.b, frozen_values(site, branch, adapter, found)
    dtype = adapter_dtype(site.cast or weight.dtype)
    rounded = weight.dtype if given is None or branch.splits else dtype  # B of EVA is zero, and its A is not rounded
    a, b = (factor.to(rounded).to(dtype).contiguous() for factor in (a, b))
    return {names.a: nn.Parameter(a, setting.trains_a), names.b: nn.Parameter(b, setting.trains_b), **frozen}


def _rest(site: Site, branch: BranchSpec, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return what a start leaves of a weight, as a matrix ``(out, in)``: ``W - s · B₀ A₀`` in float32, rounded to the dtype of ``W``."""
    dense = weight.detach().t() if site.layout == "in_out" else weight.detach()
    return (dense.float() - branch.setting.scale / branch.setting.strength * b @ a).to(weight.dtype)


def rests(
    branches: Iterable[tuple[str, BranchSpec]], found: Iterable[Site], tensors: Mapping[str, torch.Tensor]
) -> dict[str, nn.Parameter]:
    """Return by the names what the starts of branches leave of the weights of a graph, as far as these have values.

    Args:
        branches: adapter and branch, of every branch.
        found: the sites of the graph.
        tensors: its weights, and the first factors of the branches.

    Raises:
        PlanError: a weight is none that can be split.
    """
    site_of = {owner: site for site in found for owner in owners_of(site)}
    values = dict[str, nn.Parameter]()
    for adapter, branch in branches:
        if not branch.splits or branch.owner not in site_of:
            continue
        site, starts = site_of[branch.owner], branch.names(adapter).starts
        weight, (a, b) = tensors[model_weight(site)], (tensors[name].detach() for name in starts)
        if any(each.is_meta for each in (weight, a, b)):
            continue
        if weight.dtype not in SPLITTABLE or type(weight) not in (torch.Tensor, nn.Parameter):
            raise PlanError(
                f"adapter {adapter!r} started by splitting {model_weight(site)}, expected in float32, float16 or bfloat16, got "
                f"{weight.dtype}, or quantised. Save the adapter and load it there: as an update of the weight it takes any."
            )
        rest = _rest(site, branch, weight, a.to(weight.device), b.to(weight.device))
        rest = rest.t() if site.layout == "in_out" else rest
        values[rest_name(model_weight(site), adapter)] = nn.Parameter(rest.contiguous(), False)
    return values


def split_at(site: Site, branch: BranchSpec, weight: torch.Tensor) -> Split:
    """Return the parts of the weight of a site, as a matrix ``(out, in)``, as a branch starts."""
    setting = branch.setting
    dense = weight.detach().t() if site.layout == "in_out" else weight.detach()
    return split(dense, setting.rank, setting.scale / setting.strength, setting.init)


def frozen_values(site: Site, branch: BranchSpec, adapter: str, found: Split) -> dict[str, torch.Tensor]:
    """Return what never trains of a branch that splits its weight, by the names: the first factors, and the rest of the weight."""
    rest = found.rest.t() if site.layout == "in_out" else found.rest
    values = dict(zip(branch.names(adapter).starts, (found.a, found.b), strict=True))
    values[rest_name(model_weight(site), adapter)] = rest
    return {
        name: nn.Parameter(value.contiguous().clone(), False) for name, value in values.items()
    }  # A and B train in place


def frozen_names(site: Site, branch: BranchSpec, adapter: str) -> tuple[str, ...]:
    """Return the names of what :func:`frozen_values` has; none for a branch that does not split its weight."""
    return (*branch.names(adapter).starts, rest_name(model_weight(site), adapter)) if branch.splits else ()


def started(
    plan: Plan, graph: fx.Graph, state: State, start: GivenStart | None
) -> tuple[Plan, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Return a plan whose branches can start as it says, and given factors by the keys of their branches.

    Args:
        plan: in the result, branches with given factors whose product is not zero split their weight.
        graph: that gets the branches.
        state: of it.
        start: gives factors.

    Raises:
        PlanError: branches cannot start so; all are named.
    """
    pairs, problems = {}, list[str]()
    for chosen in plan.chosen if start is not None else ():
        for branch in chosen.branches:
            if branch.key not in pairs and branch.mirrors is None and (pair := start(chosen.site)) is not None:  # type: ignore[misc]
                problems += _unfit_pair(pair, branch, chosen.site)
                pairs[branch.key] = pair
    if not problems:
        plan = replace(plan, decisions=tuple(_with_given(each, pairs) for each in plan.decisions))
        problems = list(dict.fromkeys(_unfit(plan, graph, state)))
    if problems:
        raise PlanError("; ".join(problems) + ".")
    return plan, pairs


def _unfit_pair(pair: object, branch: BranchSpec, site: Site) -> Iterator[str]:
    """Yield why given factors are none for a branch."""
    shapes = factor_shapes(branch, site)
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(each, torch.Tensor) for each in pair)):
        yield f"{branch.key}: start= gave {type(pair).__name__}, and takes None or a tuple of two tensors, A {shapes[0]} and B {shapes[1]}"
    elif (found := tuple(tuple(each.shape) for each in pair)) != shapes or branch.features is not None:
        yield f"{branch.key}: start= gave factors {found[0]} and {found[1]}, expected A {shapes[0]} and B {shapes[1]}, for all features"
    elif not all(each.is_floating_point() and bool(torch.isfinite(each).all()) for each in pair):
        yield f"{branch.key}: start= gave numbers that are not finite, or integers"
    elif branch.op != "linear" and bool(pair[1].any()):
        yield f"{branch.key}: start= gave a B other than zero, which changes the weight, and that is for linear layers; this is {branch.op}"


def _with_given(decision: Decision, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Decision:
    """Return a decision whose branches say that they split their weight, where factors with a product are given."""
    if not isinstance(decision, Chosen):
        return decision
    branches = (
        replace(each, setting=replace(each.setting, init="given" if pairs[each.key][1].any() else "kaiming"))
        if each.key in pairs
        else each
        for each in decision.branches
    )
    return replace(decision, branches=tuple(branches))


def _unfit(plan: Plan, graph: fx.Graph, state: State) -> Iterator[str]:
    names = state.names()
    aliases = state.aliases()
    for chosen in plan.chosen:
        site = chosen.site
        weight = model_weight(site)
        tensor = state.tensors[weight]
        for branch in chosen.branches:
            start, where = branch.setting.init, f"{branch.key}: init {branch.setting.init!r}"
            if start == "orthogonal" and branch.op == "linear" and branch.setting.rank % 2:
                yield f"{where} takes an even rank, and this is {branch.setting.rank}"
            from_weight = start == "mica" or branch.setting.splits
            if branch.op not in ("linear", "embedding") and (from_weight or start == "orthogonal"):
                yield f"{where} is for linear layers, and this is {branch.op}"
            if not is_from_weight(branch):
                continue
            if tensor.is_meta:
                yield f"{where} is made of the weight, which is on the meta device; load the model with its weights"
            elif tensor.dtype not in SPLITTABLE or type(tensor) not in (torch.Tensor, nn.Parameter):
                yield f"{where} takes weights in float32, float16 or bfloat16, and {weight} is {tensor.dtype}, or quantised"
            if tensor.dim() != 2 or branch.features is not None:
                yield f"{where} takes a whole matrix, and the branch is for a part of {weight}"
            elif branch.setting.rank > min(tensor.shape):
                yield f"{where} has at most {min(tensor.shape)} parts of {weight}, and the rank is {branch.setting.rank}"
            if branch.splits and (len(names[aliases[weight]]) > 1 or _read_elsewhere(plan, branch, weight, graph)):
                yield f"{where} changes the weight, and {weight} is tied, or read by others than the branch is for; adapt it with another start"


def _read_elsewhere(plan: Plan, branch: BranchSpec, weight: str, graph: fx.Graph) -> bool:
    """Tell whether a weight is read by a node that is no site of a branch."""
    sites = {chosen.site.node for chosen in plan.chosen if branch.key in [each.key for each in chosen.branches]}
    nodes = [n for n in graph.find_nodes(op="get_attr") if (original_name(str(n.target)) or n.target) == weight]
    return any(reader.name not in sites for node in nodes for reader, _ in readers(node))


def check_alone(adapter: str, record: AdapterRecord, acting: Mapping[str, AdapterRecord]) -> None:
    """Refuse to let an adapter act that split weights beside another one, or at another strength than 1.

    Raises:
        PlanError: so it is.
    """
    split_by = [name for name, each in {**acting, adapter: record}.items() if _splits(each)]
    if _splits(record) and record.strength != 1:
        raise PlanError(
            f"adapter {adapter!r} started by splitting the weights, and acts at strength 1 alone, not {record.strength:g}. "
            "lora_fx.combine makes an adapter of it that takes any strength, and so does saving and loading it."
        )
    if split_by and acting:
        raise PlanError(
            f"adapter {split_by[0]!r} started by splitting the weights, and acts alone: {listed(sorted({*acting, adapter} - {split_by[0]}), 5)} "
            "would compute on what it left of them. lora_fx.combine makes one adapter of several."
        )


def _splits(record: AdapterRecord) -> bool:
    return any(branch.splits for _, branch in record.branches.values())
