"""Fused branches with dropout: the masks of the plain graph, kept as bits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, few, inputs, run
from conftest import set_factors, unchanged
from graph_diff import first_difference
from made import module
from test_fusion import kept
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx.branches.lower import lower
from lora_fx.numerics.bit_dropout import dropped, mask_of
from lora_fx.numerics.fused_branch import reduce_features

RULES = {"defaults": {"rank": 3, "alpha": 4.5, "dropout": 0.3}, "select": [{"target": ["lin", "other"]}]}
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def both(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return self.lin(x), self.other(x)


def two(
    forward: Callable[..., Any] = both, dtype: torch.dtype = torch.float32, **parts: nn.Module
) -> tuple[lora_fx.TracedGraphModule, lora_fx.TracedGraphModule]:
    """Return a graph with branches that drop beside ``lin`` and ``other``, and the same fused, both in training."""
    model = module(forward, other=nn.Linear(4, 5), **parts).to(dtype).train()
    graph_module = lora_fx.rewrite(model, rules=RULES, example_inputs=(torch.randn(7, 11, 4).to(dtype),))
    set_factors(graph_module)
    return graph_module, lora_fx.fuse(graph_module)


def results(call: Callable[..., Any], graph: nn.Module, x: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """Return outputs, all gradients, and what is drawn next."""
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    outputs = call(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    following = torch.rand(1)
    loss = sum((output.float() * torch.linspace(-1, 1, output.shape[-1])).sum() for output in outputs)
    leaves = [x, *(p for p in graph.parameters() if p.requires_grad)]
    return [*outputs, *torch.autograd.grad(loss, leaves), following]


def assert_close(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    tolerance = 0.1 if mine[0].dtype == torch.bfloat16 else 1e-5
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


def reductions(graph: fx.GraphModule) -> list[fx.Node]:
    return graph.graph.find_nodes(op="call_function", target=reduce_features)


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 8), (7, 1), (0, 4)], ids=str)
@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_stays_is_what_torch_keeps_bit_for_bit(
    shape: tuple[int, ...], rate: float, transposed: bool, dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype)
    x = x.transpose(0, -1) if transposed else x
    torch.manual_seed(1)
    expected, following = nn.functional.dropout(x, rate), torch.rand(1)
    torch.manual_seed(1)
    value, packed = dropped(x, rate)
    assert torch.equal(value, expected)
    assert torch.equal(torch.rand(1), following)
    assert torch.equal(mask_of(packed, x.shape, dtype), (expected != 0).to(dtype))
    assert packed.nbytes == -(-x.numel() // 8)


@PRECISIONS
def test_in_training_masks_outputs_and_gradients_are_those_of_the_plain_graph(dtype: torch.dtype) -> None:
    plain, fused = two(dtype=dtype)
    x = torch.randn(3, 5, 4).to(dtype)
    for seed in range(3):
        assert_close(results(fused, fused, x, seed), results(plain, plain, x, seed))
    assert not torch.allclose(results(fused, fused, x, 1)[0], results(fused, fused, x, 2)[0], atol=1e-3)


@PRECISIONS
def test_the_mode_and_the_rate_of_the_modules_are_followed(dtype: torch.dtype) -> None:
    plain, fused = two(dtype=dtype)
    x = torch.randn(3, 5, 4).to(dtype)
    for graph in (plain, fused):
        dropouts = [each for each in graph.modules() if isinstance(each, nn.Dropout)]
        assert len(dropouts) == 2
        dropouts[0].p, dropouts[1].p = 0.7, 0.0
    assert_close(results(fused, fused, x), results(plain, plain, x))
    assert_close(results(fused.eval(), fused, x), results(plain.eval(), plain, x))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fused(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_lowered_graph_has_its_dropouts_with_their_rate_and_mode() -> None:
    plain, fused = two()
    fused.get_submodule("lin.lora_dropout.default").p = 0.7
    lowered = lower(fused)
    assert type(lowered.get_submodule("lin.lora_dropout.default")) is nn.Dropout
    assert lowered.get_submodule("lin.lora_dropout.default").p == 0.7
    assert all(each.training for each in lowered.modules())
    assert first_difference(lower(lora_fx.fuse(plain)), plain) is None
    assert first_difference(lora_fx.fuse(lora_fx.fuse(plain)), lora_fx.fuse(plain)) is None


@PRECISIONS
def test_of_all_masks_only_bits_are_kept_and_the_input_once(dtype: torch.dtype) -> None:
    x = torch.randn(8, 11, 4).to(dtype)
    before, after = (kept(graph, x) for graph in two(dtype=dtype))
    small = 2 * 8 * 11 * 3 * 4
    assert after == x.nbytes + 2 * x.numel() // 8 + small
    assert before >= 2 * 4 * x.numel() + small


def test_where_no_first_factor_trains_the_input_is_not_kept() -> None:
    _, fused = two()
    for name, parameter in fused.named_parameters():
        parameter.requires_grad_(".lora_B." in name)
    x = torch.randn(8, 11, 4, requires_grad=True)
    assert kept(fused, x) == 2 * x.numel() // 8 + 2 * 8 * 11 * 3 * 4
    fused(x)[0].sum().backward()
    assert x.grad.norm() > 0


def test_masks_are_drawn_in_order_where_something_else_draws_between_two_branches() -> None:
    def forward(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.drop(self.lin(x))
        return first, self.other(x)

    plain, fused = two(forward, drop=nn.Dropout(0.5))
    assert len(reductions(fused)) == 2
    x = torch.randn(3, 5, 4)
    assert_close(results(fused, fused, x), results(plain, plain, x))


def test_a_module_that_is_called_twice_draws_twice() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.lin(self.lin(x)))

    plain, fused = two(forward)
    assert len(reductions(fused)) == 3
    x = torch.randn(3, 5, 4)
    assert_close(results(fused, fused, x), results(plain, plain, x))
    assert first_difference(lower(fused), plain) is None


def test_a_dropout_that_is_called_elsewhere_too_stays_where_it_is_with_its_branch() -> None:
    plain, _ = two()
    output = plain.graph.output_node()
    first, second = output.args[0]
    with plain.graph.inserting_before(output):
        again = plain.graph.call_module("lin.lora_dropout.default", (first,))
    output.args = ((again, second),)
    plain.recompile()
    fused = lora_fx.fuse(plain)
    assert [len(node.args[1]) for node in reductions(fused)] == [1]
    x = torch.randn(3, 5, 4)
    assert_close(results(fused, fused, x), results(plain, plain, x))


@PRECISIONS
def test_what_is_written_to_between_two_sites_is_dropped_and_read_twice(dtype: torch.dtype) -> None:
    def forward(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x * 2
        first = self.lin(x)
        x.add_(1)
        return first, self.other(x)

    model = module(forward, other=nn.Linear(4, 5)).to(dtype)
    x = torch.randn(7, 11, 4).to(dtype)
    plain = lora_fx.rewrite(model, rules=RULES, example_inputs=(x,), inference=True)
    set_factors(plain)
    fused = lora_fx.fuse(plain)
    assert len(reductions(fused)) == 2
    outputs = []
    for graph in (plain, fused):
        torch.manual_seed(0)
        outputs.append(graph.train()(x))
    assert_close(*map(list, outputs))


def test_autocast_draws_the_same_masks_and_gives_the_same_dtypes() -> None:
    plain, fused = two()
    x = torch.randn(3, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = (results(graph, graph, x) for graph in (fused, plain))
    assert_close(mine, theirs)


@PRECISIONS
def test_activation_checkpointing_draws_the_masks_once_more(dtype: torch.dtype) -> None:
    _, fused = two(dtype=dtype)
    x = torch.randn(3, 5, 4).to(dtype)
    again = results(lambda value: checkpoint(fused, value, use_reentrant=False), fused, x)
    assert_close(again, results(fused, fused, x))


@pytest.mark.parametrize("dtype", few([torch.float32, torch.bfloat16], [torch.float32]), ids=str)
def test_a_fused_graph_with_dropout_compiles_whole_and_draws_as_before(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    plain, fused = two(dtype=dtype)
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((3, 5, 4), (2, 7, 4)):
        x = torch.randn(shape).to(dtype)
        assert_close(results(compiled, fused, x), results(plain, plain, x))
    assert_close(results(compiled, fused.eval(), x), results(plain.eval(), plain, x))


@pytest.mark.parametrize("through", [copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))])
def test_copies_draw_the_same_and_lower_to_the_same_nodes(through: Callable[[Any], Any]) -> None:
    plain, fused = two(dtype=torch.bfloat16)
    copied = through(fused)
    x = torch.randn(3, 5, 4).bfloat16()
    mine, theirs = results(copied, copied, x), results(fused, fused, x)
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
    assert first_difference(lower(copied), plain) is None


@PRECISIONS
def test_passes_of_torch_fx_write_the_same_nodes_again(dtype: torch.dtype) -> None:
    _, fused = two(dtype=dtype)
    x = torch.randn(3, 5, 4).to(dtype)
    transformed = fx.Transformer(fused).transform()
    assert len(reductions(transformed)) == len(reductions(fused))
    torch.manual_seed(0)
    expected = fused(x)
    torch.manual_seed(0)
    assert torch.equal(transformed(x)[0], expected[0])
    torch.manual_seed(0)
    assert torch.equal(fx.Interpreter(fused).run(x)[0], expected[0])


def test_on_the_meta_device_shapes_are_those_of_the_plain_graph() -> None:
    plain, fused = (graph.to("meta") for graph in two())
    x = torch.randn(3, 5, 4, device="meta")
    outputs = fused(x)
    assert [value.shape for value in outputs] == [value.shape for value in plain(x)]
    sum(value.sum() for value in outputs).backward()
    assert fused.get_parameter("lin.lora_A.default.weight").grad.shape == (3, 4)


def test_it_is_folded_verified_saved_loaded_and_exported_as_the_plain_graph_is(tmp_path: Path) -> None:
    plain = lora_fx.rewrite(build("gpt2").train(), rules="gpt2", rank=4, dropout=0.2)
    set_factors(plain, scale=0.05)
    fused = lora_fx.fuse(plain)
    assert reductions(fused)
    with unchanged(fused):
        folded, expected = lora_fx.fold(fused), lora_fx.fold(plain).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in folded.state_dict().items())
        lora_fx.verify(fused, folded, inputs("gpt2", 3, 11))
        lora_fx.save_adapter(fused, tmp_path / "adapter")
        lora_fx.export.torchscript(fused, tmp_path / "graph.pt")
    loaded = lora_fx.load_adapter(lora_fx.trace(build("gpt2")), tmp_path / "adapter").eval()
    scripted = torch.jit.load(tmp_path / "graph.pt").eval()
    with torch.no_grad():
        output = run("gpt2", fused.eval(), 3, 11)[0]
        assert torch.allclose(run("gpt2", loaded, 3, 11)[0], output, rtol=0, atol=1e-5)
        assert torch.allclose(scripted(**inputs("gpt2", 3, 11))["logits"], output, rtol=0, atol=1e-5)
