"""Train and eval in one graph: the two traces of a model are compared, and what differs becomes a module that knows the mode.

A trace bakes ``model.training`` in. So a model is traced in both modes, and the two graphs are walked side by side. They
may differ only in these ways, each of which a module can express:

    aten.dropout(x, p, train)                      ``nn.Dropout(p)``
    a dropout that the eval trace does not have    ``nn.Dropout(p)``
    ``contiguous`` in one of the two               as in the train trace
    attention's ``dropout_p``                      a literal → ``ModeSwitch(train=…, eval=…)``

Anything else (layer drop, a head that exists in training only) is refused, naming the node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.errors import TraceError
from lora_fx.provenance import module_path, source_line

aten = torch.ops.aten

DROPOUT = aten.dropout.default
_NAMED = ("placeholder", "get_attr")  # matched by name, wherever they stand
_IDENTITIES = frozenset({DROPOUT, aten.contiguous.default})

MODE_ARGUMENTS: Mapping[object, str] = {
    aten.scaled_dot_product_attention.default: "dropout_p",
}
"""Operator → the argument that carries the mode."""


class ModeSwitch(nn.Module):
    """Return one constant in training and another in evaluation."""

    def __init__(self, train: float, eval: float) -> None:
        super().__init__()
        self.train_value = train
        self.eval_value = eval

    def forward(self) -> float:
        """Return the value for the mode the module is in."""
        return self.train_value if self.training else self.eval_value

    def extra_repr(self) -> str:
        """Show both values where the module is printed."""
        return f"train={self.train_value}, eval={self.eval_value}"


def unite_modes(train: fx.Graph, evaluation: fx.Graph) -> dict[str, nn.Module]:
    """Make ``train``, the graph of the train trace, serve both modes (in place), and return the modules it now calls.

    Raises:
        TraceError: the two graphs differ in a way that no module expresses.
    """
    return _express(train, _differing_arguments(train, evaluation))


def drop_dropout(graph: fx.Graph) -> None:
    """Remove the dropout nodes of an eval trace, where they are identities (in place)."""
    for node in list(graph.nodes):
        if node.target is DROPOUT:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _differing_arguments(train: fx.Graph, evaluation: fx.Graph) -> dict[fx.Node, tuple[Any, Any]]:
    """Walk both graphs in order; return the nodes of ``train`` whose mode argument differs, with both values."""
    walk = _Walk(train, evaluation)
    for node in train.nodes:
        if node.op not in _NAMED:
            walk.step(node)
    return walk.differing


class _Walk:
    """The walk of the train graph along the eval graph, and how far it has come.

    A node that is the identity in evaluation (dropout), or on values (``contiguous``, which is recorded only where the
    strides of the fake tensors ask for it, and those depend on the attention kernel), may be missing on either side.
    """

    def __init__(self, train: fx.Graph, evaluation: fx.Graph) -> None:
        self._evaluation = [node for node in evaluation.nodes if node.op not in _NAMED]
        self._position = 0
        named = {(node.op, node.target): node for node in evaluation.nodes if node.op in _NAMED}
        self._image: dict[fx.Node, fx.Node] = {
            node: named[node.op, node.target]
            for node in train.nodes
            if node.op in _NAMED and (node.op, node.target) in named
        }
        self._value: dict[fx.Node, fx.Node] = {}
        self.differing: dict[fx.Node, tuple[Any, Any]] = {}

    def step(self, node: fx.Node) -> None:
        """Match the next node of the train graph."""
        other = self._evaluation[self._position]
        while other.target in _IDENTITIES and node.target is not other.target:
            self._value[other] = self._value_of(other.args[0])
            self._position += 1
            other = self._evaluation[self._position]
        if node.target in _IDENTITIES:
            self._image[node] = self._image[node.args[0]]  # type: ignore[index]
            if other.target is node.target and self._value_of(other.args[0]) is self._image[node]:
                self._value[other] = self._image[node]
                self._position += 1
        elif self._corresponds(node, other):
            self._image[node] = other
            self._position += 1
        else:
            raise _refusal(node, other)

    def _corresponds(self, node: fx.Node, other: fx.Node) -> bool:
        if (node.op, node.target) != (other.op, other.target):
            return False
        mine, theirs = named_arguments(node), named_arguments(other)
        mode_argument = MODE_ARGUMENTS.get(node.target)
        if mode_argument is not None:
            values = mine.pop(mode_argument, None), theirs.pop(mode_argument, None)
            if values[0] != values[1]:
                self.differing[node] = values
        return _same(fx.map_arg(mine, lambda n: self._image.get(n, n)), fx.map_arg(theirs, self._value_of))

    def _value_of(self, node: Any) -> Any:
        return self._value.get(node, node)


def _same(mine: object, theirs: object) -> bool:
    flat_mine, spec_mine = pytree.tree_flatten(mine)
    flat_theirs, spec_theirs = pytree.tree_flatten(theirs)
    return spec_mine == spec_theirs and all(
        type(a) is type(b) and (a is b or a == b) for a, b in zip(flat_mine, flat_theirs, strict=True)
    )


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a node that are not defaults, by the names of the schema; by position where there is none."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {**{str(i): value for i, value in enumerate(node.args)}, **node.kwargs}
    names = [argument.name for argument in schema.arguments]
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return {name: value for name, value in given.items() if name not in defaults or not _same(value, defaults[name])}


def _express(graph: fx.Graph, differing: Mapping[fx.Node, tuple[Any, Any]]) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        if node.target is DROPOUT:
            target = _unused(modules, _dropout_path(node))
            modules[target] = nn.Dropout(node.args[1])
            with graph.inserting_before(node):
                replacement = graph.call_module(target, (node.args[0],))
            replacement.meta = dict(node.meta)
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
        elif node in differing:
            argument = MODE_ARGUMENTS[node.target]
            target = _unused(modules, f"{module_path(node)}.{argument}".removeprefix("."))
            train_value, eval_value = (
                type(next(v for v in differing[node] if v is not None))(v or 0) for v in differing[node]
            )
            modules[target] = ModeSwitch(train_value, eval_value)
            with graph.inserting_before(node):
                switch = graph.call_module(target)
            switch.meta = {key: value for key, value in node.meta.items() if key != "val"}
            set_argument(node, argument, switch)
    return modules


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set an argument of an operator call by the name its schema gives it."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def _dropout_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    own = [path for path, kind in stack.values() if str(getattr(kind, "__name__", kind)).endswith("Dropout")]
    return own[-1] if own else f"{module_path(node)}.dropout".removeprefix(".")


def _unused(taken: Mapping[str, nn.Module], name: str) -> str:
    candidate, count = name, 1
    while candidate in taken:
        candidate, count = f"{name}_{count}", count + 1
    return candidate


def _refusal(node: fx.Node, other: fx.Node) -> TraceError:
    return TraceError(
        f"the model computes something else in training than in evaluation, beyond dropout: the train trace has {node.format_node()}, "
        f"where the eval trace has {other.format_node()}{source_line(node)}. Such a model cannot be trained as a graph; "
        "use inference=True to plan, fold and export it."
    )
