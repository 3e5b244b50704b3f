"""Results of operators on fake tensors, remembered: equal calls are computed once, in one trace and in the next of the same model.

torch.export runs a model on fake tensors, whose sizes are symbols, and most of its time goes into what one operator makes of
symbols: the layers of a model ask the same again and again, and so do its train and its eval mode. torch's own cache is made for
known sizes, and describes a tensor with more questions on its sizes than the operator has.

Here a call is known by the operator and its arguments: of a tensor the type, dtype, device, sizes, strides and whether it requires a
gradient; of a size its expression, and which sizes of the call are one object, since torch's tracer knows sizes by identity. A
result is kept as a recipe: each size is a number, the size of an argument, or a new one with this expression.

Only what such a description determines is remembered: operators of torch that write nothing, do not look at values, and return
tensors of their own or one view of one argument. Everything else runs as ever. The conditions on sizes that a call made torch
record are recorded again in the next trace, so that it goes on as if it had computed the result.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_fx.graph.aten_kinds import is_view
from lora_fx.graph.process_state import exclusive
from lora_fx.torch_internals import FakeTensor, FakeTensorMode, OpOverload, in_kernel_invocation_manager

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass
class FakeResults:
    """The remembered results of the operators of one model.

    Attributes:
        recipes: description of a call → how its result is made; None for one that no recipe describes.
    """

    recipes: dict[Any, _Recipe | None] = field(default_factory=dict)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let torch.export take results from here inside the block, in this thread, and add those that it computes."""
        original: Callable[..., Any] | None = getattr(FakeTensorMode, "_dispatch_impl", None)
        if original is None:  # a private name of torch: without it a trace takes longer, and is the same
            yield
            return
        thread = threading.get_ident()
        held: set[Any] = set()

        def dispatch(mode: FakeTensorMode, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
            if threading.get_ident() != thread or mode.shape_env is None or not _is_determined(func):
                return original(mode, func, types, args, kwargs)
            call = _Call.of(mode, args, kwargs)
            if call is None:
                return original(mode, func, types, args, kwargs)
            key = func, torch.is_grad_enabled(), torch.get_default_dtype(), tuple(call.form)
            if key not in self.recipes:
                known = len(mode.shape_env.guards)
                result = original(mode, func, types, args, kwargs)
                conditions = tuple((each.expr, each.size_oblivious) for each in mode.shape_env.guards[known:])
                self.recipes[key] = _recipe(call, result, conditions, is_view=is_view(func))
                held.add(key)
                return result
            recipe = self.recipes[key]
            if recipe is None:
                return original(mode, func, types, args, kwargs)
            if key not in held:  # an earlier trace computed the call
                for condition, size_oblivious in recipe.conditions:
                    mode.shape_env.evaluate_expr(condition, size_oblivious=size_oblivious)
                held.add(key)
            return recipe.made(mode, call)

        with exclusive():
            FakeTensorMode._dispatch_impl = dispatch  # type: ignore[assignment,method-assign]
            try:
                yield
            finally:
                FakeTensorMode._dispatch_impl = original  # type: ignore[method-assign]


@functools.cache
def _is_determined(func: Any) -> bool:
    """Tell whether the description of a call determines what an operator returns for fake tensors."""
    if not isinstance(func, OpOverload) or func.namespace not in ("aten", "prims") or func._schema.is_mutable:
        return False
    if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view} & set(func.tags):
        return False
    returned = [result for result in func._schema.returns if result.alias_info is not None]
    return len(func._schema.returns) > 0 and (not returned or len(func._schema.returns) == 1)


class _Call:
    """The description of a call, and its tensors and sizes.

    Attributes:
        form: equal for equal calls.
        tensors: among the arguments, in their order.
        nodes: of the sizes, each once, in the order in which they were met.
        places: node → its index in ``nodes``.
    """

    def __init__(self) -> None:
        self.form: list[Any] = []
        self.tensors: list[Any] = []
        self.nodes: list[Any] = []
        self.places: dict[int, int] = {}

    @classmethod
    def of(cls, mode: FakeTensorMode, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Call | None:
        """Describe a call; None for one that cannot be described, or that has neither tensors nor sizes."""
        call = cls()
        described = all(call._add(mode, value) for value in args)
        for name, value in kwargs.items():
            call.form.append(name)
            described = described and call._add(mode, value)
        return call if described and (call.tensors or call.nodes) else None

    def _add(self, mode: FakeTensorMode, value: Any) -> bool:
        kind = type(value)
        if kind is FakeTensor:
            return self._add_tensor(mode, value)
        if kind is torch.SymInt:
            self.form.append(self._size(value))
        elif kind in _PLAIN:
            self.form.append((kind, repr(value) if kind is float else value))
        elif kind in (list, tuple) or kind is torch.Size:
            self.form.append((kind, len(value)))
            return all(self._add(mode, item) for item in value)
        else:
            return False
        return True

    def _add_tensor(self, mode: FakeTensorMode, tensor: Any) -> bool:
        if tensor.fake_mode is not mode or tensor.constant is not None or tensor.layout is not torch.strided:
            return False
        same = next((index for index, other in enumerate(self.tensors) if other is tensor), None)
        self.tensors.append(tensor)
        flags = tensor.requires_grad, tensor.is_conj(), tensor.is_neg(), tensor.is_inference()
        sizes = tuple(map(self._size, (*tensor.shape, *tensor.stride(), tensor.storage_offset())))
        self.form.append((FakeTensor, same, tensor.dtype, tensor.fake_device, flags, tensor.dim(), sizes))
        return True

    def _size(self, size: Any) -> Any:
        if type(size) is int:
            return size
        node = size.node
        place = self.places.setdefault(id(node), len(self.nodes))
        if place == len(self.nodes):
            self.nodes.append(node)
        return place, node._expr


@dataclass(frozen=True)
class _Recipe:
    """How the result of a call is made.

    Attributes:
        results: the tensors.
        sizes: the sizes that are new, as nodes of an earlier trace.
        kind: of a sequence of tensors; None for one tensor.
        conditions: on sizes, that the trace in which the call was computed recorded for it.
    """

    results: tuple[_Result, ...]
    sizes: tuple[Any, ...]
    kind: type | None
    conditions: tuple[Any, ...]

    def made(self, mode: FakeTensorMode, call: _Call) -> Any:
        """Return the result for the tensors and sizes of a call."""
        nodes = [*call.nodes, *(node.with_shape_env(mode.shape_env) for node in self.sizes)]
        sizes = [torch.SymInt(node) for node in nodes]
        made = [result.made(mode, call, sizes) for result in self.results]
        return made[0] if self.kind is None else self.kind(made)


@dataclass(frozen=True)
class _Result:
    """A tensor that a call returns.

    Attributes:
        base: index of the tensor that it is a view of; None for one with memory of its own.
        dtype, device: of the tensor.
        shape, strides, offset: each a number, or in a tuple the index of a size of the call, behind which come the new ones.
    """

    base: int | None
    dtype: torch.dtype
    device: torch.device
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    offset: Any

    def made(self, mode: FakeTensorMode, call: _Call, sizes: Sequence[Any]) -> Any:
        """Return the tensor."""

        def known(values: Sequence[Any]) -> list[Any]:
            return [value if type(value) is int else sizes[value[0]] for value in values]

        with in_kernel_invocation_manager(mode):
            # Memory without bytes: torch would multiply symbols for their number, which nothing asks for.
            own = torch.empty(0, dtype=self.dtype, device="meta") if self.base is None else call.tensors[self.base]
            meta = torch.as_strided(own, known(self.shape), known(self.strides), *known([self.offset]))
        return FakeTensor(mode, meta, self.device)


def _recipe(call: _Call, result: Any, conditions: tuple[Any, ...], *, is_view: bool) -> _Recipe | None:
    """Return how to make a result again; None where no recipe describes it."""
    kind = type(result) if type(result) in (list, tuple) else None
    tensors = [result] if kind is None else result
    if not tensors or any(type(tensor) is not FakeTensor for tensor in tensors) or (is_view and kind is not None):
        return None
    known = len(call.nodes)
    found = [_described(call, tensor, is_view=is_view) for tensor in tensors]
    if len({tensor.untyped_storage()._cdata for tensor in tensors}) < len(tensors):
        return None
    new = call.nodes[known:]
    if any(each is None for each in found) or any(node._hint is None or node.constant is not None for node in new):
        return None
    return _Recipe(tuple(each for each in found if each is not None), tuple(new), kind, conditions)


def _described(call: _Call, tensor: Any, *, is_view: bool) -> _Result | None:
    plain = not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg() or tensor.constant is not None)
    if not plain or tensor.layout is not torch.strided or any(tensor is other for other in call.tensors):
        return None
    storage = tensor.untyped_storage()._cdata
    bases = [index for index, each in enumerate(call.tensors) if each.untyped_storage()._cdata == storage]
    if bool(bases) != is_view or (is_view and call.tensors[bases[0]].dtype is not tensor.dtype):
        return None
    offset = call._size(tensor.storage_offset())
    if not bases and offset != 0:
        return None
    shape, strides = (tuple(map(call._size, values)) for values in (tensor.shape, tensor.stride()))
    return _Result(bases[0] if bases else None, tensor.dtype, tensor.fake_device, shape, strides, offset)
