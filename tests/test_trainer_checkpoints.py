"""Checkpoints of a prepared ``Trainer``: PEFT's layout and PEFT's curve, whoever wrote the checkpoint and whatever makes the model."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import json
import shutil
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import build
from conftest import set_factors
from safetensors.torch import load_file
from torch import nn
from transformers.trainer_utils import HPSearchBackend

import lora_fx
from lora_fx.adapters.peft_format.directories import OTHER_NAME
from lora_fx.trainer import PRIVATE_NAMES, AdapterCallback, prepare

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.xdist_group("trainer checkpoints")]

STEPS, VOCABULARY = 4, 37
TARGETS = ["q_proj", "v_proj"]


@functools.cache
def base(tied: bool) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


@functools.cache
def traced(tied: bool) -> lora_fx.TracedGraphModule:
    return lora_fx.trace(base(tied), labels=True)


def rules(rank: int = 3) -> dict[str, Any]:
    return {"defaults": {"rank": rank, "alpha": 5}, "select": [{"target": TARGETS}]}


@functools.cache
def rewritten(tied: bool, adapter: str, rank: int) -> lora_fx.TracedGraphModule:
    graph = lora_fx.rewrite(traced(tied), rules=rules(rank), adapter=adapter)
    set_factors(graph)
    return graph


def graph(tied: bool = True, adapter: str = "default", rank: int = 3) -> lora_fx.TracedGraphModule:
    return copy.deepcopy(rewritten(tied, adapter, rank))


def wrapped(tied: bool = True, adapter: str = "default") -> peft.PeftModel:
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS)
    model = peft.get_peft_model(copy.deepcopy(base(tied)), config, adapter_name=adapter)
    set_factors(model.base_model.model)
    return model


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Return rows of unequal length: without padding transformers gives its model no mask, and other bits."""
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, VOCABULARY, (6 + index % 3,), generator=generator) for index in range(count)]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each), "labels": each.clone()} for each in ids]


def collated(examples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    columns = {
        name: [nn.functional.pad(each[name], (0, 9 - len(each[name])), value=padding[name]) for each in examples]
        for name in padding
    }
    return {name: torch.stack(column) for name, column in columns.items()}


SAVING = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
}  # the first, not the last


def trainer_of(model: Any, directory: Path, *callbacks: Any, **options: Any) -> transformers.Trainer:
    """Return a trainer of a model, or of what a function makes."""
    arguments = transformers.TrainingArguments(
        str(directory),
        **{
            "per_device_train_batch_size": 2,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            **SAVING,
            **options,
        },
    )
    how = {"model": model} if isinstance(model, nn.Module) else {"model_init": model}
    trainer = transformers.Trainer(
        args=arguments,
        train_dataset=rows(6),
        eval_dataset=rows(3),
        data_collator=collated,
        callbacks=list(callbacks),
        **how,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def prepared(model: Any, directory: Path, **options: Any) -> transformers.Trainer:
    trainer = trainer_of(model, directory, **options)
    prepare(trainer)
    return trainer


def curve(trainer: transformers.Trainer) -> list[float]:
    return [
        value for entry in trainer.state.log_history for key, value in entry.items() if key in ("loss", "eval_loss")
    ]


def factors(module: nn.Module) -> dict[str, torch.Tensor]:
    named = ((name.removeprefix("base_model.model."), p) for name, p in module.named_parameters())
    return {name: p.detach().clone() for name, p in named if ".lora_" in name}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", params=[pytest.param(True, marks=pytest.mark.matrix), False], ids=["tied", "untied"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what PEFT's and a prepared trainer did, uninterrupted, and where their checkpoints are."""
    tied, directory = request.param, tmp_path_factory.mktemp("runs")
    theirs = trainer_of(wrapped(tied), directory / "peft")
    mine = prepared(graph(tied), directory / "mine")
    older = trainer_of(graph(tied), directory / "older", AdapterCallback())
    for trainer in (theirs, mine, older):
        trainer.train()
    return {"tied": tied, "directory": directory, "peft": theirs, "mine": mine, "older": older}


def test_a_prepared_trainer_has_the_curve_and_the_checkpoints_of_peft(runs: dict[str, Any]) -> None:
    assert len(set(curve(runs["peft"]))) == STEPS + STEPS // 2
    assert curve(runs["mine"]) == curve(runs["older"]) == curve(runs["peft"])
    for step in (2, 4):
        mine, theirs = (runs["directory"] / who / f"checkpoint-{step}" for who in ("mine", "peft"))
        assert files(mine) == files(theirs) - {"README.md"}
        assert "model.safetensors" not in files(mine)
        assert equal(load_file(mine / "adapter_model.safetensors"), load_file(theirs / "adapter_model.safetensors"))


@pytest.mark.parametrize("writer", ["mine", "peft", "older"])
def test_a_prepared_trainer_resumes_whoever_wrote_the_checkpoint(
    writer: str, runs: dict[str, Any], tmp_path: Path
) -> None:
    """``older`` is a callback alone, whose checkpoints have a ``model.safetensors``."""
    trainer = prepared(graph(runs["tied"]), tmp_path, **BEST, save_total_limit=1)
    other = graph(runs["tied"])
    set_factors(other, seed=5)  # what the checkpoint has is to come from there
    trainer.model.load_state_dict(other.state_dict())
    first = runs["directory"] / writer / "checkpoint-2"
    trainer.train(resume_from_checkpoint=str(first))
    assert curve(trainer) == curve(runs["peft"])
    # The state of the interrupted run had no best checkpoint: that of step 4 is the best of this one.
    assert equal(factors(trainer.model), factors(runs["peft"].model))


@pytest.mark.matrix
@pytest.mark.parametrize("variant", ["use_dora", "lora_bias"])
def test_a_variant_has_the_curve_and_the_checkpoints_of_peft_and_resumes(variant: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, lora_dropout=0.0, **{variant: True})

    def both() -> tuple[Any, lora_fx.TracedGraphModule]:
        model = copy.deepcopy(base(True))
        torch.manual_seed(4)
        model = peft.get_peft_model(model, config)
        return model, lora_fx.rewrite(traced(True), config, seed=4)

    model, own = both()
    theirs, mine = trainer_of(model, tmp_path / "peft"), prepared(own, tmp_path / "mine")
    for trainer in (theirs, mine):
        trainer.train()
    assert curve(mine) == curve(theirs)
    saved = [load_file(tmp_path / who / "checkpoint-2" / "adapter_model.safetensors") for who in ("mine", "peft")]
    assert equal(*saved)
    for writer in ("mine", "peft"):
        resumed = prepared(both()[1], tmp_path / f"from {writer}")
        resumed.train(resume_from_checkpoint=str(tmp_path / writer / "checkpoint-2"))
        assert curve(resumed) == curve(theirs)
        assert equal(factors(resumed.model), factors(theirs.model))


def test_peft_resumes_from_a_checkpoint_of_a_prepared_trainer(runs: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(wrapped(runs["tied"]), tmp_path)
    set_factors(trainer.model.base_model.model, seed=5)
    trainer.train(resume_from_checkpoint=str(runs["directory"] / "mine" / "checkpoint-2"))
    assert curve(trainer) == curve(runs["peft"])


@pytest.mark.parametrize("writer", ["mine", "peft"])
def test_the_best_model_is_loaded_in_the_end_also_if_peft_wrote_it(
    writer: str, runs: dict[str, Any], tmp_path: Path
) -> None:
    """The run is PEFT's or a prepared trainer's up to step 2, which has the largest loss and so is the best."""
    start = tmp_path / "checkpoint-2"
    shutil.copytree(runs["directory"] / writer / "checkpoint-2", start)
    state = json.loads((start / "trainer_state.json").read_text())
    best = {"best_model_checkpoint": str(start), "best_global_step": 2, "best_metric": 1e9}
    (start / "trainer_state.json").write_text(json.dumps({**state, **best}))
    trainer = prepared(graph(runs["tied"]), tmp_path, **BEST)
    trainer.train(resume_from_checkpoint=str(start))
    assert curve(trainer) == curve(runs["peft"])
    assert trainer.state.best_model_checkpoint == str(start)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base(runs["tied"])), start)
    assert equal(factors(trainer.model), factors(model))
    assert not equal(factors(trainer.model), factors(runs["peft"].model))


def test_save_model_writes_into_a_directory_and_leaves_other_files(runs: dict[str, Any], tmp_path: Path) -> None:
    trainer, final = runs["mine"], tmp_path / "final"
    final.mkdir()
    for name in ("model.safetensors", "notes.txt"):
        (final / name).write_text("of the user")
    for _ in range(2):  # what is there from the first time is replaced
        trainer.save_model(str(final))
    assert files(final) == {
        *("adapter_config.json", "adapter_model.safetensors", "training_args.bin"),
        *("model.safetensors", "notes.txt"),
    }
    assert {(final / name).read_text() for name in ("model.safetensors", "notes.txt")} == {"of the user"}
    assert isinstance(trainer.model, lora_fx.TracedGraphModule)
    batch = collated(rows(2))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base(runs["tied"])), final).eval()
    assert torch.equal(theirs(**batch).logits, trainer.model.eval()(**batch).logits)


def test_what_is_pushed_has_the_adapter(tmp_path: Path) -> None:
    trainer, pushed = prepared(graph(), tmp_path), []
    trainer.args.push_to_hub = True
    trainer.push_to_hub = lambda **_: pushed.append(files(tmp_path))
    trainer.save_model()
    assert pushed == [{"adapter_config.json", "adapter_model.safetensors", "training_args.bin"}]


def test_adapters_of_other_names_are_in_directories_of_their_names(tmp_path: Path) -> None:
    def both() -> lora_fx.TracedGraphModule:
        made = lora_fx.rewrite(graph(), rules=rules(2), adapter="style", seed=1)
        return lora_fx.activate(made, {"default": 1.0, "style": 1.0})

    trainer = prepared(both(), tmp_path)
    trainer.train()
    inner = {"adapter_config.json", "adapter_model.safetensors"}
    assert {name for name in files(tmp_path / "checkpoint-2") if "adapter" in name} == inner | {
        f"style/{name}" for name in inner
    }
    resumed = prepared(both(), tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert curve(resumed) == curve(trainer)
    assert equal(factors(resumed.model), factors(trainer.model))


def test_prepare_changes_a_trainer_once_and_stands_in_for_a_callback(tmp_path: Path) -> None:
    trainer = trainer_of(graph(), tmp_path, AdapterCallback(), max_steps=1, save_steps=1)
    prepare(trainer)
    saving = trainer.save_model
    prepare(trainer)
    assert trainer.save_model is saving
    assert sum(isinstance(each, AdapterCallback) for each in trainer.callback_handler.callbacks) == 1
    trainer.train()
    assert not (tmp_path / "checkpoint-1" / "default").exists()


@pytest.mark.parametrize(("tied", "arguments"), [(True, 0), (False, 1)])
def test_checkpoints_are_of_the_model_that_model_init_makes(tied: bool, arguments: int, tmp_path: Path) -> None:
    def init(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        return (lambda: make(tied)) if arguments == 0 else (lambda _trial: make(tied))

    theirs = trainer_of(init(wrapped), tmp_path / "peft")
    mine = prepared(init(graph), tmp_path / "mine")
    alone = trainer_of(init(graph), tmp_path / "alone", AdapterCallback())
    for trainer in (theirs, mine, alone):
        first = trainer.model
        trainer.train()
        assert trainer.model is not first
    assert curve(mine) == curve(alone) == curve(theirs)
    assert "model.safetensors" not in files(tmp_path / "mine" / "checkpoint-2")
    assert load_file(tmp_path / "alone/checkpoint-2/model.safetensors").keys() == factors(mine.model).keys()
    for writer in ("mine", "peft"):
        again = prepared(init(graph), tmp_path / "again")
        again.train(resume_from_checkpoint=str(tmp_path / writer / "checkpoint-2"))
        assert curve(again) == curve(theirs)
    resumed = trainer_of(init(graph), tmp_path / "again", AdapterCallback())
    with pytest.raises(
        lora_fx.LoraFxError,
        match=r"expected the graph that it was given, got another one, of model_init, resumed at step 2 before the callback saw it: "
        r"whether the checkpoint's adapters are the graph's is not known. Call lora_fx.trainer.prepare\(trainer\) instead",
    ):
        resumed.train(resume_from_checkpoint=str(tmp_path / "alone" / "checkpoint-2"))


class _Trials:
    """A backend of hyper-parameter searches without a library: two trials, of two learning rates."""

    default_hp_space = None

    def ensure_available(self) -> None:
        pass

    def run(self, trainer: transformers.Trainer, _n_trials: int, _direction: str) -> list[list[float]]:
        curves = []
        for number, rate in enumerate((1e-2, 3e-2)):
            trainer.train(trial=types.SimpleNamespace(number=number, params={"learning_rate": rate}))
            curves.append(curve(trainer))
            trainer.model_wrapped = trainer.model = None
        return curves


def search(trainer: transformers.Trainer, monkeypatch: pytest.MonkeyPatch) -> Any:
    backends = inspect.getmodule(transformers.Trainer).ALL_HYPERPARAMETER_SEARCH_BACKENDS  # type: ignore[union-attr]
    monkeypatch.setitem(backends, HPSearchBackend.OPTUNA, _Trials)
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    return trainer.hyperparameter_search(hp_space=lambda trial: trial.params, backend="optuna", n_trials=2)


@pytest.mark.parametrize("tied", [True, False])
def test_trials_of_a_search_have_the_curves_of_peft_and_checkpoints_of_their_own(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = search(trainer_of(lambda: wrapped(tied), tmp_path / "peft", eval_strategy="no"), monkeypatch)
    found = search(prepared(lambda: graph(tied), tmp_path / "mine", eval_strategy="no"), monkeypatch)
    assert found == wanted
    assert found[0] != found[1]
    for run, step in itertools.product((0, 1), (2, 4)):
        mine, theirs = (tmp_path / who / f"run-{run}" / f"checkpoint-{step}" for who in ("mine", "peft"))
        assert files(mine) == files(theirs) - {"README.md"}
        assert equal(load_file(mine / "adapter_model.safetensors"), load_file(theirs / "adapter_model.safetensors"))
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"run-0", "run-1"}


def test_a_callback_alone_refuses_a_search_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(lambda: graph(), tmp_path, AdapterCallback())
    with pytest.raises(
        lora_fx.LoraFxError,
        match="AdapterCallback would write the adapters of all trials of a hyper-parameter search to the same directories: a "
        r"callback is not told which the trainer takes. Call lora_fx.trainer.prepare\(trainer\) instead",
    ):
        search(trainer, monkeypatch)
    assert trainer.state.global_step == 0
    assert equal(factors(trainer.model), factors(graph()))


OTHERS = [
    ({"adapter": "other"}, r"expected the graph's adapter 'other' \(rank 3\), got adapter 'default' \(rank 3\)"),
    ({"rank": 2}, r"expected the graph's adapter 'default' \(rank 2\), got adapter 'default' \(rank 3\)"),
]


@pytest.mark.parametrize(("other", "message"), OTHERS)
@pytest.mark.parametrize("writer", ["mine", "peft", "older", "callback alone"])
def test_a_checkpoint_of_other_adapters_is_refused_before_the_first_step(
    writer: str, other: dict[str, Any], message: str, runs: dict[str, Any], tmp_path: Path
) -> None:
    """``callback alone`` is the case without ``prepare``, which reads what a callback alone wrote."""
    made = graph(runs["tied"], **other)
    trainer = trainer_of(made, tmp_path, AdapterCallback()) if writer == "callback alone" else prepared(made, tmp_path)
    before = factors(made)
    directory = runs["directory"] / ("older" if writer == "callback alone" else writer) / "checkpoint-2"
    where = "the state dict that is loaded" if writer == "callback alone" else str(directory)
    with pytest.raises(
        lora_fx.AdapterError,
        match=f"{where}:\\s+{message}: training would not go on where it stopped. Give the graph the checkpoint's adapters, by the "
        "same names and rules, or begin anew.",
    ):
        trainer.train(resume_from_checkpoint=str(directory))
    assert trainer.state.global_step == 0
    assert equal(factors(made), before)


def test_a_checkpoint_without_adapters_is_refused(tmp_path: Path) -> None:
    whole = trainer_of(copy.deepcopy(base(False)), tmp_path, max_steps=1, save_steps=1)
    whole.train()
    with pytest.raises(
        lora_fx.AdapterError, match=r"expected the graph's adapter 'default' \(rank 3\), got no adapter"
    ):
        prepared(graph(False), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_checkpoint_of_a_graph_without_callback_is_resumed(runs: dict[str, Any], tmp_path: Path) -> None:
    """Its ``model.safetensors`` has the whole state, which cannot be written with ties."""
    if runs["tied"]:
        with pytest.raises(
            lora_fx.LoraFxError, match=r"'model.embed_tokens.weight' and 'lm_head.weight' are one tensor"
        ):
            trainer_of(graph(True), tmp_path).train()
        return
    trainer_of(graph(False), tmp_path).train()
    trainer = prepared(graph(False), tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert curve(trainer) == curve(runs["peft"])


def test_a_parameter_that_was_made_trainable_by_hand_is_in_the_checkpoint(runs: dict[str, Any], tmp_path: Path) -> None:
    def made() -> lora_fx.TracedGraphModule:
        result = graph(runs["tied"])
        result.get_parameter("model.norm.weight").requires_grad_(True)
        return result

    trainer = prepared(made(), tmp_path)
    trainer.train()
    assert load_file(tmp_path / "checkpoint-2" / OTHER_NAME).keys() == {"model.norm.weight"}
    again = prepared(made(), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert curve(again) == curve(trainer)
    with pytest.raises(
        lora_fx.AdapterError, match=r"model.norm.weight: trains in the graph, and the checkpoint has no value of it"
    ):
        prepared(made(), tmp_path / "again").train(
            resume_from_checkpoint=str(runs["directory"] / "peft" / "checkpoint-2")
        )


@functools.cache
def gpt2() -> nn.Module:
    """Return GPT-2 without dropout, so that nothing depends on a random state."""
    model = build("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@functools.cache
def fused_projection() -> lora_fx.TracedGraphModule:
    return lora_fx.trace(gpt2(), labels=True)


def test_a_layer_norm_that_trains_has_no_weight_decay_as_with_peft(tmp_path: Path) -> None:
    """Else the optimizer's groups, and with them its state in PEFT's checkpoint, would be of other parameters."""
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["c_attn"], modules_to_save=["ln_f"], fan_in_fan_out=True
    )
    model = peft.get_peft_model(copy.deepcopy(gpt2()), config)
    set_factors(model.base_model.model)
    model.save_pretrained(tmp_path / "start")
    made = lora_fx.from_adapter(fused_projection(), tmp_path / "start", trainable=True)
    theirs = trainer_of(model, tmp_path / "peft", weight_decay=0.5, eval_strategy="no")
    theirs.train()
    mine = prepared(made, tmp_path / "mine", weight_decay=0.5, eval_strategy="no")
    mine.train(resume_from_checkpoint=str(tmp_path / "peft" / "checkpoint-2"))
    assert curve(mine) == curve(theirs)
    wanted = load_file(tmp_path / "peft" / "checkpoint-4" / "adapter_model.safetensors")
    assert equal(load_file(tmp_path / "mine" / "checkpoint-4" / "adapter_model.safetensors"), wanted)
    assert any("ln_f" in name for name in wanted)


def test_branches_of_parts_are_resumed_from_the_one_branch_that_peft_has(tmp_path: Path) -> None:
    select = [{"role": ["attention.query"], "features": ["query", "value"]}]
    made = lora_fx.rewrite(fused_projection(), rules={"defaults": {"rank": 2, "alpha": 3}, "select": select})
    set_factors(made)
    whole, again = (prepared(copy.deepcopy(made), tmp_path / name, eval_strategy="no") for name in ("whole", "again"))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert curve(again) == curve(whole)
    assert equal(factors(again.model), factors(whole.model))


def test_an_adapter_that_peft_has_no_words_for_is_refused_before_the_first_step(tmp_path: Path) -> None:
    select = [{"target": ["c_attn"]}, {"regex": r"transformer\.h\.0\.ln_1\.bias", "trainable": "all"}]
    made = lora_fx.rewrite(fused_projection(), rules={"select": select})
    for trainer in (trainer_of(copy.deepcopy(made), tmp_path, AdapterCallback()), prepared(made, tmp_path)):
        with pytest.raises(
            lora_fx.AdapterError, match=r"adapter 'default' cannot be written for PEFT: transformer.h.0.ln_1.bias"
        ):
            trainer.train()
        assert trainer.state.global_step == 0


def test_prepare_warns_of_a_loss_that_is_a_sum_over_accumulated_batches(tmp_path: Path) -> None:
    made = lora_fx.rewrite(build("t5"), rules={"select": [{"target": ["q", "v"]}]}, labels=True)
    summing = {"gradient_accumulation_steps": 4}

    def of(graph_module: lora_fx.TracedGraphModule, *, accepts: bool, **options: Any) -> transformers.Trainer:
        arguments = transformers.Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **options)
        trainer = transformers.Seq2SeqTrainer(graph_module, arguments)
        trainer.model_accepts_loss_kwargs = trainer.model_accepts_loss_kwargs and accepts
        return trainer

    with pytest.warns(
        UserWarning,
        match="the loss of T5ForConditionalGeneration ignores num_items_in_batch, and transformers takes it to be used: nothing "
        "divides by the 4 accumulation steps, so that losses and gradients are sums over them, as they are with PEFT. For their "
        "mean set trainer.model_accepts_loss_kwargs = False.",
    ):
        prepare(of(made, accepts=True, **summing))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        prepare(of(made, accepts=True))
        prepare(of(made, accepts=False, **summing))
        prepare(of(graph(), accepts=True, **summing))


def test_prepare_says_what_it_needs(tmp_path: Path) -> None:
    trainer = trainer_of(copy.deepcopy(base(True)), tmp_path)
    with pytest.raises(
        lora_fx.LoraFxError,
        match=r"prepare expected a graph with adapters, and the trainer has a LlamaForCausalLM: make one by lora_fx.rewrite",
    ):
        prepare(trainer)
    assert "save_model" not in vars(trainer)
    with pytest.raises(
        lora_fx.LoraFxError,
        match="prepare expected a trainer of transformers, got a SimpleNamespace without add_callback, pop_callback, save_model, "
        "compute_loss, get_decay_parameter_names, _load_from_checkpoint, _load_best_model: give it the Trainer object itself",
    ):
        prepare(types.SimpleNamespace(model=graph()))


def test_the_private_names_that_prepare_wraps_are_there() -> None:
    """Where transformers renames them, prepare refuses, and this test says so first."""
    found = {name: tuple(inspect.signature(getattr(transformers.Trainer, name)).parameters) for name in PRIVATE_NAMES}
    assert found == {
        "_load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
        "_load_best_model": ("self",),
    }
