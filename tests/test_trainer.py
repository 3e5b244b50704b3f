"""Graphs in transformers' ``Trainer`` and in accelerate: the losses of the plain loop and of PEFT, and checkpoints of what trains."""

from __future__ import annotations

import copy
import functools
import logging
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from architectures import build, few
from conftest import set_factors
from safetensors.torch import load_file
from torch import nn

import lora_fx
from lora_fx.trainer import AdapterCallback, prepare

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
    model = build("gpt2", layers=1)
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
    carried = lora_fx.transfer(mine, onto=served()).eval()
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
    for model, kind in ((base(), "GPT2LMHeadModel"), (lora_fx.unload(rewritten()), "graph without any")):
        with pytest.raises(
            lora_fx.LoraFxError, match=f"expected a graph with adapters, and the trainer has a {kind}: make one"
        ):
            trained(model, tmp_path, AdapterCallback())


def test_a_trainer_gives_the_losses_and_factors_of_a_flat_graph_with_activation_checkpointing(tmp_path: Path) -> None:
    mine, flat = graph(), graph()
    options = {"every_n_layers": 1, "use_reentrant": False}
    checkpointed = trained(
        mine, tmp_path / "mine", AdapterCallback(), gradient_checkpointing=True, gradient_checkpointing_kwargs=options
    )
    assert mine.is_gradient_checkpointing
    assert losses(checkpointed) == losses(trained(flat, tmp_path / "flat", AdapterCallback()))
    assert factors(mine).keys() == factors(flat).keys()
    assert all(torch.equal(value, factors(flat)[name]) for name, value in factors(mine).items())


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
def test_the_example_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "tools" / "examples" / "finetune_trainer.py"))["main"](8, tmp_path / "out")
    said = capsys.readouterr().out.splitlines()
    before, after = (float(line.rpartition(" ")[2]) for line in said if line.startswith("loss on held-out"))
    assert after < before
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


@functools.cache
def small(kind: str) -> nn.Module:
    """Return a model without dropout."""
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"vocab_size": 97, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 1, "num_heads": 4}
        config = transformers.T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)
        return transformers.T5ForConditionalGeneration(config)
    sizes = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
    config = transformers.BertConfig(
        **sizes,
        num_attention_heads=4,
        num_labels=2 if kind == "question answering" else 3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    heads = transformers.BertForSequenceClassification, transformers.BertForQuestionAnswering
    return heads[kind == "question answering"](config)


TARGETS = {"t5": ["q", "v"], "bert": ["query", "value"], "question answering": ["query", "value"]}


@functools.cache
def traced_small(kind: str) -> lora_fx.TracedGraphModule:
    return lora_fx.trace(small(kind), labels=True)


def pair(kind: str) -> tuple[lora_fx.TracedGraphModule, nn.Module]:
    """Return a graph with an adapter, and the same adapter in PEFT."""
    if kind == "gpt2":
        return graph(), wrapped()
    mine = lora_fx.rewrite(
        traced_small(kind), rules={"defaults": {"rank": 3, "alpha": 5}, "select": [{"target": TARGETS[kind]}]}
    )
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS[kind])
    theirs = peft.get_peft_model(copy.deepcopy(small(kind)), config)
    for module in (mine, theirs.base_model.model):
        set_factors(module, scale=0.05)
    return mine, theirs


def batches(kind: str, model: Any, count: int = 12) -> list[dict[str, torch.Tensor]]:
    """Return rows of one length, some padded; of T5 with what the collator of transformers makes for a model that derives it."""
    made = []
    for index, row in enumerate(rows(count)):
        ids = nn.functional.pad(row["input_ids"], (0, 9 - len(row["input_ids"])))
        each = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        if kind == "question answering":
            each |= {"start_positions": torch.tensor(index % 4), "end_positions": torch.tensor(index % 4 + 2)}
        else:
            each["labels"] = torch.tensor(index % 3) if kind == "bert" else ids.masked_fill(ids == 0, -100)
        if hasattr(model, "prepare_decoder_input_ids_from_labels") and kind == "t5":
            each["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=each["labels"][None])[0]
        made.append(each)
    return made


def curve(kind: str, model: nn.Module, directory: Path, how: Any = prepare, **options: Any) -> list[dict[str, float]]:
    """Return what three steps of a trainer log, evaluated after each."""
    arguments = transformers.TrainingArguments(
        str(directory),
        **{
            "per_device_train_batch_size": BATCH,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            **options,
        },
    )
    data = batches(kind, model)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:5])
    trainer.remove_callback(transformers.PrinterCallback)
    how(trainer)
    trainer.train()
    told = ("loss", "eval_loss", "total_flos", "grad_norm")
    return [{key: entry[key] for key in told if key in entry} for entry in trainer.state.log_history]


def bare(_trainer: transformers.Trainer) -> None:
    """Leave a trainer as it is."""


@pytest.mark.parametrize("kind", few(["gpt2", "bert", "t5"], ("gpt2", "bert")))
def test_label_smoothing_gives_the_losses_of_peft(kind: str, tmp_path: Path) -> None:
    mine, theirs = pair(kind)
    found = curve(kind, mine, tmp_path, label_smoothing_factor=0.2)
    assert found == curve(kind, theirs, tmp_path, bare, label_smoothing_factor=0.2)
    assert found != curve(kind, pair(kind)[0], tmp_path)


def test_a_loss_function_of_the_trainers_gets_outputs_and_labels(tmp_path: Path) -> None:
    def squared(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
        return (outputs.logits.mean(dim=1) * labels[:, :1]).pow(2).sum() / (num_items_in_batch or 1)

    def how(trainer: transformers.Trainer) -> None:
        trainer.compute_loss_func = squared
        if isinstance(trainer.model, lora_fx.TracedGraphModule):
            prepare(trainer)

    mine, theirs = pair("gpt2")
    assert curve("gpt2", mine, tmp_path, how) == curve("gpt2", theirs, tmp_path, how)


@pytest.mark.parametrize("how", [bare, prepare])
def test_a_question_answering_head_is_evaluated(how: Any, tmp_path: Path) -> None:
    mine, theirs = pair("question answering")
    found = curve("question answering", mine, tmp_path, how)
    assert sum("eval_loss" in entry for entry in found) == 3
    assert found == curve("question answering", theirs, tmp_path, bare)


CLAIM = "label_smoothing_factor=0.1 takes an input called labels from the batch, "


@pytest.mark.parametrize(
    ("kind", "how", "options", "told"),
    [
        (
            "gpt2",
            prepare,
            {"label_smoothing_factor": 0.1, "torch_compile": True},
            f"{CLAIM}and of a compiled model transformers does not see that the labels are to be shifted: set torch_compile=False.",
        ),
        (
            "gpt2",
            bare,
            {"label_smoothing_factor": 0.1},
            f"{CLAIM}which the graph needs for its own loss. Call lora_fx.trainer.prepare(trainer), which gives both what they need.",
        ),
        (
            "question answering",
            prepare,
            {"label_smoothing_factor": 0.1},
            f"{CLAIM}and BertForQuestionAnswering has start_positions and end_positions instead: transformers would train without "
            "smoothing. Set it to 0.",
        ),
        (
            "no labels",
            prepare,
            {"label_smoothing_factor": 0.1},
            f"{CLAIM}and this graph takes none. Make it by lora_fx.rewrite(model, …, labels=True).",
        ),
        (
            "gpt2",
            bare,
            {"save_strategy": "epoch"},
            "the first checkpoint (save_strategy='epoch') would fail: 'transformer.wte.weight' and 'lm_head.weight' are one tensor, and "
            "transformers writes no state dict with ties. Call lora_fx.trainer.prepare(trainer), after which checkpoints hold the adapters, "
            'or set save_strategy="no".',
        ),
        (
            "gpt2",
            prepare,
            {"neftune_noise_alpha": 5.0},
            "neftune_noise_alpha was set on the input embedding: a traced graph is flat and computes its embedding as a node, without calling "
            "this module, so that it would have no effect. Set it on the model before that is traced, or do without "
            "(neftune_noise_alpha=None).",
        ),
    ],
    ids=[
        "smoothing, compiled",
        "smoothing, not prepared",
        "smoothing of positions",
        "smoothing without labels",
        "ties",
        "neftune",
    ],
)
def test_what_a_trainer_cannot_do_with_a_graph_is_refused_before_the_first_step(
    kind: str, how: Any, options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    mine = copy.deepcopy(served()) if kind == "no labels" else pair(kind)[0]
    before = factors(mine)
    with pytest.raises(lora_fx.LoraFxError) as raised:
        curve(kind, mine, tmp_path, how, **options)
    assert str(raised.value) == told
    assert all(torch.equal(value, before[name]) for name, value in factors(mine).items())


def decoder_classifier() -> lora_fx.TracedGraphModule:
    """Return a graph that finds the last token of a row by the id of padding."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = transformers.LlamaConfig(**sizes, pad_token_id=0, num_labels=3)
    return lora_fx.rewrite(transformers.LlamaForSequenceClassification(config), rules="llama", labels=True)


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (
            decoder_classifier,
            "non_pad_mask = (input_ids != self.config.get_text_config().pad_token_id).to(logits.device, torch.int32)",
        ),
        (lambda: pair("t5")[0], "decoder_input_ids = self._shift_right(labels)"),
        (lambda: pair("gpt2")[0], None),
    ],
    ids=["classifier", "t5", "gpt2"],
)
def test_another_pad_token_than_that_of_the_trace_is_refused_where_the_graph_computes_with_it(
    made: Any, line: str | None, tmp_path: Path
) -> None:
    mine = made()
    mine.config.pad_token_id = 2  # as Trainer does, for that of a tokenizer
    if line is None:
        assert len(curve("gpt2", mine, tmp_path, bare)) > 3
        return
    with pytest.raises(lora_fx.LoraFxError) as raised:
        curve("bert", mine, tmp_path)
    assert str(raised.value) == (
        f"the graph was traced with pad_token_id=0 and computes with it ({line}), and its config has 2 now, which transformers takes "
        "from the tokenizer. Set model.config.pad_token_id = 2, and rewrite that model."
    )


@functools.cache
def served() -> lora_fx.TracedGraphModule:
    """Return GPT-2 without labels."""
    return lora_fx.rewrite(base(), rules="gpt2", rank=4, alpha=6, dropout=0.0)


SAYS = "graph.save_pretrained(directory) writes the adapter 'default'. After lora_fx.trainer.prepare(trainer), save_model does that too."


@pytest.mark.parametrize(
    ("kind", "callbacks", "told"),
    [
        ("bert", [], f"trainer.save_model(directory) writes model.safetensors with the base in it; {SAYS}"),
        (
            "gpt2",
            [],
            "trainer.save_model(directory) fails, since 'transformer.wte.weight' and 'lm_head.weight' are one tensor; "
            f"{SAYS}",
        ),
        (
            "gpt2",
            [AdapterCallback],
            f"trainer.save_model(directory) writes model.safetensors with the parameters that train; {SAYS}",
        ),
    ],
    ids=["bare", "bare with ties", "AdapterCallback"],
)
def test_one_line_at_the_end_says_what_save_model_writes_and_what_writes_the_adapter(
    kind: str, callbacks: list[type[AdapterCallback]], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = pair(kind)[0]

    def how(trainer: transformers.Trainer) -> None:
        for each in callbacks:
            trainer.add_callback(each)

    with caplog.at_level(logging.WARNING, "lora_fx"):
        curve(kind, mine, tmp_path, how)
    assert [record.getMessage() for record in caplog.records if record.name == "lora_fx.trainer"] == [told]
    mine.save_pretrained(tmp_path / "final")
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file()


def test_a_prepared_trainer_saves_the_adapter_and_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = pair("gpt2")[0]
    trainers = []

    def how(trainer: transformers.Trainer) -> None:
        prepare(trainer)
        trainers.append(trainer)

    with caplog.at_level(logging.WARNING, "lora_fx"):
        curve("gpt2", mine, tmp_path, how)
    trainers[0].save_model(str(tmp_path / "final"))
    assert not [record for record in caplog.records if record.name == "lora_fx.trainer"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (tmp_path / "final").iterdir()
    }
    assert not (tmp_path / "final" / "model.safetensors").exists()


def test_a_trainer_that_nobody_prepared_loads_the_best_checkpoint_of_a_graph_without_ties(tmp_path: Path) -> None:
    mine = pair("bert")[0]
    options = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
    found = curve("bert", mine, tmp_path, bare, metric_for_best_model="loss", **options)
    losses = [entry["eval_loss"] for entry in found if "eval_loss" in entry]
    best = load_file(tmp_path / f"checkpoint-{losses.index(max(losses)) + 1}" / "model.safetensors")
    assert losses.index(max(losses)) < 2
    assert all(torch.equal(value, best[name]) for name, value in mine.state_dict().items())


def test_the_class_of_a_graph_has_the_name_by_which_transformers_decides(tmp_path: Path) -> None:
    """Whether a loss shifts labels, which inputs are labels, what a pipeline does."""
    for module, name in (
        (pair("question answering")[0], "BertForQuestionAnswering"),
        (lora_fx.unload(pair("bert")[0]), "BertForSequenceClassification"),
        (copy.deepcopy(graph()), "GPT2LMHeadModel"),
        (lora_fx.trace(nn.Sequential(nn.Linear(3, 2)), (torch.ones(2, 3),)), "GraphModule"),
    ):
        assert (type(module).__name__, module._get_name()) == (name, name)
