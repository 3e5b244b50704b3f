"""What differs between the releases of transformers that this package runs with, in one place.

Models take a key-value cache, and return it, under one of two names: ``past_key_values`` up to 5.23, ``cache`` from 5.24 on. A model that
is given the other name may compute without what came before: other tokens, and no error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

from lora_fx.errors import InputError

_RENAMED = "cache" in {each.name for each in fields(CausalLMOutputWithPast)}

CACHE_NAMES = ("cache", "past_key_values") if _RENAMED else ("past_key_values", "cache")
"""Names of a key-value cache: that of this transformers, and that of older or newer code."""

CACHE = CACHE_NAMES[0]
"""Name of a key-value cache in this transformers."""


def cache_name(forward: Callable[..., Any]) -> str | None:
    """Return the name under which the ``forward`` of a model takes a key-value cache; None where it takes none."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def cache_in(given: Mapping[str, Any]) -> Any:
    """Return the cache among inputs by their names; None where there is none."""
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def without_cache(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs or outputs by their names, the cache left out."""
    return {name: value for name, value in given.items() if name not in CACHE_NAMES}


def check_cache_name() -> None:
    """Raise :class:`InputError` where ``generate`` of this transformers passes its cache by a name that is not known."""
    if CACHE not in inspect.signature(transformers.GenerationMixin.prepare_inputs_for_generation).parameters:
        raise InputError(
            f"transformers {transformers.__version__} passes the cache to models by another name than {' or '.join(CACHE_NAMES)}: tokens would be "
            "computed without those before them. Install transformers 5.4 to 5.24."
        )
