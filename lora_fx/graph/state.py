"""The state of a graph, as plain frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn


@dataclass(frozen=True)
class State:
    """The state of a graph: tensors by every name they have (ties are one object under several), and leaf modules."""

    tensors: Mapping[str, torch.Tensor]
    non_persistent: frozenset[str] = frozenset()
    modules: Mapping[str, nn.Module] = field(default_factory=dict)

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> State:
        """Return the state with these tensors added or replaced."""
        return replace(self, tensors={**self.tensors, **tensors})

    def with_modules(self, modules: Mapping[str, nn.Module]) -> State:
        """Return the state with these leaf modules added or replaced."""
        return replace(self, modules={**self.modules, **modules})

    def without(self, names: set[str]) -> State:
        """Return the state without the tensors and leaf modules of these names."""
        return State(
            {name: tensor for name, tensor in self.tensors.items() if name not in names},
            self.non_persistent - names,
            {name: module for name, module in self.modules.items() if name not in names},
        )

    def aliases(self) -> Mapping[str, str]:
        """Map every tensor name to the first name that the same tensor has."""
        first: dict[int, str] = {}
        return {name: first.setdefault(id(tensor), name) for name, tensor in self.tensors.items()}

    def names(self) -> Mapping[str, tuple[str, ...]]:
        """Map the first name of every tensor to all that it has."""
        names: dict[str, list[str]] = {}
        for name, first in self.aliases().items():
            names.setdefault(first, []).append(name)
        return {first: tuple(every) for first, every in names.items()}
