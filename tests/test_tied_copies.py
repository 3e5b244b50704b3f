"""Trained copies of a tied embedding and head: one for both, or, where PEFT unties them, one for each module that trains."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx.folding.checkpoint_plan import fold_checkpoint

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def tied_llama() -> Any:
    torch.manual_seed(1)
    sizes = {"vocab_size": 48, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_key_value_heads=2, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config).eval()


def config(*saved: str, **settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=list(saved), **settings)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def moved(model: torch.nn.Module, seed: int) -> None:
    """Add something to all that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture(scope="module")
def base() -> lora_fx.TracedGraphModule:
    return lora_fx.trace(tied_llama())


def saved_by_peft(directory: Path, *names: str, seed: int = 2, **settings: Any) -> Any:
    model = peft.get_peft_model(tied_llama(), config(*names, **settings)).eval()
    moved(model, seed)
    model.save_pretrained(str(directory))
    return model


SOLE = (
    f"{EMBEDDING} and {HEAD} are one parameter, of which {{}} has a copy of its own from here on, as with PEFT (modules_to_save without "
    "ensure_weight_tying): training and fold untie them. Say ensure_weight_tying to train one copy."
)


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids="+".join)
def test_a_module_that_peft_unties_has_a_copy_of_its_own(
    base: lora_fx.TracedGraphModule, names: list[str], tmp_path: Path
) -> None:
    model = saved_by_peft(tmp_path / "a", *names)
    with pytest.warns(UserWarning, match="untie them") as caught:
        graph = lora_fx.from_adapter(base, tmp_path / "a", trainable=True)
    told = [name for name in (EMBEDDING, HEAD) if name.split(".")[-2] in names]
    expected = (
        SOLE.format(told[0])
        if len(told) == 1
        else SOLE.format(" and ".join(told)).replace("has a copy of its own", "have copies of their own")
    )
    assert [str(each.message) for each in caught] == [f"{tmp_path / 'a'}: {expected}"]
    assert torch.equal(logits(graph), logits(model))
    assert lora_fx.parameter_summary(graph).trainable == 24 * 3 * 2 + 48 * 24 * len(names)
    for copied in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert torch.equal(logits(lora_fx.fold(copied)), logits(lora_fx.fold(graph)))
    folded, merged = lora_fx.fold(graph), model.merge_and_unload()
    assert torch.equal(logits(folded), logits(merged))
    assert all(torch.equal(value, folded.state_dict()[name]) for name, value in merged.state_dict().items())
    assert folded.get_parameter(HEAD) is not folded.get_parameter(EMBEDDING)
    plain = lora_fx.unload(graph)
    assert str(plain.graph) == str(base.graph)
    assert plain.get_parameter(HEAD) is plain.get_parameter(EMBEDDING)
    lora_fx.save_adapter(graph, tmp_path / "b")
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        again = lora_fx.load_adapter(graph, tmp_path / "b")
    assert torch.equal(logits(again), logits(graph))


def test_two_adapters_have_copies_for_their_own_modules(base: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    models = {
        name: saved_by_peft(tmp_path / name, name, seed=seed) for seed, name in enumerate(("lm_head", "embed_tokens"))
    }
    with pytest.warns(UserWarning, match="untie them"):
        graph = lora_fx.load_adapter(
            lora_fx.from_adapter(base, tmp_path / "lm_head", "a"), tmp_path / "embed_tokens", "b"
        )
    for adapter, name in (("b", "embed_tokens"), ("a", "lm_head")):
        assert torch.equal(logits(lora_fx.activate(graph, {adapter: 1.0})), logits(models[name]))
    both = lora_fx.activate(graph, {"a": 1.0, "b": 1.0})
    values = both.state_dict()
    plain = tied_llama()
    plain.lm_head.weight = torch.nn.Parameter(values["lm_head.trained_copy.a.weight"])
    plain.model.embed_tokens.weight = torch.nn.Parameter(values["model.embed_tokens.trained_copy.b.weight"])
    for adapter in ("a", "b"):
        at = "model.layers.0.self_attn.q_proj.lora_{}." + adapter + ".weight"
        plain.model.layers[0].self_attn.q_proj.weight.data += values[at.format("B")] @ values[at.format("A")] * (8 / 3)
    assert torch.allclose(logits(both), logits(plain), atol=1e-6)
    assert torch.allclose(logits(lora_fx.fold(both)), logits(plain), atol=1e-6)
    combined = lora_fx.combine(graph, {"a": 1.0, "b": 1.0}, adapter="c")
    assert torch.allclose(logits(combined), logits(both), atol=1e-6)
    assert torch.equal(logits(lora_fx.unload(both)), logits(base))
    saved_by_peft(tmp_path / "one", "embed_tokens", seed=4, ensure_weight_tying=True)
    third = lora_fx.load_adapter(graph, tmp_path / "one", "c")
    for call, more in ((lora_fx.activate, {}), (lora_fx.combine, {"adapter": "d"})):
        with pytest.raises(lora_fx.PlanError, match="copies of"):
            call(third, {"a": 1.0, "c": 1.0}, **more)


def test_a_second_adapter_that_peft_unties_in_spite_of_its_config_has_two_copies(
    base: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    model = peft.get_peft_model(tied_llama(), config("lm_head", "embed_tokens", ensure_weight_tying=True))
    model.add_adapter("other", config("lm_head", "embed_tokens", ensure_weight_tying=True))
    model.set_adapter("other")
    moved(model, 3)
    model.eval().save_pretrained(str(tmp_path), selected_adapters=["other"])
    with pytest.warns(UserWarning, match=f"{EMBEDDING} and {HEAD} have copies of their own"):
        graph = lora_fx.from_adapter(base, tmp_path / "other")
    assert torch.equal(logits(graph), logits(model))


class Twice(nn.Module):
    """One module under two names, which is called by both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.a, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.b = self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.b(self.a(self.first(x).tanh()).tanh()))


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
@pytest.mark.parametrize("names", [["a"], ["b"], ["a", "b"]], ids="+".join)
def test_a_module_with_two_names_is_as_tied_as_peft_has_it(names: list[str], tmp_path: Path) -> None:
    x, settings = torch.randn(4, 5), {"r": 2, "target_modules": ["first"], "ensure_weight_tying": True}
    base = lora_fx.trace(Twice(), (x,), inference=True)
    model = peft.get_peft_model(Twice(), peft.LoraConfig(**settings, modules_to_save=list(names)))
    moved(model, 3)
    model.save_pretrained(str(tmp_path / "theirs"))
    copies = f"{' and '.join(f'{name}.weight' for name in names)} {'has a copy' if len(names) == 1 else 'have copies'}"
    with pytest.warns(UserWarning, match=f"of which {copies} .* PEFT follows ensure_weight_tying where"):
        graph = lora_fx.from_adapter(base, tmp_path / "theirs")
    assert torch.equal(graph(x), model(x))
    assert torch.allclose(lora_fx.fold(graph)(x), model(x), atol=1e-6)
    assert not torch.allclose(graph(x), base(x), atol=1e-2)
    lora_fx.save_adapter(graph, tmp_path / "mine")
    assert torch.equal(peft.PeftModel.from_pretrained(Twice(), tmp_path / "mine")(x), graph(x))


def test_a_copy_that_peft_ties_is_one_where_a_tool_left_one_of_its_names_out(
    base: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    model = saved_by_peft(tmp_path, "lm_head", ensure_weight_tying=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert torch.equal(tensors.pop(f"base_model.model.{HEAD}"), tensors[f"base_model.model.{EMBEDDING}"])
    save_file(tensors, file)
    graph = lora_fx.from_adapter(base, tmp_path)
    assert torch.equal(logits(graph), logits(model))
    folded = lora_fx.fold(graph)
    assert folded.get_parameter(HEAD) is folded.get_parameter(EMBEDDING)


def test_rewrite_trains_the_copies_that_peft_trains(base: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    settings = config("lm_head", "embed_tokens")
    with pytest.warns(UserWarning, match=rf"rules 'peft': {EMBEDDING} and {HEAD} are one parameter"):
        mine = lora_fx.rewrite(base, settings, seed=5)
    model = tied_llama()
    torch.manual_seed(5)
    theirs = peft.get_peft_model(model, settings)
    for model in (mine, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            torch.nn.functional.cross_entropy(
                model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.flatten(0, 1), IDS.flatten()
            ).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(logits(mine.eval()), logits(theirs.eval()), atol=1e-6)
    assert not torch.allclose(logits(mine), logits(base), atol=1e-3)
    lora_fx.save_adapter(mine, tmp_path / "mine")
    read = peft.PeftModel.from_pretrained(tied_llama(), tmp_path / "mine").eval()
    assert torch.equal(logits(read), logits(mine))


def test_what_folds_untied_copies_unties_the_model_or_says_so(base: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    model = saved_by_peft(tmp_path / "a", "lm_head")
    with pytest.warns(UserWarning, match="untie them"):
        graph = lora_fx.from_adapter(base, tmp_path / "a")
    assert torch.equal(
        graph.generate(IDS, max_new_tokens=4, do_sample=False),
        model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False),
    )
    with pytest.raises(lora_fx.LoraFxError, match=f"'{EMBEDDING}' and '{HEAD}' are one parameter of LlamaForCausalLM"):
        graph.merge_and_unload()
    lora_fx.huggingface.save_pretrained(tied_llama(), graph, tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits(loaded), logits(model), atol=1e-6)
    tied_llama().save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="untie them"), pytest.raises(lora_fx.AdapterError) as caught:
        fold_checkpoint(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path / 'a'}: {EMBEDDING} and {HEAD}: one tied parameter of the model, which PEFT untied (modules_to_save without "
        "ensure_weight_tying) and trained to two values. Fold the loaded model with lora_fx.from_adapter and lora_fx.fold, and write it "
        "with lora_fx.huggingface.save_pretrained"
    )


def test_tied_factors_and_factors_of_their_own_are_not_taken_for_each_other(tmp_path: Path) -> None:
    targets = ["q_proj", "embed_tokens", "lm_head"]
    tied, apart = (
        lora_fx.rewrite(tied_llama(), peft.LoraConfig(r=2, target_modules=targets, ensure_weight_tying=tying))
        for tying in (True, False)
    )
    lora_fx.save_adapter(tied, tmp_path / "tied")
    lora_fx.save_adapter(apart, tmp_path / "apart")
    for graph, directory in ((apart, "tied"), (tied, "apart")):
        with pytest.raises(lora_fx.AdapterError, match="factors of"):
            lora_fx.load_adapter(graph, tmp_path / directory)
    with pytest.raises(lora_fx.PlanError, match="factors of"):
        lora_fx.transfer(tied, onto=apart)
