"""Places of results: what a write may replace there, and what it must not touch. One rule for every writer."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_fx.errors import WriteError, listed, option


@dataclass(frozen=True)
class DirectoryKind:
    """A kind of directory that a writer makes.

    Attributes:
        noun: name of such a directory in messages, ``"an adapter"``.
        includes: tells whether the writer writes a file of this path: relative, with forward slashes. Only a directory all of
            whose files it includes is replaced.
    """

    noun: str
    includes: Callable[[str], bool]


@dataclass(frozen=True)
class Target:
    """The place of a result.

    Attributes:
        path: of the file or directory to be made.
        overwrite: whether an existing one is to be replaced.
        reads: files and directories that the result is made from. None of them is written over, by the paths that they resolve
            to: the target is none of them, holds none of them and lies in none of them. A new file may lie in one.
        kind: of a directory; None for a file.
    """

    path: Path
    overwrite: bool = False
    reads: tuple[Path, ...] = ()
    kind: DirectoryKind | None = None

    def check(self) -> None:
        """Raise unless the result may be written here. Nothing is changed.

        Raises:
            WriteError: the target is read, holds or lies in what is read, exists and is not to be replaced, is a directory in
                place of a file or the reverse, is the working directory, or holds more than such a result.
        """
        for read in self.reads:
            self._check_apart(read)
        if self.kind is None and self.path.is_dir():
            raise WriteError(f"{self.path} is a directory, and a file is not written in place of one. {_ELSEWHERE}")
        if not os.path.lexists(self.path):
            return
        if not self.overwrite:
            raise WriteError(
                f"{self.path} exists already. Choose another name, or replace it: {option('overwrite=True', '--overwrite')}."
            )
        if self.kind is not None and self.path.exists():
            self._check_replaceable(self.kind)

    def _check_apart(self, read: Path) -> None:
        # Where links lead, and where they are: a rename replaces a link itself, and takes away what is reached through it.
        sources = dict.fromkeys(
            (Path(os.path.realpath(read)), Path(os.path.normpath((_working_directory() or Path()) / read)))
        )
        places = dict.fromkeys(
            (Path(os.path.realpath(self.path)), Path(os.path.realpath(self.path.parent)) / self.path.name)
        )
        for source, place in itertools.product(sources, places):
            if place == source or _is_same(place, source):
                told = "is" if str(self.path) == str(read) else f"is the same place as {read}, which is"
                raise WriteError(f"{self.path} {told} read to make the result, and is not written over. {_ELSEWHERE}")
            if place in source.parents:
                raise WriteError(f"{self.path} holds {read}, which is read to make the result. {_ELSEWHERE}")
            writes_over_nothing = self.kind is None and not os.path.lexists(self.path)
            if source in place.parents and not writes_over_nothing:
                raise WriteError(f"{self.path} lies in {read}, which is read to make the result. {_ELSEWHERE}")

    def _check_replaceable(self, kind: DirectoryKind) -> None:
        if not self.path.is_dir():
            raise WriteError(f"{self.path} is a file, and {kind.noun} is a directory. {_ELSEWHERE}")
        if self.path.is_symlink():
            return  # the link alone is replaced
        here = _working_directory()
        place = Path(os.path.realpath(self.path))
        if here is not None and place in (here, *here.parents):
            told = "is" if place == here else "holds"
            raise WriteError(f"{self.path} {told} the working directory, which is not replaced. {_ELSEWHERE}")
        other = sorted(path for path in _entries(self.path) if not kind.includes(path))
        if other:
            raise WriteError(
                f"{self.path} holds more than {kind.noun}: {listed(other, _MAX_NAMED)}. Nothing was touched: move that "
                "away, or choose another name."
            )


_ELSEWHERE = "Choose another name."
_MAX_NAMED = 5


def _entries(directory: Path) -> Iterator[str]:
    """Yield what a directory holds at any depth: files and links by their paths, and with a slash empty or unreadable directories."""
    unreadable: list[str] = []

    def record(error: OSError) -> None:
        unreadable.append(str(error.filename))

    for parent, directories, files in os.walk(directory, onerror=record):
        place = Path(parent)
        links = [name for name in directories if (place / name).is_symlink()]
        yield from ((place / name).relative_to(directory).as_posix() for name in (*links, *files))
        if not directories and not files and place != directory:
            yield f"{place.relative_to(directory).as_posix()}/"
    yield from (f"{Path(path).relative_to(directory).as_posix()}/" for path in unreadable)


def _is_same(one: Path, other: Path) -> bool:
    """Tell whether two paths are one file, as names of other case are on some systems."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def _working_directory() -> Path | None:
    try:
        return Path(os.path.realpath(Path.cwd()))
    except OSError:  # it was removed
        return None
