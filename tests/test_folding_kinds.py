"""A branch at every kind of site, equal to PEFT's where PEFT has one, and folded."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import families
import peft
import pytest
import torch
from architectures import few
from conftest import set_factors, unchanged
from graph_diff import first_difference
from torch import nn

import lora_fx
from lora_fx.tracing.example_inputs import example_inputs

pytestmark = pytest.mark.filterwarnings("ignore")

RANK, ALPHA = 2, 3


class Convolutions(nn.Module):
    """One with a kernel, and a pointwise one behind it."""

    def __init__(self, kind: Any, **settings: Any) -> None:
        super().__init__()
        self.wide = kind(6, 8, 3, **settings)
        self.point = kind(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.point(torch.tanh(self.wide(x)))  # type: ignore[no-any-return]


class Table(nn.Module):
    """An embedding with padding, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 5)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(index))  # type: ignore[no-any-return]


class Stacked(nn.Module):
    """Experts that all see all, one stack in each layout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 10)), nn.Parameter(torch.randn(3, 4, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.tanh(torch.bmm(x, self.up)), self.down.transpose(1, 2))


class Chosen(Stacked):
    """One expert a token: with the weight on the right, and on the left."""

    def forward(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        inner = torch.tanh(torch.bmm(x.unsqueeze(1), self.up[experts]).squeeze(1))
        return torch.bmm(self.down[experts], inner.unsqueeze(-1)).squeeze(-1)


class Mixed(nn.Module):
    """Weights behind casts, both ways, and behind a transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 4)
        self.up.bfloat16()
        self.table = nn.Parameter(torch.randn(7, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.tanh(nn.functional.linear(x, self.up.weight.float(), self.up.bias.float()))
        inner = nn.functional.linear(inner.bfloat16(), self.down.weight.bfloat16()).float()
        return inner @ self.table.t()


Case = tuple[nn.Module, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], list[str]]


def _convolutions(kind: Any, *sizes: int, **settings: Any) -> Case:
    model = Convolutions(kind, **settings)
    return model, (torch.randn(2, 6, *sizes),), (torch.randn(3, 6, *sizes),), ["wide", "point"]


def _experts() -> tuple[torch.Tensor, ...]:
    return torch.randn(5, 6), torch.tensor([0, 2, 1, 1, 0])


IN_PEFT: Mapping[str, Any] = {
    "conv1d": lambda: _convolutions(nn.Conv1d, 9, padding=1, stride=2),
    "conv2d": lambda: _convolutions(nn.Conv2d, 9, 7, padding=1, stride=2, bias=False),
    "conv2d circular": lambda: _convolutions(nn.Conv2d, 9, 7, padding=(1, 2)),
    "conv3d": lambda: _convolutions(nn.Conv3d, 5, 4, 6, padding=1),
    "embedding": lambda: (Table(), (torch.randint(0, 11, (2, 5)),), (torch.randint(0, 11, (3, 7)),), ["table", "out"]),
}
NOT_IN_PEFT: Mapping[str, Any] = {
    "conv1d dilated": lambda: _convolutions(nn.Conv1d, 9, dilation=2),  # PEFT's A forgets the dilation
    "conv2d same": lambda: _convolutions(nn.Conv2d, 9, 7, padding="same", dilation=2),
    "conv2d groups": lambda: _convolutions(nn.Conv2d, 9, 7, groups=2),  # PEFT's A mixes the groups
    "conv2d reflected": lambda: _convolutions(nn.Conv2d, 9, 7, padding=1, padding_mode="reflect"),
    "experts": lambda: (Stacked(), (torch.randn(3, 4, 6),), (torch.randn(3, 5, 6),), ["up", "down"]),
    "chosen experts": lambda: (Chosen(), _experts(), (torch.randn(4, 6), torch.tensor([2, 1, 1, 0])), ["up", "down"]),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def _each(kinds: Iterable[str]) -> list[Any]:
    """Return kinds in every dtype, of which each stands in one, and each dtype for some."""
    kinds = list(kinds)
    return few(itertools.product(kinds, DTYPES), list(zip(kinds, itertools.cycle(DTYPES), strict=False)))


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 6e-2}


def converted(tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)


def rewritten(model: nn.Module, example: tuple[torch.Tensor, ...], targets: list[str]) -> Any:
    base = lora_fx.trace(model, example)
    rules = {"select": [{"target": targets}]}
    with unchanged(base):
        return base, lora_fx.rewrite(base, rules, rank=RANK, alpha=ALPHA, seed=5)


@pytest.mark.parametrize(("kind", "dtype"), _each([*IN_PEFT, *NOT_IN_PEFT]), ids=str)
def test_a_branch_at_this_kind_of_site_folds_and_unloads_and_trains(kind: str, dtype: torch.dtype) -> None:
    model, example, other, targets = {**IN_PEFT, **NOT_IN_PEFT}[kind]()
    example, other = converted(example, dtype), converted(other, dtype)
    base, graph_module = rewritten(model.to(dtype).eval(), example, targets)
    assert torch.equal(graph_module(*other), base(*other))  # it starts as the identity
    set_factors(graph_module)
    with unchanged(graph_module):
        folded, unloaded = lora_fx.fold(graph_module), lora_fx.unload(graph_module)
    expected = graph_module(*other)
    scale = max(1.0, float(expected.abs().max()))
    assert expected.dtype == dtype
    assert torch.allclose(folded(*other), expected, rtol=0, atol=TOLERANCE[dtype] * scale)
    assert not torch.allclose(base(*other), expected, rtol=0, atol=0.1)
    assert first_difference(base, folded) is None
    assert first_difference(base, unloaded) is None
    assert list(folded.state_dict()) == list(model.state_dict())
    changed = {n for n, p in folded.named_parameters() if not torch.equal(p, base.get_parameter(n))}
    assert {name.removesuffix(".weight") for name in changed} == set(targets)
    lora_fx.verify(graph_module, folded, other)
    graph_module.train()(*other).square().mean().backward()
    trained = {n for n, p in graph_module.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert trained == {n for n, p in graph_module.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(targets)


@pytest.mark.parametrize(("kind", "dtype"), _each(IN_PEFT), ids=str)
def test_where_peft_has_such_a_layer_starts_and_outputs_are_bit_equal(kind: str, dtype: torch.dtype) -> None:
    model, example, other, targets = IN_PEFT[kind]()
    model, example, other = model.to(dtype).eval(), converted(example, dtype), converted(other, dtype)
    _, graph_module = rewritten(model, example, targets)
    torch.manual_seed(5)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs = [p for name, p in wrapped.named_parameters() if ".lora_" in name]
    mine = [p for name, p in graph_module.named_parameters() if ".lora_" in name]
    assert [p.shape for p in mine] == [p.shape for p in theirs]
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    set_factors(graph_module)
    with torch.no_grad():
        for a, b in zip(mine, theirs, strict=True):
            b.copy_(a)
    assert torch.equal(graph_module(*other), wrapped(*other))
    if kind == "conv3d":  # PEFT 0.21.2 fails to merge a pointwise Conv3d
        with pytest.raises(RuntimeError):
            wrapped.merge_and_unload()
        return
    before = dict(model.named_parameters())
    merged = dict(wrapped.merge_and_unload().named_parameters())
    for name, parameter in lora_fx.fold(graph_module).named_parameters():
        update = (merged[name] - before[name]).abs()
        step = torch.finfo(dtype).eps * (merged[name].abs() + before[name].abs() + update.max())  # PEFT rounds that too
        assert bool(((parameter - merged[name]).abs() <= step).all()), name


@pytest.mark.parametrize("how", few(["grouped_mm", "batched_mm"], ["batched_mm"]))
def test_experts_of_mixtral_equal_target_parameters_of_peft(how: str) -> None:
    model = families.build("mixtral").eval()
    model.set_experts_implementation(how)
    base = lora_fx.trace(model, inference=True)
    rules = {"select": [{"target": ["gate_up_proj", "down_proj"], "op": ["expert"]}]}
    graph_module = lora_fx.rewrite(base, rules, rank=RANK, alpha=ALPHA)
    set_factors(graph_module)
    batch = {k: v for k, v in example_inputs(model, None).kwargs.items() if isinstance(v, torch.Tensor)}
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs = {name: p for name, p in wrapped.named_parameters() if ".lora_" in name}
    for name, parameter in graph_module.named_parameters():
        if ".lora_" in name:
            module, _, rest = name.partition(".parametrizations.")
            of_gate, factor = rest.startswith("gate_up_proj"), rest.partition(".")[2]
            inner = ".base_layer" if of_gate else ""  # PEFT wraps a module once for each of its parameters
            theirs[f"base_model.model.{module}{inner}.{factor}"].data.copy_(parameter)
    folded = lora_fx.fold(graph_module)
    with torch.no_grad():
        mine, expected, merged = (module(**batch)[0] for module in (graph_module, wrapped, folded))
    assert torch.allclose(mine, expected, rtol=0, atol=2e-6)
    assert torch.allclose(mine, merged, rtol=0, atol=2e-6)
    assert not torch.allclose(mine, base(**batch)[0], rtol=0, atol=1e-2)
    assert first_difference(base, folded) is None
    weights = dict(wrapped.merge_and_unload().named_parameters())
    for name, parameter in folded.named_parameters():
        assert torch.allclose(parameter, weights[name], rtol=0, atol=1e-6), name


def test_parts_of_stacked_experts_get_branches_of_their_own() -> None:
    base = families.traced("mixtral")
    rules = {"select": [{"target": ["gate_up_proj"], "features": ["up"], "rank": RANK}]}
    graph_module = lora_fx.rewrite(base, rules)
    set_factors(graph_module)
    folded = lora_fx.fold(graph_module)
    model = families.model("mixtral")
    batch = {k: v for k, v in example_inputs(model, None).kwargs.items() if isinstance(v, torch.Tensor)}
    assert torch.allclose(folded(**batch)[0], graph_module.eval()(**batch)[0], rtol=0, atol=2e-6)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    before, after = base.get_parameter(name), folded.get_parameter(name)
    half = before.shape[1] // 2
    assert torch.equal(before[:, :half], after[:, :half])
    assert not torch.equal(before[:, half:], after[:, half:])


def test_weights_behind_casts_get_factors_in_the_dtype_that_is_computed_in() -> None:
    model, x = Mixed().eval(), torch.randn(5, 6)
    base, graph_module = rewritten(model, (x,), ["up", "down", "table"])
    sites = {
        decision.site.name: decision.site for decision in lora_fx.plan(base, {"select": [{"regex": ".*"}]}, rank=2)
    }
    assert {name: (site.layout, site.cast) for name, site in sites.items()} == {
        "up": ("out_in", torch.float32),
        "down": ("out_in", torch.bfloat16),
        "table": ("out_in", None),
    }
    assert {p.dtype for n, p in graph_module.named_parameters() if ".lora_" in n} == {torch.float32}
    set_factors(graph_module)
    folded = lora_fx.fold(graph_module)
    assert first_difference(base, folded) is None
    assert folded.up.weight.dtype == torch.bfloat16
    assert folded.down.weight.dtype == torch.float32
    other = torch.randn(3, 6)
    expected = graph_module(other)
    assert torch.allclose(folded(other), expected, rtol=0, atol=5e-2 * float(expected.abs().max()))


def test_a_convolution_that_cannot_have_such_a_branch_is_refused() -> None:
    model, example, _, _ = _convolutions(nn.Conv2d, 9, 7, groups=2)
    match = "'wide' has 2 groups.*rank 3 cannot be divided among them"
    with pytest.raises(lora_fx.PlanError, match=match):
        lora_fx.rewrite(model, {"select": [{"target": ["wide"], "rank": 3}]}, example_inputs=example)


def test_the_summary_counts_what_a_plan_says_for_every_kind() -> None:
    for make in (*IN_PEFT.values(), *NOT_IN_PEFT.values()):
        model, example, _, targets = make()
        base, graph_module = rewritten(model, example, targets)
        planned = lora_fx.plan(base, {"select": [{"target": targets}]}, rank=RANK, alpha=ALPHA)
        assert planned.parameters == lora_fx.parameter_summary(graph_module).trainable
