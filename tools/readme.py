"""Texts that tools make for README.md, each between its markers."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def write(tool: str, text: str, path: Path = README) -> None:
    """Put a text where that of a tool stands.

    Args:
        tool: its path from the root, as the marker spells it.
        text: instead of the present one.
        path: the file; it is left as it is unless it has the marker once.
    """
    old = path.read_text(encoding="utf-8")
    block = re.compile(rf"(<!-- made by {re.escape(tool)} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
    new, count = block.subn(lambda found: f"{found[1]}{text}\n{found[2]}", old)
    if count != 1:
        raise SystemExit(f"{path} has {count} places for what {tool} makes: it needs '<!-- made by {tool} -->', once.")
    path.write_text(new, encoding="utf-8")
