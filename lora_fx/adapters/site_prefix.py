"""Prefixes at attentions that take no past, or whose text keeps its positions: nodes that put keys and values in front of those in the graph.

    keys → cat([prefix keys of each row, keys])        values → cat([prefix values of each row, values])
    mask → mask with a column in front for each token, which admits it: 0 (additive), True (boolean)

A causal attention without a mask gets one. Of an attention that is written out, what meets the scores by columns between their product and
the softmax is extended so, too: a summand by 0, a condition by that under which scores stay as they are. T5's biases of positions are
part of the mask, and 0 for the prefix. The recorded shapes of scores stay those of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lora_fx.adapters.fake_values import FakeValues
from lora_fx.branches.lower import describe
from lora_fx.errors import PlanError
from lora_fx.graph.aten_kinds import SOFTMAX, arguments_of, name_of, set_argument, tensor_inputs
from lora_fx.graph.prefix_slot import AHEAD, CAUSAL
from lora_fx.graph.provenance import write_stamp
from lora_fx.graph.records import PrefixSpec
from lora_fx.sites.attention import attentions
from lora_fx.sites.attention_places import Operands, operands_of, scores_between, softmax_is_last, unknown

aten = torch.ops.aten

_BY_ELEMENT = frozenset(
    {"to", "_to_copy", "type_as", "dropout", "clamp", "neg", "tanh", "clone", "contiguous", "maximum", "max"}
)
"""Operators between scores and weights that change each element alone, if they read one tensor with columns."""


def write_at_attentions(
    graph: fx.Graph, value: fx.Node, prefix: PrefixSpec, adapter: str, ends: Sequence[fx.Node], fakes: FakeValues
) -> None:
    """Put a prefix in front of the keys and values of attentions (in place).

    Args:
        graph: without a prefix.
        value: ``(tokens, layers · 2 · heads · size)``, with a pair for each of the attentions that have one.
        prefix: its record.
        adapter: that it belongs to.
        ends: the results of the attentions, in graph order.
        fakes: values of new nodes.

    Raises:
        PlanError: an attention has other heads, or is written in a way that is not known; it is named.
    """
    numbers = range(prefix.layers) if prefix.pairs is None else prefix.pairs
    if len(numbers) != len(ends):
        raise PlanError(
            f"adapter {adapter!r} has a prefix for {len(numbers)} attentions ({prefix.place}), and the graph has {len(ends)} of these. Trace "
            "the same model."
        )
    by_end = {each.result: operands_of(each) for each in attentions(list(graph.nodes)) if each.result in ends}
    writer = _AttentionWriter(graph, prefix, adapter, fakes)
    sizes = [prefix.tokens, prefix.layers, 2, prefix.heads, prefix.size]
    with graph.inserting_after(value):
        pairs = writer.call(aten.view.default, value, sizes, like=value)
    with graph.inserting_after(pairs):
        pairs = writer.call(aten.permute.default, pairs, [1, 2, 3, 0, 4], like=value)
    for end, number in zip(ends, numbers, strict=True):
        operands = by_end[end]
        if (operands.heads, operands.size) != (prefix.heads, prefix.size):
            told = f"{operands.heads} heads of {operands.size}, and the prefix of adapter {adapter!r} {prefix.heads} of {prefix.size}"
            raise unknown(end, f"has {told}")
        if number is not None:
            writer.write(operands, pairs, number)


@dataclass(frozen=True)
class _AttentionWriter:
    graph: fx.Graph
    prefix: PrefixSpec
    adapter: str
    fakes: FakeValues
    masks: dict[tuple[fx.Node, bool], fx.Node] = field(default_factory=dict)

    def call(self, target: Any, *args: Any, like: fx.Node, part: str = "prefix") -> fx.Node:
        """Write a call, stamped, with the origin of another node."""
        name = f"prefix_{target.overloadpacket.__name__}"  # which does not count the nodes beside it
        node = self.graph.create_node("call_function", target, args, name=name)
        describe(node, like, None)
        write_stamp(node, {"rule": self.prefix.rule, "site": "prefix", "adapter": self.adapter, "part": part})
        self.fakes.record(node, like)
        return node

    def write(self, operands: Operands, pairs: fx.Node, number: int) -> None:
        end, fused = operands.result, operands.product is None
        if fused:
            self._extend_mask(end)
        else:
            self._extend_scores(operands)
        reader = end if operands.product is None else operands.product
        with self.graph.inserting_before(reader):
            pair = self.call(aten.select.int, pairs, 0, number, like=operands.key)
            key = self._ahead(operands.key, pair, 0, operands.key_axis, operands)
        reader.replace_input_with(operands.key, key)
        with self.graph.inserting_before(end):
            value = self._ahead(operands.value, pair, 1, -2, operands)
        end.replace_input_with(operands.value, value)

    def _ahead(self, node: fx.Node, pair: fx.Node, index: int, axis: int, operands: Operands) -> fx.Node:
        """Put the keys, or the values, of a prefix in front of those in the graph, for each row."""
        own = self.call(aten.select.int, pair, 0, index, like=node)
        if operands.repeats > 1:
            tokens, size, heads = self.prefix.tokens, self.prefix.size, self.prefix.heads
            own = self.call(aten.unsqueeze.default, own, 1, like=node)
            own = self.call(aten.expand.default, own, [heads, operands.repeats, tokens, size], like=node)
            own = self.call(aten.reshape.default, own, [heads * operands.repeats, tokens, size], like=node)
        if axis == -1:
            own = self.call(aten.transpose.int, own, -2, -1, like=node)
        batch = self.call(aten.sym_size.int, node, 0, like=node)
        own = self.call(aten.expand.default, own, [batch, -1, -1, -1], like=node)
        return self.call(aten.cat.default, [own, node], axis, like=node, part=AHEAD)

    def _extend_mask(self, attention: fx.Node) -> None:
        given = arguments_of(attention)
        mask = given["attn_mask"]
        if given.get("is_causal"):
            if mask is not None:
                raise unknown(attention, "has a mask, and masks by positions besides")
            set_argument(attention, "attn_mask", self._causal(attention, given["query"], given["key"]))
            set_argument(attention, "is_causal", False)
        elif mask is not None:
            dtype = mask.meta["val"].dtype
            set_argument(attention, "attn_mask", self._padded(mask, dtype == torch.bool))

    def _causal(self, attention: fx.Node, query: fx.Node, key: fx.Node) -> fx.Node:
        """Write the mask of a causal attention over the text, whose first query reads the first key alone, behind the prefix."""
        with self.graph.inserting_before(attention):
            sizes = [self.call(aten.sym_size.int, each, -2, like=each) for each in (query, key)]
            mask = self.call(aten.new_ones.default, query, sizes, like=query)
            mask = self.call(aten.tril.default, mask, like=query)
            mask = self.call(aten.constant_pad_nd.default, mask, [self.prefix.tokens, 0], 1.0, like=query)
            return self.call(aten.gt.Scalar, mask, 0.0, like=query, part=CAUSAL)

    def _padded(self, node: fx.Node, admits: bool) -> fx.Node:
        """Put a column in front of a mask for each token, if it has columns; once for all attentions that read it."""
        shape = node.meta["val"].shape
        if not shape or (
            isinstance(shape[-1], int) and shape[-1] == 1
        ):  # one that varies is not compared: that would fix it
            return node
        if (node, admits) not in self.masks:
            with self.graph.inserting_after(node):
                pads = [self.prefix.tokens, 0], int(admits)
                self.masks[node, admits] = self.call(aten.constant_pad_nd.default, node, *pads, like=node, part=AHEAD)
        return self.masks[node, admits]

    def _extend_scores(self, operands: Operands) -> None:
        """Extend what meets the scores of an attention that is written out by columns."""
        assert operands.product is not None
        scores = scores_between(operands, list(self.graph.nodes))
        if not any(name_of(node) in SOFTMAX for node in scores):
            raise unknown(operands.result, "has no softmax")
        for node in scores[1:]:
            name, others = name_of(node), [each for each in tensor_inputs(node) if each not in scores]
            if name in ("add", "sub"):
                for other in others:
                    node.replace_input_with(other, self._padded(other, admits=False))
            elif name == "masked_fill" and node.args[0] in scores:
                node.update_arg(1, self._padded(node.all_input_nodes[1], admits=False))
            elif name == "where" and node.args[0] not in scores:
                self._extend_choice(node, scores)
            elif not self._by_element(node, others):
                raise unknown(
                    operands.result, f"reads scores by {node.name}, an operator for which a prefix is not known"
                )

    def _extend_choice(self, node: fx.Node, scores: Sequence[fx.Node]) -> None:
        condition, kept, other = node.args[0], node.args[1], arguments_of(node).get("other")
        assert isinstance(condition, fx.Node)
        node.update_arg(0, self._padded(condition, admits=kept in scores))
        if isinstance(other, fx.Node) and other not in scores:
            node.update_arg(2, self._padded(other, admits=False))
        if isinstance(kept, fx.Node) and kept not in scores:
            node.update_arg(1, self._padded(kept, admits=False))

    def _by_element(self, node: fx.Node, others: Sequence[fx.Node]) -> bool:
        """Tell whether a node gives each score its own value, of itself and of what all of a row have."""
        if name_of(node) in SOFTMAX:
            return softmax_is_last(node)
        if any(self._has_columns(other) for other in others):
            return False
        return name_of(node) in _BY_ELEMENT | {"mul", "div", "true_divide"}

    @staticmethod
    def _has_columns(node: fx.Node) -> bool:
        shape = node.meta["val"].shape
        return bool(shape) and not (isinstance(shape[-1], int) and shape[-1] == 1)
