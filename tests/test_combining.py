"""Adapters combined into one by each of PEFT's methods: its bits, but for what PEFT is mistaken about."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from conftest import set_factors
from peft.tuners.lora.model import LoraModel
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx.adapters.combine import Method

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TARGETS = ["table", "conv", "proj", "narrow"]
SINGULAR = [name for name in get_args(Method) if name.endswith("svd")]
PRUNING = [name for name in get_args(Method) if name not in ("cat", "linear", "svd")]


class Net(nn.Module):
    """An embedding, a convolution, a projection stored (in, out) and a linear, none of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(19, 12)
        self.conv = nn.Conv2d(1, 6, (3, 2))
        self.proj = Conv1D(9, 10)  # 10 → 9
        self.narrow = nn.Linear(9, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        image = self.conv(self.table(ids)[:, None]).mean((1, 2))[:, :10]  # (batch, 10)
        return self.narrow(torch.relu(self.proj(image)))  # type: ignore[no-any-return]


IDS = torch.arange(14).reshape(2, 7)
ADAPTERS = {"a": (3, 5.0, False), "b": (3, 4.0, True), "c": (3, 2.0, False), "wide": (4, 6.0, False)}
"""Rank, alpha, and rsLoRA."""


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def theirs(net: Net) -> Any:
    """PEFT's model with the adapters, which is not changed but by new ones."""
    made: Any = None
    for name, (rank, alpha, rslora) in ADAPTERS.items():
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=TARGETS)  # type: ignore[arg-type]
        if made is None:
            made = peft.get_peft_model(copy.deepcopy(net), config, adapter_name=name)
        else:
            made.add_adapter(name, config)
    set_factors(made.base_model.model)
    return made


@pytest.fixture(scope="module")
def mine(theirs: Any, net: Net) -> lora_fx.TracedGraphModule:
    graph = lora_fx.trace(net, (IDS,))
    for name, (rank, alpha, rslora) in ADAPTERS.items():
        selection = {"target": TARGETS, "rank": rank, "alpha": alpha, "scaling": "rslora" if rslora else "standard"}
        graph = lora_fx.rewrite(graph, {"select": [selection]}, adapter=name)
    with torch.no_grad():
        for key, value in factors_of(theirs).items():
            graph.get_parameter(key).copy_(value)
    return graph.eval()


def factors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all factors by the names that they have in a graph of lora_fx."""
    found = {
        key.removeprefix("base_model.model."): p.detach() for key, p in model.named_parameters() if ".lora_" in key
    }
    return {
        f"{key.replace('lora_embedding_', 'lora_')}.weight" if ".lora_embedding_" in key else key: value
        for key, value in found.items()
    }


def of(name: str, factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace(f".{name}.", "."): value for key, value in factors.items() if f".{name}." in key}


def products(factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        key: factors[key.replace("lora_A", "lora_B")].flatten(1) @ a.flatten(1)
        for key, a in factors.items()
        if "lora_A" in key
    }


def seeded(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PEFT draw what it drops from a seed: before that it draws initial values for the new adapter, which it overwrites."""
    inject: Callable[..., Any] = LoraModel.inject_adapter

    def injected(*args: Any, **kwargs: Any) -> Any:
        made = inject(*args, **kwargs)
        torch.manual_seed(seed)
        return made

    monkeypatch.setattr(LoraModel, "inject_adapter", injected)


def options(method: str) -> dict[str, Any]:
    given: dict[str, Any] = {"density": 0.6} if method in PRUNING else {}
    return {**given, "majority_sign": "frequency"} if "ties" in method else given


def by_peft(theirs: Any, name: str, method: str, strengths: dict[str, float], **given: Any) -> dict[str, torch.Tensor]:
    words = {"majority_sign": "majority_sign_method", "rank": "svd_rank", "clamp": "svd_clamp"}
    theirs.add_weighted_adapter(
        list(strengths), list(strengths.values()), name, method, **{words.get(k, k): v for k, v in given.items()}
    )
    return of(name, factors_of(theirs))


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_gives_the_bits_of_peft(
    method: Method, theirs: Any, mine: lora_fx.TracedGraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded(5, monkeypatch)
    strengths = {"c": 0.7, "a": -1.3, "b": 0.4}
    given = options(method)
    expected = by_peft(theirs, f"all_{method}", method, strengths, **given)
    seed = {"seed": 5} if method.startswith("dare") else {}
    combined = lora_fx.combine(mine, strengths, adapter="new", method=method, **given, **seed)
    found = of("new", factors_of(combined))
    assert found.keys() == expected.keys()
    exact = [key for key in found if method not in SINGULAR or not key.startswith("conv.")]
    assert [key for key in exact if not torch.equal(found[key], expected[key])] == []
    whole, wanted = products(found), products(expected)  # a convolution's product is rounded in another order
    assert all(torch.allclose(whole[key], wanted[key], atol=1e-6) for key in whole)
    assert all(value.abs().max() > 0.01 for value in whole.values())


@pytest.mark.parametrize("method", ["ties", "dare_ties_svd"])
def test_the_sign_of_the_sum_is_elected_unless_the_frequency_is_asked_for(
    method: Method, theirs: Any, mine: lora_fx.TracedGraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded(3, monkeypatch)
    strengths, seed = {"a": 1.0, "b": 1.0, "c": 1.0}, {"seed": 3} if "dare" in method else {}
    expected = by_peft(theirs, f"total_{method}", method, strengths, density=0.5)
    found, same, other = (
        of(
            "new",
            factors_of(lora_fx.combine(mine, strengths, adapter="new", method=method, density=0.5, **seed, **more)),
        )  # type: ignore[arg-type]
        for more in ({}, {"majority_sign": "total"}, {"majority_sign": "frequency"})
    )
    key = "narrow.lora_A.weight"
    assert torch.equal(found[key], expected[key])
    assert torch.equal(found[key], same[key])
    assert not torch.allclose(found[key], other[key], atol=1e-3)


@pytest.mark.parametrize(("rank", "clamp"), [(None, None), (2, None), (2, 0.9)])
def test_singular_vectors_take_any_ranks_and_the_rank_and_clamp_of_peft(
    rank: int | None, clamp: float | None, theirs: Any, mine: lora_fx.TracedGraphModule
) -> None:
    strengths = {"a": 1.0, "wide": 0.5}
    given = {key: value for key, value in (("rank", rank), ("clamp", clamp)) if value is not None}
    expected = by_peft(theirs, f"svd {rank} {clamp is None}", "svd", strengths, **given)
    combined = lora_fx.combine(mine, strengths, adapter="new", method="svd", **given)  # type: ignore[arg-type]
    found = of("new", factors_of(combined))
    assert [key for key in found if not key.startswith("conv.") and not torch.equal(found[key], expected[key])] == []
    assert found["conv.lora_A.weight"].shape == (rank or 4, 1, 3, 2)


def test_singular_vectors_of_enough_rank_lose_nothing_and_no_side_of_a_site_is_exceeded(
    mine: lora_fx.TracedGraphModule,
) -> None:
    strengths = {"a": 1.0, "wide": 0.5}
    combined = lora_fx.combine(mine, strengths, adapter="new", method="svd", rank=7)
    ranks = {key: len(value) for key, value in of("new", factors_of(combined)).items() if ".lora_A." in key}
    assert ranks == {
        "table.lora_A.weight": 7,
        "conv.lora_A.weight": 6,
        "proj.lora_A.weight": 7,
        "narrow.lora_A.weight": 5,
    }
    only, together = lora_fx.activate(combined, {"new": 1.0}), lora_fx.activate(mine, strengths)
    assert torch.allclose(only(IDS), together(IDS), atol=1e-5)
    assert not torch.allclose(together(IDS), lora_fx.activate(mine, {"a": 1.0})(IDS), atol=1e-3)


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_with_rslora_the_scaling_is_right_where_that_of_peft_is_too_large_by_the_root_of_the_rank(
    method: Method, net: Net, mine: lora_fx.TracedGraphModule, theirs: Any
) -> None:
    rank = {"cat": 6, "linear": 3}[method]
    theirs.add_weighted_adapter(["b", "c"], [1.0, -0.5], f"rs_{method}", method)
    scaling = theirs.base_model.model.narrow.scaling[f"rs_{method}"]
    assert scaling == rank / rank**0.5  # alpha / √rank, with the alpha for alpha / rank = 1
    combined = lora_fx.combine(mine, {"b": 1.0, "c": -0.5}, adapter="new", method=method)
    found, expected = (of(*pair) for pair in (("new", factors_of(combined)), (f"rs_{method}", factors_of(theirs))))
    assert all(torch.equal(found[key], expected[key]) for key in expected)  # the factors are the same
    merged = lora_fx.fold(combined, {"new": 1.0}).get_parameter("narrow.weight") - net.narrow.weight
    theirs.set_adapter(f"rs_{method}")
    of_peft = theirs.base_model.model.narrow.get_delta_weight(f"rs_{method}")
    right = products(found)["narrow.lora_A.weight"]
    if method == "cat":
        both = [lora_fx.fold(mine, {name: 1.0}).get_parameter("narrow.weight") - net.narrow.weight for name in "bc"]
        assert torch.allclose(right, both[0] - 0.5 * both[1], atol=1e-6)
    assert torch.allclose(merged, right, atol=1e-6)
    assert torch.allclose(of_peft, right * rank**0.5, atol=1e-6)
    assert not torch.allclose(of_peft, merged, atol=1e-2)


def test_what_is_dropped_depends_on_the_seed_and_the_random_state_is_left(mine: lora_fx.TracedGraphModule) -> None:
    def dropped(**seed: int) -> torch.Tensor:
        combined = lora_fx.combine(mine, {"a": 1.0, "b": 1.0}, adapter="new", method="dare_linear", density=0.5, **seed)  # type: ignore[arg-type]
        return combined.get_parameter("narrow.lora_A.new.weight")

    torch.manual_seed(8)
    before = torch.get_rng_state()
    unseeded, one, other = dropped(), dropped(seed=1), dropped(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(unseeded, dropped(seed=8))
    assert torch.equal(one, dropped(seed=1))
    assert not torch.equal(one, other)


class Stacks(nn.Module):
    """A convolution in groups; stacks are where PEFT takes no singular vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 3, groups=2, padding=1)
        self.experts = nn.Parameter(torch.randn(3, 8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = self.conv(x).transpose(1, 2).flatten(0, 1)[None].expand(3, -1, -1)
        return torch.bmm(values, self.experts)


def test_singular_vectors_of_stacks_are_taken_matrix_by_matrix() -> None:
    x = torch.randn(2, 6, 7, dtype=torch.float64)
    graph = lora_fx.trace(Stacks().double(), (x,))
    for name, rank in (("a", 2), ("b", 4)):
        rules = {"select": [{"target": ["conv", "experts"], "rank": rank, "alpha": 3}]}
        graph = lora_fx.rewrite(graph, rules, adapter=name)
    set_factors(graph)
    graph.eval()
    strengths = {"a": 1.5, "b": -0.5}
    full, best = (lora_fx.combine(graph, strengths, method="svd", rank=rank) for rank in (6, None))
    expected = lora_fx.activate(graph, strengths)
    assert torch.allclose(full.eval()(x), expected(x), atol=1e-12)
    assert torch.allclose(lora_fx.fold(full)(x), expected(x), atol=1e-12)
    assert best.get_parameter("parametrizations.experts.lora_B.combined.weight").shape == (5, 4 * 3)
    base, whole, nearest = (
        g.get_parameter("experts") for g in (lora_fx.unload(graph), lora_fx.fold(full), lora_fx.fold(best))
    )
    for each in range(3):
        values = torch.linalg.svdvals(whole[each] - base[each])
        assert torch.allclose(
            torch.linalg.svdvals(whole[each] - nearest[each])[0], values[4], atol=1e-10
        )  # Eckart–Young
    with pytest.raises(
        lora_fx.PlanError, match="rank=3 cannot be shared out equally to the 2 groups of the convolution 'conv'"
    ):
        lora_fx.combine(graph, strengths, method="svd", rank=3)


def test_a_combined_adapter_is_saved_and_is_that_of_peft(
    net: Net, mine: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    combined = lora_fx.combine(mine, {"a": 1.0, "wide": 0.5}, method="ties_svd", density=0.5)
    only = lora_fx.activate(combined, {"combined": 1.0})
    lora_fx.save_adapter(only, tmp_path / "saved", "combined")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "saved")).eval()
    assert torch.allclose(theirs(IDS), only(IDS), atol=1e-6)
    assert not torch.allclose(net(IDS), only(IDS), atol=1e-3)


@pytest.mark.parametrize(
    ("method", "given", "problem"),
    [
        ("ties", {}, "density: expected the fraction of values to keep, above 0 and up to 1, got None"),
        ("dare_ties", {"density": 0}, "density: .* got 0"),
        ("ties", {"density": 1.5}, "density: .* got 1.5"),
        ("cat", {"density": 0.5}, "method='cat': density= has no meaning for it"),
        ("linear", {"rank": 2, "clamp": 0.9}, "rank= has no meaning for it; clamp= has no meaning for it"),
        ("svd", {"rank": 0}, "rank: expected an integer ≥ 1, got 0"),
        ("svd", {"clamp": 0.3}, "clamp: expected a quantile, above 0.5 and up to 1, got 0.3"),
        ("svd", {"majority_sign": "total", "seed": 1}, "majority_sign= has no meaning for it; seed= has no meaning"),
        (
            "ties",
            {"density": 0.5, "majority_sign": "most"},
            "majority_sign: expected 'total' or 'frequency', got 'most'",
        ),
        ("tie", {}, "expected a method of cat, linear, svd, .*, got 'tie'.*'ties'"),
        (
            "ties",
            {"density": 0.5},
            "method='ties' sums factors, which must have one rank, .* Say method='ties_svd' or 'cat'",
        ),
        ("linear", {}, "Say method='svd' or 'cat'"),
    ],
)
def test_options_that_a_method_does_not_take_are_refused(
    method: Any, given: dict[str, Any], problem: str, mine: lora_fx.TracedGraphModule
) -> None:
    with pytest.raises(lora_fx.PlanError, match=problem):
        lora_fx.combine(mine, {"a": 1.0, "wide": 1.0}, method=method, **given)
