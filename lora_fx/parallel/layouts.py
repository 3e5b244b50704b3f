"""Layouts of the values of a graph that several processes compute: whole, split along a dimension, or a summand; and what operators make of them.

A value is followed from the weights that are divided. Every operator that reads a split value has a rule here, or is refused by name: there
is no default, since a process would go on with a part as if it were the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import fx

from lora_fx.errors import LoraFxError
from lora_fx.graph.aten_kinds import (
    ACTIVATION,
    NORM,
    POINTWISE,
    POWER,
    SOFTMAX,
    arguments_of,
    name_of,
    set_argument,
    shape_of,
    writes,
)
from lora_fx.graph.process_sums import Shard
from lora_fx.graph.provenance import module_path, source_line

Layout = Shard | None
"""The dimension of a value along which it is split; None where it is whole."""

_TO_THE_END = 2**62


class Layouts:
    """Layouts of split values, and the operators on them, whose sizes become those of one process (in place).

    Args:
        rank: of the process.
        world: number of processes.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.of: dict[fx.Node, Shard] = {}
        self._shapes: dict[fx.Node, tuple[int, ...] | None] = {}

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the sizes that the whole value had in the trace."""
        if node not in self._shapes:
            self._shapes[node] = shape_of(node)
        found = self._shapes[node]
        if found is None:
            raise LoraFxError(f"{node.name}: the sizes of this value are not known: it cannot be computed in parts.")
        return found

    def split(self, node: fx.Node, layout: Layout) -> None:
        """Note the layout of a value, and give the node the sizes of a part."""
        if layout is None:
            return
        if not layout.divides(self.world):
            size = layout.blocks[0] if len(layout.blocks) == 1 else layout.blocks
            self.refuse(
                node, f"dimension {layout.dim} has size {size}, which {self.world} processes cannot share equally"
            )
        value = node.meta.get("val")
        self.of[node] = layout
        if isinstance(value, list | tuple):  # the pieces of a value, whose sizes their own nodes have
            node.meta["val"] = [_narrowed(piece, layout.dim, self.world) for piece in value]
        else:
            self.shape(node)
            node.meta["val"] = _narrowed(value, layout.dim, self.world)

    def refuse(self, node: fx.Node, reason: str) -> NoReturn:
        """Raise for a node that cannot be computed in parts."""
        where = module_path(node)
        place = f"{node.name} in {where}" if where else node.name
        raise LoraFxError(
            f"{place} cannot be computed by {self.world} processes in parts: {reason}{source_line(node)}. Leave the sites before it out of "
            "the sharding plan."
        )

    def layout_after(self, node: fx.Node) -> Layout:
        """Return the layout of what a node makes of split values, and change its sizes; refuse it where it has no rule."""
        if node.op == "output":
            self.refuse(node, f"{self._first(node).name} is returned, and is split")
        if isinstance(getattr(node.target, "_schema", None), torch.FunctionSchema) and writes(node) is not None:
            self.refuse(node, "it writes to a value in place")
        rule = _RULES.get(name_of(node))
        if rule is None:
            self.refuse(node, f"no rule says what {name_of(node)} makes of a split value ({self._first(node).name})")
        return rule(self, node)

    def _first(self, node: fx.Node) -> fx.Node:
        return next(each for each in node.all_input_nodes if each in self.of)

    def given(self, node: fx.Node) -> tuple[fx.Node, Shard, dict[str, Any]]:
        """Return the first argument, its layout, and all arguments; refuse where another argument is split."""
        first = node.args[0]
        if not isinstance(first, fx.Node) or [each for each in node.all_input_nodes if each in self.of] != [first]:
            self.refuse(node, f"it reads {self._first(node).name}, which is split, in another place than the first")
        return first, self.of[first], arguments_of(node)


def _narrowed(value: Any, dim: int, world: int) -> Any:
    """Return the fake value of a part."""
    return value.narrow(dim, 0, value.shape[dim] // world)


def _pointwise(of: Layouts, node: fx.Node) -> Layout:
    """Return the layout of a function of values by place, which torch aligns at their last dimensions."""
    dims = len(of.shape(node))
    found: set[tuple[int, tuple[int, ...]]] = set()
    for each in node.all_input_nodes:
        if each in of.of:
            found.add((of.of[each].dim - len(of.shape(each)), of.of[each].blocks))
    if len(found) != 1:
        of.refuse(node, "it joins values that are split in different ways")
    ((dim, blocks),) = found
    for each in node.all_input_nodes:
        if (
            each not in of.of
            and each.target is not torch.ops.aten.sym_size.int
            and not isinstance(each.meta.get("val"), int | torch.SymInt)
        ):
            shape = of.shape(each)
            if len(shape) >= -dim and shape[dim] != 1:
                of.refuse(
                    node,
                    f"{each.name} is whole where the other value is split, in dimension {dim} of size {shape[dim]}",
                )
    return Shard(dims + dim, blocks)


def _kept(of: Layouts, node: fx.Node) -> Layout:
    return of.given(node)[1]


def _over_other_dims(of: Layouts, node: fx.Node) -> Layout:
    """Return the layout of a softmax or a statistic that is taken over dimensions that are not split."""
    value, layout, given = of.given(node)
    dims = given["dim"] if isinstance(given.get("dim"), list | tuple) else [given.get("dim")]
    if any(type(dim) is not int or dim % len(of.shape(value)) == layout.dim for dim in dims):
        of.refuse(node, f"it is taken over dimension {layout.dim}, along which {value.name} is split")
    if not given.get("keepdim", True):
        of.refuse(node, "it drops dimensions")
    return layout


def _normed(of: Layouts, node: fx.Node) -> Layout:
    value, layout, given = of.given(node)
    if "normalized_shape" not in given or layout.dim >= len(of.shape(value)) - len(given["normalized_shape"]):
        of.refuse(node, f"it normalises over dimension {layout.dim}, along which {value.name} is split")
    return layout


def _viewed(of: Layouts, node: fx.Node) -> Layout:
    """Return the layout of a reshape: the split dimension may be divided, or joined with smaller ones behind it."""
    value, layout, given = of.given(node)
    before, after = of.shape(value), of.shape(node)
    group = next((each for each in _groups(before, after) if layout.dim in each[0]), None)
    if group is None or any(before[dim] != 1 for dim in range(group[0].start, layout.dim)):
        of.refuse(node, f"it joins dimension {layout.dim}, along which {value.name} is split, with one before it")
    dim = next((dim for dim in group[1] if after[dim] != 1), None)
    if dim is None:
        of.refuse(node, f"it takes dimension {layout.dim} apart, along which {value.name} is split")
    same = after[dim] == before[layout.dim] == math.prod(before[each] for each in group[0])
    if not same and len(layout.blocks) > 1:
        of.refuse(node, f"it reshapes dimension {layout.dim} of {value.name}, which has parts of sizes {layout.blocks}")
    name = "shape" if "shape" in given else "size"
    _divide(of, node, name, given[name], dim)
    return layout if same and dim == layout.dim else Shard(dim, layout.blocks if same else (after[dim],))


def _divide(of: Layouts, node: fx.Node, name: str, sizes: Any, dim: int) -> None:
    """Divide one of the sizes that a node is given."""
    size = sizes[dim]
    if isinstance(size, fx.Node):
        of.refuse(node, f"its size in dimension {dim} is computed")
    if size != -1:
        if size % of.world:
            of.refuse(node, f"it makes a dimension of size {size}, which {of.world} processes cannot share equally")
        set_argument(node, name, [*sizes[:dim], size // of.world, *sizes[dim + 1 :]])


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """Return the dimensions of a reshape in the smallest groups that have as many elements before as after."""
    found, first, second = [], 0, 0
    while first < len(before) or second < len(after):
        start, other = first, second
        mine = theirs = 1
        if first < len(before):
            mine, first = before[first], first + 1
        if second < len(after):
            theirs, second = after[second], second + 1
        while mine != theirs:
            if mine < theirs:
                mine, first = mine * before[first], first + 1
            else:
                theirs, second = theirs * after[second], second + 1
        found.append((range(start, first), range(other, second)))
    return found


def _expanded(of: Layouts, node: fx.Node) -> Layout:
    value, layout, given = of.given(node)
    more = len(given["size"]) - len(of.shape(value))
    _divide(of, node, "size", given["size"], layout.dim + more)
    return Shard(layout.dim + more, layout.blocks)


def _transposed(of: Layouts, node: fx.Node) -> Layout:
    value, layout, given = of.given(node)
    order = list(range(len(of.shape(value))))
    if name_of(node) == "permute":
        order = [dim % len(order) for dim in given["dims"]]
    else:
        first, second = (0, 1) if name_of(node) == "t" else (given["dim0"] % len(order), given["dim1"] % len(order))
        order[first], order[second] = order[second], order[first]
    return Shard(order.index(layout.dim), layout.blocks)


def _unsqueezed(of: Layouts, node: fx.Node) -> Layout:
    _, layout, given = of.given(node)
    return Shard(layout.dim + (given["dim"] % len(of.shape(node)) <= layout.dim), layout.blocks)


def _sliced(of: Layouts, node: fx.Node) -> Layout:
    value, layout, given = of.given(node)
    if given["dim"] % len(of.shape(value)) != layout.dim:
        return layout
    size, start, end = sum(layout.blocks), given["start"] or 0, given["end"]
    end = size if end is None or (type(end) is int and end > _TO_THE_END) else end
    ends = [sum(layout.blocks[:count]) for count in range(len(layout.blocks) + 1)]
    if given["step"] != 1 or start not in ends or end not in ends or start >= end:
        of.refuse(node, f"it takes a slice of dimension {layout.dim}, along which {value.name} is split")
    set_argument(node, "start", start // of.world)
    if end != size:
        set_argument(node, "end", end // of.world)
    return Shard(layout.dim, layout.blocks[ends.index(start) : ends.index(end)])


def _in_pieces(of: Layouts, node: fx.Node) -> Layout:
    """Note the layouts of the pieces of a split value, which stand in ``getitem`` nodes."""
    value, layout, given = of.given(node)
    if given["dim"] % len(of.shape(value)) != layout.dim:
        return layout
    width: Any = given.get("split_size", given.get("split_sizes"))
    total = sum(layout.blocks)
    if name_of(node) == "chunk":
        width = -(-total // given["chunks"])
    sizes = [width] * (total // width) if isinstance(width, int) else list(width)
    if sizes != [*layout.blocks]:
        of.refuse(
            node, f"it makes pieces of sizes {sizes} of {value.name}, which has parts of sizes {[*layout.blocks]}"
        )
    if name_of(node) == "split":
        set_argument(node, "split_size", width // of.world)
    elif name_of(node) == "split_with_sizes":
        set_argument(node, "split_sizes", [size // of.world for size in sizes])
    return layout


def _piece(of: Layouts, node: fx.Node) -> Layout:
    source, index = node.args
    assert isinstance(source, fx.Node)
    layout = of.of[source]
    whole = arguments_of(source)["dim"] % len(of.shape(node)) != layout.dim
    return layout if whole else Shard(layout.dim, (layout.blocks[index],))  # type: ignore[index]


def _joined(of: Layouts, node: fx.Node) -> Layout:
    """Return the layout of values put one after the other along a dimension that is not split."""
    values: Any = node.args[0]
    layouts = {of.of.get(value) for value in values}
    layout = next(iter(layouts))
    dim = arguments_of(node)["dim"] % len(of.shape(node))
    if len(layouts) != 1 or layout is None or dim == layout.dim or name_of(node) == "stack":
        of.refuse(node, "it joins values that are not all split in one way, or along the dimension that is split")
    return layout


def _attended(of: Layouts, node: fx.Node) -> Layout:
    """Return the layout of an attention of some heads to their own keys and values."""
    given = arguments_of(node)
    query = given["query"]
    heads = len(of.shape(query)) - 3
    for value in (query, given["key"], given["value"]):
        if value not in of.of or of.of[value].dim != heads or len(of.shape(value)) != heads + 3:
            of.refuse(node, f"{value.name} is not split by heads")
    mask = given["attn_mask"]
    if isinstance(mask, fx.Node):
        shape = of.shape(mask)
        if mask in of.of or (len(shape) > 2 and shape[-3] != 1):
            of.refuse(node, f"its mask {mask.name} has a size for each head")
    return of.of[query]


def _multiplied(of: Layouts, node: fx.Node) -> Layout:
    """Return the layout of a product of two stacks of matrices, split in the same way before their last two dimensions."""
    first, second = node.args[:2]
    layouts = [of.of.get(each) for each in (first, second) if isinstance(each, fx.Node)]
    shapes = [of.shape(each) for each in (first, second) if isinstance(each, fx.Node)]
    if layouts[0] is None or layouts[0] != layouts[-1] or len({len(shape) for shape in shapes}) != 1:
        of.refuse(node, "it multiplies values that are not both split in one way")
    if layouts[0].dim >= len(shapes[0]) - 2:
        of.refuse(node, "it multiplies along the dimension that is split")
    return layouts[0]


def _size(of: Layouts, node: fx.Node) -> Layout:
    value, layout, given = of.given(node)
    if given["dim"] % len(of.shape(value)) == layout.dim:
        of.refuse(node, f"it reads the size of the dimension along which {value.name} is split")
    return None


def _attribute(of: Layouts, node: fx.Node) -> Layout:
    if node.args[1] not in ("device", "dtype"):
        of.refuse(node, f"it reads the {node.args[1]} of a split value")
    return None


Rule = Callable[[Layouts, fx.Node], Layout]

_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(POINTWISE | ACTIVATION | POWER | {"rsqrt", "sqrt", "relu"}, _pointwise),
    **dict.fromkeys(("contiguous", "clone", "alias", "detach"), _kept),
    **dict.fromkeys(SOFTMAX | {"mean"}, _over_other_dims),
    **dict.fromkeys(NORM & {"layer_norm", "rms_norm"}, _normed),
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), _viewed),
    **dict.fromkeys(("transpose", "permute", "t"), _transposed),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _in_pieces),
    **dict.fromkeys(("matmul", "bmm"), _multiplied),
    "expand": _expanded,
    "unsqueeze": _unsqueezed,
    "slice": _sliced,
    "getitem": _piece,
    "cat": _joined,
    "scaled_dot_product_attention": _attended,
    "sym_size": _size,
    "call_function": _attribute,  # the builtin getattr
}
