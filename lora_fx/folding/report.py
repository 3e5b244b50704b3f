"""Report of a fold: figures for each weight, computed when asked for, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from lora_fx.branches.remove import plain_graph
from lora_fx.errors import FoldError, listed
from lora_fx.folding.checkpoint_check import MAX_MISROUNDED_ELEMENTS, MISROUNDED
from lora_fx.folding.dequantise import merged_dense, merged_quantised
from lora_fx.graph.graph_module import TracedGraphModule, state_of
from lora_fx.graph.info import check_module, info_of, known_info
from lora_fx.numerics.lowrank_merge import Merge, Merged, measure
from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.numerics.schemes import scheme_text
from lora_fx.numerics.update import Update
from lora_fx.text_table import new_table, text_lines


@dataclass(frozen=True)
class FoldedWeight:
    """Figures of a fold for one weight.

    Attributes:
        merge: the updates.
        merged: the figures.
        dtype: of the weight.
        quantised: the scheme of a weight that was quantised, and of one that is dense now; empty for all others.
        lost: of a weight that was quantised again, the rounding error as a part of the size of the update.
    """

    merge: Merge
    merged: Merged
    dtype: str
    quantised: str = ""
    lost: float = 0.0

    @staticmethod
    def of(
        weight: torch.Tensor, merge: Merge, tensors: Mapping[str, torch.Tensor], merged: torch.Tensor
    ) -> FoldedWeight:
        """Measure a merge by its weight before and after; see :func:`~lora_fx.numerics.lowrank_merge.measure`."""
        dtype = str(weight.dtype).removeprefix("torch.")
        if not isinstance(weight, QuantisedWeight):
            return FoldedWeight(merge, measure(weight, merge, tensors, merged), dtype)
        scheme, dense = scheme_text(weight.scheme), weight.dequantize()
        if not isinstance(merged, QuantisedWeight):
            return FoldedWeight(merge, measure(dense, merge, tensors, merged), dtype, f"{scheme} → dense")
        again = merged_quantised(weight, merge, tensors)
        exact = merged_dense(weight, merge, tensors).tensor
        others = int((again.tensor.dequantize() != merged.dequantize()).count_nonzero())
        figures = replace(measure(dense, merge, tensors, exact), others=others)
        return FoldedWeight(merge, figures, dtype, scheme, again.lost)

    @property
    def unchanged(self) -> float:
        """Share of the elements with an update that kept their value: theirs was less than half a step of the dtype."""
        return self.merged.unchanged / self.merged.elements if self.merged.elements else 0.0


def product_text(update: Update, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return an update for people: the rank of a product, a bias, or the weight itself with its rows scaled."""
    first, *others = update.factors
    scaled = " in rows times magnitudes" if update.factors[-1].rows else ""
    if first.name not in tensors:
        return f"itself{scaled}"
    what = f"B A of rank {first.view.apply(tensors[first.name]).shape[0]}" if others else "a bias"
    return f"{update.scaling:g} · {what}{scaled}"


def check_finite(non_finite: Mapping[str, int]) -> None:
    """Raise :class:`FoldError` if a weight would not be finite.

    Args:
        non_finite: by the name of the weight, how many of its elements would not be.
    """
    bad = {name: count for name, count in non_finite.items() if count}
    if bad:
        told = "; ".join(f"folding makes {name!r} non-finite in {count} elements" for name, count in bad.items())
        raise FoldError(f"{told}: the weight or an adapter has a NaN, an infinity, or too large a value.")


@dataclass(frozen=True, repr=False)
class FoldReport:
    """One entry for every weight that a fold changed. Its text is a table.

    Attributes:
        weights: for each its updates, the Frobenius norm of their sum and of the weight, and how many elements have an update but
            kept their value, since it was less than half a step of the dtype.
    """

    weights: tuple[FoldedWeight, ...]

    def __iter__(self) -> Iterator[FoldedWeight]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __repr__(self) -> str:
        if not self.weights:
            return "nothing was folded"
        table = new_table()
        for heading in ("weight", "dtype", "layout"):
            table.add_column(heading, no_wrap=True)
        for heading in ("updates", "size of update", "elements", "unchanged"):
            table.add_column(heading, justify="right", no_wrap=True)
        quantised = any(entry.quantised for entry in self.weights)
        if quantised:
            table.add_column("quantised", no_wrap=True)
            table.add_column("rounding", justify="right", no_wrap=True)
        for entry in self.weights:
            merge, merged = entry.merge, entry.merged
            table.add_row(
                " = ".join(merge.names),
                entry.dtype,
                merge.layout,
                str(len(merge.updates)),
                f"{merged.relative:.2e}",
                str(merged.elements),
                f"{entry.unchanged:.2%}",
                *([entry.quantised, f"{entry.lost:.2f}" if entry.lost else ""] if quantised else []),
            )
        return "\n".join([*text_lines(table), self._totals()])

    def _totals(self) -> str:
        elements = sum(entry.merged.elements for entry in self.weights)
        unchanged = sum(entry.merged.unchanged for entry in self.weights)
        share = unchanged / elements if elements else 0.0
        lost = f"; {share:.2%} of the elements with an update kept their value: it was less than half a step of their dtype"
        rounding = [entry.lost for entry in self.weights if entry.lost]
        again = (
            f"; {len(rounding)} weights were quantised again, with a rounding error of up to {max(rounding):.2f} of the size of their update"
            if rounding
            else ""
        )
        dense = sum(entry.merge.is_dense for entry in self.weights)
        told = f"; the updates of {dense} weights are as large as these, and of no low rank" if dense else ""
        return (
            f"{len(self.weights)} weights, {elements} elements with an update{lost if unchanged else ''}{again}{told}"
        )


def fold_report(before: fx.GraphModule, merged: TracedGraphModule) -> FoldReport:
    """Return figures for each weight that a fold changed: elements with an update, how many kept their value, its size.

    They are computed now, from the branches of ``before`` and the weights of both graphs, in about the time of a fold.

    Args:
        before: the graph that was folded, as it was then: not trained on since.
        merged: the graph that :func:`~lora_fx.folding.fold.fold` returned for it. One without folded branches has no entries.

    Raises:
        FoldError: the fold was in place, so that the weights before it are gone, or ``before`` is not the graph that was folded, or
            has other values since; or the graphs are the other way round, or on the meta device.
        PlanError: lora_fx did not make ``merged``.
    """
    for each in (before, merged):
        check_module(each)
    merges = info_of(merged).folded
    if not merges:
        _check_order(before, merged)
        return FoldReport(())
    if known_info(before).consumed:
        raise FoldError(_IN_PLACE)
    old, new = state_of(plain_graph(before)).tensors, state_of(merged).tensors
    for merge in merges:
        _check_pair(merge, old, new)
    weights = tuple(FoldedWeight.of(old[merge.weight], merge, old, new[merge.names[0]]) for merge in merges)
    _check_values(weights, new)
    return FoldReport(weights)


def _check_order(before: fx.GraphModule, merged: TracedGraphModule) -> None:
    """Raise :class:`FoldError` if the second graph has branches that are folded in the first one."""
    kept = state_of(merged).tensors
    branch = next((name for merge in known_info(before).folded for name in merge.read if name in kept), None)
    if branch is not None:
        raise FoldError(
            "expected the graph that was folded and the result of its fold, got them the other way round: the second graph has "
            f"{branch!r}, which is folded in the first. Exchange them."
        )


def _check_values(weights: Sequence[FoldedWeight], new: Mapping[str, torch.Tensor]) -> None:
    """Raise :class:`FoldError` if weights after the fold are not those before it with the updates."""
    other = {
        entry.merge.weight: f"{entry.merge.weight!r} at {entry.merged.others} of {elements} elements"
        for entry in weights
        for elements in (new[entry.merge.names[0]].numel(),)
        if entry.merged.others > MISROUNDED * elements + MAX_MISROUNDED_ELEMENTS  # devices round sums each in their way
    }
    if other:
        raise FoldError(
            "expected the graph that was folded as it was then, got one from whose values the fold gives others: "
            f"{listed(list(other.values()), 3)}. Was it trained on since? Ask for the report first, or keep a copy.deepcopy of the graph."
        )


def _check_pair(merge: Merge, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> None:
    read = (merge.weight, *merge.read)
    lacking = [name for name in read if name not in old]
    if lacking:
        raise FoldError(
            f"expected the graph that was folded and the result of its fold, got a first graph without {lacking[0]!r}, which "
            f"was merged into {merge.weight!r}. Pass the graph that fold was given."
        )
    weight, result = old[merge.weight], new[merge.names[0]]
    empty = [name for name in read if old[name].is_meta] + [merge.names[0]] * result.is_meta
    if empty:
        raise FoldError(
            f"there is nothing to measure: {empty[0]!r} is on the meta device. Pass graphs with weights; lora_fx.recipe says what "
            "is folded."
        )
    if weight.device != result.device:
        raise FoldError(
            f"expected {merge.weight!r} on one device, got {weight.device} before the fold and {result.device} after it. Move one graph "
            "to the other."
        )
    if weight.shape != result.shape or weight.dtype != result.dtype:
        raise FoldError(
            f"expected {merge.weight!r} alike in both graphs, got {tuple(weight.shape)} {weight.dtype} before the fold and "
            f"{tuple(result.shape)} {result.dtype} after it. Pass the graph that fold was given."
        )
    if isinstance(weight, QuantisedWeight):  # no fold is in place
        return
    if weight.numel() and weight.data_ptr() == result.data_ptr():
        raise FoldError(_IN_PLACE)


_IN_PLACE = (
    "the fold was in place, so that the weights before it are gone and there is nothing to compare with. Fold without "
    "inplace=True for a report."
)
