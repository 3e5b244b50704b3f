"""Verification of a fold: the folded graph runs beside its original, node by node, up to the first value that differs.

Folding removes the nodes of branches and keeps the names of all others. So the two graphs correspond by name: each node of
the folded graph to the node of the same name, or, where a branch is added to it, to the sum. Each graph computes with copies
of inputs and buffers, so that a write in place does not reach the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from typing import Any

import torch
from torch import fx, nn

from lora_fx.branches.find import Nominate, find_branches
from lora_fx.branches.found import FoundBranch
from lora_fx.branches.lower import lower
from lora_fx.errors import InputError, LoraFxError, VerifyError
from lora_fx.graph.adapter_names import is_of_branch
from lora_fx.graph.compare import ValueDifference, compare_values, rounding_tolerance
from lora_fx.graph.graph_module import state_of
from lora_fx.graph.info import check_module, check_same_for_all_rows
from lora_fx.graph.process_state import forked_random_state
from lora_fx.graph.provenance import module_path, source_line
from lora_fx.graph.signature import InputCodeGen
from lora_fx.sites.stored_weight import stored
from lora_fx.torch_internals import OpOverload
from lora_fx.tracing.parity import OwnStreams

aten = torch.ops.aten

_UNINITIALIZED = frozenset(
    {aten.empty, aten.empty_like, aten.empty_strided, aten.empty_permuted, aten.new_empty, aten.new_empty_strided}
)


@dataclass(frozen=True)
class Agreement:
    """The agreement of two graphs.

    Attributes:
        nodes: the number of nodes whose values were compared.
        largest: the largest difference, as a part of the largest value of its node.
        node: the name of that node; empty where all values are equal.
    """

    nodes: int
    largest: float
    node: str


def verify(
    graph_module: fx.GraphModule,
    merged: fx.GraphModule,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    branches: Nominate = is_of_branch,
    tolerance: float | None = None,
) -> Agreement:
    """Run a folded graph beside its original, in evaluation, and compare the value of every node.

    Values that depend on weights alone are not compared. Neither the graphs nor the inputs are changed, and a value is freed
    after its last use.

    Args:
        graph_module: with branches, or without.
        merged: the result of ``fold``.
        inputs: of both, by keyword (a mapping) or by position (a tuple).
        branches: whether a parameter of this name is a factor of a branch, as for ``fold``.
        tolerance: the largest difference, as a part of the largest value of a node. By default 1e-9, 1e-4 or 0.05, by the
            lowest precision that went into a node: double, single or half. A GPU that multiplies in TF32 needs more.

    Raises:
        VerifyError: a value differs, or ``merged`` was not made from ``graph_module``. The message names the first such
            node, and so does ``node`` of the error.
        InputError: the graphs do not take these inputs.
        FoldError: ``graph_module`` cannot be folded.
        PlanError: one of the two takes the adapter of each row.
        LoraFxError: a tensor is on the meta device.
    """
    for each in (graph_module, merged):
        check_module(each)
        check_same_for_all_rows(each)
    graph_module = lower(graph_module)
    _check_values(graph_module, merged)
    pairs = _pairs(graph_module, merged, branches)
    branched = _Run(graph_module, _bound(graph_module, inputs), pairs)
    folded = _Run(merged, _bound(merged, inputs), pairs.values())
    agreement = Agreement(len(pairs), 0.0, "")
    with _evaluating(graph_module, merged), _repeatable():
        for node, twin in pairs.items():
            expected, found = branched.value_of(node), folded.value_of(twin)
            allowed = folded.tolerances[twin] if tolerance is None else tolerance
            difference = compare_values(expected, found, allowed)
            if difference.message:
                raise _differing(node, twin, difference)
            if difference.relative > agreement.largest:
                agreement = Agreement(len(pairs), difference.relative, twin.name)
    return agreement


class _Interpreter(fx.Interpreter):
    """An interpreter that reads copies of buffers, since operators may write to them."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return value if isinstance(value, nn.Parameter) else _copied(value)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


class _Run:
    """A run of a graph, as far as values are asked for. A value is held until its last use.

    Attributes:
        tolerances: by node, for the lowest precision that went into its value.
    """

    def __init__(self, graph_module: fx.GraphModule, inputs: Iterable[Any], wanted: Collection[fx.Node]) -> None:
        self.tolerances: dict[fx.Node, float] = {}
        self._interpreter = _Interpreter(graph_module)
        self._interpreter.args_iter = map(_copied, inputs)
        self._rest = iter(graph_module.graph.nodes)
        self._written = 0.0
        self._wanted = frozenset(wanted)
        self._ready: dict[fx.Node, Any] = {}

    def value_of(self, node: fx.Node) -> Any:
        """Return the value of a wanted node, once."""
        while node not in self._ready:
            self._step(next(self._rest))
        return self._ready.pop(node)

    def _step(self, node: fx.Node) -> None:
        held = self._interpreter.env
        value = self._interpreter.run_node(node)
        self.tolerances[node] = self._tolerance(node, value)
        if node.users:
            held[node] = value
        for source in self._interpreter.user_to_last_uses.get(node, ()):
            del held[source]
        if node in self._wanted:
            self._ready[node] = value

    def _tolerance(self, node: fx.Node, value: Any) -> float:
        if node.op == "placeholder":  # the same in both graphs, to the last bit
            return 0.0
        before = [self.tolerances[source] for source in node.all_input_nodes]
        found = max([rounding_tolerance(value), self._written, *before])
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            self._written = found  # every later node may share that memory
        return found


class _Repeatable(OwnStreams):
    """Also fills uninitialized memory with zeros."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        return result.zero_() if getattr(func, "overloadpacket", None) in _UNINITIALIZED else result


@contextmanager
def _repeatable() -> Iterator[None]:
    """Give random numbers and uninitialized memory the same values in both graphs; restore the random state."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.no_grad(), forked_random_state(devices), _Repeatable():
        yield


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode, and restore the mode of each of their parts."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False  # modules of torch.export refuse eval(), and others override it
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _check_values(graph_module: fx.GraphModule, merged: fx.GraphModule) -> None:
    for which, module in (("graph", graph_module), ("folded graph", merged)):
        empty = next((name for name, tensor in state_of(module).tensors.items() if tensor.is_meta), None)
        if empty is not None:
            raise LoraFxError(
                f"{empty!r} of the {which} is on the meta device and has no values to compare. "
                "Load the weights first, with materialize."
            )


def _bound(graph_module: fx.GraphModule, inputs: Mapping[str, Any] | tuple[Any, ...]) -> Sequence[Any]:
    """Return the values of a graph's placeholders when it is called with these inputs."""
    if not isinstance(inputs, Mapping | tuple):
        raise InputError(f"inputs: expected a mapping of keyword inputs, or a tuple, got {type(inputs).__name__}.")
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    codegen = graph_module.graph._codegen
    if isinstance(codegen, InputCodeGen):
        return codegen.signature.tensors(args, kwargs)
    try:
        bound = inspect.signature(graph_module.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"the graph does not take these inputs: {error}.") from error
    bound.apply_defaults()
    return tuple(graph_module.graph.process_inputs(*bound.arguments.values()))


def _pairs(graph_module: fx.GraphModule, merged: fx.GraphModule, branches: Nominate) -> dict[fx.Node, fx.Node]:
    """Map nodes of a graph to those of the folded graph that have the same value, in the order of the graph."""
    kept = find_branches(merged, branches)
    if kept:
        raise VerifyError(
            f"the folded graph has a branch at {kept[0].end.name!r}. Pass the result of lora_fx.fold.", kept[0].end.name
        )
    found = find_branches(graph_module, branches)
    ends = {branch.base.name: branch.end for branch in found}
    partial = {node.name for branch in found for node in _without_branch(branch)}
    position = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    named = {node.name: node for node in position}
    constants = _constants(merged.graph)
    pairs: dict[fx.Node, fx.Node] = {}
    previous: fx.Node | None = None
    for twin in merged.graph.nodes:
        if twin in constants or stored(twin) is not None:  # weights, selected experts among them, differ on purpose
            continue
        node = named.get(twin.name)
        if node is None:
            raise _foreign(twin, "which the graph lacks")
        if (node.op, node.target) != (twin.op, twin.target):
            raise _foreign(twin, f"where the graph has {node.format_node()}")
        if previous is not None and position[node] < position[previous]:
            raise _foreign(twin, f"behind {previous.name}, which comes later in the graph")
        if node.name not in partial:
            pairs[ends.get(twin.name, node)] = twin
        previous = node
    return dict(sorted(pairs.items(), key=lambda pair: position[pair[0]]))


def _without_branch(branch: FoundBranch) -> set[fx.Node]:
    """Return the nodes from a site to the node that a branch is added to, without that: a fold has the branch in their values."""
    found: set[fx.Node] = set()
    behind = dropwhile(lambda node: node is not branch.site, branch.site.graph.nodes)
    for node in takewhile(lambda node: node is not branch.base, behind):
        if node is branch.site or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return (
        found if not found.isdisjoint(branch.base.all_input_nodes) else set()
    )  # a branch at the weight comes before the site


def _constants(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return the nodes that depend on weights alone, disregarding devices."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = [source for source in node.all_input_nodes if source.target is not getattr]
        computed = node.op == "call_function" and node.target is not getattr and inputs and found.issuperset(inputs)
        if node.op == "get_attr" or computed:
            found.add(node)
    return frozenset(found)


def _differing(node: fx.Node, twin: fx.Node, difference: ValueDifference) -> VerifyError:
    path = module_path(twin)
    details = [
        _operator(twin),
        f"in {path}" if path else "",
        f"with branches {node.name}" if node.name != twin.name else "",
    ]
    which = f"in part {difference.part} of it " if difference.part else ""
    return VerifyError(
        f"the folded graph differs first at {twin.name} ({', '.join(filter(None, details))}){source_line(twin)}: "
        f"{which}{difference.message}. "
        "Fold again if the graph was trained or loaded since; else keep it unfolded, or pass a tolerance that you can accept.",
        twin.name,
    )


def _foreign(twin: fx.Node, problem: str) -> VerifyError:
    return VerifyError(
        f"the folded graph was not made from this graph: it has {twin.format_node()}{source_line(twin)}, {problem}. "
        "Pass the graph that was folded and the result of lora_fx.fold, both unchanged.",
        twin.name,
    )


def _operator(node: fx.Node) -> str:
    return str(node.target) if not callable(node.target) or hasattr(node.target, "_schema") else node.target.__name__
