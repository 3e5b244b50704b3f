"""``torch.compile(graph, fullgraph=True, dynamic=True)`` trains with one graph for all sizes, and what is eager stays so.

What is compiled is counted by the backend. ``gradients`` has aot_autograd make forward and backward graphs, as inductor gets
them; without, dynamo's graph is run with autograd. In C++ they would take minutes, so they are run as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, branched, build, few, inputs, rows, without_dropout
from conftest import set_factors
from functorch.compile import make_boxed_func, nop
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

import lora_fx

SIZES = ((2, 7, 3), (3, 11, 5), (4, 9, 2), (5, 6, 7), (2, 12, 4), (6, 3, 3), (3, 8, 6), (2, 5, 2), (7, 4, 4), (2, 7, 3))
"""Batch, sequence and target sequence of ten steps. None is 1: torch compiles a graph of its own for that."""


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that counts what it compiles, and runs it as it is."""

    def __init__(self, *, gradients: bool) -> None:
        self.graphs = 0
        self._backend: Callable[..., Any] = (
            aot_autograd(fw_compiler=self._count, bw_compiler=nop) if gradients else self._count
        )

    def __call__(self, graph: fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        return self._backend(graph, example_inputs)

    def _count(self, graph: fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return make_boxed_func(graph.forward) if self._backend != self._count else graph.forward


def losses(name: str, graph: nn.Module, call: Callable[..., Any]) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in graph.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for step, size in enumerate(SIZES):
        loss = call(**inputs(name, *size, seed=step))[0].float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def graph_of(name: str, kind: str) -> lora_fx.TracedGraphModule:
    """Return a graph that trains: ``plain``, ``fused``, or ``half``, which is fused beside bfloat16 weights."""
    if kind == "half":
        graph = lora_fx.rewrite(build(name).bfloat16(), rules=ARCHITECTURES[name].rules, rank=4, dropout=0.0)
    else:
        graph = branched(name, dropout=0.0)
    set_factors(graph)
    return without_dropout(graph if kind == "plain" else lora_fx.fuse(graph)).train()


@pytest.mark.parametrize(
    ("name", "kind", "gradients"),
    [
        pytest.param(row.values[0], kind, gradients, marks=row.marks)
        for kind, gradients, row in (
            *(("plain", False, row) for row in rows(("t5", "llama", "bert"), ())),
            *(("fused", False, row) for row in rows(("t5", "llama", "gpt2"), ())),
            *(("half", True, row) for row in rows(("llama",), ())),
            *(("fused", True, row) for row in rows(("bert",), ())),
            *(("plain", True, row) for row in rows(("gpt2",), ("gpt2",))),
        )
    ],
)
def test_one_compiled_graph_trains_at_all_sizes_as_eager_does(name: str, kind: str, gradients: bool) -> None:
    graph = graph_of(name, kind)
    other, backend = copy.deepcopy(graph), Counting(gradients=gradients)
    compiled = torch.compile(other, fullgraph=True, dynamic=True, backend=backend)
    assert losses(name, other, compiled) == losses(name, graph, graph)  # bit for bit
    assert backend.graphs == 1


@pytest.mark.xdist_group("gpt2")
def test_without_dynamic_the_second_size_is_the_last_that_is_compiled() -> None:
    graph, backend = graph_of("gpt2", "plain"), Counting(gradients=False)
    compiled, counts = torch.compile(graph, fullgraph=True, backend=backend), []
    for size in SIZES:
        compiled(**inputs("gpt2", *size))
        counts.append(backend.graphs)
    assert counts == [1] + [2] * 9


@pytest.mark.xdist_group("gpt2")
def test_a_batch_of_one_is_compiled_once_more() -> None:
    graph, backend = graph_of("gpt2", "plain"), Counting(gradients=False)
    compiled, counts = torch.compile(graph, fullgraph=True, dynamic=True, backend=backend), []
    for size in ((2, 7), (1, 7), (1, 11), (3, 4)):
        compiled(**inputs("gpt2", *size))
        counts.append(backend.graphs)
    assert counts == [1, 2, 2, 2]


@pytest.mark.xdist_group("gpt2")
def test_training_and_evaluation_are_compiled_once_each_and_follow_the_mode() -> None:
    graph, backend = branched("gpt2", dropout=0.5), Counting(gradients=False)
    set_factors(graph)
    eager = copy.deepcopy(graph)
    graph.compile(fullgraph=True, dynamic=True, backend=backend)  # in place
    for size in ((2, 7), (3, 9), (4, 5)):
        batch = inputs("gpt2", *size)
        first, second = (graph.train()(**batch).logits for _ in range(2))
        assert not torch.equal(first, second)
        with torch.no_grad():
            assert torch.equal(graph.eval()(**batch).logits, eager.eval()(**batch).logits)
    assert backend.graphs == 2


@pytest.mark.xdist_group("gpt2")
def test_a_graph_with_labels_is_compiled_whole_with_its_loss() -> None:
    graph = lora_fx.rewrite(build("gpt2"), rules="gpt2", rank=4, dropout=0.0, labels=True).eval()
    backend = Counting(gradients=False)
    compiled = torch.compile(graph, fullgraph=True, dynamic=True, backend=backend)
    for size in SIZES[:4]:
        batch = inputs("gpt2", *size)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        assert torch.equal(compiled(**batch).loss, graph(**batch).loss)
    assert backend.graphs == 1


def mismatched() -> dict[str, torch.Tensor]:
    return {**inputs("bert", 2, 7), "attention_mask": inputs("bert", 2, 5)["attention_mask"]}


UNCOVERED = (
    (lambda: inputs("bert", 2, 70), "size 70 in dimension 1, expected 1 to 64"),
    (mismatched, r"input_ids.size\(1\) == attention_mask.size\(1\)"),
    (lambda: {**inputs("bert", 2, 7), "attention_mask": torch.ones(2, 7)}, "has dtype torch.float32"),
    (lambda: {"attention_mask": inputs("bert", 2, 7)["attention_mask"]}, "'input_ids' is missing"),
    (lambda: {**inputs("bert", 2, 7), "output_attentions": True}, "'output_attentions'"),
)


@pytest.mark.xdist_group("bert")
@pytest.mark.parametrize("whole", few([False, True], (False,)))
def test_what_the_trace_does_not_cover_is_refused_by_compiled_graphs_too(whole: bool) -> None:
    graph, backend = branched("bert", dropout=0.0).eval(), Counting(gradients=False)
    compiled = torch.compile(graph, fullgraph=whole, dynamic=True, backend=backend)
    # Where all is to be one graph, dynamo wraps what is raised while it reads the code.
    expected = torch._dynamo.exc.Unsupported if whole else lora_fx.InputError
    for uncovered, message in UNCOVERED:
        batch = inputs("bert", 3, 9)
        assert torch.equal(compiled(**batch)[0], graph(**batch)[0])
        with pytest.raises(expected, match=message):
            compiled(**uncovered())
    assert not whole or backend.graphs == 1


def test_inductor_trains_a_fused_graph_as_eager_does() -> None:
    x = torch.randn(6, 24)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))
    rules = {"defaults": {"rank": 4, "alpha": 8, "dropout": 0.0}, "select": [{"op": ["linear"]}]}
    graph = lora_fx.rewrite(model, rules=rules, example_inputs=(x,))
    set_factors(graph)
    graph = lora_fx.fuse(graph)
    found = []
    for each in (graph, copy.deepcopy(graph)):
        call = torch.compile(each, fullgraph=True, dynamic=True) if found else each
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        found.append([])
        for count in (6, 4, 5, 6, 3):
            loss = call(x[:count]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found[-1].append(loss.item())
    assert found[1] == pytest.approx(found[0], rel=1e-6)
