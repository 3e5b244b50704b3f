"""Trial runs of a model on candidates for its inputs: the first that it takes is what it is traced with."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lora_fx.errors import TraceError, first_line, listed, option
from lora_fx.graph.process_state import quiet
from lora_fx.torch_internals import pytree
from lora_fx.tracing.input_candidates import candidates, needed_arguments, unknown_arguments
from lora_fx.tracing.input_kinds import arguments
from lora_fx.tracing.model_state import preserved

MAX_SECONDS = 20.0
"""Time for the trials of one model, of the thread that runs them: on a busy machine the result is the same."""

MAX_ELEMENTS = 2**25
"""Models with more elements run on the meta device, where nothing is computed."""


def give() -> str:
    """Return what to do where no inputs can be made."""
    return f"pass {option('example_inputs=', '--example-inputs FILE.safetensors')}"


def taken(model: nn.Module, constants: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first candidate for the inputs of a transformers model that the model takes in a run, on the CPU, with its constants.

    A model on the meta device, or a large one, runs there without values; if it asks for values, that is as far as it can be seen.
    Where such a model takes none, the likeliest is returned, and the trace says what it makes of it.

    Args:
        model: of which nothing changes.
        constants: inputs that are no tensors; left out where the model takes the inputs without them alone.

    Raises:
        TraceError: an argument is of no kind that is known, or the model takes none of the candidates.
    """
    name, takes = type(model).__name__, listed(list(arguments(model)), 12)
    unknown = unknown_arguments(model)
    if unknown:
        raise TraceError(
            f"{name} takes {takes}; {listed([repr(each) for each in unknown], 4)} cannot be made from its signature and config: {give()}."
        )
    without_values = _is_large(model)
    first: dict[str, Any] | None = None
    refused, deadline = "", time.thread_time() + MAX_SECONDS
    drawn = candidates(model)
    given = (
        {**made, **each} if isinstance(made, dict) else made
        for made in drawn
        for each in ([constants, {}] if constants else [{}])
    )
    for made in given:
        if isinstance(made, str):
            refused = refused or f"no inputs can be made of its config: {made}"
            continue
        first = first or made
        refusal = _refusal(model, made, deadline, without_values=without_values)
        if refusal is None:
            return made
        refused = refused or f"with {shapes(made)} it says: {refusal}"
        if time.thread_time() > deadline:
            refused += f" (no more were tried after {MAX_SECONDS:.0f} s)"
            break
    if without_values and first is not None:
        return first
    needed = listed([repr(each) for each in needed_arguments(model)], 6)
    raise TraceError(
        f"{name} takes {takes}, and what {needed} {'are' if ',' in needed else 'is'} like does not follow from its config"
        f"{'; ' + refused if refused else ''}. For other inputs, {give()}."
    )


def device_of(model: nn.Module) -> torch.device:
    """Return where the parameters of a model are; the CPU for a model without."""
    return next((each.device for each in model.parameters()), torch.device("cpu"))


def shapes(inputs: Mapping[str, Any]) -> str:
    """Return names and shapes of inputs: ``"input_ids (2, 7), attention_mask (2, 7)"``."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())


def _is_large(model: nn.Module) -> bool:
    parameters = list(model.parameters())
    return any(each.is_meta for each in parameters) or sum(each.numel() for each in parameters) > MAX_ELEMENTS


class _TimeLimit(TorchFunctionMode):
    """A mode that ends a run at its next call of torch once the time is up."""

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.thread_time() > self._deadline:
            raise TimeoutError("the run takes too long")
        return func(*args, **(kwargs or {}))


_VALUES = re.compile(
    r"meta tensor|_local_scalar_dense|data-dependent|[Dd]ynamic shape|nonzero|Meta backend|device meta"
)
"""What torch says where the Python of a model asks for values that the meta device does not have."""


def _refusal(
    model: nn.Module, made: Mapping[str, torch.Tensor], deadline: float, *, without_values: bool
) -> str | None:
    """Return what a model says against inputs, or None if it takes them. Nothing of the model changes."""
    device = torch.device("meta") if without_values else device_of(model)
    copies: dict[int, torch.Tensor] = {}

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if without_values:
            return copies.setdefault(id(tensor), torch.empty_like(tensor, device=device))
        return tensor if isinstance(tensor, nn.Parameter) else copies.setdefault(id(tensor), tensor.clone())

    # By module, since one with two names is given its tensors once: torch would restore the second time what it had put there the first.
    tensors = {
        f"{path}.{name}".removeprefix("."): copied(tensor)
        for path, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    try:
        with preserved(model), quiet(), torch.no_grad(), _TimeLimit(deadline):
            model.eval()
            inputs = pytree.tree_map_only(torch.Tensor, lambda value: value.to(device), dict(made))
            torch.func.functional_call(model, tensors, (), inputs, tie_weights=False)
    except Exception as error:
        if without_values and _VALUES.search(str(error)):
            return None
        return f"{type(error).__name__}: {first_line(str(error), 'nothing')}"
    return None
