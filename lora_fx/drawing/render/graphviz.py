"""Layout by Graphviz in a process of its own: neither its crashes nor its endless layouts reach the caller."""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

from lora_fx.errors import ExportError, first_line

_OTHERWISE = "or write .html, .dot, .json or .txt, which need no Graphviz"
_DPI = "120"
_STARTS = {"svg": b"<?xml", "png": b"\x89PNG\r\n"}

# Imports nothing but pygraphviz, from the given directory: lora_fx, and with it torch, would take seconds.
_CHILD = """
import sys
sys.path.append(sys.argv[1])
try:
    import pygraphviz
    picture = pygraphviz.AGraph(string=sys.stdin.buffer.read().decode())
    picture.graph_attr.update({"dpi": sys.argv[3]} if sys.argv[2] == "png" else {})
    sys.stdout.buffer.write(picture.draw(format=sys.argv[2], prog="dot"))
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def render(dot_text: str, kind: Literal["svg", "png"], timeout: float = 60) -> bytes:
    """Lay a picture out by Graphviz; the same text gives the same bytes.

    Graphviz is that of pygraphviz where it is installed, and else ``dot`` on ``PATH``. An SVG refers to nothing outside
    of itself.

    Args:
        dot_text: the picture as DOT.
        kind: of the result.
        timeout: seconds after which a layout is given up.

    Raises:
        ExportError: there is no Graphviz, or it fails, or it takes longer than ``timeout``.
    """
    command = _command(kind)
    status, output, errors = _run(command, dot_text.encode(), timeout)
    if status != 0 or not output.startswith(_STARTS[kind]):
        said = first_line(errors.decode(errors="replace"), _ending(status))
        raise ExportError(
            f"Graphviz could not lay the picture out: {said} Update it (pip install -U pygraphviz), {_OTHERWISE}."
        )
    return _with_labels_on_top(_without_comments(output)) if kind == "svg" else output


def _command(kind: str) -> list[str]:
    # Nothing in the current directory is imported, not even a file called pygraphviz.
    places = [place for place in sys.path if place and Path(place) != Path.cwd()]
    found = importlib.machinery.PathFinder.find_spec("pygraphviz", places)
    if found is not None and found.origin is not None:
        return [sys.executable, "-I", "-c", _CHILD, str(Path(found.origin).parent.parent), kind, _DPI]
    program = shutil.which("dot")
    if program is not None:
        return [program, f"-T{kind}", *([f"-Gdpi={_DPI}"] if kind == "png" else [])]
    raise ExportError(
        f"a picture of the kind .{kind} is laid out by Graphviz, which is not installed: pip install 'lora-fx[draw]', or "
        f"install Graphviz so that its program dot is on PATH, {_OTHERWISE}."
    )


def _run(command: list[str], given: bytes, timeout: float) -> tuple[int, bytes, bytes]:
    """Run a command, and end it with all its children."""
    pipe = subprocess.PIPE
    environment = {**os.environ, "LC_ALL": "C"}  # a locale may change the layout of text
    try:
        process = subprocess.Popen(  # noqa: S603 -- an interpreter or Graphviz, and no shell
            command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=os.name == "posix"
        )
    except OSError as error:
        raise ExportError(f"cannot start {command[0]}: {error.strerror}. See to that, {_OTHERWISE}.") from error
    with process:
        try:
            output, errors = process.communicate(given, timeout)
        except subprocess.TimeoutExpired:
            raise ExportError(
                f"Graphviz did not finish the picture within {timeout:g} seconds. Draw a smaller part of the model, "
                f"{_OTHERWISE}."
            ) from None
        finally:
            _end(process)
    return process.returncode, output, errors


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, and on POSIX its whole group: what a script named ``dot`` started holds its pipes open."""
    if process.returncode is not None:
        return
    if os.name == "posix":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _ending(status: int) -> str:
    if status < 0:
        try:
            return f"it crashed ({signal.Signals(-status).name})."
        except ValueError:
            return f"it crashed (signal {-status})."
    return f"it ended with status {status} and said nothing." if status else "it wrote no picture."


_CLUSTER = re.compile(rb'<g id="clust\d+" class="cluster">.*?</g>', re.S)
_TEXT = re.compile(rb"<text [^>]*>[^<]*</text>\n?")


def _with_labels_on_top(svg: bytes) -> bytes:
    """Draw the labels of clusters last, each with a white edge: Graphviz leads edges across them."""
    labels = [text.strip() for cluster in _CLUSTER.findall(svg) for text in _TEXT.findall(cluster)]
    if not labels:
        return svg
    below = _CLUSTER.sub(lambda cluster: _TEXT.sub(b"", cluster[0]), svg)
    head, end, tail = below.rpartition(b"</g>\n</svg>")
    looks = b'<g class="labels" stroke="white" stroke-width="4" stroke-linejoin="round" paint-order="stroke">'
    return head + b"\n".join([looks, *labels, b"</g>", b""]) + end + tail


def _without_comments(svg: bytes) -> bytes:
    """Remove the version of Graphviz, the address of a DTD, and the names of nodes in comments."""
    text = re.sub(rb"<!--.*?-->|<!DOCTYPE[^>]*>", b"", svg, flags=re.DOTALL)
    return re.sub(rb"\n\s*\n+", b"\n", text)
