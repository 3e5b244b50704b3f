"""The table of a prefix in a rule file. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from lora_fx.rules.validation import Flag, Positive, Table, one_of, shown
from lora_fx.rules.vocabulary import PrefixRole


class Prefix(Table):
    """The ``[[prefix]]``: learned keys and values in front of those of every self-attention (arXiv 2101.00190)."""

    tokens: Positive = 20
    """How many keys and values, as of so many tokens."""

    role: Annotated[PrefixRole, one_of(PrefixRole)] = "self_attention"
    """Which attentions: of an encoder-decoder model those of the decoder; "peft" for the file of PEFT, whose rows are in another order there."""

    projection: Flag = False
    """Whether they are computed by two linear layers from embeddings of the tokens."""

    hidden: Positive | None = None
    """Width between these two layers; that of an embedding unless said."""

    @classmethod
    def as_a_whole(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Tell whether there is a width without a projection."""
        if "hidden" in given and given.get("projection") is not True:
            yield "hidden", f"expected none without projection = true, found {shown(given['hidden'])}"

    @classmethod
    def unknown(cls, key: str) -> str:
        """Return the message for a key that the table does not have."""
        return _OF_PREFIX.get(key) or super().unknown(key)


_OF_PREFIX = {
    "layers": "unknown key; a prefix is the past of the model, which all layers have",
    "dropout": "unknown key; a prefix has no dropout, as in PEFT",
    "positions": "unknown key; the text stands behind the prefix, and its positions are shifted, as in PEFT",
}
"""Keys that ``[[prefix]]`` might be expected to have, and the reason for which it has none."""
