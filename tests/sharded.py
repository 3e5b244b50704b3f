"""Trains small graphs that FSDP shards over two processes, which ``torch.distributed.run`` starts::

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/sharded.py DIRECTORY CHECK…

where ``DIRECTORY`` has traces, ``<architecture>.trace``. What a check finds is left there, as ``<check>-<rank>.json``.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from architectures import ARCHITECTURES, VOCABULARY, inputs
from conftest import set_factors
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

import lora_fx
import lora_fx.trainer
from lora_fx.graph.graph_module import copy_graph, state_in_parts
from lora_fx.graph.input_checks import remove_checks
from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.numerics.schemes import parse_scheme

BATCH, STEPS, STOPPED = 4, 20, 12
SPLITS = {
    "llama": "model.layers.1",
    "t5": "decoder.block.0",
    "gpt2": "transformer.h.1",
    "gemma3_text": "model.layers.2",
}
WITH_HEAD = {"rules": {"select": [{"target": ["q_proj", "down_proj"]}, {"target": ["lm_head"], "trainable": "all"}]}}
DORA = {"rules": {"defaults": {"variant": "dora"}, "select": [{"target": ["q_proj", "o_proj", "down_proj"]}]}}
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def graph_of(directory: Path, name: str, **settings: Any) -> lora_fx.TracedGraphModule:
    """Return a rewrite of a trace in ``directory``, in train mode. Every process makes an equal one; ``<name>-dora`` is of the same trace."""
    trace = torch.load(directory / f"{name.removesuffix('-dora')}.trace", weights_only=False)
    given = {"rules": "auto", "rank": 4, "alpha": 8, "dropout": 0.0, "seed": 0}
    given |= DORA if name.endswith("-dora") else {}
    return lora_fx.rewrite(trace, **{**given, **settings}).train()


def batch_of(name: str, step: int, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    """Return the part of a batch that is for one of several processes."""
    name = name.removesuffix("-dora")
    if name in ARCHITECTURES:
        whole = inputs(name, BATCH, 5 + step % 3, seed=step)
    else:
        ids = torch.randint(VOCABULARY, (BATCH, 5 + step % 3), generator=torch.Generator().manual_seed(step))
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {key: value.chunk(world)[rank] for key, value in whole.items()}


def optimizer_of(graph: nn.Module) -> Optimizer:
    return AdamW([each for each in graph.parameters() if each.requires_grad], lr=1e-2)


def loss_of_part(name: str, graph: nn.Module, step: int, rank: int, world: int) -> torch.Tensor:
    """Return the loss over the part of a batch that is for one of several processes."""
    return graph(**batch_of(name, step, rank, world))[0].square().mean()  # type: ignore[no-any-return]


def train_in_parts(name: str, graph: nn.Module, optimizer: Optimizer, steps: range, world: int) -> None:
    """Train a graph as :func:`train` does in several processes, in one alone: gradients are means over the parts of a batch."""
    for step in steps:
        for rank in range(world):
            (loss_of_part(name, graph, step, rank, world) / world).backward()
        optimizer.step()
        optimizer.zero_grad()


def train(
    name: str, graph: nn.Module, optimizer: Optimizer, steps: range, rank: int = 0, world: int = 1
) -> list[float]:
    """Train a graph, and return the losses over whole batches."""
    losses = []
    for step in steps:
        loss = loss_of_part(name, graph, step, rank, world)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        if world > 1:
            distributed.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def part_of(graph: nn.Module) -> float:
    """Return what part of the elements of the frozen parameters is in this process."""
    base = [each for each in graph.parameters() if not each.requires_grad]
    assert all(isinstance(each, DTensor) for each in graph.parameters())
    return sum(each.to_local().numel() for each in base) / sum(each.numel() for each in base)  # type: ignore[attr-defined]


def curve(name: str, directory: Path, rank: int) -> dict[str, Any]:
    """Train, stop in between, and go on in a new graph; the merged weights and the adapter are left in ``directory``."""
    graph = graph_of(directory, name)
    graph.activation_checkpointing_enable()
    lora_fx.parallel.fully_shard(graph)
    optimizer = optimizer_of(graph)
    losses = train(name, graph, optimizer, range(STOPPED), rank, 2)
    lora_fx.save_adapter(graph, directory / f"{name}-stopped")
    state = get_optimizer_state_dict(graph, optimizer, options=WHOLE)

    again = lora_fx.load_adapter(graph_of(directory, name, seed=1), directory / f"{name}-stopped")
    lora_fx.parallel.fully_shard(again)
    optimizer = optimizer_of(again)
    if rank:
        state = {}  # the first process has it whole
    set_optimizer_state_dict(
        again, optimizer, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )
    losses += train(name, again, optimizer, range(STOPPED, STEPS), rank, 2)
    lora_fx.save_adapter(again, directory / f"{name}-sharded")

    def fold(whole: lora_fx.TracedGraphModule) -> int:
        torch.save(lora_fx.fold(whole).state_dict(), directory / f"{name}-merged.pt")
        return len(list(whole.parameters()))

    return {"losses": losses, "part": part_of(again), "folded": lora_fx.parallel.on_first_process(again, fold)}


def prefixed_graph(directory: Path, positions: str) -> lora_fx.TracedGraphModule:
    """Return a graph with a prefix: one that is a past, or nodes at the attentions."""
    rules = {"prefix": [{"tokens": 5, "positions": positions, "projection": True, "hidden": 6}]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "rules 'custom' give a prefix")
        return lora_fx.rewrite(torch.load(directory / "prefixed.trace", weights_only=False), rules, seed=0).train()


def prefixed(directory: Path, rank: int) -> dict[str, Any]:
    """Train prefixes."""
    found: dict[str, Any] = {}
    for positions in ("peft", "unchanged"):
        graph = prefixed_graph(directory, positions)
        lora_fx.parallel.fully_shard(graph)
        losses = train("llama", graph, optimizer_of(graph), range(STEPS), rank, 2)
        found[positions] = {"losses": losses, "part": part_of(graph)}
    return found


def said(function: Callable[[], Any]) -> str:
    """Return what is said where a function is refused."""
    try:
        function()
    except lora_fx.LoraFxError as error:
        return str(error)
    return "nothing"


def quantised_graph() -> lora_fx.TracedGraphModule:
    """Return a nested graph with a weight in 4 bits."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(6, 8)])})
    codes = QuantisedWeight.of(model.get_submodule("layers.0").weight, parse_scheme("nf4:double"))  # type: ignore[arg-type]
    model.get_submodule("layers.0").weight = nn.Parameter(codes, False)
    model.forward = lambda x: model.get_submodule("layers.0")(x)
    return lora_fx.nest(lora_fx.rewrite(model, ["layers.0"], rank=2, example_inputs=(torch.ones(3, 6),), seed=0))


def refusals(directory: Path, rank: int) -> dict[str, Any]:
    """Return what every process says where one refuses or all do; none waits for another forever."""
    graph = graph_of(directory, "llama")
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    nested = lora_fx.nest(graph)
    found = {
        "policy": said(lambda: lora_fx.parallel.fully_shard(graph, mp_policy=low)),
        "policy of torch": said(lambda: fully_shard(nested.get_submodule("model.layers.0"), mp_policy=low)),
        "policy of torch for all": said(lambda: fully_shard(nested, mp_policy=low)),
    }
    quantised = quantised_graph()
    found |= {
        "quantised": said(lambda: lora_fx.parallel.fully_shard(quantised)),
        "quantised, by torch": said(lambda: fully_shard(quantised.get_submodule("layers.0"))),
        "one": said(lambda: lora_fx.parallel.fully_shard(graph, **({"mp_policy": low} if rank else {}))),
        "other": said(lambda: lora_fx.parallel.fully_shard(graph_of(directory, "llama", seed=rank))),
    }
    lora_fx.parallel.fully_shard(graph)
    (directory / "full").mkdir(exist_ok=True)
    (directory / "full" / "file").touch()

    def fail(_: Any) -> None:
        raise ValueError("no disk")

    graph.save_pretrained(directory / "pretrained", is_main_process=rank == 0)
    found |= {
        "target": said(lambda: lora_fx.save_adapter(graph, directory / "full", overwrite=True)),
        "adapter": said(lambda: lora_fx.save_adapter(graph, directory / "new", "other")),
        "fold": said(lambda: lora_fx.fold(graph)),
        "fuse": said(lambda: lora_fx.fuse(graph)),
    }
    try:
        lora_fx.parallel.on_first_process(graph, fail)
    except Exception as error:  # the first process raises what the function does
        found["function"] = f"{type(error).__name__}: {error}"
    assert train("llama", graph, optimizer_of(graph), range(1), rank, 2)  # the group of processes goes on
    return found


def accelerated(name: str, efficient: bool, directory: Path, rank: int) -> dict[str, Any]:
    """Train as :func:`curve` does, sharded by what accelerate calls for FSDP2."""
    graph = lora_fx.nest(graph_of(directory, name))
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=efficient
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=rank == 0,
        device=torch.device("cpu"),
    )
    fsdp2_prepare_model(accelerator, graph)
    units = [path for path, module in graph.named_modules() if isinstance(module, FSDPModule)]
    losses = train(name, graph, optimizer_of(graph), range(3), rank, 2)
    lora_fx.save_adapter(graph, directory / f"{name}-accelerated-{efficient}")
    return {"losses": losses, "part": part_of(graph), "units": units}


def from_files(name: str, directory: Path, rank: int) -> dict[str, Any]:
    """Train a graph that was traced on meta, from the files of a checkpoint, beside one that had its weights from the beginning."""
    settings = WITH_HEAD if name == "llama" else {}
    graph = graph_of(directory, f"{name}-meta", **settings)
    expected = graph_of(directory, name, **settings)
    missing = said(
        lambda: lora_fx.parallel.load_sharded(graph, directory / ("nowhere" if rank else f"{name}-checkpoint"))
    )
    other = said(lambda: lora_fx.parallel.load_sharded(graph, directory / "other"))
    lora_fx.parallel.load_sharded(graph, directory / f"{name}-checkpoint", seed=0)
    lora_fx.parallel.fully_shard(expected)
    before = {key: value.to_local() for key, value in expected.state_dict().items() if isinstance(value, DTensor)}
    unlike = [key for key, value in graph.state_dict().items() if not torch.equal(value.to_local(), before[key])]
    # Of rows for two processes each has two, and of those for four it has one.
    losses = [
        [train(name, each, optimizer_of(each), range(3), rank, count) for count in (2, 4)] for each in (graph, expected)
    ]
    sizes = [remove_checks(copy_graph(each.graph)[0], state_in_parts(each).modules) for each in (graph, expected)]
    return {
        "losses": losses,
        "unlike": unlike,
        "part": part_of(graph),
        "missing": missing,
        "other": other,
        "same sizes": sizes[0] == sizes[1],
    }


def pipelined(name: str, directory: Path, rank: int) -> dict[str, Any]:
    """Return which gradients of the stages of a pipeline differ from those of one process, for two schedules."""
    graph, expected = (graph_of(directory, name) for _ in range(2))
    for each in (graph, expected):
        set_factors(each)
    module = lora_fx.parallel.stage_module(graph, [SPLITS[name]], rank)
    batch, count = {key: value.repeat(2, 1) for key, value in batch_of(name, 0).items()}, 4
    own = {key: batch[key] for key in lora_fx.parallel.inputs_of(module)}

    def loss_of(output: Any, _target: Any = None) -> torch.Tensor:
        return (output[0] if isinstance(output, tuple) else output).square().mean()

    for number in range(count):
        (loss_of(expected(**{key: value.chunk(count)[number] for key, value in batch.items()})[0]) / count).backward()
    gradients = {key: parameter.grad for key, parameter in expected.named_parameters()}
    found: dict[str, Any] = {}
    for kind in (ScheduleGPipe, Schedule1F1B):
        graph.zero_grad()
        schedule = kind(PipelineStage(module, rank, 2, torch.device("cpu")), count, loss_fn=loss_of)
        schedule.step(**own, **({"target": batch["input_ids"]} if rank else {}))
        mine = {key: each.grad for key, each in graph.named_parameters() if each.grad is not None}
        unlike = [key for key, value in mine.items() if not torch.equal(value, gradients[key])]
        found[kind.__name__] = {"gradients": len(mine), "unlike": unlike}
    found["all"] = sum(value is not None for value in gradients.values())
    return found


def trainer(directory: Path, rank: int) -> dict[str, Any]:
    """Train by transformers' ``Trainer``, and again where it turns FSDP into DDP, as it does on CPUs."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (32, 9), generator=generator)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]

    def made(run: str, **options: Any) -> tuple[lora_fx.TracedGraphModule, Any]:
        graph = torch.load(directory / "trainer.graph", weights_only=False).train()
        if "fsdp" not in options:
            lora_fx.parallel.fully_shard(graph)
        arguments = transformers.TrainingArguments(
            str(directory / run),
            **{
                "max_steps": 4,
                "learning_rate": 1e-2,
                "per_device_train_batch_size": 2,
                "logging_steps": 1,
                "use_cpu": True,
            },
            **{"save_steps": 2, "save_only_model": True, "report_to": [], "disable_tqdm": True, **options},
        )
        return graph, transformers.Trainer(graph, arguments, train_dataset=rows)

    def losses(trainer: Any) -> list[float]:
        trainer.train()
        return [each["loss"] for each in trainer.state.log_history if "loss" in each]

    graph, prepared = made("prepared")
    lora_fx.trainer.prepare(prepared)
    found: dict[str, Any] = {"losses": losses(prepared), "part": part_of(graph)}
    prepared.save_model(str(directory / "trainer-final"))
    prepared._load_from_checkpoint(str(directory / "prepared" / "checkpoint-2"))
    lora_fx.save_adapter(graph, directory / "trainer-again")
    graph, bare = made("bare")
    found["bare"] = said(bare.train)
    bare.add_callback(lora_fx.trainer.AdapterCallback())
    found["callback"] = said(bare.train)
    event = bare.args, transformers.TrainerState(global_step=7, is_world_process_zero=rank == 0), None
    lora_fx.trainer.AdapterCallback().on_save(*event, model=graph)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found["replicated"] = losses(made("ddp", save_strategy="no", fsdp=True, fsdp_config={"version": 2})[1])
    found["warned"] = [str(each.message) for each in caught if "FSDP was asked for" in str(each.message)]
    return found


def checks() -> dict[str, Callable[[Path, int], dict[str, Any]]]:
    """Return the checks by their names."""
    found: dict[str, Callable[[Path, int], dict[str, Any]]] = {
        "refusals": refusals,
        "trainer": trainer,
        "prefixed": prefixed,
    }
    for name in SPLITS:
        found[f"{name}-pipelined"] = lambda directory, rank, name=name: pipelined(name, directory, rank)
    for name in ("llama", "t5", "gpt2", "mixtral"):
        found[f"{name}-files"] = lambda directory, rank, name=name: from_files(name, directory, rank)
    found["llama-dora"] = lambda directory, rank: curve("llama-dora", directory, rank)
    for name in ("llama", "t5", "gpt2", "mixtral"):
        found[name] = lambda directory, rank, name=name: curve(name, directory, rank)
        for efficient in (False, True):
            key = f"{name}-accelerated-{efficient}"
            found[key] = lambda directory, rank, name=name, e=efficient: accelerated(name, e, directory, rank)
    return found


def main(directory: Path, names: list[str]) -> None:
    """Run checks, and leave what they find."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    for name in names:
        (directory / f"{name}-{rank}.json").write_text(json.dumps(checks()[name](directory, rank)))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
