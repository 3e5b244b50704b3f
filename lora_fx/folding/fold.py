"""Branches → merged weights, and back to the graph as it was before the rewrite.

W' = W + Σ scaling · B A        (transposed for weights that are laid out (in, out))

First comes the recipe, which says what to add to which weight, and touches none. All that can be refused is
refused before anything is computed, and all weights are looked at before the first error is raised.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import fx, nn

from lora_fx.adapters.activate import activate
from lora_fx.adapters.kept_prefix import with_prefix_of
from lora_fx.adapters.prefix import acting_prefix, prefix_record
from lora_fx.branches.find import Nominate, find_branches
from lora_fx.branches.remove import plain_graph, without_branches
from lora_fx.branches.tied_copies import with_apart_parameters
from lora_fx.branches.weight_uses import Value, values_of
from lora_fx.errors import WITH_LABELS, FoldError, listed, option
from lora_fx.folding.dequantise import dequantise, merged_dense, merged_quantised, warn_of_losses
from lora_fx.folding.report import check_finite
from lora_fx.graph.adapter_names import is_of_branch, is_of_start, original_name
from lora_fx.graph.adapter_states import waiting
from lora_fx.graph.cached_graphs import CachedGraphs, check_whole
from lora_fx.graph.graph_module import TracedGraphModule, state_of
from lora_fx.graph.info import known_info, with_info
from lora_fx.graph.joined_graphs import apart, joined, whole
from lora_fx.graph.prefix_slot import NO_WEIGHTS_HOLD
from lora_fx.graph.state import State
from lora_fx.numerics.large_pages import empty_like
from lora_fx.numerics.lowrank_merge import FOLDABLE, Merge, merge_into, surely_finite
from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.progress import shown, step

_logger = logging.getLogger("lora_fx.folding")


@overload
def fold(
    graph_module: CachedGraphs,
    strengths: Mapping[str, float] | None = None,
    *,
    branches: Nominate = is_of_branch,
    unshare: bool = False,
    inplace: bool = False,
    quantised: Literal["dense", "requantise"] = "dense",
    keep_prefix: bool = False,
) -> CachedGraphs: ...


@overload
def fold(
    graph_module: fx.GraphModule,
    strengths: Mapping[str, float] | None = None,
    *,
    branches: Nominate = is_of_branch,
    unshare: bool = False,
    inplace: bool = False,
    quantised: Literal["dense", "requantise"] = "dense",
    keep_prefix: bool = False,
) -> TracedGraphModule: ...


def fold(
    graph_module: fx.GraphModule | CachedGraphs,
    strengths: Mapping[str, float] | None = None,
    *,
    branches: Nominate = is_of_branch,
    unshare: bool = False,
    inplace: bool = False,
    quantised: Literal["dense", "requantise"] = "dense",
    keep_prefix: bool = False,
) -> TracedGraphModule | CachedGraphs:
    """Return the graph without its branches, with their product merged into the weights of their sites.

    ``W ← W + Σ strength · scaling · B A`` (arXiv 2106.09685, section 4.1), in the layout in which the operator reads W.
    The result computes what ``graph_module`` computes in evaluation, has the graph that the model was traced to, and the
    model's ``state_dict`` keys. ``graph_module`` stays usable; only adapted weights are new tensors.
    :func:`~lora_fx.fold_report` compares both graphs.

    A branch is found by the names of its factors and folded if it is linear, with constant factors, from its input to an
    addend of its site's output. Products are summed in float32 for float32 and bfloat16 weights and in float64 for others,
    and rounded once.

    Args:
        graph_module: of ATen operators: made by lora_fx, a copy of such, or a trace of a model with branches of its own; or the
            graphs of an encoder-decoder model with a cache.
        strengths: the adapters to fold, as for :func:`~lora_fx.activate`. By default those that act, at their strengths. The
            others are dropped, and named in the log.
        branches: tells by a parameter's name whether it is a factor of a branch. By default the names that lora_fx and
            PEFT give: ``<module>.lora_A.<adapter>.weight``, ``….lora_embedding_A.<adapter>``, and so for B.
        unshare: where uses of one weight need different values, untie them. A value keeps those names of the weight whose
            module uses it; a value without such a name is called ``<module>@<n>.weight``, for the n-th call.
        inplace: write into the weights themselves, without a second copy of any. ``graph_module`` and the model that it was
            traced from are of no use afterwards, and there is no report. Where uses are untied, a weight is still copied.
        quantised: what becomes of adapted weights that are quantised. ``"dense"``: their dense values with the update, rounded once.
            ``"requantise"``: these, quantised in the same way again, with a warning where the rounding error is more than 0.25 of the size of
            an update. Other quantised weights stay as they are; :func:`~lora_fx.dequantise` makes them dense.
        keep_prefix: leave a prefix that acts in the graph, frozen, and fold what is beside it. Without it a prefix is refused, which
            no weights can hold.

    Raises:
        FoldError: a prefix acts, a branch is not linear, a weight would need different values at its uses, or would become non-finite, a tensor is on
            the meta device, or ``inplace`` meets a quantised weight. Nothing was changed.
        PlanError: ``strengths`` names an adapter that the graph has not.
    """
    if isinstance(graph_module, CachedGraphs):
        merged = fold(
            joined(graph_module), strengths, branches=branches, unshare=unshare, inplace=inplace, quantised=quantised
        )
        for part in graph_module.parts.values() if inplace else ():
            _consume(part)
        return apart(merged, graph_module)
    plain = _plain_acting(graph_module, strengths, keep_prefix=keep_prefix)
    if known_info(plain).labels:
        raise FoldError(WITH_LABELS)
    with shown("folding"):
        folded = _folded(plain, branches, unshare=unshare, inplace=inplace, quantised=quantised)
        folded = with_prefix_of(plain, folded)
    if inplace:
        _consume(graph_module)
    tell_dropped(plain, logging.WARNING if strengths is None else logging.INFO)  # the latter was asked for
    return folded


def tell_dropped(graph_module: fx.GraphModule, level: int) -> None:
    """Log the adapters that do not act, which a fold drops."""
    dropped = waiting(graph_module)
    if dropped:
        _logger.log(level, "fold drops what does not act: %s.", listed(list(map(repr, dropped)), 5))


def folded_state(
    graph_module: fx.GraphModule,
    strengths: Mapping[str, float] | None = None,
    *,
    unshare: bool = False,
    keep_prefix: bool = False,
) -> State:
    """Return the state of the folded graph: the merged weights under the model's names, all dense. The graph may have labels.

    Args:
        graph_module: see :func:`fold`.
        strengths: see :func:`fold`.
        unshare: see :func:`fold`.
        keep_prefix: whether a prefix may act, which is for the caller to compute with.

    Raises:
        FoldError: see :func:`fold`.
        PlanError: see :func:`fold`.
    """
    plain = _plain_acting(graph_module, strengths, keep_prefix=keep_prefix)
    return state_of(dequantise(_folded(plain, is_of_branch, unshare=unshare)))


def _plain_acting(
    graph_module: fx.GraphModule, strengths: Mapping[str, float] | None, *, keep_prefix: bool = False
) -> fx.GraphModule:
    """Return the plain graph in which these adapters act; without strengths those that do."""
    check_whole(graph_module)
    acting = graph_module if strengths is None else activate(graph_module, strengths)
    adapter = acting_prefix(acting)
    if adapter is not None and not keep_prefix:
        why = NO_WEIGHTS_HOLD[prefix_record(acting, adapter).kind]
        raise FoldError(
            f"adapter {adapter!r} cannot be folded: {why}. {option(_BESIDE, 'Export the graph with it: --branched.')}"
        )
    return plain_graph(acting)


_BESIDE = "Fold what is beside it, lora_fx.fold(graph, keep_prefix=True), let it not act (lora_fx.activate), or export the graph as it is."


def _folded(
    plain: fx.GraphModule,
    branches: Nominate,
    *,
    unshare: bool,
    inplace: bool = False,
    quantised: Literal["dense", "requantise"] = "dense",
) -> TracedGraphModule:
    plain = with_apart_parameters(plain)
    found = find_branches(plain, branches)
    values = values_of(plain, found, unshare=unshare)
    state = state_of(plain)
    merges = [value.merge for value in values if value.changes]
    _check_foldable(merges, state)
    _check_quantised(merges, state, inplace, quantised)
    copied = _copied_weights(values, state) if inplace else {merge.weight for merge in merges}
    copied |= {
        merge.weight for merge in merges if is_of_start(merge.weight)
    }  # what a start left of a weight is not the model's
    merged = _merged(merges, state, copied, quantised)
    for value in values:  # those of an untied weight that keep it as it is may have a new name too
        new = [name for name in value.names if name not in state.tensors and name not in merged]
        merged.update(dict.fromkeys(new, state.tensors[value.weight]))
    merged = {**_trained(plain, state, merged), **merged}
    folded = without_branches(plain, found, values, state.with_tensors(merged), branches)
    own = known_info(folded)
    names = (name for merge in merges for name in merge.names)
    changed = tuple(dict.fromkeys((*own.merged, *merged, *names)))
    measured = {name: state_of(folded).tensors[name].clone() for name in own.statistics}
    folded.meta.update(with_info({}, replace(own, folded=tuple(merges), merged=changed, statistics=measured)))
    if inplace:
        _write(merges, state, copied)
    return folded


def _merged(merges: Sequence[Merge], state: State, copied: Collection[str], quantised: str) -> dict[str, torch.Tensor]:
    """Return new tensors for the weights to be copied; refuse a result that is not finite, of the other weights too."""
    merged: dict[str, torch.Tensor] = {}
    non_finite: dict[str, int] = {}
    lost: dict[str, float] = {}
    for number, merge in enumerate(merges, 1):
        step(f"weight {number} of {len(merges)}")
        weight = state.tensors[merge.weight]
        if isinstance(weight, QuantisedWeight):
            again = merged_quantised if quantised == "requantise" else merged_dense
            result = again(weight, merge, state.tensors)
            non_finite[merge.weight], lost[merge.weight] = result.non_finite, result.lost
            merged.update(dict.fromkeys(merge.names, result.tensor))
        elif merge.weight in copied:
            out = empty_like(weight)
            non_finite[merge.weight] = merge_into(weight, merge, state.tensors, out)
            tensor = nn.Parameter(out) if isinstance(weight, nn.Parameter) else out
            merged.update(dict.fromkeys(merge.names, tensor))
        elif not surely_finite(weight, merge, state.tensors):  # only few have norms that tell nothing
            non_finite[merge.weight] = merge_into(weight, merge, state.tensors, None)
    check_finite(non_finite)
    warn_of_losses(lost)
    return merged


def _check_quantised(merges: Sequence[Merge], state: State, inplace: bool, quantised: str) -> None:
    """Refuse a fold in place into quantised weights, and an unknown wish for them."""
    if quantised not in ("dense", "requantise"):
        raise FoldError(f"quantised: expected 'dense' or 'requantise', got {quantised!r}.")
    names = [merge.weight for merge in merges if isinstance(state.tensors[merge.weight], QuantisedWeight)]
    if names and inplace:
        raise FoldError(
            f"{listed(list(map(repr, names)), 3)} cannot be folded in place: a quantised weight takes less memory than the result. Fold "
            "without inplace=True."
        )


def _write(merges: Sequence[Merge], state: State, copied: Collection[str]) -> None:
    """Merge into the weights themselves, of which all results are known to be finite: nothing is refused any more."""
    for merge in merges:
        if merge.weight not in copied:
            weight = state.tensors[merge.weight]
            with torch.inference_mode(weight.is_inference()):
                merge_into(weight, merge, state.tensors, weight)


def recipe(
    graph_module: fx.GraphModule | CachedGraphs,
    strengths: Mapping[str, float] | None = None,
    *,
    branches: Nominate = is_of_branch,
    unshare: bool = False,
) -> tuple[Merge, ...]:
    """Return what :func:`fold` would do to each weight, as data: factors by their names, scalings, layouts.

    No tensor is read, so that the graph may be on the meta device.

    Args:
        graph_module: see :func:`fold`.
        strengths: see :func:`fold`.
        branches: see :func:`fold`.
        unshare: see :func:`fold`.

    Raises:
        FoldError: see :func:`fold`.
        PlanError: see :func:`fold`.
    """
    plain = with_apart_parameters(_plain_acting(whole(graph_module), strengths))
    values = values_of(plain, find_branches(plain, branches), unshare=unshare)
    return tuple(value.merge for value in values if value.changes)


def _check_foldable(merges: Sequence[Merge], state: State) -> None:
    problems = []
    for merge in merges:
        weight = state.tensors[merge.weight]
        tensors = {name: state.tensors[name] for name in (merge.weight, *merge.read)}
        problems += [f"{name!r} is on the meta device" for name, tensor in tensors.items() if tensor.is_meta]
        if weight.dtype not in FOLDABLE:
            problems.append(f"{merge.weight!r} is {weight.dtype}, to which nothing can be added")
    if problems:
        raise FoldError(
            f"there is nothing to fold with: {'; '.join(dict.fromkeys(problems))}. Load or dequantise the weights first; "
            "lora_fx.recipe says what would be folded."
        )


def _copied_weights(values: Sequence[Value], state: State) -> set[str]:
    """Return the weights that a fold in place cannot write to, since something needs the old value; refuse shared memory."""
    names = Counter(value.weight for value in values)
    copied = {name for name, count in names.items() if count > 1}
    aliases = state.aliases()
    read = ((value.weight, aliases[name]) for value in values for update in value.updates for name in update.names)
    copied |= names.keys() & {other for weight, other in read if other != weight}  # the update of one contains another
    spans: dict[object, list[str]] = {}
    for first in state.names():
        tensor = state.tensors[first]
        if not (tensor.is_meta or isinstance(tensor, QuantisedWeight)):  # codes are never written to
            spans.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append(first)
    for group in spans.values():
        written = [name for name in group if name in names and name not in copied]
        if written and len(group) > 1:
            raise FoldError(
                f"{' and '.join(map(repr, group))} share memory: folding {written[0]!r} in place would change them all. "
                "Fold without inplace=True."
            )
    return copied


def _trained(graph_module: fx.GraphModule, state: State, merged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return values for the parameters of which the graph computes with a trained copy: a copy of that, since it may train on."""
    read = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
    names, aliases = state.names(), state.aliases()
    return {
        tied: parameter
        for name, tensor in state.tensors.items()
        if name in read and (original := original_name(name)) is not None and original not in merged
        for copied in (tensor.detach().clone(),)
        for parameter in (nn.Parameter(copied) if isinstance(tensor, nn.Parameter) else copied,)
        for tied in names[aliases[original]]
    }


def _consume(graph_module: fx.GraphModule) -> None:
    """Make a graph whose weights are overwritten refuse to compute."""

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        plain_graph(graph_module)

    graph_module.meta.update(with_info({}, replace(known_info(graph_module), consumed=True)))
    graph_module.forward = forward
