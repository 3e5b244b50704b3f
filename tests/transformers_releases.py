"""What differs between the releases of transformers that the tests run with."""

from __future__ import annotations

import transformers

# Before 5.6 its table of older names left out `model.` in front, which its own loading adds, and PEFT's does not.
PEFT_FINDS_OLDER_VISION_LANGUAGE_MODELS = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 6)
