"""Configurations of adapters as every release of PEFT writes them: keys that change the result, and keys that do not."""

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
from conftest import set_factors
from peft.utils import PeftType
from peft_releases import CHANGES, GONE, RELEASES
from safetensors.torch import load_file
from torch import nn

import lora_fx
from lora_fx.graph.adapter_names import original_name
from lora_fx.rules.peft_config.config import AdapterConfig
from lora_fx.rules.peft_config.other_keys import UNUSED, VARIANTS, WITHOUT_EFFECT

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 11), nn.Linear(11, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


X = torch.linspace(-1, 2, 15).reshape(3, 5)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    return Two().eval()


@pytest.fixture(scope="module")
def base(model: nn.Module) -> lora_fx.TracedGraphModule:
    return lora_fx.trace(model, (X,))


@pytest.fixture
def directory(tmp_path: Path, model: nn.Module) -> Path:
    """An adapter of PEFT's, of rank 3 at both products."""
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["first", "last"])
    wrapped = peft.get_peft_model(copy.deepcopy(model), settings)
    set_factors(wrapped)
    wrapped.save_pretrained(str(tmp_path))
    return tmp_path


def with_config(directory: Path, **said: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))


def peft_computes(model: nn.Module, directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(directory)).eval()(X)  # type: ignore[no-any-return]


def we_compute(base: lora_fx.TracedGraphModule, directory: Path, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return lora_fx.load_adapter(base, directory, **options).eval()(X)  # type: ignore[no-any-return]


def test_the_configuration_of_every_release_from_0_1_to_0_21_means_the_same(
    model: nn.Module, base: lora_fx.TracedGraphModule, directory: Path
) -> None:
    expected = peft_computes(model, directory)
    assert not torch.allclose(expected, base.eval()(X), atol=1e-2)
    for version, config in RELEASES.items():
        (directory / "adapter_config.json").write_text(json.dumps(config))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(we_compute(base, directory), expected), version


def test_the_newest_release_of_the_table_is_the_peft_that_is_here(directory: Path) -> None:
    said = json.loads((directory / "adapter_config.json").read_text())
    ignored = {"base_model_name_or_path", "target_modules", "peft_version", "task_type", "auto_mapping"}
    newest = RELEASES["0.21.2"]
    assert {key: said[key] for key in said.keys() - ignored} == {key: newest[key] for key in newest.keys() - ignored}
    assert said.keys() == newest.keys()


ON: dict[str, Any] = {
    "merge_weights": True, "megatron_core": "megatron.other", "qalora_group_size": 32, "runtime_config": {"ephemeral_gpu_offload": True},
    "corda_config": {"corda_method": "ipm"}, "eva_config": {"rho": 3.0}, "loftq_config": {"loftq_bits": 8}, "lora_ga_config": {"direction": "ArB2r"},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*specified but will be ignored")
def test_keys_without_effect_on_the_result_have_none_in_peft_either(
    model: nn.Module, base: lora_fx.TracedGraphModule, directory: Path
) -> None:
    expected = peft_computes(model, directory)
    assert ON.keys() == WITHOUT_EFFECT
    for key, value in ON.items():
        with_config(directory, **ON | {key: value})
        assert torch.equal(peft_computes(model, directory), expected), key
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(we_compute(base, directory), expected)
        with_config(
            directory, layers_pattern="", some_new_config=None, other={}, third=[], fourth="", fifth=0, sixth=0.0
        )
        assert torch.equal(we_compute(base, directory), expected)


def test_every_key_of_every_release_is_applied_or_refused_or_without_effect(
    base: lora_fx.TracedGraphModule, directory: Path
) -> None:
    written = {key for change in CHANGES.values() for key in change}
    others = written - AdapterConfig.model_fields.keys()
    assert others == (VARIANTS.keys() | WITHOUT_EFFECT) - {"runtime_config"}  # which is never written
    assert others - {key for key in others if CHANGES["0.3.0"].get(key) == GONE} == UNUSED.keys()
    for key, name in VARIANTS.items():
        with_config(directory, **{**dict.fromkeys(VARIANTS), key: {"a": 1}})
        for ignored in ((), (key,)):
            with pytest.raises(lora_fx.AdapterError, match=r"^[^\n]*Merge the adapter with PEFT") as caught:
                lora_fx.load_adapter(base, directory, ignore_config_keys=ignored)
            told = ", and cannot be ignored, since the result depends on it" if ignored else ""
            folds = key in (
                "kasa_config",
                "monteclora_config",
                "use_qalora",
                "velora_config",
            )  # see test_affine_folding
            way = ", or fold a trace of PEFT's model: lora_fx.fold(lora_fx.trace(peft_model, inference=True))" * folds
            assert caught.value.problems == (
                f"{key}: {name} is not supported{told}: found {{'a': 1}}. Merge the adapter with PEFT, and use the result{way}",
            )


def test_a_key_of_a_peft_that_does_not_exist_yet_is_refused_by_name_unless_it_is_to_be_ignored(
    model: nn.Module, base: lora_fx.TracedGraphModule, directory: Path
) -> None:
    expected = peft_computes(model, directory)
    with_config(directory, some_future_mode="per_head", other_mode=2, off_mode=None)
    with pytest.raises(lora_fx.AdapterError) as caught:
        lora_fx.load_adapter(base, directory, ignore_config_keys=["other_mode"])
    assert caught.value.problems == (
        "some_future_mode: unknown key, on which the result may depend: found 'per_head'. If it does not, pass "
        "ignore_config_keys=['some_future_mode']. Merge the adapter with PEFT, and use the "
        "result otherwise",
    )
    both = ["some_future_mode", "other_mode", "off_mode", "not_there"]
    for load in (
        lambda: we_compute(base, directory, ignore_config_keys=both),
        lambda: lora_fx.from_adapter(model, directory, ignore_config_keys=both, example_inputs=(X,)).eval()(X),
    ):
        with pytest.warns(UserWarning, match="ignored") as told:
            found = load()
        assert torch.equal(found, expected)
        assert [str(each.message) for each in told] == [
            f"{directory / 'adapter_config.json'}: some_future_mode, other_mode ignored, as ignore_config_keys says."
        ]
        assert told[0].filename == __file__
    with pytest.raises(lora_fx.AdapterError, match="r: is applied, and cannot be ignored"):
        lora_fx.load_adapter(base, directory, ignore_config_keys=[*both, "r"])
    with pytest.raises(
        lora_fx.AdapterError, match="ignore_config_keys: expected a list of keys, got 'some_future_mode'"
    ):
        lora_fx.load_adapter(base, directory, ignore_config_keys="some_future_mode")


def test_a_directory_of_another_method_is_told_in_one_line_whatever_else_is_in_it(
    base: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    methods = {method.value for method in PeftType} - {"LORA", "TRAINABLE_TOKENS", "PREFIX_TUNING", "PROMPT_TUNING"} | {
        "BONE"
    }  # the last of PEFT 0.14 to 0.18
    for method in methods:
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({"peft_type": method, "r": "many", "num_virtual_tokens": 20})
        )
        with pytest.raises(lora_fx.AdapterError) as caught:
            lora_fx.load_adapter(base, tmp_path)
        assert "\n" not in str(caught.value)
        assert "and lora_fx applies LoRA alone: " in str(caught.value), method
    for method, told in {
        "IA3": "found 'IA3', an adapter of IA³, and lora_fx applies LoRA alone: merge it with PEFT "
        "(PeftModel.from_pretrained(model, directory).merge_and_unload()), and use the result",
        "P_TUNING": "found 'P_TUNING', an adapter of P-tuning, and lora_fx applies LoRA alone: run it with PEFT; no "
        "weights can hold it",
        "OF_THE_FUTURE": "the only method that lora_fx applies, found 'OF_THE_FUTURE'",
        None: "the only method that lora_fx applies, found no such key: this is no PEFT adapter",
    }.items():
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": method, "r": "many"}))
        with pytest.raises(lora_fx.AdapterError) as caught:
            lora_fx.load_adapter(base, tmp_path)
        assert str(caught.value) == f"{tmp_path / 'adapter_config.json'}: peft_type: expected 'LORA', {told}"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def llama(request: pytest.FixtureRequest) -> tuple[nn.Module, lora_fx.TracedGraphModule]:
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32,
        tie_word_embeddings=request.param,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config).eval()
    return made, lora_fx.trace(made)


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["q_proj"]}, {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}],
    ids=["nothing tied", "embedding trains", "head trains"],
)
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`", "ignore:Setting `save_embedding_layers`")
def test_ensured_weight_tying_changes_nothing_where_nothing_tied_is_touched_and_trains_one_copy_where_it_is(
    llama: tuple[nn.Module, lora_fx.TracedGraphModule], settings: dict[str, Any], tmp_path: Path
) -> None:
    model, base = llama
    mask = {"attention_mask": torch.ones_like(IDS)}
    options = {
        "r": 2,
        "target_modules": ["q_proj"],
        "ensure_weight_tying": True,
        **copy.deepcopy(settings),
    }  # PEFT adds to it
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
    set_factors(wrapped)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape))
        wrapped.eval().save_pretrained(str(tmp_path / "peft"))
        expected = wrapped(input_ids=IDS, **mask).logits
    loaded = lora_fx.load_adapter(base, tmp_path / "peft").eval()
    copies = [name for name, _ in loaded.named_parameters() if original_name(name) is not None]
    assert len(copies) == ("modules_to_save" in settings)
    assert torch.equal(loaded(input_ids=IDS, **mask).logits, expected)
    lora_fx.save_adapter(loaded, tmp_path / "ours")
    said = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert said["ensure_weight_tying"] == (model.config.tie_word_embeddings and "modules_to_save" in settings)  # type: ignore[union-attr]
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours"), is_trainable=True).eval()
    assert torch.equal(again(input_ids=IDS, **mask).logits, expected)
    trained = {id(p) for name, p in again.named_parameters() if p.requires_grad and "modules_to_save" in name}
    assert len(trained) == len(copies)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
@pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:Model with `tie_word_embeddings", "ignore:You have requested"
)
def test_the_factors_of_a_tied_embedding_are_those_of_its_head_transposed_and_train_and_fold_as_one(
    llama: tuple[nn.Module, lora_fx.TracedGraphModule], targets: list[str], tmp_path: Path
) -> None:
    model, base = llama
    mask = {"attention_mask": torch.ones_like(IDS)}
    options = {"r": 2, "target_modules": ["q_proj", *targets], "ensure_weight_tying": True}
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
    set_factors(wrapped)
    wrapped.eval().save_pretrained(str(tmp_path))
    with torch.no_grad():
        expected = wrapped(input_ids=IDS, **mask).logits
    loaded = lora_fx.load_adapter(base, tmp_path, trainable=True).eval()
    tied = model.config.tie_word_embeddings  # type: ignore[union-attr]
    names = {name.partition(".lora_")[0] for name, p in loaded.named_parameters() if p.requires_grad}
    assert ("lm_head" in names) == (not tied and "lm_head" in targets)
    with torch.no_grad():
        logits = loaded(input_ids=IDS, **mask).logits
        assert torch.allclose(logits, expected, atol=2e-6)  # PEFT multiplies by transposed views of the factors
        assert not torch.allclose(logits, base.eval()(input_ids=IDS, **mask).logits, atol=1e-2)
        folded = lora_fx.fold(loaded)
        assert torch.allclose(folded(input_ids=IDS, **mask).logits, expected, atol=2e-5)
        assert (folded.get_parameter("lm_head.weight") is folded.get_parameter("model.embed_tokens.weight")) == tied
        combined = lora_fx.combine(loaded, {"default": 1.0}, adapter="alone")
        assert torch.allclose(combined(input_ids=IDS, **mask).logits, expected, atol=2e-5)
        assert torch.equal(copy.deepcopy(loaded)(input_ids=IDS, **mask).logits, logits)
        assert torch.equal(lora_fx.fuse(loaded)(input_ids=IDS, **mask).logits, logits) or not tied
    lora_fx.save_adapter(loaded, tmp_path / "again")
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == {
        key for key in load_file(tmp_path / "adapter_model.safetensors") if "base_layer" not in key
    }
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "again")).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS, **mask).logits, expected)
