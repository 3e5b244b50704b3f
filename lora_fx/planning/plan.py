"""A plan as data: one decision for each call site of a graph, a table of it for people, and the same for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from rich.table import Table

from lora_fx.graph.records import BranchSpec, Origin, PrefixSpec, TokenRows, Trained
from lora_fx.graph.state import State
from lora_fx.numerics.factor_init import adapter_dtype
from lora_fx.rules.lookup import Rules
from lora_fx.sites.call_sites import Site, is_bare
from lora_fx.sites.roles import Purpose
from lora_fx.text_table import new_table, text_lines


def factor_shapes(branch: BranchSpec, site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B beside a site.

    ``(rank, in)`` and ``(out, rank)``, with as many outputs as the branch writes to. Of a convolution A has the kernel, with
    ``in / groups`` channels, and B is pointwise with ``rank / groups``. Of experts they are ``(experts · rank, in)`` and
    ``(out, rank · experts)``, as PEFT has them.
    """
    rank, outputs = branch.setting.rank, outputs_of(branch, site)
    if site.kernel:
        ones = (1,) * len(site.kernel)
        a = (rank, site.in_features // site.matrices, *site.kernel)
        return a, (outputs, rank // site.matrices, *ones)
    return (site.matrices * rank, site.in_features), (outputs, rank * site.matrices)


def magnitude_shape(site: Site) -> tuple[int, ...]:
    """Return the shape of the magnitudes of DoRA beside a site: ``(out,)``, of a convolution ``(1, out, 1, …)``."""
    return (1, site.out_features, *(1 for _ in site.kernel)) if site.kernel else (site.out_features,)


def why_no_variant(branch: BranchSpec, site: Site, which: str) -> str:
    """Return why a branch beside a site cannot be DoRA's, have a bias, or have invocation tokens; nothing if it can."""
    setting = branch.setting
    reasons = {
        "it is a part of the output features alone": branch.features is not None,
        "it multiplies by a stack of matrices": site.op == "expert",
        "its weight is a parameter of its own": is_bare(site),
        "its factors are those of a tied embedding": branch.mirrors is not None,
        "it starts from the weight": (which == "DoRA" and (setting.splits or setting.init == "mica"))
        or (which == "invocation tokens" and setting.splits),
        "its convolution has groups": which == "DoRA" and site.matrices > 1 and site.op != "expert",
        "PEFT has none beside an embedding": which != "DoRA" and site.op == "embedding",
        f"it is {site.op}": which == "invocation tokens" and site.op not in ("linear", "expert", "embedding"),
        "DoRA has none": which != "DoRA" and setting.variant == "dora",
        f"it starts as {setting.init!r}, with which PEFT has none": which == "a bias in B"
        and setting.init not in ("kaiming", "random", "given"),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def parameters_of_branch(branch: BranchSpec, site: Site) -> int:
    """Return the number of parameters of a branch beside a site; none where it has those of another branch."""
    vectors = branch.setting.bias + (branch.setting.variant == "dora")
    factors = sum(math.prod(shape) for shape in factor_shapes(branch, site))
    return 0 if branch.mirrors is not None else factors + vectors * outputs_of(branch, site)


def outputs_of(branch: BranchSpec, site: Site) -> int:
    """Return the number of output features that a branch writes to."""
    return site.out_features if branch.features is None else len(branch.features)


def owners_of(site: Site) -> tuple[str, str]:
    """Return two owners of branches: one for all calls of the site's module together, one for this call alone."""
    path = site.module
    if path == site.weight:  # the name is the parameter's own: as torch does, beside it
        parent, _, leaf = path.rpartition(".")
        path = f"{parent}.parametrizations.{leaf}".removeprefix(".")
    return path, f"{path}@{site.call}" if site.call else path


@dataclass(frozen=True)
class Chosen:
    """A site that gets a branch, or one for each of several parts, and the selection that says so."""

    site: Site
    rule: str
    branches: tuple[BranchSpec, ...]
    purpose: Purpose = field(default_factory=Purpose)

    @property
    def parameters(self) -> int:
        """Number of parameters that the branches have."""
        return sum(parameters_of_branch(branch, self.site) for branch in self.branches)


@dataclass(frozen=True)
class Skipped:
    """A site that stays as it is.

    Attributes:
        site: the site.
        reason: in words.
        purpose: of the site.
        kind: the reason without what is particular to the site, such as its layer; empty where that is the reason.
    """

    site: Site
    reason: str
    purpose: Purpose = field(default_factory=Purpose)
    kind: str = field(default="", compare=False)


Decision = Chosen | Skipped


@dataclass(frozen=True, repr=False)
class Plan:
    """One decision for every call site of a graph, in graph order. Its text is a table.

    Attributes:
        rules: the rules that it follows.
        decisions: one for each call site.
        trained: parameters of the model that train too.
        origin: where the adapter comes from, if that is not these rules.
        tokens: rows of embeddings that train.
        prefix: learned keys and values in front of those of attentions.
    """

    rules: Rules
    decisions: tuple[Decision, ...]
    trained: tuple[Trained, ...] = ()
    origin: Origin | None = None
    tokens: tuple[TokenRows, ...] = ()
    prefix: PrefixSpec | None = None

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    @property
    def chosen(self) -> tuple[Chosen, ...]:
        """The sites that get a branch."""
        return tuple(decision for decision in self.decisions if isinstance(decision, Chosen))

    @property
    def reasons(self) -> dict[str, str]:
        """The reason of each site that gets no branch, by its name."""
        return {decision.site.name: decision.reason for decision in self if isinstance(decision, Skipped)}

    @property
    def of_prefix(self) -> Plan:
        """The plan for the prefix alone."""
        skipped = tuple(Skipped(each.site, "the prefix is an adapter of its own", each.purpose) for each in self)
        return replace(self, decisions=skipped, trained=(), tokens=())

    @property
    def parameters(self) -> int:
        """Number of parameters that the plan adds; sites that share a branch share its parameters."""
        branches = {
            branch.key: parameters_of_branch(branch, chosen.site)
            for chosen in self.chosen
            for branch in chosen.branches
        }
        return sum(branches.values())

    def __repr__(self) -> str:
        return as_text(self)


_COLUMNS: tuple[tuple[str, Literal["left", "right"]], ...] = (
    ("site", "left"),
    ("operator", "left"),
    ("in", "right"),
    ("out", "right"),
    ("role", "left"),
    ("rank", "right"),
    ("added", "right"),
    ("decision", "left"),
)


def as_text(plan: Plan) -> str:
    """Return a table with a line for each site, and the totals."""
    return "\n".join([*text_lines(as_table(plan)), totals(plan)])


def as_table(plan: Plan) -> Table:
    """Return a table of ``rich`` with a line for each site."""
    table = new_table()
    for heading, justify in _COLUMNS:
        table.add_column(heading, justify=justify, no_wrap=True, overflow="ignore")
    for decision in plan:
        site = decision.site
        operator = site.operator if site.operator.startswith(site.op) else f"{site.op} ({site.operator})"
        rank, added, why = cells(decision)
        roles = ", ".join(decision.purpose.roles)
        table.add_row(
            site.name, operator, f"{site.in_features}", f"{site.out_features}", roles, rank, added, why,
            style=None if isinstance(decision, Chosen) else "dim",
        )  # fmt: skip
    return table


def totals(plan: Plan) -> str:
    """Return a one-line summary."""
    chosen = len(plan.chosen)
    line = f"{chosen} of {len(plan.decisions)} sites chosen by rules {plan.rules.name!r}, {plan.parameters} parameters added"
    if plan.trained:
        line += f"; {sum(trained.elements for trained in plan.trained)} of the model's own train too: "
        line += ", ".join(trained.name for trained in plan.trained)
    for each in plan.tokens:
        line += f"; {len(each.rows)} rows of {each.weight} train, {each.elements} parameters"
    if plan.prefix:
        line += f"; a {plan.prefix.kind} of {plan.prefix.tokens} tokens, {plan.prefix.elements} parameters"
    return line


def as_data(plan: Plan) -> dict[str, Any]:
    """Return a plan as data for JSON."""
    return {
        "rules": plan.rules.name,
        "chosen": len(plan.chosen),
        "parameters": plan.parameters,
        "sites": [_site(decision) for decision in plan],
        "trained": [{"name": each.name, "rule": each.rule, "elements": each.elements} for each in plan.trained],
        "tokens": [{"weight": each.weight, "rule": each.rule, "rows": list(each.rows)} for each in plan.tokens],
        "prefix": _prefix(plan.prefix),
    }


def _prefix(prefix: PrefixSpec | None) -> dict[str, Any] | None:
    if prefix is None:
        return None
    return {"tokens": prefix.tokens, "rule": prefix.rule, "layers": prefix.layers, "parameters": prefix.elements}


def _site(decision: Decision) -> dict[str, Any]:
    site = decision.site
    data: dict[str, Any] = {
        "site": site.name,
        "op": site.op,
        "operator": site.operator,
        "weight": site.weight,
        "layout": site.layout,
        "in_features": site.in_features,
        "out_features": site.out_features,
        "roles": list(decision.purpose.roles),
        "parts": {part: [list(span) for span in features.ranges] for part, features in decision.purpose.parts.items()},
    }
    match decision:
        case Chosen(rule=rule, branches=branches):
            data |= {"chosen": True, "rule": rule, "parameters": decision.parameters}
            data["branches"] = [
                {
                    "owner": branch.owner,
                    "part": branch.part,
                    "rank": branch.setting.rank,
                    "alpha": branch.setting.alpha,
                    "scale": branch.setting.scale,
                    "dropout": branch.setting.dropout,
                    "scaling": branch.setting.scaling,
                    "init": branch.setting.init,
                    "variant": branch.setting.variant,
                    "bias": branch.setting.bias,
                    "invocation_tokens": list(branch.setting.invocation_tokens),
                }
                for branch in branches
            ]
        case _:
            data |= {"chosen": False, "reason": decision.reason}
    return data


def cells(decision: Decision) -> tuple[str, str, str]:
    """Return the rank, the number of parameters added and the decision on a site, in words."""
    match decision:
        case Chosen(rule=rule, branches=branches):
            ranks = " + ".join(str(branch.setting.rank) for branch in branches)
            parts = " and ".join(branch.part for branch in branches if branch.part is not None)
            return ranks, str(decision.parameters), f"chosen: {rule}{f', {parts}' if parts else ''}"
        case _:
            return "", "", f"skipped: {decision.reason}"


def calls_apart(plan: Plan, state: State) -> Iterator[str]:
    """Yield which calls cannot share the branch that a plan gives them, since they multiply in both layouts or in several dtypes."""
    kinds: dict[str, tuple[tuple[int, int, str], torch.dtype]] = {}
    for chosen in plan.chosen:
        site = chosen.site
        computed = adapter_dtype(site.cast or state.tensors[site.weight].dtype)
        shape = site.in_features, site.out_features, site.layout  # of a square weight the layout alone differs
        for branch in chosen.branches:
            known_shape, known_dtype = kinds.setdefault(branch.key, (shape, computed))
            how = "in both layouts" if shape != known_shape else f"in {known_dtype} and in {computed}"
            if (shape, computed) != (known_shape, known_dtype):
                yield f'the calls of {site.module!r} multiply by its weight {how}, and can share no branch: say calls = "each"'
