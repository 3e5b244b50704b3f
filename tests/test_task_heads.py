"""Task heads: what the rules leave out, the ranks of narrow sites, and heads that train by the task, against PEFT."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import set_factors
from torch import nn

import lora_fx
from lora_fx.planning.plan import Skipped

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SIZES = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
LABELS = 3


def bert() -> nn.Module:
    torch.manual_seed(3)
    config = transformers.BertConfig(**SIZES, max_position_embeddings=32, num_labels=LABELS)
    return transformers.BertForSequenceClassification(config).eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 17).reshape(2, 7)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def base() -> lora_fx.TracedGraphModule:
    return lora_fx.trace(bert())


def with_config(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "adapter_config.json").read_text()))


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_a_narrow_site_gets_a_lower_rank_with_one_warning_and_peft_reads_it_back(
    base: lora_fx.TracedGraphModule, scaling: str, tmp_path: Path
) -> None:
    rules = {
        "defaults": {"rank": 8, "alpha": 12, "scaling": scaling},
        "select": [{"target": ["query", "value", "classifier"]}],
    }
    for make in (lora_fx.plan, lora_fx.rewrite):
        with pytest.warns(UserWarning, match="higher rank") as caught:
            made = make(base, rules)
        (told,) = [str(each.message) for each in caught if "higher rank" in str(each.message)]
        assert told == (
            "rules 'custom' give these sites a higher rank than their update can have, and they get: classifier 3 in place of 8. The "
            "scaling stays that of the rule's rank. To have the rank everywhere, give it as an argument, rank=."
        )
        assert all(each.filename == __file__ for each in caught if "higher rank" in str(each.message))
    mine = made
    set_factors(mine)
    lora_fx.save_adapter(mine, tmp_path / "adapter")
    config = with_config(tmp_path / "adapter")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 12, {"classifier": 3})
    assert set(config["alpha_pattern"]) == {"classifier"}
    theirs = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "adapter")).eval()
    scales = {"query": 12 / 8 if scaling == "standard" else 12 / 8**0.5}
    scales["classifier"] = scales["value"] = scales["query"]
    for name, module in theirs.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            assert module.scaling["default"] == pytest.approx(scales[name.rpartition(".")[2]], rel=2**-52, abs=0)
            assert module.r["default"] == (3 if name.endswith("classifier") else 8)
    with torch.no_grad():
        expected = theirs(**batch()).logits
        torch.testing.assert_close(mine.eval()(**batch()).logits, expected, rtol=0, atol=1e-6)
        again = lora_fx.from_adapter(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(again(**batch()).logits, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(lora_fx.fold(mine)(**batch()).logits, expected, rtol=0, atol=1e-5)
    lora_fx.load_adapter(mine, tmp_path / "adapter")  # the graph's own scale, within a rounding


def test_a_rank_that_is_given_is_taken_as_it_is_as_in_peft(base: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = lora_fx.rewrite(base, {"select": [{"target": ["query", "classifier"]}]}, rank=20, alpha=6, seed=0)
    theirs = peft.LoraConfig(r=20, lora_alpha=6, target_modules=["query", "classifier"])
    wrapped = peft.get_peft_model(bert(), theirs)
    shapes = {n.removeprefix("base_model.model."): p.shape for n, p in wrapped.named_parameters() if p.requires_grad}
    assert {n: p.shape for n, p in mine.named_parameters() if p.requires_grad} == shapes
    set_factors(mine)
    lora_fx.save_adapter(mine, tmp_path / "adapter")
    assert with_config(tmp_path / "adapter")["rank_pattern"] == {}
    theirs = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.equal(mine.eval()(**batch()).logits, theirs(**batch()).logits)
        folded = lora_fx.fold(mine)
        merged = theirs.merge_and_unload()
        torch.testing.assert_close(folded(**batch()).logits, merged(**batch()).logits, rtol=0, atol=1e-5)
        assert torch.equal(lora_fx.unload(mine)(**batch()).logits, base(**batch()).logits)


def left_out(model: nn.Module) -> dict[str, str]:
    return {
        d.site.module: d.reason
        for d in lora_fx.plan(model, "all-linear")
        if isinstance(d, Skipped) and d.site.op == "linear"
    }


def test_all_linear_leaves_out_every_module_of_a_task_head_and_lowers_no_other_rank() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = lora_fx.plan(bert(), "all-linear")
    assert {chosen.branches[0].setting.rank for chosen in plan.chosen} == {8}
    assert left_out(bert()) == {"classifier": "its role head is excluded"}
    small = transformers.RobertaConfig(**SIZES, max_position_embeddings=32, num_labels=1)
    roberta = transformers.RobertaForSequenceClassification(small).eval()
    assert left_out(roberta) == {
        "classifier.dense": "its role head is excluded",
        "classifier.out_proj": "its out_features 1 are outside ≥ 2",
    }
    answers = transformers.BertForQuestionAnswering(transformers.BertConfig(**SIZES)).eval()
    assert left_out(answers) == {"qa_outputs": "its role head is excluded"}


def test_all_linear_leaves_out_gates_with_one_output_and_routers() -> None:
    config = transformers.Qwen2MoeConfig(
        **SIZES, num_key_value_heads=1, moe_intermediate_size=12, shared_expert_intermediate_size=20, num_experts=3, num_experts_per_tok=2
    )  # fmt: skip
    told = left_out(transformers.Qwen2MoeForCausalLM(config).eval())
    assert told == {
        "model.layers.0.mlp.gate": "its role router is excluded",
        "model.layers.0.mlp.shared_expert_gate": "its out_features 1 are outside ≥ 2",
        "lm_head": "its role head is excluded",
    }
