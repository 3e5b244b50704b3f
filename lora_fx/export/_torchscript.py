"""TorchScript: a scripted module with dynamic batch and sequence, which runs without lora_fx and without transformers.

The graph is written once more as plain Python that TorchScript compiles: operator packets in place of overloads, sizes by
``aten.size``, arguments by the model's own names, a ``Dict[str, Tensor]`` as result.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from lora_fx.errors import ExportError
from lora_fx.files import replacing
from lora_fx.graph_module import TracedGraphModule, assemble, copy_graph, state_of
from lora_fx.provenance import source_line

_COUNTERPARTS: Mapping[object, Callable[..., Any]] = {
    torch.ops.aten.sym_size.int: torch.ops.aten.size,
    torch.sym_min: min,
    torch.sym_max: max,
}


def torchscript(graph_module: TracedGraphModule, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a graph as TorchScript, in evaluation mode.

    The file is loaded by ``torch.jit.load``. It takes the tensors that the graph was traced with, by name or in the order
    of the model's arguments, in any size that the trace covers, and returns a dictionary from output names to tensors;
    values nested in an output are named ``<output>.<index>``.

    Args:
        graph_module: base, branched or folded; left as it is.
        path: of the file to write.
        overwrite: replace a file that exists.

    Raises:
        ExportError: TorchScript cannot express an operator, or an output is not a tensor.
        LoraFxError: the path exists or cannot be written.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\..* is deprecated", category=DeprecationWarning)
        warnings.filterwarnings(
            "ignore", message=".*instance-level annotations", category=UserWarning
        )  # of GraphModule itself
        scripted = _script(graph_module)
        with replacing(Path(path), overwrite=overwrite) as beside:
            torch.jit.save(scripted, str(beside))


def _script(graph_module: TracedGraphModule) -> torch.jit.ScriptModule:
    graph = _plain_graph(graph_module)
    owner = assemble(graph, state_of(graph_module), meta={}, training=False, trainable=frozenset())
    plain = fx.GraphModule(owner, graph).eval()
    try:
        return torch.jit.script(plain)
    except (RuntimeError, NotImplementedError, torch.jit.frontend.FrontendError) as error:
        raise ExportError(f"TorchScript does not take this graph: {_reason(error)}.") from error


def _plain_graph(graph_module: TracedGraphModule) -> fx.Graph:
    graph, _ = copy_graph(graph_module.graph)
    out_spec = graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    graph.set_codegen(CodeGen())
    for node in graph.nodes:
        if node.op == "placeholder":
            node.type = torch.Tensor
        elif node.op == "call_function":
            node.target = _counterpart(node)
    output = graph.output_node()
    output.args = (_named(output.args[0], out_spec),)
    return graph


def _counterpart(node: fx.Node) -> Any:
    if node.target in _COUNTERPARTS:
        return _COUNTERPARTS[node.target]
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target


def _named(leaves: Any, out_spec: pytree.TreeSpec) -> dict[str, fx.Node]:
    tree = pytree.tree_unflatten([_Leaf(leaf) for leaf in leaves], out_spec)
    if isinstance(tree, _Leaf):
        tree = {"output": tree}
    elif not isinstance(tree, Mapping):
        tree = (
            {f"output_{index}": value for index, value in enumerate(tree)}
            if isinstance(tree, (tuple, list))
            else {"output": tree}
        )
    named: dict[str, fx.Node] = {}
    for path, leaf in pytree.tree_leaves_with_path(dict(tree)):
        name = ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
        if not isinstance(leaf.node, fx.Node) or not isinstance(
            leaf.node.meta.get("val", torch.empty(0)), torch.Tensor
        ):
            raise ExportError(
                f"output {name!r} is not a tensor but {leaf.node}, and a TorchScript result is a dictionary of tensors{_line(leaf.node)}."
            )
        named[name] = leaf.node
    return named


class _Leaf:
    """Holds a node inside a pytree."""

    def __init__(self, node: Any) -> None:
        self.node = node


def _line(node: Any) -> str:
    return source_line(node) if isinstance(node, fx.Node) else ""


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__
