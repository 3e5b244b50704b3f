"""``adapter_config.json`` of PEFT's prefix tuning, as data. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lora_fx.errors import AdapterError
from lora_fx.rules.peft_config.config import (
    CONFIG_NAME,
    DUMMY,
    AdapterConfig,
    SharedKeys,
    beside_other_keys,
    read_document,
)
from lora_fx.rules.validation import Flag, Positive, Text, validated

METHOD: Literal["PREFIX_TUNING"] = "PREFIX_TUNING"


class PrefixConfig(SharedKeys):
    """A prefix, and what trains beside it, in PEFT's words."""

    peft_type: Literal["PREFIX_TUNING"]
    """The kind of adapter."""

    num_virtual_tokens: Positive
    """How many tokens."""

    token_dim: Positive
    """Features of the keys of a layer, of all heads."""

    num_attention_heads: Positive
    """Heads of keys and values."""

    num_layers: Positive
    """Layers for which there are keys and values."""

    num_transformer_submodules: Positive | None = None
    """2 for encoder-decoder models, whose layers take keys and values of two layers each."""

    encoder_hidden_size: Positive | None = None
    """Width of the projection."""

    prefix_projection: Flag = False
    """Whether keys and values were computed by a projection; the file has what it computed."""

    init_weights: Text | None = None
    """How the prefix began."""

    @property
    def beside(self) -> AdapterConfig:
        """The configuration of an adapter that trains the same of the model's own, and adapts no module."""
        shared = {key: getattr(self, key) for key in SharedKeys.model_fields}
        return AdapterConfig(peft_type="LORA", target_modules=DUMMY, **shared)

    @staticmethod
    def of(beside: AdapterConfig, **said: Any) -> PrefixConfig:
        """Return the configuration of a prefix beside what another adapter trains of the model's own."""
        return PrefixConfig(peft_type=METHOD, **{key: getattr(beside, key) for key in SharedKeys.model_fields} | said)

    def to_json(self) -> str:
        """Return the file, with all keys that PEFT 0.21 writes, in its form."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True)


def read_prefix_config(directory: Path, ignored: Collection[str] = ()) -> PrefixConfig | None:
    """Read the config of an adapter directory, if it is of prefix tuning.

    Args:
        directory: with ``adapter_config.json``.
        ignored: see :func:`lora_fx.rules.peft_config.config.read_config`.

    Raises:
        AdapterError: there is none, or it is malformed; all problems are named.
    """
    path = directory / CONFIG_NAME
    document = read_document(path, AdapterError, "a PEFT adapter")
    if document.get("peft_type") != METHOD:
        return None
    given: Mapping[str, Any] = {key: value for key, value in document.items() if key in PrefixConfig.model_fields}
    others = {key: value for key, value in document.items() if key not in given}
    return beside_other_keys(given, others, partial(validated, PrefixConfig), str(path), ignored)
