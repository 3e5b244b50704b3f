"""The slot of a graph for a prefix: the one tensor that all attentions take as the keys and values in front of their own.

A graph that is traced with ``prefix=True`` computes with a past that one tensor has::

    source (tokens, layers · 2 · heads · size) → expand → view → of each layer: select, expand over the batch → cat(prefix, keys)

The source is an empty tensor, or what an adapter computes from its parameters. All else follows in the graph: masks, positions and
biases are made by the model's own code from the number of tokens. The number is read off the source, but for conditions of the trace on
sizes (a table of so many positions), which are written anew for each number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from lora_fx.errors import PlanError, TraceError
from lora_fx.graph.adapter_names import is_of_prefix
from lora_fx.graph.aten_kinds import set_argument
from lora_fx.graph.erasing import erase_unread
from lora_fx.graph.input_checks import PREFIX as CHECKS
from lora_fx.graph.input_checks import Constraints, add_relation_checks
from lora_fx.graph.provenance import stamp_of
from lora_fx.graph.signature import InputCodeGen, signature_of
from lora_fx.graph.size_relations import UNBOUNDED, Relation

INPUT = "prefix"
"""Name of the prefix among the inputs of a trace, of which it becomes the slot."""

AXIS = "prefix_tokens"
"""Name of its first dimension."""

EMPTY = "empty_prefix"
"""Name of the buffer that a slot holds when no prefix acts."""

NO_WEIGHTS_HOLD = {
    "prefix": "a prefix is keys and values in front of those of the text, which no weights can hold",
    "prompt": "a prompt is embeddings in front of those of the text, which no weights can hold",
}

HIDDEN = "hidden prefix"
"""Part of nodes that hide a prefix from a layer: each reads last what the layer reads without it."""

AHEAD = "prefix ahead"
"""Part of nodes that put a prefix in front at an attention: each reads last what the attention reads without it."""

CAUSAL = "causal mask"
"""Part of a mask that an attention without a prefix makes of its sizes."""

_CHECK = f"{CHECKS}.prefix"
_SIZE = re.compile(rf"\b{INPUT}\.size\(0\)")
_SHAPE = [-1, -1]  # of the expand that marks the slot: nothing else writes this


@dataclass(frozen=True)
class PrefixSlot:
    """The slot of a graph, which was traced with ``prefix=True``, or with a cache.

    Attributes:
        layers: that take a prefix, each with keys and values in this order; none of a slot for prompts, which are ``size`` features of a token.
        heads: of keys and values.
        size: of a head.
        dtype: of keys and values.
        counted: the number of layers that PEFT reads off the config of the model: of an encoder-decoder model those of the encoder.
        decodes: whether the layers are those of the decoder of an encoder-decoder model.
        embeddings: name of the weight whose rows embed the inputs, of a slot for prompts; empty where there is none.
        past: whether the graph has no node for it: it was traced with a cache, and takes the prefix as the past of the first call.
        conditions: on the number of tokens and the sizes of inputs.
    """

    layers: int
    heads: int
    size: int
    dtype: torch.dtype
    counted: int
    decodes: bool = False
    past: bool = False
    embeddings: str = ""
    conditions: tuple[Relation, ...] = ()

    @property
    def is_prompt(self) -> bool:
        """Whether it takes embeddings in front of those of the inputs."""
        return self.layers == 0

    @property
    def width(self) -> int:
        """Features of a token: of keys and values, of all heads of all layers; of a prompt those of an embedding."""
        return (self.layers * 2 or 1) * self.heads * self.size

    def at(self, tokens: int) -> list[Relation]:
        """Return the conditions on inputs for a number of tokens.

        Raises:
            PlanError: the trace does not hold for this number.
        """
        found = [Relation(_SIZE.sub(str(tokens), each.text)) for each in self.conditions]
        broken = next(
            (
                whole
                for whole, each in zip(self.conditions, found, strict=True)
                if not each.references and not each.holds({})
            ),
            None,
        )
        if broken is not None:
            limit = _SIZE.sub("tokens", broken.text)
            raise PlanError(f"the trace holds for prefixes with {limit}, and this one has {tokens} tokens.")
        return [each for each in found if each.references]


def open_slot(graph: fx.Graph, constraints: Constraints, slot: PrefixSlot, name: str) -> tuple[PrefixSlot, Constraints]:
    """Make the slot of a trace whose last input is the prefix (in place), empty.

    Args:
        graph: with a placeholder for the prefix.
        constraints: of the trace.
        slot: without conditions.
        name: of the model, for messages.

    Returns:
        The slot with its conditions, and the constraints on the other inputs.

    Raises:
        TraceError: the trace does not hold for an empty prefix, so that the model's own graph is not among those with a prefix.
    """
    low, high = constraints.ranges[INPUT][0]
    if low > 0:
        raise TraceError(
            f"prefix=True: {name} computes with an empty past otherwise than without one, so that its graph cannot take prefixes. Use LoRA."
        )
    ranges = {key: value for key, value in constraints.ranges.items() if key != INPUT}
    dtypes = {key: value for key, value in constraints.dtypes.items() if key != INPUT}
    own = [each for each in constraints.relations if (INPUT, 0) in each.references]
    bounds = [] if high == UNBOUNDED else [Relation(f"{INPUT}.size(0) <= {high}")]
    rest = [each for each in constraints.relations if each not in own]
    slot = replace(slot, conditions=(*bounds, *own))
    given = next(node for node in graph.find_nodes(op="placeholder") if node.target == INPUT)
    empty = _empty_source(graph, given)
    with graph.inserting_after(empty):
        taken = graph.call_function(torch.ops.aten.expand.default, (empty, list(_SHAPE)))
    taken.meta = dict(given.meta)
    given.replace_all_uses_with(taken)
    graph.erase_node(given)
    codegen = graph._codegen
    assert isinstance(codegen, InputCodeGen)
    signature = signature_of(graph)
    signature = replace(
        signature,
        arguments=tuple(each for each in signature.arguments if each.name != INPUT),
        inputs=tuple(each for each in signature.inputs if each != INPUT),
    )
    graph.set_codegen(InputCodeGen(signature, codegen.pytree_info.out_spec))
    return slot, Constraints(ranges, dtypes, tuple(rest))


def slot_node(graph: fx.Graph) -> fx.Node | None:
    """Return the node that marks the slot of a graph, whose input is the prefix; None where it has none."""
    nodes: Iterable[fx.Node] = graph.find_nodes(op="call_function", target=torch.ops.aten.expand.default)
    return next((node for node in nodes if node.args[1] == _SHAPE and _is_prefix(node.all_input_nodes[0])), None)


def _is_prefix(node: fx.Node) -> bool:
    """Tell whether a value is computed from the parameters of a prefix, or is the empty one."""
    todo, found = [node], False
    while todo:
        each = todo.pop()
        if each.op == "get_attr":
            found = found or each.target == EMPTY or is_of_prefix(str(each.target))
        elif each.op == "placeholder":
            return False
        todo += each.all_input_nodes
    return found


def put(graph: fx.Graph, slot: PrefixSlot, prefix: fx.Node, tokens: int) -> dict[str, nn.Module]:
    """Let a slot hold another prefix (in place), and return the modules that check the conditions for it.

    Args:
        graph: with a slot.
        slot: its record.
        prefix: node of the value, before the slot.
        tokens: how many it has.

    Raises:
        PlanError: the trace does not hold for this number of tokens.
    """
    _take_out(graph)
    taken = slot_node(graph)
    assert taken is not None
    before = taken.all_input_nodes[0]
    taken.replace_input_with(before, prefix)
    if before is not prefix:
        erase_unread(graph, before)
    for node in list(graph.find_nodes(op="call_module")):
        if str(node.target).startswith(_CHECK):
            erase_unread(graph, node)
    return add_relation_checks(graph, slot.at(tokens), _CHECK)


def _take_out(graph: fx.Graph) -> None:
    """Let attentions read what they read without the nodes of a prefix (in place)."""
    for node in reversed(list(graph.nodes)):
        part = stamp_of(node).get("part")
        if part == CAUSAL:
            for reader in list(node.users):
                set_argument(reader, "attn_mask", None)
                set_argument(reader, "is_causal", True)
                reader.kwargs = {name: value for name, value in reader.kwargs.items() if name != "attn_mask"}
            erase_unread(graph, node)
        elif part in (HIDDEN, AHEAD):
            node.replace_all_uses_with(node.all_input_nodes[-1])
            erase_unread(graph, node)


def emptied(graph: fx.Graph, slot: PrefixSlot | None) -> dict[str, nn.Module]:
    """Let a graph compute without a prefix (in place), and return the modules that check its conditions then."""
    _take_out(graph)
    taken = None if slot is None else slot_node(graph)
    if slot is None or taken is None or taken.all_input_nodes[0].target == EMPTY:
        return {}
    return put(graph, slot, _empty_source(graph, taken), 0)


def _empty_source(graph: fx.Graph, like: fx.Node) -> fx.Node:
    """Write the empty prefix behind the inputs, with the metadata of another node."""
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        empty = graph.create_node("get_attr", EMPTY)
    empty.meta = dict(like.meta)
    return empty


def wanted_slot(slot: PrefixSlot | None, expected: str, *, prompt: bool = False) -> PrefixSlot:
    """Return the slot of a graph, for prompts or for keys and values.

    Raises:
        PlanError: it has no such slot.
    """
    kind, asked = ("prompt", '"prompt"') if prompt else ("prefix", "True")
    if prompt and slot is not None and slot.past:
        raise PlanError(f"{expected}: a graph with a cache takes no prompt, which is no past. Leave out cache=True.")
    if slot is None or slot.is_prompt != prompt:
        raise PlanError(
            f"{expected} needs a graph that can take a {kind}, and this one was traced without (with a cache, graphs of encoder-decoder "
            "models have no place for one): pass the model, or the graph that "
            f"lora_fx.trace(model, prefix={asked}) returns."
        )
    return slot
