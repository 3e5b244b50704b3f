"""The seed's demo: an mT5 of mt0-small's real size, with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import set_factors
from transformers import MT5Config, MT5ForConditionalGeneration

import lora_fx
from lora_fx import huggingface

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("seed")]

STEPS = 8
PROMPT = torch.tensor([[37, 4212, 8, 99, 1], [5, 60, 777, 1, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])


@pytest.fixture(scope="module")
def model() -> MT5ForConditionalGeneration:
    torch.manual_seed(0)
    return made(250112, 8)


def made(vocabulary: int, layers: int) -> MT5ForConditionalGeneration:
    config = MT5Config(
        vocab_size=vocabulary,
        d_model=512,
        d_kv=64,
        d_ff=1024,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    config.tie_word_embeddings = False  # mt0-small's head is its own; this config class ignores the argument
    model = MT5ForConditionalGeneration(config)
    model.set_input_embeddings(model.shared)  # and its encoder and decoder share their embedding all the same
    return model.eval()


@pytest.fixture(scope="module")
def branched(model: MT5ForConditionalGeneration) -> lora_fx.TracedGraphModule:
    return lora_fx.rewrite(model, rules="t5", rank=8, alpha=32, dropout=0.1)


def greedy(step: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the tokens that a plain greedy loop over logits produces."""
    tokens = torch.zeros(len(PROMPT), 1, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(STEPS):
            tokens = torch.cat([tokens, step(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens


def over_graph(graph_module: Any) -> torch.Tensor:
    return greedy(lambda tokens: graph_module(PROMPT, MASK, tokens).logits)


def generate(model: Any) -> torch.Tensor:
    return model.generate(
        input_ids=PROMPT, attention_mask=MASK, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, num_beams=1
    )


def test_the_report_is_the_seeds(branched: Any) -> None:
    assert (
        str(lora_fx.parameter_summary(branched))
        == "trainable params: 344064 || all params: 300520832 || trainable%: 0.11448923447676333"
    )


def test_only_q_and_v_get_a_branch(branched: Any) -> None:
    chosen = [name for name, _ in branched.named_parameters() if ".lora_A." in name]
    assert len(chosen) == 2 * (8 + 8 + 8)
    assert {name.split(".lora_A.")[0].rpartition(".")[2] for name in chosen} == {"q", "v"}


def test_branched_folded_and_generate_give_the_same_tokens_and_others_than_the_base(model: Any, branched: Any) -> None:
    base = generate(model)
    set_factors(
        branched, scale=0.02
    )  # far larger ones drive the unscaled attention of T5 into chaos, where roundings grow
    folded = lora_fx.fold(branched)
    tokens = over_graph(branched)
    assert torch.equal(over_graph(folded), tokens)
    with huggingface.folded(model, branched):
        inside = generate(model)
    # `generate` pads a finished row; forced to its full length it does not finish early.
    assert torch.equal(inside, tokens)
    assert not torch.equal(base, tokens)
    assert torch.equal(generate(model), base)


def test_inference_trains_nothing() -> None:
    graph_module = lora_fx.rewrite(made(97, 1), rules="t5", inference=True)
    assert lora_fx.parameter_summary(graph_module).trainable == 0
    assert not any(isinstance(m, torch.nn.Dropout) for n, m in graph_module.named_modules() if "lora" not in n)


def test_weights_are_back_after_an_exception(model: Any, branched: Any) -> None:
    before = dict(model.named_parameters(remove_duplicate=False))
    values = {name: parameter.clone() for name, parameter in before.items() if name.endswith("q.weight")}
    set_factors(branched)

    def fail() -> None:
        with huggingface.folded(copy.copy(model), branched):
            assert not torch.equal(
                model.encoder.block[0].layer[0].SelfAttention.q.weight,
                values["encoder.block.0.layer.0.SelfAttention.q.weight"],
            )
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is before[name] for name in before)
    assert all(torch.equal(after[name], value) for name, value in values.items())
