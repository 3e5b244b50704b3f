"""Equality of values once branches are folded: through dropout, casts, copies and reshapes, unless something writes between."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import fx

from lora_fx.graph.aten_kinds import VIEW, name_of, writes
from lora_fx.graph.batch_norms import GivenBatchNorm
from lora_fx.graph.training_only import TrainingOnly
from lora_fx.sites.stored_weight import cast_of, is_view
from lora_fx.torch_internals import DropoutBase, OpOverload

aten = torch.ops.aten

COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)
"""Operators that return the value of their input."""

_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.flatten.using_ints,
)


class Flow:
    """Identities, shared memory and writes of the values of a graph, node by node in graph order.

    Args:
        graph_module: the graph.
        in_branch: tells whether a node is a product with a factor: a dropout that only such nodes read is a branch's own.
        graph: whose nodes are visited: that of the graph module, or a copy of it with other nodes.
    """

    def __init__(
        self, graph_module: fx.GraphModule, in_branch: Callable[[fx.Node], bool], graph: fx.Graph | None = None
    ) -> None:
        self._graph_module = graph_module
        self._in_branch = in_branch
        self._position = {node: index for index, node in enumerate((graph or graph_module.graph).nodes)}
        self._memory: dict[fx.Node, fx.Node] = {}
        self._writers: dict[fx.Node, list[fx.Node]] = {}
        self._writer_of: dict[str, fx.Node] = {}

    def note(self, node: fx.Node) -> None:
        """Record whose memory the value of the next node may share, and to whose memory it writes."""
        targets = self._write_targets(node)
        source = next(iter(targets or node.all_input_nodes), None)
        if source is not None and (targets or may_share(node)):
            self._memory[node] = self._memory.get(source, source)
        for target in targets:
            place = self._memory.get(target, target)
            self._writers.setdefault(place, []).append(node)
            if place.op == "get_attr":
                self._writer_of.setdefault(str(place.target), node)

    def writer_of(self, names: Collection[str]) -> fx.Node | None:
        """Return a node that writes to one of the graph's own tensors of these names."""
        return next((self._writer_of[name] for name in names if name in self._writer_of), None)

    def reaches(self, source: fx.Node, wanted: fx.Node) -> bool | None:
        """Compare two nodes as they are once folded: None if they differ, else whether a reshape lies between."""
        mine, theirs = (dict(self._identities(node)) for node in (source, wanted))
        met = next((node for node in mine if node in theirs), None)
        return None if met is None else mine[met] or theirs[met]

    def written_between(self, read: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
        """Return a node that writes to a value after it was read, or copied, the first time and before the last.

        Args:
            read: reader → what it reads; all of these are copies of one value.
        """
        chains = [[node for node, _ in self._identities(source)] for source in read.values()]
        met = next(node for node in chains[0] if all(node in chain for chain in chains))
        before_meeting = {node for chain in chains for node in chain[: chain.index(met)]}
        events = [self._position[node] for node in (*before_meeting, *read)]
        memory = {self._memory.get(node, node) for node in (*before_meeting, met)}
        written = (node for place in memory for node in self._writers.get(place, ()))
        return next((node for node in written if min(events) < self._position[node] < max(events)), None)

    def _write_targets(self, node: fx.Node) -> list[fx.Node]:
        """Return the values to which a node may write: as its schema says; without a schema, all that it reads."""
        if isinstance(node.target, OpOverload):
            target = writes(node)
            return [] if target is None else [target]
        if node.op == "call_module":
            called = self._graph_module.get_submodule(str(node.target))
            if isinstance(called, GivenBatchNorm):
                return [source for source in node.args[3:] if isinstance(source, fx.Node)]
            if isinstance(called, TrainingOnly):
                return node.all_input_nodes if called.changes_inputs else []
            drops = isinstance(called, DropoutBase) and not called.inplace
            return [] if drops or type(called).__module__.startswith("lora_fx.") else node.all_input_nodes
        computes = node.op == "call_method" or (node.op == "call_function" and not _is_pure(node.target))
        return node.all_input_nodes if computes else []

    def _identities(self, node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
        """Yield a node and its originals once folded, through dropout, casts and reshapes, each with whether a reshape lies between."""
        reshaped = False
        while True:
            yield node, reshaped
            if not self._is_identity(node) and not keeps_last_dim(node):
                return
            reshaped = reshaped or keeps_last_dim(node)
            node = node.all_input_nodes[0]

    def _is_identity(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._graph_module.get_submodule(str(node.target)), DropoutBase)
        if node.target is aten.dropout.default:
            return not node.args[2] or all(self._in_branch(user) for user in node.users)
        return cast_of(node) is not None or node.target in COPIES


def _is_pure(function: object) -> bool:
    """Tell whether a Python function (of the kind that computes with sizes) leaves its arguments unchanged."""
    module, name = str(getattr(function, "__module__", "")), str(getattr(function, "__name__", ""))
    if module == "_operator":
        return not (name.startswith("i") and name[1:] in _IN_PLACE) and name not in ("setitem", "delitem")
    return module in ("builtins", "math") or (module == "torch" and name.startswith("sym_"))


_IN_PLACE = frozenset(
    [
        "add",
        "and",
        "concat",
        "floordiv",
        "lshift",
        "matmul",
        "mod",
        "mul",
        "or",
        "pow",
        "rshift",
        "sub",
        "truediv",
        "xor",
    ]
)


def may_share(node: fx.Node) -> bool:
    """Tell whether a node's value may share memory with another value."""
    computed = node.op == "call_function" and isinstance(node.target, OpOverload)
    copies = node.target in COPIES and node.target is not aten.clone.default
    return not computed or name_of(node) in VIEW or is_view(node) or copies or node.target is aten.dropout.default


def is_read_once(node: fx.Node) -> bool:
    """Tell whether one node alone reads a computed value, itself or through reshapes: no other one sees what it writes there."""
    while len(node.users) < 2 and may_share(node) and keeps_last_dim(node):
        node = node.args[0]  # type: ignore[assignment]
    return len(node.users) < 2 and not may_share(node)


def keeps_last_dim(node: fx.Node) -> bool:
    """Tell whether a node is a reshape that keeps the last dimension: positions keep their order in memory."""
    if node.target not in _RESHAPES or not isinstance(node.args[0], fx.Node):
        return False
    before, after = (each.meta.get("val") for each in (node.args[0], node))
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.dim() and after.dim()):
        return False
    last = before.shape[-1], after.shape[-1]
    return all(type(size) is int for size in last) and last[0] == last[1]


def same_shapes(left: fx.Node, right: fx.Node) -> bool:
    """Tell whether two values have the same shape in the trace, and at every size that the graph may run with."""
    mine, theirs = (node.meta.get("val") for node in (left, right))
    if not isinstance(mine, torch.Tensor) or not isinstance(theirs, torch.Tensor) or mine.dim() != theirs.dim():
        return False
    return [str(size) for size in mine.shape] == [str(size) for size in theirs.shape]
