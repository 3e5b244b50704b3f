"""EVA: branches whose A are the main directions of what their sites read, and whose ranks go where these explain most (arXiv 2410.07170).

Sites that read one node of the graph read one input, of which there is one decomposition.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from lora_fx.adapters.activate import activate
from lora_fx.branches.lower import lower
from lora_fx.errors import PlanError, listed, warn
from lora_fx.graph.adapter_names import adapters
from lora_fx.graph.cached_graphs import CachedGraphs, check_changeable
from lora_fx.graph.graph_module import state_of
from lora_fx.graph.process_state import forked_random_state
from lora_fx.graph.records import BranchSpec
from lora_fx.graph.signature import signature_of
from lora_fx.numerics.principal_components import Components, extended
from lora_fx.planning.plan import Chosen, Plan
from lora_fx.planning.planner import plan_graph
from lora_fx.rules.lookup import Rules, RulesLike, load, model_type_of
from lora_fx.rules.peft_config.argument_names import refusing_peft_names
from lora_fx.rules.peft_config.rules import PeftRules, layers_of
from lora_fx.rules.peft_config.target_names import patterns
from lora_fx.rules.rule_file import Defaults, Selection
from lora_fx.sites.call_sites import Site, is_bare
from lora_fx.sites.weight_ops import weight_op
from lora_fx.tracing.model_state import unwrapped
from lora_fx.tracing.replicated_layers import trace_with_layers

_SEED = 42  # of the decompositions, PEFT's


@dataclass(frozen=True)
class EvaStart:
    """First factors by EVA, to be passed as ``start=`` of :func:`lora_fx.rewrite`, with the rules that have their ranks.

    Attributes:
        rules: the given ones, with the ranks and alphas that EVA gives.
        ranks: of each module with a branch by EVA; those of rank 0 have none.
        factors: A ``(rank, in)`` of each of these modules.
    """

    rules: Rules
    ranks: Mapping[str, int]
    factors: Mapping[str, torch.Tensor] = field(repr=False)

    def __call__(self, site: Site) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return A and a B of zeros for a site; None where the rules give the start."""
        a = self.factors.get(site.module)
        return None if a is None else (a, a.new_zeros(site.out_features, len(a)))


@refusing_peft_names
def eva(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    rules: RulesLike = "auto",
    *,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    rho: float = 2.0,
    tau: float = 0.99,
    whiten: bool = False,
    adjust_scaling: bool = True,
    mask: Callable[[Mapping[str, Any]], torch.Tensor | None] | None = None,
    passes: int = 10,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
) -> EvaStart:
    """Return first factors from data: the main directions of the inputs of each site, and ranks that follow how much they explain.

    ``found = lora_fx.eva(graph, loader, rules)``, then ``lora_fx.rewrite(graph, found.rules, start=found)``. Ranks, factors and scalings
    are those of PEFT's ``initialize_lora_eva_weights``. Each batch goes through the graph without branches, in evaluation mode, until the
    directions that get a rank stay as they are from one batch to the next.

    Args:
        model: a module, or a graph that lora_fx returned; not changed.
        loader: batches of keyword inputs. ``labels`` are taken out where the graph has none.
        rules: see :func:`lora_fx.rewrite`. Linear layers with one branch get a start; others start, and keep the rank, as the rules say.
        rank: see :func:`lora_fx.rewrite`; the sum of the ranks stays as the rules give it.
        alpha: see :func:`lora_fx.rewrite`.
        dropout: see :func:`lora_fx.rewrite`.
        rho: a module gets at most ``rho`` times its rank; 1 leaves the ranks as they are. At least 1.
        tau: cosine between a direction and the same one a batch before, from which on it counts as found; from 0 to 1.
        whiten: divide each direction by the root of its singular value.
        adjust_scaling: scale alpha with the rank, so that ``alpha / rank`` stays that of the rules.
        mask: gives the positions of a batch to use, ``(batch, sequence)``; by default those of ``attention_mask`` whose label is not
            -100. Where an input has another number of positions, all of its are used.
        passes: how often the loader is gone through at most.
        example_inputs: see :func:`lora_fx.trace`.

    Raises:
        PlanError: the rules give parts or single calls of a module branches of their own, or a loader has no batch with as many positions
            as directions are asked for.
        RuleError: see :func:`lora_fx.rewrite`.
        TraceError: the model cannot be traced.
    """
    if not (rho >= 1 and 0 <= tau <= 1 and passes >= 1):
        raise PlanError(f"expected rho ≥ 1, 0 ≤ tau ≤ 1 and passes ≥ 1, got rho={rho}, tau={tau}, passes={passes}.")
    if isinstance(model, CachedGraphs):
        raise PlanError("expected a model or one graph, got the graphs of an encoder-decoder model with a cache.")
    given = unwrapped(model)
    ruleset = load(rules, model_type_of(getattr(given, "config", None))).with_overrides(rank, alpha, dropout)
    graph_module: Any = trace_with_layers(given, layers_of(ruleset), example_inputs, inference=True)
    check_changeable(graph_module)
    base = lower(activate(graph_module, {}) if adapters(graph_module) else graph_module)
    plan = plan_graph(base, ruleset)
    run = _Decompositions.of(base, plan, rho)
    was = base.training
    base.eval()
    try:
        run.through(loader, mask or _usual_mask, tau, passes)
    finally:
        base.train(was)
    return run.start(plan, whiten=whiten, adjust_scaling=adjust_scaling)


def _usual_mask(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the positions of a batch that are no padding, and have a label if there are any."""
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    mask = None if mask is None else mask.bool()
    if labels is not None and mask is not None and labels.shape == mask.shape:
        mask = mask & (labels != -100)
    return mask


@dataclass(eq=False)  # several modules have one
class _SiteInput:
    """What the sites of some modules read, and its components so far.

    Attributes:
        nodes: that have it, one for each call.
        number: of components.
        asked: how many of them get a rank.
        found: which components stayed as they were with the last batch.
        acts: whether further batches are taken.
    """

    nodes: tuple[str, ...]
    number: int
    asked: int = 0
    components: Components | None = None
    found: torch.Tensor | None = None
    acts: bool = True

    def take(self, rows: torch.Tensor, tau: float) -> None:
        """Take the rows of one call; fewer than there are components are left out."""
        before = self.components
        if len(rows) < self.number:
            return
        with forked_random_state(seed=_SEED):  # each decomposition draws the same, as PEFT's
            self.components = extended(before, rows.to(torch.float32), self.number)
        if before is not None:
            self.found = torch.cosine_similarity(self.components.vectors, before.vectors) >= tau

    @property
    def is_found(self) -> bool:
        """Whether all components that get a rank stay as they are."""
        return not self.asked or (self.found is not None and bool(self.found[: self.asked].all()))


@dataclass
class _Decompositions:
    """Decompositions of the inputs of a graph's branches, by the modules of these."""

    graph_module: fx.GraphModule
    branches: Mapping[str, BranchSpec]
    inputs: Mapping[str, _SiteInput]
    ranks: dict[str, int]

    @classmethod
    def of(cls, graph_module: fx.GraphModule, plan: Plan, rho: float) -> _Decompositions:
        """Return a run for the branches of a plan that EVA can start."""
        position = {name: index for index, name in enumerate(state_of(graph_module).tensors)}  # PEFT's order
        nodes = {node.name: node for node in graph_module.graph.nodes}
        branches: dict[str, BranchSpec] = {}
        reads: dict[str, tuple[str, ...]] = {}
        widths: dict[str, int] = {}
        for chosen in sorted(plan.chosen, key=lambda each: position[each.site.weight]):
            site, module = chosen.site, chosen.site.module
            if not _starts(chosen):
                continue
            product = weight_op(nodes[site.node])
            assert product is not None
            branches[module], widths[module] = chosen.branches[0], site.in_features
            reads[module] = (*reads.get(module, ()), product.input.name)
        if not branches:
            raise PlanError("eva starts linear layers, and the rules give none of these a branch.")
        together: dict[tuple[str, ...], list[str]] = {}
        for module, read in reads.items():
            together.setdefault(read, []).append(module)
        most = {module: min(round(branch.setting.rank * rho), widths[module]) for module, branch in branches.items()}
        inputs = dict[str, _SiteInput]()
        for read, modules in together.items():
            number = max(most[module] for module in modules)
            inputs |= dict.fromkeys(modules, _SiteInput(read, number, number))
        return cls(graph_module, branches, inputs, {module: branch.setting.rank for module, branch in branches.items()})

    def through(
        self,
        loader: Iterable[Mapping[str, Any]],
        mask: Callable[[Mapping[str, Any]], torch.Tensor | None],
        tau: float,
        passes: int,
    ) -> None:
        """Run batches until what gets a rank stays as it is."""
        every = list(dict.fromkeys(self.inputs.values()))
        device = state_of(self.graph_module).device
        positions = 0
        for _ in range(passes):
            for given in loader:
                for each in every:
                    each.acts = not each.is_found
                if not any(each.acts for each in every):
                    return
                batch = {
                    key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in given.items()
                }
                positions = max(
                    positions, _run(self.graph_module, batch, mask(batch), [e for e in every if e.acts], tau)
                )
                if all(each.components is not None for each in every):
                    self._distribute()
        lacking = [module for module, each in self.inputs.items() if each.components is None]
        if lacking:
            raise PlanError(
                f"eva asks for {self.inputs[lacking[0]].number} directions at {listed(lacking, 3)}, and no batch has more than {positions} "
                "positions: give it larger batches, or a lower rank or rho."
            )
        open_at = [module for module, each in self.inputs.items() if not each.is_found]
        if open_at:
            warn(
                f"after {passes} passes the directions at {listed(open_at, 3)} still change by more than tau={tau:g}: they are taken as they are."
            )

    def _distribute(self) -> None:
        """Give the ranks of all modules to the directions that explain most."""
        shared: dict[_SiteInput, str] = {}
        first = {module: shared.setdefault(each, module) for module, each in self.inputs.items()}
        ordered = [m for m in first if first[m] == m] + [m for m in first if first[m] != m]
        keys, ratios = list[str](), list[torch.Tensor]()
        for module in ordered:
            components = self.inputs[module].components
            assert components is not None
            ratios.append(components.ratios)
            keys += [module] * len(components.ratios)
        best = torch.cat([each.double() for each in ratios]).argsort(descending=True)
        budget = sum(branch.setting.rank for branch in self.branches.values())
        counts = Counter(keys[index] for index in best[:budget].tolist())
        self.ranks = {module: counts[module] for module in ordered}
        for module in ordered:
            own, of_first = self.ranks[module], self.ranks[first[module]]
            if own > of_first:
                self.ranks[module], self.ranks[first[module]] = of_first, own
        for module in ordered:
            if first[module] == module:
                self.inputs[module].asked = self.ranks[module]

    def start(self, plan: Plan, *, whiten: bool, adjust_scaling: bool) -> EvaStart:
        """Return the first factors, and the rules of a plan with their ranks."""
        factors, settings = dict[str, torch.Tensor](), dict[str, BranchSpec]()
        for module, branch in self.branches.items():
            rank, components = self.ranks[module], self.inputs[module].components
            if rank == 0 or components is None:
                continue
            vectors = components.vectors[:rank]
            factors[module] = (vectors / components.values[:rank].sqrt().view(-1, 1) if whiten else vectors).float()
            alpha = branch.setting.alpha * (rank / branch.setting.rank if adjust_scaling else 1)
            setting = replace(branch.setting, rank=rank, rule_rank=None, alpha=alpha, init="kaiming")
            settings[module] = replace(branch, setting=setting)
        others = {c.site.module: c.branches[0] for c in plan.chosen if c.site.module not in self.branches}
        rules = _with_ranks(plan.rules, {**settings, **others})
        return EvaStart(rules, {module: self.ranks[module] for module in self.branches}, factors)


def _starts(chosen: Chosen) -> bool:
    """Tell whether EVA starts the branch at a site: a linear layer's, with factors of its own.

    Raises:
        PlanError: its module has several branches.
    """
    branch = chosen.branches[0]
    if len(chosen.branches) > 1 or branch.features is not None or "@" in branch.owner:
        raise PlanError(f"{branch.key}: eva takes whole modules, and this is a part of one, or one of its calls.")
    return branch.op == "linear" and branch.mirrors is None and not is_bare(chosen.site)


def _run(
    graph_module: fx.GraphModule,
    batch: Mapping[str, Any],
    mask: torch.Tensor | None,
    inputs: Iterable[_SiteInput],
    tau: float,
) -> int:
    """Run a batch through a graph, and hand what its nodes compute to the inputs; return the most rows that one has."""
    readers: dict[str, list[_SiteInput]] = {}
    for each in inputs:
        for name in each.nodes:
            readers.setdefault(name, []).append(each)
    counts = [0]

    class Reading(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            for each in readers.get(n.name, ()):
                rows = value.reshape(-1, value.shape[-1])
                kept = rows[mask.flatten()] if mask is not None and mask.numel() == len(rows) else rows
                counts.append(len(kept))
                each.take(kept, tau)
            return value

    signature = signature_of(graph_module.graph)
    taken = {key: value for key, value in batch.items() if key != "labels" or "labels" in signature.inputs}
    with torch.no_grad():
        Reading(graph_module).run(*signature.tensors((), taken))
    return max(counts)


def _with_ranks(rules: Rules, branches: Mapping[str, BranchSpec]) -> Rules:
    """Return rules that give these branches, by their modules, and train what they trained besides."""
    settings = {module: branch.setting for module, branch in branches.items()}
    if isinstance(rules, PeftRules):
        config = rules.config
        said = {
            "target_modules": tuple(settings),
            "rank_pattern": patterns({m: float(s.rank) for m, s in settings.items()}, config.r),
            "alpha_pattern": patterns({m: s.alpha for m, s in settings.items()}, config.lora_alpha),
            "init_lora_weights": True,
        }
        return replace(rules, config=config.model_copy(update=said))
    together: dict[tuple[Any, ...], list[str]] = {}
    for module, setting in settings.items():
        together.setdefault(tuple(sorted(_said_of(setting).items(), key=str)), []).append(module)
    selections = [
        Selection(regex="|".join(map(re.escape, modules)), **dict(said)) for said, modules in together.items()
    ]
    trained = [each for each in rules.select if each.trainable is not None]
    return rules.model_copy(update={"select": (*trained, *selections)})


def _said_of(setting: Any) -> dict[str, Any]:
    """Return a setting by the keys of a selection."""
    keys = [key for key in Defaults.model_fields if key != "invocation_tokens" or setting.invocation_tokens]
    return {key: getattr(setting, key) for key in keys}
