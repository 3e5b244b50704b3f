"""Replicated layers (``layer_replication``): layers of a model again, over shared weights and with adapters of their own; PEFT is beside."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import lora_fx
from lora_fx.errors import AdapterError, FoldError, LoraFxError, PlanError, RuleError, TraceError
from lora_fx.folding.checkpoint_plan import fold_checkpoint
from lora_fx.tracing.replicated_layers import replicated

IDS = torch.tensor([[11, 3, 9, 5, 7, 2, 7], [5, 1, 3, 3, 8, 30, 4]])
INPUTS = {"input_ids": IDS, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])}
LAYERS = [[0, 2], [1, 2]]
SETTINGS: dict[str, Any] = {"r": 3, "target_modules": ["q_proj", "down_proj"], "layer_replication": LAYERS}


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def named(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


@pytest.fixture(scope="module")
def pair() -> tuple[Any, lora_fx.TracedGraphModule]:
    model, config = llama(), peft.LoraConfig(**SETTINGS, init_lora_weights=False)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(model, config).eval()
    given = llama()
    mine = lora_fx.rewrite(given, config, seed=1)
    assert (len(given.model.layers), given.config.num_hidden_layers) == (2, 2)
    return theirs, mine


def logits(model: nn.Module, **options: Any) -> torch.Tensor:
    return model(**INPUTS, **options).logits


def test_logits_gradients_and_files_are_pefts(pair: tuple[Any, lora_fx.TracedGraphModule], tmp_path: Path) -> None:
    theirs, mine = pair
    one, other = logits(theirs, use_cache=False), logits(mine)
    assert torch.equal(one, other)
    own = dict(mine.named_parameters())
    for loss in (one, other):
        loss.square().sum().backward()
    trained = {named(name): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"0", "1", "2"}
    assert trained.keys() == {name for name, p in own.items() if p.requires_grad}
    assert all(torch.equal(p, own[name]) and torch.equal(p.grad, own[name].grad) for name, p in trained.items())
    theirs.save_pretrained(tmp_path / "theirs")
    lora_fx.save_adapter(mine, tmp_path / "mine")
    files = [load_file(tmp_path / each / "adapter_model.safetensors") for each in ("theirs", "mine")]
    assert files[0].keys() == files[1].keys()
    assert json.loads((tmp_path / "mine" / "adapter_config.json").read_text())["layer_replication"] == LAYERS
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "mine").eval()
    assert torch.equal(logits(again, use_cache=False), one)
    read = lora_fx.load_adapter(lora_fx.unload(mine), tmp_path / "theirs")
    assert torch.equal(logits(read), one)


def test_a_fold_unties_the_layers_and_the_merged_model_has_them(
    pair: tuple[Any, lora_fx.TracedGraphModule], tmp_path: Path
) -> None:
    theirs, mine = pair
    expected = logits(theirs, use_cache=False).detach()
    with pytest.raises(FoldError, match=r"layers\.1\.self_attn\.q_proj\.weight' is used 2 times.*unshare=True"):
        lora_fx.fold(mine)
    folded = lora_fx.fold(mine, unshare=True)
    assert (logits(folded) - expected).abs().max() < 1e-6 * expected.abs().max()
    model = replicated(llama(), ((0, 2), (1, 2)))
    assert folded.state_dict().keys() == model.state_dict().keys()
    merged: Any = mine.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert len(again.model.layers) == again.config.num_hidden_layers == 3
    assert (logits(again, use_cache=False) - expected).abs().max() < 1e-6 * expected.abs().max()
    for write in (
        lora_fx.huggingface.write_back,
        lambda m, g: lora_fx.huggingface.save_pretrained(m, g, tmp_path / "x"),
    ):
        with pytest.raises(LoraFxError, match="the graph has replicated layers"):
            write(llama(), folded)
    ids = IDS[1:, :3]
    mine_says, theirs_say = (m.generate(input_ids=ids, max_new_tokens=3, do_sample=False) for m in (mine, theirs))
    assert torch.equal(mine_says, theirs_say)


def test_a_graph_of_other_layers_and_a_checkpoint_are_refused_by_the_key(
    pair: tuple[Any, lora_fx.TracedGraphModule], tmp_path: Path
) -> None:
    _, mine = pair
    lora_fx.save_adapter(mine, tmp_path / "adapter")
    other = lora_fx.unload(mine)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_replication": [[0, 1], [0, 2]]}))
    message = r"layer_replication: expected a graph with the layers \[\[0, 1\], \[0, 2\]\], and this has the layers \[\[0, 2\], \[1, 2\]\]"
    with pytest.raises(AdapterError, match=message):
        lora_fx.load_adapter(other, tmp_path / "adapter")
    with pytest.raises(RuleError, match=message):
        lora_fx.rewrite(other, path, adapter="b")
    llama().save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match=r"layer_replication: expected .* and this has those of the model itself"):
        fold_checkpoint(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def swapped() -> lora_fx.TracedGraphModule:
    """Return a graph whose layers are those of the model in another order, so that all names are in both."""
    config = {"peft_type": "LORA", **SETTINGS, "layer_replication": [[1, 2], [0, 1]], "init_lora_weights": False}
    return lora_fx.rewrite(llama(), config, seed=1).eval()


def test_graphs_of_other_layers_exchange_no_adapters(swapped: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    plain, bare = lora_fx.trace(llama(), inference=True), lora_fx.unload(swapped)
    expected = "layer_replication: expected a graph with the"
    of_model = rf"{expected} layers \[\[1, 2\], \[0, 1\]\], and this has those of the model itself\. Give"
    with pytest.raises(PlanError, match=of_model):
        lora_fx.transfer(swapped, onto=plain)
    of_swapped = rf"{expected} layers of the model itself, and this has the layers \[\[1, 2\], \[0, 1\]\]\. Trace"
    with pytest.raises(PlanError, match=of_swapped):
        lora_fx.transfer(lora_fx.rewrite(plain, ["q_proj"]), onto=bare)
    assert torch.equal(logits(lora_fx.transfer(swapped, onto=bare).eval()), logits(swapped))
    for graph in (swapped, lora_fx.fold(swapped)):
        with pytest.raises(LoraFxError, match="the graph has replicated layers"):
            lora_fx.huggingface.write_back(llama(), graph)
        with pytest.raises(LoraFxError, match="the graph has replicated layers"):
            lora_fx.huggingface.save_pretrained(llama(), graph, tmp_path / "x")


def test_weights_of_the_model_get_into_no_other_layers_by_their_names(
    pair: tuple[Any, lora_fx.TracedGraphModule], swapped: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    message = r"layer_replication: the graph has the layers \[\[1, 2\], \[0, 1\]\], so that weights of the model would get into other layers"
    with pytest.raises(LoraFxError, match=message):
        lora_fx.materialize(swapped, llama().state_dict())
    llama().save_pretrained(tmp_path)
    with pytest.raises(LoraFxError, match=message):
        lora_fx.parallel.load_sharded(copy.deepcopy(swapped).to("meta"), tmp_path)
    assert torch.equal(logits(lora_fx.materialize(swapped, swapped.state_dict())), logits(swapped))
    _, mine = pair
    weights = {name: value * 2 for name, value in llama().state_dict().items()}
    model = replicated(llama(), ((0, 2), (1, 2)))
    model.load_state_dict(weights, strict=False)
    assert torch.equal(logits(lora_fx.unload(lora_fx.materialize(mine, weights))), logits(model, use_cache=False))


class Plain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(TraceError, match=r"has 2 layers, 0 to 1, got the ranges \[\[0, 3\]\]"):
        lora_fx.rewrite(llama(), {"peft_type": "LORA", **SETTINGS, "layer_replication": [[0, 3]]})
    with pytest.raises(TraceError, match="Plain has no list of layers where PEFT looks for one"):
        replicated(Plain(), ((0, 1),))
    with pytest.raises(RuleError, match="layer_replication: expected a list of pairs of integers ≥ 0"):
        lora_fx.rewrite(Plain(), {"peft_type": "LORA", "target_modules": ["q"], "layer_replication": [1]})


@pytest.mark.parametrize("name", ["bert", "falcon", "qwen3"])
@pytest.mark.matrix
def test_layers_are_found_where_peft_finds_them_and_kinds_of_layers_go_along(name: str) -> None:
    small = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 31}
    torch.manual_seed(0)
    model: Any = {
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**small, intermediate_size=48)),
        "falcon": lambda: transformers.FalconModel(transformers.FalconConfig(**small)),
        "qwen3": lambda: transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                **small, intermediate_size=48, num_key_value_heads=2, head_dim=16, use_sliding_window=True, max_window_layers=1,
                sliding_window=3,
            )
        ),
    }[name]().eval()  # fmt: skip
    targets = {"bert": ["query"], "falcon": ["dense"], "qwen3": ["q_proj"]}[name]
    config = peft.LoraConfig(target_modules=targets, layer_replication=[[1, 3], [0, 3]], init_lora_weights=False)
    mine = lora_fx.rewrite(model, config, seed=1)
    assert len({n for n, _ in mine.named_parameters() if "lora_A" in n}) == 5
    if name == "qwen3":  # PEFT leaves layer_types as they were, and fails
        kinds = model.config.layer_types
        assert mine.config.layer_types == [kinds[i] for i in (1, 2, 0, 1, 2)]
        with pytest.raises(IndexError):
            peft.get_peft_model(model, config)(**INPUTS, use_cache=False)
        return
    torch.manual_seed(1)
    theirs = peft.get_peft_model(model, config).eval()
    one, other = (
        each(**INPUTS, **more)[0]
        for each, more in ((theirs, {"use_cache": False} if name == "falcon" else {}), (mine, {}))
    )
    assert torch.equal(one, other)
