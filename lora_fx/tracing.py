"""From a ``torch.nn.Module`` and inputs to one plain graph in normal form. The only file that calls ``torch.export``."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx import normal_form
from lora_fx.checks import Constraints, add_checks
from lora_fx.constraints import constraints_of
from lora_fx.errors import TraceError
from lora_fx.gradients import check_gradients, recorded_functions
from lora_fx.graph_module import State, TracedGraphModule, assemble, copy_graph, state_of, trainable_names
from lora_fx.inputs import ExampleInputs, config_of
from lora_fx.inputs import example_inputs as make_inputs
from lora_fx.modes import drop_dropout, unite_modes
from lora_fx.probing import without_artefacts
from lora_fx.signature import argument_names, take_inputs

Dynamic = Mapping[str, Sequence[int]]


def trace(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    *,
    dynamic: Dynamic | None = None,
    inference: bool = False,
) -> TracedGraphModule:
    """Trace a model into one plain ``torch.fx.GraphModule`` of ATen operators.

    The graph takes the inputs it was traced with, by position or keyword, and returns what the model returned (for a
    transformers model the same ``ModelOutput`` class). It has its own ``Parameter`` objects, all frozen, over the storage
    of the model's; the model is not changed. Inputs that the trace does not cover raise :class:`~lora_fx.errors.InputError`.

    Args:
        model: any module that ``torch.export`` takes; a graph of ours is copied.
        example_inputs: keyword inputs as a mapping, or positional ones as a tuple. Made from the config of a transformers
            model when left out. Values that are not tensors become constants of the graph.
        dynamic: input name → dimensions that may vary. By default batch and sequence of a transformers model must, and
            every other dimension may wherever the model allows.
        inference: trace the eval mode only. The graph has no dropout and cannot be trained; for models whose training
            cannot be traced.

    Returns:
        A graph in the mode (train or eval) of the model.

    Raises:
        TraceError: the model cannot be traced, or fixes a dimension that should vary; the message says which.
    """
    if isinstance(model, TracedGraphModule):
        graph, _ = copy_graph(model.graph)
        return assemble(
            graph, state_of(model), meta=model.meta, training=model.training, trainable=trainable_names(model)
        )
    inputs = make_inputs(model, example_inputs)
    state = state_of(model)
    with _unchanged(model):
        evaluation = _export(model, state, inputs, dynamic, training=False)
        if inference:
            traced, modules, functions = evaluation, {}, []
            drop_dropout(traced.graph)
        else:
            with recorded_functions() as functions:
                traced = _export(model, state, inputs, dynamic, training=True)
            modules = unite_modes(traced.graph, evaluation.graph)
        constraints = traced.constraints.intersection(evaluation.constraints)
        state = state.with_tensors(traced.constants).with_modules(modules)
        state = State(state.tensors, state.non_persistent | set(traced.constants), state.modules)
        meta = {
            "lora_fx": {
                "inference": inference,
                "constants": traced.fixed,
                "model_class": f"{type(model).__module__}:{type(model).__qualname__}",
                "config": config_of(model),
            }
        }
        unchecked = assemble(traced.graph, state, meta=meta, training=False, trainable=frozenset())
        if functions:
            check_gradients(model.train(), unchecked.train(), inputs, functions)
        model.eval()
        unchecked.eval()
        if not any(tensor.is_meta for tensor in state.tensors.values()):
            constraints = without_artefacts(model, unchecked, inputs, constraints)
    graph, _ = copy_graph(traced.graph)
    checks = add_checks(graph, constraints)
    graph.lint()
    return assemble(graph, state.with_modules(checks), meta=meta, training=model.training, trainable=frozenset())


@dataclass(frozen=True)
class _Trace:
    """One export in one mode: a flat graph, and what it holds for."""

    graph: fx.Graph
    constants: Mapping[str, torch.Tensor]
    constraints: Constraints
    fixed: Mapping[str, Any]


def _export(
    model: nn.Module, state: State, inputs: ExampleInputs, dynamic: Dynamic | None, *, training: bool
) -> _Trace:
    model.train(training)
    program = _call_export(model, inputs, dynamic, training)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    normal_form.inline_regions(module)
    graph, _ = copy_graph(module.graph)
    written = normal_form.written_names(graph)
    if written:
        raise TraceError(
            f"the model writes to {', '.join(written)} while it computes{' in training' if training else ''}, and a graph would write to "
            f"the model's own. {'Use inference=True.' if training else 'Such a model is not supported.'}"
        )
    normal_form.remove_assertions(graph)
    fixed = {name: value for name, value in inputs.kwargs.items() if not _has_tensor(value)}
    normal_form.remove_inputs(graph, fixed)
    constants = {
        name: tensor
        for name, tensor in program.constants.items()
        if name not in state.tensors and isinstance(tensor, torch.Tensor)
    }
    normal_form.use_first_names(graph, {**{name: name for name in constants}, **state.aliases()})
    normal_form.follow_input_device(graph)
    graph.eliminate_dead_code()
    constraints = constraints_of(program, graph, argument_names(graph))
    take_inputs(graph, inputs.args, inputs.kwargs, fixed)
    return _Trace(graph, constants, constraints, fixed)


def _call_export(
    model: nn.Module, inputs: ExampleInputs, dynamic: Dynamic | None, training: bool
) -> torch.export.ExportedProgram:
    with _explicit_arguments(model, inputs), _quiet():
        shapes = _dynamic_shapes(model, inputs, dynamic)
        try:
            return torch.export.export(model, inputs.args, dict(inputs.kwargs), strict=False, dynamic_shapes=shapes)
        except Exception as error:
            raise _refusal(model, inputs, error, training) from error


@contextmanager
def _explicit_arguments(model: nn.Module, inputs: ExampleInputs) -> Iterator[None]:
    """Let ``model.forward`` name the inputs that it takes through ``**kwargs``: torch.export mistakes those (2.13)."""
    original = model.forward
    signature = inspect.signature(original)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    extra = [name for name in inputs.kwargs if name not in {p.name for p in named}]
    if not extra:
        yield
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    forward.__signature__ = signature.replace(parameters=[*named, *keywords])  # type: ignore[attr-defined]
    own = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging hundreds of lines about a failure that we report in one."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)


def _dynamic_shapes(model: nn.Module, inputs: ExampleInputs, dynamic: Dynamic | None) -> dict[str, Any]:
    """Return torch.export's ``dynamic_shapes``: DYNAMIC where a dimension must vary, AUTO where it may."""
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    leaves = {name: value for name, value in bound.items() if name not in _variadic(model)}
    variadic = {name: bound[name] for name in _variadic(model) if name in bound}
    unknown = set(dynamic or {}) - set(inputs.kwargs) - set(leaves)
    if unknown:
        raise TraceError(f"dynamic= names {', '.join(sorted(unknown))}, and the inputs are {', '.join(leaves)}.")

    def shape(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if dynamic is not None:
                return {dim: _hint(dim in dynamic.get(name, ())) for dim in range(value.dim())}
            axes = inputs.axes.get(name)
            if axes is not None:
                return {dim: _hint(axis is not None) for dim, axis in enumerate(axes)}
            return dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO)
        if isinstance(value, Mapping):
            return {key: shape(name, item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(shape(name, item) for item in value)
        return None

    shapes = {name: shape(name, value) for name, value in leaves.items()}
    for name, value in variadic.items():
        shapes[name] = (
            {key: shape(key, item) for key, item in value.items()}
            if isinstance(value, dict)
            else tuple(shape(name, item) for item in value)
        )
    return shapes


def _hint(varies: bool) -> Any:
    return torch.export.Dim.DYNAMIC if varies else torch.export.Dim.STATIC


def _variadic(model: nn.Module) -> tuple[str, ...]:
    parameters = inspect.signature(model.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL))


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


# torch.export's two ways of naming a dimension: inputs['x'].shape[1], and L['x'].size()[1].
_FIXED_DIMENSION = re.compile(r"(?:inputs|L)(?P<path>(?:\['?\w+'?\])+)\.(?:shape|size\(\))\[(?P<dim>\d+)\]")


def _refusal(model: nn.Module, inputs: ExampleInputs, error: Exception, training: bool) -> TraceError:
    message = str(error)
    mode = " in training mode" if training else ""
    name = type(model).__name__
    fixed = sorted({(re.findall(r"\w+", m["path"])[0], int(m["dim"])) for m in _FIXED_DIMENSION.finditer(message)})
    if fixed:
        axes = ", ".join(f"dimension {dim}{_axis(inputs, path, dim)} of {path!r}" for path, dim in fixed)
        rest = {
            key: tuple(
                d
                for d in range(value.dim())
                if (key, d) not in fixed and inputs.axes.get(key, ())[d : d + 1] != (None,)
            )
            for key, value in inputs.kwargs.items()
            if isinstance(value, torch.Tensor)
        }
        return TraceError(
            f"{name} fixes {axes}{mode}: its own code computes something else, or unrolls, for each size. "
            f"Trace for the sizes of example_inputs alone with dynamic={rest}. torch.export says: {_first_line(message)}"
        )
    hint = " If the model does so in training only, inference=True traces the eval mode alone." if training else ""
    return TraceError(
        f"{name} cannot be traced{mode}{_own_line(error)}. torch.export says: {_first_line(message)}{hint}"
    )


def _axis(inputs: ExampleInputs, name: str, dim: int) -> str:
    axes = inputs.axes.get(name)
    return f" ({axes[dim]})" if axes and axes[dim] else ""


def _first_line(message: str) -> str:
    return next((line.strip() for line in message.splitlines() if line.strip()), "nothing")


def _own_line(error: BaseException) -> str:
    """Return the last line of the model's own code in the traceback, or that of its cause."""
    found = ""
    traceback = error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if "/torch/" not in file and "/lora_fx/" not in file and "contextlib" not in file:
            found = f" at {file}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back the mode of every module, ``requires_grad`` and the random state.

    Inside, all floating-point parameters require a gradient: torch.export records layout operators by what does, and a graph
    shall not depend on what happened to be frozen.
    """
    modes = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in trained:
        if parameter.is_floating_point() and not parameter.is_inference():
            parameter.requires_grad_(True)
    devices = sorted({tensor.device.index for tensor in model.parameters() if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter, requires_grad in trained.items():
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
