"""Adapters in and out of directories: in PEFT's format, ``adapter_config.json`` and ``adapter_model.safetensors``, and in other tools' forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch
from torch import fx, nn

from lora_fx.adapters.activate import tell_waiting
from lora_fx.adapters.attach import attach
from lora_fx.adapters.peft_format.fingerprint import fingerprint, metadata
from lora_fx.adapters.peft_format.foreign_formats import foreign_file
from lora_fx.adapters.peft_format.foreign_formats.diffusers import to_diffusers
from lora_fx.adapters.peft_format.foreign_formats.kohya import to_kohya
from lora_fx.adapters.peft_format.keys import base_key
from lora_fx.adapters.peft_format.opening import AdapterFiles, check_base, read_adapter
from lora_fx.adapters.peft_format.reading import AdapterContents, read_contents
from lora_fx.adapters.peft_format.stacks import StackLayout
from lora_fx.adapters.peft_format.tensors import FILE_NAME, PICKLE_NAME
from lora_fx.adapters.peft_format.writing import PeftAdapter, module_paths, to_peft
from lora_fx.adapters.recorded import (
    branches_of,
    free_names,
    moved_statistics,
    origin_of,
    plan_branches,
    record_of,
    trained_of,
    with_training,
)
from lora_fx.adapters.transfer import differences, prefix_differences, row_differences
from lora_fx.branches.invariants import checked
from lora_fx.branches.lower import lower
from lora_fx.errors import AdapterError, PlanError, listed, warn
from lora_fx.files.atomic import replacing
from lora_fx.files.safetensors import write_tensors
from lora_fx.files.target import DirectoryKind, Target
from lora_fx.graph.adapter_names import adapters
from lora_fx.graph.adapter_states import trained_names
from lora_fx.graph.cached_graphs import CachedGraphs, check_undivided, check_whole
from lora_fx.graph.graph_module import TracedGraphModule, as_traced, rebuilt, state_of
from lora_fx.graph.info import RuledBranches, info_of
from lora_fx.graph.joined_graphs import Graphs, through, whole
from lora_fx.graph.records import BranchSpec
from lora_fx.graph.sharded import from_first_process, on_first_process
from lora_fx.graph.state import State
from lora_fx.numerics.lowrank_merge import with_all_rows
from lora_fx.planning.attention_projections import warn_of_double_updates
from lora_fx.rules.peft_config.config import CONFIG_NAME
from lora_fx.rules.peft_config.prefix_config import AheadConfig
from lora_fx.rules.validation import shown
from lora_fx.tracing.model_state import unwrapped
from lora_fx.tracing.replicated_layers import trace_with_layers
from lora_fx.tracing.torch_export import Dynamic


@overload
def from_adapter(
    model: nn.Module,
    directory: str | Path,
    adapter: str = "default",
    *,
    trainable: bool = False,
    strict: bool = True,
    stacks: StackLayout | None = None,
    ignore_config_keys: Collection[str] = (),
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    dynamic: Dynamic | None = None,
    inference: bool = False,
    cache: Literal[False] = False,
) -> TracedGraphModule: ...


@overload
def from_adapter(
    model: nn.Module,
    directory: str | Path,
    adapter: str = "default",
    *,
    trainable: bool = False,
    strict: bool = True,
    stacks: StackLayout | None = None,
    ignore_config_keys: Collection[str] = (),
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    dynamic: Dynamic | None = None,
    inference: bool = False,
    cache: bool,
) -> TracedGraphModule | CachedGraphs: ...


def from_adapter(
    model: nn.Module | CachedGraphs,
    directory: str | Path,
    adapter: str = "default",
    *,
    trainable: bool = False,
    strict: bool = True,
    stacks: StackLayout | None = None,
    ignore_config_keys: Collection[str] = (),
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    dynamic: Dynamic | None = None,
    inference: bool = False,
    cache: bool = False,
) -> TracedGraphModule | CachedGraphs:
    """Return a new graph of ``model`` with the adapter that a directory holds: its targets, ranks, scalings and values.

    Args:
        model: a module, or a graph of lora_fx, to which it is added as by :func:`load_adapter`; not changed.
        directory: with ``adapter_config.json``, and ``adapter_model.safetensors`` or ``adapter_model.bin``, as PEFT or
            :func:`save_adapter` writes them; or with a whole ``PeftModel.state_dict()`` in place of the tensors. Or a safetensors
            file, or a directory with one, of diffusers (``pytorch_lora_weights.safetensors``) or with kohya's keys; what such a file
            has for other models of a pipeline is left out, with a warning.
        adapter: name for it in the graph.
        trainable: whether it trains.
        strict: see :func:`load_adapter`.
        stacks: see :func:`load_adapter`.
        ignore_config_keys: see :func:`load_adapter`.
        example_inputs: see :func:`lora_fx.trace`.
        dynamic: see :func:`lora_fx.trace`.
        inference: trace the eval mode only and train nothing.
        cache: trace with the key-value cache as inputs and outputs; see :func:`lora_fx.trace`.

    Raises:
        AdapterError: see :func:`load_adapter`.
        PlanError: see :func:`load_adapter`; or PEFT wraps the model.
        TraceError: the model cannot be traced.
    """
    given = model if isinstance(model, CachedGraphs) else unwrapped(model)
    # A malformed directory is refused before the model is traced.
    files = read_adapter(Path(directory), stacks, ignore_config_keys)
    loading = _loading(files, adapter, trainable, strict)
    if isinstance(given, CachedGraphs):
        return through(given, loading)
    settings: dict[str, Any] = {
        "dynamic": dynamic,
        "inference": inference,
        "prefix": files.prefix is not None and not cache and files.prefix.traced,
    }
    graphs = trace_with_layers(given, files.config.layer_replication, example_inputs, cache=cache, **settings)
    return through(graphs, loading)


def load_adapter(
    graph_module: Graphs,
    directory: str | Path,
    adapter: str = "default",
    *,
    trainable: bool | None = None,
    strict: bool = True,
    stacks: StackLayout | None = None,
    ignore_config_keys: Collection[str] = (),
) -> Graphs:
    """Return a new graph with the adapter that a directory holds.

    The first adapter of a graph acts. A further one stays in it without nodes, and waits for :func:`~lora_fx.activate`, as in PEFT.
    An adapter of this name that the graph has already is given the values; it must have the same branches. Where it has branches
    for parts of a fused projection, which :func:`save_adapter` writes as one, each takes the ranks and rows that are its own.
    Factors are converted to the dtype that they have in the graph, if that loses nothing.

    Args:
        graph_module: not changed; or the graphs of an encoder-decoder model with a cache.
        directory: see :func:`from_adapter`.
        adapter: name for it in the graph.
        trainable: whether it trains while it acts. By default a new adapter does not, and one that the graph has already goes on as
            it is.
        strict: whether another base than the adapter's own, by the fingerprint in its file, is an error. If not, it is a warning
            that lists every tensor that differs.
        stacks: how the file has the factors of stacked experts (``target_parameters``), which PEFT changed in 0.19.0 and 0.19.1:
            ``"as_stored"``, with A on the first dimension of each expert's matrix, or ``"exchanged"``, on its last. Told by the
            shapes, or else by ``peft_version``; asked for where neither tells, and then needed.
        ignore_config_keys: keys of ``adapter_config.json`` that lora_fx does not know, and of which you know that they have no effect
            on the result. Those that are there and are switched on are named in one warning; without this they are an error.

    Raises:
        AdapterError: the directory is malformed, of an unsupported kind, or does not fit the graph. All problems are named.
        PlanError: the adapter does not fit beside the other adapters of the graph.
    """
    files = read_adapter(Path(directory), stacks, ignore_config_keys)
    return through(graph_module, _loading(files, adapter, trainable, strict))


def _loading(
    files: AdapterFiles, adapter: str, trainable: bool | None, strict: bool
) -> Callable[[TracedGraphModule], TracedGraphModule]:
    def loaded(graph_module: TracedGraphModule) -> TracedGraphModule:
        found = with_adapter(graph_module, files, adapter, trainable=trainable, strict=strict)
        if adapter not in adapters(graph_module):
            tell_waiting(found, adapter)
        return found

    return loaded


def with_adapter(
    graph_module: TracedGraphModule, files: AdapterFiles, adapter: str, *, trainable: bool | None, strict: bool
) -> TracedGraphModule:
    """Return the graph with an adapter from a directory that was opened, see :func:`load_adapter`."""
    check_undivided(graph_module)
    graph_module = _traced(graph_module)
    check_base(files, fingerprint(_base_of(graph_module)), strict=strict)
    contents = read_contents(files, graph_module)
    if adapter not in adapters(graph_module):
        values = contents.values_of(adapter, trainable=bool(trainable))
        plan = plan_branches(
            graph_module,
            adapter,
            contents.branches,
            contents.trained,
            origin=contents.origin,
            tokens=contents.tokens,
            prefix=contents.prefix and contents.prefix[0],
        )
        if trainable:
            warn_of_double_updates(plan, graph_module)
        return attach(graph_module, plan, adapter=adapter, values=values)
    return _with_values(graph_module, adapter, contents, trainable)


def save_adapter(
    graph_module: TracedGraphModule | CachedGraphs,
    directory: str | Path,
    adapter: str = "default",
    *,
    format: Literal["peft", "diffusers", "kohya"] = "peft",
    overwrite: bool = False,
) -> None:
    """Write an adapter as PEFT does: ``PeftModel.from_pretrained(model, directory)`` computes what the graph computes.

    The file's metadata also name the rules, the versions, and a fingerprint of the base: the dtype, the shape and a digest of up
    to 4096 elements of each tensor, and how it is quantised, if it is. Branches of parts of a fused projection become one for
    all of its features, whose B has zeros in the rows of the others. It is written beside the target and moved into
    place.

    Args:
        graph_module: with the adapter; not changed. Or the graphs of an encoder-decoder model with a cache. Every process calls this with
            a graph that FSDP shards, and the first writes; where it cannot, all raise.
        directory: to be made.
        adapter: its name, which does not appear in the files.
        format: ``"diffusers"`` writes ``pytorch_lora_weights.safetensors`` for ``load_lora_weights`` of the pipeline that the model
            is of, with its keys under ``unet.``, ``transformer.`` or ``text_encoder.`` by the class of the model, or else without
            a prefix. ``"kohya"`` writes a file of that name with kohya's keys (``lora_unet_…`` and the like) and an alpha for each
            module. Both have factors of linear layers and convolutions alone.
        overwrite: replace a directory that holds nothing but an adapter.

    Raises:
        PlanError: the graph has no such adapter.
        AdapterError: the format has no way to say what the adapter is. All problems are named.
        WriteError: the directory exists, or cannot be written.
    """
    if format not in get_args(foreign_file.Form) and format != "peft":
        raise AdapterError("format", [f"expected 'peft', 'diffusers' or 'kohya', got {shown(format)}"])
    target = Target(Path(directory), overwrite, kind=_ADAPTER)

    def write(graph_module: TracedGraphModule) -> None:
        graph_module = _traced(graph_module)
        content = to_peft(graph_module, adapter)
        foreign = None if format == "peft" else _in_form(graph_module, content, format)
        _warn_of_statistics(graph_module, content)
        with replacing(target) as beside:
            beside.mkdir()
            if foreign is None:
                _write(graph_module, adapter, content, beside / FILE_NAME)
            else:
                tensors, said = foreign
                said = {**metadata(origin_of(graph_module, adapter), _base_of(graph_module)), **said}
                write_tensors(beside / foreign_file.FILE_NAME, tensors, said)

    graph = as_traced(whole(graph_module))
    from_first_process(graph, target.check)
    on_first_process(graph, write)


def _in_form(
    graph_module: TracedGraphModule, content: PeftAdapter, form: foreign_file.Form
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the metadata of an adapter in a form of other tools."""
    if isinstance(content.config, AheadConfig):
        raise AdapterError(
            f"format {form!r}",
            [f"has factors of layers alone, and the adapter is a {content.config.kind}: write it for PEFT"],
        )
    model_class = info_of(graph_module).model_class
    if form == "diffusers":
        return to_diffusers(content.config, content.tensors, model_class)
    return to_kohya(content.config, content.tensors, module_paths(graph_module), model_class)


def write_adapter_files(graph_module: TracedGraphModule, directory: Path, adapter: str) -> None:
    """Write the files of an adapter into a directory, which is made where it is missing; other files in it stay.

    Args:
        graph_module: with the adapter; not changed.
        directory: such as a checkpoint of a trainer, which has files of its own. An adapter in it is replaced.
        adapter: its name.

    Raises:
        PlanError: the graph has no such adapter.
        AdapterError: PEFT has no way to say what the adapter is. All problems are named.
        WriteError: the directory cannot be written to.
    """
    graph_module = _traced(graph_module)
    content = to_peft(graph_module, adapter)
    _warn_of_statistics(graph_module, content)
    with replacing(Target(directory / FILE_NAME, overwrite=True)) as beside:
        _write(graph_module, adapter, content, beside)


def check_writable(graph_module: TracedGraphModule, adapter: str) -> None:
    """Raise what :func:`save_adapter` would raise for the adapter itself, wherever it is written to."""
    to_peft(_traced(graph_module), adapter)


def _write(graph_module: TracedGraphModule, adapter: str, content: PeftAdapter, file: Path) -> None:
    """Write the file of an adapter's tensors, and its config beside it."""
    write_tensors(file, content.tensors, metadata(origin_of(graph_module, adapter), _base_of(graph_module)))
    file.with_name(CONFIG_NAME).write_text(content.config.to_json())


_ADAPTER = DirectoryKind(
    "an adapter", {CONFIG_NAME, FILE_NAME, PICKLE_NAME, foreign_file.FILE_NAME, "README.md"}.__contains__
)  # PEFT adds the last


def _base_of(graph_module: TracedGraphModule) -> State:
    """Return the state of the base as it was traced: without what training has made of running statistics."""
    return state_of(graph_module).with_tensors(info_of(graph_module).statistics)


def _warn_of_statistics(graph_module: TracedGraphModule, content: PeftAdapter) -> None:
    """Warn of batch norms whose running statistics training has moved, and the adapter does not have."""
    moved = moved_statistics(graph_module)
    norms = dict.fromkeys(path for name, path in moved.items() if base_key(name, ()) not in content.tensors)
    if norms:
        warn(
            f"training has moved the running statistics of {listed(list(norms), 8)}, and the adapter is saved without them, as PEFT does: "
            "whoever loads it gets those of the base, and other numbers than this graph. Save these modules with the adapter "
            "(modules_to_save, trainable), put them into eval mode before the model is rewritten, or save the merged model "
            "(huggingface.save_pretrained, or the state dict of lora_fx.fold(graph)).",
        )


def _traced(graph_module: fx.GraphModule) -> TracedGraphModule:
    """Return a graph of lora_fx as plain nodes with weights; refuse anything else."""
    traced = as_traced(graph_module)
    check_whole(traced)
    if any(parameter.is_meta for parameter in traced.parameters()):
        raise PlanError("the graph is on the meta device, without weights: lora_fx.materialize gives it some.")
    return lower(traced)


def _with_values(
    graph_module: TracedGraphModule, adapter: str, contents: AdapterContents, trainable: bool | None
) -> TracedGraphModule:
    """Return a graph whose adapter, which must be like that of the directory, has other values."""
    mine = branches_of(graph_module, adapter)
    contents = _in_parts(contents, [branch for _, branch in mine.values()])
    contents = _beside_starts(contents, mine, adapter, state_of(graph_module))
    values = contents.values_of(adapter, trainable=True)
    # Dropout is how the graph trains, and no property of the values.
    dropout = {branch.owner: branch.setting.dropout for _, branch in mine.values()}
    theirs = {
        key: (rule, replace(b, setting=replace(b.setting, dropout=dropout.get(b.owner, b.setting.dropout))))
        for key, (rule, b) in contents.branches.items()
    }
    unlike = differences(mine, theirs)
    own, given = (
        {(each.name, each.untied) for each in trained}
        for trained in (trained_of(graph_module, adapter), contents.trained)
    )
    unlike += row_differences(record_of(graph_module, adapter).tokens, contents.tokens)
    unlike += [f"{name}: trains in one of them only" for name in sorted({name for name, _ in own ^ given})]
    unlike += prefix_differences(record_of(graph_module, adapter).prefix, contents.prefix and contents.prefix[0])
    if unlike:
        problem = f"the graph's adapter {adapter!r} is another than the directory's; load it under another name, or with from_adapter"
        raise AdapterError(problem, unlike)
    free = free_names(graph_module, adapter).intersection(n for n, value in values.items() if value.requires_grad)
    trains = trained_names(graph_module, adapter) if trainable is None else free if trainable else frozenset()
    return checked(with_training(rebuilt(graph_module, tensors=values), adapter, trains), "branched")


def _beside_starts(contents: AdapterContents, branches: RuledBranches, adapter: str, state: State) -> AdapterContents:
    """Return the contents with the factors beside what a start left of the weight, where they are those of an update of the weight.

    The inverse of writing them: the second half of the rank has the first factors of the graph's branch.
    """
    found, factors = dict(contents.branches), dict(contents.factors)
    for key, (rule, branch) in branches.items():
        _, theirs = found.get(key, ("", None))
        if not branch.splits or theirs is None or theirs.splits or theirs.setting.rank != branch.added.rank:
            continue
        a, b = factors[key]
        a0, b0 = (state.tensors[name].to(a.dtype) for name in branch.names(adapter).starts)
        rank, scale = branch.setting.rank, branch.setting.scale
        same = math.isclose(theirs.setting.scale, scale, rel_tol=1e-12)  # an alpha for twice the rank is rounded
        if same and torch.equal(a[rank:], a0) and torch.equal(b[:, rank:], -b0):
            found[key] = rule, branch
            factors[key] = a[:rank].clone(), b[:, :rank].clone()
    return replace(contents, branches=found, factors=factors)


def _in_parts(contents: AdapterContents, branches: Sequence[BranchSpec]) -> AdapterContents:
    """Return the contents with branches for parts of fused projections in place of each that is the sum of such ones.

    The inverse of writing them as one: their ranks lie one after the other, and B has zeros in the rows of all other features.

    Args:
        contents: with one branch for all features of a site.
        branches: of the graph, in the order in which they are written.
    """
    parts: dict[str, list[BranchSpec]] = {}
    for branch in branches:
        if branch.features is not None:
            parts.setdefault(branch.owner, []).append(branch)
    found, factors = dict(contents.branches), dict(contents.factors)
    for owner, each in parts.items():
        ranks = [branch.setting.rank for branch in each]
        rule, whole = found.get(owner, ("", None))
        if (
            whole is None
            or sum(ranks) != whole.setting.rank
            or {b.setting.scale for b in each} != {whole.setting.scale}
        ):
            continue
        a, b = factors[owner]
        pairs = list(zip(a.split(ranks), b.split(ranks, dim=1), strict=True))
        own = [(a.clone(), b[list(branch.features or ())]) for branch, (a, b) in zip(each, pairs, strict=True)]
        full = [
            with_all_rows(b, branch.features, len(rows))
            for branch, (_, b), (_, rows) in zip(each, own, pairs, strict=True)
        ]
        if all(torch.equal(mine, rows) for mine, (_, rows) in zip(full, pairs, strict=True)):
            del found[owner], factors[owner]
            found |= {branch.key: (rule, branch) for branch in each}
            factors |= {branch.key: pair for branch, pair in zip(each, own, strict=True)}
    return replace(contents, branches=found, factors=factors)
