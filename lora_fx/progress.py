"""Progress of what takes seconds, as transformers shows its own: one bar, which its switches turn off.

``transformers.utils.logging.disable_progress_bar()``, ``HF_HUB_DISABLE_PROGRESS_BARS=1``: no bar is shown. Anything that ends within
two seconds shows none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from lora_fx.errors import in_command

DELAY = 2.0
"""Seconds after which a bar appears."""

_TICK = 1.0
_FORMAT = "{desc}: {elapsed}{postfix}"


class _Bar:
    """A bar that appears once it is late, with the time since the work began, and counts on while one step takes all of it."""

    def __init__(self, what: str) -> None:
        self._what, self._step, self._began = what, "", time.time()
        self._bar: Any = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def step(self, name: str) -> None:
        with self._lock:
            self._step = name
            if self._bar is not None:
                self._bar.set_postfix_str(name)

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            if self._bar is not None:
                self._bar.close()

    def _run(self) -> None:
        if self._closed.wait(DELAY):
            return
        from transformers.utils import logging  # outside of the lock: another thread may be importing it

        with self._lock:
            if self._closed.is_set():
                return
            # With a delay, tqdm prints nothing of its own before it knows when the work began.
            self._bar = logging.tqdm(desc=self._what, bar_format=_FORMAT, leave=False, delay=1e-9)
            self._bar.start_t = self._began
            self._bar.set_postfix_str(self._step)
        while not self._closed.wait(_TICK):
            with self._lock:
                if not self._closed.is_set():
                    self._bar.refresh()


_current: ContextVar[_Bar | None] = ContextVar("lora_fx.progress", default=None)


@contextmanager
def shown(what: str) -> Iterator[None]:
    """Show what is done in a block that takes more than two seconds: its name, the time, and the step that it is at.

    Within another such block it is a step of that. Commands show their steps themselves.
    """
    around = _current.get()
    if around is not None or in_command():
        step(what)
        yield
        return
    bar = _Bar(what)
    token = _current.set(bar)
    try:
        yield
    finally:
        _current.reset(token)
        bar.close()


def step(name: str) -> None:
    """Name the step that is begun, if its progress is shown."""
    bar = _current.get()
    if bar is not None:
        bar.step(name)
