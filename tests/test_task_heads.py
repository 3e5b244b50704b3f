"""Task heads: what the rules leave out, the ranks of narrow sites, and heads that train by the task, against PEFT."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import few
from conftest import set_factors
from torch import nn

import lora_fx
from lora_fx.planning.plan import Skipped
from lora_fx.tracing.module_kinds import PRIVATE_NAMES, task_head

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


def test_all_linear_leaves_out_every_module_of_a_task_head_and_lowers_no_other_rank(
    base: lora_fx.TracedGraphModule,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = lora_fx.plan(base, "all-linear")
    assert {chosen.branches[0].setting.rank for chosen in plan.chosen} == {8}
    assert left_out(base) == {"classifier": "select[0]: its role head is excluded"}
    small = transformers.RobertaConfig(**SIZES, max_position_embeddings=32, num_labels=1)
    roberta = transformers.RobertaForSequenceClassification(small).eval()
    assert left_out(roberta) == {
        "classifier.dense": "select[0]: its role head is excluded",
        "classifier.out_proj": "select[0]: its out_features 1 are outside ≥ 2",
    }
    answers = transformers.BertForQuestionAnswering(transformers.BertConfig(**SIZES)).eval()
    assert left_out(answers) == {"qa_outputs": "select[0]: its role head is excluded"}


def test_all_linear_leaves_out_gates_with_one_output_and_routers() -> None:
    config = transformers.Qwen2MoeConfig(
        **SIZES, num_key_value_heads=1, moe_intermediate_size=12, shared_expert_intermediate_size=20, num_experts=3, num_experts_per_tok=2
    )  # fmt: skip
    model = transformers.Qwen2MoeForCausalLM(config).eval()
    graph = lora_fx.trace(model, inference=True)
    assert left_out(graph) == {
        "model.layers.0.mlp.gate": "select[0]: its role router is excluded",
        "model.layers.0.mlp.shared_expert_gate": "select[0]: its out_features 1 are outside ≥ 2",
        "lm_head": "select[0]: its role head is excluded",
    }
    theirs = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=30)
    mine = lora_fx.plan(graph, theirs)  # PEFT's set, with its ranks
    wrapped = peft.get_peft_model(model, theirs)
    peers = {n: m for n, m in wrapped.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {chosen.site.module for chosen in mine.chosen} == set(peers)
    assert "model.layers.0.mlp.shared_expert_gate" in peers
    assert {chosen.branches[0].setting.rank for chosen in mine.chosen} == {30}


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS"])
def test_all_linear_of_peft_trains_the_head_whole_where_peft_raises(task: str) -> None:
    kind = transformers.BertForTokenClassification if task == "TOKEN_CLS" else transformers.BertForQuestionAnswering
    model = kind(transformers.BertConfig(**SIZES, num_labels=2)).eval()
    config = peft.LoraConfig(target_modules="all-linear", task_type=task, r=2)
    graph = lora_fx.trace(model, inference=True)
    plan = lora_fx.plan(graph, copy.deepcopy(config))
    head = "classifier" if task == "TOKEN_CLS" else "qa_outputs"
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {chosen.site.module for chosen in plan.chosen} == linears - {head}
    assert {each.name for each in plan.trained} == {f"{head}.weight", f"{head}.bias"}
    with pytest.raises(TypeError, match="modules_to_save cannot be applied to modules of type"):
        peft.get_peft_model(model, copy.deepcopy(config))


FRESH = (
    "the task head of {kind} is not known to have values from a checkpoint, and neither trains nor gets a branch: {head}. If it is "
    "random, it stays so. {advice}, as a whole."
)


def told_by(model: nn.Module, rules: Any = "auto", **options: Any) -> tuple[lora_fx.TracedGraphModule, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = lora_fx.rewrite(model, rules, **options)
    found = [each for each in caught if "task head" in str(each.message)]
    assert all(each.filename == __file__ for each in found)
    return made, [str(each.message) for each in found]


def trained_of(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_a_head_that_no_checkpoint_gave_is_named_once_and_loaded_trained_or_adapted_ones_are_not(
    base: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    classes = "BertForSequenceClassification"
    told = FRESH.format(kind=classes, head="classifier", advice="Say task_type='SEQ_CLS' to train it")
    assert told_by(base)[1] == [told]
    trained, silent = told_by(base, task_type="SEQ_CLS")
    assert silent == []
    assert told_by(trained, adapter="second")[1] == []  # the first adapter's copy is the head
    assert told_by(base, {"select": [{"target": ["query", "classifier"]}]}, rank=2)[1] == []
    assert told_by(base, {"select": [{"target": ["query"]}, {"target": ["classifier"], "trainable": "all"}]})[1] == []
    assert told_by(lora_fx.trace(bert(), inference=True))[1] == []  # of which nothing trains
    bert().bert.save_pretrained(tmp_path / "without")
    bert().save_pretrained(tmp_path / "with")
    load = transformers.BertForSequenceClassification.from_pretrained
    assert told_by(load(tmp_path / "without", num_labels=LABELS))[1] == [told]
    assert told_by(load(tmp_path / "with"))[1] == []
    assert told_by(lora_fx.fold(trained))[1] == []  # its copy is the head now


def test_a_head_of_another_task_is_named_with_the_selection_that_trains_it() -> None:
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, num_labels=LABELS
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    graph, told = told_by(model)
    selection = {"target": ["classifier"], "trainable": "all"}
    advice = f"To train it, add the selection {json.dumps(selection)}".replace('["classifier"]', "['classifier']")
    assert told == [FRESH.format(kind="ViTForImageClassification", head="classifier", advice=f"{advice} to the rules")]
    assert not any("classifier" in name for name in trained_of(graph))


def test_the_private_mark_of_loaded_parameters_is_there(tmp_path: Path) -> None:
    bert().bert.save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=LABELS)
    (mark,) = PRIVATE_NAMES
    fresh = {name for name, parameter in loaded.named_parameters() if not getattr(parameter, mark, False)}
    assert fresh == {"classifier.weight", "classifier.bias"}


TASKS = {
    "SEQ_CLS": (transformers.BertForSequenceClassification, transformers.BertConfig, {"labels": torch.tensor([2, 0])}),
    "TOKEN_CLS": (
        transformers.RobertaForTokenClassification,
        transformers.RobertaConfig,
        {"labels": torch.arange(14).reshape(2, 7) % LABELS},
    ),
    "QUESTION_ANS": (
        transformers.BertForQuestionAnswering,
        transformers.BertConfig,
        {"start_positions": torch.tensor([1, 5]), "end_positions": torch.tensor([3, 6])},
    ),
}


@pytest.mark.parametrize("task", few(TASKS, ["SEQ_CLS"]))
def test_a_task_type_trains_what_peft_trains_step_by_step_and_peft_reads_it_back(task: str, tmp_path: Path) -> None:
    kind, kind_of_config, labels = TASKS[task]
    config = kind_of_config(**SIZES, max_position_embeddings=32, num_labels=LABELS if task != "QUESTION_ANS" else 2)

    def fresh() -> Any:
        torch.manual_seed(3)
        return kind(copy.deepcopy(config)).eval()

    options = {"rank": 2, "alpha": 6, "dropout": 0.0}
    rules = {"select": [{"target": ["query", "value"]}], "defaults": {"task_type": task}}
    mine, told = told_by(fresh(), rules, **options, labels=True, seed=5)
    assert told == []
    theirs = peft.get_peft_model(
        fresh(), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["query", "value"], task_type=task)
    )
    theirs.base_model.model.load_state_dict(  # the same first factors
        {n: p for n, p in mine.named_parameters() if ".lora_A." in n}, strict=False
    )

    def name_of(parameter: str) -> str:
        return parameter.removeprefix("base_model.model.").replace("modules_to_save.", "trained_copy.")

    assert {name_of(name) for name in trained_of(theirs)} == trained_of(mine)
    for module in (mine, theirs):
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            module(**batch(), **labels).loss.backward()
            optimizer.step()
    peers = {name_of(name): parameter for name, parameter in theirs.named_parameters()}
    for name in trained_of(mine):
        torch.testing.assert_close(mine.get_parameter(name), peers[name], rtol=0, atol=1e-6)
    lora_fx.save_adapter(mine, tmp_path / "adapter")
    assert with_config(tmp_path / "adapter")["task_type"] == task
    with torch.no_grad():
        read = peft.PeftModel.from_pretrained(fresh(), str(tmp_path / "adapter")).eval()
        other = lora_fx.from_adapter(fresh(), tmp_path / "adapter").eval()
        expected, plain = read(**batch())[0], fresh()(**batch())[0]
        assert torch.equal(other(**batch())[0], expected)
        assert not torch.allclose(expected, plain, atol=1e-2)
        folded = lora_fx.fold(other).state_dict()
    merged = read.merge_and_unload().state_dict()
    for name, value in merged.items():
        torch.testing.assert_close(folded[name], value, rtol=0, atol=1e-6)


def test_the_whole_head_trains_where_peft_knows_no_name_for_it_and_its_sites_get_no_branch(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(**SIZES, max_position_embeddings=32, num_labels=LABELS)
    model = transformers.RobertaForSequenceClassification(config).eval()
    plan = lora_fx.plan(model, {"select": [{"op": ["linear"]}]}, task_type="SEQ_CLS", rank=2)
    skipped = {decision.site.module: decision.reason for decision in plan if isinstance(decision, Skipped)}
    told = "it trains as a whole, by task_type 'SEQ_CLS'"
    assert skipped["classifier.dense"] == skipped["classifier.out_proj"] == told
    assert {each.name.rpartition(".")[0] for each in plan.trained} == {"classifier.dense", "classifier.out_proj"}
    lora_fx.save_adapter(
        told_by(model, {"select": [{"op": ["linear"]}]}, task_type="SEQ_CLS", rank=2)[0], tmp_path / "adapter"
    )
    read = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter"), is_trainable=True)
    assert {name.rpartition(".modules_to_save")[0] for name in trained_of(read) if "lora" not in name} == {
        "base_model.model.classifier"
    }


@pytest.mark.parametrize(
    ("kind", "config", "head"),
    [
        (transformers.BartForSequenceClassification, transformers.BartConfig, ("classification_head",)),
        (transformers.DebertaV2ForSequenceClassification, transformers.DebertaV2Config, ("pooler", "classifier")),
        (
            transformers.DistilBertForSequenceClassification,
            transformers.DistilBertConfig,
            ("pre_classifier", "classifier"),
        ),
        (transformers.CLIPForImageClassification, transformers.CLIPConfig, ("classifier",)),  # its base model is itself
        (transformers.LlamaForSequenceClassification, transformers.LlamaConfig, ("score",)),
        (transformers.LlamaForCausalLM, transformers.LlamaConfig, ()),
        (transformers.BertForMaskedLM, transformers.BertConfig, ()),
        (transformers.BertModel, transformers.BertConfig, ()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_task_head_is_what_a_model_has_beside_its_base_model(kind: Any, config: Any, head: tuple[str, ...]) -> None:
    with torch.device("meta"):
        model = kind(config())
    assert task_head(model).modules == head


def test_a_task_that_is_none_and_a_head_that_is_not_there_are_refused(base: lora_fx.TracedGraphModule) -> None:
    with pytest.raises(
        lora_fx.RuleError, match=r"defaults\.task_type: expected 'SEQ_CLS', .*'FEATURE_EXTRACTION', found 'seq_cls'"
    ):
        lora_fx.rewrite(base, task_type="seq_cls")
    told = (
        r"defaults\.task_type: SEQ_CLS trains the task head, and the model uses none: no module beside a base model, and none whose name "
        r"ends in classifier or score"
    )
    plain = lora_fx.trace(bert().bert, inference=True)
    with pytest.raises(lora_fx.RuleError, match=told):
        lora_fx.plan(plain, task_type="SEQ_CLS")
    assert lora_fx.plan(plain, task_type="FEATURE_EXTRACTION").trained == ()
