"""What the commands print to: results, progress and errors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from lora_fx.errors import LoraFxError

console = Console()
errors = Console(stderr=True)


@contextmanager
def reported() -> Iterator[None]:
    """Report a LoraFxError as one message, without a traceback, and exit with 1; keep advice on Python calls from the terminal."""
    advice = logging.getLogger("lora_fx.adapters.advice")
    advice.addFilter(_nothing)
    try:
        yield
    except LoraFxError as error:
        errors.print("[bold red]error:[/bold red]", end=" ")
        errors.print(str(error), soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(1) from error
    finally:
        advice.removeFilter(_nothing)


def _nothing(_record: logging.LogRecord) -> bool:
    return False
