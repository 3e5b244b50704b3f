"""Prefixes of adapters: learned keys and values in front of those of every self-attention (arXiv 2101.00190), as PEFT has them.

    embedding → [linear → tanh → linear] → [dropout] → [pairs in the order of the layers] → [cast] → slot of the graph

The dropout is one draw for all rows of a batch.

A prompt is learned embeddings in front of those of the inputs (arXiv 2104.08691), without projection and pairs. What the graph does with
them is in its trace: see :mod:`lora_fx.tracing.prefixed_forward` and :mod:`lora_fx.tracing.prompted_forward`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from lora_fx.adapters.fake_values import FakeValues
from lora_fx.adapters.hidden_prefix import hide
from lora_fx.adapters.site_prefix import write_at_attentions
from lora_fx.errors import PlanError, listed
from lora_fx.graph.adapter_names import prefix_dropout, prefix_name
from lora_fx.graph.graph_module import state_of
from lora_fx.graph.info import AdapterRecord, known_info
from lora_fx.graph.prefix_slot import PrefixSlot, put, slot_node, wanted_slot
from lora_fx.graph.process_state import forked_random_state
from lora_fx.graph.provenance import write_stamp
from lora_fx.graph.records import PrefixSpec
from lora_fx.graph.state import State

aten = torch.ops.aten


def prefix_values(
    prefix: PrefixSpec | None,
    state: State,
    adapter: str,
    given: Mapping[str, torch.Tensor] | None = None,
    seed: int | None = None,
) -> dict[str, torch.Tensor]:
    """Return new parameters of a prefix, by their names: with given values, or drawn as PEFT draws them.

    Args:
        prefix: None for an adapter without one.
        state: of the graph.
        adapter: that they belong to.
        given: values by their names.
        seed: of the draws.

    Raises:
        PlanError: it starts as embeddings that the graph has not.
    """
    if prefix is None:
        return {}
    if given is not None:
        values = {prefix_name(adapter, part): given[prefix_name(adapter, part)] for part in prefix.shapes}
        return {name: nn.Parameter(value.detach(), value.requires_grad) for name, value in values.items()}
    if prefix.starts_as is not None:
        weight, ids = state.tensors[prefix.starts_as[0]], prefix.starts_as[1]
        if max(ids) >= len(weight):
            raise PlanError(f"{prefix.rule}: init_ids: expected ids below {len(weight)}, found {max(ids)}.")
        rows = torch.tensor([ids[index % len(ids)] for index in range(prefix.tokens)], device=weight.device)
        return {prefix_name(adapter): nn.Parameter(weight.detach()[rows].to(torch.float32))}
    with forked_random_state(seed=seed), state.device:
        features = prefix.shapes["embedding.weight"][1]
        modules: dict[str, nn.Module] = {"embedding": nn.Embedding(prefix.tokens, features)}
        if prefix.hidden is not None:
            whole = prefix.layers * 2 * prefix.width
            modules["transform.0"] = nn.Linear(prefix.width, prefix.hidden)
            modules["transform.2"] = nn.Linear(prefix.hidden, whole)
    return {
        prefix_name(adapter, f"{path}.{name}"): parameter
        for path, module in modules.items()
        for name, parameter in module.named_parameters()
    }


def check_one_prefix(adapter: str, record: AdapterRecord, others: Mapping[str, AdapterRecord]) -> None:
    """Raise :class:`PlanError` where an adapter with a prefix, or a prompt, is to act beside another one with either."""
    rival = next((name for name, other in others.items() if other.prefix is not None), None)
    if record.prefix is not None and rival is not None:
        mine, theirs = (each.prefix.kind if each.prefix else "" for each in (record, others[rival]))
        told = f"a {mine} each" if mine == theirs else f"a {mine} and a {theirs}"
        raise PlanError(
            f"adapter {adapter!r} and {rival!r}, which acts, have {told}: a graph computes with one, as PEFT does. Let one of them "
            f'act at a time: lora_fx.activate(graph, {{"{adapter}": 1.0}}).'
        )


def write_prefix(
    graph: fx.Graph,
    state: State,
    adapter: str,
    prefix: PrefixSpec | None,
    slot: PrefixSlot | None,
    ends: Sequence[fx.Node],
) -> dict[str, nn.Module]:
    """Put the prefix of an adapter into a graph (in place), and return the modules that check its conditions.

    Args:
        graph: without a prefix; with an empty slot, if the prefix is a past or a prompt.
        state: with the parameters.
        adapter: that they belong to.
        prefix: of the adapter.
        slot: of the graph.
        ends: the results of the attentions at which a prefix that is no past is written.

    Raises:
        PlanError: the graph can take no prefix, or none of so many tokens, or none for some layers alone.
    """
    if prefix is None:
        return {}
    fakes = FakeValues(state)
    if prefix.place is not None:
        anchor = next(node for node in graph.nodes if node.op != "placeholder")
        value, modules = _value(graph, fakes, adapter, prefix, ends[0], anchor)
        write_at_attentions(graph, value, prefix, adapter, ends, fakes)
        return modules
    slot = wanted_slot(slot, f"adapter {adapter!r}", prompt=prefix.is_prompt)
    if slot.past:
        check_is_past(prefix, adapter)
        return {}
    taken = slot_node(graph)
    assert taken is not None
    value, modules = _value(graph, fakes, adapter, prefix, taken, taken)
    modules |= put(graph, slot, value, prefix.tokens)
    hide(graph, prefix, adapter, fakes)
    return modules


def _value(
    graph: fx.Graph, fakes: FakeValues, adapter: str, prefix: PrefixSpec, like: fx.Node, anchor: fx.Node
) -> tuple[fx.Node, dict[str, nn.Module]]:
    """Write what a prefix computes from its parameters before a node, in the dtype of another, and return it, and its dropout."""
    modules = dict[str, nn.Module]()

    def record(node: fx.Node, part: str = "prefix") -> fx.Node:
        write_stamp(node, {"rule": prefix.rule, "site": prefix.kind, "adapter": adapter, "part": part})
        fakes.record(node, like)
        return node

    def named(part: str) -> fx.Node:
        return record(graph.create_node("get_attr", prefix_name(adapter, part)))

    def call(target: Any, *args: Any) -> fx.Node:
        # By a name that does not count the nodes beside it: graphs with and without branches are compared by names.
        return record(graph.create_node("call_function", target, args, name=f"prefix_{target.overloadpacket.__name__}"))

    with graph.inserting_before(anchor):
        value = named("embedding.weight")
        if prefix.hidden is not None:
            first = named("transform.0.weight"), named("transform.0.bias")
            second = named("transform.2.weight"), named("transform.2.bias")
            value = call(aten.linear.default, value, *first)
            value = call(aten.tanh.default, value)
            value = call(aten.linear.default, value, *second)
        if prefix.dropout:
            modules[prefix_dropout(adapter)] = nn.Dropout(prefix.dropout)
            value = record(graph.call_module(prefix_dropout(adapter), (value,)))
        if prefix.pairs is not None and prefix.place is None:
            width, numbers = 2 * prefix.width, [pair or 0 for pair in prefix.pairs]
            own = [call(aten.slice.Tensor, value, 1, pair * width, (pair + 1) * width) for pair in numbers]
            value = call(aten.cat.default, own, 1)
        if (dtype := like.meta["val"].dtype) != torch.float32:
            value = call(aten.to.dtype, value, dtype)
    return value, modules


def check_is_past(prefix: PrefixSpec, adapter: str) -> None:
    """Raise :class:`PlanError` for a prefix that is no past, with which generation begins: one at attentions, or for some layers alone."""
    if prefix.place is not None:
        raise PlanError(
            f"adapter {adapter!r} has a prefix at attentions ({_PLACED[prefix.place]}), which is no past that a cache can begin with. Compute with "
            "it without a cache, by calling the graph."
        )
    if prefix.without:
        raise PlanError(
            f"adapter {adapter!r} has a prefix for some layers alone, which is no past that a cache can begin with: layers "
            f"{listed([*map(str, prefix.without)], 8)} would have one of their own length. Compute with it without a cache, by calling the graph."
        )


def resolved(prefix: PrefixSpec, adapter: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the keys and values of a prefix, ``(tokens, layers · 2 · heads · size)``: of a projection what it computes."""
    own = {part: tensors[prefix_name(adapter, part)].detach() for part in prefix.shapes}
    value = own["embedding.weight"]
    if prefix.hidden is None:
        return value
    linear = torch.nn.functional.linear
    inner = torch.tanh(linear(value, own["transform.0.weight"], own["transform.0.bias"]))
    return linear(inner, own["transform.2.weight"], own["transform.2.bias"])


_PLACED = {
    "self_attention": "self_attention, positions unchanged",
    "encoder": "encoder",
    "cross_attention": "cross_attention",
}


def acting_prefix(graph_module: nn.Module) -> str | None:
    """Return the adapter whose prefix acts in a graph, if one does."""
    records = known_info(graph_module).adapters.items()
    return next((name for name, record in records if record.acts and record.prefix is not None), None)


def acting_past(graph_module: nn.Module) -> str | None:
    """Return the adapter whose prefix acts in a graph, if one does that is not written as nodes at attentions."""
    adapter = acting_prefix(graph_module)
    return adapter if adapter is not None and prefix_record(graph_module, adapter).place is None else None


def prefix_record(graph_module: nn.Module, adapter: str) -> PrefixSpec:
    """Return the prefix of an adapter that has one."""
    prefix = known_info(graph_module).adapters[adapter].prefix
    assert prefix is not None
    return prefix


def prompt_of(graph_module: nn.Module, adapter: str) -> torch.Tensor:
    """Return the embeddings that the prompt of an adapter has, ``(tokens, width)``, without a gradient."""
    slot = wanted_slot(known_info(graph_module).prefix_slot, f"adapter {adapter!r}", prompt=True)
    return resolved(prefix_record(graph_module, adapter), adapter, state_of(graph_module).tensors).to(slot.dtype)


def keys_and_values(graph_module: nn.Module, adapter: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the keys and values that the prefix of an adapter gives each layer, ``(heads, tokens, size)``, without a gradient.

    Raises:
        PlanError: it is no past.
    """
    prefix = prefix_record(graph_module, adapter)
    check_is_past(prefix, adapter)
    slot = wanted_slot(known_info(graph_module).prefix_slot, f"adapter {adapter!r}")
    whole = resolved(prefix, adapter, state_of(graph_module).tensors).to(slot.dtype)
    pairs = whole.view(prefix.tokens, prefix.layers, 2, prefix.heads, prefix.size).permute(1, 2, 3, 0, 4)
    found = [pairs[number] for number in prefix.pairs or range(prefix.layers) if number is not None]
    return [(key, value) for key, value in found]
