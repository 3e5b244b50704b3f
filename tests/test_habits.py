"""Arguments by habit: what PEFT's users write is taken where it means one thing, and else answered by the right spelling."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lora_fx

X = torch.linspace(-1, 1, 21).reshape(3, 7)


class Net(nn.Module):
    """A network with projections of distinct widths, one of which is called twice as deep as the others."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(7, 6), nn.Linear(6, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.v(self.q(x)).tanh())  # type: ignore[no-any-return]


def net() -> nn.Module:
    torch.manual_seed(5)
    return Net().eval()


def owners(graph: nn.Module) -> list[str]:
    return [name.removesuffix(".lora_A.default.weight") for name, _ in graph.named_parameters() if "lora_A" in name]


@pytest.fixture(scope="module")
def base() -> lora_fx.TracedGraphModule:
    return lora_fx.trace(net(), (X,))


@pytest.mark.parametrize("rules", [["q", "v"], ("v", "q"), {"q", "v"}])
def test_names_of_modules_are_rules(base: Any, rules: Any) -> None:
    graph = lora_fx.rewrite(base, rules, rank=3, alpha=6)
    assert owners(graph) == ["q", "v"]
    assert "rank 3, alpha 6, scaling 2" in repr(graph)


def test_no_rules_are_auto(base: Any) -> None:
    with pytest.raises(lora_fx.RuleError) as by_none:
        lora_fx.rewrite(base, None)
    with pytest.raises(lora_fx.RuleError) as by_name:
        lora_fx.rewrite(base, "auto")
    assert str(by_none.value) == str(by_name.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 8, "lora_alpha": 16}, "rewrite takes no r= (rank= here), lora_alpha= (alpha= here); or pass the whole configuration"),
        ({"target_modules": ["q"]}, 'rewrite takes no target_modules= (rules=["q_proj", "v_proj"] here)'),
        ({"adapter_name": "a"}, "rewrite takes no adapter_name= (adapter= here)"),
        ({"use_rslora": True}, 'rewrite takes no use_rslora= (scaling = "rslora" in the rules here); or pass the whole configuration: '
            "rules=LoraConfig(use_rslora=…, …)."),
        ({"init_lora_weights": "pissa"}, 'rewrite takes no init_lora_weights= (init = "gaussian" or "kaiming" in the rules here); or pass'),
        ({"use_dora": True}, "rewrite takes no use_dora=; or pass the whole configuration: rules=LoraConfig(use_dora=…, …)."),
    ],
)  # fmt: skip
def test_arguments_of_peft_are_answered_by_those_of_here(base: Any, arguments: Any, message: str) -> None:
    with pytest.raises(lora_fx.PlanError, match=re.escape(message)):
        lora_fx.rewrite(base, **arguments)
    with pytest.raises(lora_fx.PlanError, match=re.escape(message.replace("rewrite takes", "plan takes"))):
        lora_fx.plan(base, **arguments)


def test_a_configuration_of_peft_that_does_not_say_so_is_told(base: Any) -> None:
    with pytest.raises(lora_fx.RuleError) as refused:
        lora_fx.rewrite(base, {"r": 8, "target_modules": ["q"]})
    assert str(refused.value) == (
        "rules: r, target_modules are keys of a PEFT configuration: add 'peft_type': 'LORA' to have it read as PEFT reads it; as rules "
        "say {'defaults': {'rank': 8, 'alpha': 16}, 'select': [{'target': ['q', 'v']}]}"
    )
    graph = lora_fx.rewrite(base, {"r": 3, "lora_alpha": 6, "target_modules": ["q"], "peft_type": "LORA"})
    assert owners(graph) == ["q"]


@pytest.mark.parametrize("rules", [7, b"t5", ["q", 3]])
def test_what_is_no_rules_is_told_by_its_type(base: Any, rules: Any) -> None:
    with pytest.raises(
        lora_fx.RuleError, match="expected a name, a path, names of modules, a mapping, loaded rules or a"
    ):
        lora_fx.rewrite(base, rules)


def test_each_name_of_a_selection_has_to_name_something(base: Any) -> None:
    with pytest.raises(lora_fx.RuleError) as refused:
        lora_fx.rewrite(base, ["q", "heat", "v"])
    assert str(refused.value) == (
        "rules: select[0] names 'heat', which is no module that multiplies by a weight here (did you mean 'head'?); leave it out, or say "
        "alternatives = true if models have one name or another"
    )
    for rest in (
        ({"target": ["q"]}, {"target": ["wz"], "optional": True}),
        ({"target": ["q", "wz"], "alternatives": True},),
    ):
        assert owners(lora_fx.rewrite(base, {"select": list(rest)})) == ["q"]
    trained = {"select": [{"target": ["q"]}, {"target": ["head", "tail"], "trainable": "all"}]}
    with pytest.raises(lora_fx.RuleError, match=r"select\[1\] names 'tail'"):
        lora_fx.rewrite(base, trained)


def test_a_module_without_a_site_is_no_name_beside_others(base: Any) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = net(), nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.inner(x))  # type: ignore[no-any-return]

    graph = lora_fx.trace(Outer().eval(), (X,))
    for name in ("inner", "norm"):
        with pytest.raises(lora_fx.RuleError, match=rf"select\[0\] names '{name}', which is no module that multiplies"):
            lora_fx.rewrite(graph, ["q", name])


def test_a_graph_is_not_traced_again_with_labels_or_a_cache(base: Any) -> None:
    for more in ({"cache": True}, {"labels": True}):
        with pytest.raises(
            lora_fx.TraceError, match="a graph is taken as it was traced, and this one was traced without"
        ):
            lora_fx.rewrite(base, ["q"], **more)


def test_wrappers_of_torch_are_taken_off() -> None:
    model = net()
    expected = lora_fx.rewrite(model, ["q"], example_inputs=(X,), seed=1)
    for wrapped in (torch.compile(model), nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        found = lora_fx.rewrite(wrapped, ["q"], example_inputs=(X,), seed=1)
        assert list(found.state_dict()) == list(expected.state_dict())
        assert torch.equal(found(X), expected(X))
        assert list(lora_fx.trace(wrapped, (X,)).state_dict()) == list(model.state_dict())
        assert len(lora_fx.plan(lora_fx.trace(wrapped, (X,)), ["q"]).chosen) == 1
    assert lora_fx.rewrite(torch.compile(expected), ["v"], adapter="b").adapters[1].name == "b"


def test_what_is_compiled_or_quantised_inside_is_refused_by_its_path() -> None:
    inside = net()
    inside.v = torch.compile(inside.v)  # type: ignore[assignment]
    with pytest.raises(lora_fx.PlanError, match=r"'v' is compiled, and its parameters would be called 'v._orig_mod.…'"):
        lora_fx.rewrite(inside, ["q"], example_inputs=(X,))
    quantised = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(lora_fx.PlanError, match=r"'q' is a Linear of torch.ao.quantization, whose weights are packed"):
        lora_fx.rewrite(quantised, ["q"], example_inputs=(X,))


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        ("gpt2", r"a str: load it first, as by transformers\.AutoModelForCausalLM\.from_pretrained\('gpt2'\)\.$"),
        (nn.Linear, r"a type: pass an instance of Linear\.$"),
        (
            transformers.GPT2Config(),
            r"a GPT2Config: make its model, as by transformers\.AutoModelForCausalLM\.from_config\.$",
        ),
        (torch.ones(2), r"a Tensor: tensor\(\[1\., 1\.\]\)\.$"),
    ],
)
def test_what_is_no_model_is_told_how_one_is_had(value: Any, advice: str) -> None:
    with pytest.raises(lora_fx.TraceError, match="expected a torch.nn.Module in Python, got " + advice):
        lora_fx.rewrite(value)


def test_fsdp_is_refused_by_name() -> None:
    class FullyShardedDataParallel(nn.Module):
        """Stands in for torch's, which needs a process group."""

    FullyShardedDataParallel.__module__ = "torch.distributed.fsdp.fully_sharded_data_parallel"
    with pytest.raises(lora_fx.PlanError, match="FullyShardedDataParallel holds parts of the weights in each process"):
        lora_fx.rewrite(FullyShardedDataParallel(), ["q"], example_inputs=(X,))
