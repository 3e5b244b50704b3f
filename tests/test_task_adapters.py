"""Adapters of a task over a pretrained checkpoint: its class, its head, and its number of labels come from the adapter."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import few
from conftest import set_factors
from safetensors.torch import load_file
from typer.testing import CliRunner

import lora_fx
from lora_fx.cli import app
from lora_fx.folding.checkpoint_plan import fold_checkpoint

SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore::FutureWarning")


def pretrained(root: Path, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
    """A masked language model on disk, whose config names it."""
    torch.manual_seed(1)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)).to(dtype)
    model.save_pretrained(root / "base", **saving)
    return root / "base"


def classifier(base: Path, kind: Any = transformers.BertForTokenClassification, **settings: Any) -> Any:
    torch.manual_seed(2)
    return kind.from_pretrained(base, **{"num_labels": 3, **settings}).eval()


def trained(model: Any, directory: Path, **settings: Any) -> tuple[Path, torch.Tensor]:
    """An adapter of PEFT's with values that are not zero, head included, and the logits that it was saved with."""
    wrapped = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(**{"r": 3, "target_modules": ["query", "value"], **settings})
    )
    set_factors(wrapped)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype))
        wrapped.eval().save_pretrained(str(directory))
        outputs = wrapped(**BATCH)
    return directory, outputs[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a pretrained ``base``, and an ``adapter`` of a classifier of tokens with three labels."""
    root = tmp_path_factory.mktemp("task")
    _, logits = trained(classifier(pretrained(root)), root / "adapter", task_type="TOKEN_CLS")
    torch.save(logits, root / "logits.pt")
    return root


def loaded(directory: Path) -> tuple[Any, torch.Tensor, dict[str, Any]]:
    """What transformers loads by the class that the config names."""
    kind = getattr(transformers, json.loads((directory / "config.json").read_text())["architectures"][0])
    model, report = kind.from_pretrained(directory, output_loading_info=True)
    with torch.no_grad():
        return model, model.eval()(**BATCH)[0], report


@pytest.mark.parametrize("saving", few([{}, {"max_shard_size": "20KB"}], [{}]), ids=["one file", "shards"])
def test_a_classifier_is_folded_onto_its_pretrained_body_with_the_head_and_the_labels_of_the_adapter(
    saving: dict[str, Any], tmp_path: Path
) -> None:
    base = pretrained(tmp_path, **saving)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    adapter, expected = trained(classifier(base), tmp_path / "adapter", task_type="TOKEN_CLS")
    done = CliRunner().invoke(app, ["fold", str(base), str(adapter), str(tmp_path / "out"), "--verify", "--report"])
    assert done.exit_code == 0, done.output
    assert (
        "the result is a BertForTokenClassification, which the adapter was trained on, in config.json too; added: classifier.weight, "
        "classifier.bias"
    ) in " ".join(done.stdout.split())
    model, logits, report = loaded(tmp_path / "out")
    assert not report["missing_keys"]
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert logits.shape == (2, 5, 3)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert not torch.allclose(logits, classifier(base)(**BATCH)[0], atol=1e-2)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    head = load_file(adapter / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(model.classifier.weight, head)
    old = {key: value for path in base.glob("*.safetensors") for key, value in load_file(path).items()}
    new = {key: value for path in (tmp_path / "out").glob("*.safetensors") for key, value in load_file(path).items()}
    assert new.keys() - old.keys() == {"classifier.weight", "classifier.bias"}
    assert {key for key in old if not torch.equal(old[key], new[key])} == {
        f"bert.encoder.layer.0.attention.self.{part}.weight" for part in ("query", "value")
    }
    if saving:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        was = json.loads(before["model.safetensors.index.json"])
        assert index["weight_map"].keys() == new.keys()
        assert index["metadata"]["total_size"] - was["metadata"]["total_size"] == (3 * 24 + 3) * 4


def test_the_head_of_a_half_precision_checkpoint_is_rounded_once(tmp_path: Path) -> None:
    base = pretrained(tmp_path, torch.bfloat16)
    adapter, _ = trained(classifier(base, dtype=torch.float32), tmp_path / "adapter", task_type="TOKEN_CLS")
    fold_checkpoint(base, [(adapter, 1.0)], tmp_path / "out", verify=True)
    head = load_file(tmp_path / "out" / "model.safetensors")["classifier.weight"]
    said = load_file(adapter / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert head.dtype == torch.bfloat16
    assert torch.equal(head, said.bfloat16())


def test_the_class_is_that_of_the_adapters_config_where_it_says_no_task_or_is_given(root: Path, tmp_path: Path) -> None:
    base = root / "base"
    adapter, expected = trained(
        classifier(base, transformers.BertForQuestionAnswering, num_labels=2),
        tmp_path / "a",
        modules_to_save=["qa_outputs"],
    )
    said = json.loads((adapter / "adapter_config.json").read_text())
    assert said["auto_mapping"]["base_model_class"] == "BertForQuestionAnswering"
    fold_checkpoint(base, [(adapter, 1.0)], tmp_path / "by config")
    (adapter / "adapter_config.json").write_text(json.dumps({**said, "auto_mapping": None}))
    with pytest.raises(lora_fx.AdapterError, match="qa_outputs"):
        fold_checkpoint(base, [(adapter, 1.0)], tmp_path / "out")
    fold_checkpoint(base, [(adapter, 1.0)], tmp_path / "by name", model_class="BertForQuestionAnswering")
    for name in ("by config", "by name"):
        model, logits, _ = loaded(tmp_path / name)
        assert type(model) is transformers.BertForQuestionAnswering
        assert torch.allclose(logits, expected, atol=1e-5)
    for name, problem in {
        "BertForAnything": "model_class: transformers [^ ]+ has no model class 'BertForAnything'",
        "LlamaForCausalLM": "model_class: LlamaForCausalLM is built from LlamaConfig, and the checkpoint has BertConfig",
    }.items():
        with pytest.raises(lora_fx.LoraFxError, match=problem):
            fold_checkpoint(base, [(adapter, 1.0)], tmp_path / "out", model_class=name)
    assert not (tmp_path / "out").exists()


def test_what_was_random_in_training_and_is_in_no_file_is_named(root: Path, tmp_path: Path) -> None:
    base = root / "base"  # of a masked language model, which has no pooler
    with_pooler = classifier(base, transformers.BertForSequenceClassification)
    adapter, _ = trained(with_pooler, tmp_path / "adapter", task_type="SEQ_CLS")
    for arguments in (
        ["fold", base, adapter, tmp_path / "out"],
        ["export", base, tmp_path / "out", "--adapter", adapter, "-f", "torchscript"],
    ):
        done = CliRunner().invoke(app, [str(each) for each in arguments])
        assert done.exit_code == 3
        told = " ".join(done.stderr.split())
        assert "nor an adapter" in told
        assert "bert.pooler.dense.weight" in told
        assert "which were random where the adapter was trained" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ours", few([False, True], [False]), ids=["of PEFT", "of lora_fx"])
def test_a_classifier_is_exported_from_its_pretrained_body(ours: bool, root: Path, tmp_path: Path) -> None:
    base, adapter, expected = root / "base", root / "adapter", torch.load(root / "logits.pt")
    if ours:
        mine = lora_fx.from_adapter(classifier(base), adapter)
        lora_fx.save_adapter(mine, tmp_path / "ours")  # with a fingerprint of the base, random head included
        adapter = tmp_path / "ours"
    done = CliRunner().invoke(
        app, ["export", str(base), str(tmp_path / "m.pt"), "--adapter", str(adapter), "-f", "torchscript"]
    )
    assert done.exit_code == 0, done.output
    logits = torch.jit.load(str(tmp_path / "m.pt"))(**BATCH)["logits"]
    assert torch.allclose(logits, expected, atol=1e-5)
    if ours:
        fold_checkpoint(base, [(adapter, 1.0)], tmp_path / "out")
        assert torch.allclose(loaded(tmp_path / "out")[1], expected, atol=1e-5)


def test_a_config_that_names_no_class_is_as_transformers_takes_it(root: Path, tmp_path: Path) -> None:
    base = shutil.copytree(root / "base", tmp_path / "base")
    said = json.loads((base / "config.json").read_text())
    del said["architectures"]
    (base / "config.json").write_text(json.dumps(said))
    done = CliRunner().invoke(
        app, ["export", str(base), str(tmp_path / "m.pt"), "--adapter", str(root / "adapter"), "-f", "torchscript"]
    )
    assert done.exit_code == 0, done.output
    logits = torch.jit.load(str(tmp_path / "m.pt"))(**BATCH)["logits"]
    assert torch.allclose(logits, torch.load(root / "logits.pt"), atol=1e-5)
    fold_checkpoint(base, [(root / "adapter", 1.0)], tmp_path / "out")
    assert torch.allclose(loaded(tmp_path / "out")[1], torch.load(root / "logits.pt"), atol=1e-5)


def test_an_adapter_of_the_body_alone_is_folded_and_the_checkpoint_stays_what_it_is(root: Path, tmp_path: Path) -> None:
    base = root / "base"
    body = transformers.BertModel.from_pretrained(base, add_pooling_layer=False).eval()
    adapter, expected = trained(body, tmp_path / "adapter", task_type="FEATURE_EXTRACTION")
    fold_checkpoint(base, [(adapter, 1.0)], tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    merged = transformers.BertModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    assert torch.allclose(merged(**BATCH)[0], expected, atol=1e-5)
    assert not torch.allclose(merged(**BATCH)[0], body(**BATCH)[0], atol=1e-3)


def test_heads_for_different_numbers_of_labels_are_refused(root: Path, tmp_path: Path) -> None:
    base = root / "base"
    other, _ = trained(classifier(base, num_labels=5), tmp_path / "5", task_type="TOKEN_CLS")
    pairs = [(root / "adapter", 1.0), (other, 1.0)]
    with pytest.raises(
        lora_fx.AdapterError, match=r"heads for different numbers of labels: 3 in .*/adapter .*; 5 in .*/5 "
    ):
        fold_checkpoint(base, pairs, tmp_path / "out")


def test_the_command_line_names_keys_that_are_to_be_ignored(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "some_future_mode": "per_head"}))
    fold = ["fold", str(root / "base"), str(tmp_path / "adapter"), str(tmp_path / "out")]
    export = [
        "export",
        str(root / "base"),
        str(tmp_path / "m.pt2"),
        "--adapter",
        str(tmp_path / "adapter"),
        "-f",
        "pt2",
    ]
    for arguments in (fold, export):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 3
        assert "If it does not, pass --ignore-config-key some_future_mode." in " ".join(done.stderr.split())
        done = CliRunner().invoke(app, [*arguments, "--ignore-config-key", "some_future_mode"])
        assert "some_future_mode ignored, as --ignore-config-key says" in " ".join(done.stderr.split())
        assert done.exit_code == 0, done.output
