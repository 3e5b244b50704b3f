"""Which of a graph's adapters act, each at its own strength."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import overload

from torch import fx

from lora_fx.adapters.attach import act
from lora_fx.adapters.recorded import (
    record_of,
    recorded_plan,
    resting_records,
    tensors_of,
    trained_of,
)
from lora_fx.branches.remove import unload
from lora_fx.errors import PlanError, listed
from lora_fx.graph.adapter_names import is_of_adapter
from lora_fx.graph.adapter_states import acting, adapters_as_added, waiting
from lora_fx.graph.cached_graphs import CachedGraphs, check_changeable
from lora_fx.graph.graph_module import TracedGraphModule, rebuilt
from lora_fx.graph.info import RuledBranches, info_of
from lora_fx.graph.joined_graphs import apart, joined
from lora_fx.graph.late_code import without_code
from lora_fx.graph.module_tensors import trainable_names
from lora_fx.rules.plain_numbers import finite_number

_logger = logging.getLogger("lora_fx.adapters")
_advice = logging.getLogger("lora_fx.adapters.advice")  # on calls from Python, which the command line leaves out


@overload
def activate(graph_module: CachedGraphs, strengths: Mapping[str, float]) -> CachedGraphs: ...


@overload
def activate(graph_module: fx.GraphModule, strengths: Mapping[str, float]) -> TracedGraphModule: ...


def activate(
    graph_module: fx.GraphModule | CachedGraphs, strengths: Mapping[str, float]
) -> TracedGraphModule | CachedGraphs:
    """Return a new graph in which just these adapters act: ``y + Σ strength · scaling · B(A(x))``.

    The others stay in it, without nodes: another ``activate`` brings them back. Their parameters are frozen as long as they do
    not act; what acts trains if :func:`~lora_fx.rewrite` made it, or if it was loaded with ``trainable=True``. ``{}`` gives
    the base. The parameters are shared with ``graph_module``, which is not changed. A strength replaces the present one of the
    adapter, it is no factor of it. It scales branches; trained copies of the model's own parameters are taken whole.

    Args:
        graph_module: made by lora_fx, with adapters; or the graphs of an encoder-decoder model with a cache.
        strengths: adapter → factor of its scaling; 1 is the adapter as it was trained. Numbers of numpy and tensors without
            dimensions are taken too.

    Raises:
        PlanError: the graph has no such adapter, a strength is not finite, or two of these adapters have trained copies of one
            parameter.
        FoldError: a branch cannot be taken out without changing something else.
    """
    if isinstance(graph_module, CachedGraphs):
        return apart(activate(joined(graph_module), strengths), graph_module)
    check_changeable(graph_module)
    with without_code():
        result = let_act(at_rest(graph_module), ordered(graph_module, strengths))
    result.recompile()
    return result


def at_rest(graph_module: fx.GraphModule) -> TracedGraphModule:
    """Return the graph with all of its adapters, none of which acts.

    Raises:
        PlanError: it has an adapter without a record.
        FoldError: a branch cannot be taken out without changing something else.
    """
    records = resting_records(graph_module)
    tensors = tensors_of(graph_module, records)
    own = frozenset(name for name in trainable_names(graph_module) if not is_of_adapter(name))
    base = unload(graph_module)  # new, so that its graph need not be copied
    return rebuilt(
        base, base.graph, tensors=tensors, info=replace(info_of(graph_module), adapters=records), trainable=own
    )


def let_act(graph_module: TracedGraphModule, strengths: Mapping[str, float]) -> TracedGraphModule:
    """Return a graph at rest with these of its adapters acting, in their order in it. Raises as :func:`activate` does."""
    for adapter in adapters_as_added(graph_module):
        if adapter in strengths:
            plan = recorded_plan(graph_module, adapter, graph_module, strength=strengths[adapter])
            graph_module = act(graph_module, plan, adapter)
    return graph_module


def tell_waiting(graph_module: TracedGraphModule, adapter: str, call: str = "") -> None:
    """Log the call that makes an adapter act, if it does not: by default that of :func:`activate`."""
    if adapter not in waiting(graph_module):
        return
    others = acting(graph_module)
    beside = f" beside {listed(list(map(repr, others)), 5)}" if others else ""
    if not call:
        strengths = ", ".join(f'"{name}": {strength:g}' for name, strength in {**others, adapter: 1.0}.items())
        call = f'lora_fx.activate(graph, {{"{adapter}": 1.0}})'
        records = info_of(graph_module).adapters
        prefixes = [name for name in (*others, adapter) if name in records and records[name].prefix is not None]
        together = f", {{{strengths}}} together" if others and len(prefixes) < 2 else ""
        call = f"{call} makes it act alone{together}"
    _advice.warning("adapter %r is in the graph%s and does not act yet: %s.", adapter, beside, call)


def tell_whole_copies(adapter: str, strength: float, names: Sequence[str]) -> None:
    """Log that a strength other than 1 does not scale an adapter's trained copies of these parameters, if it has any."""
    if names and strength != 1:
        _logger.warning(
            "adapter %r acts at strength %g, which scales its branches; its trained copies of %s are taken whole.",
            adapter,
            strength,
            listed(names, 5),
        )


def check_whole_strength(adapter: str, branches: RuledBranches, strength: float) -> None:
    """Raise :class:`PlanError` for DoRA at another strength than 1: its magnitudes are those of the weight with its whole update."""
    if strength != 1 and any(branch.setting.variant == "dora" for _, branch in branches.values()):
        raise PlanError(
            f"adapter {adapter!r} cannot have the strength {strength:g}: it is DoRA's, whose magnitudes are those of the weight with its whole "
            "update. Let it act at 1."
        )


def ordered(graph_module: fx.GraphModule, strengths: Mapping[str, float]) -> dict[str, float]:
    """Return the strengths of these adapters in the order in which the graph has them, as floats.

    Raises:
        PlanError: see :func:`activate`.
    """
    if not isinstance(strengths, Mapping):
        raise PlanError(f'expected strengths by the names of adapters, as {{"a": 1.0, "b": 0.5}}, got {strengths!r}.')
    found: dict[str, float] = {}
    for adapter, given in strengths.items():
        record = record_of(graph_module, adapter)
        strength = finite_number(given)
        if strength is None:
            raise PlanError(f"adapter {adapter!r} cannot have the strength {given!r}: give a finite number.")
        check_whole_strength(adapter, record.branches, strength)
        if strength != 1 and record.prefix is not None:
            raise PlanError(
                f"adapter {adapter!r} cannot have the strength {strength:g}: it has a {record.prefix.kind}, which acts or does not. Let it act at 1."
            )
        found[adapter] = strength
        whole = [each.name for each in trained_of(graph_module, adapter)]
        whole += [f"rows of {each.weight}" for each in record.tokens]
        tell_whole_copies(adapter, strength, whole)
    return {adapter: found[adapter] for adapter in adapters_as_added(graph_module) if adapter in found}
