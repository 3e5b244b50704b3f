"""A model from a directory, or its structure alone from a config or a graph. Nothing is downloaded, no code that comes with it is run."""

from __future__ import annotations

import copy
import importlib
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME

from lora_fx.errors import LoraFxError, hub_hint, listed, option
from lora_fx.files.bounded import CONFIG_BYTES, read_bounded
from lora_fx.files.safetensors import TensorFile
from lora_fx.graph.compare import described
from lora_fx.graph.graph_module import TracedGraphModule, state_of
from lora_fx.graph.info import info_of
from lora_fx.graph.process_state import forked_random_state
from lora_fx.graph.state import State


@dataclass(frozen=True)
class ModelChoice:
    """A class of transformers, in place of the one that a config names.

    Attributes:
        model_class: the class.
        labels: number of labels of its head, where that is not the config's.
        supplied: names of weights that a checkpoint need not have, since they are replaced.
    """

    model_class: Any
    labels: int | None = None
    supplied: frozenset[str] = frozenset()

    def apply(self, config: Any) -> Any:
        """Set the number of labels of a config, in place, and return the class."""
        if self.labels is not None:
            config.num_labels = self.labels
        return self.model_class


def empty_model(path: str | Path, choice: ModelChoice | None = None) -> nn.Module:
    """Return the transformers model that a config describes, without weights.

    Args:
        path: a model directory, or its ``config.json``.
        choice: of the class; by default the config's own.

    Raises:
        LoraFxError: there is no config, or transformers has no model for it. Code that comes with a model is never run.
    """
    path = Path(path)
    config = read_model_config(path)
    model_class = class_of_config(config) if choice is None else choice.apply(config)
    with torch.device("meta"):
        return _build(config, path, model_class)


@dataclass(frozen=True)
class KeyConversions:
    """How transformers renames the keys of a checkpoint of a model, and makes tensors of others, as it loads it.

    Attributes:
        renamings: of keys.
        converters: of several tensors to one, or of one to several.
        prefix: that is added where it is missing and dropped where it is twice; None for none.
    """

    renamings: Sequence[WeightRenaming] = ()
    converters: Sequence[WeightConverter] = ()
    prefix: str | None = None

    @staticmethod
    def of(model: Any) -> KeyConversions:
        """Return those of a model, by transformers' table: by its class, and then by its type."""
        transforms = get_model_conversion_mapping(model)
        return KeyConversions(
            [each for each in transforms if isinstance(each, WeightRenaming)],
            [each for each in transforms if isinstance(each, WeightConverter)],
            getattr(model, "base_model_prefix", "") or None,
        )

    def without_converters(self) -> KeyConversions:
        """Return the renamings alone."""
        return replace(self, converters=())

    def applied(self, key: str, names: dict[str, Any]) -> tuple[str, str | None]:
        """Return the name of the tensor that a key is for, and the pattern of the converter that makes it, if one does.

        Args:
            key: of a checkpoint.
            names: of the model's tensors, as keys.
        """
        return rename_source_key(key, list(self.renamings), list(self.converters), self.prefix, names)


def untie_as_loaded(
    model: Any, stored: Collection[str], equal: Callable[[str, str], bool]
) -> tuple[tuple[str, str], ...]:
    """Untie parameters of an empty model that files have two values for, as ``from_pretrained`` does whatever the config says.

    Args:
        model: a transformers model on the meta device; changed in place.
        stored: names of the tensors that the files have.
        equal: tells whether the files have equal values for two of these names.

    Returns:
        For each parameter that was untied, the name of the other one, and its own.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    valued = {name: name for name in stored if name in parameters}  # whose value a name gets
    untied = []
    for target, source in dict(getattr(model, "all_tied_weights_keys", {})).items():
        if target in valued and source in valued and not equal(valued[source], valued[target]):
            untied.append((source, target))
        elif target in valued:
            valued.setdefault(source, valued[target])
    for _, name in untied:
        path, _, leaf = name.rpartition(".")
        own = nn.Parameter(torch.empty_like(parameters[name]), parameters[name].requires_grad)
        model.get_submodule(path).register_parameter(leaf, own)
        del model.all_tied_weights_keys[name]
    return tuple(untied)


def load_model(path: str | Path, dtype: torch.dtype | None = None, choice: ModelChoice | None = None) -> nn.Module:
    """Return the transformers model in a directory, in evaluation mode. Of weights, only safetensors files are read.

    Args:
        path: of the directory.
        dtype: of the weights; by default that in which they were saved.
        choice: of the class; by default the one that the config names.

    Raises:
        LoraFxError: it is no such directory, transformers cannot load it, or files do not have all of its weights.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise LoraFxError(f"{path}: expected a directory with a config.json and safetensors files.{hub_hint(path)}")
    config = read_model_config(path)
    for name, most in _ALSO_READ.items():
        _check_size(path / name, most)
    names = getattr(config, "architectures", None)
    model_class = (class_of_config(config) if choice is None else choice.apply(config)) or transformers.AutoModel
    if names and model_class is transformers.AutoModel:
        raise LoraFxError(
            f"{path}: config.json says architectures {names}, of which transformers {transformers.__version__} has no model; code that "
            f"comes with a model is not run. Name the class of transformers that was saved{option('', ': --model-class')}."
        )
    options = {"trust_remote_code": False} if model_class is transformers.AutoModel else {}
    options |= {"config": config} if choice is not None else {}
    try:
        loaded, report = model_class.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            dtype=dtype or "auto",
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # the files are a stranger's, and transformers raises whatever it meets
        for file in sorted(path.glob("*.safetensors")):
            TensorFile.open(file)  # says which file is cut off or cannot be read
        raise LoraFxError(
            f"{path}: transformers {transformers.__version__} cannot load this model: {type(error).__name__}: {error}"
        ) from error
    supplied = choice.supplied if choice is not None else frozenset()
    missing, unused = sorted(set(report["missing_keys"]) - supplied), sorted(report["unexpected_keys"])
    if missing and choice is not None:
        raise LoraFxError(
            f"{path}: neither the files nor an adapter have values for {listed(missing, 5)} of {model_class.__name__}, which were random "
            "where the adapter was trained. Give the checkpoint that it was trained on."
        )
    if missing or (unused and not names and choice is None):
        problem = (
            f"no values for {listed(missing, 5)}, which would be random"
            if missing
            else f"values for {listed(unused, 5)}, which would be lost"
        )
        raise LoraFxError(
            f"{path}: the files have {problem}. Let 'architectures' in config.json name the class that was saved; it says {names}."
        )
    assert isinstance(loaded, nn.Module)
    return loaded.eval()


def read_model_config(path: Path) -> Any:
    """Return the config of transformers in a directory, or a file.

    Raises:
        LoraFxError: there is none, it is larger than any config, transformers cannot read it, or it asks for code from a hub.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise LoraFxError(
            f"{path}: expected a model directory with a config.json, or such a file. Nothing is downloaded.{hub_hint(path)}"
        )
    _check_size(file, CONFIG_BYTES)
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the file is a stranger's, and transformers raises whatever it meets
        raise LoraFxError(
            f"{path}: transformers {transformers.__version__} cannot read this config: {error}"
        ) from error
    _check_kernels(config, path)
    return config


_ALSO_READ = {"generation_config.json": CONFIG_BYTES, "model.safetensors.index.json": 2**26}
"""What transformers reads beside a config and weights, and the bytes of it at most."""


def _check_size(file: Path, most: int) -> None:
    """Refuse a file that transformers would read as a whole however large it is, and a pipe, for which it would wait."""
    try:
        read_bounded(file, most)
    except FileNotFoundError:
        return
    except OSError as error:
        raise LoraFxError(f"cannot read {file}: {error.strerror or error}.") from error


def _check_kernels(config: Any, path: Path) -> None:
    """Refuse a config that names an implementation on a hub, which transformers would download and run."""
    for key, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            _check_kernels(value, path)
        elif "implementation" in key and "/" in str(value):
            raise LoraFxError(
                f"{path}: the config asks for the code {value!r} ({key.strip('_')}), and code that comes with a model is not run. "
                "Remove that key, or name sdpa or eager."
            )


def class_of_config(config: Any, names: object = None) -> Any:
    """Return the first class of transformers among some names, by default those that a config says; None if there is none."""
    names = getattr(config, "architectures", None) if names is None else names
    names = names if isinstance(names, list | tuple) else []
    return next((getattr(transformers, name) for name in names if _is_model(name)), None)


def why_this_class(config: Any) -> str:
    """Return the reason for which :func:`empty_model` builds the class that it builds of a config, in words."""
    names = getattr(config, "architectures", None)
    if class_of_config(config) is not None:
        return "named by architectures in the config"
    kind = f"what transformers.AutoModel builds for model type {config.model_type!r}"
    return (
        f"{kind}: of architectures {names} transformers has none"
        if names
        else f"{kind}: the config names no architectures"
    )


def class_of_task(config: Any, task: str | None) -> Any:
    """Return the class that transformers has for a config and a task, as PEFT names tasks; None if there is none."""
    mapping = {
        "SEQ_CLS": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "TOKEN_CLS": transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        "QUESTION_ANS": transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
        "CAUSAL_LM": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        "SEQ_2_SEQ_LM": transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        "FEATURE_EXTRACTION": transformers.MODEL_MAPPING,
    }.get(task or "")
    found = None if mapping is None else mapping.get(type(config), None)
    return found[0] if isinstance(found, list | tuple) else found


def named_class(name: str, config: Any) -> Any:
    """Return the class of transformers of a name.

    Raises:
        LoraFxError: there is none, or not for this config.
    """
    if not _is_model(name):
        raise LoraFxError(
            f"{option('model_class', '--model-class')}: transformers {transformers.__version__} has no model class {name!r}."
        )
    found = getattr(transformers, name)
    if not isinstance(config, found.config_class or object):
        raise LoraFxError(
            f"{option('model_class', '--model-class')}: {name} is built from {found.config_class.__name__}, "
            f"and the checkpoint has {type(config).__name__}."
        )
    return found


def _build(config: Any, path: Path, model_class: Any) -> nn.Module:
    try:
        made = transformers.AutoModel.from_config(config) if model_class is None else model_class(config)
    except Exception as error:
        raise LoraFxError(f"{path}: a model cannot be made of this config: {error}") from error
    assert isinstance(made, nn.Module)
    return made


def _is_model(name: Any) -> bool:
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)


def traced_class(graph_module: TracedGraphModule) -> nn.Module | None:
    """Return a model of the traced class and config, with buffers and without weights; None if it was no transformers model."""
    info = info_of(graph_module)
    if info.config is None:
        return None
    module, _, path = info.model_class.partition(":")
    model_class: Any = importlib.import_module(module)
    for part in path.split("."):
        model_class = getattr(model_class, part)
    with forked_random_state(), torch.device("cpu"), _parameters_on_meta():
        model: nn.Module = model_class(copy.deepcopy(info.config))
    return model


def empty_double(graph_module: TracedGraphModule) -> transformers.PreTrainedModel:
    """Return a model of the traced class without weights, with the config and generation config of the graph.

    Raises:
        LoraFxError: its class is code of a hub, is not found by its name, or makes nothing of its own config.
    """
    info = info_of(graph_module)
    module, _, name = info.model_class.partition(":")
    if module.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME:
        raise LoraFxError(
            f"{name} is code from a hub, of which no second model is made. Use the model that was traced: "
            "lora_fx.huggingface.write_back(model, graph) gives it the merged weights, and lora_fx.huggingface.folded(model, graph) lends "
            "them to it."
        )
    try:
        model = traced_class(graph_module)
    except Exception as error:  # the class is a stranger's, and raises whatever it likes
        raise LoraFxError(
            f"expected {name} of the module {module}, which was traced, to make a model of its config alone, got {type(error).__name__}: "
            f"{error}. Use the model that was traced: lora_fx.huggingface.folded(model, graph) lends it the merged weights."
        ) from error
    assert isinstance(model, transformers.PreTrainedModel)
    if info.generation_config is not None:
        model.generation_config = copy.deepcopy(info.generation_config)
    return model


def double_over(
    graph_module: TracedGraphModule, state: State, turned: Collection[str] = ()
) -> transformers.PreTrainedModel:
    """Return a new model of the traced class over the parameters of a state, and over copies of its buffers.

    Args:
        graph_module: see :func:`empty_double`.
        state: of that graph, folded. Names of one tensor are tied in the model, and no others.
        turned: weights that the graph has as ``(out, in)``. Where the model has a ``Conv1D``, as GPT-2 does, they are copied into its
            ``(in, out)``: quantised ones are stored as those of a linear layer.

    Raises:
        LoraFxError: see :func:`empty_double`; or the model has other tensors than the state, or those have no values.
    """
    model = empty_double(graph_module)
    own = state_of(model)
    for name in turned:
        if name in state.tensors and isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D):
            weight = nn.Parameter(state.tensors[name].detach().t().contiguous(), state.tensors[name].requires_grad)
            state = replace(state, tensors={**state.tensors, name: weight})
    parameters = {name for name, tensor in state.tensors.items() if isinstance(tensor, nn.Parameter)}
    missing = sorted(name for name in own.tensors if name not in state.tensors)
    problems = [f"{name!r} is in the model alone" for name in missing]
    problems += [f"{name!r} is in the graph alone" for name in sorted(parameters - own.tensors.keys())]
    problems += [
        f"{name!r} is {described(state.tensors[name])} in the graph and {described(tensor)} in the model"
        for name, tensor in own.tensors.items()
        if name in state.tensors and state.tensors[name].shape != tensor.shape
    ]
    if problems:
        raise LoraFxError(
            f"the config of this {type(model).__name__} makes another model than the one that was traced: {listed(problems, 3, '; ')}. "
            "Bring model.config up to date before the trace, or use the model that was traced: "
            "lora_fx.huggingface.folded(model, graph) lends it the merged weights."
        )
    empty = [repr(name) for name in own.tensors if state.tensors[name].is_meta]
    if empty:
        raise LoraFxError(
            f"{listed(empty, 3)} on the meta device: lora_fx.materialize(graph, state_dict) gives the graph its weights."
        )
    for name in own.tensors:
        path, _, leaf = name.rpartition(".")
        module, tensor = model.get_submodule(path), state.tensors[name]
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(leaf, tensor)
        else:
            module.register_buffer(leaf, tensor.clone(), persistent=name not in state.non_persistent)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules that this thread makes register their parameters without values, and their buffers with."""
    register, thread = nn.Module.register_parameter, threading.get_ident()

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and threading.get_ident() == thread:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
