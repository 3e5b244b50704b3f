"""PEFT's and transformers' spelling: functions that graphs of transformers models have as methods.

A :class:`~lora_fx.TracedGraphModule` looks the names of :data:`~lora_fx.graph.info.PEFT_SPELLING` up here. Each function does what
a PEFT user expects of its name, with a line or two around the functions of the package; those say what they raise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType, MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lora_fx.adapters.activate import activate, tell_waiting
from lora_fx.adapters.peft_format.opening import read_adapter
from lora_fx.adapters.peft_format.save_load import with_adapter, write_adapter_files
from lora_fx.adapters.prefix import acting_prefix, keys_and_values, prefix_record, prompt_of
from lora_fx.adapters.recorded import free_names, with_training
from lora_fx.adapters.row_selection import activate_by_row
from lora_fx.branches.lower import is_fused
from lora_fx.branches.remove import plain_graph
from lora_fx.branches.tied_copies import untied_copies
from lora_fx.errors import InputError, LoraFxError
from lora_fx.export.torchscript_file import scriptable as scriptable  # for torch.jit.script
from lora_fx.folding.fold import folded_state
from lora_fx.generation import generator
from lora_fx.generation.prefixed_model import behind, behind_prompt, check_options
from lora_fx.graph.adapter_names import adapters, original_name
from lora_fx.graph.adapter_rows import ADAPTER_NAMES, AdapterRows
from lora_fx.graph.cached_graphs import has_cache
from lora_fx.graph.graph_module import TracedGraphModule, state_of
from lora_fx.graph.info import CHECKPOINTING_SPELLING, EMBEDDINGS, PEFT_SPELLING, known_info, with_info
from lora_fx.graph.layers import layers
from lora_fx.graph.sharded import is_sharded, on_first_process
from lora_fx.graph.take_over import take_over
from lora_fx.sites.call_sites import sites
from lora_fx.tracing.transformers_models import double_over, empty_double
from lora_fx.training.below_head import below_head
from lora_fx.training.checkpointing import (  # noqa: F401  # methods, by their names
    activation_checkpointing_disable,
    activation_checkpointing_enable,
    gradient_checkpointing_disable,
    gradient_checkpointing_enable,
)
from lora_fx.training.fuse import fuse
from lora_fx.training.parameters import parameter_summary


def methods_of(graph_module: TracedGraphModule) -> Mapping[str, Callable[..., Any]]:
    """Return the methods that mean something for a graph, by their names: few unless it is of a transformers model."""
    info = known_info(graph_module)
    absent = set() if info.pretrained else PEFT_SPELLING - CHECKPOINTING_SPELLING
    absent |= set() if info.generation_config is not None else {"base_model", "generate", "get_output_embeddings"}
    absent |= EMBEDDINGS if info.nested else set()
    absent |= set() if adapters(graph_module) else {"save_pretrained", "set_adapter"}
    return {name: MethodType(globals()[name], graph_module) for name in sorted(PEFT_SPELLING - absent)}


def add_model_tags(graph_module: TracedGraphModule, tags: Sequence[str] | str) -> None:
    """Add tags for the model card of the model that :func:`merge_and_unload` returns (in place); trainers of trl do."""
    info = known_info(graph_module)
    all_tags = dict.fromkeys((*info.tags, *([tags] if isinstance(tags, str) else tags)))
    graph_module.meta.update(with_info(graph_module.meta, replace(info, tags=tuple(all_tags))))


def can_generate(graph_module: TracedGraphModule) -> bool:
    """Tell whether the model that was traced generates."""
    return known_info(graph_module).generation_config is not None


def generate(graph_module: TracedGraphModule, *args: Any, **options: Any) -> Any:
    """Generate tokens by the model's own ``generate``, with the weights as they are folded at the start of the call.

    A graph that was traced with ``cache=True`` computes them itself: see :func:`lora_fx.generation.generator`. It takes ``adapter_names``
    too, the adapter of each row; the others that it has may be of kinds that cannot act by row.

    A model of the traced class is made for the call, in evaluation mode. It shares the weights that no adapter changes; the others
    are in memory twice until the call returns, and nothing is kept. The graph may have labels. A prefix that acts is the beginning of
    its cache, and a prompt stands in front of the embeddings.

    Args:
        graph_module: not changed.
        args: of the model's ``generate``.
        options: of the model's ``generate``; others follow from ``generation_config``.

    Raises:
        LoraFxError: the class of the model is code of a hub, or its config makes another model.
        FoldError: the branches cannot be folded.
    """
    named = options.get(ADAPTER_NAMES) is not None
    if has_cache(graph_module):
        by_row = named and not known_info(graph_module).by_row
        graph = _for_rows(graph_module, options[ADAPTER_NAMES]) if by_row else graph_module
        return generator(graph).generate(*args, **options)
    if named or known_info(graph_module).by_row:
        raise LoraFxError(
            f"{ADAPTER_NAMES}: expected a graph with a key-value cache, got one without, whose weights would be folded for all rows alike. "
            "Rewrite the model or load the adapters with cache=True."
        )
    adapter = acting_prefix(graph_module)
    state = folded_state(graph_module, unshare=True, keep_prefix=True)
    model: Any = double_over(graph_module, state, _turned(graph_module)).eval()
    if adapter is None:
        return model.generate(*args, **options)
    check_options(model, options, prefix_record(graph_module, adapter).kind)
    if prefix_record(graph_module, adapter).is_prompt:
        if options.get("encoder_outputs") is not None:
            raise InputError(
                "encoder_outputs were given, and a prompt is put in front of what the encoder reads. Leave them out."
            )
        ahead = behind_prompt(model, prompt_of(graph_module, adapter))
    else:
        ahead = behind(model, keys_and_values(graph_module, adapter))
    with ahead:
        return model.generate(*args, **options)


def load_adapter(
    graph_module: TracedGraphModule, model_id: str | os.PathLike[str], adapter_name: str, is_trainable: bool = False
) -> None:
    """Take the adapter of a directory into this graph (in place); :func:`lora_fx.load_adapter` returns a new graph instead.

    As in PEFT, the first adapter of a graph acts at once, and a further one waits for :func:`set_adapter`. One that the graph has
    already gets the values, and goes on acting and training as it does. Every ``Parameter`` that is there stays the object that it
    is, so that an optimizer made before goes on. Unless ``is_trainable``, the graph is in evaluation mode afterwards.

    Args:
        graph_module: is changed.
        model_id: the directory, see :func:`lora_fx.from_adapter`.
        adapter_name: name for it in the graph.
        is_trainable: whether a new adapter trains while it acts. Before it acts, its parameters require no gradient.

    Raises:
        AdapterError: see :func:`lora_fx.load_adapter`; the graph is as it was.
        PlanError: see :func:`lora_fx.load_adapter`; the graph is as it was.
    """
    present = adapter_name in adapters(graph_module)
    trainable = None if present else is_trainable
    changed = with_adapter(graph_module, read_adapter(Path(model_id)), adapter_name, trainable=trainable, strict=True)
    _become(graph_module, changed)
    if not is_trainable:
        graph_module.eval()
    if not present:
        tell_waiting(graph_module, adapter_name, f'graph.set_adapter("{adapter_name}") makes it act')


def set_adapter(
    graph_module: TracedGraphModule, adapter_name: str | Sequence[str], inference_mode: bool = False
) -> None:
    """Let just these adapters act and train in this graph (in place); :func:`lora_fx.activate` returns a new graph instead.

    They act at strength 1. What their kind freezes stays frozen. The others stay in the graph, without nodes, and do not train.
    Every ``Parameter`` that is there stays the object that it is, so that an optimizer made before goes on.

    Args:
        graph_module: is changed.
        adapter_name: a name, or several; none of them for the base.
        inference_mode: freeze them.

    Raises:
        PlanError: see :func:`lora_fx.activate`; the graph is as it was.
    """
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    changed = activate(graph_module, dict.fromkeys(names, 1.0))
    for name in names:
        changed = with_training(changed, name, frozenset() if inference_mode else free_names(changed, name))
    _become(graph_module, changed)


def _become(graph_module: TracedGraphModule, changed: TracedGraphModule) -> None:
    """Let a graph become another one in place, fused if it is."""
    take_over(graph_module, fuse(changed) if is_fused(graph_module) else changed)


def merge_and_unload(
    graph_module: TracedGraphModule,
    progressbar: bool = False,  # noqa: ARG001
    safe_merge: bool = False,  # noqa: ARG001
    adapter_names: Sequence[str] | None = None,
) -> PreTrainedModel:
    """Return a new transformers model of the traced class with merged weights, as :func:`lora_fx.fold` computes them.

    The graph and the model that was traced stay as they are. Weights that no adapter changes are not copied: they are other
    ``Parameter`` objects over the same memory, and ``copy.deepcopy`` of the result gives it memory of its own. Replicated layers
    (``layer_replication``) have weights of their own there, since transformers saves no others.

    Args:
        graph_module: not changed.
        progressbar: without effect: a merge takes no time worth a bar.
        safe_merge: without effect: a merge that is not finite is always refused.
        adapter_names: the adapters to merge; by default those that act.

    Raises:
        LoraFxError: the class of the model is code of a hub, or its config makes another model.
        FoldError: the branches cannot be folded.
        PlanError: the graph has no adapter of that name.
    """
    strengths = None if adapter_names is None else dict.fromkeys(adapter_names, 1.0)
    state = folded_state(graph_module, strengths, unshare=bool(known_info(graph_module).layers))
    model = double_over(graph_module, state, _turned(graph_module))
    for name, first in model.all_tied_weights_keys.items():
        if {name, first} <= state.tensors.keys() and state.tensors[name] is not state.tensors[first]:
            raise LoraFxError(
                f"{first!r} and {name!r} are one parameter of {type(model).__name__}, and were untied by fold: the model would tie them "
                "again whenever it is resized, saved or loaded. Untie them before the trace (config.tie_word_embeddings = False and a "
                "parameter of its own for each), or write the graph with lora_fx.huggingface.save_pretrained."
            )
    if known_info(graph_module).layers:
        _separate_layers(model)
    model.add_model_tags(list(known_info(graph_module).tags))
    model.train(graph_module.training)
    return model


def _separate_layers(model: PreTrainedModel) -> None:
    """Give a model a parameter of its own for each name of one that its class does not tie (in place)."""
    seen = set[int]()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name in model.all_tied_weights_keys:
            continue
        if parameter.data_ptr() in seen:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
        seen.add(parameter.data_ptr())


def _turned(graph_module: TracedGraphModule) -> set[str]:
    """Return the weights of linear layers that a graph stores as ``(out, in)``."""
    found = {site.weight for site in sites(plain_graph(graph_module)) if (site.op, site.layout) == ("linear", "out_in")}
    return {original_name(name) or name for name in found}


def _for_rows(graph_module: TracedGraphModule, names: Any) -> TracedGraphModule:
    """Return a graph that takes the adapters of these rows alone, of which others may be of any kind."""
    present = adapters(graph_module)
    chosen = set(AdapterRows(present).chosen(names).names)
    named = [name for name in present if name in chosen]
    return activate_by_row(graph_module, named) if named else activate(graph_module, {})


def save_pretrained(
    graph_module: TracedGraphModule,
    save_directory: str | os.PathLike[str],
    safe_serialization: bool = True,
    selected_adapters: Sequence[str] | None = None,
    *,
    is_main_process: bool = True,
) -> None:
    """Write the adapters as PEFT lays them out; :func:`lora_fx.huggingface.save_pretrained` writes the folded model.

    The adapter ``default`` is written into the directory, each other one into a directory of its name. Files of an adapter that is
    there are replaced, others stay. :func:`lora_fx.save_adapter` writes one adapter into a directory of its own.

    Args:
        graph_module: not changed.
        save_directory: made where it is missing.
        safe_serialization: True; adapters are written as safetensors alone.
        selected_adapters: by default all that the graph has.
        is_main_process: whether to write at all; of a graph that FSDP shards the first process does, and every process calls this.

    Raises:
        PlanError: the graph has no adapter of that name.
        AdapterError: PEFT has no way to say what an adapter is.
        WriteError: the directory cannot be written to.
    """
    if not safe_serialization:
        raise LoraFxError("adapters are written as safetensors alone: expected safe_serialization=True, got False.")
    directory = Path(save_directory)

    def write(whole: TracedGraphModule) -> None:
        for adapter in adapters(whole) if selected_adapters is None else selected_adapters:
            write_adapter_files(whole, directory if adapter == "default" else directory / adapter, adapter)

    if is_main_process or is_sharded(graph_module):
        on_first_process(graph_module, write)


def get_nb_trainable_parameters(graph_module: TracedGraphModule) -> tuple[int, int]:
    """Return the number of trainable and of all parameters, by their elements."""
    summary = parameter_summary(graph_module)
    return summary.trainable, summary.total


def print_trainable_parameters(graph_module: TracedGraphModule) -> None:
    """Print the numbers of trainable and of all parameters in a line, as PEFT does."""
    summary = parameter_summary(graph_module)
    print(
        f"trainable params: {summary.trainable:,d} || all params: {summary.total:,d} || trainable%: {summary.percent:.4f}"
    )


def num_parameters(
    graph_module: TracedGraphModule, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """Return the number of elements of the parameters.

    Args:
        graph_module: with its adapters, which count.
        only_trainable: count those that require a gradient alone.
        exclude_embeddings: count no weights of the model's ``nn.Embedding`` modules, nor trained copies of them.
    """
    # Trainer asks at each step: nothing that takes time.
    excluded = known_info(graph_module).embeddings if exclude_embeddings else frozenset()
    return sum(
        parameter.numel()
        for name, parameter in graph_module.named_parameters()
        if (original_name(name) or name) not in excluded and (parameter.requires_grad or not only_trainable)
    )


def get_input_embeddings(graph_module: TracedGraphModule) -> nn.Module:
    """Return the embedding of the model's input, whose weight is the graph's own parameter.

    The graph is flat and does not call it: a hook, or an attribute such as ``neftune_noise_alpha``, raises a :class:`LoraFxError`
    where it is set. A nested graph has no such method. So does a call, where the embedding has branches of adapters.

    Args:
        graph_module: not changed.

    Raises:
        LoraFxError: the class of the model is code of a hub, has no such embedding, or its config makes another model.
    """
    return _part(graph_module, "get_input_embeddings")[1]


def get_output_embeddings(graph_module: TracedGraphModule) -> nn.Module:
    """Return the output head of the model, whose weight is the graph's own parameter; see :func:`get_input_embeddings`."""
    return _part(graph_module, "get_output_embeddings")[1]


def base_model(graph_module: TracedGraphModule, *args: Any, **options: Any) -> Any:
    """Return what the output head reads, as ``last_hidden_state``: transformers' base model, for trainers with a head of their own.

    Args:
        graph_module: not changed.
        args: of the graph, without labels.
        options: of the graph, without labels.

    Raises:
        LoraFxError: the head has branches of an adapter, or see :func:`get_input_embeddings`.
    """
    path, _ = _part(graph_module, "get_output_embeddings")
    state = state_of(graph_module)
    made, own = vars(graph_module).get("_below_head", (None, {}))
    if made is None or any(state.tensors.get(name) is not tensor for name, tensor in own.items()):
        weight = _read_name(graph_module, f"{path}.weight")
        made = below_head(graph_module, weight)
        own = {name: tensor for name, tensor in state_of(made).tensors.items() if name in state.tensors}
        vars(graph_module)["_below_head"] = made, own  # not as an attribute: it is no module of the graph
    for name, layer in layers(made).items():  # which are modules of its own
        layer.training = graph_module.get_submodule(name).training
    return made(*args, **options)


def _part(graph_module: TracedGraphModule, getter: str) -> tuple[str, nn.Module]:
    """Return path and module of a part of the model, over the graph's own tensors. It is made once for each graph."""
    known = vars(graph_module).setdefault("_parts", {})
    if getter not in known:
        model = empty_double(graph_module)
        try:
            module = getattr(model, getter)()
        except NotImplementedError:
            module = None
        if module is None:
            raise LoraFxError(f"{type(model).__name__} has no {getter.removeprefix('get_').replace('_', ' ')}.")
        path = next(name for name, each in model.named_modules() if each is module)
        module.__class__ = type(type(module).__name__, (_NotCalled, type(module)), {})
        vars(module)["_called"] = _CALLED[getter]
        known[getter] = path, module
    path, module = known[getter]
    state = state_of(graph_module)
    for name in state_of(module).tensors:
        value = state.tensors[_read_name(graph_module, f"{path}.{name}")]
        owner_path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_path)
        (owner._parameters if isinstance(value, nn.Parameter) else owner._buffers)[leaf] = value
    owners = {
        branch.owner.partition("@")[0]
        for record in known_info(graph_module).adapters.values()
        for _, branch in record.branches.values()
        if record.acts
    }
    vars(module)["_is_adapted"] = path in owners
    return path, module


_CALLED = {"get_input_embeddings": "the input embedding", "get_output_embeddings": "the output embedding"}


def _read_name(graph_module: TracedGraphModule, name: str) -> str:
    """Return the name under which a graph reads a tensor of the model: of a trained copy of it, or the first of its own."""
    read = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
    first = state_of(graph_module).aliases()[name]
    copies = {original: copied for copied in read if (original := original_name(copied)) is not None}
    shared = copies.get(first)
    return copies.get(name) or (None if shared in untied_copies(graph_module) else shared) or first


def follow_trainer(caller: FrameType) -> None:
    """Have :mod:`lora_fx.trainer` follow a ``Trainer`` that reads the config of a graph in a call of ``caller``."""
    from lora_fx import trainer  # only now: transformers' own has long been imported

    trainer.follow(caller)


class _NotCalled(nn.Module):
    """A module whose tensors are a graph's, and that the graph does not call: what would only act in such a call is refused."""

    def _refuse(self, what: str) -> Any:
        raise LoraFxError(
            f"{what} on {vars(self)['_called']}: a traced graph is flat and computes its embedding as a node, without calling this module, so "
            "that it would have no effect. Set it on the model before that is traced, or do without (neftune_noise_alpha=None)."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "training":
            self._refuse(f"{name} was set")
        super().__setattr__(name, value)

    def forward(self, *args: Any, **options: Any) -> Any:
        """Compute what the model's own module does, unless an adapter has branches there."""
        if vars(self)["_is_adapted"]:
            raise LoraFxError(
                f"this {type(self).__name__} has branches of adapters in the graph, and its weight alone would leave them out. Call the "
                "graph, or the module of graph.merge_and_unload()."
            )
        return super().forward(*args, **options)

    def register_forward_hook(self, *_args: Any, **_options: Any) -> Any:
        self._refuse("a forward hook was set")

    def register_forward_pre_hook(self, *_args: Any, **_options: Any) -> Any:
        self._refuse("a forward hook was set")

    def register_full_backward_hook(self, *_args: Any, **_options: Any) -> Any:
        self._refuse("a backward hook was set")

    def register_full_backward_pre_hook(self, *_args: Any, **_options: Any) -> Any:
        self._refuse("a backward hook was set")

    def register_backward_hook(self, *_args: Any, **_options: Any) -> Any:
        self._refuse("a backward hook was set")
