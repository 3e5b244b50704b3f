"""Kinds of modules that a graph cannot tell, by a model's classes: the task head, and the linear layers as PEFT tells them."""

from __future__ import annotations

import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_fx.graph.records import TaskHead
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
