"""Plans by a PEFT configuration: the modules and parameters that PEFT adapts, with its ranks and scalings, and what trains besides.

PEFT adapts modules by their names, rules of lora_fx call sites; all calls of a module share its branch. Where PEFT would raise, since
a name means a module that it cannot adapt, so does this.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from lora_fx.errors import RuleError, did_you_mean, listed, shortened
from lora_fx.graph.records import BranchSpec, ParameterModule, Trained
from lora_fx.planning.peft_tokens import Vocabulary, token_rows
from lora_fx.planning.plan import Chosen, Decision, Plan, Skipped, owners_of
from lora_fx.rules.peft_config.config import ALL_LINEAR, AdapterConfig, trains_bias
from lora_fx.rules.peft_config.name_matching import is_named, layer_of, modules_of
from lora_fx.rules.peft_config.rules import PeftRules
from lora_fx.sites.call_sites import Site, attention_of, is_bare, is_idle, parameter_of
from lora_fx.sites.roles import Purpose

Parameters = Mapping[tuple[str, ...], int]
"""The parameters that a graph reads, each by all of its names, and their numbers of elements."""


def plan_peft_sites(
    found: Sequence[Site],
    rules: PeftRules,
    purpose_of: Mapping[str, Purpose],
    parameters: Parameters,
    linears: Sequence[str],
    modules: Mapping[str, ParameterModule],
    vocabulary: Vocabulary,
) -> Plan:
    """Decide for each of these sites as PEFT does.

    Args:
        found: the sites of a graph.
        rules: the configuration.
        purpose_of: roles and parts of each site, by its name.
        parameters: those that the graph reads.
        linears: the modules that ``all-linear`` means, by their paths.
        modules: those whose weights PEFT adapts as parameters alone.
        vocabulary: of the model.

    Raises:
        RuleError: nothing is selected, or what PEFT cannot adapt. All problems are named.
    """
    config = rules.config.model_copy(update={"modules_to_save": rules.saved or None})
    every = str(config.target_modules).lower() == ALL_LINEAR
    if every:
        config = config.model_copy(update={"target_modules": tuple(linears)})
    try:
        tied = {} if every else _tied_modules(config, found, parameters)  # PEFT ties before it knows the linear layers
        decisions = [
            _decision(site, config, rules, tied, purpose_of.get(site.name, Purpose()), modules) for site in found
        ]
        chosen = [each.site for each in decisions if isinstance(each, Chosen)]
        trained = _trained(rules, config, parameters, {site.module for site in chosen if not is_bare(site)})
        problems = [*_unadaptable(config, found, parameters, modules), *_unlike(config, tied)]
        tokens = token_rows(config, found, parameters, vocabulary, rules.name, problems)
    except TimeoutError as error:
        raise RuleError(rules.source, [str(error)]) from error
    if not chosen and not trained and not tokens and not config.has_rows_alone:
        problems.append(_nothing(rules.config, found, modules))
    if problems:
        raise RuleError(rules.source, shortened(problems, _MAX_NAMED, "problems"))
    return Plan(rules, tuple(decisions), trained, tokens=tokens)


_MAX_NAMED = 20


def _decision(
    site: Site,
    config: AdapterConfig,
    rules: PeftRules,
    tied: Mapping[str, str | None],
    purpose: Purpose,
    modules: Mapping[str, ParameterModule],
) -> Decision:
    """Return the branch of a site, or why it has none."""
    parameter, owner = parameter_of(site), attention_of(site, modules)
    if owner is not None and config.selects(owner):
        setting = replace(config.setting_of(owner), dropout=0.0)  # PEFT merges, and drops nothing
        return Chosen(
            site, f"{rules.name}:target_modules", (BranchSpec(owners_of(site)[0], setting, op=site.op),), purpose
        )
    if is_idle(site, modules) and config.selects(site.module):
        return Skipped(site, "target_modules names it; an nn.MultiheadAttention never calls it", purpose)
    if config.selects_parameter(parameter):
        key, name = "target_parameters", parameter
    elif not is_bare(site) and (site.module in tied or config.selects(site.module)):
        key, name = "target_modules", site.module
    else:
        reason, *kind = _why_not(site, config)
        return Skipped(site, reason, purpose, *kind)
    branch = BranchSpec(owners_of(site)[0], config.setting_of(name), op=site.op, mirrors=tied.get(site.module))
    return Chosen(site, f"{rules.name}:{key}", (branch,), purpose)


def _why_not(site: Site, config: AdapterConfig) -> tuple[str, ...]:
    """Return why a site has no branch, and the same without its layer where that is the reason."""
    if config.has_rows_alone:
        return ("trainable tokens have no branches",)
    if is_bare(site):
        return ("target_parameters does not name it",)
    if config.target_modules is None or not is_named(site.module, config.target_modules):
        return ("target_modules does not name it",)
    named = "target_modules names it; "
    if config.exclude_modules is not None and is_named(site.module, config.exclude_modules):
        return (f"{named}exclude_modules does too",)
    if any(f".{saved}." in f".{site.module}." for saved in config.modules_to_save or ()):
        return (f"{named}it trains as a whole, by modules_to_save or task_type",)
    index, layers = layer_of(site.module, config.layers_pattern), json.dumps(config.layers_to_transform)
    if index is None:
        return (f"{named}it is in no numbered layer, and layers_to_transform is {layers}",)
    end = f"is not in layers_to_transform, {layers}"
    return f"{named}its layer {index} {end}", f"{named}its layer {end}"


def _trained(rules: PeftRules, config: AdapterConfig, parameters: Parameters, adapted: set[str]) -> tuple[Trained, ...]:
    """Return the parameters that train as a whole or as a bias."""
    found = []
    for names, elements in parameters.items():
        saved = [config.saves_any(name) for name in names]
        meant = [saves or trains_bias(config, name, adapted) for saves, name in zip(saved, names, strict=True)]
        if not any(meant):
            continue
        rule = f"{rules.name}:{'modules_to_save' if any(saved) else 'bias'}"
        if (
            len(names) > 1 and any(saved) and not config.ensure_weight_tying
        ):  # PEFT has a copy for each of these modules
            alone = [name for name, saves in zip(names, saved, strict=True) if saves]
            found += [Trained(name, rule, elements, untied=True) for name in alone]
        else:
            found.append(Trained(names[0], rule, elements, whole=all(meant) or any(saved)))
    return tuple(found)


def _unadaptable(
    config: AdapterConfig, found: Sequence[Site], parameters: Parameters, modules: Mapping[str, ParameterModule]
) -> Iterator[str]:
    """Yield the modules that are selected and are no linear layer, convolution or embedding, for which PEFT raises."""
    for module in dict.fromkeys(site.module for site in found if not is_bare(site) and not site.kernel):
        if module in modules and config.selects(module):
            kind = modules[module].classes[0].partition(":")[2]
            yield (
                f"target_modules: {module!r} is a {kind}, for which PEFT has no layer. Name its weight under target_parameters: {module}.weight"
            )
    known = {site.module for site in found}
    attentions = {owner for site in found if (owner := attention_of(site, modules)) and config.selects(owner)}
    for owner in sorted(attentions):
        if f"{owner}.in_proj_weight" not in known:
            yield (
                f"target_modules: {owner!r} is an nn.MultiheadAttention whose query is another tensor than its key, so that its in_proj_weight is "
                "no call site"
            )
        for key, said in (
            ("use_dora", config.use_dora),
            ("lora_bias", config.lora_bias),
            ("bias", config.bias != "none"),
        ):
            if said:
                yield f"{key}: expected none in an nn.MultiheadAttention, which {owner!r} is, found {json.dumps(getattr(config, key))}"
    known |= attentions
    paths = dict.fromkeys(path for names in parameters for name in names for path in modules_of(name))
    for path in paths:
        if path not in known and config.selects(path):
            yield f"target_modules: {path!r} is no linear layer, convolution or embedding that the model calls"


def _tied_modules(config: AdapterConfig, found: Sequence[Site], parameters: Parameters) -> dict[str, str | None]:
    """Return the modules to which PEFT gives a branch since they share a weight with a selected one, selected or not.

    Each with the input embedding whose factors it has, transposed, as the head has; None where the factors are its own: those of
    embeddings, and of the head of a model that never calls the embedding that all others are tied to (``shared`` of T5).
    """
    if not config.ensure_weight_tying:
        return {}
    kinds = {site.module: site.op for site in found if not is_bare(site)}
    together: dict[str, str | None] = {}
    for names in parameters:
        paths = [name.rpartition(".")[0] for name in names]
        if len(names) > 1 and any(map(config.selects, paths)):
            source = paths[0] if kinds.get(paths[0]) == "embedding" else None
            together |= {path: source if kinds[path] == "linear" else None for path in paths if path in kinds}
    return together


def _unlike(config: AdapterConfig, tied: Mapping[str, str | None]) -> Iterator[str]:
    """Yield the modules that would have the factors of another one, with other settings."""
    for module, source in tied.items():
        if source is not None and config.setting_of(module) != config.setting_of(source):
            yield (
                f"ensure_weight_tying: {module!r} and {source!r} have the same factors, and rank_pattern or alpha_pattern gives them different "
                "ones"
            )


def _nothing(config: AdapterConfig, found: Sequence[Site], modules: Mapping[str, ParameterModule]) -> str:
    idle = [site for site in found if is_idle(site, modules) and config.selects(site.module)]
    if idle:
        owner = attention_of(idle[0], modules)
        return f"target_modules: {idle[0].module!r} is never called: name its nn.MultiheadAttention, {owner!r}"
    ends = sorted({site.module.rpartition(".")[2] for site in found})
    named = config.target_parameters if config.target_modules is None else config.target_modules
    key = "target_parameters" if config.target_modules is None else "target_modules"
    names = [named] if isinstance(named, str) else list(named or ())
    hint = "".join(did_you_mean(name.rpartition(".")[2], ends) for name in names)
    return f"{key}: no call site is {listed(names, 5) or 'named'}{hint}; the model's sites end in {', '.join(ends) or 'nothing'}"
