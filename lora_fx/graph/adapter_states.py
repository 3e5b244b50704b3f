"""The state of each adapter of a graph: whether it acts, how strongly, and whether it trains."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from lora_fx.graph.adapter_names import adapter_of, adapters
from lora_fx.graph.info import known_info
from lora_fx.graph.module_tensors import parameters_of_module


@dataclass(frozen=True)
class AdapterState:
    """One adapter of a graph. ``str()`` is ``"style (acts at strength 0.5, trains)"``, or ``"style (acts by row, frozen)"``.

    Attributes:
        name: of the adapter.
        acts: whether the graph computes with it.
        strength: the factor of its scaling.
        trains: whether parameters of it train; if it does not act, whether they would.
        by_row: whether calls choose the rows in which it acts.
    """

    name: str
    acts: bool
    strength: float
    trains: bool
    by_row: bool = False

    def __str__(self) -> str:
        if self.by_row:
            return f"{self.name} (acts by row, frozen)"
        if self.acts:
            strength = "" if self.strength == 1 else f" at strength {self.strength:g}"
            return f"{self.name} (acts{strength}, {'trains' if self.trains else 'frozen'})"
        return f"{self.name} (does not act, {'would train' if self.trains else 'frozen'})"


def adapters_as_added(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a graph's adapters in the order in which they were added: those without a record, then the others."""
    known, present = known_info(module).adapters, adapters(module)
    return (*(name for name in present if name not in known), *(name for name in known if name in present))


def adapter_states(module: nn.Module) -> tuple[AdapterState, ...]:
    """Return the state of every adapter, in the order of :func:`adapters_as_added`. One without a record acts if a node reads it."""
    info = known_info(module)
    known = info.adapters
    nodes = module.graph.find_nodes(op="get_attr") if isinstance(module, fx.GraphModule) else ()
    read = {adapter_of(str(node.target)) for node in nodes}
    trained = {adapter_of(name) for name, p in parameters_of_module(module).items() if p.requires_grad}
    found = []
    for name in adapters_as_added(module):
        record = known.get(name)
        acts = name in read if record is None else record.acts
        trains = name in trained or (record is not None and not acts and bool(record.trains))
        found.append(AdapterState(name, acts, 1.0 if record is None else record.strength, trains, name in info.by_row))
    return tuple(found)


def acting(module: nn.Module) -> dict[str, float]:
    """Return the strength of each adapter that acts."""
    return {state.name: state.strength for state in adapter_states(module) if state.acts}


def waiting(module: nn.Module) -> tuple[str, ...]:
    """Return the adapters that do not act."""
    return tuple(state.name for state in adapter_states(module) if not state.acts)


def trained_of_each(module: nn.Module) -> dict[str, frozenset[str]]:
    """Return the names of the parameters of each adapter that train while it acts, of adapters that have such or a record."""
    info, flagged = known_info(module), dict[str, set[str]]()
    for name, parameter in parameters_of_module(module).items():
        if parameter.requires_grad and (adapter := adapter_of(name)) is not None:
            flagged.setdefault(adapter, set()).add(name)
    found = {adapter: frozenset(names) for adapter, names in flagged.items()}
    for adapter, record in info.adapters.items():
        own = found.get(adapter, frozenset())
        found[adapter] = own if record.acts and not info.inference else record.trains | own
    return found


def trained_names(module: nn.Module, adapter: str) -> frozenset[str]:
    """Return the names of an adapter's parameters that train while it acts."""
    return trained_of_each(module).get(adapter, frozenset())
