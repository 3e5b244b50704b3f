"""The values that new nodes have in a trace: fake tensors, from which shapes and dtypes can be read.

To compute one with symbolic sizes takes milliseconds, and the layers of a model are mostly alike: what an operator makes of
arguments of the same shapes is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lora_fx.graph.graph_module import State


class FakeValues:
    """Gives new nodes of one graph their values.

    Args:
        state: of the graph, with the tensors that new nodes read.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._known: dict[Hashable, Any] = {}

    def record(self, node: fx.Node, like: fx.Node) -> None:
        """Give a node its value, if the node ``like`` beside it has one, and all that it reads."""
        fake = like.meta.get("val")
        if not isinstance(fake, FakeTensor):
            return
        mode, target = fake.fake_mode, node.target
        if node.op == "get_attr":
            tensor = self._state.tensors[str(target)].detach()
            node.meta["val"] = self._once(lambda: mode.from_tensor(tensor, static_shapes=True), mode, tensor)
        elif all("val" in argument.meta for argument in node.all_input_nodes):
            arguments: Any = fx.map_arg(node.args, lambda n: n.meta["val"])
            if callable(target):
                node.meta["val"] = self._once(lambda: _run(mode, target, arguments), mode, target, arguments)
            else:  # the path of a dropout
                node.meta["val"] = arguments[0]

    def _once(self, compute: Callable[[], Any], *given: Any) -> Any:
        """Return what was computed from something like ``given`` before, or compute it."""
        key = _told_apart_by(given)
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


def _run(mode: FakeTensorMode, target: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    with mode:
        return target(*arguments)


def _told_apart_by(value: Any) -> Hashable:
    """Return what a computation with fake values depends on: of a tensor what describes it, of a symbolic size the expression."""
    if isinstance(value, torch.Tensor):
        sizes = _told_apart_by((*value.shape, *value.stride(), value.storage_offset()))
        return sizes, value.dtype, value.device, value.requires_grad
    if isinstance(value, torch.SymInt):
        return value.node.expr  # type: ignore[no-any-return]
    if isinstance(value, list | tuple):
        return tuple(map(_told_apart_by, value))
    return type(value), value  # since 1 == 1.0 == True
