"""Stubs of layers: for the length of a trace all layers of a class but the template compute nothing, and leave a mark in the graph.

Three operators mark a trace, and none is left in a finished graph:

    enter(layer, values)          a template begins; it is given these tensors
    leave(layer, values)          it has ended; these tensors are its results, and then its inputs, as it left them
    stub(layer, values, like)     a layer that is given these tensors would compute results like those
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn, Protocol

import torch
from torch import nn

from lora_fx.torch_internals import DisableTorchFunction, pytree
from lora_fx.tracing.repeated_layers.call_values import (
    FirstLayerDiffers,
    Frozen,
    LayersDiffer,
    Values,
    is_constant,
    same_values,
    storage_of,
    values_of,
)
from lora_fx.tracing.repeated_layers.layer_classes import Key, LayerClass, contents, has_hooks

_library = torch.library.Library("lora_fx", "FRAGMENT")  # the registrations live as long as this object
_library.define("enter(str layer, Tensor[] values) -> ()")
_library.define("leave(str layer, Tensor[] values) -> ()")
_library.define("stub(str layer, Tensor[] values, Tensor[] like) -> Tensor[]")

ENTER = torch.ops.lora_fx.enter.default
LEAVE = torch.ops.lora_fx.leave.default
STUB = torch.ops.lora_fx.stub.default


def _nothing(_layer: str, _values: Sequence[torch.Tensor]) -> None:
    """Mark a place, and compute nothing."""


def _empty(_layer: str, _values: Sequence[torch.Tensor], like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [
        torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device) for tensor in like
    ]


def _no_gradient(_context: Any, *_gradients: Any) -> Any:
    raise NotImplementedError("a stub is traced, and never run")


for _marker in (ENTER, LEAVE):
    torch.library.register_fake(_marker, _nothing, lib=_library)
torch.library.register_fake(STUB, _empty, lib=_library)
for _mark in (ENTER, LEAVE, STUB):  # dead code is found once stubs have become nodes
    torch.fx.node.has_side_effect(_mark)
torch.library.register_autograd(
    STUB, _no_gradient, lib=_library
)  # so that results require a gradient as those of a layer do


class Carried(Protocol):
    """Tensors that layers take and return by an object that is given to all of them, and not as arguments and results."""

    def begin(self, path: str) -> list[torch.Tensor]:
        """Return what the layer of a path takes; what happens to the object until :meth:`end` belongs to this layer."""

    def end(self) -> list[torch.Tensor]:
        """Return what the layer has put there."""

    def replace(self, path: str, returned: Sequence[torch.Tensor]) -> None:
        """Put something in the place of what the layer of a path would have put there."""


class _NothingCarried:
    def begin(self, _path: str) -> list[torch.Tensor]:
        return []

    def end(self) -> list[torch.Tensor]:
        return []

    def replace(self, _path: str, _returned: Sequence[torch.Tensor]) -> None:
        pass


@contextmanager
def stubbed(model: nn.Module, classes: Iterable[LayerClass], carried: Carried | None = None) -> Iterator[None]:
    """Replace all layers but the templates by stubs, and mark the templates; restore the model afterwards.

    Args:
        model: to be traced.
        classes: its equal layers.
        carried: tensors that pass the layers by an object.

    Raises:
        LayersDiffer: a layer was not called as its template was, which may be found when the trace is over.
    """
    with ExitStack() as stack:
        recorders = []
        for each in classes:
            template = stack.enter_context(_Template(model, each, carried or _NothingCarried()).marked())
            for path in each.paths[1:]:
                stack.enter_context(_replaced(model, path, template))
            recorders.append(template)
        yield
        for recorder in recorders:
            recorder.check()


@contextmanager
def _replaced(model: nn.Module, path: str, template: _Template) -> Iterator[None]:
    parent, _, name = path.rpartition(".")
    held = model.get_submodule(parent)._modules
    layer = held[name]
    assert layer is not None
    held[name] = template.stub(path, layer)
    try:
        yield
    finally:
        held[name] = layer


class _Template:
    """The traced layer of a class, with the arguments of its call and of the calls of its stubs."""

    def __init__(self, model: nn.Module, of: LayerClass, carried: Carried) -> None:
        self._of = of
        self._carried = carried
        self._path = of.paths[0]
        self._layer = model.get_submodule(self._path)
        self._positions: list[tuple[dict[str, Any], str, Any, Position]] = []
        self._given: Values | None = None
        self._taken: list[torch.Tensor] = []
        self._returned: Values | None = None
        self._others: dict[str, Values] = {}
        self._difference: LayersDiffer | None = None

    @contextmanager
    def marked(self) -> Iterator[_Template]:
        """Let the layer leave marks in the graph where it begins and ends."""
        handles = (
            self._layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._layer.register_forward_hook(self._leave, with_kwargs=True),
        )
        self._hooks = [handle.id for handle in handles]
        self._planned = _contents(self._layer)
        try:
            yield self
        finally:
            self._restore_positions()
            for handle in handles:
                handle.remove()

    def stub(self, path: str, layer: nn.Module) -> nn.Module:
        """Return a module that has the attributes of a layer of this class, but no tensors, and computes nothing."""
        stub: nn.Module = object.__new__(type(layer))
        held = {
            name: OrderedDict(value) if isinstance(value, OrderedDict) else value for name, value in vars(layer).items()
        }
        vars(stub).update({**held, "_parameters": {}, "_buffers": {}, "_modules": {}})
        planned = _contents(stub)

        def call(*args: Any, **kwargs: Any) -> Any:
            if _contents(stub) != planned:
                self._refuse(f"{path!r} was changed before it was called")
            with DisableTorchFunction():  # past torch.export's modes, which cost more than all else here
                return self._stand_in(path, args, kwargs)

        stub.forward = call
        return stub

    def check(self) -> None:
        """Raise :class:`LayersDiffer` unless each layer was called once, as the template was, or none at all."""
        if self._difference is not None:  # raised inside the trace, where the model caught it
            raise self._difference
        if self._given is None and not self._others:
            return
        missing = [path for path in self._of.paths[1:] if path not in self._others]
        if missing:
            raise LayersDiffer(f"{missing[0]!r} is not called, and {self._path!r} is")
        forms = [given.form for given in self._others.values()]
        if self._given is None or not all(form == forms[0] for form in forms):
            raise LayersDiffer(f"layers like {self._path!r} are called with different arguments")
        if self._given.form != forms[0]:
            raise FirstLayerDiffers(self._path)

    def _refuse(self, why: str | LayersDiffer) -> NoReturn:
        self._difference = why if isinstance(why, LayersDiffer) else LayersDiffer(why)
        raise self._difference

    def _enter(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._given is not None:
            self._refuse(f"{self._path!r} is called several times")
        if not self._is_as_planned():
            self._refuse(f"{self._path!r} was changed before it was called")
        self._taken = self._carried.begin(self._path)
        self._given = values_of((args, kwargs, self._taken))
        ENTER(self._path, self._given.tensors)
        self._hide_positions()

    def _leave(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        spent = [name for held, name, _, hidden in self._positions if held.get(name) is not hidden or hidden.used]
        self._restore_positions()
        if spent:
            self._refuse(f"{self._path!r} changes or uses its {spent[0]!r}")
        assert self._given is not None
        if not same_values(self._given, (args, kwargs, self._taken)):
            self._refuse(f"{self._path!r} changes its arguments")
        self._returned = values_of((output, self._carried.end()))
        self._check_memory(self._given, self._returned)
        LEAVE(self._path, [*self._results(), *self._given.tensors])

    def _stand_in(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return results like those of the template, which was called before, for the arguments of another layer."""
        if self._given is None or self._returned is None or path in self._others:
            self._refuse(f"{path!r} is called before {self._path!r}, or several times")
        given = self._others[path] = values_of((args, kwargs, self._carried.begin(path)))
        if given.spec != self._given.spec:
            self._refuse(FirstLayerDiffers(self._path))
        like = self._results()
        made = STUB(path, given.tensors, like)
        if [each.requires_grad for each in made] != [each.requires_grad for each in like]:
            if given.form != self._given.form:
                self._refuse(FirstLayerDiffers(self._path))
            self._refuse(f"some results of {self._path!r} have a gradient, and some have none")
        image = {id(old): new for old, new in zip(self._given.leaves, given.leaves, strict=True)}
        image.update({id(old): new for old, new in zip(like, made, strict=True)})
        leaves = [leaf if is_constant(leaf) else image[id(leaf)] for leaf in self._returned.leaves]
        output, put = pytree.tree_unflatten(leaves, self._returned.spec)
        self._carried.replace(path, put)
        return output

    def _results(self) -> list[torch.Tensor]:
        """Return the tensors that the template returned, each once, without its own inputs."""
        assert self._given is not None
        assert self._returned is not None
        given = {id(leaf) for leaf in self._given.leaves}
        return list({id(tensor): tensor for tensor in self._returned.tensors if id(tensor) not in given}.values())

    def _check_memory(self, given: Values, returned: Values) -> None:
        results = self._results()
        storages = {storage_of(tensor) for tensor in (*given.tensors, *results)}
        known = {storage_of(tensor) for tensor in given.tensors}
        if len(storages) != len(known) + len(results) or any(tensor.storage_offset() for tensor in results):
            self._refuse(f"{self._path!r} returns views")
        held = {id(leaf) for leaf in given.leaves}
        for leaf in returned.leaves:
            if not (isinstance(leaf, torch.Tensor) or is_constant(leaf) or id(leaf) in held):
                self._refuse(f"{self._path!r} returns an object of type {type(leaf).__name__}")

    def _is_as_planned(self) -> bool:
        """Tell whether the layer is unchanged since the trace began, apart from hooks that run after these."""
        hooks = [*self._layer._forward_pre_hooks, *list(self._layer._forward_hooks)[:1]]
        inner = any(has_hooks(child) for child in self._layer.children())
        return hooks == self._hooks and not inner and _contents(self._layer) == self._planned

    def _hide_positions(self) -> None:
        for path, *_, name in self._of.positional:
            held = vars(self._layer.get_submodule(path))
            self._positions.append((held, name, held[name], Position()))
            held[name] = self._positions[-1][-1]

    def _restore_positions(self) -> None:
        for held, name, value, _ in self._positions:
            held[name] = value
        self._positions.clear()


def _contents(layer: nn.Module) -> dict[Key, Any]:
    """Return the attributes of a layer, without ``forward`` and hooks, which stubs and marks set."""
    return {key: value for key, value in contents(layer, Frozen()).items() if key not in _REPLACED}


_REPLACED = {
    ("", "attribute", name)
    for name in ("forward", *(f"_forward_{kind}hooks{more}" for kind in ("", "pre_") for more in ("", "_with_kwargs")))
}


def _use(position: Any, *_args: Any, **_kwargs: Any) -> NoReturn:
    position.used = True  # since the model's code may catch the exception
    raise LayersDiffer("a layer computes with its position among the layers")


class Position:
    """A placeholder for the position of a layer, which raises :class:`LayersDiffer` wherever it is used, and remembers it.

    A layer that does nothing with its position is like the others. Passing it on and comparing it with ``is`` are no use of it.
    """

    def __init__(self) -> None:
        self.used = False

    __class__ = property(_use)  # isinstance asks for it


_BINARY = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "lshift", "rshift", "and", "or", "xor"),
    "matmul",
)
_OTHER = (
    *("eq", "ne", "lt", "le", "gt", "ge", "hash", "bool", "int", "float", "complex", "index", "round", "trunc"),
    *("floor", "ceil", "neg", "pos", "abs", "invert", "len", "iter", "getitem", "contains", "call", "getattr"),
    *("str", "repr", "format", "reduce_ex", "copy", "deepcopy", "torch_function"),
)
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), *_OTHER):
    setattr(Position, f"__{_name}__", _use)
