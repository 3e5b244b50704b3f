"""Small modules made of one function, and what is asked of their traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import unchanged
from torch import nn

import lora_fx

X = torch.tensor([[0.5, -1.2, 0.3, 2.0], [-0.4, 0.8, 1.1, -0.7], [0.1, 0.9, -2.2, 0.6]])


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
