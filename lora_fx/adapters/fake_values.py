"""Fake values of new nodes: tensors without data, from which shapes and dtypes can be read.

Computing one with symbolic sizes takes milliseconds, and the layers of a model are mostly alike: the result of an operator on
arguments of the same shapes is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from lora_fx.graph.state import State
from lora_fx.torch_internals import FakeTensor, FakeTensorMode


class FakeValues:
    """Fake values for the new nodes of one graph, each computed once.

    Args:
        state: of the graph, with the tensors that new nodes read.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._known: dict[Hashable, Any] = {}

    def record(self, node: fx.Node, like: fx.Node) -> None:
        """Give a node its value, if the node ``like`` beside it and all inputs have one."""
        fake = like.meta.get("val")
        if not isinstance(fake, torch.Tensor):
            return
        mode, target = _mode_of(fake), node.target
        if node.op == "get_attr":
            node.meta["val"] = self._of_tensor(node, fake)
        elif target is torch.ops.aten.nonzero.default:
            return  # its size is a value
        elif all("val" in argument.meta for argument in node.all_input_nodes):
            # Of a tensor, a value of the mode: where graphs were joined, several modes read it.
            arguments: Any = fx.map_arg(
                node.args, lambda n: self._of_tensor(n, fake) if n.op == "get_attr" else n.meta["val"]
            )
            if callable(target):
                node.meta["val"] = self._once(lambda: _run(mode, target, arguments), mode, target, arguments)
            else:  # the path of a dropout
                node.meta["val"] = arguments[0]

    def _of_tensor(self, node: fx.Node, fake: torch.Tensor) -> Any:
        # On the device of the trace, which the graph may have left since: for another one, or for weights after meta.
        tensor, mode = self._state.tensors[str(node.target)], _mode_of(fake)
        given = (tuple(tensor.shape), tensor.stride(), tensor.dtype, fake.device)
        return self._once(lambda: _empty(mode, *given), mode, *given)

    def _once(self, compute: Callable[[], Any], *given: Any) -> Any:
        """Return the result for arguments like ``given``; computed at the first such call."""
        key = _cache_key(given)
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


_Mode = FakeTensorMode | nullcontext[None]

_NO_MODE = nullcontext()


def _mode_of(value: torch.Tensor) -> _Mode:
    """Return the mode of a fake value; a graph that was pickled has tensors on meta, which need none."""
    return value.fake_mode if isinstance(value, FakeTensor) else _NO_MODE


def _run(mode: _Mode, target: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    with mode:
        return target(*arguments)


def _empty(
    mode: _Mode, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Any:
    with mode:
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _cache_key(value: Any) -> Hashable:
    """Return everything that a computation with fake values depends on: the metadata of a tensor, the expression of a symbolic size."""
    if isinstance(value, torch.Tensor):
        sizes = _cache_key((*value.shape, *value.stride(), value.storage_offset()))
        return sizes, value.dtype, value.device, value.requires_grad
    if isinstance(value, torch.SymInt):
        return value.node.expr  # type: ignore[no-any-return]
    if isinstance(value, list | tuple):
        return tuple(map(_cache_key, value))
    return type(value), value  # since 1 == 1.0 == True
