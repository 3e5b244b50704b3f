from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import transformers
from architectures import EACH, SIZES, branched, inputs, model, run, traced
from conftest import set_factors, unchanged
from graph_diff import first_difference
from torch import nn
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx.graph.info import info_of


@pytest.fixture(params=EACH)
def named(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_graph_computes_what_the_model_computes(named: str, size: tuple[int, int, int]) -> None:
    expected, found = run(named, model(named), *size), run(named, traced(named), *size)
    assert type(found) is type(expected)
    leaves = pytree.tree_leaves(found)
    assert len(leaves) == len(pytree.tree_leaves(expected))
    assert all(torch.equal(a, b) for a, b in zip(leaves, pytree.tree_leaves(expected), strict=True))
    batch, parameters = inputs(named, *size), inspect.signature(model(named).forward).parameters
    last = max(list(parameters).index(name) for name in batch)
    by_position = [batch.get(name, parameter.default) for name, parameter in list(parameters.items())[: last + 1]]
    assert torch.equal(traced(named)(*by_position)[0], expected[0])


def test_dropout_follows_the_mode_also_after_a_copy(named: str) -> None:
    eager, graph_module = copy.deepcopy(model(named)), copy.deepcopy(traced(named))
    for graph in (graph_module, copy.deepcopy(graph_module.train())):
        for mode in (True, False):
            torch.manual_seed(3)
            expected = run(named, eager.train(mode), 3, 11, 5)[0]
            torch.manual_seed(3)
            assert torch.equal(run(named, graph.train(mode), 3, 11, 5)[0], expected)


def test_dropout_is_off_once_each_dropout_module_has_rate_zero(named: str) -> None:
    """As trl's trainers switch it off; attention's own, which an operator does, too."""
    graph = copy.deepcopy(traced(named)).train()
    for module in graph.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    torch.manual_seed(3)
    first = run(named, graph, 3, 11, 5)[0]
    assert torch.equal(run(named, graph, 3, 11, 5)[0], first)


def test_the_graph_is_in_normal_form(named: str) -> None:
    eager, graph_module = model(named), traced(named)
    attributes = [str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"]
    assert len(attributes) == len(set(attributes))
    for node in graph_module.graph.nodes:
        assert not isinstance(node.target, torch._ops.HigherOrderOperator)
        assert node.op != "call_module" or type(graph_module.get_submodule(node.target)).__name__ in {
            "Dropout",
            "AttentionDropout",
            "ModeSwitch",
            "InputCheck",
            "RelationCheck",
        }
        assert not any(isinstance(value, torch.device) for value in (*node.args, *node.kwargs.values()))
    assert {id(p) for p in graph_module.parameters()}.isdisjoint(id(p) for p in eager.parameters())
    assert not any(p.requires_grad for p in graph_module.parameters())
    assert set(graph_module.state_dict()) == set(eager.state_dict())


def test_ties_are_kept(named: str) -> None:
    ties = []
    for module in (model(named), traced(named)):
        parameters = list(module.named_parameters(remove_duplicate=False))
        ties.append({(a, b) for a, p in parameters for b, q in parameters if p is q})
    assert ties[0] == ties[1]


def test_meta_and_modes_survive_a_deep_copy(named: str) -> None:
    graph_module = branched(named).train()
    copied = copy.deepcopy(graph_module)
    assert info_of(copied).adapters == info_of(graph_module).adapters
    assert list(copied.state_dict()) == list(graph_module.state_dict())
    assert [m.training for m in copied.modules()] == [m.training for m in graph_module.modules()]
    graph_module.eval()
    assert copied.training


def test_converting_the_dtype_is_refused_and_moving_is_not() -> None:
    graph_module = traced("bert")
    for convert in (nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)):
        with pytest.raises(lora_fx.LoraFxError, match=r"keeps its dtype.*trace it again"):
            convert(copy.deepcopy(graph_module))
    copy.deepcopy(graph_module).to("cpu").float()


# Constraints: nothing that torch.export assumed is lost.


class BranchesOnLength(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.size(1) <= 16 else x * 3


class Divides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.view(x.size(0), x.size(1) // 3, 3, 6).sum(2))


class HasMaximum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.positions.weight[: x.size(1)]


class TreatsOneApart(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.size(1) == 1 else x * 3


class Pair(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([a, b], dim=1) + torch.cat([b, a], dim=1)


@pytest.mark.parametrize("copied", [False, True], ids=["traced", "copied"])
@pytest.mark.parametrize(
    ("model", "traced_at", "good", "bad"),
    [
        (BranchesOnLength(), 7, (1, 2, 16), (17, 40)),
        (BranchesOnLength(), 20, (17, 40), (16, 3, 1)),
        (Divides(), 9, (6, 12), (4, 2, 1)),
        (HasMaximum(), 7, (1, 5, 12), (13, 40)),
        (TreatsOneApart(), 7, (2, 40), (1,)),
    ],
    ids=["short", "long", "divides", "maximum", "one"],
)
def test_inputs_outside_of_the_trace_raise_and_none_is_wrong(
    model: nn.Module, traced_at: int, good: tuple[int, ...], bad: tuple[int, ...], copied: bool
) -> None:
    graph_module = lora_fx.trace(model, (torch.randn(2, traced_at, 6),))
    graph_module = copy.deepcopy(graph_module) if copied else graph_module
    for size in good:
        x = torch.randn(5, size, 6)
        assert torch.equal(graph_module(x), model(x))
        assert torch.equal(graph_module(x[:1]), model(x[:1]))
    for size in bad:
        with pytest.raises(lora_fx.InputError, match="Trace again with example_inputs"):
            graph_module(torch.randn(5, size, 6))


def test_a_constraint_survives_rewrite_fold_and_scripting(tmp_path: Any) -> None:
    graph_module = lora_fx.rewrite(
        Divides(), {"select": [{"target": ["linear"]}]}, rank=2, example_inputs=(torch.randn(2, 9, 6),)
    )
    lora_fx.export.torchscript(graph_module, tmp_path / "model.pt")
    for module in (
        graph_module,
        lora_fx.fold(graph_module),
        lora_fx.unload(graph_module),
        torch.jit.load(tmp_path / "model.pt"),
    ):
        module(torch.randn(4, 6, 6))
        with pytest.raises((lora_fx.InputError, torch.jit.Error), match=r"size\(1\)"):
            module(torch.randn(4, 4, 6))


def test_dtype_and_rank_of_inputs_are_checked() -> None:
    graph_module = lora_fx.trace(BranchesOnLength(), {"x": torch.randn(2, 7, 6)})
    with pytest.raises(lora_fx.InputError, match=r"'x' has dtype torch.float64, expected torch.float32"):
        graph_module(torch.randn(2, 7, 6).double())
    with pytest.raises(lora_fx.InputError, match="'x' has 2 dimensions, expected 3"):
        graph_module(torch.randn(7, 6))


def test_relations_between_inputs_are_checked() -> None:
    graph_module = lora_fx.trace(Pair(), {"a": torch.randn(2, 7), "b": torch.randn(2, 5)})
    a, b = torch.randn(3, 4), torch.randn(3, 6)
    assert torch.equal(graph_module(b=b, a=a), Pair()(a, b))
    with pytest.raises((lora_fx.InputError, RuntimeError)):
        graph_module(a, b[:2])


class RunsOverLength(nn.Module):
    """Unrolls over the sequence, as Mamba and RWKV do."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = x[:, 0]
        for position in range(x.size(1)):
            state = self.linear(state) + x[:, position]
        return state


def test_the_least_of_three_sizes_is_a_relation() -> None:
    class Least(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            least = torch.sym_min(torch.sym_min(2 * x.size(1), 3 * y.size(1)), 8 * x.size(0) * x.size(1))
            torch._check(least == 2 * x.size(1))
            return self.lin(x) + y.sum()

    model = Least().eval()
    graph = lora_fx.trace(model, (torch.randn(2, 5, 4), torch.randn(3, 6)), inference=True)
    x, y = torch.randn(3, 7, 4), torch.randn(2, 8)
    assert torch.equal(graph(x, y), model(x, y))
    with pytest.raises(
        lora_fx.InputError, match=r"min\(2 \* x\.size\(1\), 3 \* y\.size\(1\), .*got x\.size\(1\) = 7, y\.size\(1\) = 4"
    ):
        graph(x, y[:, :4])


def test_a_dimension_that_the_model_fixes_is_named_and_can_be_given_up() -> None:
    model, example = RunsOverLength(), {"x": torch.randn(2, 7, 6)}
    with pytest.raises(lora_fx.TraceError, match=r"fixes dimension 1 of 'x'.*dynamic=\{'x': \(0, 2\)\}"):
        lora_fx.trace(model, example, dynamic={"x": (0, 1)})
    graph_module = lora_fx.trace(model, example, dynamic={"x": (0,)})
    x = torch.randn(4, 7, 6)
    assert torch.equal(graph_module(x), model(x))
    with pytest.raises(lora_fx.InputError, match="size 8 in dimension 1, expected 7 alone"):
        graph_module(torch.randn(4, 8, 6))


# What cannot be traced says so.


class DropsLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return x * 2
        return self.linear(x)


class ReadsData(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x * 3


def test_python_that_branches_on_the_mode_is_refused_for_training_only() -> None:
    model, example = DropsLayers(), (torch.randn(2, 6),)
    with pytest.raises(
        lora_fx.TraceError,
        match=r"in training than in evaluation.*aten\.mul.*aten\.linear.*test_tracing\.py:\d+.*inference=True",
    ):
        lora_fx.trace(model, example)
    x = torch.randn(5, 6)
    assert torch.equal(lora_fx.trace(model, example, inference=True)(x), model.eval()(x))


def test_a_model_that_cannot_be_traced_names_its_own_line_and_prints_no_graph(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(
        lora_fx.TraceError,
        match=r"ReadsData cannot be traced at .*test_tracing\.py:\d+: its Python asks for .* torch\.where\.$",
    ):
        lora_fx.trace(ReadsData(), (torch.randn(2, 6),))
    assert capfd.readouterr() == ("", "")


def test_missing_inputs_of_a_plain_module_are_asked_for() -> None:
    with pytest.raises(lora_fx.TraceError, match=r"Divides is not a transformers model.*pass example_inputs"):
        lora_fx.trace(Divides())


def test_a_trace_of_a_graph_is_a_copy_of_it() -> None:
    graph_module = lora_fx.trace(Divides(), (torch.randn(2, 9, 6),))
    copied = lora_fx.trace(graph_module)
    assert first_difference(graph_module, copied) is None
    assert copied is not graph_module
    assert copied.linear.weight is not graph_module.linear.weight


class NoGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = x.abs().mean(-1, keepdim=True)
        return self.linear(x / scale)


def test_a_region_without_gradients_keeps_none() -> None:
    model, x = NoGradient(), torch.randn(5, 6)
    graph_module = lora_fx.trace(model, (torch.randn(2, 6),))
    gradients = []
    for module in (model, graph_module):
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_pickle_and_torch_save_keep_everything(named: str, tmp_path: Any) -> None:
    graph_module = branched(named)
    set_factors(graph_module, scale=0.05)
    trainable = {n for n, p in graph_module.named_parameters() if p.requires_grad}
    folded = lora_fx.fold(graph_module)
    torch.save(graph_module.train(), tmp_path / "graph.pt")
    for copied in (pickle.loads(pickle.dumps(graph_module)), torch.load(tmp_path / "graph.pt", weights_only=False)):
        graph_module.train()
        assert first_difference(graph_module, copied) is None
        assert info_of(copied).adapters == info_of(graph_module).adapters
        assert [n.meta.get("custom") for n in copied.graph.nodes] == [
            n.meta.get("custom") for n in graph_module.graph.nodes
        ]
        assert [m.training for m in copied.modules()] == [m.training for m in graph_module.modules()]
        assert {n for n, p in copied.named_parameters() if p.requires_grad} == trainable
        for mode in (True, False):
            torch.manual_seed(3)
            expected = run(named, graph_module.train(mode), 3, 11, 5)[0]
            torch.manual_seed(3)
            assert torch.equal(run(named, copied.train(mode), 3, 11, 5)[0], expected)
        assert first_difference(folded, lora_fx.fold(copied)) is None


def test_a_mask_left_out_is_what_the_model_makes_of_that_and_other_inputs_are_named(named: str) -> None:
    batch = inputs(named, 3, 11)
    mask = batch.pop("attention_mask")
    graph = traced(named)
    with torch.no_grad():
        expected, found = model(named)(**batch)[0], graph(**batch)[0]
        for given in (torch.ones_like(mask), torch.ones_like(mask).bool()):
            assert torch.equal(graph(**batch, attention_mask=given)[0], found)
    assert torch.equal(found, expected)
    last = list(batch)[-1]
    with pytest.raises(lora_fx.InputError, match=f"input '{last}' is missing, but the graph was traced with it"):
        graph(**{name: value for name, value in batch.items() if name != last})


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Rounds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return StraightThrough.apply(self.linear(x))  # type: ignore[no-any-return, no-untyped-call]


def test_a_gradient_that_the_trace_would_lose_is_refused() -> None:
    example = (torch.randn(2, 6),)
    with pytest.raises(
        lora_fx.TraceError,
        match=r"Rounds applies its own autograd functions.* StraightThrough is not known to be the derivative",
    ):
        lora_fx.trace(Rounds(), example)
    rounds, x = Rounds(), torch.randn(4, 6)
    assert torch.equal(lora_fx.trace(rounds, example, inference=True)(x), rounds(x))


def test_layer_drop_is_refused_for_training_and_traced_for_inference() -> None:
    config = transformers.OPTConfig(
        vocab_size=97,
        hidden_size=48,
        ffn_dim=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=48,
        layerdrop=0.3,
    )
    eager = transformers.OPTForCausalLM(config).eval().requires_grad_(False)
    with pytest.raises(
        lora_fx.TraceError,
        match=r"OPTForCausalLM cannot be traced in training mode at .*modeling_opt\.py:\d+\..*anew with config\.layerdrop = 0, .*inference=True",
    ):
        lora_fx.trace(eager)
    batch = inputs("opt", 3, 11)
    assert torch.equal(lora_fx.trace(eager, inference=True)(**batch)[0], eager(**batch, use_cache=False)[0])


class Recurrent(nn.Module):
    """Two recurrent layers with dropout between them, which the operator applies itself."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.recurrent = kind(5, 7, num_layers=2, dropout=0.4, batch_first=True)
        self.last = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.recurrent(self.first(x))[0])


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_dropout_inside_of_a_recurrent_layer_follows_the_mode(kind: type[nn.RNNBase]) -> None:
    model = Recurrent(kind).eval().requires_grad_(False)
    graph_module = lora_fx.trace(model, (torch.randn(3, 4, 6),))
    x = torch.randn(5, 4, 6)
    assert torch.equal(graph_module(x), model(x))
    model.train(), graph_module.train()
    mine, theirs = (torch.manual_seed(3) and module(x) for module in (graph_module, model))
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, model.eval()(x))
    tuned = lora_fx.rewrite(graph_module, {"select": [{"target": ["first", "last"]}]}, rank=2)
    set_factors(tuned)
    torch.testing.assert_close(lora_fx.fold(tuned).eval()(x), tuned.eval()(x))


class Casts(nn.Module):
    """Casts a part of itself at every call, as the routers of SwitchTransformers do."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.lin, self.dtype = nn.Linear(6, 3), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.lin = self.lin.to(self.dtype)
        return self.lin(x.to(self.dtype))


def test_a_model_may_cast_a_part_of_itself_to_the_dtype_that_it_has() -> None:
    model, x = Casts(torch.float32), torch.randn(2, 6)
    with unchanged(model):
        graph_module = lora_fx.trace(model, (x,))
    batch = torch.randn(4, 6)
    assert torch.equal(graph_module(batch), model(batch))
    with pytest.raises(lora_fx.TraceError, match=r"Casts cannot be traced.* at .*test_tracing\.py:\d+"):
        lora_fx.trace(Casts(torch.bfloat16), (x,))


class Counts(nn.Module):
    """Writes to its own buffer while it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x * self.calls


def test_a_model_that_writes_to_its_buffers_is_refused() -> None:
    model = Counts()
    with pytest.raises(lora_fx.TraceError, match="the model writes to calls while it computes"):
        lora_fx.trace(model, (torch.randn(2, 6),))
    assert model.calls == 0


def test_a_failed_trace_leaves_the_model_as_it_was() -> None:
    model, example = ReadsData().train(), (torch.randn(2, 6),)
    with unchanged(model), pytest.raises(lora_fx.TraceError):
        lora_fx.trace(model, example)


def test_a_graph_does_not_depend_on_what_is_frozen() -> None:
    frozen = model("llama")
    loose = copy.deepcopy(frozen).requires_grad_(True)
    assert first_difference(lora_fx.trace(loose), traced("llama")) is None
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in loose.parameters())
