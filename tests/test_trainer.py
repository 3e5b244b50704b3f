"""Graphs in transformers' ``Trainer`` and in accelerate: the losses of the plain loop and of PEFT, and checkpoints of what trains."""

from __future__ import annotations

import copy
import functools
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from architectures import build
from conftest import set_factors
from safetensors.torch import load_file
from torch import nn

import lora_fx
from lora_fx.trainer import AdapterCallback

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.xdist_group("trainer")]

ROOT = Path(__file__).parent.parent
STEPS, BATCH = 6, 4


def rows(count: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 97, (int(7 + index % 3),), generator=generator) for index in range(count)]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each), "labels": each.clone()} for each in ids]


class Collator:
    """Pads a batch, and remembers it."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []

    def __call__(self, examples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        batch = {
            name: nn.utils.rnn.pad_sequence([each[name] for each in examples], batch_first=True, padding_value=value)
            for name, value in padding.items()
        }
        self.batches.append(batch)
        return dict(batch)


def base() -> nn.Module:
    """Return GPT-2 without dropout, so that nothing depends on a random state."""
    model = build("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@functools.cache
def rewritten() -> lora_fx.TracedGraphModule:
    """Return GPT-2, whose head is tied to its embedding, with labels."""
    graph = lora_fx.rewrite(base(), rules="gpt2", labels=True, rank=4, alpha=6, dropout=0.0)
    set_factors(graph, scale=0.05)
    return graph


def graph() -> lora_fx.TracedGraphModule:
    return copy.deepcopy(rewritten())


def wrapped() -> nn.Module:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True, task_type=None)
    model = peft.get_peft_model(base(), config)
    set_factors(model.base_model.model, scale=0.05)
    return model


def trained(
    model: nn.Module, directory: Path, *callbacks: Any, resume: Any = None, **options: Any
) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        str(directory),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(),
        eval_dataset=rows(8),
        data_collator=Collator(),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: transformers.Trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def factors(module: nn.Module) -> dict[str, torch.Tensor]:
    named = ((name.removeprefix("base_model.model."), p) for name, p in module.named_parameters())
    return {name: p.detach().clone() for name, p in named if ".lora_" in name}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_gives_the_losses_of_a_plain_loop(accumulation: int, tmp_path: Path) -> None:
    trainer = trained(graph(), tmp_path, gradient_accumulation_steps=accumulation)
    batches = iter(trainer.data_collator.batches)
    other = graph().train()
    parameters = [p for p in other.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    found = []
    for _ in range(STEPS):
        parts = [next(batches) for _ in range(accumulation)]
        count = sum((part["labels"] != -100).sum() for part in parts)
        parts = [other(**part, num_items_in_batch=count).loss for part in parts]
        sum(parts, torch.zeros(())).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(sum(part.item() for part in parts))
    assert len(set(losses(trainer))) == STEPS
    assert losses(trainer) == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_gives_the_losses_and_factors_of_peft(accumulation: int, tmp_path: Path) -> None:
    mine, theirs = graph(), wrapped()
    found, wanted = (
        losses(trained(model, tmp_path, gradient_accumulation_steps=accumulation)) for model in (mine, theirs)
    )
    assert found == wanted
    expected = factors(theirs)
    assert {name: torch.equal(value, expected[name]) for name, value in factors(mine).items()} == dict.fromkeys(
        expected, True
    )


def test_only_the_adapter_changes(tmp_path: Path) -> None:
    mine, before = graph(), graph()
    trained(mine, tmp_path)
    changed = {n for n, p in mine.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed == set(factors(before))


def test_checkpoints_hold_what_trains_and_resuming_continues_the_curve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    mine = graph()
    whole = trained(mine, tmp_path, AdapterCallback(), **options)
    checkpoint = tmp_path / "checkpoint-3"
    assert set(load_file(checkpoint / "model.safetensors")) == set(factors(mine))
    assert len(losses(whole, "eval_loss")) == 2
    resumed = graph()
    transformers.logging.set_verbosity_warning()
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        again = trained(resumed, tmp_path, AdapterCallback(), resume=str(checkpoint), **options)
    assert "missing keys" not in caplog.text
    assert losses(again) == losses(whole)
    assert losses(again, "eval_loss") == losses(whole, "eval_loss")
    for name, value in factors(mine).items():
        assert torch.equal(resumed.get_parameter(name), value)
    whole.save_model(str(tmp_path / "final"))
    assert set(load_file(tmp_path / "final" / "model.safetensors")) == set(factors(mine))


def test_peft_and_lora_fx_read_the_adapter_of_a_checkpoint(tmp_path: Path) -> None:
    mine = graph()
    trained(mine, tmp_path, AdapterCallback(), save_strategy="steps", save_steps=STEPS)
    directory = tmp_path / f"checkpoint-{STEPS}" / "default"
    inputs = {name: value for name, value in Collator()(rows(4)).items() if name != "labels"}
    model = base()
    wanted = lora_fx.from_adapter(model, directory).eval()(**inputs).logits
    carried = lora_fx.transfer(mine, onto=lora_fx.rewrite(model, rules="gpt2", rank=4, alpha=6, dropout=0.0)).eval()
    assert torch.equal(carried(**inputs).logits, wanted)
    assert torch.equal(peft.PeftModel.from_pretrained(model, directory).eval()(**inputs).logits, wanted)


def test_the_best_checkpoint_is_loaded_in_the_end(tmp_path: Path) -> None:
    mine = graph()
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trained(
        mine,
        tmp_path,
        AdapterCallback(),
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        **options,
    )
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name == "checkpoint-2"  # the largest loss, so that the last is not the best
    for name, value in load_file(best / "model.safetensors").items():
        assert torch.equal(mine.get_parameter(name), value)


def test_a_callback_on_something_else_is_refused(tmp_path: Path) -> None:
    for model, kind in ((base(), "GPT2LMHeadModel"), (lora_fx.unload(rewritten()), "GraphModule")):
        with pytest.raises(
            lora_fx.LoraFxError, match=f"expected a graph with adapters, and the trainer has a {kind}: make one"
        ):
            trained(model, tmp_path, AdapterCallback())


def test_activation_checkpointing_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(lora_fx.LoraFxError, match="no activation checkpointing"):
        trained(graph(), tmp_path, gradient_checkpointing=True)


def test_accelerate_trains_a_graph(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    mine, other = graph().train(), graph().train()
    data = [Collator()(rows()[start : start + BATCH]) for start in range(0, 16, BATCH)]

    def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)

    model, optimizer, loader = accelerator.prepare(
        mine, optimizer_of(mine), torch.utils.data.DataLoader(data, batch_size=None)
    )
    found = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    plain = optimizer_of(other)
    wanted = []
    for index, batch in enumerate(data):
        loss = other(**batch).loss
        (loss / 2).backward()
        wanted.append(loss.item())
        if index % 2:
            plain.step()
            plain.zero_grad()
    assert found == wanted
    assert factors(mine).keys() == factors(other).keys()
    assert all(torch.equal(value, factors(other)[name]) for name, value in factors(mine).items())


@pytest.mark.slow
def test_the_example_learns(tmp_path: Path) -> None:
    command = [sys.executable, "tools/examples/finetune_trainer.py", "--steps", "8", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = (
        float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("loss on held-out")
    )
    assert after < before
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
