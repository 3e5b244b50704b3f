"""Printing that cannot fail for want of a character or of a reader: streams of any encoding, closed pipes, no stream at all.

A command whose result is its text fails where that cannot be printed; one that has written a file has done so whatever becomes
of the lines about it (:func:`remark`).
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

import typer
from typer.core import TyperCommand, TyperGroup

from lora_fx.cli.console import OUTPUT


def _stand_ins() -> dict[str, str]:
    box, blocks, braille = (map(chr, range(*ends)) for ends in ((0x2500, 0x2580), (0x2580, 0x25A0), (0x2800, 0x2900)))
    return {
        **dict.fromkeys(box, "+"), **dict.fromkeys("─━┄┅┈┉╌╍═╴╶╸╺╼╾", "-"), **dict.fromkeys("│┃┆┇┊┋║╎╏╵╷╹╻╽╿", "|"),
        **dict.fromkeys(blocks, "#"), **dict.fromkeys(braille, "*"),
        "×": "x", "·": ".", "•": "*", "–": "-", "—": "-", "−": "-", "…": "...", "→": "->", "←": "<-", "⇄": "%",
        "≤": "<=", "≥": ">=", "≠": "!=", "±": "+/-", "³": "3", "‘": "'", "’": "'", "“": '"', "”": '"', "\N{NO-BREAK SPACE}": " ",
    }  # fmt: skip


STAND_INS = _stand_ins()
"""What is printed of a character that the encoding lacks: lines of tables, bars, and signs of our own messages."""


def shown(text: str, encoding: str) -> str:
    """Return a text of which every character is in an encoding: stand-ins for signs, an escape for any other."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(_shown_character(each, encoding) for each in text)
    return text


def _shown_character(character: str, encoding: str) -> str:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return STAND_INS.get(character) or character.encode("ascii", "backslashreplace").decode("ascii")
    return character


class PrintError(OSError):
    """The standard output takes no more: its disk is full, or its reader has gone."""


class Output:
    """A text stream that shows any text in its encoding, and tells once that it cannot be written to; then it drops what comes."""

    def __init__(self, stream: TextIO, *, strict: bool) -> None:
        self._stream, self._strict, self._failed = stream, strict, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text.

        Raises:
            PrintError: it cannot be written, for the first time, and the stream is ``strict``.
        """
        self._try(lambda: self._stream.write(shown(text, getattr(self._stream, "encoding", None) or "utf-8")))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write texts one after another."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand on what was written; raises as :meth:`write` does."""
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            act()
        except (OSError, ValueError) as error:  # the latter of a stream that was closed
            self._failed = True
            self._discard_buffer()
            if self._strict:
                raise PrintError(
                    getattr(error, "errno", None), str(getattr(error, "strerror", None) or error)
                ) from error

    def _discard_buffer(self) -> None:
        """Let the interpreter, which flushes the stream once more as it ends, succeed at that."""
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def printable() -> Iterator[None]:
    """Let standard output and error take any text for the length of a block, also where there is none (``pythonw``).

    Exit with 5 where the standard output cannot be written to. What is lost on standard error is progress, and changes nothing.
    """
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123
        sys.stdout = cast(TextIO, Output(before[0] or nowhere, strict=True))
        sys.stderr = cast(TextIO, Output(before[1] or nowhere, strict=False))
        try:
            try:
                yield
            finally:
                sys.stdout.flush()
        except PrintError as error:
            if error.errno != errno.EPIPE:  # `lora-fx plan … | head` has what it wants
                sys.stderr.write(f"error: cannot print the result: {error.strerror}.\n")
            sys.exit(OUTPUT)
        finally:
            sys.stderr.flush()
            sys.stdout, sys.stderr = before


def remark(text: str) -> None:
    """Print a line about a result that was written. Where that fails, the command has succeeded nevertheless."""
    try:
        print(text, flush=True)
    except OSError as error:
        if error.errno != errno.EPIPE:
            print(f"warning: all was written, but not what is printed about it: {error.strerror}.", file=sys.stderr)


class PrintableGroup(TyperGroup):
    """Commands, their help and the errors in how they are called, printed on any stream."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run, see :func:`printable`."""
        with printable():
            return super().main(*arguments, **options)


class PrintableCommand(TyperCommand):
    """A command of its own, as :class:`PrintableGroup`."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run, see :func:`printable`."""
        with printable():
            return super().main(*arguments, **options)


def run_script(function: Callable[..., Any], *, epilog: str | None = None) -> None:
    """Run a function as the command of a script, as ``typer.run`` does."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=PrintableCommand, epilog=epilog)(function)
    app()
