"""A transformers directory: which tensors and which config it holds, and whether ``from_pretrained`` gives them back.

A config has one switch for ties, ``tie_word_embeddings``. Where a tie of the model is gone, it is turned off, and all
other weights that this unties are stored as well. T5 and its kin tie whatever their config says, but not where both weights are in the
files with different values. Whether the directory loads is tested by loading it.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from lora_fx.errors import LoraFxError, listed
from lora_fx.graph.compare import described
from lora_fx.graph.graph_module import state_of
from lora_fx.graph.process_state import exclusive, forked_random_state

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes in which a directory can be written."""


@dataclass(frozen=True)
class Contents:
    """Contents of a directory, and so of a model that is loaded from it.

    Attributes:
        config: of that model.
        dtype: that the config says; None for that of the first parameter.
        tensors: parameters and persistent buffers by every name that they have, as they are before a conversion.
        dtypes: of each in the files.
        stored: under which name each is in the files: that of another where ``from_pretrained`` ties the two.
        untied: names of which the model has one tensor, and ``tensors`` has two.
    """

    config: Any
    dtype: torch.dtype | None
    tensors: Mapping[str, torch.Tensor]
    dtypes: Mapping[str, torch.dtype]
    stored: Mapping[str, str]
    untied: tuple[tuple[str, str], ...]

    def converted(self, name: str, *, new: bool = False) -> torch.Tensor:
        """Return a tensor as it is in the files; ``new`` if it is to have storage of its own."""
        return self.tensors[name].detach().to(self.dtypes[name], copy=new)


def contents_of(
    model: Any, values: Mapping[str, torch.Tensor], untied: tuple[tuple[str, str], ...], dtype: torch.dtype | None
) -> Contents:
    """Return the contents of a directory for a model with other values.

    Args:
        model: a transformers model; left as it is.
        values: by all names of its parameters and buffers; names of one object are tied.
        untied: pairs of names that are one tensor of the model, and two of ``values``.
        dtype: of the files; None for the dtype of each tensor.

    Raises:
        LoraFxError: the class of the model makes no model of its config, or another one.
    """
    state = state_of(model)
    tensors = {name: values[name] for name in state.tensors if name not in state.non_persistent}
    config = _untied(model) if untied else copy.deepcopy(model.config)
    if dtype is not None:
        for part in configs_of(config):
            if part is config or getattr(part, "dtype", None) is not None:
                part.dtype = dtype
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    stored = {name: first for name, first in state.with_tensors(tensors).aliases().items() if name in tensors}
    if untied or dtype is not None:
        empty = _empty(type(model), config, dtype or model.dtype)
        _check_names(empty, tensors)
        if dtype is not None:
            dtypes |= _converted_dtypes(empty, tensors, dtype)
        if untied:
            ties = empty.all_tied_weights_keys
            stored = {name: name for name in tensors}
            stored |= {name: first for name, first in ties.items() if tensors.get(name) is tensors.get(first)}
    return Contents(config, dtype, tensors, dtypes, stored, untied)


def configs_of(config: Any) -> Iterator[Any]:
    """Yield a config and all that it holds."""
    yield config
    for value in vars(config).values():
        if isinstance(value, transformers.PreTrainedConfig):
            yield from configs_of(value)


def write(model: Any, contents: Contents, directory: Path, options: Mapping[str, Any]) -> None:
    """Write a directory as the model's own ``save_pretrained`` does; the model is left as it is.

    Args:
        model: whose class, and settings for generation, are written.
        contents: of the directory.
        directory: to be made.
        options: passed to ``save_pretrained``.

    Raises:
        LoraFxError: transformers cannot write such a model, or a value is not finite in the dtype asked for.
        OSError: the directory cannot be written.
    """
    double = _double(model, {})
    double.config = contents.config
    if getattr(model, "generation_config", None) is not None:
        double.generation_config = copy.deepcopy(model.generation_config)
    made: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in contents.tensors.items():
        first = contents.stored[name]
        is_parameter = isinstance(tensor, nn.Parameter)
        if first not in made:  # transformers stores one of the names that share storage
            stored = contents.converted(first, new=id(tensor) in seen)
            made[first] = nn.Parameter(stored, requires_grad=False) if is_parameter else stored
            seen.add(id(tensor))
        path, _, leaf = name.rpartition(".")
        owner = double.get_submodule(path)
        (owner._parameters if is_parameter else owner._buffers)[leaf] = made[first]
    _check_finite(contents, made)
    with _writing_errors(type(model).__name__):
        double.save_pretrained(directory, **options)
        if contents.dtype is not None:  # transformers writes that of the first parameter, which may be kept in float32
            double.config.dtype = contents.dtype
            double.config.save_pretrained(directory)


def check_loads(model_class: Any, contents: Contents, directory: Path, target: Path, variant: str | None) -> None:
    """Raise unless ``from_pretrained`` gives every tensor of ``contents`` back, bit for bit, with its ties.

    Weights that a class always keeps in float32 (parts of T5, where the rest is float16) may be in float32.

    Args:
        model_class: whose ``from_pretrained`` is meant.
        contents: of the directory.
        directory: that was written.
        target: its final path.
        variant: under which it was written.

    Raises:
        LoraFxError: it does not; all weights of which this is so are counted, and the first are named.
    """
    try:
        with _quiet(), forked_random_state():
            loaded, told = model_class.from_pretrained(
                directory,
                dtype="auto",
                variant=variant,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (*_TRANSFORMERS, OSError, SafetensorError) as error:
        raise LoraFxError(_not_given_back(model_class, contents, target, [str(error)])) from error
    found = state_of(loaded).tensors
    missing = {name: f"{name!r} is not loaded" for name in told["missing_keys"] if name in contents.tensors}
    differences = (missing.get(name) or _difference(contents, name, found.get(name)) for name in contents.tensors)
    problems = [difference for difference in differences if difference is not None]
    problems += [
        f"{name!r} and {first!r} are one tensor, and loaded as two"
        for name, first in contents.stored.items()
        if name in found and first in found and found[name] is not found[first]
    ]
    problems += [f"{name!r} is in the files only" for name in sorted(told["unexpected_keys"])]
    if problems:
        raise LoraFxError(_not_given_back(model_class, contents, target, problems))


def _not_given_back(model_class: Any, contents: Contents, target: Path, problems: list[str]) -> str:
    if contents.untied:
        first, name = contents.untied[0]
        advice = (
            f"Fold untied {first!r} and {name!r}, which that class may tie whatever its config says. Untie them in the model first "
            "(config.tie_word_embeddings = False and a parameter of its own for each, then trace that model), or fold without "
            "unshare=True, and without a branch at one of them alone."
        )
    else:
        advice = (
            "A model of several dtypes needs to be written in one (dtype=torch.float32); one whose layers differ from its config "
            "needs a config that fits. verify=False writes it nevertheless."
        )
    return (
        f"{target}: {model_class.__name__}.from_pretrained does not give back what would be written: {listed(problems, _MAX_NAMED, '; ')}. "
        f"Nothing was written. {advice}"
    )


_MAX_NAMED = 3


def _difference(contents: Contents, name: str, found: torch.Tensor | None) -> str | None:
    """Return how a loaded tensor differs from the written one, in words."""
    if found is None:
        return f"{name!r} is not in the loaded model"
    written = contents.converted(name)
    kept = torch.promote_types(written.dtype, found.dtype) == found.dtype  # a wider dtype has the same values
    if written.shape != found.shape or not kept:
        return f"{name!r} is {described(written)}, and loaded as {described(found)}"
    expected = written.to(found.device, found.dtype)
    mine, theirs = (each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (expected, found))
    return None if torch.equal(mine, theirs) else f"{name!r} is loaded with other values"


def _untied(model: Any) -> Any:
    """Return a copy of a model's config that ties nothing; an equal copy where the switch has a further meaning."""
    config = copy.deepcopy(model.config)
    if any(_reads_switch(kind) for kind in {type(module) for module in model.modules()}):
        return config
    for part in configs_of(config):
        if getattr(part, _SWITCH, False):
            setattr(part, _SWITCH, False)
    return config if _read_back(config) == _read_back(model.config) else copy.deepcopy(model.config)


_SWITCH = "tie_word_embeddings"


def _reads_switch(kind: type[nn.Module]) -> bool:
    """Tell whether the forward of a module reads the switch (of a Switch Transformer, it scales the output by it)."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and _SWITCH in code.co_names


def _read_back(config: Any) -> Any:
    """Return what a config says once it is written and read, but for the switch: other settings may follow from that."""

    def without_switch(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: without_switch(each) for key, each in value.items() if key != _SWITCH}
        return value

    with _quiet():
        return without_switch(type(config).from_dict(json.loads(config.to_json_string())).to_dict())


def _empty(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """Return the model that ``from_pretrained`` makes of a config before it loads weights, on the meta device."""
    try:
        with _quiet(), forked_random_state(), torch.device("meta"), _default_dtype(dtype):
            return model_class(type(config).from_dict(json.loads(config.to_json_string())))
    except _TRANSFORMERS as error:
        raise LoraFxError(f"{model_class.__name__} makes no model of its own config: {error}. Correct it.") from error


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _check_names(empty: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    state = state_of(empty)
    other = sorted(tensors.keys() ^ (state.tensors.keys() - state.non_persistent))
    if other:
        raise LoraFxError(
            f"the config of this {type(empty).__name__} makes another model: {listed([*map(repr, other)], _MAX_NAMED)} in one of them "
            "only. from_pretrained could not load what would be written. Bring model.config up to date."
        )


def _converted_dtypes(empty: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return what ``from_pretrained(dtype=…)`` makes of each tensor of floating point.

    Some classes keep parts in float32, others make them in a dtype of their own.
    """
    state, plan = state_of(empty).tensors, empty._get_dtype_plan(dtype)
    kept = [(re.compile(pattern.replace("*", ".*")), exact) for pattern, exact in plan.items()]
    return {
        name: next((exact for pattern, exact in kept if pattern.search(name)), state[name].dtype)
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
    }


def _double(module: Any, known: dict[nn.Module, Any]) -> Any:
    """Return a tree of modules like this one, in which tensors can be replaced; all that it holds is the module's own."""
    if module not in known:
        double = known[module] = copy.copy(module)
        double.__dict__["_parameters"], double.__dict__["_buffers"] = dict(module._parameters), dict(module._buffers)
        double.__dict__["_modules"] = {
            name: None if child is None else _double(child, known) for name, child in module._modules.items()
        }
    return known[module]


def _check_finite(contents: Contents, made: Mapping[str, torch.Tensor]) -> None:
    beyond = [
        name
        for name, tensor in made.items()
        if tensor.dtype != contents.tensors[name].dtype
        and isinstance(contents.tensors[name], nn.Parameter)
        and not bool(torch.isfinite(tensor).all())
        and bool(torch.isfinite(contents.tensors[name]).all())
    ]
    if beyond:
        raise LoraFxError(
            f"{listed([*map(repr, beyond)], _MAX_NAMED)} would not be finite in {contents.dtype}: values are beyond its range. "
            "Choose a wider dtype (torch.bfloat16 has the range of torch.float32)."
        )


_TRANSFORMERS = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, NotImplementedError)
"""Exceptions of transformers about models and configs that it cannot handle."""


@contextmanager
def _writing_errors(name: str) -> Iterator[None]:
    """Turn errors of writing into those of the system, where they are that, or else into LoraFxError."""
    try:
        yield
    except SafetensorError as error:  # it has the number in its text alone
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise LoraFxError(f"safetensors cannot write this {name}: {error}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    except _TRANSFORMERS as error:
        raise LoraFxError(f"transformers cannot write this {name}: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings, logs and progress bars of transformers from the user, who did not ask for what makes them."""
    with exclusive(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        try:
            transformers_logging.set_verbosity(logging.CRITICAL)
            transformers_logging.disable_progress_bar()
            yield
        finally:
            transformers_logging.set_verbosity(level)
            if bars:
                transformers_logging.enable_progress_bar()
