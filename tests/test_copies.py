"""Whatever a branched graph has been through, fold finds every branch, and gives the same weights."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, TWO, inputs, rows, run, traced
from conftest import all_acting, set_factors
from graph_diff import first_difference
from test_folding_kinds import IN_PEFT, NOT_IN_PEFT, rewritten
from torch import fx

import lora_fx

pytestmark = pytest.mark.filterwarnings("ignore")


def pickled(graph_module: Any) -> fx.GraphModule:
    return pickle.loads(pickle.dumps(graph_module))  # type: ignore[no-any-return]


def saved(graph_module: Any) -> fx.GraphModule:
    buffer = io.BytesIO()
    torch.save(graph_module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


def transformed(graph_module: Any) -> fx.GraphModule:
    return fx.Transformer(graph_module).transform()


def swept(graph_module: Any) -> fx.GraphModule:
    swept = copy.deepcopy(graph_module)
    swept.graph.eliminate_dead_code()
    swept.recompile()
    return swept  # type: ignore[no-any-return]


def stripped(graph_module: Any) -> fx.GraphModule:
    """All metadata is gone, as after somebody else's pass."""
    stripped = copy.deepcopy(graph_module)
    for node in stripped.graph.nodes:
        node.meta.clear()
    return stripped  # type: ignore[no-any-return]


COPIES: dict[str, Callable[[Any], fx.GraphModule]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "torch.save": saved,
    "fx.Transformer": transformed,
    "dead-code elimination": swept,
    "no metadata": stripped,
    "trace": lora_fx.trace,
    "fuse": lora_fx.fuse,
    "a copy of a fused graph": lambda graph_module: pickled(copy.deepcopy(lora_fx.fuse(graph_module))),
    "fx.GraphModule": lambda graph_module: fx.GraphModule(graph_module, copy.deepcopy(graph_module).graph),
    "all of them": lambda graph_module: swept(transformed(pickled(copy.deepcopy(graph_module)))),
}


WITHOUT_VALUES = ("no metadata", "fx.Transformer", "all of them")


def same_weights(copied: Any, folded: Any, graph_module: Any, expected: Any) -> None:
    # fx itself forgets which buffers are persistent, and all names of a tied tensor but one.
    mine, theirs = dict(folded.named_parameters()), dict(expected.named_parameters(remove_duplicate=False))
    assert mine.keys() == dict(expected.named_parameters()).keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert len(lora_fx.fold_report(copied, folded)) == len(lora_fx.fold_report(graph_module, expected)) > 0
    assert not any("lora_" in str(node.target) for node in folded.graph.nodes)


@functools.cache
def folded_kind(kind: str) -> tuple[lora_fx.TracedGraphModule, lora_fx.TracedGraphModule, tuple[torch.Tensor, ...]]:
    """Return a branched graph, its fold, and inputs. Not to be changed."""
    model, example, other, targets = {**IN_PEFT, **NOT_IN_PEFT}[kind]()
    _, graph_module = rewritten(model.eval(), example, targets)
    set_factors(graph_module)
    return graph_module, lora_fx.fold(graph_module), other


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.xdist_group(kind)) for kind in (*IN_PEFT, *NOT_IN_PEFT)]
)
def test_a_copy_folds_to_the_same_weights_at_every_kind_of_site(kind: str, how: str) -> None:
    graph_module, expected, other = folded_kind(kind)
    copied = COPIES[how](graph_module)
    if how in WITHOUT_VALUES and kind == "chosen experts":
        with pytest.raises(
            lora_fx.FoldError, match="The node is"
        ):  # nothing tells along which dimensions an index chooses
            lora_fx.fold(copied)
        return
    folded = lora_fx.fold(copied)
    same_weights(copied, folded, graph_module, expected)
    assert torch.equal(folded(*other), expected(*other))


@functools.cache
def branched(name: str) -> tuple[lora_fx.TracedGraphModule, lora_fx.TracedGraphModule]:
    """Return a graph with two adapters at overlapping sites and dropout, in train mode, and its fold. Not to be changed."""
    graph_module = lora_fx.rewrite(traced(name), rules=ARCHITECTURES[name].rules, rank=6, alpha=9, dropout=0.2)
    rules = {"select": [{"role": ["attention.query"], "rank": 3, "alpha": 2}]}
    graph_module = all_acting(lora_fx.rewrite(graph_module, rules, adapter="second"))
    set_factors(graph_module, scale=0.05)
    return graph_module.train(), lora_fx.fold(graph_module)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", TWO)
def test_a_copy_of_a_real_model_with_two_adapters_folds_to_the_same_weights(name: str, how: str) -> None:
    graph_module, expected = branched(name)
    assert first_difference(expected, traced(name)) is None
    copied = COPIES[how](graph_module)
    folded = lora_fx.fold(copied)
    same_weights(copied, folded, graph_module, expected)
    assert torch.equal(run(name, folded.eval(), 3, 11, 5)[0], run(name, expected.eval(), 3, 11, 5)[0])


@pytest.mark.parametrize("name", rows(("t5", "gpt2", "llama", "bert"), ("gpt2",)))
def test_a_program_that_was_saved_and_loaded_folds_to_the_same_weights(name: str, tmp_path: Path) -> None:
    graph_module, expected = branched(name)
    graph_module = copy.deepcopy(graph_module).eval()
    batch = inputs(name, 3, 11, 5)
    auto = torch.export.Dim.AUTO
    shapes = {key: dict.fromkeys(range(value.dim()), auto) for key, value in batch.items()}
    program = torch.export.export(graph_module, (), batch, dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "branched.pt2")
    loaded = lora_fx.trace(torch.export.load(tmp_path / "branched.pt2"), inference=True)
    assert any(".lora_A." in key for key in loaded.state_dict())
    folded = lora_fx.fold(loaded)
    same_weights(loaded, folded, graph_module, expected)
    assert torch.allclose(folded(**batch)[0], run(name, graph_module, 3, 11, 5)[0], rtol=0, atol=1e-5)


def test_a_memory_format_in_a_graph_is_saved() -> None:
    class Copied(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.transpose(1, 2).clone(memory_format=torch.contiguous_format)

    x = torch.randn(2, 3, 4)
    graph_module = lora_fx.trace(Copied(), (x,))
    for copied in (saved(graph_module), pickled(graph_module)):
        assert torch.equal(copied(x), x.transpose(1, 2))
        assert copied(x).is_contiguous()
