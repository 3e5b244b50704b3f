"""Rules × call sites → a plan: for every site, chosen and how, or skipped and why. Changes nothing."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import fx, nn

from lora_fx.errors import PlanError, RuleError, did_you_mean
from lora_fx.graph_module import TracedGraphModule
from lora_fx.ruleset import RuleSet, Selection, load
from lora_fx.sites import Site, sites
from lora_fx.tracing import trace


@dataclass(frozen=True)
class Branch:
    """The settings of one low-rank branch: ``y + scaling · B(A(dropout(x)))`` with ``scaling = alpha / rank``."""

    rank: int
    alpha: float
    dropout: float

    @property
    def scaling(self) -> float:
        """``alpha / rank`` (LoRA, arXiv 2106.09685, section 4.1)."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Chosen:
    """A site that gets a branch, and the selection that says so."""

    site: Site
    rule: str
    branch: Branch

    @property
    def parameters(self) -> int:
        """Number of parameters that the branch adds: ``rank · (in + out)``."""
        return self.branch.rank * (self.site.in_features + self.site.out_features)


@dataclass(frozen=True)
class Skipped:
    """A site that stays as it is."""

    site: Site
    reason: str


Decision = Chosen | Skipped


@dataclass(frozen=True)
class Plan:
    """One decision for every call site of a graph, in graph order. ``str(plan)`` is a table."""

    rules: RuleSet
    decisions: tuple[Decision, ...]

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    @property
    def chosen(self) -> tuple[Chosen, ...]:
        """The sites that get a branch."""
        return tuple(decision for decision in self.decisions if isinstance(decision, Chosen))

    @property
    def parameters(self) -> int:
        """Number of parameters that the plan adds; branches of several calls of one module share theirs."""
        return sum({chosen.site.module: chosen.parameters for chosen in self.chosen}.values())

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading, justify in (
            ("site", "left"),
            ("operator", "left"),
            ("in", "right"),
            ("out", "right"),
            ("rank", "right"),
            ("added", "right"),
            ("decision", "left"),
        ):
            table.add_column(heading, justify=justify, no_wrap=True, overflow="ignore")  # type: ignore[arg-type]
        for decision in self.decisions:
            site = decision.site
            rank, added, why = _cells(decision)
            table.add_row(site.name, site.operator, str(site.in_features), str(site.out_features), rank, added, why)
        console = Console(file=io.StringIO(), width=10_000, color_system=None)
        console.print(table)
        assert isinstance(console.file, io.StringIO)
        lines = [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]
        total = f"{len(self.chosen)} of {len(self.decisions)} sites chosen by rules {self.rules.name!r}, {self.parameters} parameters added"
        return "\n".join([*lines, total])


def plan(
    model: nn.Module,
    rules: str | Path | Mapping[str, Any] | RuleSet = "auto",
    *,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
) -> Plan:
    """Match rules against the call sites of a model or a graph.

    Args:
        model: a graph of ours, or a model, which is then traced.
        rules: see :func:`lora_fx.ruleset.load`.
        example_inputs: see :func:`lora_fx.trace`.
        rank: replaces the ``[defaults]`` of the rules, as do ``alpha`` and ``dropout``.
        alpha: numerator of the scaling ``alpha / rank``.
        dropout: probability with which an element of a branch's input is dropped in training.

    Raises:
        RuleError: the rules are malformed, a selection matches nothing, or two claim one site with different settings.
        PlanError: a chosen site cannot get such a branch.
    """
    graph_module = model if isinstance(model, TracedGraphModule) else trace(model, example_inputs, inference=True)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return plan_sites(sites(graph_module), load(rules, model_type).with_overrides(rank, alpha, dropout))


def plan_sites(found: Sequence[Site], rules: RuleSet) -> Plan:
    """Decide for each site. Raises as :func:`plan` does."""
    decisions = tuple(_decide(site, rules) for site in found)
    _every_selection_matches(found, rules)
    return Plan(rules, decisions)


def check_weights(plan: Plan, graph_module: fx.GraphModule) -> None:
    """Raise :class:`PlanError` unless every chosen weight is a floating-point one."""
    for chosen in plan.chosen:
        dtype = graph_module.get_parameter(chosen.site.weight).dtype
        if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise PlanError(
                f"site {chosen.site.name!r} has a weight of dtype {dtype}: a branch needs a floating-point one. Dequantise the model first."
            )


def _decide(site: Site, rules: RuleSet) -> Decision:
    claims = [(index, selection) for index, selection in enumerate(rules.select) if selection.matches(site.module)]
    if not claims:
        return Skipped(site, "no selection names it")
    settings = {index: _branch(selection, rules) for index, selection in claims}
    first, *others = settings
    for other in others:
        if settings[other] != settings[first]:
            raise RuleError(
                f"rules {rules.name!r}",
                [
                    f"select[{first}] and select[{other}] both claim {site.name!r}, "
                    f"with {settings[first]} and {settings[other]}; make one of them narrower"
                ],
            )
    branch = settings[first]
    if branch.rank > min(site.in_features, site.out_features):
        raise PlanError(
            f"select[{first}] of rules {rules.name!r} gives site {site.name!r} rank {branch.rank}, which is more than its weight of "
            f"{site.out_features} × {site.in_features} can have. Choose rank ≤ {min(site.in_features, site.out_features)}."
        )
    return Chosen(site, f"{rules.name}:select[{first}]", branch)


def _branch(selection: Selection, rules: RuleSet) -> Branch:
    def setting(name: str) -> Any:
        own = getattr(selection, name)
        return own if own is not None else getattr(rules.defaults, name)

    return Branch(setting("rank"), setting("alpha"), setting("dropout"))


def _every_selection_matches(found: Sequence[Site], rules: RuleSet) -> None:
    modules = [site.module for site in found]
    ends = sorted({module.rpartition(".")[2] for module in modules})
    problems = [
        f"select[{index}] matches no call site: target = {list(selection.target)}"
        f"{''.join(did_you_mean(target.rpartition('.')[2], ends) for target in selection.target)}; "
        f"the model's sites end in {', '.join(ends) or 'nothing'}"
        for index, selection in enumerate(rules.select)
        if not any(selection.matches(module) for module in modules)
    ]
    if problems:
        raise RuleError(f"rules {rules.name!r}", problems)


def _cells(decision: Decision) -> tuple[str, str, str]:
    match decision:
        case Chosen(rule=rule, branch=branch):
            return str(branch.rank), str(decision.parameters), f"chosen: {rule}"
        case Skipped(reason=reason):
            return "", "", f"skipped: {reason}"
