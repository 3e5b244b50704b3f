"""The projections of ``nn.MultiheadAttention`` as PEFT 0.21 adapts them: both together, with one rank and scaling.

Of ``y = out_proj(attention(in_proj_weight x))`` PEFT merges the updates into both weights for the length of a call. The one of ``out_proj``
it merges twice, and its gradient is that of one: a graph has it once, and a file has half of it. ``in_proj_weight`` alone is a parameter
that ``target_parameters`` may name; ``out_proj`` alone has no form, since its module is never called.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from lora_fx.errors import listed, warn
from lora_fx.graph.info import known_info
from lora_fx.graph.records import BranchSpec
from lora_fx.planning.plan import Plan
from lora_fx.rules.peft_config.rules import PeftRules
from lora_fx.sites.call_sites import attention_of, is_idle


def why_not_together(inputs: Sequence[BranchSpec], outputs: Sequence[BranchSpec]) -> str:
    """Return why PEFT has no form for branches at ``out_proj`` beside those at ``in_proj_weight``; nothing if it has."""
    if any(branch.setting.bias or branch.setting.variant == "dora" for branch in (*inputs, *outputs)):
        return "PEFT has neither DoRA nor a bias of B in an nn.MultiheadAttention"
    settings = [(sum(b.added.rank for b in each), {b.setting.scale for b in each}) for each in (inputs, outputs)]
    if settings[0] == settings[1]:
        return ""
    return "PEFT adapts in_proj_weight and out_proj of an nn.MultiheadAttention together, with one rank and scaling"


def warn_of_attentions(plan: Plan, graph_module: fx.GraphModule) -> None:
    """Warn once of branches at ``out_proj`` of ``nn.MultiheadAttention`` that PEFT has no form for, or counts in its own way."""
    modules = known_info(graph_module).parameter_modules
    branches = {chosen.site.module: chosen.branches for chosen in plan.chosen}
    outputs = {
        chosen.site.module: attention_of(chosen.site, modules)
        for chosen in plan.chosen
        if is_idle(chosen.site, modules)
    }
    reasons = {
        output: reason
        for output, owner in outputs.items()
        if (reason := why_not_together(branches.get(f"{owner}.in_proj_weight", ()), branches[output]))
    }
    if reasons:
        warn(
            f"save_adapter has no form for the branches at {listed(list(reasons), 4)}, which fold and the exports take: "
            f"{next(iter(reasons.values()))}. Give both such branches, or none to out_proj.",
        )
    elif isinstance(plan.rules, PeftRules):
        warn_of_double_updates(plan, graph_module)


def warn_of_double_updates(plan: Plan, graph_module: fx.GraphModule) -> None:
    """Warn once of branches at ``out_proj`` of ``nn.MultiheadAttention``, which train otherwise in PEFT."""
    modules = known_info(graph_module).parameter_modules
    outputs = [chosen.site.module for chosen in plan.chosen if is_idle(chosen.site, modules)]
    if outputs:
        warn(
            f"PEFT 0.21 adds the update at {listed(outputs, 4)} twice, and trains with the gradient of one; the graph has it once, and "
            "save_adapter writes half of it, so that PEFT computes what the graph computes.",
        )
