"""Every error that lora_fx raises. Each message says where, what was expected, what was found and what to do."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from pathlib import Path


class LoraFxError(Exception):
    """Base class of all errors raised by lora_fx."""


_MAX_PROBLEMS = 100  # of a message; a hostile file has as many as it has keys


class _ProblemsError(LoraFxError):
    """Something read has problems, all of which are reported at once."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        told = shortened(problems, _MAX_PROBLEMS, "problems")
        super().__init__("\n  ".join([f"{source}:", *told]) if len(problems) != 1 else f"{source}: {problems[0]}")


class RuleError(_ProblemsError):
    """A rule file is malformed, unknown, or does not fit the model. All problems are reported at once.

    Attributes:
        source: the file, or what the rules are called.
        problems: a sentence each, with line and key.
    """


class AdapterError(_ProblemsError):
    """A directory with an adapter is malformed, of a kind that is not supported, or does not fit the graph.

    Attributes:
        source: the directory.
        problems: a sentence each. All are reported at once.
    """


class TraceError(LoraFxError):
    """The model cannot be traced into a graph that computes what the model computes."""


class InputError(LoraFxError):
    """A graph was called with inputs that its trace does not cover."""


class PlanError(LoraFxError):
    """A plan cannot be carried out on this graph."""


class FoldError(LoraFxError):
    """Branches cannot be folded into weights without changing what the graph computes."""


class VerifyError(LoraFxError):
    """A folded graph or a written file does not compute what its graph computes.

    Attributes:
        node: the first value that differs: a node of the folded graph, or an output of the file.
    """

    def __init__(self, message: str, node: str = "") -> None:
        self.node = node
        super().__init__(message)


class StateError(LoraFxError):
    """A pass left a graph that is not legal in the state it should be in: a fault of lora_fx."""


class ExportError(LoraFxError):
    """A graph cannot be written in the requested format."""


class WriteError(LoraFxError):
    """A file or directory cannot be made: it exists, it is read to make the result, or the disk does not take it."""


_in_command: ContextVar[bool] = ContextVar("lora_fx.errors.in_command", default=False)


@contextmanager
def of_a_command() -> Iterator[None]:
    """Let messages name options as the command line spells them, for the length of a block."""
    token = _in_command.set(True)
    try:
        yield
    finally:
        _in_command.reset(token)


def in_command() -> bool:
    """Tell whether a command runs."""
    return _in_command.get()


def option(argument: str, flag: str) -> str:
    """Return how a message names an option: as the argument of a function, or in a command as its flag.

    Args:
        argument: ``"overwrite=True"``.
        flag: ``"--overwrite"``.
    """
    return flag if in_command() else argument


WITH_LABELS = (
    "this graph was traced with labels, for training, and would need them when it is used. Carry its adapters over first: "
    "lora_fx.transfer(graph, onto=lora_fx.trace(model)). A trace can be kept for that, and the transfer takes milliseconds; where weights "
    "are enough, huggingface.save_pretrained, folded and write_back take this graph as it is."
)
"""What fold and the exporters say of a graph that is for training."""


def warn(message: str) -> None:
    """Warn at the line that called the package: the first one outside of it, however many functions are in between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


_BETWEEN = (__name__.partition(".")[0], "contextlib", "functools")
"""Packages whose lines a warning is not about: this one, and those that call its functions for it."""


def first_line(message: str, otherwise: str) -> str:
    """Return the first line of a message of others that says something."""
    return next((line.strip() for line in message.splitlines() if line.strip()), otherwise)


def printable(text: str) -> str:
    """Return a text of strangers on one line, with escapes in place of signs that a terminal obeys."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def listed(items: Sequence[str], most: int, separator: str = ", ") -> str:
    """Return ``"x, y and 3 more"``: the first items of a list, and how many there are besides.

    Args:
        items: in the order in which they are named.
        most: how many are named.
        separator: ``"; "`` for items that are sentences; then ``"x; y, and 3 more"``.
    """
    named, rest = separator.join(items[:most]), len(items) - most
    return named if rest <= 0 else f"{named}{'' if separator == ', ' else ','} and {rest} more"


def shortened(lines: Sequence[str], most: int, noun: str) -> list[str]:
    """Return the first lines of a list, and a further line with the number of the others: ``"and 3 more tensors"``."""
    rest = len(lines) - most
    return [*lines[:most], *([f"and {rest} more {noun}"] if rest > 0 else [])]


def hub_hint(path: str | Path) -> str:
    """Return what to run where a path that does not exist may be an id on the Hugging Face hub, or an empty string."""
    path = Path(path)
    name = path.as_posix()
    if _HUB_ID.fullmatch(name) is None or path.exists() or (len(path.parts) == 2 and path.parent.exists()):
        return ""
    download = f"hf download {name} --local-dir {path.name}"
    return f" If it is an id on the Hugging Face hub, from which nothing is downloaded: run {download}, and give {path.name}."


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(?<!\.json)(?<!\.pt2)(?<!\.safetensors)", re.ASCII)


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the nearest known spellings, or an empty string."""
    near = get_close_matches(found, sorted(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(name) for name in near)}?)" if near else ""
