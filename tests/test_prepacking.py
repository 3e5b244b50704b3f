from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import PRIMARY, inputs, model, run, traced
from conftest import set_factors, unchanged
from graph_diff import first_difference
from made import X, module
from test_fusion import EITHER, branched, distances, exact, plain, results
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import lora_fx
from lora_fx import packed, prepacking
from lora_fx.branches.lower import lower
from lora_fx.packed import PrepackedAddmm, PrepackedLinear, PrepackedWeight
from lora_fx.prepacking import prepacked_bytes

aten = torch.ops.aten
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _small_weights_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacking, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(packed, "LEAST_ROWS", 0)
    monkeypatch.setattr(packed, "REPEATS", 0)


def packing(graph_module: nn.Module) -> list[PrepackedWeight]:
    return [part for part in graph_module.modules() if isinstance(part, PrepackedWeight)]


def targets(graph_module: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph_module.graph.nodes if node.op != "call_module"]


def made(forward: Callable[..., Any] | None = None, width: int = 4, **parts: Any) -> lora_fx.TracedGraphModule:
    """Return a prepacked graph with one layer, whose input may need a gradient."""
    model = module(forward or (lambda self, x: self.lin(x)), lin=nn.Linear(width, width), **parts)
    example = torch.randn(3, width)
    return lora_fx.fuse(lora_fx.trace(model.requires_grad_(False), (example,)), prepack=True)


def computes(graph_module: lora_fx.TracedGraphModule, x: torch.Tensor = X) -> bool:
    """Tell whether a graph gives the output and the gradient that its weights give now, and fail if the gradient is off."""
    found, expected = (x.clone().requires_grad_() for _ in range(2))
    output, wanted = graph_module(found), lora_fx.fuse(graph_module)(expected)
    output.square().sum().backward()
    wanted.square().sum().backward()
    same = torch.allclose(output, wanted, rtol=1e-5, atol=1e-6)
    assert same == torch.allclose(found.grad, expected.grad, rtol=1e-5, atol=1e-6)
    return same


# What it computes.


@pytest.mark.parametrize(("name", "dtype"), EITHER)
def test_outputs_and_gradients_are_no_farther_from_fp64_than_those_of_the_plain_graph(
    name: str, dtype: torch.dtype
) -> None:
    prepacked = lora_fx.fuse(plain(name, dtype), prepack=True)
    before, after = (distances(results(name, graph), exact(name, dtype)) for graph in (plain(name, dtype), prepacked))
    assert after.square().mean().sqrt() <= 1.1 * before.square().mean().sqrt()
    assert (after <= 2 * before).all()


@pytest.mark.parametrize(
    ("name", "linear", "addmm"),
    [
        ("llama", 3 * 7 + 1, 0),
        ("gpt2", 1, 3 * 4),
        ("bert", 3 * 6 + 1, 0),
        ("t5", 3 * 6 + 4 * 10 + 1, 0),
    ],
)
def test_every_linear_weight_of_a_model_is_packed(name: str, linear: int, addmm: int) -> None:
    prepacked = lora_fx.fuse(plain(name), prepack=True)
    kinds = [type(part) for part in packing(prepacked)]
    assert (kinds.count(PrepackedLinear), kinds.count(PrepackedAddmm)) == (linear, addmm)
    assert not {aten.linear.default, aten.addmm.default} & set(targets(prepacked))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [PrepackedLinear, PrepackedAddmm])
def test_products_with_wide_weights_stay_near_fp64(dtype: torch.dtype, kind: type[Any]) -> None:
    x, weight, bias, dy = (torch.randn(shape).to(dtype) for shape in ((70, 700), (300, 700), (300,), (70, 300)))
    weight = weight.t().contiguous() if kind.swapped else weight

    def given(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        wide = bias.to(x.dtype), x, weight.to(x.dtype)
        return wide if kind.swapped else (*wide[1:], wide[0])

    found = []
    for call, wide in ((kind("w"), dtype), (kind.operator, dtype), (kind.operator, torch.float64)):
        leaf = x.to(wide, copy=True).requires_grad_()
        output = call(*given(leaf))
        output.backward(dy.to(wide))
        found.append((output, leaf.grad))
    assert type(found[0][0].grad_fn).__name__ == "_PackedProductBackward"
    for mine, theirs, right in zip(*found, strict=True):
        assert (mine - right).norm() <= 1.1 * (theirs - right).norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4),
        torch.randn(3, 4),
        torch.randn(2, 3, 4),
        torch.randn(2, 3, 2, 4),
        torch.randn(0, 4),
        torch.randn(2, 0, 4),
        torch.randn(4, 6).t(),
        torch.randn(2, 4, 3).transpose(1, 2),
        torch.randn(3, 5)[:, 1:],
        torch.randn(()).expand(3, 4),
    ],
    ids=lambda x: f"{tuple(x.shape)}-{x.stride()}",
)
def test_inputs_may_have_any_shape_and_strides(x: torch.Tensor, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(5, 4).to(dtype), torch.randn(5).to(dtype)
    for expanded in (False, True):
        found = []
        for call in (PrepackedLinear("w"), aten.linear.default):
            leaf, trained = x.to(dtype).detach().requires_grad_(), bias.clone().requires_grad_()
            output = call(leaf, weight, trained)
            (output.sum() if expanded else output.square().sum()).backward()
            found.append((output, leaf.grad, trained.grad))
        for mine, theirs in zip(*found, strict=True):
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
            assert (mine - theirs).norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-6) * theirs.norm()


def test_a_bias_that_trains_gets_its_gradient_also_where_the_input_needs_none() -> None:
    weight, bias = torch.randn(5, 4), torch.randn(5, requires_grad=True)
    PrepackedLinear("w")(X, weight, bias).square().sum().backward()
    assert torch.allclose(bias.grad, 2 * (X @ weight.t() + bias).sum(0))


@pytest.mark.parametrize("training", [False, True])
def test_modes_switch_as_before(training: bool) -> None:
    rules = {"defaults": {"rank": 6, "alpha": 9, "dropout": 0.3}, "select": [{"target": ["q_proj", "down_proj"]}]}
    graph_module = lora_fx.rewrite(model("llama"), rules=rules)
    set_factors(graph_module, scale=0.05)
    outputs = []
    for graph in (graph_module, lora_fx.fuse(graph_module, prepack=True)):
        torch.manual_seed(3)
        outputs.append(run("llama", graph.train(training), 3, 11)[0])
    assert torch.allclose(*outputs, rtol=0, atol=1e-5)


def test_nothing_more_is_saved_for_the_backward_pass() -> None:
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    graph_module = made()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = graph_module(X.clone().requires_grad_())
    assert output.requires_grad
    assert not kept


def test_a_second_derivative_is_refused_by_torch() -> None:
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(made()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# When plain operators compute.


def test_autocast_gives_the_bits_that_it_gives_the_plain_graph() -> None:
    graph_module = made()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = graph_module(X), lora_fx.fuse(graph_module)(X)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_errors_are_those_of_the_operator() -> None:
    weight = torch.randn(5, 4)
    for x, bias in ((X.double(), None), (torch.randn(3, 5), None), (X, torch.randn(4))):
        said = []
        for call in (PrepackedLinear("w"), aten.linear.default):
            with pytest.raises(RuntimeError) as raised:
                call(x, weight, bias)
            said.append(str(raised.value))
        assert said[0] == said[1]
    with pytest.raises(RuntimeError, match="mat1 must be a matrix"):
        PrepackedAddmm("w")(torch.randn(5), torch.randn(2, 3, 4), torch.randn(4, 5))


def test_transforms_and_modes_see_plain_operators() -> None:
    graph_module = made()
    weight = graph_module.get_parameter("lin.weight")
    expected = X @ weight.t() + graph_module.get_parameter("lin.bias")
    call = packing(graph_module)[0]
    assert torch.allclose(torch.vmap(lambda x: call(x, weight, graph_module.get_parameter("lin.bias")))(X), expected)
    with FlopCounterMode(display=False) as counter:
        graph_module(X)
    assert counter.get_total_flops() == 2 * 3 * 4 * 4


def test_tangents_of_forward_differentiation_pass() -> None:
    graph_module = made()
    graph_module(X)
    assert prepacked_bytes(graph_module) > 0
    tangent = torch.randn(X.shape)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        output = graph_module(torch.autograd.forward_ad.make_dual(X, tangent))
        found = torch.autograd.forward_ad.unpack_dual(output).tangent
    assert torch.allclose(found, tangent @ graph_module.get_parameter("lin.weight").t())


def test_a_prepacked_graph_compiles_whole_to_plain_operators() -> None:
    prepacked = lora_fx.fuse(plain("llama"), prepack=True)
    compiled = torch.compile(prepacked, fullgraph=True, backend="aot_eager")
    found = [results("llama", each) for each in (compiled, lora_fx.fuse(plain("llama")))]
    for mine, theirs in zip(*(each.values() for each in found), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_weight_that_trains_is_not_packed_and_gets_its_gradient() -> None:
    graph_module = made()
    weight = graph_module.get_parameter("lin.weight").requires_grad_()
    graph_module(X).sum().backward()
    assert torch.allclose(weight.grad, X.sum(0).expand(4, 4))
    assert prepacked_bytes(graph_module) == 0
    assert not packing(lora_fx.fuse(graph_module, prepack=True))
    with torch.no_grad():
        weight.add_(weight.grad)
    assert computes(graph_module)
    weight.requires_grad_(False)
    assert computes(graph_module)
    assert prepacked_bytes(graph_module) > 0


def test_a_graph_that_leaves_the_cpu_drops_its_copies() -> None:
    graph_module = made()
    graph_module.to("meta")
    assert graph_module(X.to("meta")).device.type == "meta"
    assert prepacked_bytes(graph_module) == 0


# Weights that change.


def _assign(weight: nn.Parameter) -> None:
    weight.data = torch.randn(weight.shape)


def _assign_twice(weight: nn.Parameter) -> None:
    weight.data = weight.data.clone()
    weight.data = torch.randn(weight.shape)  # may be where the first one was


def _write(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[1, 2] += 1


def _write_data(weight: nn.Parameter) -> None:
    weight.data.mul_(2)


def _write_row(weight: nn.Parameter) -> None:
    weight.data[1].add_(1)


def _write_column(weight: nn.Parameter) -> None:
    weight.data[:, 2].add_(1)


def _write_numpy(weight: nn.Parameter) -> None:
    weight.detach().numpy()[:] = 3


def _become_nan(weight: nn.Parameter) -> None:
    weight.data.fill_(float("nan"))


@pytest.mark.parametrize(
    "change",
    [_assign, _assign_twice, _write, _write_data, _write_row, _write_column, _write_numpy],
    ids=lambda change: change.__name__.strip("_"),
)
def test_a_weight_that_has_changed_is_packed_again(change: Callable[[nn.Parameter], None]) -> None:
    graph_module = made()
    assert computes(graph_module)
    before = graph_module(X)
    change(graph_module.get_parameter("lin.weight"))
    assert computes(graph_module)
    assert not torch.allclose(before, graph_module(X))


def test_every_row_and_column_is_compared_at_every_shape() -> None:
    for rows, columns in ((1, 1), (1, 7), (7, 1), (3, 5), (48, 48), (40, 72), (72, 40), (1024, 2816)):
        found = packed._sample(torch.zeros(rows, columns))
        places = found.storage_offset() + torch.arange(found.numel()) * found.stride(0)
        assert set((places // columns).tolist()) == set(range(rows))
        assert set((places % columns).tolist()) == set(range(columns))
        assert found.numel() <= 2 * max(rows, columns)


def test_weights_with_a_nan_are_not_packed_again_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module = made()
    _become_nan(graph_module.get_parameter("lin.weight"))
    assert graph_module(X).isnan().all()
    monkeypatch.setattr(packed, "Packed", None)  # what would pack
    assert graph_module(X).isnan().all()


def test_another_parameter_loaded_values_and_functional_calls_are_seen() -> None:
    graph_module = made()
    values = {name: torch.randn(tensor.shape) for name, tensor in graph_module.state_dict().items()}
    graph_module.load_state_dict(values)
    assert computes(graph_module)
    graph_module.load_state_dict({name: 2 * value for name, value in values.items()}, assign=True)
    assert computes(graph_module)
    graph_module.get_submodule("lin").weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)
    assert computes(graph_module)
    given = torch.func.functional_call(graph_module, values, (X,))
    assert torch.allclose(given, X @ values["lin.weight"].t() + values["lin.bias"])
    assert computes(graph_module)


def test_gradients_are_of_the_values_that_the_forward_pass_used() -> None:
    graph_module = made()
    weight = graph_module.get_parameter("lin.weight")
    before = weight.clone()
    x = X.clone().requires_grad_()
    output = graph_module(x)
    weight.data.mul_(3)
    output.sum().backward()
    assert torch.allclose(x.grad, before.sum(0).expand(3, 4))


def test_a_fold_in_place_and_the_model_change_what_other_graphs_over_their_memory_compute() -> None:
    graph_module = branched("llama", copy.deepcopy(model("llama")))
    prepacked = lora_fx.fuse(graph_module, prepack=True)
    other = lora_fx.fuse(lora_fx.unload(graph_module), prepack=True)
    before = run("llama", other, 3, 11)[0]
    expected = run("llama", lora_fx.fold(graph_module), 3, 11)[0]
    lora_fx.fold(prepacked, inplace=True)
    assert not torch.allclose(before, expected, atol=1e-4)
    assert torch.allclose(run("llama", other, 3, 11)[0], expected, rtol=0, atol=1e-5)
    with pytest.raises(lora_fx.FoldError, match="folded in place"):
        run("llama", prepacked, 3, 11)


def test_packed_in_inference_mode_serves_training() -> None:
    graph_module = copy.deepcopy(made())
    with torch.inference_mode():
        graph_module(X)
    assert computes(graph_module)


# What is kept, and what is not.


@pytest.mark.parametrize(
    "through",
    [
        copy.deepcopy,
        lambda graph: pickle.loads(pickle.dumps(graph)),
        lambda graph: _saved(graph),
        lambda graph: fx.Transformer(graph).transform(),
        lora_fx.trace,
    ],
    ids=["deepcopy", "pickle", "torch.save", "Transformer", "trace"],
)
def test_copies_compute_the_same_and_hold_no_packed_weight_until_they_are_called(
    through: Callable[[Any], Any],
) -> None:
    prepacked = lora_fx.fuse(plain("llama"), prepack=True)
    copied = through(prepacked)
    if isinstance(copied, lora_fx.TracedGraphModule):  # a Transformer's result has the modules of the graph themselves
        assert prepacked_bytes(copied) == 0
    assert torch.equal(run("llama", copied, 3, 11)[0], run("llama", prepacked, 3, 11)[0])
    assert prepacked_bytes(copied) > 0
    lowered = lora_fx.fold(copied).state_dict()
    assert all(torch.equal(tensor, lowered[key]) for key, tensor in lora_fx.fold(plain("llama")).state_dict().items())


def _saved(graph: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(graph, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def test_state_dict_parameters_and_the_size_of_a_pickle_are_as_before() -> None:
    fused, prepacked = lora_fx.fuse(plain("gpt2")), lora_fx.fuse(plain("gpt2"), prepack=True)
    assert list(prepacked.state_dict()) == list(fused.state_dict())
    assert [name for name, _ in prepacked.named_parameters()] == [name for name, _ in fused.named_parameters()]
    assert [name for name, _ in prepacked.named_buffers()] == [name for name, _ in fused.named_buffers()]
    assert str(lora_fx.parameter_summary(prepacked)) == str(lora_fx.parameter_summary(fused))
    assert len(pickle.dumps(prepacked)) < len(pickle.dumps(fused)) + 300 * len(packing(prepacked))
    assert prepacked.meta == fused.meta


def test_dead_code_elimination_keeps_what_is_read() -> None:
    prepacked = lora_fx.fuse(plain("llama"), prepack=True)
    before = run("llama", prepacked, 3, 11)[0]
    prepacked.graph.eliminate_dead_code()
    prepacked.recompile()
    assert torch.equal(run("llama", prepacked, 3, 11)[0], before)
    assert first_difference(lower(prepacked), plain("llama")) is None


def test_calls_of_one_weight_share_its_copies() -> None:
    prepacked = made(lambda self, x: self.lin(self.lin(x)))
    assert len(packing(prepacked)) == 1
    assert sum(node.op == "call_module" and "prepacked" in str(node.target) for node in prepacked.graph.nodes) == 2
    assert computes(prepacked)


def test_a_part_of_the_model_may_be_called_prepacked() -> None:
    prepacked = made(lambda self, x: self.prepacked(self.lin(x)), prepacked=nn.Linear(4, 4))
    assert computes(prepacked)
    assert len(packing(prepacked)) == 2
    assert "prepacked.weight" in prepacked.state_dict()


def test_its_memory_is_logged_and_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lora_fx.prepacking")
    prepacked = made(width=64)
    assert caplog.messages == ["1 weights of 0.0 MB are packed when they are used, in as much again for each direction"]
    assert prepacked_bytes(prepacked) == 0
    prepacked(torch.randn(3, 64))
    assert prepacked_bytes(prepacked) == 4 * 64 * 64
    prepacked(torch.randn(3, 64, requires_grad=True))
    assert prepacked_bytes(prepacked) == 2 * 4 * 64 * 64
    assert prepacked_bytes(lora_fx.fuse(prepacked)) == 0


# When it is packed.


def test_a_weight_of_single_precision_is_packed_for_the_rows_that_come_twice_in_succession(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed, "REPEATS", 1)
    monkeypatch.setattr(packed, "LEAST_ROWS", 4)
    graph_module = made()
    found = []
    for rows in (5, 6, 6, 7, 6, 3, 3, 7, 7):
        assert computes(graph_module, torch.randn(rows, 4))
        (part,) = packing(graph_module)
        found.append(part._packed and part._packed.rows)
    assert found == [None, None, 6, 6, 6, 6, 6, 6, 7]


def test_with_few_rows_products_of_single_precision_are_plain_and_have_their_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    call, weight = PrepackedLinear("w"), torch.randn(600, 700)
    for rows, packs in ((15, False), (16, True)):
        x = torch.randn(rows, 700)
        for _ in range(3):
            found = call(x, weight)
        assert (call.nbytes > 0) == packs
        exact, plain = x.double() @ weight.double().t(), x @ weight.t()
        assert (found - exact).norm() <= 1.1 * (plain - exact).norm()
        assert packs or torch.equal(found, plain)


# Taken back.


@pytest.mark.parametrize(("name", "dtype"), EITHER)
def test_lowered_is_the_plain_graph_node_for_node_with_its_metadata(name: str, dtype: torch.dtype) -> None:
    lowered = lower(lora_fx.fuse(plain(name, dtype), prepack=True))
    assert first_difference(lowered, plain(name, dtype)) is None
    assert not packing(lowered)
    assert [name for name, _ in lowered.named_modules()] == [name for name, _ in plain(name, dtype).named_modules()]
    for node, other in zip(lowered.graph.nodes, plain(name, dtype).graph.nodes, strict=True):
        assert node.name == other.name
        for key in ("custom", "nn_module_stack", "stack_trace"):
            assert node.meta.get(key) == other.meta.get(key)


def test_fuse_depends_on_the_plain_graph_alone() -> None:
    fused, prepacked = lora_fx.fuse(plain("llama")), lora_fx.fuse(plain("llama"), prepack=True)
    assert first_difference(lora_fx.fuse(prepacked), fused) is None
    assert first_difference(lora_fx.fuse(prepacked, prepack=True), prepacked) is None
    assert first_difference(lora_fx.fuse(fused, prepack=True), prepacked) is None
    with unchanged(prepacked):
        lora_fx.fuse(prepacked)
        lower(prepacked)


@pytest.mark.parametrize("name", PRIMARY)
def test_folds_unloads_and_verifies_to_the_same_bits(name: str) -> None:
    prepacked = lora_fx.fuse(plain(name), prepack=True)
    expected, found = lora_fx.fold(plain(name)), lora_fx.fold(prepacked)
    assert first_difference(expected, found) is None
    weights = expected.state_dict()
    assert list(weights) == list(found.state_dict())
    assert all(torch.equal(tensor, weights[key]) for key, tensor in found.state_dict().items())
    assert first_difference(lora_fx.unload(prepacked), lora_fx.unload(plain(name))) is None
    lora_fx.verify(prepacked, found, inputs(name, 2, 5))


def test_adapters_plans_and_pictures_are_those_of_the_plain_graph(tmp_path: Path) -> None:
    graph, base = plain("llama"), traced("llama")
    prepacked, bare = lora_fx.fuse(graph, prepack=True), lora_fx.fuse(base, prepack=True)
    lora_fx.save_adapter(prepacked, tmp_path / "a")
    lora_fx.save_adapter(graph, tmp_path / "b")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    for mine, theirs in [
        (lora_fx.load_adapter(bare, tmp_path / "a"), lora_fx.load_adapter(base, tmp_path / "a")),
        (lora_fx.rewrite(bare, rules="llama", seed=1), lora_fx.rewrite(base, rules="llama", seed=1)),
        (lora_fx.transfer(prepacked, onto=bare), lora_fx.transfer(graph, onto=base)),
        (lora_fx.activate(prepacked, {"default": 0.5}), lora_fx.activate(graph, {"default": 0.5})),
        (lora_fx.combine(prepacked, {"default": 0.5}), lora_fx.combine(graph, {"default": 0.5})),
    ]:
        assert first_difference(mine, theirs) is None
    assert str(lora_fx.plan(bare, rules="llama")) == str(lora_fx.plan(base, rules="llama"))
    lora_fx.draw(bare, prepacked, tmp_path / "a.json")
    lora_fx.draw(base, lora_fx.fuse(graph), tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_exports_are_those_of_the_plain_graph(tmp_path: Path) -> None:
    graphs = {"a": lora_fx.fuse(plain("llama"), prepack=True), "b": plain("llama")}
    for name, graph in graphs.items():
        lora_fx.export.onnx(graph, tmp_path / f"{name}.onnx")
        lora_fx.export.pt2(graph, tmp_path / f"{name}.pt2")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    mine, theirs = (
        torch.export.load(tmp_path / f"{name}.pt2") for name in graphs
    )  # torch writes ids of objects into it
    assert str(mine.graph) == str(theirs.graph)
    assert list(mine.state_dict) == list(theirs.state_dict)


# What is left as it is, and what is refused.


def test_small_weights_buffers_and_other_products_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.lin(x), self.buffer) @ self.weight + nn.functional.linear(x, x)[:, :1]

    parts = {"buffer": torch.randn(4, 4), "weight": nn.Parameter(torch.randn(4, 4))}
    assert [part.name for part in packing(made(forward, **parts))] == ["lin.weight"]
    monkeypatch.undo()
    assert not packing(made())
    assert not packing(lora_fx.fuse(plain("llama"), prepack=True))
    assert packing(made(width=512))


def test_other_dtypes_stay_plain() -> None:
    graph_module = lora_fx.trace(module(lambda self, x: self.lin(x)).double(), (X.double(),))
    assert not packing(lora_fx.fuse(graph_module, prepack=True))


def test_it_is_refused_where_it_cannot_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = lora_fx.trace(copy.deepcopy(model("llama")).to("meta"))
    with pytest.raises(lora_fx.LoraFxError, match=r"for the CPU, and '.*' is on meta.*materialize"):
        lora_fx.fuse(elsewhere, prepack=True)
    with pytest.raises(lora_fx.PlanError, match="a graph of lora_fx is expected"):
        lora_fx.fuse(model("llama"), prepack=True)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(lora_fx.LoraFxError, match="no oneDNN for this machine"):
        lora_fx.fuse(plain("llama"), prepack=True)
