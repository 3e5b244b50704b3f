"""Attention masks of transformers, made in a way that torch.export sees through.

Where a mask depends on more than positions (the images of Gemma 3), transformers 5 evaluates its mask function under
``torch.vmap``, which leaves an operator on sub-graphs in the trace. The same functions work on index tensors that broadcast,
which is what transformers itself does with all other masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

_KINDS = ("sdpa", "eager")


@contextmanager
def broadcast_masks() -> Iterator[None]:
    """Let transformers make masks by broadcasting inside the block."""
    own = {kind: ALL_MASK_ATTENTION_FUNCTIONS[kind] for kind in _KINDS}
    try:
        for kind, make in own.items():
            ALL_MASK_ATTENTION_FUNCTIONS[kind] = _without_vmap(make)
        yield
    finally:
        for kind, make in own.items():
            ALL_MASK_ATTENTION_FUNCTIONS[kind] = make


def _without_vmap(make: Callable[..., Any]) -> Callable[..., Any]:
    def broadcasting(*args: Any, **kwargs: Any) -> Any:
        return make(*args, **({**kwargs, "use_vmap": False} if "use_vmap" in kwargs else kwargs))

    return broadcasting
