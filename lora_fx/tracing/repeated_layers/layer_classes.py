"""Which layers of a model are equal: of each class of them one is traced, its template, and stamped for the others.

Layers are the parts of a ``ModuleList`` or ``Sequential``. Two are of one class if no code can tell them apart but by their
weights: by their fingerprints, apart from numbers that are their position in the list. A layer that shares a module or a
tensor with anything outside of it, or has hooks, is in no class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from lora_fx.tracing.repeated_layers.call_values import Frozen
from lora_fx.tracing.repeated_layers.fingerprints import Key, fingerprint

LEAST = 4
"""Equal layers, below which stamping gains nothing."""


@dataclass(frozen=True)
class LayerClass:
    """Equal layers.

    Attributes:
        paths: of the modules in the model, the template's first.
        positional: where the layers hold their position.
    """

    paths: tuple[str, ...]
    positional: frozenset[Key]


def foreign_part(model: nn.Module) -> str | None:
    """Return the path and class of a part whose code is neither torch's nor transformers', or None.

    Code can tell layers apart in ways that leave no trace in them: by what the model around them does to itself, to a class,
    to an object that they share. Models of transformers are known not to; others are traced in full.
    """
    for path, module in model.named_modules():
        package = type(module).__module__.partition(".")[0]
        if package not in _KNOWN or "forward" in vars(module):
            return f"{path or 'the model'!r} ({type(module).__module__}.{type(module).__qualname__})"
    return None


_KNOWN = ("torch", "transformers")


def layer_classes(model: nn.Module) -> list[LayerClass]:
    """Return the classes of at least :data:`LEAST` equal layers of a model, none of them inside another."""
    if any(isinstance(module, fx.GraphModule | torch.jit.ScriptModule) for module in model.modules()) or _any_hooks():
        return []
    shared = _Sharing(model)
    found: list[LayerClass] = []
    frozen = Frozen()
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{layer}.") for each in found for layer in each.paths)
        if not inside and isinstance(module, nn.ModuleList | nn.Sequential) and len(module) >= LEAST:
            layers = {f"{path}.{name}".removeprefix("."): layer for name, layer in module.named_children()}
            found += _classes(layers, frozen, shared)
    return found


def without_first(classes: Iterable[LayerClass], path: str) -> list[LayerClass]:
    """Return the classes without the layer of this path, the first of one of them; those that are too small are left out."""
    shortened = [replace(each, paths=each.paths[each.paths[0] == path :]) for each in classes]
    return [each for each in shortened if len(each.paths) >= LEAST]


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
    return (LayerClass(tuple(paths), held[paths[0]]) for _, paths in groups if len(paths) >= LEAST)


def _positional(prints: Sequence[dict[Key, Any]]) -> Iterator[Key]:
    """Yield where all layers that have it hold an integer that is their position in the list, or that and some number."""
    for key in {key: None for found in prints for key in found}:
        held = [(index, found[key]) for index, found in enumerate(prints) if key in found]
        integers = key[1] == "attribute" and len(held) > 1 and all(_is_integer(value) for _, value in held)
        if integers and len({int(value[1]) - index for index, value in held}) == 1:
            yield key


def _is_integer(frozen: Any) -> bool:
    return isinstance(frozen, tuple) and frozen[:1] == (int,)


class _Sharing:
    """Tells what a model holds in several places."""

    def __init__(self, model: nn.Module) -> None:
        self._total = Counter(_parts(model))

    def stands_alone(self, layer: nn.Module) -> bool:
        """Tell whether nothing in a layer is also outside of it."""
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
