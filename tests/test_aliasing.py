"""Weights with several uses: merged once where all are adapted alike, else refused, or untied where that is asked for.

PEFT merges into whatever module the adapter sits in, and so into every other use of its weight. Its output stands beside ours.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import build, inputs, run, traced
from conftest import set_factors, unchanged
from graph_diff import first_difference
from torch import nn

import lora_fx

X = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))


class Tied(nn.Module):
    """One weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One module, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.between = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(torch.tanh(self.between(self.shared(x))))  # type: ignore[no-any-return]


class Embedded(nn.Module):
    """An embedding whose table is the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(self.embed(index))))  # type: ignore[no-any-return]


class Both(nn.Module):
    """One weight, multiplied by in both layouts, and read by something that is no site."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) @ self.lin.weight + self.lin.weight.sum()


def adapted(model: nn.Module, *select: dict[str, Any], example: torch.Tensor = X) -> lora_fx.TracedGraphModule:
    rules = {"defaults": {"rank": 2, "alpha": 3}, "select": list(select)}
    graph_module = lora_fx.rewrite(model.eval(), rules, example_inputs=(example[:3],))
    set_factors(graph_module)
    return graph_module


def in_peft(model: nn.Module, graph_module: lora_fx.TracedGraphModule, targets: list[str]) -> Any:
    """Return PEFT's wrapping of a model with the factors of a graph."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets))
    mine = dict(graph_module.named_parameters())
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                key = name.removeprefix("base_model.model.").replace("lora_embedding_", "lora_")
                parameter.copy_(mine[key if key in mine else f"{key}.weight"])
    return wrapped.eval()


CASES = [
    pytest.param(Tied, [{"target": ["first"]}], ["first"], X, {"first.weight", "second.weight"}, id="tied linears"),
    pytest.param(Embedded, [{"target": ["head"]}], ["head"], None, {"embed.weight", "head.weight"}, id="tied head"),
    pytest.param(Embedded, [{"target": ["embed"]}], ["embed"], None, {"embed.weight", "head.weight"}, id="embedding"),
    pytest.param(
        Embedded,
        [{"target": ["embed", "head"]}],
        ["embed", "head"],
        None,
        {"embed.weight", "head.weight"},
        id="both ends",
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model_class", "select", "targets", "example", "names"), CASES)
def test_a_tied_weight_that_needs_two_values_is_refused_or_untied_where_peft_changes_all_uses(
    model_class: type[nn.Module],
    select: list[dict[str, Any]],
    targets: list[str],
    example: torch.Tensor | None,
    names: set[str],
) -> None:
    model = model_class()
    x = torch.randint(0, 11, (3, 7)) if example is None else example
    graph_module = adapted(model, *select, example=x)
    wrapped = in_peft(model, graph_module, targets)
    branched = graph_module(x)
    assert torch.equal(wrapped(x), branched)
    assert not torch.allclose(wrapped.merge_and_unload()(x), branched, atol=1e-2)  # PEFT's is another function now
    weight = sorted(names)[0]
    with (
        unchanged(graph_module),
        pytest.raises(lora_fx.FoldError, match=rf"'{weight}' is used 2 times.* need different values.*unshare=True"),
    ):
        lora_fx.fold(graph_module)
    with unchanged(graph_module):
        folded = lora_fx.fold(graph_module, unshare=True)
    assert torch.allclose(folded(x), branched, rtol=0, atol=1e-5)
    assert set(folded.state_dict()) == set(model.state_dict())  # two values under the two names that it had
    assert len({folded.state_dict()[name].data_ptr() for name in names}) == 2
    lora_fx.verify(graph_module, folded, (x,))
    untied = copy.deepcopy(model)
    for name in names:  # an eager model that is untied in the same way computes the same
        untied.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(folded.state_dict()[name])
    assert torch.allclose(untied(x), branched, rtol=0, atol=1e-5)


def test_the_refusal_names_every_use_with_its_site_and_whether_it_has_a_branch() -> None:
    with pytest.raises(lora_fx.FoldError) as caught:
        lora_fx.fold(adapted(Both(), {"target": ["lin"], "calls": [1]}))
    told = str(caught.value)
    assert "'lin.weight' is used 3 times" in told
    assert "(lin@1, with a branch)" in told
    assert "(lin@2, without a branch)" in told
    assert "sum" in told


def test_uses_of_one_weight_in_both_layouts_share_no_value_even_with_equal_names() -> None:
    x, model = X, Both()
    graph_module = adapted(model, {"target": ["lin"], "calls": "each"})
    with pytest.raises(lora_fx.FoldError, match="used 3 times"):
        lora_fx.fold(graph_module)
    folded = lora_fx.fold(graph_module, unshare=True)
    assert torch.allclose(folded(x), graph_module(x), rtol=0, atol=1e-5)
    assert len(lora_fx.fold_report(graph_module, folded)) == 2
    assert {entry.merge.layout for entry in lora_fx.fold_report(graph_module, folded)} == {"out_in", "in_out"}


@pytest.mark.filterwarnings("ignore")
def test_a_module_called_twice_with_one_adapter_is_merged_once_as_in_peft() -> None:
    model = Twice()
    graph_module = adapted(model, {"target": ["shared"]})
    wrapped = in_peft(model, graph_module, ["shared"])
    folded = lora_fx.fold(graph_module)
    assert torch.allclose(folded(X), graph_module(X), rtol=0, atol=1e-6)
    assert torch.equal(wrapped.merge_and_unload().shared.weight, folded.shared.weight)
    assert first_difference(lora_fx.trace(model, (X[:3],)), folded) is None
    assert len(lora_fx.fold_report(graph_module, folded)) == 1


@pytest.mark.parametrize(
    ("calls", "merged"),
    [("each", ["shared.weight", "shared@2.weight"]), ([1], ["shared.weight"]), ([2], ["shared@2.weight"])],
    ids=str,
)
def test_calls_with_adapters_of_their_own_are_untied_under_the_names_of_their_sites(
    calls: Any, merged: list[str]
) -> None:
    """PEFT has one adapter a module: it cannot say this at all."""
    model = Twice()
    graph_module = adapted(model, {"target": ["shared"], "calls": calls})
    with pytest.raises(lora_fx.FoldError, match=r"'shared\.weight' is used 2 times"):
        lora_fx.fold(graph_module)
    folded = lora_fx.fold(graph_module, unshare=True)
    assert torch.allclose(folded(X), graph_module(X), rtol=0, atol=1e-6)
    assert set(folded.state_dict()) - set(model.state_dict()) == {"shared@2.weight"}
    assert [name for entry in lora_fx.fold_report(graph_module, folded) for name in entry.merge.names] == merged
    assert torch.equal(folded.shared.weight, model.shared.weight) is ("shared.weight" not in merged)
    again = lora_fx.fold(copy.deepcopy(folded))
    assert first_difference(folded, again) is None


def test_three_uses_in_two_kinds_are_two_values() -> None:
    class Thrice(Twice):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.shared(torch.tanh(self.shared(torch.relu(self.shared(x)))))  # type: ignore[no-any-return]

    model = Thrice()
    graph_module = adapted(model, {"target": ["shared"], "calls": [1, 3]})
    set_factors(graph_module)
    shared = {name: p for name, p in graph_module.named_parameters() if "@1.lora" in name}
    assert len(shared) == 2
    folded = lora_fx.fold(graph_module, unshare=True)
    assert torch.allclose(folded(X), graph_module(X), rtol=0, atol=1e-6)
    assert set(folded.state_dict()) - set(model.state_dict()) == {"shared@2.weight", "shared@3.weight"}


def test_a_name_that_is_taken_is_not_used_for_an_untied_value() -> None:
    model = Twice()
    model.add_module("shared@2", nn.Linear(5, 3))
    graph_module = adapted(model, {"target": ["shared"], "calls": [2]})
    folded = lora_fx.fold(graph_module, unshare=True)
    assert torch.allclose(folded(X), graph_module(X), rtol=0, atol=1e-6)
    assert set(folded.state_dict()) - set(model.state_dict()) == {"shared@3.weight"}


def test_a_bare_parameter_is_untied_under_its_own_name() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x @ self.table) @ self.table

    graph_module = adapted(Bare(), {"target": ["table"], "calls": [2]})
    folded = lora_fx.fold(graph_module, unshare=True)
    assert torch.allclose(folded(X), graph_module(X), rtol=0, atol=1e-6)
    assert list(folded.state_dict()) == ["table", "table@2"]


def test_un_tying_needs_to_know_which_module_uses_which_name() -> None:
    graph_module = adapted(Tied(), {"target": ["first"]})
    for node in graph_module.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    with pytest.raises(lora_fx.FoldError, match="one tensor, and none of its uses"):
        lora_fx.fold(graph_module, unshare=True)


def test_un_tying_a_weight_that_no_module_is_called_with_says_so() -> None:
    class Functional(Tied):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.linear(x, self.first.weight)
            return x @ self.second.weight[:3].t()

    graph_module = adapted(Functional(), {"target": ["first"]})
    with pytest.raises(lora_fx.FoldError) as caught:
        lora_fx.fold(graph_module, unshare=True)
    assert str(caught.value).startswith(
        "first.weight and second.weight are one tensor, and none of its uses (linear, slice_1) is known to be in a call of one of these "
        "modules, as with products in functional form"
    )


def test_transposes_and_casts_between_a_weight_and_its_uses_are_kept_apart_too() -> None:
    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = self.a.weight.double().t()
            return torch.tanh(x.double() @ wide) @ wide + x @ self.a.weight.t()

    graph_module = adapted(Through(), {"target": ["a"], "calls": [2]})
    folded = lora_fx.fold(graph_module, unshare=True)
    assert torch.allclose(folded(X), graph_module(X), rtol=0, atol=1e-6)
    assert set(folded.state_dict()) == {"a.weight", "a.bias", "a@2.weight"}


def test_calls_in_both_layouts_of_a_square_weight_share_no_branch() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(torch.tanh(self.a(x)), self.a.weight.t())

    model = Square().eval()
    told = r"the calls of 'a' multiply by its weight in both layouts, .* calls = \"each\""
    with unchanged(model), pytest.raises(lora_fx.PlanError, match=told):
        adapted(model, {"target": ["a"]})
    graph_module = adapted(model, {"target": ["a"], "calls": "each"})
    folded = lora_fx.fold(graph_module, unshare=True)
    assert torch.allclose(folded(X), graph_module(X), rtol=0, atol=1e-6)


class Again(nn.Module):
    """One module under two names; PEFT wraps the first, and calls by the second go past its adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 5)
        self.b = self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("targets", [["b"], ["a", "b"]], ids=" and ".join)
def test_an_adapter_under_the_second_name_of_a_module_is_not_written_since_peft_drops_it(
    targets: list[str], tmp_path: Path
) -> None:
    graph_module = adapted(Again(), {"target": targets})
    with pytest.raises(
        lora_fx.AdapterError, match="b: a second name of the module 'a', and PEFT wraps that name alone"
    ):
        lora_fx.save_adapter(graph_module, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_under_the_first_name_of_a_module_is_that_of_peft(tmp_path: Path) -> None:
    model = Again()
    graph_module = adapted(model, {"target": ["a"]})
    lora_fx.save_adapter(graph_module, tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").eval()
    assert torch.equal(wrapped(X), graph_module(X))
    assert not torch.equal(wrapped(X), model(X))
    loaded = lora_fx.from_adapter(model, tmp_path / "adapter", example_inputs=(X[:3],))
    assert torch.equal(loaded(X), graph_module(X))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_a_convolution_that_pads_without_zeros_has_the_branch_of_pefts_merge_and_no_file(
    mode: Any, tmp_path: Path
) -> None:
    """PEFT's A pads with zeros, so that its wrapped model and its merge are two functions."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, padding_mode=mode), nn.Tanh(), nn.Conv2d(5, 4, 1))
    x = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(4))
    graph_module = adapted(model, {"target": ["0"]}, example=x)
    wrapped = in_peft(model, graph_module, ["0"])
    branched, apart = graph_module(x), wrapped(x)
    wrapped.save_pretrained(tmp_path / "theirs")
    merged = wrapped.merge_and_unload()
    assert torch.allclose(branched, merged(x), rtol=0, atol=1e-5)
    assert not torch.allclose(apart, merged(x), rtol=0, atol=1e-2)
    assert torch.allclose(lora_fx.fold(graph_module).state_dict()["0.weight"], merged[0].weight, rtol=0, atol=1e-5)
    with pytest.raises(lora_fx.AdapterError, match="computes more than the product"):
        lora_fx.save_adapter(graph_module, tmp_path / "mine")
    with pytest.raises(lora_fx.AdapterError, match="computes more than the product"):
        lora_fx.from_adapter(model, tmp_path / "theirs", example_inputs=(x,))


@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16], ids=str)
def test_calls_that_compute_in_several_dtypes_share_no_branch(computed: torch.dtype) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            narrow = nn.functional.linear(x.to(computed), self.a.weight.to(computed)).to(x.dtype)
            return self.a(torch.tanh(narrow))  # type: ignore[no-any-return]

    model, x = Cast().double().eval(), X.double()
    told = r"the calls of 'a' multiply by its weight in torch\.float32 and in torch\.float64, .* calls = \"each\""
    with unchanged(model), pytest.raises(lora_fx.PlanError, match=told):
        adapted(model, {"target": ["a"]}, example=x)


def test_a_tied_head_of_a_real_model_is_untied_under_the_name_that_the_state_dict_has() -> None:
    graph_module = lora_fx.rewrite(traced("gpt2"), {"select": [{"target": ["lm_head"]}]}, rank=6, alpha=9)
    set_factors(graph_module)
    folded = lora_fx.fold(graph_module, unshare=True)
    expected = run("gpt2", graph_module, 3, 11)[0]
    assert torch.allclose(run("gpt2", folded, 3, 11)[0], expected, rtol=0, atol=1e-5)
    assert set(folded.state_dict()) == set(build("gpt2").state_dict())
    assert not torch.equal(folded.lm_head.weight, folded.transformer.wte.weight)
    lora_fx.verify(graph_module, folded, inputs("gpt2", 3, 11))


def test_untied_weights_are_not_put_into_a_model_that_ties_them() -> None:
    model = build("gpt2").eval()
    graph_module = lora_fx.rewrite(model, {"select": [{"target": ["lm_head"]}]}, rank=6, alpha=9, inference=True)
    set_factors(graph_module)
    folded = lora_fx.fold(graph_module, unshare=True)
    told = r"'transformer\.wte\.weight' and 'lm_head\.weight' are one parameter of GPT2LMHeadModel, and were untied by fold"
    with unchanged(model), pytest.raises(lora_fx.LoraFxError, match=told):
        lora_fx.huggingface.write_back(model, folded)
