"""An adapter of a graph in PEFT's words: its config, and its tensors under PEFT's keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from lora_fx.adapters.peft_format.keys import (
    Slot,
    apart_from_calls,
    base_key,
    module_of_key,
    slots,
    token_key,
    without_factors,
)
from lora_fx.adapters.peft_format.prefix_files import beside_prefix, in_peft_words
from lora_fx.adapters.peft_format.stacks import StackLayout, is_transposed, written_layout
from lora_fx.adapters.recorded import (
    branches_of,
    origin_of,
    record_of,
    tensors_of,
    trained_of,
)
from lora_fx.errors import AdapterError, warn
from lora_fx.graph.adapter_names import copy_name, is_of_adapter, original_name, token_names
from lora_fx.graph.graph_module import TracedGraphModule, state_of
from lora_fx.graph.info import info_of
from lora_fx.graph.provenance import called_modules
from lora_fx.graph.records import BranchSpec
from lora_fx.numerics.lowrank_merge import concatenated, with_all_rows
from lora_fx.planning.attention_projections import why_not_together
from lora_fx.planning.peft_tokens import Vocabulary
from lora_fx.planning.plan import owners_of
from lora_fx.rules.peft_config.config import AdapterConfig, trains_bias
from lora_fx.rules.peft_config.name_matching import modules_of
from lora_fx.rules.peft_config.prefix_config import AheadConfig
from lora_fx.rules.peft_config.target_names import TrainedParts, alpha_of, patterns, targets, trained_parts
from lora_fx.rules.vocabulary import Start, splits_weight
from lora_fx.sites.call_sites import Site, attention_of, is_bare, is_idle, parameter_of, sites


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter as PEFT has it.

    Attributes:
        config: its ``adapter_config.json``.
        tensors: by PEFT's keys.
    """

    config: AdapterConfig | AheadConfig
    tensors: Mapping[str, torch.Tensor]


def to_peft(graph_module: TracedGraphModule, adapter: str) -> PeftAdapter:
    """Return an adapter of a graph as PEFT has it.

    Raises:
        PlanError: the graph has no such adapter.
        AdapterError: PEFT has no words for it; all problems are named.
    """
    return _PeftWriter(graph_module, adapter).peft_adapter()


class _PeftWriter:
    """Says in PEFT's words what an adapter is, and collects what cannot be said."""

    def __init__(self, graph_module: TracedGraphModule, adapter: str) -> None:
        self._graph_module, self._adapter = graph_module, adapter
        self._state = state_of(graph_module)
        self._first = self._state.aliases()
        self._own = {name: tensor for name, tensor in self._state.tensors.items() if not is_of_adapter(name)}
        self._branches: dict[str, list[BranchSpec]] = {}
        for _, branch in branches_of(graph_module, adapter).values():
            self._branches.setdefault(branch.owner, []).append(branch)
        self._problems: list[str] = []

    def peft_adapter(self) -> PeftAdapter:
        site_of = {owner: site for site in sites(self._graph_module) for owner in owners_of(site)}
        chosen = [site_of[owner] for owner in self._branches]
        attentions = self._attentions(chosen)
        weights, apart = self._named_weights([site for site in chosen if site.module not in attentions])
        apart |= apart_from_calls(self._graph_module, attentions, (), attentions)
        placed = slots(chosen, self._own, weights, self._layouts(chosen, weights), attentions)
        tensors: dict[str, torch.Tensor] = {}
        settings: dict[str, tuple[int, float]] = {}
        for owner, branches in self._branches.items():
            slot = placed[site_of[owner].module]
            if slot.site.kernel and slot.site.matrices > 1:
                self._problems.append(
                    f"{owner}: a convolution in groups, each with an update of its own, and PEFT's mixes them"
                )
            if slot.is_parameter and "." not in slot.name:
                self._problems.append(f"{owner}: a parameter of the top-level module, at which PEFT has no branches")
            if owner != owners_of(slot.site)[0]:
                self._problems.append(
                    f"{owner}: a branch of one of several calls of a module, and PEFT has one branch for all of them"
                )
                continue
            tensors |= dict(zip(slot.keys, slot.of_file(*self._dense(branches, slot.site)), strict=True))
            (first, *_) = branches
            vectors = [self._state.tensors[name].detach() for name in first.parameters(self._adapter)[2:]]
            tensors |= dict(zip(slot.vectors(first), vectors, strict=True))
            settings[slot.name] = (sum(branch.added.rank for branch in branches), self._scale(owner))
        self._problems += [*self._second_names(chosen), *_parameters_beside_conv1d(placed.values())]
        self._problems += [*apart.values(), *_unlike_variants([b for each in self._branches.values() for b in each])]
        indices, rows = self._tokens(chosen)
        adapted = [slot.site.module for slot in placed.values() if slot.is_module]
        parts = self._trained(adapted)
        if attentions and parts.bias == "all":
            self._problems.append(
                "all biases train, and PEFT has other keys for those of an nn.MultiheadAttention: not supported"
            )
        if self._problems:
            raise AdapterError(f"adapter {self._adapter!r} cannot be written for PEFT", self._problems)
        branches = [branch for each in self._branches.values() for branch in each]
        config = _config(self._graph_module, self._adapter, branches, placed, settings)
        config = config.model_copy(update={"bias": parts.bias, "modules_to_save": parts.modules or None})
        names_of, trained = self._state.names(), trained_of(self._graph_module, self._adapter)
        tied = [names_of[each.name] for each in trained if not each.untied and len(names_of[each.name]) > 1]
        as_one = any(config.saves_any(name) for names in tied for name in names)
        as_one = as_one or any(branch.mirrors is not None for branch in branches)
        config = config.model_copy(update={"ensure_weight_tying": as_one, "trainable_token_indices": indices})
        if (
            origin_of(self._graph_module, self._adapter).method == "TRAINABLE_TOKENS"
            and not self._branches
            and not trained
        ):
            return self._rows_alone(config, rows)
        copies, prefix = self._copies(config, adapted), record_of(self._graph_module, self._adapter).prefix
        if prefix is None:
            return PeftAdapter(config, {**tensors, **copies, **rows})
        if tensors or rows or config.bias != "none":
            problem = f"beside a {prefix.kind} it has branches, rows of embeddings or biases that train: PEFT has modules alone"
            raise AdapterError(f"adapter {self._adapter!r} cannot be written for PEFT", [problem])
        said = in_peft_words(config, prefix, info_of(self._graph_module), self._adapter, self._state.tensors)
        return PeftAdapter(said[0], {**beside_prefix(copies), **said[1]})

    def _second_names(self, chosen: Collection[Site]) -> list[str]:
        """Return why branches at second names of modules cannot be written: PEFT walks over each module once, by its first name."""
        first = info_of(self._graph_module).second_names
        return [
            f"{name}: a second name of the module {first[name]!r}, and PEFT wraps that name alone; adapt {first[name]!r} alone, or give "
            f"{name!r} a module of its own with the same weights"
            for name in dict.fromkeys(site.module for site in chosen)
            if name in first
        ]

    def _rows_alone(self, config: AdapterConfig, rows: Mapping[str, torch.Tensor]) -> PeftAdapter:
        """Return an adapter of rows of embeddings as one of trainable tokens alone, whose file has them for each module that they are of."""
        tokens = record_of(self._graph_module, self._adapter).tokens
        chosen = {module_of_key(key): value for key, value in rows.items()}
        tensors: dict[str, torch.Tensor] = {}
        for module, value in chosen.items():
            together = self._state.names()[self._first[f"{module}.weight"]]
            alone = any(each.alone for each in tokens if each.module == module)
            modules = [module] if alone else [name.removesuffix(".weight") for name in together]
            tensors |= {without_factors(token_key(each)): value for each in modules}
        named = targets(list(chosen), sorted(module_paths(self._graph_module) - chosen.keys()))
        said = {"peft_type": "TRAINABLE_TOKENS", "target_modules": named, "trainable_token_indices": tokens[0].rows}
        return PeftAdapter(config.model_copy(update=said), tensors)

    def _attentions(self, chosen: Collection[Site]) -> dict[str, str]:
        """Return the sites that PEFT adapts as parts of an ``nn.MultiheadAttention``, by their modules, with its path.

        Its ``in_proj_weight`` alone is a parameter to PEFT, as any other.
        """
        modules = info_of(self._graph_module).parameter_modules
        owners = {site.module: owner for site in chosen if (owner := attention_of(site, modules))}
        outputs = {owners[site.module]: site for site in chosen if is_idle(site, modules)}
        inputs = {owners[site.module]: site for site in chosen if site.module in owners and is_bare(site)}
        for owner, output in outputs.items():
            given = [self._branches[owners_of(each)[0]] if each else () for each in (inputs.get(owner), output)]
            reason = why_not_together(*given)
            if reason:
                self._problems.append(f"{output.module}: {reason}")
        return {module: owner for module, owner in owners.items() if owner in outputs}

    def _named_weights(self, chosen: Collection[Site]) -> tuple[set[str], dict[str, str]]:
        """Return the modules to adapt by their weights, and where PEFT cannot adapt.

        They are of classes that PEFT has no layer for, or compute more than the product.
        """
        modules = {site.module: site for site in chosen}
        apart = apart_from_calls(self._graph_module, modules)
        known = info_of(self._graph_module).parameter_modules
        matrices = {
            name
            for name, site in modules.items()
            if not is_bare(site) and not site.kernel and (name in apart or name in known)
        }
        as_weights = apart_from_calls(self._graph_module, matrices, matrices) if matrices else {}
        weights = matrices - as_weights.keys()
        missing = {name: as_weights[name] for name in matrices if name not in weights and name not in apart}
        return weights, {**{module: reason for module, reason in apart.items() if module not in weights}, **missing}

    def _layouts(self, chosen: Collection[Site], weights: Collection[str]) -> dict[str, StackLayout]:
        """Return the layout that PEFT has for the factors at each stack of matrices, by the name of the stack."""
        found: dict[str, StackLayout] = {}
        for site in chosen:
            if site.op != "expert" or not (is_bare(site) or site.module in weights):
                continue
            name = parameter_of(site)
            transposed = is_transposed(site, info_of(self._graph_module).parameter_modules.get(name.rpartition(".")[0]))
            if transposed is None:
                self._problems.append(
                    f"{name}: a stack of matrices stored (in, out), for which PEFT goes by is_transposed of its module, which the "
                    "graph does not know. Trace the model itself"
                )
            elif site.matrices > 1:
                found[name] = written_layout(PEFT_VERSION, transposed=transposed)
            elif transposed and site.in_features != site.out_features:
                self._problems.append(
                    f"{name}: a stack of one matrix that is_transposed, to which PEFT cannot add an update"
                )
        return found

    def _scale(self, owner: str) -> float:
        scales = sorted({branch.setting.scale for branch in self._branches[owner]})
        if len(scales) > 1:
            told = ", ".join(f"{scale:g}" for scale in scales)
            self._problems.append(f"{owner}: its parts have the scalings {told}, and PEFT has one for all of a module")
        return scales[0]

    def _dense(self, branches: Collection[BranchSpec], site: Site) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B of one branch for all output features that does what those of parts do together."""
        pairs = []
        for branch in branches:
            a, b = branch.factors(self._adapter, self._state.tensors)
            pairs.append((a, with_all_rows(b, branch.features, site.out_features)))
        a, b = pairs[0] if len(pairs) == 1 else concatenated(pairs)
        return a.contiguous(), b.contiguous()

    def _trained(self, adapted: Collection[str]) -> TrainedParts:
        trained = trained_of(self._graph_module, self._adapter)
        together, alone = ({each.name for each in trained if each.untied is untied} for untied in (False, True))
        nodes = self._graph_module.graph.find_nodes(op="get_attr")
        read = {original_name(str(node.target)) or str(node.target) for node in nodes}
        names = [name for name, tensor in self._own.items() if isinstance(tensor, nn.Parameter)]
        unread = {name for name in names if self._first[name] not in read}
        try:
            own = {name for name in names if name in alone or self._first[name] in together}
            # A list of modules is not called, and has no parameters of its own: PEFT takes its items.
            modules = called_modules(self._graph_module) | {name.rpartition(".")[0] for name in names}
            return trained_parts(own, names, unread, adapted, modules)
        except ValueError as error:
            self._problems.append(
                f"{error}: trains, and PEFT trains all biases, those of adapted modules, or whole modules"
            )
            return TrainedParts("none", ())

    def _tokens(self, chosen: Collection[Site]) -> tuple[object, dict[str, torch.Tensor]]:
        """Return the rows of embeddings that have values, as PEFT's config has them, and the values by their keys."""
        vocabulary = Vocabulary.of(info_of(self._graph_module))
        adapted = {self._first[site.weight] for site in chosen}
        indices: dict[str, tuple[int, ...]] = {}
        values: dict[str, torch.Tensor] = {}
        for each in record_of(self._graph_module, self._adapter).tokens:
            first, module = self._first[each.weight], each.module
            names = self._state.names()[first]
            if not each.alone and vocabulary.tied and f"{vocabulary.embedding}.weight" in names:
                module = str(vocabulary.embedding)
            elif not each.alone and len(names) > 1:
                self._problems.append(
                    f"{module}: rows of a weight that its config does not tie, and PEFT would give them to {module} alone"
                )
            if first in adapted:
                self._problems.append(
                    f"{module}: rows of its weight beside a branch, and PEFT has one of the two at an embedding"
                )
            indices[module] = each.rows
            values[token_key(module)] = self._state.tensors[token_names(each.module, self._adapter)[0]]
        alone = list(indices) == [vocabulary.embedding]
        return indices[str(vocabulary.embedding)] if alone else indices or None, values

    def _copies(self, config: AdapterConfig, adapted: Collection[str]) -> dict[str, torch.Tensor]:
        """Return what PEFT keeps of the model's own tensors: trained parameters, and all else in the modules that train."""
        copies = tensors_of(self._graph_module, [self._adapter])
        kept = {}
        for name, tensor in self._own.items():
            saved = config.saves_any(name) and name not in self._state.non_persistent
            if saved or (isinstance(tensor, nn.Parameter) and trains_bias(config, name, adapted)):
                key = base_key(name, () if saved else adapted)
                shared = copies.get(copy_name(self._first[name], self._adapter), tensor)
                kept[key] = copies.get(copy_name(name, self._adapter), shared)
        return kept


def _unlike_variants(branches: Collection[BranchSpec]) -> Iterator[str]:
    """Yield why PEFT has no words for the kinds of some branches: it has one for all."""
    for what, given in (
        ("DoRA", {branch.setting.variant == "dora" for branch in branches}),
        ("a bias in B", {branch.setting.bias for branch in branches}),
        ("these invocation tokens", {branch.setting.invocation_tokens for branch in branches}),
    ):
        if len(given) > 1:
            yield f"some of its branches have {what} and others not, and PEFT has one kind for all. Make two adapters of it"


def _parameters_beside_conv1d(placed: Collection[Slot]) -> Iterator[str]:
    """Yield why parameters cannot be adapted beside Conv1D layers alone: PEFT sets ``fan_in_fan_out`` there, which its ParamWrapper refuses."""
    parameters = [slot.name for slot in placed if slot.is_parameter]
    if parameters and _stored_in_out(placed):
        yield (
            f"{', '.join(parameters)}: adapted as a parameter beside layers stored (in, out) such as Conv1D, which PEFT refuses in one "
            "adapter (fan_in_fan_out). Make two adapters of it"
        )


def _stored_in_out(placed: Collection[Slot]) -> bool:
    """Tell whether all adapted linears are modules whose weight is ``(in, out)``: PEFT's ``fan_in_fan_out``."""
    linear = [slot for slot in placed if not slot.is_parameter and slot.site.op == "linear"]
    return bool(linear) and all(slot.site.layout == "in_out" for slot in linear)


def _config(
    graph_module: TracedGraphModule,
    adapter: str,
    branches: Collection[BranchSpec],
    placed: Mapping[str, Slot],
    settings: Mapping[str, tuple[int, float]],
) -> AdapterConfig:
    origin = origin_of(graph_module, adapter)
    rslora = bool(branches) and all(branch.setting.scaling == "rslora" for branch in branches)
    ranks = {name: float(rank) for name, (rank, _) in settings.items()}
    alphas = {name: alpha_of(rank, scale, rslora=rslora) for name, (rank, scale) in settings.items()}
    rank, alpha = _most_common(ranks.values(), 8.0), _most_common(alphas.values(), 8.0)
    dropouts = _dropouts(adapter, branches, placed.values())
    modules = list(dict.fromkeys(slot.name for slot in placed.values() if not slot.is_parameter))
    parameters = tuple(slot.name for slot in placed.values() if slot.is_parameter)
    if len(dropouts) > 1 and not parameters:
        told = ", ".join(f"{dropout:g}" for dropout in sorted(dropouts))
        warn(
            f"adapter {adapter!r} trains with the dropouts {told}; PEFT has one for all, and {max(dropouts):g} is written. What the adapter "
            "computes in evaluation is the same.",
        )
    dropout = max(dropouts, default=0.0)
    if parameters and dropout:
        warn(
            f"adapter {adapter!r} trains with a dropout of {dropout:g}; PEFT has none where it adapts a parameter, and 0 is written. What the "
            "adapter computes in evaluation is the same.",
        )
        dropout = 0.0
    others = sorted(module_paths(graph_module) - set(modules))
    info = info_of(graph_module)
    library, _, class_name = info.model_class.partition(":")
    starts = {branch.added.init for branch in branches}
    mapping = {"base_model_class": class_name, "parent_library": library} if class_name else None
    return AdapterConfig(
        peft_type="LORA",
        layer_replication=info.layers or None,
        r=int(rank),
        lora_alpha=alpha,
        rank_pattern={name: int(value) for name, value in patterns(ranks, rank).items()},
        alpha_pattern=patterns(alphas, alpha),
        use_rslora=rslora,
        use_dora=any(branch.setting.variant == "dora" for branch in branches),
        lora_bias=any(branch.setting.bias for branch in branches),
        alora_invocation_tokens=next((b.setting.invocation_tokens for b in branches), ()) or None,
        lora_dropout=dropout,
        target_modules=targets(modules, others) if modules or not parameters else None,
        target_parameters=parameters or None,
        init_lora_weights=_start_text(starts),
        fan_in_fan_out=_stored_in_out(placed.values()),
        inference_mode=True,
        task_type=origin.task_type,
        auto_mapping=None if origin.task_type else mapping,
        base_model_name_or_path=origin.base or getattr(info.config, "name_or_path", None) or None,
        revision=origin.revision,
        peft_version=PEFT_VERSION,
    )


def _dropouts(adapter: str, branches: Collection[BranchSpec], placed: Iterable[Slot]) -> Counter[float]:
    """Count the dropouts of branches, but for those in an ``nn.MultiheadAttention``, where PEFT has none; warn where one is there."""
    in_attention = {owners_of(slot.site)[0] for slot in placed if slot.in_attention}
    if any(branch.setting.dropout for branch in branches if branch.owner in in_attention):
        warn(
            f"adapter {adapter!r} trains with a dropout in an nn.MultiheadAttention, where PEFT has none. What the adapter computes in "
            "evaluation is the same.",
        )
    return Counter(branch.setting.dropout for branch in branches if branch.owner not in in_attention)


def _start_text(starts: Collection[Start]) -> bool | str:
    """Return how the branches started, in PEFT's words; its default where they did not all start alike."""
    (start,) = starts if len(starts) == 1 else ("kaiming",)
    return True if start == "kaiming" or splits_weight(start) else False if start == "random" else start


PEFT_VERSION = "0.21.2"
"""The version whose format is written."""


def _most_common(values: Collection[float], default: float) -> float:
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], -value)) if counts else default


def module_paths(graph_module: fx.GraphModule) -> set[str]:
    """Return the paths of the model's modules, as far as tensors and nodes tell."""
    paths = {path for name in state_of(graph_module).tensors if not is_of_adapter(name) for path in modules_of(name)}
    return (paths | called_modules(graph_module)) - {""}
