"""PEFT's configurations as rules: the sites, ranks, starts and trained parts that ``peft.get_peft_model`` has, and its refusals."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import lora_fx
from lora_fx.adapters.recorded import origin_of
from lora_fx.cli import app

SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

Case = tuple[nn.Module, lora_fx.TracedGraphModule]


@pytest.fixture(scope="module")
def models() -> dict[str, Case]:
    torch.manual_seed(7)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2)).eval()
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3)).eval()
    return {"llama": (llama, lora_fx.trace(llama)), "bert": (bert, lora_fx.trace(bert))}


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "names": ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 7, "lora_dropout": 0.2}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"], "r": 4, "use_rslora": True,
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "up_proj": 6}, "alpha_pattern": {r"layers\.\d+\.mlp\.up_proj": 5, ".*v_proj": 9},
        },
    ),
    "both factors random": ("llama", {"target_modules": ["embed_tokens", "k_proj", "up_proj"], "init_lora_weights": False, "r": 3}),
    "an expression": ("llama", {"target_modules": r".*\.1\..*(q|k)_proj", "init_lora_weights": "gaussian", "r": 5}),
    "excluded names": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["1.self_attn.v_proj"]}),
    "an excluded expression": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0.*"}),
    "a layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    "layers by a pattern": ("bert", {"target_modules": ["key"], "layers_to_transform": [0], "layers_pattern": "layer"}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "r": 3}),
    "the type of the model": ("llama", {}),
    "all linear layers": ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 3}),
    "all linear layers of a classifier": ("bert", {"target_modules": "ALL-LINEAR", "task_type": "SEQ_CLS", "r": 2}),
    "all linear layers, gates and heads included": ("bert", {"target_modules": "all-linear", "r": 2}),
    "the head of a task": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "all biases": ("bert", {"target_modules": ["query", "dense"], "bias": "all", "r": 2}),
    "biases of adapted modules": ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
    "modules that train": ("bert", {"target_modules": ["value"], "modules_to_save": ["pooler", "classifier"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_config_of_peft_chooses_what_peft_chooses_and_starts_as_in_peft(
    case: str, models: dict[str, Case], tmp_path: Path
) -> None:
    name, said = CONFIGS[case]
    model, graph = models[name]
    config = peft.LoraConfig(**copy.deepcopy(said))
    mine = lora_fx.rewrite(graph, copy.deepcopy(config), seed=11)
    torch.manual_seed(11)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    lora_fx.save_adapter(mine, tmp_path / "ours")
    wrapped.save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
    found, expected = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "peft"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert sum(p.numel() for p in mine.parameters() if p.requires_grad) == wrapped.get_nb_trainable_parameters()[0]
    written, theirs = (json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("ours", "peft"))
    same = ("use_rslora", "lora_dropout", "task_type", "bias", "init_lora_weights")
    if said.get("bias") != "all":  # all biases of a model may also be those of adapted modules
        assert {key: written[key] for key in same} == {key: theirs[key] for key in same}
    assert origin_of(mine, "default").rules == "peft"


def test_the_config_may_be_an_object_its_mapping_or_its_file_and_peft_is_not_imported(
    models: dict[str, Case], tmp_path: Path
) -> None:
    _, graph = models["llama"]
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    config.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    plans = [lora_fx.plan(graph, each) for each in (config, config.to_dict(), file, str(file))]
    assert {str(plan).replace("adapter_config", "peft") for plan in plans} == {str(plans[0])}
    assert str(plans[0]).splitlines()[-1].startswith("4 of 16 sites chosen by rules 'peft'")
    assert "chosen: peft:target_modules" in str(plans[0])
    assert "skipped: target_modules does not name it" in str(plans[0])
    raised = lora_fx.plan(graph, config, rank=5, alpha=2, dropout=0.0)
    assert {(b.setting.rank, b.setting.alpha, b.setting.dropout) for c in raised.chosen for b in c.branches} == {
        (5, 2, 0.0)
    }
    code = "import sys, lora_fx; from lora_fx.rules.lookup import load; load(sys.argv[1]); assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(file)], check=True)


Q = {"target_modules": ["q_proj"]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": (
        {"target_modules": ["q_porj"]},
        "target_modules: no call site is q_porj (did you mean 'q_proj' or 'v_proj' or 'o_proj'?); the model's sites end in down_proj, ",
    ),
    "a module that is no product": (
        {"target_modules": ["q_proj", "mlp"]},
        "target_modules: 'model.layers.0.mlp' is no linear layer, convolution or embedding that the model calls",
    ),
    "another method": ({"peft_type": "IA3"}, "peft_type: expected 'LORA', the only method of lora_fx, found 'IA3'"),
    "a variant": (
        {**Q, "use_qalora": True},
        "use_qalora: QA-LoRA is not supported: found True. Leave it out, or train with PEFT",
    ),
    "a start": (
        {**Q, "init_lora_weights": "corda"},
        "init_lora_weights: expected true, false, 'gaussian', 'orthogonal', 'pissa', 'olora', 'mica' or 'pissa_niter_16', by which factors start "
        "without data, found 'corda'. Pass start= to rewrite (lora_fx.eva makes that of EVA), leave it out",
    ),
    "a later key": (
        {**Q, "use_wonder": 2},
        "use_wonder: unknown key: found 2. Leave it out if the result does not depend on it",
    ),
    "a task that is none": ({**Q, "task_type": "SEQ_CLASS"}, "task_type: expected 'SEQ_CLS', 'SEQ_2_SEQ_LM'"),
    "dropout on a parameter": (
        {"target_parameters": ["q_proj.weight"], "lora_dropout": 0.1},
        "lora_dropout: PEFT has none with target_parameters: expected 0",
    ),
    "a bad rank": ({**Q, "r": 0}, "r: expected an integer ≥ 1, found 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_config_asks_for_and_cannot_be_done_is_refused_by_name(case: str, models: dict[str, Case]) -> None:
    said, problem = REFUSED[case]
    with pytest.raises(lora_fx.RuleError) as caught:
        lora_fx.rewrite(models["llama"][1], {"peft_type": "LORA", **said})
    assert problem in str(caught.value)


def test_what_are_no_rules_is_told(models: dict[str, Case]) -> None:
    with pytest.raises(
        lora_fx.RuleError,
        match="rules: expected a name, a path, names of modules, a mapping, loaded rules or a configuration of PEFT, got int",
    ):
        lora_fx.rewrite(models["llama"][1], 4)  # type: ignore[arg-type]


def test_all_problems_of_a_config_are_told_at_once(models: dict[str, Case]) -> None:
    said = {"peft_type": "LORA", "use_qalora": True, "r": 0, "init_lora_weights": "loftq", "task_type": "X", "new": 1}
    with pytest.raises(lora_fx.RuleError) as caught:
        lora_fx.rewrite(models["llama"][1], said)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "use_qalora", "new", "init_lora_weights", "task_type", "r",
    ]  # fmt: skip


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)  # type: ignore[no-any-return]


def test_a_config_without_modules_needs_a_model_of_a_known_type() -> None:
    with pytest.raises(
        lora_fx.RuleError, match="LoraConfig: target_modules: required, since no built-in rules name the modules"
    ):
        lora_fx.rewrite(Named(), peft.LoraConfig(), example_inputs=(torch.ones(2, 5),))


def test_ensured_weight_tying_trains_one_copy_and_one_pair_of_factors() -> None:
    torch.manual_seed(8)
    tied = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)).eval()
    graph = lora_fx.trace(tied)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    mine = lora_fx.rewrite(graph, config)
    assert lora_fx.parameter_summary(mine).trainable == 48 * 24 + 2 * 8 * 48
    with pytest.warns(UserWarning, match="of which model.embed_tokens.weight has a copy of its own from here on"):
        lora_fx.rewrite(graph, {**config.to_dict(), "ensure_weight_tying": False})
    shared = peft.LoraConfig(target_modules=["lm_head"], ensure_weight_tying=True)
    both = lora_fx.rewrite(graph, shared)
    assert {name.partition(".lora_")[0] for name, p in both.named_parameters() if p.requires_grad} == {
        "model.embed_tokens"
    }
    with pytest.raises(lora_fx.RuleError) as caught:
        lora_fx.rewrite(graph, {**shared.to_dict(), "rank_pattern": {"lm_head": 4}})
    assert str(caught.value) == (
        "rules: ensure_weight_tying: 'lm_head' and 'model.embed_tokens' have the same factors, and rank_pattern or alpha_pattern gives "
        "them different ones"
    )


def test_the_command_line_takes_the_file_of_a_config(models: dict[str, Case], tmp_path: Path) -> None:
    models["llama"][0].config.save_pretrained(tmp_path)
    (tmp_path / "lora.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "target_modules": ["k_proj"]}))
    done = CliRunner().invoke(app, ["plan", str(tmp_path), "--rules", str(tmp_path / "lora.json")])
    assert done.exit_code == 0, done.output
    assert "2 of 15 sites chosen by rules 'lora'" in done.output
