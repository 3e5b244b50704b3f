"""The name under which ``generate`` of this transformers passes the cache to a model.

Up to 5.23 it is ``past_key_values``; 5.24 says ``cache``. A model that waits for the other name would get none, and every step would be
computed without what came before: other tokens, and no error.
"""

from __future__ import annotations

import inspect

import transformers
from transformers import GenerationMixin

from lora_fx.errors import InputError

CACHE = "past_key_values"


def check_cache_name() -> None:
    """Raise :class:`InputError` where transformers passes its cache by another name than ``past_key_values``."""
    if CACHE not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
        raise InputError(
            f"transformers {transformers.__version__} passes the cache to models by another name than {CACHE}, which graphs and prefixes "
            "take it by: tokens would be computed without those before them. Install transformers 5.4 to 5.23."
        )
