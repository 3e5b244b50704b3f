"""Fused graphs of every architecture against plain ones: no farther from double precision, under the same masks.

Torch draws the masks of dropout from the same random state alike in all precisions, so the exact result has them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, FOUR, branched, build, inputs, rows
from conftest import set_factors
from graph_diff import first_difference
from test_fusion import outcome
from torch import fx, nn

import lora_fx
from lora_fx.branches.lower import lower
from lora_fx.graph.signature import signature_of
from lora_fx.numerics.fused_branch import add_update
from lora_fx.tracing.train_eval import ModeSwitch

HALF = rows(("llama", "t5", "roberta"), ("llama",))
DRAWS = range(8)
"""Of masks in training, of inputs in evaluation. What rounding makes of one is a matter of luck."""


class Exact(fx.Interpreter):
    """Runs a graph in double precision, whatever it computes in."""

    def __init__(self, graph: lora_fx.TracedGraphModule) -> None:
        super().__init__(graph)
        tensors = {**dict(graph.named_parameters(remove_duplicate=False)), **dict(graph.named_buffers())}
        wide = {
            id(tensor): self.cast(tensor.detach()).requires_grad_(tensor.requires_grad) for tensor in tensors.values()
        }
        self.tensors = {name: wide[id(tensor)] for name, tensor in tensors.items()}

    @staticmethod
    def cast(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return torch.float64 if value.is_floating_point else value
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def fetch_attr(self, target: str) -> Any:
        return self.tensors[target] if target in self.tensors else super().fetch_attr(target)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.cast(super().placeholder(target, args, kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        is_check = not isinstance(self.fetch_attr(target), nn.Dropout | ModeSwitch)
        return None if is_check else super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        kwargs = {key: self.cast(value) for key, value in kwargs.items()}
        return super().call_function(target, tuple(map(self.cast, args)), kwargs)

    def __call__(self, **values: torch.Tensor) -> Any:
        found = self.run(*signature_of(self.module.graph).tensors((), values), enable_io_processing=False)
        return found if isinstance(found, list | tuple) else [found]


def results(name: str, call: Any, tensors: Mapping[str, torch.Tensor], draw: int) -> dict[str, torch.Tensor]:
    """Return the output and the gradients of all factors, with the masks of one seed."""
    batch = inputs(name, 3, 11, 5, seed=draw)
    torch.manual_seed(draw)
    return outcome(call(**batch)[0], tensors)


def distances(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the distance of each result from the exact one, relative to the largest of its kind."""
    assert list(found) == list(expected)
    norms = {key: float(value.norm()) for key, value in expected.items()}
    largest = {kind: max(norms[key] for key in norms if kind_of(key) == kind) for kind in map(kind_of, norms)}
    return torch.tensor([float((found[key] - value).norm()) / largest[kind_of(key)] for key, value in expected.items()])


def kind_of(name: str) -> str:
    return next((kind for kind in (".lora_A.", ".lora_B.") if kind in name), "output")


def check(name: str, plain: lora_fx.TracedGraphModule, tolerance: float) -> None:
    set_factors(plain, scale=0.05)
    fused = lora_fx.fuse(plain)
    assert fused.graph.find_nodes(op="call_function", target=add_update)
    assert not any(".lora_dropout." in str(node.target) and node.args for node in fused.graph.nodes)
    assert first_difference(lower(fused), plain) is None
    for training in (False, True):
        graphs = [graph.train(training) for graph in (plain, fused)]
        exact, found = Exact(plain), []
        for draw in DRAWS:
            expected = results(name, exact, exact.tensors, draw)
            found.append([distances(results(name, g, dict(g.named_parameters()), draw), expected) for g in graphs])
        before, after = (torch.cat(each) for each in zip(*found, strict=True))
        assert before.max() < tolerance  # with other masks they would be far from each other
        assert after.square().mean().sqrt() <= 1.15 * before.square().mean().sqrt()
        assert after.max() <= 1.5 * before.max()


@pytest.mark.parametrize("name", FOUR)
def test_outputs_and_gradients_are_no_farther_from_fp64_than_the_plain_graphs_with_the_same_masks(name: str) -> None:
    check(name, branched(name, dropout=0.1), 1e-4)


@pytest.mark.parametrize("name", HALF)
def test_beside_half_precision_weights_they_are_no_farther_either(name: str) -> None:
    settings = {"rules": ARCHITECTURES[name].rules, "rank": 6, "alpha": 9, "dropout": 0.1}
    check(name, lora_fx.rewrite(build(name).bfloat16(), **settings), 0.5)
