"""How long planning takes, by number of call sites and of selections: it is to be linear in both.

    python tools/bench/planning.py

prints a table and the fitted exponents.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lora_fx.cli.printing import printable
from lora_fx.planning.planner import plan_sites
from lora_fx.rules.lookup import load
from lora_fx.rules.rule_file import RuleSet
from lora_fx.rules.vocabulary import Role
from lora_fx.sites.call_sites import Site
from lora_fx.sites.roles import Purpose

PROJECTIONS: tuple[tuple[str, Role], ...] = (
    ("self_attn.q_proj", "self_attention.query"),
    ("self_attn.k_proj", "self_attention.key"),
    ("self_attn.v_proj", "self_attention.value"),
    ("self_attn.o_proj", "self_attention.output"),
    ("mlp.gate_proj", "mlp.gate"),
    ("mlp.up_proj", "mlp.up"),
    ("mlp.down_proj", "mlp.down"),
)


def model(sites: int) -> tuple[list[Site], dict[str, Purpose]]:
    """Return the sites of a decoder with that many of them, and what they are for."""
    found, purposes = [], {}
    for index in range(sites):
        layer, position = divmod(index, len(PROJECTIONS))
        end, role = PROJECTIONS[position]
        name = f"model.layers.{layer}.{end}"
        found.append(Site(name, name, f"linear_{index}", "linear", "linear", f"{name}.weight", "out_in", 64, 64))
        purposes[name] = Purpose((role,))
    return found, purposes


def rules(selections: int) -> RuleSet:
    """Return rules with that many selections, each with a predicate of every kind that is asked of a name."""
    select = [
        {
            "target": ["*_proj"],
            "regex": r".*\.(self_attn|mlp)\.\w+",
            "role": ["attention.query", "mlp.up"],
            "layers": [f"{index}-"],
        }
        for index in range(selections)
    ]
    return load({"defaults": {"rank": 4}, "select": select})


def seconds(sites: int, selections: int, repetitions: int = 3) -> float:
    """Return the median time of a plan."""
    found, purposes = model(sites)
    ruleset = rules(selections)
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        plan_sites(found, ruleset, purposes)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """Return the exponent of a power law fitted to the first and the last size."""
    return math.log(times[-1] / times[0]) / math.log(sizes[-1] / sizes[0])


def main() -> None:
    """Print the table."""
    table = Table("sites", "selections", "seconds", title="lora_fx.planning.planner.plan_sites")
    by_sites, by_selections = (1_000, 5_000, 20_000), (1, 4, 16)
    site_times = [seconds(count, 4) for count in by_sites]
    selection_times = [seconds(5_000, count) for count in by_selections]
    for count, took in zip(by_sites, site_times, strict=True):
        table.add_row(f"{count:,}", "4", f"{took:.3f}")
    for count, took in zip(by_selections, selection_times, strict=True):
        table.add_row("5,000", str(count), f"{took:.3f}")
    console = Console()
    console.print(table)
    console.print(
        f"exponent in sites {exponent(by_sites, site_times):.2f}, in selections {exponent(by_selections, selection_times):.2f}"
    )


if __name__ == "__main__":
    with printable():
        main()
