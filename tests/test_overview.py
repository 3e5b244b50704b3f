"""What a graph, a plan and the data of a fold print: a few lines, whatever the size of the model."""

from __future__ import annotations

import copy
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
import transformers
from conftest import set_factors
from torch import nn

import lora_fx

X = torch.linspace(-1, 1, 21).reshape(3, 7)


@pytest.fixture(scope="module")
def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50, d_model=12, d_kv=4, d_ff=20, num_layers=2, num_heads=3, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5)).eval()


def test_a_graph_of_a_model_prints_a_few_lines(t5: Any) -> None:
    graph = lora_fx.rewrite(t5, "t5", rank=2)
    nodes = len(graph.graph.nodes)
    total = sum(p.numel() for p in graph.parameters())
    trainable = (
        12 * 2 * (12 + 12)
    )  # two branches for each of two self-attentions in the encoder, four attentions in the decoder
    assert str(graph).splitlines() == repr(graph).splitlines() == [
        f"T5ForConditionalGeneration as a graph of {nodes:,} nodes, in evaluation mode, float32 on cpu",
        f"  parameters  {trainable} trainable of {total:,} ({100 * trainable / total:.4g}%)",
        "  adapters    default (acts, trains): rank 2, alpha 32, scaling 16, 12 branches",
        "  inputs      input_ids (batch, sequence), attention_mask (batch, sequence), decoder_input_ids (batch, target_sequence)",
        "  output      Seq2SeqLMOutput (logits, encoder_last_hidden_state)",
        "  code        gm.code; its nodes: print(gm.graph)",
    ]  # fmt: skip
    assert "def forward" in graph.code
    plan = lora_fx.plan(graph, "t5")
    assert repr(plan) == str(plan)
    assert len(repr(plan).splitlines()) == len(plan.decisions) + 3


def test_many_adapters_and_inputs_stay_within_twelve_lines() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(7, 6)

        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            return self.proj(sum(inputs.values()))  # type: ignore[no-any-return]

    graph = lora_fx.trace(Sum().eval(), {f"x{n}": X for n in range(9)})
    for n in range(8):
        graph = lora_fx.rewrite(graph, {"select": [{"target": ["proj"], "rank": n % 5 + 1}]}, adapter=f"a{n}")
    lines = repr(graph).splitlines()
    assert len(lines) <= 12
    assert "and 3 more in gm.adapters" in lines[7]
    assert lines[8].endswith("x5 (batch, 7) and 3 more")
    assert [state.name for state in graph.adapters] == [f"a{n}" for n in range(8)]


def test_the_repr_follows_what_becomes_of_a_graph() -> None:
    rules = {"select": [{"target": ["0"], "rank": 3, "alpha": 6}, {"target": ["2"], "trainable": "all"}]}
    graph = lora_fx.rewrite(net(), rules, example_inputs=(X,), adapter="a")
    set_factors(graph)
    assert "a (acts, trains): rank 3, alpha 6, scaling 2, 1 branch, 2 trained copies" in repr(graph)
    half = lora_fx.activate(graph, {"a": 0.5})
    assert "a (acts at strength 0.5, trains): rank 3, alpha 6, scaling 2" in repr(half)
    assert "Graph of " in repr(half).splitlines()[0]
    assert "in training mode" in repr(copy.deepcopy(graph).train())
    folded = lora_fx.fold(graph)
    assert "  folded      3 parameters changed" in repr(folded)
    assert "adapters" not in repr(folded)
    both = nn.Sequential(graph)
    assert repr(graph).splitlines()[1] in repr(both)  # as a part of another module


def test_notebooks_show_the_same_as_a_table() -> None:
    class Cells(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.texts: list[str] = []

        def handle_data(self, data: str) -> None:
            self.texts.append(data)

    graph = lora_fx.rewrite(net(), {"select": [{"target": ["0"]}]}, rank=2, example_inputs=(X,))
    parser = Cells()
    parser.feed(graph._repr_html_())
    heading, *cells = parser.texts
    assert heading == repr(graph).splitlines()[0]
    for name, text in zip(cells[::2], cells[1::2], strict=True):
        assert f"  {name:<10}  {text}" in repr(graph).splitlines()


def test_the_data_of_a_fold_prints_as_formulas_and_its_report_as_a_table() -> None:
    graph = lora_fx.rewrite(net(), {"select": [{"target": ["0"], "rank": 2, "alpha": 3}]}, example_inputs=(X,))
    assert repr(lora_fx.recipe(graph)) == (
        "(<Merge 0.weight (out_in) += 1.5 * 0.lora_B.default.weight @ 0.lora_A.default.weight>,)"
    )
    report = lora_fx.fold_report(graph, lora_fx.fold(graph))
    assert repr(report) == str(report)
    assert repr(report).splitlines()[0].split() == [
        "weight",
        "dtype",
        "layout",
        "updates",
        "size",
        "of",
        "update",
        "elements",
        "unchanged",
    ]
