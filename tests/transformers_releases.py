"""What differs between the releases of transformers that the tests run with."""

from __future__ import annotations

import peft
import pytest
import transformers

_RELEASE, _PEFT = (tuple(map(int, each.__version__.split(".")[:2])) for each in (transformers, peft))

# Before 5.6 its table of older names left out `model.` in front, which its own loading adds, and PEFT's does not.
PEFT_FINDS_OLDER_VISION_LANGUAGE_MODELS = _RELEASE >= (5, 6)

# PEFT 0.21.2 knows caches by the name that they had before: `generate` goes on without its prefix, writes other tokens behind its prompt than
# greedy search with the same PEFT model does, and some models are refused.
peft_takes_caches = pytest.mark.xfail(
    _RELEASE >= (5, 24), strict=True, reason="PEFT's prefixes and prompts do not go with this transformers"
)

# It asks for PEFT 0.22, which came later.
transformers_takes_peft = pytest.mark.xfail(
    _RELEASE >= (5, 24) and _PEFT < (0, 22),
    strict=True,
    raises=ValueError,
    reason="`add_adapter` of this transformers asks for a later PEFT",
)

# Its Llama detaches no cosines and sines: two nodes fewer.
drawn_as_looked_at = pytest.mark.xfail(
    _RELEASE >= (5, 24), strict=True, reason="pictures were looked at with transformers 5.23"
)
