"""One ONNX file with slots, and adapters of every kind in files: each computes what its folded graph and PEFT compute."""

from __future__ import annotations

import copy
import functools
import json
import re
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import architectures
import families
import numpy as np
import onnx
import onnxruntime
import peft
import pytest
import safetensors.torch
import torch
from conftest import all_acting, limited, set_factors, unchanged
from slotted import (
    LINEAR,
    SITES,
    Small,
    adapted,
    base,
    batch,
    expected,
    exported,
    near,
    parameters,
    quiet,
    write,
)
from torch import nn

import lora_fx
from lora_fx.errors import AdapterError, ExportError, LoraFxError, PlanError, VerifyError
from lora_fx.export import onnx_file as _onnx
from lora_fx.export.slot_table import KEY
from lora_fx.runtime import OnnxSession

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

NAMES = architectures.rows(("t5", "gpt2", "llama", "bert", "mixtral"), ("gpt2",))
ADAPTERS = ("two", "five", "mixed", "partial")
SIZES = ((1, 4, 2), (3, 11, 5), (1, 1, 1))


@dataclass(frozen=True)
class Served:
    """A model with slots, its base, and adapters in PEFT's directories and in files."""

    directory: Path
    session: OnnxSession
    base: onnxruntime.InferenceSession
    graphs: Mapping[str, lora_fx.TracedGraphModule]
    folded: Mapping[str, lora_fx.TracedGraphModule]
    wrapped: Mapping[str, Any]


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)
        served.cache_clear()


def config(name: str, adapter: str, model: nn.Module) -> peft.LoraConfig:
    known = architectures.ARCHITECTURES.get(name) or families.FAMILIES[name]
    targets = list(known.target_modules)
    options: dict[str, Any] = {"target_modules": targets, "fan_in_fan_out": known.fan_in_fan_out}
    match adapter:
        case "two":
            options |= {"r": 2, "lora_alpha": 3}
        case "five":
            options |= {"r": 5, "lora_alpha": 2, "use_rslora": True}
        case "mixed":
            options |= {"r": 3, "rank_pattern": {r".*\.1\..*": 6}, "alpha_pattern": {r".*\.0\..*": 5}}
        case "partial":
            modules = [n for n, _ in model.named_modules() if n.endswith(tuple(targets)) and ".1." in n]
            options |= {"r": 4, "target_modules": modules}
    return peft.LoraConfig(**options)


@functools.cache
def served(name: str, root: Path) -> Served:
    known: Any = architectures if name in architectures.ARCHITECTURES else families
    directory = root / name
    graphs, wrapped = {}, {}
    for seed, adapter in enumerate(ADAPTERS):
        wrapped[adapter] = peft.get_peft_model(
            copy.deepcopy(known.model(name)), config(name, adapter, known.model(name))
        )
        set_factors(wrapped[adapter], seed, scale=0.1)
        wrapped[adapter].save_pretrained(directory / adapter)
        graphs[adapter] = lora_fx.load_adapter(known.traced(name), directory / adapter, "tuned").eval()
        wrapped[adapter].eval()
    lora_fx.export.onnx(graphs["two"], directory / "slots.onnx", slots=True, verify=False)
    lora_fx.export.onnx(known.traced(name), directory / "base.onnx", verify=False)
    session = OnnxSession(directory / "slots.onnx")
    for adapter, graph in graphs.items():
        path = directory / f"{adapter}.onnx_adapter"
        lora_fx.export.onnx_adapter(graph, path, "tuned")
        session.load(adapter, path)
    plain = onnxruntime.InferenceSession(str(directory / "base.onnx"), providers=["CPUExecutionProvider"])
    folded = {adapter: lora_fx.fold(graph) for adapter, graph in graphs.items()}
    return Served(directory, session, plain, graphs, folded, wrapped)


def tensors(name: str, *size: int) -> dict[str, torch.Tensor]:
    known: Any = architectures if name in architectures.ARCHITECTURES else families
    made: dict[str, torch.Tensor] = known.inputs(name, *size)
    return made


def arrays(name: str, *size: int) -> dict[str, Any]:
    return {key: value.numpy() for key, value in tensors(name, *size).items()}


@pytest.mark.parametrize("name", NAMES)
def test_without_an_adapter_the_bits_are_those_of_the_base(name: str, root: Path) -> None:
    have = served(name, root)
    onnx.checker.check_model(str(have.directory / "slots.onnx"), full_check=True)
    for size in SIZES:
        found = have.session.run(arrays(name, *size))
        wanted = have.base.run(None, arrays(name, *size))
        assert [value.tobytes() for value in found.values()] == [value.tobytes() for value in wanted]
    assert [value.name for value in have.session.session.get_inputs()] == [v.name for v in have.base.get_inputs()]


@pytest.mark.parametrize("name", NAMES)
def test_adapters_one_after_another_equal_their_folded_graphs_and_peft(name: str, root: Path) -> None:
    have = served(name, root)
    constants = architectures.ARCHITECTURES[name].constants if name in architectures.ARCHITECTURES else {}
    for adapter in (*ADAPTERS, *reversed(ADAPTERS)):
        for size in SIZES:
            found = have.session.run(arrays(name, *size), adapter)
            with torch.no_grad():
                wanted = have.folded[adapter](**tensors(name, *size))
                theirs = have.wrapped[adapter](**tensors(name, *size), **constants)[0]
            for key, value in found.items():
                assert near(value, wanted[key]), (adapter, size, key)
            first = next(iter(found.values()))
            assert near(first, theirs), (adapter, size)
            assert not near(first, torch.from_numpy(have.base.run(None, arrays(name, *size))[0]), 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_four_threads_at_once_get_each_what_it_asked_for(name: str, root: Path) -> None:
    have = served(name, root)
    inputs = [arrays(name, *size) for size in SIZES]
    choices = ("two", "five", "mixed", None)
    alone = {choice: [have.session.run(each, choice) for each in inputs] for choice in choices}
    wrong: list[Any] = []
    start = threading.Barrier(4)

    def serve(offset: int) -> None:
        start.wait()
        for turn in range(24):
            choice, index = choices[(turn + offset) % 4], turn % len(inputs)
            found = have.session.run(inputs[index], choice)
            for key, value in alone[choice][index].items():
                if not np.array_equal(found[key], value):
                    wrong.append((offset, turn, choice, key))

    threads = [threading.Thread(target=serve, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not np.array_equal(*(next(iter(alone[choice][1].values())) for choice in ("two", "five")))


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_of_pefts_gives_the_bytes_that_the_graph_gives(name: str, root: Path, tmp_path: Path) -> None:
    have = served(name, root)
    for adapter in ADAPTERS:
        path = tmp_path / f"{adapter}.onnx_adapter"
        lora_fx.export.onnx_adapter_from_peft(have.directory / adapter, have.directory / "slots.onnx", path)
        assert path.read_bytes() == (have.directory / path.name).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_training_trace_and_one_for_inference_are_one_base(name: str, root: Path, tmp_path: Path) -> None:
    known: Any = architectures if name in architectures.ARCHITECTURES else families
    have = served(name, root)
    graph = lora_fx.from_adapter(known.model(name), have.directory / "two", "tuned", inference=name not in ("mixtral",))
    lora_fx.export.onnx_adapter(graph, tmp_path / "again", "tuned")
    assert (tmp_path / "again").read_bytes() == (have.directory / "two.onnx_adapter").read_bytes()


def test_a_slot_beside_every_linear_layer_keeps_the_bits_unless_onnxruntime_fuses_around_it(tmp_path: Path) -> None:
    """BERT's products with the GELU and the layer norms behind them: a limit of the promise above."""
    bert = lora_fx.trace(architectures.build("bert", layers=1), inference=True)
    graph = lora_fx.rewrite(bert, rules="all-linear", rank=2)
    lora_fx.export.onnx(graph, tmp_path / "slots.onnx", slots=True, verify=False)
    lora_fx.export.onnx(bert, tmp_path / "base.onnx", verify=False)
    found: dict[str, list[Any]] = {}
    for level in ("ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"):
        for name in ("slots", "base"):
            options = quiet()
            options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
            session = onnxruntime.InferenceSession(str(tmp_path / f"{name}.onnx"), options)
            found.setdefault(level, []).append(session.run(None, arrays("bert", 3, 11))[0])
    assert np.array_equal(*found["ORT_ENABLE_BASIC"])
    assert not np.array_equal(*found["ORT_ENABLE_ALL"])
    assert near(found["ORT_ENABLE_ALL"][0], torch.from_numpy(found["ORT_ENABLE_ALL"][1]))


# What is written.


def test_the_same_slots_and_adapters_are_the_same_bytes(tmp_path: Path) -> None:
    for place in ("a", "b"):
        with unchanged(graph := adapted()):
            lora_fx.export.onnx(graph, tmp_path / place / "slots.onnx", slots=True)
            report = lora_fx.export.onnx_adapter(graph, tmp_path / place / "adapter")
        assert str(report).startswith(f"{tmp_path / place / 'adapter'}: 3 slots, rank 3, for the base ")
    for name in ("slots.onnx", "adapter"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_order_in_which_rules_choose_does_not_change_the_bytes(tmp_path: Path) -> None:
    for place, rules in enumerate([{"target": [site], "rank": 2} for site in sites] for sites in (SITES, SITES[::-1])):
        graph = adapted({"select": rules})
        lora_fx.export.onnx_adapter(graph, tmp_path / f"{place}")
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()


def test_slots_are_optional_inputs_with_the_promised_names_shapes_and_defaults(tmp_path: Path) -> None:
    model = onnx.load(exported(tmp_path / "slots.onnx"))
    inputs = {value.name: value for value in model.graph.input}
    defaults = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    widths = {"first": (7, 11), "twice": (11, 11), "last": (11, 5)}
    assert list(inputs) == [
        "x",
        *(f"{s}.{end}" for s in SITES for end in ("lora_A.weight", "lora_B.weight", "scaling")),
    ]
    for site, (narrow, high) in widths.items():
        dims = [
            [dim.dim_param or dim.dim_value for dim in inputs[f"{site}.{end}"].type.tensor_type.shape.dim]
            for end in ("lora_A.weight", "lora_B.weight", "scaling")
        ]
        assert dims == [[f"{site}.rank", narrow], [high, f"{site}.rank"], [1]]
        assert defaults[f"{site}.lora_A.weight"].shape == (0, narrow)
        assert defaults[f"{site}.lora_B.weight"].shape == (high, 0)
        assert defaults[f"{site}.scaling"].tolist() == [1.0]
    said = json.loads({entry.key: entry.value for entry in model.metadata_props}[KEY])
    assert [(slot["site"], slot["in_features"], slot["out_features"]) for slot in said["slots"]] == [
        (site, *widths[site]) for site in SITES
    ]
    assert said["format"] == 1
    assert 0 < said["model_version"] < 2**31
    assert list(said["base"]) == list(base().state_dict())


def test_an_adapter_that_is_written_by_hand_may_leave_the_scaling_out(tmp_path: Path) -> None:
    """By onnxruntime alone, which does not ask."""
    graph = adapted({"select": [{"target": ["first"], "rank": 2, "alpha": 2}]})
    lora_fx.export.onnx_adapter(graph, tmp_path / "whole")
    values = parameters(tmp_path / "whole")
    del values["first.scaling"]
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(write(tmp_path / "adapter", values, 0)))
    session = onnxruntime.InferenceSession(str(exported(tmp_path / "slots.onnx")), quiet())
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    assert near(session.run(None, batch(), options)[0], expected(graph))


def test_weights_beside_the_model_keep_the_slots(tmp_path: Path) -> None:
    with mock.patch.object(_onnx, "MAX_INLINE_BYTES", 300):
        lora_fx.export.onnx(adapted(), tmp_path / "slots.onnx", slots=True)
    assert len(list(tmp_path.glob("*.data"))) == 1
    session = OnnxSession(tmp_path / "slots.onnx")
    lora_fx.export.onnx_adapter(adapted(), tmp_path / "adapter")
    session.load("a", tmp_path / "adapter")
    assert near(session.run(batch(), "a")["y"], expected(adapted()))
    assert near(session.run(batch())["y"], expected(base()))


def test_slots_that_are_mixed_up_are_found_before_the_file_is_in_its_place(tmp_path: Path) -> None:
    """The model is compared with an adapter in every slot, too."""
    original = _onnx._Onnx.write
    pair = ("twice.lora_A.weight", "last.lora_A.weight")
    swap = dict(zip(pair, pair[::-1], strict=True))

    def mixed_up(self: Any, exportable: Any, path: Path) -> None:
        original(self, exportable, path)
        model = onnx.load(path)
        for node in model.graph.node:
            node.input[:] = [swap.get(name, name) for name in node.input]
        onnx.save(model, path)

    with (
        mock.patch.object(_onnx._Onnx, "write", mixed_up),
        pytest.raises(VerifyError, match="differs from the graph"),
    ):
        lora_fx.export.onnx(adapted(), tmp_path / "slots.onnx", slots=True)
    assert list(tmp_path.iterdir()) == []


# Adapters of every kind.


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> OnnxSession:
    return OnnxSession(exported(tmp_path_factory.mktemp("small") / "slots.onnx"))


def runs(session: OnnxSession, path: Path) -> Any:
    """Return what the small model computes with an adapter file."""
    session.load(str(path), path)
    return session.run(batch(), str(path))["y"]


@pytest.mark.parametrize(
    "rules",
    [
        {"select": [{"op": ["linear"], "rank": 2, "alpha": 5, "scaling": "rslora"}]},
        {"select": [{"target": ["first"], "rank": 5}, {"target": ["last"], "rank": 1, "alpha": 7}]},
        {"select": [{"op": ["linear"], "rank": 3, "dropout": 0.5}]},
    ],
    ids=["rslora", "other ranks at some sites", "dropout"],
)
def test_scalings_and_ranks_are_those_of_the_graph(session: OnnxSession, rules: Any, tmp_path: Path) -> None:
    graph = adapted(rules)
    lora_fx.export.onnx_adapter(graph, tmp_path / "adapter")
    assert near(runs(session, tmp_path / "adapter"), expected(graph))


def test_a_fused_graph_gives_the_bytes_of_the_branched_one(tmp_path: Path) -> None:
    for name, graph in (("branched", adapted()), ("fused", lora_fx.fuse(adapted()))):
        lora_fx.export.onnx(graph, tmp_path / name, slots=True, verify=False)
        lora_fx.export.onnx_adapter(graph, tmp_path / f"{name}.adapter")
    assert (tmp_path / "branched").read_bytes() == (tmp_path / "fused").read_bytes()
    assert (tmp_path / "branched.adapter").read_bytes() == (tmp_path / "fused.adapter").read_bytes()


def two(rules: Any = None) -> lora_fx.TracedGraphModule:
    """Return a graph with two adapters."""
    other = rules or {"select": [{"target": ["first", "twice"], "rank": 2, "alpha": 3}]}
    graph = lora_fx.rewrite(adapted(), other, adapter="second")
    set_factors(graph, 5)
    return all_acting(graph)


def test_several_adapters_at_strengths_become_one(session: OnnxSession, tmp_path: Path) -> None:
    graph = two()
    for index, strengths in enumerate(
        ({"default": 1.0, "second": 0.5}, {"second": -2.0}, {"default": 1.0, "second": 1})
    ):
        report = lora_fx.export.onnx_adapter(graph, tmp_path / f"{index}", strengths)
        assert near(runs(session, tmp_path / f"{index}"), expected(lora_fx.activate(graph, strengths)))
    assert dict(report.ranks) == {"first": 5, "last": 3, "twice": 5}
    lora_fx.export.onnx_adapter(lora_fx.activate(graph, {"second": 0.25}), tmp_path / "active", "second")
    assert near(runs(session, tmp_path / "active"), expected(lora_fx.activate(graph, {"second": 0.25})))


def test_directories_at_strengths_become_one(session: OnnxSession, tmp_path: Path) -> None:
    graph = two()
    for name in ("default", "second"):
        lora_fx.save_adapter(graph, tmp_path / name, name)
    exported(tmp_path / "slots.onnx")
    pairs = [(tmp_path / "default", 0.75), (tmp_path / "second", 2.0)]
    lora_fx.export.onnx_adapter_from_peft(pairs, tmp_path / "slots.onnx", tmp_path / "both")
    lora_fx.export.onnx_adapter(graph, tmp_path / "same", {"default": 0.75, "second": 2.0})
    assert near(runs(session, tmp_path / "both"), expected(lora_fx.activate(graph, {"default": 0.75, "second": 2.0})))
    assert (tmp_path / "both").read_bytes() == (tmp_path / "same").read_bytes()


def test_a_model_of_two_adapters_has_the_slots_of_both(tmp_path: Path) -> None:
    first = lora_fx.rewrite(base(), {"select": [{"target": ["first"], "rank": 2}]}, adapter="one")
    both = lora_fx.rewrite(first, {"select": [{"target": ["last"], "rank": 2}]}, adapter="two")
    lora_fx.export.onnx(both, tmp_path / "slots.onnx", slots=True, verify=False)
    assert [slot.site for slot in OnnxSession(tmp_path / "slots.onnx").slots.slots] == ["first", "last"]


@pytest.mark.parametrize("name", architectures.rows(("gpt2", "bloom"), ("bloom",)))
def test_branches_for_parts_of_a_projection_fill_one_slot(name: str, tmp_path: Path) -> None:
    """Query in the first rows and value in the last; or both in turns, head by head. In either layout of the weight."""
    rules = {"select": [{"role": ["attention.query"], "features": ["query", "value"], "rank": 3, "alpha": 5}]}
    graph = lora_fx.rewrite(architectures.traced(name), rules)
    set_factors(graph)
    lora_fx.export.onnx(graph, tmp_path / "slots.onnx", slots=True, verify=False)
    report = lora_fx.export.onnx_adapter(graph, tmp_path / "adapter")
    lora_fx.save_adapter(graph, tmp_path / "peft")
    lora_fx.export.onnx_adapter_from_peft(tmp_path / "peft", tmp_path / "slots.onnx", tmp_path / "again")
    assert set(report.ranks.values()) == {6}
    assert (tmp_path / "again").read_bytes() == (tmp_path / "adapter").read_bytes()
    session = OnnxSession(tmp_path / "slots.onnx")
    session.load("a", tmp_path / "adapter")
    found = next(iter(session.run(arrays(name, 3, 11), "a").values()))
    with torch.no_grad():
        wanted = next(iter(lora_fx.fold(graph).eval()(**tensors(name, 3, 11)).values()))
    assert near(found, wanted)


def test_calls_with_branches_of_their_own_have_slots_of_their_own(tmp_path: Path) -> None:
    rules = {"select": [{"target": ["twice"], "rank": 2, "calls": "each"}]}
    graph = adapted(rules)
    session = OnnxSession(exported(tmp_path / "slots.onnx", rules))
    lora_fx.export.onnx_adapter(graph, tmp_path / "adapter")
    session.load("a", tmp_path / "adapter")
    assert [slot.site for slot in session.slots.slots] == ["twice@1", "twice@2"]
    assert near(session.run(batch(), "a")["y"], expected(graph))
    lora_fx.save_adapter(adapted({"select": [{"target": ["twice"], "rank": 2}]}), tmp_path / "peft")
    with pytest.raises(AdapterError, match="twice@1: each call of twice has a slot of its own"):
        lora_fx.export.onnx_adapter_from_peft(tmp_path / "peft", tmp_path / "slots.onnx", tmp_path / "out")


class Product(nn.Module):
    """A parameter in the layout that PEFT mistakes."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weights


class Bare(nn.Module):
    """A parameter after a module whose name says nothing good."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(7, 6))
        self.own, self.name = Product(), name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(self.get_submodule(self.name)(x))


@pytest.mark.parametrize(
    "name",
    architectures.few(
        ["<script>alert(1)</script>", "a & b", "größe", "x" * 300], ("<script>alert(1)</script>", "x" * 300)
    ),
)
def test_names_are_names_whatever_they_say(name: str, tmp_path: Path) -> None:
    graph = lora_fx.rewrite(lora_fx.trace(Bare(name), (torch.randn(3, 7),), inference=True), LINEAR)
    set_factors(graph)
    lora_fx.export.onnx(graph, tmp_path / "slots.onnx", slots=True)
    lora_fx.export.onnx_adapter(graph, tmp_path / "adapter")
    lora_fx.save_adapter(graph, tmp_path / "peft")
    lora_fx.export.onnx_adapter_from_peft(tmp_path / "peft", tmp_path / "slots.onnx", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "adapter").read_bytes()
    session = OnnxSession(tmp_path / "slots.onnx")
    session.load("a", tmp_path / "adapter")
    with torch.no_grad():
        wanted = lora_fx.fold(graph)(torch.from_numpy(batch()["x"]))
    assert near(session.run(batch(), "a")["output"], wanted)
    assert session.slots.slots[0].site == name


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_layer_as_narrow_as_a_rank_has_a_slot_of_its_width(width: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(7, width), nn.Linear(width, 4))
    graph = lora_fx.rewrite(
        lora_fx.trace(model, (torch.randn(3, 7),), inference=True), {"select": [{"op": ["linear"], "rank": 1}]}
    )
    graph = lora_fx.rewrite(graph, {"select": [{"target": ["0"], "rank": 1}]}, adapter="narrow")
    set_factors(graph)
    lora_fx.export.onnx(graph, tmp_path / "slots.onnx", slots=True)
    lora_fx.export.onnx_adapter(graph, tmp_path / "adapter", "narrow")
    session = OnnxSession(tmp_path / "slots.onnx")
    session.load("a", tmp_path / "adapter")
    with torch.no_grad():
        wanted = lora_fx.fold(graph, {"narrow": 1.0})(torch.from_numpy(batch()["x"]))
    assert near(session.run({"input": batch()["x"]}, "a")["output"], wanted)


# What is refused.


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.narrow, self.head = nn.Embedding(9, 8), nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.narrow(self.table(ids).transpose(1, 2)).transpose(1, 2))


@functools.cache
def kinds(half: bool = False) -> lora_fx.TracedGraphModule:
    model = Kinds().to(torch.bfloat16) if half else Kinds()
    return lora_fx.trace(model, (torch.randint(0, 9, (2, 5)),), inference=True)


@pytest.mark.parametrize(
    ("select", "said"),
    [
        ([{"target": ["table"], "op": ["embedding"]}], "table is embedding. Fold adapters of such sites"),
        ([{"target": ["narrow"], "op": ["conv1d"]}], "narrow is conv1d. Fold"),
        (
            [{"target": ["head"]}, {"target": ["narrow"], "trainable": "all"}],
            "trained copy of 'narrow.weight', as of modules_to_save",
        ),
    ],
    ids=["embedding", "convolution", "trained copies"],
)
def test_what_no_slot_takes_is_refused_with_the_reason(select: Any, said: str, tmp_path: Path) -> None:
    graph = lora_fx.rewrite(kinds(), {"defaults": {"rank": 2}, "select": select})
    for write_out in (
        lambda: lora_fx.export.onnx(graph, tmp_path / "slots.onnx", slots=True),
        lambda: lora_fx.export.onnx_adapter(graph, tmp_path / "adapter"),
    ):
        with pytest.raises(ExportError, match=said):
            write_out()
    assert list(tmp_path.iterdir()) == []


def test_half_precision_is_refused_with_what_to_do(tmp_path: Path) -> None:
    graph = lora_fx.rewrite(kinds(half=True), {"select": [{"target": ["head"], "rank": 2}]})
    with pytest.raises(ExportError, match=r"head computes in torch.bfloat16. Convert the model \(model.float\(\)"):
        lora_fx.export.onnx(graph, tmp_path / "slots.onnx", slots=True)
    with pytest.raises(ExportError, match=r"head computes in torch.bfloat16"):
        lora_fx.export.onnx_adapter(graph, tmp_path / "adapter")


def test_a_graph_without_branches_has_no_slots(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the graph has no branches"):
        lora_fx.export.onnx(base(), tmp_path / "slots.onnx", slots=True)
    with pytest.raises(PlanError, match="expected a graph of lora_fx"):
        lora_fx.export.onnx(Small(), tmp_path / "slots.onnx", slots=True)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="has no adapter 'other'"):
        lora_fx.export.onnx_adapter(adapted(), tmp_path / "adapter", "other")
    with pytest.raises(ExportError, match="expected at least one adapter"):
        lora_fx.export.onnx_adapter(adapted(), tmp_path / "adapter", {})


def test_one_branch_for_all_calls_and_one_for_each_are_not_both(tmp_path: Path) -> None:
    each = {"select": [{"target": ["twice"], "rank": 2, "calls": "each"}]}
    graph = lora_fx.rewrite(adapted(), each, adapter="each")
    with pytest.raises(
        ExportError, match="one adapter has one branch for all calls of twice, another has one per call"
    ):
        lora_fx.export.onnx(graph, tmp_path / "slots.onnx", slots=True)


class Taken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(7, 5)
        self.head.scaling = nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) * self.head.scaling


def test_a_name_that_a_slot_would_have_is_not_taken_twice(tmp_path: Path) -> None:
    graph = lora_fx.rewrite(lora_fx.trace(Taken(), (torch.randn(3, 7),), inference=True), LINEAR)
    with pytest.raises(ExportError, match=r"'head.scaling', which is the name of an input of a slot. Rename it"):
        lora_fx.export.onnx(graph, tmp_path / "slots.onnx", slots=True)


def test_values_that_are_no_numbers_are_not_written(tmp_path: Path) -> None:
    graph = adapted()
    with torch.no_grad():
        graph.get_parameter("last.lora_B.default.weight")[2, 1] = torch.inf
    with pytest.raises(ExportError, match=r"last.lora_B.weight: expected finite numbers"):
        lora_fx.export.onnx_adapter(graph, tmp_path / "adapter")


def test_an_adapter_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "adapter"
    lora_fx.export.onnx_adapter(adapted(), path)
    before = path.read_bytes()
    with pytest.raises(LoraFxError, match="exists already"):
        lora_fx.export.onnx_adapter(adapted(), path)
    model = nn.Sequential(nn.Linear(200, 100))
    rules = {"select": [{"op": ["linear"], "rank": 60}]}
    wide = lora_fx.rewrite(lora_fx.trace(model, (torch.randn(3, 200),), inference=True), rules, adapter="wide")
    with limited(), pytest.raises(LoraFxError, match=r"cannot write .*: Failed to write"):
        lora_fx.export.onnx_adapter(wide, path, "wide", overwrite=True)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["adapter"]
    lora_fx.export.onnx_adapter(wide, path, "wide", overwrite=True)
    assert len(path.read_bytes()) > 60 * 300 * 4
    with pytest.raises(LoraFxError, match="is a directory"):
        lora_fx.export.onnx_adapter(adapted(), tmp_path / "new", overwrite=True)


# Directories of PEFT's that do not fit.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with slots at two of three sites."""
    rules = {"select": [{"target": ["first", "twice"], "rank": 2}]}
    return exported(tmp_path_factory.mktemp("two") / "slots.onnx", rules)


def changed(directory: Path, *, file: Any = None, **settings: Any) -> Path:
    """Write an adapter for two sites, with another config, and tensors that a function changed."""
    lora_fx.save_adapter(adapted({"select": [{"target": ["first", "twice"], "rank": 2}]}), directory)
    said = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(said | settings))
    if file is not None:
        values = safetensors.torch.load_file(directory / "adapter_model.safetensors")
        file(values)
        safetensors.torch.save_file(values, directory / "adapter_model.safetensors")
    return directory


A, B = "base_model.model.first.lora_A.weight", "base_model.model.first.lora_B.weight"


def without_b(values: dict[str, torch.Tensor]) -> None:
    del values[B]


def narrower(values: dict[str, torch.Tensor]) -> None:
    values[A] = values[A][:, :5].contiguous()


def doubled(values: dict[str, torch.Tensor]) -> None:
    values[A] = values[A].double()


def counted(values: dict[str, torch.Tensor]) -> None:
    values[A] = values[A].long()


def elsewhere(values: dict[str, torch.Tensor]) -> None:
    values["base_model.model.last.lora_A.weight"] = torch.ones(2, 11)


def resized(values: dict[str, torch.Tensor]) -> None:
    values["base_model.model.last.weight"] = torch.ones(6, 11)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"file": without_b}, "first.lora_B.weight: missing in adapter_model.safetensors"),
        ({"file": narrower}, "first.lora_A.weight: expected shape (2, 7), of 7 and 11 features, got (2, 5)"),
        (
            {"file": doubled},
            "first.lora_A.weight: expected float32, or a dtype that converts to it exactly, got torch.float64",
        ),
        ({"file": counted}, "first.lora_A.weight: expected float32"),
        (
            {"file": elsewhere},
            "last.lora_A.weight: the model has no slot for it. Export the model with rules that choose",
        ),
        ({"file": resized}, "last.weight: another value than the model's 'last.weight'"),
        ({"r": 3}, "first.lora_A.weight: expected shape (3, 7)"),
        ({"target_modules": ["first"]}, "twice.lora_A.weight: the model has no slot for it"),
        ({"use_dora": True}, "use_dora: DoRA has no slot. Fold the adapter (lora-fx fold), or train without"),
        ({"bias": "all"}, "bias: a bias that trains has no slot. Fold the adapter (lora-fx fold), or train without"),
        ({"modules_to_save": ["last"]}, "modules_to_save: a module that trains as a whole has no slot"),
        ({"trainable_token_indices": [0]}, "trainable_token_indices: rows of an embedding that train have no slot"),
        ({"lora_bias": True}, "lora_bias: a bias in B has no slot. Fold the adapter"),
    ],
    ids=lambda value: "",
)
def test_a_directory_that_does_not_fit_is_refused_with_the_reason(
    model: Path, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    directory = changed(tmp_path / "peft", **settings)
    with pytest.raises(AdapterError, match=re.escape(said)):
        lora_fx.export.onnx_adapter_from_peft(directory, model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_key_that_is_to_be_ignored_is_ignored_for_slots_too(model: Path, tmp_path: Path) -> None:
    directory = changed(tmp_path / "peft", some_future_mode="per_head")
    with pytest.raises(AdapterError, match="some_future_mode: unknown key, on which the result may depend"):
        lora_fx.export.onnx_adapter_from_peft(directory, model, tmp_path / "adapter")
    with pytest.warns(UserWarning, match="some_future_mode ignored"):
        lora_fx.export.onnx_adapter_from_peft(
            directory, model, tmp_path / "adapter", ignore_config_keys=["some_future_mode"]
        )
    assert (tmp_path / "adapter").is_file()


def test_all_problems_of_a_directory_are_told_at_once(model: Path, tmp_path: Path) -> None:
    def several(values: dict[str, torch.Tensor]) -> None:
        narrower(values)
        elsewhere(values)

    with pytest.raises(AdapterError) as caught:
        lora_fx.export.onnx_adapter_from_peft(changed(tmp_path / "peft", file=several), model, tmp_path / "adapter")
    assert len(caught.value.problems) == 2


def test_copies_of_the_models_own_tensors_and_narrower_factors_are_taken(model: Path, tmp_path: Path) -> None:
    def echoed(values: dict[str, torch.Tensor]) -> None:
        values["base_model.model.last.weight"] = base().get_parameter("last.weight").detach().clone()
        values[A] = values[A].bfloat16()

    lora_fx.export.onnx_adapter_from_peft(changed(tmp_path / "peft", file=echoed), model, tmp_path / "adapter")
    graph = lora_fx.load_adapter(base(), tmp_path / "peft", "tuned")
    session = OnnxSession(model)
    assert near(runs(session, tmp_path / "adapter"), expected(graph))


def test_an_adapter_of_another_base_is_refused_or_warned_of(model: Path, tmp_path: Path) -> None:
    rules = {"select": [{"target": ["first"], "rank": 2}]}
    lora_fx.save_adapter(adapted(rules, of=1), tmp_path / "peft")
    with pytest.raises(AdapterError, match="the adapter was trained on another base"):
        lora_fx.export.onnx_adapter_from_peft(tmp_path / "peft", model, tmp_path / "adapter")
    with pytest.warns(UserWarning, match="first.weight: other values"):
        lora_fx.export.onnx_adapter_from_peft(tmp_path / "peft", model, tmp_path / "adapter", strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert OnnxSession(model).load("a", tmp_path / "adapter") is None


def test_a_model_without_slots_is_refused(tmp_path: Path) -> None:
    lora_fx.export.onnx(base(), tmp_path / "plain.onnx", verify=False)
    (tmp_path / "text.onnx").write_text("no model")
    lora_fx.save_adapter(adapted(), tmp_path / "peft")
    for name, said in (
        ("plain.onnx", "has no slots for adapters. Export it with slots"),
        ("text.onnx", "is not an ONNX model"),
        ("none.onnx", "cannot read"),
    ):
        with pytest.raises(ExportError, match=said):
            lora_fx.export.onnx_adapter_from_peft(tmp_path / "peft", tmp_path / name, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "are malformed"),
        ("[]", "are malformed"),
        ('{"format": 1, "slots": [], "base": {}}', "are malformed"),
        ('{"format": 1, "slots": [{"site": 1}], "base": {}}', "are malformed"),
        ('{"format": 2}', "expected slots of format 1, got 2"),
        ("[" * 100_000, "are malformed"),
    ],
)
def test_metadata_of_strangers_are_read_with_care(model: Path, text: str, said: str, tmp_path: Path) -> None:
    changed_model = onnx.load(model)
    changed_model.metadata_props[0].value = text
    onnx.save(changed_model, tmp_path / "strange.onnx")
    with pytest.raises(ExportError, match=said):
        OnnxSession(tmp_path / "strange.onnx")
