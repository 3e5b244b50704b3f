"""Models that PEFT wrapped, traced and folded: its layers are gone, and the weights are those of its own merge."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import peft
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, build, rows, run
from conftest import set_factors, unchanged
from test_peft_equality import wrap
from torch import nn
from transformers_releases import transformers_takes_peft

import lora_fx
from lora_fx.tracing.example_inputs import example_inputs

pytestmark = pytest.mark.filterwarnings("ignore")


def renamed(graph_module: nn.Module) -> dict[str, nn.Parameter]:
    """Return parameters under the names that they have once PEFT is gone."""
    named = graph_module.named_parameters(remove_duplicate=False)
    return {name.removeprefix("base_model.model.").replace(".base_layer.", "."): p for name, p in named}


def one_rounding(mine: torch.Tensor, theirs: torch.Tensor, before: torch.Tensor) -> bool:
    """Tell whether two weights differ by no more than rounding the sum once, and the update, which PEFT rounds too."""
    step = torch.finfo(mine.dtype).eps * (mine.abs() + (mine - before).abs().max())
    return bool(((mine - theirs).abs() <= step).all())


@pytest.mark.parametrize("name", rows(ARCHITECTURES, ("t5", "gpt2")))
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
    report = lora_fx.fold_report(graph_module, folded)  # before PEFT merges into the weights that the graph shares
    theirs = dict(wrapped.merge_and_unload().named_parameters(remove_duplicate=False))
    mine = renamed(folded)
    assert mine.keys() == theirs.keys()  # no adapter is left, and nothing else is gone
    assert all(one_rounding(mine[key], theirs[key], before[key]) for key in theirs)
    changed = {key for key in mine if not torch.equal(mine[key], before[key])}
    assert len(report) == len(changed) > 0
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
    graph_module = lora_fx.trace(wrapped, (INDEX,), inference=True)
    folded, expected = lora_fx.fold(graph_module), wrapped(INDEX)
    assert len(lora_fx.fold_report(graph_module, folded)) == 3
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
    graph_module = lora_fx.trace(wrapped, (INDEX,), inference=True)
    folded = lora_fx.fold(graph_module)
    assert torch.allclose(folded(INDEX), wrapped(INDEX), rtol=0, atol=1e-6)
    assert {
        entry.merge.weight.split(".")[-3]: len(entry.merge.updates)
        for entry in lora_fx.fold_report(graph_module, folded)
    } == {
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


def test_adapters_of_stacked_experts_fold_to_the_weights_that_peft_merges() -> None:
    model = families.build("mixtral").eval()
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=["experts.down_proj"])
    wrapped = peft.get_peft_model(model, config).eval()
    set_factors(wrapped)
    graph_module = lora_fx.trace(wrapped, inference=True)
    folded = lora_fx.fold(graph_module)
    values = example_inputs(families.model("mixtral"), None).kwargs
    batch = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
    assert torch.allclose(folded(**batch)[0], graph_module(**batch)[0], rtol=0, atol=2e-6)
    lora_fx.verify(graph_module, folded, batch)
    mine = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p for name, p in folded.named_parameters()
    }
    assert len(lora_fx.fold_report(graph_module, folded)) == 3
    theirs = dict(wrapped.merge_and_unload().named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


class Parametrized(nn.Module):
    """``W + s · B A``, written by hand."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 5))
        self.b, self.a = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 5))
        self.wrong = wrong

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta = 0.5 * (self.b @ self.a) - torch.mm(self.b, self.a)
        if self.wrong == "squared":
            delta = delta * delta
        if self.wrong == "row":
            delta = (self.b @ self.a)[:1]
        return nn.functional.linear(x, self.weight + delta)


def is_factor(name: str) -> bool:
    return name in ("a", "b")


def test_a_sum_of_a_weight_and_a_product_of_factors_folds() -> None:
    x, model = torch.randn(3, 5), Parametrized()
    graph_module = lora_fx.trace(model, (x,), inference=True)
    folded = lora_fx.fold(graph_module, branches=is_factor)
    assert list(folded.state_dict()) == ["weight"]
    assert torch.allclose(folded.weight, model.weight - 0.5 * model.b @ model.a, rtol=0, atol=1e-6)
    assert torch.allclose(folded(x), model(x), rtol=0, atol=1e-5)
    assert [node.name for node in folded.graph.nodes if node.op == "call_function"] == ["linear"]
    bare = lora_fx.unload(graph_module, branches=is_factor)
    assert torch.equal(bare(x), nn.functional.linear(x, model.weight))


@pytest.mark.parametrize("way", ["squared", "row"])
def test_a_weight_that_depends_on_factors_in_any_way_is_computed(way: str) -> None:
    x, model = torch.randn(3, 5), Parametrized(way)
    graph_module = lora_fx.trace(model, (x,), inference=True)
    with unchanged(graph_module):
        folded = lora_fx.fold(graph_module, branches=is_factor)
    assert list(folded.state_dict()) == ["weight"]
    assert torch.allclose(folded(x), model(x), rtol=0, atol=1e-5)


def llama() -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config).eval()


CONFIG = peft.LoraConfig(r=2, target_modules=["q_proj"])
LAYER = "model.layers.0.self_attn.q_proj"
GO_ON = (
    "to go on with its adapter, save_pretrained(directory) and lora_fx.from_adapter(plain model, directory); "
    "to merge it, lora_fx.fold(lora_fx.trace(model))."
)


def with_adapter_of_transformers() -> nn.Module:
    model = llama()
    model.add_adapter(CONFIG)
    return model


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            lambda: peft.get_peft_model(llama(), CONFIG),
            f"PeftModel is wrapped by PEFT. For the plain model take .unload(); {GO_ON}",
        ),
        (
            lambda: peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            f"PeftModelForCausalLM is wrapped by PEFT. For the plain model take .get_base_model(); {GO_ON}",
        ),
        (
            lambda: peft.get_peft_model(llama(), CONFIG).get_base_model(),
            f"LlamaForCausalLM is wrapped by PEFT: {LAYER!r} is PEFT's Linear. For the plain model take .unload() of the PeftModel "
            f"(or load the model anew); {GO_ON}",
        ),
        pytest.param(
            with_adapter_of_transformers,
            f"LlamaForCausalLM is wrapped by PEFT: {LAYER!r} is PEFT's Linear. For the plain model take .unload() of the PeftModel "
            f"(or load the model anew); {GO_ON}",
            marks=transformers_takes_peft,
        ),
    ],
    ids=["PeftModel", "prompt tuning", "its base", "add_adapter"],
)
def test_rewrite_plan_and_from_adapter_refuse_a_model_that_peft_wraps_and_say_what_to_do(
    model: Callable[[], nn.Module], told: str, tmp_path: Path
) -> None:
    peft.get_peft_model(llama(), CONFIG).save_pretrained(tmp_path)
    for call in (lora_fx.rewrite, lora_fx.plan, lambda wrapped: lora_fx.from_adapter(wrapped, tmp_path)):
        with pytest.raises(lora_fx.PlanError) as raised:
            call(model())
        assert str(raised.value) == told


def test_a_wrapped_model_is_refused_without_importing_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = peft.get_peft_model(llama(), CONFIG)
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    with pytest.raises(lora_fx.PlanError, match="wrapped by PEFT"):
        lora_fx.rewrite(wrapped)


def test_each_way_out_of_the_refusal_of_a_wrapped_model_works(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(llama(), CONFIG).eval()
    set_factors(wrapped)
    wanted = wrapped(**INPUTS).logits
    merged = lora_fx.fold(lora_fx.trace(wrapped))
    assert torch.allclose(merged(**INPUTS).logits, wanted, rtol=0, atol=1e-6)
    wrapped.save_pretrained(tmp_path)
    plain = wrapped.unload()
    assert torch.equal(lora_fx.from_adapter(plain, tmp_path)(**INPUTS).logits, wanted)
    assert torch.equal(lora_fx.rewrite(plain, rules="llama")(**INPUTS).logits, plain(**INPUTS).logits)


IDS = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(1))
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
