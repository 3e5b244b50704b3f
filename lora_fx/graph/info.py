"""The typed record that a graph carries of itself: where it comes from, its adapters, and the weights that a fold merged.

It lies in ``meta`` of the graph module, so that it lives through copies and pickling with the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from lora_fx.errors import PlanError
from lora_fx.graph.example_sizes import Examples
from lora_fx.graph.layers import Checkpointing
from lora_fx.graph.prefix_slot import PrefixSlot
from lora_fx.graph.process_sums import RankShards
from lora_fx.graph.records import BranchSpec, Origin, ParameterModule, PrefixSpec, TaskHead, TokenRows
from lora_fx.numerics.lowrank_merge import Merge
from lora_fx.rules.peft_config.config import LayerMap

RuledBranches = Mapping[str, tuple[str, BranchSpec]]
"""The branches of one adapter by their keys, each behind the rule that chose it."""

CHECKPOINTING_SPELLING = frozenset(
    {
        "activation_checkpointing_disable",
        "activation_checkpointing_enable",
        "gradient_checkpointing_disable",
        "gradient_checkpointing_enable",
    }
)
"""Names of the methods of all graphs, also of those of models that are not of transformers."""

EMBEDDINGS = frozenset({"get_input_embeddings", "get_output_embeddings"})
"""Names of methods that a flat graph has alone."""

PEFT_SPELLING = CHECKPOINTING_SPELLING | frozenset(
    {
        "add_model_tags",
        "base_model",
        "can_generate",
        "generate",
        "get_input_embeddings",
        "get_nb_trainable_parameters",
        "get_output_embeddings",
        "load_adapter",
        "merge_and_unload",
        "num_parameters",
        "print_trainable_parameters",
        "save_pretrained",
        "set_adapter",
    }
)
"""Names of the methods of a graph that are functions of ``lora_fx.methods``."""

_KEY = "lora_fx"


@dataclass(frozen=True)
class AdapterRecord:
    """Everything known of an adapter besides its parameters.

    Attributes:
        branches: by their keys, each behind the rule that chose it; enough to write its nodes again.
        origin: where it comes from.
        skipped: sites without a branch, each with the reason.
        acts: whether its branches are nodes of the graph, and its trained copies are read.
        trains: names of its parameters that train while it acts. Of an adapter that acts in a graph that trains, the parameters
            themselves tell, by ``requires_grad``.
        untied: names of tied parameters of which it has a trained copy for the module of that name alone.
        tokens: rows of embeddings for which it has values of its own.
        prefix: learned keys and values in front of those of attentions.
    """

    branches: RuledBranches
    origin: Origin = field(default_factory=Origin)
    skipped: Mapping[str, str] = field(default_factory=dict)
    acts: bool = True
    trains: frozenset[str] = frozenset()
    untied: frozenset[str] = frozenset()
    tokens: tuple[TokenRows, ...] = ()
    prefix: PrefixSpec | None = None

    @property
    def strength(self) -> float:
        """The factor of its scaling, the same at all branches; 1 where it has none."""
        return next((branch.setting.strength for _, branch in self.branches.values()), 1.0)

    def at_strength(self, strength: float) -> AdapterRecord:
        """Return the record with another factor of its scaling."""
        branches = {
            key: (rule, replace(branch, setting=replace(branch.setting, strength=strength)))
            for key, (rule, branch) in self.branches.items()
        }
        return replace(self, branches=branches)


@dataclass(frozen=True)
class GraphInfo:
    """Everything known of a graph besides its nodes and tensors. The defaults are those of a graph that lora_fx did not trace.

    Attributes:
        inference: traced in eval mode alone, so that nothing in it trains.
        labels: traced with labels, for training.
        part: ``"encoder"``, ``"first"`` or ``"later"``: which of the graphs of an encoder-decoder model with a cache; empty for a whole
            model.
        constants: inputs of the trace that are no tensors, by their names.
        model_class: of the model that was traced, as ``module:qualified.name``.
        pretrained: whether the model is a ``transformers.PreTrainedModel``.
        config: of the transformers model that was traced, a copy of its own.
        generation_config: of that model, a copy of its own; None if it cannot generate.
        head: the task head of that model.
        linears: the modules of that model that PEFT's ``all-linear`` means, by their paths.
        tags: for the model card of the merged model.
        pad_token: ``pad_token_id`` of the config when it was traced.
        main_input: name of the input by whose size transformers counts operations, that model's ``main_input_name``.
        embeddings: names of the weights of its ``nn.Embedding`` modules.
        parameter_modules: the modules of the model whose weights PEFT adapts as parameters alone, by their paths.
        second_names: paths of modules that the model has under another path before, which is the value; PEFT wraps them there alone.
        layers: ranges of layers that the model has one after the other, if PEFT's ``layer_replication`` made it; else none.
        vocabulary: the modules of the input and the output embedding of that model, by their paths.
        loss_type: of that model, as transformers names losses.
        examples: the inputs of the trace.
        statistics: of the model's batch norms as it was traced, by their names; copies.
        adapters: those that lora_fx added, in that order.
        folded: the merges of the fold that made the graph.
        merged: names of all parameters that folds changed, also earlier ones.
        consumed: folded in place, so that its weights hold its branches already.
        prefix_slot: of a graph that can take prefixes.
        nested: whether the code is in layers.
        by_row: the adapters among which a call chooses for each row of the batch; empty where all rows have the same.
        checkpointing: how layers of a nested graph are computed again in the backward pass; None where none are.
        shards: the share of this process where several compute parts of the graph (tensor parallelism); None where one computes all.
    """

    inference: bool = True
    labels: bool = False
    part: str = ""
    constants: Mapping[str, Any] = field(default_factory=dict)
    model_class: str = ""
    pretrained: bool = False
    config: Any = None
    generation_config: Any = None
    head: TaskHead = field(default_factory=TaskHead)
    linears: tuple[str, ...] = ()
    second_names: Mapping[str, str] = field(default_factory=dict)
    layers: LayerMap = ()
    vocabulary: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    pad_token: int | None = None
    main_input: str = "input_ids"
    embeddings: frozenset[str] = frozenset()
    parameter_modules: Mapping[str, ParameterModule] = field(default_factory=dict)
    loss_type: str | None = None
    examples: Examples | None = None
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    adapters: Mapping[str, AdapterRecord] = field(default_factory=dict)
    folded: tuple[Merge, ...] = ()
    merged: tuple[str, ...] = ()
    consumed: bool = False
    prefix_slot: PrefixSlot | None = None
    nested: bool = False
    by_row: tuple[str, ...] = ()
    checkpointing: Checkpointing | None = None
    shards: RankShards | None = None

    @property
    def flat(self) -> GraphInfo:
        """The record of the same graph when its code is not in layers."""
        return replace(self, nested=False, checkpointing=None)

    @property
    def class_name(self) -> str:
        """Name of the class of the model that was traced; ``"GraphModule"`` where that is not known, or was a graph."""
        name = self.model_class.rpartition(":")[2].rpartition(".")[2]
        return "GraphModule" if not name or name.startswith("GraphModule") else name


def info_of(graph_module: fx.GraphModule) -> GraphInfo:
    """Return the record of a graph.

    Raises:
        PlanError: the graph has none: lora_fx did not make it.
    """
    info = _record(graph_module)
    if info is None:
        raise PlanError(
            f"expected a graph that lora_fx made, got a {type(graph_module).__name__} without its record: "
            f"{held_graphs(graph_module) or 'make one with lora_fx.trace'}."
        )
    return info


def known_info(graph_module: nn.Module) -> GraphInfo:
    """Return the record of a graph, or an empty one if it is foreign."""
    return _record(graph_module) or GraphInfo()


def check_same_for_all_rows(graph_module: nn.Module) -> None:
    """Raise :class:`PlanError` for a graph that takes the adapter of each row, which is for calls alone."""
    adapters = known_info(graph_module).by_row
    if adapters:
        raise PlanError(
            f"expected a graph whose adapters act in all rows, got one that takes adapter_names ({', '.join(adapters)}), which is for calls "
            "alone. Pass the graph from which lora_fx.activate_by_row made it; it has the same parameters."
        )


def check_module(value: object) -> None:
    """Raise :class:`PlanError` for anything but a module, such as an object that holds several graphs."""
    if not isinstance(value, nn.Module):
        raise PlanError(
            f"expected a graph or another module, got a {type(value).__name__}: "
            f"{held_graphs(value) or 'make a graph with lora_fx.trace'}."
        )


def held_graphs(value: object) -> str:
    """Return advice to pass a graph that an object holds: a wrapper of one, or the graphs of a model; nothing if it holds none."""
    held = [*getattr(value, "__dict__", {}).items(), *getattr(value, "_modules", {}).items()]
    graphs = [name for name, each in held if _record(each) is not None]
    if len(graphs) == 1:
        return f"it wraps one, which is its attribute {graphs[0]!r}: pass that"
    return f"pass one of its graphs: {', '.join(graphs)}" if graphs else ""


def _record(module: Any) -> GraphInfo | None:
    """Return the record of a graph; None for a foreign one, and for a module that is no graph."""
    meta = getattr(module, "meta", None)  # what wraps a graph answers for it
    info = meta.get(_KEY) if isinstance(meta, dict) else None
    return info if isinstance(info, GraphInfo) else None


def with_info(meta: Mapping[str, Any], info: GraphInfo) -> dict[str, Any]:
    """Return the ``meta`` of a graph module with another record."""
    return {**meta, _KEY: info}
