"""Comparing two graphs in order: operators, arguments, constants, attribute names, aliasing.

FX graphs are ordered, so the n-th node of one is compared with the n-th of the other. General graph isomorphism would be
slower and would take ``x - w`` for ``w - x``.
"""

from __future__ import annotations

from torch import fx
from torch.utils import _pytree as pytree

from lora_fx.graph.graph_module import TracedGraphModule, state_of


def first_difference(left: TracedGraphModule, right: TracedGraphModule) -> str | None:
    """Return what first differs between two graphs, in words, or None if they are node-identical.

    Values of tensors are not compared; their names, shapes, dtypes and ties are.
    """
    image: dict[fx.Node, fx.Node] = {}
    mine, theirs = list(left.graph.nodes), list(right.graph.nodes)
    for node, other in zip(mine, theirs, strict=False):
        if (node.op, node.target, node.name) != (other.op, other.target, other.name):
            return f"{node.format_node()} against {other.format_node()}"
        if not _same_arguments(node, other, image):
            return f"arguments of {node.name}: {node.args} {node.kwargs} against {other.args} {other.kwargs}"
        if node.op == "call_module" and repr(left.get_submodule(str(node.target))) != repr(
            right.get_submodule(str(node.target))
        ):
            return f"module {node.target!r}: {left.get_submodule(str(node.target))} against {right.get_submodule(str(node.target))}"
        image[node] = other
    if len(mine) != len(theirs):
        return f"{len(mine)} nodes against {len(theirs)}"
    return _state_difference(left, right)


def _same_arguments(node: fx.Node, other: fx.Node, image: dict[fx.Node, fx.Node]) -> bool:
    left, left_spec = pytree.tree_flatten(fx.map_arg((node.args, dict(node.kwargs)), lambda n: image[n]))
    right, right_spec = pytree.tree_flatten(fx.map_arg((other.args, dict(other.kwargs)), lambda n: n))
    return left_spec == right_spec and all(
        type(a) is type(b) and (a is b or a == b) for a, b in zip(left, right, strict=True)
    )


def _state_difference(left: TracedGraphModule, right: TracedGraphModule) -> str | None:
    mine, theirs = state_of(left), state_of(right)
    unlike = (set(mine.tensors) ^ set(theirs.tensors)) | (mine.non_persistent ^ theirs.non_persistent)
    if unlike:
        return f"tensors {sorted(unlike)}"
    for name, tensor in mine.tensors.items():
        if (tensor.shape, tensor.dtype) != (theirs.tensors[name].shape, theirs.tensors[name].dtype):
            return f"tensor {name!r}: {tensor.dtype} {tuple(tensor.shape)} against {theirs.tensors[name].dtype} {tuple(theirs.tensors[name].shape)}"
    return None if mine.aliases() == theirs.aliases() else "ties between tensors"
