"""What a fold did to each weight, as data and as a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lora_fx.errors import FoldError
from lora_fx.graph.graph_module import TracedGraphModule
from lora_fx.graph.info import info_of
from lora_fx.numerics.lowrank_merge import Merge, Merged
from lora_fx.text_table import new_table, text_lines


@dataclass(frozen=True)
class FoldedWeight:
    """What a fold did to one weight.

    Attributes:
        merge: what was asked.
        merged: what came of it.
        dtype: of the weight.
    """

    merge: Merge
    merged: Merged
    dtype: str

    @property
    def unchanged(self) -> float:
        """Share of the elements with an update that kept their value: theirs was less than half a step of the dtype."""
        return self.merged.unchanged / self.merged.elements if self.merged.elements else 0.0


def check_finite(weights: Mapping[str, FoldedWeight]) -> None:
    """Raise :class:`FoldError` if a weight, here by its name, would not be finite."""
    bad = {name: entry.merged.non_finite for name, entry in weights.items() if entry.merged.non_finite}
    if bad:
        listed = "; ".join(f"folding makes {name!r} non-finite in {count} elements" for name, count in bad.items())
        raise FoldError(f"{listed}: the weight or an adapter has a NaN, an infinity, or too large a value.")


@dataclass(frozen=True)
class FoldReport:
    """One entry for every weight that a fold changed. ``str(report)`` is a table."""

    weights: tuple[FoldedWeight, ...]

    def __iter__(self) -> Iterator[FoldedWeight]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __str__(self) -> str:
        if not self.weights:
            return "nothing was folded"
        table = new_table()
        for heading in ("weight", "dtype", "layout"):
            table.add_column(heading, no_wrap=True)
        for heading in ("updates", "size of update", "elements", "unchanged"):
            table.add_column(heading, justify="right", no_wrap=True)
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
            )
        return "\n".join([*text_lines(table), self._totals()])

    def _totals(self) -> str:
        elements = sum(entry.merged.elements for entry in self.weights)
        unchanged = sum(entry.merged.unchanged for entry in self.weights)
        share = unchanged / elements if elements else 0.0
        lost = f"; {share:.2%} of the elements with an update kept their value: it was less than half a step of their dtype"
        return f"{len(self.weights)} weights, {elements} elements with an update{lost if unchanged else ''}"


def fold_report(folded: TracedGraphModule) -> FoldReport:
    """Return what the fold that made this graph did to each weight; nothing if it had no branches."""
    return FoldReport(info_of(folded).folded)
