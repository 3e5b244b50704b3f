"""One call from a model to a branched graph: trace, plan, attach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, overload

from torch import nn

from lora_fx.adapters.activate import tell_waiting
from lora_fx.adapters.attach import attach
from lora_fx.adapters.starts import GivenStart
from lora_fx.graph.cached_graphs import CachedGraphs
from lora_fx.graph.graph_module import TracedGraphModule, state_of
from lora_fx.graph.info import info_of
from lora_fx.graph.joined_graphs import through
from lora_fx.planning.attention_projections import warn_of_attentions
from lora_fx.planning.cautions import warn_of_fresh_head, warn_of_lower_ranks, warn_of_prefix, warn_of_untying
from lora_fx.planning.planner import plan_graph
from lora_fx.progress import shown, step
from lora_fx.rules.lookup import RulesLike, has_prefix, load, model_type_of
from lora_fx.rules.peft_config.argument_names import refusing_peft_names
from lora_fx.rules.peft_config.rules import layers_of
from lora_fx.tracing.model_state import unwrapped
from lora_fx.tracing.replicated_layers import trace_with_layers
from lora_fx.tracing.torch_export import Dynamic


@overload
def rewrite(
    model: nn.Module,
    rules: RulesLike = "auto",
    *,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    adapter: str = "default",
    task_type: str | None = None,
    seed: int | None = None,
    start: GivenStart | None = None,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    dynamic: Dynamic | None = None,
    labels: bool = False,
    inference: bool = False,
    cache: Literal[False] = False,
) -> TracedGraphModule: ...


@overload
def rewrite(
    model: nn.Module,
    rules: RulesLike = "auto",
    *,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    adapter: str = "default",
    task_type: str | None = None,
    seed: int | None = None,
    start: GivenStart | None = None,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    dynamic: Dynamic | None = None,
    labels: bool = False,
    inference: bool = False,
    cache: bool,
) -> TracedGraphModule | CachedGraphs: ...


@overload
def rewrite(
    model: CachedGraphs,
    rules: RulesLike = "auto",
    *,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    adapter: str = "default",
    task_type: str | None = None,
    seed: int | None = None,
    start: GivenStart | None = None,
) -> CachedGraphs: ...


@refusing_peft_names
def rewrite(
    model: nn.Module | CachedGraphs,
    rules: RulesLike = "auto",
    *,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    adapter: str = "default",
    task_type: str | None = None,
    seed: int | None = None,
    start: GivenStart | None = None,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    dynamic: Dynamic | None = None,
    labels: bool = False,
    inference: bool = False,
    cache: bool = False,
) -> TracedGraphModule | CachedGraphs:
    """Return a graph of ``model`` with a low-rank branch beside every call site that the rules select.

    ``y = W x`` becomes ``y = W x + scale · B(A(dropout(x)))`` (LoRA, arXiv 2106.09685), with W of shape ``(out, in)``, A of
    ``(rank, in)`` and B of ``(out, rank)``. ``scale`` is ``alpha / rank``, or ``alpha / √rank`` where the rules say so (rsLoRA,
    arXiv 2312.03732). A starts random, B zero, so that the graph computes what the model computes until it is trained. Only
    the factors require a gradient. The model is not changed.

    Args:
        model: a module, or a graph that lora_fx returned (or the graphs of an encoder-decoder model with a cache), which then gets one more
            adapter. That one does not act before
            :func:`~lora_fx.activate` says so, as in PEFT; it acts at once if the graph had none.
        rules: the name of a built-in file or one of its model types (``"t5"``); ``"auto"``, by ``model.config.model_type``, of
            diffusers' models by their class, or by role where there is no file for it; ``"all-linear"``; ``"all-conv"``; a path to a
            ``.toml`` file; names of modules (``["q", "v"]``); a mapping with the keys of a rule file; or a configuration of PEFT: a
            ``peft.LoraConfig``, its mapping, or the path of its ``.json`` file.
        rank: replaces the rank in the rules' ``[defaults]``, at least 1. It is taken as it is; a rank of the rules is lowered, with a
            warning, at each site whose update cannot have it, and the scaling stays that of the rule's rank.
        alpha: replaces the alpha in ``[defaults]``, greater than 0.
        dropout: replaces the dropout in ``[defaults]``: the probability, at least 0 and less than 1, with which an element of a
            branch's input is dropped in training.
        adapter: name of the adapter, part of its parameters' names.
        task_type: replaces the task in ``[defaults]``, as PEFT names it: with ``"SEQ_CLS"``, ``"TOKEN_CLS"`` and ``"QUESTION_ANS"`` the task
            head trains as a whole, in a copy, and gets no branch; it is every module beside the base model, and what PEFT takes for it by
            its name. :func:`save_adapter` writes it. Without it one warning names a head that would stay random.
        seed: of the initial factors. Without one they are drawn from torch's current random state, which is restored.
        start: gives first factors for a call site, A ``(rank, in)`` and B ``(out, rank)``, such as of a method that starts from data (EVA,
            CorDA, LoRA-GA), or None for those of the rules. Where B is not zero, the branch computes beside the weight without
            ``scale · B A``, as with ``init = "pissa"``, so that the graph starts as the model.
        example_inputs: see :func:`lora_fx.trace`.
        dynamic: see :func:`lora_fx.trace`.
        labels: trace with labels, so that the graph returns the model's loss; see :func:`lora_fx.trace`.
        inference: trace the eval mode only and train nothing.
        cache: trace with the key-value cache as inputs and outputs; see :func:`lora_fx.trace`.

    Returns:
        A graph in the mode (train or eval) of the model, with parameters ``<module>.lora_A.<adapter>.weight`` and ``lora_B``.

    Raises:
        RuleError: the rules are malformed or do not fit the model.
        TraceError: the model cannot be traced.
        PlanError: a selected site cannot get such a branch, the adapter name is taken, or PEFT wraps the model.
    """
    given = model if isinstance(model, CachedGraphs) else unwrapped(model)
    config = getattr(given.first if isinstance(given, CachedGraphs) else given, "config", None)
    ruleset = load(rules, model_type_of(config)).with_overrides(rank, alpha, dropout, task_type)

    def attached(graph_module: TracedGraphModule) -> TracedGraphModule:
        step("adding branches")
        plan = plan_graph(graph_module, ruleset)
        warn_of_lower_ranks(plan)
        warn_of_untying(plan.trained, state_of(graph_module).names(), f"rules {plan.rules.name!r}")
        warn_of_fresh_head(plan, graph_module)
        warn_of_attentions(plan, graph_module)
        warn_of_prefix(plan)
        both = plan.prefix is not None and bool(getattr(ruleset, "select", ()))
        result = attach(
            graph_module, replace(plan, prefix=None) if both else plan, adapter=adapter, seed=seed, start=start
        )
        if both:
            acts = info_of(result).adapters[adapter].acts
            result = attach(result, plan.of_prefix, adapter=f"{adapter}-prefix", seed=seed, acts=acts)
        tell_waiting(result, adapter)
        return result

    if isinstance(given, CachedGraphs):
        return through(given, attached)
    with shown(f"rewriting {type(given).__name__}"):
        return through(
            trace_with_layers(
                given,
                layers_of(ruleset),
                example_inputs,
                dynamic=dynamic,
                labels=labels,
                inference=inference,
                cache=cache,
                # The plan refuses a graph by its rules.
                prefix=not (cache or isinstance(given, TracedGraphModule)) and has_prefix(ruleset),
            ),
            attached,
        )
