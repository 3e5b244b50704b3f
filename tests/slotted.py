"""A small model with slots, and adapters of it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from conftest import set_factors
from torch import nn

import lora_fx

LINEAR: dict[str, Any] = {"select": [{"op": ["linear"], "rank": 3, "alpha": 4}]}
SITES = ("first", "twice", "last")


class Small(nn.Module):
    """A module that is called once, one that is called twice, and one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(7, 11), nn.Linear(11, 11), nn.Linear(11, 5, bias=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.last(torch.tanh(self.twice(torch.tanh(self.twice(torch.tanh(self.first(x)))))))}


@functools.cache
def base(seed: int = 0) -> lora_fx.TracedGraphModule:
    """Return the trace of a model. Not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return lora_fx.trace(Small(), (torch.randn(3, 7),), inference=True)


def adapted(rules: Any = None, *, seed: int = 11, of: int = 0, **options: Any) -> lora_fx.TracedGraphModule:
    """Return a graph with an adapter that is not zero."""
    graph = lora_fx.rewrite(base(of), rules or LINEAR, **options)
    set_factors(graph, seed)
    return graph


def exported(path: Path, rules: Any = None, **options: Any) -> Path:
    """Write the model with slots."""
    lora_fx.export.onnx(adapted(rules), path, slots=True, verify=False, **options)
    return path


def batch(rows: int = 6) -> dict[str, Any]:
    return {"x": np.random.default_rng(3).normal(size=(rows, 7)).astype(np.float32)}


def expected(graph: lora_fx.TracedGraphModule, rows: int = 6) -> torch.Tensor:
    """Return what a graph, folded, computes of :func:`batch`."""
    with torch.no_grad():
        found: torch.Tensor = lora_fx.fold(graph, unshare=True)(torch.from_numpy(batch(rows)["x"]))["y"]
    return found


def near(found: Any, wanted: torch.Tensor, tolerance: float = 2e-6) -> bool:
    """Tell whether an array is that tensor, as a part of its largest value."""
    return bool((torch.from_numpy(found) - wanted).abs().max() <= tolerance * wanted.abs().max())


def quiet() -> onnxruntime.SessionOptions:
    """Return options of a session that does not warn of every slot."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return options


def parameters(path: Path) -> dict[str, Any]:
    """Return what is in an adapter file."""
    read = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    return {name: value.numpy().copy() for name, value in read.items()}


def write(path: Path, values: dict[str, Any], model_version: int, adapter_version: int = 1) -> Path:
    """Write an adapter file by onnxruntime alone."""
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(adapter_version)
    made.set_model_version(model_version)
    made.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    made.export_adapter(str(path))
    return path
