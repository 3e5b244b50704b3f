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
from lora_fx.graph_module import TracedGraphModule, described, same_values, state_of


@contextmanager
def folded(model: nn.Module, graph_module: TracedGraphModule) -> Iterator[nn.Module]:
    """Let ``model`` compute with the folded weights of ``graph_module`` for the length of a ``with`` block.

    For everything that needs the model's own Python: ``generate`` with a key-value cache, pipelines, evaluation harnesses.
    Parameters are swapped for others, never overwritten; the originals are back afterwards, also after an exception.

    Args:
        model: the model that ``graph_module`` was traced from.
        graph_module: a branched or a folded graph.

    Raises:
        LoraFxError: the graph was traced from another model, or from other weights.
        FoldError: the branches cannot be folded.
    """
    originals = _swap(model, graph_module)
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
    _swap(model, graph_module)


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


def _swap(model: nn.Module, graph_module: TracedGraphModule) -> dict[str, nn.Parameter]:
    """Put in the parameters whose values fold changed, and return those that were there."""
    merged = fold(graph_module)
    _check_traced_from(model, graph_module, merged)
    current = dict(model.named_parameters(remove_duplicate=False))
    made: dict[int, nn.Parameter] = {}
    new: dict[str, nn.Parameter] = {}
    for name, parameter in merged.named_parameters(remove_duplicate=False):
        old = current[name]
        if not same_values(parameter, old):
            new[name] = made.setdefault(id(old), nn.Parameter(parameter.detach().to(old.device), old.requires_grad))
    _put(model, new)
    return {name: current[name] for name in new}


def _check_traced_from(model: nn.Module, graph_module: TracedGraphModule, merged: TracedGraphModule) -> None:
    """Raise unless the model has the tensors that the graph was traced with, or others of the same values and ties.

    Of a graph that is folded already, the merged weights are not compared: their former values are gone.
    """
    model_state, graph_state = state_of(model), state_of(graph_module)
    theirs, mine = model_state.tensors, graph_state.tensors
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    other = {name for name, _ in merged.named_parameters(remove_duplicate=False)} ^ parameters
    folded_before = graph_module.meta["lora_fx"].get("merged", ())
    untied = [
        (first, name)
        for name, first in model_state.aliases().items()
        if name != first and {name, first} <= mine.keys() and mine[name] is not mine[first]
    ]
    if any(folded_before.count(name) for pair in untied for name in pair):
        first, name = untied[0]
        raise LoraFxError(
            f"{first!r} and {name!r} are one parameter of {type(model).__name__}, and were un-tied by fold. Un-tie them in the model too: "
            "config.tie_word_embeddings = False and a parameter of its own for each, then trace that model, and fold."
        )
    differences = [f"{name!r} is in one of them only" for name in sorted(other | (theirs.keys() - mine.keys()))]
    differences += [
        f"{name!r} is {described(tensor)} in the model and {described(mine[name])} in the graph"
        for name, tensor in theirs.items()
        if name in mine and (tensor.shape, tensor.dtype) != (mine[name].shape, mine[name].dtype)
    ]
    differences += [
        f"{name!r} and {first!r} are one tensor in one of them only"
        for tied, untied in ((model_state, graph_state), (graph_state, model_state))
        for name, first in tied.aliases().items()
        if name != first
        and {name, first} <= theirs.keys() & mine.keys()
        and untied.tensors[name] is not untied.tensors[first]
    ]
    differences = differences or [
        f"{name!r} has other values"
        for name, tensor in theirs.items()
        if name not in folded_before and not same_values(tensor, mine[name])
    ]
    if differences:
        more = f", and {len(differences) - _MOST} more" if len(differences) > _MOST else ""
        raise LoraFxError(
            f"the graph was not traced from this {type(model).__name__}: {'; '.join(differences[:_MOST])}{more}. Pass the model that "
            "was traced. If only its weights were changed since, give it those of the graph: "
            "model.load_state_dict(lora_fx.fold(graph).state_dict(), assign=True)."
        )


_MOST = 3


def _put(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path).register_parameter(leaf, parameter)
