"""Kinds of modules that a graph cannot tell, by a model's classes: the task head, and what PEFT tells by classes."""

from __future__ import annotations

import contextlib

import transformers
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

from lora_fx.graph.records import ParameterModule, TaskHead
from lora_fx.rules.vocabulary import TASK_HEADS

PRIVATE_NAMES = ("_is_hf_initialized",)
"""Private names of transformers that are read: its mark of a parameter with a value from a checkpoint."""

_HEAD_NAMES = frozenset(name for names in TASK_HEADS.values() for name in names)


def task_head(model: nn.Module) -> TaskHead:
    """Return the task head of a transformers model: its modules beside the base model, unless they are a head over the vocabulary."""
    if not isinstance(model, transformers.PreTrainedModel) or model.get_output_embeddings() is not None:
        return TaskHead()
    base = model.base_model
    modules = [
        name
        for name, module in model.named_children()
        if any(True for _ in module.parameters())
        and (name in _HEAD_NAMES if base is model else all(each is not base for each in module.modules()))
    ]
    fresh = [
        name
        for path in modules
        for name, parameter in model.get_submodule(path).named_parameters(prefix=path)
        if not any(getattr(parameter, mark, False) for mark in PRIVATE_NAMES)
    ]
    return TaskHead(tuple(modules), tuple(fresh))


def linear_modules(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the modules that PEFT's ``all-linear`` means: linear layers by their class, but for the output embedding."""
    head = model.get_output_embeddings() if isinstance(model, transformers.PreTrainedModel) else None
    return tuple(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    )


def parameter_modules(model: nn.Module) -> dict[str, ParameterModule]:
    """Return the modules whose weights PEFT adapts as parameters alone, by their paths.

    They have a stack of matrices, or a weight in a class of their own, for which PEFT has no layer; or they are an ``nn.MultiheadAttention``,
    for which it has one that adapts both. The modules of a graph are left out: it keeps the parameters of a module, but not its class and
    attributes.
    """
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kinds = [kind for kind in type(module).__mro__ if issubclass(kind, nn.Module) and kind is not nn.Module]
        if (
            kinds
            and not isinstance(module, fx.GraphModule)
            and any(is_kind(module) for is_kind in (_is_stack, _is_own, _is_attention))
        ):
            classes = tuple(f"{kind.__module__}:{kind.__qualname__}" for kind in kinds)
            found[path] = ParameterModule(classes, bool(getattr(module, "is_transposed", False)))
    return found


def second_names(model: nn.Module) -> dict[str, str]:
    """Return the later paths of modules with parameters that a model holds under several, each with the first, under which PEFT finds it."""
    first: dict[nn.Module, str] = {}
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if first.setdefault(module, path) != path and any(True for _ in module.parameters()):
            found[path] = first[module]
    return found


def _is_stack(module: nn.Module) -> bool:
    return not isinstance(module, nn.Conv1d) and any(
        parameter.ndim == 3 for parameter in module.parameters(recurse=False)
    )


def _is_own(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Linear | nn.Embedding | Conv1D)


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention)


def vocabulary_modules(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the input and then the output embedding of a model that tells them; PEFT saves both where a vocabulary was resized."""
    embeddings: list[object] = []
    for method in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(NotImplementedError):  # of a model without
            embeddings.append(getattr(model, method, lambda: None)())
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    return tuple(dict.fromkeys(names[id(each)] for each in embeddings if id(each) in names))
