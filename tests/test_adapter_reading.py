"""Every way in which an adapter directory can be wrong is an error of its own, and the graph stays as it was."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import set_factors, unchanged
from safetensors.torch import load_file, save_file

import lora_fx

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

QUERY = "encoder.layer.0.attention.self.query"
KEY = f"base_model.model.{QUERY}"


def bert(seed: int = 0) -> transformers.BertModel:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
    )
    return transformers.BertModel(config).eval()


@pytest.fixture(scope="module")
def base() -> lora_fx.TracedGraphModule:
    return lora_fx.trace(bert())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An adapter of PEFT's, of rank 3 at the queries and values."""
    wrapped = peft.get_peft_model(bert(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "value"]))
    set_factors(wrapped)
    wrapped.save_pretrained(str(tmp_path))
    return tmp_path


Tensors = dict[str, torch.Tensor]


def with_tensors(directory: Path, change: Callable[[Tensors], None]) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def with_config(directory: Path, **said: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))


def with_header(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "adapter_model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + length :])


def refused(graph: lora_fx.TracedGraphModule, directory: Path, *messages: str) -> None:
    with unchanged(graph), pytest.raises(lora_fx.AdapterError) as caught:
        lora_fx.load_adapter(graph, directory)
    assert str(directory) in str(caught.value)
    for message in messages:
        assert message in str(caught.value), str(caught.value)


TENSORS: dict[str, tuple[Callable[[Tensors], Any], tuple[str, ...]]] = {
    "missing": (
        lambda t: [t.pop(f"{KEY}.lora_A.weight"), t.pop(f"{KEY}.lora_B.weight")],
        (
            f"{KEY}.lora_A.weight: missing in adapter_model.safetensors: adapter_config.json selects '{QUERY}'",
            f"{KEY}.lora_B.weight: missing in adapter_model.safetensors",
        ),
    ),
    "of a site that is not selected": (
        lambda t: t.update({"base_model.model.encoder.layer.0.attention.self.key.lora_A.weight": torch.ones(3, 24)}),
        ("adapter_config.json does not select 'encoder.layer.0.attention.self.key'",),
    ),
    "of a site that the graph has not": (
        lambda t: t.update({"base_model.model.encoder.layer.9.attention.self.query.lora_A.weight": torch.ones(3, 24)}),
        (
            "the graph has no call site 'encoder.layer.9.attention.self.query' (did you mean 'encoder.layer.1.attention.self.query' or",
        ),
    ),
    "of no parameter": (
        lambda t: t.update({"base_model.model.nothing.weight": torch.ones(3)}),
        ("base_model.model.nothing.weight: the model has no such parameter",),
    ),
    "without the prefix": (
        lambda t: t.update({"other.lora_A.weight": torch.ones(3)}),
        ("other.lora_A.weight: expected a key that begins with base_model.model.",),
    ),
    "a magnitude": (
        lambda t: t.update({f"{KEY}.lora_magnitude_vector": torch.ones(24)}),
        (f"{KEY}.lora_magnitude_vector: magnitudes of DoRA, and adapter_config.json does not say use_dora",),
    ),
    "a bias of B": (
        lambda t: t.update({f"{KEY}.lora_B.bias": torch.ones(24)}),
        (f"{KEY}.lora_B.bias: a bias of a factor, and adapter_config.json does not say lora_bias",),
    ),
    "of another shape": (
        lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4, 24)}),
        (f"{KEY}.lora_A.weight: expected shape (3, 24), rank 3 at {QUERY}, of 24 and 24 features, got (4, 24)",),
    ),
    "integers": (
        lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(3, 24, dtype=torch.int32)}),
        (f"{KEY}.lora_A.weight: expected torch.float32, or what converts to it exactly, found torch.int32",),
    ),
    "of double precision": (
        lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(3, 24, dtype=torch.float64)}),
        ("expected torch.float32, or what converts to it exactly, found torch.float64",),
    ),
    "not finite": (
        lambda t: t[f"{KEY}.lora_B.weight"].__setitem__((slice(1, 3), 0), torch.nan),
        (f"{KEY}.lora_B.weight: expected finite numbers, found 2 of 72 that are not",),
    ),
    "a weight of the base, changed": (
        lambda t: t.update({"base_model.model.pooler.dense.weight": torch.ones(24, 24)}),
        (
            "another value than the model's 'pooler.dense.weight' (torch.float32 (24, 24))",
            "add its module to modules_to_save",
        ),
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_named(base: lora_fx.TracedGraphModule, directory: Path, case: str) -> None:
    change, messages = TENSORS[case]
    with_tensors(directory, change)
    refused(base, directory, *messages)


def test_half_precision_is_taken_exactly_and_an_equal_base_weight_is_ignored(
    base: lora_fx.TracedGraphModule, directory: Path
) -> None:
    def change(tensors: Tensors) -> None:
        tensors.update({key: value.bfloat16() for key, value in tensors.items()})
        tensors[f"{KEY}.base_layer.weight"] = base.get_parameter(f"{QUERY}.weight").detach().clone()

    with_tensors(directory, change)
    loaded = lora_fx.load_adapter(base, directory).get_parameter(f"{QUERY}.lora_A.default.weight")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.bfloat16(), load_file(directory / "adapter_model.safetensors")[f"{KEY}.lora_A.weight"])


CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "another kind": ({"peft_type": "IA3"}, ("peft_type: expected 'LORA', found 'IA3'",)),
    "no kind": ({"peft_type": None}, ("peft_type: expected 'LORA'", "found no such key")),
    "other modules": (
        {"target_modules": ["key", "value"]},
        (
            "base_model.model.encoder.layer.1.attention.self.key.lora_A.weight: missing",
            f"{KEY}.lora_A.weight: adapter_config.json does not select '{QUERY}'",
        ),
    ),
    "fewer layers": (
        {"layers_to_transform": [1]},
        (f"{KEY}.lora_A.weight: adapter_config.json does not select '{QUERY}'",),
    ),
    "excluded": ({"exclude_modules": ".*layer.0.*"}, (f"adapter_config.json does not select '{QUERY}'",)),
    "another rank": ({"rank_pattern": {"layer.1.attention.self.query": 7}}, ("expected shape (7, 24)",)),
    "no module at all": ({"target_modules": ["nothing"]}, (f"does not select '{QUERY}'",)),
    "DoRA": ({"use_dora": True}, (f"{KEY}.lora_magnitude_vector: missing in adapter_model.safetensors",)),
    "aLoRA": ({"alora_invocation_tokens": [1, -2]}, ("alora_invocation_tokens: expected a list of integers ≥ 0, found [1, -2]",)),
    "lora_bias": ({"lora_bias": True}, (f"{KEY}.lora_B.bias: missing in adapter_model.safetensors",)),
    "replication": ({"layer_replication": [[0, 1]]}, ("layer_replication: expected a graph with the layers [[0, 1]]",)),
    "QA-LoRA": ({"use_qalora": True}, ("QA-LoRA is not supported",)),
    "of the future": (
        {"use_wonder": {"a": 1}, "r": 0},
        ("use_wonder: unknown key, on which the result may depend: found {'a': 1}", "r: expected an integer ≥ 1, found 0"),
    ),
    "a bad number": ({"lora_alpha": float("nan")}, ("lora_alpha: expected a finite number, found nan",)),
    "a bad pattern": ({"target_modules": "("}, ("target_modules: expected a regular expression or a list of names",)),
    "a slow pattern": ({"target_modules": "(?:.|..|...)+[0-8][0-9]{2}"}, ("took more than 0.1 s to match",)),
    "a module that is not there": (
        {"modules_to_save": ["pooler"]},
        ("base_model.model.pooler.dense.weight: missing in adapter_model.safetensors: adapter_config.json says modules_to_save",),
    ),
    "biases that are not there": ({"bias": "all"}, ("adapter_config.json says bias='all'",)),
    **{
        init: ({"init_lora_weights": init}, (f"{name} changed the base weights when the adapter was made",))
        for init, name in {
            "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA",
        }.items()
    },
    "another start": ({"init_lora_weights": "wild"}, ("init_lora_weights: expected true, false or one of 'gaussian'",)),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_cannot_be_followed_are_named(base: lora_fx.TracedGraphModule, directory: Path, case: str) -> None:
    said, messages = CONFIGS[case]
    with_config(directory, **said)
    refused(base, directory, *messages)


def test_options_that_are_not_known_are_no_matter_where_they_are_off(
    base: lora_fx.TracedGraphModule, directory: Path
) -> None:
    with_config(directory, use_wonder=False, wonder_config=None, init_lora_weights="eva", eva_config={"rho": 2.0})
    assert lora_fx.load_adapter(base, directory).get_parameter(f"{QUERY}.lora_A.default.weight").shape == (3, 24)


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "beyond the end": (lambda h: h[f"{KEY}.lora_A.weight"].update(data_offsets=[0, 10**12]), "adapter_model.safetensors"),
    "another size": (lambda h: h[f"{KEY}.lora_A.weight"].update(shape=[3, 25]), "adapter_model.safetensors"),
    "a shape that wraps around": (lambda h: h[f"{KEY}.lora_A.weight"].update(shape=[2**62, 2**62]), "adapter_model.safetensors"),
    "another dtype": (lambda h: h[f"{KEY}.lora_A.weight"].update(dtype="F64"), "adapter_model.safetensors"),
    "no dtype": (lambda h: h[f"{KEY}.lora_A.weight"].update(dtype="F7"), "adapter_model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(base: lora_fx.TracedGraphModule, directory: Path, case: str) -> None:
    change, message = HEADERS[case]
    with_header(directory, change)
    refused(base, directory, message)


@pytest.mark.parametrize("kept", [0, 5, 8, 400, -1], ids=str)
def test_a_truncated_file_is_refused(base: lora_fx.TracedGraphModule, directory: Path, kept: int) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(base, directory, "adapter_model.safetensors")


def test_what_is_not_there_is_named(base: lora_fx.TracedGraphModule, directory: Path, tmp_path: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "moved")
    refused(base, directory, "expected adapter_model.safetensors or adapter_model.bin, neither of which is there")
    (directory / "adapter_config.json").write_text("[")
    refused(base, directory, "expected JSON")
    (directory / "adapter_config.json").write_text("[]")
    refused(base, directory, "expected an object, found []")
    (directory / "adapter_config.json").write_text("[" * 100_000)
    refused(base, directory, "expected JSON")
    (directory / "inner").mkdir()
    (directory / "adapter_config.json").rename(directory / "inner" / "adapter_config.json")
    refused(base, directory, "expected adapter_config.json, found it in inner: give one of these directories")
    refused(base, tmp_path / "nowhere", "expected a PEFT adapter, with adapter_config.json: No such file or directory")


def test_another_base_is_refused_or_told(base: lora_fx.TracedGraphModule, tmp_path: Path) -> None:
    branched = lora_fx.rewrite(base, "bert", rank=3)
    lora_fx.save_adapter(branched, tmp_path / "a")
    other = bert()
    with torch.no_grad():
        other.pooler.dense.bias.add_(1)
    wider = transformers.BertModel(transformers.BertConfig(**{**bert().config.to_dict(), "type_vocab_size": 3}))
    for name, model, telling in (
        ("values", other, "pooler.dense.bias: other values"),
        ("shape", wider, "embeddings.token_type_embeddings.weight: was float32 2x24, is float32 3x24"),
        ("dtype", bert().bfloat16(), "embeddings.LayerNorm.bias: was float32 24, is bfloat16 24"),
    ):
        graph = lora_fx.trace(model, inference=True)
        refused(graph, tmp_path / "a", "the adapter was trained on another base", telling)
        with pytest.warns(UserWarning, match="trained on another base") as caught:
            loaded = lora_fx.load_adapter(graph, tmp_path / "a", strict=False)
        assert telling in str(caught[0].message), name
        assert lora_fx.unload(loaded).state_dict().keys() == graph.state_dict().keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_fx.load_adapter(base, tmp_path / "a")


def test_an_adapter_is_only_filled_with_one_like_it(base: lora_fx.TracedGraphModule, directory: Path) -> None:
    other = lora_fx.rewrite(base, "bert", rank=4, alpha=5)
    refused_by = "query: rank 4, scale 1.25, dropout 0.1 against rank 3, scale 1.66667, dropout 0.1"
    with unchanged(other), pytest.raises(lora_fx.AdapterError, match=refused_by):
        lora_fx.load_adapter(other, directory)
    beside = lora_fx.load_adapter(other, directory, "second")
    assert beside.get_parameter(f"{QUERY}.lora_A.second.weight").shape == (3, 24)
    alike = lora_fx.rewrite(base, "bert", rank=3, alpha=5, dropout=0.3)
    filled = lora_fx.load_adapter(alike, directory)
    assert [node.format_node() for node in filled.graph.nodes] == [node.format_node() for node in alike.graph.nodes]
    assert filled.training is alike.training
