"""Arguments that a transformers model fills in by itself where a call omits them: masks, positions, and flags of its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lora_fx.errors import InputError
from lora_fx.graph.size_relations import Reference
from lora_fx.transformers_releases import CACHE_NAMES

FillKind = Literal["ones", "zeros", "positions"]


@dataclass(frozen=True)
class Fill:
    """The value of an input that a call omits.

    Attributes:
        kind: ``"ones"`` for a mask that hides nothing; ``"zeros"``; ``"positions"``: those behind the past, ascending.
        sizes: for each dimension the sizes of other inputs whose sum it has; the first of several is that of the past.
        dtype: as in the trace.
    """

    kind: FillKind
    sizes: tuple[tuple[Reference, ...], ...]
    dtype: torch.dtype

    def value(self, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the value, on the device of the other inputs.

        Args:
            given: the other inputs by name.
        """
        least: dict[str, int] = {}
        for name, dim in (place for added in self.sizes for place in added):
            least[name] = max(least.get(name, 0), dim + 1)
        for name, dimensions in least.items():
            if given[name].dim() < dimensions:
                raise InputError(
                    f"input '{name}' has shape {tuple(given[name].shape)}, expected {dimensions} dimensions as in the trace, of which the "
                    f"first is the batch. Of a single example, pass {name}.unsqueeze(0)."
                )
        sizes = [[given[name].size(dim) for name, dim in added] for added in self.sizes]
        shape = [sum(added) for added in sizes]
        device = given[self.sizes[0][0][0]].device
        if self.kind == "positions":
            *batch, length = shape
            past = shape[-1] - sizes[-1][-1]
            positions = torch.arange(past, length, dtype=self.dtype, device=device)
            return positions.expand(*batch, length - past)
        return torch.full(shape, int(self.kind == "ones"), dtype=self.dtype, device=device)

    def cast(self, value: torch.Tensor) -> torch.Tensor:
        """Return a mask of booleans in the dtype of the trace; anything else unchanged."""
        return value.to(self.dtype) if self.kind == "ones" and value.dtype is torch.bool else value


def advice_on(name: str, given: Any) -> str:
    """Return how a graph is traced that takes an argument which this one was traced without."""
    if name == "labels":
        return "rewrite(…, labels=True) makes a graph that takes labels and returns the loss"
    if name in CACHE_NAMES or (name == "use_cache" and given):
        return (
            "rewrite(…, cache=True) makes a graph with a key-value cache, and generate() of this one takes the model's"
        )
    if name == "return_dict":
        return "it returns what the model's class returns: to_tuple() of that is a tuple"
    if isinstance(given, torch.Tensor):
        return f"rewrite(…, example_inputs={{…, {name!r}: a tensor}}) makes a graph that takes it"
    return f"rewrite(…, example_inputs={{…, {name!r}: {given!r:.30}}}) makes a graph with this value"
