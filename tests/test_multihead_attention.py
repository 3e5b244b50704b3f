"""Adapters at ``nn.MultiheadAttention``, whose projections PEFT adapts together, and of which it adds one update twice."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import set_factors
from safetensors.torch import load_file
from torch import nn

import lora_fx

X = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1))
MORE = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2))
TWICE = r"^PEFT 0\.21 adds the update at attention\.out_proj twice, and trains with the gradient of one; the graph has it once"


class Attending(nn.Module):
    def __init__(self, query: int | None = None) -> None:
        super().__init__()
        self.lin, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.query = query

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lin(x)
        query = x if self.query is None else x[:, : self.query]
        return self.head(self.attention(query, x, x, need_weights=False)[0])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    made = Attending().eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


@pytest.fixture(scope="module")
def graph(model: nn.Module) -> lora_fx.TracedGraphModule:
    return lora_fx.trace(model, (X,))


def config(**settings: Any) -> peft.LoraConfig:
    given = {"r": 2, "lora_alpha": 3, "rank_pattern": {"lin": 4}, "target_modules": ["attention", "lin"], **settings}
    return peft.LoraConfig(**given)


def test_an_adapter_of_pefts_computes_what_peft_computes(
    model: nn.Module, graph: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    theirs = peft.get_peft_model(copy.deepcopy(model), config(lora_dropout=0.2)).eval()
    set_factors(theirs, scale=0.3)
    theirs.save_pretrained(str(tmp_path))
    mine = lora_fx.from_adapter(graph, tmp_path)
    for x in (X, MORE):
        torch.testing.assert_close(mine(x), theirs(x))
        assert not torch.allclose(mine(x), model(x), atol=1e-2)
    torch.testing.assert_close(lora_fx.fold(mine)(MORE), theirs.merge_and_unload()(MORE))
    with pytest.warns(UserWarning, match=TWICE):
        lora_fx.from_adapter(graph, tmp_path, trainable=True)


def test_an_adapter_that_was_trained_in_a_graph_is_pefts(
    model: nn.Module, graph: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=TWICE):
        mine = lora_fx.rewrite(graph, config(lora_dropout=0.2))
    set_factors(mine, scale=0.3)
    optimizer = torch.optim.SGD([p for p in mine.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        mine.train()(MORE).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    lora_fx.save_adapter(mine.eval(), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(theirs(X), mine(X))
    theirs.save_pretrained(str(tmp_path / "peft"))
    ours, again = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("adapter", "peft"))
    assert ours.keys() == again.keys()
    assert "base_model.model.attention.base_layer.out_proj.lora_A.weight" in ours
    assert torch.equal(lora_fx.from_adapter(graph, tmp_path / "adapter")(X), mine(X))
    assert torch.equal(lora_fx.load_adapter(mine, tmp_path / "peft")(X), mine(X))
    with pytest.raises(lora_fx.AdapterError, match=r"attention\.out_proj: a part of an nn\.MultiheadAttention"):
        lora_fx.save_adapter(mine, tmp_path / "diffusers", format="diffusers")


def test_the_input_projection_alone_is_a_parameter_to_peft(
    model: nn.Module, graph: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    mine = lora_fx.rewrite(graph, {"select": [{"target": ["in_proj_weight"], "rank": 2, "alpha": 5}]})
    set_factors(mine, scale=0.3)
    lora_fx.save_adapter(mine, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(theirs(X), mine(X))
    assert not torch.allclose(mine(X), model(X), atol=1e-2)


def test_a_layer_that_peft_never_calls_is_left_out(
    model: nn.Module, graph: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    named = config(target_modules=["out_proj", "lin"])
    theirs = peft.get_peft_model(copy.deepcopy(model), named).eval()
    set_factors(theirs)
    theirs.save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match="has branches at attention.out_proj, which the model never computes with"):
        mine = lora_fx.from_adapter(graph, tmp_path)
    assert torch.equal(mine(X), theirs(X))
    plan = lora_fx.plan(graph, named)
    assert {each.site.module for each in plan.chosen} == {"lin"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"use_dora: expected none in an nn\.MultiheadAttention, which 'attention' is, found true"),
        ({"lora_bias": True}, r"lora_bias: expected none .* found true"),
        ({"bias": "lora_only"}, r"bias: expected none .* found \"lora_only\""),
        ({"target_modules": ["out_proj"]}, r"'attention\.out_proj' is never called: name its nn\.MultiheadAttention"),
    ],
)
def test_what_peft_has_not_there_is_said_before_the_training(
    settings: dict[str, Any], message: str, graph: lora_fx.TracedGraphModule
) -> None:
    with pytest.raises(lora_fx.RuleError, match=message):
        lora_fx.rewrite(graph, config(**settings))


def test_what_cannot_be_saved_is_said_before_the_training(graph: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    together = (
        r"PEFT adapts in_proj_weight and out_proj of an nn\.MultiheadAttention together, with one rank and scaling"
    )
    both = {"select": [{"target": ["in_proj_weight"], "rank": 2}, {"target": ["out_proj"], "rank": 3}]}
    for rules in ({"select": [{"target": ["out_proj"], "rank": 2}]}, both):
        with pytest.warns(
            UserWarning, match=rf"^save_adapter has no form for the branches at .*: {together}\. Give both"
        ):
            mine = lora_fx.rewrite(graph, rules)
        with pytest.raises(lora_fx.AdapterError, match=rf"attention\.out_proj: {together}"):
            lora_fx.save_adapter(mine, tmp_path / "adapter")
    crossed = Attending(query=3).eval()
    with pytest.raises(
        lora_fx.RuleError, match=r"'attention' is an nn\.MultiheadAttention whose query is another tensor"
    ):
        lora_fx.rewrite(crossed, config(), example_inputs=(X,))
    peft.get_peft_model(copy.deepcopy(crossed), config()).save_pretrained(str(tmp_path / "crossed"))
    with pytest.raises(
        lora_fx.AdapterError, match=r"attention\.lora_A\.weight: an nn\.MultiheadAttention whose query is"
    ):
        lora_fx.from_adapter(crossed, tmp_path / "crossed", example_inputs=(X,))


def test_an_adapter_file_for_slots_is_written_from_a_graph_and_not_from_pefts_directory(
    model: nn.Module, graph: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    theirs = peft.get_peft_model(copy.deepcopy(model), config()).eval()
    set_factors(theirs, scale=0.3)
    theirs.save_pretrained(str(tmp_path))
    rules = {"select": [{"target": ["in_proj_weight", "out_proj", "lin"], "rank": 2}]}
    lora_fx.export.onnx(lora_fx.rewrite(graph, rules).eval(), tmp_path / "slots.onnx", slots=True)
    with pytest.raises(lora_fx.AdapterError) as refused:
        lora_fx.export.onnx_adapter_from_peft(tmp_path, tmp_path / "slots.onnx", tmp_path / "adapter")
    assert str(refused.value).partition(": ")[2] == (
        "attention: factors of an nn.MultiheadAttention, which PEFT adds to both of its weights at once, are not read from a directory into "
        "slots. Write them from a graph: lora_fx.export.onnx_adapter(lora_fx.from_adapter(model, directory), path)"
    )
    lora_fx.export.onnx_adapter(lora_fx.from_adapter(graph, tmp_path), tmp_path / "adapter")
    alone = config(target_parameters=["attention.in_proj_weight"], target_modules=["lin"])
    parameter = peft.get_peft_model(copy.deepcopy(model), alone).eval()
    set_factors(parameter, scale=0.3)
    parameter.save_pretrained(str(tmp_path / "alone"))
    lora_fx.export.onnx_adapter_from_peft(tmp_path / "alone", tmp_path / "slots.onnx", tmp_path / "alone.adapter")
    session = onnxruntime.InferenceSession(str(tmp_path / "slots.onnx"))
    for path, wrapped in (("adapter", theirs), ("alone.adapter", parameter)):
        options, adapter = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
        adapter.Load(str(tmp_path / path))
        options.add_active_adapter(adapter)
        (found,) = session.run(None, {session.get_inputs()[0].name: MORE.numpy()}, options)
        torch.testing.assert_close(torch.from_numpy(found), wrapped(MORE))
