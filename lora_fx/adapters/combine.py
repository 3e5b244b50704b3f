"""Combination of several adapters into one.

cat     [B₁ B₂] [w₁ s₁ A₁; w₂ s₂ A₂] = w₁ s₁ B₁ A₁ + w₂ s₂ B₂ A₂, of the sum of the ranks: the same function
linear  (Σ √(wᵢ sᵢ) Bᵢ) (Σ √(wᵢ sᵢ) Aᵢ), of the rank that all have: another function, with the products Bᵢ Aⱼ of different ones

Both are what PEFT's ``add_weighted_adapter`` computes, in its order of operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import fx, nn

from lora_fx.adapters.activate import activate, ordered
from lora_fx.adapters.attach import attach
from lora_fx.adapters.transfer import branches_of, parameters_of, plan_branches, trained_of
from lora_fx.errors import PlanError, did_you_mean
from lora_fx.graph.adapter_names import adapters, copy_name
from lora_fx.graph.graph_module import TracedGraphModule
from lora_fx.graph.records import BranchSpec, Origin
from lora_fx.numerics.lowrank_merge import concatenated
from lora_fx.planning.plan import owners_of
from lora_fx.rules.rule_file import Setting
from lora_fx.sites.call_sites import sites

Method = Literal["cat", "linear"]


def combine(
    graph_module: fx.GraphModule,
    strengths: Mapping[str, float],
    *,
    adapter: str = "combined",
    method: Method = "cat",
) -> TracedGraphModule:
    """Return the graph with one adapter in place of several.

    ``"cat"`` is exact: it computes what they compute together at these strengths. With ``w = strength · scaling``, the factors
    ``w₁A₁, w₂A₂, …``, each ``(rank, in)``, are stacked, and ``B₁, B₂, …``, each ``(out, rank)``, put side by side, so that the
    rank at a site is the sum of theirs. ``"linear"`` keeps the rank, which all must share: ``A = Σ ±√|w| A``, ``B = Σ √|w| B``, as
    PEFT's ``add_weighted_adapter`` does, whose product has mixed terms. The new adapter has the scaling 1, and a dropout if all have
    the same.

    Args:
        graph_module: made by lora_fx, with adapters; not changed. Adapters that are not in ``strengths`` stay.
        strengths: adapter → factor of its scaling.
        adapter: name of the new one.
        method: ``"cat"`` or ``"linear"``.

    Raises:
        PlanError: there is no such adapter or method, the name is taken, ranks differ for ``"linear"``, or several adapters
            have trained copies of one parameter.
    """
    if method not in get_args(Method):
        raise PlanError(
            f"expected a method of {', '.join(get_args(Method))}, got {method!r}{did_you_mean(method, get_args(Method))}."
        )
    if not strengths:
        raise PlanError("expected at least one adapter with its strength, got none.")
    chosen = ordered(graph_module, strengths)
    kept = [name for name in adapters(graph_module) if name not in chosen]
    rest = activate(graph_module, {name: _strength(graph_module, name) for name in kept})
    matrices = {owner: site.matrices for site in sites(rest) for owner in owners_of(site)}
    members: dict[str, list[_Member]] = {}
    for name, strength in chosen.items():
        for key, (_, branch) in branches_of(graph_module, name).items():
            members.setdefault(key, []).append(_Member.of(graph_module, name, branch, strength))
    dropouts = {part.branch.setting.dropout for parts in members.values() for part in parts}
    dropout = dropouts.pop() if len(dropouts) == 1 else 0.0
    branches: dict[str, tuple[str, BranchSpec]] = {}
    values: dict[str, torch.Tensor] = {}
    for key, parts in members.items():
        branch = _combined(key, parts, method, dropout)
        a, b = _METHODS[method](parts, matrices[branch.owner])
        own = branch.names(adapter)
        values |= {own.a: nn.Parameter(a), own.b: nn.Parameter(b)}
        branches[key] = (f"combined:{method}", branch)
    trained = tuple(each for name in chosen for each in trained_of(graph_module, name))
    for name in chosen:
        own_parameters = parameters_of(graph_module, name)
        values |= {
            copy_name(each.name, adapter): nn.Parameter(own_parameters[copy_name(each.name, name)].detach().clone())
            for each in trained_of(graph_module, name)
        }
    told = ", ".join(f"{name} × {strength:g}" for name, strength in chosen.items())
    plan = plan_branches(rest, adapter, branches, trained, origin=Origin(rules=f"{method} of {told}"))
    return attach(rest, plan, adapter=adapter, values=values)


@dataclass(frozen=True)
class _Member:
    """A branch to combine with others beside the same site."""

    branch: BranchSpec
    a: torch.Tensor
    b: torch.Tensor
    strength: float

    @staticmethod
    def of(graph_module: fx.GraphModule, adapter: str, branch: BranchSpec, strength: float) -> _Member:
        names = branch.names(adapter)
        a, b = (graph_module.get_parameter(name).detach() for name in (names.a, names.b))
        return _Member(replace(branch, setting=replace(branch.setting, strength=1.0)), a, b, strength)

    @property
    def scale(self) -> float:
        return self.branch.setting.scale


def _strength(graph_module: fx.GraphModule, adapter: str) -> float:
    """Return the strength that an adapter has; it has the same at all of its branches."""
    return next((branch.setting.strength for _, branch in branches_of(graph_module, adapter).values()), 1.0)


def _combined(key: str, parts: Sequence[_Member], method: Method, dropout: float) -> BranchSpec:
    ranks = [part.branch.setting.rank for part in parts]
    if method == "linear" and len(set(ranks)) > 1:
        raise PlanError(
            f"method='linear' sums factors, which must have one rank, and those of {key!r} are {', '.join(map(str, ranks))}. "
            "Say method='cat'."
        )
    if len({part.branch.features for part in parts}) > 1:
        raise PlanError(f"the branches at {key!r} write to different features, and cannot become one.")
    rank = sum(ranks) if method == "cat" else ranks[0]
    return replace(parts[0].branch, setting=Setting(rank, float(rank), dropout))


def _concatenated(parts: Sequence[_Member], matrices: int) -> tuple[torch.Tensor, torch.Tensor]:
    return concatenated([(part.a * part.strength * part.scale, part.b) for part in parts], matrices)


def _summed(parts: Sequence[_Member], _matrices: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights = [part.strength * part.scale for part in parts]
    roots = [math.sqrt(abs(weight)) for weight in weights]
    signed = [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
    return _weighted([part.a for part in parts], signed), _weighted([part.b for part in parts], roots)


def _weighted(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    stacked = torch.stack(list(tensors))
    factors = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)
    return (stacked * factors.view(-1, *[1] * (stacked.dim() - 1))).sum(0)


_METHODS: Mapping[Method, Callable[[Sequence[_Member], int], tuple[torch.Tensor, torch.Tensor]]] = {
    "cat": _concatenated,
    "linear": _summed,
}
