"""Where a node comes from: the module it was traced in, and the line of the model's own source."""

from __future__ import annotations

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
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    for position in range(len(frames) - 1, -1, -1):
        location = frames[position]
        if location.startswith("File ") and "/torch/" not in location:
            code = f": {frames[position + 1]}" if position + 1 < len(frames) else ""
            file, line = location.split('"')[1], location.split("line ")[1].split(",")[0]
            return f"{file}:{line}{code}"
    return ""
