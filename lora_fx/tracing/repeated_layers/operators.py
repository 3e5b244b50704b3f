"""Operators that a trace records where a layer begins and ends, and in place of a layer.

    enter(layer, values)          a template begins; it is given these tensors
    leave(layer, values)          it has ended; these tensors are its results, and then what it was given, as it left them
    stub(layer, values, like)     a layer that is given these tensors would compute something like those

None is left in a graph of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_library = torch.library.Library("lora_fx", "FRAGMENT")  # the registrations last as long as this object
_library.define("enter(str layer, Tensor[] values) -> ()")
_library.define("leave(str layer, Tensor[] values) -> ()")
_library.define("stub(str layer, Tensor[] values, Tensor[] like) -> Tensor[]")

ENTER = torch.ops.lora_fx.enter.default
LEAVE = torch.ops.lora_fx.leave.default
STUB = torch.ops.lora_fx.stub.default


def _nothing(_layer: str, _values: Sequence[torch.Tensor]) -> None:
    """Mark a place, and compute nothing."""


def _empty(_layer: str, _values: Sequence[torch.Tensor], like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [
        torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device) for tensor in like
    ]


def _no_gradient(_context: Any, *_gradients: Any) -> Any:
    raise NotImplementedError("a stub is traced, and never run")


for _marker in (ENTER, LEAVE):
    torch.library.register_fake(_marker, _nothing, lib=_library)
torch.library.register_fake(STUB, _empty, lib=_library)
for _mark in (ENTER, LEAVE, STUB):  # what stays of a layer that nothing reads is found out when it has nodes
    torch.fx.node.has_side_effect(_mark)
torch.library.register_autograd(STUB, _no_gradient, lib=_library)  # so that results need a gradient as a layer's do
