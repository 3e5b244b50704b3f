"""transformers integration: run a model with folded weights, write them back, and save them as its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lora_fx.errors import LoraFxError, listed
from lora_fx.files.atomic import replacing
from lora_fx.files.target import DirectoryKind, Target
from lora_fx.folding.checkpoint import is_weights
from lora_fx.folding.fold import folded_state, tell_dropped
from lora_fx.folding.transformers_directory import DTYPES, check_loads, contents_of, write
from lora_fx.graph.adapter_names import original_name
from lora_fx.graph.batch_norms import statistics
from lora_fx.graph.cached_graphs import CachedGraphs
from lora_fx.graph.compare import described, same_values
from lora_fx.graph.graph_module import TracedGraphModule, state_of
from lora_fx.graph.info import info_of
from lora_fx.graph.joined_graphs import whole
from lora_fx.graph.state import State
from lora_fx.tracing.quantised_models import quantised_layers

__all__ = ["folded", "save_pretrained", "write_back"]


@contextmanager
def folded(model: nn.Module, graph_module: TracedGraphModule | CachedGraphs) -> Iterator[nn.Module]:
    """Let ``model`` compute with the folded weights of ``graph_module`` for the length of a ``with`` block.

    For everything that needs the model's own Python: ``generate`` with a key-value cache, pipelines, evaluation harnesses.
    Parameters are swapped for others, never overwritten; the originals are back afterwards, also after an exception. Weights
    that were folded with ``unshare=True`` are apart in the block, unless something in it ties them (``model.tie_weights()``).

    Args:
        model: the model that ``graph_module`` was traced from.
        graph_module: a branched or a folded graph, which may have labels; or the graphs of an encoder-decoder model with a cache.

    Raises:
        LoraFxError: the graph was traced from another model, or from other weights.
        FoldError: the branches cannot be folded.
    """
    graph = whole(graph_module)
    new = _changed(model, graph, _folded_of(model, graph))
    originals = state_of(model).tensors
    try:
        _put(model, new)
        yield model
    finally:
        _put(model, {name: originals[name] for name in new})


def write_back(model: nn.Module, graph_module: TracedGraphModule | CachedGraphs) -> None:
    """Give ``model`` the folded weights of ``graph_module`` for good, as new parameters.

    Its old parameters are not overwritten: graphs that were traced from it go on with the weights that they had.

    Args:
        model: the model that ``graph_module`` was traced from; it is changed.
        graph_module: a branched or a folded graph, which may have labels; or the graphs of an encoder-decoder model with a cache.

    Raises:
        LoraFxError: the graph was traced from another model, or fold untied weights in it that are one in the model, which
            would tie them again whenever it is resized, saved or loaded.
        FoldError: the branches cannot be folded.
    """
    graph = whole(graph_module)
    merged = _folded_of(model, graph)
    untied = _untied(model, graph)
    if untied:
        first, name = untied[0]
        raise LoraFxError(
            f"{first!r} and {name!r} are one parameter of {type(model).__name__}, and were untied by fold. Untie them in the model too: "
            "config.tie_word_embeddings = False and a parameter of its own for each, then trace that model, and fold. "
            "huggingface.folded and huggingface.save_pretrained take this graph as it is."
        )
    _put(model, _changed(model, graph, merged))


def save_pretrained(
    model: Any,
    graph_module: TracedGraphModule | CachedGraphs,
    directory: str | Path,
    *,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    **options: Any,
) -> None:
    """Write a transformers directory with the folded weights, which ``from_pretrained`` loads.

    Weights that were folded with ``unshare=True`` are written each on its own, with ``tie_word_embeddings`` false in the
    config, so that they are loaded apart; what that unties besides is written too. Of T5 and its kin, which tie whatever
    their config says, and of a model that computes something else without the switch (Switch Transformers, UDOP),
    ``from_pretrained`` leaves weights apart since their values differ, and says so. Other programs may tie these.

    Args:
        model: the transformers model that ``graph_module`` was traced from; nothing in it is changed, at no time.
        graph_module: a branched or a folded graph, which may have labels; or the graphs of an encoder-decoder model with a cache.
        directory: to be made. It is there once it is whole.
        overwrite: replace a directory that holds nothing but configs and weights, and is not the one that ``model`` was loaded from.
        dtype: of the weights that are written, float16, bfloat16, float32 or float64; those of the model by default. The
            merged values are rounded once. Weights that ``from_pretrained(dtype=…)`` keeps in another dtype are written in that one.
        verify: load the written directory before it is moved into place, and compare every parameter and persistent buffer bit
            for bit. That takes the memory of a second model.
        options: passed to the model's ``save_pretrained``: ``max_shard_size``, ``variant``.

    Raises:
        LoraFxError: the directory exists, holds other files (a tokenizer, data) or cannot be written, the graph was traced from
            another model, a weight has a value beyond the range of ``dtype``, or ``from_pretrained`` does not restore the
            written weights.
        FoldError: the branches cannot be folded.
    """
    if isinstance(model, TracedGraphModule):
        raise LoraFxError(
            "expected the transformers model that was traced, and then the graph, got a graph first: save_pretrained(model, graph, directory)."
        )
    if not isinstance(model, transformers.PreTrainedModel):
        raise LoraFxError(
            f"expected a transformers model, got a {type(model).__name__}. Pass the PreTrainedModel that was traced; of "
            "another module, save the state dict of the folded graph."
        )
    if dtype is not None and dtype not in DTYPES:
        raise LoraFxError(
            f"weights are written in {', '.join(map(str, DTYPES))}, and not in {dtype}. Choose one of these."
        )
    directory = Path(directory)
    target = Target(directory, overwrite, _loaded_from(model), _KIND)
    target.check()
    graph = whole(graph_module)
    values = _folded_of(model, graph).tensors
    contents = contents_of(model, values, _untied(model, graph), dtype)
    with replacing(target) as beside:
        write(model, contents, beside, options)
        if verify:
            check_loads(type(model), contents, beside, directory, options.get("variant"))


def _is_written(path: str) -> bool:
    """Tell whether the ``save_pretrained`` of a model writes a file of this name: configs, weights, and code from the hub."""
    return path in ("config.json", "generation_config.json") or (
        "/" not in path and (is_weights(path) or path.endswith(".py"))
    )


_KIND = DirectoryKind("a transformers model", _is_written)


def _loaded_from(model: Any) -> tuple[Path, ...]:
    """Return the directory that a model was loaded from, if it was."""
    source = getattr(model.config, "name_or_path", "") or ""
    return (Path(source),) if Path(source).is_dir() and source else ()


def _folded_of(model: nn.Module, graph_module: TracedGraphModule) -> State:
    """Return the folded weights; only these are needed, so that the graph may have labels."""
    quantised = next(iter(quantised_layers(model).weights), None)
    if quantised is not None:
        raise LoraFxError(
            f"{type(model).__name__} has quantised layers, such as {quantised!r}, which take no dense weights. graph.merge_and_unload() "
            "makes a dense model with the merged weights, whose save_pretrained writes it."
        )
    merged = folded_state(graph_module)
    tell_dropped(graph_module, logging.WARNING)
    _check_traced_from(model, graph_module, merged)
    return merged


def _parameters(state: State) -> dict[str, nn.Parameter]:
    return {name: tensor for name, tensor in state.tensors.items() if isinstance(tensor, nn.Parameter)}


def _changed(model: nn.Module, graph_module: TracedGraphModule, merged: State) -> dict[str, torch.Tensor]:
    """Return new parameters and running statistics for the ones whose values fold or training changed; tied ones are one object."""
    current = state_of(model).tensors
    read = statistics(graph_module.graph, state_of(graph_module).modules)
    measured = {original_name(name) or name for name in read}
    made: dict[int, torch.Tensor] = {}
    new: dict[str, torch.Tensor] = {}
    for name, tensor in merged.tensors.items():
        if isinstance(tensor, nn.Parameter) and not same_values(tensor, old := current[name]):
            new[name] = made.setdefault(id(tensor), nn.Parameter(tensor.detach().to(old.device), old.requires_grad))
        elif name in measured and not same_values(tensor, current[name]):
            new[name] = made.setdefault(id(tensor), tensor.clone().to(current[name].device))
    return new


def _untied(model: nn.Module, graph_module: TracedGraphModule) -> tuple[tuple[str, str], ...]:
    """Return the pairs of names that are one tensor in the model, and that fold gave a tensor each."""
    state, tensors = state_of(model), state_of(graph_module).tensors
    folded_before = info_of(graph_module).merged
    return tuple(
        (first, name)
        for name, first in state.aliases().items()
        if {name, first} <= tensors.keys()
        and tensors[name] is not tensors[first]
        and (name in folded_before or first in folded_before)
    )


def _check_traced_from(model: nn.Module, graph_module: TracedGraphModule, merged: State) -> None:
    """Raise unless the model has the tensors that the graph was traced with, or others of the same values and ties.

    Of a graph that is folded already, the merged weights are not compared: their former values are gone. Weights that it untied
    may be one in the model.
    """
    model_state, graph_state = state_of(model), state_of(graph_module)
    theirs, mine = model_state.tensors, graph_state.tensors
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    other = _parameters(merged).keys() ^ parameters
    if info_of(graph_module).layers:  # whose names may be those of the model, in another order
        raise LoraFxError(
            f"the graph has replicated layers (layer_replication), which this {type(model).__name__} lacks: graph.merge_and_unload() makes a "
            "model that has them, with the merged weights."
        )
    folded_before = info_of(graph_module).merged
    before = {**mine, **info_of(graph_module).statistics}
    extra = sorted(other.intersection(folded_before))
    if extra:
        raise LoraFxError(
            f"fold untied the calls of one module, and {type(model).__name__} has no parameter for {extra[0]!r}. Adapt all calls "
            "alike, or give the model a module for each before it is traced."
        )
    untied_by_fold = set(_untied(model, graph_module))
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
        and (first, name) not in untied_by_fold
    ]
    differences = differences or [
        f"{name!r} has other values"
        for name, tensor in theirs.items()
        if name not in folded_before and not same_values(tensor, before[name])
    ]
    if differences:
        raise LoraFxError(
            f"the graph was not traced from this {type(model).__name__}: {listed(differences, _MAX_NAMED, '; ')}. Pass the model that "
            "was traced. If only its weights were changed since, give it those of the graph: "
            "model.load_state_dict(lora_fx.fold(graph).state_dict(), assign=True)."
        )


_MAX_NAMED = 3


def _put(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        held: dict[str, Any] = owner._parameters if isinstance(tensor, nn.Parameter) else owner._buffers
        held[leaf] = tensor
