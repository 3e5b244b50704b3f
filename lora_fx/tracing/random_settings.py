"""Decisions of a model's Python by random numbers (layer drop, SpecAugment): the settings for them, and draws that decide nothing."""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class Undrawn:
    """A random number that is drawn where its value matters; a comparison with a number outside of its range needs none.

    So MusicGen draws for each layer, and compares with its ``layerdrop`` of 0.
    """

    def __init__(self, low: float, high: float, draw: Callable[[], float]) -> None:
        self._ends = (low, high)
        self._draw = draw

    def _compared(self, comparison: Callable[[Any, Any], bool], other: object) -> bool:
        if isinstance(other, int | float):
            low, high = (comparison(end, other) for end in self._ends)
            if low is high:
                return low
        return comparison(self._draw(), other)

    def __lt__(self, other: object) -> bool:
        return self._compared(operator.lt, other)

    def __le__(self, other: object) -> bool:
        return self._compared(operator.le, other)

    def __gt__(self, other: object) -> bool:
        return self._compared(operator.gt, other)

    def __ge__(self, other: object) -> bool:
        return self._compared(operator.ge, other)

    def __eq__(self, other: object) -> bool:
        return self._draw() == other

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        return bool(self._draw())

    def __float__(self) -> float:
        return self._draw()


@contextmanager
def undrawn() -> Iterator[None]:
    """Let the functions that draw one number between two give this thread an :class:`Undrawn` inside the block.

    A model that computes with such a number draws it, or fails.
    """
    thread = threading.get_ident()

    def lazily(function: Callable[..., float]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread or kwargs or len(args) not in (0, 2):
                return function(*args, **kwargs)
            low, high = sorted(args or (0.0, 1.0))
            return Undrawn(low, high, lambda: function(*args))

        return called

    replaced = [(sys.modules[module], name) for module, name in _DRAWS if module in sys.modules]
    former = [vars(module)[name] for module, name in replaced]
    for (module, name), function in zip(replaced, former, strict=True):
        setattr(module, name, lazily(function))
    try:
        yield
    finally:
        for (module, name), function in zip(replaced, former, strict=True):
            setattr(module, name, function)


_DRAWS = (("random", "random"), ("random", "uniform"), ("numpy.random", "random"), ("numpy.random", "uniform"))
"""Module and name of the functions that draw one number: from 0 to 1, or between their two arguments."""
