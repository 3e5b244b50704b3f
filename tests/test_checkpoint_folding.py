"""Adapters folded into a checkpoint on disk give the model that folding the graph gives, and transformers loads it."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, EACH, build, run
from conftest import set_factors
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import lora_fx
from lora_fx.cli import app
from lora_fx.folding.checkpoint_plan import fold_checkpoint, plan_checkpoint_fold
from lora_fx.graph.graph_module import State

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

IN_TRANSFORMERS = [each for each in EACH if each.values[0] != "chatglm"]
"""Those that a config describes; ChatGLM's code comes with its checkpoints, and is not run."""


def adapter(base: nn.Module, directory: Path, seed: int = 11, **settings: Any) -> Any:
    """Write an adapter of PEFT's, and return the model that it wrapped."""
    wrapped: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
    set_factors(wrapped, seed)
    wrapped.eval().save_pretrained(str(directory))
    return wrapped


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in directory.glob("*.safetensors") for key, value in load_file(path).items()}


def order_of(directory: Path) -> dict[str, list[str]]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found[path.name] = list(file.offset_keys())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_the_merged_directory_loads_and_gives_the_logits_of_the_branched_graph(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = build(name).to(dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size="100KB")  # type: ignore[operator]
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    adapter(base, tmp_path / "a", target_modules=list(ARCHITECTURES[name].target_modules))
    report = fold_checkpoint(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out", verify=True, report=True)
    graph = lora_fx.from_adapter(base, tmp_path / "a", inference=True)
    merged = lora_fx.fold(graph)
    model = type(base).from_pretrained(tmp_path / "out", dtype=dtype).eval()  # type: ignore[attr-defined]
    found = model.state_dict()
    for key, expected in merged.state_dict().items():
        assert torch.equal(found[key].to(expected.dtype), expected), (
            key
        )  # some of DeBERTa's are made float32 as they load
    size = (3, 11, 5)
    if dtype == torch.float32:
        model.requires_grad_(False)  # as in a graph: attention's kernel depends on it
        mine, theirs, branched, before = (run(name, each, *size)[0].detach() for each in (model, merged, graph, base))
        assert torch.equal(mine, theirs)
        assert torch.allclose(mine, branched, rtol=0, atol=1e-5 * max(1.0, float(branched.abs().max())))
        assert not torch.allclose(mine, before, atol=1e-3)
    assert order_of(tmp_path / "out") == order_of(tmp_path / "base")
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for other in names - set(order_of(tmp_path / "base")):
        assert (tmp_path / "out" / other).read_bytes() == (tmp_path / "base" / other).read_bytes()
    old, new = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert len(changed) == len(report.weights) > 0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = build("llama")
    directory = tmp_path_factory.mktemp("llama") / "base"
    model.save_pretrained(directory)  # type: ignore[operator]
    return model, directory


def test_several_adapters_are_folded_at_their_strengths_with_one_rounding(tmp_path: Path) -> None:
    model = build("gpt2").bfloat16()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    first = {"target_modules": ["c_attn"], "r": 3}
    second = {"target_modules": ["c_attn", "c_proj"], "r": 5, "use_rslora": True}
    adapter(model, tmp_path / "a", 1, **first)
    adapter(model, tmp_path / "b", 2, **second)
    fold_checkpoint(tmp_path / "base", [(tmp_path / "a", 1.0), (tmp_path / "b", -0.5)], tmp_path / "out")
    graph = lora_fx.from_adapter(model, tmp_path / "a", "a", inference=True)
    graph = lora_fx.load_adapter(graph, tmp_path / "b", "b")
    expected = lora_fx.fold(graph, {"a": 1.0, "b": -0.5}).state_dict()
    found = tensors_of(tmp_path / "out")
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_trained_modules_and_biases_take_the_place_of_the_models(tmp_path: Path) -> None:
    config = transformers.BertConfig(vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(target_modules=["query"], bias="lora_only", modules_to_save=["classifier"]),
    )
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.eval().save_pretrained(str(tmp_path / "a"))
    fold_checkpoint(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out")
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    batch = {"input_ids": torch.randint(0, 60, (3, 7))}
    assert torch.allclose(loaded(**batch).logits, wrapped(**batch).logits, atol=1e-6)
    assert not torch.allclose(loaded(**batch).logits, model(**batch).logits, atol=1e-3)


def test_names_are_looked_up_as_often_for_many_trained_copies_as_for_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.BertConfig(vocab_size=60, hidden_size=24, num_hidden_layers=1, num_attention_heads=4)
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    names, callers = State.names, []

    def counted(state: State) -> Any:
        callers.append(sys._getframe(1).f_globals["__name__"])
        return names(state)

    monkeypatch.setattr(State, "names", counted)
    replaced, asked = [], []
    for bias in ("none", "all"):
        adapter(model, tmp_path / bias, target_modules=["query"], bias=bias)
        callers.clear()
        plan = plan_checkpoint_fold(tmp_path / "base", [(tmp_path / bias, 1.0)])
        replaced.append(len(plan.changes.replacements))
        asked.append(callers.count("lora_fx.folding.checkpoint_plan"))
    assert replaced[0] == 0
    assert replaced[1] > 5
    assert asked[0] == asked[1] > 0


def test_a_checkpoint_of_a_model_without_its_head_is_found_by_the_names_of_transformers(tmp_path: Path) -> None:
    headless = transformers.LlamaModel(transformers.LlamaConfig(
        vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    )).eval()  # fmt: skip
    headless.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    whole = transformers.LlamaForCausalLM(headless.config)
    whole.model = headless
    whole.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    adapter(headless, tmp_path / "a", target_modules=["q_proj"])
    fold_checkpoint(tmp_path / "whole", [(tmp_path / "a", 1.0)], tmp_path / "out")
    expected = lora_fx.fold(lora_fx.from_adapter(headless, tmp_path / "a", inference=True)).state_dict()
    found = tensors_of(tmp_path / "out")
    assert all(torch.equal(found[f"model.{key}"], value) for key, value in expected.items())


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    config = transformers.MixtralConfig(
        vocab_size=60, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    directory = tmp_path_factory.mktemp("mixtral") / "base"
    model.save_pretrained(directory)
    return model, directory


def test_what_transformers_makes_of_other_tensors_as_it_loads_is_refused(
    mixtral: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    model, directory = mixtral
    adapter(model, tmp_path / "attention", target_modules=["q_proj"])
    fold_checkpoint(directory, [(tmp_path / "attention", 1.0)], tmp_path / "out")
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    graph = lora_fx.from_adapter(model, tmp_path / "attention", inference=True)
    assert all(torch.equal(loaded[key], value) for key, value in lora_fx.fold(graph).state_dict().items())
    adapter(model, tmp_path / "experts", target_modules=[], target_parameters=["experts.gate_up_proj"])
    with pytest.raises(
        lora_fx.FoldError, match=r"does not store '.*gate_up_proj' as the model has it: transformers makes it of"
    ):
        fold_checkpoint(directory, [(tmp_path / "experts", 1.0)], tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_tied_weights_are_refused(tmp_path: Path) -> None:
    model = build("gpt2")
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    adapter(model, tmp_path / "a", target_modules=["lm_head"])
    with pytest.raises(lora_fx.FoldError, match="wte") as caught:
        fold_checkpoint(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out")
    assert "tie_word_embeddings" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_embeddings_that_peft_adds_to_a_file_are_compared_with_the_checkpoint(
    base: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    model, directory = base
    adapter(model, tmp_path / "a", target_modules=["embed_tokens"])
    fold_checkpoint(directory, [(tmp_path / "a", 1.0)], tmp_path / "out")
    changed = (
        tensors_of(directory)["model.embed_tokens.weight"] != tensors_of(tmp_path / "out")["model.embed_tokens.weight"]
    )
    assert changed.any()
    with pytest.raises(lora_fx.AdapterError, match=r"another value than the model's 'model\.embed_tokens\.weight'"):
        fold_checkpoint(tmp_path / "out", [(tmp_path / "a", 1.0)], tmp_path / "twice")


def test_another_base_is_refused_or_told(base: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, directory = base
    graph = lora_fx.rewrite(lora_fx.trace(model), "llama", rank=3)
    set_factors(graph)
    lora_fx.save_adapter(graph, tmp_path / "a")
    fold_checkpoint(directory, [(tmp_path / "a", 1.0)], tmp_path / "out")
    with pytest.raises(lora_fx.AdapterError, match="trained on another base") as caught:
        fold_checkpoint(tmp_path / "out", [(tmp_path / "a", 1.0)], tmp_path / "twice")
    assert "model.layers.0.self_attn.q_proj.weight: other values" in str(caught.value)
    with pytest.warns(UserWarning, match="trained on another base"):
        fold_checkpoint(tmp_path / "out", [(tmp_path / "a", 1.0)], tmp_path / "twice", strict=False)


def test_a_quantised_checkpoint_is_refused(base: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, directory = base
    adapter(model, tmp_path / "a", target_modules=["q_proj"])
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    for path in directory.iterdir():
        (quantised / path.name).write_bytes(path.read_bytes())
    config = json.loads((quantised / "config.json").read_text())
    said = {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (quantised / "config.json").write_text(json.dumps(said))
    with pytest.raises(
        lora_fx.FoldError, match=r"its weights are quantised \(gptq\), and nothing can be added to them"
    ):
        plan_checkpoint_fold(quantised, [(tmp_path / "a", 1.0)])


def test_the_command_line(base: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, directory = base
    adapter(model, tmp_path / "a", target_modules=["q_proj", "v_proj"])
    adapter(model, tmp_path / "b", target_modules=["k_proj"], r=2)
    runner = CliRunner()
    out = tmp_path / "out"

    def call(*arguments: object) -> Any:
        return runner.invoke(app, ["fold", *map(str, arguments)])

    planned = call(directory, tmp_path / "a", tmp_path / "b", out, "--dry-run", "--strength", 1, "--strength", 0.5)
    assert planned.exit_code == 0
    assert "model.layers.0.self_attn.k_proj.weight" in planned.stdout
    assert "1.5 · B A of rank 2" in planned.stdout
    assert "9 tensors" in planned.stdout
    assert not out.exists()
    done = call(
        directory, tmp_path / "a", tmp_path / "b", out, "--strength", 1, "--strength", 0.5, "--verify", "--report"
    )
    assert done.exit_code == 0, done.output
    assert "9 weights" in done.stdout
    first = tensors_of(out)
    again = call(directory, tmp_path / "a", out)
    assert again.exit_code == 1
    assert "exists already" in again.output
    quiet = call(directory, tmp_path / "a", out, "--overwrite")
    assert quiet.exit_code == 0
    assert "weights" not in quiet.stdout  # the report is printed when it is asked for
    assert f"{out}: " in quiet.stdout
    second = tensors_of(out)
    key = "model.layers.0.self_attn.k_proj.weight"
    assert not torch.equal(first[key], second[key])
    assert torch.equal(second[key], tensors_of(directory)[key])
    assert "name the base, one adapter or more" in call(directory, out).output
    assert (
        "1 adapters, and 2 strengths" in call(directory, tmp_path / "a", out, "--strength", 1, "--strength", 2).output
    )
    missing = call(directory, tmp_path / "nowhere", tmp_path / "other")
    assert missing.exit_code == 1
    assert "expected a PEFT adapter" in missing.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]
