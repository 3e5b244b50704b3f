"""Settings of transformers models by which their Python decides by random numbers: layer drop, SpecAugment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import transformers
from torch import nn

_LAYER_DROP = ("layerdrop", "layer_drop")  # the end of the names: encoder_layerdrop
_MASKS = ("mask_time_prob", "mask_feature_prob")


def advice_on_random_settings(model: nn.Module) -> str:
    """Return a sentence that names what to set, where the config of a model lets it skip layers or mask its input at random."""
    found = list(_settings(getattr(model, "config", None), "config"))
    if not found:
        return ""
    return (
        f" In training its Python decides by random numbers, and a graph would repeat one choice: make the model anew with "
        f"{' and '.join(found)}, then it trains."
    )


def _settings(config: Any, path: str) -> Iterator[str]:
    """Yield the assignments that switch the settings off."""
    if not isinstance(config, transformers.PreTrainedConfig):
        return
    for name, value in vars(config).items():
        if name.endswith(_LAYER_DROP) and isinstance(value, float | int) and value > 0:
            yield f"{path}.{name} = 0"
        elif name == "apply_spec_augment" and value and any(getattr(config, mask, 0) for mask in _MASKS):
            yield f"{path}.{name} = False"
        else:
            yield from _settings(value, f"{path}.{name}")
