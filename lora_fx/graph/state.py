"""The state of a graph, as plain frozen data, and what a state dict may give its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lora_fx.errors import LoraFxError
from lora_fx.graph.batch_norms import copied_leaf
from lora_fx.graph.compare import described, same_values
from lora_fx.numerics.quantised_weight import QuantisedWeight


@dataclass(frozen=True)
class State:
    """The state of a graph: tensors by every name they have (ties are one object under several), and leaf modules."""

    tensors: Mapping[str, torch.Tensor]
    non_persistent: frozenset[str] = frozenset()
    modules: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device of the first tensor; without tensors the CPU."""
        return next((tensor.device for tensor in self.tensors.values()), torch.device("cpu"))

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> State:
        """Return the state with these tensors added or replaced."""
        return replace(self, tensors={**self.tensors, **tensors})

    def with_modules(self, modules: Mapping[str, nn.Module]) -> State:
        """Return the state with these leaf modules added or replaced."""
        return replace(self, modules={**self.modules, **modules})

    def without(self, names: set[str]) -> State:
        """Return the state without the tensors and leaf modules of these names."""
        return State(
            {name: tensor for name, tensor in self.tensors.items() if name not in names},
            self.non_persistent - names,
            {name: module for name, module in self.modules.items() if name not in names},
        )

    def aliases(self) -> Mapping[str, str]:
        """Map every tensor name to the first name that the same tensor has."""
        first: dict[int, str] = {}
        return {name: first.setdefault(id(tensor), name) for name, tensor in self.tensors.items()}

    def names(self) -> Mapping[str, tuple[str, ...]]:
        """Map the first name of every tensor to all that it has."""
        names: dict[str, list[str]] = {}
        for name, first in self.aliases().items():
            names.setdefault(first, []).append(name)
        return {first: tuple(every) for first, every in names.items()}


def takes(value: Any, tensor: torch.Tensor, assign: bool) -> bool:
    """Tell whether torch would load ``value`` into ``tensor``; a tensor of one element also into one without dimensions."""
    if not isinstance(value, torch.Tensor) or (tensor.is_meta and not assign):
        return False
    return value.shape == tensor.shape or (tensor.dim() == 0 and value.shape == (1,))


def taken_names(
    state: State, values: Mapping[str, torch.Tensor], prefix: str, *, assign: bool
) -> Mapping[str, list[str]]:
    """Map the first name of each tensor of a graph to those under which a state dict has a value that torch would load into it.

    Args:
        state: of the graph.
        values: the state dict.
        prefix: of the names of the graph in it.
        assign: whether the values are to become the tensors.

    Raises:
        LoraFxError: one tensor has several values, or one that is quantised otherwise or, with ``assign``, has another dtype.
    """
    groups: dict[str, list[str]] = {}
    for name, first in state.aliases().items():
        if name not in state.non_persistent and takes(values.get(prefix + name), state.tensors[name], assign):
            groups.setdefault(first, []).append(name)
    for first, (name, *others) in groups.items():
        tensor, value = state.tensors[first], values[prefix + name]
        check_form(name, tensor, value)
        for other in others:
            if not same_values(value.reshape(tensor.shape), values[prefix + other].reshape(tensor.shape)):
                raise LoraFxError(
                    f"{name!r} and {other!r} are one tensor of the graph, and the state dict has different values for them. "
                    "Give both the same, or untie them in the model and trace it again."
                )
        if assign and value.dtype != tensor.dtype:
            raise LoraFxError(
                f"{name!r} is {tensor.dtype} in the graph, which keeps its dtype, and {value.dtype} in the state dict. "
                "Convert it, or load without assign=True."
            )
    return groups


def with_value(tensor: torch.Tensor, value: torch.Tensor, assign: bool) -> torch.Tensor:
    """Return a tensor with a value: the same object with new storage, or another one: off the meta device, onto it, and quantised.

    A quantised tensor takes the values of those that are like it alone. A sharded one takes this process's part of a whole value, into the
    storage that it has.
    """
    if isinstance(tensor, QuantisedWeight):
        assert isinstance(value, QuantisedWeight)
        return tensor.with_values(value)
    if isinstance(tensor, DTensor):
        part = part_of(value, tensor)
        if tensor.is_meta:
            return nn.Parameter(part, tensor.requires_grad)
        with torch.no_grad():
            return tensor.copy_(part)
    value = value.reshape(tensor.shape)
    if tensor.is_meta != value.is_meta:  # torch has no way from the one to the other within an object
        return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    tensor.data = value if assign else torch.empty_like(tensor, requires_grad=False).copy_(value)
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)  # a backward over the old value is refused, as after a copy_
    return tensor


def leaf_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that a graph calls, by their paths; other modules have none."""
    if isinstance(module, fx.GraphModule):
        for node in module.graph.nodes:
            if node.op == "call_module":
                yield str(node.target), module.get_submodule(str(node.target))


def check_form(name: str, tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Raise :class:`LoraFxError` for a value that is not quantised as the tensor of a graph is that it is for."""
    if isinstance(tensor, QuantisedWeight) and not tensor.is_like(value):
        found = repr(value) if isinstance(value, QuantisedWeight) else described(value)
        found += ", with codes and scales of other shapes or dtypes" if found == repr(tensor) else ""
        raise LoraFxError(
            f"{name!r} is {tensor!r} in the graph, which keeps the form of its weights, and in the state dict "
            f"{found}. Load what state_dict() of such a graph gave."
        )


@contextmanager
def quantised_apart(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Take quantised parameters out of a module, and put back what a function makes of them after the block.

    Torch would exchange their contents in place, which it cannot where a backward pass still needs them.
    """
    held: list[tuple[Any, str, Any]] = [
        (parameters, name, tensor)
        for parameters in (each._parameters for each in module.modules())
        for name, tensor in parameters.items()
        if isinstance(tensor, QuantisedWeight)
    ]
    moved = {id(tensor): nn.Parameter(function(tensor), requires_grad=False) for _, _, tensor in held}
    for parameters, name, _ in held:
        parameters[name] = None
    try:
        yield
    finally:
        for parameters, name, tensor in held:
            parameters[name] = moved[id(tensor)]


def owned(state: State, trainable: frozenset[str], updated: Iterable[str]) -> State:
    """Return a state with one new ``Parameter`` per distinct parameter, over the same storage.

    Args:
        state: left as it is.
        trainable: names of the parameters that get ``requires_grad=True``.
        updated: names of the buffers that are copied.
    """
    aliases = state.aliases()
    trained, updated = {aliases[name] for name in trainable}, {aliases[name] for name in updated}
    owned: dict[str, torch.Tensor] = {}
    for name, tensor in state.tensors.items():
        first = aliases[name]
        if first in owned:
            owned[name] = owned[first]
        elif isinstance(tensor, nn.Parameter):
            owned[name] = nn.Parameter(tensor.detach(), requires_grad=first in trained)
        else:
            owned[name] = tensor.detach().clone() if first in updated else tensor.detach()
    # A leaf module carries its mode, which each graph sets for itself: copied, around the tensors owned above.
    memo: dict[int, Any] = {id(tensor): owned[name] for name, tensor in state.tensors.items()}
    return replace(state, tensors=owned, modules={name: copied_leaf(m, memo) for name, m in state.modules.items()})


def part_of(value: torch.Tensor, like: DTensor) -> DTensor:
    """Return this process's part of a whole value, sharded as another tensor is. No process asks another for anything."""
    if isinstance(value, DTensor):
        return value
    # Of the value that this process has, and not of the one that the first sends to all.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def sharded_name(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of a tensor that is sharded over several devices, if there is one."""
    return next((name for name, tensor in tensors.items() if hasattr(tensor, "device_mesh")), None)
