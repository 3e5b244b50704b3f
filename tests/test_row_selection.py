"""An adapter for each row of a batch: PEFT's mixed batches to the bit, and refusals that name the adapters."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Mapping, Sequence
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, build, inputs, model, rows, traced
from conftest import unchanged
from made import Convolved, Layers
from torch import nn

import lora_fx
from lora_fx.graph.adapter_names import adapter_of, is_of_adapter, original_name
from lora_fx.graph.cached_graphs import CachedGraphs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

NAMES = ["b", "a", "__base__", "a", "b"]
SIZE = (len(NAMES), 11, 4)


IDS = torch.tensor([[3, 0, 10, 4, 1], [2, 2, 9, 7, 5], [8, 1, 0, 0, 6], [5, 5, 5, 1, 2], [9, 10, 3, 7, 4]])
IMAGES = torch.linspace(-1, 1, 5 * 3 * 6 * 8).reshape(5, 3, 6, 8)


def both(base: nn.Module, onto: Any, configs: Mapping[str, Mapping[str, Any]], **more: Any) -> tuple[Any, Any]:
    """Return PEFT's model and a graph with these adapters, of equal random factors."""
    graph, wrapped = onto, None
    for adapter, settings in configs.items():
        config = peft.LoraConfig(**settings)
        graph = lora_fx.rewrite(graph, rules=config, adapter=adapter, **more)
        if wrapped is None:
            wrapped = peft.get_peft_model(copy.deepcopy(base), config, adapter)
        else:
            wrapped.add_adapter(adapter, config)
        more = {}
    assert wrapped is not None
    theirs = {
        re.sub(r"lora_embedding_(.*)", r"lora_\1.weight", name.removeprefix("base_model.model.")): p
        for name, p in wrapped.named_parameters()
    }
    torch.manual_seed(3)
    whole = graph.first if isinstance(graph, CachedGraphs) else graph
    for name, parameter in whole.named_parameters():
        if is_of_adapter(name) and original_name(name) is None:
            parameter.data.normal_(std=0.3)
            theirs[name].data.copy_(parameter.data)
    return wrapped.eval(), graph if isinstance(graph, CachedGraphs) else graph.eval()


def settings(first: Sequence[str], second: Sequence[str], **more: Any) -> dict[str, dict[str, Any]]:
    """Return the configurations of two adapters of different ranks and scalings."""
    return {
        "a": {"r": 3, "lora_alpha": 5, "lora_dropout": 0.3, "target_modules": list(first), **more},
        "b": {"r": 5, "lora_alpha": 4, "use_rslora": True, "target_modules": list(second), **more},
    }


def logits(name: str, module: Any, **more: Any) -> torch.Tensor:
    constants = {} if isinstance(module, lora_fx.TracedGraphModule) else ARCHITECTURES[name].constants
    with torch.no_grad():
        return module(**inputs(name, *SIZE), **constants, **more)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", rows(ARCHITECTURES, ("llama", "t5", "gpt2")))
def test_every_row_has_the_bits_of_pefts_mixed_batch(name: str) -> None:
    """Where the batch is not the first dimension of a layer's input, PEFT fails in the call, and no graph is made here."""
    architecture = ARCHITECTURES[name]
    first, *rest = architecture.target_modules
    configs = settings((first, *rest), rest or [first], fan_in_fan_out=architecture.fan_in_fan_out)
    wrapped, graph = both(model(name), traced(name), configs)
    if name in ("deberta-v2", "chatglm"):
        with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
            logits(name, wrapped, adapter_names=NAMES)
        with pytest.raises(lora_fx.PlanError, match=r"cannot act by row at .* expected an input whose first dimension"):
            lora_fx.activate_by_row(graph)
        return
    with unchanged(graph):
        by_row = lora_fx.activate_by_row(graph)
    found = logits(name, by_row, adapter_names=NAMES)
    assert torch.equal(found, logits(name, wrapped, adapter_names=NAMES))
    assert torch.equal(logits(name, pickle.loads(pickle.dumps(copy.deepcopy(by_row))), adapter_names=NAMES), found)
    for adapter, strengths in {"a": {"a": 1.0}, "b": {"b": 1.0}, "__base__": {}}.items():
        mine = [row for row, each in enumerate(NAMES) if each == adapter]
        alone = logits(name, lora_fx.activate(graph, strengths).eval())
        assert float((alone[mine] - found[mine]).abs().max()) <= 1e-6 * max(1.0, float(alone.abs().max()))
        others = [row for row in range(len(NAMES)) if row not in mine]
        assert float((alone[others] - found[others]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("layers", torch.float32),
        ("layers", torch.bfloat16),
        ("convolutions", torch.float32),
        pytest.param("convolutions", torch.bfloat16, marks=pytest.mark.matrix),
    ],
)
def test_embeddings_conv1d_convolutions_and_biases_of_b_have_pefts_bits(kind: str, dtype: torch.dtype) -> None:
    base, x = (Layers(), IDS) if kind == "layers" else (Convolved(2), IMAGES.to(dtype))
    base, targets = base.to(dtype).eval(), ["wide", "point"]
    configs = settings(targets, targets[:1])
    if kind == "layers":
        configs = settings(["emb", "q", "c"], ["q", "k", "emb"])
        configs["b"] |= {"target_modules": ["q"], "lora_bias": True}
    wrapped, graph = both(base, copy.deepcopy(base), configs, example_inputs=(x[:2],))
    by_row = lora_fx.activate_by_row(graph)
    for names in (NAMES, ["a"] * 5, ["__base__"] * 5, ["b", "b", "b", "b", "a"]):
        found = by_row(x, adapter_names=names)
        assert torch.equal(found, wrapped(x, adapter_names=names))
        assert found.dtype == dtype
    assert torch.equal(by_row(x[:1], adapter_names=["a"]), wrapped(x[:1], adapter_names=["a"]))


def test_each_row_has_the_head_of_its_adapter_as_in_peft() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=50, max_position_embeddings=16, num_labels=3, **sizes)
    )
    configs = settings(["query", "value"], ["value"], task_type="SEQ_CLS")
    wrapped, graph = both(bert.eval(), lora_fx.trace(bert.eval(), inference=True), configs)
    for name, parameter in graph.named_parameters():
        if original_name(name) is not None:
            module, _, leaf = str(original_name(name)).rpartition(".")
            saved = wrapped.get_submodule(f"base_model.model.{module}").modules_to_save[adapter_of(name)]
            parameter.data.normal_()
            saved.get_parameter(leaf).data.copy_(parameter.data)
    batch = {"input_ids": torch.randint(50, (5, 7)), "attention_mask": torch.ones(5, 7, dtype=torch.long)}
    batch["attention_mask"][1, 4:] = 0
    with torch.no_grad():
        for names in (NAMES, ["a"] * 5, ["__base__", "b", "b", "b", "b"]):
            found = lora_fx.activate_by_row(graph)(**batch, adapter_names=names).logits
            assert torch.equal(found, wrapped(**batch, adapter_names=names).logits)
    alone = lora_fx.activate(graph, {"b": 1.0})(**batch).logits
    assert torch.allclose(found[1:], alone[1:], atol=1e-6)


def test_what_is_more_than_branches_and_modules_is_named(two: lora_fx.TracedGraphModule) -> None:
    def refused(rules: Any) -> str:
        with pytest.raises(lora_fx.PlanError) as caught:
            lora_fx.activate_by_row(lora_fx.rewrite(two, rules=rules, adapter="c"))
        assert str(caught.value).startswith("adapter 'c' cannot act by row: expected branches of LoRA and modules")
        return str(caught.value)

    q = {"target": ["q"], "rank": 2}
    assert "got a branch of 'dora' at 'q'" in refused({"select": [{**q, "variant": "dora"}]})
    assert "got a branch at 'q' whose start split the weight" in refused({"select": [{**q, "init": "pissa"}]})
    assert "got rows of 'emb.weight'" in refused({"select": [{"target": ["emb"], "trainable": [1, 3]}]})
    assert lora_fx.activate_by_row(two, "a").adapters[0].name == "a"


@pytest.fixture(scope="module")
def two() -> lora_fx.TracedGraphModule:
    """Return a graph with the adapters a and b."""
    return both(Layers(), Layers(), settings(["emb", "q", "c"], ["q"]), example_inputs=(IDS[:2],))[1]


def test_what_is_no_name_for_each_row_is_refused_with_the_names(two: lora_fx.TracedGraphModule) -> None:
    by_row = lora_fx.activate_by_row(two)
    expected = "input 'adapter_names': expected one of 'a', 'b', '__base__' for each row, got "
    cases: dict[str, Any] = {
        f"{expected}'bb' (did you mean 'b'?).": ["a", "bb", "a", "a", "a"],
        f"{expected}None.": None,
        f"{expected}'a'.": "a",
        f"{expected}[0, 1, 0, 1, 1].": [0, 1, 0, 1, 1],
        "input 'adapter_names': expected 5 names, one for each row of 'x', got 2. The adapters are 'a', 'b', and '__base__' for none.": [
            "a",
            "b",
        ],
    }
    for message, names in cases.items():
        with pytest.raises(lora_fx.InputError, match=re.escape(message)):
            by_row(IDS, adapter_names=names)
    with pytest.raises(lora_fx.InputError, match=r"lora_fx.activate_by_row\(graph\) makes a graph that takes it"):
        two(IDS, adapter_names=["a"] * 5)
    with pytest.raises(lora_fx.InputError, match="adapter_names is for inference, and the graph is in training mode"):
        copy.deepcopy(by_row).train()(IDS, adapter_names=["a"] * 5)
    only = lora_fx.activate_by_row(two, ["b"])
    assert [*map(str, only.adapters)] == ["a (does not act, would train)", "b (acts by row, frozen)"]
    assert "adapter_names" in repr(only)
    with pytest.raises(lora_fx.InputError, match="expected one of 'b', '__base__' for each row, got 'a'"):
        only(IDS, adapter_names=["a"] * 5)
    with pytest.raises(lora_fx.PlanError, match="the graph has no adapter 'c'; it has: a, b"):
        lora_fx.activate_by_row(two, ["c"])
    with pytest.raises(lora_fx.PlanError, match="expected a graph with adapters, got one without"):
        lora_fx.activate_by_row(lora_fx.unload(two))


def test_passes_that_change_adapters_take_the_graph_from_which_it_was_made(two: lora_fx.TracedGraphModule) -> None:
    by_row = lora_fx.activate_by_row(two)
    expected = r"takes adapter_names \(a, b\), which is for calls alone. Pass the graph from which lora_fx.activate_by_row made it"
    for refused in (lora_fx.fold, lora_fx.fuse, lora_fx.unload, lora_fx.activate_by_row):
        with pytest.raises(lora_fx.PlanError, match=expected):
            refused(by_row)  # type: ignore[operator]
    with pytest.raises(lora_fx.PlanError, match=expected):
        lora_fx.activate(by_row, {"a": 1.0})
    for pair in ((two, by_row), (by_row, two)):
        with pytest.raises(lora_fx.PlanError, match=expected):
            lora_fx.verify(*pair, (IDS,))


@pytest.mark.parametrize("name", rows(("llama", "t5"), ("llama",)))
def test_rows_generate_pefts_tokens_with_beams_and_without(name: str) -> None:
    base, first = build(name, layers=1).eval(), ARCHITECTURES[name].target_modules
    wrapped, graph = both(base, lora_fx.trace(base, cache=True), settings(first, first[:1]))
    ids = torch.randint(3, 90, (4, 6))
    names, given = NAMES[:4], {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False}
    given |= {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    given |= {"decoder_start_token_id": 0} if name == "t5" else {}
    by_row = lora_fx.generation.generator(lora_fx.activate_by_row(graph))
    for more in ({}, {"num_beams": 3}):
        expected = wrapped.generate(**given, **more, adapter_names=names)
        assert torch.equal(by_row.generate(**given, **more, adapter_names=names), expected)
        assert not torch.equal(wrapped.generate(**given, **more, adapter_names=["a"] * 4), expected)
    for wrong, message in (
        (names[:2], "expected 4 names, one for each row of 'input_ids', got 2"),
        ("abab", "expected one of 'a', 'b', '__base__' for each row, got 'abab'"),
    ):
        with pytest.raises(lora_fx.InputError, match=message):
            by_row.generate(**given, adapter_names=wrong)
    if name == "llama":
        assert torch.equal(graph.generate(**given, adapter_names=names), by_row.generate(**given, adapter_names=names))
        more = peft.LoraConfig(r=2, target_modules=list(first), use_dora=True, init_lora_weights=False)
        wrapped.add_adapter("d", more)
        beside = lora_fx.rewrite(graph, rules=more, adapter="d")
        for rows_of in (["a", "__base__", "a", "a"], ["__base__"] * 4):
            expected = wrapped.generate(**given, adapter_names=rows_of)
            assert torch.equal(beside.generate(**given, adapter_names=rows_of), expected)
        with pytest.raises(lora_fx.PlanError, match="adapter 'd' cannot act by row"):
            beside.generate(**given, adapter_names=["a", "d", "a", "a"])
        for wrong, message in (
            (["__base__"] * 2, "expected 4 names, one for each row of 'input_ids', got 2"),
            (["__base__", "z", "a", "a"], "expected one of 'a', 'b', 'd', '__base__' for each row, got 'z'"),
            ("__base__", "expected one of .* for each row, got '__base__'"),
        ):
            with pytest.raises(lora_fx.InputError, match=message):
                beside.generate(**given, adapter_names=wrong)
        flat = lora_fx.rewrite(traced(name), rules=list(first), adapter="a")
        with pytest.raises(lora_fx.LoraFxError, match="adapter_names: expected a graph with a key-value cache"):
            flat.generate(**given, adapter_names=names)
        invoked = {"defaults": {"invocation_tokens": [3]}, "select": [{"target": list(first)}]}
        with pytest.raises(lora_fx.PlanError, match="expected the graph of a causal language model that takes all"):
            lora_fx.rewrite(graph, rules=invoked, adapter="c")
