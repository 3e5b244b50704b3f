"""Updates of a weight as data: products of named tensors, computed constants, and scales of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce

import torch

from lora_fx.numerics.constant import Constant
from lora_fx.numerics.weight_view import AS_STORED, SWAP, View


@dataclass(frozen=True)
class Factor:
    """One matrix of a product, or a vector that scales the rows of one.

    Attributes:
        name: of the tensor; of a computed one, its digest.
        view: from that to a matrix ``(out, in)``, or a stack of them; of the scales of rows, to a vector.
        computed: how the tensor is computed, if it is no named one.
        rows: the scales of its rows, each a vector over the output features.
    """

    name: str
    view: View = AS_STORED
    computed: Constant | None = None
    rows: tuple[Factor, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors of which it is made."""
        own = (self.name,) if self.computed is None else self.computed.names
        return (*own, *(name for scale in self.rows for name in scale.names))

    @property
    def is_plain(self) -> bool:
        """Whether it is a named tensor as it is."""
        return self.computed is None and not self.rows

    def value(
        self, tensors: Mapping[str, torch.Tensor], known: dict[str, torch.Tensor], precision: torch.dtype
    ) -> torch.Tensor:
        """Return the matrix, or stack of matrices, with its rows scaled."""
        value = self.stored(tensors, known).to(precision)
        scales = self.row_scales(tensors, known, precision)
        return value if scales is None else value * scales.reshape(*value.shape[:-1], 1)

    def row_scales(
        self, tensors: Mapping[str, torch.Tensor], known: dict[str, torch.Tensor], precision: torch.dtype
    ) -> torch.Tensor | None:
        """Return what scales its rows, as one vector; None where nothing does."""
        found = [scale.stored(tensors, known).to(precision) for scale in self.rows]
        return reduce(torch.mul, found) if found else None

    def stored(self, tensors: Mapping[str, torch.Tensor], known: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the tensor in its view, in its own precision, without its scales of rows."""
        tensor = tensors[self.name] if self.computed is None else self.computed.value(tensors, known)
        return self.view.apply(tensor.detach())

    def __str__(self) -> str:
        text = self.name if self.computed is None else repr(self.computed)
        return f"{text} by rows of {' and '.join(map(str, self.rows))}" if self.rows else text


@dataclass(frozen=True, repr=False)
class Update:
    """One low-rank update ``scaling · … M₂ M₁``, of LoRA ``scaling · B A``, as data.

    Attributes:
        factors: in the order in which they are applied to ``x``: A, then B.
        scaling: factor of the product.
        scales: names of tensors with one element, which are factors of the product too.
        places: name of the tensor that has, for each output feature, the row of the product that is added to it, or the
            number of rows where none is; None where the product has a row for every feature.
    """

    factors: tuple[Factor, ...]
    scaling: float = 1.0
    scales: tuple[str, ...] = ()
    places: str | None = None

    @property
    def transposed(self) -> Update:
        """The transpose of an update without places, and without scales of rows."""
        factors = tuple(replace(factor, view=factor.view.then(SWAP)) for factor in reversed(self.factors))
        return replace(self, factors=factors)

    @property
    def can_be_transposed(self) -> bool:
        """Whether :attr:`transposed` is its transpose."""
        return self.places is None and not any(factor.rows for factor in self.factors)

    @property
    def is_plain(self) -> bool:
        """Whether it is a product of named tensors as they are."""
        return all(factor.is_plain for factor in self.factors)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors of which it is made."""
        places = () if self.places is None else (self.places,)
        return (*(name for factor in self.factors for name in factor.names), *self.scales, *places)

    def __repr__(self) -> str:
        product = " @ ".join(map(str, reversed(self.factors)))
        scales = "".join(f"{scale} * " for scale in self.scales)
        return f"{self.scaling:g} * {scales}{product}{'' if self.places is None else f' at {self.places}'}"
