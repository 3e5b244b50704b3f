"""Encoder-decoder models with a key-value cache: three graphs over the same parameters, which generate as the model does."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
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
from lora_fx import huggingface
from lora_fx.adapters.attach import attach
from lora_fx.generation import generator
from lora_fx.graph.cached_graphs import CachedGraphs
from lora_fx.graph.joined_graphs import through
from lora_fx.planning.planner import plan_graph
from lora_fx.rules.lookup import load

SIZES = {
    **families.TOKENS,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 88,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
}
OWN = {
    "mt5": families._model(  # transformers' own generate fails where the decoder has more layers than the encoder
        "MT5ForConditionalGeneration",
        "MT5Config",
        **families.TOKENS,
        d_model=40,
        d_kv=12,
        d_ff=72,
        num_layers=2,
        num_heads=4,
    ),
    "mbart": families._model("MBartForConditionalGeneration", "MBartConfig", **SIZES),
    "pegasus": families._model("PegasusForConditionalGeneration", "PegasusConfig", **SIZES),
}
NAMES = ("t5", "mt5", "bart", "mbart", "pegasus", "whisper")
EACH = rows(NAMES, ("t5",))
T5 = pytest.mark.xdist_group("t5")
STEPS = 10


@functools.cache
def model(name: str) -> Any:
    if name in OWN:
        torch.manual_seed(0)
        return OWN[name]().eval()
    return architectures.model(name).eval() if name in architectures.ARCHITECTURES else families.build(name)


@functools.cache
def bare(name: str) -> CachedGraphs:
    graphs = lora_fx.trace(model(name), cache=True)
    assert isinstance(graphs, CachedGraphs)
    return graphs


@functools.cache
def branched(name: str) -> CachedGraphs:
    graphs = lora_fx.rewrite(model(name), "all-linear", rank=4, alpha=6, cache=True)
    assert isinstance(graphs, CachedGraphs)
    set_factors(graphs.first, scale=0.08)
    return graphs


@functools.cache
def folded(name: str) -> CachedGraphs:
    return lora_fx.fold(branched(name))


@functools.cache
def merged(name: str) -> Any:
    """The model itself over folded weights."""
    made = copy.deepcopy(model(name))
    state = folded(name).encoder.state_dict()
    made.load_state_dict({key: state[key] for key in made.state_dict()}, strict=True)
    return made


def inputs(name: str) -> dict[str, dict[str, torch.Tensor]]:
    source = torch.Generator().manual_seed(5)
    if name == "whisper":
        sounds = torch.randn(3, 10, 22, generator=source)
        return {"batch 3": {"input_features": sounds}, "batch 1": {"input_features": sounds[:1]}}
    ids = torch.randint(3, 90, (3, 7), generator=source)
    padded = torch.ones_like(ids)
    padded[0, 5:] = padded[2, 3:] = 0
    ones = torch.ones_like(ids)
    return {
        "batch 3": {"input_ids": ids, "attention_mask": ones},
        "padded": {"input_ids": ids.masked_fill(padded == 0, 0), "attention_mask": padded},
        "batch 1": {"input_ids": ids[:1]},
        "one token": {"input_ids": ids[:2, :1], "attention_mask": ones[:2, :1]},
        "decoder prompt": {"input_ids": ids, "attention_mask": ones, "decoder_input_ids": ids[:, :4]},
    }


def generated(source: Any, **options: Any) -> Any:
    settings = transformers.GenerationConfig(
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        pad_token_id=0,
        eos_token_id=2,
        do_sample=False,
        decoder_start_token_id=1,
        output_logits=True,
        return_dict_in_generate=True,
        num_beams=options.pop("num_beams", 1),
    )
    return source.generate(**options, generation_config=settings)


@pytest.mark.parametrize("name", EACH)
def test_tokens_and_logits_are_those_of_generate_with_folded_weights(name: str) -> None:
    for graphs in (branched(name), folded(name)):
        for case, given in inputs(name).items():
            found, expected = generated(generator(graphs), **given), generated(merged(name), **given)
            assert found.sequences.equal(expected.sequences), case
            for ours, theirs in zip(found.logits, expected.logits, strict=True):
                assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max(), case
        beams = [generated(each, **given, num_beams=3).sequences for each in (generator(graphs), merged(name))]
        assert torch.equal(*beams)
    plain, other = (generated(each, **inputs(name)["batch 3"]).logits[0] for each in (model(name), merged(name)))
    assert not plain.allclose(other, rtol=0.01)


def shared(graphs: CachedGraphs) -> bool:
    """Tell whether all parameters of the graphs are the same objects."""
    first, *others = (dict(part.named_parameters(remove_duplicate=False)) for part in graphs.parts.values())
    return all(first.keys() == other.keys() and all(first[name] is other[name] for name in first) for other in others)


@T5
def test_all_graphs_have_the_same_parameters() -> None:
    for graphs in (branched("t5"), folded("t5"), lora_fx.activate(branched("t5"), {})):
        assert shared(graphs)
        assert shared(copy.deepcopy(graphs))
        assert shared(pickle.loads(pickle.dumps(graphs)))
    assert not set(map(id, branched("t5").first.parameters())) & set(map(id, model("t5").parameters()))


@T5
def test_a_fold_leaves_the_graphs_of_the_trace() -> None:
    for part, graph in folded("t5").parts.items():
        shown = [
            [(node.op, str(node.target), node.name, str(node.args)) for node in each.graph.nodes]
            for each in (graph, bare("t5").parts[part])
        ]
        assert shown[0] == shown[1], part
    assert list(folded("t5").encoder.state_dict()) == list(model("t5").state_dict())


@T5
def test_a_fold_in_place_writes_into_the_weights_of_all() -> None:
    graphs = copy.deepcopy(branched("t5"))
    weight = graphs.later.get_parameter("decoder.block.1.layer.0.SelfAttention.k.weight")
    result = lora_fx.fold(graphs, inplace=True)
    assert result.later.get_parameter("decoder.block.1.layer.0.SelfAttention.k.weight").data_ptr() == weight.data_ptr()
    given = inputs("t5")["padded"]
    assert generated(generator(result), **given).sequences.equal(generated(merged("t5"), **given).sequences)
    with pytest.raises(lora_fx.FoldError, match="folded in place"):
        graphs.first(torch.ones(1, 1, dtype=torch.int64))


# Adapters.


@pytest.fixture(scope="module")
def trained() -> lora_fx.TracedGraphModule:
    graph = lora_fx.rewrite(model("t5"), "all-linear", rank=4, alpha=6, inference=True)
    set_factors(graph, scale=0.08)
    return graph


@pytest.fixture(scope="module")
def directory(trained: lora_fx.TracedGraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapter") / "default"
    lora_fx.save_adapter(trained, place)
    return place


@T5
def test_an_adapter_goes_from_an_ordinary_graph_and_from_its_directory_onto_all_graphs(
    trained: lora_fx.TracedGraphModule, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    there = branched("t5")  # traced before traces are counted

    def traced(_model: nn.Module, _inputs: Any, **options: Any) -> CachedGraphs:
        asked.append(options["cache"])
        return bare("t5")

    monkeypatch.setattr("lora_fx.tracing.replicated_layers.trace", traced)
    two = lora_fx.load_adapter(lora_fx.activate(there, {}), directory, "other")
    given = inputs("t5")["padded"]
    expected = generated(generator(there), **given)
    for graphs in (
        lora_fx.transfer(trained, onto=bare("t5")),
        lora_fx.activate(two, {"other": 1.0}),
        lora_fx.from_adapter(model("t5"), directory, cache=True),
    ):
        assert isinstance(graphs, CachedGraphs)
        assert shared(graphs)
        found = generated(generator(graphs), **given)
        assert all(ours.equal(theirs) for ours, theirs in zip(found.logits, expected.logits, strict=True))
    assert asked == [True]
    lora_fx.save_adapter(two, tmp_path / "saved", "other")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (directory / name).read_bytes()


@T5
def test_half_the_strength_is_half_the_update_in_all_graphs(trained: lora_fx.TracedGraphModule) -> None:
    graphs, graph = lora_fx.activate(branched("t5"), {"default": 0.5}), lora_fx.activate(trained, {"default": 0.5})
    given = inputs("t5")["padded"]
    with huggingface.folded(copy.deepcopy(model("t5")), graph) as expected:
        assert generated(generator(graphs), **given).sequences.equal(generated(expected, **given).sequences)


@T5
def test_rules_for_single_calls_are_refused() -> None:
    rules = {"select": [{"target": ["q"], "calls": "each"}], "defaults": {"rank": 2, "alpha": 2}}
    with pytest.raises(lora_fx.PlanError, match=r"branches at .*@\d.* are for one of several calls of a module"):
        through(bare("t5"), lambda graph: attach(graph, plan_graph(graph, load(rules))))


# In files.


@T5
def test_onnxruntime_generates_the_tokens_of_generate(tmp_path: Path) -> None:
    check_files("t5", tmp_path / "model")


def check_files(name: str, place: Path) -> None:
    exported = lora_fx.export.generation(folded(name), place)
    assert exported.largest is not None
    assert exported.largest <= 1e-6
    files = ("encoder_model", "decoder_model", "decoder_with_past_model")
    assert sorted(path.name for path in place.iterdir()) == [
        *("config.json", "decoder_model.onnx", "decoder_with_past_model.onnx", "encoder_model.onnx"),
        "generation_config.json",
    ]
    encoder, first, later = (onnxruntime.InferenceSession(place / f"{file}.onnx") for file in files)
    for case, given in inputs(name).items():
        expected = generated(merged(name), **given)
        main = given.get("input_ids", given.get("input_features"))
        assert main is not None
        fed = {"input_ids": main, "attention_mask": given.get("attention_mask", torch.ones_like(main))}
        fed = {"input_features": main} if name == "whisper" else fed
        (hidden,) = encoder.run(None, {key: value.numpy() for key, value in fed.items()})
        tokens = given.get("decoder_input_ids")
        now = torch.ones(len(main), 1, dtype=torch.int64)
        now = now if tokens is None else torch.cat([now, tokens], 1)
        tokens, mask = now, {} if name == "whisper" else {"encoder_attention_mask": fed["attention_mask"].numpy()}
        past: dict[str, Any] = {}
        for logits in expected.logits:
            session = later if past else first
            more = past if past else {"encoder_hidden_states": hidden}
            found = dict(
                zip(
                    [output.name for output in session.get_outputs()],
                    session.run(None, {"input_ids": now.numpy(), **mask, **more}),
                    strict=True,
                )
            )
            past |= {f"past_key_values.{key[8:]}": value for key, value in found.items() if key != "logits"}
            last = torch.from_numpy(found["logits"][:, -1])
            assert (last - logits).abs().max() <= 1e-6 * logits.abs().max(), case
            now = last.index_fill(1, torch.tensor([2]), -torch.inf).argmax(-1, keepdim=True)  # no end before its time
            tokens = torch.cat([tokens, now], 1)
        assert tokens[:, :-1].equal(expected.sequences[:, :-1]), (
            case
        )  # generate forces the last token of BART and its kin


@pytest.mark.matrix
@pytest.mark.parametrize("name", NAMES)
def test_files_of_all_formats_compute_what_the_graphs_compute(name: str, tmp_path: Path) -> None:
    check_files(name, tmp_path / "onnx")
    for part, graph in folded(name).parts.items():
        for format in (lora_fx.export.torchscript, lora_fx.export.pt2):
            assert format(graph, tmp_path / f"{part}.{format.__name__}.pt2").largest == 0, part


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_equal_layers_are_stamped_to_the_graphs_of_full_traces(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    config = copy.deepcopy(model(name).config)
    layers = {"num_layers": 5, "num_decoder_layers": 6} if name == "t5" else {"encoder_layers": 5, "decoder_layers": 6}
    config.update(layers)
    deep = type(model(name))(config).eval()
    with caplog.at_level("INFO", "lora_fx.tracing"):
        stamped = lora_fx.trace(deep, cache=True)
    assert caplog.text.count("layers stamped") == 3, caplog.text
    monkeypatch.setattr("lora_fx.tracing.trace.layer_classes", lambda _model: [])
    whole = lora_fx.trace(deep, cache=True)
    for part in ("encoder", "first", "later"):
        shown = [
            [(node.op, str(node.target), node.name, str(node.args)) for node in getattr(each, part).graph.nodes]
            for each in (stamped, whole)
        ]
        assert shown[0] == shown[1], part


# What is refused.

WHOLE = {
    "activate",
    "activate_by_row",
    "combine",
    "fold",
    "from_adapter",
    "load_adapter",
    "plan",
    "recipe",
    "rewrite",
    "save_adapter",
    "transfer",
    "unload",
}
OF_MODELS = {"eva", "huggingface.save_pretrained", "huggingface.write_back", "huggingface.folded"}
TAKES_GRAPHS: dict[str, Callable[[Any, Path], object]] = {
    "dequantise": lambda g, _: lora_fx.dequantise(g),
    "draw": lambda g, path: lora_fx.draw(g, g, path / "x.svg"),
    "flatten": lambda g, _: lora_fx.flatten(g),
    "fold_report": lambda g, _: lora_fx.fold_report(g, g),
    "lora_plus_groups": lambda g, _: lora_fx.lora_plus_groups(g, 1e-3, ratio=2.0),
    "materialize": lambda g, _: lora_fx.materialize(g, {}),
    "parameter_summary": lambda g, _: lora_fx.parameter_summary(g),
    "trace": lambda g, _: lora_fx.trace(g),
    "verify": lambda g, _: lora_fx.verify(g, g, {}),
    "export.aoti": lambda g, path: lora_fx.export.aoti(g, path / "x.pt2"),
    "export.executorch": lambda g, path: lora_fx.export.executorch(g, path / "x.pte"),
    "export.onnx": lambda g, path: lora_fx.export.onnx(g, path / "x.onnx"),
    "export.onnx_adapter": lambda g, path: lora_fx.export.onnx_adapter(g, path / "x.onnx_adapter"),
    "export.pt2": lambda g, path: lora_fx.export.pt2(g, path / "x.pt2"),
    "export.torchscript": lambda g, path: lora_fx.export.torchscript(g, path / "x.pt"),
}


@T5
@pytest.mark.parametrize("name", TAKES_GRAPHS)
def test_other_functions_name_the_graphs_that_they_take(name: str, tmp_path: Path) -> None:
    with pytest.raises(lora_fx.LoraFxError, match=r"CachedGraphs.*: pass one of its graphs: encoder, first, later"):
        TAKES_GRAPHS[name](branched("t5"), tmp_path)


@T5
def test_graphs_that_generate_are_not_fused_since_they_do_not_train() -> None:
    with pytest.raises(
        lora_fx.PlanError,
        match=r"fuse is for graphs that train, and the graphs .* generate: fold\(graphs\) has no branches left",
    ):
        lora_fx.fuse(branched("t5"))  # type: ignore[arg-type]


@T5
def test_adapters_of_all_graphs_are_those_of_an_ordinary_graph(
    trained: lora_fx.TracedGraphModule, directory: Path
) -> None:
    """Branches come, are combined and go in all graphs at once, with the bits that an ordinary graph has."""
    graphs = branched("t5")
    there = lora_fx.transfer(graphs, onto=lora_fx.unload(trained))
    both = lora_fx.rewrite(there, ["q"], rank=3, alpha=9, adapter="b", seed=7)
    ours = lora_fx.rewrite(graphs, ["q"], rank=3, alpha=9, adapter="b", seed=7)
    assert isinstance(ours, CachedGraphs)
    assert shared(ours)
    weights = {"default": 0.5, "b": 2.0}
    expected, found = (lora_fx.combine(each, weights, adapter="ab") for each in (both, ours))
    mine, theirs = (dict(each.named_parameters()) for each in (found.first, expected))
    assert [name for name in theirs if ".ab." in name]
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert lora_fx.recipe(found) == lora_fx.recipe(expected)
    bare_again = lora_fx.unload(found)
    for part, graph in bare_again.parts.items():
        assert [node.name for node in graph.graph.nodes] == [node.name for node in bare("t5").parts[part].graph.nodes]
    loaded = lora_fx.from_adapter(bare("t5"), directory)  # type: ignore[arg-type]
    assert isinstance(loaded, CachedGraphs)
    planned = lora_fx.plan(bare("t5"), "t5")
    assert {each.site.module for each in planned.chosen} == {
        each.site.module for each in lora_fx.plan(model("t5"), "t5").chosen
    }


@T5
def test_the_weights_of_all_graphs_are_lent_to_the_model() -> None:
    mine = copy.deepcopy(model("t5"))
    given = inputs("t5")["padded"]
    with huggingface.folded(mine, branched("t5")), torch.no_grad():
        found = mine(**given, decoder_input_ids=torch.ones(3, 4, dtype=torch.int64)).logits
    expected = merged("t5")(**given, decoder_input_ids=torch.ones(3, 4, dtype=torch.int64)).logits
    assert torch.equal(found, expected)


def test_every_public_function_is_asked() -> None:
    modules = {"": lora_fx, "export.": lora_fx.export, "huggingface.": huggingface}
    public = {
        f"{prefix}{name}"
        for prefix, module in modules.items()
        for name in (module.__all__ if prefix != "huggingface." else ("save_pretrained", "write_back", "folded"))
        if inspect.isfunction(getattr(module, name))
    }
    assert (
        public - WHOLE - OF_MODELS - {"fuse", "nest", "export.generation", "export.onnx_adapter_from_peft"}
        == TAKES_GRAPHS.keys()
    )


@T5
@pytest.mark.parametrize(
    "take",
    [
        lora_fx.fold,
        lora_fx.fuse,
        generator,
        lambda part: lora_fx.activate(part, {}),
        lambda part: lora_fx.rewrite(part, "all-linear", adapter="new"),
        lambda part: lora_fx.transfer(branched("t5").first, onto=part),
        lambda part: lora_fx.export.generation(part, "nowhere"),
        lambda part: lora_fx.save_adapter(part, "nowhere"),
        lambda part: part.generate(torch.ones(1, 3, dtype=torch.int64)),
    ],
)
def test_adapters_and_weights_of_one_graph_alone_are_not_changed(take: Callable[[Any], object]) -> None:
    with pytest.raises(
        lora_fx.PlanError,
        match="expected the graphs of T5ForConditionalGeneration together, got 'first' alone: pass the CachedGraphs",
    ):
        take(branched("t5").first)


@T5
def test_slots_and_masks_of_the_decoder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(lora_fx.LoraFxError, match="slots=True: clients of encoder-decoder models load no adapters"):
        lora_fx.export.generation(branched("t5"), tmp_path / "x", slots=True)
    given = inputs("t5")["decoder prompt"]
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[0, :2] = 0
    with pytest.raises(lora_fx.InputError, match="decoder_attention_mask has zeros"):
        generator(branched("t5")).generate(**given, decoder_attention_mask=mask, decoder_start_token_id=1)
    with pytest.raises(lora_fx.InputError, match="output_attentions was asked for"):
        generator(branched("t5")).generate(**given, output_attentions=True)


def test_models_of_other_inputs_are_refused_by_name() -> None:
    config = transformers.Speech2TextConfig(
        **{**SIZES, "max_source_positions": 64, "max_target_positions": 64, "input_feat_per_channel": 10},
        num_conv_layers=1,
        conv_kernel_sizes=[5],
    )
    with pytest.raises(
        lora_fx.TraceError, match="Speech2TextForConditionalGeneration reads an attention_mask beside input"
    ):
        lora_fx.trace(transformers.Speech2TextForConditionalGeneration(config).eval(), cache=True)
    with pytest.raises(lora_fx.TraceError, match="cache=True: T5Model returns no logits to generate from"):
        lora_fx.trace(transformers.T5Model(model("t5").config).eval(), cache=True)
    with pytest.raises(lora_fx.TraceError, match="cache=True: Linear is not a causal language model"):
        lora_fx.trace(nn.Linear(2, 3), cache=True)
