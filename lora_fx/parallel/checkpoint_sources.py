"""What the tensors of a graph are made of in a checkpoint: of a tensor each, or, where experts were modules of their own, of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from lora_fx.adapters.peft_format.experts import ExpertKey
from lora_fx.errors import LoraFxError, listed
from lora_fx.files.safetensors import TensorEntry, TensorFile, equal_in_files
from lora_fx.folding.checkpoint import Checkpoint
from lora_fx.graph.adapter_names import is_of_adapter
from lora_fx.graph.compare import described
from lora_fx.graph.state import State, part_of
from lora_fx.tracing.transformers_models import KeyConversions


@dataclass(frozen=True)
class Sources:
    """Where a checkpoint has the tensors of a graph's base; these by their first names.

    Attributes:
        plain: keys of those that are stored as the graph has them.
        stacks: for each ``(experts, out, in)`` of which the matrices are stored, the keys of every expert, whose outputs follow one another.
    """

    plain: Mapping[str, str]
    stacks: Mapping[str, tuple[tuple[str, ...], ...]]

    @staticmethod
    def of(state: State, checkpoint: Checkpoint, like: nn.Module | None) -> Sources:
        """Rename every key as transformers does for a model like this one as it loads, and find what each tensor is made of.

        Raises:
            LoraFxError: the checkpoint lacks some, has others, or in another shape or dtype; or another file has one of them, too.
        """
        conversions = KeyConversions.of(like) if isinstance(like, PreTrainedModel) else KeyConversions()
        converters = {pattern: each for each in conversions.converters for pattern in each.source_patterns}
        first, names = state.aliases(), dict(state.tensors)
        problems: list[str] = []
        unknown: list[str] = []
        renamed: dict[str, str] = {}
        experts: dict[str, list[ExpertKey]] = {}
        for key in checkpoint.tensors:
            name, pattern = conversions.applied(key, names)
            if name not in first:
                unknown.append(f"{key!r} is unknown")
            elif pattern is None:
                renamed.setdefault(name, key)
            else:
                expert = ExpertKey.of(key, key.rpartition(".")[0], first[name], pattern, converters[pattern])
                problems += [_unknown_way(key, name, converters[pattern])] if expert is None else []
                experts.setdefault(first[name], []).extend([] if expert is None else [expert])
        plain: dict[str, str] = {}
        for name, every in state.names().items():
            if name in state.non_persistent or is_of_adapter(name):
                continue
            keys = [renamed[each] for each in every if each in renamed]
            if keys:
                plain[name] = keys[0]
                problems += _unlike(keys[0], checkpoint.tensors[keys[0]][1], described(state.tensors[name]))
                problems += _untied(keys, checkpoint)
            elif name not in experts:
                problems.append(f"{name!r} is missing")
        stacks = {name: _stack(state.tensors[name], found, checkpoint, problems) for name, found in experts.items()}
        problems += unknown
        if problems:
            raise LoraFxError(f"{checkpoint.directory} does not fit the graph: {listed(problems, _MAX_NAMED, '; ')}.")
        _check_single(plain, checkpoint)
        return Sources(plain, stacks)

    def fill(self, name: str, values: torch.Tensor, checkpoint: Checkpoint) -> None:
        """Give a stack its values (in place); of one that is sharded by experts, this process reads its own alone."""
        keys = self.stacks[name]
        if not isinstance(values, DTensor):
            _read(values, keys, checkpoint)
        elif all(each.is_replicate() or each.is_shard(0) for each in values.placements):
            own = part_of(torch.arange(len(keys), device=values.device), values).to_local()
            _read(values.to_local(), [keys[expert] for expert in own.tolist()], checkpoint)
        else:
            whole = torch.empty(values.shape, dtype=values.dtype, device=values.device)
            _read(whole, keys, checkpoint)
            values.to_local().copy_(part_of(whole, values).to_local())


def _read(values: torch.Tensor, keys: Sequence[Sequence[str]], checkpoint: Checkpoint) -> None:
    for expert, parts in enumerate(keys):
        start = 0
        for key in parts:
            part = checkpoint.read(key)
            values[expert, start : start + part.shape[0]] = part
            start += part.shape[0]


def _unknown_way(key: str, name: str, converter: WeightConverter) -> str:
    done = ", ".join(type(each).__name__ for each in converter.operations)
    return (
        f"of {key!r} transformers makes {name!r} ({done}), which is not done here: write the model with "
        "save_pretrained(…, save_original_format=False)"
    )


def _stack(
    tensor: torch.Tensor, found: list[ExpertKey], checkpoint: Checkpoint, problems: list[str]
) -> tuple[tuple[str, ...], ...]:
    """Return the keys of the matrices of a stack, by expert; add what is wrong to the problems."""
    if not found:  # said already
        return ()
    some, keys = found[0], {(each.expert, each.leaf): each.key for each in found}
    experts, out, *others = tensor.shape
    stored = {place: checkpoint.tensors[key][1] for place, key in keys.items()}
    rows = {leaf: entry.shape[0] if entry.shape else 0 for (_, leaf), entry in stored.items()}
    if len(rows) == len(some.leaves) and sum(rows.values()) != out:
        problems.append(f"the outputs of {some.stack!r} are {rows} in the files, and not {out} together")
    problems += [
        f"{some.stack!r} has {experts} experts: {key!r} is unknown" for (n, _), key in keys.items() if n >= experts
    ]
    for place in ((expert, leaf) for expert in range(experts) for leaf in some.leaves):
        if place in keys:
            form = f"{tensor.dtype} {(rows[place[1]], *others)}"
            problems += _unlike(keys[place], stored[place], form)
        else:
            problems.append(f"{some.module(*place)!r} is missing, of which {some.stack!r} is made")
    return tuple(tuple(keys.get((expert, leaf), "") for leaf in some.leaves) for expert in range(experts))


def _untied(keys: Sequence[str], checkpoint: Checkpoint) -> list[str]:
    """Return the problem that a tensor which has several names was stored under these with several values."""
    one, *others = (checkpoint.find(key) for key in keys)
    return [
        f"{keys[0]!r} and {other[1].name!r} have other values, and are one tensor of the graph: trace a model whose config does not tie them"
        for other in others
        if not equal_in_files(one, other, one[1].dtype)
    ]


def _unlike(key: str, entry: TensorEntry, form: str) -> list[str]:
    """Return the problem that a tensor in a file has not the dtype and shape of another."""
    stored = f"{entry.dtype} {tuple(entry.shape)}"
    return [] if stored == form else [f"{key!r} is {stored}, not {form}"]


def _check_single(plain: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Refuse files beside those of the checkpoint that have its tensors too, since torch reads all that there are."""
    own: set[Path] = {file.path for file in checkpoint.files}
    for path in sorted(checkpoint.model.glob("*.safetensors")):
        also = [key for key in plain.values() if path not in own and key in TensorFile.open(path).entries]
        if also:
            raise LoraFxError(f"{path} has {also[0]!r} too, beside the checkpoint's own files: move it away.")


_MAX_NAMED = 10
