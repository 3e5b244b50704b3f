"""What is taken for a branch and folded, and what is refused by which node: graphs of a few nodes, written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  registers transformers::grouped_mm_fallback
from graph_diff import first_difference
from torch import fx, nn

import lora_fx
from lora_fx.branches.delta import Term
from lora_fx.branches.find import find_branches
from lora_fx.branches.found import FoundBranch
from lora_fx.numerics.update import Factor, Update
from lora_fx.numerics.weight_view import SWAP, View

aten = torch.ops.aten
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
A, B = "lin.lora_A.default.weight", "lin.lora_B.default.weight"
Written = Any  # what a graph puts out: a node, or several


class Hand:
    """A graph under construction; every node has its value, so that shapes can be read off it."""

    def __init__(self) -> None:
        self.root, self.graph = nn.Module(), fx.Graph()
        self.inputs: list[torch.Tensor] = []
        self._known: dict[str, fx.Node] = {}
        self._generator = torch.Generator().manual_seed(7)

    def value(self, *shape: int, dtype: torch.dtype = F64) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, dtype=F64).to(dtype)

    def input(self, *shape: int, dtype: torch.dtype = F64, value: torch.Tensor | None = None) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.inputs)}")
        self.inputs.append(self.value(*shape, dtype=dtype) if value is None else value)
        node.meta["val"] = self.inputs[-1]
        return node

    def get(self, name: str, *shape: int, dtype: torch.dtype = F64, value: torch.Tensor | None = None) -> fx.Node:
        """Return the ``get_attr`` of a tensor, new if there is none of this name."""
        if name not in self._known:
            tensor = self.value(*shape, dtype=dtype) if value is None else value
            *path, leaf = name.split(".")
            module = self.root
            for part in path:
                module.add_module(part, module._modules.get(part) or nn.Module())
                module = module.get_submodule(part)
            if tensor.is_floating_point():
                module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
            else:
                module.register_buffer(leaf, tensor)
            self._known[name] = self.graph.get_attr(name)
            self._known[name].meta["val"] = tensor
        return self._known[name]

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*values[0], **values[1])
        return node

    def raw(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A node without a value: it need not make sense."""
        return self.graph.call_function(target, args, kwargs)

    def module(self, name: str, module: nn.Module, *args: fx.Node) -> fx.Node:
        parent, _, leaf = name.rpartition(".")
        self.root.get_submodule(parent).add_module(leaf, module)
        node = self.graph.call_module(name, args)
        node.meta["val"] = module.eval()(*(n.meta["val"] for n in args))
        return node

    def done(self, written: Written) -> fx.GraphModule:
        self.graph.output(written)
        return fx.GraphModule(self.root, self.graph).eval()

    # What most graphs have: x, w, a, b, the site and its branch. A node is written when it is first asked for.

    @property
    def x(self) -> fx.Node:
        return self._once("x", lambda: self.input(3, 4, 6))

    @property
    def flat(self) -> fx.Node:
        return self._once("flat", lambda: self.input(7, 6))

    @property
    def w(self) -> fx.Node:
        return self.get("lin.weight", 5, 6)

    @property
    def a(self) -> fx.Node:
        return self.get(A, 2, 6)

    @property
    def b(self) -> fx.Node:
        return self.get(B, 5, 2)

    @property
    def site(self) -> fx.Node:
        return self._once("site", lambda: self.linear(self.x, self.w))

    @property
    def down(self) -> fx.Node:
        return self._once("down", lambda: self.linear(self.x, self.a))

    @property
    def delta(self) -> fx.Node:
        return self._once("delta", lambda: self.linear(self.down, self.b))

    def _once(self, key: str, make: Callable[[], fx.Node]) -> fx.Node:
        if f"({key})" not in self._known:
            self._known[f"({key})"] = make()
        return self._known[f"({key})"]

    def linear(self, value: fx.Node, weight: fx.Node, *bias: fx.Node) -> fx.Node:
        return self(aten.linear.default, value, weight, *bias)

    def add(self, left: Any, right: Any, **kwargs: Any) -> fx.Node:
        return self(aten.add.Tensor, left, right, **kwargs)

    def mul(self, left: Any, right: Any) -> fx.Node:
        return self(aten.mul.Tensor, left, right)

    def to(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        return self(aten.to.dtype, value, dtype)

    def view(self, value: fx.Node, *sizes: int) -> fx.Node:
        return self(aten.view.default, value, list(sizes))

    def second(self) -> fx.Node:
        """Another adapter's branch beside the same site."""
        a, b = self.get("lin.lora_A.other.weight", 3, 6), self.get("lin.lora_B.other.weight", 5, 3)
        return self.linear(self.linear(self.x, a), b)


def operators(graph_module: fx.GraphModule) -> list[str]:
    """Return what a graph computes with: names of operators, and ``module`` for a module."""
    called = [node for node in graph_module.graph.nodes if node.op.startswith("call_")]
    return ["module" if node.op == "call_module" else node.target._opname for node in called]


def never(name: str) -> bool:
    return False


# Branches that fold. Beside each: the operators that are left.

Accepted = dict[str, tuple[Callable[[Hand], Written], list[str]]]
CASES: Accepted = {}


def folds(name: str, left: str = "linear") -> Callable[[Callable[[Hand], Written]], Callable[[Hand], Written]]:
    def add(write: Callable[[Hand], Written]) -> Callable[[Hand], Written]:
        CASES[name] = write, left.split()
        return write

    return add


def _simple(**cases: Callable[[Hand], Written]) -> None:
    """Cases beside a plain linear, of which nothing but that is left."""
    CASES.update({name.replace("_", " "): (write, ["linear"]) for name, write in cases.items()})


_simple(
    site_and_delta=lambda h: h.add(h.site, h.delta),
    delta_and_site=lambda h: h.add(h.delta, h.site),
    site_less_delta=lambda h: h(aten.sub.Tensor, h.site, h.delta),
    site_and_twice_delta=lambda h: h.add(h.site, h.delta, alpha=2),
    site_less_half_delta=lambda h: h(aten.sub.Tensor, h.site, h.delta, alpha=0.5),
    delta_and_once_site=lambda h: h.add(h.delta, h.site, alpha=1),
    in_place=lambda h: h(aten.add_.Tensor, h.site, h.delta, alpha=3),
    in_place_less=lambda h: h(aten.sub_.Tensor, h.site, h.delta),
    in_place_of_delta=lambda h: h(aten.add_.Tensor, h.delta, h.site),
    times_integer=lambda h: h.add(h.site, h.mul(h.delta, 3)),
    times_float=lambda h: h.add(h.site, h.mul(h.delta, -1.5)),
    float_times=lambda h: h.add(h.site, h.mul(0.25, h.delta)),
    times_scalar=lambda h: h.add(h.site, h(aten.mul.Scalar, h.delta, 2.5)),
    by_number=lambda h: h.add(h.site, h(aten.div.Tensor, h.delta, 4)),
    by_scalar=lambda h: h.add(h.site, h(aten.div.Scalar, h.delta, -0.5)),
    times_zero=lambda h: h.add(h.site, h.add(h.mul(h.delta, 0), h.second())),
    negated=lambda h: h.add(h.site, h(aten.neg.default, h.delta)),
    scaled_inside=lambda h: h.add(h.site, h.linear(h.mul(h.down, 1.5), h.b)),
    scaled_twice=lambda h: h.add(h.site, h.mul(h.linear(h.mul(h.down, 1.5), h.b), 3)),
    times_parameter=lambda h: h.add(h.site, h.mul(h.delta, h.get("s"))),
    parameter_times=lambda h: h.add(h.site, h.mul(h.get("s", 1), h.delta)),
    times_parameters=lambda h: h.add(h.site, h.mul(h.mul(h.delta, h.get("s", 1)), h.get("t"))),
    times_reshaped_parameter=lambda h: h.add(h.site, h.mul(h.delta, h.view(h.get("s", 1, 1), 1))),
    sum_of_deltas=lambda h: h.add(h.site, h.add(h.delta, h.second())),
    difference_of_deltas=lambda h: h.add(h.site, h(aten.sub.Tensor, h.delta, h.second())),
    sum_of_deltas_scaled=lambda h: h.add(h.site, h.mul(h.add(h.delta, h.second(), alpha=2), 0.5)),
    two_adapters=lambda h: h.add(h.add(h.site, h.delta), h.second()),
    two_adapters_the_other_way=lambda h: h.add(h.second(), h.add(h.delta, h.site)),
    second_adapter_subtracted=lambda h: h(aten.sub.Tensor, h.add(h.site, h.delta), h.second(), alpha=2),
    two_adapters_in_place=lambda h: h(aten.add_.Tensor, h(aten.add_.Tensor, h.site, h.delta), h.second()),
    one_delta_twice=lambda h: h.add(h.site, h.add(h.delta, h.delta)),
    one_delta_added_twice=lambda h: h.add(h.add(h.site, h.delta), h.delta),
    one_factor=lambda h: h.add(h.site, h.linear(h.x, h.get(A, 5, 6))),
    three_factors=lambda h: h.add(h.site, h.linear(h.linear(h.down, h.get("lin.lora_A.m.weight", 3, 2)), h.get(B, 5, 3))),
    a_frozen_matrix_inside=lambda h: h.add(h.site, h.linear(h.linear(h.down, h.get("frozen", 3, 2)), h.get(B, 5, 3))),
    shared_A=lambda h: h.add(h.add(h.site, h.delta), h.linear(h.down, h.get("lin.lora_B.o.weight", 5, 2))),
    cloned=lambda h: h.add(h.site, h(aten.clone.default, h.delta)),
    contiguous=lambda h: h.add(h.site, h(aten.contiguous.default, h.delta)),
    aliased=lambda h: h.add(h.site, h(aten.alias.default, h.delta)),
    detached=lambda h: h.add(h.site, h(aten.detach.default, h.delta)),
    of_a_clone=lambda h: h.add(h.site, h.linear(h.linear(h(aten.clone.default, h.x), h.a), h.b)),
    inactive_dropout=lambda h: h.add(h.site, h.linear(h.linear(h(aten.dropout.default, h.x, 0.5, False), h.a), h.b)),
    of_a_reshape=lambda h: h.add(h.site, h.view(h.linear(h.linear(h.view(h.x, 12, 6), h.a), h.b), 3, 4, 5)),
    reshaped_inside=lambda h: h.add(h.site, h.view(h.linear(h.view(h.down, 12, 2), h.b), 3, 4, 5)),
    unsafe_view=lambda h: h.add(
        h.site, h(aten._unsafe_view.default, h.linear(h(aten.reshape.default, h.down, [2, 6, 2]), h.b), [3, 4, 5])
    ),
    squeezed=lambda h: h.add(h.site, h(aten.squeeze.dim, h.linear(h(aten.unsqueeze.default, h.down, 0), h.b), 0)),
    flattened=lambda h: h.add(
        h.site, h.view(h.linear(h(aten.flatten.using_ints, h.down, 0, 1), h.b), 3, 4, 5)
    ),
)  # fmt: skip


@folds("matmul in_out", "matmul")
def _(h: Hand) -> Written:
    base = h(aten.matmul.default, h.x, h.get("lin.weight", 6, 5))
    return h.add(base, h(aten.matmul.default, h(aten.matmul.default, h.x, h(aten.t.default, h.a)), h.get(B, 2, 5)))


@folds("mm, every transpose of a factor", "mm")
def _(h: Hand) -> Written:
    value = h(aten.mm.default, h.flat, h.get("lin.weight", 6, 5))
    swaps: list[tuple[Any, ...]] = [
        (aten.t.default,), (aten.mT.default,), (aten.numpy_T.default,), (aten.transpose.int, 0, 1),
        (aten.transpose.int, -1, -2), (aten.permute.default, [1, 0]),
    ]  # fmt: skip
    for number, (swap, *how) in enumerate(swaps):
        a, b = (h.get(f"lin.lora_{p}.n{number}.weight", *shape) for p, shape in (("A", (2, 6)), ("B", (5, 2))))
        value = h.add(value, h(aten.mm.default, h(aten.mm.default, h.flat, h(swap, a, *how)), h(swap, b, *how)))
    return value


@folds("addmm", "addmm")
def _(h: Hand) -> Written:
    return h.add(
        h(aten.addmm.default, h.get("lin.bias", 5), h.flat, h.get("lin.weight", 6, 5)),
        h.linear(h.linear(h.flat, h.a), h.b),
    )


@folds("a fused product and sum")
def _(h: Hand) -> Written:
    down, site = h.linear(h.flat, h.a), h.linear(h.flat, h.w)
    return h(aten.addmm.default, site, down, h(aten.t.default, h.b), alpha=0.5)


@folds("fused sums of two adapters")
def _(h: Hand) -> Written:
    down, site = h.linear(h.flat, h.a), h.linear(h.flat, h.w)
    other = h.linear(h.flat, h.get("lin.lora_A.o.weight", 3, 6))
    value = h(aten.addmm.default, site, down, h(aten.t.default, h.b))
    return h(aten.addmm.default, value, other, h.get("lin.lora_B.o.weight", 3, 5), alpha=-2)


@folds("a fused sum of deltas")
def _(h: Hand) -> Written:
    delta = h.linear(h.linear(h.flat, h.a), h.b)
    other = h.linear(h.flat, h.get("lin.lora_A.o.weight", 3, 6))
    value = h(aten.addmm.default, delta, other, h.get("lin.lora_B.o.weight", 3, 5), alpha=3)
    return h.add(h.linear(h.flat, h.w), value)


@folds("a site with a bias")
def _(h: Hand) -> Written:
    return h.add(h.linear(h.x, h.w, h.get("lin.bias", 5)), h.delta)


@folds("behind a bias that is a node", "linear add")
def _(h: Hand) -> Written:
    return h.add(h.add(h.site, h.get("lin.bias", 5)), h.delta)


@folds("before a bias that is a node", "linear add")
def _(h: Hand) -> Written:
    return h.add(h.add(h.site, h.delta), h.get("lin.bias", 5))


@folds("behind a reshape of the site, as GPT-2 has it", "view addmm view")
def _(h: Hand) -> Written:
    site = h(aten.addmm.default, h.get("lin.bias", 5), h.view(h.x, 12, 6), h.get("lin.weight", 6, 5))
    return h.add(h.view(site, 3, 4, 5), h.delta)


@folds("behind two reshapes and a bias", "linear add reshape view")
def _(h: Hand) -> Written:
    biased = h.add(h.site, h.get("lin.bias", 5))
    return h.add(h.view(h(aten.reshape.default, biased, [2, 6, 5]), 3, 4, 5), h.delta)


@folds("of an input behind a reshape and a cast", "view linear")
def _(h: Hand) -> Written:
    view = h.view(h.x, 12, 6)
    down = h.linear(h.to(h(aten.reshape.default, h.x, [12, 6]), F64), h.a)
    return h.add(h.linear(view, h.w), h.linear(down, h.b))


@folds("own dropout")
def _(h: Hand) -> Written:
    h.get(A, 2, 6)
    dropped = h.module("lin.lora_dropout", nn.Dropout(0.5), h.x)
    return h.add(h.site, h.linear(h.linear(dropped, h.a), h.b))


@folds("own dropout behind a cast, before another dropout")
def _(h: Hand) -> Written:
    h.get(A, 2, 6)
    dropped = h.module("lin.lora_dropout", nn.Dropout(0.5), h.to(h.x, F64))
    again = h.module("lin.again", nn.Dropout1d(0.5), dropped)
    return h.add(h.site, h.linear(h.linear(again, h.a), h.b))


@folds("a site behind a dropout that is the model's", "module linear")
def _(h: Hand) -> Written:
    site = h.linear(h.module("drop", nn.Dropout(0.5), h.x), h.w)
    return h.add(site, h.delta)


@folds("sites one after the other", "linear tanh linear")
def _(h: Hand) -> Written:
    inner = h(aten.tanh.default, h.add(h.site, h.delta))
    a, b = h.get("next.lora_A.default.weight", 2, 5), h.get("next.lora_B.default.weight", 3, 2)
    return h.add(h.linear(inner, h.get("next.weight", 3, 5)), h.linear(h.linear(inner, a), b))


@folds("a branch that reads a sum with a branch", "linear linear")
def _(h: Hand) -> Written:
    inner = h.add(h.site, h.delta)
    a, b = h.get("next.lora_A.default.weight", 2, 5), h.get("next.lora_B.default.weight", 3, 2)
    return h.add(h.linear(inner, h.get("next.weight", 3, 5)), h.linear(h.linear(inner, a), b))


@folds("one A of two sites", "linear linear")
def _(h: Hand) -> Written:
    other = h.linear(h.x, h.get("next.weight", 3, 6))
    return h.add(h.site, h.delta), h.add(other, h.linear(h.down, h.get("next.lora_B.default.weight", 3, 2)))


@folds("factors in another dtype, cast", "linear")
def _(h: Hand) -> Written:
    a, b = h.get(A, 2, 6, dtype=F32), h.get(B, 5, 2, dtype=F32)
    return h.add(h.site, h.linear(h.linear(h.x, h.to(a, F64)), h(aten._to_copy.default, b, dtype=F64)))


@folds("a weight behind a cast", "to linear")
def _(h: Hand) -> Written:
    return h.add(h.linear(h.x, h.to(h.get("lin.weight", 5, 6, dtype=F32), F64)), h.delta)


@folds("a weight behind a transpose", "t matmul")
def _(h: Hand) -> Written:
    return h.add(h(aten.matmul.default, h.x, h(aten.t.default, h.w)), h.delta)


@folds("factors behind reshapes")
def _(h: Hand) -> Written:
    a, b = h.view(h.get(A, 12), 2, 6), h(aten.squeeze.dim, h.get(B, 1, 5, 2), 0)
    return h.add(h.site, h.linear(h.linear(h.x, a), b))


def _narrow(h: Hand) -> tuple[fx.Node, fx.Node]:
    """A site in float32, and a delta in float64."""
    x = h.input(3, 4, 6, dtype=F32)
    return h.linear(x, h.get("lin.weight", 5, 6, dtype=F32)), h.linear(h.linear(h.to(x, F64), h.a), h.b)


@folds("wider factors, the sum cast back")
def _(h: Hand) -> Written:
    return h.to(h.add(*_narrow(h)), F32)


@folds("wider factors, the sum of two adapters cast back once")
def _(h: Hand) -> Written:
    site, delta = _narrow(h)
    return h(aten._to_copy.default, h.add(h.add(site, delta), h.mul(delta, 2)), dtype=F32)


@folds("wider factors, cast back after each")
def _(h: Hand) -> Written:
    site, delta = _narrow(h)
    return h.to(h.add(h.to(h.add(site, delta), F32), h.mul(delta, 2)), F32)


@folds("wider factors, the delta cast")
def _(h: Hand) -> Written:
    site, delta = _narrow(h)
    return h.add(site, h.to(delta, F32))


@folds("a wider delta, made narrow by its last product")
def _(h: Hand) -> Written:
    x = h.input(3, 4, 6, dtype=F32)
    down = h.to(h.linear(h.to(x, F64), h.a), F32)
    return h.add(h.linear(x, h.get("lin.weight", 5, 6, dtype=F32)), h.linear(down, h.get(B, 5, 2, dtype=F32)))


@folds("a scale without dimensions leaves the dtype")
def _(h: Hand) -> Written:
    x, w = h.input(3, 4, 6, dtype=F32), h.get("lin.weight", 5, 6, dtype=F32)
    delta = h.linear(h.linear(x, h.get(A, 2, 6, dtype=F32)), h.get(B, 5, 2, dtype=F32))
    return h.add(h.linear(x, w), h.mul(delta, h.get("s")))


@folds("a scale with a dimension makes wide, and is cast back")
def _(h: Hand) -> Written:
    x, w = h.input(3, 4, 6, dtype=F32), h.get("lin.weight", 5, 6, dtype=F32)
    delta = h.linear(h.linear(x, h.get(A, 2, 6, dtype=F32)), h.get(B, 5, 2, dtype=F32))
    return h.to(h.add(h.linear(x, w), h.mul(delta, h.get("s", 1))), F32)


@folds("a cast that is the model's stays", "linear to")
def _(h: Hand) -> Written:
    return h.to(h.add(h.site, h.delta), F32)


def _convolved(dims: int, *how: Any, groups: int = 1, point: tuple[Any, ...] = ()) -> Callable[[Hand], Written]:
    def write(h: Hand) -> Written:
        target = {1: aten.conv1d, 2: aten.conv2d, 3: aten.conv3d}[dims]
        target = target.padding if any(isinstance(each, str) for each in how) else target.default
        sizes, kernel, ones = (9, 7, 8)[:dims], (3, 2, 3)[:dims], (1,) * dims
        x = h.input(2, 4, *sizes)
        base = h(target, x, h.get("lin.weight", 6, 4 // groups, *kernel), None, *how)
        down = h(target, x, h.get(A, 2, 4 // groups, *kernel), None, *how)
        return h.add(base, h(target, down, h.get(B, 6, 2 // groups, *ones), None, *point))

    return write


for _name, _write in {
    "conv1d": _convolved(1, [2], [1]),
    "conv2d": _convolved(2, [1, 1], [2, 1], [2, 1], 1),
    "conv3d": _convolved(3, [1, 1, 1], [1, 0, 1]),
    "conv2d of groups": _convolved(2, [1], [1], [1], 2, groups=2, point=([1, 1], [0], [1], 2)),
    "conv2d with a word for its padding": _convolved(2, [1, 1], "same", [2, 1], point=([1], "valid")),
}.items():
    CASES[_name] = _write, [_name.partition(" ")[0]]


@folds("conv2d with three factors", "conv2d")
def _(h: Hand) -> Written:
    x = h.input(2, 4, 9, 7)
    base = h(aten.conv2d.default, x, h.get("lin.weight", 6, 4, 3, 3), None, [2, 2])
    down = h(aten.conv2d.default, x, h.get(A, 2, 4, 3, 3), None, [2, 2])
    middle = h(aten.conv2d.default, down, h.get("lin.lora_A.m.weight", 3, 2, 1, 1))
    return h.add(base, h(aten.conv2d.default, middle, h.get(B, 6, 3, 1, 1)))


@folds("embedding", "embedding")
def _(h: Hand) -> Written:
    index = h.input(value=torch.tensor([[0, 3, 2], [1, 1, 4]]))
    found = h(aten.embedding.default, h(aten.t.default, h.get(A, 2, 5)), index)
    delta = h(aten.matmul.default, found, h(aten.t.default, h.get(B, 6, 2)))
    return h.add(h(aten.embedding.default, h.get("lin.weight", 5, 6), index), h.mul(delta, 2))


@folds("all experts, both layouts", "bmm transpose bmm")
def _(h: Hand) -> Written:
    x = h.input(2, 4, 6)
    down = h(aten.bmm.default, x, h.get(A, 2, 6, 3))
    first = h.add(h(aten.bmm.default, x, h.get("lin.weight", 2, 6, 5)), h(aten.bmm.default, down, h.get(B, 2, 3, 5)))
    a, b = h.get("next.lora_A.default.weight", 2, 3, 5), h.get("next.lora_B.default.weight", 2, 7, 3)
    stacks = [h(aten.transpose.int, each, 1, 2) for each in (h.get("next.weight", 2, 7, 5), a, b)]
    base, down = (h(aten.bmm.default, first, stack) for stack in stacks[:2])
    return h.add(base, h(aten.bmm.default, down, stacks[2]))


@folds("all experts, a fused product and sum", "bmm")
def _(h: Hand) -> Written:
    x = h.input(2, 4, 6)
    down = h(aten.bmm.default, x, h.get(A, 2, 6, 3))
    base = h(aten.bmm.default, x, h.get("lin.weight", 2, 6, 5))
    return h(aten.baddbmm.default, base, down, h.get(B, 2, 3, 5), alpha=-0.5)


def _chosen(h: Hand) -> fx.Node:
    return h.input(value=torch.tensor([1, 0, 1, 1]))


@folds("chosen experts", "index bmm")
def _(h: Hand) -> Written:
    x, chosen = h.input(4, 3, 6), _chosen(h)
    stacks = [
        h(aten.index.Tensor, h.get(n, 2, *s), [chosen]) for n, s in (("lin.weight", (6, 5)), (A, (6, 2)), (B, (2, 5)))
    ]
    base, down = (h(aten.bmm.default, x, stack) for stack in stacks[:2])
    return h.add(base, h.mul(h(aten.bmm.default, down, stacks[2]), 0.5))


@folds("chosen experts on the left", "index bmm")
def _(h: Hand) -> Written:
    x, chosen = h.input(4, 6, 3), _chosen(h)
    stacks = [
        h(aten.index.Tensor, h.get(n, 2, *s), [chosen]) for n, s in (("lin.weight", (5, 6)), (A, (2, 6)), (B, (5, 2)))
    ]
    base, down = (h(aten.bmm.default, stack, x) for stack in stacks[:2])
    return h.add(base, h(aten.bmm.default, stacks[2], down))


def _grouped(h: Hand, *, placed: bool = False) -> Written:
    mm = torch.ops.transformers.grouped_mm_fallback.default
    x, ends = h.input(4, 6), h.input(value=torch.tensor([1, 4], dtype=torch.int32))
    base, down = h(mm, x, h.get("lin.weight", 2, 6, 5), ends), h(mm, x, h.get(A, 2, 6, 3), ends)
    if placed:
        return h.add(base, _placed(h, h(mm, down, h.get(B, 2, 3, 2), ends)))
    return h.add(base, h(mm, down, h.get(B, 2, 3, 5), ends))


def _placed(h: Hand, delta: fx.Node, number: tuple[Any, ...] = ()) -> fx.Node:
    """Two features go to places 3 and 0 of five."""
    padded = h(aten.constant_pad_nd.default, delta, [0, 1], *number)
    return h(aten.index_select.default, padded, -1, _places(h))


def _places(h: Hand, name: str = "lin.lora_places.default.query") -> fx.Node:
    return h.get(name, value=torch.tensor([1, 2, 2, 0, 2]))


CASES["grouped experts"] = _grouped, ["grouped_mm_fallback"]
CASES["features of grouped experts in their places"] = lambda h: _grouped(h, placed=True), ["grouped_mm_fallback"]


def _part(h: Hand) -> fx.Node:
    return h.linear(h.down, h.get(B, 2, 2))


_simple(
    features_in_their_places=lambda h: h.add(h.site, _placed(h, _part(h))),
    features_in_their_places_among_zeros=lambda h: h.add(h.site, _placed(h, _part(h), (0,))),
    features_in_their_places_among_float_zeros=lambda h: h.add(h.site, _placed(h, _part(h), (0.0,))),
    places_then_scale=lambda h: h.add(h.site, h.mul(_placed(h, _part(h)), 3)),
    places_and_all=lambda h: h.add(h.site, h.add(_placed(h, _part(h)), h.second())),
    places_of_one_factor=lambda h: h.add(h.site, _placed(h, h.down)),
)


@folds("a scale, a cast and a reshape between padding and places")
def _(h: Hand) -> Written:
    padded = h(aten.constant_pad_nd.default, _part(h), [0, 1])
    reshaped = h.view(h.to(h(aten.neg.default, padded), F64), 12, 3)
    return h.add(h.site, h.view(h(aten.index_select.default, reshaped, -1, _places(h)), 3, 4, 5))


# A product of factors, added to the weight.


def _product(h: Hand) -> fx.Node:
    return h(aten.matmul.default, h.b, h.a)


_simple(
    factors_added_to_the_weight=lambda h: h.linear(h.x, h.add(h.w, h.mul(_product(h), 0.5))),
    weight_added_to_the_factors=lambda h: h.linear(h.x, h.add(_product(h), h.w)),
    factors_subtracted_from_the_weight=lambda h: h.linear(h.x, h(aten.sub.Tensor, h.w, _product(h))),
    a_linear_of_factors=lambda h: h.linear(h.x, h.add(h.w, h.linear(h.b, h.get(A, 6, 2)))),
    transposed_factors=lambda h: h.linear(
        h.x, h.add(h.w, h(aten.mm.default, h(aten.t.default, h.get(B, 2, 5)), h(aten.t.default, h.get(A, 6, 2))))
    ),
    factors_fused_with_the_weight=lambda h: h.linear(h.x, h(aten.addmm.default, h.w, h.b, h.a, alpha=-2)),
    two_products_added_to_the_weight=lambda h: h.linear(
        h.x,
        h.add(h.add(h.w, _product(h)), h(aten.mm.default, h.get("lin.lora_B.o.weight", 5, 3), h.get("lin.lora_A.o.weight", 3, 6))),
    ),
    a_sum_of_products_added_to_the_weight=lambda h: h.linear(
        h.x,
        h.add(h.w, h.add(_product(h), h(aten.mm.default, h.get("lin.lora_B.o.weight", 5, 3), h.get("lin.lora_A.o.weight", 3, 6)))),
    ),
    factors_in_another_dtype_added_to_the_weight_cast_back=lambda h: h.linear(
        h.input(3, 6, dtype=F32), h.to(h.add(h.get("lin.weight", 5, 6, dtype=F32), _product(h)), F32)
    ),
    factors_cast_before_they_are_added_to_the_weight=lambda h: h.linear(
        h.input(3, 6, dtype=F32),
        h.add(
            h.get("lin.weight", 5, 6, dtype=F32),
            h(aten.mm.default, h.to(h.b, F32), h.get(A, 2, 6, dtype=F32)),
        ),
    ),
)  # fmt: skip


@folds("factors added to a weight that is stored in_out", "matmul")
def _(h: Hand) -> Written:
    product = h(aten.matmul.default, h.get(A, 6, 2), h.get(B, 2, 5))
    return h(aten.matmul.default, h.x, h.add(h.get("lin.weight", 6, 5), product))


@folds("factors of experts added to the weight", "bmm")
def _(h: Hand) -> Written:
    weight = h.get("lin.weight", 2, 6, 5)
    product = h(aten.bmm.default, h.get(A, 2, 6, 3), h.get(B, 2, 3, 5))
    return h(aten.bmm.default, h.input(2, 4, 6), h.add(weight, h.mul(product, 0.5)))


# Affine branches: constants are computed, features are scaled by vectors, vectors are added.


def _biased(h: Hand) -> fx.Node:
    return h._once("biased", lambda: h.linear(h.x, h.w, h.get("lin.bias", 5)))


def _m(h: Hand, *sizes: int, name: str = "m") -> fx.Node:
    return h.get(f"lin.lora_A.{name}.weight", *sizes)


def _weight(h: Hand, weight: fx.Node) -> fx.Node:
    return h.linear(h.x, weight)


def _dora(h: Hand, site: fx.Node, output: fx.Node) -> fx.Node:
    """DoRA as PEFT writes it; ``output`` is that of the site without its bias."""
    total = h.add(h.to(h.w, F64), h.mul(h(aten.detach.default, h(aten.mm.default, h.b, h.a)), 0.5))
    norm = h(aten.linalg_norm.default, total, None, [1])
    scale = h.view(h(aten.div.Tensor, h.get("lin.lora_magnitude_vector.default.weight", 5), norm), 1, -1)
    kept = h.mul(h(aten.sub.Tensor, scale, 1), output)
    return h.add(site, h.add(kept, h.mul(h.mul(scale, h.delta), 0.5)))


def _in_place(h: Hand) -> fx.Node:
    """A weight that is written to while it is computed."""
    zeros = h(aten.zeros.default, [5, 6], dtype=F64)
    return h(aten.add_.Tensor, zeros, _product(h))


def _convolved_dora(h: Hand) -> fx.Node:
    x, bias = h.input(2, 6, 9), h.get("lin.bias", 5)
    site = h(aten.conv1d.default, x, h.get("lin.weight", 5, 6, 3), bias)
    scale, shift = h.get(A, 1, 5, 1), h.view(bias, 1, -1, 1)
    return h.add(site, h.mul(h(aten.sub.Tensor, scale, 1), h(aten.sub.Tensor, site, shift)))


def _two_of_dora(h: Hand) -> fx.Node:
    """The second one goes by the output with the first one in it, as PEFT's does."""
    first = _dora(h, _biased(h), h(aten.sub.Tensor, _biased(h), h.get("lin.bias", 5)))
    kept = h.mul(_m(h, 5), h(aten.sub.Tensor, first, h.get("lin.bias", 5)))
    return h.add(first, h.add(kept, h.second()))


_simple(
    scaled_by_a_vector=lambda h: h.add(h.site, h.mul(h.delta, h.get("s", 5))),
    scaled_by_a_factor=lambda h: h.add(h.site, h.mul(_m(h, 5), h.delta)),
    scaled_inside_by_a_vector=lambda h: h.add(h.site, h.linear(h.mul(h.down, _m(h, 2)), h.b)),
    scaled_twice_by_vectors=lambda h: h.add(
        h.site, h.mul(_m(h, 1, 5), h.linear(h.mul(_m(h, 2, name="n"), h.down), h.b))
    ),
    a_product_of_factors_as_a_weight=lambda h: h.add(h.site, h.linear(h.x, _product(h))),
    a_sliced_factor=lambda h: h.add(
        h.site, h.linear(h.linear(h.x, h(aten.slice.Tensor, h.get(A, 2, 9), 1, 0, 6)), h.b)
    ),
    a_product_by_elements=lambda h: h.add(h.site, h.linear(h.x, h.mul(_product(h), _m(h, 5, 6)))),
    a_product_of_kronecker=lambda h: h.add(
        h.site, h.linear(h.x, h(aten.kron.default, _m(h, 5, 2), h.get("lin.lora_B.n.weight", 1, 3)))
    ),
    a_weight_that_is_written_to=lambda h: h.add(h.site, h.linear(h.x, _in_place(h))),
    a_delta_less_itself=lambda h: h.add(h.site, h.linear(h.x, h(aten.sub.Tensor, _product(h), h.mul(_product(h), 3)))),
    the_output_times_a_factor=lambda h: h.mul(h.site, _m(h, 5)),
    the_output_times_a_factor_and_itself=lambda h: h.add(h.site, h.mul(_m(h, 5), h.site)),
    the_output_times_two_factors=lambda h: h.mul(_m(h, 5, name="n"), h.mul(h.site, _m(h, 5))),
    the_output_times_a_factor_and_a_delta=lambda h: h.add(h.mul(h.site, _m(h, 5)), h.delta),
    the_biased_output_times_a_factor=lambda h: h.mul(_biased(h), _m(h, 5)),
    the_output_of_one_feature_times_a_factor=lambda h: h.mul(h.linear(h.x, h.get("lin.weight", 1, 6)), _m(h, 1)),
    bias_of_a_factor=lambda h: h.add(_biased(h), h.linear(h.down, h.b, h.get("lin.lora_B.default.bias", 5))),
    bias_of_the_first_factor=lambda h: h.add(
        _biased(h), h.linear(h.linear(h.x, h.a, h.get("lin.lora_A.default.bias", 2)), h.b)
    ),
    bias_of_a_factor_scaled=lambda h: h.add(
        _biased(h), h.mul(h.linear(h.down, h.b, h.get("lin.lora_B.default.bias", 5)), -0.5)
    ),
    a_factor_added=lambda h: h.add(_biased(h), h.add(h.delta, _m(h, 5))),
    a_factor_added_to_the_output=lambda h: h.add(_biased(h), h(aten.tanh.default, _m(h, 5))),
    a_factor_subtracted_from_the_output=lambda h: h(aten.sub.Tensor, _biased(h), _m(h, 5)),
    the_output_subtracted_from_a_factor=lambda h: h(aten.sub.Tensor, _m(h, 5), _biased(h)),
    dora=lambda h: _dora(h, h.site, h.site),
    dora_beside_a_bias=lambda h: _dora(h, _biased(h), h(aten.sub.Tensor, _biased(h), h.get("lin.bias", 5))),
    dora_of_the_biased_output=lambda h: _dora(h, _biased(h), _biased(h)),
    two_of_dora=_two_of_dora,
    rows_put_into_a_weight=lambda h: _weight(
        h, h(aten.index_copy.default, h.w, 0, h.get("rows", value=torch.tensor([3, 1])), _m(h, 2, 6))
    ),
    rows_put_into_a_weight_with_a_branch=lambda h: h.add(
        _weight(h, h(aten.index_copy.default, h.w, 0, h.get("rows", value=torch.tensor([3, 1])), _m(h, 2, 6))), h.delta
    ),
)  # fmt: skip


@folds("a convolution scaled as by dora", "conv1d")
def _(h: Hand) -> Written:
    return _convolved_dora(h)


@folds("an output scaled behind a reshape", "addmm view")
def _(h: Hand) -> Written:
    flat = h(aten.addmm.default, h.get("lin.bias", 5), h.flat, h.get("lin.weight", 6, 5))
    return h.mul(h.view(flat, 7, 1, 5), _m(h, 5))


@folds("an output with a bias of its own, scaled", "matmul add")
def _(h: Hand) -> Written:
    total = h.add(h(aten.matmul.default, h.x, h.get("lin.weight", 6, 5)), h.get("lin.bias", 5))
    return h.add(total, h.mul(_m(h, 5), h(aten.sub.Tensor, total, h.get("lin.bias", 5))))


@folds("an output scaled, read twice", "linear relu tanh")
def _(h: Hand) -> Written:
    scaled = h.mul(_biased(h), _m(h, 5))
    return h(aten.relu.default, scaled), h(aten.tanh.default, scaled)


@folds("one layer scaled behind another with a branch", "linear linear")
def _(h: Hand) -> Written:
    scaled = h.mul(h.site, _m(h, 5))
    second = h.linear(scaled, h.get("o.weight", 3, 5))
    down = h.linear(scaled, h.get("o.lora_A.default.weight", 2, 5))
    return h.add(second, h.linear(down, h.get("o.lora_B.default.weight", 3, 2)))


@folds("an embedding scaled", "embedding")
def _(h: Hand) -> Written:
    found = h(aten.embedding.default, h.get("lin.weight", 7, 5), h.input(value=torch.tensor([[0, 3, 1], [2, 2, 4]])))
    return h.mul(_m(h, 5), found)


def _run(graph_module: nn.Module, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    written = graph_module(*(value.clone() for value in inputs))
    return written if isinstance(written, tuple) else (written,)


@pytest.mark.parametrize("name", CASES)
def test_a_linear_branch_folds_and_nothing_of_it_is_left(name: str) -> None:
    write, left = CASES[name]
    hand = Hand()
    graph_module = hand.done(write(hand))
    folded, unloaded = lora_fx.fold(graph_module), lora_fx.unload(graph_module)
    outputs, mine, base = (_run(module, hand.inputs) for module in (graph_module, folded, unloaded))
    for expected, value, without in zip(outputs, mine, base, strict=True):
        assert value.dtype == expected.dtype
        precise = all(p.dtype == F64 for p in graph_module.parameters()) and expected.dtype == F64
        assert torch.allclose(value, expected, rtol=0, atol=1e-12 if precise else 1e-4)
        assert not torch.allclose(without, expected, rtol=0, atol=1e-2)
    for result in (folded, unloaded):
        assert operators(result) == left
        assert not any("lora_" in key for key in result.state_dict())
    for key, tensor in unloaded.state_dict().items():
        assert torch.equal(tensor, graph_module.state_dict()[key])


@pytest.mark.parametrize("name", CASES)
def test_without_a_nominated_factor_the_same_graph_is_left_node_for_node(name: str) -> None:
    hand = Hand()
    graph_module = hand.done(CASES[name][0](hand))
    assert find_branches(graph_module, never) == ()
    folded = lora_fx.fold(graph_module, branches=never)
    assert first_difference(graph_module, folded) is None  # type: ignore[arg-type]
    for key, tensor in folded.state_dict().items():
        assert tensor.data_ptr() == graph_module.state_dict()[key].data_ptr()


def test_factors_of_any_name_are_found_if_one_says_which_they_are() -> None:
    hand = Hand()
    delta = hand.linear(hand.linear(hand.x, hand.get("down", 2, 6)), hand.get("up", 5, 2))
    graph_module = hand.done(hand.add(hand.site, delta))
    assert find_branches(graph_module) == ()
    folded = lora_fx.fold(graph_module, branches=lambda name: name in ("down", "up"))
    assert torch.allclose(folded(*hand.inputs), graph_module(*hand.inputs), rtol=0, atol=1e-12)
    assert list(folded.state_dict()) == ["lin.weight"]


def test_a_branch_is_told_as_data() -> None:
    hand = Hand()
    site, down = hand(aten.matmul.default, hand.x, hand.get("lin.weight", 6, 5)), hand.down
    delta = hand.mul(hand.mul(hand.linear(down, hand.b), 0.5), hand.get("s"))
    first = hand.add(site, delta)
    end = hand(aten.sub.Tensor, first, hand.second())
    (found,) = find_branches(hand.done(end))
    other = Update((Factor("lin.lora_A.other.weight"), Factor("lin.lora_B.other.weight")), -1.0)
    updates = (Update((Factor(A), Factor(B)), 0.5, ("s",)), other)
    products = (down, end.args[1].args[0])
    terms = tuple(Term(hand.x, "linear", (), (), *each) for each in zip(products, updates, strict=True))
    assert found == FoundBranch(site, site, end, terms, hand.get("lin.weight"), View((SWAP,)))
    assert found.updates == updates


def test_a_branch_of_a_weight_is_told_as_data() -> None:
    hand = Hand()
    weight = hand.get("lin.weight", 5, 6, dtype=F32)
    product = _product(hand)
    total = hand.add(weight, hand.mul(product, 3))
    end = hand.to(total, F32)
    (found,) = find_branches(hand.done(hand.linear(hand.input(3, 6, dtype=F32), end)))
    update = Update((Factor(A), Factor(B)), 3.0)
    assert found == FoundBranch(total, weight, end, (Term(hand.b, None, (), (), product, update),), weight, View())


def test_a_branch_of_a_convolution_is_told_with_its_geometry_and_kernel() -> None:
    hand = Hand()
    graph_module = hand.done(CASES["conv2d"][0](hand))
    (found,) = find_branches(graph_module)
    (term,) = found.terms
    assert (term.op, term.geometry, term.kernel) == ("conv2d", ((1, 1), (2, 1), (2, 1), 1), (3, 2))


# What is refused.

LINEAR = "a branch must be linear in its site's input until it is added to its site's output"
UNREAD = "nothing reads this part of a branch"


def refused(graph_module: fx.GraphModule, node: fx.Node, problem: str, where: str = "") -> None:
    """Fail unless folding is refused at this node for this reason, in exactly these words, and changes nothing."""
    before = {name: tensor.clone() for name, tensor in graph_module.state_dict().items()}
    for call in (lora_fx.fold, lora_fx.unload, lora_fx.folding.fold.recipe, find_branches):
        with pytest.raises(lora_fx.FoldError) as caught:
            call(graph_module)
        assert str(caught.value) == (
            f"a branch cannot be folded: {problem}. The node is {node.format_node()}{where}. "
            "Take this computation out of the branch, or keep the graph unfolded."
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph_module.state_dict().items())


Bad = Callable[[Hand], tuple[fx.Node, Written]]
"""Writes a graph, and returns the node that is wrong, and what the graph puts out."""

NOT_LINEAR: dict[str, Bad] = {}


def _between(**cases: Callable[[Hand], fx.Node]) -> None:
    """Cases that return a node which is wrong, and is added to the site then."""
    NOT_LINEAR.update(
        {
            n.replace("_", " "): lambda h, write=w: (node := write(h), h.raw(aten.add.Tensor, h.site, node))
            for n, w in cases.items()
        }
    )  # type: ignore[misc]


def _last(**cases: Callable[[Hand], fx.Node]) -> None:
    """Cases that return a node which is wrong, and is put out then."""
    NOT_LINEAR.update({n.replace("_", " "): lambda h, write=w: (node := write(h), node) for n, w in cases.items()})  # type: ignore[misc]


def _padded(h: Hand, delta: fx.Node | None = None) -> fx.Node:
    return h(aten.constant_pad_nd.default, delta or _part(h), [0, 1])


_between(
    gelu=lambda h: h(aten.gelu.default, h.delta),
    gelu_inside=lambda h: h(aten.gelu.default, h.down),
    softmax=lambda h: h(aten.softmax.int, h.delta, -1),
    square=lambda h: h.mul(h.delta, h.delta),
    data_dependent_scale=lambda h: h.mul(h.delta, h(aten.mean.default, h.x)),
    data_dependent_scale_on_the_left=lambda h: h.mul(h(aten.sigmoid.default, h.x), h.linear(h.down, h.get(B, 6, 2))),
    scale_of_one_element_in_two_dimensions=lambda h: h.mul(h.delta, h.get("s", 1, 1)),
    scale_of_integers=lambda h: h.mul(h.delta, h.get("s", value=torch.tensor([2]))),
    a_truth_value_as_scale=lambda h: h.mul(h.delta, True),
    by_a_parameter=lambda h: h(aten.div.Tensor, h.delta, h.get("s", 1)),
    number_by_delta=lambda h: h(aten.div.Tensor, 2.0, h.delta),
    parameter_by_delta=lambda h: h(aten.div.Tensor, h.get("s", 1), h.delta),
    by_zero=lambda h: h(aten.div.Tensor, h.delta, 0),
    scalar_by_zero=lambda h: h(aten.div.Scalar, h.delta, 0.0),
    rounded_quotient=lambda h: h(aten.div.Tensor_mode, h.delta, 2, rounding_mode="floor"),
    shifted=lambda h: h.add(h.delta, 1.0),
    shifted_by_a_scalar=lambda h: h(aten.add.Scalar, h.delta, 1.0),
    nothing_added=lambda h: h.add(h.delta, 0),
    subtracted_from_a_number=lambda h: h(aten.sub.Tensor, 1.0, h.delta),
    dropout=lambda h: h(aten.dropout.default, h.delta, 0.5, True),
    inactive_dropout=lambda h: h(aten.dropout.default, h.delta, 0.5, False),
    dropout_inside=lambda h: h(aten.dropout.default, h.down, 0.5, True),
    dropout_module=lambda h: h.module("drop", nn.Dropout(0.5), h.delta),
    another_module=lambda h: h.module("act", nn.Tanh(), h.delta),
    transposed=lambda h: h(aten.transpose.int, h.delta, 0, 1),
    cast_to_integers=lambda h: h(aten.to.dtype, h.delta, torch.int64),
    cast_and_more=lambda h: h(aten._to_copy.default, h.delta, dtype=F64, device="cpu"),
    expanded=lambda h: h(aten.expand.default, h.delta, [3, 4, 5]),
    summed_up=lambda h: h(aten.cumsum.default, h.delta, 0),
    chosen_positions=lambda h: h(aten.index.Tensor, h.delta, [h.input(value=torch.tensor([0, 1, 2]))]),
    reshaped_features=lambda h: h.view(h.delta, 4, 3, 5, 1),
    features_reshaped_inside=lambda h: h.view(h.down, 3, 8),
    concatenated=lambda h: h(aten.cat.default, [h.delta], 0),
    alpha_that_is_computed=lambda h: h.raw(aten.add.Tensor, h.delta, h.second(), alpha=h(aten.sym_size.int, h.x, 0)),
    another_argument=lambda h: h.raw(aten.mul.Tensor, h.delta, 2.0, out=h.x),
    another_argument_of_a_sum=lambda h: h.raw(aten.add.Tensor, h.delta, h.second(), alpha=1, out=h.x),
    padded_in_front=lambda h: h(aten.constant_pad_nd.default, h.delta, [1, 0]),
    padded_by_two=lambda h: h(aten.constant_pad_nd.default, h.delta, [0, 2]),
    padded_along_positions=lambda h: h(aten.constant_pad_nd.default, h.delta, [0, 1, 0, 1]),
    padded_with_ones=lambda h: h(aten.constant_pad_nd.default, h.delta, [0, 1], 1),
    padded_twice=lambda h: _padded(h, _padded(h)),
    padded_after_places=lambda h: _padded(h, _placed(h, _part(h))),
    places_without_padding=lambda h: h(aten.index_select.default, h.delta, -1, _places(h)),
    places_along_positions=lambda h: h(aten.index_select.default, _padded(h), 0, _places(h)),
    places_counted_from_the_front=lambda h: h(aten.index_select.default, _padded(h), 2, _places(h)),
    places_of_another_name=lambda h: h(aten.index_select.default, _padded(h), -1, _places(h, "lin.places")),
    places_that_are_computed=lambda h: h(aten.index_select.default, _padded(h), -1, h(aten.clone.default, _places(h))),
    places_of_the_input=lambda h: h(aten.index_select.default, _padded(h), -1, h.input(value=torch.tensor([1, 2, 2, 0, 2]))),
    places_twice=lambda h: h(aten.index_select.default, _placed(h, _part(h)), -1, _places(h)),
    product_after_places=lambda h: h.linear(_placed(h, _part(h)), h.get("lin.lora_A.m.weight", 5, 5)),
    product_after_padding=lambda h: h.linear(_padded(h), h.get("lin.lora_A.m.weight", 5, 3)),
    padded_ones_added=lambda h: h.add(_padded(h), _padded(h, h.mul(h.down, 2))),
    a_delta_added_to_a_padded_one=lambda h: h.add(_padded(h), h.linear(h.x, h.get("lin.lora_A.m.weight", 3, 6))),
    a_padded_one_added_to_a_delta=lambda h: h.add(h.linear(h.x, h.get("lin.lora_A.m.weight", 3, 6)), _padded(h)),
    delta_as_a_weight=lambda h: h.linear(h.x, h.linear(h.flat, h.get(A, 6, 6))),
    embedding_of_a_delta=lambda h: h.raw(aten.embedding.default, h.w, h.delta),
    delta_less_site=lambda h: h(aten.sub.Tensor, h.delta, h.site),
    delta_and_twice_site=lambda h: h.add(h.delta, h.site, alpha=2),
    a_factor_as_a_bias=lambda h: h.linear(h.x, h.w, h.get("lin.lora_A.m.weight", 5)),
    a_factor_in_a_module=lambda h: h.module("act", nn.Tanh(), h.get("lin.lora_A.m.weight", 5)),
    integers_as_a_factor=lambda h: h.linear(
        h.input(3, 4, 6, dtype=torch.int64), h.get(A, value=torch.ones(5, 6, dtype=torch.int64))
    ),
    input_times_a_product_of_factors=lambda h: h.raw(aten.matmul.default, _product(h), h.x),
    a_product_with_a_chosen_factor=lambda h: h(
        aten.bmm.default, h.get(A, 4, 6, 3), h(aten.index.Tensor, h.get(B, 2, 3, 5), [_chosen(h)])
    ),
    a_product_of_a_chosen_factor=lambda h: h(
        aten.bmm.default, h(aten.index.Tensor, h.get(A, 2, 6, 3), [_chosen(h)]), h.get(B, 4, 3, 5)
    ),
    an_embedding_then_an_embedding=lambda h: h.raw(
        aten.embedding.default, h.b, h(aten.embedding.default, h.a, h.input(value=torch.tensor([0, 1])))
    ),
)  # fmt: skip


def _read_before_a_reshape(h: Hand) -> fx.Node:
    h(aten.relu.default, h.site)
    return h.add(h(aten.view.default, h.site, [3, 4, 5]), h.delta)


def _read_in_place(h: Hand, target: Any) -> fx.Node:
    h(aten.relu.default, h.site)
    return h(target, h.site, h.delta)


_last(
    a_padded_product_of_factors=lambda h: h.raw(aten.add.Tensor, h.site, _padded(h, _product(h))),
    a_product_of_three_factors=lambda h: h.raw(
        aten.add.Tensor, h.site, h.linear(_product(h), h.get("lin.lora_A.m.weight", 6, 6))
    ),
    a_factor_times_the_input=lambda h: h.mul(h.x, h.get("lin.lora_A.m.weight", 6)),
    a_factor_times_positions=lambda h: h.mul(h.site, h.get("lin.lora_A.m.weight", 4, 1)),
    a_factor_divided_by_a_site=lambda h: h(aten.div.Tensor, h.get("lin.lora_A.m.weight", 5), h.site),
    residual=lambda h: h.add(h.x, h.linear(h.down, h.get(B, 6, 2))),
    activated_site=lambda h: h.add(h(aten.relu.default, h.site), h.delta),
    two_sites=lambda h: h.add(h.add(h.site, h.linear(h.x, h.get("o.weight", 5, 6))), h.delta),
    a_bias_that_is_computed=lambda h: h.add(h.add(h.site, h.input(5)), h.delta),
    a_bias_taken_twice=lambda h: h.add(h.add(h.site, h.get("bias", 5), alpha=2), h.delta),
    a_scaled_product=lambda h: h.add(
        h(aten.addmm.default, h.get("bias", 5), h.flat, h.get("lin.weight", 6, 5), alpha=2),
        h.linear(h.linear(h.flat, h.a), h.b),
    ),
    a_fused_sum_with_no_site=lambda h: h(
        aten.addmm.default, h(aten.relu.default, h.linear(h.flat, h.w)), h.linear(h.flat, h.a), h(aten.t.default, h.b)
    ),
    a_fused_sum_with_twice_the_site=lambda h: h(
        aten.addmm.default, h.linear(h.flat, h.w), h.linear(h.flat, h.a), h(aten.t.default, h.b), beta=2
    ),
    a_delta_as_the_addend_of_a_site=lambda h: h(
        aten.addmm.default, h.linear(h.linear(h.flat, h.a), h.b), h.flat, h.get("lin.weight", 6, 5)
    ),
    a_view_of_what_something_else_reads=_read_before_a_reshape,
    in_place_of_what_something_else_reads=lambda h: _read_in_place(h, aten.add_.Tensor),
    less_in_place_of_what_something_else_reads=lambda h: _read_in_place(h, aten.sub_.Tensor),
    in_place_of_a_number=lambda h: h.raw(aten.add_.Tensor, 1.0, h.delta),
    padded_and_added=lambda h: h.add(h.linear(h.x, h.w), _padded(h, h.linear(h.down, h.get(B, 4, 2)))),
    a_product_of_factors_added_to_the_site=lambda h: h.add(
        h.linear(h.flat, h.get("lin.weight", 6, 6)), h(aten.mm.default, h.get(B, 7, 2), h.a)
    ),
    a_product_of_factors_added_to_a_joined_site=lambda h: h.add(
        h.add(h.linear(h.flat, h.get("lin.weight", 6, 6)), h.linear(h.flat, h.get("lin.lora_A.m.weight", 6, 6))),
        h(aten.mm.default, h.get(B, 7, 2), h.a),
    ),
    a_product_of_factors_added_to_a_delta=lambda h: h.add(
        h.linear(h.flat, h.get("lin.lora_A.m.weight", 6, 6)), h(aten.mm.default, h.get(B, 7, 2), h.a)
    ),
    a_delta_added_to_a_product_of_factors=lambda h: h.add(
        h(aten.mm.default, h.get(B, 7, 2), h.a), h.linear(h.flat, h.get("lin.lora_A.m.weight", 6, 6))
    ),
    a_delta_added_to_a_joined_weight=lambda h: h.add(
        h.add(h.get("lin.weight", 7, 6), h(aten.mm.default, h.get(B, 7, 2), h.a)),
        h.linear(h.flat, h.get("lin.lora_A.m.weight", 6, 6)),
    ),
    a_convolution_that_goes_on_with_a_kernel=lambda h: h(
        aten.conv1d.default,
        h(aten.conv1d.default, h.input(2, 4, 9), h.get(A, 2, 4, 3)),
        h.get(B, 6, 2, 3),
    ),
    a_convolution_that_goes_on_with_padding=lambda h: h(
        aten.conv1d.default,
        h(aten.conv1d.default, h.input(2, 4, 9), h.get(A, 2, 4, 3)),
        h.get(B, 6, 2, 1), None, [1], [1],
    ),
    a_convolution_that_goes_on_with_a_stride=lambda h: h(
        aten.conv1d.default,
        h(aten.conv1d.default, h.input(2, 4, 9), h.get(A, 2, 4, 3)),
        h.get(B, 6, 2, 1), None, [2],
    ),
    a_convolution_that_goes_on_with_other_groups=lambda h: h(
        aten.conv1d.default,
        h(aten.conv1d.default, h.input(2, 4, 9), h.get(A, 2, 2, 3), None, [1], [0], [1], 2),
        h.get(B, 6, 2, 1),
    ),
    a_convolution_that_goes_on_with_a_linear=lambda h: h.linear(
        h(aten.conv1d.default, h.input(2, 4, 9), h.get(A, 2, 4, 3)), h.get(B, 5, 7)
    ),
    a_convolution_that_goes_on_in_two_dimensions=lambda h: h.raw(
        aten.conv2d.default, h(aten.conv1d.default, h.input(4, 9), h.get(A, 2, 4, 3)), h.get(B, 6, 2, 1, 1)
    ),
    a_linear_that_goes_on_with_a_convolution=lambda h: h(
        aten.conv1d.default, h.linear(h.x, h.get(A, 2, 6)), h.get(B, 6, 4, 1)
    ),
    a_linear_that_goes_on_with_experts=lambda h: h(aten.bmm.default, h.down, h.get(B, 3, 2, 5)),
    experts_that_go_on_with_others=lambda h: h(
        aten.bmm.default,
        h(aten.bmm.default, h.input(4, 3, 6), h(aten.index.Tensor, h.get(A, 2, 6, 3), [_chosen(h)])),
        h(aten.index.Tensor, h.get(B, 2, 3, 5), [h.input(value=torch.tensor([0, 0, 1, 1]))]),
    ),
    a_padded_convolution=lambda h: _padded(h, h(aten.conv1d.default, h.input(2, 4, 9), h.get(A, 2, 4, 3))),
    padded_experts_on_the_left=lambda h: _padded(
        h, h(aten.bmm.default, h(aten.index.Tensor, h.get(A, 2, 2, 6), [_chosen(h)]), h.input(4, 6, 3))
    ),
    padded_experts_on_the_right=lambda h: _padded(h, h(aten.bmm.default, h.input(2, 3, 6), h.get(A, 2, 6, 3))),
    a_reshaped_convolution=lambda h: h.view(h(aten.conv1d.default, h.input(2, 4, 9), h.get(A, 2, 4, 3)), 1, 2, 2, 7),
    reshaped_experts=lambda h: h.view(h(aten.bmm.default, h.input(2, 3, 6), h.get(A, 2, 6, 3)), 6, 3),
)  # fmt: skip


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_not_linear_in_the_input_of_a_site_is_refused_by_node(name: str) -> None:
    hand = Hand()
    node, written = NOT_LINEAR[name](hand)
    refused(hand.done(written), node, LINEAR)


def test_a_weight_that_is_computed_in_another_dtype_is_refused() -> None:
    hand = Hand()
    weight = hand.add(hand.to(hand.get("lin.weight", 5, 6, dtype=F32), F64), _product(hand))
    end = hand.linear(hand.x, weight)
    refused(hand.done(end), hand.graph.output_node(), LINEAR)


WEIGHTS: dict[str, Callable[[Hand], fx.Node]] = {
    "cast": lambda h: h.add(h.to(h.get("lin.weight", 5, 6, dtype=F32), F64), _product(h)),
    "transposed": lambda h: h.add(h(aten.t.default, h.get("lin.weight", 6, 5)), _product(h)),
    "factor": lambda h: h.add(h.get("lin.lora_A.m.weight", 5, 6), _product(h)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_computed_weight_that_is_put_out_is_refused(name: str) -> None:
    hand = Hand()
    graph_module = hand.done(WEIGHTS[name](hand))
    refused(graph_module, graph_module.graph.output_node(), LINEAR)


NO_BIAS = "it adds a constant to the output of a site that has no bias to hold it"


@pytest.mark.parametrize("name", ["bias of a factor", "a factor added"])
def test_a_constant_at_a_site_without_a_bias_is_refused(name: str) -> None:
    hand = Hand()
    vector = hand.get("lin.lora_B.default.bias", 5)
    delta = hand.linear(hand.down, hand.b, vector) if name == "bias of a factor" else hand.add(hand.delta, vector)
    end = hand.add(hand.site, delta)
    graph_module = hand.done(end)
    for call in (lora_fx.fold, lora_fx.recipe):
        with pytest.raises(lora_fx.FoldError, match=f"{NO_BIAS}. The node is %{end.name} "):
            call(graph_module)
    assert torch.equal(lora_fx.unload(graph_module)(*hand.inputs), hand.site.meta["val"])


def test_a_factor_of_a_computed_weight_that_something_else_reads_is_refused() -> None:
    hand = Hand()
    scaled = hand.mul(hand.site, _m(hand, 5))
    read = hand(aten.relu.default, hand.site)
    refused(
        hand.done((scaled, read)),
        read,
        f"it reads {hand.site}, the output of a site before all branches are added to it",
    )


def test_nothing_that_nominates_is_left_in_silence() -> None:
    hand = Hand()
    end = hand.add(hand.site, hand.delta)
    dead = hand(aten.relu.default, hand.a)
    graph_module = hand.done(end)
    assert not dead.users
    with pytest.raises(lora_fx.FoldError, match="relu"):
        lora_fx.fold(graph_module)


PUT_OUT: dict[str, Callable[[Hand], Written]] = {
    "factor": lambda h: h.a,
    "delta": lambda h: h.delta,
    "sum and delta": lambda h: (h.add(h.site, h.delta), h.delta),
    "sum and factor": lambda h: {"y": h.add(h.site, h.delta), "more": [h.a]},
    "product of factors": _product,
}


@pytest.mark.parametrize("name", PUT_OUT)
def test_a_branch_that_is_put_out_is_refused(name: str) -> None:
    hand = Hand()
    graph_module = hand.done(PUT_OUT[name](hand))
    refused(graph_module, graph_module.graph.output_node(), LINEAR)


Refused = Callable[[Hand], tuple[fx.Node, str, Written]]
"""Writes a graph, and returns the node that is refused, why, and what the graph puts out."""

OTHERS: dict[str, Refused] = {}


def refusal(name: str) -> Callable[[Refused], Refused]:
    def add(write: Refused) -> Refused:
        OTHERS[name] = write
        return write

    return add


@refusal("a dead part")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    return h.delta, UNREAD, h.site


@refusal("a dead sum")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    return h.add(h.site, h.delta), UNREAD, h(aten.relu.default, h.x)


@refusal("a part that is dead before another is read")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    dead = h.mul(h.delta, 2)
    return dead, UNREAD, h.add(h.site, h.delta)


@refusal("a site that is read before")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    read = h(aten.relu.default, h.site)
    joined = h.add(h.site, h.delta)
    return read, f"it reads {h.site}, the output of a site before all branches are added to it", h.add(joined, read)


@refusal("a site that is put out too")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    joined, site = h.add(h.site, h.delta), h.site
    output = h.graph.output((joined, site))
    return output, f"it reads {site}, the output of a site before all branches are added to it", None


@refusal("a sum that is read before the second branch")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    first = h.add(h.site, h.delta)
    second = h.add(first, h.second())
    read = h(aten.relu.default, first)
    return read, f"it reads {first}, the output of a site before all branches are added to it", h.add(second, read)


@refusal("one site, two sums")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    first, second = h.add(h.site, h.delta), h.add(h.site, h.second())
    return second, f"it reads {h.site}, the output of a site before all branches are added to it", h.add(first, second)


@refusal("a sum that is read as it is and cast back")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    total = h.add(*_narrow(h))
    cast, read = h.to(total, F32), h(aten.relu.default, total)
    return read, f"it reads {total}, the output of a site before all branches are added to it", (cast, read)


def _not_cast(h: Hand, end: fx.Node) -> tuple[fx.Node, str, Written]:
    problem = "the sum has dtype torch.float64 and must be cast back to torch.float32, that of its site"
    return end, problem, h(aten.relu.default, end)


@refusal("a sum that is not cast back")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    return _not_cast(h, h.add(*_narrow(h)))


@refusal("a sum that is cast to another type")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    end, problem, _ = _not_cast(h, h.add(*_narrow(h)))
    return end, problem, h.to(end, BF16)


@refusal("a second sum that is not cast back")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    site, delta = _narrow(h)
    return _not_cast(h, h.add(h.to(h.add(site, delta), F32), delta))


@refusal("a sum that a scale makes wide")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    x, w = h.input(3, 4, 6, dtype=F32), h.get("lin.weight", 5, 6, dtype=F32)
    delta = h.linear(h.linear(x, h.get(A, 2, 6, dtype=F32)), h.get(B, 5, 2, dtype=F32))
    return _not_cast(h, h.add(h.linear(x, w), h.mul(delta, h.view(h.to(h.get("s", 1, dtype=F32), F64), 1))))


@refusal("a weight whose sum is not cast back")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    return _not_cast(h, h.add(h.get("lin.weight", 5, 6, dtype=F32), _product(h)))


@refusal("a weight that is cast up, whose sum is made as narrow as it is stored")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    x = h.input(3, 6, dtype=F32)
    site = h.linear(x, h.to(h.get("lin.weight", 5, 6, dtype=BF16), F32))
    end = h.add(site, h.linear(h.linear(h.to(x, F64), h.a), h.b))
    return end, _not_cast(h, end)[1], h.to(end, BF16)


def _elsewhere(h: Hand, source: fx.Node, wanted: fx.Node) -> tuple[fx.Node, str, Written]:
    end = h.add(h.linear(wanted, h.w), h.linear(h.linear(source, h.a), h.b))
    return end, f"it adds a branch that reads {source} to a site that reads {wanted}", end


@refusal("another input")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    return _elsewhere(h, h.input(3, 4, 6), h.x)


@refusal("an input that is scaled")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    return _elsewhere(h, h.mul(h.x, 2), h.x)


@refusal("a site whose input is activated")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    return _elsewhere(h, h.x, h(aten.relu.default, h.x))


@refusal("an input behind a module that is no dropout")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    return _elsewhere(h, h.module("act", nn.Tanh(), h.x), h.x)


@refusal("an input behind an active dropout that others read too")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    dropped = h(aten.dropout.default, h.x, 0.5, True)
    h(aten.relu.default, dropped)
    return _elsewhere(h, dropped, h.x)


@refusal("a site behind an active dropout")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    return _elsewhere(h, h.x, h(aten.dropout.default, h.x, 0.5, True))


@refusal("an input whose features are reshaped")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    wide = h.input(2, 12)
    return _elsewhere(h, h.view(wide, 4, 6), h(aten.slice.Tensor, h.view(wide, 4, 6), 0, 0, 4))


@refusal("an input whose positions change places")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    square = h.input(4, 4, 6)
    return _elsewhere(h, h(aten.transpose.int, square, 0, 1), square)


@refusal("the second of two branches with another input")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    other = h.input(3, 4, 6)
    end = h.add(h.add(h.site, h.delta), h.linear(h.linear(other, h.get("lin.lora_A.o.weight", 2, 6)), h.b))
    return end, f"it adds a branch that reads {other} to a site that reads {h.x}", end


def _told(mine: str, theirs: str, write: Callable[[Hand], fx.Node], branch: Callable[[Hand], fx.Node]) -> Refused:
    """A sum of a site and a delta of another kind."""

    def both(h: Hand) -> tuple[fx.Node, str, Written]:
        base, delta = write(h), branch(h)
        end = h.raw(aten.add.Tensor, base, delta)
        return end, f"it adds {mine} to {theirs}", end

    return both


def _signal(h: Hand) -> fx.Node:
    return h._once("signal", lambda: h.input(2, 4, 9))


def _conv1d(h: Hand, name: str, *sizes: int, how: tuple[Any, ...] = (), value: fx.Node | None = None) -> fx.Node:
    return h(aten.conv1d.default, value or _signal(h), h.get(name, *sizes), None, *how)


def _seen(kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1) -> Refused:
    """A branch that sees other places than the site."""

    def branch(h: Hand) -> fx.Node:
        how = [stride], [padding], [dilation], groups
        down = _conv1d(h, A, 2, 4 // groups, kernel, how=how)
        return _conv1d(h, B, 6, 2 // groups, 1, how=([1], [0], [1], groups), value=down)

    mine = f"conv1d (kernel ({kernel},), (({stride},), ({padding},), ({dilation},), {groups}))"
    theirs = "conv1d (kernel (3,), ((1,), (0,), (1,), 1))"
    return _told(mine, theirs, lambda h: _conv1d(h, "lin.weight", 6, 4, 3), branch)


OTHERS |= {
    "another kernel": _seen(2),
    "another stride": _seen(3, stride=9),
    "another padding": _seen(3, padding=1),
    "another dilation": _seen(3, dilation=2),
    "other groups": _seen(3, groups=2),
    "a linear beside experts": _told(
        "linear",
        "expert (('right', None))",
        lambda h: h(aten.bmm.default, h.x, h.get("lin.weight", 3, 6, 5)),
        lambda h: h.delta,
    ),
    "experts beside a linear": _told(
        "expert (('right', None))",
        "linear",
        lambda h: h.site,
        lambda h: h(aten.bmm.default, h(aten.bmm.default, h.x, h.get(A, 3, 6, 2)), h.get(B, 3, 2, 5)),
    ),
    "a convolution beside a linear": _told(
        "conv1d (kernel (2,), ((1,), (0,), (1,), 1))",
        "linear",
        lambda h: h.linear(_signal(h), h.get("lin.weight", 5, 9)),
        lambda h: _conv1d(h, A, 6, 4, 2),
    ),
    "a linear beside a convolution": _told(
        "linear",
        "conv1d (kernel (3,), ((1,), (0,), (1,), 1))",
        lambda h: _conv1d(h, "lin.weight", 6, 4, 3),
        lambda h: h.linear(_signal(h), h.get(A, 7, 9)),
    ),
}


def _unlike(mine: tuple[int, ...], wanted: tuple[int, ...], *write: Callable[[Hand], fx.Node]) -> Refused:
    """A sum of a site and deltas, or of a weight and products of factors, of which the shapes differ."""

    def both(h: Hand) -> tuple[fx.Node, str, Written]:
        end, *deltas = (each(h) for each in write)
        for delta in deltas:
            end = h.raw(aten.add.Tensor, end, delta)
        return end, f"it adds an update of shape {mine} to a weight of {wanted}", end

    return both


OTHERS |= {
    "one row of a convolution for all": _unlike(
        (1, 1, 12),
        (1, 6, 12),
        lambda h: _conv1d(h, "lin.weight", 6, 4, 3),
        lambda h: _conv1d(h, B, 1, 2, 1, value=_conv1d(h, A, 2, 4, 3)),
    ),
    "one row for all features": _unlike((1, 6), (5, 6), lambda h: h.site, lambda h: h.linear(h.down, h.get(B, 1, 2))),
    "one row for all features, of one factor": _unlike(
        (1, 6), (5, 6), lambda h: h.site, lambda h: h.linear(h.x, h.get(A, 1, 6))
    ),
    "features for a site with one": _unlike(
        (5, 6), (1, 6), lambda h: h.linear(h.x, h.get("lin.weight", 1, 6)), lambda h: h.delta
    ),
    "one row for all features, of the second": _unlike(
        (1, 6), (5, 6), lambda h: h.site, lambda h: h.delta, lambda h: h.linear(h.x, h.get("lin.lora_A.o.weight", 1, 6))
    ),
    "one place for all features": _unlike(
        (1, 6),
        (5, 6),
        lambda h: h.site,
        lambda h: h(
            aten.index_select.default, _padded(h), -1, h.get("lin.lora_places.default.query", value=torch.tensor([1]))
        ),
    ),
    "a product of factors of fewer rows": _unlike(
        (1, 6), (5, 6), lambda h: h.w, lambda h: h(aten.mm.default, h.get(B, 1, 2), h.a)
    ),
    "a product of factors of fewer columns": _unlike(
        (5, 1), (5, 6), lambda h: h.w, lambda h: h(aten.mm.default, h.b, h.get(A, 2, 1))
    ),
    "a product of factors for all experts": _unlike(
        (5, 6), (2, 5, 6), lambda h: h.get("lin.weight", 2, 5, 6), lambda h: _product(h)
    ),
    "two products of factors, one of fewer rows": _unlike(
        (1, 6), (5, 6), lambda h: h.w, _product, lambda h: h(aten.mm.default, h.get("lin.lora_B.o.weight", 1, 2), h.a)
    ),
}


@refusal("experts chosen on the other side")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    x, chosen = h.input(4, 6, 6), _chosen(h)
    base = h(aten.bmm.default, x, h(aten.index.Tensor, h.get("lin.weight", 2, 6, 6), [chosen]))
    end = h.add(base, h(aten.bmm.default, h(aten.index.Tensor, h.get(A, 2, 6, 6), [chosen]), x))
    return end, f"it adds expert (('left', {chosen})) to expert (('right', {chosen}))", end


@refusal("other experts")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    x, mine, theirs = h.input(4, 3, 6), _chosen(h), _chosen(h)
    base = h(aten.bmm.default, x, h(aten.index.Tensor, h.get("lin.weight", 2, 6, 5), [mine]))
    down = h(aten.bmm.default, x, h(aten.index.Tensor, h.get(A, 2, 6, 2), [theirs]))
    end = h.add(base, h(aten.bmm.default, down, h(aten.index.Tensor, h.get(B, 2, 2, 5), [theirs])))
    return end, f"it adds expert (('right', {theirs})) to expert (('right', {mine}))", end


@refusal("a convolution in one dimension beside a linear")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    square = h.input(6, 6)
    end = h.add(h.linear(square, h.w), h(aten.conv1d.default, square, h.get(A, 6, 6, 2)))
    return end, "it adds conv1d (kernel (2,), ((1,), (0,), (1,), 1)) to linear", end


def _positions(base: fx.Node) -> str:
    return f"it adds values of other positions to {base}, or of positions not known"


@refusal("each position to all others")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    base, delta = h.linear(h.flat, h.w), h.linear(h.linear(h.flat, h.a), h.b)
    end = h.add(base, h(aten.unsqueeze.default, delta, 1))
    return end, _positions(base), end


@refusal("all others to each position")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    base = h(aten.unsqueeze.default, h.linear(h.flat, h.w), 1)
    end = h.add(base, h.linear(h.linear(h.flat, h.a), h.b))
    return end, _positions(base), end


@refusal("each position to all others, reshaped before the branch")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    base = h.linear(h.flat, h.w)
    end = h.add(base, h.linear(h.linear(h(aten.unsqueeze.default, h.flat, 1), h.a), h.b))
    return end, _positions(base), end


@refusal("each position to all others, reshaped before the site")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    base = h.linear(h(aten.unsqueeze.default, h.flat, 1), h.w)
    end = h.add(base, h.linear(h.linear(h.flat, h.a), h.b))
    return end, _positions(base), end


@refusal("positions of which the shape is not known")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    base = h.linear(h.flat, h.w)
    delta = h(aten.unsqueeze.default, h.linear(h.linear(h.flat, h.a), h.b), 0)
    end = h.add(base, h(aten.squeeze.dim, delta, 0))
    del end.meta["val"]
    return end, _positions(base), end


@refusal("a base of which the shape is not known")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    base = h.linear(h.flat, h.w)
    end = h.add(base, h.view(h.linear(h.linear(h.flat, h.a), h.b), 7, 5))
    del base.meta["val"]
    return end, _positions(base), end


@refusal("a convolution of a reshaped input")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    x = h.input(1, 4, 9)
    base = _conv1d(h, "lin.weight", 6, 4, 3, value=x)
    end = h.add(base, _conv1d(h, A, 6, 4, 3, value=h.view(x, 4, 9)))
    return end, _positions(base), end


@refusal("experts of a reshaped input")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    x = h.input(1, 3, 6)
    base = h(aten.bmm.default, x, h.get("lin.weight", 1, 6, 5))
    end = h.add(base, h(aten.bmm.default, h.view(x, 1, 3, 6), h.get(A, 1, 6, 5)))
    return end, _positions(base), end


def _written(
    h: Hand, write: Callable[[fx.Node], fx.Node], *, branch_first: bool = False
) -> tuple[fx.Node, str, Written]:
    """Something is written to the input, or to a view of it, between the site and its branch."""
    if branch_first:
        assert h.down
    else:
        assert h.site
    node = write(h.x)
    end = h.add(h.site, h.delta)
    return node, f"it writes to what {h.site} and {h.down} read, between the two", end


@refusal("an input that is written to between a site and its branch")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    return _written(h, lambda x: h(aten.add_.Tensor, x, 1.0))


@refusal("an input that is written to between a branch and its site")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    return _written(h, lambda x: h(aten.mul_.Tensor, x, 2.0), branch_first=True)


@refusal("a view of an input that is written to between a site and its branch")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    return _written(h, lambda x: h(aten.add_.Tensor, h(aten.select.int, x, 0, 1), 1.0))


@refusal("a module that holds a factor")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    h.get(A, 2, 6)
    node = h.module("lin", _Holder(h.root.lin), h.x)
    return node, "the module 'lin' holds a factor, and is not made of operators", node


@refusal("a module in a module that holds a factor")
def _(h: Hand) -> tuple[fx.Node, str, Written]:
    h.get(A, 2, 6)
    node = h.module("lin.lora_A.default", nn.Linear(6, 2, bias=False).double(), h.x)
    return node, "the module 'lin.lora_A.default' holds a factor, and is not made of operators", node


class _Holder(nn.Module):
    """Computes with what another module has."""

    def __init__(self, holder: nn.Module) -> None:
        super().__init__()
        self.lora_A = holder.lora_A

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.lora_A.default.weight.T


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_taken_out_alone_is_refused_by_node_and_reason(name: str) -> None:
    hand = Hand()
    node, problem, written = OTHERS[name](hand)
    graph_module = fx.GraphModule(hand.root, hand.graph) if written is None else hand.done(written)
    refused(graph_module, node, problem)


def test_a_refusal_says_which_line_of_the_model_the_node_is_from() -> None:
    hand = Hand()
    node = hand(aten.gelu.default, hand.delta)
    node.meta["stack_trace"] = '  File "/home/me/model.py", line 12, in forward\n    return gelu(x)'
    graph_module = hand.done(hand.add(hand.site, node))
    refused(graph_module, node, LINEAR, ", at /home/me/model.py:12: return gelu(x)")


def test_an_active_dropout_that_only_factors_read_is_that_of_the_branch() -> None:
    hand = Hand()
    dropped = hand(aten.dropout.default, hand.x, 0.5, True)
    other = hand.linear(hand.linear(dropped, hand.get("lin.lora_A.o.weight", 2, 6)), hand.b)
    end = hand.add(hand.add(hand.site, hand.linear(hand.linear(dropped, hand.a), hand.b)), other)
    graph_module = hand.done(end)
    folded = lora_fx.fold(graph_module)
    assert operators(folded) == ["linear"]
    for node in graph_module.graph.nodes:
        if node.target is aten.dropout.default:
            node.args = (node.args[0], 0.5, False)
    graph_module.recompile()
    assert torch.allclose(folded(*hand.inputs), graph_module(*hand.inputs), rtol=0, atol=1e-12)


def test_modules_whose_names_only_begin_like_that_of_a_factor_are_left_alone() -> None:
    hand = Hand()
    inner = hand.module("linear", nn.Tanh(), hand.x)
    hand.get(A, 2, 6)
    dropped = hand.module("lin.lora_dropout", nn.Dropout(0.5), inner)
    base = hand.linear(inner, hand.w)
    graph_module = hand.done(hand.add(base, hand.linear(hand.linear(dropped, hand.a), hand.b)))
    folded = lora_fx.fold(graph_module)
    assert operators(folded) == ["module", "linear"]
    assert {name for name, _ in folded.named_modules()} == {"", "linear", "lin"}
    assert torch.allclose(folded(*hand.inputs), graph_module(*hand.inputs), rtol=0, atol=1e-12)


def _two_values(hand: Hand) -> fx.GraphModule:
    joined = hand.linear(hand.flat, hand.add(hand.w, _product(hand)))
    return hand.done(hand.add(hand.linear(hand.flat, hand.w), hand.mul(joined, 2)))


def test_a_weight_that_is_read_without_its_product_too_needs_two_values() -> None:
    with pytest.raises(lora_fx.FoldError, match=r"^'lin\.weight' is used 2 times"):
        lora_fx.fold(_two_values(Hand()))


def test_a_weight_that_is_read_without_its_product_too_can_be_untied() -> None:
    hand = Hand()
    graph_module = _two_values(hand)
    folded = lora_fx.fold(graph_module, unshare=True)
    assert torch.allclose(folded(*hand.inputs), graph_module(*hand.inputs), rtol=0, atol=1e-12)
    assert operators(folded) == ["linear", "linear", "mul", "add"]


def test_what_is_written_to_an_input_before_or_after_both_read_it_is_the_models_own() -> None:
    hand = Hand()
    before = hand(aten.add_.Tensor, hand.x, 1.0)
    end = hand.add(hand.linear(before, hand.w), hand.linear(hand.linear(hand.x, hand.a), hand.b))
    del before
    graph_module = hand.done(end)
    with pytest.raises(lora_fx.FoldError, match="it adds a branch that reads x0 to a site that reads add__tensor"):
        lora_fx.fold(graph_module)  # the same values, which it does not see
    hand = Hand()
    hand(aten.mul_.Tensor, hand.x, 2.0)
    end = hand.add(hand.site, hand.delta)
    hand(aten.mul_.Tensor, hand.x, 2.0)
    graph_module = hand.done(end)
    folded = lora_fx.fold(graph_module)
    expected, value = _run(graph_module, hand.inputs), _run(folded, hand.inputs)
    assert torch.allclose(value[0], expected[0], rtol=0, atol=1e-12)
    assert operators(folded) == ["mul_", "linear", "mul_"]


def test_a_cast_behind_a_wider_bias_is_the_models_own() -> None:
    hand = Hand()
    x = hand.input(3, 4, 6, dtype=F32)
    base = hand.add(hand.linear(x, hand.get("lin.weight", 5, 6, dtype=F32)), hand.get("lin.bias", 5))
    delta = hand.linear(hand.linear(hand.to(x, F64), hand.a), hand.b)
    graph_module = hand.done(hand.to(hand.add(base, delta), F32))
    assert operators(lora_fx.fold(graph_module)) == ["linear", "add", "to"]


def test_a_scale_that_is_read_many_times_is_refused() -> None:
    hand = Hand()
    many = hand(aten.index.Tensor, hand.get("s", 1), [hand.input(value=torch.tensor([0, 0, 0]))])
    delta = hand.mul(hand.linear(hand.down, hand.get(B, 1, 2)), many)
    graph_module = hand.done(hand.add(hand.linear(hand.x, hand.get("lin.weight", 1, 6)), delta))
    with pytest.raises(lora_fx.FoldError):
        lora_fx.fold(graph_module)


@pytest.mark.parametrize("view", [False, True])
def test_a_factor_that_nothing_alive_reads_is_gone(view: bool) -> None:
    hand = Hand()
    end = hand.add(hand.site, hand.delta)
    unused = hand.get("lin.lora_A.unused.weight", 3, 6)
    if view:
        hand(aten.t.default, unused)
    assert list(lora_fx.fold(hand.done(end)).state_dict()) == ["lin.weight"]


def test_a_product_of_a_factor_and_a_stack_of_them_is_refused() -> None:
    hand = Hand()
    product = hand(aten.matmul.default, hand.get(B, 6, 3), hand.get(A, 2, 3, 5))
    weight = hand.add(hand.get("lin.weight", 2, 6, 5), product)
    graph_module = hand.done(hand(aten.bmm.default, hand.input(2, 4, 6), weight))
    with pytest.raises(lora_fx.FoldError, match=r"it adds an update of shape \(\) to a weight of \(2, 6, 5\)"):
        lora_fx.fold(graph_module)


# What a run of the mutation tester found untested.


@pytest.mark.parametrize("name", ["lin.weight", "lin.scale"])
def test_a_write_to_a_tensor_of_a_branch_is_refused_wherever_it_stands(name: str) -> None:
    hand = Hand()
    total = hand.add(hand.site, hand.mul(hand.delta, hand.get("lin.scale", 1)))
    write = hand(aten.mul_.Tensor, hand.get(name), 0.5)
    refused(hand.done(total), write, "it writes to a weight or a factor while the graph computes")


@pytest.mark.parametrize("name", [A, B])
def test_a_write_to_a_factor_is_refused(name: str) -> None:
    hand = Hand()
    total = hand.add(hand.site, hand.delta)
    write = hand(aten.mul_.Tensor, hand.get(name), 0.5)
    refused(
        hand.done(total), write, "a branch must be linear in its site's input until it is added to its site's output"
    )


def test_a_write_to_a_tensor_that_is_of_no_branch_is_left_alone() -> None:
    hand = Hand()
    other = hand.get("other", 5)
    total = hand.add(hand.add(hand.site, hand.delta), hand(aten.mul_.Tensor, other, 0.5))
    assert len(find_branches(hand.done(total))) == 1


@pytest.mark.parametrize("first", [False, True])
def test_a_sum_of_deltas_of_which_one_lost_its_positions_is_refused_where_shapes_differ(first: bool) -> None:
    hand = Hand()
    base = hand.linear(hand.flat, hand.w)
    plain = hand.linear(hand.linear(hand.flat, hand.a), hand.b)
    spread = hand(aten.unsqueeze.default, plain, 1)
    total = hand.add(spread, plain) if first else hand.add(plain, spread)
    graph_module = hand.done(hand.add(base, total))
    with pytest.raises(lora_fx.FoldError, match="it adds values of other positions to"):
        lora_fx.fold(graph_module)


def test_a_sum_of_deltas_has_the_wider_of_their_types() -> None:
    hand = Hand()
    x = hand.input(3, 4, 6, dtype=F32)
    narrow = hand.linear(hand.linear(x, hand.to(hand.a, F32)), hand.to(hand.b, F32))
    wide = hand.linear(hand.linear(hand.to(x, F64), hand.a), hand.b)
    base = hand.linear(x, hand.get("lin.weight", 5, 6, dtype=F32))
    total = hand.add(base, hand.add(narrow, wide))
    assert operators(lora_fx.fold(hand.done(hand.to(total, F32)))) == ["linear"]
    hand = Hand()
    x = hand.input(3, 4, 6, dtype=F32)
    narrow = hand.linear(hand.linear(x, hand.to(hand.a, F32)), hand.to(hand.b, F32))
    wide = hand.linear(hand.linear(hand.to(x, F64), hand.a), hand.b)
    base = hand.linear(x, hand.get("lin.weight", 5, 6, dtype=F32))
    graph_module = hand.done(hand.add(base, hand.add(narrow, wide)))
    with pytest.raises(
        lora_fx.FoldError, match=r"the sum has dtype torch\.float64 and must be cast back to torch\.float32"
    ):
        lora_fx.fold(graph_module)


def test_a_delta_of_an_embedding_may_be_reshaped() -> None:
    hand = Hand()
    index = hand.input(value=torch.tensor([[0, 3, 1], [2, 2, 4]]))
    table = hand(aten.t.default, hand.get(A, 2, 7))
    found = hand.view(hand(aten.embedding.default, table, index), 6, 2)
    delta = hand.view(hand.linear(found, hand.b), 2, 3, 5)
    base = hand(aten.embedding.default, hand.get("lin.weight", 7, 5), index)
    graph_module = hand.done(hand.add(base, delta))
    folded = lora_fx.fold(graph_module)
    assert torch.allclose(folded(*hand.inputs), graph_module(*hand.inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_factor_under_an_operator_is_a_factor(by_keyword: bool) -> None:
    hand = Hand()
    args, kwargs = ((), {"self": hand.a}) if by_keyword else ((hand.a,), {})
    node = hand.graph.call_function(aten.neg.default, args, kwargs)
    node.meta["val"] = -hand.a.meta["val"]
    graph_module = hand.done(hand.add(hand.site, hand.linear(hand.linear(hand.x, node), hand.b)))
    (found,) = find_branches(graph_module)
    (update,) = found.updates
    assert update.names == (A, B)
    assert len(update.factors) == 2  # of low rank still
    folded = lora_fx.fold(graph_module)
    assert torch.allclose(folded(*hand.inputs), graph_module(*hand.inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [2, 1, 0.5])
def test_the_factor_of_a_fused_sum_scales_the_update(alpha: float) -> None:
    hand = Hand()
    base = hand.linear(hand.flat, hand.w)
    down = hand.linear(hand.flat, hand.a)
    total = hand(aten.addmm.default, base, down, hand(aten.t.default, hand.b), alpha=alpha)
    graph_module = hand.done(total)
    (found,) = find_branches(graph_module)
    assert [update.scaling for update in found.updates] == [alpha]
    folded = lora_fx.fold(graph_module)
    assert torch.allclose(folded(*hand.inputs), graph_module(*hand.inputs), rtol=0, atol=1e-12)


def test_unload_takes_what_is_nominated() -> None:
    hand = Hand()
    low, high = hand.get("down", 2, 6), hand.get("up", 5, 2)
    graph_module = hand.done(hand.add(hand.site, hand.linear(hand.linear(hand.x, low), high)))
    bare = lora_fx.unload(graph_module, branches=lambda name: name in ("down", "up"))
    assert operators(bare) == ["linear"]
    assert list(bare.state_dict()) == ["lin.weight"]
    assert operators(lora_fx.unload(graph_module)) == operators(graph_module)


def test_a_factor_that_is_a_mere_attribute_is_refused() -> None:
    root = nn.Module()
    root.register_parameter("w", nn.Parameter(torch.ones(4, 3)))
    root.left, root.right = torch.ones(2, 3), torch.ones(4, 2)
    graph = fx.Graph()
    x, w, left, right = graph.placeholder("x"), graph.get_attr("w"), graph.get_attr("left"), graph.get_attr("right")
    linear = torch.ops.aten.linear.default
    update = graph.call_function(linear, (graph.call_function(linear, (x, left)), right))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (graph.call_function(linear, (x, w)), update)))
    graph_module = fx.GraphModule(root, graph)  # which registers both as buffers
    nominate = ("left", "right").__contains__
    assert len(find_branches(graph_module, nominate)) == 1
    for name in ("right", "left"):
        tensor = getattr(graph_module, name)
        delattr(graph_module, name)
        vars(graph_module)[name] = tensor
    message = r"'left', 'right': read as a factor, and neither a parameter nor a buffer of the graph\. Register it: register_buffer\."
    with pytest.raises(lora_fx.FoldError, match=message):
        find_branches(graph_module, nominate)
    assert find_branches(graph_module, "other".__eq__) == ()
