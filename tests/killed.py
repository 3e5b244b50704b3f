"""A process that does something over and over in children of its own, which are killed at given moments."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

TRIALS = [20, pytest.param(50, marks=pytest.mark.matrix)]
"""At how many moments an act is killed."""

_SERVER = """
import gc, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
{setup}
print("ready", flush=True)
for line in sys.stdin:
    out, overwrite, seconds = line.split()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        gc.freeze()  # else it copies its parent's memory to look for garbage
        os.write(writing, b"1")
        act(Path(out), overwrite == "1")
        os._exit(0)
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    start = time.perf_counter()
    if float(seconds) >= 0:
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), time.perf_counter() - start, flush=True)
"""


class Server:
    """Imports torch once, and has a child for each act."""

    def __init__(self, setup: str, *arguments: object) -> None:
        """Start it; ``setup`` is code that defines ``act(out, overwrite)``, with ``arguments`` in ``sys.argv``."""
        script = _SERVER.format(tests=str(Path(__file__).parent), setup=textwrap.dedent(setup))
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self._output.readline() == "ready\n"

    @property
    def _output(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def __call__(self, out: Path, *, overwrite: bool, seconds: float = -1.0) -> tuple[int, float]:
        """Act, and kill after that time; return the exit code and how long it was."""
        assert self.process.stdin is not None
        print(out, int(overwrite), seconds, file=self.process.stdin, flush=True)
        code, took = self._output.readline().split()
        return int(code), float(took)


@contextmanager
def server(setup: str, *arguments: object) -> Iterator[Server]:
    made = Server(setup, *arguments)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()


def check_killed(
    act: Server, place: Path, *, overwrite: bool, old: Callable[[Path], object], new: Callable[[Path], bool],
    same_as_old: Callable[[Path], bool], remove: Callable[[Path], object], trials: int,
) -> None:  # fmt: skip
    """Kill an act at moments through its length; its result must be there whole, or not at all.

    Args:
        act: writes to a path in ``place``.
        place: a new directory.
        overwrite: whether something is at the path before.
        old: makes that.
        new: tells whether a path has the result.
        same_as_old: tells whether a path has what was there.
        remove: removes a path.
        trials: how many moments.
    """
    out, times = place / "out", []
    for number in range(3):
        code, took = act(out, overwrite=number > 0)
        assert code == 0
        assert new(out)
        times.append(took)
    remove(out)
    source, longest = random.Random(17), 1.2 * sorted(times)[1]
    outcomes: list[tuple[int, str]] = []
    for trial in range(trials):
        if overwrite and not out.exists():
            old(out)
        code, _ = act(out, overwrite=overwrite, seconds=longest * (trial + source.random()) / trials)
        if not out.exists():
            found = "absent"
        elif new(out):
            found = "new"
        else:
            assert same_as_old(out), f"half a result after {trial} of {trials}"
            found = "old"
        outcomes.append((code, found))
        if found == "new":
            remove(out)
    before = "old" if overwrite else "absent"
    assert {found for _, found in outcomes} <= {before, "new"}
    assert all(found == "new" for code, found in outcomes if code == 0)
    assert sum(found == before for _, found in outcomes) >= trials // 3  # killed while it wrote
    assert act(out, overwrite=overwrite)[0] == 0
    assert new(out)
    assert [path.name for path in place.iterdir()] == ["out"]
