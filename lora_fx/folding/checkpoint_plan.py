"""Adapters folded into a checkpoint on disk, without a model in memory.

The model is traced on the meta device from its config; the adapters are attached to that graph as they would be to one with
weights, and the recipe of its fold says which updates go to which weight, and in which layout it is stored. So all refusals
come before a byte is written. Only then are tensors read, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lora_fx.adapters.attach import attach
from lora_fx.adapters.peft_format.fingerprint import fingerprint_on_disk
from lora_fx.adapters.peft_format.opening import AdapterFiles, check_base, read_adapter
from lora_fx.adapters.peft_format.reading import (
    AdapterContents,
    another_value,
    equal_as_saved,
    is_of_embedding,
    read_contents,
    resized_and_adapted,
    warn_of_embeddings,
    warn_of_rounding,
)
from lora_fx.adapters.peft_format.stacks import StackLayout
from lora_fx.adapters.recorded import plan_branches
from lora_fx.errors import AdapterError, FoldError, LoraFxError, listed
from lora_fx.files.safetensors import equal_in_files
from lora_fx.folding.checkpoint import Changes, Checkpoint
from lora_fx.folding.checkpoint_check import changed_in_files, check_fits
from lora_fx.folding.checkpoint_files import Companions, companions_of, skipped_lines
from lora_fx.folding.checkpoint_write import CheckpointReport, write_merged
from lora_fx.folding.fold import recipe
from lora_fx.graph.adapter_names import adapter_of, original_name
from lora_fx.graph.graph_module import TracedGraphModule, state_of
from lora_fx.graph.state import State
from lora_fx.numerics.lowrank_merge import Merge, Update
from lora_fx.rules.plain_numbers import finite_number
from lora_fx.text_table import new_table, text_lines
from lora_fx.tracing.example_inputs import read_example_inputs
from lora_fx.tracing.trace import trace
from lora_fx.tracing.transformers_models import empty_model, untie_as_loaded


@dataclass(frozen=True)
class CheckpointFold:
    """Plan of a fold of a checkpoint.

    Attributes:
        checkpoint: the base.
        changes: merges and replacements of its tensors.
        adapters: the directories, each with its strength.
        companions: the other files of the base, those that go along and those that are skipped.
        untied: pairs of parameters that the config ties, and for which the files have two values.
        reads: the files and directories beside the base that the result is made from, which are not written over.
    """

    checkpoint: Checkpoint
    changes: Changes
    adapters: tuple[tuple[Path, float], ...]
    companions: Companions
    untied: tuple[tuple[str, str], ...] = ()
    reads: tuple[Path, ...] = ()

    @property
    def changed_bytes(self) -> int:
        """Number of bytes of the tensors that change."""
        changed = {*self.changes.merges, *self.changes.replacements}
        return sum(self.checkpoint.find(key)[1].size for key in changed)

    @property
    def untied_lines(self) -> list[str]:
        """Return a line for each pair that the config ties and the files do not."""
        return [
            f"{source} and {name} are two tensors with other values, and stay apart, as transformers loads them. The config ties them: set "
            "tie_word_embeddings to false for programs that go by it alone"
            for source, name in self.untied
        ]

    def __str__(self) -> str:
        table = new_table()
        for heading in ("tensor", "dtype", "shape", "layout", "what is done"):
            table.add_column(heading, no_wrap=True)
        for key, (_, entry) in self.checkpoint.tensors.items():
            merge = self.changes.merges.get(key)
            if merge is None and key not in self.changes.replacements:
                continue
            done = "replaced" if merge is None else " + ".join(map(self._product_text, merge.updates))
            shape = " × ".join(map(str, entry.shape))
            table.add_row(key, str(entry.dtype).removeprefix("torch."), shape, merge.layout if merge else "", done)
        changed = len(self.changes.merges) + len(self.changes.replacements)
        copied = len(self.checkpoint.tensors) - changed
        return "\n".join(
            [
                *text_lines(table),
                *(f"adapter {directory} at strength {strength:g}" for directory, strength in self.adapters),
                *self.untied_lines,
                f"{changed} tensors, {self.changed_bytes / 1e6:.1f} MB, change; {copied} tensors, "
                f"{(self.checkpoint.size - self.changed_bytes) / 1e6:.1f} MB with the headers, are copied as they are",
                f"copied too: {listed(self.companions.files, _MAX_NAMED)}",
                *skipped_lines(self.companions.skipped),
            ]
        )

    def _product_text(self, update: Update) -> str:
        rank = self.changes.tensors[update.factors[0].name].shape[0]
        return f"{update.scaling:g} · B A of rank {rank}"

    def write(
        self,
        out: str | Path,
        *,
        overwrite: bool = False,
        verify: bool = False,
        report: bool = False,
        progress: Callable[[int], object] = lambda _: None,
    ) -> CheckpointReport:
        """Write the merged checkpoint.

        Args:
            out: the directory to be made, beside which it is written first.
            overwrite: replace a directory that holds nothing but an earlier result.
            verify: read every changed tensor again, and compare it with the exact result.
            report: read every merged tensor again, before and after, and measure the update.
            progress: called with the number of bytes that were written since the last call.

        Raises:
            FoldError: a result is not finite, or not the exact one.
            LoraFxError: ``out`` is read, exists and is not to be replaced, or cannot be written. Nothing is left then.
        """
        return write_merged(
            self.checkpoint,
            self.changes,
            Path(out),
            reads=self.reads,
            overwrite=overwrite,
            verify=verify,
            report=report,
            progress=progress,
        )


def plan_checkpoint_fold(
    base: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    *,
    strict: bool = True,
    stacks: Sequence[StackLayout | None] = (),
    ignore_config_keys: Collection[str] = (),
    example_inputs: Path | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> CheckpointFold:
    """Plan the fold of adapters into a checkpoint, tensor by tensor. Read are only those that the config ties and the files have twice.

    Args:
        base: directory with a ``config.json`` and safetensors files, or of sentence-transformers.
        adapters: directories as PEFT or :func:`lora_fx.save_adapter` write them, each with the factor of its scaling.
        strict: see :func:`lora_fx.load_adapter`.
        stacks: see :func:`lora_fx.load_adapter`; one for each adapter, or none.
        ignore_config_keys: see :func:`lora_fx.load_adapter`.
        example_inputs: a safetensors file of the inputs to trace with, by name; by default they are made from the config.
        step: called with the name of each step, for a display.

    Raises:
        AdapterError: an adapter is malformed, or does not fit the model.
        FoldError: a weight would need different values at its uses, or is not stored as the model has it.
        TraceError: the model cannot be traced.
        LoraFxError: the directory is no checkpoint of a transformers model.
    """
    if not adapters:
        raise LoraFxError("there is nothing to fold: name at least one adapter directory.")
    checkpoint = Checkpoint.open(Path(base))
    companions = companions_of(checkpoint)
    adapters = [(directory, _strength(directory, given)) for directory, given in adapters]
    if stacks and len(stacks) != len(adapters):
        raise LoraFxError(f"stacks: expected a layout or None for each of {len(adapters)} adapters, got {len(stacks)}.")
    layouts = stacks or [None] * len(adapters)
    opened = [
        read_adapter(Path(directory), layout, ignore_config_keys)
        for (directory, _), layout in zip(adapters, layouts, strict=True)
    ]
    step("reading the config")
    model = empty_model(checkpoint.model)
    _check_not_quantised(model, checkpoint.model)
    _check_weights_named(model, checkpoint)
    places = _Places.of(model, checkpoint)
    untied = untie_as_loaded(model, places.plain, partial(places.equal, dtype=getattr(model.config, "dtype", None)))
    step(f"tracing {type(model).__name__}")
    inputs = None if example_inputs is None else read_example_inputs(example_inputs, model)
    graph_module = trace(model, inputs, inference=True)
    step("fitting the adapters")
    base_fingerprint = places.fingerprint(state_of(graph_module))
    names = _all_names(state_of(graph_module))
    factors: dict[str, torch.Tensor] = {}
    copies: dict[str, torch.Tensor] = {}
    trained_by: dict[str, int] = {}
    for index, (files, (_, strength)) in enumerate(zip(opened, adapters, strict=True)):
        check_base(files, base_fingerprint, strict=strict)
        contents = _with_embeddings(files, read_contents(files, graph_module), places, graph_module)
        _check_copies(files, contents.copies, strength, copies)
        name = f"adapter_{index}"
        values = contents.values_of(name, trainable=False)
        graph_module = _attached(graph_module, contents, name, strength, values)
        factors |= {key: value.detach() for key, value in values.items() if original_name(key) is None}
        copies |= contents.copies
        stored = {copied: places.of_names(names[copied]) for copied in contents.copies}
        dtypes = {copied: checkpoint.find(keys[0])[1].dtype for copied, keys in stored.items()}
        warn_of_rounding(files.directory, contents.copies, dtypes, stacklevel=2)
        trained_by |= {key: index for keys in stored.values() for key in keys}
    merges = {key: merge for merge in _recipe(graph_module) for key in places.of_names(merge.names)}
    replaced = {key: value for name, value in copies.items() for key in places.of_names(names[name])}
    _check_apart(merges, replaced, trained_by, [directory for directory, _ in adapters])
    changes = Changes(merges=merges, replacements=replaced, tensors=factors)
    check_fits(checkpoint, changes)
    changed_in_files(checkpoint, changes)
    pairs = tuple((Path(directory), strength) for directory, strength in adapters)
    reads = (*(directory for directory, _ in pairs), *([] if example_inputs is None else [example_inputs]))
    return CheckpointFold(checkpoint, changes, pairs, companions, untied, reads)


_MAX_NAMED = 10


def _strength(directory: str | Path, given: float) -> float:
    strength = finite_number(given)
    if strength is None:
        raise LoraFxError(f"{directory}: expected a finite number as strength, got {given!r}.")
    return strength


def fold_checkpoint(
    base: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    *,
    strict: bool = True,
    stacks: Sequence[StackLayout | None] = (),
    ignore_config_keys: Collection[str] = (),
    example_inputs: Path | None = None,
    overwrite: bool = False,
    verify: bool = False,
    report: bool = False,
) -> CheckpointReport:
    """Fold adapters into a checkpoint on disk: :func:`plan_checkpoint_fold`, then :meth:`CheckpointFold.write`."""
    planned = plan_checkpoint_fold(
        base,
        adapters,
        strict=strict,
        stacks=stacks,
        ignore_config_keys=ignore_config_keys,
        example_inputs=example_inputs,
    )
    return planned.write(out, overwrite=overwrite, verify=verify, report=report)


def _check_copies(
    files: AdapterFiles, copies: Mapping[str, torch.Tensor], strength: float, others: Mapping[str, torch.Tensor]
) -> None:
    """Refuse trained values at another strength than 1, and those of which an earlier adapter has others."""
    problems = [f"{name}: another adapter has trained values too" for name in sorted(copies.keys() & others.keys())]
    if copies and strength != 1:
        problems = [f"has trained values of {', '.join(copies)}, which have no other strength than 1"]
    if problems:
        raise AdapterError(str(files.directory), problems)


def _check_apart(
    merges: Mapping[str, Merge],
    replaced: Mapping[str, torch.Tensor],
    trained_by: Mapping[str, int],
    directories: Sequence[str | Path],
) -> None:
    """Refuse to add to a tensor of which another adapter has a trained value: both are changes to the same old one."""
    problems = []
    for key in [key for key in merges if key in replaced]:
        factors = (adapter_of(name) for update in merges[key].updates for name in update.names)
        adding = sorted({int(name.removeprefix("adapter_")) for name in factors if name is not None})
        problems.append(
            f"{key!r} is to be both added to, by {' and '.join(str(directories[index]) for index in adding)}, and replaced, by "
            f"{directories[trained_by[key]]}"
        )
    if problems:
        raise FoldError(f"{'; '.join(problems)}. Leave one of the two adapters out.")


def _with_embeddings(
    files: AdapterFiles, contents: AdapterContents, places: _Places, graph_module: TracedGraphModule
) -> AdapterContents:
    """Compare what an adapter's file has of the model's own tensors with the checkpoint; embeddings that differ are trained copies."""
    problems, found, names = [], {}, _all_names(state_of(graph_module))
    adapted = {f"{branch.owner}.weight" for _, branch in contents.branches.values()}
    for name, key in contents.echoes.items():
        for place in places.of_names(names[name]):
            own, value = places.checkpoint.read(place), files.file.read(key)
            if own.shape == value.shape and equal_as_saved(value, own):
                continue
            if not adapted.isdisjoint(names[name]):
                problems.append(resized_and_adapted(key, name))
            elif own.shape == value.shape and is_of_embedding(name, graph_module):
                found[names[name][0]] = value
            else:
                problems.append(another_value(key, name, own))
    if problems:
        raise AdapterError(str(files.directory), problems)
    warn_of_embeddings(files.directory, list(found), stacklevel=3)
    return replace(contents, copies={**contents.copies, **found})


def _all_names(state: State) -> dict[str, tuple[str, ...]]:
    """Return for each name of a tensor all that it has."""
    return {name: names for names in state.names().values() for name in names}


def _attached(
    graph_module: TracedGraphModule,
    contents: AdapterContents,
    adapter: str,
    strength: float,
    values: Mapping[str, nn.Parameter],
) -> TracedGraphModule:
    """Return the graph with an adapter whose values stay outside of it."""
    branches = {
        key: (rule, replace(branch, setting=replace(branch.setting, strength=strength)))
        for key, (rule, branch) in contents.branches.items()
    }
    plan = plan_branches(graph_module, adapter, branches, (), origin=contents.origin)
    empty = {name: nn.Parameter(value.to("meta"), requires_grad=False) for name, value in values.items()}
    return attach(graph_module, plan, adapter=adapter, values=empty, acts=True)


def _recipe(graph_module: TracedGraphModule) -> tuple[Merge, ...]:
    try:
        return recipe(graph_module)
    except FoldError as error:
        raise FoldError(
            f"{error} A checkpoint is untied by loading the model, setting config.tie_word_embeddings = False, giving each use a "
            "parameter of its own, and save_pretrained."
        ) from error


def _check_not_quantised(model: nn.Module, base: Path) -> None:
    quantisation = getattr(model.config, "quantization_config", None)
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise FoldError(
            f"{base}: its weights are quantised ({method or 'by an unnamed method'}), and nothing can be added to them. Fold into "
            "the checkpoint that they were made of, and quantise the result."
        )


def _check_weights_named(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Refuse a config that names other weights than those that are read where it names none."""
    named = getattr(model.config, "transformers_weights", None)
    used = (checkpoint.index or checkpoint.files[0].path).relative_to(checkpoint.model).as_posix()
    if named is not None and named != used:
        raise FoldError(
            f"{checkpoint.model}: expected the weights in {used}, found that config.json names {named!r} (transformers_weights), which "
            f"transformers loads. Rename that to {used}, and remove the key."
        )


@dataclass(frozen=True)
class _Places:
    """Where the tensors of a model are in its checkpoint.

    Attributes:
        checkpoint: it.
        plain: name in the model → key, for tensors that are stored as the model has them.
        converted: name in the model → keys, for tensors that transformers computes from others as it loads.
    """

    checkpoint: Checkpoint
    plain: Mapping[str, str]
    converted: Mapping[str, tuple[str, ...]]

    @staticmethod
    def of(model: nn.Module, checkpoint: Checkpoint) -> _Places:
        """Rename every key as transformers does when it loads it."""
        transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        prefix = getattr(model, "base_model_prefix", "") or None
        state = model.state_dict()
        made_of: dict[str, list[str]] = {}
        converts = set()
        for key in checkpoint.tensors:
            name, converter = rename_source_key(key, renamings, converters, prefix, state)
            made_of.setdefault(name, []).append(key)
            if converter is not None:
                converts.add(name)
        plain = {name: keys[0] for name, keys in made_of.items() if len(keys) == 1 and name not in converts}
        converted = {name: tuple(keys) for name, keys in made_of.items() if name not in plain}
        return _Places(checkpoint, plain, converted)

    def equal(self, one: str, other: str, *, dtype: torch.dtype | None) -> bool:
        """Tell whether two tensors that are stored as the model has them are equal when they are loaded in a dtype."""
        first, second = (self.checkpoint.find(self.plain[name]) for name in (one, other))
        return equal_in_files(first, second, dtype if dtype is not None else first[1].dtype)

    def fingerprint(self, state: State) -> dict[str, str | None]:
        """Return the fingerprint of the base, see :func:`lora_fx.adapters.peft_format.fingerprint.differences`."""
        found = {
            first: next((self.plain[name] for name in names if name in self.plain), None)
            for first, names in state.names().items()
            if first not in state.non_persistent
        }
        told = fingerprint_on_disk({n: self.checkpoint.find(key) for n, key in found.items() if key is not None})
        return {name: told.get(name) for name in found}

    def of_names(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the keys under which a tensor of the model with these names is stored; several where it is stored twice.

        Raises:
            FoldError: it is not in the checkpoint as the model has it.
        """
        keys = tuple(self.plain[name] for name in names if name in self.plain)
        if keys:
            return keys
        made_of = next((self.converted[name] for name in names if name in self.converted), ())
        if made_of:
            raise FoldError(
                f"{self.checkpoint.directory} does not store {names[0]!r} as the model has it: transformers makes it of "
                f"{listed(made_of, 3)}. Load the model, fold with lora_fx.from_adapter and lora_fx.fold, and write it with "
                "lora_fx.huggingface.save_pretrained."
            )
        raise FoldError(
            f"{self.checkpoint.directory} has no tensor for {' or '.join(map(repr, names))}, which an adapter changes. Is it the checkpoint of "
            "another model?"
        )
