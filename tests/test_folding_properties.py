"""For any small graph: a fold computes what the branches compute, or raises; and it gives back the base.

A program is drawn as data: layers, the order in which they are called, and what they share. A model is made of it, traced,
given adapters at random sites, copied in ways that other people copy graphs, and folded.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  registers transformers::grouped_mm_fallback
from architectures import few
from conftest import all_acting
from graph_diff import first_difference
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional

import lora_fx
from lora_fx.folding.fold import recipe
from lora_fx.graph.adapter_names import is_factor
from lora_fx.sites.call_sites import sites

aten = torch.ops.aten

CHECKED = settings(
    deadline=None,
    max_examples=settings.default.max_examples // 4,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

FEWER = settings(CHECKED, max_examples=settings.default.max_examples * 3 // 20)
"""Where each example takes long."""

# Programs.


@dataclass(frozen=True)
class Layer:
    """From ``(batch, sequence, wide)`` to ``(batch, some sequence, high)``; ``inner`` are the layers of a nested one."""

    kind: str
    wide: int
    high: int
    bias: bool = False
    geometry: tuple[Any, ...] = (1, 1, 0, 1, 1)
    inner: tuple[Layer, ...] = ()
    tied: int | None = None


@dataclass(frozen=True)
class Program:
    """A model: its layers, and the order in which they are called. With ``vocabulary`` it begins with an embedding."""

    layers: tuple[Layer, ...]
    calls: tuple[int, ...]
    dtype: torch.dtype
    vocabulary: int = 0
    seed: int = 0


LOWER = {torch.float64: torch.float32, torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}


def made(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(
        torch.randn(*shape, dtype=torch.float64).mul(shape[-1] ** -0.5).to(dtype or torch.get_default_dtype())
    )


class Drawn(nn.Module):
    """A layer with a matrix ``w`` of its own, and perhaps a bias."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.w = made(*self.shape(layer.wide, layer.high))
        self.b = made(layer.high) if layer.bias else None

    def shape(self, wide: int, high: int) -> tuple[int, ...]:
        return high, wide

    def plus(self, value: torch.Tensor) -> torch.Tensor:
        return value if self.b is None else value + self.b


class OutIn(Drawn):
    """``x @ w.T``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plus(x @ self.w.T)


class InOut(Drawn):
    """``x @ w``."""

    def shape(self, wide: int, high: int) -> tuple[int, ...]:
        return wide, high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plus(x @ self.w)


class Addmm(InOut):
    """GPT-2's ``Conv1D``, and the product of two matrices where there is no bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.size(-1))
        value = torch.mm(flat, self.w) if self.b is None else torch.addmm(self.b, flat, self.w)
        return value.view(*x.shape[:-1], -1)


class Strided(Drawn):
    """A weight that lies transposed in memory."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.w = nn.Parameter(self.w.detach().T.contiguous().T)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.w, self.b)


class CastUp(Drawn):
    """A weight that is stored in another type than that of the product."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.w = nn.Parameter(self.w.detach().to(LOWER[self.w.dtype]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.w.to(x.dtype), self.b)


class CastDown(Drawn):
    """A product in another type than that of all else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = LOWER[x.dtype]
        return self.plus((x.to(other) @ self.w.to(other).T).to(x.dtype))


class WideBias(Drawn):
    """A product to which a bias of more precision is added, which all else then has."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        lower = LOWER[self.w.dtype]
        self.w, self.b = nn.Parameter(self.w.detach().to(lower)), made(layer.high)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = self.plus(x.to(self.w.dtype) @ self.w.T)
        return value if value.dtype == x.dtype else value.to(x.dtype)


class BothLayouts(Drawn):
    """One weight in both layouts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plus(functional.linear(torch.tanh(functional.linear(x, self.w)), self.w.T))


class Conv(nn.Module):
    """A convolution over the sequence, or over the sequence and a dimension of one."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.flat = layer.kind == "conv1d"
        kernel, stride, padding, dilation, groups = layer.geometry
        made_of = nn.Conv1d if self.flat else nn.Conv2d
        self.conv = made_of(layer.wide, layer.high, kernel, stride, padding, dilation, groups, layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.transpose(1, 2)
        value = self.conv(channels if self.flat else channels.unsqueeze(-1))
        return value.flatten(2).transpose(1, 2)


EXPERTS = 3


class Experts(nn.Module):
    """A stack of matrices: all of them at every position, or one at each."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.how = layer.kind.removeprefix("experts ")
        out_in = self.how == "left" or layer.bias
        self.w = made(EXPERTS, layer.high, layer.wide) if out_in else made(EXPERTS, layer.wide, layer.high)
        self.swapped = out_in and self.how != "left"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.size(-1))
        w = self.w.transpose(1, 2) if self.swapped else self.w
        return self._multiplied(flat, w).view(*x.shape[:-1], -1)

    def _multiplied(self, flat: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        rows = flat.size(0)
        if self.how == "all":
            return torch.bmm(flat.expand(EXPERTS, -1, -1), w).sum(0)
        if self.how == "broadcast":
            return torch.matmul(flat, w).sum(0)
        if self.how == "grouped":
            ends = (torch.arange(1, EXPERTS + 1) * rows // EXPERTS).to(torch.int32)
            return torch.ops.transformers.grouped_mm_fallback(flat, w, offs=ends)
        ids = torch.arange(rows) % EXPERTS
        if self.how == "left":
            return torch.bmm(w[ids], flat.unsqueeze(-1)).squeeze(-1)
        return torch.bmm(flat.unsqueeze(1), self.w[ids].transpose(1, 2) if self.swapped else w[ids]).squeeze(1)


class Nested(nn.Module):
    """Layers in a module of a module."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.block = nn.Sequential(*(module_of(inner) for inner in layer.inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.block(x))


# Decoys: linear in x, or nearly so, and no branches.


class Residual(nn.Module):
    """A low-rank residual that somebody wrote by hand."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(layer.wide, 2, bias=layer.bias), nn.Linear(2, layer.high, bias=False)
        self.main = nn.Linear(layer.wide, layer.high)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x) + self.up(self.down(x)) * 0.5


class Parallel(nn.Module):
    """Two linears of one input, added."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(layer.wide, layer.high), nn.Linear(layer.wide, layer.high, bias=layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) + self.two(x)


class LowRankWeight(nn.Module):
    """A weight that is a product of two."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.a, self.b = made(layer.wide, 2), made(2, layer.high)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.a @ self.b)


class Woven(nn.Module):
    """A square weight that is an input, an addend or a factor of products too, of its own even."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.kind = layer.kind.removeprefix("woven ")
        self.woven, self.other = made(layer.wide, layer.wide), made(layer.wide, layer.wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "gram":
            return x @ functional.linear(self.woven, self.woven)
        if self.kind == "addend":
            return x @ torch.addmm(self.woven, self.other, self.woven)
        return functional.linear(x, self.woven) @ torch.matmul(self.woven, self.other)


class Named(nn.Module):
    """Parameters whose names are nearly those of factors."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.main = nn.Linear(layer.wide, layer.high)
        self.lora_A, self.lora_B = nn.Linear(layer.wide, 2, bias=False), nn.Linear(2, layer.high, bias=False)
        self.lora_Ax = nn.ModuleDict({"default": nn.Linear(layer.wide, 2, bias=False)})
        self.mylora_B = nn.ModuleDict({"default": nn.Linear(2, layer.high, bias=False)})
        self.lora = nn.ModuleDict({"default": nn.Linear(layer.wide, layer.high, bias=layer.bias)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = self.main(x) + self.lora_B(self.lora_A(x)) * 0.5 + self.lora["default"](x)
        return value + self.mylora_B["default"](self.lora_Ax["default"](x))


class Trained(nn.Module):
    """A module with the name that stands before an adapter's trained copies."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.trained = nn.ModuleDict({"default": nn.Linear(layer.wide, layer.high, bias=layer.bias)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trained["default"](x)


class Gate(nn.Module):
    """A product of two activations."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(layer.wide, layer.high), nn.Linear(layer.wide, layer.high, bias=layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value(x) * torch.sigmoid(self.gate(x))


class InPlace(nn.Module):
    """An input that is overwritten once it was read, before or after a bias is added."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.w, self.b = made(layer.wide, layer.high), made(layer.high)
        self.before_bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.5
        value = x @ self.w
        if self.before_bias:
            x.mul_(0.5)
            value = value + self.b
        else:
            value = value + self.b
            x.mul_(0.5)
        return value + x.sum(-1, keepdim=True)


class Pointwise(nn.Module):
    """What is not linear and has no weight, or next to none."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.kind, self.norm = layer.kind, nn.LayerNorm(layer.wide) if layer.kind == "norm" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self.kind:
            case "gelu":
                return functional.gelu(x)
            case "softmax":
                return x + x.softmax(-1)
            case "attention":
                return x + functional.scaled_dot_product_attention(x, x, x)
            case "norm" if self.norm is not None:
                return self.norm(x)
        return x * torch.tanh(x)


class Linear(nn.Linear):
    def __init__(self, layer: Layer) -> None:
        super().__init__(layer.wide, layer.high, bias=layer.bias)


class Dropped(Linear):
    """A linear of a dropped input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(functional.dropout(x, 0.3, self.training))


POINTWISE = ("gelu", "softmax", "attention", "norm", "square")
WOVEN = ("woven gram", "woven addend", "woven factor")
KINDS: Mapping[str, Callable[[Layer], nn.Module]] = {
    "linear": Linear,
    "dropped": Dropped,
    "out in": OutIn,
    "in out": InOut,
    "addmm": Addmm,
    "strided": Strided,
    "cast up": CastUp,
    "cast down": CastDown,
    "wide bias": WideBias,
    "both layouts": BothLayouts,
    "conv1d": Conv,
    "conv2d": Conv,
    **dict.fromkeys((f"experts {how}" for how in ("all", "broadcast", "left", "right", "grouped")), Experts),
    "nested": Nested,
    "residual": Residual,
    "parallel": Parallel,
    "low-rank weight": LowRankWeight,
    "named": Named,
    "trained": Trained,
    "gate": Gate,
    "in place": InPlace,
    **dict.fromkeys(WOVEN, Woven),
    **dict.fromkeys(POINTWISE, Pointwise),
}
SQUARE = (*POINTWISE, *WOVEN, "both layouts")


def module_of(layer: Layer) -> nn.Module:
    return KINDS[layer.kind](layer)


class Model(nn.Module):
    """The model that a program is."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        first = program.layers[0].wide
        self.embed = nn.Embedding(program.vocabulary, first) if program.vocabulary else None
        self.layers = nn.ModuleList(module_of(layer) for layer in program.layers)
        for layer, module in zip(program.layers, self.layers, strict=True):
            if layer.tied is not None:
                module.weight = self.layers[layer.tied].weight
        self.calls = program.calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = x if self.embed is None else self.embed(x)
        for index in self.calls:
            value = self.layers[index](value)
        return value


def build(program: Program) -> nn.Module:
    torch.manual_seed(program.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(program.dtype)
    try:
        return Model(program).eval()
    finally:
        torch.set_default_dtype(before)


def inputs(program: Program, batch: int, sequence: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    if program.vocabulary:
        return torch.randint(program.vocabulary, (batch, sequence), generator=generator)
    drawn = torch.randn(batch, sequence, program.layers[0].wide, dtype=torch.float64, generator=generator)
    return drawn.to(program.dtype)


# Strategies.

WIDTHS = st.sampled_from([4, 6, 8])
# Kernel, stride, padding, dilation: such that no sequence gets too short.
LINES = ((1, 1, 0, 1), (3, 1, 1, 1), (3, 1, 2, 2), (3, 2, 1, 1), (2, 1, 1, 1), (3, 1, "same", 1), (3, 1, "same", 2))
PLANES = (
    *(((1, 1), 1, 0, 1), ((3, 1), 1, (1, 0), 1), ((3, 3), (2, 1), 1, 1), ((1, 3), 1, "same", 1)),
    *(((2, 2), 1, 1, 1), ((3, 1), 1, "same", (2, 1)), (1, (2, 1), 0, 1)),
)


@st.composite
def layers(draw: st.DrawFn, wide: int, kinds: Sequence[str], depth: int = 0) -> Layer:
    kind = draw(st.sampled_from(kinds))
    high = wide if kind in SQUARE else draw(WIDTHS)
    layer = Layer(kind, wide, high, bias=draw(st.booleans()))
    if kind in ("conv1d", "conv2d"):
        shape = draw(st.sampled_from(LINES if kind == "conv1d" else PLANES))
        return replace(layer, geometry=(*shape, draw(st.sampled_from([1, 2]))))
    if kind != "nested":
        return layer
    flat = [each for each in kinds if each != "nested" or depth == 0] if set(kinds) != {"nested"} else ["linear"]
    inner = [draw(layers(wide, flat, depth + 1))]
    while draw(st.booleans()) and len(inner) < 3:
        inner.append(draw(layers(inner[-1].high, flat, depth + 1)))
    return replace(layer, inner=tuple(inner), high=inner[-1].high)


@st.composite
def programs(
    draw: st.DrawFn, kinds: Sequence[str] = tuple(KINDS), most: int = 5, dtypes: Sequence[torch.dtype] = tuple(LOWER)
) -> Program:
    width = draw(WIDTHS)
    vocabulary = draw(st.sampled_from([0, 0, 11]))
    drawn: list[Layer] = []
    calls: list[int] = []
    while not calls or (len(calls) < most and draw(st.integers(0, 4)) > 0):
        again = [index for index, layer in enumerate(drawn) if layer.wide == width]
        twins = [i for i in again if drawn[i].kind == "linear" and drawn[i].tied is None]
        how = draw(st.sampled_from(["new", "new", *(["again"] * bool(again)), *(["tied"] * bool(twins))]))
        if how == "again":
            calls.append(draw(st.sampled_from(again)))
        else:
            calls.append(len(drawn))
            twin = draw(st.sampled_from(twins)) if how == "tied" else None
            drawn.append(draw(layers(width, kinds)) if twin is None else replace(drawn[twin], tied=twin))
        width = drawn[calls[-1]].high
    return Program(tuple(drawn), tuple(calls), draw(st.sampled_from(dtypes)), vocabulary, draw(st.integers(0, 99)))


@dataclass(frozen=True)
class Adapter:
    """Which sites get a branch (those at which ``mask``, repeated, is true), and of what kind."""

    mask: tuple[bool, ...]
    rank: int
    alpha: float
    each: bool = False
    copies: tuple[str, ...] = ()


def cleaned(graph_module: lora_fx.TracedGraphModule) -> lora_fx.TracedGraphModule:
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


COPIES: Mapping[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda graph_module: pickle.loads(pickle.dumps(graph_module)),
    "dead code": cleaned,
    "trace": lora_fx.trace,
}


ADAPTERS = st.builds(
    Adapter,
    mask=st.lists(st.booleans(), min_size=1, max_size=8).map(tuple),
    rank=st.integers(1, 2),
    alpha=st.sampled_from([1.0, 3.0, 7.0]),
    each=st.sampled_from([False, False, True]),
    copies=st.lists(st.sampled_from(sorted(COPIES)), max_size=2).map(tuple),
)


# What a graph with branches is, and what must come of it.


@dataclass
class Branched:
    """A graph with branches, and which keys of branches are at which of its sites."""

    program: Program
    model: nn.Module
    base: lora_fx.TracedGraphModule
    graph: lora_fx.TracedGraphModule
    keys: dict[str, set[tuple[str, str]]]
    lost: bool = False
    precision: torch.dtype = torch.float64

    @property
    def adapted(self) -> set[str]:
        return {site.weight for site in sites(self.base) if self.keys[site.node]}

    @property
    def conflicting(self) -> set[str]:
        """The weights whose uses need different values."""
        values = defaultdict(set)
        for site in sites(self.base):
            keys = frozenset(self.keys[site.node])
            values[site.weight].add((keys, site.layout if keys else None))
        apart = {weight for weight, different in values.items() if len(different) > 1}
        return apart | {weight for weight in self.adapted if weight.endswith("woven")}

    @property
    def tolerance(self) -> float:
        dtypes = {p.dtype for p in self.model.parameters()} | {self.program.dtype, self.precision}
        if any(layer.kind == "cast down" for layer in flattened(self.program.layers)):
            dtypes.add(LOWER[self.program.dtype])
        return max(TOLERANCE[dtype] for dtype in dtypes)

    def differs(self, one: fx.GraphModule, other: fx.GraphModule) -> float:
        """Return by how much two graphs differ at another batch size, in units of the tolerance."""
        x = inputs(self.program, 5)
        mine, theirs = (run(graph, x) for graph in (one, other))
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        mine, theirs = mine.double(), theirs.double()
        return ((mine - theirs).abs().max() / (mine.abs().max() + 1e-6)).item() / self.tolerance


def run(graph_module: fx.GraphModule, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)  # dropout that always drops
    with torch.no_grad():
        return graph_module(x)


def flattened(layers: Sequence[Layer]) -> list[Layer]:
    return [each for layer in layers for each in (layer, *flattened(layer.inner))]


def set_factors(graph_module: nn.Module, seed: int) -> None:
    """Make every factor a known value that is not zero; names that are nearly a factor's are none."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(graph_module.named_parameters()):
            if is_factor(name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def branched(program: Program, adapters: Sequence[Adapter], seed: int = 11) -> Branched:
    model = build(program)
    base = lora_fx.trace(model, (inputs(program, 3),), inference=True)
    made = Branched(program, model, base, base, defaultdict(set))
    for number, adapter in enumerate(adapters):
        rules = rules_of(made.graph, adapter)
        if rules is not None:
            name = f"adapter{number}"
            for chosen in lora_fx.plan(made.graph, rules).chosen:
                made.keys[chosen.site.node] |= {(name, branch.key) for branch in chosen.branches}
            made.graph = all_acting(lora_fx.rewrite(made.graph, rules, adapter=name))
            set_factors(made.graph, seed)
        for name in adapter.copies:
            made.graph = COPIES[name](made.graph)
            made.lost |= name == "pickle"
    return made


def rules_of(graph_module: lora_fx.TracedGraphModule, adapter: Adapter) -> dict[str, Any] | None:
    found, layouts = {site.module: site for site in sites(graph_module)}, defaultdict(set)
    for site in sites(graph_module):
        layouts[site.module].add(site.layout)
    mask = [adapter.mask[index % len(adapter.mask)] for index in range(len(found))]
    select = [
        {
            "target": [module],
            "rank": adapter.rank * (site.matrices if site.kernel else 1),
            "alpha": adapter.alpha,
            "calls": "each" if adapter.each or len(layouts[module]) > 1 else "all",
        }
        for (module, site), chosen in zip(found.items(), mask, strict=True)
        if chosen
    ]

    return {"select": select} if select else None


@CHECKED
@given(programs(), st.lists(ADAPTERS, min_size=1, max_size=2))
def test_a_fold_computes_what_the_branches_compute_and_gives_back_the_base(
    program: Program, adapters: list[Adapter]
) -> None:
    check(branched(program, adapters))


LAYERS = [kind for kind in KINDS if kind not in POINTWISE]


@pytest.mark.parametrize(
    ("kind", "bias"),
    few(itertools.product(LAYERS, (False, True)), [(kind, index % 2 == 0) for index, kind in enumerate(LAYERS)]),
    ids=lambda value: value if isinstance(value, str) else ("plain", "biased")[value],
)
def test_each_kind_of_layer_folds_where_its_weight_has_one_value_after_it(kind: str, bias: bool) -> None:
    wide, high = (6, 6) if kind in SQUARE else (6, 8)
    inner = (Layer("linear", 6, 4, bias), Layer("in out", 4, 8, bias)) if kind == "nested" else ()
    geometry = {"conv1d": (*LINES[3], 2), "conv2d": (*PLANES[2], 2)}.get(kind, Layer.geometry)
    program = Program((Layer(kind, wide, high, bias, geometry, inner),), (0,), torch.float32)
    check(branched(program, [Adapter((True,), 2, 3.0), Adapter((True,), 1, 2.0)]))


def check(made: Branched) -> None:
    check_base_is_a_fixed_point(made)
    check_unload(made)
    if made.conflicting:
        check_refused(made)
        check_untied(made)
    else:
        check_folded(made)


def check_base_is_a_fixed_point(made: Branched) -> None:
    for same in (lora_fx.fold(made.base), lora_fx.unload(made.base)):
        assert first_difference(made.base, same) is None
    assert recipe(made.base) == ()


def check_unload(made: Branched) -> None:
    unloaded = lora_fx.unload(made.graph)
    assert first_difference(made.base, unloaded) is None
    assert list(unloaded.state_dict()) == list(made.base.state_dict())
    assert all(torch.equal(tensor, made.base.state_dict()[name]) for name, tensor in unloaded.state_dict().items())


def folded_or_refused(
    graph_module: fx.GraphModule, *, unshare: bool = False
) -> tuple[lora_fx.TracedGraphModule | None, str]:
    """Return what a graph folds to, or why it does not."""
    try:
        return lora_fx.fold(graph_module, unshare=unshare), ""
    except lora_fx.FoldError as error:
        return None, str(error)


def check_refused(made: Branched) -> None:
    folded, reason = folded_or_refused(made.graph)
    assert folded is None, f"{made.conflicting} need different values at their uses, and were folded"
    assert any(repr(weight) in reason for weight in made.conflicting), reason
    with pytest.raises(lora_fx.FoldError):
        recipe(made.graph)


def check_untied(made: Branched) -> None:
    """Fail unless untying computes what the branches do, or cannot be done for want of metadata."""
    before = {name: tensor.clone() for name, tensor in made.graph.state_dict().items()}
    untied, reason = folded_or_refused(made.graph, unshare=True)
    if untied is None:
        woven = any(weight.endswith("woven") for weight in made.conflicting)
        assert woven or (made.lost and "no longer says" in reason), reason
        return
    assert made.differs(made.graph, untied) < 1
    assert set(made.base.state_dict()) <= set(untied.state_dict())
    assert not any(".lora_A.adapter" in name or ".lora_B.adapter" in name for name in untied.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.graph.state_dict().items())


def check_folded(made: Branched) -> None:
    folded = lora_fx.fold(made.graph)
    assert made.differs(made.graph, folded) < 1
    assert first_difference(made.base, folded) is None
    assert list(folded.state_dict()) == list(made.base.state_dict())
    assert {merge.weight for merge in recipe(made.graph)} == made.adapted
    check_weights(made, folded)
    if made.adapted:
        mine, theirs = (each(inputs(made.program, 5)) for each in (made.graph, made.base))
        assert not torch.equal(mine, theirs)
    check_folded_in_place(made, folded)


def check_weights(made: Branched, folded: lora_fx.TracedGraphModule) -> None:
    """Fail unless all tensors but the adapted ones are those of the base, bit for bit, and in its memory if nothing was copied."""
    shared = {name: tensor.data_ptr() for name, tensor in made.graph.state_dict().items()}
    names = {name for name, first in _aliases(made.base).items() if first in made.adapted}
    for name, tensor in folded.state_dict().items():
        if name in names:
            assert tensor.data_ptr() != shared[name]
            assert not torch.equal(tensor, made.base.state_dict()[name])
        else:
            assert tensor.data_ptr() == shared[name]
            assert torch.equal(tensor, made.base.state_dict()[name])


def _aliases(graph_module: fx.GraphModule) -> dict[str, str]:
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in graph_module.named_parameters(remove_duplicate=False)}


def check_folded_in_place(made: Branched, folded: lora_fx.TracedGraphModule) -> None:
    again = lora_fx.fold(copy.deepcopy(made.graph), inplace=True)
    assert first_difference(made.base, again) is None
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, folded.state_dict()[name])


@FEWER
@given(programs(dtypes=(torch.float64,)), st.lists(ADAPTERS, min_size=1, max_size=2))
def test_a_copy_that_torch_fx_made_is_refused_or_folds_to_what_it_computes(
    program: Program, adapters: list[Adapter]
) -> None:
    made = branched(program, adapters)
    assume(made.adapted)
    transformed = fx.Transformer(made.graph).transform()
    for unshare in (False, True):
        folded, _ = folded_or_refused(transformed, unshare=unshare)
        event("refused" if folded is None else "folded")
        if folded is not None:
            assert unshare or not made.conflicting
            assert made.differs(made.graph, folded) < 1


# Branches that somebody changed. Each of these edits a graph in place, at a node of a branch.

Edit = Callable[["Place"], None]


@dataclass
class Place:
    """Where an edit is made, and what it may take from the rest of the graph."""

    graph: fx.Graph
    node: fx.Node
    draw: Callable[[Sequence[fx.Node]], fx.Node]

    def call(self, target: Any, *args: Any) -> fx.Node:
        """Write a node behind the last one that was written."""
        with self.graph.inserting_after(self.node):
            self.node = self.graph.call_function(target, args)
        return self.node

    def put_behind(self, *steps: tuple[Any, ...]) -> None:
        """Let what reads the node read what these steps make of it. ``None`` stands for the value of the step before."""
        users = list(self.node.users)
        first = self.node
        for target, *args in steps:
            last = self.node
            self.call(target, *(last if arg is None else arg for arg in args))
        for user in users:
            user.replace_input_with(first, self.node)

    @property
    def before(self) -> list[fx.Node]:
        """Activations that are computed before the node and are no part of a branch."""
        order = list(self.graph.nodes)
        earlier = order[: order.index(self.node)]
        return [n for n in earlier if n.op in ("placeholder", "call_function") and not part_of(n) and is_real(n)]

    def branch(self, part: str) -> list[fx.Node]:
        """All nodes of branches with this part that compute."""
        return [n for n in self.graph.nodes if part_of(n) == part and n.op == "call_function"]


def part_of(node: fx.Node) -> str | None:
    part: str | None = node.meta.get("custom", {}).get("lora_fx", {}).get("part")
    return part


def is_real(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0


def behind(*steps: tuple[Any, ...]) -> Edit:
    return lambda place: place.put_behind(*steps)


def mul_by_activation(place: Place) -> None:
    place.put_behind((aten.mul.Tensor, None, place.draw(place.before)))


def mul_by_vector(place: Place) -> None:
    """Multiply by one number for each feature, which an activation gives."""
    other = place.draw(place.before)
    node, before = place.node, list(place.node.users)
    mean = place.call(aten.mean.dim, other, list(range(other.meta["val"].dim() - 1)))
    scaled = place.call(aten.mul.Tensor, node, mean)
    for user in before:
        user.replace_input_with(node, scaled)


def swap_source(place: Place) -> None:
    """Let the first product of a branch read something else."""
    place.node = place.draw([n for n in place.branch("A") if is_real(n.args[0])])
    place.node.replace_input_with(place.node.args[0], place.draw(place.before))


def swap_site_input(place: Place) -> None:
    """Let a site read something else than its branch does."""
    place.node = place.draw([n for n in place.graph.nodes if n.target is aten.linear.default and not part_of(n)])
    place.node.replace_input_with(place.node.args[0], place.draw(place.before))


def swap_sums(place: Place) -> None:
    """Let a branch be added elsewhere."""
    place.node = place.draw(place.branch("add"))
    place.node.replace_input_with(place.node.args[0], place.draw(place.before))


def read_early(place: Place) -> None:
    """Read the output of a site before its branch is added."""
    end = place.node = place.draw(place.branch("add"))
    users = list(end.users)
    total = place.call(aten.add.Tensor, end, place.call(aten.sin.default, end.args[0]))
    for user in users:
        user.replace_input_with(end, total)


def overwrite_source(place: Place) -> None:
    """Overwrite what a site has read before its branch reads it, or a copy of which that has a part."""
    first = place.draw([n for n in place.branch("A") if is_real(n.args[0])])
    place.node = first.prev
    source = first.args[0]
    if place.draw([first, source]) is source:
        source = place.call(aten.view.default, source, [-1])
    place.call(aten.mul_.Tensor, source, 0.5)


def overwrite(place: Place) -> None:
    """Overwrite a value of a branch, seen through a view."""
    place.call(aten.mul_.Tensor, place.call(aten.alias.default, place.node), 0.5)


def swap_factor(place: Place) -> None:
    """Let a branch multiply by another tensor of the graph."""
    place.node = place.draw([n for n in place.graph.nodes if n.op == "get_attr" and part_of(n)])
    others = [
        n for n in place.graph.nodes if n.op == "get_attr" and n.meta["val"].shape == place.node.meta["val"].shape
    ]
    place.node.target = place.draw(others).target


def subtract(place: Place) -> None:
    place.node = place.draw(place.branch("add"))
    place.node.target = aten.sub.Tensor


def exchange(place: Place) -> None:
    """Exchange the operands of a sum."""
    place.node = place.draw(place.branch("add"))
    place.node.args = place.node.args[::-1]


def add_twice(place: Place) -> None:
    place.put_behind((aten.add.Tensor, None, place.node))


def drop(place: Place) -> None:
    """Leave a node out."""
    place.node.replace_all_uses_with(place.draw([n for n in place.node.all_input_nodes if is_real(n)]))


EDITS: Mapping[str, Edit] = {
    # Not linear, or not constant.
    "gelu": behind((aten.gelu.default, None)),
    "relu": behind((aten.relu.default, None)),
    "sigmoid": behind((aten.sigmoid.default, None)),
    "abs": behind((aten.abs.default, None)),
    "dropout": behind((aten.dropout.default, None, 0.5, True)),
    "shift": behind((aten.add.Tensor, None, 1.0)),
    "square": behind((aten.pow.Tensor_Scalar, None, 2)),
    "to int": behind((aten.to.dtype, None, torch.int32), (aten.to.dtype, None, torch.float64)),
    "divide": behind((aten.div.Tensor, 2.0, None)),
    "activation": mul_by_activation,
    "vector": mul_by_vector,
    "softmax": behind((aten.softmax.int, None, -1)),
    "cumsum": behind((aten.cumsum.default, None, 0)),
    "in place": behind((aten.relu_.default, None)),
    "scale in place": behind((aten.mul_.Tensor, None, 2.0)),
    # Other places.
    "unsqueeze first": behind((aten.unsqueeze.default, None, 0)),
    "unsqueeze in the middle": behind((aten.unsqueeze.default, None, -2)),
    "squeeze": behind((aten.unsqueeze.default, None, 0), (aten.squeeze.dim, None, 0)),
    "transpose": behind((aten.transpose.int, None, 0, 1)),
    "transpose last": behind((aten.transpose.int, None, -2, -1)),
    "permute": behind((aten.transpose.int, None, 0, 1), (aten.clone.default, None), (aten.transpose.int, None, 0, 1)),
    "flip": behind((aten.flip.default, None, [0])),
    "flip last": behind((aten.flip.default, None, [-1])),
    "roll": behind((aten.roll.default, None, [1], [0])),
    "reverse order": behind((aten.numpy_T.default, None), (aten.reshape.default, None, [-1])),
    "sum": behind((aten.sum.dim_IntList, None, [0], True)),
    "flatten": behind((aten.view.default, None, [-1])),
    # Linear all the same, where a fold can go on.
    "negate": behind((aten.neg.default, None)),
    "scale": behind((aten.mul.Tensor, None, -2.0)),
    "quotient": behind((aten.div.Tensor, None, 4.0)),
    "copy": behind((aten.clone.default, None), (aten.contiguous.default, None)),
    "cast": behind((aten.to.dtype, None, torch.float32), (aten.to.dtype, None, torch.float64)),
    "twice": add_twice,
    "subtract": subtract,
    "exchange": exchange,
    # Other connections.
    "source": swap_source,
    "site's input": swap_site_input,
    "sum elsewhere": swap_sums,
    "early": read_early,
    "overwrite source": overwrite_source,
    "overwrite": overwrite,
    "factor": swap_factor,
    "drop": drop,
}


def edited(made: Branched, name: str, chance: random.Random) -> Branched | None:
    """Return the graph with an edit somewhere, or None where that cannot be made or the result does not run."""
    graph_module = copy.deepcopy(made.graph)
    parts = [node for node in graph_module.graph.nodes if part_of(node)]
    try:
        # IndexError: there is no node for an edit; the others: its result is no graph, or does not run.
        EDITS[name](Place(graph_module.graph, chance.choice(parts), chance.choice))
        refresh(graph_module)
        graph_module.graph.lint()
        graph_module.recompile()
        result = run(graph_module, inputs(made.program, 5))
    except (RuntimeError, IndexError, ValueError, AssertionError):
        return None
    precision = torch.float32 if name == "cast" else torch.float64
    return replace(made, graph=graph_module, precision=precision) if torch.isfinite(result).all() else None


def refresh(graph_module: fx.GraphModule) -> None:
    """Bring the fake values of a graph up to date."""
    mode = next(n.meta["val"].fake_mode for n in graph_module.graph.nodes if n.op == "placeholder")
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = mode.from_tensor(_attribute(graph_module, str(node.target)), static_shapes=True)
        elif node.op == "call_function" and all("val" in n.meta for n in node.all_input_nodes):
            arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with mode:
                node.meta["val"] = node.target(*arguments, **keywords)


def _attribute(module: Any, name: str) -> torch.Tensor:
    for part in name.split("."):
        module = getattr(module, part)
    return module.detach()


FACTORED = [kind for kind in KINDS if kind not in (*POINTWISE, *WOVEN, "both layouts")]


@FEWER
@given(programs(FACTORED, most=3, dtypes=(torch.float64,)), ADAPTERS, st.integers(0, 2**32 - 1))
def test_a_changed_branch_is_refused_by_node_or_folds_to_what_it_computes(
    program: Program, adapter: Adapter, seed: int
) -> None:
    made = branched(program, [replace(adapter, copies=(), mask=(True, *adapter.mask))])
    assume(made.adapted and not made.conflicting)
    chance = random.Random(seed)
    for name in chance.sample(sorted(EDITS), 10):
        changed = edited(made, name, chance)
        if changed is not None:
            check_refused_or_equal(changed, name)


def check_refused_or_equal(changed: Branched, name: str) -> None:
    folded, reason = folded_or_refused(changed.graph)
    event(f"{name}: {'refused' if folded is None else 'folded'}")
    if folded is None:
        assert any(node.name in reason for node in changed.graph.graph.nodes), reason
    else:
        assert changed.differs(changed.graph, folded) < 1, f"{name} is folded to something else"


# What the properties above reach seldom, or not at all.


def with_factors(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> nn.Module:
    """Return a module ``lin`` with factors beside it, for a graph that is written by hand."""
    root = nn.Module()
    for name, tensor in (("", weight), (".lora_A.default", a), (".lora_B.default", b)):
        module = root
        for part in f"lin{name}".split("."):
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.weight = nn.Parameter(tensor.double())
    return root


def by_hand(root: nn.Module, write: Callable[..., fx.Node]) -> fx.GraphModule:
    """Return a graph; ``write`` gets its ``call_function``, the input, the weight and both factors."""
    graph = fx.Graph()
    names = ("lin.weight", "lin.lora_A.default.weight", "lin.lora_B.default.weight")
    nodes = [graph.placeholder("x"), *map(graph.get_attr, names)]
    graph.output(write(lambda target, *args: graph.call_function(target, args), *nodes))
    return fx.GraphModule(root, graph)


def check_hand_written(graph_module: fx.GraphModule, x: torch.Tensor) -> None:
    """Fail unless the graph is refused, or folds to what it computes."""
    folded, _ = folded_or_refused(copy.deepcopy(graph_module))
    if folded is not None:
        assert torch.allclose(run(graph_module, x.clone()), run(folded, x.clone()), rtol=0, atol=1e-10)


def test_a_kernel_that_a_view_of_its_factor_has_is_not_taken_for_that_of_the_site() -> None:
    root = with_factors(torch.randn(5, 4, 3, 1), torch.randn(2, 4, 3, 1), torch.randn(5, 2, 1, 1))

    def write(call: Callable[..., fx.Node], x: fx.Node, w: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
        turned = call(aten.view.default, a, [2, 4, 1, 3])
        down = call(aten.conv2d.padding, x, turned, None, [1, 1], "same")
        return call(
            aten.add.Tensor, call(aten.conv2d.padding, x, w, None, [1, 1], "same"), call(aten.conv2d.default, down, b)
        )

    check_hand_written(by_hand(root, write), torch.randn(2, 4, 6, 6, dtype=torch.float64))


def overwritten(what: str, call: Callable[..., fx.Node], x: fx.Node, scale: fx.Node) -> fx.Node:
    """Overwrite something between a site of ``x`` and its branch, and return what the branch reads."""
    match what:
        case "scale":
            call(aten.mul_.Tensor, scale, 0.5)
        case "input":
            call(aten.mul_.Tensor, x, 0.5)
        case "view":
            call(aten.mul_.Tensor, call(aten.view.default, x, [-1]), 0.5)
        case "copy":
            copied = call(aten.clone.default, x)
            call(aten.mul_.Tensor, copied, 0.5)
            return copied
        case "original":
            copied = call(aten.clone.default, x)
            call(aten.mul_.Tensor, x, 0.5)
            return copied
        case "module":
            x.graph.call_module("act", (x,))
    return x


@pytest.mark.parametrize("first", ["site", "branch"])
@pytest.mark.parametrize("what", ["scale", "input", "view", "copy", "original", "module", "nothing"])
def test_a_value_that_is_overwritten_before_it_is_read_again_is_not_folded_as_it_was(what: str, first: str) -> None:
    root = with_factors(torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 2))
    root.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))
    root.act = nn.ReLU(inplace=True)

    def write(call: Callable[..., fx.Node], x: fx.Node, w: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
        scale = x.graph.get_attr("scale")
        before = call(aten.linear.default, x, w) if first == "site" else None
        branch = call(aten.linear.default, call(aten.linear.default, overwritten(what, call, x, scale), a), b)
        site = before or call(aten.linear.default, x, w)
        return call(aten.add.Tensor, site, call(aten.mul.Tensor, branch, scale))

    check_hand_written(by_hand(root, write), torch.randn(3, 4, dtype=torch.float64))


def test_a_part_of_a_branch_that_is_overwritten_through_an_alias_is_not_folded_as_it_was() -> None:
    root = with_factors(torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 2))

    def write(call: Callable[..., fx.Node], x: fx.Node, w: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
        down = call(aten.linear.default, x, a)
        twice = call(aten.add_.Tensor, call(aten.alias.default, down), down)
        ups = [call(aten.linear.default, each, b) for each in (down, twice)]
        return call(aten.add.Tensor, call(aten.add.Tensor, call(aten.linear.default, x, w), ups[0]), ups[1])

    check_hand_written(by_hand(root, write), torch.randn(3, 4, dtype=torch.float64))


def test_a_trained_copy_of_a_layer_called_lora_a_is_no_factor() -> None:
    model = Named(Layer("named", 4, 6)).double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    rules = {"select": [{"target": ["main"], "rank": 2}, {"target": ["lora_A"], "trainable": "all"}]}
    graph_module = lora_fx.rewrite(model, rules, example_inputs=(x,)).eval()
    with torch.no_grad():
        for parameter in graph_module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    folded = lora_fx.fold(graph_module)
    assert list(folded.state_dict()) == list(model.state_dict())
    assert torch.allclose(run(folded, x), run(graph_module, x), rtol=0, atol=1e-10)
