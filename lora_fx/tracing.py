"""From a ``torch.nn.Module`` and inputs to one plain graph in normal form, which was run beside the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx import normal_form
from lora_fx.beside import check_evaluation, check_training, leaving_buffers, map_tensors
from lora_fx.checks import Constraints, add_checks
from lora_fx.constraints import constraints_of
from lora_fx.errors import TraceError
from lora_fx.exporting import Dynamic, check_inputs, export, in_order, tie
from lora_fx.gradients import check_functions, check_hooks, recorded_interference
from lora_fx.graph_module import TracedGraphModule, assemble, check_names, copy_graph, state_of, trainable_names
from lora_fx.inputs import ExampleInputs, config_of, with_labels
from lora_fx.inputs import example_inputs as make_inputs
from lora_fx.modes import check_constants, remove_inactive_dropout, unite_modes
from lora_fx.preserving import is_exported, mode_of, preserved, set_mode, stateless
from lora_fx.probing import examples_of, without_artefacts
from lora_fx.signature import take_inputs
from lora_fx.states import checked


def trace(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | ExampleInputs | None = None,
    *,
    dynamic: Dynamic | None = None,
    labels: bool = False,
    inference: bool = False,
) -> TracedGraphModule:
    """Trace a model into one plain ``torch.fx.GraphModule`` of ATen operators.

    The graph takes the inputs it was traced with, by position or keyword, and returns what the model returned (for a
    transformers model the same ``ModelOutput`` class). It has its own ``Parameter`` objects, all frozen, over the storage
    of the model's; the model is not changed. Inputs that the trace does not cover raise :class:`~lora_fx.errors.InputError`.

    Args:
        model: any module that ``torch.export`` takes, also one that PEFT wraps, and a ``GraphModule`` of any kind; a graph of
            ours is copied. An ``ExportedProgram`` (a loaded ``.pt2``), or the module of one, has only the mode in which it was
            exported, and needs ``inference=True``. Its parameters keep their names, and its guards become input checks.
        example_inputs: keyword inputs as a mapping, or positional ones as a tuple. Made from the config of a transformers
            model when left out; those of the program for an ``ExportedProgram``. Values that are not tensors become constants
            of the graph.
        dynamic: input name → dimensions that may vary. By default batch and sequence of a transformers model must, and
            every other dimension may wherever the model allows.
        labels: trace a transformers model with labels, so that the graph returns the model's loss. Where ``example_inputs`` have
            none, they are made as the model's class takes them. Such a graph is for training: fold and exports ask for
            :func:`~lora_fx.transfer` to one without.
        inference: trace the eval mode only. The graph has no dropout and cannot be trained; for models whose training
            cannot be traced.

    Returns:
        A graph in the mode (train or eval) of the model; in eval mode for an exported program.

    Raises:
        TraceError: the model cannot be traced, fixes a dimension that should vary (the message says which), or has a graph
            that gives other numbers or gradients than it does.
    """
    if isinstance(model, TracedGraphModule):
        graph, _ = copy_graph(model.graph)
        return assemble(
            graph, state_of(model), meta=model.meta, training=model.training, trainable=trainable_names(model)
        )
    if isinstance(model, torch.export.ExportedProgram):
        if example_inputs is None and model.example_inputs is not None:
            example_inputs = ExampleInputs(*model.example_inputs)
        model = model.module()
    _check_model(model)
    with preserved(model):
        inputs = _inputs_of(model, example_inputs)
        if labels:
            inputs = with_labels(model, inputs)
        check_inputs(model, inputs, dynamic)
        inputs = in_order(model, inputs)
        training = mode_of(model, inference=inference)
        if labels:
            _check_loss(model, inputs)
        if is_exported(model):
            tie(model)
        united = _trace(model, inputs, dynamic, training=False) if inference else _trace_both(model, inputs, dynamic)
        state = replace(state_of(model), modules=united.modules).with_tensors(united.constants)
        state = replace(state, non_persistent=state.non_persistent | set(united.constants))
        check_names(united.modules)
        meta = {
            "lora_fx": {
                "inference": inference,
                "labels": labels,
                "constants": {name: value for name, value in inputs.kwargs.items() if not _has_tensor(value)},
                "examples": examples_of(inputs, united.constraints),
                "model_class": f"{type(model).__module__}:{type(model).__qualname__}",
                "config": config_of(model),
            }
        }
        unchecked = assemble(united.graph, state, meta=meta, training=False, trainable=frozenset())
        constraints = _verified(model, unchecked, inputs, united, inference=inference)
    graph, _ = copy_graph(united.graph)
    checks = add_checks(graph, constraints)
    graph.lint()
    traced = assemble(graph, state.with_modules(checks), meta=meta, training=training, trainable=frozenset())
    return checked(traced, "base")


@dataclass(frozen=True)
class _Trace:
    """A flat graph, what it holds for, the tensors and modules that are not the model's, and its autograd functions."""

    graph: fx.Graph
    constants: Mapping[str, torch.Tensor]
    constraints: Constraints
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    functions: Set[Any] = frozenset()


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TraceError(f"a torch.nn.Module in Python is expected, and {model!r} is a {type(model).__name__}.")
    tensors = state_of(model).tensors
    check_names(tensors)
    if any(tensor.is_inference() for tensor in tensors.values()):
        raise TraceError(
            f"the tensors of {type(model).__name__} were made under torch.inference_mode(), and can have no gradients: "
            "make the model outside of it."
        )


def _check_loss(model: nn.Module, inputs: ExampleInputs) -> None:
    """Raise unless the model returns a loss. In its first call it may choose one by the labels, and note that in its config.

    On the meta device, where models cannot look at their inputs, nothing is checked.
    """
    if any(tensor.is_meta for tensor in state_of(model).tensors.values()):
        return
    set_mode(model, False)
    with torch.no_grad():
        found = leaving_buffers(model)(*inputs.args, **inputs.kwargs)
    if getattr(found, "loss", None) is None:
        raise TraceError(
            f"{type(model).__name__} returns no loss for {', '.join(inputs.kwargs)}: let example_inputs have all labels that it asks for."
        )


def _inputs_of(model: nn.Module, given: Mapping[str, Any] | tuple[Any, ...] | ExampleInputs | None) -> ExampleInputs:
    if given is not None and not isinstance(given, Mapping | tuple | ExampleInputs):
        raise TraceError(
            f"example_inputs are a {type(given).__name__}: a mapping of keyword inputs, or a tuple of positional ones, is expected."
        )
    seen: set[torch.Tensor] = set()

    def own(tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor, or a copy where torch.export would take it for another input, or could not use it."""
        if tensor in seen or tensor.is_inference():
            return tensor.clone()
        seen.add(tensor)
        return tensor

    return map_tensors(own, make_inputs(model, given))


def _trace_both(model: nn.Module, inputs: ExampleInputs, dynamic: Dynamic | None) -> _Trace:
    """Trace in both modes, and return one trace that serves both."""
    check_hooks(model, ())
    evaluation = _trace(model, inputs, dynamic, training=False)
    with recorded_interference(model) as found:
        train = _trace(model, inputs, dynamic, training=True)
    check_hooks(model, found.lines)
    check_constants(train.graph, train.constants, evaluation.constants)
    modules = unite_modes(train.graph, evaluation.graph, [*state_of(model).tensors, *train.constants])
    constraints = train.constraints.intersection(evaluation.constraints)
    return replace(train, constraints=constraints, modules=modules, functions=found.functions)


def _trace(model: nn.Module, inputs: ExampleInputs, dynamic: Dynamic | None, *, training: bool) -> _Trace:
    """Export in one mode, and bring the graph into normal form."""
    set_mode(model, training)
    with stateless(model):
        program = export(model, inputs, dynamic, training=training)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    normal_form.inline_regions(module, training=training)
    graph, _ = copy_graph(module.graph)
    remove_inactive_dropout(graph)
    written = normal_form.written_names(graph)
    if written:
        raise TraceError(
            f"the model writes to {', '.join(written)} while it computes{' in training' if training else ''}, and a graph would write to "
            f"the model's own. {'Use inference=True.' if training else 'Such a model is not supported.'}"
        )
    normal_form.remove_assertions(graph)
    state = state_of(model)
    constants = {
        name: tensor
        for name, tensor in program.constants.items()
        if name not in state.tensors and isinstance(tensor, torch.Tensor)
    }
    normal_form.use_first_names(graph, {**{name: name for name in constants}, **state.aliases()})
    normal_form.follow_input_device(graph)
    graph.eliminate_dead_code()
    signature = inspect.signature(model.forward)
    constraints = constraints_of(program, graph, signature)
    take_inputs(graph, signature, inputs.args, inputs.kwargs)
    return _Trace(graph, constants, constraints)


def _verified(
    model: nn.Module, graph_module: TracedGraphModule, inputs: ExampleInputs, traced: _Trace, *, inference: bool
) -> Constraints:
    """Run the graph beside the model, and return what it holds for."""

    def set_training(training: bool) -> None:
        set_mode(model, training)
        graph_module.train(training)

    on_meta = any(tensor.is_meta for tensor in state_of(graph_module).tensors.values())
    if not inference:
        set_training(True)
        check_functions(model, lambda: leaving_buffers(model)(*inputs.args, **inputs.kwargs), traced.functions)
        if not on_meta:
            check_training(model, graph_module, inputs)
    set_training(False)
    if on_meta:
        return traced.constraints
    check_evaluation(model, graph_module, inputs)
    modes = None if inference else set_training
    return without_artefacts(leaving_buffers(model), graph_module, inputs, traced.constraints, modes)


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))
