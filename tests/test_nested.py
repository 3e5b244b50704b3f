"""Nested graphs: the flat graph's computation, layer by layer, and what lora_fx does with them."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from architectures import ARCHITECTURES, build, rows, run, traced
from conftest import set_factors
from graph_diff import first_difference
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import lora_fx
from lora_fx.export.prepare import prepare
from lora_fx.graph.cached_graphs import CachedGraphs
from lora_fx.graph.info import info_of
from lora_fx.graph.layers import layers

aten = torch.ops.aten
FURTHER = ("qwen3_moe", "phi3", "whisper", "vit", "albert")


@functools.cache
def flat_graph(name: str) -> lora_fx.TracedGraphModule:
    """Return a branched graph with dropout in train mode. Not to be changed."""
    base = lora_fx.trace(families.build(name)) if name in FURTHER else traced(name)
    graph = lora_fx.rewrite(base, "all-linear", rank=5, alpha=7, dropout=0.2)
    set_factors(graph)
    return graph.train()


def call(name: str, graph: nn.Module, *size: int) -> Any:
    return graph(**families.inputs(name, *size)) if name in FURTHER else run(name, graph, *size)


def results(name: str, graph: nn.Module, *size: int) -> list[torch.Tensor]:
    """Return outputs and gradients of a step under one random state."""
    graph.zero_grad()
    torch.manual_seed(5)
    outputs = [leaf for leaf in pytree.tree_leaves(call(name, graph, *size)) if isinstance(leaf, torch.Tensor)]
    sum(output.square().sum() for output in outputs).backward()  # type: ignore[union-attr]
    gradients = [parameter.grad for parameter in graph.parameters() if parameter.grad is not None]
    graph.zero_grad()
    return [*outputs, *gradients]


def equal(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("name", rows([*ARCHITECTURES, *FURTHER], ("t5", "gpt2", "llama")))
def test_a_nested_graph_computes_the_bits_of_the_flat_one_and_flattens_to_it(name: str) -> None:
    flat = flat_graph(name)
    nested = lora_fx.nest(flat)
    assert layers(nested)
    assert all(path.rpartition(".")[2].isdecimal() for path in layers(nested))
    assert [*nested.state_dict()] == [*flat.state_dict()]
    for (mine, one), (theirs, other) in zip(nested.named_parameters(), flat.named_parameters(), strict=True):
        assert mine == theirs
        assert one is other
    expected = results(name, flat, 3, 11, 5)
    assert len(expected) > 3
    assert equal(results(name, nested, 3, 11, 5), expected)
    nested.activation_checkpointing_enable()
    assert equal(results(name, nested, 3, 11, 5), expected)
    with torch.no_grad():
        mine, theirs = (pytree.tree_leaves(call(name, each.eval(), 2, 6, 4)) for each in (nested, flat))
    flat.train()
    assert equal(*([leaf for leaf in each if isinstance(leaf, torch.Tensor)] for each in (mine, theirs)))
    again = lora_fx.flatten(nested)
    assert first_difference(again, flat) is None
    assert (again.code, str(again.graph)) == (flat.code, str(flat.graph))
    assert not layers(again)
    for node, other in zip(again.graph.nodes, flat.graph.nodes, strict=True):
        assert node.meta.keys() == other.meta.keys()
        assert all(value is other.meta[key] for key, value in node.meta.items())
    assert all(one is other for one, other in zip(again.parameters(), flat.parameters(), strict=True))


def test_equal_layers_share_a_class_that_is_called_as_the_models() -> None:
    nested = lora_fx.nest(flat_graph("llama"))
    found = layers(nested)
    assert [*found] == ["model.layers.0", "model.layers.1"]
    (kind,) = {type(layer) for layer in found.values()}
    assert kind.__name__ == "LlamaDecoderLayer"
    assert nested._no_split_modules == ["LlamaDecoderLayer"]
    assert type(lora_fx.nest(lora_fx.nest(flat_graph("llama"))).get_submodule("model.layers.1")) is kind


def test_a_layer_that_is_called_several_times_has_the_code_of_each_call() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3), nn.Tanh())])
            self.out = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = self.layers[0](x).sin()
            return self.out(x)  # type: ignore[no-any-return]

    x = torch.randn(4, 6)
    flat = lora_fx.rewrite(Repeated().train(), ["layers.0.0", "out"], rank=2, example_inputs=(x,))
    set_factors(flat)
    nested = lora_fx.nest(flat)
    nested.gradient_checkpointing_enable()
    assert len(layers(nested)["layers.0"]._computations) == 3  # each with masks of its own
    found = []
    for graph in (nested, flat):
        torch.manual_seed(2)
        graph(x).sum().backward()
        found.append([each.grad for each in graph.parameters() if each.grad is not None])
        graph.zero_grad()
    assert equal(*found)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda graph: pickle.loads(pickle.dumps(graph)),
    "torch.save": lambda graph: torch.load(saved(graph), weights_only=False),
    "trace": lora_fx.trace,
}


def saved(graph: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(graph, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_nested_graph_are_nested_and_compute_again_what_it_does(how: str) -> None:
    nested = lora_fx.nest(flat_graph("llama"))
    nested.activation_checkpointing_enable(every_n_layers=2)
    copied = COPIES[how](nested)
    assert [*layers(copied)] == [*layers(nested)]
    assert [layer.gradient_checkpointing for layer in layers(copied).values()] == [True, False]
    assert {type(layer) for layer in layers(copied).values()} == {type(layer) for layer in layers(nested).values()}
    assert copied.get_parameter("lm_head.weight") is not nested.get_parameter("lm_head.weight")
    expected = results("llama", nested, 3, 11)
    assert equal(results("llama", copied, 3, 11), expected)


def test_passes_give_nested_graphs_for_nested_ones_and_folds_and_exports_give_flat_ones(tmp_path: Path) -> None:
    flat = flat_graph("llama")
    nested = lora_fx.nest(flat)
    nested.gradient_checkpointing_enable()
    lora_fx.save_adapter(nested, tmp_path / "adapter")
    given = {"rank": 3, "adapter": "other"}
    passes: dict[str, Callable[[Any], Any]] = {
        "fuse": lora_fx.fuse,
        "activate": lambda graph: lora_fx.activate(graph, {"default": 0.5}),
        "rewrite": lambda graph: lora_fx.activate(lora_fx.rewrite(graph, **given, seed=1), {"other": 1.0}),
        "load_adapter": lambda graph: lora_fx.load_adapter(graph, tmp_path / "adapter", "default"),
        "transfer": lambda graph: lora_fx.transfer(flat, onto=lora_fx.unload(graph) if graph is flat else nest(graph)),
        "combine": lambda graph: lora_fx.combine(graph, {"default": 0.5}, adapter="new"),
    }

    def nest(graph: Any) -> Any:
        made = lora_fx.nest(lora_fx.unload(graph))
        made.gradient_checkpointing_enable()
        return made

    for how, each in passes.items():
        mine, theirs = each(nested), each(flat)
        assert mine.is_activation_checkpointing, how
        assert [*layers(mine)] == [*layers(nested)], how
        assert not layers(theirs), how
        assert first_difference(mine, theirs) is None, how
        assert equal(results("llama", mine.train(), 3, 11), results("llama", theirs.train(), 3, 11)), how
    assert lora_fx.plan(nested, ["q_proj"]).chosen
    assert lora_fx.parameter_summary(nested) == lora_fx.parameter_summary(flat)
    for graph, expected in ((lora_fx.fold(nested), lora_fx.fold(flat)), (lora_fx.unload(nested), lora_fx.unload(flat))):
        assert not layers(graph)
        assert not graph.is_activation_checkpointing
        assert first_difference(graph, expected) is None
    assert not layers(prepare(nested).graph_module)  # of every export
    assert prepare(nested).plain.code == prepare(flat).plain.code


def test_checkpointing_nests_a_flat_graph_in_place_and_keeps_parameters_and_hooks() -> None:
    graph = copy.deepcopy(flat_graph("llama"))
    expected = results("llama", graph, 3, 11)
    parameters, seen = [*graph.parameters()], list[str]()
    for path in ("", "model.layers.0", "model.layers.1"):
        graph.get_submodule(path).register_forward_hook(lambda *_, path=path: seen.append(path))
    graph.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert graph.is_gradient_checkpointing
    assert all(one is other for one, other in zip(graph.parameters(), parameters, strict=True))
    assert equal(results("llama", graph, 3, 11), expected)
    assert seen == ["model.layers.0", "model.layers.1", ""]  # once, though layers are computed twice
    graph.set_adapter("default")
    assert graph.is_activation_checkpointing
    assert all(one is other for one, other in zip(graph.parameters(), parameters, strict=True))
    graph.gradient_checkpointing_disable()
    assert not graph.is_activation_checkpointing
    assert [*layers(graph)] == ["model.layers.0", "model.layers.1"]
    assert equal(results("llama", graph, 3, 11), expected)


def kept_by(compute: Callable[[], Any]) -> tuple[int, Any]:
    """Return how many elements a forward pass keeps for the backward pass, as far as they can be seen from outside of layers, and its result."""
    count = 0

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = compute()
    return count, result


def kept(graph: nn.Module) -> int:
    return kept_by(lambda: run("llama", graph, 3, 11))[0]


def test_less_is_kept_with_checkpointing_and_every_nth_layer_says_how_much() -> None:
    graph = copy.deepcopy(flat_graph("llama"))
    whole = kept(graph)
    graph.activation_checkpointing_enable(every_n_layers=2)
    half = kept(graph)
    graph.activation_checkpointing_enable()
    assert kept(graph) < 0.7 * half < 0.6 * whole
    assert kept(graph.eval()) == kept(copy.deepcopy(flat_graph("llama")).eval())  # as with transformers' models


def test_what_is_below_the_head_is_computed_again_where_the_graph_is() -> None:
    ids = torch.arange(33).reshape(3, 11)
    graph = lora_fx.rewrite(families.build("phi3"), ["qkv_proj"], rank=3, dropout=0.2).train()
    set_factors(graph)

    def step() -> tuple[int, list[torch.Tensor]]:
        graph.zero_grad()
        torch.manual_seed(5)
        count, hidden = kept_by(lambda: graph.base_model(input_ids=ids).last_hidden_state)
        hidden.square().sum().backward()
        return count, [hidden, *(each.grad.clone() for each in graph.parameters() if each.grad is not None)]

    whole, expected = step()
    graph.activation_checkpointing_enable()
    less, found = step()
    assert less < 0.6 * whole
    assert equal(found, expected)
    graph.eval()
    whole_again, _ = step()
    assert whole_again > less
    graph.train().activation_checkpointing_disable()
    assert step()[0] == whole


def test_results_of_some_operators_are_kept_and_the_bits_are_the_same() -> None:
    graph = copy.deepcopy(flat_graph("gpt2"))
    expected = results("gpt2", graph, 3, 11)
    selective = functools.partial(create_selective_checkpoint_contexts, [aten.addmm.default, aten.mm.default])
    graph.activation_checkpointing_enable({"context_fn": selective}, offload=True)
    assert equal(results("gpt2", graph, 3, 11), expected)
    assert equal(results("gpt2", copy.deepcopy(graph), 3, 11), expected)
    with pytest.raises(
        lora_fx.LoraFxError, match=r"context_fn of the activation checkpointing does not pickle.*_disable"
    ):
        pickle.dumps(graph)


@pytest.mark.parametrize(
    ("every", "make"), [(1, lora_fx.rewrite), pytest.param(2, lora_fx.trace, marks=pytest.mark.matrix)]
)
def test_the_graph_of_a_model_that_computes_its_layers_again_does_so_too(every: int, make: Any) -> None:
    model = build("llama").train()
    model.activation_checkpointing_enable(every_n_layers=every, activation_checkpointing_kwargs={"debug": False})
    graph = make(model)
    assert graph.is_activation_checkpointing
    assert [each.gradient_checkpointing for each in layers(graph).values()] == [True, every == 1]
    assert info_of(graph).checkpointing.options == {"debug": False}
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, every == 1]
    assert model.training


def test_a_model_that_computes_its_layers_again_as_a_graph_cannot_is_refused() -> None:
    model = build("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(lora_fx.LoraFxError, match="expected use_reentrant=False, got True"):
        lora_fx.rewrite(model)
    model._set_gradient_checkpointing(gradient_checkpointing_func=lambda function, *args: function(*args))
    with pytest.raises(
        lora_fx.TraceError, match=r"computes its layers again by .*lambda>, expected torch\.utils\.checkpoint"
    ):
        lora_fx.rewrite(model)
    assert model.is_gradient_checkpointing
    assert lora_fx.plan(model, ["q_proj"]).chosen  # which trains nothing


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Viewing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Sequential(nn.Identity(), nn.Linear(4, 4))])
        self.layers[0][0].forward = lambda x: x + 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = self.layers[0](x)
        x.diagonal().mul_(2.0)
        return y + x  # type: ignore[no-any-return]


class HalfNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x))  # type: ignore[no-any-return]


class Writing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](self.first(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Normed, r"the running statistics of layers\.0\.1, layers\.1\.1 would count each batch twice"),
        (Viewing, r"mul_\w* writes to what the layer of \w+ reads"),
        (Writing, r"relu_ writes to what the layer of relu_ reads"),
    ],
)
def test_layers_that_would_compute_something_else_the_second_time_are_refused(model: type[nn.Module], why: str) -> None:
    graph = lora_fx.rewrite(model().train(), "all-linear", rank=2, example_inputs=(torch.randn(3, 4),))
    nested = lora_fx.nest(graph)
    with pytest.raises(lora_fx.LoraFxError, match=why):
        nested.activation_checkpointing_enable()
    assert not nested.is_activation_checkpointing


def test_layers_that_are_not_computed_again_may_have_running_statistics() -> None:
    graph = lora_fx.rewrite(HalfNormed().train(), "all-linear", rank=2, example_inputs=(torch.randn(3, 4),))
    with pytest.raises(lora_fx.LoraFxError, match=r"running statistics of layers\.1\.1 would count"):
        graph.activation_checkpointing_enable()
    graph.activation_checkpointing_enable(every_n_layers=2)
    assert [layer.gradient_checkpointing for layer in layers(graph).values()] == [True, False]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"activation_checkpointing_kwargs": {"preserve_rng_state": False}}, "dropout would draw other masks"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "expected use_reentrant=False, got True"),
        ({"activation_checkpointing_kwargs": {"contextfn": 1}}, r"got 'contextfn' \(did you mean 'context_fn'\?\)"),
        ({"every_n_layers": 0}, "expected every_n_layers of 1 or more, got 0"),
    ],
)
def test_settings_with_which_gradients_would_be_wrong_are_refused(options: dict[str, Any], why: str) -> None:
    graph = copy.deepcopy(flat_graph("llama"))
    with pytest.raises(lora_fx.LoraFxError, match=why):
        graph.activation_checkpointing_enable(**options)
    assert not layers(graph)


def test_what_has_no_layers_or_cannot_be_computed_by_layers_is_refused() -> None:
    linear = lora_fx.trace(nn.Linear(3, 4), (torch.randn(2, 3),))
    with pytest.raises(lora_fx.LoraFxError, match="cannot be nested: the model has no layers"):
        lora_fx.nest(linear)
    with pytest.raises(lora_fx.LoraFxError, match="cannot be nested: the model has no layers"):
        linear.activation_checkpointing_enable()
    assert not linear.is_activation_checkpointing
    with pytest.raises(lora_fx.PlanError, match="expected a graph of lora_fx, got a Linear"):
        lora_fx.nest(nn.Linear(3, 4))  # type: ignore[arg-type]
    graph = copy.deepcopy(flat_graph("llama"))
    nodes = {node: next(iter(node.meta.get("nn_module_stack", {}).values()), ("",)) for node in graph.graph.nodes}
    second = next(
        node for node in nodes if "layers.1" in str(node.meta.get("nn_module_stack")) and len(node.users) == 1
    )
    first = next(node for node in nodes if "layers.0.mlp" in str(node.meta.get("nn_module_stack")))
    moved = graph.graph.call_function(aten.neg.default, (first,))
    moved.meta = dict(second.meta)
    first.append(moved)
    with pytest.raises(
        lora_fx.LoraFxError, match=r"the layer 'model\.layers\.0' stand before and behind 'model\.layers\.1' which"
    ):
        lora_fx.nest(graph)


def test_accelerates_wrapper_of_layers_is_refused() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    nested = lora_fx.nest(flat_graph("llama"))
    wrapper = checkpoint_wrapper(nested.get_submodule("model.layers.0"), preserve_rng_state=False)
    ours = r"'model\.layers\.0' is in torch's checkpoint_wrapper.*graph\.activation_checkpointing_enable\(\)"
    with pytest.raises(lora_fx.LoraFxError, match=ours):
        nested.set_submodule("model.layers.0", wrapper)
    setattr(nested.get_submodule("model.layers"), "0", wrapper)
    with pytest.raises(lora_fx.LoraFxError, match=ours):
        lora_fx.save_adapter(nested, "nowhere")


def test_graphs_with_a_cache_of_an_encoder_decoder_stay_flat() -> None:
    graphs = CachedGraphs(*[flat_graph("llama")] * 3)
    with pytest.raises(
        lora_fx.PlanError, match="CachedGraphs: the graphs of an encoder-decoder with a key-value cache stay flat"
    ):
        lora_fx.nest(graphs)  # type: ignore[arg-type]


def test_a_nested_graph_with_a_cache_generates_what_the_flat_one_does() -> None:
    model, ids = build("llama").eval(), torch.tensor([[1, 5, 7]])
    flat = lora_fx.trace(model, cache=True)
    nested = lora_fx.nest(flat)
    assert [*layers(nested)] == ["model.layers.0", "model.layers.1"]
    found, expected = (each.generate(ids, max_new_tokens=4, do_sample=False) for each in (nested, flat))
    assert torch.equal(found, expected)
