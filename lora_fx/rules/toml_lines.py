"""TOML with the lines that its keys stand on: tomllib gives values without positions; those are in tree-sitter's syntax tree."""

from __future__ import annotations

import re
import tomllib
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tree_sitter_toml
from tree_sitter import Language, Node, Parser

from lora_fx.errors import RuleError
from lora_fx.files.bounded import read_bounded

KeyPath = tuple[str | int, ...]
"""Keys and, for items of an array, indices: ``("select", 1, "rank")``."""

FILE_BYTES = 65_536
_MAX_PARTS = 4000  # of a dotted key, for which tomllib takes quadratic time
_DOTTED = re.compile(r"""(?:\.[ \t]*+(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+)++""")
DEEPEST = 8  # parts of a key path that are told apart; a hostile text can nest as deep as it is long


def read_toml(path: Path) -> tuple[dict[str, Any], Mapping[KeyPath, int]]:
    """Return the values of a TOML file, and the lines they stand on.

    Raises:
        RuleError: it cannot be read, or is not TOML.
    """
    try:
        data = read_bounded(path, FILE_BYTES)
        text = data.decode("utf-8-sig")
        if any(found[0].count(".") > _MAX_PARTS for found in _DOTTED.finditer(text)):
            raise RecursionError
        return tomllib.loads(text), toml_lines(text)
    except OSError as error:
        raise RuleError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise RuleError(str(path), [f"is not UTF-8 text: {error}"]) from error
    except RecursionError as error:
        raise RuleError(str(path), ["is not valid TOML: it nests too deep"]) from error
    except ValueError as error:  # tomllib's own error, and Python's for an integer with too many digits
        raise RuleError(str(path), [f"is not valid TOML: {error}"]) from error


def toml_lines(text: str) -> Mapping[KeyPath, int]:
    """Return the line, counted from 1, of every key, table header and array item of a valid TOML text.

    A table that no header opens stands where its first key stands. A text that tree-sitter cannot parse has no lines.
    """
    root = Parser(Language(tree_sitter_toml.language())).parse(text.encode()).root_node
    lines: dict[KeyPath, int] = {}
    pending: deque[tuple[Node, KeyPath]] = deque() if root.has_error else deque([(root, ())])
    arrays: dict[KeyPath, int] = {}  # index of the latest table of each array of tables
    while pending:
        node, path = pending.popleft()
        if len(path) > DEEPEST:
            continue
        children = [child for child in node.named_children if child.type != "comment"]
        match node.type:
            case "table" | "table_array_element":
                path = _open_table(node, children.pop(0), lines, arrays)
                pending.extend((child, path) for child in children)
            case "pair":
                key, value = children
                for part in _keys(key):
                    path = (*path, part)
                    lines.setdefault(path, _line(key))
                pending.append((value, path))
            case "array":
                for index, item in enumerate(children):
                    lines[*path, index] = _line(item)
                    pending.append((item, (*path, index)))
            case "document" | "inline_table":
                pending.extend((child, path) for child in children)
    return lines


def _open_table(table: Node, header: Node, lines: dict[KeyPath, int], arrays: dict[KeyPath, int]) -> KeyPath:
    """Note the line of a header, ``[a.b]`` or ``[[a.b]]``, and return the path of the table that it opens."""
    path: KeyPath = ()
    keys = _keys(header)
    for key in keys[:-1]:
        path = (*path, key)
        lines.setdefault(path, _line(header))
        if path in arrays:  # a header speaks of the latest table of an array
            path = (*path, arrays[path])
    path = (*path, keys[-1])
    if table.type == "table_array_element":
        lines.setdefault(path, _line(header))
        arrays[path] = arrays.get(path, -1) + 1
        path = (*path, arrays[path])
    lines[path] = _line(header)
    return path


def _keys(key: Node) -> tuple[str, ...]:
    parts: list[Node] = []
    while key.type == "dotted_key":  # a.b.c is ((a, b), c)
        key, last = key.named_children
        parts.append(last)
    return tuple(_key(part) for part in [key, *reversed(parts)][:DEEPEST])


def _key(key: Node) -> str:
    text = (key.text or b"").decode()
    return next(iter(tomllib.loads(f"{text} = 0"))) if key.type == "quoted_key" else text


def _line(node: Node) -> int:
    return node.start_point.row + 1
