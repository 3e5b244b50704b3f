"""Prefix tuning beside PEFT's: the same bits, steps and files."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import peft
import pytest
import torch
import transformers
from architectures import rows
from graph_diff import first_difference
from safetensors.torch import load_file
from transformers_releases import peft_takes_caches

import lora_fx
from lora_fx.errors import AdapterError, FoldError, PlanError, RuleError, TraceError
from lora_fx.folding.checkpoint_plan import fold_checkpoint

EMBEDDING = "prompt_encoder.default.embedding.weight"
TOKENS = 6


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def mistral() -> Any:
    config = transformers.MistralConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        sliding_window=7,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


def bloom() -> Any:
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=90, hidden_size=32, n_layer=2, n_head=4))


def opt() -> Any:
    config = transformers.OPTConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=24,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def of_t5(name: str, encoder: int = 3, decoder: int = 2, d_kv: int = 8) -> Any:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=90, d_model=32, d_kv=d_kv, d_ff=48, num_layers=encoder, num_decoder_layers=decoder, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


t5, mt5 = functools.partial(of_t5, "T5"), functools.partial(of_t5, "MT5")


def bart(encoder: int = 3, decoder: int = 3) -> Any:
    config = transformers.BartConfig(
        vocab_size=90, d_model=32, encoder_layers=encoder, decoder_layers=decoder, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


MODELS: Mapping[str, tuple[Callable[[], Any], str]] = {
    "llama": (llama, "CAUSAL_LM"),
    "mistral": (mistral, "CAUSAL_LM"),
    "gpt2": (gpt2, "CAUSAL_LM"),
    "bloom": (bloom, "CAUSAL_LM"),
    "opt": (opt, "CAUSAL_LM"),
    "bert": (bert, "SEQ_CLS"),
    "t5": (t5, "SEQ_2_SEQ_LM"),
    "bart": (bart, "SEQ_2_SEQ_LM"),
}


def made(build: Callable[[], Any]) -> Any:
    """Return a frozen model in evaluation mode, since torch's attention may choose another kernel for one that trains."""
    torch.manual_seed(0)
    return build().eval().requires_grad_(False)


def inputs(model: Any, batch: int, length: int, target: int = 5) -> dict[str, torch.Tensor]:
    """Return token ids and a mask that hides the beginning of the first row."""
    torch.manual_seed(batch)
    ids = torch.randint(3, 90, (batch, length))
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    more = {"decoder_input_ids": torch.randint(3, 90, (batch, target))} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def peft_model(model: Any, task: str, **settings: Any) -> Any:
    torch.manual_seed(3)
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=TOKENS, **settings)
    return peft.get_peft_model(copy.deepcopy(model), config)


def given(theirs: Any, mine: lora_fx.TracedGraphModule) -> None:
    """Give a graph the prefix and the head of PEFT's model."""
    own = dict(mine.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            found = name.removeprefix("base_model.").replace("modules_to_save", "trained_copy")
            own.pop(found).data.copy_(parameter)
    assert not any(parameter.requires_grad for parameter in own.values())


def trained(module: Any, batch: Mapping[str, torch.Tensor]) -> list[float]:
    """Take ten steps."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(10):
        logits = module(**batch).logits.flatten(0, -2)
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.size(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same_as_peft(
    model: Any, task: str, rules: Any, *, inference: bool = False, **settings: Any
) -> tuple[lora_fx.TracedGraphModule, Any]:
    """Return a graph and PEFT's model with one prefix, whose logits are equal at several sizes."""
    mine = lora_fx.rewrite(model, rules, task_type=task, inference=inference)
    theirs = peft_model(model, task, **settings)
    given(theirs, mine)
    mine.eval(), theirs.eval()
    with torch.no_grad():
        for sizes in ((3, 9), (1, 4), (2, 13)):
            batch = inputs(model, *sizes)
            found = mine(**batch).logits
            assert torch.equal(found, theirs(**batch).logits), sizes
            assert not torch.allclose(found, model(**batch).logits, atol=1e-4)
            assert torch.equal(lora_fx.activate(mine, {})(**batch).logits, model(**batch).logits)
    return mine, theirs


@pytest.mark.parametrize("name", rows(MODELS, ("bert",)))
def test_logits_steps_and_files_are_those_of_peft(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if name == "bert":
        request.applymarker(peft_takes_caches)
    build, task = MODELS[name]
    model = made(build)
    mine, theirs = same_as_peft(model, task, {"prefix": [{"tokens": TOKENS, "role": "peft"}]})
    batch = inputs(model, 3, 9)
    assert trained(mine, batch) == pytest.approx(trained(theirs, batch), rel=1e-5)
    ours, _ = mine.get_parameter(EMBEDDING), theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(ours, theirs.prompt_encoder.default.embedding.weight, rtol=0, atol=1e-5)
    lora_fx.save_adapter(mine, tmp_path / "mine")
    with torch.no_grad():
        read = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "mine").eval()
        assert torch.equal(read(**batch).logits, mine(**batch).logits)
        loaded = lora_fx.load_adapter(lora_fx.activate(mine, {}), tmp_path / "theirs", "other")
        assert torch.equal(lora_fx.activate(loaded, {"other": 1})(**batch).logits, theirs(**batch).logits)
        assert torch.equal(lora_fx.load_adapter(mine, tmp_path / "theirs")(**batch).logits, theirs(**batch).logits)
    written, known = (json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("mine", "theirs"))
    known["modules_to_save"] = known["modules_to_save"] and ["classifier"]
    assert {**written, "encoder_hidden_size": None} == {**known, "encoder_hidden_size": None}


@pytest.mark.parametrize("name", rows(("bert",), ()))
def test_a_head_belongs_to_the_adapter_with_the_branches(name: str, tmp_path: Path) -> None:
    build, task = MODELS[name]
    model = made(build)
    rules = {"select": [{"role": ["attention.query"]}], "prefix": [{"tokens": TOKENS}]}
    mine = lora_fx.rewrite(model, rules, rank=3, task_type=task, seed=1).eval()
    torch.manual_seed(2)
    for parameter in mine.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    batch = inputs(model, 3, 9)
    for adapter, method in (("default", "LORA"), ("default-prefix", "PREFIX_TUNING")):
        lora_fx.save_adapter(mine, tmp_path / adapter, adapter)
        document = json.loads((tmp_path / adapter / "adapter_config.json").read_text())
        assert document["peft_type"] == method
        assert (document["modules_to_save"] == ["classifier"]) == (adapter == "default")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "default").eval()
    alone = lora_fx.activate(mine, {"default": 1})
    with torch.no_grad():
        torch.testing.assert_close(alone(**batch).logits, read(**batch).logits, rtol=0, atol=1e-6)
        theirs = peft_model(read.merge_and_unload(), task).eval()
        ahead = mine.get_parameter(EMBEDDING.replace("default", "default-prefix"))
        theirs.prompt_encoder.default.embedding.weight.copy_(ahead)
        if hasattr(theirs.get_base_model().classifier, "modules_to_save"):
            trained_head = theirs.get_base_model().classifier
            trained_head.modules_to_save["default"].load_state_dict(trained_head.original_module.state_dict())
        torch.testing.assert_close(mine(**batch).logits, theirs(**batch).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", rows(MODELS, ()))
def test_a_projection_is_that_of_peft(name: str, tmp_path: Path) -> None:
    build, task = MODELS[name]
    model = made(build)
    rules = {"prefix": [{"tokens": TOKENS, "role": "peft", "projection": True, "hidden": 12}]}
    mine, theirs = same_as_peft(model, task, rules, prefix_projection=True, encoder_hidden_size=12)
    assert projected_files_agree(model, mine, theirs, tmp_path)


def projected_files_agree(model: Any, mine: lora_fx.TracedGraphModule, theirs: Any, directory: Path) -> bool:
    """Tell whether the files of a projection, which have what it computes, give the same logits to both readers."""
    theirs.save_pretrained(directory / "theirs")
    lora_fx.save_adapter(mine, directory / "mine")
    batch = inputs(model, 3, 9)
    with torch.no_grad():
        expected = mine(**batch).logits, theirs.eval()(**batch).logits
        read = peft.PeftModel.from_pretrained(copy.deepcopy(model), directory / "mine").eval()
        loaded = lora_fx.load_adapter(lora_fx.activate(mine, {}), directory / "theirs", "other")
        found = read(**batch).logits, lora_fx.activate(loaded, {"other": 1})(**batch).logits
    with pytest.raises(AdapterError, match="it has a projection here, and a file has what that computes"):
        lora_fx.load_adapter(mine, directory / "theirs")
    return all(map(torch.equal, found, expected))


SIZES = {f"{name}-{encoder}-{decoder}": (name, encoder, decoder) for name, encoder, decoder in (
    ("bart", 3, 2), ("t5", 2, 2), ("t5", 3, 3), ("t5", 3, 2), ("bart", 4, 4),
)}  # fmt: skip


@pytest.mark.parametrize("case", rows(SIZES, ("bart-3-2",)))
def test_a_decoder_reads_the_rows_that_peft_reads(case: str) -> None:
    name, encoder, decoder = SIZES[case]
    model = made(lambda: MODELS[name][0](encoder, decoder))  # type: ignore[call-arg]
    rules = {"prefix": [{"tokens": TOKENS, "role": "peft"}]}
    mine, _ = same_as_peft(model, "SEQ_2_SEQ_LM", rules, inference=True)
    assert mine.get_parameter(EMBEDDING).shape == (TOKENS, encoder * 2 * 32)
    own = lora_fx.rewrite(lora_fx.unload(mine), {"prefix": [{"tokens": TOKENS}]})
    assert own.get_parameter(EMBEDDING).shape == (TOKENS, decoder * 2 * 32)
    with torch.no_grad():  # of the pairs of rows, layer i has 2 i modulo the layers of the encoder
        pairs = mine.get_parameter(EMBEDDING).view(TOKENS, encoder, 64)
        own.get_parameter(EMBEDDING).copy_(torch.cat([pairs[:, 2 * i % encoder] for i in range(decoder)], 1))
        batch = inputs(model, 3, 9)
        assert torch.equal(own(**batch).logits, mine(**batch).logits)
    with pytest.raises(AdapterError, match='say role = "peft"'):
        lora_fx.save_adapter(own, "unwritten")


@pytest.mark.parametrize("case", rows(("t5",), ()))
def test_a_decoder_with_more_layers_than_the_encoder_has_no_rows_in_peft(case: str) -> None:
    graph = lora_fx.trace(made(lambda: MODELS[case][0](2, 3)), prefix=True, inference=True)  # type: ignore[call-arg]
    with pytest.raises(PlanError, match="the decoder has 3 layers, and PEFT has keys and values for the 2"):
        lora_fx.rewrite(graph, {"prefix": [{"tokens": 4, "role": "peft"}]})
    lora_fx.rewrite(graph, {"prefix": [{"tokens": 4}]})


@pytest.mark.parametrize("case", rows(("t5", "mt5"), ()))
def test_heads_of_another_width_than_the_model_need_no_setting(case: str) -> None:
    model = made(lambda: {"t5": t5, "mt5": mt5}[case](d_kv=5))
    rules = {"prefix": [{"tokens": TOKENS, "role": "peft"}]}
    with pytest.raises(RuntimeError, match=r"shape|size"):  # of PEFT, which takes d_model
        peft_model(model, "SEQ_2_SEQ_LM")(**inputs(model, 2, 5))
    same_as_peft(model, "SEQ_2_SEQ_LM", rules, inference=True, token_dim=20)


@pytest.fixture(scope="module")
def model() -> Any:
    return made(llama)


@pytest.fixture(scope="module")
def base(model: Any) -> lora_fx.TracedGraphModule:
    return lora_fx.trace(model, prefix=True)


@pytest.fixture(scope="module")
def graph(base: lora_fx.TracedGraphModule) -> lora_fx.TracedGraphModule:
    return lora_fx.rewrite(base, {"prefix": [{"tokens": TOKENS}]}, seed=1)


@pytest.fixture(scope="module")
def both(base: lora_fx.TracedGraphModule) -> lora_fx.TracedGraphModule:
    rules = {"select": [{"role": ["attention.query"]}], "prefix": [{"tokens": TOKENS}]}
    found = lora_fx.rewrite(base, rules, rank=3, seed=1)
    torch.manual_seed(2)
    for name, parameter in found.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.3)
    return found


def hiding(theirs: Any, layer: int) -> Any:
    """Return PEFT's model with the prefix hidden from a layer, by its mask."""

    def hidden(_module: Any, args: Any, kwargs: Any) -> Any:
        def masked(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.dim() != 4 or value.size(-1) != value.size(-2) + TOKENS:
                return value
            if value.size(1) != 1:  # T5's biases of positions, which the layer hands on to the next one
                return value
            columns = torch.arange(value.size(-1)) < TOKENS
            return value.masked_fill(columns, False if value.dtype == torch.bool else -torch.inf)

        return tuple(map(masked, args)), {name: masked(value) for name, value in kwargs.items()}

    base = theirs.get_base_model()
    of = base.get_decoder() if base.config.is_encoder_decoder else base
    ends = tuple(f"{name}.{layer}" for name in ("layers", "h", "encoder.layer", "block"))
    module = next(module for path, module in of.named_modules() if path.endswith(ends))
    module.register_forward_pre_hook(hidden, with_kwargs=True)
    return theirs


def middle_layer_hidden_as_by_a_mask(model: Any, task: str, graph: lora_fx.TracedGraphModule) -> None:
    """Compare a graph of layers without a prefix in the second one with PEFT's model whose mask hides it there."""
    decodes = model.config.is_encoder_decoder
    with pytest.warns(UserWarning, match="PEFT's file has one for all: save_adapter refuses it"):
        mine = lora_fx.rewrite(graph, {"prefix": [{"tokens": TOKENS, "layers": [0, "2-"] if decodes else [0]}]}).eval()
    theirs = hiding(peft_model(model, task), 1).eval()
    if task == "SEQ_CLS":
        theirs.base_model.classifier.load_state_dict(model.classifier.state_dict(), strict=False)
    chosen = [0, 2] if decodes else [0]
    width = mine.get_parameter(EMBEDDING).size(1) // len(chosen)
    rows = theirs.prompt_encoder.default.embedding.weight.view(TOKENS, -1, width)
    assert (rows.size(1) - len(chosen)) == 1
    of_peft = [2 * layer % rows.size(1) for layer in chosen] if decodes else chosen
    mine.get_parameter(EMBEDDING).data.copy_(rows[:, of_peft].flatten(1))
    for sizes in ((3, 9), (1, 4), (2, 13)):
        batch = inputs(model, *sizes)
        found, expected = mine(**batch).logits, theirs(**batch).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    if not mine.get_parameter(EMBEDDING).requires_grad:
        return
    found.square().mean().backward(), expected.square().mean().backward()
    gradient = theirs.prompt_encoder.default.embedding.weight.grad.view(TOKENS, -1, width)[:, of_peft].flatten(1)
    torch.testing.assert_close(mine.get_parameter(EMBEDDING).grad, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", rows([name for name in MODELS if name != "llama"], ()))
def test_a_layer_without_a_prefix_is_one_whose_mask_hides_it(name: str) -> None:
    build, task = MODELS[name]
    model = made((lambda: t5(3, 3)) if name == "t5" else build)
    middle_layer_hidden_as_by_a_mask(model, task, lora_fx.trace(model, prefix=True))


def test_layers_without_a_prefix_attend_to_the_text_alone(
    model: Any, base: lora_fx.TracedGraphModule, cached: Any, tmp_path: Path
) -> None:
    middle_layer_hidden_as_by_a_mask(model, "CAUSAL_LM", base)
    rules = {"prefix": [{"tokens": TOKENS, "layers": [1], "dropout": 0.4}]}
    with pytest.warns(UserWarning, match="PEFT's file has one for all"):
        mine = lora_fx.rewrite(base, rules, seed=1).eval()
    batch = inputs(model, 3, 9)
    expected = mine(**batch).logits
    assert first_difference(lora_fx.unload(mine), base) is None
    for each in (
        pickle.loads(pickle.dumps(mine)), lora_fx.nest(mine), lora_fx.transfer(mine, onto=base),
        lora_fx.activate(lora_fx.activate(mine, {}), {"default": 1}), lora_fx.fold(mine, keep_prefix=True),
    ):  # fmt: skip
        assert torch.equal(each.eval()(**batch).logits, expected)
    with pytest.raises(AdapterError, match="for some layers alone, none for 0, and PEFT's file has one for all"):
        lora_fx.save_adapter(mine, tmp_path / "a")
    for call in (lambda: mine.generate(**batch), lambda: lora_fx.transfer(mine, onto=cached)):
        with pytest.raises(PlanError, match="for some layers alone, which is no past"):
            call()
    with pytest.raises(PlanError, match=r"layers: expected some of 0 to 1, as the model has, found 2\."):
        lora_fx.rewrite(base, {"prefix": [{"layers": [0, 2]}]})


def test_dropout_of_a_prefix_is_drawn_in_training_alone(model: Any, base: lora_fx.TracedGraphModule) -> None:
    mine = lora_fx.rewrite(base, {"prefix": [{"tokens": TOKENS, "dropout": 0.4}]})
    theirs = peft_model(model, "CAUSAL_LM")
    given(theirs, mine)
    batch = inputs(model, 3, 9)
    assert torch.equal(mine.eval()(**batch).logits, theirs.eval()(**batch).logits)

    def dropped(_module: Any, _args: Any, found: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(found[:1], 0.4).expand_as(found)

    theirs.train().prompt_encoder.default.register_forward_hook(dropped)
    logits = []
    for each in (mine.train(), theirs):
        torch.manual_seed(5)
        logits.append(each(**batch).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-6)
    assert not torch.allclose(mine(**batch).logits, logits[0], atol=1e-4)  # drawn anew
    mine.eval()


@peft_takes_caches
def test_bert_without_a_mask_takes_a_prefix_as_peft_does() -> None:
    model = made(bert)
    ids = {"input_ids": inputs(model, 3, 9)["input_ids"]}
    mine = lora_fx.rewrite(model, {"prefix": [{"tokens": TOKENS}]}, task_type="SEQ_CLS", example_inputs=ids)
    theirs = peft_model(model, "SEQ_CLS").eval()
    given(theirs, mine)
    with torch.no_grad():
        torch.testing.assert_close(mine(**ids).logits, theirs(**ids).logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(lora_fx.activate(mine, {})(**ids).logits, model(**ids).logits, rtol=0, atol=1e-6)


def test_a_projection_on_a_shared_trace_is_that_of_peft(
    model: Any, base: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    rules = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, prefix_projection=True, encoder_hidden_size=12
    )
    mine = lora_fx.rewrite(base, rules)
    theirs = peft_model(model, "CAUSAL_LM", prefix_projection=True, encoder_hidden_size=12).eval()
    given(theirs, mine)
    batch = inputs(model, 3, 9)
    assert torch.equal(mine(**batch).logits, theirs(**batch).logits)
    assert trained(mine, batch) == pytest.approx(trained(theirs, batch), rel=1e-5)
    assert projected_files_agree(model, mine, theirs, tmp_path)


def test_a_graph_without_a_prefix_is_that_of_the_model(
    model: Any, base: lora_fx.TracedGraphModule, graph: lora_fx.TracedGraphModule
) -> None:
    batch = inputs(model, 3, 9)
    for each in (base, lora_fx.unload(graph), lora_fx.activate(graph, {})):
        assert torch.equal(each(**batch).logits, model(**batch).logits)
    assert str(lora_fx.unload(graph).graph) == str(base.graph)
    assert set(lora_fx.unload(graph).state_dict()) == set(base.state_dict()) == set(model.state_dict())


def test_only_the_prefix_trains_and_its_size_is_that_of_all_keys_and_values(graph: lora_fx.TracedGraphModule) -> None:
    shapes = {name: tuple(p.shape) for name, p in graph.named_parameters() if p.requires_grad}
    assert shapes == {EMBEDDING: (TOKENS, 2 * 2 * 2 * 8)}
    assert lora_fx.parameter_summary(graph).trainable == TOKENS * 64
    assert "a prefix of 6 tokens" in repr(graph)


def test_a_trace_for_the_sizes_of_its_example_alone_takes_prefixes_of_any_length(
    model: Any, graph: lora_fx.TracedGraphModule
) -> None:
    batch = inputs(model, 3, 9)
    fixed = lora_fx.trace(model, batch, prefix=True, inference=True, dynamic={})
    for tokens in (TOKENS, TOKENS - 2):
        mine = lora_fx.rewrite(fixed, {"prefix": [{"tokens": tokens}]}, seed=1)
        other = lora_fx.rewrite(graph, {"prefix": [{"tokens": tokens}]}, adapter="other", seed=1)
        assert torch.equal(mine(**batch).logits, lora_fx.activate(other, {"other": 1})(**batch).logits)


def test_a_prefix_is_read_by_all_stages_of_a_pipeline_and_refused(both: lora_fx.TracedGraphModule) -> None:
    with pytest.raises(lora_fx.LoraFxError, match="the prefix of adapter 'default-prefix' acts, which all stages read"):
        lora_fx.parallel.stage_module(copy.deepcopy(both), ["model.layers.1"], 0)


def test_two_adapters_come_of_rules_with_both_and_each_has_its_directory(
    model: Any, both: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    batch = inputs(model, 3, 9)
    assert [str(each) for each in both.adapters] == ["default (acts, trains)", "default-prefix (acts, trains)"]
    for name in ("default", "default-prefix"):
        lora_fx.save_adapter(both, tmp_path / name, name)
        alone = lora_fx.activate(both, {name: 1})
        read = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / name).eval()
        with torch.no_grad():
            torch.testing.assert_close(read(**batch).logits, alone(**batch).logits, rtol=0, atol=1e-6)
    buffer = io.BytesIO()
    torch.save(both, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for each in (copy.deepcopy(both), loaded, lora_fx.transfer(both, onto=lora_fx.unload(both))):
        assert torch.equal(each(**batch).logits, both(**batch).logits)


def checkpoint(directory: Path) -> Path:
    made(llama).save_pretrained(directory / "base")
    return directory / "base"


def test_a_prefix_cannot_be_folded_combined_or_doubled(
    both: lora_fx.TracedGraphModule, graph: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    with pytest.raises(
        FoldError, match="adapter 'default-prefix' cannot be folded: a prefix is keys and values in front"
    ):
        lora_fx.fold(both)
    with pytest.raises(FoldError, match="cannot be folded"):
        lora_fx.recipe(graph)
    with pytest.raises(PlanError, match="it has a prefix, and those of two adapters have no sum"):
        lora_fx.combine(both, {"default": 1, "default-prefix": 1}, adapter="sum")
    lora_fx.save_adapter(graph, tmp_path / "a")
    second = lora_fx.load_adapter(graph, tmp_path / "a", "second")
    with pytest.raises(PlanError, match="'second' and 'default', which acts, have a prefix each"):
        lora_fx.activate(second, {"default": 1, "second": 1})
    with pytest.raises(PlanError, match=r"cannot have the strength 0\.5: it has a prefix"):
        lora_fx.activate(graph, {"default": 0.5})
    with pytest.raises(FoldError, match="which no weights can hold"):
        fold_checkpoint(checkpoint(tmp_path), [(tmp_path / "a", 1.0)], tmp_path / "out")
    lora_only = lora_fx.activate(both, {"default": 1})
    assert EMBEDDING.replace("default", "default-prefix") not in lora_fx.fold(lora_only).state_dict()


def test_a_fold_beside_a_prefix_keeps_it(
    model: Any, both: lora_fx.TracedGraphModule, graph: lora_fx.TracedGraphModule, base: lora_fx.TracedGraphModule
) -> None:
    rules = {"select": [{"role": ["attention.query"]}], "prefix": [{"tokens": 3, "projection": True, "hidden": 5}]}
    projected = lora_fx.rewrite(base, rules, rank=3, seed=1)
    for each in (both, graph, projected):
        merged = lora_fx.fold(each, keep_prefix=True)
        assert [str(found) for found in merged.adapters] == [f"{each.adapters[-1].name} (acts, frozen)"]
        assert not any(".lora_" in name for name in merged.state_dict())
        assert lora_fx.verify(each, merged, inputs(model, 3, 9)).largest < 1e-5
    batch = inputs(model, 2, 5)
    assert torch.equal(lora_fx.fold(graph, keep_prefix=True)(**batch).logits, graph(**batch).logits)


def test_a_mask_that_hides_the_text_leaves_attention_over_the_prefix_alone(
    model: Any, graph: lora_fx.TracedGraphModule
) -> None:
    ids = inputs(model, 2, 7)["input_ids"]
    pairs = graph.get_parameter(EMBEDDING).detach().view(TOKENS, 2, 2, 2, 8).permute(1, 2, 3, 0, 4)
    with torch.no_grad():
        hidden = model.model.embed_tokens(ids)
        turned = model.model.rotary_emb(hidden, torch.arange(TOKENS, TOKENS + 7)[None])
        for layer, (key, value) in zip(model.model.layers, pairs, strict=True):
            query = layer.self_attn.q_proj(layer.input_layernorm(hidden)).unflatten(-1, (4, 8)).transpose(1, 2)
            query, _ = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(query, query, *turned)
            weights = (query @ key.repeat_interleave(2, 0).mT / 8**0.5).softmax(-1)
            attended = (weights @ value.repeat_interleave(2, 0)).transpose(1, 2).flatten(2)
            hidden = hidden + layer.self_attn.o_proj(attended)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        expected = model.lm_head(model.model.norm(hidden))
        found = graph(input_ids=ids, attention_mask=torch.zeros_like(ids)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def generated_as_peft(model: Any, mine: lora_fx.TracedGraphModule, theirs: Any) -> None:
    given(theirs, mine)
    batch = {name: value for name, value in inputs(model, 3, 8).items() if not name.startswith("decoder")}
    settings: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}

    def generated(module: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = module.generate(**batch, **settings, return_dict_in_generate=True, output_logits=True, **options)
        return found.sequences, torch.stack(found.logits)

    for options in ({"num_beams": 2}, {}):
        tokens, logits = generated(theirs, **options)
        found = generated(mine, **options)
        assert torch.equal(found[0], tokens), options
        torch.testing.assert_close(found[1], logits, rtol=0, atol=1e-5)
    uncached, without = (
        generated(mine, use_cache=False),
        generated(lora_fx.activate(mine, {})),
    )  # PEFT fails without a cache
    assert torch.equal(uncached[0], tokens)
    torch.testing.assert_close(uncached[1], logits, rtol=0, atol=1e-5)
    assert not torch.allclose(without[1][0], logits[0], atol=1e-3)
    with pytest.raises(lora_fx.InputError, match="prompt_lookup_num_tokens was given, and a prefix is in a cache"):
        mine.generate(**batch, max_new_tokens=2, prompt_lookup_num_tokens=2)
    with pytest.raises(lora_fx.InputError, match="cache_implementation was given, and a prefix is in a cache"):
        mine.generate(
            **batch, generation_config=transformers.GenerationConfig(cache_implementation="static", max_length=20)
        )


@peft_takes_caches
def test_tokens_that_are_generated_are_those_of_peft(model: Any, base: lora_fx.TracedGraphModule) -> None:
    mine = lora_fx.rewrite(base, {"prefix": [{"tokens": TOKENS}]})
    generated_as_peft(model, mine, peft_model(model, "CAUSAL_LM").eval())


@pytest.mark.parametrize("name", rows([name for name in MODELS if name not in ("llama", "bert")], ()))
def test_tokens_of_each_model_are_those_of_peft(name: str) -> None:
    build, task = MODELS[name]
    model = made(build)
    mine = lora_fx.rewrite(model, {"prefix": [{"tokens": TOKENS, "role": "peft"}]}, inference=True)
    generated_as_peft(model, mine, peft_model(model, task).eval())


@pytest.fixture(scope="module")
def cached(model: Any) -> Any:
    return lora_fx.trace(model, cache=True, inference=True)


def test_with_a_cache_a_prefix_is_the_first_past(
    model: Any, cached: Any, both: lora_fx.TracedGraphModule, graph: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    batch = inputs(model, 3, 8)
    settings: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    lora_fx.save_adapter(graph, tmp_path / "a")
    read = lora_fx.load_adapter(cached, tmp_path / "a")
    merged = lora_fx.fold(lora_fx.transfer(both, onto=cached), keep_prefix=True)
    for found, expected in ((read, graph), (lora_fx.transfer(both, onto=cached), both), (merged, both)):
        tokens = expected.generate(**batch, **settings)
        assert torch.equal(found.generate(**batch, **settings), tokens)
        assert not torch.equal(lora_fx.unload(found).generate(**batch, **settings), tokens)
    beams = {**settings, "num_beams": 2}
    assert torch.equal(read.generate(**batch, **beams), graph.generate(**batch, **beams))
    with pytest.raises(lora_fx.ExportError, match=r"lora_fx\.export\.generation writes it beside the model"):
        lora_fx.export.torchscript(read, tmp_path / "m.ts")
    with pytest.raises(PlanError, match="takes a prefix as the past of the first call, and trains none"):
        lora_fx.rewrite(cached, {"prefix": [{"tokens": 3}]})


@pytest.mark.parametrize("name", rows(("llama",), ()))
def test_a_directory_for_generation_has_the_prefix_as_a_past(
    name: str, model: Any, cached: Any, graph: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    del name
    lora_fx.export.generation(lora_fx.transfer(graph, onto=cached), tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    batch = inputs(model, 3, 8)
    past = {
        name: value.expand(3, -1, -1, -1)
        for name, value in load_file(tmp_path / "out" / "past_key_values.safetensors").items()
    }
    mask = torch.cat([torch.ones(3, TOKENS, dtype=torch.int64), batch["attention_mask"]], 1)
    positions = torch.arange(TOKENS, TOKENS + 8).repeat(3, 1)
    feed = {"input_ids": batch["input_ids"], "attention_mask": mask, "position_ids": positions, **past}
    (found,) = session.run(["logits"], {name: value.numpy() for name, value in feed.items()})
    torch.testing.assert_close(torch.from_numpy(found), graph(**batch).logits, rtol=0, atol=1e-5)


def test_a_prefix_nests_is_computed_again_and_fuses(model: Any, both: lora_fx.TracedGraphModule) -> None:
    batch = inputs(model, 3, 9)
    name = EMBEDDING.replace("default", "default-prefix")

    def gradient(module: Any) -> torch.Tensor:
        module.zero_grad()
        module(**batch).logits.square().sum().backward()
        return module.get_parameter(name).grad.clone()

    expected, nested = gradient(copy.deepcopy(both)), lora_fx.nest(copy.deepcopy(both))
    assert torch.equal(nested(**batch).logits, both(**batch).logits)
    nested.train().gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(nested), expected)
    torch.testing.assert_close(gradient(lora_fx.fuse(copy.deepcopy(both))), expected)


def test_a_graph_that_was_pickled_takes_a_prefix_as_the_graph_does(model: Any, base: lora_fx.TracedGraphModule) -> None:
    rules = {"prefix": [{"tokens": TOKENS, "projection": True}]}
    graph, late = (lora_fx.rewrite(each, rules, seed=1) for each in (base, pickle.loads(pickle.dumps(base))))
    assert first_difference(graph, late) is None
    batch = inputs(model, 3, 9)
    assert torch.equal(late(**batch).logits, graph(**batch).logits)
    assert not torch.equal(late(**batch).logits, base(**batch).logits)


def test_files_for_other_runtimes_have_the_prefix(graph: lora_fx.TracedGraphModule, model: Any, tmp_path: Path) -> None:
    lora_fx.export.torchscript(graph, tmp_path / "m.ts")
    batch = inputs(model, 3, 9)
    found = torch.jit.load(tmp_path / "m.ts")(*batch.values())  # type: ignore[no-untyped-call]
    assert torch.equal(found["logits"], graph(**batch).logits)
    with pytest.raises(lora_fx.ExportError, match="has a prefix, which is no product of A and B"):
        lora_fx.export.onnx(graph, tmp_path / "m.onnx", slots=True)


@pytest.mark.parametrize("name", rows(MODELS, ()))
def test_onnx_models_have_the_prefix(name: str, tmp_path: Path) -> None:
    graph = lora_fx.rewrite(made(MODELS[name][0]), {"prefix": [{"tokens": TOKENS, "projection": True}]}, inference=True)
    for each in (graph, lora_fx.activate(graph, {})):  # each is compared with its graph at several sizes
        lora_fx.export.onnx(each, tmp_path / "m.onnx", overwrite=True)
        lora_fx.export.torchscript(each, tmp_path / "m.ts", overwrite=True)


def test_what_a_prefix_cannot_be_is_refused_in_one_line(base: lora_fx.TracedGraphModule) -> None:
    def refused(error: type[Exception], match: str, call: Callable[[], object]) -> None:
        with pytest.raises(error, match=match):
            call()

    for key, value, told in (
        ("layers", ["3-1"], "layers.0.: expected the first layer before the last"),
        ("dropout", 1.0, "dropout: expected a number ≥ 0 and < 1"),
        ("positions", "shifted", "positions: expected 'peft' or 'unchanged', found 'shifted'"),
        ("hidden", 4, "hidden: expected none without projection = true"),
    ):
        refused(RuleError, told, lambda table={"tokens": 3, key: value}: lora_fx.rewrite(base, {"prefix": [table]}))  # type: ignore[misc]
    refused(RuleError, "prefix: expected one table at most", lambda: lora_fx.rewrite(base, {"prefix": [{}, {}]}))
    refused(RuleError, "select: required, and missing", lambda: lora_fx.rewrite(base, {"defaults": {}}))
    plain = torch.fx.symbolic_trace(torch.nn.Linear(3, 2))
    refused(TraceError, "takes no key-value cache", lambda: lora_fx.trace(plain, (torch.ones(1, 3),), prefix=True))
    other = lora_fx.trace(torch.nn.Linear(3, 2), (torch.ones(2, 3),))
    refused(PlanError, "traced without", lambda: lora_fx.rewrite(other, {"prefix": [{"tokens": 3}]}))
    refused(TraceError, "prefix=True ask for", lambda: lora_fx.trace(other, prefix=True))
    with torch.device("meta"):
        empty = llama()
    refused(TraceError, "expected a model with weights", lambda: lora_fx.trace(empty, prefix=True))


def test_a_directory_of_another_model_is_refused_with_all_that_differs(
    base: lora_fx.TracedGraphModule, graph: lora_fx.TracedGraphModule, tmp_path: Path
) -> None:
    lora_fx.save_adapter(graph, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "num_layers": 3, "num_attention_heads": 4}))
    with pytest.raises(AdapterError) as caught:
        lora_fx.load_adapter(base, tmp_path / "a")
    assert "num_attention_heads: expected 2 as in the model, found 4" in str(caught.value)
    assert "num_layers: expected 2 as in the model, found 3" in str(caught.value)
    assert "prompt_embeddings: expected shape (6, 96) by adapter_config.json, found (6, 64)" in str(caught.value)
    path.write_text(json.dumps({**document, "later_option": True}))
    with pytest.raises(AdapterError, match="later_option: unknown key"):
        lora_fx.load_adapter(base, tmp_path / "a")


def test_positions_that_the_model_has_not_are_refused_with_the_prefix_counted() -> None:
    model = made(bert)
    graph = lora_fx.rewrite(model, {"prefix": [{"tokens": TOKENS}]}, inference=True)
    graph(**inputs(model, 2, 24 - TOKENS))
    with pytest.raises(lora_fx.InputError, match=r"attention_mask.size\(1\) \+ 6 <= 24"):
        graph(**inputs(model, 2, 25 - TOKENS))
    with pytest.raises(PlanError, match="this one has 30 tokens"):
        lora_fx.rewrite(lora_fx.unload(graph), {"prefix": [{"tokens": 30}]})
    lora_fx.activate(graph, {})(**inputs(model, 2, 24))
