"""Graphs on the way to another graph, of which no code is generated: nobody calls them, and writing it takes longer than the graph itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_WITHOUT_CODE: ContextVar[bool] = ContextVar("_WITHOUT_CODE", default=False)


@contextmanager
def without_code() -> Iterator[None]:
    """Let graph modules that are made inside the block have no code; the last of them gets it by ``recompile()`` after the block."""
    token = _WITHOUT_CODE.set(True)
    try:
        yield
    finally:
        _WITHOUT_CODE.reset(token)


def is_without_code() -> bool:
    """Tell whether a graph module that is made now gets no code."""
    return _WITHOUT_CODE.get()
