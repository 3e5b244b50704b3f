"""Process-wide state, and the one lock under which it is changed.

torch.export, torch.onnx and TorchScript keep their state in the process, and so do Python's garbage collector and warnings,
torch's random numbers, and functions that are replaced for the length of a trace. Whoever calls the former or changes the latter
holds the lock; a second thread waits for it. The lock is re-entrant: a rewrite traces, and an export traces again.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

_LOCK = threading.RLock()


def _renew_lock() -> None:
    global _LOCK
    _LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):
    # A forked child has one thread, and waits for ever for a lock that another one held.
    os.register_at_fork(after_in_child=_renew_lock)

_SILENCED = ("torch", "onnxscript", "onnx_ir", "transformers")


@contextmanager
def exclusive() -> Iterator[None]:
    """Hold the lock inside the block."""
    with _LOCK:
        yield


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python from looking for garbage: while a graph grows, all new objects stay, and each search takes longer."""
    with exclusive():
        collecting = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collecting:
                gc.enable()


@contextmanager
def forked_random_state(devices: Sequence[int] = (), *, seed: int | None = None) -> Iterator[None]:
    """Restore torch's random state after the block, of the CPU and of these CUDA devices.

    Args:
        devices: indices of CUDA devices.
        seed: of the draws of the CPU inside; None to draw from the current state.
    """
    with exclusive(), torch.random.fork_rng(devices=list(devices)):
        if seed is not None:
            # torch.manual_seed would seed all devices, of which none is restored.
            torch.default_generator.manual_seed(int(seed))
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging hundreds of lines about a failure that lora_fx reports in one, and from warning of its own doings.

    Only records of this thread are dropped, and only those of the loggers of torch, of transformers, and of the packages for
    ONNX.
    """
    with exclusive():
        loggers = [
            logger
            for name, logger in list(logging.root.manager.loggerDict.items())
            if isinstance(logger, logging.Logger) and _family(name) in _SILENCED
        ]
        # Handlers too: modules that are first imported inside the block have loggers of which nothing is known yet.
        handlers = {handler for logger in (*loggers, logging.root) for handler in logger.handlers}
        filtered = [*loggers, *handlers, *([logging.lastResort] if logging.lastResort else [])]
        muted = _Muted(threading.get_ident())
        for each in filtered:
            each.addFilter(muted)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The tensor attribute")  # the tracer restores attributes
                warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
                yield
        finally:
            for each in filtered:
                each.removeFilter(muted)


def _family(name: str) -> str:
    return name.partition(".")[0]


class _Muted(logging.Filter):
    """Drops the records that one thread logs under the silenced names."""

    def __init__(self, thread: int) -> None:
        super().__init__()
        self._thread = thread

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is to be handled."""
        return record.thread != self._thread or _family(record.name) not in _SILENCED
