"""Stored weights behind graph nodes: the named tensor that an operator reads, through transposes, reshapes and casts.

Rows that an adapter writes over (``index_copy`` of its token values) count as the weight's own: :func:`written_rows` tells of them.
A cast to another floating-point type counts as the identity: the arithmetic that a fold replaces is that of real numbers,
which is rounded once, at its end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from lora_fx.graph.adapter_names import is_token_values
from lora_fx.graph.aten_kinds import arguments_of
from lora_fx.numerics.lowrank_merge import RowWrite
from lora_fx.numerics.weight_view import AS_STORED, SWAP, Step, View

aten = torch.ops.aten


@dataclass(frozen=True)
class Stored:
    """A named tensor as an operator reads it.

    Attributes:
        node: its ``get_attr``.
        view: from the stored tensor to the value that the operator reads.
        dtype: the dtype to which it is cast, or None.
        chosen: the index node of ``stack[chosen]``, which picks matrices of a stack; None if all of it is read.
    """

    node: fx.Node
    view: View = AS_STORED
    dtype: torch.dtype | None = None
    chosen: fx.Node | None = None

    @property
    def dims(self) -> int | None:
        """Number of dimensions of the value read, or None if it is not known."""
        shaping = [step for step in self.view.steps if step.kind != "swap"]
        return len(shaping[-1].dims) if shaping else dims_of(self.node)

    @property
    def swapped(self) -> Stored:
        """The same tensor with its last two dimensions exchanged."""
        return replace(self, view=self.view.then(SWAP))


def stored(value: Any) -> Stored | None:
    """Return the named tensor behind ``value``, through all transparent nodes (:func:`is_transparent`); None if there is none."""
    passed: list[fx.Node] = []
    while isinstance(value, fx.Node) and is_transparent(value):
        passed.append(value)
        value = value.args[0]
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found = Stored(value)
    for node in reversed(passed):
        step = step_of(node)
        if found.chosen is not None and (_choosing_index(node) is not None or step not in (None, SWAP)):
            return None  # a reshape after the choice mixes the chosen matrices: only their transpose is a view of the stack
        found = replace(
            found,
            view=found.view if step is None else found.view.then(step),
            dtype=cast_of(node) or found.dtype,
            chosen=_choosing_index(node) or found.chosen,
        )
    return found


def is_transparent(node: fx.Node) -> bool:
    """Tell whether a node only passes on the tensor that it reads.

    By a transpose, a reshape, a cast, a choice of matrices, or with rows that an adapter writes over.
    """
    return is_view(node) or _choosing_index(node) is not None or written_rows(node) is not None


def written_rows(node: fx.Node) -> RowWrite | None:
    """Return the rows of a weight that a node writes over with the token values of an adapter; None if it is no such node."""
    if node.target is not aten.index_copy.default:
        return None
    weight, dim, index, values = node.args
    numbers, found, own = _constant(index), stored(values), stored(weight)
    if numbers is None or found is None or own is None or dim != 0 or own.view.steps or found.view.steps:
        return None
    name = str(found.node.target)
    return RowWrite(str(numbers.target), name) if is_token_values(name) else None


def has_written_rows(node: fx.Node, weight: fx.Node) -> bool:
    """Tell whether a node reads a weight, given as its ``get_attr``, with rows that an adapter writes over."""
    for value in node.all_input_nodes:
        written = False
        while is_transparent(value) and isinstance(value.args[0], fx.Node):
            written, value = written or written_rows(value) is not None, value.args[0]
        if value is weight and written:
            return True
    return False


def _constant(value: Any) -> fx.Node | None:
    """Return the ``get_attr`` of a tensor of integers that is passed on unchanged, as torch.export writes a tensor made in ``forward``."""
    while isinstance(value, fx.Node) and value.target in _PASSED_ON:
        value = value.args[0]
    return value if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _choosing_index(node: fx.Node) -> fx.Node | None:
    """Return the index node of ``stack[chosen]``, or None if the node is no such choice."""
    indices: Any = node.args[1] if node.target is aten.index.Tensor else None
    index = indices[0] if indices is not None and len(indices) == 1 else None
    return index if isinstance(index, fx.Node) and dims_of(index) == 1 else None


def is_view(node: fx.Node) -> bool:
    """Tell whether a node keeps all elements of the tensor that it reads: moved, or cast to another floating-point type."""
    return cast_of(node) is not None or step_of(node) is not None


def cast_of(node: fx.Node) -> torch.dtype | None:
    """Return the floating-point type to which a node casts; None if it does not cast, or does more than that."""
    if node.target not in _CASTS:
        return None
    given = arguments_of(node)
    dtype = given.pop("dtype")
    if node.target is aten.to.device:
        del given["device"]  # numbers are the same on all devices
    others = [value for name, value in given.items() if name != "self" and value not in (None, False)]
    return dtype if not others and isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def dims_of(node: fx.Node) -> int | None:
    """Return the number of dimensions of a node's value, or None if it is not known."""
    value = node.meta.get("val")
    if value is None and node.op == "get_attr" and node.graph.owning_module is not None:
        value = _attribute(node.graph.owning_module, str(node.target))
    if isinstance(value, torch.Tensor):
        return value.dim()
    if node.target in _RESHAPES_TO_SIZES or node.target is aten.permute.default:
        return len(node.args[1])  # type: ignore[arg-type]
    source = node.args[0] if node.target in (*_PERMUTATIONS, *_CASTS) else None
    return dims_of(source) if isinstance(source, fx.Node) else None


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def step_of(node: fx.Node) -> Step | None:
    """Return the step by which a node rearranges the tensor that it reads; None if it does not, or does more than that."""
    if not node.args or not isinstance(node.args[0], fx.Node) or node.kwargs:
        return None
    if node.target in _RESHAPES_TO_SIZES:
        return _reshape_to(node.args[1])
    if node.target in _RESHAPES_OF_RANK:
        value = node.meta.get("val")
        return _reshape_to(tuple(value.shape)) if isinstance(value, torch.Tensor) else None
    if node.target in (aten.t.default, aten.mT.default):
        return SWAP
    given: Any = node.args[1:]
    if node.target is aten.transpose.int and set(given) == {-2, -1}:
        return SWAP
    dim = dims_of(node) if node.target in _PERMUTATIONS else None
    if dim is None:
        return None
    order = list(range(dim))
    if node.target is aten.transpose.int:
        first, second = (position % dim for position in given)
        order[first], order[second] = order[second], order[first]
    elif node.target is aten.permute.default:
        order = [position % dim for position in given[0]]
    else:
        order.reverse()
    return SWAP if order == [*range(dim - 2), dim - 1, dim - 2] else Step("permute", tuple(order))


def _reshape_to(sizes: Any) -> Step | None:
    fixed = isinstance(sizes, list | tuple) and all(type(size) is int for size in sizes)
    return Step("reshape", tuple(sizes)) if fixed else None


_CASTS = (aten.to.dtype, aten.to.device, aten._to_copy.default)
_RESHAPES_TO_SIZES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_RESHAPES_OF_RANK = (aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints)
_PASSED_ON = (
    aten.lift_fresh_copy.default,
    aten.detach_.default,
    aten.detach.default,
    aten.to.dtype_layout,
    aten.to.dtype,
    aten.to.device,
    aten._to_copy.default,
)
_PERMUTATIONS = (aten.transpose.int, aten.permute.default, aten.numpy_T.default)
