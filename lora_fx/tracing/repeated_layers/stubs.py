"""Layers as stubs: for the length of a trace all of a class but the template compute nothing, and leave a mark in the graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.tracing.repeated_layers.call_values import Frozen
from lora_fx.tracing.repeated_layers.calls import (
    Departure,
    FirstDeparts,
    Values,
    is_constant,
    same_values,
    storage_of,
    values_of,
)
from lora_fx.tracing.repeated_layers.fingerprints import Key, contents
from lora_fx.tracing.repeated_layers.layer_classes import LayerClass, has_hooks
from lora_fx.tracing.repeated_layers.operators import ENTER, LEAVE, STUB
from lora_fx.tracing.repeated_layers.positions import Position


@contextmanager
def stubbed(model: nn.Module, classes: Iterable[LayerClass]) -> Iterator[None]:
    """Put stubs in the place of all layers but the templates, and mark the templates; put all back.

    Raises:
        Departure: when the trace is over, if a layer was not called as its template was. Inside, that and others.
    """
    with ExitStack() as stack:
        recorders = []
        for each in classes:
            template = stack.enter_context(_Template(model, each).marked())
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
    """The layer of a class that is traced: what it was called with, and what others were, in its place."""

    def __init__(self, model: nn.Module, of: LayerClass) -> None:
        self._of = of
        self._path = of.paths[0]
        self._layer = model.get_submodule(self._path)
        self._positions: list[tuple[dict[str, Any], str, Any, Position]] = []
        self._given: Values | None = None
        self._returned: Values | None = None
        self._others: dict[str, Values] = {}
        self._departure: Departure | None = None

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
            self._put_positions_back()
            for handle in handles:
                handle.remove()

    def stub(self, path: str, layer: nn.Module) -> nn.Module:
        """Return a module that is like a layer of this class from outside, holds nothing, and computes nothing."""
        stub: nn.Module = object.__new__(type(layer))
        held = {
            name: OrderedDict(value) if isinstance(value, OrderedDict) else value for name, value in vars(layer).items()
        }
        vars(stub).update({**held, "_parameters": {}, "_buffers": {}, "_modules": {}})
        planned = _contents(stub)

        def call(*args: Any, **kwargs: Any) -> Any:
            if _contents(stub) != planned:
                self._depart(f"{path!r} was changed before it was called")
            with torch._C.DisableTorchFunction():  # for torch.export's modes, which cost more than the rest
                return self._stand_in(path, args, kwargs)

        stub.forward = call
        return stub

    def check(self) -> None:
        """Raise :class:`Departure` unless each layer was called once, as the template was, or none at all."""
        if self._departure is not None:  # the model caught it
            raise self._departure
        if self._given is None and not self._others:
            return
        missing = [path for path in self._of.paths[1:] if path not in self._others]
        if missing:
            raise Departure(f"{missing[0]!r} is not called, and {self._path!r} is")
        forms = [given.form for given in self._others.values()]
        if self._given is None or not all(form == forms[0] for form in forms):
            raise Departure(f"layers like {self._path!r} are called with different things")
        if self._given.form != forms[0]:
            raise FirstDeparts(self._path)

    def _depart(self, why: str | Departure) -> NoReturn:
        self._departure = why if isinstance(why, Departure) else Departure(why)
        raise self._departure

    def _enter(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._given is not None:
            self._depart(f"{self._path!r} is called several times")
        if not self._is_as_planned():
            self._depart(f"{self._path!r} was changed before it was called")
        self._given = values_of((args, kwargs))
        ENTER(self._path, self._given.tensors)
        self._hide_positions()

    def _leave(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        spent = [name for held, name, _, hidden in self._positions if held.get(name) is not hidden or hidden.used]
        self._put_positions_back()
        if spent:
            self._depart(f"{self._path!r} changes or uses its {spent[0]!r}")
        assert self._given is not None
        if not same_values(self._given, (args, kwargs)):
            self._depart(f"{self._path!r} changes what it is given")
        self._returned = values_of(output)
        self._check_memory(self._given, self._returned)
        LEAVE(self._path, [*self._results(), *self._given.tensors])

    def _stand_in(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a layer would return in place of the template, which was called before."""
        if self._given is None or self._returned is None or path in self._others:
            self._depart(f"{path!r} is called before {self._path!r}, or several times")
        given = self._others[path] = values_of((args, kwargs))
        if given.spec != self._given.spec:
            self._depart(FirstDeparts(self._path))
        like = self._results()
        made = STUB(path, given.tensors, like)
        if [each.requires_grad for each in made] != [each.requires_grad for each in like]:
            if given.form != self._given.form:
                self._depart(FirstDeparts(self._path))
            self._depart(f"some results of {self._path!r} have a gradient, and some have none")
        image = {id(old): new for old, new in zip(self._given.leaves, given.leaves, strict=True)}
        image.update({id(old): new for old, new in zip(like, made, strict=True)})
        leaves = [leaf if is_constant(leaf) else image[id(leaf)] for leaf in self._returned.leaves]
        return pytree.tree_unflatten(leaves, self._returned.spec)

    def _results(self) -> list[torch.Tensor]:
        """Return the tensors that the template returned, each once, and none that it was given."""
        assert self._given is not None
        assert self._returned is not None
        given = {id(leaf) for leaf in self._given.leaves}
        return list({id(tensor): tensor for tensor in self._returned.tensors if id(tensor) not in given}.values())

    def _check_memory(self, given: Values, returned: Values) -> None:
        results = self._results()
        storages = {storage_of(tensor) for tensor in (*given.tensors, *results)}
        known = {storage_of(tensor) for tensor in given.tensors}
        if len(storages) != len(known) + len(results) or any(tensor.storage_offset() for tensor in results):
            self._depart(f"{self._path!r} returns views")
        held = {id(leaf) for leaf in given.leaves}
        for leaf in returned.leaves:
            if not (isinstance(leaf, torch.Tensor) or is_constant(leaf) or id(leaf) in held):
                self._depart(f"{self._path!r} returns an object of type {type(leaf).__name__}")

    def _is_as_planned(self) -> bool:
        """Tell whether the layer is as it was when the trace began, apart from hooks that run after ours."""
        hooks = [*self._layer._forward_pre_hooks, *list(self._layer._forward_hooks)[:1]]
        inner = any(has_hooks(child) for child in self._layer.children())
        return hooks == self._hooks and not inner and _contents(self._layer) == self._planned

    def _hide_positions(self) -> None:
        for path, *_, name in self._of.positional:
            held = vars(self._layer.get_submodule(path))
            self._positions.append((held, name, held[name], Position()))
            held[name] = self._positions[-1][-1]

    def _put_positions_back(self) -> None:
        for held, name, value, _ in self._positions:
            held[name] = value
        self._positions.clear()


def _contents(layer: nn.Module) -> dict[Key, Any]:
    """Return what a layer holds, apart from what we change in it, and hooks that run after ours."""
    return {key: value for key, value in contents(layer, Frozen()).items() if key not in _OURS}


_OURS = {
    ("", "attribute", name)
    for name in ("forward", *(f"_forward_{kind}hooks{more}" for kind in ("", "pre_") for more in ("", "_with_kwargs")))
}
