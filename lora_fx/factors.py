"""The names of the factors A and B of low-rank branches, by which branches are nominated."""

from __future__ import annotations

import re

from torch import nn

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.(?P<adapter>[^.]+)\.weight")


def factor_name(module: str, part: str, adapter: str) -> str:
    """Return the full parameter name of a factor, ``part`` being ``"A"`` or ``"B"``."""
    return f"{module}.lora_{part}.{adapter}.weight"


def is_factor(name: str) -> bool:
    """Tell whether a parameter name is that of a factor."""
    return _FACTOR.fullmatch(name) is not None


def adapters(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters in a graph, in the order of their first parameters."""
    matches = (_FACTOR.fullmatch(name) for name, _ in module.named_parameters(remove_duplicate=False))
    return tuple(dict.fromkeys(match["adapter"] for match in matches if match))
