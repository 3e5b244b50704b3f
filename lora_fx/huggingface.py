"""What is special to transformers models: computing with folded weights inside the model, and saving them as its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.files import replacing
from lora_fx.folding import fold
from lora_fx.graph_module import TracedGraphModule


@contextmanager
def folded(model: nn.Module, graph_module: TracedGraphModule) -> Iterator[nn.Module]:
    """Let ``model`` compute with the folded weights of ``graph_module`` for the length of a ``with`` block.

    For everything that needs the model's own Python: ``generate`` with a key-value cache, pipelines, evaluation harnesses.
    Parameters are swapped for others, never overwritten; the originals are back afterwards, also after an exception.

    Args:
        model: the model that ``graph_module`` was traced from.
        graph_module: a branched or a folded graph.

    Raises:
        LoraFxError: the graph was traced from another model.
        FoldError: the branches cannot be folded.
    """
    originals = _swap(model, fold(graph_module))
    try:
        yield model
    finally:
        _put(model, originals)


def write_back(model: nn.Module, graph_module: TracedGraphModule) -> None:
    """Give ``model`` the folded weights of ``graph_module`` for good, as new parameters.

    Its old parameters are not overwritten: graphs that were traced from it go on with the weights that they had.

    Raises:
        LoraFxError: the graph was traced from another model.
        FoldError: the branches cannot be folded.
    """
    _swap(model, fold(graph_module))


def save_pretrained(
    model: Any, graph_module: TracedGraphModule, directory: str | Path, *, overwrite: bool = False, **options: Any
) -> None:
    """Write a transformers directory with the folded weights, which ``from_pretrained`` loads.

    Args:
        model: the transformers model that ``graph_module`` was traced from; left as it is.
        graph_module: a branched or a folded graph.
        directory: to be made.
        overwrite: replace a directory that exists.
        options: passed to the model's ``save_pretrained``.

    Raises:
        LoraFxError: the directory exists or cannot be written, or the graph was traced from another model.
        FoldError: the branches cannot be folded.
    """
    config = model.config
    with folded(model, graph_module), replacing(Path(directory), overwrite=overwrite) as beside:
        model.config = copy.deepcopy(config)  # `save_pretrained` writes the architecture and the dtype into it
        try:
            model.save_pretrained(beside, **options)
        finally:
            model.config = config


def _swap(model: nn.Module, merged: TracedGraphModule) -> dict[str, nn.Parameter]:
    """Put in the parameters whose values fold changed, and return those that were there."""
    current = dict(model.named_parameters(remove_duplicate=False))
    new = dict(merged.named_parameters(remove_duplicate=False))
    unlike = sorted(set(current) ^ set(new)) or sorted(
        name for name in current if current[name].shape != new[name].shape
    )
    if unlike:
        raise LoraFxError(
            f"the graph was not traced from this {type(model).__name__}: they differ in {len(unlike)} parameters, such as {unlike[0]!r}. "
            "Pass the model that was rewritten."
        )
    changed = {name: p for name, p in new.items() if p.data_ptr() != current[name].data_ptr()}
    made: dict[int, nn.Parameter] = {}
    _put(
        model,
        {
            name: made.setdefault(id(p), nn.Parameter(p.detach(), current[name].requires_grad))
            for name, p in changed.items()
        },
    )
    return {name: current[name] for name in changed}


def _put(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path).register_parameter(leaf, parameter)
