"""Affine values as data: Σ scaling · … M₂ M₁ x + Σ c, the terms of an unfinished branch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from lora_fx.numerics.update import Factor, Update
from lora_fx.rules.vocabulary import Op


@dataclass(frozen=True)
class Term:
    """One update, and the input that it is applied to.

    Attributes:
        source: the node that the first product reads.
        op: the kind of that product; None for a product of factors alone, without any input.
        geometry: which features of the source belong together, as the first product says.
        kernel: that of the first product, if it is a convolution.
        product: the node of the first product.
        update: the factors and the scaling.
    """

    source: fx.Node
    op: Op | None
    geometry: tuple[Any, ...]
    kernel: tuple[int, ...]
    product: fx.Node
    update: Update


@dataclass(frozen=True)
class SiteOutput:
    """The output of a site, of which a delta has a part.

    Attributes:
        site: the site's node.
        nodes: from that on, through a bias, reshapes and casts, to the complete output of the site.
        dtype: of that.
    """

    site: fx.Node
    nodes: tuple[fx.Node, ...]
    dtype: torch.dtype

    @property
    def base(self) -> fx.Node:
        """The complete output of the site, as far as nothing has changed it."""
        return self.nodes[-1]


@dataclass(frozen=True)
class Delta:
    """A value that is affine in the sources of its terms.

    Attributes:
        terms: its summands.
        dtype: of the value.
        padded: whether a zero stands behind its last feature.
        reshaped: whether its positions are no longer laid out as those of a source.
        offsets: vectors over its features, each as a matrix of one column.
        output: that of the site whose own weight is in its terms; None without it.
    """

    terms: tuple[Term, ...]
    dtype: torch.dtype
    padded: bool = False
    reshaped: bool = False
    offsets: tuple[Update, ...] = ()
    output: SiteOutput | None = None

    @property
    def is_weight(self) -> bool:
        """Whether it is a product of factors alone, to be added to a weight."""
        return self.terms[0].op is None

    @property
    def is_placed(self) -> bool:
        """Whether its features are put in places of their own, or padded for that."""
        return self.padded or any(term.update.places is not None for term in self.terms)

    def updated(self, change: Callable[[Update], Update]) -> Delta:
        """Return it with another update in each of its terms, and another of its offsets for each."""
        terms = tuple(replace(term, update=change(term.update)) for term in self.terms)
        return replace(self, terms=terms, offsets=tuple(map(change, self.offsets)))

    def scaled(self, number: float) -> Delta:
        """Return it times a number."""
        return self.updated(lambda update: replace(update, scaling=update.scaling * number))

    def scaled_by_rows(self, scale: Factor) -> Delta:
        """Return it with each feature times an element of a vector."""
        return self.updated(
            lambda update: replace(update, factors=(*update.factors[:-1], _by_rows(update.factors[-1], scale)))
        )

    def plus(self, other: Delta) -> Delta:
        """Return the sum with another delta."""
        dtype = torch.promote_types(self.dtype, other.dtype)
        return replace(
            self,
            terms=self.terms + other.terms,
            dtype=dtype,
            reshaped=self.reshaped or other.reshaped,
            offsets=summed((*self.offsets, *other.offsets)),
            output=self.output or other.output,
        )


def summed(updates: tuple[Update, ...]) -> tuple[Update, ...]:
    """Return updates of which equal ones are one, with the sum of their scalings, or none if that is zero."""
    scalings: dict[Update, float] = {}
    for update in updates:
        key = replace(update, scaling=1.0)
        scalings[key] = scalings.get(key, 0.0) + update.scaling
    return tuple(replace(key, scaling=scaling) for key, scaling in scalings.items() if scaling)


def _by_rows(factor: Factor, scale: Factor) -> Factor:
    return replace(factor, rows=(*factor.rows, scale))


@dataclass(frozen=True)
class Addition:
    """The sum of a delta and a value that is no delta.

    Attributes:
        base: that value.
        delta: the delta.
        written: the one of the two to which a sum in place is written, and whose dtype it has; None for other sums.
    """

    base: fx.Node
    delta: Delta
    written: fx.Node | None = None

    def dtype(self, base: torch.dtype) -> torch.dtype:
        """Return the dtype of the sum, given that of the base."""
        if self.written is not None:
            return base if self.written is self.base else self.delta.dtype
        return torch.promote_types(base, self.delta.dtype)
