"""FSDP2: two processes that hold half a graph each train, save, stop, go on and fold as one process does."""

from __future__ import annotations

import copy
import functools
import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import families
import pytest
import sharded
import torch
import transformers
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import DistributedType
from architectures import ARCHITECTURES, build, traced, without_dropout
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_fx

pytestmark = [pytest.mark.xdist_group("sharded"), pytest.mark.filterwarnings("ignore::FutureWarning")]

EXAMPLES = Path(__file__).parent.parent / "tools" / "examples"
SCRIPT = Path(__file__).parent / "sharded.py"
FIRST = ("refusals", "llama", "llama-files", "llama-pipelined", "llama-accelerated-True")
MORE = tuple(name for name in sharded.checks() if name not in FIRST)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Any]]]:
    """Return a function of a check, which returns the directory of the traces, and what each of two processes found."""

    @functools.cache
    def launched(checks: Collection[str]) -> Path:
        directory = tmp_path_factory.mktemp("sharded")
        graph = (
            lora_fx.rewrite(build("gpt2"), "gpt2", labels=True, rank=4, dropout=0.0, seed=0) if checks == MORE else None
        )
        torch.save(graph, directory / "trainer.graph")
        if "prefixed" in checks:
            torch.save(lora_fx.trace(build("llama"), prefix=True), directory / "prefixed.trace")
        for name in {check.partition("-")[0] for check in checks} - {"refusals", "trainer", "prefixed"}:
            trace = copy.deepcopy(traced(name)) if name in ARCHITECTURES else lora_fx.trace(families.build(name))
            torch.save(without_dropout(trace), directory / f"{name}.trace")
            if f"{name}-files" in checks:
                known = ARCHITECTURES if name in ARCHITECTURES else families.FAMILIES
                with torch.device("meta"):
                    empty = known[name].build()
                torch.save(without_dropout(lora_fx.trace(empty)), directory / f"{name}-meta.trace")
                weights = build(name) if name in ARCHITECTURES else families.build(name)
                weights.save_pretrained(directory / f"{name}-checkpoint")
                (directory / "other").mkdir(exist_ok=True)
                save_file({"weight": torch.ones(2, 3)}, directory / "other" / "model.safetensors")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
        # A process that waits for another forever would end here.
        done = subprocess.run([*launch, directory, *checks], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return directory

    def of(check: str) -> tuple[Path, list[Any]]:
        directory = launched(FIRST if check in FIRST else MORE)
        return directory, [json.loads((directory / f"{check}-{rank}.json").read_text()) for rank in range(2)]

    return of


def also(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.matrix) for name in names]


def whole(name: str, directory: Path, steps: int) -> tuple[lora_fx.TracedGraphModule, list[float]]:
    """Return a graph that one process trained, and its losses."""
    graph = sharded.graph_of(directory, name)
    return graph, sharded.train(name, graph, sharded.optimizer_of(graph), range(steps))


@pytest.mark.parametrize("name", ["llama", *also("llama-dora", "t5", "gpt2", "mixtral")])
def test_two_processes_that_hold_half_a_graph_each_train_stop_and_go_on_as_one_does(
    name: str, found: Callable[[str], tuple[Path, list[Any]]], tmp_path: Path
) -> None:
    directory, both = found(name)
    graph, losses = whole(name, directory, sharded.STEPS)
    assert losses[-1] < 0.97 * losses[0]
    for each in both:
        assert each["losses"] == pytest.approx(losses, abs=1e-6)
        assert 0.475 <= each["part"] <= 0.525
    lora_fx.save_adapter(graph, tmp_path / "one")
    parts = sharded.graph_of(directory, name)
    sharded.train_in_parts(name, parts, sharded.optimizer_of(parts), range(sharded.STEPS), 2)
    lora_fx.save_adapter(parts, tmp_path / "parts")
    mine, theirs = directory / f"{name}-sharded", tmp_path / "one"
    tensors, expected, of_parts = (
        load_file(folder / "adapter_model.safetensors") for folder in (mine, theirs, tmp_path / "parts")
    )
    assert list(tensors) == list(expected)
    # One process that takes the batch in the same parts has the same bits, but where gradients of one tensor come from several layers, as those
    # of T5's encoded inputs do: under FSDP's hooks these are summed in another order.
    for key, value in of_parts.items():
        assert torch.equal(tensors[key], value) or name == "t5", key
    # Adam divides by the size of a gradient, however small that is, and sums over a batch in one are rounded otherwise than in parts.
    for key, value in expected.items():
        assert torch.allclose(tensors[key], value, rtol=0, atol=2e-6), key
    for read in (
        lambda folder: (folder / "adapter_config.json").read_text(),
        lambda folder: safe_open(folder / "adapter_model.safetensors", "pt").metadata(),  # with digests of the base
    ):
        assert read(mine) == read(theirs)
    assert [each["folded"] for each in both] == [len(list(graph.parameters())), None]
    merged = torch.load(directory / f"{name}-merged.pt")
    for key, value in lora_fx.fold(lora_fx.load_adapter(graph, mine)).state_dict().items():
        assert torch.equal(merged[key], value), key


@pytest.mark.matrix
def test_prefixes_train_in_two_processes_that_hold_half_a_graph_each_as_in_one(
    found: Callable[[str], tuple[Path, list[Any]]],
) -> None:
    directory, both = found("prefixed")
    for positions in ("peft", "unchanged"):
        graph = sharded.prefixed_graph(directory, positions)
        losses = sharded.train("llama", graph, sharded.optimizer_of(graph), range(sharded.STEPS))
        assert losses[-1] < 0.97 * losses[0]
        for each in both:
            assert each[positions]["losses"] == pytest.approx(losses, abs=1e-6)
            assert 0.475 <= each[positions]["part"] <= 0.525


@pytest.mark.parametrize(
    ("name", "efficient", "units"),
    [
        ("llama", True, ["", "model.layers.0", "model.layers.1"]),
        *(
            pytest.param(name, efficient, units, marks=pytest.mark.matrix)
            for name, units in (
                ("llama", ["", "model.layers.0", "model.layers.1"]),
                ("t5", ["", *(f"{stack}.block.{n}" for stack in ("encoder", "decoder") for n in range(2))]),
                ("gpt2", ["", "transformer.h.0", "transformer.h.1"]),
                ("mixtral", ["", "model.layers.0", "model.layers.1", "model.layers.2"]),
            )
            for efficient in (False, True)
            if (name, efficient) != ("llama", True)
        ),
    ],
)
def test_what_accelerate_calls_for_fsdp_shards_a_nested_graph_by_its_layers(
    name: str, efficient: bool, units: list[str], found: Callable[[str], tuple[Path, list[Any]]], tmp_path: Path
) -> None:
    directory, both = found(f"{name}-accelerated-{efficient}")
    graph, losses = whole(name, directory, 3)
    for each in both:
        assert each["losses"] == pytest.approx(losses, abs=1e-6)
        assert 0.475 <= each["part"] <= 0.525
        assert each["units"] == units
    lora_fx.save_adapter(graph, tmp_path / "one")
    tensors, expected = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (directory / f"{name}-accelerated-{efficient}", tmp_path / "one")
    )
    for key, value in expected.items():
        assert torch.allclose(tensors[key], value, rtol=0, atol=1e-5), key


@pytest.mark.parametrize("name", ["llama", *also("t5", "gpt2", "mixtral")])
def test_a_graph_traced_on_meta_gets_its_parts_from_files_and_trains_with_the_bits_of_one_with_weights(
    name: str, found: Callable[[str], tuple[Path, list[Any]]]
) -> None:
    directory, both = found(f"{name}-files")
    for each in both:
        assert each["unlike"] == []
        mine, theirs = each["losses"]
        assert mine == theirs
        assert each["same sizes"]
        assert 0.475 <= each["part"] <= 0.525
        assert f"{directory / 'nowhere'} does not exist" in each["missing"]  # for one of the two
        assert each["other"].startswith(f"{directory / 'other'} does not fit the graph: ")
        assert each["other"].endswith(" is missing; 'weight' is unknown.") or " more." in each["other"]


@pytest.mark.parametrize("name", ["llama", *also("t5", "gpt2", "gemma3_text")])
def test_stages_of_a_pipeline_have_the_gradients_of_one_process(
    name: str, found: Callable[[str], tuple[Path, list[Any]]]
) -> None:
    _, both = found(f"{name}-pipelined")
    for schedule in ("ScheduleGPipe", "Schedule1F1B"):
        assert [each[schedule]["unlike"] for each in both] == [[], []]
        assert all(each[schedule]["gradients"] for each in both)
        assert sum(each[schedule]["gradients"] for each in both) == both[0]["all"]


@pytest.mark.matrix
def test_a_trainer_trains_a_sharded_graph_as_it_does_with_ddp_and_saves_whole_adapters(
    found: Callable[[str], tuple[Path, list[Any]]],
) -> None:
    directory, both = found("trainer")
    graph = torch.load(directory / "trainer.graph", weights_only=False)
    for each in both:
        assert each["losses"] == pytest.approx(each["replicated"], abs=1e-6)
        assert 0.475 <= each["part"] <= 0.525
        for refused in ("bare", "callback"):
            assert each[refused].startswith("the graph was sharded before the trainer was made")
    assert len(both[0]["warned"]) == 1
    assert "accelerate makes DistributedDataParallel of it" in both[0]["warned"][0]
    assert both[1]["warned"] == []
    saved = (
        "trainer-final",
        "prepared/checkpoint-2",
        "prepared/checkpoint-4",
        "trainer-again",
        "bare/checkpoint-7/default",
    )
    final, second, last, again, _ = (load_file(directory / each / "adapter_model.safetensors") for each in saved)
    for one, other in ((final, last), (again, second)):
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert not all(torch.equal(value, last[key]) for key, value in second.items())
    lora_fx.load_adapter(graph, directory / "trainer-final")


def test_all_processes_refuse_where_one_does_and_none_waits(found: Callable[[str], tuple[Path, list[Any]]]) -> None:
    directory, (first, second) = found("refusals")
    assert lora_fx.load_adapter(traced("llama"), directory / "pretrained").adapters
    for policy in ("policy", "policy of torch", "policy of torch for all"):
        assert first[policy] == second[policy]
        assert first[policy].startswith("expected a MixedPrecisionPolicy with a reduce_dtype alone, got Mixed")
    for refused in ("quantised", "quantised, by torch"):
        assert first[refused] == second[refused]
        assert first[refused].endswith("is quantised, and FSDP shards tensors of numbers alone: train with DDP.")
    assert second["one"] == second["policy"]
    assert first["one"] == f"process 1 refused: LoraFxError: {second['one']}"
    assert first["other"].startswith("process 1 has another graph than process 0, by a digest of its nodes and tensors")
    assert second["other"].startswith("process 0 has another graph than process 1, by a digest")
    for refused in ("fold", "fuse"):
        assert first[refused] == second[refused]
        assert "is sharded over several devices (FSDP), and lora_fx reads whole tensors" in first[refused]
    assert first["target"].endswith("Nothing was touched: move that away, or choose another name.")
    assert first["adapter"] == "the graph has no adapter 'other'; it has: default."
    assert first["function"] == "ValueError: no disk"
    for refused, kind in (("target", "WriteError: "), ("adapter", "PlanError: ")):
        assert second[refused] == f"the first process refused: {kind}{first[refused]}"
    assert second["function"] == "LoraFxError: the first process refused: ValueError: no disk"


def test_a_nested_graph_has_no_embedding_modules_and_says_why() -> None:
    graph = lora_fx.nest(traced("llama"))
    for name in ("get_input_embeddings", "get_output_embeddings"):
        assert not hasattr(graph, name)
        assert name not in dir(graph)
        with pytest.raises(AttributeError, match=f"a nested graph has no {name}: FSDP would shard such a module"):
            getattr(graph, name)
        assert hasattr(lora_fx.flatten(graph), name)


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["finetune_fsdp.py", "finetune_pipeline.py"])
def test_the_examples_learn_and_their_adapters_fit_the_base(name: str, tmp_path: Path) -> None:
    script = EXAMPLES / name
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    options = ["--steps", "8", "--out", tmp_path]
    done = subprocess.run([*launch, *options], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert losses[-1] < losses[0] - 0.2
    torch.manual_seed(0)
    sizes = runpy.run_path(str(script))["CONFIG"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=128, **sizes))
    if name == "finetune_fsdp.py":
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert lora_fx.from_adapter(model, tmp_path / "adapter").adapters  # by the fingerprint in its file


def test_the_config_for_accelerate_is_one_that_it_reads() -> None:
    config = ClusterConfig.from_yaml_file(str(EXAMPLES / "accelerate_fsdp.yaml"))
    assert config.distributed_type == DistributedType.FSDP
    assert config.fsdp_config["fsdp_version"] == 2
    assert not config.fsdp_config["fsdp_activation_checkpointing"]
    assert config.mixed_precision == "no"


def test_stages_that_a_graph_does_not_have_are_refused() -> None:
    graph = lora_fx.rewrite(traced("gpt2"), "gpt2", rank=3)
    stage = functools.partial(lora_fx.parallel.stage_module, graph)
    with pytest.raises(
        lora_fx.LoraFxError, match=r"expected paths of layers \(transformer\.h\.0, .*got 'transformer\.h'"
    ):
        stage(["transformer.h"], 0)
    with pytest.raises(lora_fx.LoraFxError, match=r"in the order in which they are computed, got transformer\.h\.1, "):
        stage(["transformer.h.1", "transformer.h.0"], 0)
    with pytest.raises(lora_fx.LoraFxError, match="expected the index of one of 2 stages, got 2"):
        stage(["transformer.h.1"], 2)
    ids = torch.zeros(2, 7, dtype=torch.int64)
    with pytest.raises(lora_fx.InputError, match=r"input_ids.size\(1\) == attention_mask.size\(1\)"):
        stage(["transformer.h.1"], 0)(input_ids=ids, attention_mask=ids[:, :5])
    graph.get_parameter("lm_head.weight").requires_grad_()  # the embedding too
    with pytest.raises(lora_fx.LoraFxError, match=r"transformer\.wte\.weight: trains and is read in several stages"):
        stage(["transformer.h.1"], 0)
