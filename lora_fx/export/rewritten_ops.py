"""Operators of a plain graph, rewritten for formats that lack them: complex numbers, bfloat16 amid float32, checks of values."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lora_fx.export.prepare import Exportable
from lora_fx.graph.erasing import erase_unread
from lora_fx.graph.graph_module import copy_graph
from lora_fx.graph.provenance import source_line

aten = torch.ops.aten


def for_onnx(exportable: Exportable) -> Exportable:
    """Return the graph in operators that torch.onnx translates and onnxruntime's CPU computes."""
    graph, _ = copy_graph(exportable.plain.graph)
    _subtract_in_dtype_of_result(graph)
    for holds in _without_idle_squeezes(graph):
        multiply_result_by_check(graph, holds)
    _write_complex_as_pairs(graph)
    _compute_bfloat16_in_float32(graph, exportable)
    for holds, _ in value_checks(graph):
        multiply_result_by_check(graph, holds)
    graph.lint()
    return replace(exportable, plain=fx.GraphModule(exportable.plain, graph, class_name="GraphModule").eval())


def value_checks(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """Take each check that a tensor is true everywhere out of a graph (in place), and yield a truth value and a message in its place.

    torch.export writes it as a size: ``_assert_scalar(ge(sym_ite(item(_is_all_true(tensor)), 1, 0), 1))``.
    """
    for node in graph.find_nodes(op="call_function", target=aten._is_all_true.default):
        users = list(_users(node))
        checked = any(user.target in (operator.eq, operator.ge) and user.args[1] == 1 for user in users)
        if not checked or not {user.target for user in users} <= _OF_CHECKS:
            continue
        message = f"expected values for which a condition of the model holds{source_line(node)}"
        with graph.inserting_before(node):
            holds = _call(graph, aten.all.default, node.args, node)
        for user in reversed(users):
            erase_unread(graph, user)
        yield holds, message


_OF_CHECKS = {
    aten.item.default,
    torch.sym_ite,
    operator.ge,
    operator.le,
    operator.eq,
    aten._assert_scalar.default,
}


def _users(node: fx.Node) -> Iterator[fx.Node]:
    """Yield all nodes that a node's value reaches, those behind others last."""
    found: dict[fx.Node, None] = {}
    reached = {node}
    for other in node.graph.nodes:
        if not reached.isdisjoint(other.all_input_nodes):
            reached.add(other)
            found[other] = None
    yield from found


def multiply_result_by_check(graph: fx.Graph, holds: fx.Node) -> None:
    """Let the first result depend on a truth value, by an index that is out of range where it is false (in place)."""
    output = graph.output_node()
    results: dict[str, fx.Node] = dict(output.args[0])  # type: ignore[arg-type]
    name, result = next(iter(results.items()))
    value = result.meta["val"]
    with graph.inserting_before(output):
        one = _call(graph, aten.new_ones.default, (result, [1]), result)
        index = _call(
            graph, aten.to.dtype, (_call(graph, aten.logical_not.default, (holds,), result), torch.int64), result
        )
        index = _call(graph, aten.reshape.default, (index, [1]), result)
        factor = _call(
            graph, aten.reshape.default, (_call(graph, aten.index_select.default, (one, 0, index), result), []), result
        )
        both = aten.logical_and.default if value.dtype is torch.bool else aten.mul.Tensor
        results[name] = _call(graph, both, (result, factor), result)
    output.args = (results,)


def _without_idle_squeezes(graph: fx.Graph) -> Iterator[fx.Node]:
    """Remove squeezes of a dimension whose size is not 1, which do nothing (in place); torch.onnx takes the size for 1.

    Yields:
        For each, whether the size is not 1: then the result would have another rank.
    """
    for node in graph.find_nodes(op="call_function", target=aten.squeeze.dim):
        given = node.args[0]
        before, after = _value(given), _value(node)
        if before is not None and after is not None and before.dim() == after.dim():
            node.replace_all_uses_with(given)
            with graph.inserting_before(node):
                size = _call(graph, aten.sym_size.int, (given, node.args[1]), node)
                size = _call(graph, aten.scalar_tensor.default, (size,), node, dtype=torch.int64)
                holds = _call(graph, aten.ne.Scalar, (size, 1), node)
            graph.erase_node(node)
            yield holds


def _subtract_in_dtype_of_result(graph: fx.Graph) -> None:
    """Cast what a number minus integers subtracts to the dtype of the result, as torch does (in place); torch.onnx does not."""
    for node in graph.find_nodes(op="call_function", target=aten.rsub.Scalar):
        given = node.args[0]
        value, result = _value(given), _value(node)
        if value is not None and result is not None and value.dtype is not result.dtype:
            with graph.inserting_before(node):
                node.replace_input_with(given, _cast(graph, given, result.dtype))


def _compute_bfloat16_in_float32(graph: fx.Graph, exportable: Exportable) -> None:
    """Compute sums and products of bfloat16 in float32 and round them, which gives the bits of torch's CPU (in place).

    Only where no weight is bfloat16: onnxruntime's CPU has no kernels for it, and a model in bfloat16 is for another runtime.
    A sum with ``alpha`` stays: whether torch rounds the product depends on how the tensors lie in memory.
    """
    if any(tensor.dtype is torch.bfloat16 for tensor in exportable.plain.state_dict().values()):
        return
    for node in list(graph.nodes):
        if node.target not in _ELEMENTWISE or "alpha" in node.kwargs or not _is_bfloat16(node):
            continue
        if any(_value(given) is None for given in node.all_input_nodes):  # a size, or of a size that depends on values
            continue
        with graph.inserting_before(node):
            node.args = tuple(_operand_in_float32(graph, node, place) for place in (0, 1))
        with graph.inserting_after(node):
            result = _cast(graph, node, torch.bfloat16)
        node.replace_all_uses_with(result, delete_user_cb=lambda user, result=result: user is not result)


def _is_bfloat16(node: fx.Node) -> bool:
    value = _value(node)
    return value is not None and value.dtype is torch.bfloat16


def _operand_in_float32(graph: fx.Graph, node: fx.Node, place: int) -> Any:
    """Return an operand of a sum or product of bfloat16 as torch's CPU computes with it: rounded to bfloat16, but for one number.

    A number by which tensors are multiplied or divided is not rounded; nor is a tensor of one number in the second place.
    """
    given: Any = node.args[place]
    is_product = node.target in (aten.mul.Tensor, aten.div.Tensor)
    if not isinstance(given, fx.Node):
        return given if is_product else float(torch.tensor(given, dtype=torch.bfloat16))
    value = _value(given)
    is_number = value is not None and value.dim() == 0
    if not _is_bfloat16(given) and not (is_product and place == 1 and is_number):
        given = _cast(graph, given, torch.bfloat16)
    return _cast(graph, given, torch.float32)


_ELEMENTWISE = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return _call(graph, aten.to.dtype, (node, dtype), node)


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node, **kwargs: Any) -> fx.Node:
    """Insert a call with the origin of another node."""
    node = graph.call_function(target, args, kwargs)
    node.meta = dict(like.meta)
    return node


def _write_complex_as_pairs(graph: fx.Graph) -> None:
    """Write complex values as pairs of real and imaginary part in a last dimension (in place), if all operators on them are known."""
    nodes = [node for node in graph.nodes if _is_complex(node) or any(map(_is_complex, node.all_input_nodes))]
    results = list(graph.output_node().args[0].values())  # type: ignore[union-attr]
    if any(node.target not in _PAIRS or _casts_parts(node) for node in nodes) or any(map(_is_complex, results)):
        return
    pairs: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        with graph.inserting_before(node):
            pairs[node] = _PAIRS[node.target](graph, node, pairs)
        if not _is_complex(node):
            node.replace_all_uses_with(pairs[node])
    for node in reversed(nodes):
        graph.erase_node(node)


def _is_complex(node: fx.Node) -> bool:
    value = _value(node)
    return value is not None and value.is_complex()


def _value(node: fx.Node) -> torch.Tensor | None:
    """Return the fake value of a tensor; None where the trace has none: its size depends on values."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def _casts_parts(node: fx.Node) -> bool:
    """Tell whether a cast changes the dtype of complex numbers, or makes them of real ones, or the reverse."""
    if node.target not in (aten.to.dtype, aten.to.device, aten.to.dtype_layout):
        return False
    value, given = _value(node), _value(node.all_input_nodes[0])
    return value is None or given is None or value.dtype is not given.dtype


Pairs = Mapping[fx.Node, fx.Node]


def _joined(graph: fx.Graph, real: fx.Node, imaginary: fx.Node, like: fx.Node) -> fx.Node:
    return _call(graph, aten.stack.default, ([real, imaginary], -1), like)


def _polar(graph: fx.Graph, node: fx.Node, _: Pairs) -> fx.Node:
    size, angle = node.args
    real, imaginary = (
        _call(graph, aten.mul.Tensor, (size, _call(graph, function, (angle,), node)), node)
        for function in (aten.cos.default, aten.sin.default)
    )
    return _joined(graph, real, imaginary, node)


def _unchanged(_: fx.Graph, node: fx.Node, pairs: Pairs) -> fx.Node:
    (given,) = node.all_input_nodes[:1]
    return pairs.get(given, given)


def _product(graph: fx.Graph, node: fx.Node, pairs: Pairs) -> fx.Node:
    def parts(factor: Any) -> list[Any]:
        if isinstance(factor, complex):
            return [factor.real, factor.imag]
        return [_call(graph, aten.select.int, (pairs[factor], -1, part), node) for part in (0, 1)]

    def times(x: Any, y: Any) -> fx.Node:
        tensor, factor = (x, y) if isinstance(x, fx.Node) else (y, x)
        return _call(graph, aten.mul.Tensor, (tensor, factor), node)

    def is_complex(factor: Any) -> bool:
        return _is_complex(factor) if isinstance(factor, fx.Node) else isinstance(factor, complex)

    first, second = node.args
    if not (is_complex(first) and is_complex(second)):
        numbers, factor = (first, second) if is_complex(first) else (second, first)
        a, b = parts(numbers)
        return _joined(graph, times(a, factor), times(b, factor), node)
    (a, b), (c, d) = parts(first), parts(second)
    real = _call(graph, aten.sub.Tensor, (times(a, c), times(b, d)), node)
    return _joined(graph, real, _call(graph, aten.add.Tensor, (times(a, d), times(b, c)), node), node)


def _along(*places: int) -> Callable[[fx.Graph, fx.Node, Pairs], fx.Node]:
    """Return the rewriting of an operator whose arguments at these places are dimensions."""

    def rewritten(graph: fx.Graph, node: fx.Node, pairs: Pairs) -> fx.Node:
        args: list[Any] = [pairs[node.args[0]], *node.args[1:]]  # type: ignore[index]
        for place in places:
            args[place] -= args[place] < 0  # the pair is the last dimension
        return _call(graph, node.target, tuple(args), node)

    return rewritten


def _sized(graph: fx.Graph, node: fx.Node, pairs: Pairs) -> fx.Node:
    sizes: Sequence[Any] = node.args[1]  # type: ignore[assignment]
    return _call(graph, node.target, (pairs[node.args[0]], [*sizes, 2]), node)  # type: ignore[index]


_PAIRS: Mapping[Any, Callable[[fx.Graph, fx.Node, Pairs], fx.Node]] = {
    aten.polar.default: _polar,
    aten.mul.Tensor: _product,
    aten.slice.Tensor: _along(1),
    aten.unsqueeze.default: _along(1),
    aten.select.int: _along(1),
    aten.transpose.int: _along(1, 2),
    **dict.fromkeys((aten.reshape.default, aten.view.default, aten.expand.default), _sized),
    **dict.fromkeys(
        (
            *(aten.view_as_complex.default, aten.view_as_real.default, aten.clone.default),
            *(aten.to.dtype_layout, aten.to.device, aten.to.dtype),
        ),
        _unchanged,
    ),
}
