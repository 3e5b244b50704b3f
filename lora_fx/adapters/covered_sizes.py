"""Sizes that a graph traced on the meta device covers: it is run beside its model, with weights, at sizes that torch.export excluded."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from lora_fx.errors import LoraFxError, TraceError
from lora_fx.graph.example_sizes import Examples, cut_or_repeated
from lora_fx.graph.graph_module import TracedGraphModule, copy_graph, rebuilt, state_of
from lora_fx.graph.info import info_of
from lora_fx.graph.input_checks import Constraints, InputCheck, RelationCheck, add_checks, remove_checks
from lora_fx.graph.process_state import forked_random_state
from lora_fx.graph.size_relations import UNBOUNDED
from lora_fx.graph.state import State
from lora_fx.tracing.example_inputs import ExampleInputs, example_inputs, graph_inputs
from lora_fx.tracing.parity import GraphFailed, ModelFailed, difference
from lora_fx.tracing.size_probing import examples_of, without_artefacts


def covered_sizes(base: TracedGraphModule, like: nn.Module) -> tuple[Constraints, Examples] | None:
    """Return the constraints that a graph would have, had it been traced with its weights; None where they cannot be found out.

    Args:
        base: in evaluation mode, without adapters, with values for its tensors; not changed.
        like: a module of the traced class, of which the parameters are not read.

    Raises:
        LoraFxError: the graph computes something else than the model.
    """
    if info_of(base).prefix_slot is not None:  # traced with weights, and checked for the prefix that it holds
        return None
    try:
        inputs = example_inputs(like, None, next(base.parameters()).device)
    except TraceError:  # not a model whose inputs follow from its config: its checks stay as strict as they are
        return None
    graph, _ = copy_graph(base.graph)
    constraints = remove_checks(graph, state_of(base).modules)
    if list(constraints.ranges) != list(graph_inputs(inputs)):
        return None
    inputs = _covered(inputs, constraints)
    unchecked = rebuilt(base, graph, training=False, trainable=frozenset())
    tensors = dict(state_of(unchecked).tensors)
    like.eval()

    def model(*args: Any, **kwargs: Any) -> Any:
        return functional_call(like, tensors, args, kwargs)

    with forked_random_state(range(torch.cuda.device_count())):
        try:
            unlike = difference(model, unchecked, inputs)
        except ModelFailed:  # its inputs do not follow from its config after all
            return None
        except GraphFailed as error:
            unlike = str(error)
        if unlike is not None:
            raise LoraFxError(
                f"with its weights, the graph does not compute what {type(like).__name__} does: {unlike}. "
                "Trace the model with its weights instead."
            )
        found = without_artefacts(model, unchecked, inputs, constraints)
    return found, examples_of(inputs, found)


def with_checks(graph_module: TracedGraphModule, constraints: Constraints, examples: Examples) -> TracedGraphModule:
    """Return a graph with checks of other constraints in the place of its own."""
    state = state_of(graph_module)
    without_checks, _ = copy_graph(graph_module.graph)
    remove_checks(without_checks, state.modules)
    graph, _ = copy_graph(without_checks)  # in which the names of the removed nodes are free again
    kept = {
        name: module for name, module in state.modules.items() if not isinstance(module, InputCheck | RelationCheck)
    }
    checks = replace(state, modules={**kept, **add_checks(graph, constraints)})
    return rebuilt(graph_module, graph, state=checks, info=replace(info_of(graph_module), examples=examples))


def stand_ins(state: State, device: torch.device) -> dict[str, torch.Tensor]:
    """Return values for the floating-point tensors of a state on the meta device, in almost no memory: ``W[i, j] = noise[i + j]``.

    The matrices have full rank, and the outputs of a model the sizes that those of a new model have. They are equal in all processes.
    Those of a stack have rows one after another, which ``grouped_mm`` asks for, and all stacks of one shape the same memory.

    Args:
        state: of a graph without adapters.
        device: for the values.
    """
    generator = torch.Generator().manual_seed(0)
    values: dict[str, torch.Tensor] = {}
    of_stacks: dict[tuple[torch.Size, torch.dtype], torch.Tensor] = {}
    for first, names in state.names().items():
        tensor = state.tensors[first]
        if tensor.is_meta and tensor.is_floating_point():
            kind, is_stack = (tensor.shape, tensor.dtype), tensor.dim() == 3
            strides = [_STACK_STRIDE, tensor.shape[-1], 1] if is_stack else [1] * tensor.dim()
            if kind in of_stacks:
                noise = of_stacks[kind]
            else:
                count = sum(size * stride for size, stride in zip(tensor.shape, strides, strict=True)) + 1
                noise = torch.randn(count, generator=generator)
                noise = 1 + 0.1 * noise if tensor.dim() < 2 else noise / math.sqrt(max(tensor.shape[-2:]))
                noise = noise.to(device, tensor.dtype)
            of_stacks |= {kind: noise} if is_stack else {}
            strided = noise.as_strided(tensor.shape, strides)
            value = nn.Parameter(strided, False) if isinstance(tensor, nn.Parameter) else strided
            values |= dict.fromkeys(names, value)
    return values


_STACK_STRIDE = 16
"""Elements from a matrix of a stack to the next: ``grouped_mm`` takes multiples of 16 bytes."""


def _covered(inputs: ExampleInputs, constraints: Constraints) -> ExampleInputs:
    """Return inputs of sizes for which a graph holds: it may have been traced for one size alone."""
    sized = {
        name: cut_or_repeated(value, torch.Size(map(_clamped, value.shape, constraints.ranges[name])))
        for name, value in inputs.kwargs.items()
        if name in constraints.ranges
    }
    return replace(inputs, kwargs={**inputs.kwargs, **sized})


def _clamped(size: int, within: tuple[int, int]) -> int:
    low, high = within
    return max(size, low) if high == UNBOUNDED else min(max(size, low), high)
