"""Write the API reference from the docstrings: plain HTML, a page for each public module. No network is needed.

Example:  python tools/make_docs.py --out docs

Errors are: a warning of pdoc, a public name without a docstring, and a link or a reference that leads nowhere.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pdoc
import typer

from lora_fx.cli.printing import run_script

PAGES = ("lora_fx", "lora_fx.trainer", "lora_fx.runtime")
"""Modules to document; those in the ``__all__`` of one have a page of their own."""

REFERENCE = re.compile(r"<code>~?(lora_fx\.[\w.]+)\(\)</code>")


def public_names() -> Iterator[tuple[str, str]]:
    """Yield each public module and each name that it offers."""
    modules = list(PAGES)
    for module in modules:
        loaded = importlib.import_module(module)
        for name in getattr(loaded, "__all__", None) or [name for name in vars(loaded) if not name.startswith("_")]:
            value = getattr(loaded, name)
            if inspect.ismodule(value):
                modules += [value.__name__] if hasattr(loaded, "__all__") else []
            elif hasattr(loaded, "__all__") or getattr(value, "__module__", None) == module:
                yield module, name


def build(out: Path) -> list[str]:
    """Write the reference, and return what is wrong with it."""
    problems = [
        f"{module}.{name} has no docstring"
        for module, name in public_names()
        if not inspect.getdoc(getattr(importlib.import_module(module), name))
    ]
    pdoc.render.configure(docformat="google", show_source=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pdoc.pdoc(*PAGES, output_directory=out)
    return [*problems, *(str(warning.message) for warning in caught), *problems_of(out)]


def problems_of(out: Path) -> Iterator[str]:
    """Yield the public names that no page has, and the links and references of pages that lead nowhere."""
    pages = {path: path.read_text(encoding="utf-8") for path in out.rglob("*.html")}
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    for module, name in public_names():
        page = out / f"{module.replace('.', '/')}.html"
        if name not in anchors.get(page, ()):
            yield f"{module}.{name} is not in {page}"
    for path, text in pages.items():
        for link in re.findall(r'\bhref="([^"]+)"', re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)):
            if re.match(r"[a-z]+:", link):
                continue
            target, _, anchor = link.partition("#")
            page = (path.parent / target).resolve() if target else path.resolve()
            if not page.exists() or (anchor and anchor not in anchors[page]):
                yield f"{path}: the link to {link!r} leads nowhere"
        for reference in REFERENCE.findall(text):
            yield f"{path}: {reference} is named, but it is not public"


def main(out: Annotated[Path, typer.Option(help="Directory for the pages.")] = Path("docs")) -> None:
    """Write the API reference."""
    problems = build(out.resolve())
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise typer.Exit(1)
    print(f"{out / 'index.html'}: {sum(1 for _ in public_names())} names")


if __name__ == "__main__":
    run_script(main)
