"""Counting the parameters of a graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ParameterSummary:
    """How many parameters train. ``str()`` is the line that PEFT prints.

    Attributes:
        trainable: number of elements in parameters that require a gradient.
        total: number of elements in all parameters, tied ones counted once.
    """

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Share of trainable elements, in percent."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"trainable params: {self.trainable} || all params: {self.total} || trainable%: {self.percent}"


def parameter_summary(module: nn.Module) -> ParameterSummary:
    """Count the parameters of a module, each tensor once."""
    parameters = list(module.parameters())
    return ParameterSummary(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))
