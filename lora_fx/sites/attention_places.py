"""Attentions by their place in a model: self-attention, that of an encoder, and cross-attention; and how their operands lie.

An attention is self-attention if its queries and keys are made of one stream of values. A self-attention is of the encoder if keys of
cross-attention are made of its result. No name of a module or parameter is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lora_fx.errors import PlanError
from lora_fx.graph.aten_kinds import ATTENTION, PRODUCT, SOFTMAX, arguments_of, name_of, tensor_inputs
from lora_fx.graph.graph_module import TracedGraphModule
from lora_fx.graph.info import known_info
from lora_fx.graph.joined_graphs import is_joined
from lora_fx.graph.provenance import source_line
from lora_fx.rules.vocabulary import AttentionPlace
from lora_fx.sites.attention import Attention, attentions
from lora_fx.sites.roles import streams_of
from lora_fx.sites.weight_ops import weight_op

_NAMES = {
    "self_attention": "self-attention",
    "encoder": "self-attention of an encoder, whose result cross-attention reads",
    "cross_attention": "cross-attention",
}
_REPEATS = frozenset({"reshape", "view", "_unsafe_view", "flatten"})


def attentions_at(graph_module: fx.GraphModule, place: AttentionPlace) -> tuple[Attention, ...]:
    """Return the attentions of a place, in graph order: of a model with an encoder, ``self_attention`` is that of the decoder.

    Raises:
        PlanError: there is none, or the graph is a part of a model.
    """
    if known_info(graph_module).part or (isinstance(graph_module, TracedGraphModule) and is_joined(graph_module.graph)):
        raise PlanError(
            f"expected a whole graph to find {_NAMES[place]} in, got those of an encoder-decoder model with a cache. Trace the model "
            "without cache=True."
        )
    found = tuple(attentions(list(graph_module.graph.nodes)))
    operands = [(values, each.result) for each in found for values in (each.queries, each.keys)]
    streams = streams_of(graph_module, operands)
    crosses = [each for each, one, other in zip(found, streams[::2], streams[1::2], strict=True) if not one & other]
    read = _ancestors([key for each in crosses for key in each.keys])
    own: dict[AttentionPlace, tuple[Attention, ...]] = {
        "self_attention": tuple(each for each in found if each not in crosses and each.result not in read),
        "encoder": tuple(each for each in found if each not in crosses and each.result in read),
        "cross_attention": tuple(crosses),
    }
    if not own[place]:
        told = ", ".join(f"{len(each)} of {name}" for name, each in own.items() if each)
        raise PlanError(
            f"expected {_NAMES[place]}, and the graph has none; {f'it has attentions: {told}' if told else 'no attention was found in it'}."
        )
    return own[place]


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    todo, seen = list(nodes), set[fx.Node]()
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += tensor_inputs(node)
    return seen


@dataclass(frozen=True)
class Operands:
    """The keys and values of one attention.

    Attributes:
        key: ``(batch, heads, sequence, size)``, or with the last two exchanged.
        key_axis: that of the sequence, counted from the end.
        value: ``(batch, heads, sequence, size)``.
        product: queries by keys, if it is written out; None of a fused attention.
        result: values by weights, or the fused attention.
        repeats: how often each head of keys and values is there.
    """

    key: fx.Node
    key_axis: int
    value: fx.Node
    product: fx.Node | None
    result: fx.Node
    repeats: int

    @property
    def heads(self) -> int:
        """Heads of keys and values, each counted once."""
        return int(_val(self.key).shape[1]) // self.repeats

    @property
    def size(self) -> int:
        """Features of a head."""
        return int(_val(self.value).shape[-1])


def operands_of(attention: Attention) -> Operands:
    """Return the operands of an attention with one key and one value of four dimensions.

    Raises:
        PlanError: they lie otherwise; the node is named.
    """
    result = attention.result
    if len(set(attention.keys)) != 1 or len(set(attention.values)) != 1:
        raise unknown(result, "has several products of scores, or of values")
    (key, *_), (value, *_) = attention.keys, attention.values
    product, axis = None, -2
    if name_of(result) != ATTENTION:
        products = [user for user in key.users if name_of(user) in PRODUCT and weight_op(user) is None]
        if len(products) != 1 or {name_of(products[0]), name_of(result)} - {"matmul", "bmm"}:
            raise unknown(result, "is written out, and its scores or its result are no matmul")
        product = products[0]
        axis = -1 if product.args[1] is key else -2
        if result.args[1] is not value:
            raise unknown(result, "is written out with its values in front of their weights")
    other = -3 - axis
    shapes = [_val(key).shape, _val(value).shape]
    if any(len(shape) != 4 for shape in shapes):
        raise unknown(result, "has keys and values of other dimensions than (batch, heads, sequence, size)")
    sizes = shapes[0][1], shapes[1][1], shapes[0][other], shapes[1][-1]
    if not all(isinstance(size, int) for size in sizes) or sizes[0] != sizes[1] or sizes[2] != sizes[3]:
        raise unknown(
            result, f"has keys of {sizes[0]} heads and {sizes[2]} features, values of {sizes[1]} and {sizes[3]}"
        )
    if isinstance(length := shapes[0][axis], int) and length == 1:
        raise unknown(result, "was traced for one key, so that a mask of its keys is not told from one for all of them")
    repeats = {_repeats(key if axis == -2 else tensor_inputs(key)[0]), _repeats(value)}
    return Operands(key, axis, value, product, result, repeats.pop() if len(repeats) == 1 else 1)


def _repeats(node: fx.Node) -> int:
    """Return how often each head is in a value, of grouped heads that were repeated before the attention."""
    if name_of(node) not in _REPEATS:
        return 1
    (source, *_) = tensor_inputs(node)
    while name_of(source) in ("clone", "contiguous"):
        (source, *_) = tensor_inputs(source)
    if name_of(source) != "expand":
        return 1
    before, after = _val(tensor_inputs(source)[0]).shape, _val(source).shape
    if len(before) != 5 or len(after) != 5 or not isinstance(after[2], int) or before[2] != 1:
        return 1
    return int(after[2]) if _val(node).shape[1] == before[1] * after[2] else 1


def scores_between(operands: Operands, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the nodes with a column of scores or weights for each key, from the product of an attention that is written out to its result."""
    assert operands.product is not None
    found = {operands.product: None}
    for node in nodes:
        if node is not operands.result and any(source in found for source in tensor_inputs(node)):
            found[node] = None
    return list(found)


def softmax_is_last(node: fx.Node) -> bool:
    """Tell whether a node is a softmax over its last dimension."""
    dim = arguments_of(node).get("dim")
    return name_of(node) in SOFTMAX and dim in (-1, _val(node).dim() - 1)


def unknown(node: fx.Node, problem: str) -> PlanError:
    """Return the error for an attention that a prefix cannot be written at."""
    return PlanError(f"a prefix cannot be put at attention {node.name}, which {problem}{source_line(node)}.")


def _val(node: fx.Node) -> torch.Tensor:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise unknown(node, "has no recorded shape")
    return value
