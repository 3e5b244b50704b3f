"""A prefix in a graph that another one was folded to."""

from __future__ import annotations

from dataclasses import replace

from torch import fx, nn

from lora_fx.adapters.attach import attach
from lora_fx.adapters.prefix import acting_prefix
from lora_fx.adapters.recorded import parameters_of, plan_branches, record_of
from lora_fx.graph.adapter_names import is_of_prefix
from lora_fx.graph.graph_module import TracedGraphModule


def with_prefix_of(graph_module: fx.GraphModule, folded: TracedGraphModule) -> TracedGraphModule:
    """Return a folded graph with the prefix that acts in the graph it was folded from, frozen, under the name of its adapter.

    What its adapter trained of the model's own is folded.
    """
    adapter = acting_prefix(graph_module)
    if adapter is None:
        return folded
    record = record_of(graph_module, adapter)
    prefix = None if record.prefix is None else replace(record.prefix, dropout=0.0)  # it trains no more
    plan = plan_branches(folded, adapter, {}, (), origin=record.origin, prefix=prefix)
    own = {name: p for name, p in parameters_of(graph_module, adapter).items() if is_of_prefix(name)}
    values = {name: nn.Parameter(parameter.detach(), False) for name, parameter in own.items()}
    return attach(folded, plan, adapter=adapter, values=values, acts=True)
