"""Preparation for every export: a graph of plain operators in evaluation mode, from named inputs to named outputs."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count as count_from
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen

from lora_fx.adapters.prefix import acting_past
from lora_fx.branches.lower import lower
from lora_fx.errors import WITH_LABELS, ExportError
from lora_fx.folding.dequantise import dequantise
from lora_fx.graph.batch_norms import GivenBatchNorm
from lora_fx.graph.example_sizes import Dimension, Examples
from lora_fx.graph.graph_module import TracedGraphModule, copy_graph, rebuilt, state_of
from lora_fx.graph.info import held_graphs, info_of, known_info
from lora_fx.graph.input_checks import Constraints, remove_checks
from lora_fx.graph.process_sums import SumOverProcesses
from lora_fx.graph.provenance import source_line
from lora_fx.graph.signature import key_parts, signature_of
from lora_fx.graph.size_relations import UNBOUNDED
from lora_fx.graph.training_only import TrainingOnly
from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.numerics.schemes import scheme_text
from lora_fx.torch_internals import DropoutBase, OpOverload, all_reduce, pytree, wait_tensor
from lora_fx.tracing.train_eval import ModeSwitch

_logger = logging.getLogger("lora_fx.export")

aten = torch.ops.aten


@dataclass(frozen=True)
class Exportable:
    """A graph prepared for export.

    Attributes:
        graph_module: the given graph, in evaluation mode, over the same storage.
        plain: the same graph in ATen operators and input checks alone. Its ``forward`` takes the inputs by name, or in this order,
            and returns a dictionary of tensors. Each tensor that it reads has the first of its names.
        constraints: the inputs that the trace covers.
        examples: the inputs that it is tried on.
        outputs: names of the results. A nested one is called ``<output>.<index>`` or ``<output>.<key>``.
        left_out: names of results that are None, which no file has.
        nested: inputs within a list or mapping → such names for them, for formats whose names may have dots.
        file_names: inputs → their names in the file, where those are others.
        evaded: results whose own name the file has for something else → their names in it, which ``outputs`` has.
    """

    graph_module: TracedGraphModule
    plain: fx.GraphModule
    constraints: Constraints
    examples: Examples
    outputs: tuple[str, ...]
    left_out: tuple[str, ...]
    nested: Mapping[str, str]
    file_names: Mapping[str, str] = field(default_factory=dict)
    evaded: Mapping[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs."""
        return tuple(self.constraints.ranges)

    @property
    def dynamic(self) -> dict[str, tuple[int, ...]]:
        """The dimensions that may vary, of each input."""
        return {
            name: tuple(dim for dim, (low, high) in enumerate(ranges) if low != high)
            for name, ranges in self.constraints.ranges.items()
        }

    @property
    def groups(self) -> dict[str, set[Dimension]]:
        """The dimensions that may vary, grouped by axis: those of one axis vary together."""
        return self.examples.together((name, dim) for name, dims in self.dynamic.items() for dim in dims)

    @property
    def axes(self) -> dict[str, dict[int, str]]:
        """The axis of each dimension that may vary, by input and dimension."""
        axes: dict[str, dict[int, str]] = {name: {} for name in self.inputs}
        for axis, group in self.groups.items():
            for name, dim in group:
                axes[name][dim] = axis
        return axes

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the outputs of the given graph, by name."""
        in_order = [inputs[name] for name in self.inputs]
        results = fx.Interpreter(self.graph_module).run(*in_order, enable_io_processing=False)
        found = [value for value in pytree.tree_leaves(results) if value is not None]
        tensors = dict(zip(self.outputs, found, strict=True))
        for name, value in tensors.items():
            _check_tensor(name, value, "")
        return tensors


def prepare(graph_module: TracedGraphModule, example_inputs: Mapping[str, torch.Tensor] | None = None) -> Exportable:
    """Prepare a graph for export.

    Args:
        graph_module: base, branched, fused or folded; not changed.
        example_inputs: used instead of the inputs of the trace.

    Raises:
        ExportError: it is not a traced graph, it has no values, it has no example inputs, or an output is not a tensor.
    """
    if not isinstance(graph_module, TracedGraphModule):
        raise ExportError(
            f"expected a graph that lora_fx.trace, rewrite or fold returned, got {type(graph_module).__name__}: "
            f"{held_graphs(graph_module) or 'trace it, lora_fx.trace(module, example_inputs)'}."
        )
    if info_of(graph_module).labels:
        raise ExportError(WITH_LABELS)
    slot, adapter = info_of(graph_module).prefix_slot, acting_past(graph_module)
    if slot is not None and slot.past and adapter is not None:
        raise ExportError(
            f"adapter {adapter!r} has a prefix, which is the past of the first call of a graph with a cache, and no part of it: "
            "lora_fx.export.generation writes it beside the model. For the model alone let it not act (lora_fx.activate)."
        )
    empty = [name for name, tensor in state_of(graph_module).tensors.items() if tensor.is_meta]
    if empty:
        raise ExportError(
            f"{empty[0]!r} and {len(empty) - 1} other tensors have no values, since the graph was traced on the meta device. "
            "Give it weights first: lora_fx.materialize(graph, state_dict)."
        )
    graph_module = _dense(graph_module)
    given = _in_evaluation(graph_module)
    lowered = _in_evaluation(lower(graph_module))
    modules = state_of(lowered).modules
    constraints = remove_checks(copy_graph(lowered.graph)[0], modules)
    signature = signature_of(lowered.graph)
    inputs = signature.inputs
    unchecked = [name for name in inputs if name not in constraints.ranges]
    if unchecked:
        raise ExportError(
            f"the graph has lost its input check of {unchecked[0]!r}, and with it the sizes that it covers. "
            "Do not remove the nodes under 'input_checks' from a graph, or trace the model again."
        )
    names = _argument_names(inputs)
    constraints = constraints.renamed(names)
    graph, _ = copy_graph(lowered.graph)
    _fix_mode(graph, modules)
    _write_sums(graph, modules)
    outputs, left_out = _name_outputs(graph)
    graph.set_codegen(CodeGen())
    _name_inputs(graph, constraints.ranges)
    graph.lint()
    plain = fx.GraphModule(lowered, graph, class_name="GraphModule").eval()
    nested = {names[name]: place for name, place in signature.nested.items()}
    examples = _examples(graph_module, constraints, example_inputs, names)
    return Exportable(given, plain, constraints, examples, outputs, left_out, nested)


def check_alone(exportable: Exportable) -> None:
    """Raise :class:`ExportError` for the graph of one of several processes, whose sums over them most formats do not have."""
    if info_of(exportable.graph_module).shards is not None:
        raise ExportError(
            "expected a whole graph, got that of one of several processes, which computes sums over them that such a file does not have: export "
            "the graph before lora_fx.parallel.shard, or by lora_fx.export.pt2, a file for each process."
        )


def _write_sums(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Write sums over processes as operators (in place)."""
    for node in graph.find_nodes(op="call_module"):
        module = modules.get(str(node.target))
        if isinstance(module, SumOverProcesses):
            with graph.inserting_before(node):
                value: fx.Node = graph.call_function(aten.contiguous.default, node.args)
                for target, *others in ((all_reduce.default, "sum", module.group), (wait_tensor.default,)):
                    value = graph.call_function(target, (value, *others))
            value.meta = dict(node.meta)
            node.replace_all_uses_with(value)
            graph.erase_node(node)


def _dense(graph_module: TracedGraphModule) -> TracedGraphModule:
    """Return the graph with dense weights, and tell by the log where it had quantised ones, which no file format has."""
    quantised = [tensor for tensor in state_of(graph_module).tensors.values() if isinstance(tensor, QuantisedWeight)]
    if not quantised:
        return graph_module
    schemes = sorted({scheme_text(tensor.scheme) for tensor in quantised})
    _logger.info(
        "the file has dense weights, %s, in the place of %d quantised ones (%s)",
        " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in quantised})),
        len(quantised),
        ", ".join(schemes),
    )
    return dequantise(graph_module)


def explain(exportable: Exportable, message: str) -> str:
    """Return a sentence with the operator that an exporter's message names and its line in the model; empty if there is none.

    Args:
        exportable: the graph that was to be written.
        message: with an operator as ``aten.linear.default`` or ``aten::linear``.
    """
    words = set(re.findall(r"[\w:.]+", message.replace("::", ".")))
    for node in exportable.plain.graph.nodes:
        if isinstance(node.target, OpOverload):
            overload, packet = str(node.target), str(node.target.overloadpacket)
            if words & {overload, packet, f"{overload}."} and source_line(node):
                return f" The operator is {overload}{source_line(node)}."
    return ""


def _in_evaluation(graph_module: TracedGraphModule) -> TracedGraphModule:
    return rebuilt(graph_module, info=info_of(graph_module).flat, training=False, trainable=frozenset())


def _fix_mode(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Replace dropout, batch norms, mode switches and detach() by their effect in evaluation (in place)."""
    for node in list(graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ModeSwitch):
            for user in list(node.users):
                user.args, user.kwargs = pytree.tree_map(
                    lambda leaf, node=node, value=module.eval_value: value if leaf is node else leaf,
                    (user.args, dict(user.kwargs)),
                )
            graph.erase_node(node)
        elif isinstance(module, GivenBatchNorm):
            given, weight, bias, mean, var, _ = node.args
            args = given, weight, bias, mean, var, False, module.momentum or 0.0, module.eps, True
            node.op, node.target, node.args = "call_function", module.operator, args
        elif isinstance(module, DropoutBase | TrainingOnly) or node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _argument_names(inputs: Sequence[str]) -> dict[str, str]:
    """Map the inputs to their names in the file: unchanged, unless the generated code needs the name itself."""
    names = {name: name for name in inputs}
    for name in _NEEDED.intersection(inputs):
        names[name] = next(free for count in count_from(1) if (free := f"{name}_{count}") not in names.values())
    return names


def _name_inputs(graph: fx.Graph, names: Iterable[str]) -> None:
    """Let ``forward`` have these names for its arguments, whatever the graph calls them (in place)."""
    for node, name in zip(graph.find_nodes(op="placeholder"), names, strict=True):
        node.target, node.type = name, torch.Tensor


_NEEDED = frozenset(
    "_ self torch aten fx_pytree operator math device getattr min max inf nan NoneType".split()  # noqa: SIM905
)


def _name_outputs(graph: fx.Graph) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Let a graph return a dictionary from names to tensors, each of them a node of its own (in place).

    Returns:
        The names, and those of results that are None, which it does not return.
    """
    output = graph.output_node()
    leaves: Sequence[Any] = output.args[0]  # type: ignore[assignment]
    names = _output_names(len(leaves), graph._codegen.pytree_info.out_spec)  # type: ignore[attr-defined]
    seen: set[fx.Node] = set()
    left_out = tuple(name for name, node in zip(names, leaves, strict=True) if node is None)
    results = [(name, node) for name, node in zip(names, leaves, strict=True) if node is not None]
    if not results:
        raise ExportError(f"expected a graph that returns a tensor, got None for {', '.join(left_out) or 'all'}.")
    for name, node in results:
        computed = node.meta.get("val", _UNKNOWN) if isinstance(node, fx.Node) else node
        _check_tensor(name, computed, source_line(node) if isinstance(node, fx.Node) else "")
    with graph.inserting_before(output):
        named: dict[str, fx.Node] = {}
        for name, node in results:
            own = node.op not in ("placeholder", "get_attr") and node not in seen
            named[name] = node if own else graph.call_function(aten.clone.default, (node,))
            seen.add(node)
    output.args = (named,)
    return tuple(named), left_out


_UNKNOWN = torch.empty(0)


def _check_tensor(name: str, value: object, where: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise ExportError(
            f"output {name!r}: expected a tensor, got {value}{where}. Trace a module that does not return it."
        )


def _output_names(count: int, out_spec: pytree.TreeSpec) -> list[str]:
    tree: Any = pytree.tree_unflatten(list(range(count)), out_spec)
    if isinstance(tree, int):
        return ["output"]
    if not isinstance(tree, Mapping):
        tree = (
            {f"output_{index}": value for index, value in enumerate(tree)}
            if type(tree) in (tuple, list)
            else {"output": tree}
        )
    names = [""] * count
    for path, index in pytree.tree_leaves_with_path(dict(tree)):
        names[index] = ".".join(key_parts(path))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ExportError(f"two outputs have the name {twice[0]!r}. Trace a module that gives them different names.")
    return names


def _examples(
    graph_module: TracedGraphModule,
    constraints: Constraints,
    given: Mapping[str, torch.Tensor] | None,
    names: Mapping[str, str],
) -> Examples:
    found = known_info(graph_module).examples
    if given is not None and not (
        isinstance(given, Mapping) and all(isinstance(value, torch.Tensor) for value in given.values())
    ):
        raise ExportError(
            f"example_inputs: expected a mapping from {', '.join(constraints.ranges)} to tensors, got {type(given).__name__}."
        )
    values = given if given is not None else found.tensors if found is not None else {}
    tensors = {names.get(name, name): value for name, value in values.items()}
    missing = [name for name in constraints.ranges if name not in tensors or tensors[name].is_meta]
    unknown = [name for name in tensors if name not in constraints.ranges]
    if missing or unknown:
        named = ", ".join(map(repr, missing or unknown))
        problem = (
            "there are no example values for" if missing else "example_inputs has names that the graph does not take:"
        )
        raise ExportError(
            f"{problem} {named}. Pass example_inputs: a mapping from {', '.join(constraints.ranges)} to tensors."
        )
    device = state_of(graph_module).device
    placed = {name: tensors[name].detach().to(device) for name in constraints.ranges}
    axes = {names.get(name, name): axes for name, axes in (found.axes if found is not None else {}).items()}
    axes = {name: dims for name, dims in axes.items() if len(dims) == placed[name].dim()}
    for name, ranges in constraints.ranges.items():
        _check_example(name, placed[name], ranges, constraints.dtypes[name])
    return Examples(placed, axes)


def _check_example(name: str, tensor: torch.Tensor, ranges: Sequence[tuple[int, int]], dtype: torch.dtype) -> None:
    fits = tensor.dim() == len(ranges) and all(
        low <= size and (high == UNBOUNDED or size <= high)
        for size, (low, high) in zip(tensor.shape, ranges, strict=True)
    )
    if not fits or tensor.dtype is not dtype:
        raise ExportError(
            f"the example for {name!r}: expected {dtype} of shape ({_as_text(ranges)}), got {tensor.dtype} of shape {tuple(tensor.shape)}. "
            "Pass example_inputs that the graph takes."
        )


def _as_text(ranges: Sequence[tuple[int, int]]) -> str:
    sizes = [
        str(low) if low == high else f"{low} or more" if high == UNBOUNDED else f"{low} to {high}"
        for low, high in ranges
    ]
    return ", ".join(sizes)
