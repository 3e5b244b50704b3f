"""Parity of a new graph with its model: oversights of torch.export show in numbers or in gradients.

A trace bakes in every answer to the model's Python except sizes: whether it is being compiled, whether gradients are on, which
class a tensor has. So model and graph run on the example inputs: in eval mode without gradients, on contiguous and on strided
inputs, and in train mode with gradients, which are compared too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from lora_fx.errors import TraceError
from lora_fx.graph.batch_norms import statistics
from lora_fx.graph.compare import compare_values
from lora_fx.graph.graph_module import state_of
from lora_fx.progress import step
from lora_fx.torch_internals import TorchDispatchMode, pytree
from lora_fx.tracing.example_inputs import ExampleInputs

TOLERANCE = 1e-4
"""Largest relative difference between the gradients of graph and model that counts as rounding, in single precision."""

NOISE = 1e-6
"""Rounding in gradients that are zero in theory, as that of a key's bias in attention; as a part of the largest gradient."""

MAX_ELEMENTS = 2**24
"""Gradients are compared for the smallest parameters, up to this many elements: all norms and biases of a large model."""


class ModelFailed(Exception):  # noqa: N818  # the caller decides whether it is an error
    """The model itself fails on these inputs."""


class GraphFailed(Exception):  # noqa: N818
    """The graph fails on inputs that its model takes."""


class OwnStreams(TorchDispatchMode):
    """A mode in which every random operator has a stream of its own, so that neither their order nor their number matters."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # torch.manual_seed formats a stack trace for each kind of device, whether there is one or not.
        self._seed = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._seed(0)  # the tracer restores the random state
        return func(*args, **(kwargs or {}))


def difference(model: Callable[..., Any], graph: Callable[..., Any], inputs: ExampleInputs) -> str | None:
    """Return how the outputs of a graph differ from those of its model; None where they agree.

    Raises:
        ModelFailed, GraphFailed: one of them fails on the inputs.
    """
    with OwnStreams():
        try:
            expected = model(*inputs.args, **inputs.kwargs)
        except Exception as error:
            raise ModelFailed(str(error)) from error
        try:
            found = graph(*inputs.args, **inputs.kwargs)
        except Exception as error:
            raise GraphFailed(f"{type(error).__name__}: {error}") from error
    compared = compare_values(expected, found, tolerance=None)
    if not compared.message:
        return None
    return f"output{compared.part}: {compared.message}" if compared.part else f"the output: {compared.message}"


def check_evaluation(model: nn.Module, graph_module: fx.GraphModule, inputs: ExampleInputs) -> None:
    """Raise :class:`TraceError` unless graph and model, both in eval mode, agree on the example inputs."""
    step("comparing with the model")
    name = type(model).__name__
    with torch.no_grad():
        check_outputs(model, graph_module, inputs, "evaluation")
        try:
            run, run_graph = OnCopies(model), OnCopies(graph_module)
            found = difference(run, run_graph, map_tensors(_strided, inputs))
        except (ModelFailed, GraphFailed):  # a refusal is not a wrong number
            return
    if found is not None:
        raise TraceError(
            f"the graph of {name} computes something else than the model in a second call, on inputs that are not contiguous: {found}. "
            "The model asks for the layout of its inputs, or remembers its first call."
        )


def check_outputs(model: nn.Module, graph_module: fx.GraphModule, inputs: ExampleInputs, mode: str) -> None:
    """Raise :class:`TraceError` unless graph and model, both in this mode, agree on the inputs; nothing is recorded for gradients."""
    name = type(model).__name__
    with torch.no_grad(), _explained(name, mode):
        _check(name, difference(OnCopies(model), OnCopies(graph_module), inputs), mode)


def check_training(model: nn.Module, graph_module: fx.GraphModule, inputs: ExampleInputs) -> None:
    """Raise :class:`TraceError` unless graph and model, both in train mode, agree in outputs and gradients.

    Args:
        model: with parameters that require a gradient.
        graph_module: its parameters require the same gradients afterwards.
        inputs: of both.
    """
    step("comparing with the model in training")
    for name, parameter in model.named_parameters():
        graph_module.get_parameter(name).requires_grad_(parameter.requires_grad)
    with _explained(type(model).__name__, "training"):
        try:
            _check_gradients(model, graph_module, map_tensors(_leaf, inputs))
        except ModelFailed:  # it may refuse inputs that require a gradient
            _check_gradients(model, graph_module, inputs)


def _check_gradients(model: nn.Module, graph_module: fx.GraphModule, inputs: ExampleInputs) -> None:
    names = [*_smallest(dict(model.named_parameters())), *_tensors(inputs)]
    derivatives: list[list[torch.Tensor]] = []

    def differentiated(module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            leaves = {**dict(module.named_parameters()), **_tensors(inputs)}
            derivatives.append(gradients(output, [leaves[name] for name in names]))
            return output

        return run

    run, run_graph = OnCopies(model), OnCopies(graph_module)
    found = difference(differentiated(model, run), differentiated(graph_module, run_graph), inputs)
    updated = statistics(graph_module.graph, state_of(graph_module).modules)
    unlike = [name for name in updated if not agree(run.buffers[name].float(), run_graph.buffers[name].float())]
    found = found or (f"the running statistics {unlike[0]!r}" if unlike else None)
    _check(type(model).__name__, found, "training")
    wrong = _wrong_gradient(names, *derivatives)
    if wrong is not None:
        raise TraceError(
            f"a graph of {type(model).__name__} would give {wrong!r} another gradient: the model interferes with its backward "
            "(an autograd function of its own, a hook, torch.inference_mode). Write it with operators and detach(), or use inference=True."
        )


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], inputs: ExampleInputs) -> ExampleInputs:
    """Return the inputs with a function applied to every tensor, in the order of placeholders."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, function, (inputs.args, dict(inputs.kwargs)))
    return replace(inputs, args=args, kwargs=kwargs)


def called(model: nn.Module, inputs: ExampleInputs) -> Any:
    """Return what a model returns for inputs, without gradients, each random operator with a stream of its own."""
    with torch.no_grad(), OwnStreams():
        return OnCopies(model)(*inputs.args, **inputs.kwargs)


class OnCopies:
    """A call of a model with copies of its buffers, lists and mappings: it may write to them where a trace does not see it.

    Attributes:
        buffers: of the last call, by their names.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, torch.Tensor] = MappingProxyType({})) -> None:
        """Call ``model``, with these values of some parameters."""
        self._model, self._parameters = model, parameters
        self.buffers: dict[str, torch.Tensor] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns."""
        # A module that has two names is given its buffers once: torch would restore the second time what it had put there the first.
        copies: dict[int, torch.Tensor] = {}
        self.buffers = {
            f"{path}.{name}".removeprefix("."): copies.setdefault(id(buffer), buffer.clone())
            for path, module in self._model.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        }
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf, (args, kwargs)
        )  # sentence-transformers adds to what it is given
        values = {**self._parameters, **self.buffers}
        return torch.func.functional_call(self._model, values, args, kwargs, tie_weights=False)


@contextmanager
def _explained(name: str, mode: str) -> Iterator[None]:
    try:
        yield
    except ModelFailed as error:
        hint = " If it cannot be trained, use inference=True." if mode == "training" else ""
        raise TraceError(f"{name} itself fails on the example inputs in {mode}: {error}.{hint}") from error
    except GraphFailed as error:
        raise TraceError(
            f"the graph of {name} fails on the example inputs in {mode}, but the model does not: {error}"
        ) from error


def _check(name: str, found: str | None, mode: str) -> None:
    if found is not None:
        raise TraceError(
            f"the graph of {name} computes something else than the model on the example inputs in {mode}: {found}. The model's "
            "Python asks for something that a trace does not have, such as whether it is being compiled, gradients are on, or of "
            "what class a tensor is."
        )


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point() or tensor.is_complex())


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    """Return an equal tensor that is not contiguous, if it has enough elements."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def _smallest(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    chosen: dict[str, torch.Tensor] = {}
    total = 0
    for name, parameter in sorted(parameters.items(), key=lambda item: item[1].numel()):
        total += parameter.numel()
        if parameter.requires_grad and total <= MAX_ELEMENTS:
            chosen[name] = parameter
    return chosen


def _tensors(inputs: ExampleInputs) -> dict[str, torch.Tensor]:
    found = pytree.tree_leaves_with_path({**dict(enumerate(inputs.args)), **inputs.kwargs})
    return {
        f"inputs{pytree.keystr(path)}": leaf
        for path, leaf in found
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    }


def gradients(results: Any, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients of a random linear function of all results; zeros where there is none."""
    generator = torch.Generator().manual_seed(0)
    sources, weights = [], []
    for value in pytree.tree_leaves(results):
        if isinstance(value, torch.Tensor):
            # Drawn for every result, with or without a gradient, so that model and graph get the same weights.
            weight = torch.randn(value.shape, generator=generator, device="cpu")
            if value.requires_grad:
                sources.append(value)
                weights.append(weight.to(value.device, value.dtype))
    found = torch.autograd.grad(sources, leaves, weights, allow_unused=True) if sources else [None] * len(leaves)
    return [torch.zeros_like(leaf) if value is None else value for leaf, value in zip(leaves, found, strict=True)]


def agree(expected: torch.Tensor, found: torch.Tensor, noise: float = 0.0) -> bool:
    """Tell whether two gradients are finite in the same places and equal there, up to rounding and some noise."""
    if torch.equal(expected, found):  # which no NaN does
        return True
    finite = expected.isfinite()
    tolerance = max(TOLERANCE, 8 * torch.finfo(expected.dtype).eps)
    return torch.equal(finite, found.isfinite()) and (
        _norm(expected[finite] - found[finite]) <= tolerance * _norm(expected) + noise
    )


def _wrong_gradient(
    names: Iterable[str], expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]
) -> str | None:
    unequal = [pair for pair in zip(names, expected, found, strict=True) if not torch.equal(*pair[1:])]
    noise = NOISE * max(map(_norm, expected), default=0.0) if unequal else 0.0
    return next((name for name, mine, theirs in unequal if not agree(mine, theirs, noise)), None)


def _norm(tensor: torch.Tensor) -> float:
    return float(tensor[tensor.isfinite()].abs().double().norm())
