"""Combination of several adapters into one, as PEFT's ``add_weighted_adapter`` combines them, in its order of operations.

cat      [B₁ B₂] [w₁ s₁ A₁; w₂ s₂ A₂] = w₁ s₁ B₁ A₁ + w₂ s₂ B₂ A₂, of the sum of the ranks: the same function
linear   (Σ √(wᵢ sᵢ) Bᵢ) (Σ √(wᵢ sᵢ) Aᵢ), of the rank that all have: another function, with the products Bᵢ Aⱼ of different ones
svd      the nearest to Σ wᵢ sᵢ Bᵢ Aᵢ that a rank allows

``ties``, ``dare_linear``, ``dare_ties`` and ``magnitude_prune`` are ``linear`` with the factors Aᵢ and Bᵢ pruned; with ``_svd`` they are ``svd``
with the products sᵢ Bᵢ Aᵢ pruned; see :mod:`lora_fx.numerics.task_vectors`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import fx, nn

from lora_fx.adapters.activate import activate, ordered
from lora_fx.adapters.attach import attach
from lora_fx.adapters.recorded import (
    branches_of,
    parameters_of,
    plan_branches,
    record_of,
    statistics_of,
    trained_of,
)
from lora_fx.errors import PlanError, did_you_mean
from lora_fx.graph.adapter_names import copy_name, original_name, token_names
from lora_fx.graph.adapter_states import acting, trained_names
from lora_fx.graph.cached_graphs import check_undivided
from lora_fx.graph.graph_module import TracedGraphModule, state_of
from lora_fx.graph.info import check_module
from lora_fx.graph.joined_graphs import Graphs, through
from lora_fx.graph.process_state import forked_random_state
from lora_fx.graph.records import BranchSpec, Origin, TokenRows, Trained
from lora_fx.numerics.lowrank_merge import concatenated
from lora_fx.numerics.task_vectors import MajoritySign, Pruning, TaskArithmetic, nearest_factors
from lora_fx.planning.plan import owners_of
from lora_fx.rules.plain_numbers import finite_number
from lora_fx.rules.rule_file import Setting
from lora_fx.sites.call_sites import Site, sites

Method = Literal[
    "cat", "linear", "svd",
    "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip


def combine(
    graph_module: Graphs,
    strengths: Mapping[str, float],
    *,
    adapter: str = "combined",
    method: Method = "cat",
    rank: int | None = None,
    density: float | None = None,
    majority_sign: MajoritySign | None = None,
    clamp: float | None = None,
    seed: int | None = None,
) -> Graphs:
    """Return a new graph in which one adapter acts in place of several, which stay in it and do not act.

    ``"cat"`` is exact: it computes what they compute together at these strengths. With ``w = strength · scaling``, the factors
    ``w₁A₁, w₂A₂, …``, each ``(rank, in)``, are stacked, and ``B₁, B₂, …``, each ``(out, rank)``, put side by side, so that the
    rank at a site is the sum of theirs. ``"svd"`` has the singular vectors of ``Σ w B A`` of the largest singular values: no other
    product of its rank is nearer.

    ``"linear"`` keeps the rank, which all must share: ``A = Σ ±√|w| A``, ``B = Σ √|w| B``, whose product has mixed terms.
    ``"magnitude_prune"``, ``"dare_linear"`` (arXiv 2311.03099), ``"ties"`` (arXiv 2306.01708) and ``"dare_ties"`` do that with pruned
    factors; ``"ties…"`` average those values alone whose sign most of them have. With ``_svd`` behind the name they prune the products
    ``scaling · B A`` instead, so that ranks may differ, and take the singular vectors of their sum.

    All give what PEFT's ``add_weighted_adapter`` gives, whose ``combination_type`` is ``method`` here. PEFT is not followed where it is
    mistaken: with rsLoRA it leaves the combined adapter a scaling of ``√rank``, and its ``cat`` mixes up the matrices of stacked
    experts and of convolutions in groups. The new adapter has the scaling 1, and a dropout if all have the same. It trains if one of
    them does.

    Args:
        graph_module: made by lora_fx, with adapters; not changed. Adapters that are not in ``strengths`` stay as they are. Or the graphs of
            an encoder-decoder model with a cache.
        strengths: adapter → factor of its scaling.
        adapter: name of the new one.
        method: how they are combined.
        rank: of the new adapter, for ``"svd"`` and ``"…_svd"``, of each matrix where a weight is a stack; none is higher than the smaller
            side of its site. By default the highest rank that the adapters have at the site.
        density: the fraction of values that pruning keeps, above 0 and up to 1; needed by all methods that prune.
        majority_sign: for ``"ties…"`` and ``"dare_ties…"``, whether the sign of the sum (``"total"``, the default) or the sign of most adapters
            (``"frequency"``) is elected.
        clamp: for ``"svd"`` and ``"…_svd"``, a quantile, above 0.5 and up to 1, of the elements of the two factors at a site, to which these are
            clamped.
        seed: of ``"dare_…"``, which drops values at random. Without one they are drawn from torch's current random state, which is
            restored.

    Raises:
        PlanError: there is no such adapter or method, the method does not take an option or lacks one, the name is taken, ranks
            differ where factors are summed, or two adapters have different trained copies of one parameter.
    """
    way = _way(method, rank=rank, density=density, majority_sign=majority_sign, clamp=clamp, seed=seed)
    return through(graph_module, lambda graph: _combination(graph, strengths, adapter, way, method, seed))


def _combination(
    graph_module: TracedGraphModule,
    strengths: Mapping[str, float],
    adapter: str,
    way: _Way,
    method: Method,
    seed: int | None,
) -> TracedGraphModule:
    check_module(graph_module)
    check_undivided(graph_module)
    if not strengths:
        raise PlanError("expected at least one adapter with its strength, got none.")
    found = ordered(graph_module, strengths)
    _check_products(graph_module, found)
    chosen = {name: found[name] for name in strengths}  # PEFT sums and draws in the order in which they are given
    others = {name: strength for name, strength in acting(graph_module).items() if name not in chosen}
    rest = activate(graph_module, others)
    trains = any(trained_names(graph_module, name) for name in chosen)
    site_of = {owner: site for site in sites(rest) for owner in owners_of(site)}
    members: dict[str, list[_Member]] = {}
    for name, strength in chosen.items():
        for key, (_, branch) in branches_of(graph_module, name).items():
            members.setdefault(key, []).append(_Member.of(graph_module, name, branch, strength))
    dropouts = {part.branch.setting.dropout for parts in members.values() for part in parts}
    dropout = dropouts.pop() if len(dropouts) == 1 else 0.0
    branches: dict[str, tuple[str, BranchSpec]] = {}
    values: dict[str, torch.Tensor] = {}
    with forked_random_state(seed=seed):
        for key, parts in _in_module_order(members, site_of, rest):
            branch, a, b = way.combined(key, parts, site_of[parts[0].branch.owner], dropout)
            own = branch.names(adapter)
            values |= {own.a: nn.Parameter(a, trains), own.b: nn.Parameter(b, trains)}
            branches[key] = (f"combined:{method}", branch)
    trained, copies = _one_copy_each(graph_module, chosen)
    values |= {copy_name(name, adapter): nn.Parameter(value.clone(), trains) for name, value in copies.items()}
    for name in chosen:
        for held, tensor in statistics_of(graph_module, name).items():
            copy = copy_name(str(original_name(held)), adapter)
            if not torch.equal(values.setdefault(copy, tensor), tensor):
                raise PlanError(
                    f"adapters have different running statistics of {original_name(held)}, and a copy is taken whole."
                )
    tokens, rows = _rows_of_one(graph_module, chosen)
    own_rows = zip(tokens, rows, strict=True)
    values |= {token_names(each.module, adapter)[0]: nn.Parameter(row.clone(), trains) for each, row in own_rows}
    told = ", ".join(f"{name} × {strength:g}" for name, strength in chosen.items())
    origin = Origin(rules=f"{method} of {told}")
    plan = plan_branches(rest, adapter, branches, trained, origin=origin, tokens=tokens)
    return attach(rest, plan, adapter=adapter, values=values, acts=True)


def _check_products(graph_module: fx.GraphModule, chosen: Iterable[str]) -> None:
    """Raise :class:`PlanError` for adapters whose branches are more than a product of A and B."""
    for name in chosen:
        if (ahead := record_of(graph_module, name).prefix) is not None:
            raise PlanError(
                f"adapter {name!r} cannot be combined: it has a {ahead.kind}, and those of two adapters have no sum."
            )
        for _, branch in branches_of(graph_module, name).values():
            more = (
                "DoRA's"
                if branch.setting.variant == "dora"
                else "one whose B has a bias"
                if branch.setting.bias
                else "one with invocation tokens"
                if branch.setting.invocation_tokens
                else ""
            )
            if more:
                raise PlanError(
                    f"adapter {name!r} cannot be combined: it is {more}, of which no product of two factors is a sum. Fold it first, or let "
                    "the adapters act together: lora_fx.activate."
                )


def _one_copy_each(
    graph_module: fx.GraphModule, chosen: Iterable[str]
) -> tuple[tuple[Trained, ...], dict[str, torch.Tensor]]:
    """Return the parameters of which adapters have trained copies, and the copies by their names.

    Raises:
        PlanError: two adapters have different copies of one parameter.
    """
    state = state_of(graph_module)
    names_of, aliases = state.names(), state.aliases()
    trained: dict[str, Trained] = {}
    copies: dict[str, torch.Tensor] = {}
    owner: dict[str, str] = {}
    differing: dict[tuple[str, str], list[str]] = {}
    for adapter in chosen:
        own = parameters_of(graph_module, adapter)
        for each in trained_of(graph_module, adapter):
            value = own[copy_name(each.name, adapter)].detach()
            covered = (each.name,) if each.untied else names_of[aliases[each.name]]
            first = next((owner[name] for name in covered if name in owner), adapter)
            owner |= dict.fromkeys(covered, first)
            alike = trained.setdefault(each.name, each).untied == each.untied and (
                first == adapter or each.name in copies
            )
            if not torch.equal(copies.setdefault(each.name, value), value) or not alike:
                differing.setdefault((first, adapter), []).append(each.name)
    if differing:
        told = "; ".join(
            f"{a!r} and {b!r} have different trained copies of {', '.join(n)}" for (a, b), n in differing.items()
        )
        raise PlanError(
            f"{told}, and a copy is taken whole. Combine adapters of which one alone has a copy, or give them one value."
        )
    return tuple(trained.values()), copies


def _rows_of_one(
    graph_module: fx.GraphModule, chosen: Iterable[str]
) -> tuple[tuple[TokenRows, ...], list[torch.Tensor]]:
    """Return the rows of embeddings that an adapter has, and their values.

    Raises:
        PlanError: several of the adapters have rows, which are taken whole.
    """
    owners = [name for name in chosen if record_of(graph_module, name).tokens]
    if len(owners) > 1:
        raise PlanError(
            f"{' and '.join(map(repr, owners))} have rows of embeddings, which are taken whole. Combine adapters of which one alone has rows."
        )
    tensors = state_of(graph_module).tensors
    tokens = record_of(graph_module, owners[0]).tokens if owners else ()
    return tokens, [tensors[token_names(each.module, owners[0])[0]].detach() for each in tokens]


@dataclass(frozen=True)
class _Member:
    """A branch to combine with others beside the same site."""

    branch: BranchSpec
    a: torch.Tensor
    b: torch.Tensor
    strength: float

    @staticmethod
    def of(graph_module: fx.GraphModule, adapter: str, branch: BranchSpec, strength: float) -> _Member:
        a, b = branch.factors(adapter, state_of(graph_module).tensors)
        return _Member(replace(branch, setting=replace(branch.added, strength=1.0), mirrors=None), a, b, strength)

    @property
    def scale(self) -> float:
        return self.branch.setting.scale


def _in_module_order(
    members: Mapping[str, Sequence[_Member]], site_of: Mapping[str, Site], graph_module: fx.GraphModule
) -> list[tuple[str, Sequence[_Member]]]:
    """Return the branches to combine in the order of the model's modules, in which PEFT draws what it drops."""
    position = {name: index for index, name in enumerate(state_of(graph_module).tensors)}

    def place(entry: tuple[str, Sequence[_Member]]) -> int:
        site = site_of[entry[1][0].branch.owner]
        return position.get(f"{site.module}.weight", position[site.weight])

    return sorted(members.items(), key=place)


@dataclass(frozen=True)
class _Concatenation:
    """Factors side by side."""

    def combined(self, key: str, parts: Sequence[_Member], site: Site, dropout: float) -> _Combined:
        pairs = [(part.a * part.strength * part.scale, part.b) for part in parts]
        rank = sum(part.branch.setting.rank for part in parts)
        return (_branch(key, parts, rank, dropout), *concatenated(pairs, site.matrices))


@dataclass(frozen=True)
class _Sum:
    """Sums of factors, A with A and B with B."""

    method: str
    arithmetic: TaskArithmetic

    def combined(self, key: str, parts: Sequence[_Member], _site: Site, dropout: float) -> _Combined:
        ranks = [part.branch.setting.rank for part in parts]
        if len(set(ranks)) > 1:
            raise PlanError(
                f"method={self.method!r} sums factors, which must have one rank, and those of {key!r} are {', '.join(map(str, ranks))}. "
                f"Say method={f'{self.method}_svd'.removeprefix('linear_')!r} or 'cat'."
            )
        weights = [part.strength * part.scale for part in parts]
        roots = [math.sqrt(abs(weight)) for weight in weights]
        signed = [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
        a = self.arithmetic.merged([part.a for part in parts], signed)
        return _branch(key, parts, ranks[0], dropout), a, self.arithmetic.merged([part.b for part in parts], roots)


@dataclass(frozen=True)
class _SingularVectors:
    """The nearest product of a rank to the sum of products."""

    arithmetic: TaskArithmetic
    rank: int | None
    clamp: float | None

    def combined(self, key: str, parts: Sequence[_Member], site: Site, dropout: float) -> _Combined:
        shared = site.matrices if site.kernel else 1  # the groups of a convolution have a share of the rank each
        most = self.rank or max(part.branch.setting.rank for part in parts)
        if most % shared:
            raise PlanError(
                f"rank={most} cannot be shared out equally to the {shared} groups of the convolution {key!r}: give a multiple."
            )
        updates = [_update(part, site) for part in parts]
        merged = _as_stored(self.arithmetic.merged(updates, [part.strength for part in parts]), site)
        each = min(most // shared, *merged.shape[1:])
        pairs = [nearest_factors(matrix, each, self.clamp) for matrix in merged]
        a, b = torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
        a = a.reshape(-1, *parts[0].a.shape[1:])
        b = b.permute(1, 2, 0).flatten(1) if site.op == "expert" else b.reshape(-1, each, *parts[0].b.shape[2:])
        return _branch(key, parts, each * shared, dropout), a, b.contiguous()


def _update(part: _Member, site: Site) -> torch.Tensor:
    """Return ``scaling · B A`` of each matrix of a site as its weight is stored, since values are dropped in that order.

    It is ``(matrices, out, in)``, or ``(matrices, in, out)``; of a convolution the inputs are all places under its kernel.
    """
    a = part.a.unflatten(0, (site.matrices, -1)).flatten(2)
    by_expert = site.op == "expert"
    b = (
        part.b.unflatten(1, (-1, site.matrices)).permute(2, 0, 1)
        if by_expert
        else part.b.unflatten(0, (site.matrices, -1))
    )
    products = torch.stack([(up @ down) * part.scale for up, down in zip(b.flatten(2), a, strict=True)])
    return _as_stored(products, site)


def _as_stored(matrices: torch.Tensor, site: Site) -> torch.Tensor:
    """Return matrices ``(out, in)`` in the layout of a site's weight, or the other way round."""
    return matrices.transpose(1, 2) if site.layout == "in_out" else matrices


_Combined = tuple[BranchSpec, torch.Tensor, torch.Tensor]
_Way = _Concatenation | _Sum | _SingularVectors


def _branch(key: str, parts: Sequence[_Member], rank: int, dropout: float) -> BranchSpec:
    if len({part.branch.features for part in parts}) > 1:
        raise PlanError(f"the branches at {key!r} write to different features, and cannot become one.")
    return replace(parts[0].branch, setting=Setting(rank, float(rank), dropout))


def _way(
    method: str,
    *,
    rank: int | None,
    density: float | None,
    majority_sign: MajoritySign | None,
    clamp: float | None,
    seed: int | None,
) -> _Way:
    """Return how a method combines, given its options; refuse options that it does not take, and values out of range."""
    if method not in get_args(Method):
        raise PlanError(
            f"expected a method of {', '.join(get_args(Method))}, got {method!r}{did_you_mean(method, get_args(Method))}."
        )
    random, elects, singular = method.startswith("dare_"), "ties" in method, method.endswith("svd")
    prunes = random or elects or method.startswith("magnitude_")
    problems = [
        f"{name}= has no meaning for it"
        for name, value, taken in (
            ("rank", rank, singular),
            ("density", density, prunes),
            ("majority_sign", majority_sign, elects),
            ("clamp", clamp, singular),
            ("seed", seed, random),
        )
        if value is not None and not taken
    ]
    kept, bound = (None if each is None else finite_number(each) for each in (density, clamp))
    if prunes and not (kept is not None and 0 < kept <= 1):
        problems.append(f"density: expected the fraction of values to keep, above 0 and up to 1, got {density!r}")
    if rank is not None and (type(rank) is not int or rank < 1):
        problems.append(f"rank: expected an integer ≥ 1, got {rank!r}")
    if majority_sign is not None and majority_sign not in get_args(MajoritySign):
        problems.append(
            f"majority_sign: expected {' or '.join(map(repr, get_args(MajoritySign)))}, got {majority_sign!r}"
        )
    if clamp is not None and not (bound is not None and 0.5 < bound <= 1):
        problems.append(f"clamp: expected a quantile, above 0.5 and up to 1, got {clamp!r}")
    if problems:
        raise PlanError(f"method={method!r}: {'; '.join(problems)}.")
    if method == "cat":
        return _Concatenation()
    pruning: Pruning | None = "random" if random else "magnitude" if prunes else None
    arithmetic = TaskArithmetic(pruning, kept or 1.0, (majority_sign or "total") if elects else None)
    return _SingularVectors(arithmetic, rank, bound) if singular else _Sum(method, arithmetic)
