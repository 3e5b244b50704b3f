"""Names of values as the lines of the model's code that read them have them: ``hidden_states`` in place of ``mul_4``."""

from __future__ import annotations

import ast
from functools import lru_cache

from lora_fx.drawing.describe.difference import Entry
from lora_fx.graph.provenance import code_of


def name_read(reader: Entry, source: Entry) -> str:
    """Return what the model's code calls the only value that an operator reads; an empty string where that is not plain.

    It is plain where the line calls the operator's module with a name, ``self.q(hidden_states)``, or a method of a name and nothing
    else, ``cos.unsqueeze(axis)``, or has one name beside those that it calls or takes attributes of.

    Args:
        reader: an operator.
        source: the value, which is no input of the model: those have their names.
    """
    if source.node.op == "placeholder":
        return ""
    frames = reader.reader.frames(reader.node)
    module = frames[-1].path.rpartition(".")[2] if frames else ""
    name = _name_in(code_of(reader.node), module)
    return name if name != source.node.name else ""


# What functions are called of, by the names that code imports them under.
_NO_VALUES = {"self", "torch", "nn", "F", "math"}


@lru_cache(4096)  # layers have the same lines
def _name_in(code: str, module: str) -> str:
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):  # a part of a statement of several lines
        return ""
    for call in ast.walk(tree):
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == module
            and call.args
        ):
            return call.args[0].id if isinstance(call.args[0], ast.Name) else ""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    methods_of = {
        call.func.value.id
        for call in calls
        if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name)
    } - _NO_VALUES
    if methods_of:
        return methods_of.pop() if len(calls) == 1 else ""
    passive = {
        id(inner)
        for node in ast.walk(tree)
        for inner in (
            [node.func] if isinstance(node, ast.Call) else [node.value] if isinstance(node, ast.Attribute) else []
        )
    }
    names = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and id(node) not in passive
    }
    return names.pop() if len(names) == 1 else ""
