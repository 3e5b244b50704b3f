"""Where a node comes from: the module it was traced in, and the line of the model's own source."""

from __future__ import annotations

import re

from torch import fx


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the innermost module whose ``forward`` recorded this node; ``""`` for the root."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0].split("@")[0] if stack else ""


def source_line(node: fx.Node) -> str:
    """Return ``", at <file>:<line>: <code>"`` for the model's line that recorded this node, or an empty string."""
    return f", at {location}" if (location := source_of(node)) else ""


def source_of(node: fx.Node) -> str:
    """Return ``<file>:<line>: <code>`` for the model's line that recorded this node, or an empty string."""
    location, code = _source(node)
    return f"{location}{f': {code}' if code else ''}"


def code_of(node: fx.Node) -> str:
    """Return the text of that line alone, which is the same wherever the file lies."""
    return _source(node)[1]


def _source(node: fx.Node) -> tuple[str, str]:
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    for position in range(len(frames) - 1, -1, -1):
        match = _LOCATION.match(frames[position])
        if match is not None and "/torch/" not in match["file"]:
            return f"{match['file']}:{match['line']}", frames[position + 1] if position + 1 < len(frames) else ""
    return "", ""


_LOCATION = re.compile(r'File "(?P<file>.*)", line (?P<line>\d+)')
