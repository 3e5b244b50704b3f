"""The class of the model that adapters were trained on, where a checkpoint names another: a classifier over a pretrained body.

A config on disk names the class that was pretrained (``BertForMaskedLM``); the config of an adapter, its task or its class. The keys
of its tensors tell which of them it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lora_fx.adapters.peft_format.keys import base_name, module_of_key
from lora_fx.adapters.peft_format.opening import AdapterFiles
from lora_fx.errors import AdapterError
from lora_fx.tracing.transformers_models import (
    ModelChoice,
    class_of_config,
    class_of_task,
    empty_model,
    named_class,
    read_model_config,
)


def base_class(path: Path, opened: Sequence[AdapterFiles], name: str | None = None) -> ModelChoice | None:
    """Return the class to build from a checkpoint, with as many labels as the heads of the adapters have; None for the checkpoint's own.

    Args:
        path: of the checkpoint.
        opened: the adapters.
        name: of the class, if it is given; else it is the first that has all the modules of the adapters: the checkpoint's own, or
            that of the class or the task that their configs say.

    Raises:
        LoraFxError: transformers has no such class, or not for this config.
        AdapterError: the adapters have heads for different numbers of labels.
    """
    config = read_model_config(path)
    own = class_of_config(config) or class_of_task(config, "FEATURE_EXTRACTION")  # as transformers' AutoModel
    said = [files.config for files in opened]
    mapped = [class_of_config(config, [(each.auto_mapping or {}).get("base_model_class")]) for each in said]
    by_task = [class_of_task(config, each.task_type) for each in said]
    candidates = dict.fromkeys(each for each in (own, *mapped, *by_task) if each is not None and _is_of(each, config))
    if name is not None:
        chosen = named_class(name, config)
        model = empty_model(path, ModelChoice(chosen))
    else:
        fitting = _fitting(path, opened, candidates) if len(candidates) > 1 else None
        if fitting is None or fitting[0] is own:
            return None
        chosen, model = fitting
    names = dict(model.named_parameters(remove_duplicate=False))
    supplied = frozenset(name for files in opened for name in files.replaced(names))
    return ModelChoice(chosen, _labels(path, opened, names, getattr(model.config, "num_labels", None)), supplied)


def _is_of(model_class: Any, config: object) -> bool:
    return isinstance(config, model_class.config_class or object)


def _fitting(path: Path, opened: Sequence[AdapterFiles], candidates: Iterable[Any]) -> tuple[Any, Any] | None:
    """Return the first class that has all modules of these adapters, and an empty model of it; None if there is none."""
    for each in candidates:
        model = empty_model(path, ModelChoice(each))
        if all(_fits(files, model) for files in opened):
            return each, model
    return None


def _fits(files: AdapterFiles, model: nn.Module) -> bool:
    """Tell whether a model has all modules and parameters that the tensors of an adapter name."""
    names = dict(model.named_parameters(remove_duplicate=False))
    modules = {name for name, _ in model.named_modules()}
    return all(base_name(key, names) is not None or module_of_key(key) in modules for key in files.file.entries)


def _labels(
    path: Path, opened: Sequence[AdapterFiles], names: Mapping[str, nn.Parameter], known: int | None
) -> int | None:
    """Return the number of labels that the heads of adapters have, where the model that the config describes has another."""
    found: dict[int, str] = {}
    for files in opened:
        for key, entry in files.file.entries.items():
            name = base_name(key, names)
            shape = tuple(names[name].shape) if name is not None else ()
            if shape and shape[0] == known and entry.shape[:1] != shape[:1] and entry.shape[1:] == shape[1:]:
                found.setdefault(entry.shape[0], f"{files.directory} ({key})")
    if len(found) > 1:
        told = "; ".join(f"{count} in {where}" for count, where in found.items())
        raise AdapterError(str(path), [f"the adapters have heads for different numbers of labels: {told}"])
    return next(iter(found), None)
