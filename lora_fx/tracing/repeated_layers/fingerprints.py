"""What a layer is, as far as a trace depends on it: two layers of one fingerprint are traced to the same nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lora_fx.tracing.repeated_layers.call_values import Frozen

Key = tuple[str, ...]
"""Path of a module in the layer, and the name of its attribute, or of one of its tensors."""

_CONTENTS = ("_parameters", "_buffers", "_modules")


def fingerprint(layer: nn.Module, frozen: Frozen) -> dict[Key, Any]:
    """Return all that the layer holds, by value, of its parameters and buffers only what can be told without reading them."""
    found = contents(layer, frozen)
    first: dict[int, str] = {}
    for path, module in layer.named_modules(remove_duplicate=False):
        for name, tensor in _tensors(module):
            found[path, "tensor", name] = _described(tensor, frozen, first.setdefault(id(tensor), f"{path}.{name}"))
    return found


def contents(layer: nn.Module, frozen: Frozen) -> dict[Key, Any]:
    """Return what the layer holds beside tensors."""
    own = {module: path for path, module in reversed(list(layer.named_modules(remove_duplicate=False)))}
    found: dict[Key, Any] = {}
    for path, module in layer.named_modules(remove_duplicate=False):
        found[path, "class"] = type(module)
        found[path, "children"] = tuple(module._modules)
        for name, value in vars(module).items():
            if name not in _CONTENTS:
                found[path, "attribute", name] = frozen(value, own)
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    yield from module._parameters.items()
    yield from module._buffers.items()


def _described(tensor: torch.Tensor | None, frozen: Frozen, first: str) -> Any:
    if tensor is None:
        return None
    form = (tensor.shape, tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad, tensor.is_leaf)
    strides = (tensor.stride(), tensor.storage_offset()) if tensor.layout is torch.strided else None
    return type(tensor), form, strides, first, frozen(dict(vars(tensor)), {})
