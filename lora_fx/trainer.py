"""transformers' ``Trainer``: checkpoints that hold a graph's adapters as PEFT lays them out, and not their base."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_callback import TrainerCallback, TrainerState
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import TrainingArguments
from transformers.utils.generic import find_labels

from lora_fx.adapters.peft_format.directories import (
    adapter_directories,
    read_adapters,
    write_adapters,
)
from lora_fx.adapters.peft_format.save_load import check_writable, save_adapter
from lora_fx.adapters.trained_state import is_restricted, restrict
from lora_fx.errors import LoraFxError, warn
from lora_fx.graph.adapter_names import adapters
from lora_fx.graph.graph_module import TracedGraphModule, state_in_parts
from lora_fx.graph.info import known_info
from lora_fx.graph.provenance import code_of
from lora_fx.graph.sharded import from_first_process, gathered, is_sharded, on_first_process
from lora_fx.tracing.example_inputs import pad_token_of
from lora_fx.tracing.item_count import loss_uses_count

__all__ = ["AdapterCallback", "prepare"]

PRIVATE_NAMES = ("_load_from_checkpoint", "_load_best_model")
"""Methods of transformers' ``Trainer`` that are no public names and that :func:`prepare` wraps: there it looks for PEFT's class."""

_PAD_TOKEN = re.compile(r"pad_token_id|shift_(tokens_)?right")  # in the line of a model's code that made a node
_logger = logging.getLogger("lora_fx.trainer")
aten = torch.ops.aten


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
        trainer: an object of ``transformers.Trainer`` or a subclass, which trains a graph. Its public methods ``save_model``,
            ``compute_loss`` (which takes labels from the batch for ``label_smoothing_factor`` and ``compute_loss_func``, and the
            graph needs them too) and ``get_decay_parameter_names`` (which looks for ``nn.LayerNorm``) are wrapped, and so are its
            methods of :data:`PRIVATE_NAMES`; an :class:`AdapterCallback` is added.

    Raises:
        LoraFxError: the trainer's model is no graph with adapters, or the object lacks a method that is to be wrapped.
    """
    handler = getattr(trainer, "callback_handler", None)
    if any(isinstance(each, _PreparedCallback) for each in getattr(handler, "callbacks", ())):
        return
    wraps: dict[str, Callable[..., Any]] = {
        "save_model": _save_model,
        "compute_loss": _compute_loss,
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
    restrict(graph)
    for kind in (AdapterCallback, UnpreparedCallback):
        while trainer.pop_callback(kind) is not None:
            pass
    trainer.add_callback(_PreparedCallback())
    for name, wrapper in wraps.items():
        setattr(trainer, name, partial(wrapper, trainer, getattr(trainer, name)))


def _warn_of_sums(trainer: Any, graph: TracedGraphModule) -> None:
    steps = trainer.args.gradient_accumulation_steps
    counts = trainer.model_accepts_loss_kwargs and trainer.compute_loss_func is None and trainer.label_smoother is None
    if steps > 1 and counts and not loss_uses_count(graph):
        model = known_info(graph).model_class.rpartition(":")[2]
        warn(
            f"the loss of {model} ignores num_items_in_batch, and transformers takes it to be used: nothing divides by the {steps} "
            "accumulation steps, so that losses and gradients are sums over them, as they are with PEFT. For their mean set "
            "trainer.model_accepts_loss_kwargs = False.",
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
        restrict(_graph_in(model, "AdapterCallback"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_control: Any, model: Any = None, **_context: Any
    ) -> None:
        """Refuse what the checkpoints would be wrong for, before the first step; restrict the state dict of the graph that trains."""
        graph = _graph_in(model, "AdapterCallback")
        self._check(args, state, graph)
        restrict(graph)
        if args.save_strategy != "no":
            on_first_process(graph, _check_writable)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, *_control: Any, model: Any = None, **_context: Any
    ) -> None:
        """Write each adapter into the checkpoint, from one process; all give their parts of a sharded graph."""
        if state.is_world_process_zero or is_sharded(model):
            checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            for adapter in adapters(model):
                save_adapter(model, checkpoint / adapter, adapter, overwrite=True)

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        *_control: Any,
        model: Any = None,
        **_context: Any,
    ) -> None:
        """Say once what ``save_model`` writes, and what writes the adapter."""
        if state.is_world_process_zero:
            self._tell(model)

    def _tell(self, graph: TracedGraphModule) -> None:
        _tell_of_saving(graph, "writes model.safetensors with the parameters that train")

    def _check(self, args: TrainingArguments, state: TrainerState, graph: TracedGraphModule) -> None:
        _check_whole(args, graph)
        _check_traced(args, graph, keeps_labels=False)
        if state.is_hyper_param_search or state.trial_params is not None:
            raise LoraFxError(
                "AdapterCallback would write the adapters of all trials of a hyper-parameter search to the same directories: a callback "
                "is not told which the trainer takes. Call lora_fx.trainer.prepare(trainer) instead."
            )
        if state.global_step and not is_restricted(graph):
            raise LoraFxError(
                f"AdapterCallback expected the graph that it was given, got another one, of model_init, resumed at step "
                f"{state.global_step} before the callback saw it: whether the checkpoint's adapters are the graph's is not known. "
                "Call lora_fx.trainer.prepare(trainer) instead."
            )


class _PreparedCallback(AdapterCallback):
    """The callback of a trainer whose methods were wrapped, so that they write and read adapters."""

    def _check(self, args: TrainingArguments, state: TrainerState, graph: TracedGraphModule) -> None:  # noqa: ARG002
        _check_traced(args, graph, keeps_labels=True)

    def _tell(self, graph: TracedGraphModule) -> None:
        """Say nothing: ``save_model`` writes the adapter."""

    def on_save(self, *_event: Any, **_context: Any) -> None:
        """Do nothing: the adapters are in the checkpoint already."""


class UnpreparedCallback(TrainerCallback):
    """The callback of a trainer that trains a graph and was not prepared: it refuses what would fail or mislead later."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, *_event: Any, model: Any = None, **_context: Any) -> None:
        """Refuse what the trainer cannot do with the graph, before the first step."""
        if self._is_needed(model):
            _check_whole(args, model)
            _check_traced(args, model, keeps_labels=False)
            tied, strategy = _tied(model), SaveStrategy(args.save_strategy)
            if tied and strategy is not SaveStrategy.NO:
                raise LoraFxError(
                    f"the first checkpoint (save_strategy={strategy.value!r}) would fail: {tied} are one tensor, and "
                    "transformers writes no state dict with ties. Call lora_fx.trainer.prepare(trainer), after which checkpoints "
                    'hold the adapters, or set save_strategy="no".'
                )

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        *_control: Any,
        model: Any = None,
        **_context: Any,
    ) -> None:
        """Say once what ``save_model`` writes, and what writes the adapter."""
        if state.is_world_process_zero and self._is_needed(model):
            tied = _tied(model)
            does = f"fails, since {tied} are one tensor" if tied else "writes model.safetensors with the base in it"
            _tell_of_saving(model, does)

    def _is_needed(self, model: Any) -> bool:
        others = self._trainer.callback_handler.callbacks
        return (
            isinstance(model, TracedGraphModule)
            and bool(adapters(model))
            and not any(isinstance(each, AdapterCallback) for each in others)
        )


def follow(caller: FrameType) -> None:
    """Add an :class:`UnpreparedCallback` to a trainer that is being made around a graph (in place).

    Args:
        caller: the call that reads the graph's config; that of ``Trainer.__init__`` does so when it can take callbacks.
    """
    trainer: Any = caller.f_locals.get("self") if caller.f_code.co_name == "__init__" else None
    callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", None)
    if callbacks is not None and not any(isinstance(each, AdapterCallback | UnpreparedCallback) for each in callbacks):
        trainer.add_callback(UnpreparedCallback(trainer))


def _tell_of_saving(graph: TracedGraphModule, does: str) -> None:
    names = ", ".join(repr(adapter) for adapter in adapters(graph))
    _logger.warning(
        "trainer.save_model(directory) %s; graph.save_pretrained(directory) writes the adapter %s. After "
        "lora_fx.trainer.prepare(trainer), save_model does that too.",
        does,
        names,
    )


def _check_writable(graph: TracedGraphModule) -> None:
    """Raise what the first checkpoint would."""
    for adapter in adapters(graph):
        check_writable(graph, adapter)


def _tied(graph: TracedGraphModule) -> str:
    """Return the names of the first tensor that has several in the state dict, or nothing."""
    kept = graph.state_dict(keep_vars=True)
    names = ([name for name in every if name in kept] for every in state_in_parts(graph).names().values())
    return next((" and ".join(map(repr, each)) for each in names if len(each) > 1), "")


def _check_whole(args: TrainingArguments, graph: TracedGraphModule) -> None:
    """Raise where a trainer would write this process's parts of a graph, sharded by hand, as if they were whole."""
    by_hand = getattr(graph, "is_distributed_loading_by_transformers", False)
    if by_hand and args.save_strategy != "no":
        raise LoraFxError(
            "the graph was sharded before the trainer was made, which would write the parts that one process has as model.safetensors. Call "
            'lora_fx.trainer.prepare(trainer), after which checkpoints hold whole adapters, or set save_strategy="no".'
        )


def _check_traced(args: TrainingArguments, graph: TracedGraphModule, *, keeps_labels: bool) -> None:
    """Raise where a trainer asks for something that is otherwise in the trace.

    Args:
        args: of the trainer.
        graph: that it trains.
        keeps_labels: whether the graph gets the labels that the trainer takes from the batch.
    """
    _check_pad_token(graph)
    if args.label_smoothing_factor:
        _check_smoothing(args, graph, keeps_labels)


def _check_pad_token(graph: TracedGraphModule) -> None:
    """Raise where the config has another ``pad_token_id`` by now, as the trainer takes it from a tokenizer, and the graph reads it."""
    info = known_info(graph)
    pad_token = pad_token_of(info.config)
    if pad_token == info.pad_token:
        return
    line = next((code for node in graph.graph.nodes if _PAD_TOKEN.search(code := code_of(node))), None)
    if line is not None:
        raise LoraFxError(
            f"the graph was traced with pad_token_id={info.pad_token} and computes with it ({line}), and its config has {pad_token} now, "
            f"which transformers takes from the tokenizer. Set model.config.pad_token_id = {pad_token}, and rewrite that model."
        )


def _check_smoothing(args: TrainingArguments, graph: TracedGraphModule, keeps_labels: bool) -> None:
    """Raise where ``label_smoothing_factor`` would not act on the loss, or the graph would miss the labels that it takes."""
    name, labels = known_info(graph).class_name, find_labels(type(graph))
    if not labels:
        reason = "and this graph takes none. Make it by lora_fx.rewrite(model, …, labels=True)."
    elif "labels" not in labels:
        reason = (
            f"and {name} has {' and '.join(labels)} instead: transformers would train without smoothing. Set it to 0."
        )
    elif args.torch_compile and name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        reason = "and of a compiled model transformers does not see that the labels are to be shifted: set torch_compile=False."
    elif not keeps_labels:
        reason = "which the graph needs for its own loss. Call lora_fx.trainer.prepare(trainer), which gives both what they need."
    else:
        return
    raise LoraFxError(
        f"label_smoothing_factor={args.label_smoothing_factor} takes an input called labels from the batch, {reason}"
    )


def _graph_in(model: Any, caller: str) -> TracedGraphModule:
    if not isinstance(model, TracedGraphModule) or not adapters(model):
        kind = "graph without any" if isinstance(model, TracedGraphModule) else type(model).__name__
        raise LoraFxError(
            f"{caller} expected a graph with adapters, and the trainer has a {kind}: "
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
            write_adapters(self._graph, Path(directory))


def _save_model(trainer: Any, save_model: Callable[..., None], *args: Any, **options: Any) -> None:
    graph = _graph_in(trainer.model, "prepare")
    whole, fsdp = gathered(graph), getattr(trainer, "is_fsdp_enabled", False)
    trainer.model = _AdapterWriter(graph if whole is None else whole)
    trainer.is_fsdp_enabled = False  # transformers would gather a state dict of the base, too
    try:
        from_first_process(graph, lambda: save_model(*args, **options))
    finally:
        trainer.model, trainer.is_fsdp_enabled = graph, fsdp


class _KeptLabels:
    """A hook before the call of a graph, which gives it the labels that its trainer took from the batch for a loss of its own."""

    labels: Any = None

    def __call__(self, _graph: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs if self.labels is None else {"labels": self.labels, **kwargs}


def _compute_loss(
    trainer: Any, compute_loss: Callable[..., Any], model: Any, inputs: Mapping[str, Any], *args: Any, **options: Any
) -> Any:
    graph = trainer.model
    takes = trainer.label_smoother is not None or trainer.compute_loss_func is not None
    if not takes or "labels" not in find_labels(type(graph)):
        return compute_loss(model, inputs, *args, **options)
    kept = next((hook for hook in graph._forward_pre_hooks.values() if isinstance(hook, _KeptLabels)), None)
    if kept is None:
        kept = _KeptLabels()
        graph.register_forward_pre_hook(kept, with_kwargs=True)
    kept.labels = inputs.get("labels")
    try:
        return compute_loss(model, inputs, *args, **options)
    finally:
        kept.labels = None


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
    restrict(graph)
    if adapter_directories(Path(resume_from_checkpoint)):
        read_adapters(graph, Path(resume_from_checkpoint))
    else:
        load(resume_from_checkpoint, model)


def _load_best_model(trainer: Any, load: Callable[[], None]) -> None:
    directory = Path(str(trainer.state.best_model_checkpoint))
    if adapter_directories(directory):
        read_adapters(_graph_in(trainer.model, "prepare"), directory)
    else:
        load()
