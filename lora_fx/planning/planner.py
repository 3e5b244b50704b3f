"""Planner: rules × call sites → a plan, without any change to the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from lora_fx.branches.remove import unload
from lora_fx.branches.tied_copies import why_not_untied
from lora_fx.errors import PlanError, RuleError, did_you_mean, listed
from lora_fx.graph.adapter_names import adapters, is_factor, is_token_values, original_name
from lora_fx.graph.cached_graphs import CachedGraphs
from lora_fx.graph.graph_module import state_of
from lora_fx.graph.info import known_info
from lora_fx.graph.joined_graphs import whole
from lora_fx.graph.process_state import uncollected
from lora_fx.graph.records import BranchSpec, TaskHead, TokenRows, Trained
from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.planning.cautions import warn_of_lower_ranks
from lora_fx.planning.matching import Refusal, refusal, trains
from lora_fx.planning.peft_plan import plan_peft_sites
from lora_fx.planning.peft_tokens import Vocabulary
from lora_fx.planning.plan import Chosen, Decision, Plan, Skipped, calls_apart, outputs_of, owners_of, why_no_variant
from lora_fx.planning.prefix_plan import prefix_of
from lora_fx.rules.lookup import Rules, RulesLike, has_prefix, load, model_type_of
from lora_fx.rules.peft_config.argument_names import refusing_peft_names
from lora_fx.rules.peft_config.name_matching import modules_of
from lora_fx.rules.peft_config.rules import PeftRules, layers_of
from lora_fx.rules.rule_file import RuleSet, Selection
from lora_fx.rules.vocabulary import TASK_HEADS, Part
from lora_fx.sites.call_sites import Site, sites
from lora_fx.sites.roles import Purpose, purposes
from lora_fx.tracing.model_state import unwrapped
from lora_fx.tracing.replicated_layers import trace_with_layers


@refusing_peft_names
def plan(
    model: nn.Module | CachedGraphs,
    rules: RulesLike = "auto",
    *,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    task_type: str | None = None,
) -> Plan:
    """Decide for every call site of a model or a graph whether rules give it a branch, without changing anything.

    Args:
        model: a graph of lora_fx, or a model, which is then traced; on the meta device too; or the graphs of an encoder-decoder model with a
            cache, whose sites are then calls.
        rules: see :func:`lora_fx.rewrite`.
        example_inputs: see :func:`lora_fx.trace`.
        rank: replaces the ``[defaults]`` of the rules, as do ``alpha``, ``dropout`` and ``task_type``.
        alpha: numerator of the scaling ``alpha / rank``.
        dropout: probability with which an element of a branch's input is dropped in training.
        task_type: the task, by which the task head trains; see :func:`lora_fx.rewrite`.

    Returns:
        One decision for every site, in graph order, with its reason; ``print(plan)`` shows the table.

    Raises:
        RuleError: the rules are malformed, a selection matches nothing, or two claim one site with different settings.
        PlanError: a chosen site cannot get such a branch, or PEFT wraps the model.
        TraceError: the model cannot be traced.
    """
    given = unwrapped(whole(model))
    model_type = model_type_of(getattr(given, "config", None))
    ruleset = load(rules, model_type).with_overrides(rank, alpha, dropout, task_type)
    prefix = not isinstance(given, fx.GraphModule) and has_prefix(ruleset)
    made = plan_graph(
        trace_with_layers(given, layers_of(ruleset), example_inputs, inference=True, prefix=prefix), ruleset
    )
    warn_of_lower_ranks(made)
    return made


@uncollected()
def plan_graph(graph_module: fx.GraphModule, rules: Rules) -> Plan:
    """Decide for each site of a graph. Raises as :func:`plan` does."""
    found = sites(graph_module)
    targets = (str(node.target) for node in graph_module.graph.find_nodes(op="get_attr"))
    read = {original_name(name) or name for name in targets}
    state = state_of(graph_module)
    own = {
        names: state.tensors[first].numel()
        for first, names in state.names().items()
        if first in read
        and isinstance(state.tensors[first], nn.Parameter)
        and not (is_factor(first) or is_token_values(first))
    }
    plain = (
        unload(graph_module) if adapters(graph_module) else graph_module
    )  # in which roles are not hidden by branches
    purpose_of = purposes(plain, sites(plain))
    head = known_info(graph_module).head
    purpose_of = {
        **purpose_of,
        **{site.name: purpose_of[site.name].with_role("head") for site in found if head.has(site.module)},
    }
    if isinstance(rules, PeftRules):
        known = known_info(graph_module)
        if problem := rules.config.problem_of_layers(known.layers):
            raise RuleError(rules.source, [problem])
        vocabulary = Vocabulary.of(known)
        return plan_peft_sites(found, rules, purpose_of, own, known.linears, known.parameter_modules, vocabulary)
    prefix = prefix_of(rules, known_info(graph_module).prefix_slot, plain)
    return replace(plan_sites(found, rules, purpose_of, own, head), prefix=prefix)


def plan_sites(
    found: Sequence[Site],
    rules: RuleSet,
    purpose_of: Mapping[str, Purpose] | None = None,
    parameters: Mapping[tuple[str, ...], int] | None = None,
    head: TaskHead | None = None,
) -> Plan:
    """Decide for each of these sites.

    Args:
        found: the sites of a graph.
        rules: the selections and their settings.
        purpose_of: roles and parts of each site, by its name.
        parameters: the parameters that the graph reads, each by all of its names, and their numbers of elements.
        head: the task head of the model.

    Raises:
        RuleError: as :func:`plan` does.
        PlanError: as :func:`plan` does.
    """
    known = {site: (purpose_of or {}).get(site.name, Purpose()) for site in found}
    problems: list[str] = []
    matched: set[int] = set()
    decisions: list[Decision] = []
    by_task = _trains_by_task(rules, head or TaskHead())
    branching = [index for index, selection in enumerate(rules.select) if selection.trainable is None]
    for site, purpose in known.items():
        refused = {index: refusal(rules.select[index], site, purpose) for index in branching}
        claims = [index for index, reason in refused.items() if reason is None]
        matched.update(claims)
        if by_task(f"{site.module}.weight"):
            decisions.append(Skipped(site, f"it trains as a whole, by task_type {rules.defaults.task_type!r}", purpose))
        elif claims:
            decisions.append(_chosen(site, purpose, rules, claims, problems))
        else:
            decisions.append(_skipped(site, purpose, rules, {i: why for i, why in refused.items() if why is not None}))
    trained = _trained(rules, known, parameters or {}, matched)
    tokens = _tokens(rules, known, parameters or {}, matched, problems)
    of_head = {each.name: each for each in _trained_by_task(rules, by_task, parameters or {}, problems)}
    trained = tuple({**of_head, **{each.name: each for each in trained}}.values())
    problems += [
        _matches_nothing(known, rules, index)
        for index, selection in enumerate(rules.select)
        if index not in matched and not selection.optional
    ]
    problems += [
        _names_nothing(known, rules, index, target)
        for index in sorted(matched)
        if not rules.select[index].alternatives
        for target in rules.select[index].target or ()
        if not _names_something(target, known, (parameters or {}) if rules.select[index].trainable else {})
    ]
    if problems:
        raise RuleError(rules.source or f"rules {rules.name!r}", problems)
    return Plan(rules, tuple(decisions), trained, tokens=tokens)


def _tokens(
    rules: RuleSet,
    known: Mapping[Site, Purpose],
    parameters: Mapping[tuple[str, ...], int],
    matched: set[int],
    problems: list[str],
) -> tuple[TokenRows, ...]:
    """Return the rows of embeddings that selections mean, and note which selections those are; conflicts are added to the problems."""
    found: dict[str, TokenRows] = {}
    tables = {site.weight: site for site in known if site.op == "embedding"}
    for index, selection in enumerate(rules.select):
        if not isinstance(selection.trainable, tuple):
            continue
        means = trains(selection, known)
        for names in parameters:
            site = next((tables[name] for name in names if name in tables), None)
            meant = next((name for name in names if means(name)), None)
            if site is None or meant is None:
                continue
            matched.add(index)
            beyond = [row for row in selection.trainable if row >= site.in_features]
            if beyond:
                problems.append(
                    f"{rules.at('select', index, 'trainable')}: {meant!r} has {site.in_features} rows, and {beyond[0]} is none of them"
                )
            if names[0] in found:
                problems.append(
                    f"{rules.where(index)} names rows of {meant!r}, as an earlier selection does; put them into one"
                )
            module = meant.removesuffix(".weight")
            rule = f"{rules.name}:select[{index}]"
            found[names[0]] = TokenRows(module, selection.trainable, rule, site.out_features)
    return tuple(found.values())


def _trained(
    rules: RuleSet, known: Mapping[Site, Purpose], parameters: Mapping[tuple[str, ...], int], matched: set[int]
) -> tuple[Trained, ...]:
    """Return the parameters that selections with ``trainable`` mean, and note which selections those are."""
    found: dict[str, Trained] = {}
    for index, selection in enumerate(rules.select):
        if selection.trainable is None or isinstance(selection.trainable, tuple):
            continue
        means = trains(selection, known)
        for names, elements in parameters.items():
            meant = [means(name) for name in names]
            if any(meant):
                rule = f"{rules.name}:select[{index}]"
                found.setdefault(names[0], Trained(names[0], rule, elements, whole=all(meant)))
                matched.add(index)
    return tuple(found.values())


def _trains_by_task(rules: RuleSet, head: TaskHead) -> Callable[[str], bool]:
    """Return what tells whether a parameter trains by the task of the rules: in a module that PEFT takes for the head, or in the head."""
    task = rules.defaults.task_type
    names = TASK_HEADS.get(task, ()) if task else ()

    def trains_by_task(parameter: str) -> bool:
        return bool(names) and any(path.endswith(names) or head.has(path) for path in modules_of(parameter))

    return trains_by_task


def _trained_by_task(
    rules: RuleSet,
    by_task: Callable[[str], bool],
    parameters: Mapping[tuple[str, ...], int],
    problems: list[str],
) -> Iterator[Trained]:
    """Yield the parameters that train by the task; a task whose head the model does not have is added to the problems."""
    task, nothing = rules.defaults.task_type, True
    for names, elements in parameters.items():
        meant = [by_task(name) for name in names]
        if any(meant):
            nothing = False
            yield Trained(names[0], f"{rules.name}:task_type", elements, whole=all(meant))
    if nothing and task is not None and task in TASK_HEADS:
        problems.append(
            f"{rules.at('defaults', 'task_type')}: {task} trains the task head, and the model uses none: no module beside a base model, and "
            f"none whose name ends in {' or '.join(TASK_HEADS[task])}"
        )


def check_attachable(plan: Plan, graph_module: fx.GraphModule) -> None:
    """Raise :class:`PlanError` unless every chosen site can get a branch; all that cannot are named."""
    problems: list[str] = []
    state = state_of(graph_module)
    for chosen in plan.chosen:
        site, weight = chosen.site, state.tensors[chosen.site.weight]
        problems += _unfit(chosen)
        if not isinstance(weight, nn.Parameter):
            problems.append(f"site {site.name!r} multiplies by a buffer, {site.weight!r}: make it a parameter")
        elif weight.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            problems.append(
                f"site {site.name!r} has a weight of dtype {weight.dtype}: a branch needs a floating-point one. "
                "Dequantise the model first"
            )
    problems += calls_apart(plan, state)
    weights = (chosen.site.weight for chosen in plan.chosen)
    first, tied = state.aliases(), state.names()
    adapted = {first[original_name(name) or name] for name in weights}
    for trained in plan.trained:
        names = tied[first[trained.name]]
        if isinstance(weight := state.tensors[trained.name], QuantisedWeight):
            problems.append(
                f"{trained.name!r} is {weight!r}, and codes do not train: leave it out, or load the model without quantising that layer "
                "(llm_int8_skip_modules in transformers' BitsAndBytesConfig)"
            )
        if trained.untied and (reason := why_not_untied(graph_module, names, trained.name)):
            problems.append(
                f"{' and '.join(names)} are one parameter, of which {trained.name} would be a trained copy of its own, as PEFT has it unless it "
                f"ties them: {reason}. Name them all in modules_to_save, with ensure_weight_tying, for one copy"
            )
        elif not trained.whole:
            problems.append(
                f"{' and '.join(names)} are one tied parameter, which cannot train at one of its uses alone"
            )
        elif first[trained.name] in adapted:
            problems.append(f"{trained.name!r} would both train and get a branch; leave one of the two out")
    for each in plan.tokens:
        names = tied[first[each.weight]]
        if first[each.weight] in {first[trained.name] for trained in plan.trained}:
            problems.append(
                f"{each.weight!r} would train as a whole, and rows of it by themselves; leave one of the two out"
            )
        elif each.alone and (reason := why_not_untied(graph_module, names, each.weight)):
            problems.append(
                f"{' and '.join(names)} are one parameter, and rows of {each.weight} would be those of {each.module} alone: {reason}"
            )
    if problems:
        raise PlanError("; ".join(problems) + ".")


def _unfit(chosen: Chosen) -> Iterator[str]:
    """Yield why branches cannot be at a site of this kind."""
    site = chosen.site
    for branch in chosen.branches:
        rank = branch.setting.rank
        if site.kernel and branch.features is not None:
            yield f"site {site.name!r} is {site.op}: a part of its output features alone can get no branch"
        if site.kernel and rank % site.matrices:
            yield (
                f"site {site.name!r} has {site.matrices} groups, each with a low-rank update of its own, and rank {rank} cannot be "
                "divided among them"
            )
        kinds = {
            "DoRA": branch.setting.variant == "dora",
            "a bias in B": branch.setting.bias,
            "invocation tokens": bool(branch.setting.invocation_tokens),
        }
        for which, fits in kinds.items():
            if fits and (reason := why_no_variant(branch, site, which)):
                yield f"site {site.name!r} can get no branch with {which}: {reason}"
        if site.operator == "_grouped_mm" and rank % 4:
            yield f"site {site.name!r} multiplies by {site.operator}, which takes ranks that are multiples of 4, not {rank}"


def _chosen(site: Site, purpose: Purpose, rules: RuleSet, claims: Sequence[int], problems: list[str]) -> Chosen:
    """Return the branches that the claims on a site amount to; conflicts are added to the problems."""
    branches: dict[Part | None, tuple[int, BranchSpec]] = {}
    for index in claims:
        selection = rules.select[index]
        for branch in _branches(site, purpose, rules, selection):
            rivals = [part for part in branches if part == branch.part or part is None or branch.part is None]
            if any(branches[part][1] != branch for part in rivals) and not selection.override:
                first, other = branches[rivals[0]]
                problems.append(
                    f"{rules.where(first)} and {rules.where(index)} both claim {site.name!r}, with {_setting_text(other)} and "
                    f"{_setting_text(branch)}; make one of them narrower, or let the later say override = true"
                )
            elif selection.override or not rivals:
                for part in rivals:
                    del branches[part]
                branches[branch.part] = (index, branch)
    named = ", ".join(dict.fromkeys(f"select[{index}]" for index, _ in branches.values()))
    fitted = tuple(_fitted(branch, site, rules, rules.select[index]) for index, branch in branches.values())
    return Chosen(site, f"{rules.name}:{named}", fitted, purpose)


def _skipped(site: Site, purpose: Purpose, rules: RuleSet, refused: Mapping[int, Refusal]) -> Skipped:
    """Return the decision on a site that no selection claims, with the reason of the one that comes nearest."""
    if not refused:
        return Skipped(site, "no selection adds branches", purpose)
    named = {
        index for index in refused if rules.select[index].target is not None or rules.select[index].regex is not None
    }
    index = max(refused, key=lambda each: (refused[each].agreed, each in named))
    nearest = refused[index]
    if not nearest.agreed:
        return Skipped(site, nearest.reason, purpose)
    where = f"select[{index}] names it; " if index in named else f"select[{index}]: "
    return Skipped(site, where + nearest.reason, purpose, where + nearest.kind)


def _fitted(branch: BranchSpec, site: Site, rules: RuleSet, selection: Selection) -> BranchSpec:
    """Return the branch with no higher rank than its update can have, if its rank comes from a rule file."""
    if rules.rank_is_given and selection.rank is None:
        return branch
    width = min(site.in_features * math.prod(site.kernel), outputs_of(branch, site))
    return replace(branch, setting=branch.setting.lowered_to(width))


def _branches(site: Site, purpose: Purpose, rules: RuleSet, selection: Selection) -> Iterator[BranchSpec]:
    shared, own = owners_of(site)
    owner = shared if selection.calls == "all" else own
    setting = rules.setting_of(selection)
    if selection.features is None:
        yield BranchSpec(owner, setting, op=site.op)
    for part in selection.features or ():
        yield BranchSpec(owner, setting, part, purpose.parts[part], site.op)


def _setting_text(branch: BranchSpec) -> str:
    setting = branch.setting
    words = [f"rank {setting.rank}", f"alpha {setting.alpha:g}", f"dropout {setting.dropout:g}"]
    words += [setting.scaling] if setting.scaling != "standard" else []
    words += [f"init {setting.init}"] if setting.init != "kaiming" else []
    words += ["DoRA"] * (setting.variant == "dora") + ["a bias in B"] * setting.bias
    words += [f"invocation tokens {list(setting.invocation_tokens)}"] if setting.invocation_tokens else []
    return ", ".join([*words, f"for {branch.part or 'all'} of {branch.owner!r}"])


def _names_something(target: str, known: Mapping[Site, Purpose], parameters: Mapping[tuple[str, ...], int]) -> bool:
    named = Selection(target=(target,))
    if any(named.names(site.module) for site in known):
        return True
    return any(named.names(path) for names in parameters for name in names for path in (*modules_of(name), name))


def _names_nothing(known: Mapping[Site, Purpose], rules: RuleSet, index: int, target: str) -> str:
    ends = sorted({site.module.rpartition(".")[2] for site in known})
    hint = did_you_mean(target.rpartition(".")[2], ends)
    return (
        f"{rules.where(index)} names {target!r}, which is no module that multiplies by a weight here{hint}; leave it out, or say alternatives = true "
        "if models have one name or another"
    )


def _attends(purpose: Purpose) -> bool:
    return any("attention" in role for role in purpose.roles)


def _matches_nothing(known: Mapping[Site, Purpose], rules: RuleSet, index: int) -> str:
    selection = rules.select[index]
    if isinstance(selection.trainable, tuple):
        ends = sorted({site.module.rpartition(".")[2] for site in known if site.op == "embedding"})
        return f"{rules.where(index)} matches no embedding; the model has {', '.join(ends) or 'none'}"
    if selection.trainable is not None:
        return f"{rules.where(index)} matches no parameter that the model uses; name a module, or a part of its dotted name's end"
    where = f"{rules.where(index)} matches no call site"
    ends = sorted({site.module.rpartition(".")[2] for site in known})
    roles = selection.role or ()
    if roles and all("attention" in role for role in roles) and not any(map(_attends, known.values())):
        return (
            f"the model has no attention projections, which {rules.where(index)} asks for by role: name modules, as in rules={ends[:2]!r}, or "
            f"say rules='all-linear'; its sites end in {listed(ends, 12) or 'nothing'}"
        )
    named = {site: refusal(selection, site, purpose) for site, purpose in known.items()}
    near = [(site, reason) for site, reason in named.items() if reason is not None and not reason.by_name]
    if near:
        site, nearest = max(near, key=lambda pair: pair[1].agreed)
        return f"{where}: of {site.name!r}, {nearest.reason}. Say optional = true if that is meant"
    asked = [
        f"{key} = {list(value) if isinstance(value, tuple) else value!r}"
        for key in ("target", "regex", "layers", "exclude")
        if (value := getattr(selection, key))
    ]
    hint = "".join(did_you_mean(target.rpartition(".")[2], ends) for target in selection.target or ())
    return f"{where}: {', '.join(asked)}{hint}; the model's sites end in {', '.join(ends) or 'nothing'}"
