"""Call sites: the nodes of a graph that multiply by a weight. The only file that knows how a linear looks in ATen.

A site is what computes, not a module: one shared module called twice is two sites, and a functional call is a site like any
other. The layout of its weight is read off the operator and the transposes before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from lora_fx.factors import is_factor, original_name
from lora_fx.graph_module import state_of
from lora_fx.provenance import module_path
from lora_fx.vocabulary import Op

aten = torch.ops.aten

Layout = Literal["out_in", "in_out"]
"""Whether a weight is ``(out, in)``, as in ``nn.Linear``, or ``(in, out)``, as in GPT-2's ``Conv1D``."""


@dataclass(frozen=True)
class Site:
    """One call site.

    Attributes:
        name: the module path of the call, ``<module path>@n`` for the n-th of several calls of one module, or the full
            name of a bare parameter.
        module: the same without ``@n``: what rules match.
        call: n, counted from 1; 0 where the module is called once.
        node: name of the graph node.
        op: what it is, in the words of rule files.
        operator: the ATen operator.
        weight: first name of the weight.
        layout: layout of the weight, of each matrix where it is a stack of them.
        in_features: width of the input: of its last dimension, its channels, or the number of rows of a table.
        out_features: width of the output.
    """

    name: str
    module: str
    node: str
    op: Op
    operator: str
    weight: str
    layout: Layout
    in_features: int
    out_features: int
    call: int = 0


@dataclass(frozen=True)
class Operands:
    """The operands of a site's node.

    Attributes:
        op: what the site is.
        input: what it reads.
        weight: the ``get_attr`` of its weight.
        layout: of the weight as it is stored.
        groups: of a convolution.
    """

    op: Op
    input: fx.Node
    weight: fx.Node
    layout: Layout
    groups: int = 1


def operands(node: fx.Node) -> Operands | None:
    """Return what ``node`` multiplies, if it multiplies an input by a named weight; else None."""
    read = _READ.get(node.target.name()) if isinstance(node.target, torch._ops.OpOverload) else None
    return read(node) if read is not None else None


def uses(weight: fx.Node) -> Iterator[fx.Node]:
    """Yield what reads a weight, seen through transposes."""
    for user in weight.users:
        if _is_transpose(user):
            yield from uses(user)
        else:
            yield user


def biased(site: fx.Node) -> fx.Node | None:
    """Return the sum of a site's output with a bias that is a node of its own, if nothing else reads that output."""
    user = next(iter(site.users)) if len(site.users) == 1 else None
    if user is None or user.target is not aten.add.Tensor or user.kwargs:
        return None
    others = [node for node in user.all_input_nodes if node is not site]
    return user if len(others) == 1 and others[0].op == "get_attr" and not is_factor(str(others[0].target)) else None


def sites(graph_module: fx.GraphModule) -> tuple[Site, ...]:
    """Return every call site of a graph, in the order in which they compute; the factors of branches are none."""
    state = state_of(graph_module)
    names = state.names()
    found: list[Site] = []
    for node in graph_module.graph.nodes:
        parts = operands(node)
        if parts is None or is_factor(str(parts.weight.target)):
            continue
        weight = str(parts.weight.target)
        in_features, out_features = _features(parts, tuple(state.tensors[weight].shape))
        original = original_name(weight)
        name = _name(node, names[weight] if original is None else (original,))
        operator = node.target._opname
        found.append(Site(name, name, node.name, parts.op, operator, weight, parts.layout, in_features, out_features))
    return _numbered(found)


def _features(parts: Operands, shape: tuple[int, ...]) -> tuple[int, int]:
    if parts.op in ("conv1d", "conv2d", "conv3d"):
        return shape[1] * parts.groups, shape[0]
    rows, columns = shape[-2:]
    return (rows, columns) if parts.layout == "in_out" else (columns, rows)


def _name(node: fx.Node, names: Sequence[str]) -> str:
    path = module_path(node)
    return path if f"{path}.weight" in names else names[0].removesuffix(".weight")


def _numbered(found: list[Site]) -> tuple[Site, ...]:
    calls = Counter(site.module for site in found)
    seen: Counter[str] = Counter()
    numbered = []
    for site in found:
        seen[site.module] += 1
        call = seen[site.module]
        numbered.append(replace(site, name=f"{site.module}@{call}", call=call) if calls[site.module] > 1 else site)
    return tuple(numbered)


def _is_transpose(node: fx.Node) -> bool:
    """Tell whether a node swaps the last two dimensions of what it reads, and leaves all others alone."""
    if node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default, aten.adjoint.default):
        return node.target is not aten.numpy_T.default or _dim(node) == 2
    dim = _dim(node)
    if node.target is aten.transpose.int:
        return {position % dim for position in node.args[1:3]} == {dim - 2, dim - 1}  # type: ignore[operator]
    if node.target is aten.permute.default:
        order = [position % dim for position in node.args[1]]  # type: ignore[union-attr, operator]
        return order == [*range(dim - 2), dim - 1, dim - 2]
    return False


def _dim(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 2


def _weight(value: Any, layout: Layout) -> tuple[fx.Node, Layout] | None:
    """Return the named tensor behind transposes, and the layout in which it is stored."""
    while isinstance(value, fx.Node) and _is_transpose(value):
        value, layout = value.args[0], "in_out" if layout == "out_in" else "out_in"
    return (value, layout) if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _product(op: Op, value: Any, weight: Any, layout: Layout, dims: int) -> Operands | None:
    found = _weight(weight, layout)
    if found is None or not isinstance(value, fx.Node) or _dim(found[0]) != dims:
        return None
    return Operands(op, value, *found)


def _linear(node: fx.Node) -> Operands | None:
    return _product("linear", node.args[0], node.args[1], "out_in", dims=2)


def _addmm(node: fx.Node) -> Operands | None:
    plain = node.kwargs.get("alpha", 1) == 1 and node.kwargs.get("beta", 1) == 1
    return _product("linear", node.args[1], node.args[2], "in_out", dims=2) if plain else None


def _matmul(node: fx.Node) -> Operands | None:
    return _product("linear", node.args[0], node.args[1], "in_out", dims=2)


def _expert(node: fx.Node) -> Operands | None:
    return _product("expert", node.args[0], node.args[1], "in_out", dims=3)


def _stacked(node: fx.Node) -> Operands | None:
    return _expert(node) or _matmul(node)


def _convolution(op: Op) -> Callable[[fx.Node], Operands | None]:
    def read(node: fx.Node) -> Operands | None:
        value, weight = node.args[:2]
        named = isinstance(weight, fx.Node) and weight.op == "get_attr"
        groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
        return Operands(op, value, weight, "out_in", groups) if named else None  # type: ignore[arg-type]

    return read


def _embedding(node: fx.Node) -> Operands | None:
    weight, index = node.args[:2]
    if not (isinstance(weight, fx.Node) and weight.op == "get_attr" and isinstance(index, fx.Node)):
        return None
    return Operands("embedding", index, weight, "in_out")


# By name: operators of other libraries are not there before those are imported.
_READ: Mapping[str, Callable[[fx.Node], Operands | None]] = {
    "aten::linear": _linear,
    "aten::addmm": _addmm,
    "aten::mm": _matmul,
    "aten::matmul": _stacked,
    "aten::bmm": _expert,
    "aten::_grouped_mm": _expert,
    "transformers::grouped_mm_fallback": _expert,
    "aten::conv1d": _convolution("conv1d"),
    "aten::conv1d.padding": _convolution("conv1d"),
    "aten::conv2d": _convolution("conv2d"),
    "aten::conv2d.padding": _convolution("conv2d"),
    "aten::conv3d": _convolution("conv3d"),
    "aten::conv3d.padding": _convolution("conv3d"),
    "aten::embedding": _embedding,
}
