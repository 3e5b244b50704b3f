"""Schemas of operators without which ``import torchvision`` fails beside a torch without CUDA."""

from __future__ import annotations

import torch


def define_operator_schemas() -> None:
    """Make ``import torchvision`` possible beside a torch without CUDA.

    The package index has torchvision's wheel for CUDA alone, whose library of operators does not load there; the import then fails
    where Python registers fake results for two operators that nobody has defined. None of the models here calls them.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    _KEPT.append(library)  # an operator lives as long as the library that defined it


_KEPT: list[torch.library.Library] = []
