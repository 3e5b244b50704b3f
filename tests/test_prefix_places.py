"""Prefixes at attentions that take no past, and with unchanged positions, beside the models' own code and PEFT's embedding."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import rows
from graph_diff import first_difference
from test_prefix import EMBEDDING, MODELS, TOKENS, inputs, made, peft_model, trained
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lora_fx
from lora_fx.errors import AdapterError, FoldError, PlanError, RuleError

UNCHANGED: dict[str, Any] = {"prefix": [{"tokens": TOKENS, "positions": "unchanged"}]}
SIZES = ((3, 9), (1, 4), (2, 13))

pytestmark = pytest.mark.filterwarnings("ignore:rules 'custom' give a prefix.*which PEFT's file cannot hold")


class Unshifted(torch.nn.Module):
    """PEFT's model, whose text has the positions that it has without a prefix."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.theirs = theirs

    def forward(self, **batch: torch.Tensor) -> Any:
        mask, model = batch["attention_mask"], self.theirs.get_base_model()
        rows, length = mask.shape
        positions = torch.arange(length).expand(mask.shape)
        if model.config.model_type == "opt":  # which counts from the first token that is not padded
            positions = (mask.cumsum(1) * mask - 1).long()
        whole = torch.cat([torch.ones(rows, TOKENS, dtype=mask.dtype), mask], 1)
        if (
            window := getattr(model.config, "sliding_window", None)
        ) is not None:  # of the text, and behind all of the prefix
            behind = torch.arange(length)[:, None] - torch.arange(length)
            seen = (behind >= 0) & (behind < window) & mask[:, None, None].bool()
            whole = pad(seen, (TOKENS, 0), value=True)
        past = self.theirs.get_prompt(batch_size=rows)
        return model(input_ids=batch["input_ids"], attention_mask=whole, position_ids=positions, past_key_values=past)


def embedding(graph: lora_fx.TracedGraphModule) -> torch.nn.Parameter:
    return graph.get_parameter(EMBEDDING)


@pytest.mark.parametrize("name", rows(("gpt2", "opt", "bert", "llama", "mistral"), ()))
def test_text_with_unchanged_positions_is_what_peft_computes_at_these(name: str) -> None:
    build, task = MODELS[name]
    model = made(build)
    mine = lora_fx.rewrite(model, UNCHANGED)
    theirs = Unshifted(peft_model(model, task)).eval()
    theirs.theirs.requires_grad_(False).prompt_encoder.requires_grad_(True)
    if task == "SEQ_CLS":
        theirs.theirs.base_model.classifier.load_state_dict(model.classifier.state_dict(), strict=False)
    with torch.no_grad():
        embedding(mine).copy_(theirs.theirs.prompt_encoder.default.embedding.weight)
        for sizes in SIZES:
            batch = inputs(model, *sizes)
            found = mine.eval()(**batch).logits
            assert torch.equal(found, theirs(**batch).logits), sizes
            assert torch.equal(lora_fx.activate(mine, {})(**batch).logits, model(**batch).logits)
            assert not torch.allclose(found, model(**batch).logits, atol=1e-4)
    assert trained(mine, batch) == pytest.approx(trained(theirs, batch), rel=1e-5)


class AtAttentions(torch.nn.Module):
    """A model of transformers whose attentions at a place have keys and values in front, by its own interface of attention functions."""

    def __init__(self, model: Any, place: str, weight: torch.Tensor, chosen: Sequence[int] | None = None) -> None:
        super().__init__()
        self.model, self.weight = copy.deepcopy(model), torch.nn.Parameter(weight.detach().clone())
        part = self.model.get_encoder() if place == "encoder" else self.model.get_decoder()
        names = ("EncDecAttention", "encoder_attn") if place == "cross_attention" else ("SelfAttention", "self_attn")
        found = [module for name, module in part.named_modules() if name.endswith(names)]
        self.attended = [found[index] for index in (range(len(found)) if chosen is None else chosen)]

    def forward(self, **batch: torch.Tensor) -> Any:
        inner = ALL_ATTENTION_FUNCTIONS["sdpa"]
        pairs = self.weight.view(TOKENS, len(self.attended), 2, 4, 8).permute(1, 2, 3, 0, 4)

        def prefixed(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
            if module in self.attended:
                ahead = pairs[self.attended.index(module)].unsqueeze(1).expand(-1, len(key), -1, -1, -1)
                key, value = torch.cat([ahead[0], key], 2), torch.cat([ahead[1], value], 2)
                if mask is None and module.is_causal and query.size(2) > 1:
                    mask = torch.ones(query.size(2), query.size(2), dtype=torch.bool).tril()[None, None]
                if mask is not None:
                    mask = pad(mask, (TOKENS, 0), value=mask.dtype == torch.bool)
                if more.get("position_bias") is not None:
                    more["position_bias"] = pad(more["position_bias"], (TOKENS, 0))
            return inner(module, query, key, value, mask, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", prefixed)
            return self.model(**batch)


PLACES = ("encoder", "cross_attention", "self_attention")


def at(place: str, **more: Any) -> dict[str, Any]:
    return {"prefix": [{"tokens": TOKENS, "role": place, "positions": "unchanged", **more}]}


@functools.cache
def of_encoder_decoder(name: str) -> tuple[Any, lora_fx.TracedGraphModule]:
    """Return a model with two layers in the encoder and one in the decoder, and its graph."""
    model = made(lambda: MODELS[name][0](2, 1))  # type: ignore[call-arg]
    return model, lora_fx.trace(model, inference=True)


@pytest.mark.parametrize("name", rows(("t5", "bart"), ("t5",)))
def test_a_prefix_at_each_place_is_in_front_of_its_keys_and_values(name: str) -> None:
    model, graph = of_encoder_decoder(name)
    found: dict[str, torch.Tensor] = {}
    for place in PLACES:
        mine = lora_fx.rewrite(graph, at(place), seed=1)
        assert embedding(mine).shape == (TOKENS, (2 if place == "encoder" else 1) * 2 * 32)
        eager = AtAttentions(model, place, embedding(mine))
        for sizes in SIZES:
            batch = inputs(model, *sizes)
            found[place] = mine(**batch).logits
            torch.testing.assert_close(found[place], eager(**batch).logits, rtol=0, atol=2e-6)
            assert torch.equal(lora_fx.activate(mine, {})(**batch).logits, graph(**batch).logits)
        assert first_difference(lora_fx.unload(mine), graph) is None
    logits = [graph(**batch).logits, *found.values()]
    assert all((one - other).abs().max() > 1e-4 for one, other in itertools.combinations(logits, 2))


@pytest.mark.parametrize("name", rows(("t5", "bart"), ()))
def test_a_prefix_at_each_place_trains_as_in_the_model(name: str) -> None:
    model = made(lambda: MODELS[name][0](2, 2))  # type: ignore[call-arg]
    graph = lora_fx.trace(model)
    batch = inputs(model, 3, 9)
    for place in PLACES:
        mine = lora_fx.rewrite(graph, at(place), seed=1).eval()
        eager = AtAttentions(model, place, embedding(mine))
        before = embedding(mine).clone()
        assert trained(mine, batch) == pytest.approx(trained(eager, batch), rel=1e-5), place
        assert not torch.allclose(embedding(mine), before)
        torch.testing.assert_close(embedding(mine), eager.weight, rtol=0, atol=1e-5)
        chosen = lora_fx.rewrite(graph, at(place, layers=[1]), seed=1).eval()
        alone = AtAttentions(model, place, embedding(chosen), [1])
        torch.testing.assert_close(chosen(**batch).logits, alone(**batch).logits, rtol=0, atol=2e-6)


def test_a_mask_that_hides_all_inputs_leaves_cross_attention_over_the_prefix_alone() -> None:
    model, graph = of_encoder_decoder("t5")
    mine = lora_fx.rewrite(graph, at("cross_attention"), seed=1)
    batch = inputs(model, 2, 7)
    key, value = embedding(mine).view(TOKENS, 2, 4, 8).permute(1, 2, 0, 3)

    def alone(module: Any, query: Any, keys: Any, values: Any, mask: Any, **more: Any) -> Any:
        if keys.size(2) == 7:
            keys, values, mask, more["position_bias"] = (
                key.expand(2, -1, -1, -1),
                value.expand(2, -1, -1, -1),
                None,
                None,
            )
        return inner(module, query, keys, values, mask, **more)

    inner, hidden = ALL_ATTENTION_FUNCTIONS["sdpa"], {**batch, "attention_mask": torch.zeros(2, 7, dtype=torch.int64)}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", alone)
        expected = model(**batch).logits
    torch.testing.assert_close(mine(**hidden).logits, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", rows(("t5",), ()))
def test_passes_take_a_prefix_at_a_place(name: str, tmp_path: Path) -> None:
    model, graph = of_encoder_decoder(name)
    batch = inputs(model, 3, 9)
    rules = {**at("encoder", projection=True, hidden=5), "select": [{"target": ["q"]}]}
    both = lora_fx.rewrite(graph, rules, rank=3, seed=1)
    torch.manual_seed(2)
    for name, parameter in both.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.3)
    expected = both(**batch).logits
    own = [embedding.data for name, embedding in both.named_parameters() if "prompt_encoder" in name]
    table, first, first_bias, second, second_bias = own
    whole = torch.tanh(table @ first.T + first_bias) @ second.T + second_bias
    alone = lora_fx.activate(both, {"default-prefix": 1})
    torch.testing.assert_close(
        alone(**batch).logits, AtAttentions(model, "encoder", whole)(**batch).logits, rtol=0, atol=2e-6
    )
    merged = lora_fx.fold(both, keep_prefix=True)
    assert lora_fx.verify(both, merged, batch).largest < 1e-5
    for each in (
        copy.deepcopy(both), pickle.loads(pickle.dumps(both)), lora_fx.nest(copy.deepcopy(both)),
        lora_fx.transfer(both, onto=lora_fx.unload(both)), lora_fx.activate(alone, {"default": 1, "default-prefix": 1}),
    ):  # fmt: skip
        assert torch.equal(each(**batch).logits, expected)
    lora_fx.export.torchscript(both, tmp_path / "m.ts")  # which is compared with the graph
    with pytest.raises(FoldError, match="'default-prefix' cannot be folded: a prefix is keys and values in front"):
        lora_fx.fold(both)
    with pytest.raises(AdapterError, match="its prefix is at encoder, and PEFT's file has one that is the past"):
        lora_fx.save_adapter(both, tmp_path / "a", "default-prefix")
    with pytest.raises(
        PlanError, match=r"has a prefix at attentions \(encoder\), which is no past that a cache can begin"
    ):
        both.generate(batch["input_ids"])
    with pytest.raises(PlanError, match="'default-prefix', which acts, have a prefix each"):
        lora_fx.rewrite(both, at("cross_attention"), adapter="second").set_adapter(["second", "default-prefix"])


@pytest.mark.parametrize("name", rows(("t5", "bart", "bert"), ()))
def test_onnx_models_have_a_prefix_at_a_place(name: str, tmp_path: Path) -> None:
    model = made(MODELS[name][0])
    graph = lora_fx.trace(model, inference=True)
    for place in ("self_attention",) if name == "bert" else PLACES:
        lora_fx.export.onnx(lora_fx.rewrite(graph, at(place)), tmp_path / f"{place}.onnx")


class Block(torch.nn.Module):
    """A causal attention with grouped heads and without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.pair = torch.nn.Linear(12, 20), torch.nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.query(x).unflatten(-1, (4, 5)).transpose(1, 2)
        key, value = (each.unflatten(-1, (2, 5)).transpose(1, 2) for each in self.pair(x).chunk(2, -1))
        found = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return found.transpose(1, 2).flatten(2)


def test_a_causal_attention_of_your_own_module_gets_a_mask_that_admits_the_prefix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Block().requires_grad_(False)
    graph = lora_fx.trace(module, (torch.randn(2, 5, 12),))
    with pytest.warns(
        UserWarning, match="a prefix with the positions of the text unchanged, which PEFT's file cannot hold"
    ):
        mine = lora_fx.rewrite(graph, UNCHANGED, seed=1)
    x = torch.randn(3, 7, 12)
    pairs = embedding(mine).view(TOKENS, 2, 2, 5).permute(1, 2, 0, 3)
    query, both = module.query(x).view(3, 7, 4, 5), module.pair(x).view(3, 7, 2, 2, 5)
    expected = torch.empty(3, 7, 4, 5)
    for row, position, head in itertools.product(range(3), range(7), range(4)):
        keys, values = (
            torch.cat([own[head // 2], both[row, : position + 1, index, head // 2]]) for index, own in enumerate(pairs)
        )
        expected[row, position, head] = (keys @ query[row, position, head] / 5**0.5).softmax(0) @ values
    torch.testing.assert_close(mine(x), expected.flatten(2), rtol=0, atol=1e-6)
    for each in (lora_fx.unload(mine), lora_fx.activate(mine, {})):
        assert torch.equal(each(x), module(x))
    assert str(lora_fx.unload(mine).graph) == str(graph.graph)
    for suffix, told in (("dot", "+ prefix ahead · cat"), ("txt", "prefix default")):
        lora_fx.draw(graph, mine, tmp_path / f"mine.{suffix}")
        drawn = (tmp_path / f"mine.{suffix}").read_text()
        assert told in drawn
        assert "LoRA" not in drawn


def test_attentions_that_cannot_take_a_prefix_are_refused() -> None:
    class Mixed(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query = self.query(x).unflatten(-1, (4, 5)).transpose(1, 2)
            weights = (query @ query.mT).roll(1, -1).softmax(-1)
            return weights @ query

    one = lora_fx.trace(Block(), (torch.randn(2, 1, 12),), dynamic={})
    linear = lora_fx.trace(torch.nn.Linear(3, 2), (torch.ones(2, 3),))
    for graph, told in (
        (
            lora_fx.trace(Mixed(), (torch.randn(2, 5, 12),)),
            "at attention matmul_1, which reads scores by roll, an operator",
        ),
        (one, "which was traced for one key"),
        (linear, "no attention was found in it"),
    ):
        with pytest.raises(PlanError, match=told):
            lora_fx.rewrite(graph, UNCHANGED)
    with pytest.raises(PlanError, match=r"expected cross-attention, and the graph has none; .* 1 of self_attention"):
        lora_fx.rewrite(lora_fx.trace(Block(), (torch.randn(2, 5, 12),)), at("cross_attention"))
    for table, told in (
        ({"role": "encoder", "positions": "peft"}, 'positions: expected "unchanged" with role = "encoder"'),
        ({"role": "peft", "positions": "unchanged"}, 'positions: expected "peft" with role = "peft"'),
        (
            {"role": "decoder"},
            "role: expected 'self_attention', 'peft', 'encoder' or 'cross_attention', found 'decoder'",
        ),
    ):
        with pytest.raises(RuleError, match=told):
            lora_fx.rewrite(linear, {"prefix": [table]})


@pytest.mark.parametrize("name", rows(("bloom",), ()))
def test_an_attention_that_is_written_with_bmm_is_refused_by_node(name: str) -> None:
    graph = lora_fx.trace(made(MODELS[name][0]), inference=True)
    with pytest.raises(PlanError, match=r"at attention bmm, which is written out, .* at .*modeling_bloom.py:"):
        lora_fx.rewrite(graph, UNCHANGED)


@pytest.mark.parametrize("name", rows(("gpt2", "t5"), ()))
def test_a_causal_graph_with_a_cache_has_the_prefix_in_every_step_and_parts_of_a_model_have_none(name: str) -> None:
    model = made(MODELS[name][0])
    cached = lora_fx.trace(model, cache=True, inference=True)
    if name == "t5":
        with pytest.raises(PlanError, match="got those of an encoder-decoder model with a cache"):
            lora_fx.rewrite(cached, UNCHANGED)
        return
    mine = lora_fx.rewrite(cached, UNCHANGED, seed=1)
    whole = lora_fx.rewrite(model, UNCHANGED, seed=1, inference=True)
    batch = inputs(model, 3, 8)
    tokens = mine.generate(**batch, max_new_tokens=7, do_sample=False, pad_token_id=0, min_new_tokens=7)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(7):
        ids = torch.cat([ids, whole(input_ids=ids, attention_mask=mask).logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
    assert torch.equal(tokens, ids)
    assert not torch.equal(tokens, lora_fx.unload(mine).generate(**batch, max_new_tokens=7, pad_token_id=0))
