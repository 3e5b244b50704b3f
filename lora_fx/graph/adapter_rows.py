"""The choice of an adapter for each row of a batch: the names of a call become numbers, which a graph takes as a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lora_fx.errors import InputError, did_you_mean, listed

ADAPTER_NAMES = "adapter_names"
"""PEFT's name of the argument."""

BASE = "__base__"
"""PEFT's name for rows without an adapter."""


@dataclass(frozen=True)
class AdapterRows:
    """The adapters that the rows of a batch may have; of a call, also those that they have.

    Attributes:
        adapters: by their numbers; the number behind the last one stands for the base.
        names: for each row.
    """

    adapters: tuple[str, ...]
    names: tuple[str, ...] = ()

    def chosen(self, value: Any) -> AdapterRows:
        """Return the choice that a call makes.

        Raises:
            InputError: the value is no list of names of these adapters.
        """
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
            raise InputError(f"{self._expected} for each row, got {value!r:.60}.")
        unknown = list(dict.fromkeys(name for name in value if name not in (*self.adapters, BASE)))
        if unknown:
            meant = did_you_mean(unknown[0], self.adapters)
            raise InputError(f"{self._expected} for each row, got {listed(list(map(repr, unknown)), 5)}{meant}.")
        return replace(self, names=tuple(value))

    def value(self, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the numbers of the adapters ``(rows,)``, on the device of the other inputs."""
        numbers = {name: number for number, name in enumerate((*self.adapters, BASE))}
        device = next(iter(given.values())).device
        return torch.tensor([numbers[name] for name in self.names], dtype=torch.long, device=device)

    @property
    def _expected(self) -> str:
        return f"input '{ADAPTER_NAMES}': expected one of {', '.join(map(repr, (*self.adapters, BASE)))}"


def check_count(names: int, rows: int, name: str, adapters: Sequence[str]) -> None:
    """Raise :class:`InputError` unless there are as many names as an input of this name has rows."""
    if names != rows:
        raise InputError(
            f"input '{ADAPTER_NAMES}': expected {rows} names, one for each row of '{name}', got {names}. The adapters are "
            f"{listed(list(map(repr, adapters)), 20)}, and '{BASE}' for none."
        )


class RowCheck(nn.Module):
    """Raise :class:`InputError` unless there is an adapter for each row of an input, and the graph is in evaluation mode."""

    _is_impure = True  # keeps the call alive through dead-code elimination

    def __init__(self, name: str, adapters: tuple[str, ...]) -> None:
        super().__init__()
        self.name = name
        self.adapters = adapters

    def forward(self, numbers: torch.Tensor, value: torch.Tensor) -> None:
        """Check the numbers of the adapters against an input whose first dimension is the batch."""
        if self.training:
            raise InputError(
                f"{ADAPTER_NAMES} is for inference, and the graph is in training mode: call graph.eval(), or train one adapter at a time."
            )
        check_count(numbers.size(0), value.size(0), self.name, self.adapters)

    def extra_repr(self) -> str:
        """Return the adapters, for the printed module."""
        return ", ".join(self.adapters)
