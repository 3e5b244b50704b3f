"""Directories with all adapters of a graph, as PEFT's ``Trainer`` lays them out.

The adapter ``default`` is at the top, each other one in a directory of its name. Beside them is what else trains, in a file of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import nn

from lora_fx.adapters.peft_format.opening import read_adapter
from lora_fx.adapters.peft_format.save_load import load_adapter, write_adapter_files
from lora_fx.adapters.recorded import branches_of, tensors_of
from lora_fx.errors import AdapterError, shortened
from lora_fx.files.atomic import replacing
from lora_fx.files.safetensors import TensorFile, write_tensors
from lora_fx.files.target import Target
from lora_fx.graph.adapter_names import adapter_of, adapters, is_of_adapter
from lora_fx.graph.batch_norms import statistics
from lora_fx.graph.compare import described
from lora_fx.graph.graph_module import TracedGraphModule, as_traced, rebuilt, state_in_parts, state_of
from lora_fx.graph.sharded import told_by_first
from lora_fx.rules.peft_config.config import CONFIG_NAME

OTHER_NAME = "graph_state.safetensors"
"""File of a checkpoint with the parameters that train and are of no adapter: see :func:`lora_fx.trainer.prepare`."""

MAX_NAMED = 10
"""How many tensors a message names."""

_DEFAULT = "default"  # the adapter that PEFT writes to the top of a directory
_STATE_DICT_NAME = "model.safetensors"  # of transformers; until there was `prepare`, checkpoints of graphs had one


def adapter_directories(directory: Path) -> dict[str, Path]:
    """Return the directory of each adapter in a checkpoint, or in another directory that PEFT or ``prepare`` writes to."""
    names = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_NAME}"))
    found = {name: directory / name for name in names if "." not in name}  # no adapter's name has one, and scratch has
    return found | ({_DEFAULT: directory} if (directory / CONFIG_NAME).is_file() else {})


def write_adapters(graph: TracedGraphModule, directory: Path) -> None:
    """Write all adapters of a graph, and other parameters that train."""
    tensors = state_of(graph).tensors
    other = {name: tensors[name] for name in first_trainable_names(graph) if not is_of_adapter(name)}
    other |= {name: tensors[name] for name in updated_names(graph) if not is_of_adapter(name)}
    if other:
        with replacing(Target(directory / OTHER_NAME, overwrite=True)) as beside:
            write_tensors(beside, other, {"format": "pt"})
    for adapter in adapters(graph):
        write_adapter_files(graph, directory if adapter == _DEFAULT else directory / adapter, adapter)


def read_adapters(graph: TracedGraphModule, directory: Path) -> None:
    """Give a graph what a checkpoint has of its adapters, and of other parameters that train (in place); a sharded one its parts."""
    values = told_by_first(graph, lambda whole: _values_in(directory, whole))
    graph.load_state_dict(values, strict=False)


def _values_in(directory: Path, graph: TracedGraphModule) -> dict[str, torch.Tensor]:
    """Return what a checkpoint has of the adapters of a graph, and of other parameters that train."""
    found = adapter_directories(directory)
    held, wanted = {adapter: _ranks_on_disk(path) for adapter, path in found.items()}, ranks_in(graph)
    if held.keys() != wanted.keys():
        raise AdapterError(str(directory), [other_adapters(held, wanted)])
    other = _read_other(graph, directory)
    loaded = rebuilt(graph)
    loaded.load_state_dict(other, strict=False)
    for adapter, path in found.items():
        try:
            loaded = load_adapter(loaded, path, adapter)
        except AdapterError as error:
            told = other_adapters({adapter: held[adapter]}, {adapter: wanted[adapter]})
            raise AdapterError(str(directory), [told, error.source, *error.problems]) from error
    return {**other, **{name: value.detach() for name, value in tensors_of(loaded, found).items()}}


def _read_other(graph: TracedGraphModule, directory: Path) -> dict[str, torch.Tensor]:
    """Return the values that a checkpoint has for the parameters that train and are of no adapter, by their names in the graph."""
    tensors = state_of(graph).tensors
    names = sorted(name for name in first_trainable_names(graph) if not is_of_adapter(name))
    path = next((path for name in (OTHER_NAME, _STATE_DICT_NAME) if (path := directory / name).is_file()), None)
    found: dict[str, torch.Tensor] = {}
    kept = (*names, *updated_names(graph))
    if kept and path is not None:
        file = TensorFile.open(path)
        found = {name: file.read(name) for name in kept if name in file.entries}
    problems = [
        f"{name}: expected {described(tensors[name])}, got {described(value)}"
        for name, value in found.items()
        if value.shape != tensors[name].shape
    ]
    problems += [
        f"{name}: trains in the graph, and the checkpoint has no value of it" for name in names if name not in found
    ]
    if problems:
        raise AdapterError(str(directory), shortened(problems, MAX_NAMED, "tensors"))
    return found


def ranks_in(graph: TracedGraphModule) -> dict[str, set[int]]:
    """Return the ranks of each adapter of a graph, as PEFT counts them: parts of one projection together."""
    ranks: dict[str, Counter[str]] = {adapter: Counter() for adapter in adapters(graph)}
    for adapter, by_owner in ranks.items():
        for _, branch in branches_of(graph, adapter).values():
            by_owner[branch.owner] += branch.added.rank
    return {adapter: set(by_owner.values()) for adapter, by_owner in ranks.items()}


def _ranks_on_disk(directory: Path) -> set[int]:
    files = read_adapter(directory)
    has_branches = any(".lora_" in key for key in files.file.entries)
    return {files.config.r, *files.config.rank_pattern.values()} if has_branches else set()


def other_adapters(held: Mapping[str, Collection[int]], wanted: Mapping[str, Collection[int]]) -> str:
    """Return the sentence on adapters that are not those of a graph, each by its ranks."""
    return (
        f"expected the graph's {_adapters_text(wanted)}, got {_adapters_text(held)}: training would not go on where it stopped. "
        "Give the graph the checkpoint's adapters, by the same names and rules, or begin anew."
    )


def _adapters_text(ranks: Mapping[str, Collection[int]]) -> str:
    """Return ``"adapters 'a' (rank 4) and 'b' (ranks 2, 4)"``."""
    told = [
        f"{adapter!r} (rank{'s' if len(each) > 1 else ''} {', '.join(map(str, sorted(each)))})"
        if each
        else repr(adapter)
        for adapter, each in ranks.items()
    ]
    return f"adapter{'s' if len(told) > 1 else ''} {' and '.join(told)}" if told else "no adapter"


def first_trainable_names(graph: nn.Module) -> set[str]:
    """Return the first name of each parameter that trains."""
    return {name for name, parameter in graph.named_parameters() if parameter.requires_grad}


def updated_names(graph: nn.Module) -> set[str]:
    """Return the names of the running statistics that the graph updates in train mode."""
    return set(statistics(as_traced(graph).graph, state_in_parts(graph).modules))


def ranks_of(given: Mapping[str, torch.Tensor], graph: TracedGraphModule) -> dict[str, set[int]]:
    """Return the ranks of the adapters in a state dict, as far as its factors are beside branches of the graph."""
    state = state_in_parts(graph).tensors
    known = {}
    for adapter in adapters(graph):
        for _, branch in branches_of(graph, adapter).values():
            known[branch.owner] = (branch.setting.rank, len(state[branch.names(adapter).a]))
    ranks: dict[str, set[int]] = {}
    for name, value in given.items():
        owner, found, _ = name.partition(".lora_A.")
        of_adapter = ranks.setdefault(str(adapter_of(name)), set())
        if found and owner in known:
            rank, rows = known[owner]
            of_adapter.add(rank * len(value) // rows)  # a stack has the rows of all its matrices
    return ranks
