"""What came of one random model: every comparison, refusal and error, by the pass that was asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

import lora_fx

RESULTS = ("equal", "refused", "wrong", "not compared")


class TookTooLong(BaseException):
    """The time limit of a model, which no pass may catch."""


@dataclass
class Outcome:
    """What came of a seed.

    Attributes:
        seed: of the model.
        kinds: what is in the model and its adapters.
        results: the pass; one of :data:`RESULTS`; the difference or the message.
        worst: the largest difference that was within its tolerance, as a part of the largest value.
        seconds: of a processor.
    """

    seed: int
    kinds: list[str] = field(default_factory=list)
    results: list[tuple[str, str, str]] = field(default_factory=list)
    worst: float = 0.0
    seconds: float = 0.0

    def add(self, what: str, result: str, said: str = "") -> None:
        self.results.append((what, result, said))

    @property
    def wrong(self) -> list[tuple[str, str]]:
        return [(what, said) for what, result, said in self.results if result == "wrong"]

    @contextlib.contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Note a refusal, and as wrong an error that is not the project's."""
        try:
            yield
        except lora_fx.LoraFxError as error:
            self.add(what, "refused", f"{type(error).__name__}: {' '.join(str(error).split())}")
        except Exception as error:
            self.add(what, "wrong", f"{type(error).__name__}: {' '.join(str(error).split())[:600]}")

    def near(self, what: str, found: Any, wanted: Any, tolerance: float) -> None:
        """Compare tensors in structures, as a part of the largest value."""
        ours, theirs = (
            [leaf for leaf in pytree.tree_leaves(each) if isinstance(leaf, torch.Tensor)] for each in (found, wanted)
        )
        if [leaf.shape for leaf in ours] != [leaf.shape for leaf in theirs]:
            shapes = [[tuple(leaf.shape) for leaf in each] for each in (ours, theirs)]
            self.add(what, "wrong", f"other shapes: {shapes[0]} for {shapes[1]}")
            return
        apart = max((difference(mine, other) for mine, other in zip(ours, theirs, strict=True)), default=0.0)
        self.add(what, "equal" if apart <= tolerance else "wrong", f"{apart:.1e}")
        if apart <= tolerance:
            self.worst = max(self.worst, apart)


def difference(mine: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference as a part of the largest value; infinite where one has a NaN and the other has none."""
    if mine.numel() == 0:
        return 0.0
    one, two = mine.detach().double(), other.detach().double()
    if not torch.equal(one.isfinite(), two.isfinite()):
        return float("inf")
    one, two = one.nan_to_num(0.0, 0.0, 0.0), two.nan_to_num(0.0, 0.0, 0.0)
    return float((one - two).abs().max()) / max(float(two.abs().max()), 1e-6)
