"""Graphs with a key-value cache: one for the prompt and for every further token, which generate as the model does."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import families
import onnxruntime
import pytest
import torch
import transformers
from architectures import rows
from conftest import set_factors
from torch import nn

import lora_fx
from lora_fx.export.generation_directory import genai_config
from lora_fx.generation import generator
from lora_fx.graph.cached_graphs import cache_layers
from lora_fx.graph.input_checks import RelationCheck
from lora_fx.runtime import OnnxSession

SMALL = {**families.GROUPED, "num_hidden_layers": 2}
OWN = {
    "starcoder2": families._model("Starcoder2ForCausalLM", "Starcoder2Config", **SMALL, sliding_window=4),
    "xglm": families._model(
        "XGLMForCausalLM", "XGLMConfig", **families.TOKENS, d_model=48, ffn_dim=80, num_layers=2, attention_heads=4
    ),
}
NAMES = (
    *(
        "llama",
        "qwen3",
        "mistral",
        "gemma3_text",
        "gemma2",
        "gpt2",
        "gpt_neox",
        "gptj",
        "opt",
        "falcon",
        "bloom",
        "phi3",
    ),
    *("mixtral", "qwen2_moe", "gpt_oss", "cohere2", "glm4", "olmo2", "starcoder2", "xglm"),
)
CAUSAL = rows(NAMES, ("llama", "gpt2", "gemma3_text"))
STEPS = 10
DOUBLE = ("glm4", "olmo2", "gemma3_text")
"""Rows in float64: in float32, rounding of branches beside weights, and of their sum, are 1.06e-6 of the largest logit apart (the folded
graphs 5.3e-7); of Gemma 3 1.007e-6 on processors without AVX-512.
"""


@functools.cache
def model(name: str) -> nn.Module:
    if name in OWN:
        torch.manual_seed(0)
        return OWN[name]().eval()
    made = architectures.model(name).eval() if name in architectures.ARCHITECTURES else families.build(name)
    return copy.deepcopy(made).double() if name in DOUBLE else made


@functools.cache
def branched(name: str) -> lora_fx.TracedGraphModule:
    graph = lora_fx.rewrite(model(name), "all-linear", rank=4, alpha=6, cache=True, inference=True)
    set_factors(graph, scale=0.08)
    return graph


@functools.cache
def folded(name: str) -> lora_fx.TracedGraphModule:
    return lora_fx.fold(branched(name))


@functools.cache
def merged(name: str) -> Any:
    """The model itself over folded weights."""
    made = copy.deepcopy(model(name))
    state = folded(name).state_dict()
    made.load_state_dict({key: state[key] for key in made.state_dict()}, strict=True)
    return made


def prompts() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    source = torch.Generator().manual_seed(5)
    ids, long = (torch.randint(3, 90, shape, generator=source) for shape in ((3, 7), (2, 14)))
    padded = torch.ones_like(ids)
    padded[0, :3] = padded[2, :5] = 0
    return {
        "batch 3": (ids, torch.ones_like(ids)),
        "left-padded": (ids.masked_fill(padded == 0, 0), padded),
        "batch 1": (ids[:1], torch.ones_like(ids[:1])),
        "prompt of 1": (ids[:2, :1], torch.ones_like(ids[:2, :1])),
        "longer than the window": (long, torch.ones_like(long)),
    }


def generated(source: Any, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
    torch.manual_seed(3)
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "pad_token_id": 0, "do_sample": False, **options}
    return source.generate(
        input_ids=ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings
    )


@pytest.mark.parametrize("name", CAUSAL)
def test_tokens_and_logits_are_those_of_generate_with_folded_weights(name: str) -> None:
    for graph in (branched(name), folded(name)):
        for case, (ids, mask) in prompts().items():
            found, expected = generated(generator(graph), ids, mask), generated(merged(name), ids, mask)
            assert found.sequences.equal(expected.sequences), case
            for ours, theirs in zip(found.logits, expected.logits, strict=True):
                tolerance = 1e-12 if name in DOUBLE else 1e-6
                assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max(), case
    assert (
        not generated(model(name), *prompts()["batch 3"])
        .logits[0]
        .allclose(generated(merged(name), *prompts()["batch 3"]).logits[0], rtol=0.01)
    )


@pytest.mark.xdist_group("llama")
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "top_k": 20},
        pytest.param({"do_sample": True, "num_return_sequences": 2}, marks=pytest.mark.matrix),
    ],
)
def test_beams_and_samples_are_those_of_generate(options: dict[str, Any]) -> None:
    for case, (ids, mask) in prompts().items():
        expected = generated(merged("llama"), ids, mask, **options).sequences
        for graph in (branched("llama"), lora_fx.fuse(branched("llama"))):
            assert generated(generator(graph), ids, mask, **options).sequences.equal(expected), case


@pytest.mark.xdist_group("llama")
def test_what_a_graph_learns_counts_in_the_next_call() -> None:
    graph, (ids, mask) = lora_fx.unload(branched("llama")), prompts()["batch 3"]
    made = generator(graph)
    before = generated(made, ids, mask)
    assert before.sequences.equal(generated(model("llama"), ids, mask).sequences)
    with torch.no_grad():
        head = graph.get_parameter("lm_head.weight")
        own = head.clone()
        head.data = head.flip(0)
    assert not generated(made, ids, mask).sequences.equal(before.sequences)
    head.data = own


@pytest.mark.xdist_group("llama")
def test_an_adapter_that_was_trained_without_a_cache_goes_onto_a_graph_with_one() -> None:
    trained = lora_fx.rewrite(model("llama"), "all-linear", rank=4, alpha=6)
    set_factors(trained, scale=0.08)
    moved = lora_fx.transfer(trained, onto=lora_fx.unload(branched("llama")))
    assert not moved.training
    ids, mask = prompts()["left-padded"]
    assert generated(generator(moved), ids, mask).sequences.equal(
        generated(generator(branched("llama")), ids, mask).sequences
    )


@pytest.mark.xdist_group("llama")
def test_all_tensors_of_the_past_are_checked_by_one_condition_for_each_axis() -> None:
    graph = branched("llama")
    relations = [module.relation for module in graph.modules() if isinstance(module, RelationCheck)]
    assert len(relations) == 4
    layers = cache_layers(graph)
    assert [(layer.heads, layer.key_size, layer.value_size) for layer in layers] == [(2, 8, 8)] * len(layers)
    past = [layer.tensors(3, 4, torch.device("cpu")) for layer in layers]
    given = {"input_ids": torch.ones(3, 2, dtype=torch.int64), "position_ids": torch.full((3, 2), 4)}
    mask = torch.ones(3, 6, dtype=torch.int64)
    assert graph(**given, attention_mask=mask, past_key_values=past)["logits"].shape == (3, 2, 97)
    with pytest.raises(
        lora_fx.InputError,
        match=r"attention_mask\.size\(1\) == past_key_values_0_key\.size\(2\) \+ input_ids\.size\(1\)",
    ):
        graph(**given, attention_mask=mask[:, :5], past_key_values=past)
    shorter = [*past[:-1], {**past[-1], "value": past[-1]["value"][:, :, :3]}]
    with pytest.raises(
        lora_fx.InputError, match=r"past_key_values_0_key\.size\(2\) == past_key_values_0_value\.size\(2\) == "
    ):
        graph(**given, attention_mask=mask, past_key_values=shorter)


def test_equal_layers_are_stamped_to_the_graph_of_a_full_trace(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    deep = families._model("LlamaForCausalLM", "LlamaConfig", **{**SMALL, "num_hidden_layers": 5})().eval()
    with caplog.at_level("INFO", "lora_fx.tracing"):
        stamped = lora_fx.trace(deep, cache=True, inference=True)
    assert "is traced with 4 layers stamped" in caplog.text
    monkeypatch.setattr("lora_fx.tracing.trace.layer_classes", lambda _model: [])
    whole = lora_fx.trace(deep, cache=True, inference=True)
    shown = [[(n.op, str(n.target), n.name, str(n.args)) for n in graph.graph.nodes] for graph in (stamped, whole)]
    assert shown[0] == shown[1]


def test_a_graph_in_half_precision_generates_as_the_model() -> None:
    half = copy.deepcopy(model("llama")).to(torch.bfloat16)
    graph = lora_fx.trace(half, cache=True, inference=True)
    ids, mask = prompts()["left-padded"]
    assert generated(generator(graph), ids, mask).sequences.equal(generated(half, ids, mask).sequences)


@pytest.mark.xdist_group("llama")
def test_generate_of_a_graph_with_a_cache_is_that_of_its_generator() -> None:
    graph, (ids, mask) = branched("llama"), prompts()["left-padded"]
    found, expected = generated(graph, ids, mask), generated(generator(graph), ids, mask)
    assert all(ours.equal(theirs) for ours, theirs in zip(found.logits, expected.logits, strict=True))
    assert found.past_key_values.get_seq_length() == ids.size(1) + STEPS - 1


@pytest.mark.xdist_group("llama")
def test_an_adapter_of_a_directory_comes_with_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora_fx.save_adapter(branched("llama"), tmp_path / "adapter")
    bare, asked = lora_fx.unload(branched("llama")), []

    def traced(_model: nn.Module, _inputs: Any, **options: Any) -> lora_fx.TracedGraphModule:
        asked.append(options["cache"])
        return bare

    monkeypatch.setattr("lora_fx.tracing.replicated_layers.trace", traced)
    graph = lora_fx.from_adapter(model("llama"), tmp_path / "adapter", cache=True)
    ids, mask = prompts()["left-padded"]
    found, expected = (generated(generator(each), ids, mask) for each in (graph, branched("llama")))
    assert asked == [True]
    assert all(ours.equal(theirs) for ours, theirs in zip(found.logits, expected.logits, strict=True))


@pytest.mark.xdist_group("llama")
@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"use_cache": False, "num_beams": 3}, {"cache_implementation": "dynamic"}]
)
def test_settings_of_the_cache_change_neither_tokens_nor_logits(options: dict[str, Any]) -> None:
    ids, mask = prompts()["batch 3"]
    beams = {key: value for key, value in options.items() if key == "num_beams"}
    expected = generated(generator(branched("llama")), ids, mask, **beams)
    found = generated(generator(branched("llama")), ids, mask, **options)
    assert found.sequences.equal(expected.sequences)
    assert all(ours.equal(theirs) for ours, theirs in zip(found.logits, expected.logits, strict=True))


@pytest.mark.xdist_group("llama")
def test_a_cache_that_forgets_positions_is_refused_and_one_that_grows_goes_on() -> None:
    ids, mask = prompts()["batch 3"]
    windowed = transformers.DynamicCache(config=transformers.MistralConfig(num_hidden_layers=2, sliding_window=6))
    fixed = transformers.StaticCache(config=branched("llama").config, max_cache_len=20)
    for cache, found in ((windowed, "DynamicSlidingWindowLayer"), (fixed, "StaticLayer")):
        with pytest.raises(lora_fx.InputError, match=f"whose layers all grow, got {found}. Leave out config="):
            generated(generator(branched("llama")), ids, mask, past_key_values=cache)
    turns = transformers.DynamicCache()
    first = generated(generator(branched("llama")), ids, mask, past_key_values=turns).sequences
    longer = torch.cat([first, ids[:, :2]], dim=1)
    found, expected = (
        generated(generator(branched("llama")), longer, torch.ones_like(longer), **more).sequences
        for more in ({"past_key_values": turns}, {})
    )
    assert found.equal(expected)


@pytest.mark.xdist_group("llama")
def test_modules_of_a_graph_keep_their_modes_when_it_generates() -> None:
    graph = copy.deepcopy(branched("llama"))
    next(iter(graph.children())).training = True
    modes = [module.training for module in graph.modules()]
    generated(generator(graph), *prompts()["batch 1"])
    assert [module.training for module in graph.modules()] == modes
    assert any(modes)
    assert not all(modes)


# In files.


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("generation")
    (place / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "notes.txt"):
        (place / "tokenizer" / name).write_text(f'"{name}"')
    exported = lora_fx.export.generation(folded("llama"), place / "llama", tokenizer=place / "tokenizer")
    assert exported.path == place / "llama"
    assert sorted(path.name for path in exported.files) == sorted(path.name for path in exported.path.iterdir())
    return exported.path


@pytest.mark.xdist_group("llama")
def test_a_directory_for_generation_has_what_clients_read(directory: Path) -> None:
    assert sorted(path.name for path in directory.iterdir()) == [
        *("config.json", "genai_config.json", "generation_config.json", "model.onnx"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    decoder = json.loads((directory / "genai_config.json").read_text())["model"]["decoder"]
    assert (decoder["head_size"], decoder["num_key_value_heads"], decoder["num_hidden_layers"]) == (8, 2, 2)
    assert transformers.AutoConfig.from_pretrained(directory).model_type == "llama"
    names = [value.name for value in onnxruntime.InferenceSession(directory / "model.onnx").get_inputs()]
    assert names[:5] == [
        *("input_ids", "attention_mask", "position_ids", "past_key_values.0.key", "past_key_values.0.value"),
    ]
    with pytest.raises(lora_fx.LoraFxError, match="exists already"):
        lora_fx.export.generation(folded("llama"), directory)
    (directory / "notes").write_text("mine")
    with pytest.raises(lora_fx.LoraFxError, match="holds more than a directory for generation: notes"):
        lora_fx.export.generation(folded("llama"), directory, overwrite=True)
    (directory / "notes").unlink()


@pytest.mark.xdist_group("llama")
def test_settings_of_generation_are_those_of_the_file_for_genai_too(caplog: Any) -> None:
    graph = copy.deepcopy(folded("llama"))
    settings = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "num_beams": 2,
    }
    graph.generation_config = transformers.GenerationConfig(eos_token_id=[7, 9], pad_token_id=3, **settings)
    made = genai_config(graph)
    assert {name: made["search"][name] for name in settings} == settings
    assert (made["model"]["eos_token_id"], made["model"]["pad_token_id"]) == ([7, 9], 3)
    assert not caplog.messages
    graph.config.eos_token_id = None
    graph.generation_config = transformers.GenerationConfig()
    assert genai_config(graph)["model"]["eos_token_id"] == 0
    assert caplog.messages[0].startswith("the model has no eos_token_id, which genai_config.json needs: it says 0, and")


@pytest.mark.xdist_group("llama")
def test_what_cannot_be_written_beside_the_model_is_told_before_the_export(tmp_path: Path) -> None:
    with pytest.raises(
        lora_fx.LoraFxError, match="expected a directory, or a tokenizer of transformers with save_pretrained"
    ):
        lora_fx.export.generation(folded("llama"), tmp_path / "out", tokenizer=object())
    graph = copy.deepcopy(folded("llama"))
    settings = graph.generation_config
    settings.temperature = 0.6  # without do_sample
    graph.generation_config = settings
    with pytest.raises(lora_fx.LoraFxError, match="the graph's generation_config is not valid"):
        lora_fx.export.generation(graph, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.xdist_group("llama")
def test_onnxruntime_generates_the_tokens_of_generate(directory: Path) -> None:
    session = onnxruntime.InferenceSession(directory / "model.onnx")
    outputs = [value.name for value in session.get_outputs()]
    check_generated(lambda given: dict(zip(outputs, session.run(None, given), strict=True)), merged("llama"))


@pytest.mark.xdist_group("llama")
def test_a_file_with_slots_generates_with_and_without_an_adapter(tmp_path: Path) -> None:
    lora_fx.export.onnx(branched("llama"), tmp_path / "slots.onnx", slots=True, verify=False)
    lora_fx.export.onnx_adapter(branched("llama"), tmp_path / "trained.onnx_adapter")
    session = OnnxSession(tmp_path / "slots.onnx")
    session.load("trained", tmp_path / "trained.onnx_adapter")
    check_generated(lambda given: session.run(given, adapter="trained"), merged("llama"))
    check_generated(session.run, model("llama"))


def check_generated(run: Callable[[dict[str, Any]], Any], source: Any) -> None:
    """Compare tokens and logits of a file that keeps its cache itself with those that a model generates."""
    for case, (ids, mask) in prompts().items():
        expected = generated(source, ids, mask)
        zeros = [layer.tensors(len(ids), 0, torch.device("cpu")) for layer in cache_layers(folded("llama"))]
        past = {f"past_key_values.{i}.{key}": v.numpy() for i, layer in enumerate(zeros) for key, v in layer.items()}
        now, tokens = ids, ids
        for logits in expected.logits:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -now.size(1) :]
            given = {"input_ids": now, "attention_mask": mask, "position_ids": positions}
            found = run({**{key: v.numpy() for key, v in given.items()}, **past})
            last = torch.from_numpy(found["logits"][:, -1])
            assert (last - logits).abs().max() <= 1e-6 * logits.abs().max(), case
            past = {name: found[name.replace("past_key_values", "present")] for name in past}
            now = last.index_fill(1, torch.tensor([2]), -torch.inf).argmax(-1, keepdim=True)  # no end before its time
            tokens, mask = torch.cat([tokens, now], 1), torch.cat([mask, torch.ones_like(now)], 1)
        assert tokens.equal(expected.sequences), case


@pytest.mark.xdist_group("llama")
@pytest.mark.parametrize("write", ["torchscript", "pt2"])
def test_torchscript_and_pt2_take_a_graph_with_a_cache(write: str, tmp_path: Path) -> None:
    exported = getattr(lora_fx.export, write)(folded("llama"), tmp_path / "file.pt2")
    sizes = [comparison.sizes for comparison in exported.comparisons]
    assert {"batch": 1, "sequence": 1, "past_sequence": 0} in sizes
    assert exported.largest == 0


# What is refused.


@pytest.mark.parametrize(
    ("rope", "kind"),
    [
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, "dynamic"),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "factor": 2.0,
                "rope_theta": 1e4,
            },
            "longrope",
        ),
    ],
)
def test_positions_that_are_chosen_by_the_length_are_refused_by_name(rope: dict[str, Any], kind: str) -> None:
    made = families._model("LlamaForCausalLM", "LlamaConfig", **SMALL, rope_parameters=rope)().eval()
    with pytest.raises(
        lora_fx.TraceError, match=rf"cache=True: LlamaForCausalLM has rope_type='{kind}', whose frequencies"
    ):
        lora_fx.trace(made, cache=True)


def test_caches_of_another_kind_are_refused_by_name() -> None:
    config = transformers.Lfm2Config(**{**SMALL, "layer_types": ["conv", "full_attention"]})
    with pytest.raises(
        lora_fx.TraceError, match=r"cache=True: Lfm2ForCausalLM keeps a cache of another kind \(LinearAttentionLayer\)"
    ):
        lora_fx.trace(transformers.Lfm2ForCausalLM(config).eval(), cache=True)
    with pytest.raises(lora_fx.TraceError, match="cache=True: BertModel returns no logits to generate from"):
        lora_fx.trace(architectures.model("bert"), cache=True)
    with pytest.raises(lora_fx.TraceError, match="cache=True: Linear is not a causal language model of transformers"):
        lora_fx.trace(nn.Linear(3, 4), cache=True)


TINY = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2}
LINEAR = {f"linear_{name}": size for name, size in (("num_value_heads", 4), ("num_key_heads", 2))}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}


@pytest.mark.parametrize(
    ("name", "sizes", "found"),
    [
        (
            "Mamba",
            {**TINY, "state_size": 4},
            # before transformers 5.24, and since
            r"(returns no cache \('MambaCausalLMOutput' object has no attribute|keeps a cache of another kind \(LinearAttentionLayer\))",
        ),
        ("Rwkv", TINY, r"returns no cache \('RwkvCausalLMOutput' object has no attribute"),
        (
            "FalconH1",
            {**SMALL, "mamba_d_ssm": 48, "mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 8},
            r"keeps a cache of another kind \(LinearAttentionAndFullAttentionLayer\)",
        ),
        (
            "Qwen3Next",
            {
                **{**SMALL, "layer_types": ["linear_attention", "full_attention"], "num_experts": 4},
                **LINEAR,
                **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2},
            },
            r"keeps a cache of another kind \(LinearAttentionLayer\)",
        ),
    ],
)
def test_models_without_such_a_cache_are_refused_with_the_way_that_works(
    name: str, sizes: dict[str, Any], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_fx.tracing.trace._trace_equal_layers_once", None)  # before anything is traced
    made = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    instead = r"Trace it without a cache, and generate with the model and folded weights: lora_fx\.huggingface\.folded"
    with pytest.raises(lora_fx.TraceError, match=rf"cache=True: {name}ForCausalLM {found}.*{instead}"):
        lora_fx.trace(made, cache=True)


@pytest.mark.xdist_group("llama")
def test_layers_of_several_sizes_are_refused_for_genai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = cache_layers(branched("llama"))
    layers = [first, dataclasses.replace(second, value_size=6)]
    monkeypatch.setattr("lora_fx.export.generation_directory.cache_layers", lambda _graph: layers)
    with pytest.raises(
        lora_fx.LoraFxError, match=r"of one size in all layers, .* got .* \(2, 6\), \(2, 8\)\. Write the"
    ):
        lora_fx.export.generation(branched("llama"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_inputs_of_a_trace_with_a_cache_are_not_chosen() -> None:
    for option in ({"labels": True}, {"example_inputs": {}}, {"dynamic": {}}):
        with pytest.raises(lora_fx.TraceError, match="cache=True makes its own example_inputs, and has no labels"):
            lora_fx.trace(model("llama"), cache=True, **option)


@pytest.mark.xdist_group("llama")
def test_a_graph_without_a_cache_says_how_to_get_one() -> None:
    with pytest.raises(
        lora_fx.LoraFxError, match=r"expected a graph with a key-value cache: rewrite, trace or from_adapter with"
    ):
        generator(lora_fx.trace(nn.Linear(3, 4), (torch.ones(2, 3),)))
