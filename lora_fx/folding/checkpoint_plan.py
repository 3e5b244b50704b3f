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
from typing import Any

import torch
from torch import nn

from lora_fx.adapters.activate import check_whole_strength, tell_whole_copies
from lora_fx.adapters.attach import attach
from lora_fx.adapters.invocation import check_always_acts
from lora_fx.adapters.peft_format.base_class import base_class
from lora_fx.adapters.peft_format.opening import AdapterFiles, foldable, read_adapter
from lora_fx.adapters.peft_format.own_tensors import (
    another_value,
    equal_as_saved,
    is_of_embedding,
    resized_and_adapted,
    warn_of_embeddings,
    warn_of_rounding,
)
from lora_fx.adapters.peft_format.reading import AdapterContents, read_contents
from lora_fx.adapters.peft_format.renaming import fitted
from lora_fx.adapters.peft_format.stacks import StackLayout
from lora_fx.adapters.recorded import plan_branches
from lora_fx.adapters.tokens import row_numbers
from lora_fx.errors import AdapterError, FoldError, LoraFxError, listed
from lora_fx.folding.checkpoint import Changes, Checkpoint
from lora_fx.folding.checkpoint_check import changed_in_files, check_fits
from lora_fx.folding.checkpoint_files import Companions, companions_of, skipped_lines
from lora_fx.folding.checkpoint_places import Places, check_weights_named, tied_again, widened
from lora_fx.folding.checkpoint_write import CheckpointReport, write_merged
from lora_fx.folding.dense_base import dense_base
from lora_fx.folding.fold import recipe
from lora_fx.folding.report import product_text
from lora_fx.folding.trained_base import check_bases, trained_on
from lora_fx.graph.adapter_names import adapter_of, is_of_adapter, original_name
from lora_fx.graph.graph_module import TracedGraphModule, state_of
from lora_fx.graph.state import State
from lora_fx.numerics.lowrank_merge import Merge, rounded
from lora_fx.rules.plain_numbers import finite_number
from lora_fx.text_table import new_table, text_lines
from lora_fx.tracing.example_inputs import read_example_inputs
from lora_fx.tracing.trace import trace
from lora_fx.tracing.transformers_models import ModelChoice, empty_model, untie_as_loaded


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
        quantised: what becomes of quantised weights, in a line; None if there are none.
    """

    checkpoint: Checkpoint
    changes: Changes
    adapters: tuple[tuple[Path, float], ...]
    companions: Companions
    untied: tuple[tuple[str, str], ...] = ()
    reads: tuple[Path, ...] = ()
    quantised: str | None = None

    @property
    def changed(self) -> frozenset[str]:
        """Keys of the tensors that change: by adapters, or since they are, or were, quantised."""
        tensors = self.checkpoint.tensors
        computed = {key for key, (file, _) in tensors.items() if file.is_computed(key)}
        return frozenset({*self.changes.merges, *self.changes.replacements, *computed})

    @property
    def changed_bytes(self) -> int:
        """Number of bytes of the tensors that change."""
        return sum(self.checkpoint.find(key)[1].size for key in self.changed)

    @property
    def lines(self) -> list[str]:
        """Return a line for each pair that the config ties and the files do not, one for quantised weights, and one for another class."""
        told = [] if self.quantised is None else [self.quantised]
        told += [
            f"{source} and {name} are two tensors with other values, and stay apart, as transformers loads them. The config ties them: set "
            "tie_word_embeddings to false for programs that go by it alone"
            for source, name in self.untied
        ]
        if not self.changes.additions:
            return told
        added = listed(list(self.changes.additions), _MAX_NAMED)
        kind = self.changes.config["architectures"][0]
        return [
            *told,
            f"the result is a {kind}, which the adapter was trained on, in config.json too; added: {added}",
        ]

    def __str__(self) -> str:
        table = new_table()
        for heading in ("tensor", "dtype", "shape", "layout", "what is done"):
            table.add_column(heading, no_wrap=True)
        for key, (_, entry) in self.checkpoint.tensors.items():
            merge = self.changes.merges.get(key)
            if merge is None and key not in self.changes.replacements:
                continue
            done = "replaced" if merge is None else self._merge_text(merge)
            shape = " × ".join(map(str, entry.shape))
            table.add_row(key, str(entry.dtype).removeprefix("torch."), shape, merge.layout if merge else "", done)
        for key, value in self.changes.additions.items():
            shape = " × ".join(map(str, value.shape))
            table.add_row(key, str(value.dtype).removeprefix("torch."), shape, "", "added")
        changed = len(self.changed)
        copied = len(self.checkpoint.tensors) - changed
        return "\n".join(
            [
                *text_lines(table),
                *(f"adapter {directory} at strength {strength:g}" for directory, strength in self.adapters),
                *self.lines,
                f"{changed} tensors, {self.changed_bytes / 1e6:.1f} MB, change; {copied} tensors, "
                f"{(self.checkpoint.size - self.changed_bytes) / 1e6:.1f} MB with the headers, are copied as they are",
                f"copied too: {listed(self.companions.files, _MAX_NAMED)}",
                *skipped_lines(self.companions.skipped),
            ]
        )

    def _merge_text(self, merge: Merge) -> str:
        rows = [f"{self.changes.tensors[write.rows].numel()} rows replaced" for write in merge.writes]
        return " + ".join([*rows, *(product_text(each, self.changes.tensors) for each in merge.updates)])

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
    model_class: str | None = None,
    example_inputs: Path | None = None,
    quantised: str | None = None,
    not_quantised: Collection[str] | None = None,
    loaded_in: str | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> CheckpointFold:
    """Plan the fold of adapters into a checkpoint, tensor by tensor. Read are only those that the config ties and the files have twice.

    Args:
        base: directory with a ``config.json`` and safetensors files, or of sentence-transformers.
        adapters: directories as PEFT or :func:`lora_fx.save_adapter` write them, each with the factor of its scaling.
        strict: see :func:`lora_fx.load_adapter`.
        stacks: see :func:`lora_fx.load_adapter`; one for each adapter, or none.
        ignore_config_keys: see :func:`lora_fx.load_adapter`.
        model_class: name of the class of transformers that the adapters were trained on. By default it is the one that the config of the
            checkpoint names, or, where the adapters have modules that this has not, the one of their task (``task_type``) or that they
            name (``auto_mapping``). Trained modules that the checkpoint lacks, such as the head of a classifier, are added to it.
        example_inputs: a safetensors file of the inputs to trace with, by name; by default they are made from the config.
        quantised: how the base was quantised where the adapters were trained, ``"nf4"``, ``"nf4:double"``, ``"int8"``, ``"int4:64"``, …: they are
            added to what its weights become then. None: as the files are; those of bitsandbytes, GPTQ or AWQ are made dense in either case.
        not_quantised: modules that were not, as ``llm_int8_skip_modules`` names them; None for those that transformers skips by itself.
        loaded_in: dtype into which the model was loaded before it was quantised; None: as the adapters' files say, or else the checkpoint's.
        step: called with the name of each step, for a display.

    Raises:
        AdapterError: an adapter is malformed, or does not fit the model.
        PlanError: an adapter of DoRA has another strength than 1.
        FoldError: a weight would need different values at its uses, is not stored as the model has it, or cannot be quantised so.
        TraceError: the model cannot be traced.
        LoraFxError: the directory is no checkpoint of a transformers model.
    """
    if not adapters:
        raise LoraFxError("there is nothing to fold: name at least one adapter directory.")
    checkpoint = Checkpoint.open(Path(base))
    companions = companions_of(checkpoint)
    pairs = tuple((Path(directory), _strength(directory, given)) for directory, given in adapters)
    opened = _opened([directory for directory, _ in pairs], stacks, ignore_config_keys)
    step("reading the config")
    choice = base_class(checkpoint.model, opened, model_class)
    model = widened(empty_model(checkpoint.model, choice), checkpoint, opened)
    dense, places = dense_base(checkpoint, model, quantised, not_quantised, loaded_in, trained_on(opened))
    checkpoint = dense.checkpoint
    check_weights_named(model, checkpoint)
    untied = untie_as_loaded(model, places.plain, partial(places.equal, dtype=getattr(model.config, "dtype", None)))
    step(f"tracing {type(model).__name__}")
    inputs = None if example_inputs is None else read_example_inputs(example_inputs, model)
    graph_module = trace(model, inputs, inference=True)
    step("fitting the adapters")
    check_bases(opened, dense, places, state_of(graph_module), strict=strict)
    names = _all_names(state_of(graph_module))
    factors, copies, added = (dict[str, torch.Tensor]() for _ in range(3))
    trained_by: dict[str, int] = {}
    for index, (files, (_, strength)) in enumerate(zip(opened, pairs, strict=True)):
        contents = _contents(files, places, graph_module)
        check_whole_strength(str(files.directory), contents.branches, strength)
        check_always_acts(str(files.directory), contents.branches)
        own = _copies_of(files, contents, strength, copies)
        name = f"adapter_{index}"
        values = contents.values_of(name, trainable=False)
        graph_module = _attached(graph_module, contents, name, strength, values)
        factors |= _factors(values, row_numbers(contents.tokens, state_of(graph_module), name))
        copies |= own
        added |= {name: value for name, value in own.items() if choice and places.lacks(names[name])}
        stored = {copied: places.of_names(names[copied]) for copied in own if copied not in added}
        _tell_rounding(files, own, stored, added, checkpoint)
        trained_by |= {key: index for keys in stored.values() for key in keys}
    merges = {key: merge for merge in _recipe(graph_module) for key in places.of_names(merge.names)}
    replaced = {
        key: value for name, value in copies.items() if name not in added for key in places.of_names(names[name])
    }
    _check_apart(merges, replaced, trained_by, [directory for directory, _ in pairs])
    additions = _additions(added, choice, model, places, state_of(graph_module))
    changes = Changes(merges, replaced, factors, *additions, dense.dropped_config)
    check_fits(checkpoint, changes)
    changed_in_files(checkpoint, changes)
    reads = (*(directory for directory, _ in pairs), *([] if example_inputs is None else [example_inputs]))
    return CheckpointFold(checkpoint, changes, pairs, companions, untied, reads, dense.line)


_MAX_NAMED = 10


def _opened(
    directories: Sequence[Path], stacks: Sequence[StackLayout | None], ignore_config_keys: Collection[str]
) -> list[AdapterFiles]:
    if stacks and len(stacks) != len(directories):
        raise LoraFxError(
            f"stacks: expected a layout or None for each of {len(directories)} adapters, got {len(stacks)}."
        )
    pairs = zip(directories, stacks or [None] * len(directories), strict=True)
    return [foldable(read_adapter(directory, layout, ignore_config_keys)) for directory, layout in pairs]


def _strength(directory: str | Path, given: float) -> float:
    strength = finite_number(given)
    if strength is None:
        raise LoraFxError(f"{directory}: expected a finite number as strength, got {given!r}.")
    return strength


def _tell_rounding(
    files: AdapterFiles,
    own: Mapping[str, torch.Tensor],
    stored: Mapping[str, Sequence[str]],
    added: Collection[str],
    checkpoint: Checkpoint,
) -> None:
    """Warn of trained values that have more precision than the checkpoint gives them."""
    dtypes = {name: checkpoint.find(keys[0])[1].dtype for name, keys in stored.items()}
    warn_of_rounding(files.directory, own, dtypes | dict.fromkeys(added, checkpoint.usual_dtype))


def fold_checkpoint(
    base: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    *,
    strict: bool = True,
    stacks: Sequence[StackLayout | None] = (),
    ignore_config_keys: Collection[str] = (),
    model_class: str | None = None,
    example_inputs: Path | None = None,
    quantised: str | None = None,
    not_quantised: Collection[str] | None = None,
    loaded_in: str | None = None,
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
        model_class=model_class,
        example_inputs=example_inputs,
        quantised=quantised,
        not_quantised=not_quantised,
        loaded_in=loaded_in,
    )
    return planned.write(out, overwrite=overwrite, verify=verify, report=report)


def _copies_of(
    files: AdapterFiles, contents: AdapterContents, strength: float, others: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return trained values of parameters; refuse those of which an earlier adapter has others, log that a strength scales none of them."""
    copies, rows = {**contents.copies, **contents.statistics}, [f"rows of {each.weight}" for each in contents.tokens]
    problems = [f"{name}: another adapter has trained values too" for name in sorted(copies.keys() & others.keys())]
    if problems:
        raise AdapterError(str(files.directory), problems)
    tell_whole_copies(str(files.directory), strength, [*copies, *rows])
    return copies


def _check_apart(
    merges: Mapping[str, Merge],
    replaced: Mapping[str, torch.Tensor],
    trained_by: Mapping[str, int],
    directories: Sequence[str | Path],
) -> None:
    """Refuse to add to a tensor of which another adapter has a trained value: both are changes to the same old one."""
    problems = []
    for key in [key for key in merges if key in replaced]:
        factors = (adapter_of(name) for name in merges[key].read)
        adding = sorted({int(name.removeprefix("adapter_")) for name in factors if name is not None})
        problems.append(
            f"{key!r} is to be both added to, by {' and '.join(str(directories[index]) for index in adding)}, and replaced, by "
            f"{directories[trained_by[key]]}"
        )
    if problems:
        raise FoldError(f"{'; '.join(problems)}. Leave one of the two adapters out.")


def _contents(files: AdapterFiles, places: Places, graph_module: TracedGraphModule) -> AdapterContents:
    """Fit an adapter to the graph, and compare what it has of the model's own tensors with the checkpoint.

    Embeddings that differ, as those of a resized vocabulary do, are trained copies.
    """
    files = fitted(files, graph_module)
    names = _all_names(state_of(graph_module))
    contents = read_contents(files, graph_module, lambda name: places.start(names[name]))
    problems, found = [], {}
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
    warn_of_embeddings(files.directory, list(found))
    return tied_again(replace(contents, copies={**contents.copies, **found}), names, files)


def _additions(
    added: Mapping[str, torch.Tensor], choice: ModelChoice | None, model: nn.Module, places: Places, state: State
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors that a checkpoint gets for another class, in the dtype of its others, and what its config says of that class.

    Raises:
        LoraFxError: the class has further tensors that neither the checkpoint nor an adapter has.
    """
    if choice is None or not added:
        return {}, {}
    lacking = [
        first
        for first, names in state.names().items()
        if first not in added and first not in state.non_persistent and not is_of_adapter(first) and places.lacks(names)
    ]
    kind = choice.model_class.__name__
    if lacking:
        raise LoraFxError(
            f"{places.checkpoint.directory}: neither it nor an adapter has values for {listed(lacking, _MAX_NAMED)} of {kind}, which were "
            "random where the adapter was trained. Fold into the checkpoint that it was trained on."
        )
    dtype = places.checkpoint.usual_dtype
    config: Any = model.config
    said: dict[str, Any] = {"architectures": [kind]}
    if choice.labels is not None:
        said |= {"id2label": {str(key): name for key, name in config.id2label.items()}, "label2id": config.label2id}
    return {name: rounded(value.detach().cpu(), dtype).contiguous() for name, value in added.items()}, said


def _all_names(state: State) -> dict[str, tuple[str, ...]]:
    """Return for each name of a tensor all that it has."""
    return {name: names for names in state.names().values() for name in names}


def _attached(
    graph_module: TracedGraphModule,
    contents: AdapterContents,
    adapter: str,
    strength: float,
    values: Mapping[str, torch.Tensor],
) -> TracedGraphModule:
    """Return the graph with an adapter whose values stay outside of it."""
    branches = {
        key: (rule, replace(branch, setting=replace(branch.setting, strength=strength)))
        for key, (rule, branch) in contents.branches.items()
    }
    plan = plan_branches(graph_module, adapter, branches, (), origin=contents.origin, tokens=contents.tokens)
    empty = {name: nn.Parameter(value.to("meta"), requires_grad=False) for name, value in values.items()}
    return attach(graph_module, plan, adapter=adapter, values=empty, acts=True)


def _factors(values: Mapping[str, torch.Tensor], rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors that merges name: an adapter's values, without trained copies, and the numbers of its rows."""
    return {**rows, **{key: value.detach() for key, value in values.items() if original_name(key) is None}}


def _recipe(graph_module: TracedGraphModule) -> tuple[Merge, ...]:
    try:
        return recipe(graph_module)
    except FoldError as error:
        raise FoldError(
            f"{error} A checkpoint is untied by loading the model, setting config.tie_word_embeddings = False, giving each use a "
            "parameter of its own, and save_pretrained."
        ) from error
