"""Texts about the nodes of one graph: values with named sizes, arguments, weights, the calls of modules around a node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import sympy
import torch
from torch import fx, nn

from lora_fx.graph.graph_module import TracedGraphModule, state_of
from lora_fx.graph.info import known_info
from lora_fx.graph.input_checks import InputCheck, RelationCheck
from lora_fx.torch_internals import FakeTensor, OpOverload
from lora_fx.tracing.transformers_models import traced_class

_QUIET = (torch.ops.aten.sym_size.int, torch.ops.aten._assert_scalar.default, getattr)
_MAX_LENGTH = 400  # characters of arguments: the beginning of a list of a thousand numbers is enough


@dataclass(frozen=True)
class Frame:
    """One call of a module.

    Attributes:
        path: of the module.
        type: class of the module.
        call: which of its calls this is, counted from 1.
    """

    path: str
    type: str
    call: int = 1


@dataclass(frozen=True)
class Weight:
    """A tensor of the model that an operator reads, with its dtype and shape as text."""

    name: str
    value: str
    trainable: bool


class Reader:
    """Reads the nodes of one graph."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        state = state_of(graph_module)
        self._tensors, self._constants = state.tensors, state.non_persistent
        self._axes = _axes(graph_module)
        self._sizes: dict[Any, str] = {}
        self._frames: dict[str, Frame | None] = {}

    def frames(self, node: fx.Node) -> tuple[Frame, ...]:
        """Return the calls of modules around a node, from the outside, without the model itself.

        A node without a record of them, put in by someone else, is where all that it reads and is read by is.
        """
        if node.meta.get("nn_module_stack") or node.op in ("placeholder", "output", "get_attr"):
            return self._recorded(node)
        around = [
            self._recorded(each) for each in (*node.all_input_nodes, *node.users) if each.meta.get("nn_module_stack")
        ]
        return tuple(level[0] for level in takewhile(_is_one, zip(*around, strict=False)))

    def _recorded(self, node: fx.Node) -> tuple[Frame, ...]:
        stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
        found: dict[Frame, None] = {}
        for key, (path, kind) in stack.items():
            known = f"{key}:{path}"
            if known not in self._frames:
                self._frames[known] = _frame(key, path, kind)
            frame = self._frames[known]
            if frame is not None:
                found[frame] = None
        return tuple(found)

    @cached_property
    def _wrapper(self) -> str:
        """The path, with a dot, of the innermost module in which everything is computed, as under a wrapper of PEFT or a container."""
        nodes = [
            node for node in self.graph_module.graph.nodes if node.op.startswith("call") and not self.is_quiet(node)
        ]
        shared = list(takewhile(_is_one, zip(*map(self.frames, nodes), strict=False)))
        return f"{shared[-1][0].path}." if shared else ""

    def own_name(self, name: str) -> str:
        """Return the name of a module or tensor without the prefixes of wrappers, such as PEFT's."""
        parts = f"{name}.".removeprefix(self._wrapper).removesuffix(".").split(".")
        return ".".join(part for part in parts if part != "base_layer")

    def value(self, node: fx.Node) -> str:
        """Return dtype and shape of a node's value, or an expression where it is a size; nothing for an unknown value."""
        if node.op == "get_attr":
            tensor = self._tensors.get(str(node.target))
            return "" if tensor is None else self._of(tensor)
        return self._of(node.meta.get("val"))

    def weights(self, node: fx.Node) -> tuple[Weight, ...]:
        """Return the tensors of the model that a node reads, each once, in the order of its arguments."""
        names = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
        return tuple(map(self.weight, names))

    def weight(self, name: str) -> Weight:
        """Return a tensor of the model by its name."""
        tensor = self._tensors.get(name)
        if tensor is None:
            return Weight(name, "", trainable=False)
        value = self._of(tensor)
        if tensor.dim() == 0 and not isinstance(tensor, nn.Parameter | FakeTensor) and not tensor.is_meta:
            value += f" = {tensor.item()}"  # a number in the model's code
        return Weight(name, value, tensor.requires_grad)

    def constant(self, name: str) -> torch.Tensor | None:
        """Return the value of a tensor of the model's code, such as a mask or a table of positions; None for weights.

        A graph traced on the meta device has no values. For these its model is made again, with buffers and without weights.
        """
        if name not in self._constants:
            return None
        tensor = self._tensors[name]
        return self._computed.get(name, tensor) if tensor.is_meta else tensor

    @cached_property
    def _computed(self) -> Mapping[str, torch.Tensor]:
        made = traced_class(self.graph_module) if isinstance(self.graph_module, TracedGraphModule) else None
        return {} if made is None else dict(made.named_buffers(remove_duplicate=False))

    def operator(self, node: fx.Node) -> str:
        """Return the operator of a node, or the class of the module that it calls."""
        if node.op == "call_module":
            return type(self.graph_module.get_submodule(str(node.target))).__name__
        if node.op in ("placeholder", "output"):
            return "input" if node.op == "placeholder" else "output"
        if isinstance(node.target, str):
            return node.target
        if isinstance(node.target, OpOverload):
            return str(node.target)
        return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', node.target)}".lstrip(".")

    def arguments(
        self, node: fx.Node, name_of: Callable[[fx.Node], str] | None = None, longest: int | None = _MAX_LENGTH
    ) -> str:
        """Return the arguments of a node as text; sizes are expressions.

        Args:
            node: of this graph.
            name_of: what to call the nodes among them; by default by their names, and weights by theirs.
            longest: number of characters after which the text is cut.
        """
        parts = [self.argument(value, name_of) for value in node.args]
        parts += [f"{key}={self.argument(value, name_of)}" for key, value in sorted(node.kwargs.items())]
        text = ", ".join(parts)
        return text if longest is None or len(text) <= longest else f"{text[: longest - 1]}…"

    def is_quiet(self, node: fx.Node) -> bool:
        """Tell whether a node is not drawn as long as both graphs have it: a weight, a size, a check of the inputs."""
        return node in self._quiet

    @cached_property
    def _quiet(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.graph_module.graph.nodes:
            if self._says_little(node, found):
                found.add(node)
        return found

    def _says_little(self, node: fx.Node, quiet: set[fx.Node]) -> bool:
        if node.op in ("placeholder", "output", "call_method"):
            return False
        if node.op == "get_attr":
            return True
        if node.op == "call_module":
            return isinstance(self.graph_module.get_submodule(str(node.target)), InputCheck | RelationCheck)
        if node.target in _QUIET:
            return True
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor | tuple | list):
            return False
        counted = value is not None or not isinstance(node.target, OpOverload)
        return counted and all(source in quiet and source.op != "get_attr" for source in node.all_input_nodes)

    def _name(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return str(node.target)
        if node.target is getattr:
            return f"{node.args[0]}.{node.args[1]}"
        return (self.value(node) or node.name) if self.is_quiet(node) else node.name

    def argument(self, value: Any, name_of: Callable[[fx.Node], str] | None = None) -> str:
        """Return one argument as text; see :meth:`arguments`."""
        name_of = name_of or self._name
        if isinstance(value, fx.Node):
            return name_of(value)
        if isinstance(value, list | tuple):
            inner = ", ".join(self.argument(item, name_of) for item in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key}: {self.argument(item, name_of)}" for key, item in value.items()) + "}"
        if isinstance(value, slice):
            bounds = (value.start, value.stop, value.step)
            return "slice(" + ", ".join(self.argument(bound, name_of) for bound in bounds) + ")"
        if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
            return str(value).removeprefix("torch.")
        return repr(value)

    def _of(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            shape = ", ".join(self._size(size) for size in value.shape)
            return f"{str(value.dtype).removeprefix('torch.')} [{shape}]"
        if isinstance(value, tuple | list):
            return f"({', '.join(self._of(item) for item in value)})"
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self._size(value)
        return "" if value is None else repr(value)

    def _size(self, size: Any) -> str:
        if isinstance(size, int | float):
            return str(size)
        expression = size.node.expr
        if expression not in self._sizes:
            named = expression.xreplace({symbol: self._axes.get(symbol, symbol) for symbol in expression.free_symbols})
            self._sizes[expression] = str(named)
        return self._sizes[expression]


def _is_one(level: tuple[Frame, ...]) -> bool:
    return len(set(level)) == 1


def _axes(graph_module: fx.GraphModule) -> dict[Any, Any]:
    """Return for each symbol that is a dimension of an input the name of its axis, as the repr of the graph has it."""
    examples = known_info(graph_module).examples
    symbols: dict[tuple[str, int], Any] = {}
    for node in graph_module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if examples is None or not isinstance(value, torch.Tensor) or str(node.target) not in examples.tensors:
            continue
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                symbols[str(node.target), dim] = size.node.expr
    given = {axis for axes in (examples.axes.values() if examples is not None else ()) for axis in axes}
    named: dict[Any, Any] = {}
    for axis, places in (examples.together(symbols) if examples is not None else {}).items():
        found = {symbols[place] for place in places}
        if axis in given or len(found) == 1:  # sizes without names that vary apart keep their symbols
            named = {**dict.fromkeys(found, sympy.Symbol(axis, integer=True, positive=True)), **named}
    return named


def _frame(key: str, path: str, kind: Any) -> Frame | None:
    path = path.split("@")[0]
    if not path or not key.startswith("L__self__"):
        return None
    call = key.rpartition("@")[2] if "@" in key else ""
    name = kind if isinstance(kind, str) else getattr(kind, "__qualname__", type(kind).__qualname__)
    return Frame(path, name.rpartition(".")[2], int(call) + 1 if call.isdigit() else 1)


def type_of_root(graph_module: fx.GraphModule) -> str:
    """Return the class of the model that a graph was traced from, if it is known."""
    return known_info(graph_module).class_name
