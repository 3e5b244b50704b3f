"""Kinds of ATen operators by their effect on positions and features, and their arguments by the names of the schema."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import fx

from lora_fx.torch_internals import BatchNormBase, DropoutBase


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


VIEW = _words(
    """
    view reshape _unsafe_view view_as reshape_as transpose permute movedim swapaxes swapdims t numpy_T mT unsqueeze squeeze
    expand expand_as broadcast_to slice select narrow split split_with_sizes chunk unbind tensor_split flatten unflatten alias
    detach view_as_complex view_as_real getitem
    """
)
"""Return a view, so that a write to the result is a write to the argument."""

SHAPE = VIEW | _words(
    """
    contiguous clone lift_fresh_copy cat concat stack index index_select gather take_along_dim repeat repeat_interleave roll
    flip pad constant_pad_nd unsafe_split unsafe_chunk
    """
)
"""Move values, and change none."""

POINTWISE = _words(
    """
    to _to_copy type_as mul div true_divide add sub rsub neg where masked_fill clamp dropout maximum minimum addcmul copy
    """
)
"""Work value by value, and keep what flows through recognisable."""

EMPTY = _words(
    """
    empty new_empty empty_like zeros new_zeros zeros_like ones new_ones ones_like full new_full full_like
    """
)
"""Make a tensor whose values do not depend on what they read."""

ACTIVATION = _words(
    """
    gelu relu relu6 silu sigmoid tanh softplus elu leaky_relu mish hardswish hardsigmoid hardtanh selu celu exp erf log_sigmoid
    softsign
    """
)
"""Nonlinear, value by value."""

NORM = _words("layer_norm rms_norm group_norm native_layer_norm batch_norm instance_norm _fused_rms_norm")
"""Normalise their first argument."""

STATISTIC = _words("mean var std rsqrt sqrt norm linalg_vector_norm sum amax amin")
"""Parts of norms; features do not flow through them."""

POWER = _words("pow square")

PRODUCT = _words("matmul bmm baddbmm einsum")
SOFTMAX = _words("softmax _softmax special_softmax _safe_softmax")
ATTENTION = "scaled_dot_product_attention"


def name_of(node: fx.Node) -> str:
    """Return the name of a node's operator: ``"linear"``, ``"add"`` also where it adds in place, ``"dropout"`` for that module."""
    if node.op == "call_module":
        module = node.graph.owning_module
        called = module.get_submodule(str(node.target)) if module is not None else None
        kinds = {"dropout": DropoutBase, "batch_norm": BatchNormBase}
        return next(
            (name for name, kind in kinds.items() if isinstance(called, kind)),
            str(getattr(called, "kind", node.target)),
        )
    if node.target is operator.getitem:
        return "getitem"
    return str(getattr(node.target, "_opname", node.op)).rstrip("_")


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the nodes with tensor values from which a node's value is computed; sizes are skipped."""
    if name_of(node) in EMPTY:
        return []
    read = node.all_input_nodes[1:] if name_of(node) == "copy" else node.all_input_nodes
    return [source for source in read if is_tensor(source)]


def is_tensor(node: fx.Node) -> bool:
    """Tell whether a node's value is a tensor, or a tuple of tensors."""
    value = node.meta.get("val")
    return node.op == "get_attr" or isinstance(value, torch.Tensor | tuple | list)


def writes(node: fx.Node) -> fx.Node | None:
    """Return the node whose value a node changes in place, or None."""
    schema = getattr(node.target, "_schema", None)
    first = node.args[0] if node.args else None
    return first if schema is not None and schema.is_mutable and isinstance(first, fx.Node) else None


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return all arguments of a node, defaults included, by the names of its schema; by position where it has no schema."""
    if getattr(node.target, "_schema", None) is None:
        return {**{str(index): value for index, value in enumerate(node.args)}, **node.kwargs}
    defaults = _defaults(node.target)
    return {**defaults, **dict(zip(defaults, node.args, strict=False)), **node.kwargs}


@cache
def is_view(operator: Any) -> bool:
    """Tell whether the result of an operator shares memory with what it reads, as its schema says: ``diagonal``, ``unfold``."""
    schema = getattr(operator, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


@cache  # torch makes new Python objects of a schema at every access
def _defaults(operator: Any) -> Mapping[str, Any]:
    return {argument.name: argument.default_value for argument in operator._schema.arguments}


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set an argument of an operator call by its name in the schema."""
    position = list(_defaults(node.target)).index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return the sizes that a node's value had in the trace, or None if it is no tensor or has a size that is not known."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    sizes = tuple(size_of(size) for size in value.shape)
    return None if None in sizes else sizes  # type: ignore[return-value]


def size_of(size: Any) -> int | None:
    """Return the number that a symbolic size stood for in the trace."""
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        return int(hint) if hint is not None else None
    return size if isinstance(size, int) else None


def flattened(value: Any) -> Iterator[fx.Node]:
    """Yield the nodes in a (nested) argument."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from flattened(item)
