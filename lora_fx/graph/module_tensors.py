"""Tensors of a module by their names, from one walk through its tree.

``nn.Module.named_parameters`` passes every tensor through a generator for each level of the tree, and parameters, buffers and the names of
those that are not saved take a walk each. Passes ask for all names of a graph many times over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors of a module, in torch's order, under all names that they have.

    Attributes:
        parameters: by their names.
        buffers: by their names.
        non_persistent: names of the buffers that a state dict does not have.
    """

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, torch.Tensor]
    non_persistent: frozenset[str]


def tensors_of_module(module: nn.Module) -> ModuleTensors:
    """Return the tensors of a module and of all modules in it; nothing is copied."""
    modules = modules_by_path(module)
    hidden = frozenset(f"{at}{name}" for at, each in modules for name in each._non_persistent_buffers_set)
    kind = type(module)
    if kind.named_parameters is nn.Module.named_parameters and kind.named_buffers is nn.Module.named_buffers:
        parameters = {f"{at}{name}": p for at, each in modules for name, p in each._parameters.items() if p is not None}
        buffers = {f"{at}{name}": b for at, each in modules for name, b in each._buffers.items() if b is not None}
    else:  # a wrapper that gives its tensors other names, as torch's first FSDP does
        parameters = dict(module.named_parameters(remove_duplicate=False))
        buffers = dict(module.named_buffers(remove_duplicate=False))
    return ModuleTensors(parameters, buffers, hidden)


def parameters_of_module(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module and of all modules in it, each under its first name."""
    seen: set[int] = set()
    every = tensors_of_module(module).parameters.items()
    return {name: p for name, p in every if id(p) not in seen and not seen.add(id(p))}  # type: ignore[func-returns-value]


def trainable_names(module: nn.Module) -> frozenset[str]:
    """Return the names (all of them, for tied tensors) of the parameters that require a gradient."""
    return frozenset(name for name, p in tensors_of_module(module).parameters.items() if p.requires_grad)


def modules_by_path(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a module and all modules in it, under every path, each with a dot behind the path (nothing for the first)."""
    found: list[tuple[str, nn.Module]] = []

    def walk(each: nn.Module, at: str) -> None:
        if type(each).named_modules is not nn.Module.named_modules:  # PEFT's wrappers of parameters hide some
            found.extend((f"{path}." if path else "", m) for path, m in each.named_modules(set(), at[:-1], False))
            return
        found.append((at, each))
        for name, child in each._modules.items():
            if child is not None:
                walk(child, f"{at}{name}.")

    walk(module, "")
    return found
