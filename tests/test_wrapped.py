"""Models that PEFT wrapped, traced and folded: its layers are gone, and the weights are those of its own merge."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from architectures import ARCHITECTURES, EACH, build, run
from conftest import set_factors, unchanged
from test_peft_equality import wrap
from torch import nn

import lora_fx

pytestmark = pytest.mark.filterwarnings("ignore")


def renamed(graph_module: nn.Module) -> dict[str, nn.Parameter]:
    """Return parameters under the names that they have once PEFT is gone."""
    named = graph_module.named_parameters(remove_duplicate=False)
    return {name.removeprefix("base_model.model.").replace(".base_layer.", "."): p for name, p in named}


def one_rounding(mine: torch.Tensor, theirs: torch.Tensor, before: torch.Tensor) -> bool:
    """Tell whether two weights differ by no more than rounding the sum once, and the update, which PEFT rounds too."""
    step = torch.finfo(mine.dtype).eps * (mine.abs() + (mine - before).abs().max())
    return bool(((mine - theirs).abs() <= step).all())


@pytest.mark.parametrize("name", EACH)
def test_a_trace_of_a_wrapped_model_folds_to_the_weights_that_peft_merges(name: str) -> None:
    wrapped = wrap(name, build(name)).eval()
    set_factors(wrapped, scale=0.05)
    with unchanged(wrapped):
        graph_module = lora_fx.trace(wrapped, inference=True)
    with unchanged(graph_module):
        folded = lora_fx.fold(graph_module)
    with torch.no_grad():
        eager, branched, plain = (run(name, module, 3, 11, 5)[0] for module in (wrapped, graph_module, folded))
    assert torch.equal(eager, branched)
    assert torch.allclose(plain, branched, rtol=0, atol=max(1e-5, 1e-6 * float(branched.abs().max())))
    before = {name: p.clone() for name, p in renamed(wrapped).items() if ".lora_" not in name}
    theirs = dict(wrapped.merge_and_unload().named_parameters(remove_duplicate=False))
    mine = renamed(folded)
    assert mine.keys() == theirs.keys()  # no adapter is left, and nothing else is gone
    assert all(one_rounding(mine[key], theirs[key], before[key]) for key in theirs)
    changed = {key for key in mine if not torch.equal(mine[key], before[key])}
    assert len(lora_fx.fold_report(folded)) == len(changed) > 0
    targets = ARCHITECTURES[name].target_modules
    assert all(key.removesuffix(".weight").endswith(tuple(targets)) for key in changed)


class Small(nn.Module):
    """A linear, a convolution, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(11, 6), nn.Conv1d(6, 8, 3, padding=1)
        self.lin = nn.Linear(8, 5)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.lin(torch.tanh(self.conv(self.table(index).transpose(1, 2))).transpose(1, 2))  # type: ignore[no-any-return]


INDEX = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(0))


def wrapped_small(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["table", "conv", "lin"], **settings}
    wrapped = peft.get_peft_model(Small().to(dtype), peft.LoraConfig(**settings))
    set_factors(wrapped)
    return wrapped.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_kind_of_layer_that_peft_wraps_folds_in_every_precision(dtype: torch.dtype) -> None:
    wrapped = wrapped_small(dtype)
    folded = lora_fx.fold(lora_fx.trace(wrapped, (INDEX,), inference=True))
    expected = wrapped(INDEX)
    assert len(lora_fx.fold_report(folded)) == 3
    scale = float(expected.abs().max())
    assert torch.allclose(folded(INDEX), expected, rtol=0, atol=scale * {2: 2e-2, 4: 1e-6, 8: 1e-14}[dtype.itemsize])
    before = {name: p.clone() for name, p in renamed(wrapped).items()}
    theirs = dict(wrapped.merge_and_unload().named_parameters())
    assert all(one_rounding(p, theirs[name], before[name]) for name, p in renamed(folded).items())


def test_two_active_adapters_fold_together_and_one_that_is_not_active_is_dropped() -> None:
    wrapped = wrapped_small(target_modules=["conv", "lin"])
    wrapped.add_adapter("second", peft.LoraConfig(r=4, lora_alpha=2, target_modules=["lin", "table"]))
    wrapped.add_adapter("idle", peft.LoraConfig(r=3, target_modules=["lin"]))
    wrapped.base_model.set_adapter(["default", "second"])
    set_factors(wrapped.eval())
    folded = lora_fx.fold(lora_fx.trace(wrapped, (INDEX,), inference=True))
    assert torch.allclose(folded(INDEX), wrapped(INDEX), rtol=0, atol=1e-6)
    assert {entry.merge.weight.split(".")[-3]: len(entry.merge.updates) for entry in lora_fx.fold_report(folded)} == {
        "table": 1,
        "conv": 1,
        "lin": 2,
    }
    assert not any("lora_" in name for name in folded.state_dict())


def test_dropout_of_a_wrapped_model_counts_as_identity_also_in_a_graph_that_trains() -> None:
    wrapped = wrapped_small(lora_dropout=0.3)
    graph_module = lora_fx.trace(wrapped, (INDEX,))
    assert any(isinstance(module, nn.Dropout) for module in graph_module.modules())
    assert torch.allclose(lora_fx.fold(graph_module)(INDEX), wrapped(INDEX), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "node"),
    [
        ({"use_dora": True, "target_modules": ["lin"]}, "linear"),
        ({"lora_bias": True, "target_modules": ["lin"]}, "linear"),
    ],
    ids=["dora", "bias"],
)
def test_variants_that_are_no_low_rank_update_are_refused_by_node(settings: dict[str, Any], node: str) -> None:
    graph_module = lora_fx.trace(wrapped_small(**settings), (INDEX,), inference=True)
    with unchanged(graph_module), pytest.raises(lora_fx.FoldError, match=rf"a branch cannot be folded.*{node}"):
        lora_fx.fold(graph_module)
