"""``adapter_config.json`` of a directory, of whichever method. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lora_fx.errors import AdapterError
from lora_fx.rules.peft_config.config import CONFIG_NAME, AdapterConfig, config_in, read_document
from lora_fx.rules.peft_config.prefix_config import PrefixConfig, PromptConfig, prefix_config_in


def read_config(directory: Path, ignored: Collection[str] = ()) -> AdapterConfig | PrefixConfig | PromptConfig:
    """Read the config of an adapter directory.

    Args:
        directory: with ``adapter_config.json``.
        ignored: keys that lora_fx does not know, and of which somebody knows that they have no effect on the result. One warning
            names those that are there and are switched on.

    Raises:
        AdapterError: there is none, it is malformed, it is of a method that lora_fx does not apply, or it asks for what lora_fx cannot
            apply; all problems are named.
    """
    path = directory / CONFIG_NAME
    document = read_document(path, AdapterError, "a PEFT adapter")
    return prefix_config_in(document, str(path), ignored) or config_in(document, str(path), ignored)
