"""The prefix of a rule set for a graph: its sizes are those of the keys and values in the graph, which no rule says."""

from __future__ import annotations

from torch import fx

from lora_fx.errors import PlanError
from lora_fx.graph.prefix_slot import PrefixSlot, wanted_slot
from lora_fx.graph.records import PrefixSpec
from lora_fx.rules.dotted_names import has_layer
from lora_fx.rules.prefix_table import Prefix
from lora_fx.rules.rule_file import RuleSet
from lora_fx.rules.vocabulary import AttentionPlace
from lora_fx.sites.attention_places import attentions_at, operands_of, unknown


def prefix_of(rules: RuleSet, slot: PrefixSlot | None, graph_module: fx.GraphModule) -> PrefixSpec | None:
    """Return the prefix or the prompt that rules ask for, if they do.

    Args:
        rules: of which one table at most is for a prefix.
        slot: of the graph.
        graph_module: without branches.

    Raises:
        PlanError: the graph can take no prefix, or has no such layer or attention, or PEFT has none for such a model.
    """
    for prompt in rules.prompt:
        where = f"{rules.name!r}: [[prompt]]"
        slot, ids = wanted_slot(slot, where, prompt=True), prompt.init_ids
        if ids and not slot.embeddings:
            raise PlanError(f"{where}: init_ids: what this model embeds tokens as is no row of a weight. Leave it out.")
        starts_as = (slot.embeddings, ids) if ids else None
        return PrefixSpec(prompt.tokens, 0, 1, slot.size, f"{rules.name}:prompt", starts_as=starts_as)
    for each in rules.prefix:
        rule = f"{rules.name}:prefix"
        if each.place is not None:
            return _at_place(each, each.place, graph_module, rule)
        slot = wanted_slot(slot, f"{rules.name!r}: [[prefix]]")
        if slot.past:
            raise PlanError(
                f"{rules.name!r}: [[prefix]]: a graph with a cache takes a prefix as the past of the first call, and trains none. Train it "
                "without cache=True, and lora_fx.transfer(trained, onto=lora_fx.trace(model, cache=True)), or lora_fx.from_adapter(…, cache=True)."
            )
        layers, pairs = peft_pairs(slot) if each.role == "peft" else _chosen(each, slot.layers, rule)
        width = slot.heads * slot.size
        hidden = (each.hidden or width) if each.projection else None
        return PrefixSpec(each.tokens, layers, slot.heads, slot.size, rule, hidden, pairs, each.dropout or 0.0)
    return None


def _at_place(prefix: Prefix, place: AttentionPlace, graph_module: fx.GraphModule, rule: str) -> PrefixSpec:
    """Return a prefix that is written as nodes at the attentions of a place, which have heads of one number and size."""
    found = [operands_of(each) for each in attentions_at(graph_module, place)]
    heads, size = found[0].heads, found[0].size
    for each in found:
        if (each.heads, each.size) != (heads, size):
            told = f"has {each.heads} heads of {each.size}, where the first one has {heads} of {size}: a prefix has one size for all"
            raise unknown(each.result, told)
    layers, pairs = _chosen(prefix, len(found), rule)
    hidden = (prefix.hidden or heads * size) if prefix.projection else None
    return PrefixSpec(prefix.tokens, layers, heads, size, rule, hidden, pairs, prefix.dropout or 0.0, place=place)


def _chosen(prefix: Prefix, count: int, rule: str) -> tuple[int, tuple[int | None, ...] | None]:
    """Return for how many layers there are keys and values, and which of them each layer has."""
    if prefix.layers is None:
        return count, None
    for each in prefix.layers:
        if not any(has_layer(each, layer) for layer in range(count)):
            raise PlanError(f"{rule}: layers: expected some of 0 to {count - 1}, as the model has, found {each!r}.")
    chosen = [layer for layer in range(count) if any(has_layer(each, layer) for each in prefix.layers)]
    if len(chosen) == count:
        return count, None
    return len(chosen), tuple(chosen.index(layer) if layer in chosen else None for layer in range(count))


def peft_pairs(slot: PrefixSlot) -> tuple[int, tuple[int, ...] | None]:
    """Return the number of layers that PEFT's file has keys and values for, and which of them each layer of a model reads.

    In an encoder-decoder model PEFT repeats the L pairs of its file, takes two at a time for each layer of the decoder, and throws the
    second, for cross-attention, away (0.21.2): layer i reads pair 2i modulo L. L is the number of layers of the encoder.

    Raises:
        PlanError: the decoder has more layers than that, where PEFT fails.
    """
    if not slot.decodes:
        return slot.layers, None
    if slot.layers > slot.counted:
        raise PlanError(
            f'role = "peft": the decoder has {slot.layers} layers, and PEFT has keys and values for the {slot.counted} of the encoder alone, '
            'and fails. Say role = "self_attention".'
        )
    return slot.counted, tuple(2 * layer % slot.counted for layer in range(slot.layers))
