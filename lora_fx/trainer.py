"""transformers' ``Trainer``: checkpoints that hold a graph's adapters as PEFT lays them out, and not their base."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerCallback, TrainerState
from transformers.training_args import TrainingArguments

from lora_fx.adapters.peft_format.opening import read_adapter
from lora_fx.adapters.peft_format.save_load import check_writable, load_adapter, save_adapter, write_adapter_files
from lora_fx.adapters.transfer import branches_of, parameters_of
from lora_fx.errors import AdapterError, LoraFxError, shortened
from lora_fx.files.atomic import replacing
from lora_fx.files.safetensors import TensorFile, write_tensors
from lora_fx.files.target import Target
from lora_fx.graph.adapter_names import adapter_of, adapters, is_of_adapter
from lora_fx.graph.compare import described
from lora_fx.graph.graph_module import TracedGraphModule, rebuilt, state_of
from lora_fx.graph.info import known_info
from lora_fx.rules.peft_config.config import CONFIG_NAME
from lora_fx.tracing.item_count import loss_uses_count

PRIVATE_NAMES = ("_load_from_checkpoint", "_load_best_model")
"""Methods of transformers' ``Trainer`` that are no public names and that :func:`prepare` wraps: there it looks for PEFT's class."""

OTHER_NAME = "graph_state.safetensors"
"""File of a checkpoint with the parameters that train and are of no adapter: see :func:`prepare`."""

aten = torch.ops.aten
_DEFAULT = "default"  # the adapter that PEFT writes to the top of a directory
_STATE_DICT_NAME = "model.safetensors"  # of transformers; until there was `prepare`, checkpoints of graphs had one
_MAX_NAMED = 10


def prepare(trainer: Any) -> None:
    """Let the checkpoints and ``save_model`` of a trainer hold the adapters of its graph, as PEFT lays them out (in place).

    ::

        trainer = transformers.Trainer(graph, arguments, train_dataset=rows)
        lora_fx.trainer.prepare(trainer)
        trainer.train()  # or train(resume_from_checkpoint=True), or hyperparameter_search(…) of a trainer with model_init
        trainer.save_model("final")  # peft.PeftModel.from_pretrained(model, "final")

    A directory has ``adapter_config.json`` and ``adapter_model.safetensors`` of the adapter ``default``, a directory of its name
    for each other adapter, and no copy of the base. Parameters of the model that were made trainable by hand are in
    ``graph_state.safetensors`` beside them, if there are any. Files are written into a directory that exists; others in it stay.

    ``resume_from_checkpoint`` and ``load_best_model_at_end`` read such directories, those that PEFT's ``Trainer`` wrote, and those
    of :class:`AdapterCallback`. The curve goes on as if it had not been interrupted. A checkpoint with other adapters than the
    graph's, by name, rank, scaling or place, is refused before the first step.

    Whatever model the trainer has by then is written and read: with ``model_init`` the one that trains. A second call changes
    nothing. A warning says where transformers adds up the losses of accumulated batches instead of taking their mean, as it does
    for PEFT: for models that compute a mean of their own and ignore ``num_items_in_batch``.

    Args:
        trainer: an object of ``transformers.Trainer`` or a subclass, which trains a graph. Its public methods ``save_model`` and
            ``get_decay_parameter_names`` (which looks for ``nn.LayerNorm``) are wrapped, and so are its methods of
            :data:`PRIVATE_NAMES`; an :class:`AdapterCallback` is added.

    Raises:
        LoraFxError: the trainer's model is no graph with adapters, or the object lacks a method that is to be wrapped.
    """
    handler = getattr(trainer, "callback_handler", None)
    if any(isinstance(each, _PreparedCallback) for each in getattr(handler, "callbacks", ())):
        return
    wraps: dict[str, Callable[..., Any]] = {
        "save_model": _save_model,
        "get_decay_parameter_names": _decaying,
        **dict(zip(PRIVATE_NAMES, (_load_from_checkpoint, _load_best_model), strict=True)),
    }
    missing = [name for name in ("add_callback", "pop_callback", *wraps) if not hasattr(trainer, name)]
    if missing:
        raise LoraFxError(
            f"prepare expected a trainer of transformers, got a {type(trainer).__name__} without {', '.join(missing)}: give it "
            "the Trainer object itself."
        )
    graph = _graph_in(trainer.model, "prepare")
    _warn_of_sums(trainer, graph)
    _hook(graph)
    while trainer.pop_callback(AdapterCallback) is not None:
        pass
    trainer.add_callback(_PreparedCallback())
    for name, wrapper in wraps.items():
        setattr(trainer, name, partial(wrapper, trainer, getattr(trainer, name)))


def _warn_of_sums(trainer: Any, graph: TracedGraphModule) -> None:
    steps = trainer.args.gradient_accumulation_steps
    counts = trainer.model_accepts_loss_kwargs and trainer.compute_loss_func is None
    if steps > 1 and counts and not loss_uses_count(graph):
        model = known_info(graph).model_class.rpartition(":")[2]
        warnings.warn(
            f"the loss of {model} ignores num_items_in_batch, and transformers takes it to be used: nothing divides by the {steps} "
            "accumulation steps, so that losses and gradients are sums over them, as they are with PEFT. For their mean set "
            "trainer.model_accepts_loss_kwargs = False.",
            stacklevel=3,
        )


class AdapterCallback(TrainerCallback):
    """A callback with which the checkpoints of a ``Trainer`` hold the trained parameters, and no copy of the frozen base.

    ::

        trainer = transformers.Trainer(graph, arguments, train_dataset=rows, callbacks=[AdapterCallback()])

    From then on the state dict of the graph holds the trained parameters alone, and loading such a state dict misses nothing: one with
    other adapters than the graph's is refused. So ``resume_from_checkpoint``, ``load_best_model_at_end`` and ``save_model`` work
    as for any model, with small files. Beside the trainer's own files each checkpoint gets a directory for each adapter, of its
    name, which :func:`~lora_fx.load_adapter` and PEFT read.

    Without it a checkpoint has the whole state dict, which transformers refuses to write where weights are tied.

    A callback is told neither the trainer nor its directories. :func:`prepare` therefore does more: checkpoints as PEFT lays them
    out, PEFT's own, hyper-parameter searches, and resuming with ``model_init``, the last two of which are refused here.
    """

    def on_init_end(self, *_event: Any, model: Any = None, **_context: Any) -> None:
        """Restrict the graph's state dict to what trains; the graph that ``model_init`` makes later has its turn then."""
        _hook(_graph_in(model, "AdapterCallback"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_control: Any, model: Any = None, **_context: Any
    ) -> None:
        """Refuse what the checkpoints would be wrong for, before the first step; restrict the state dict of the graph that trains."""
        graph = _graph_in(model, "AdapterCallback")
        self._check(state, graph)
        _hook(graph)
        for adapter in adapters(graph) if args.save_strategy != "no" else ():
            check_writable(graph, adapter)  # raises what the first checkpoint would

    def on_save(
        self, args: TrainingArguments, state: TrainerState, *_control: Any, model: Any = None, **_context: Any
    ) -> None:
        """Write each adapter into the checkpoint, from one process."""
        if state.is_world_process_zero:
            checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            for adapter in adapters(model):
                save_adapter(model, checkpoint / adapter, adapter, overwrite=True)

    def _check(self, state: TrainerState, graph: TracedGraphModule) -> None:
        if state.is_hyper_param_search or state.trial_params is not None:
            raise LoraFxError(
                "AdapterCallback would write the adapters of all trials of a hyper-parameter search to the same directories: a callback "
                "is not told which the trainer takes. Call lora_fx.trainer.prepare(trainer) instead."
            )
        if state.global_step and not _is_hooked(graph):
            raise LoraFxError(
                f"AdapterCallback expected the graph that it was given, got another one, of model_init, resumed at step "
                f"{state.global_step} before the callback saw it: whether the checkpoint's adapters are the graph's is not known. "
                "Call lora_fx.trainer.prepare(trainer) instead."
            )


class _PreparedCallback(AdapterCallback):
    """The callback of a trainer whose methods were wrapped, so that they write and read adapters."""

    def _check(self, state: TrainerState, graph: TracedGraphModule) -> None:
        """Allow everything: what is written and read is known."""

    def on_save(self, *_event: Any, **_context: Any) -> None:
        """Do nothing: the adapters are in the checkpoint already."""


def _graph_in(model: Any, caller: str) -> TracedGraphModule:
    if not isinstance(model, TracedGraphModule) or not adapters(model):
        raise LoraFxError(
            f"{caller} expected a graph with adapters, and the trainer has a {type(model).__name__}: "
            "make one by lora_fx.rewrite(model, …, labels=True)."
        )
    return model


class _AdapterWriter:
    """Stands in for a trainer's graph while the trainer saves, and writes adapters where that would write the state dict."""

    def __init__(self, graph: TracedGraphModule) -> None:
        self._graph = graph

    # What isinstance asks for: transformers has a PreTrainedModel write itself.
    __class__ = property(lambda _: PreTrainedModel)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)

    def save_pretrained(self, directory: str | Path, *_: Any, is_main_process: bool = True, **_options: Any) -> None:
        if is_main_process:
            _write(self._graph, Path(directory))


def _save_model(trainer: Any, save_model: Callable[..., None], *args: Any, **options: Any) -> None:
    graph = _graph_in(trainer.model, "prepare")
    trainer.model = _AdapterWriter(graph)
    try:
        save_model(*args, **options)
    finally:
        trainer.model = graph


def _decaying(_trainer: Any, names_of: Callable[[nn.Module], list[str]], model: nn.Module) -> list[str]:
    """Return the names of the parameters with weight decay, as for the model: without the weights of layer norms."""
    names = names_of(model)
    if not isinstance(model, TracedGraphModule):
        return names
    nodes = model.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    norms = {str(node.args[2].target) for node in nodes if len(node.args) > 2 and isinstance(node.args[2], fx.Node)}
    return [name for name in names if name not in norms]


def _load_from_checkpoint(
    trainer: Any, load: Callable[..., None], resume_from_checkpoint: str, model: Any = None
) -> None:
    graph = _graph_in(trainer.model if model is None else model, "prepare")
    _hook(graph)
    if adapter_directories(Path(resume_from_checkpoint)):
        _read(graph, Path(resume_from_checkpoint))
    else:
        load(resume_from_checkpoint, model)


def _load_best_model(trainer: Any, load: Callable[[], None]) -> None:
    directory = Path(str(trainer.state.best_model_checkpoint))
    if adapter_directories(directory):
        _read(_graph_in(trainer.model, "prepare"), directory)
    else:
        load()


def adapter_directories(directory: Path) -> dict[str, Path]:
    """Return the directory of each adapter in a checkpoint, or in another directory that PEFT or :func:`prepare` writes to."""
    names = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_NAME}"))
    found = {name: directory / name for name in names if "." not in name}  # no adapter's name has one, and scratch has
    return found | ({_DEFAULT: directory} if (directory / CONFIG_NAME).is_file() else {})


def _write(graph: TracedGraphModule, directory: Path) -> None:
    tensors = state_of(graph).tensors
    other = {name: tensors[name] for name in _trained(graph) if not is_of_adapter(name)}
    if other:
        with replacing(Target(directory / OTHER_NAME, overwrite=True)) as beside:
            write_tensors(beside, other, {"format": "pt"})
    for adapter in adapters(graph):
        write_adapter_files(graph, directory if adapter == _DEFAULT else directory / adapter, adapter)


def _read(graph: TracedGraphModule, directory: Path) -> None:
    """Give a graph what a checkpoint has of its adapters, and of other parameters that train (in place)."""
    found = adapter_directories(directory)
    held, wanted = {adapter: _ranks_on_disk(path) for adapter, path in found.items()}, _ranks(graph)
    if held.keys() != wanted.keys():
        raise AdapterError(str(directory), [_other_adapters(held, wanted)])
    other = _read_other(graph, directory)
    loaded = rebuilt(graph)
    loaded.load_state_dict(other, strict=False)
    for adapter, path in found.items():
        try:
            loaded = load_adapter(loaded, path, adapter)
        except AdapterError as error:
            told = _other_adapters({adapter: held[adapter]}, {adapter: wanted[adapter]})
            raise AdapterError(str(directory), [told, error.source, *error.problems]) from error
    values = {name: value for adapter in found for name, value in parameters_of(loaded, adapter).items()}
    graph.load_state_dict({**other, **values}, strict=False)


def _read_other(graph: TracedGraphModule, directory: Path) -> dict[str, torch.Tensor]:
    """Return the values that a checkpoint has for the parameters that train and are of no adapter, by their names in the graph."""
    tensors = state_of(graph).tensors
    names = sorted(name for name in _trained(graph) if not is_of_adapter(name))
    path = next((path for name in (OTHER_NAME, _STATE_DICT_NAME) if (path := directory / name).is_file()), None)
    found: dict[str, torch.Tensor] = {}
    if names and path is not None:
        file = TensorFile.open(path)
        found = {name: file.read(name) for name in names if name in file.entries}
    problems = [
        f"{name}: expected {described(tensors[name])}, got {described(value)}"
        for name, value in found.items()
        if value.shape != tensors[name].shape
    ]
    problems += [
        f"{name}: trains in the graph, and the checkpoint has no value of it" for name in names if name not in found
    ]
    if problems:
        raise AdapterError(str(directory), shortened(problems, _MAX_NAMED, "tensors"))
    return found


def _ranks(graph: TracedGraphModule) -> dict[str, set[int]]:
    """Return the ranks of each adapter of a graph, as PEFT counts them: parts of one projection together."""
    ranks: dict[str, Counter[str]] = {adapter: Counter() for adapter in adapters(graph)}
    for adapter, by_owner in ranks.items():
        for _, branch in branches_of(graph, adapter).values():
            by_owner[branch.owner] += branch.setting.rank
    return {adapter: set(by_owner.values()) for adapter, by_owner in ranks.items()}


def _ranks_on_disk(directory: Path) -> set[int]:
    files = read_adapter(directory)
    has_branches = any(".lora_" in key for key in files.file.entries)
    return {files.config.r, *files.config.rank_pattern.values()} if has_branches else set()


def _other_adapters(held: Mapping[str, Collection[int]], wanted: Mapping[str, Collection[int]]) -> str:
    return (
        f"expected the graph's {_adapters_text(wanted)}, got {_adapters_text(held)}: training would not go on where it stopped. "
        "Give the graph the checkpoint's adapters, by the same names and rules, or begin anew."
    )


def _adapters_text(ranks: Mapping[str, Collection[int]]) -> str:
    """Return ``"adapters 'a' (rank 4) and 'b' (ranks 2, 4)"``."""
    told = [
        f"{adapter!r} (rank{'s' if len(each) > 1 else ''} {', '.join(map(str, sorted(each)))})"
        if each
        else repr(adapter)
        for adapter, each in ranks.items()
    ]
    return f"adapter{'s' if len(told) > 1 else ''} {' and '.join(told)}" if told else "no adapter"


def _trained(graph: nn.Module) -> set[str]:
    """Return the first name of each parameter that trains."""
    tensors, names = state_of(graph).tensors, state_of(graph).names()
    return {name for name in names if tensors[name].requires_grad}


def _is_hooked(graph: nn.Module) -> bool:
    return _keep_trained in graph._state_dict_hooks.values()


def _hook(graph: nn.Module) -> None:
    """Restrict the state dict of a graph to what trains, once; loading one misses nothing, and other adapters are refused."""
    if not _is_hooked(graph):
        graph.register_state_dict_post_hook(_keep_trained)
        graph.register_load_state_dict_pre_hook(_check_adapters)
        graph.register_load_state_dict_post_hook(_miss_no_frozen)


def _keep_trained(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    kept = {f"{prefix}{name}" for name in _trained(module)}
    for name in [name for name in state_dict if name.startswith(prefix) and name not in kept]:
        del state_dict[name]


def _miss_no_frozen(module: nn.Module, keys: Any) -> None:
    trained = _trained(module)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in trained]


def _check_adapters(module: TracedGraphModule, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    tensors = state_of(module).tensors
    given = {
        name: value
        for key, value in state_dict.items()
        if key.startswith(prefix) and is_of_adapter(name := key[len(prefix) :])
    }
    problems = [
        f"{name}: expected {described(tensors[name])}, got {described(given[name]) if name in given else 'none'}"
        for name in sorted(_trained(module))
        if is_of_adapter(name) and (name not in given or given[name].shape != tensors[name].shape)
    ]
    problems += [f"{name}: the graph has no such tensor" for name in given if name not in tensors]
    if problems:
        told = _other_adapters(_ranks_of(given, module), _ranks(module))
        raise AdapterError("the state dict that is loaded", [told, *shortened(problems, _MAX_NAMED, "tensors")])


def _ranks_of(given: Mapping[str, torch.Tensor], graph: TracedGraphModule) -> dict[str, set[int]]:
    """Return the ranks of the adapters in a state dict, as far as its factors are beside branches of the graph."""
    state = state_of(graph).tensors
    known = {}
    for adapter in adapters(graph):
        for _, branch in branches_of(graph, adapter).values():
            known[branch.owner] = (branch.setting.rank, len(state[branch.names(adapter).a]))
    ranks: dict[str, set[int]] = {}
    for name, value in given.items():
        owner, found, _ = name.partition(".lora_A.")
        of_adapter = ranks.setdefault(str(adapter_of(name)), set())
        if found and owner in known:
            rank, rows = known[owner]
            of_adapter.add(rank * len(value) // rows)  # a stack has the rows of all its matrices
    return ranks
