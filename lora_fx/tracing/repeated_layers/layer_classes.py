"""Equal layers of a model: of each class one layer, the template, is traced, and its nodes are stamped for the others.

Tracing costs tens of milliseconds of Python per node, and most models are one layer many times. For the length of the trace all
layers of a class but the template are stubs; afterwards each stub in the graph becomes a copy of the template's nodes. The
result is the graph of a full trace, node for node. Where that is not certain,
:class:`~lora_fx.tracing.repeated_layers.call_values.LayersDiffer` is raised, and the model is traced in full.

    layer_classes    equal layers (this module)
    call_values      equality of values, and of calls of layers
    stubs            placeholders of layers during the trace, and the check that all layers of a class are called alike
    template_body    nodes of a template, and the check that no value passes its marks unseen
    expand           stubs replaced by nodes

Layers are the parts of a ``ModuleList`` or ``Sequential``. Two are of one class if no code can tell them apart but by their
weights: by their fingerprints, apart from numbers that are their position in the list. A layer that shares a module or a
tensor with anything outside of it, or has hooks, is in no class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from lora_fx.tracing.quantised_models import without_codes
from lora_fx.tracing.repeated_layers.call_values import Frozen

Key = tuple[str, ...]
"""Path of a module in the layer, and the name of its attribute, or of one of its tensors."""

MIN_LAYERS = 4
"""Fewest equal layers for which stamping pays."""


@dataclass(frozen=True)
class LayerClass:
    """Equal layers.

    Attributes:
        paths: of the modules in the model, the template's first.
        positional: keys of attributes that hold the position of a layer.
    """

    paths: tuple[str, ...]
    positional: frozenset[Key]


def foreign_part(model: nn.Module, replaced: Callable[..., Any] | None = None) -> str | None:
    """Return the path and class of a part whose code is neither torch's, transformers' nor lora_fx's, or None.

    Code can tell layers apart in ways that leave no trace in them: the model around them may change itself, a class, or an object
    that they share. Models of transformers are known not to do so; others are traced in full.

    Args:
        model: to be traced.
        replaced: the ``forward`` that the tracer has given the model for the trace.
    """
    for path, module in model.named_modules():
        package = type(module).__module__.partition(".")[0]
        if package not in _KNOWN or vars(module).get("forward", replaced) is not replaced:
            return f"{path or 'the model'!r} ({type(module).__module__}.{type(module).__qualname__})"
    return None


_KNOWN = ("torch", "transformers", "lora_fx")


def layer_classes(model: nn.Module) -> list[LayerClass]:
    """Return the classes of at least :data:`MIN_LAYERS` equal layers of a model, none of them inside another."""
    if any(isinstance(module, fx.GraphModule | torch.jit.ScriptModule) for module in model.modules()) or _any_hooks():
        return []
    with without_codes(model):
        return _layer_classes(model)


def _layer_classes(model: nn.Module) -> list[LayerClass]:
    shared = _Sharing(model)
    found: list[LayerClass] = []
    frozen = Frozen()
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{layer}.") for each in found for layer in each.paths)
        if not inside and isinstance(module, nn.ModuleList | nn.Sequential) and len(module) >= MIN_LAYERS:
            layers = {f"{path}.{name}".removeprefix("."): layer for name, layer in module.named_children()}
            found += _classes(layers, frozen, shared)
    return found


def without_first(classes: Iterable[LayerClass], path: str) -> list[LayerClass]:
    """Return the classes without the layer of this path, the first of one of them; classes that become too small are dropped."""
    shortened = [replace(each, paths=each.paths[each.paths[0] == path :]) for each in classes]
    return [each for each in shortened if len(each.paths) >= MIN_LAYERS]


def _classes(layers: dict[str, nn.Module], frozen: Frozen, shared: _Sharing) -> Iterator[LayerClass]:
    prints = [fingerprint(layer, frozen) for layer in layers.values()]
    positional = frozenset(_positional(prints))
    groups: list[tuple[dict[Key, Any], list[str]]] = []
    for (path, layer), found in zip(layers.items(), prints, strict=True):
        if shared.stands_alone(layer) and not has_hooks(layer):
            known = {key: value for key, value in found.items() if key not in positional}
            same = next((paths for other, paths in groups if other == known), None)
            if same is None:
                groups.append((known, [path]))
            else:
                same.append(path)
    held = {path: positional & found.keys() for path, found in zip(layers, prints, strict=True)}
    return (LayerClass(tuple(paths), held[paths[0]]) for _, paths in groups if len(paths) >= MIN_LAYERS)


def _positional(prints: Sequence[dict[Key, Any]]) -> Iterator[Key]:
    """Yield the keys under which all layers hold an integer that is their position in the list, up to one common offset."""
    for key in {key: None for found in prints for key in found}:
        held = [(index, found[key]) for index, found in enumerate(prints) if key in found]
        integers = key[1] == "attribute" and len(held) > 1 and all(_is_integer(value) for _, value in held)
        if integers and len({int(value[1]) - index for index, value in held}) == 1:
            yield key


def _is_integer(frozen: Any) -> bool:
    return isinstance(frozen, tuple) and frozen[:1] == (int,)


class _Sharing:
    """Count of the modules and storages of a model, by the number of their paths."""

    def __init__(self, model: nn.Module) -> None:
        self._total = Counter(_parts(model))

    def stands_alone(self, layer: nn.Module) -> bool:
        """Tell whether a layer shares nothing with the rest of the model."""
        return all(self._total[part] == count for part, count in Counter(_parts(layer)).items())


def _parts(module: nn.Module) -> Iterator[object]:
    """Yield the modules and the storages of a module, once for each path that they have."""
    for _, part in module.named_modules(remove_duplicate=False):
        yield part
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                yield tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def has_hooks(layer: nn.Module) -> bool:
    """Tell whether anything but ``forward`` runs when a layer is called."""
    return any(
        hooks
        for module in layer.modules()
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


def _any_hooks() -> bool:
    registered = nn.modules.module
    return any(
        (
            registered._global_forward_hooks,
            registered._global_forward_pre_hooks,
            registered._global_backward_hooks,
            registered._global_backward_pre_hooks,
        )
    )


_CONTENTS = ("_parameters", "_buffers", "_modules")


def fingerprint(layer: nn.Module, frozen: Frozen) -> dict[Key, Any]:
    """Return all attributes of a layer by value, and of its parameters and buffers the metadata, without reading their values.

    Two layers of one fingerprint are traced to the same nodes.
    """
    found = contents(layer, frozen)
    first: dict[int, str] = {}
    for path, module in layer.named_modules(remove_duplicate=False):
        for name, tensor in _tensors(module):
            found[path, "tensor", name] = _described(tensor, frozen, first.setdefault(id(tensor), f"{path}.{name}"))
    return found


def contents(layer: nn.Module, frozen: Frozen) -> dict[Key, Any]:
    """Return the attributes of a layer beside tensors."""
    own = {module: path for path, module in reversed(list(layer.named_modules(remove_duplicate=False)))}
    found: dict[Key, Any] = {}
    for path, module in layer.named_modules(remove_duplicate=False):
        found[path, "class"] = type(module)
        found[path, "children"] = tuple(module._modules)
        for name, value in vars(module).items():
            if name not in _CONTENTS:
                found[path, "attribute", name] = frozen(value, own)
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    yield from module._parameters.items()
    yield from module._buffers.items()


def _described(tensor: torch.Tensor | None, frozen: Frozen, first: str) -> Any:
    if tensor is None:
        return None
    form = (tensor.shape, tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad, tensor.is_leaf)
    strides = (tensor.stride(), tensor.storage_offset()) if tensor.layout is torch.strided else None
    return type(tensor), form, strides, first, frozen(dict(vars(tensor)), {})
