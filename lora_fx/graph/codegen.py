"""Code generation with fewer steps of Python than torch.fx takes, which is the time that a small batch waits for.

torch.fx calls operators as ``torch.ops.aten.add.Tensor``, which looks its arguments up in a schema at each call. ``torch.add`` is
the same operator a microsecond sooner; the table has such functions for the operators of common models. And torch.fx looks each
tensor up from the root, by one Python function per part of its name; here the modules on the way are looked up once per call.
"""

from __future__ import annotations

import copy
import functools
import keyword
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen

aten = torch.ops.aten

BINDINGS: Mapping[Any, str] = {
    aten.add.Tensor: "torch.add",
    aten.addmm.default: "torch.addmm",
    aten.bmm.default: "torch.bmm",
    aten.cat.default: "torch.cat",
    aten.contiguous.default: "torch.Tensor.contiguous",
    aten.cos.default: "torch.cos",
    aten.div.Tensor: "torch.div",
    aten.embedding.default: "torch.embedding",
    aten.expand.default: "torch.Tensor.expand",
    aten.gelu.default: "torch._C._nn.gelu",
    aten.index_select.default: "torch.index_select",
    aten.layer_norm.default: "torch.layer_norm",
    aten.linear.default: "torch._C._nn.linear",
    aten.matmul.default: "torch.matmul",
    aten.mean.dim: "torch.mean",
    aten.mul.Tensor: "torch.mul",
    aten.neg.default: "torch.neg",
    aten.permute.default: "torch.permute",
    aten.pow.Tensor_Scalar: "torch.pow",
    aten.relu.default: "torch.relu",
    aten.reshape.default: "torch.reshape",
    aten.rsqrt.default: "torch.rsqrt",
    aten.scaled_dot_product_attention.default: "torch._C._nn.scaled_dot_product_attention",
    aten.select.int: "torch.select",
    aten.silu.default: "torch._C._nn.silu",
    aten.sin.default: "torch.sin",
    aten.softmax.int: "torch.softmax",
    aten.sub.Tensor: "torch.sub",
    aten.tanh.default: "torch.tanh",
    aten.to.dtype: "torch.Tensor.to",
    aten.transpose.int: "torch.transpose",
    aten.unsqueeze.default: "torch.unsqueeze",
    aten.view.default: "torch.Tensor.view",
}
"""Operator → the expression of a function that calls it with the same arguments."""

MAX_POSITIONAL: Mapping[Any, int] = {aten.to.dtype: 4}
"""Operator → the number of positional arguments of its function, where the operator has more."""

_COUNTER = re.compile(r"# COUNTER: (\d+)\n")


class ShortCode(CodeGen):
    """A code generator that writes short code to run; the printed code (``verbose``) keeps the names of the operators."""

    def _gen_python_code(
        self, nodes: Any, root_module: str, namespace: Any, *, verbose: bool = False, **options: Any
    ) -> fx.graph.PythonCode:
        given = self._body_transformer

        def transformed(body: list[str]) -> list[str]:
            return shortened(body if given is None else given(body), tuple(nodes), root_module)

        generator = copy.copy(self)  # graphs share this object
        generator._body_transformer = given if verbose else transformed
        return super(ShortCode, generator)._gen_python_code(nodes, root_module, namespace, verbose=verbose, **options)


def shortened(body: Sequence[str], nodes: Sequence[fx.Node], root: str) -> list[str]:
    """Return a shorter ``forward`` that computes the same, as statements.

    Args:
        body: as a transformer of ``fx.Graph.on_generate_code`` gets it: the statement of the n-th node stands behind a line with
            its number.
        nodes: of the graph.
        root: the name of the module in the code.
    """
    owners = _Owners(root, {node.name for node in nodes})
    made: list[str] = []
    node: fx.Node | None = None
    for text in body:
        made.append(text if node is None else _statement(text, node, owners))
        counter = _COUNTER.fullmatch(text)
        node = None if counter is None else nodes[int(counter[1])]
    return made


def _statement(text: str, node: fx.Node, owners: _Owners) -> str:
    """Return the short statement of a node; other text unchanged."""
    if _has_binding(node):
        return text.replace(f"{node.name} = torch.ops.{node.target}(", f"{node.name} = {BINDINGS[node.target]}(", 1)
    if node.op in ("get_attr", "call_module"):
        *path, last = str(node.target).split(".")
        before = f"{node.name} = {_attribute(owners.root, [*path, last])}"
        if text.startswith(before):
            looked_up, owner = owners.of(path)
            return f"{looked_up}{node.name} = {_attribute(owner, [last])}{text.removeprefix(before)}"
    return text


def _has_binding(node: fx.Node) -> bool:
    """Tell whether the function takes the same arguments: its positional ones have other names than in the schema."""
    if node.op != "call_function" or node.target not in BINDINGS:
        return False
    return node.kwargs.keys() <= _keyword_only(node.target) and len(node.args) <= MAX_POSITIONAL.get(
        node.target, len(node.args)
    )


@functools.cache
def _keyword_only(operator: Any) -> frozenset[str]:
    return frozenset(argument.name for argument in operator._schema.arguments if argument.kwarg_only)


class _Owners:
    """The local variables of a ``forward`` for the modules on the way to its tensors."""

    def __init__(self, root: str, taken: set[str]) -> None:
        self.root = root
        self._names: Iterator[str] = (name for n in range(2**62) if (name := f"_module_{n}") not in taken)
        self._known: dict[tuple[str, ...], str] = {(): root}

    def of(self, path: Sequence[str]) -> tuple[str, str]:
        """Return the assignments that are still missing, and the variable for the module of this path."""
        assignments = ""
        for length in range(1, len(path) + 1):
            key = tuple(path[:length])
            if key not in self._known:
                owner, name = self._known[key[:-1]], next(self._names)
                assignments += f"{name} = {_attribute(owner, [key[-1]])}; "
                self._known[key] = name
        return assignments, self._known[tuple(path)]


def _attribute(owner: str, path: Sequence[str]) -> str:
    """Return the expression by which torch.fx reads an attribute of an attribute."""
    for part in path:
        owner = f"{owner}.{part}" if part.isidentifier() else f'getattr({owner}, "{part}")'
    return owner


@functools.lru_cache(maxsize=2**14)
def is_usable_part(part: str) -> bool:
    """Tell whether torch.fx writes valid code for a dotted name with this part: ``self.part``, or ``getattr(self, "part")``."""
    # Python reads an identifier in its compatibility form (NFKC): ``self.ª`` is ``self.a``.
    is_other = part.isidentifier() and unicodedata.normalize("NFKC", part) != part
    return not keyword.iskeyword(part) and part.isprintable() and not is_other and not set(part) & {'"', "\\"}
