"""Small modules: of layers of each kind, and made of one function, with what is asked of their traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import unchanged
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx

X = torch.tensor([[0.5, -1.2, 0.3, 2.0], [-0.4, 0.8, 1.1, -0.7], [0.1, 0.9, -2.2, 0.6]])


class Layers(nn.Module):
    """An embedding, linears with a bias and without one, and GPT-2's Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.emb, self.q = nn.Embedding(11, 6), nn.Linear(6, 10)
            self.k, self.c = nn.Linear(10, 7, bias=False), Conv1D(9, 7)
            nn.init.normal_(self.c.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.k(torch.tanh(self.q(self.emb(x))))))  # type: ignore[no-any-return]


class Convolved(nn.Module):
    """Convolutions of some number of dimensions, with a bias and without one."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.wide, self.point = kind(3, 8, 3, stride=2, padding=1), kind(8, 5, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.point(torch.tanh(self.wide(x)))  # type: ignore[no-any-return]


def module(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    """Return a module with this forward, a linear layer ``lin`` and these attributes, in train mode."""
    made: Any = type("Made", (nn.Module,), {"forward": forward})()
    made.lin = nn.Linear(4, 4)
    for name, part in parts.items():
        if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
            made.register_buffer(name, part)
        else:
            setattr(made, name, part)
    return made  # type: ignore[no-any-return]


def refused(model: nn.Module, match: str, inputs: Any = (X,), **settings: Any) -> None:
    """Fail unless a trace raises a TraceError that matches, and leaves the model as it was."""
    with unchanged(model), pytest.raises(lora_fx.TraceError, match=match):
        lora_fx.trace(model, inputs, **settings)


def agrees(model: nn.Module, inputs: Any = (X,), **settings: Any) -> lora_fx.TracedGraphModule:
    """Fail unless a trace gives the numbers of the model, in the modes that it has, under one random state."""
    with unchanged(model):
        graph = lora_fx.trace(model, inputs, **settings)
    for training in (False,) if settings.get("inference") else (False, True):
        torch.manual_seed(5)
        expected = model.train(training)(*inputs)
        torch.manual_seed(5)
        assert torch.equal(graph.train(training)(*inputs), expected)
    return graph
