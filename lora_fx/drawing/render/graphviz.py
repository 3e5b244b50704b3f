"""Layout by Graphviz in a process of its own: neither its crashes nor its endless layouts reach the caller."""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from lora_fx.errors import ExportError, first_line

_OTHERWISE = "or write .html, .dot, .json or .txt, which need no Graphviz"
_DPI = "120"
_STARTS = {"svg": b"<?xml", "png": b"\x89PNG\r\n", "dot": b"digraph"}

# Imports nothing but pygraphviz, from the given directory: lora_fx, and with it torch, would take seconds.
_CHILD = """
import sys
sys.path.append(sys.argv[1])
try:
    import pygraphviz
    picture = pygraphviz.AGraph(string=sys.stdin.buffer.read().decode())
    picture.graph_attr.update({"dpi": sys.argv[4]} if sys.argv[3] == "png" else {})
    sys.stdout.buffer.write(picture.draw(format=sys.argv[3], prog=sys.argv[2]))
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
    laid_out = _drawn(dot_text, "dot", "dot", timeout).decode()
    picture = _drawn(_with_labels_on_top(laid_out), "nop2", kind, timeout)
    return _without_comments(picture) if kind == "svg" else picture


def _drawn(dot_text: str, engine: Literal["dot", "nop2"], kind: Literal["svg", "png", "dot"], timeout: float) -> bytes:
    """Return what Graphviz makes of a picture.

    Args:
        dot_text: the picture as DOT.
        engine: dot lays it out; nop2 takes all positions as the text has them.
        kind: of the result; ``"dot"`` is the text with positions.
        timeout: seconds after which it is given up.
    """
    status, output, errors = _run(_command(engine, kind), dot_text.encode(), timeout)
    if status != 0 or not output.startswith(_STARTS[kind]):
        said = first_line(errors.decode(errors="replace"), _ending(status))
        raise ExportError(
            f"Graphviz could not lay the picture out: {said} Update it (pip install -U pygraphviz), {_OTHERWISE}."
        )
    return output


def _command(engine: str, kind: str) -> list[str]:
    # Nothing in the current directory is imported, not even a file called pygraphviz.
    places = [place for place in sys.path if place and Path(place) != Path.cwd()]
    found = importlib.machinery.PathFinder.find_spec("pygraphviz", places)
    if found is not None and found.origin is not None:
        return [sys.executable, "-I", "-c", _CHILD, str(Path(found.origin).parent.parent), engine, kind, _DPI]
    program = shutil.which("dot")
    if program is not None:
        return [program, f"-K{engine}", f"-T{kind}", *([f"-Gdpi={_DPI}"] if kind == "png" else [])]
    raise ExportError(
        "a picture as .svg or .png is laid out by Graphviz, which is not installed: pip install 'lora-fx[draw]', or "
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


_STRING = r'"(?:\\.|[^"\\])*"'
_CLUSTER = re.compile(
    rf'{_STRING}|<<.*?>>|(?P<head>subgraph (?P<name>cluster_\w+) \{{\s*graph \[)(?P<attributes>(?:{_STRING}|[^\]"])*)\]',
    re.S,
)
_ATTRIBUTE = re.compile(rf"(\w+)=({_STRING}|[\w.#-]+)", re.S)


def _with_labels_on_top(laid_out: str) -> str:
    """Return a picture with its positions in which the labels of clusters are nodes, and all nodes are drawn over all edges.

    Graphviz leads edges across the labels of clusters.
    """
    labels: list[str] = []

    def bare(cluster: re.Match[str]) -> str:
        if cluster["head"] is None:  # a string: not read for clusters
            return cluster[0]
        attributes = dict(_ATTRIBUTE.findall(cluster["attributes"]))
        if not attributes.keys() >= {"label", "lp", "lwidth", "lheight", "bgcolor"}:
            return cluster[0]
        label = {
            "label": attributes.pop("label"),
            "pos": attributes.pop("lp"),
            "width": attributes.pop("lwidth"),
            "height": attributes.pop("lheight"),
            "fillcolor": attributes["bgcolor"],
            **{"shape": "box", "style": "filled", "penwidth": "0", "margin": "0"},
        }
        labels.append(f'"label:{cluster["name"]}" [{_joined(label)}]')
        return f'{cluster["head"]}{_joined(attributes)} label=""]'

    text = _CLUSTER.sub(bare, laid_out)
    body, end, _ = text.rpartition("}")
    return "\n".join([body, "graph [outputorder=edgesfirst]", *labels, end, ""])


def _joined(attributes: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in attributes.items())


def _without_comments(svg: bytes) -> bytes:
    """Remove the version of Graphviz, the address of a DTD, and the names of nodes in comments."""
    text = re.sub(rb"<!--.*?-->|<!DOCTYPE[^>]*>", b"", svg, flags=re.DOTALL)
    return re.sub(rb"\n\s*\n+", b"\n", text)
