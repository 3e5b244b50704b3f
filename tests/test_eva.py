"""EVA: starts and ranks from data, with PEFT's ``initialize_lora_eva_weights`` beside them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import lora_fx
from lora_fx.adapters.recorded import branches_of
from lora_fx.errors import PlanError
from lora_fx.graph.adapter_names import copy_name
from lora_fx.numerics.principal_components import extended

pytestmark = pytest.mark.filterwarnings("ignore:lora with eva initialization", "ignore:`is_gradient")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=71, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=71, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config).eval()


def batches(number: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(number):
        ids = torch.randint(71, (4, 16), generator=generator)
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[0, :5], labels[1, :6] = 0, -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


@pytest.fixture(scope="module")
def graph() -> lora_fx.TracedGraphModule:
    return lora_fx.trace(llama())


def check_as_peft(
    model: Any, graph: lora_fx.TracedGraphModule, settings: dict[str, Any], eva: dict[str, Any]
) -> tuple[Any, lora_fx.TracedGraphModule]:
    """Start an adapter by EVA, here and in PEFT, and compare ranks, scalings and factors bit for bit."""
    config = peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(**eva), **copy.deepcopy(settings))
    theirs = peft.get_peft_model(model, config)
    peft.initialize_lora_eva_weights(theirs, batches(), show_progress_bar=False)
    said = {key.removesuffix("_factors"): value for key, value in eva.items()}
    state = torch.get_rng_state()
    found = lora_fx.eva(graph, batches(), {"peft_type": "LORA", **settings}, passes=100, **said)
    assert torch.equal(torch.get_rng_state(), state)
    mine = lora_fx.rewrite(graph, found.rules, start=found)
    own = {name: p for name, p in mine.named_parameters() if p.requires_grad}
    trained = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters() if p.requires_grad}
    assert own.keys() == trained.keys()
    # PEFT makes factors of another rank anew, in the dtype of the model
    assert all(torch.equal(own[name].to(p.dtype), p) for name, p in trained.items())
    scalings = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    assert {key: branch.setting.scale for key, (_, branch) in branches_of(mine, "default").items()} == scalings
    assert len(set(found.ranks.values())) > 1
    return theirs.eval(), mine.eval()


def test_ranks_scalings_and_factors_are_pefts_bit_for_bit(graph: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    theirs, mine = check_as_peft(llama(), graph, {"target_modules": TARGETS, "r": 4, "lora_alpha": 8}, {})
    inputs = {key: value for key, value in batches(1)[0].items() if key != "labels"}
    expected = theirs(**inputs, use_cache=False).logits
    assert torch.equal(mine(**inputs).logits, expected)
    assert torch.equal(graph(**inputs).logits, expected)
    lora_fx.save_adapter(mine, tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    own = dict(mine.named_parameters())
    factors = {n.removeprefix("base_model.model."): p for n, p in again.named_parameters() if ".lora_" in n}
    assert all(torch.equal(own[name], p) for name, p in factors.items())


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["bfloat16, whitened", "Conv1D, alphas stay", "no redistribution"])
def test_other_settings_and_layers_are_pefts_too(name: str) -> None:
    make, settings, eva = {
        "bfloat16, whitened": (
            lambda: llama(torch.bfloat16),
            {"target_modules": ["q_proj", "gate_proj", "down_proj"], "r": 3, "rank_pattern": {"q_proj": 5}},
            {"rho": 1.5, "tau": 0.9, "whiten": True},
        ),
        "Conv1D, alphas stay": (
            gpt2, {"target_modules": ["c_attn", "c_proj"], "r": 4}, {"tau": 0.95, "adjust_scaling_factors": False}
        ),
        "no redistribution": (
            llama, {"target_modules": TARGETS, "r": 3, "rank_pattern": {"o_proj": 2}, "use_rslora": True}, {"rho": 1.0}
        ),
    }[name]  # fmt: skip
    check_as_peft(make(), lora_fx.trace(make()), settings, eva)


def test_a_rule_file_keeps_its_settings_and_what_it_trains(graph: lora_fx.TracedGraphModule) -> None:
    rules = {
        "defaults": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
        "select": [{"target": TARGETS}, {"target": ["norm"], "trainable": "all"}],
    }
    plain = {"peft_type": "LORA", "target_modules": TARGETS, "r": 4, "lora_alpha": 8}
    of_peft = lora_fx.eva(graph, batches(), plain, tau=0.9)
    found = lora_fx.eva(graph, batches(), rules, tau=0.9)
    assert found.ranks == of_peft.ranks
    assert all(torch.equal(a, of_peft.factors[module]) for module, a in found.factors.items())
    mine = lora_fx.rewrite(graph, found.rules, start=found)
    settings = [branch.setting for _, branch in branches_of(mine, "default").values()]
    assert {(each.dropout, each.scale) for each in settings} == {(0.1, 2.0)}
    assert sum(found.ranks.values()) == 4 * len(TARGETS) * 2 == sum(each.rank for each in settings)
    assert [name for name, p in mine.named_parameters() if p.requires_grad and ".lora_" not in name] == [
        copy_name("model.norm.weight", "default")
    ]
    for parameter in mine.parameters():
        parameter.data.add_(1 if parameter.requires_grad else 0)
    again = lora_fx.eva(mine, batches(), rules, tau=0.9)  # the adapter of the graph does not act in it
    assert again.ranks == found.ranks


def test_invocation_tokens_of_a_selection_stay_in_the_rules(graph: lora_fx.TracedGraphModule) -> None:
    rules = {
        "select": [{"target": ["q_proj"], "rank": 2, "invocation_tokens": [3, 5]}, {"target": ["v_proj"], "rank": 2}]
    }
    found = lora_fx.eva(graph, batches(), rules, tau=0.9)
    branches = branches_of(lora_fx.rewrite(graph, found.rules, start=found), "default").values()
    assert {branch.owner.rpartition(".")[2]: branch.setting.invocation_tokens for _, branch in branches} == {
        "q_proj": (3, 5),
        "v_proj": (),
    }


def test_what_eva_cannot_start_is_told(graph: lora_fx.TracedGraphModule) -> None:
    rules = {"select": [{"target": ["q_proj"], "rank": 40}]}
    with pytest.raises(PlanError, match=r"asks for 64 directions at model.* and no batch has more than 53 positions"):
        lora_fx.eva(graph, batches(2), rules)
    with pytest.warns(UserWarning, match="after 1 passes the directions at .* still change by more than tau=1"):
        lora_fx.eva(graph, batches(2), {"select": [{"target": ["q_proj"], "rank": 2}]}, tau=1.0, passes=1)
    with pytest.raises(PlanError, match="eva starts linear layers, and the rules give none"):
        lora_fx.eva(graph, batches(1), {"select": [{"target": ["embed_tokens"], "rank": 2}]})
    with pytest.raises(PlanError, match="expected rho ≥ 1, 0 ≤ tau ≤ 1"):
        lora_fx.eva(graph, batches(1), rules, rho=0.5)
    with pytest.raises(lora_fx.RuleError, match=r"lora_fx\.eva makes that of EVA"):
        lora_fx.rewrite(graph, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="eva"))


class Twice(nn.Module):
    """One layer called twice, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.mix(self.table(ids)).tanh()))


def test_a_layer_that_is_called_twice_has_one_start_of_both_inputs_and_others_start_by_the_rules() -> None:
    torch.manual_seed(1)
    model = Twice().eval()
    ids = torch.randint(9, (5, 7))
    graph = lora_fx.trace(model, (ids,))
    rules = {"peft_type": "LORA", "target_modules": ["mix", "table", "head"], "r": 2}
    loader: Iterator[dict[str, Any]] = ({"ids": torch.randint(9, (5, 7))} for _ in itertools.count())
    found = lora_fx.eva(graph, loader, rules)
    assert found.ranks.keys() == {"mix", "head"}
    mine = lora_fx.rewrite(graph, found.rules, start=found, seed=1)
    a = mine.get_parameter("mix.lora_A.default.weight")
    assert torch.allclose(a @ a.t(), torch.eye(found.ranks["mix"]), atol=1e-5)
    assert torch.equal(mine(ids), model(ids))
    with pytest.raises(PlanError, match=r"mix@1: eva takes whole modules"):
        lora_fx.eva(graph, loader, {"select": [{"target": ["mix"], "calls": "each", "rank": 2}]})


def test_components_are_those_of_all_rows_together() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 4, generator=generator) @ torch.randn(4, 9, generator=generator) + 3
    found = None
    for part in rows.split([25, 20, 15]):
        found = extended(found, part, 4)
    assert found is not None
    _, values, right = torch.linalg.svd((rows - rows.mean(0)).double(), full_matrices=False)
    assert torch.allclose(found.values.double(), values[:4], rtol=1e-5)
    assert torch.allclose((found.vectors.double() @ right[:4].t()).abs(), torch.eye(4).double(), atol=1e-4)
    assert torch.allclose(found.ratios.double(), values[:4] ** 2 / (values**2).sum(), rtol=1e-5)
