"""Gradients that a trace would lose: custom autograd functions and hooks in a model's own code.

torch.export keeps the operators of a forward and differentiates those. An ``autograd.Function`` whose ``backward`` is just their
derivative loses nothing; any other (a straight-through estimator) would train differently, in silence, and so
would a model with hooks on gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

from lora_fx.errors import TraceError
from lora_fx.torch_internals import pytree
from lora_fx.tracing.parity import OwnStreams, agree, gradients
from lora_fx.tracing.torch_export import is_model_code

MAGNITUDES = (1e-3, 1.0, 1e3, 1e6)
"""Of the values at which an autograd function's backward is compared with the derivative of its forward."""

Call = tuple[Any, ...]


@dataclass
class Interference:
    """Changes of a model to its own backward: autograd functions that it applies, and lines that hook gradients."""

    functions: set[Any] = field(default_factory=set)
    lines: list[str] = field(default_factory=list)


@contextmanager
def recorded_interference(model: nn.Module) -> Iterator[Interference]:
    """Yield a record that fills while ``model`` is called inside the block."""
    found = Interference()
    original = torch.Tensor.register_hook

    def register_hook(tensor: torch.Tensor, hook: Any) -> Any:
        found.lines.append(_calling_line())
        return original(tensor, hook)  # type: ignore[no-untyped-call]

    def walk(_module: nn.Module, _args: Any, output: Any) -> None:
        found.functions |= _functions_behind(pytree.tree_leaves(output))

    torch.Tensor.register_hook = register_hook  # type: ignore[method-assign]
    handle = model.register_forward_hook(walk)
    try:
        yield found
    finally:
        handle.remove()
        torch.Tensor.register_hook = original  # type: ignore[method-assign]


def check_hooks(model: nn.Module, lines: Iterable[str]) -> None:
    """Raise :class:`TraceError` where a model has hooks on gradients, or registered some while it computed (at ``lines``)."""
    places = [
        f"parameter {name!r}"
        for name, parameter in model.named_parameters()
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    ]
    places += [
        f"module {name!r}"
        for name, module in model.named_modules()
        if module._backward_hooks or module._backward_pre_hooks
    ]
    places += list(lines)
    if places:
        raise TraceError(
            f"{type(model).__name__} hooks the gradients of {', '.join(places)}, and a graph would train without. "
            "Remove the hooks and register them on the graph, or use inference=True."
        )


def check_functions(model: nn.Module, call: Callable[[], object], functions: Set[Any]) -> None:
    """Raise :class:`TraceError` unless the functions' backwards are the derivatives of their forwards.

    Each is compared at its actual arguments, and at values of many magnitudes: a clamp whose backward lets all through agrees
    with its derivative wherever it does not clamp.

    Args:
        model: that applies them.
        call: runs it.
        functions: the classes.
    """
    if not functions:
        return
    names = ", ".join(sorted(function.__qualname__ for function in functions))
    if any(parameter.is_meta for parameter in model.parameters()):
        raise TraceError(
            f"{type(model).__name__} applies its own autograd functions ({names}), whose gradients a graph keeps only if they are "
            "those of its operators. That is found out by running it: trace it with weights, or with inference=True."
        )
    with _recorded_calls(functions) as calls:
        try:
            call()
        except Exception as error:
            raise TraceError(
                f"{type(model).__name__} itself fails on the example inputs in training: {error}"
            ) from error
    wrong = [function for function in functions if not calls[function]]
    wrong += [
        function for function in functions if not all(_is_derivative(function, given) for given in calls[function])
    ]
    if wrong:
        raise TraceError(
            f"{type(model).__name__} applies its own autograd functions, and the backward of "
            f"{', '.join(sorted({function.__qualname__ for function in wrong}))} is not known to be the derivative of its forward, "
            "which a graph would take. Write it with operators and detach(), or use inference=True."
        )


def _functions_behind(leaves: Iterable[Any]) -> set[Any]:
    """Walk the autograd graph back from these tensors; return the classes of the functions that are not torch's own."""
    waiting = [leaf.grad_fn for leaf in leaves if isinstance(leaf, torch.Tensor)]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [source for source, _ in node.next_functions]
    functions = {type(node)._forward_cls for node in seen if isinstance(node, BackwardCFunction)}  # type: ignore[attr-defined]
    # An operator that a library registers with a backward of its own stays that operator in a graph.
    return {function for function in functions if function.__module__ != "torch._library.autograd"}


@contextmanager
def _recorded_calls(functions: Set[Any]) -> Iterator[dict[Any, list[Call]]]:
    """Yield, for each function, a list that fills with the arguments that it is applied to."""
    calls: dict[Any, list[Call]] = {function: [] for function in functions}
    own = {function: vars(function).get("forward") for function in functions}

    def recording(function: Any) -> Any:
        forward, skipped = function.forward, 0 if _has_own_context(function) else 1

        def record(*args: Any) -> Any:
            calls[function].append(args[skipped:])
            return forward(*args)

        return staticmethod(record)

    for function in functions:
        function.forward = recording(function)
    try:
        yield calls
    finally:
        for function, forward in own.items():
            if forward is None:
                del function.forward
            else:
                function.forward = forward


def _has_own_context(function: Any) -> bool:
    """Tell whether ``forward`` is without a context, which ``setup_context`` fills then."""
    return function.setup_context is not torch.autograd.Function.setup_context


def _is_derivative(function: Any, given: Call) -> bool:
    """Tell whether a function has the gradients of the operators of its forward, at these arguments and at others like them."""

    def operators(*args: Any) -> Any:
        return function.forward(*args) if _has_own_context(function) else function.forward(_context(args), *args)

    try:
        return all(
            all(map(agree, _derivatives(function.apply, values), _derivatives(operators, values)))
            for values in _others_like(given)
        )
    except Exception:  # without a comparison nothing is known
        return False


def _others_like(given: Call) -> Iterator[Call]:
    """Yield the arguments, then noise of all magnitudes in place of their real tensors. All in single precision or better."""
    generator = torch.Generator().manual_seed(0)

    def leaf(value: Any, magnitude: float | None) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        wide = value.detach().to(torch.promote_types(value.dtype, torch.float32))
        if magnitude is not None:
            wide = (torch.randn(wide.shape, generator=generator, device="cpu") * magnitude).to(wide)
        return wide.requires_grad_(value.requires_grad)

    for magnitude in (None, *MAGNITUDES):
        yield tuple(leaf(value, magnitude) for value in given)


def _derivatives(function: Callable[..., Any], values: Call) -> list[torch.Tensor]:
    """Return the gradients, by the arguments that require one, of a random linear function of all results."""
    leaves = [value for value in values if isinstance(value, torch.Tensor) and value.requires_grad]
    with torch.enable_grad(), OwnStreams():
        results = function(*(value.clone() if isinstance(value, torch.Tensor) else value for value in values))
        return gradients(results, leaves)


def _context(args: Call) -> FunctionCtx:
    context = FunctionCtx()
    context.needs_input_grad = tuple(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)  # type: ignore[attr-defined]
    return context


def _calling_line() -> str:
    """Return the innermost line of the model's own code on the stack."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not is_model_code(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
