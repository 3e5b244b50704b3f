"""What differs between the releases of transformers that the tests run with."""

from __future__ import annotations

import pytest
import transformers

_RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))

# Before 5.6 its table of older names left out `model.` in front, which its own loading adds, and PEFT's does not.
PEFT_FINDS_OLDER_VISION_LANGUAGE_MODELS = _RELEASE >= (5, 6)

# PEFT 0.21.2 hands its prefix on by the name that caches had before: `generate` goes on without the prefix, and some models are refused.
peft_takes_caches = pytest.mark.xfail(
    _RELEASE >= (5, 24), strict=True, reason="PEFT's prefixes do not go with this transformers"
)
