"""Gradients that a trace would lose: those of a model's own ``torch.autograd.Function``.

torch.export keeps the operators of a function's ``forward`` and differentiates those. A function whose ``backward`` is just
their derivative loses nothing; one that says otherwise (a straight-through estimator) would train differently, in silence. So
where such functions run, the gradients of graph and model are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.errors import TraceError
from lora_fx.inputs import ExampleInputs, graph_inputs

TOLERANCE = 1e-4
"""Largest relative difference between the gradients of graph and model that is taken for rounding."""


@contextmanager
def recorded_functions() -> Iterator[list[type]]:
    """Yield a list that fills with the ``torch.autograd.Function`` classes applied inside the block."""
    used: list[type] = []
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls not in used:
            used.append(cls)
        return original.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield used
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


def check_gradients(
    model: nn.Module, graph_module: fx.GraphModule, inputs: ExampleInputs, functions: Sequence[type]
) -> None:
    """Raise :class:`TraceError` unless graph and model have the same gradients on the example inputs.

    Args:
        model: the traced model, in train mode.
        graph_module: its graph without input checks, in train mode.
        inputs: what it was traced with.
        functions: the functions that the model applies.
    """
    names = ", ".join(function.__qualname__ for function in functions)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise TraceError(
            f"{type(model).__name__} applies its own autograd functions ({names}), whose gradients a graph keeps only if they are "
            "those of its operators. That is found out by running it: trace it with weights, or with inference=True."
        )
    parameters = {
        name: parameter.detach().requires_grad_(parameter.is_floating_point())
        for name, parameter in model.named_parameters()
    }
    expected = _gradients(model, parameters, inputs.args, dict(inputs.kwargs))
    found = _gradients(graph_module, parameters, inputs.args, graph_inputs(inputs))
    for name, gradient in expected.items():
        if (found[name] - gradient).norm() > TOLERANCE * max(gradient.norm().item(), 1e-30):
            raise TraceError(
                f"{type(model).__name__} applies its own autograd functions ({names}), and a graph would give {name!r} another gradient. "
                "Write the backward with operators (detach), or use inference=True."
            )


def _gradients(
    module: nn.Module, parameters: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # the same dropout masks in both; the tracer puts the random state back
    output = torch.func.functional_call(module, parameters, args, kwargs)
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    total = sum(leaf.double().square().sum() for leaf in leaves)
    wanted = {name: p for name, p in parameters.items() if p.requires_grad}
    gradients = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)  # type: ignore[arg-type]
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(wanted.items(), gradients, strict=True)
    }
