"""The tables of a prefix and of a prompt in a rule file. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from lora_fx.rules.validation import Dropout, Flag, Items, Layers, Natural, Positive, Table, one_of, shown
from lora_fx.rules.vocabulary import AttentionPlace, PrefixPositions, PrefixRole

PREFIXES = ("prefix", "prompt")
"""Keys of these tables, of which a rule set has one at most."""


class Prefix(Table):
    """The ``[[prefix]]``: learned keys and values in front of those of attentions (arXiv 2101.00190)."""

    tokens: Positive = 20
    """How many keys and values, as of so many tokens."""

    role: Annotated[PrefixRole, one_of(PrefixRole)] = "self_attention"
    """Which attentions; of an encoder-decoder model self_attention is that of the decoder, and "peft" the same in the order of PEFT's file."""

    positions: Annotated[PrefixPositions, one_of(PrefixPositions)] | None = None
    """Positions of the text: "peft", shifted by the prefix, unless said; those of an encoder and of cross-attention are "unchanged"."""

    projection: Flag = False
    """Whether they are computed by two linear layers from embeddings of the tokens."""

    hidden: Positive | None = None
    """Width between these two layers; that of an embedding unless said."""

    layers: Annotated[tuple[Layers, ...], Items('[0, "4-7"]')] | None = None
    """Numbers of the layers that have them, counted from 0, or ranges of these, each with both ends; all layers unless said."""

    dropout: Dropout | None = None
    """Rate at which their elements are dropped in training; none unless said."""

    @classmethod
    def as_a_whole(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Tell whether there is a width without a projection."""
        if "hidden" in given and given.get("projection") is not True:
            yield "hidden", f"expected none without projection = true, found {shown(given['hidden'])}"
        if given.get("role") == "peft" and given.get("layers") is not None:
            yield (
                "layers",
                f'expected none with role = "peft", whose file is for all layers, found {shown(given["layers"])}',
            )

        role, positions = given.get("role", "self_attention"), given.get("positions")
        if role in ("encoder", "cross_attention") and positions == "peft":
            yield "positions", f'expected "unchanged" with role = "{role}", for which PEFT has no prefix, found "peft"'
        if role == "peft" and positions == "unchanged":
            yield (
                "positions",
                'expected "peft" with role = "peft", whose file means shifted positions, found "unchanged"',
            )

    @property
    def place(self) -> AttentionPlace | None:
        """At which attentions it is written as nodes; None for one that is a past."""
        if self.role == "peft" or (self.role == "self_attention" and self.positions != "unchanged"):
            return None
        return self.role


class Prompt(Table):
    """The ``[[prompt]]``: learned embeddings in front of those of the inputs (arXiv 2104.08691)."""

    tokens: Positive = 20
    """How many embeddings, as of so many tokens."""

    init_ids: Annotated[tuple[Natural, ...], Items("[5, 17, 3]", distinct=False)] | None = None
    """Ids of tokens whose embeddings they start as, over and over if there are fewer; random numbers unless said."""

    @classmethod
    def unknown(cls, key: str) -> str:
        """Return the message for a key that the table does not have."""
        return _TEXT if key in ("init", "text") else super().unknown(key)


_TEXT = "unknown key; a text to start from is given by its ids, init_ids = […], which its tokenizer knows"
