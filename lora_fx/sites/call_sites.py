"""Call sites: the nodes of a graph that multiply by a weight.

A site is a computation, not a module: one shared module called twice is two sites, and a functional call is a site like any
other. The layout of its weight is read off the operator and the transposes before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch import fx

from lora_fx.graph.adapter_names import is_factor, original_name
from lora_fx.graph.graph_module import state_of
from lora_fx.graph.provenance import module_path
from lora_fx.graph.records import ParameterModule
from lora_fx.numerics.factor_init import casts_first
from lora_fx.rules.vocabulary import Layout, Op
from lora_fx.sites.stored_weight import cast_of
from lora_fx.sites.weight_ops import CONVOLUTIONS, WeightOp, weight_op
from lora_fx.torch_internals import OpOverload

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """One call site.

    Attributes:
        name: the module path of the call, ``<module path>@n`` for the n-th of several calls of one module, or the full
            name of a bare parameter.
        module: the same without ``@n``; rules match this.
        node: name of the graph node.
        op: the kind of product, in the words of rule files.
        operator: the ATen operator.
        weight: first name of the weight.
        layout: layout of the weight, of each matrix where it is a stack of them.
        in_features: width of the input: of its last dimension, its channels, or the number of rows of a table.
        out_features: width of the output.
        call: n of several calls, counted from 1; 0 if the module is called once.
        matrices: number of matrices in the weight: of experts, or of the groups of a convolution.
        kernel: sizes of the kernel of a convolution.
        cast: the dtype to which the weight is cast first, or None.
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
    matrices: int = 1
    kernel: tuple[int, ...] = ()
    cast: torch.dtype | None = None


def is_bare(site: Site) -> bool:
    """Tell whether a site multiplies by a bare parameter, whose name is the site's."""
    return site.module == site.weight


def parameter_of(site: Site) -> str:
    """Return what ``target_parameters`` calls the weight of a site."""
    return site.module if is_bare(site) else f"{site.module}.weight"


def attention_of(site: Site, modules: Mapping[str, ParameterModule]) -> str | None:
    """Return the path of the ``nn.MultiheadAttention`` whose ``in_proj_weight`` or ``out_proj`` a site is; None for any other site.

    Args:
        site: of a graph.
        modules: what is known of the model's modules, by their paths.
    """
    owner, _, leaf = site.module.rpartition(".")
    known = modules.get(owner)
    is_projection = leaf == "out_proj" or (leaf == "in_proj_weight" and is_bare(site))
    return owner if owner and is_projection and known is not None and known.is_attention else None


def is_idle(site: Site, modules: Mapping[str, ParameterModule]) -> bool:
    """Tell whether the module of a site is never called: an ``nn.MultiheadAttention`` multiplies with the weight of its ``out_proj``."""
    return not is_bare(site) and attention_of(site, modules) is not None


def biased(site: fx.Node) -> fx.Node | None:
    """Return the sum of a site's output with a separate bias node, if nothing else reads that output."""
    user = next(iter(site.users)) if len(site.users) == 1 else None
    if user is None or user.target is not aten.add.Tensor or user.kwargs:
        return None
    others = [node for node in user.all_input_nodes if node is not site]
    return user if len(others) == 1 and others[0].op == "get_attr" and not is_factor(str(others[0].target)) else None


def cast_back(site: fx.Node, weight: torch.Tensor) -> fx.Node | None:
    """Return the cast of a product back to the dtype of the site's input, in a layer for 4 bits that computes in another one.

    PEFT's branch reads the input as it is in front of such a layer, and is added behind it.
    """
    parts, users = weight_op(site), list(site.users)
    if not casts_first(weight) or parts is None or len(users) != 1 or None in (cast_of(parts.input), cast_of(users[0])):
        return None
    return users[0] if module_path(parts.input) == module_path(site) == module_path(users[0]) else None


def sites(graph_module: fx.GraphModule) -> tuple[Site, ...]:
    """Return every call site of a graph, in execution order; products with the factors of branches are not call sites."""
    state = state_of(graph_module)
    names = state.names()
    found: list[Site] = []
    for node in graph_module.graph.nodes:
        product = weight_op(node)
        if not is_site(product) or is_factor(str(product.weight.target)):
            continue
        weight = str(product.weight.target)
        original = original_name(weight)
        name = _site_name(node, names[weight] if original is None else (original,))
        found.append(_site(node, product, weight, name, state.tensors[weight].shape))
    return _with_call_numbers(found)


def is_site(product: WeightOp | None) -> TypeGuard[WeightOp]:
    """Tell whether a branch can go beside a product: its weight is stored as a matrix, or a stack of matrices."""
    return product is not None and product.layout is not None and product.alpha == 1


def _site(node: fx.Node, product: WeightOp, weight: str, name: str, shape: torch.Size) -> Site:
    assert product.layout is not None
    kernel: tuple[int, ...] = ()
    if product.op in CONVOLUTIONS:
        matrices, kernel = product.groups, tuple(shape[2:])
        wide, high = shape[1] * product.groups, shape[0]
    else:
        matrices = shape[0] if len(shape) == 3 else 1
        wide, high = shape[-2:] if product.layout == "in_out" else (shape[-1], shape[-2])
    return Site(
        name, name, node.name, product.op, _operator(node), weight, product.layout, wide, high,
        matrices=matrices, kernel=kernel, cast=product.dtype,
    )  # fmt: skip


def _operator(node: fx.Node) -> str:
    assert isinstance(node.target, OpOverload)
    return node.target._opname


def _site_name(node: fx.Node, names: Sequence[str]) -> str:
    path = module_path(node)
    return path if f"{path}.weight" in names else names[0].removesuffix(".weight")


def _with_call_numbers(found: list[Site]) -> tuple[Site, ...]:
    calls = Counter(site.module for site in found)
    seen: Counter[str] = Counter()
    numbered = []
    for site in found:
        seen[site.module] += 1
        call = seen[site.module]
        numbered.append(replace(site, name=f"{site.module}@{call}", call=call) if calls[site.module] > 1 else site)
    return tuple(numbered)
