"""Provenance of a node: the module it was traced in, the line of the model's own source, and the stamp of a branch's node."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

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


def stamp_of(node: fx.Node) -> Mapping[str, Any]:
    """Return the stamp on a node of a branch: rule, site, adapter and part. Empty on any other node."""
    custom = node.meta.get("custom")
    stamp = custom.get(_STAMP) if isinstance(custom, Mapping) else None
    return stamp if isinstance(stamp, Mapping) else {}


def write_stamp(node: fx.Node, stamp: Mapping[str, Any], like: fx.Node | None = None) -> None:
    """Stamp a node as part of a branch.

    Args:
        node: of a branch.
        stamp: of JSON alone, since torch's exporters write ``custom`` into files.
        like: a node whose other ``custom`` entries the new one gets.
    """
    custom = {} if like is None else like.meta.get("custom") or {}
    node.meta["custom"] = {**custom, _STAMP: dict(stamp)}


_STAMP = "lora_fx"


def _source(node: fx.Node) -> tuple[str, str]:
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    for position in range(len(frames) - 1, -1, -1):
        match = _LOCATION.match(frames[position])
        if match is not None and "/torch/" not in match["file"]:
            return f"{match['file']}:{match['line']}", frames[position + 1] if position + 1 < len(frames) else ""
    return "", ""


_LOCATION = re.compile(r'File "(?P<file>.*)", line (?P<line>\d+)')


def called_modules(graph_module: fx.GraphModule) -> set[str]:
    """Return the paths of the modules that recorded nodes."""
    stacks = (node.meta.get("nn_module_stack") or {} for node in graph_module.graph.nodes)
    return {path.split("@")[0] for stack in stacks for path, _ in stack.values()} - {""}
