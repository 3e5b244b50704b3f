"""Starts from the weight itself (PiSSA, OLoRA, MiCA) and orthogonal ones, with PEFT beside them."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import lora_fx
from lora_fx.errors import AdapterError, PlanError, RuleError
from lora_fx.folding.checkpoint_plan import fold_checkpoint
from lora_fx.graph.graph_module import state_of

INPUTS = {
    "input_ids": torch.tensor([[11, 3, 9, 5, 7, 2, 7], [5, 1, 3, 3, 8, 30, 4]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]),
}
SPLITTING = ("pissa", "olora", "pissa_niter_4")


def llama(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def config_of(init: str) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=init)


def logits(graph: nn.Module) -> torch.Tensor:
    return graph(**INPUTS).logits.detach()


def theirs_of(model: nn.Module) -> torch.Tensor:
    return model(**INPUTS, use_cache=False).logits.detach()


@functools.cache
def traced(dtype: torch.dtype) -> lora_fx.TracedGraphModule:
    return lora_fx.trace(llama(dtype))


@dataclass(frozen=True)
class Pair:
    init: str
    dtype: torch.dtype
    base: lora_fx.TracedGraphModule
    theirs: Any
    mine: lora_fx.TracedGraphModule

    @property
    def near(self) -> float:
        return 1e-6 if self.dtype == torch.float32 else 2e-2


STANDING = (("pissa", torch.float32), ("orthogonal", torch.float32), ("olora", torch.bfloat16))
"""One that splits the weight, one that does not, and one in half precision."""

CASES = [
    pytest.param(
        (init, dtype),
        id=f"{init}, {dtype}".replace("torch.", ""),
        marks=[] if (init, dtype) in STANDING else pytest.mark.matrix,
    )
    for init, dtype in (
        *((init, torch.float32) for init in (*SPLITTING, "orthogonal", "mica")),
        ("olora", torch.bfloat16),
    )
]


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> Pair:
    init, dtype = request.param
    base = traced(dtype)
    model = llama(dtype)
    torch.manual_seed(3)
    theirs = peft.get_peft_model(model, config_of(init)).eval()
    mine = lora_fx.rewrite(base, config_of(init), seed=3).eval()
    own = dict(mine.named_parameters())
    for name, value in theirs.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        rest = name.replace(".weight", ".lora_rest.default.weight")
        assert torch.equal(value, own.get(rest, own[name])), name
        assert value.requires_grad == own[name].requires_grad
    assert torch.equal(theirs_of(theirs), logits(mine))
    generator = torch.Generator().manual_seed(7)
    for name, value in theirs.named_parameters():
        if value.requires_grad:
            value.data.add_(torch.randn(value.shape, generator=generator) * 0.05)
            own[name.removeprefix("base_model.model.")].data.copy_(value)
    return Pair(init, dtype, base, theirs, mine)


def test_factors_weights_and_outputs_are_pefts_bit_for_bit(pair: Pair) -> None:
    assert torch.equal(theirs_of(pair.theirs), logits(pair.mine))
    assert not torch.equal(logits(pair.base), logits(pair.mine))


def test_the_weight_itself_stays_and_what_does_not_act_leaves_no_trace(pair: Pair) -> None:
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert state_of(pair.mine).tensors[weight].data_ptr() == state_of(pair.base).tensors[weight].data_ptr()
    expected = logits(pair.base)
    resting = lora_fx.activate(pair.mine, {})
    assert torch.equal(logits(resting), expected)
    assert torch.equal(logits(lora_fx.unload(pair.mine)), expected)
    assert torch.equal(logits(lora_fx.activate(resting, {"default": 1.0})), logits(pair.mine))
    rules = {"select": [{"target": ["q_proj"], "rank": 2}]}
    two = lora_fx.rewrite(pair.mine, rules, adapter="plain", seed=4)
    alone = lora_fx.rewrite(pair.base, rules, adapter="plain", seed=4)
    assert torch.equal(logits(lora_fx.activate(two, {"plain": 1.0})), logits(alone))
    if pair.init in SPLITTING:
        with pytest.raises(
            PlanError, match=r"adapter 'default' started by splitting the weights, and acts alone: plain would"
        ):
            lora_fx.activate(two, {"default": 1.0, "plain": 1.0})
        with pytest.raises(PlanError, match=r"acts at strength 1 alone, not 0\.5"):
            lora_fx.activate(two, {"default": 0.5})
    both = lora_fx.combine(two, {"default": 1.0, "plain": 1.0})  # B of the plain one is zero
    assert (logits(both) - logits(pair.mine)).abs().max() < pair.near


def test_a_fold_adds_what_training_changed(pair: Pair) -> None:
    folded = lora_fx.fold(pair.mine)
    assert [n.format_node() for n in folded.graph.nodes] == [n.format_node() for n in pair.base.graph.nodes]
    assert folded.state_dict().keys() == pair.base.state_dict().keys()
    assert (logits(folded) - logits(pair.mine)).abs().max() < pair.near
    assert all(isinstance(p, nn.Parameter) for n, p in state_of(folded).tensors.items() if n.endswith("weight"))
    lora_fx.verify(pair.mine, folded, INPUTS)
    assert len(lora_fx.fold_report(pair.mine, folded)) == 2
    assert torch.equal(logits(lora_fx.fold(copy.deepcopy(pair.mine), inplace=True)), logits(folded))


def test_files_are_pefts_conversion_and_are_taken_up_again(pair: Pair, tmp_path: Path) -> None:
    lora_fx.save_adapter(pair.mine, tmp_path / "mine")
    ranks = {v.shape[0] for k, v in load_file(tmp_path / "mine" / "adapter_model.safetensors").items() if "lora_A" in k}
    assert ranks == {8 if pair.init in SPLITTING else 4}
    theirs = peft.PeftModel.from_pretrained(llama(pair.dtype), tmp_path / "mine").eval()
    assert (theirs_of(theirs) - logits(pair.mine)).abs().max() < pair.near
    loaded = lora_fx.load_adapter(pair.base, tmp_path / "mine")
    assert torch.equal(logits(loaded), theirs_of(theirs))
    fresh = lora_fx.rewrite(pair.base, config_of(pair.init), seed=3)
    assert torch.equal(logits(lora_fx.load_adapter(fresh, tmp_path / "mine").eval()), logits(pair.mine))
    assert torch.equal(logits(lora_fx.transfer(pair.mine, onto=pair.base)), logits(pair.mine))


def test_an_adapter_of_peft_that_was_not_converted_starts_from_the_base_again_in_memory_and_on_disk(
    pair: Pair, tmp_path: Path
) -> None:
    pair.theirs.save_pretrained(tmp_path / "peft")
    llama(pair.dtype).save_pretrained(tmp_path / "base")
    if pair.init == "pissa_niter_4":
        with pytest.raises(
            AdapterError, match=r"the start 'pissa_niter_4' was random, changed .*, and is not in the file"
        ):
            lora_fx.load_adapter(pair.base, tmp_path / "peft")
        return
    assert torch.equal(logits(lora_fx.load_adapter(pair.base, tmp_path / "peft")), logits(pair.mine))
    fold_checkpoint(tmp_path / "base", [(tmp_path / "peft", 1.0)], tmp_path / "out", verify=True)
    folded = lora_fx.fold(pair.mine).state_dict()
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert (value.double() - folded[name].double()).abs().max() <= (1e-7 if pair.dtype == torch.float32 else 2e-3)


def test_an_adapter_that_has_hardly_trained_is_verified_on_disk(tmp_path: Path) -> None:
    model = llama(torch.float32)
    gm = lora_fx.rewrite(model, {"select": [{"target": ["q_proj"], "rank": 4, "init": "pissa"}]}, seed=0)
    for value in gm.parameters():
        if value.requires_grad:
            value.data.add_(1e-6)
    lora_fx.save_adapter(gm, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    fold_checkpoint(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out", verify=True)


class Shared(nn.Module):
    """Two projections of one weight, a narrow one, a convolution, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.one, self.other = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight
        self.last, self.conv = nn.Linear(6, 3), nn.Conv1d(5, 5, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.conv(self.other(self.one(self.table(ids)).tanh())))


IDS = torch.tensor([[1, 4, 6, 4, 0], [0, 2, 2, 5, 3]])


@pytest.fixture(scope="module")
def shared() -> lora_fx.TracedGraphModule:
    torch.manual_seed(2)
    return lora_fx.trace(Shared().eval(), (IDS,), dynamic={"ids": [0]})


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (
            {"target": ["one"], "init": "pissa", "rank": 2},
            r"one\.weight is tied, or read by others than the branch is for",
        ),
        (
            {"target": ["conv"], "init": "olora", "rank": 2},
            "conv: init 'olora' is for linear layers, and this is conv1d",
        ),
        ({"target": ["last"], "init": "orthogonal", "rank": 1}, "takes an even rank, and this is 1"),
    ],
)
def test_starts_that_a_site_cannot_have_are_refused(
    shared: lora_fx.TracedGraphModule, selection: Any, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        lora_fx.rewrite(shared, {"select": [selection]})


def test_starts_of_rules_need_the_weights_and_a_word_that_is_known(shared: lora_fx.TracedGraphModule) -> None:
    gm = lora_fx.rewrite(
        shared, {"select": [{"target": ["last", "table"], "init": "pissa_niter_16", "rank": 2}]}, seed=0
    )
    assert (gm(IDS) - shared(IDS)).abs().max() < 1e-6
    with pytest.raises(
        RuleError, match="expected 'kaiming', 'gaussian', 'orthogonal', 'pissa', 'olora', 'mica' or 'pissa_niter_16'"
    ):
        lora_fx.rewrite(shared, {"select": [{"target": ["last"], "init": "pissa_niter_0"}]})
    with torch.device("meta"):
        empty = Shared().eval()
    with pytest.raises(PlanError, match="made of the weight, which is on the meta device"):
        lora_fx.rewrite(
            empty, {"select": [{"target": ["last"], "init": "olora"}]}, example_inputs=(IDS.to("meta"),), dynamic={"ids": [0]}
        )  # fmt: skip


def test_a_frozen_factor_never_trains_in_any_form_of_the_adapter(
    shared: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    rules = {"defaults": {"freeze": ["A"]}, "select": [{"target": ["last", "table"], "rank": 2}]}
    gm = lora_fx.rewrite(shared, rules, seed=0)
    trained = ["table.lora_B.default.weight", "last.lora_B.default.weight"]
    for form in (gm, lora_fx.activate(lora_fx.activate(gm, {}), {"default": 1.0}), lora_fx.transfer(gm, onto=shared)):
        assert [name for name, value in form.named_parameters() if value.requires_grad] == trained
    lora_fx.save_adapter(gm, tmp_path / "adapter")
    again = lora_fx.load_adapter(gm, tmp_path / "adapter")
    assert [name for name, value in again.named_parameters() if value.requires_grad] == trained
    with pytest.raises(RuleError, match="expected one factor at most, since none would train"):
        lora_fx.rewrite(shared, {"defaults": {"freeze": ["A", "B"]}, "select": [{"target": ["last"]}]})


def test_given_factors_start_a_branch_beside_what_they_leave_of_the_weight(
    shared: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    torch.manual_seed(4)
    a, b = torch.randn(2, 6), torch.randn(3, 2)
    rules = {"select": [{"target": ["last", "table"], "rank": 2, "alpha": 3}]}
    gm = lora_fx.rewrite(shared, rules, seed=0, start=lambda site: (a, b) if site.module == "last" else None)
    assert torch.equal(gm.get_parameter("last.lora_A.default.weight"), a)
    assert torch.equal(gm.get_parameter("last.lora_B.default.weight"), b)
    assert (gm(IDS) - shared(IDS)).abs().max() < 1e-6
    gm.get_parameter("last.lora_B.default.weight").data.add_(1)
    lora_fx.save_adapter(gm, tmp_path / "adapter")
    loaded = lora_fx.load_adapter(shared, tmp_path / "adapter")
    assert (loaded(IDS) - shared(IDS)).abs().max() > 1e-2
    assert (loaded(IDS) - gm(IDS)).abs().max() < 1e-6
    plain = lora_fx.rewrite(shared, rules, start=lambda site: (a, 0 * b) if site.module == "last" else None)
    assert torch.equal(plain(IDS), shared(IDS))
    assert "last.lora_rest.default.weight" not in plain.state_dict()
    with pytest.raises(
        PlanError, match=r"last: start= gave factors \(2, 6\) and \(2, 3\), expected A \(2, 6\) and B \(3, 2\)"
    ):
        lora_fx.rewrite(shared, rules, start=lambda site: (a, b.t()) if site.module == "last" else None)
