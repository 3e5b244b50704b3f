"""``adapter_config.json`` of PEFT's prefix and prompt tuning, as data. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, Self

from lora_fx.rules.peft_config.config import (
    DUMMY,
    AdapterConfig,
    SharedKeys,
    beside_other_keys,
)
from lora_fx.rules.validation import Flag, Positive, Text, validated


class AheadConfig(SharedKeys):
    """What stands in front of the text, and what trains beside it, in PEFT's words."""

    kind: ClassVar[Literal["prefix", "prompt"]]

    peft_type: Literal["PREFIX_TUNING", "PROMPT_TUNING"]
    """The kind of adapter."""

    num_virtual_tokens: Positive
    """How many tokens."""

    token_dim: Positive
    """Features of the keys of a layer, of all heads, or of an embedding."""

    num_transformer_submodules: Positive | None = None
    """2 for encoder-decoder models: a prefix has keys and values of two layers for each of theirs, a prompt twice the embeddings."""

    @property
    def beside(self) -> AdapterConfig:
        """The configuration of an adapter that trains the same of the model's own, and adapts no module."""
        shared = {key: getattr(self, key) for key in SharedKeys.model_fields}
        return AdapterConfig(peft_type="LORA", target_modules=DUMMY, **shared)

    @classmethod
    def of(cls, beside: AdapterConfig, **said: Any) -> Self:
        """Return the configuration beside what another adapter trains of the model's own."""
        return cls(**{key: getattr(beside, key) for key in SharedKeys.model_fields} | said)

    def to_json(self) -> str:
        """Return the file, with all keys that PEFT 0.21 writes, in its form."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True)


class PrefixConfig(AheadConfig):
    """A prefix."""

    kind: ClassVar[Literal["prefix"]] = "prefix"

    peft_type: Literal["PREFIX_TUNING"] = "PREFIX_TUNING"

    num_attention_heads: Positive
    """Heads of keys and values."""

    num_layers: Positive
    """Layers for which there are keys and values."""

    encoder_hidden_size: Positive | None = None
    """Width of the projection."""

    prefix_projection: Flag = False
    """Whether keys and values were computed by a projection; the file has what it computed."""

    init_weights: Text | None = None
    """How the prefix began."""


class PromptConfig(AheadConfig):
    """A prompt."""

    kind: ClassVar[Literal["prompt"]] = "prompt"

    peft_type: Literal["PROMPT_TUNING"] = "PROMPT_TUNING"

    num_attention_heads: Positive | None = None
    """Of the model; PEFT reads them off its config where they are not said."""

    num_layers: Positive | None = None
    """Of the model, as the heads."""

    prompt_tuning_init: Text = "RANDOM"
    """How the prompt began."""

    prompt_tuning_init_text: Text | None = None
    """The text that it began as."""

    tokenizer_name_or_path: Text | None = None
    """The tokenizer of that text."""

    tokenizer_kwargs: Mapping[str, Any] | None = None
    """Its settings."""


AHEAD: Mapping[str, type[PrefixConfig | PromptConfig]] = {
    "PREFIX_TUNING": PrefixConfig,
    "PROMPT_TUNING": PromptConfig,
}
"""PEFT's names of the methods whose values stand in front of the text."""


def prefix_config_in(
    document: Mapping[str, Any], source: str, ignored: Collection[str] = ()
) -> PrefixConfig | PromptConfig | None:
    """Return the config that a document of prefix or prompt tuning has; None for one of another method.

    Args:
        document: the object of its JSON.
        source: where it is, for messages.
        ignored: see :func:`~lora_fx.rules.peft_config.read_config.read_config`.

    Raises:
        AdapterError: it is malformed; all problems are named.
    """
    if (kind := AHEAD.get(str(document.get("peft_type")))) is None:
        return None
    given: Mapping[str, Any] = {key: value for key, value in document.items() if key in kind.model_fields}
    others = {key: value for key, value in document.items() if key not in given}
    return beside_other_keys(given, others, partial(validated, kind), source, ignored)
