"""Folds on disk of adapters that were trained beside quantised weights: bitsandbytes and PEFT are the oracle, GPTQ and AWQ by their formats."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import quantised
import torch
import transformers
from architectures import few
from bitsandbytes import functional as bitsandbytes
from conftest import set_factors
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import lora_fx
from lora_fx.cli import app
from lora_fx.errors import AdapterError, FoldError, LoraFxError
from lora_fx.files.quantised_checkpoints import QuantisedTensor, quantised_tensors
from lora_fx.files.safetensors import TensorEntry
from lora_fx.folding.checkpoint import Checkpoint
from lora_fx.folding.checkpoint_plan import fold_checkpoint, plan_checkpoint_fold
from lora_fx.folding.dense_base import dense_base, stored_dense
from lora_fx.numerics.schemes import CodebookScheme
from lora_fx.tracing.trace import trace

Tensors = dict[str, torch.Tensor]

IDS = torch.tensor([[5, 17, 3, 60, 8, 2, 33], [9, 9, 41, 7, 0, 1, 12]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a Llama whose linears all have inputs of whole blocks, and two shapes."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
        tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    made: nn.Module = transformers.LlamaForCausalLM(config).to(dtype)
    return made


@pytest.fixture(scope="module", autouse=True)
def _traced_once() -> Iterator[None]:
    """Trace each model of this file once for each dtype: passes leave the graphs that they are given as they are."""

    graphs: dict[tuple[Any, ...], Any] = {}

    def traced(model: Any, inputs: None, *, inference: bool) -> Any:
        config = model.config
        key = (type(model), config.num_hidden_layers, config.hidden_size, config.dtype)
        if key not in graphs:
            graphs[key] = trace(model, inputs, inference=inference)
        return graphs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_fx.folding.checkpoint_plan.trace", traced)
        yield


def tensors_of(directory: Path) -> Tensors:
    return {key: tensor for path in sorted(directory.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def assert_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        assert torch.equal(tensor, other[key]), key


@dataclass(frozen=True)
class Trained:
    """A base, quantised by bitsandbytes as it was loaded, and an adapter of PEFT beside it.

    Attributes:
        root: with ``base``, ``4bit``, ``adapter``, and ``dense``: the base with the values that bitsandbytes makes of its codes.
        logits: of PEFT's model.
        scheme: text of the scheme.
        folded: the graph of the model with the adapter, folded in memory.
    """

    root: Path
    logits: torch.Tensor
    scheme: str
    folded: Tensors


def trained(root: Path, scheme: str, dtype: torch.dtype) -> Trained:
    base = llama(dtype)
    base.save_pretrained(root / "base")
    kind, _, double = scheme.partition(":")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double == "double",
        bnb_4bit_compute_dtype=dtype,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        root / "base", quantization_config=settings, device_map="cpu", attn_implementation="eager"
    ).train()  # in evaluation, bitsandbytes may repack its weights for good
    model.save_pretrained(root / "4bit")
    dense = dict(base.state_dict())
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            dense[f"{name}.weight"] = bitsandbytes.dequantize_4bit(module.weight.data, module.weight.quant_state)
    shutil.copytree(root / "base", root / "dense")
    graph = lora_fx.trace(model)
    save_file(dense, root / "dense" / "model.safetensors", {"format": "pt"})
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", lora_dropout=0.0)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    wrapped.save_pretrained(root / "adapter")
    with torch.no_grad():
        logits = wrapped(input_ids=IDS, attention_mask=MASK).logits
    graph = lora_fx.load_adapter(graph, root / "adapter")
    lora_fx.save_adapter(graph, root / "graph adapter")
    folded = dict(lora_fx.fold(graph).state_dict())
    return Trained(root, logits, scheme, folded)


ROWS = {f"{scheme} {dtype}": dtype for scheme in ("nf4", "nf4:double") for dtype in (torch.float32, torch.bfloat16)}


@pytest.fixture(scope="module", params=few(ROWS, ("nf4 torch.bfloat16", "nf4:double torch.float32")))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(tmp_path_factory.mktemp("world"), request.param.partition(" ")[0], ROWS[request.param])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(tmp_path_factory.mktemp("one"), "nf4:double", torch.float32)


def fold(base: Path, adapter: Path, out: Path, **settings: Any) -> Tensors:
    fold_checkpoint(base, [(adapter, 1.0)], out, verify=True, **settings)
    return tensors_of(out)


def test_an_adapter_is_folded_into_what_it_was_trained_on(world: Trained, tmp_path: Path) -> None:
    adapter = world.root / "adapter"
    expected = fold(world.root / "dense", adapter, tmp_path / "by bitsandbytes")
    original = fold(world.root / "base", adapter, tmp_path / "original", quantised=world.scheme)
    stored = fold(world.root / "4bit", adapter, tmp_path / "stored")
    assert_equal(original, expected)
    assert_equal(stored, expected)
    assert_equal(world.folded, expected)
    naive = fold(world.root / "base", adapter, tmp_path / "naive")
    assert not torch.equal(naive["model.layers.0.mlp.up_proj.weight"], expected["model.layers.0.mlp.up_proj.weight"])
    size = world.logits.abs().max()

    def difference(directory: str) -> float:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / directory, attn_implementation="eager")
        assert not hasattr(model.config, "quantization_config")
        with torch.no_grad():
            logits = model(input_ids=IDS, attention_mask=MASK).logits
        return float((logits - world.logits).abs().max() / size)

    near = 1e-6 if world.logits.dtype == torch.float32 else 2e-2
    assert difference("stored") == difference("original") <= near
    assert difference("naive") > 4 * near  # what most people do


def test_an_unknown_method_is_refused_by_its_name(one: Trained, tmp_path: Path) -> None:
    base = shutil.copytree(one.root / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    for method in ("hqq", None, ["gptq"]):
        said = {**config, "quantization_config": {"quant_method": method, "bits": 4}}
        (base / "config.json").write_text(json.dumps(said))
        with pytest.raises(LoraFxError) as caught:
            plan_checkpoint_fold(base, [(one.root / "adapter", 1.0)])
        assert str(caught.value) == (
            f"{base}: expected weights that are quantised by bitsandbytes, gptq, awq, got quant_method {method!r} in config.json. Fold into "
            "the checkpoint that they were made of."
        )


def test_an_adapter_of_a_graph_says_how_its_base_was_quantised(one: Trained, tmp_path: Path) -> None:
    adapter = one.root / "graph adapter"
    part = {"quantised": one.scheme, "not_quantised": ["mlp.up_proj", "lm_head"]}
    every = {"quantised": one.scheme, "not_quantised": []}
    for settings in ({}, {"quantised": "nf4"}, part, every):
        with pytest.raises(
            AdapterError, match=f"trained on another base; its weights were quantised .{one.scheme}."
        ) as caught:
            fold(one.root / "base", adapter, tmp_path / "no", **settings)
        way = f"lora-fx fold --quantised {one.scheme}"
        told = {
            id(
                part
            ): "and model.layers.0.mlp.up_proj.weight is not here: not_quantised names the modules that stay dense",
            id(every): "and lm_head.weight was not: not_quantised names the modules that stay dense",
        }.get(id(settings), way)
        assert told in str(caught.value)
        assert (way in str(caught.value)) == (told == way)
    assert_equal(fold(one.root / "base", adapter, tmp_path / "base", quantised=one.scheme), one.folded)
    assert_equal(fold(one.root / "4bit", adapter, tmp_path / "4bit"), one.folded)


@pytest.mark.parametrize(("base", "scheme"), [("base", "nf4:double"), ("4bit", None)])
def test_a_plan_compares_with_the_base_of_an_adapter_without_making_a_weight_dense(
    one: Trained, monkeypatch: pytest.MonkeyPatch, base: str, scheme: str | None
) -> None:
    sizes = []
    dequantise = CodebookScheme.dequantise

    def counted(self: CodebookScheme, tensors: Any, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        sizes.append(tuple(shape))
        return dequantise(self, tensors, shape, dtype)

    monkeypatch.setattr(CodebookScheme, "dequantise", counted)
    monkeypatch.setattr("lora_fx.adapters.peft_format.fingerprint.SAMPLES", 5)
    adapter = one.root / "graph adapter"
    with pytest.raises(AdapterError, match="other values"):  # the adapter's fingerprint is of 4096 elements
        plan_checkpoint_fold(one.root / base, [(adapter, 1.0)], quantised=scheme)
    assert sizes
    assert set(sizes) <= {(blocks, 64) for blocks in range(1, 6)}


def test_codes_are_made_in_the_dtype_into_which_the_model_was_loaded(tmp_path: Path) -> None:
    """A checkpoint in float32 was loaded in bfloat16, and norms and embeddings were made float32 again, as PEFT advises."""
    llama(torch.float32).save_pretrained(tmp_path / "base")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=settings, device_map="cpu", dtype=torch.bfloat16
    )
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False).train()
    graph = lora_fx.rewrite(model, ["q_proj", "down_proj"], rank=3, alpha=6)
    set_factors(graph)
    adapter, silent = tmp_path / "adapter", tmp_path / "silent"
    lora_fx.save_adapter(graph, adapter)
    shutil.copytree(adapter, silent)
    save_file(load_file(adapter / "adapter_model.safetensors"), silent / "adapter_model.safetensors", {"format": "pt"})
    found = fold(tmp_path / "base", adapter, tmp_path / "seen", quantised="nf4")
    said = fold(tmp_path / "base", silent, tmp_path / "said", quantised="nf4", loaded_in="bfloat16")
    other = fold(tmp_path / "base", silent, tmp_path / "other", quantised="nf4")
    assert_equal(found, said)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        name = f"model.layers.0.{name}"
        a, b = (graph.get_parameter(f"{name}.lora_{part}.default.weight") for part in "AB")
        expected = graph.get_parameter(f"{name}.weight").quantised_matrix() + 2 * b @ a  # type: ignore[operator]
        torch.testing.assert_close(found[f"{name}.weight"], expected, rtol=0, atol=1e-6)
        assert (other[f"{name}.weight"] - expected).abs().max() > 1e-4  # so this test can fail
    with pytest.raises(AdapterError, match=r"q_proj.weight: other values"):
        plan_checkpoint_fold(tmp_path / "base", [(adapter, 1.0)], quantised="nf4", loaded_in="float32")
    told = {
        directory: plan_checkpoint_fold(tmp_path / "base", [(directory, 1.0)], quantised="nf4").quantised
        for directory in (adapter, silent)
    }
    assert "(nf4) from bfloat16 and made dense again, as they were beside the adapter in training" in str(told[adapter])
    assert "pass" not in str(told[adapter])
    assert "(nf4) from float32" in str(told[silent])
    assert "pass loaded_in='bfloat16', for example" in str(told[silent])


def graph_with_adapter(root: Path, name: str, computed: torch.dtype, loaded: torch.dtype = torch.bfloat16) -> Any:
    """Return a graph of a model that is quantised as it is loaded, and write its base, in bfloat16, and its adapter."""
    base = quantised.saved(name, torch.bfloat16, root / "base")
    model = quantised.loaded(name, base, "nf4", loaded, computed)
    graph = lora_fx.rewrite(model, quantised.MODELS[name][1], rank=3, dropout=0.0)
    for parameter_name, parameter in graph.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.05)
    lora_fx.save_adapter(graph, root / "adapter")
    return graph


def test_dense_weights_tell_the_dtype_where_codes_are_the_same_in_several(tmp_path: Path) -> None:
    """float16 has room for nearly every value of bfloat16, and so the same codes."""
    graph = graph_with_adapter(tmp_path, "llama-1", torch.float16, torch.float16)
    pair = [(tmp_path / "adapter", 1.0)]
    planned = plan_checkpoint_fold(tmp_path / "base", pair, quantised="nf4")
    assert "(nf4) from float16 and made dense again" in str(planned.quantised)
    found = fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", quantised="nf4")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (graph.get_parameter(f"{name}.lora_{part}.default.weight").float() for part in "AB")
    matrix = graph.get_parameter(f"{name}.weight").quantised_matrix().bfloat16().float()  # type: ignore[operator]
    scaling = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_alpha"] / 3
    torch.testing.assert_close(found[f"{name}.weight"].float(), matrix + scaling * b @ a, rtol=2**-8, atol=1e-6)
    with pytest.raises(AdapterError, match=r"others were in float16: .* loaded_in='float16'"):
        plan_checkpoint_fold(tmp_path / "base", pair, quantised="nf4", loaded_in="bfloat16")


def test_further_weights_tell_the_dtype_where_the_smallest_have_the_same_codes_in_several(tmp_path: Path) -> None:
    llama(torch.float32).save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    small = {name: value.bfloat16().float() for name, value in weights.items() if "k_proj" in name or "v_proj" in name}
    save_file(weights | small, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=settings, device_map="cpu", dtype=torch.bfloat16
    )
    graph = lora_fx.rewrite(model, ["q_proj"], rank=3)
    lora_fx.save_adapter(graph, tmp_path / "adapter")
    planned = plan_checkpoint_fold(tmp_path / "base", [(tmp_path / "adapter", 1.0)], quantised="nf4")
    assert "(nf4) from bfloat16 and made dense again" in str(planned.quantised)


def test_a_dense_base_in_another_dtype_is_refused_with_the_way_to_cast_it(tmp_path: Path) -> None:
    llama(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float16)
    lora_fx.save_adapter(lora_fx.rewrite(model, ["q_proj"], rank=3), tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"this one loaded in float16, for a fold on disk written so with save_pret"):
        plan_checkpoint_fold(tmp_path / "base", [(tmp_path / "adapter", 1.0)])


def test_factors_at_a_parameter_that_lies_the_other_way_round_are_refused(tmp_path: Path) -> None:
    graph_with_adapter(tmp_path, "gpt2", torch.float32)
    config = tmp_path / "adapter" / "adapter_config.json"
    named = {"target_modules": None, "target_parameters": ["attn.c_attn.weight"]}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    with pytest.raises(AdapterError, match=r"c_attn.weight.* was quantised as \(out, in\), and is stored \(in, out\)"):
        plan_checkpoint_fold(tmp_path / "base", [(tmp_path / "adapter", 1.0)], quantised="nf4", strict=False)


@pytest.mark.parametrize(
    ("name", "computed"),
    few(
        [("llama", torch.float32), ("gpt2", torch.bfloat16), ("gpt2", torch.float32)],
        [("gpt2", torch.bfloat16)],
    ),
    ids=str,
)
def test_an_adapter_of_a_graph_is_folded_on_disk_whatever_its_base_computes_in(
    tmp_path: Path, name: str, computed: torch.dtype
) -> None:
    graph = graph_with_adapter(tmp_path, name, computed)  # float32 is the default of bitsandbytes
    done = fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", quantised="nf4")
    folded = lora_fx.fold(graph).state_dict()
    for each in (key for key in done if "_proj.weight" in key or "c_" in key):
        expected = folded[each].T if name == "gpt2" and done[each].dim() == 2 else folded[each]
        assert (done[each].float() - expected.float()).abs().max() <= 2**-8 * expected.abs().max(), each
    other = quantised.saved(name, torch.bfloat16, tmp_path / "other")
    tensors = tensors_of(other)
    key = next(key for key in tensors if "0.mlp" in key and "weight" in key)
    save_file({**tensors, key: -tensors[key]}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match=f"{key}: other values") as caught:
        plan_checkpoint_fold(other, [(tmp_path / "adapter", 1.0)], quantised="nf4")
    assert "were quantised (nf4) as in this base, but other weights: pass that model" in str(caught.value)


@pytest.mark.parametrize("place", ["directory", "cache", "name"])
def test_an_adapter_of_peft_whose_config_names_a_quantised_base_is_told(
    one: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    adapter = shutil.copytree(one.root / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    named = {"directory": str(one.root / "4bit"), "cache": "someone/model", "name": "someone/model-bnb-4bit"}[place]
    asked = []

    def cached(repository: str, name: str) -> str | None:
        asked.append((repository, name))
        return str(one.root / "4bit" / name) if place == "cache" and repository == named else None

    monkeypatch.setattr("lora_fx.folding.trained_base.try_to_load_from_cache", cached)

    def plan(named: str, **settings: Any) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
        plan_checkpoint_fold(one.root / settings.pop("base", "base"), [(adapter, 1.0)], **settings)

    with pytest.warns(UserWarning, match=f"trained on {named}, which is quantised") as caught:
        plan(named)
    assert len(caught) == 1
    way = "quantised='nf4'" if place == "name" else "quantised='nf4:double'"
    assert way in str(caught[0].message)
    assert asked == ([] if place == "directory" else [(named, "config.json")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(named, quantised="nf4:double")
        plan(named, base="4bit")
        plan(str(one.root / "dense"))
        plan("someone/habit4bits")
        plan("no\0name")


# GPTQ and AWQ, made by the documentation of their formats.


def words_of(values: list[int], bits: int) -> list[int]:
    """Return words of 32 bits, signed, whose bits from the lowest up are those of the values."""
    stream = sum(value << bits * place for place, value in enumerate(values))
    content = stream.to_bytes(-(-len(values) * bits // 32) * 4, "little")
    return [int.from_bytes(content[at : at + 4], "little", signed=True) for at in range(0, len(content), 4)]


def packed(matrix: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Return a matrix of integers packed along a dimension."""
    lines = [words_of(line, bits) for line in (matrix if dim == 1 else matrix.T).tolist()]
    found = torch.tensor(lines, dtype=torch.int32)
    return found if dim == 1 else found.T.contiguous()


def interleaved(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix whose columns are in AWQ's order within each eight."""
    columns = [start + place for start in range(0, matrix.shape[1], 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    return matrix[:, columns]


def quantised_directory(base: Path, directory: Path, settings: dict[str, Any], dtype: str) -> Tensors:
    """Write a checkpoint of GPTQ or AWQ in a directory, and return the tensors of the dense one that it stands for."""
    bits, group, awq = settings["bits"], settings["group_size"], settings["quant_method"] == "awq"
    shutil.copytree(base, directory)
    generator = torch.Generator().manual_seed(5)
    tensors: Tensors = {}
    dense: Tensors = {}
    out_dtype = getattr(torch, dtype)
    for key, tensor in load_file(base / "model.safetensors").items():
        if "_proj" not in key:
            tensors[key] = dense[key] = tensor.to(out_dtype)
            continue
        outputs, inputs = tensor.shape
        groups = 1 if group == -1 else -(-inputs // group)
        codes = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
        zeros = torch.randint(0, 2**bits, (groups, outputs), generator=generator)
        if settings.get("sym"):
            zeros = torch.full_like(zeros, 2 ** (bits - 1))
        scales = (torch.rand(groups, outputs, generator=generator) * 0.01 + 1e-4).half()
        columns = torch.arange(inputs) // (inputs if group == -1 else group)
        stem = key.removesuffix(".weight")
        if awq:
            tensors[f"{stem}.qweight"] = packed(interleaved(codes), 4, 1)
            tensors[f"{stem}.qzeros"] = packed(interleaved(zeros), 4, 1)
        else:
            if settings.get("desc_act"):
                columns = columns[torch.randperm(inputs, generator=generator)]
            tensors[f"{stem}.qweight"] = packed(codes, bits, 0)
            words = packed(zeros, bits, 1)
            if (
                settings.get("checkpoint_format") != "gptq_v2"
            ):  # one less in each place, taken from words as unsigned integers
                ones = sum(1 << place for place in range(0, 32, bits))
                words = torch.from_numpy((words.numpy().view(np.uint32) - np.uint32(ones)).view(np.int32))
            tensors[f"{stem}.qzeros"] = words
            tensors[f"{stem}.g_idx"] = columns.int()
        tensors[f"{stem}.scales"] = scales
        exact = (codes - zeros[columns]).double() * scales[columns].double()  # of 24 bits at most
        dense[key] = exact.T.to(torch.float32).to(out_dtype).contiguous()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": dtype, "quantization_config": settings}))
    (directory / ("quant_config.json" if awq else "quantize_config.json")).write_text(json.dumps(settings))
    return dense


FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq 4 bits, act order": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, "float32"),
    "gptq_v2 3 bits": ({"quant_method": "gptq", "bits": 3, "group_size": -1, "checkpoint_format": "gptq_v2"}, "bfloat16"),
    "gptq 8 bits": ({"quant_method": "gptq", "bits": 8, "group_size": 64, "sym": False}, "float16"),
    "gptq 2 bits": ({"quant_method": "gptq", "bits": 2, "group_size": 16, "checkpoint_format": "gptq"}, "float32"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, "float16"),
}  # fmt: skip


def read_dense(base: Path) -> Tensors:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(base))
    dense = stored_dense(Checkpoint.open(base), model)
    assert dense.stored
    assert len(dense.schemes) == 7
    return {key: dense.checkpoint.read(key) for key in dense.checkpoint.tensors}


@pytest.mark.parametrize("name", FORMATS)
def test_gptq_and_awq_are_read_as_their_formats_say(one: Trained, tmp_path: Path, name: str) -> None:
    settings, dtype = FORMATS[name]
    expected = quantised_directory(one.root / "base", tmp_path / "base", settings, dtype)
    assert_equal(read_dense(tmp_path / "base"), expected)


@pytest.mark.parametrize("filled", ["missing", "zeros"])
def test_groups_without_g_idx_are_consecutive_and_the_last_one_may_be_shorter(
    one: Trained, tmp_path: Path, filled: str
) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 40, "sym": True}  # of 64 and 192 input features
    expected = quantised_directory(one.root / "base", tmp_path / "base", settings, "float32")
    tensors = tensors_of(tmp_path / "base")
    for key in [key for key in tensors if key.endswith("g_idx")]:
        index = tensors.pop(key)
        tensors |= {key: torch.zeros_like(index)} if filled == "zeros" else {}
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    assert_equal(read_dense(tmp_path / "base"), expected)


def test_zero_points_of_another_format_than_the_config_says_are_refused_where_they_are_known(
    one: Trained, tmp_path: Path
) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq_v2"}
    quantised_directory(one.root / "base", tmp_path / "base", settings, "float32")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"].pop("checkpoint_format")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FoldError, match=r"model.safetensors: model.layers.0.*qzeros: expected zero points of 8, .* got 9"
    ):
        read_dense(tmp_path / "base")


@pytest.mark.parametrize("name", ["gptq 4 bits, act order", "awq"])
def test_an_adapter_is_folded_into_gptq_and_awq(one: Trained, tmp_path: Path, name: str) -> None:
    settings, dtype = FORMATS[name]
    tensors = quantised_directory(one.root / "base", tmp_path / "base", settings, dtype)
    shutil.copytree(one.root / "base", tmp_path / "dense")
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    expected = fold(tmp_path / "dense", one.root / "adapter", tmp_path / "expected")
    assert_equal(fold(tmp_path / "base", one.root / "adapter", tmp_path / "out"), expected)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"quant_config.json", "quantize_config.json"}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)


def test_the_other_layout_of_gpt2_and_weights_in_8_bits_are_those_of_bitsandbytes(tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=50, n_positions=16, n_inner=192)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    original = tensors_of(tmp_path / "base")
    four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    for name, settings in (("4bit", four), ("8bit", transformers.BitsAndBytesConfig(load_in_8bit=True))):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=settings, device_map="cpu"
        )
        model.save_pretrained(tmp_path / name)
        expected = dict(original)
        for path, module in model.named_modules():
            if type(module).__name__ == "Linear4bit":
                expected[f"{path}.weight"] = bitsandbytes.dequantize_4bit(
                    module.weight.data, module.weight.quant_state
                ).T
            elif type(module).__name__ == "Linear8bitLt":
                expected[f"{path}.weight"] = bitsandbytes.int8_vectorwise_dequant(
                    module.weight.data, module.weight.SCB
                ).T
        read = []
        for base, scheme in ((name, None), ("base", "nf4"))[: 2 if name == "4bit" else 1]:
            with torch.device("meta"):
                empty = transformers.GPT2LMHeadModel(transformers.AutoConfig.from_pretrained(tmp_path / base))
            dense, _ = dense_base(Checkpoint.open(tmp_path / base), empty, scheme, None)
            assert len(dense.schemes) == 4
            read.append({key: dense.checkpoint.read(key) for key in dense.checkpoint.tensors})
            if scheme is not None:  # which torchao leaves as they are: it quantises nn.Linear alone
                with pytest.raises(FoldError, match=r"no linear is left to quantise \(torchao takes no Conv1D\)"):
                    dense_base(Checkpoint.open(tmp_path / base), empty, "int8", None)
                with pytest.raises(
                    FoldError,
                    match=r"lm_head reads transformer.wte.weight, which .* stays dense.*not_quantised=\['lm_head'",
                ):
                    dense_base(Checkpoint.open(tmp_path / base), empty, scheme, ["mlp"])
        for found in read:
            assert found.keys() == {key for key in expected if key != "lm_head.weight"}
            for key, tensor in found.items():
                assert tensor.shape == expected[key].shape
                assert (tensor - expected[key]).abs().max() <= (1e-7 if name == "8bit" else 0.0) * expected[
                    key
                ].abs().max(), key


# Of shards, of several files, and on the command line.


def test_the_parts_of_a_weight_may_lie_in_several_shards(one: Trained, tmp_path: Path) -> None:
    tensors = tensors_of(one.root / "4bit")
    expected = fold(one.root / "4bit", one.root / "adapter", tmp_path / "whole")
    base = shutil.copytree(one.root / "4bit", tmp_path / "base")
    (base / "model.safetensors").unlink()
    places = {key: f"model-0000{1 + number % 3}-of-00003.safetensors" for number, key in enumerate(sorted(tensors))}
    for name in set(places.values()):
        save_file({k: t for k, t in tensors.items() if places[k] == name}, base / name, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_equal(fold(base, one.root / "adapter", tmp_path / "out"), expected)
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert written["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert written["weight_map"] == {
        key: path.name for path in (tmp_path / "out").glob("*.safetensors") for key in load_file(path)
    }
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_command_line_says_what_becomes_of_quantised_weights(one: Trained, tmp_path: Path) -> None:
    def call(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["fold", *map(str, arguments)])

    adapter = one.root / "adapter"
    planned = call(one.root / "4bit", adapter, tmp_path / "out", "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert (
        "7 quantised weights (nf4:double) become dense ones in float32; config.json has no quantization_config"
        in planned.stdout
    )
    assert "7 tensors, " in planned.stdout
    done = call(
        one.root / "base",
        adapter,
        tmp_path / "out",
        "--quantised",
        "nf4:double",
        "--not-quantised",
        "lm_head",
        "--report",
    )
    assert done.exit_code == 0, done.output
    assert "7 weights are quantised (nf4:double) from float32 and made dense again" in done.output
    assert "pass --loaded-in bfloat16, for example" in done.output
    part = call(
        one.root / "base",
        adapter,
        tmp_path / "part",
        "--quantised",
        "nf4",
        "--not-quantised",
        "mlp",
        "--not-quantised",
        "lm_head",
    )
    assert (
        "4 weights are quantised (nf4) from float32 and made dense again" not in part.output
    )  # "mlp" is a name or the end of one
    assert part.exit_code == 0, part.output
    refused = {
        ("base", "--quantised", "nf5"): "expected a way to quantise, nf4, nf4:double",
        ("base", "--not-quantised", "mlp"): "--not-quantised goes with --quantised",
        ("base", "--loaded-in", "bfloat16"): "--loaded-in goes with --quantised",
        (
            "base",
            "--quantised",
            "nf4",
            "--loaded-in",
            "int8",
        ): "loaded_in: expected float32, bfloat16, float16, got 'int8'",
        (
            "4bit",
            "--quantised",
            "nf4:double",
            "--loaded-in",
            "float32",
        ): "so that its codes are known: leave out --loaded-in",
        ("base", "--quantised", "nf4", "--not-quantised", "("): "expected names or regular expressions",
        ("base", "--quantised", "nf4", "--not-quantised", ".*"): "no linear is left to quantise",
        ("base", "--quantised", "int4:48"): "expected input features in groups of 48, got 64",
        ("base", "--quantised", "gptq-int4:32"): "gptq chooses codes by more than the weight",
        ("4bit", "--quantised", "nf4"): "is quantised already (nf4:double), got nf4",
    }
    for (base, *options), message in refused.items():
        done = call(one.root / base, adapter, tmp_path / "no", *options)
        assert done.exit_code != 0
        assert message in " ".join(done.output.split()), done.output
    assert not (tmp_path / "no").exists()


# What a stranger's file may say.


def entries_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorEntry]:
    return {key: TensorEntry(key, t.dtype, tuple(t.shape), 0, t.nbytes) for key, t in tensors.items()}


def state_of(**values: Any) -> torch.Tensor:
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [6, 64], **values}
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


STATE = "x.weight.quant_state.bitsandbytes__nf4"
NESTED = {"nested_blocksize": 256, "nested_offset": 0.5, "nested_dtype": "float32"}


def of_four_bits() -> Tensors:
    return {
        "x.weight": torch.zeros(192, 1, dtype=torch.uint8),
        "x.weight.absmax": torch.ones(6),
        "x.weight.quant_map": torch.zeros(16),
        STATE: state_of(),
    }


def read(tensors: Tensors, **settings: Any) -> tuple[QuantisedTensor, ...]:
    settings = {"quant_method": "bitsandbytes", **settings}
    return quantised_tensors("base", settings, entries_of(tensors), tensors.__getitem__)


FOUR_BITS: dict[str, tuple[Tensors, str]] = {
    "another shape": ({STATE: state_of(shape=[6, 65])}, "expected x.weight.absmax to be torch.float32 [7], got torch.float32 [6]"),
    "a shape without end": ({STATE: state_of(shape=[2**30, 2**30])}, "expected x.weight.absmax to be torch.float32 [18014398509481984]"),
    "no matrix": ({STATE: state_of(shape=[384])}, "expected the shape of a matrix, got [384]"),
    "sizes that are none": ({STATE: state_of(shape=[6, "64"])}, "expected the shape of a matrix"),
    "an odd block": ({STATE: state_of(blocksize=63)}, "expected a blocksize from 32 to 4096, got 63"),
    "another type": ({STATE: state_of(quant_type="fp4")}, "expected one quant_state of nf4 or fp4"),
    "another dtype": ({STATE: state_of(dtype="int8")}, "expected one quant_state of nf4 or fp4 with a dtype"),
    "no JSON": ({STATE: torch.zeros(5, dtype=torch.uint8)}, "expected one quant_state"),
    "a list": ({STATE: torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "expected one quant_state"),
    "a deep one": ({STATE: torch.full((9000,), ord("["), dtype=torch.uint8)}, "expected one quant_state"),
    "a long one": ({STATE: torch.zeros(20_000, dtype=torch.uint8)}, "expected one quant_state"),
    "nested in others": ({STATE: state_of(**{**NESTED, "nested_blocksize": 64})}, "expected a nested_blocksize of 256"),
    "no number": ({STATE: state_of(**{**NESTED, "nested_offset": float("nan")})}, "and a finite nested_offset"),
    "no number of float32": ({STATE: state_of(**{**NESTED, "nested_offset": 10**400})}, "a finite nested_offset of float32"),
    "another large one": ({STATE: state_of(**{**NESTED, "nested_offset": 1e300})}, "a finite nested_offset of float32"),
    "nested, not there": ({STATE: state_of(**NESTED)}, "expected x.weight.nested_absmax, x.weight.nested_quant_map beside it"),
    "codes of another size": ({"x.weight": torch.zeros(191, 1, dtype=torch.uint8)}, "expected 192 bytes of codes"),
    "a table of 15": ({"x.weight.quant_map": torch.zeros(15)}, "expected x.weight.quant_map to be torch.float32 [16]"),
    "one left": ({"y.weight.absmax": torch.ones(3)}, "y.weight.absmax: belongs to no quantised weight"),
    "rows of no matrix": ({"z.weight": torch.zeros(3, dtype=torch.int8), "z.SCB": torch.ones(3)}, "expected a matrix z.weight, got the shape [3]"),
    "rows of two formats": (
        {"z.weight": torch.zeros(3, 2, dtype=torch.int8), "z.SCB": torch.ones(3), "z.weight_format": torch.zeros(2, dtype=torch.uint8)},
        "expected z.weight_format to be torch.uint8 [], got torch.uint8 [2]",
    ),
    "rows without codes": ({"z.SCB": torch.ones(3)}, "expected a matrix z.weight, got the shape []"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUR_BITS)
def test_tensors_of_bitsandbytes_that_do_not_fit_are_refused(name: str) -> None:
    assert read(of_four_bits())[0].scheme == "nf4"
    changed, message = FOUR_BITS[name]
    with pytest.raises(LoraFxError) as caught:
        read({**of_four_bits(), **changed})
    assert message in str(caught.value)
    assert str(caught.value).startswith("base: its quantised weights cannot be read:\n  ")


def of_words() -> Tensors:
    return {
        "x.qweight": torch.zeros(8, 24, dtype=torch.int32),
        "x.qzeros": torch.zeros(2, 3, dtype=torch.int32),
        "x.scales": torch.ones(2, 24).half(),
        "x.g_idx": torch.zeros(64, dtype=torch.int32),
    }


WORDS: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "bits": ({}, {"bits": 5}, "expected bits of 2 or 3 or 4 or 8, got 5"),
    "bits as text": ({}, {"bits": "4"}, "expected bits of 2 or 3 or 4 or 8, got '4'"),
    "a truth": ({}, {"bits": True}, "expected bits of 2 or 3 or 4 or 8, got True"),
    "no group": ({}, {"group_size": 0}, "expected a group_size from 1 to 9999999, or -1, got 0"),
    "a group without end": ({}, {"group_size": 10**7}, "expected a group_size from 1 to 9999999, or -1, got 10000000"),
    "marlin": ({}, {"checkpoint_format": "marlin"}, "expected the format gptq or gptq_v2, got 'marlin'"),
    "a packing": ({}, {"pack_dtype": "int8"}, "expected pack_dtype int32, got 'int8'"),
    "by modules": ({}, {"dynamic": {"+:x": {"bits": 8}}}, "dynamic has other settings for some modules"),
    "gemv": ({}, {"quant_method": "awq", "version": "GEMV"}, "expected the format gemm, got 'gemv'"),
    "awq of 8": ({}, {"quant_method": "awq", "bits": 8}, "expected bits of 4, got 8"),
    "zeros": ({"x.qzeros": torch.zeros(2, 4, dtype=torch.int32)}, {}, "expected x.qzeros to be torch.int32 [2, 3]"),
    "scales": ({"x.scales": torch.ones(2, 24, dtype=torch.int32)}, {}, "a matrix scales of float16, bfloat16 or float32"),
    "groups": ({"x.g_idx": torch.zeros(63, dtype=torch.int32)}, {}, "expected x.g_idx to be torch.int32 [64]"),
    "parts of integers": ({"x.qweight": torch.zeros(7, 24, dtype=torch.int32)}, {"bits": 3}, "rows of qweight that hold whole integers of 3 bits"),
    "one left": ({"y.qzeros": torch.zeros(2, 3, dtype=torch.int32)}, {}, "y.qzeros: belongs to no quantised weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_words_that_do_not_fit_are_refused(name: str) -> None:
    tensors, settings, message = WORDS[name]
    usual = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    assert read(of_words(), **usual)[0].shape == (24, 64)
    with pytest.raises(LoraFxError) as caught:
        read({**of_words(), **tensors}, **{**usual, **settings})
    assert message in str(caught.value)


def test_a_config_that_says_quantised_of_dense_files_is_refused() -> None:
    with pytest.raises(LoraFxError, match="quant_method is bitsandbytes, and no tensor is quantised so"):
        read({"x.weight": torch.ones(3, 4)})


def _another_table(tensors: Tensors) -> str:
    key = "model.layers.0.mlp.up_proj.weight.quant_map"
    tensors[key][3] += 1
    return f"{key}: expected the table of nf4, got \\[-1.0, -0.6962, -0.5251, 0.6051, "


def _another_matrix(tensors: Tensors) -> str:
    for key in [key for key in tensors if ".mlp.up_proj." in key]:
        tensors[key.replace("mlp.up_proj", "mlp.down_proj")] = tensors[key].clone()
    return r"down_proj.weight: expected \[64, 192\] as in the model, got \[192, 64\]"


def _an_infinity(tensors: Tensors) -> str:
    tensors["model.layers.0.mlp.up_proj.weight.nested_absmax"][0] = torch.inf
    return r"folding makes 'model.layers.0.mlp.up_proj.weight' non-finite in \d+ elements"


@pytest.mark.parametrize("damage", [_another_table, _another_matrix, _an_infinity])
def test_a_damaged_checkpoint_is_refused_and_nothing_is_left(
    one: Trained, tmp_path: Path, damage: Callable[[Tensors], str]
) -> None:
    base = shutil.copytree(one.root / "4bit", tmp_path / "base")
    tensors = tensors_of(base)
    message = damage(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(FoldError, match=message):
        fold(base, one.root / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
