"""``load_adapter`` and ``set_adapter`` as methods: in place, with the parameter objects that are there, as PEFT's do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import few
from conftest import set_factors, unchanged
from torch import nn

import lora_fx

IDS = torch.tensor([[37, 21, 8, 59, 11], [5, 44, 70, 23, 9]])
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
TARGETS = {"b": ["v_proj", "q_proj"], "head": ["v_proj"]}


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def traced(model: Any) -> lora_fx.TracedGraphModule:
    return lora_fx.trace(model)


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of adapters that PEFT wrote: b, c (like b, other values), and head, which trains the output head too."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, like) in enumerate((("b", "b"), ("c", "b"), ("head", "head"))):
        more = {"modules_to_save": ["lm_head"]} if name == "head" else {}
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[like], lora_dropout=0.1, **more)
        made: Any = peft.get_peft_model(copy.deepcopy(model), config)
        set_factors(made, seed)
        with torch.no_grad():
            for key, parameter in made.named_parameters():
                if "modules_to_save" in key:
                    parameter.add_(0.1)
        made.save_pretrained(root / name)
    return root


@pytest.fixture
def pair(model: Any, traced: lora_fx.TracedGraphModule) -> tuple[Any, Any]:
    """PEFT's model and a graph, with the same adapter a, in train mode."""
    theirs: Any = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"]), adapter_name="a"
    )
    set_factors(theirs.base_model.model)
    rules = {"defaults": {"rank": 3, "alpha": 5, "dropout": 0.0}, "select": [{"target": ["q_proj"]}]}
    mine = lora_fx.rewrite(traced, rules, adapter="a")
    set_factors(mine)
    return theirs.train(), mine.train()


def own_name(name: str) -> str:
    """Return the name in a graph of a parameter of PEFT's model."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace("modules_to_save", "trained_copy")


def training(module: nn.Module) -> set[str]:
    """Return the parameters that get a gradient, by the names of a graph."""
    module.zero_grad()
    loss = module(**BATCH).logits.square().mean()
    if loss.requires_grad:
        loss.backward()
    return {own_name(name) for name, p in module.named_parameters() if p.grad is not None}


def requiring(module: nn.Module) -> set[str]:
    return {own_name(name) for name, p in module.named_parameters() if p.requires_grad}


STEPS: dict[str, Any] = {
    "load b": lambda m, saved, t: m.load_adapter(saved / "b", "b", is_trainable=t),
    "set b": lambda m, _saved, _t: m.set_adapter("b"),
    "freeze a": lambda m, _saved, _t: m.set_adapter("a", inference_mode=True),
    "set both": lambda m, _saved, _t: both(m),
    "set a": lambda m, _saved, _t: m.set_adapter("a"),
    "load b again": lambda m, saved, t: m.load_adapter(saved / "c", "b", is_trainable=t),
    "set b again": lambda m, _saved, _t: m.set_adapter("b"),
    "load b while it acts": lambda m, saved, t: m.load_adapter(saved / "b", "b", is_trainable=t),
    "load head": lambda m, saved, t: m.load_adapter(saved / "head", "head", is_trainable=t),
    "set head": lambda m, _saved, _t: m.set_adapter("head"),
    "back to b": lambda m, _saved, _t: m.set_adapter("b"),
}


def both(module: Any) -> None:
    """Set two adapters: PEFT's model takes a list by its tuner alone."""
    (module.base_model if isinstance(module, peft.PeftModel) else module).set_adapter(["a", "b"])


@pytest.mark.parametrize("is_trainable", few([False, True], [True]))
def test_after_each_call_acts_and_trains_what_does_in_peft(pair: Any, saved: Path, is_trainable: bool) -> None:
    theirs, mine = pair
    objects: dict[str, int] = {}
    for step, call in STEPS.items():
        for module in pair:
            call(module, saved, is_trainable)
        assert mine.training == theirs.training, step
        modes = {module.training for module in mine.modules()}
        assert modes == {mine.training}, step
        assert training(mine) == training(theirs), step
        acts = {state.name for state in lora_fx.parameter_summary(mine).adapters if state.acts}
        assert acts == set(theirs.active_adapters), step
        assert requiring(mine) == {name for name in requiring(theirs) if any(f".{a}." in name for a in acts)}, step
        for module in pair:
            mode = module.training
            module.eval()
            module.logits = module(**BATCH).logits.detach()
            module.train(mode)
        assert torch.equal(mine.logits, theirs.logits), step
        found = {name: id(parameter) for name, parameter in mine.named_parameters()}
        assert found.items() >= objects.items(), step
        objects = found


def test_an_optimizer_made_before_goes_on_as_in_peft(pair: Any, saved: Path) -> None:
    curves = []
    for module in pair:
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
        losses = []
        for step in range(6):
            if step == 2:
                module.load_adapter(saved / "b", "b", is_trainable=True)
                module.set_adapter("b")
                module.eval()  # without dropout
                optimizer.add_param_group({"params": [p for name, p in module.named_parameters() if ".b." in name]})
            if step == 4:
                module.set_adapter("a")
            loss = module(**BATCH).logits.logsumexp(-1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert len(set(curves[0])) == 6
    theirs = {own_name(name): p for name, p in pair[0].named_parameters()}
    for name, parameter in pair[1].named_parameters():
        assert torch.allclose(parameter, theirs[name], atol=1e-5), name


def test_a_name_that_waits_is_told_and_an_empty_graph_takes_it_at_once(traced: Any, saved: Path, caplog: Any) -> None:
    graph = copy.deepcopy(traced)
    assert not hasattr(graph, "set_adapter")
    graph.load_adapter(saved / "b", "b")
    assert [str(state) for state in graph.adapters] == ["b (acts, frozen)"]
    graph.load_adapter(saved / "head", "head", is_trainable=True)
    assert caplog.messages == [
        "adapter 'head' is in the graph beside 'b' and does not act yet: graph.set_adapter(\"head\") makes it act."
    ]
    assert [str(state) for state in graph.adapters] == ["b (acts, frozen)", "head (does not act, would train)"]
    wanted = lora_fx.load_adapter(traced, saved / "b", "b")
    assert torch.equal(graph(**BATCH).logits, wanted(**BATCH).logits)


@pytest.mark.parametrize(
    "call",
    [
        lambda graph, _: graph.set_adapter("c"),
        lambda graph, _: graph.set_adapter(["a", "c"]),
        lambda graph, saved: graph.load_adapter(saved / "none", "b"),
        lambda graph, saved: graph.load_adapter(saved / "b", "a"),
    ],
)
def test_what_is_refused_leaves_the_graph_as_it_was(pair: Any, saved: Path, call: Any) -> None:
    _, graph = pair
    with unchanged(graph), pytest.raises(lora_fx.LoraFxError):
        call(graph, saved)


def test_other_graphs_over_the_same_tensors_stay_as_they_are(pair: Any, saved: Path) -> None:
    _, graph = pair
    graph.load_adapter(saved / "b", "b")
    other = lora_fx.activate(graph, {"b": 1.0})
    with unchanged(other):
        graph.set_adapter("b")
        graph.load_adapter(saved / "c", "b")
        graph.set_adapter("a")
    assert not torch.equal(
        graph.get_parameter("model.layers.0.self_attn.v_proj.lora_A.b.weight"),
        other.get_parameter("model.layers.0.self_attn.v_proj.lora_A.b.weight"),
    )


def copies(graph: Any) -> Iterator[Any]:
    yield copy.deepcopy(graph)
    yield pickle.loads(pickle.dumps(graph))


def test_a_graph_that_was_changed_in_place_is_like_one_made_anew(pair: Any, saved: Path) -> None:
    _, graph = pair
    wanted = lora_fx.activate(lora_fx.load_adapter(graph, saved / "b", "b"), {"b": 1.0}).eval()
    fused = lora_fx.fuse(graph)
    for each in (graph, fused):
        each.load_adapter(saved / "b", "b")
        each.set_adapter("b")
        each.eval()
        for found in (each, *copies(each), lora_fx.fold(each)):
            assert torch.allclose(found(**BATCH).logits, wanted(**BATCH).logits, atol=1e-6)
    assert [node.format_node() for node in graph.graph.nodes] == [node.format_node() for node in wanted.graph.nodes]
    assert [name for name, _ in graph.named_buffers()] == [name for name, _ in wanted.named_buffers()]
    assert any("add_update" in str(node.target) for node in fused.graph.nodes)
    fused.train()
    torch.manual_seed(0)
    first = fused(**BATCH).logits
    assert not torch.equal(first, fused(**BATCH).logits)  # dropout follows the mode


def test_a_compiled_graph_computes_with_what_acts(pair: Any, saved: Path) -> None:
    _, graph = pair
    graph.eval()
    compiled: Any = torch.compile(graph, backend="eager", dynamic=False)
    with torch.no_grad():
        before = compiled(**BATCH).logits
        graph.load_adapter(saved / "b", "b")
        graph.set_adapter("b")
        after = compiled(**BATCH).logits
        assert torch.allclose(after, graph(**BATCH).logits, atol=1e-6)
    assert not torch.allclose(before, after, atol=1e-3)
