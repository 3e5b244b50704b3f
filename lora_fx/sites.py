"""Call sites: the nodes of a graph that multiply by a weight. The only file that knows how a linear looks in ATen.

A site is what computes, not a module: one shared module called twice is two sites, and a functional call is a site like any
other. The layout of its weight is read off the operator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import fx

from lora_fx.factors import is_factor
from lora_fx.graph_module import state_of
from lora_fx.provenance import module_path

aten = torch.ops.aten

Layout = Literal["out_in", "in_out"]
"""Whether a weight is ``(out, in)``, as in ``nn.Linear``, or ``(in, out)``, as in GPT-2's ``Conv1D``."""


@dataclass(frozen=True)
class Site:
    """One call site.

    Attributes:
        name: the module path of the call, ``<module path>@n`` for the n-th of several calls of one module, or the full
            name of a bare parameter.
        module: the same without ``@n``: what rules match, and what adapter parameters are named after.
        node: name of the graph node.
        operator: ``"linear"`` or ``"addmm"``.
        weight: first name of the weight.
        layout: layout of the weight.
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
    """

    name: str
    module: str
    node: str
    operator: str
    weight: str
    layout: Layout
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Operands:
    """The operands of a site's node."""

    input: fx.Node
    weight: fx.Node
    layout: Layout


def operands(node: fx.Node) -> Operands | None:
    """Return what ``node`` multiplies, if it multiplies an input by a named two-dimensional weight; else None."""
    read = _OPERANDS.get(node.target)
    found = read(node) if read is not None else None
    return found if found is not None and found.weight.op == "get_attr" else None


def sites(graph_module: fx.GraphModule) -> tuple[Site, ...]:
    """Return every call site of a graph, in the order in which they compute; the factors of branches are none."""
    state = state_of(graph_module)
    aliases: dict[str, list[str]] = {}
    for name, first in state.aliases().items():
        aliases.setdefault(first, []).append(name)
    found: list[Site] = []
    for node in graph_module.graph.nodes:
        parts = operands(node)
        if parts is None or is_factor(str(parts.weight.target)):
            continue
        weight = str(parts.weight.target)
        shape = state.tensors[weight].shape
        in_features, out_features = shape if parts.layout == "in_out" else reversed(shape)
        name = _name(node, aliases[weight])
        found.append(
            Site(name, name, node.name, _OPERATOR_NAMES[node.target], weight, parts.layout, in_features, out_features)
        )
    return _numbered(found)


def _name(node: fx.Node, names: list[str]) -> str:
    path = module_path(node)
    return path if f"{path}.weight" in names else names[0].removesuffix(".weight")


def _numbered(found: list[Site]) -> tuple[Site, ...]:
    calls = Counter(site.module for site in found)
    seen: Counter[str] = Counter()
    numbered = []
    for site in found:
        seen[site.module] += 1
        numbered.append(replace(site, name=f"{site.module}@{seen[site.module]}") if calls[site.module] > 1 else site)
    return tuple(numbered)


def _linear(node: fx.Node) -> Operands | None:
    value, weight = node.args[:2]
    return Operands(value, weight, "out_in") if isinstance(value, fx.Node) and isinstance(weight, fx.Node) else None


def _addmm(node: fx.Node) -> Operands | None:
    _, value, weight = node.args
    plain = node.kwargs.get("alpha", 1) == 1 and node.kwargs.get("beta", 1) == 1
    return (
        Operands(value, weight, "in_out")
        if plain and isinstance(value, fx.Node) and isinstance(weight, fx.Node)
        else None
    )


_OPERANDS: Mapping[object, Callable[[fx.Node], Operands | None]] = {
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
}
_OPERATOR_NAMES: Mapping[object, str] = {aten.linear.default: "linear", aten.addmm.default: "addmm"}
