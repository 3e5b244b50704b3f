"""Views of stored tensors: the transposes and reshapes between a tensor and the operator that reads it, as plain data.

A step moves each element to one place and changes no value, so a view can be undone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Step:
    """One step of a view.

    Attributes:
        kind: ``"swap"`` exchanges the last two dimensions, ``"permute"`` orders all of them, ``"reshape"`` gives new sizes,
            ``"stack"`` makes a stack of matrices, of which each has an equal share of the first dimension as its rows.
        dims: the order, the sizes (-1: the remaining elements), or the number of matrices.
    """

    kind: Literal["swap", "permute", "reshape", "stack"]
    dims: tuple[int, ...] = ()

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor after this step, as a view of it where torch has one."""
        match self.kind:
            case "swap":
                return tensor.transpose(-2, -1)
            case "permute":
                return tensor.permute(self.dims)
            case "reshape":
                return tensor.reshape(self.dims)
            case "stack":
                return tensor.reshape(*self.dims, tensor.shape[0] // self.dims[0], -1)


SWAP = Step("swap")


@dataclass(frozen=True)
class View:
    """The steps from a stored tensor to the value that an operator reads, in order."""

    steps: tuple[Step, ...] = ()

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the value that the operator reads; nothing is copied where torch has a view."""
        for step in self.steps:
            tensor = step.apply(tensor)
        return tensor

    def shape_of(self, stored: torch.Size) -> torch.Size:
        """Return the shape of the view of a tensor that has this one."""
        return self.apply(torch.empty(stored, device="meta")).shape

    def then(self, step: Step) -> View:
        """Return the view with one more step; two swaps in a row cancel."""
        return View(self.steps[:-1]) if step == SWAP and self.steps[-1:] == (SWAP,) else View((*self.steps, step))


AS_STORED = View()
