"""A plan as a table for people, and as data for programs."""

from __future__ import annotations

from typing import Any, Literal

from rich.table import Table

from lora_fx.planning.plan import Chosen, Decision, Plan
from lora_fx.text_table import new_table, text_lines

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
    """Return the same as a table of ``rich``."""
    table = new_table()
    for heading, justify in _COLUMNS:
        table.add_column(heading, justify=justify, no_wrap=True, overflow="ignore")
    for decision in plan:
        site = decision.site
        operator = site.operator if site.operator.startswith(site.op) else f"{site.op} ({site.operator})"
        rank, added, why = _cells(decision)
        roles = ", ".join(decision.purpose.roles)
        table.add_row(
            site.name, operator, f"{site.in_features}", f"{site.out_features}", roles, rank, added, why,
            style=None if isinstance(decision, Chosen) else "dim",
        )  # fmt: skip
    return table


def totals(plan: Plan) -> str:
    """Return one line that sums a plan up."""
    chosen = len(plan.chosen)
    line = f"{chosen} of {len(plan.decisions)} sites chosen by rules {plan.rules.name!r}, {plan.parameters} parameters added"
    if plan.trained:
        line += f"; {sum(trained.elements for trained in plan.trained)} of the model's own train too: "
        line += ", ".join(trained.name for trained in plan.trained)
    return line


def as_data(plan: Plan) -> dict[str, Any]:
    """Return the same as data for JSON."""
    return {
        "rules": plan.rules.name,
        "chosen": len(plan.chosen),
        "parameters": plan.parameters,
        "sites": [_site(decision) for decision in plan],
        "trained": [{"name": each.name, "rule": each.rule, "elements": each.elements} for each in plan.trained],
    }


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
                    "dropout": branch.setting.dropout,
                    "scaling": branch.setting.scaling,
                    "init": branch.setting.init,
                }
                for branch in branches
            ]
        case _:
            data |= {"chosen": False, "reason": decision.reason}
    return data


def _cells(decision: Decision) -> tuple[str, str, str]:
    match decision:
        case Chosen(rule=rule, branches=branches):
            ranks = " + ".join(str(branch.setting.rank) for branch in branches)
            parts = " and ".join(branch.part for branch in branches if branch.part is not None)
            return ranks, str(decision.parameters), f"chosen: {rule}{f', {parts}' if parts else ''}"
        case _:
            return "", "", f"skipped: {decision.reason}"
