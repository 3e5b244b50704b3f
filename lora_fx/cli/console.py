"""What the commands print to: results, progress, warnings and errors; and the status that they end with."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from lora_fx.errors import (
    AdapterError,
    ExportError,
    FoldError,
    InputError,
    LoraFxError,
    PlanError,
    RuleError,
    StateError,
    TraceError,
    VerifyError,
    WriteError,
    of_a_command,
)

console = Console()
errors = Console(stderr=True)

USAGE, INPUT, MODEL, OUTPUT = 2, 3, 4, 5
"""Exit codes: of the command line itself, as typer has it; of files that are read; of the model; of what is written."""

CODES: dict[type[LoraFxError], int] = {
    StateError: 1,  # a fault of lora_fx, as is any other exception
    RuleError: INPUT,
    AdapterError: INPUT,
    TraceError: MODEL,
    InputError: MODEL,
    PlanError: MODEL,
    FoldError: MODEL,
    ExportError: OUTPUT,
    VerifyError: OUTPUT,
    WriteError: OUTPUT,
    LoraFxError: INPUT,
}
"""Exit codes by the kind of error. An error without a kind is about a file that is read."""

CODES_HELP = (
    "Exit codes: 0 done; 2 usage: options that are unknown or do not go together; 3 input: a path, rules, an adapter, a config or weights "
    "that cannot be read or do not fit; 4 model: it cannot be traced, adapted or folded so; 5 output: it exists, cannot be written, or "
    "does not compute what it should; 1 a fault of lora-fx."
)


def help_end(*examples: str) -> str:
    """Return the end of a command's help: examples, one a line, so that they can be copied, and exit codes."""
    return "\n\n".join(["Examples:", *examples, CODES_HELP])


@contextmanager
def reported() -> Iterator[None]:
    """Report a LoraFxError as one message, without a traceback, and exit with the code of its kind.

    Messages name options by their flags, warnings are one paragraph each, and advice on Python calls is kept from the terminal.
    """
    advice = logging.getLogger("lora_fx.adapters.advice")
    advice.addFilter(_nothing)
    before = warnings.showwarning
    warnings.showwarning = _as_a_line(before)
    try:
        with of_a_command():
            yield
    except LoraFxError as error:
        _say("error", str(error), "bold red")
        raise typer.Exit(next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)) from error
    finally:
        warnings.showwarning = before
        advice.removeFilter(_nothing)


def _say(kind: str, message: str, style: str) -> None:
    errors.print(f"[{style}]{kind}:[/{style}]", end=" ")
    errors.print(message, soft_wrap=True, markup=False, highlight=False)


def _as_a_line(otherwise: Callable[..., None]) -> Callable[..., None]:
    """Return what shows a warning for users without a place in the code, which is none of theirs."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, UserWarning):
            _say("warning", str(message), "bold yellow")
        else:
            otherwise(message, category, *place, **more)

    return show


def _nothing(_record: logging.LogRecord) -> bool:
    return False
