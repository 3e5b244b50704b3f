"""Random small models: modules and weights in a pool, and a program of calls, functional products and in-place operators on them.

The oracle is the same program in float64 with updates of pool weights: every functional product reads ``W + ΔW``, every call of a
module, or the n-th alone, adds the product of ``ΔW`` to what the module returns.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

Values = list[torch.Tensor]
Step = Callable[["Net", Values], torch.Tensor]

VOCABULARY = 13
ROWS, LENGTH = 3, 5


class Scaled(nn.Linear):
    """A linear layer that computes more than its product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.7


@dataclass
class Program:
    """What a seed stands for.

    Attributes:
        steps: append a value each, to a list that begins with the input.
        widths: of the values.
        kinds: of the steps, for the table and for findings.
        functional: pool names that a step reads the weight of without calling the module.
        ambiguous: pool names that share a tensor with another, so that a functional product has two owners.
        casts: a product is computed in float32 within a model in float64.
        both: pool names whose square weight is multiplied with in both layouts, which have a branch each.
        head_alone: the table of embeddings, whose rows are taken by indexing, which is no call site, and that a head multiplies with.
        unlike: pool names of convolutions that pad with other numbers than PEFT's A does, or compute more than a product.
        tokens: the input is token ids.
        outputs: which values the model returns.
    """

    steps: list[Step] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    functional: set[str] = field(default_factory=set)
    ambiguous: set[str] = field(default_factory=set)
    both: set[str] = field(default_factory=set)
    head_alone: set[str] = field(default_factory=set)
    unlike: set[str] = field(default_factory=set)
    casts: bool = False
    tokens: bool = False
    outputs: list[int] = field(default_factory=list)


class Net(nn.Module):
    """The model of a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.pool = nn.ModuleDict()
        self.program = Program()
        self.deltas: dict[str, list[tuple[int | None, torch.Tensor]]] = {}
        self.calls: Counter[str] = Counter()
        torch.manual_seed(seed)
        _Writer(self, random.Random(seed)).write()
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn(parameter.shape) * 0.3)

    def forward(self, x: torch.Tensor) -> Any:
        values = [x]
        self.calls.clear()
        for step in self.program.steps:
            values.append(step(self, values))
        chosen = [values[index] for index in self.program.outputs]
        return {f"out{number}": value for number, value in enumerate(chosen)} if len(chosen) > 1 else chosen[0]

    def weight(self, name: str) -> torch.Tensor:
        """Return a weight of the pool, with its updates."""
        stored: torch.Tensor = self.pool[name].weight
        return sum((delta for _, delta in self.deltas.get(name, ())), stored)

    def call(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Call a module of the pool, and add the products of its updates."""
        module = self.pool[name]
        value: torch.Tensor = module(x)
        self.calls[name] += 1
        for call, delta in self.deltas.get(name, ()):
            if call in (None, self.calls[name]):
                value = value + product(module, x, delta) * (0.7 if isinstance(module, Scaled) else 1.0)
        return value


def product(module: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return what a module computes with another weight and no bias."""
    if isinstance(module, nn.Linear):
        return functional.linear(x, weight)
    if isinstance(module, Conv1D):
        return x @ weight
    if isinstance(module, nn.Embedding):
        return functional.embedding(x, weight)
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    bare = type(module)(
        module.in_channels,
        module.out_channels,
        module.kernel_size,  # type: ignore[arg-type]
        module.stride,  # type: ignore[arg-type]
        module.padding,  # type: ignore[arg-type]
        module.dilation,  # type: ignore[arg-type]
        module.groups,
        False,
        module.padding_mode,
    )
    return torch.func.functional_call(bare.to(weight), {"weight": weight}, (x,))


class _Writer:
    """Draws the modules and steps of a model."""

    def __init__(self, net: Net, draw: random.Random) -> None:
        self.net, self.draw, self.program = net, draw, net.program

    def write(self) -> None:
        program, draw = self.program, self.draw
        program.tokens = draw.random() < 0.3
        program.widths.append(0 if program.tokens else draw.choice((5, 6)))
        if program.tokens:
            width = draw.choice((5, 6, 8))
            self.net.pool["embed"] = nn.Embedding(VOCABULARY, width, padding_idx=draw.choice((None, 0)))
            how = draw.choice(("module", "module", "functional", "index"))
            self._add(f"embedding by {how}", width, _embedding(how))
            if how != "module":
                program.functional.add("embed")
        for _ in range(draw.randint(2, 6)):
            self._step()
        if program.tokens and draw.random() < 0.5:
            self._head()
        last = len(program.widths) - 1
        program.outputs = [last] if draw.random() < 0.6 else sorted({last, draw.randint(1, last)})

    def _add(self, kind: str, width: int, step: Step) -> None:
        self.program.kinds.append(kind)
        self.program.widths.append(width)
        self.program.steps.append(step)

    def _new(self, kind: str, wide: int, high: int) -> str:
        """Return the name of a module of the pool that takes these widths: an old one, if there is one, half of the time."""
        draw, pool = self.draw, self.net.pool
        if draw.random() < 0.06:
            for name, each in list(pool.items()):
                if getattr(each, "widths", None) == (kind, wide, high):
                    again = f"again{len(pool)}"
                    pool[again] = each  # one module under two names
                    self.program.kinds.append("aliased")
                    self.program.ambiguous |= {name, again}
                    return again
        fits = [name for name, each in pool.items() if getattr(each, "widths", None) == (kind, wide, high)]
        if fits and draw.random() < 0.5:
            return draw.choice(fits)
        bias = draw.random() < 0.6
        made: Any
        match kind:
            case "linear":
                made = nn.Linear(wide, high, bias=bias)
            case "scaled":
                made = Scaled(wide, high, bias=bias)
            case "Conv1D":
                made = Conv1D(high, wide)
                made.weight.data.mul_(10)
            case "conv":
                mode = draw.choice(("zeros", "zeros", "circular", "reflect"))
                made = nn.Conv1d(wide, high, 3, padding=draw.choice((1, "same")), bias=bias, padding_mode=mode)
            case _:
                made = nn.Conv2d(wide, high, (3, 1), padding=(1, 0), dilation=(1, 2), bias=bias)
        made.widths = (kind, wide, high)
        name = draw.choice(("q", "layers_0", "fc", "w")) + str(len(pool))
        pool[name] = made
        if kind == "scaled" or getattr(made, "padding_mode", "zeros") != "zeros":
            self.program.unlike.add(name)
        self._tie(name, kind, wide, high)
        return name

    def _tie(self, name: str, kind: str, wide: int, high: int) -> None:
        """Share the weight with another module now and then, in the other layout too."""
        if self.draw.random() > 0.25 or kind not in ("linear", "Conv1D"):
            return
        pool: Any = self.net.pool
        others = [other for other in pool if other != name and isinstance(pool[other], nn.Linear | Conv1D)]
        self.draw.shuffle(others)
        for other in others:
            weight = pool[other].weight
            if weight.shape == pool[name].weight.shape:
                pool[name].weight = weight
            elif weight.shape == pool[name].weight.shape[::-1]:
                pool[name].weight = nn.Parameter(weight.detach().t())  # another parameter over the same storage
            else:
                continue
            self.program.kinds.append("tied")
            self.program.ambiguous |= {name, other}
            return

    def _head(self) -> None:
        width, embedded = self.program.widths[-1], self.program.widths[1]
        if width != embedded:
            return
        if self.draw.random() < 0.5:
            self.net.pool["head"] = nn.Linear(width, VOCABULARY, bias=False)
            self.net.pool["head"].weight = self.net.pool["embed"].weight
            self.program.ambiguous |= {"head", "embed"}
            self._add("tied head", VOCABULARY, lambda net, values: net.call("head", values[-1]))
        else:
            self.program.functional.add("embed")
            if "embedding by index" in self.program.kinds:
                self.program.head_alone.add("embed")
            self._add("head of the table", VOCABULARY, lambda net, values: values[-1] @ net.weight("embed").t())

    def _step(self) -> None:
        draw, program = self.draw, self.program
        at = draw.randint(max(1 if program.tokens else 0, len(program.widths) - 3), len(program.widths) - 1)
        wide = program.widths[at]
        high = draw.choice((wide, wide, 4, 6, 7))
        kind = draw.choice(CALLS * 2 + FUNCTIONAL * 2 + PARTS + OTHERS)
        if kind in CALLS:
            name = self._new(kind, wide, high)
            self._add(kind, high, _called(name, at, kind))
        elif kind in FUNCTIONAL:
            high = wide if kind == "square" else high
            name = self._new(draw.choice(("linear", "linear", "Conv1D")), wide, high)
            program.functional.add(name)
            program.casts |= kind == "cast"
            if kind == "square":
                program.both.add(name)
            self._add(kind, high, _functional(kind, name, at))
        elif kind in PARTS:
            name = self._new("linear", wide, 6)
            program.functional.add(name)
            self._add(kind, 3 if kind in ("sliced", "reshaped") else 6, _part(kind, name, at))
        else:
            self._other(kind, at, wide)
        if draw.random() < 0.35 and program.widths[-1] == wide:
            self._add("residual", wide, _residual(draw.choice(("out", "in place")), at))

    def _other(self, kind: str, at: int, wide: int) -> None:
        pool, draw = self.net.pool, self.draw
        name = f"other{len(pool)}"
        match kind:
            case "norm":
                pool[name] = draw.choice((nn.LayerNorm, nn.RMSNorm))(wide)
            case "dropout":
                pool[name] = nn.Dropout(0.25, inplace=draw.random() < 0.3)
            case "activation":
                inplace = draw.random() < 0.4
                pool[name] = draw.choice((nn.ReLU(inplace=inplace), nn.SiLU(inplace=inplace), nn.Tanh(), nn.GELU()))
            case "buffer":
                self.net.register_buffer(name, torch.randn(wide))
                self._add(kind, wide, lambda net, values: values[at] * getattr(net, name))
                return
            case "experts":
                router = self._new("linear", wide, 3)
                names = [self._new("linear", wide, wide) for _ in range(3)]
                self._add(kind, wide, _experts(router, names, at))
                return
            case "attention":
                names = [self._new("linear", wide, 6) for _ in range(3)]
                self._add(kind, 6, _attention(names, at))
                return
            case "fused attention":
                self._add(kind, 6, _fused_attention(self._new("linear", wide, 18), at))
                return
            case "loop":
                self._add(kind, wide, _loop(self._new("linear", wide, wide), at))
                return
            case "overwritten":
                self._add(kind, wide, _overwritten(draw.choice(("mul", "slice", "copy", "fill")), at))
                return
        self._add(kind, wide, lambda net, values: net.pool[name](values[at]))


CALLS = ("linear", "Conv1D", "conv", "conv2d", "scaled")
FUNCTIONAL = ("F.linear", "matmul", "addmm", "einsum", "bmm", "tensordot", "cast", "inner", "square")
PARTS = ("sliced", "summed", "scaled weight", "concatenated", "reshaped")
UNKNOWN = ("bmm", "tensordot", "inner")
"""Of these, products that are no call sites (bmm: of a weight that is expanded over the batch): no rule takes them, and a fold of another
use of their weight is refused."""

OTHERS = ("norm", "dropout", "activation", "buffer", "experts", "attention", "fused attention", "loop", "overwritten")


def _embedding(how: str) -> Step:
    def step(net: Net, values: Values) -> torch.Tensor:
        if how == "module":
            return net.call("embed", values[0])
        if how == "functional":
            return functional.embedding(values[0], net.weight("embed"))
        return net.pool["embed"].weight[values[0]]  # no call site: no rule adapts it

    return step


def _called(name: str, at: int, kind: str) -> Step:
    def step(net: Net, values: Values) -> torch.Tensor:
        x = values[at]
        if kind == "conv":
            return net.call(name, x.transpose(1, 2)).transpose(1, 2)
        if kind == "Conv1D":
            return net.call(name, x.contiguous())  # it takes a view of its input
        if kind == "conv2d":
            return net.call(name, x.transpose(1, 2).unsqueeze(-1)).flatten(2).transpose(1, 2)
        return net.call(name, x)

    return step


def _functional(kind: str, name: str, at: int) -> Step:
    def step(net: Net, values: Values) -> torch.Tensor:
        x, w = values[at], net.pool[name].weight if kind in UNKNOWN else net.weight(name)
        w = w.t() if isinstance(net.pool[name], Conv1D) else w  # (out, in)
        flat = x.reshape(-1, x.size(-1))
        match kind:
            case "F.linear":
                return functional.linear(x, w)
            case "matmul":
                return torch.matmul(x, w.transpose(0, 1)) + 0.3
            case "addmm":
                bias = torch.linspace(-1, 1, w.size(0), dtype=x.dtype)
                return torch.addmm(bias, flat, w.t()).view(*x.shape[:-1], -1)
            case "einsum":
                return torch.einsum("bsi,oi->bso", x, w)
            case "bmm":
                return torch.bmm(x, w.t().unsqueeze(0).expand(x.size(0), -1, -1))
            case "tensordot":
                return torch.tensordot(x, w, dims=([2], [1]))
            case "cast":
                return functional.linear(x.float(), w.float()).to(x.dtype)
            case "square":
                return functional.linear(x, w) - torch.matmul(x, w)
        return (w @ flat.t()).t().reshape(*x.shape[:-1], -1)

    return step


def _part(kind: str, name: str, at: int) -> Step:
    def step(net: Net, values: Values) -> torch.Tensor:
        x, w = values[at], net.pool[name].weight
        match kind:
            case "sliced":
                return functional.linear(x, w[:3]) - functional.linear(x, w.chunk(2)[1])
            case "summed":
                return functional.linear(x, w + w.mean())
            case "scaled weight":
                return functional.linear(x, w * 0.5)
            case "reshaped":
                return functional.linear(x, w.reshape(3, 2, -1).sum(1))
        return functional.linear(x, torch.cat([w[3:], w[:3] * 2]))

    return step


def _residual(how: str, at: int) -> Step:
    def step(net: Net, values: Values) -> torch.Tensor:
        return values[-1] + values[at] if how == "out" else values[-1].add_(values[at])

    return step


def _overwritten(how: str, at: int) -> Step:
    def step(net: Net, values: Values) -> torch.Tensor:
        x = values[at]
        match how:
            case "mul":
                return x.mul_(0.5)
            case "slice":
                x[..., 0] = x[..., 1] * 2
            case "copy":
                made = x.clone()
                made[:, :1].add_(1.0)
                return made
            case "fill":
                x.view(-1, x.size(-1))[:, -1:].fill_(0.25) if x.is_contiguous() else x[..., -1:].fill_(0.25)
        return x + 0.0

    return step


def _experts(router: str, names: list[str], at: int) -> Step:
    def step(net: Net, values: Values) -> torch.Tensor:
        x = values[at]
        chosen = net.call(router, x).argmax(-1)
        result = torch.zeros_like(x)
        for number, name in enumerate(names):
            result = result + torch.where((chosen == number).unsqueeze(-1), net.call(name, x), 0.0)
        return result

    return step


def _attention(names: list[str], at: int) -> Step:
    def step(net: Net, values: Values) -> torch.Tensor:
        q, k, v = (net.call(name, values[at]).unflatten(-1, (2, 3)).transpose(1, 2) for name in names)
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    return step


def _fused_attention(name: str, at: int) -> Step:
    def step(net: Net, values: Values) -> torch.Tensor:
        q, k, v = (each.unflatten(-1, (2, 3)).transpose(1, 2) for each in net.call(name, values[at]).chunk(3, -1))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return step


def _loop(name: str, at: int) -> Step:
    def step(net: Net, values: Values) -> torch.Tensor:
        x = values[at]
        for _ in range(3):
            x = x + torch.tanh(net.call(name, x)) * 0.5
        return x

    return step


def example(net: Net, rows: int = ROWS, length: int = LENGTH, seed: int = 7) -> torch.Tensor:
    """Return an input of a model, in its dtype."""
    generator = torch.Generator().manual_seed(seed)
    if net.program.tokens:
        return torch.randint(VOCABULARY, (rows, length), generator=generator)
    dtype = next(net.parameters(), torch.zeros(0)).dtype
    return torch.randn(rows, length, net.program.widths[0], generator=generator, dtype=torch.float64).to(dtype)
