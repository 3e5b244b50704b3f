"""Warnings about a plan that can be carried out: ranks lower than the rules say, and a task head that would stay random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from lora_fx.errors import listed, option, warn
from lora_fx.graph.adapter_names import original_name
from lora_fx.graph.info import known_info
from lora_fx.graph.records import Trained
from lora_fx.planning.plan import Plan
from lora_fx.rules.vocabulary import TaskType


def warn_of_lower_ranks(plan: Plan) -> None:
    """Warn once, as of the caller's caller, of the sites that are too narrow for the rank of their rule."""
    lower = [
        f"{branch.key} {branch.setting.rank} in place of {branch.setting.rule_rank}"
        for branch in {branch.key: branch for chosen in plan.chosen for branch in chosen.branches}.values()
        if branch.setting.rule_rank is not None
    ]
    if lower:
        warn(
            f"rules {plan.rules.name!r} give these sites a higher rank than their update can have, and they get: {listed(lower, 20)}. The "
            f"scaling stays that of the rule's rank. To have the rank everywhere, give it as an argument, {option('rank=', '--rank')}.",
        )


def warn_of_prefix(plan: Plan) -> None:
    """Warn once, as of the caller's caller, of a prefix that PEFT's file cannot hold."""
    if plan.prefix is not None and plan.prefix.place is not None:
        where = (
            "with the positions of the text unchanged"
            if plan.prefix.place == "self_attention"
            else f"at {plan.prefix.place}"
        )
        warn(
            f"rules {plan.rules.name!r} give a prefix {where}, which PEFT's file cannot hold: save_adapter refuses it, and torch.save takes the "
            "graph.",
        )
    elif plan.prefix is not None and plan.prefix.without:
        warn(
            f"rules {plan.rules.name!r} give a prefix to some layers alone, and PEFT's file has one for all: save_adapter refuses it, and "
            "torch.save takes the graph.",
        )


def warn_of_untying(
    trained: Sequence[Trained], names: Mapping[str, Sequence[str]], source: str, *, ensured: bool = False
) -> None:
    """Warn once of parameters that the model ties, and of which modules have trained copies of their own.

    Args:
        trained: the parameters that train.
        names: all names of a parameter, by its first.
        source: of the adapter, or of its rules.
        ensured: whether it says ``ensure_weight_tying``, which PEFT did not follow here.
    """
    untied = [each.name for each in trained if each.untied]
    tied = [every for every in names.values() if not set(untied).isdisjoint(every)]
    if tied:
        told = "; ".join(
            f"{' and '.join(every)} are one parameter, of which {' and '.join(n for n in every if n in untied)} "
            f"{'have copies' if len(set(untied).intersection(every)) > 1 else 'has a copy'} of its own from here on".replace(
                "copies of its own", "copies of their own"
            )
            for every in tied
        )
        end = (
            "as in the file: PEFT follows ensure_weight_tying where transformers ties a module to the input embedding and modules_to_save "
            "says embed_tokens or lm_head. Training and fold untie them."
            if ensured
            else "as with PEFT (modules_to_save without ensure_weight_tying): training and fold untie them. Say ensure_weight_tying to train "
            "one copy."
        )
        warn(f"{source}: {told}, {end}")


def warn_of_fresh_head(plan: Plan, graph_module: fx.GraphModule) -> None:
    """Warn once, as of the caller's caller, of a task head without values from a checkpoint that neither trains nor gets a branch.

    Args:
        plan: for the graph.
        graph_module: may have adapters, which may train the head.
    """
    info = known_info(graph_module)
    if info.inference:
        return
    read = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
    trained = {*(each.name for each in plan.trained), *filter(None, map(original_name, read))}
    reached = {name.rpartition(".")[0] for name in trained} | {chosen.site.module for chosen in plan.chosen}
    acting = (record for record in info.adapters.values() if record.acts)
    reached |= {branch.owner for record in acting for _, branch in record.branches.values()}
    random = [name for name in info.head.fresh if name in read and name not in info.merged]
    left = [path for path in dict.fromkeys(name.rpartition(".")[0] for name in random) if path not in reached]
    if not left:
        return
    kind = info.model_class.rpartition(":")[2]
    task = next((task for suffix, task in TASKS.items() if kind.endswith(suffix)), None)
    selection = f'{{"target": {[path.rpartition(".")[2] for path in left]}, "trainable": "all"}}'
    advice = (
        f"Say task_type={task!r} to train it" if task else f"To train it, add the selection {selection} to the rules"
    )
    warn(
        f"the task head of {kind} is not known to have values from a checkpoint, and neither trains nor gets a branch: {listed(left, 8)}. "
        f"If it is random, it stays so. {advice}, as a whole.",
    )


TASKS: dict[str, TaskType] = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""Ends of the names of transformers' classes, and their tasks."""
