"""One HTML file that shows a description of a graph: self-contained, without any request."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any

# Not allowed in the text of a script element: they could end it, or start a comment.
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def page(description: Mapping[str, Any]) -> str:
    """Return an HTML file in which a graph can be looked at, searched and downloaded as SVG or PNG.

    It works from a file, without a server and without a network, and its Content-Security-Policy lets it load nothing.

    Args:
        description: of a graph, as ``lora_fx.drawing.draw.describe`` makes it.

    Returns:
        The text of the file, the same for the same description.
    """
    style, viewer, layout = _read("page.css"), _read("page.js"), _layout()
    policy = {
        "default-src": "'none'",
        "script-src": f"{_hash(layout)} {_hash(viewer)}",
        "style-src": _hash(style),
        "img-src": "data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return Template(_read("page.html")).substitute(
        policy="; ".join(f"{name} {value}" for name, value in policy.items()),
        title=html.escape(_one_line(str(description.get("title", "graph")))),
        style=style,
        description=json.dumps(description, separators=(",", ":"), allow_nan=False).translate(_ESCAPES),
        layout=layout,
        viewer=viewer,
    )


def _read(name: str) -> str:
    return files("lora_fx.drawing.render").joinpath("assets", name).read_text(encoding="utf-8")


def _layout() -> str:
    """Return the layout library with its licence, which has to go with every copy of it, without its source map."""
    code = "".join(line for line in _read("dagre.min.js").splitlines(True) if not line.startswith("//# source"))
    return f"/*!\n{_read('dagre.LICENSE.txt')}*/\n{code}"


def _hash(text: str) -> str:
    """Return the source expression with which a Content-Security-Policy allows an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _one_line(text: str) -> str:
    """Return a text as a title can show it: one line, of characters that UTF-8 has."""
    return " ".join(text.encode("utf-8", "replace").decode().split())
