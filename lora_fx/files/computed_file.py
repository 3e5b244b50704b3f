"""A safetensors file of which some tensors are computed as they are read: those that quantised ones stand for, for example.

To whoever reads it, it is the file that would hold them. Nothing of it is in memory before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from lora_fx.files.safetensors import TensorFile, layout_of


@dataclass(frozen=True)
class Computed:
    """A tensor that is computed: the values of a quantised matrix.

    Attributes:
        dtype: of its elements.
        shape: of the tensor.
        scheme: text of the scheme of the matrix.
        transposed: whether the tensor is the transpose of the matrix that is quantised.
        matrix: computes that matrix in a dtype, in memory of its own; called once for each time that it is read.
        elements: computes elements of it in float32, by their positions one after another, at less cost; None where there is no such way.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    scheme: str
    transposed: bool
    matrix: Callable[[torch.dtype], torch.Tensor]
    elements: Callable[[torch.Tensor], torch.Tensor] | None = None

    def value(self) -> torch.Tensor:
        """Return the tensor."""
        matrix = self.matrix(self.dtype)
        return matrix.T.contiguous() if self.transposed else matrix


@dataclass(frozen=True)
class ComputedFile(TensorFile):
    """A file as it would be with its computed tensors; ``path`` is the one on disk.

    Attributes:
        stored: the file on disk.
        computed: its further tensors, or those in place of stored ones, by name.
    """

    stored: TensorFile = field(kw_only=True)
    computed: Mapping[str, Computed] = field(kw_only=True)

    @staticmethod
    def of(stored: TensorFile, dropped: Collection[str], computed: Mapping[str, Computed]) -> ComputedFile:
        """Return a file without some tensors and with computed ones, which take the place of stored ones of their names.

        Where no tensor comes or goes and none changes its dtype or shape, all stay where they are in the file.
        """
        kept = {name: (entry.dtype, entry.shape) for name, entry in stored.entries.items() if name not in dropped}
        tensors = {**kept, **{name: (each.dtype, each.shape) for name, each in computed.items()}}
        header, entries = stored.header, stored.entries
        if tensors != {name: (entry.dtype, entry.shape) for name, entry in entries.items()}:
            header, entries = layout_of(stored.path, tensors, stored.metadata)
        return ComputedFile(stored.path, stored.metadata, entries, header, stored=stored, computed=computed)

    @property
    def on_disk(self) -> TensorFile:
        """The file on disk, without computed tensors."""
        return self.stored

    def is_computed(self, name: str) -> bool:
        """Tell whether a tensor is not on disk as it is read."""
        return name in self.computed

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in memory of its own, see :meth:`TensorFile.read`."""
        return self.computed[name].value() if name in self.computed else self.stored.read(name)

    def pieces(self, name: str, elements: int) -> Iterator[torch.Tensor]:
        """Yield the elements of a tensor in order, see :meth:`TensorFile.pieces`; a computed one is in memory as a whole."""
        if name in self.computed:
            yield from self.read(name).reshape(-1).split(elements)
        else:
            yield from self.stored.pieces(name, elements)
