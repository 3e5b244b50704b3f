"""Trace of a ``torch.nn.Module``: one plain graph in normal form, compared with the model on the example inputs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import fx, nn

from lora_fx.errors import TraceError, first_line
from lora_fx.graph.batch_norms import statistics
from lora_fx.graph.cached_graphs import CachedGraphs
from lora_fx.graph.graph_module import TracedGraphModule, assemble, check_names, copy_graph, rebuilt, state_of
from lora_fx.graph.info import GraphInfo, with_info
from lora_fx.graph.input_checks import Constraints, add_checks
from lora_fx.graph.invariants import checked_base
from lora_fx.graph.prefix_slot import INPUT as PREFIX
from lora_fx.graph.prefix_slot import open_slot
from lora_fx.graph.process_state import uncollected
from lora_fx.graph.signature import fill_in, signature_of
from lora_fx.graph.state import State
from lora_fx.graph.take_inputs import take_inputs
from lora_fx.progress import shown
from lora_fx.tracing.cached_encoder_decoder import CALLS, is_encoder_decoder, sizes_of
from lora_fx.tracing.cached_forward import CachedCall, CausalCall, replaced_forward
from lora_fx.tracing.canonicalize import (
    follow_input_device,
    inline_regions,
    numbered,
    remove_assertions,
    use_first_names,
    written_names,
)
from lora_fx.tracing.constraints import constraints_of
from lora_fx.tracing.custom_autograd import check_functions, check_hooks, recorded_interference
from lora_fx.tracing.example_inputs import (
    ExampleInputs,
    config_of,
    generation_config_of,
    has_tensor,
    is_pretrained,
    pad_token_of,
    varied,
    with_labels,
)
from lora_fx.tracing.fake_results import FakeResults
from lora_fx.tracing.item_count import (
    follow_item_count,
    loss_uses_count,
    trained_model,
    with_item_count,
    without_item_count,
)
from lora_fx.tracing.model_checks import (
    advice_on_writes,
    check_cached,
    check_loss,
    check_model,
    check_taken_as_traced,
    nest_as,
    taken_checkpointing,
)
from lora_fx.tracing.model_state import (
    Mode,
    inner_model,
    is_exported,
    mode_of,
    preserved,
    stateless,
    traceable_batch_norms,
)
from lora_fx.tracing.module_kinds import linear_modules, parameter_modules, second_names, task_head, vocabulary_modules
from lora_fx.tracing.omitted_inputs import fills_of, flags_of
from lora_fx.tracing.parity import OnCopies, called, check_evaluation, check_outputs, check_training
from lora_fx.tracing.prefixed_forward import PrefixedCall, returns_cache, with_empty_slot, without_prefix
from lora_fx.tracing.prompted_forward import prefixed
from lora_fx.tracing.quantised_models import QuantisedLayers, checked_beside_library, linear_layers, without_codes
from lora_fx.tracing.repeated_layers.call_values import FirstLayerDiffers, LayersDiffer, reason_of
from lora_fx.tracing.repeated_layers.expand import expand
from lora_fx.tracing.repeated_layers.layer_classes import (
    MIN_LAYERS,
    LayerClass,
    foreign_part,
    layer_classes,
    without_first,
)
from lora_fx.tracing.repeated_layers.stubs import stubbed
from lora_fx.tracing.size_probing import examples_of, without_artefacts
from lora_fx.tracing.torch_export import Dynamic, check_inputs, export, in_order, inputs_of, tie
from lora_fx.tracing.train_eval import CUMULATIVE, check_constants, remove_inactive_dropout, unite_modes

_logger = logging.getLogger("lora_fx.tracing")


@overload
def trace(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | ExampleInputs | None = None,
    *,
    dynamic: Dynamic | None = None,
    labels: bool = False,
    inference: bool = False,
    cache: Literal[False] = False,
    prefix: bool | Literal["prompt"] = False,
) -> TracedGraphModule: ...


@overload
def trace(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | ExampleInputs | None = None,
    *,
    dynamic: Dynamic | None = None,
    labels: bool = False,
    inference: bool = False,
    cache: bool,
    prefix: bool | Literal["prompt"] = False,
) -> TracedGraphModule | CachedGraphs: ...


def trace(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | ExampleInputs | None = None,
    *,
    dynamic: Dynamic | None = None,
    labels: bool = False,
    inference: bool = False,
    cache: bool = False,
    prefix: bool | Literal["prompt"] = False,
) -> TracedGraphModule | CachedGraphs:
    """Trace a model into one plain ``torch.fx.GraphModule`` of ATen operators.

    The graph takes the inputs it was traced with, by position or keyword, and returns what the model returned (for a
    transformers model the same ``ModelOutput`` class). It has its own ``Parameter`` objects, all frozen, over the storage
    of the model's; the model is not changed. Inputs that the trace does not cover raise :class:`~lora_fx.errors.InputError`.

    Of four equal layers or more in a model of transformers one is traced, and its nodes are stamped for
    the others, wherever that gives the graph of a full trace. The logger ``lora_fx.tracing`` says at level INFO whether it did,
    and if not, why. A model with a part of other origin is traced in full: state that its layers keep in Python from one
    call to the next (a count of calls) would not be seen.

    Args:
        model: any module that ``torch.export`` takes, also one that PEFT wraps, and a ``GraphModule`` of any kind; a traced
            graph is copied. An ``ExportedProgram`` (a loaded ``.pt2``), or the module of one, has only the mode in which it was
            exported, and needs ``inference=True``. Its parameters keep their names, and its guards become input checks.
        example_inputs: keyword inputs as a mapping, or positional ones as a tuple. Made from the config of a transformers
            model when left out; those of the program for an ``ExportedProgram``. Values that are not tensors become constants
            of the graph. Dimensions that must vary may have size 1: they are traced with 2.
        dynamic: input name → dimensions that may vary. By default batch and sequence of a transformers model must, and
            every other dimension may wherever the model allows.
        labels: trace a transformers model with labels, so that the graph returns the model's loss. Where ``example_inputs`` have
            none, they are made as the model's class takes them. Such a graph is for training: fold and exports ask for
            :func:`~lora_fx.transfer` to one without.
        inference: trace the eval mode only. The graph has no dropout and cannot be trained; for models whose training
            cannot be traced.
        cache: trace a causal language model of transformers with its key-value cache as inputs and outputs. One graph then serves
            the prompt and every further token: ``(input_ids (batch, sequence), attention_mask (batch, past_sequence + sequence)[,
            position_ids (batch, sequence)], past_key_values)`` → ``{"logits", "present"}``, where ``past_key_values`` and ``present``
            are lists with ``{"key", "value"}`` of each layer, ``(batch, heads, length, size of a head)``. The past may be empty.
        prefix: trace a transformers model so that its graph can take prefixes (``[[prefix]]`` in rules), or with ``"prompt"`` prompts
            (``[[prompt]]``). Without one it computes what the model computes.

    Returns:
        A graph in the mode (train or eval) of the model; in eval mode for an exported program. It is nested
        (:func:`~lora_fx.nest`) if the model computes layers again in the backward pass, and does so too.

    Raises:
        TraceError: the model cannot be traced, fixes a dimension that should vary (the message says which), or has a graph
            that gives other numbers or gradients than it does.
    """
    model = inner_model(model)
    if isinstance(model, TracedGraphModule):
        check_taken_as_traced(model, cache=cache, labels=labels, prefix=prefix)
        return rebuilt(model)
    if isinstance(model, torch.export.ExportedProgram):
        if example_inputs is None and model.example_inputs is not None:
            example_inputs = ExampleInputs(*model.example_inputs)
        model = model.module()
    check_model(model)
    check_cached(example_inputs, cache=cache, dynamic=dynamic is not None, labels=labels, prefix=prefix)
    with shown(f"tracing {type(model).__name__}"), uncollected(), preserved(model), linear_layers(model) as quantised:
        checkpointing = None if inference or cache else taken_checkpointing(model)
        if cache and is_encoder_decoder(model):
            return _encoder_decoder(model, quantised)
        inputs = None if cache else inputs_of(model, example_inputs)
        if labels and inputs is not None:
            inputs = with_item_count(model, with_labels(model, inputs))
        call = CausalCall(model) if inputs is None else prefixed(model, inputs, prefix)
        with nullcontext() if call is None else replaced_forward(model, call) as cached:
            inputs = inputs if cached is None else inputs_of(model, cached.inputs)
            assert inputs is not None
            check_inputs(model, inputs, dynamic)
            if dynamic is not None and prefix:
                dynamic = {**dynamic, PREFIX: (0,)}  # a prefix has any number of tokens, whatever the inputs have
            inputs = varied(in_order(model, inputs), dynamic)
            mode = mode_of(model, inference=inference)
            if labels:
                check_loss(model, inputs, mode)
            if is_exported(model):
                tie(model)
            traced = _trace_equal_layers_once(_Task(model, inputs, dynamic, labels, inference, mode, cached))
            inputs = without_prefix(inputs) if prefix else inputs
            traced = checked_beside_library(model, traced, inputs, quantised).train(mode.training)
            return checked_base(nest_as(model, traced, checkpointing))


def _encoder_decoder(model: nn.Module, quantised: QuantisedLayers) -> CachedGraphs:
    """Trace the encoder of a model, and the first and the later steps of its decoder."""
    mode = mode_of(model, inference=True)
    mode.set(model, False)
    sizes, parts = sizes_of(model), dict[str, TracedGraphModule]()
    for part, call in CALLS.items():
        with replaced_forward(model, call(model, sizes)) as cached:
            inputs = in_order(model, inputs_of(model, cached.inputs))
            task = _Task(model, inputs, None, labels=False, inference=True, mode=mode, cached=cached, part=part)
            traced = checked_beside_library(model, _trace_equal_layers_once(task), inputs, quantised)
            parts[part] = checked_base(traced.train(mode.training))
    return CachedGraphs(**parts).sharing()


@dataclass(frozen=True)
class _Task:
    """A model to trace, and the settings of the trace.

    Attributes:
        mode: of the model as it was given.
        cached: the call with a key-value cache, which replaces the model's own.
        part: of an encoder-decoder model that the call is of.
        classes: equal layers, of which one is traced.
    """

    model: nn.Module
    inputs: ExampleInputs
    dynamic: Dynamic | None
    labels: bool
    inference: bool
    mode: Mode
    cached: CachedCall | None = None
    part: str = ""
    classes: Sequence[LayerClass] = ()

    @property
    def info(self) -> GraphInfo:
        """Record of the origin of the graph."""
        model, inputs = self.model, self.inputs
        return GraphInfo(
            inference=self.inference,
            prefix_slot=self.cached.slot if isinstance(self.cached, CausalCall) else None,
            labels=self.labels,
            part=self.part,
            constants={name: value for name, value in inputs.kwargs.items() if not has_tensor(value)},
            model_class=f"{type(model).__module__}:{type(model).__qualname__}",
            pretrained=is_pretrained(model),
            config=config_of(model),
            generation_config=generation_config_of(model),
            head=task_head(model),
            linears=linear_modules(model),
            pad_token=pad_token_of(config_of(model)),
            main_input=str(getattr(trained_model(model), "main_input_name", GraphInfo.main_input)),
            embeddings=frozenset(f"{at}.weight" for at, m in model.named_modules() if isinstance(m, nn.Embedding)),
            parameter_modules=parameter_modules(model),
            second_names=second_names(model),
            vocabulary=vocabulary_modules(model),
            loss_type=getattr(trained_model(model), "loss_type", None),
        )


@dataclass(frozen=True)
class _Trace:
    """A flat graph, its constraints, tensors and modules beyond the model's, and the model's autograd functions; stubs are to be expanded."""

    graph: fx.Graph
    constants: Mapping[str, torch.Tensor]
    constraints: Constraints
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    functions: Set[Any] = frozenset()


def _trace_equal_layers_once(task: _Task) -> TracedGraphModule:
    """Trace with stamped layers where that gives the graph of a full trace, and otherwise in full, which also reports errors."""
    name = type(task.model).__name__
    try:
        if (foreign := foreign_part(task.model, task.cached.forward if task.cached else None)) is not None:
            raise LayersDiffer(f"the code of {foreign} is neither torch's nor transformers'")
        classes = layer_classes(task.model)
        if not classes:
            raise LayersDiffer(f"it has no {MIN_LAYERS} equal layers")
        return _stamped(replace(task, classes=classes))
    except Exception as error:
        _logger.info("%s is traced in full: %s", name, first_line(str(reason_of(error)), type(error).__name__))
    return _trace_all(task)


def _stamped(task: _Task) -> TracedGraphModule:
    """Trace with stamped layers, without the first of a class where that is called with other arguments than the rest."""
    try:
        with preserved(task.model):
            traced = _trace_all(task)
    except Exception as error:
        reason = reason_of(error)
        classes = without_first(task.classes, reason.path) if isinstance(reason, FirstLayerDiffers) else []
        if not classes:
            raise
    else:
        count = sum(len(each.paths) - 1 for each in task.classes)
        _logger.info("%s is traced with %d layers stamped", type(task.model).__name__, count)
        return traced
    return _stamped(replace(task, classes=classes))


def _trace_all(task: _Task) -> TracedGraphModule:
    """Trace in all modes, compare the graph with the model, and add its input checks."""
    united = _trace(task, FakeResults(), training=False) if task.inference else _trace_both(task)
    if task.classes:
        united = _expanded(task, united)
    united = _counted(task, united)
    state = replace(state_of(task.model), modules=united.modules).with_tensors(united.constants)
    state = replace(state, non_persistent=state.non_persistent | set(united.constants))
    check_names(united.modules)
    measured = {name: state.tensors[name].clone() for name in statistics(united.graph, united.modules)}
    info = replace(task.info, examples=examples_of(task.inputs, united.constraints), statistics=measured)
    constraints = _verified(task, state, with_info({}, info), united)
    if isinstance(task.cached, PrefixedCall):
        slot, constraints = open_slot(united.graph, constraints, task.cached.slot, type(task.model).__name__)
        state, info = with_empty_slot(state, info, slot)
    graph = numbered(united.graph)
    state = state.with_modules(add_checks(graph, constraints))
    graph.lint()
    return assemble(graph, state, meta=with_info({}, info), training=False, trainable=frozenset())


def _trace_both(task: _Task) -> _Trace:
    """Trace in both modes, and return one trace that serves both."""
    model, results = task.model, FakeResults()
    check_hooks(model, ())
    evaluation = _trace(task, results, training=False)
    for remembered in (results, FakeResults()):  # before a model is refused, nothing is taken from the other mode
        with recorded_interference(model) as found:
            train = _trace(task, remembered, training=True)
        check_hooks(model, found.lines)
        check_constants(train.graph, train.constants, evaluation.constants)
        try:
            modules = unite_modes(train.graph, evaluation.graph, [*state_of(model).tensors, *train.constants])
            break
        except TraceError:
            if remembered is not results:
                raise
    constraints = train.constraints.intersection(evaluation.constraints)
    return replace(train, constraints=constraints, modules=modules, functions=found.functions)


def _trace(task: _Task, results: FakeResults, *, training: bool) -> _Trace:
    """Export in one mode, and bring the graph into normal form."""
    model = task.model
    task.mode.set(model, training)
    asks_nothing = nullcontext() if task.inference else traceable_batch_norms(model, CUMULATIVE)
    with (
        stubbed(model, task.classes, task.cached),
        asks_nothing,
        stateless(model, partial(called, model, task.inputs)),
        without_codes(model),
    ):
        program = export(model, task.inputs, task.dynamic, training=training, results=results)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    inline_regions(module, training=training)
    graph, _ = copy_graph(module.graph)
    remove_inactive_dropout(graph)
    written = written_names(graph, training=training)
    if written:
        raise TraceError(
            f"the model writes to {', '.join(written)} while it computes{' in training' if training else ''}, and a graph would write to "
            f"the model's own. {advice_on_writes(model, written, training=training)}"
        )
    remove_assertions(graph)
    follow_input_device(graph)
    state = state_of(model)
    constants = {
        name: tensor
        for name, tensor in program.constants.items()
        if name not in state.tensors and isinstance(tensor, torch.Tensor)
    }
    if task.part:  # whose graphs have all other tensors in common
        for node in graph.find_nodes(op="get_attr"):
            node.target = f"{task.part}_{node.target}" if node.target in constants else node.target
        constants = {f"{task.part}_{name}": tensor for name, tensor in constants.items()}
    if not task.classes:
        use_first_names(graph, {**{name: name for name in constants}, **state.aliases()})
    graph.eliminate_dead_code()
    signature = inspect.signature(model.forward)
    constraints = constraints_of(program, graph, signature, task.inputs.axes)
    if task.classes and any(relation.functions for relation in constraints.relations):
        raise LayersDiffer("some layers may say in other words what sizes the trace holds for")
    take_inputs(graph, signature, task.inputs.args, task.inputs.kwargs)
    return _Trace(graph, constants, constraints)


def _expanded(task: _Task, traced: _Trace) -> _Trace:
    """Replace all stubs by copies of their templates."""
    state = state_of(task.model)
    expanded = expand(traced.graph, task.classes, list(state.tensors), traced.modules)
    graph, constants = expanded.graph, expanded.with_copies(traced.constants)
    use_first_names(graph, {**{name: name for name in constants}, **state.aliases()})
    graph.eliminate_dead_code(lambda node: node.op == "call_module" or node.is_impure())
    unread = next((node.target for node in graph.find_nodes(op="call_module") if not node.users), None)
    if unread is not None:  # in a full trace the two modes may differ in its inputs
        raise LayersDiffer(f"nothing reads what {unread!r} returns")
    return replace(traced, graph=graph, constants=constants, modules=expanded.modules)


def _counted(task: _Task, traced: _Trace) -> _Trace:
    """Let calls leave out the count of items that ``Trainer`` passes with labels, where the trace has one."""
    taken = [*state_of(task.model).tensors, *traced.constants, *traced.modules]
    modules = follow_item_count(traced.graph, taken) if task.labels else {}
    return replace(traced, modules={**traced.modules, **modules})


def _verified(task: _Task, state: State, meta: dict[str, Any], traced: _Trace) -> Constraints:
    """Compare the graph with the model, and return its constraints. On the meta device nothing can be run."""
    model, inputs, inference = task.model, task.inputs, task.inference
    on_meta = any(tensor.is_meta for tensor in state.tensors.values())
    if not inference:
        task.mode.set(model, True)
        check_functions(model, lambda: OnCopies(model)(*inputs.args, **inputs.kwargs), traced.functions)
    if on_meta:
        fill_in(traced.graph, {}, flags_of(task.info, cache=returns_cache(task.cached)))
        return traced.constraints
    graph_module = assemble(traced.graph, state, meta=meta, training=not inference, trainable=frozenset())

    def set_training(training: bool) -> None:
        task.mode.set(model, training)
        graph_module.train(training)

    if not inference:
        check_training(model, graph_module, inputs)
    set_training(False)
    check_evaluation(model, graph_module, inputs)
    if loss_uses_count(graph_module) and signature_of(traced.graph).omissible:
        check_outputs(model, graph_module, without_item_count(inputs), "evaluation")
    fills = fills_of(model, graph_module, inputs) if task.info.pretrained else {}
    fill_in(traced.graph, fills, flags_of(task.info, cache=returns_cache(task.cached)))
    modes = None if inference else set_training
    return without_artefacts(OnCopies(model), OnCopies(graph_module), inputs, traced.constraints, modes)
