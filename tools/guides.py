"""README.md and the guides: where they are, and the texts in them that tools make, each between its markers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("rules", "lora_fx", "tools", "tests")
GUIDES = (
    ROOT / "README.md",
    *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md")),
)


def made(tool: str, paths: Sequence[Path] = GUIDES) -> str:
    """Return the text that a tool made before, from the first guide with its marker; see :func:`write`."""
    block = re.compile(rf"<!-- made by {re.escape(tool)} -->\n(.*?)\n<!-- end -->", flags=re.DOTALL)
    found = (block.search(path.read_text(encoding="utf-8")) for path in paths)
    return next(each[1] for each in found if each is not None)


def write(tool: str, text: str, paths: Sequence[Path] = GUIDES) -> None:
    """Replace the text that a tool made before.

    Args:
        tool: its path from the root, as the marker spells it.
        text: instead of the present one.
        paths: where to look for the marker; nothing is written unless it is there once.
    """
    block = re.compile(rf"(<!-- made by {re.escape(tool)} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
    places = [path for path in paths for _ in block.finditer(path.read_text(encoding="utf-8"))]
    if len(places) != 1:
        raise SystemExit(
            f"expected '<!-- made by {tool} -->' once in README.md and the guides, got it {len(places)} times. "
            "Put the marker, and <!-- end -->, where the text belongs."
        )
    old = places[0].read_text(encoding="utf-8")
    places[0].write_text(block.sub(lambda found: f"{found[1]}{text}\n{found[2]}", old), encoding="utf-8")
