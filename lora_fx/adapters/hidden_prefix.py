"""Layers without a prefix in a graph that has one: nodes that take its columns out of their attention.

The cache that a graph was traced with gives every layer keys and values of one length, and one mask. A layer without a prefix reads them
behind it, so that it attends to the text alone, as the model's layer does: of a fused attention ``keys[tokens:]``, ``values[tokens:]`` and
``mask[..., tokens:]``; of one that is written out, whose shapes are, too, the scores with −∞ in these columns before the softmax, by which
their weights are 0. Positions stay those behind the prefix.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lora_fx.adapters.fake_values import FakeValues
from lora_fx.branches.lower import describe
from lora_fx.errors import PlanError
from lora_fx.graph.aten_kinds import SOFTMAX, arguments_of, name_of, set_argument, tensor_inputs
from lora_fx.graph.prefix_slot import HIDDEN, slot_node
from lora_fx.graph.provenance import write_stamp
from lora_fx.graph.records import PrefixSpec
from lora_fx.sites.attention import Attention, attentions
from lora_fx.sites.weight_ops import weight_op

aten = torch.ops.aten


def hide(graph: fx.Graph, prefix: PrefixSpec, adapter: str, fakes: FakeValues) -> None:
    """Hide a prefix from the layers that have none (in place).

    Args:
        graph: whose slot holds the prefix.
        prefix: its record.
        adapter: that it belongs to.
        fakes: values of new nodes.

    Raises:
        PlanError: the attention of such a layer is not known.
    """
    if not prefix.without:
        return
    layer_of = _layers(graph)
    found: dict[int, list[Attention]] = {}
    for attention in attentions(list(graph.nodes)):
        layer = next((layer_of[cat] for key in attention.keys for cat in _behind(key, layer_of)), None)
        if layer is not None:
            found.setdefault(layer, []).append(attention)
    writer = _Writer(graph, prefix, adapter, fakes, layer_of, {})
    for layer in prefix.without:
        if layer not in found:
            raise PlanError(
                f"{prefix.rule}: layers: the attention of layer {layer} was not found, by which a prefix would be hidden from it. Leave layers out."
            )
        for attention in found[layer]:
            writer.write(attention, layer)


def _layers(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return the nodes that put keys and values of a prefix in front of those of a layer, with its number."""
    taken, found = slot_node(graph), dict[fx.Node, int]()
    assert taken is not None
    todo: list[tuple[fx.Node, int | None]] = [(taken, None)]
    while todo:
        node, layer = todo.pop()
        for user in node.users:
            if name_of(user) == "cat" and layer is not None:
                found[user] = layer
            elif name_of(user) == "select" and layer is None:
                number = user.args[2]
                assert isinstance(number, int)
                todo.append((user, number // 2))
            elif tensor_inputs(user) == [node]:
                todo.append((user, layer))
    return found


def _behind(node: fx.Node, ends: Mapping[fx.Node, Any]) -> Iterator[fx.Node]:
    """Yield the ends from which a value comes, by way of no weight."""
    todo, seen = [node], set()
    while todo:
        each = todo.pop()
        if each in seen:
            continue
        seen.add(each)
        if each in ends:
            yield each
        elif weight_op(each) is None:
            todo += tensor_inputs(each)


@dataclass(frozen=True)
class _Writer:
    graph: fx.Graph
    prefix: PrefixSpec
    adapter: str
    fakes: FakeValues
    layer_of: Mapping[fx.Node, int]
    masks: dict[fx.Node, fx.Node]

    def write(self, attention: Attention, layer: int) -> None:
        node = attention.result
        given = arguments_of(node)
        if "attn_mask" not in given:
            self._before_softmax(self._softmax(attention, layer))
            return
        if given.get("is_causal"):
            raise self._unknown(layer, node, "masks by positions alone")
        for name in ("key", "value"):
            set_argument(node, name, self._cut(given[name], -2, node))
        mask = given["attn_mask"]
        columns = mask.meta["val"].shape[-1] if isinstance(mask, fx.Node) else 1
        if not isinstance(columns, int) or columns != 1:  # one that varies is not compared: that would fix it
            if mask not in self.masks:
                self.masks[mask] = self._cut(mask, -1, mask.next)
            set_argument(node, "attn_mask", self.masks[mask])

    def _softmax(self, attention: Attention, layer: int) -> fx.Node:
        todo, seen = [attention.result], set()
        while todo:
            node = todo.pop(0)
            if name_of(node) in SOFTMAX:
                if node.args[1] in (-1, node.meta["val"].dim() - 1):
                    return node
                break
            if node not in seen and node not in self.layer_of:
                seen.add(node)
                todo += tensor_inputs(node)
        raise self._unknown(layer, attention.result, "has no softmax over its last dimension")

    def _before_softmax(self, softmax: fx.Node) -> None:
        scores = softmax.all_input_nodes[0]
        text = self._cut(scores, -1, softmax)
        with self.graph.inserting_before(softmax):
            pads = [self.prefix.tokens, 0]
            padded = self.graph.call_function(aten.constant_pad_nd.default, (text, pads, -math.inf))
        softmax.replace_input_with(scores, self._recorded(padded, softmax))

    def _cut(self, node: fx.Node, dim: int, before: fx.Node) -> fx.Node:
        with self.graph.inserting_before(before):
            cut = self.graph.call_function(aten.slice.Tensor, (node, dim, self.prefix.tokens, sys.maxsize))
        return self._recorded(cut, node if before is node.next else before)

    def _recorded(self, node: fx.Node, like: fx.Node) -> fx.Node:
        describe(node, like, None)
        write_stamp(node, {"rule": self.prefix.rule, "site": "prefix", "adapter": self.adapter, "part": HIDDEN})
        self.fakes.record(node, like)
        return node

    def _unknown(self, layer: int, node: fx.Node, problem: str) -> PlanError:
        return PlanError(
            f"{self.prefix.rule}: layers: a prefix cannot be hidden from layer {layer}, whose attention {node.name} {problem}. Leave layers out."
        )
