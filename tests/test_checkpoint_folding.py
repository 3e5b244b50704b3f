"""Adapters folded into a checkpoint on disk give the model that folding the graph gives, and transformers loads it."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, build, rows, run
from conftest import set_factors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import lora_fx
from lora_fx.cli import app
from lora_fx.folding.checkpoint_plan import fold_checkpoint, plan_checkpoint_fold
from lora_fx.graph.state import State
from lora_fx.tracing.transformers_models import empty_model, untie_as_loaded

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

IN_TRANSFORMERS = [
    pytest.param(row.values[0], dtype, id=f"{row.values[0]}-{dtype}".replace("torch.", ""), marks=row.marks)
    for dtype, representatives in {
        torch.float32: ("t5",),
        torch.bfloat16: ("gpt2",),
    }.items()
    for row in rows([name for name in ARCHITECTURES if name != "chatglm"], representatives)
]
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


@pytest.mark.parametrize(("name", "dtype"), IN_TRANSFORMERS)
def test_the_merged_directory_loads_and_gives_the_logits_of_the_branched_graph(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = build(name, layers=1).to(dtype)
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
    model = build("gpt2", layers=1).bfloat16()
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


def test_a_tensor_that_one_adapter_replaces_and_another_adds_to_is_refused_with_both_their_names(
    tmp_path: Path,
) -> None:
    model = build("bert")
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    adapter(model, tmp_path / "style", target_modules=["query", "pooler.dense"])
    adapter(model, tmp_path / "head", target_modules=["query"], modules_to_save=["pooler"])
    both = [(tmp_path / name, 1.0) for name in ("style", "head")]
    with pytest.raises(lora_fx.FoldError) as caught:
        plan_checkpoint_fold(tmp_path / "base", both)
    assert str(caught.value) == (
        f"'pooler.dense.weight' is to be both added to, by {tmp_path / 'style'}, and replaced, by {tmp_path / 'head'}. Leave one of "
        "the two adapters out."
    )


def test_strengths_on_disk_are_finite_numbers_of_any_origin(tmp_path: Path) -> None:
    model = build("bert")
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    adapter(model, tmp_path / "a", target_modules=["query"])
    planned = plan_checkpoint_fold(tmp_path / "base", [(tmp_path / "a", np.float32(0.5))])  # type: ignore[list-item]
    assert planned.adapters == ((tmp_path / "a", 0.5),)
    for wrong in (np.float32("nan"), torch.inf, "1"):
        with pytest.raises(lora_fx.LoraFxError, match=r"a: expected a finite number as strength, got"):
            plan_checkpoint_fold(tmp_path / "base", [(tmp_path / "a", wrong)])  # type: ignore[list-item]


def test_tied_weights_are_refused(tmp_path: Path) -> None:
    model = build("gpt2")
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    adapter(model, tmp_path / "a", target_modules=["lm_head"])
    with pytest.raises(lora_fx.FoldError, match="wte") as caught:
        fold_checkpoint(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out")
    assert "tie_word_embeddings" in str(caught.value)
    assert not (tmp_path / "out").exists()


# The config ties, and the files decide.


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def small_llama(*, tie_word_embeddings: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tie_word_embeddings,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def two_values(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint whose config ties embedding and head, of which the files have a value each."""
    directory = tmp_path_factory.mktemp("two values") / "base"
    small_llama(tie_word_embeddings=False).save_pretrained(directory)
    said = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**said, "tie_word_embeddings": True}))
    return directory


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"target_modules": ["lm_head", "q_proj"]}, marks=pytest.mark.matrix),
        {"target_modules": ["embed_tokens"]},
        pytest.param({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, marks=pytest.mark.matrix),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["head", "embedding", "trained head", "both trained"],
)
def test_embedding_and_head_with_a_value_each_are_folded_as_transformers_loads_them(
    settings: dict[str, Any], two_values: Path, tmp_path: Path
) -> None:
    def load(directory: Path) -> Any:
        return transformers.LlamaForCausalLM.from_pretrained(directory).eval()

    wrapped = adapter(load(two_values), tmp_path / "a", **settings)
    with torch.no_grad():  # the trained copies too
        for number, (name, parameter) in enumerate(wrapped.named_parameters()):
            if "modules_to_save" in name:
                parameter.add_(torch.linspace(-0.3, 0.2, parameter.numel()).view_as(parameter) * (number + 1))
    wrapped.save_pretrained(str(tmp_path / "a"))
    ids = torch.arange(3, 18).reshape(3, 5)
    expected = wrapped.merge_and_unload()(input_ids=ids).logits
    plan = plan_checkpoint_fold(two_values, [(tmp_path / "a", 1.0)])
    assert plan.untied == ((EMBEDDING, HEAD),)
    assert (
        f"{EMBEDDING} and {HEAD} are two tensors with other values, and stay apart, as transformers loads them. The config ties them: "
        "set tie_word_embeddings to false for programs that go by it alone"
    ) in str(plan).splitlines()
    plan.write(tmp_path / "out", verify=True)
    loaded = load(tmp_path / "out")
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert (expected - load(two_values)(input_ids=ids).logits).abs().max() > 1e-3


def test_trained_copies_of_a_pair_are_one_tensor_on_disk_if_they_have_one_value_and_refused_otherwise(
    tmp_path: Path,
) -> None:
    model = small_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    wrapped = adapter(model, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    copies = [value for name, value in wrapped.named_parameters() if "modules_to_save" in name]
    with torch.no_grad():
        for value in copies:
            value.copy_(torch.linspace(-0.3, 0.2, value.numel()).view_as(value))
    wrapped.save_pretrained(str(tmp_path / "a"))
    fold_checkpoint(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out")
    memory = lora_fx.fold(lora_fx.from_adapter(model, tmp_path / "a", inference=True)).state_dict()
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert all(torch.equal(value, memory[key]) for key, value in loaded.state_dict().items())
    with torch.no_grad():
        copies[1].add_(0.1)
    wrapped.save_pretrained(str(tmp_path / "b"))
    with pytest.raises(lora_fx.AdapterError) as caught:
        plan_checkpoint_fold(tmp_path / "base", [(tmp_path / "b", 1.0)])
    assert str(caught.value) == (
        f"{tmp_path / 'b'}: model.embed_tokens.weight and lm_head.weight: one tied parameter of the model, which PEFT untied "
        "(modules_to_save without ensure_weight_tying) and trained to two values. Fold the loaded model with lora_fx.from_adapter and "
        "lora_fx.fold, and write it with lora_fx.huggingface.save_pretrained"
    )
    memory = lora_fx.fold(lora_fx.from_adapter(model, tmp_path / "b", inference=True)).state_dict()
    assert torch.equal(memory["lm_head.weight"], copies[1])
    assert torch.equal(memory["model.embed_tokens.weight"], copies[0])


TIED = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


def test_of_tied_names_those_are_untied_that_transformers_loads_apart(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    rest = {key: value for key, value in tensors_of(tmp_path).items() if key not in TIED}
    for values in (
        (0, None, None, 1),
        (None, 0, None, 1),
        (None, 0, 1, None),
        (0, None, None, 0),
        (0, 1, 0, 2),
        (None, None, 0, 0),
        (0, 1, 1, 1),
    ):
        stored = {
            name: torch.full((40, 16), float(value))
            for name, value in zip(TIED, values, strict=True)
            if value is not None
        }
        save_file({**rest, **stored}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded, empty = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path), empty_model(tmp_path)
        untied = untie_as_loaded(empty, {*rest, *stored}, lambda one, other, s=stored: torch.equal(s[one], s[other]))  # type: ignore[misc]

        def ties(model: nn.Module) -> list[bool]:
            return [model.get_parameter(one) is model.get_parameter(other) for one in TIED for other in TIED]

        assert ties(empty) == ties(loaded), values
        assert empty.all_tied_weights_keys == loaded.all_tied_weights_keys
        assert all(name not in loaded.all_tied_weights_keys for _, name in untied)


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


def test_a_config_that_names_other_weights_is_refused(base: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, directory = base
    adapter(model, tmp_path / "a", target_modules=["q_proj"])
    named = shutil.copytree(directory, tmp_path / "base")
    said = {**json.loads((named / "config.json").read_text()), "transformers_weights": "new.safetensors"}
    (named / "config.json").write_text(json.dumps(said))
    shutil.copy(named / "model.safetensors", named / "new.safetensors")
    with pytest.raises(lora_fx.FoldError) as caught:
        plan_checkpoint_fold(named, [(tmp_path / "a", 1.0)])
    assert str(caught.value) == (
        f"{named}: expected the weights in model.safetensors, found that config.json names 'new.safetensors' (transformers_weights), "
        "which transformers loads. Rename that to model.safetensors, and remove the key."
    )


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
    assert "6 tensors" in planned.stdout
    assert not out.exists()
    done = call(
        directory, tmp_path / "a", tmp_path / "b", out, "--strength", 1, "--strength", 0.5, "--verify", "--report"
    )
    assert done.exit_code == 0, done.output
    assert "6 weights" in done.stdout
    first = tensors_of(out)
    again = call(directory, tmp_path / "a", out)
    assert again.exit_code == 5
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
    assert missing.exit_code == 3
    assert "expected a PEFT adapter" in missing.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


def test_a_strength_scales_branches_and_takes_trained_modules_whole(tmp_path: Path, caplog: Any) -> None:
    model = small_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    adapter(model, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    fold_checkpoint(tmp_path / "base", [(tmp_path / "a", 0.5)], tmp_path / "out")
    assert caplog.messages == [
        f"adapter '{tmp_path / 'a'}' acts at strength 0.5, which scales its branches; its trained copies of lm_head.weight are taken whole."
    ]
    graph = lora_fx.from_adapter(model, tmp_path / "a", inference=True)
    expected, found = lora_fx.fold(graph, {"default": 0.5}).state_dict(), tensors_of(tmp_path / "out")
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_an_adapter_in_float64_is_folded_into_a_checkpoint_in_float64_as_peft_merges_it(tmp_path: Path) -> None:
    base: Any = build("gpt2", layers=1).double()
    base.save_pretrained(tmp_path / "base")
    wrapped = adapter(base, tmp_path / "a", target_modules=["c_attn", "wpe"])
    fold_checkpoint(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out", verify=True)
    found, before = tensors_of(tmp_path / "out"), base.state_dict()
    merged = wrapped.merge_and_unload().state_dict()
    assert {key for key in found if not torch.equal(found[key], before[key])} == {
        "transformer.wpe.weight",
        "transformer.h.0.attn.c_attn.weight",
    }
    for key, value in found.items():
        assert value.dtype == torch.float64
        assert torch.allclose(value, merged[key], rtol=0, atol=1e-14)


def test_an_adapter_in_float64_is_not_rounded_for_a_checkpoint_in_float32(tmp_path: Path) -> None:
    base: Any = build("gpt2", layers=1)
    base.save_pretrained(tmp_path / "base")
    adapter(copy.deepcopy(base).double(), tmp_path / "a", target_modules=["c_attn"])
    with pytest.raises(
        lora_fx.AdapterError, match=r"c_attn.lora_A.weight: expected torch.float32.*found torch.float64"
    ):
        fold_checkpoint(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
