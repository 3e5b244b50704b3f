"""Export with slots: branches take their factors from optional inputs, so that one ONNX model runs with any adapter.

    y = base(x) + scaling · B(A(x))         A (rank, in) and B (out, rank), of any rank; by default rank 0, which adds zero

A site has one slot, whatever its branches: those for parts of a fused projection become one for all features. The inputs get
their defaults last, since an optimiser would take the defaults for constants.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from lora_fx.adapters.attach import attach
from lora_fx.adapters.peft_format.fingerprint import fingerprint
from lora_fx.adapters.peft_format.keys import apart_from_calls
from lora_fx.adapters.recorded import branches_of, plan_branches, record_of, trained_of
from lora_fx.branches.remove import unload
from lora_fx.errors import ExportError, option
from lora_fx.export.onnx_ops import onnx_package
from lora_fx.export.prepare import Exportable
from lora_fx.export.slot_table import KEY, OnnxSlot, SlotTable
from lora_fx.export.trial_inputs import larger_examples
from lora_fx.graph.adapter_names import adapters
from lora_fx.graph.example_sizes import Examples
from lora_fx.graph.graph_module import TracedGraphModule, as_traced, state_of
from lora_fx.graph.provenance import stamp_of
from lora_fx.graph.records import BranchSpec, Origin
from lora_fx.graph.size_relations import UNBOUNDED
from lora_fx.planning.plan import Chosen, Plan, factor_shapes, owners_of
from lora_fx.rules.rule_file import Setting
from lora_fx.sites.call_sites import sites

NAME = "slot"
"""Name of the made-up adapter with which slots are tried."""

RANK, SCALE = 3, 1.5
"""Rank and scale of its branches."""


@dataclass(frozen=True)
class Slots:
    """A graph prepared for an export with slots.

    Attributes:
        base: the graph without its adapters.
        probe: the same with one branch at each future slot, with factors that change every output.
        table: the slots.
        site_of: the slot of each call site, by the site's name.
    """

    base: TracedGraphModule
    probe: TracedGraphModule
    table: SlotTable
    site_of: Mapping[str, OnnxSlot]

    @staticmethod
    def of(graph_module: TracedGraphModule) -> Slots:
        """Return the slots of a branched graph: one for each site at which one of its adapters has a branch.

        Raises:
            ExportError: it has no adapters, or branches that no slot takes; all of them are named.
        """
        graph_module = as_traced(graph_module)
        if not adapters(graph_module):
            raise ExportError(
                f"{option('slots=True', '--slots')} gives every site with a branch a slot, but the graph has no branches. Choose sites by rules: "
                f"{option('lora_fx.rewrite(model, rules=…); the values of the branches do not matter', '--rules')}."
            )
        owners = dict.fromkeys(
            branch.owner for name in adapters(graph_module) for _, branch in branches_of(graph_module, name).values()
        )
        check_slots(graph_module, adapters(graph_module))
        base = unload(graph_module)
        setting = Setting(RANK, RANK * SCALE, 0.0)
        branches = {owner: ("slots", BranchSpec(owner, setting)) for owner in owners}
        plan = plan_branches(base, NAME, branches, (), origin=Origin())
        probe = attach(base, plan, adapter=NAME, values=dict(_probing(plan, base)))
        site_of = _slots(plan, base)
        table = SlotTable(tuple(dict.fromkeys(site_of.values())), fingerprint(state_of(base)))
        return Slots(base, probe, table, site_of)

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """The values of the probe for the slots, by the names of their inputs, in the order of the table."""
        found: dict[str, torch.Tensor] = {}
        for slot in self.table.slots:
            a, b = (self.probe.get_parameter(name).detach() for name in _factors(slot))
            found |= dict(zip(slot.names, (a, b, a.new_tensor([SCALE])), strict=True))
        return found

    def as_inputs(self, exportable: Exportable) -> Exportable:
        """Return the probe with the inputs of the slots appended to its own, under names that are valid in Python."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(exportable.plain.graph, {}))
        taken = {str(node.target) for node in graph.find_nodes(op="get_attr")} | {
            *exportable.inputs,
            *exportable.file_names.values(),
            *exportable.outputs,
        }
        clash = sorted(taken & self.table.names)
        if clash:
            raise ExportError(
                f"the model has a tensor, an input or an output {clash[0]!r}, which is the name of an input of a slot. Rename it."
            )
        given = _argument_names(self.table, exportable.inputs)
        nodes = _placeholders(graph, given)
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor):
            stamp = stamp_of(node)
            if (stamp.get("adapter"), stamp.get("part")) == (NAME, "scale"):
                node.update_arg(1, nodes[self.site_of[stamp["site"]].scaling])
        for slot in self.table.slots:
            for factor, name in zip(_factors(slot), slot.names[:2], strict=True):
                for node in graph.find_nodes(op="get_attr", target=factor):
                    node.replace_all_uses_with(nodes[name])
                    graph.erase_node(node)
        graph.lint()
        plain = fx.GraphModule(exportable.plain, graph, class_name="GraphModule").eval()
        return self._with_slot_inputs(replace(exportable, plain=plain), given)

    def _with_slot_inputs(self, exportable: Exportable, given: Mapping[str, str]) -> Exportable:
        """Add the inputs of the slots to constraints and examples: fixed widths, and one axis for the rank of each slot."""
        constraints = exportable.constraints
        tensors, axes = dict(larger_examples(exportable)), dict(exportable.examples.axes)
        ranges, dtypes = dict(constraints.ranges), dict(constraints.dtypes)
        values = self.values
        for slot in self.table.slots:
            axis = f"{slot.site}.rank"
            for name, dims in zip(slot.names, ((axis, None), (None, axis), (None,)), strict=True):
                argument, value = given[name], values[name]
                tensors[argument], axes[argument], dtypes[argument] = value, dims, value.dtype
                ranges[argument] = tuple(
                    (size, size) if dim is None else (0, UNBOUNDED) for dim, size in zip(dims, value.shape, strict=True)
                )
        constraints = replace(constraints, ranges=ranges, dtypes=dtypes)
        return replace(exportable, constraints=constraints, examples=Examples(tensors, axes))

    def register(self, model: Any) -> None:
        """Give the last inputs of an ``onnx_ir`` model, just before it is written, names and defaults; give the model its metadata."""
        ir = onnx_package("onnx_ir")
        defaults: dict[str, torch.Tensor] = {}
        for slot in self.table.slots:
            # A scaling of 1, so that files written without lora_fx may hold A and B alone.
            none = (torch.zeros(0, slot.in_features), torch.zeros(slot.out_features, 0), torch.ones(1))
            defaults |= dict(zip(slot.names, none, strict=True))
        for value, (name, default) in zip(model.graph.inputs[-len(defaults) :], defaults.items(), strict=True):
            value.name, value.const_value = name, ir.tensor(default.numpy(), name=name)
            model.graph.register_initializer(value)
        model.metadata_props[KEY] = self.table.to_text()


def check_slots(graph_module: TracedGraphModule, names: Sequence[str]) -> None:
    """Raise :class:`ExportError` if these adapters of a graph have branches that no slot takes; all of them are named."""
    problems = list(_problems(graph_module, names))
    if problems:
        raise ExportError("\n  ".join(["a slot takes the A and B of one matrix, in single precision:", *problems]))


def _problems(graph_module: TracedGraphModule, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        for trained in trained_of(graph_module, name):
            yield (
                f"adapter {name!r} has a trained copy of {trained.name!r}, as of modules_to_save or a bias. Fold it "
                "(lora_fx.fold), or train without"
            )
        if (ahead := record_of(graph_module, name).prefix) is not None:
            yield f"adapter {name!r} has a {ahead.kind}, which is no product of A and B. Export the graph without slots"
        for rows in record_of(graph_module, name).tokens:
            yield f"adapter {name!r} has trained rows of {rows.weight!r}. Fold it (lora_fx.fold), or train without"
        for _, branch in branches_of(graph_module, name).values():
            if branch.setting.invocation_tokens:
                yield f"adapter {name!r} acts from its invocation tokens on (aLoRA) at {branch.owner!r}. Train without them"
            if branch.setting.variant == "dora" or branch.setting.bias:
                kind = "DoRA" if branch.setting.variant == "dora" else "a bias in B"
                yield f"adapter {name!r} has {kind} at {branch.owner!r}. Fold it (lora_fx.fold), or train without"
    state = state_of(graph_module)
    owners = {branch.owner for name in names for _, branch in branches_of(graph_module, name).values()}
    for site in sites(graph_module):
        used = owners.intersection(owners_of(site))
        if not used:
            continue
        dtype = site.cast or state.tensors[site.weight].dtype
        if len(used) > 1:
            yield f"{site.name}: one adapter has one branch for all calls of {site.module}, another has one per call. Use the same rules for both"
        if site.op != "linear":
            yield f"{site.name} is {site.op}. Fold adapters of such sites, or choose others"
        elif dtype is not torch.float32:
            yield f"{site.name} computes in {dtype}. Convert the model (model.float(), --dtype float32) and trace it again"


def _slots(plan: Plan, base: TracedGraphModule) -> dict[str, OnnxSlot]:
    """Return the slot of every chosen site, by the site's name; sites that share a branch have equal ones."""
    modules = {chosen.site.module for chosen in plan.chosen}
    apart, as_weights = apart_from_calls(base, modules), apart_from_calls(base, modules, modules)
    return {
        chosen.site.name: _slot(chosen, apart.get(chosen.site.module, ""), as_weights.get(chosen.site.module, ""))
        for chosen in plan.chosen
    }


def _slot(chosen: Chosen, apart: str, apart_as_weight: str) -> OnnxSlot:
    site, owner = chosen.site, chosen.branches[0].owner
    if owner != owners_of(site)[0]:
        why = f"{owner}: each call of {site.module} has a slot of its own, and an adapter of PEFT's is for all of them"
        apart = apart_as_weight = why
    features = site.in_features, site.out_features
    return OnnxSlot(owner, site.module, site.weight, site.layout, *features, apart, apart_as_weight)


def _probing(plan: Plan, base: TracedGraphModule) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield factors that differ from site to site, large enough to change the outputs and small enough to keep their scale."""
    generator = torch.Generator().manual_seed(0)
    state = state_of(base)
    for chosen in plan.chosen:
        branch = chosen.branches[0]
        names = branch.names(NAME)
        a, b = (torch.randn(shape, generator=generator) for shape in factor_shapes(branch, chosen.site))
        like = state.tensors[chosen.site.weight]
        yield names.a, nn.Parameter((a / math.sqrt(chosen.site.in_features)).to(like.device))
        yield names.b, nn.Parameter((b * 0.2).to(like.device))


def _factors(slot: OnnxSlot) -> tuple[str, str]:
    """Return the names of the probe's A and B."""
    names = BranchSpec(slot.site, Setting(RANK, RANK * SCALE, 0.0)).names(NAME)
    return names.a, names.b


def _argument_names(table: SlotTable, inputs: Sequence[str]) -> dict[str, str]:
    """Map the names of the slots' inputs to names that are valid in Python and new to the model."""
    prefix = "slot"
    while any(name.startswith(prefix) for name in inputs):
        prefix += "_"
    names = [name for slot in table.slots for name in slot.names]
    return {name: f"{prefix}_{index}" for index, name in enumerate(names)}


def _placeholders(graph: fx.Graph, given: Mapping[str, str]) -> dict[str, fx.Node]:
    """Insert placeholders behind those of a graph (in place)."""
    *_, last = graph.find_nodes(op="placeholder")
    nodes: dict[str, fx.Node] = {}
    for name, argument in given.items():
        with graph.inserting_after(last):
            last = nodes[name] = graph.placeholder(argument, torch.Tensor)
    return nodes
