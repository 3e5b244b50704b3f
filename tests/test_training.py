"""A rewritten graph trains as PEFT does, in a loop as people write one.

Where PEFT's steps are asked for bit for bit, the same operators ran in the same order; in double precision and over ten steps
of single precision the promise is a tolerance, although no difference was seen there either.
"""

from __future__ import annotations

import copy
import functools
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import ARCHITECTURES, PRIMARY, branched, build, inputs, model, rows, traced
from conftest import all_acting, unchanged
from peft.optimizers import create_loraplus_optimizer
from torch import fx, nn
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

import lora_fx

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

RANK, ALPHA, RATE, CLIP, EPOCH = 6, 9, 1e-2, 0.03, 4
SAME, VARYING = ((3, 11, 5),), ((3, 11, 5), (4, 9, 2), (2, 7, 6), (1, 13, 3))
LLAMA = pytest.mark.xdist_group("llama")

Sizes = Sequence[tuple[int, int, int]]


def loss_of(output: Any, labels: torch.Tensor) -> torch.Tensor:
    """Return transformers' own loss of logits; of BERT, which has no head here, with its last hidden states for logits."""
    scores = output[0]
    if hasattr(output, "pooler_output"):
        return ForMaskedLMLoss(scores, labels, scores.shape[-1])
    if hasattr(output, "encoder_last_hidden_state"):
        return nn.CrossEntropyLoss(ignore_index=-100)(scores.view(-1, scores.shape[-1]), labels.view(-1))
    return ForCausalLMLoss(scores, labels, scores.shape[-1])


def batch_of(name: str, step: int, sizes: Sizes) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the inputs and labels of a step; each batch comes again after ``EPOCH`` steps."""
    index = step % EPOCH
    batch = inputs(name, *sizes[index % len(sizes)], seed=100 + index)
    shape = batch.get("decoder_input_ids", batch["input_ids"]).shape
    labels = torch.randint(0, 48, shape, generator=torch.Generator().manual_seed(200 + index))
    labels[0, 0] = -100  # not every token counts
    return batch, labels


class Run:
    """A fine-tune in progress: AdamW, a schedule, gradients clipped, and the model's own dropout under a known state."""

    def __init__(
        self,
        name: str,
        module: Any,
        *,
        sizes: Sizes = SAME,
        autocast: torch.dtype | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.name, self.module, self.sizes, self.autocast, self.scaler = name, module, sizes, autocast, scaler
        trained = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = optimizer or torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: (step + 1) / 3 if step < 2 else 1 - step / 60
        )
        self.steps, self.norm, self.gradients = 0, 0.0, dict[str, torch.Tensor]()

    def loss(self, step: int) -> torch.Tensor:
        batch, labels = batch_of(self.name, step, self.sizes)
        constants = {} if isinstance(self.module, lora_fx.TracedGraphModule) else ARCHITECTURES[self.name].constants
        with torch.random.fork_rng(), torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            torch.manual_seed(step)
            return loss_of(self.module(**batch, **constants), labels)

    def step(self) -> float:
        self.module.train()
        scaler = self.scaler or torch.amp.GradScaler("cpu", enabled=False)
        loss = self.loss(self.steps)
        scaler.scale(loss).backward()
        scaler.unscale_(self.optimizer)
        self.gradients = {key: p.grad.clone() for key, p in trained_of(self.module).items() if p.grad is not None}
        self.norm = float(nn.utils.clip_grad_norm_(trained_of(self.module).values(), CLIP))
        scaler.step(self.optimizer)
        scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return loss.item()

    def take(self, steps: int) -> list[float]:
        return [self.step() for _ in range(steps)]

    def evaluation(self) -> float:
        self.module.eval()
        with torch.no_grad():
            return sum(self.loss(step).item() for step in range(EPOCH))

    def states(self) -> tuple[Any, Any]:
        """Return the states of optimizer and schedule, as a checkpoint has them."""
        return copy.deepcopy(self.optimizer.state_dict()), self.schedule.state_dict()

    def go_on(self, module: Any, states: tuple[Any, Any]) -> Run:
        """Return the same run with another module, from where this one was when it gave its states."""
        other = Run(self.name, module, sizes=self.sizes)
        other.optimizer.load_state_dict(states[0])
        other.schedule.load_state_dict(states[1])
        other.steps = self.steps
        return other


def trained_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains, by names that are the same here and in PEFT."""
    words = r"base_model\.model\.|base_layer\.|modules_to_save\.default\.|trained_copy\.default\."
    plain = {re.sub(words, "", name): p for name, p in module.named_parameters() if p.requires_grad}
    named = {re.sub(r"lora_embedding_(.)\.default$", r"lora_\1.default.weight", name): p for name, p in plain.items()}
    return dict(sorted(named.items()))  # the norm of all gradients is a sum in this order


def base_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of the model that a graph was traced from, buffers too."""
    return {
        key: tensor for key, tensor in module.state_dict().items() if "lora_" not in key and "trained_copy" not in key
    }


@functools.cache
def model_as(name: str, dtype: torch.dtype) -> nn.Module:
    return model(name) if dtype == torch.float32 else build(name).to(dtype).requires_grad_(False)


@functools.cache
def traced_as(name: str, dtype: torch.dtype) -> lora_fx.TracedGraphModule:
    return traced(name) if dtype == torch.float32 else lora_fx.trace(model_as(name, dtype))


def ours(
    name: str, rules: Any = None, dtype: torch.dtype = torch.float32, **settings: Any
) -> lora_fx.TracedGraphModule:
    settings = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "seed": 5, **settings}
    return lora_fx.rewrite(traced_as(name, dtype), rules or ARCHITECTURES[name].rules, **settings)


def theirs(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    said = {
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(ARCHITECTURES[name].target_modules),
        "fan_in_fan_out": ARCHITECTURES[name].fan_in_fan_out,
    }
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return peft.get_peft_model(copy.deepcopy(model_as(name, dtype)), peft.LoraConfig(**{**said, **settings}))


def equal(mine: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


def in_step(mine: Run, other: Run, steps: int, tolerance: float = 0.0) -> list[float]:
    """Take steps on both sides and compare losses, gradients and parameters after each; return the losses."""
    losses = []
    assert equal(trained_of(mine.module), trained_of(other.module))
    for step in range(steps):
        losses.append(mine.step())
        assert abs(losses[-1] - (expected := other.step())) <= tolerance * abs(expected), step
        assert mine.gradients.keys() == other.gradients.keys()
        pairs = ((mine.gradients, other.gradients), (trained_of(mine.module), trained_of(other.module)))
        for (key, value), reference in ((item, right[item[0]]) for left, right in pairs for item in left.items()):
            assert value.dtype == reference.dtype, key
            assert (value - reference).norm() <= tolerance * reference.norm(), (step, key)
    return losses


@pytest.mark.parametrize(
    ("name", "dtype", "steps", "tolerance", "sizes"),
    [
        pytest.param(*row.values, *setting, marks=row.marks)
        for *setting, representatives in (
            (torch.float64, 50, 1e-9, SAME, ("gpt2",)),
            (torch.float64, 50, 1e-9, VARYING, ("bert",)),
            (torch.float32, 10, 1e-5, SAME, ("llama",)),
            (torch.float32, 10, 1e-5, VARYING, ("gpt2",)),
        )
        for row in rows(("t5", "gpt2", "llama", "bert"), representatives)
    ],
    ids=lambda value: (
        ("sizes that change" if value is VARYING else "one size") if isinstance(value, tuple) else str(value)
    ),
)
def test_a_fine_tune_matches_peft_step_by_step(
    name: str, dtype: torch.dtype, steps: int, tolerance: float, sizes: Sizes
) -> None:
    mine = Run(name, ours(name, dtype=dtype), sizes=sizes)
    other = Run(name, theirs(name, dtype), sizes=sizes)
    before = mine.evaluation()
    in_step(mine, other, steps, tolerance)
    assert mine.norm > CLIP  # so gradients were clipped
    assert mine.evaluation() < before


@pytest.mark.parametrize("name", PRIMARY)
def test_only_adapter_parameters_change(name: str) -> None:
    graph_module = ours(name, dropout=0.1)
    adapter, base = trained_of(graph_module), base_of(graph_module)
    kept, start = ({key: value.clone() for key, value in part.items()} for part in (base, adapter))
    # Also where the optimizer is given all parameters, with a weight decay.
    optimizer = torch.optim.AdamW(graph_module.parameters(), lr=RATE, weight_decay=0.5)
    with unchanged(model(name)), unchanged(traced(name)):
        Run(name, graph_module, optimizer=optimizer).take(3)
    assert equal(base_of(graph_module), kept)
    assert set(base) == set(model(name).state_dict())
    assert equal(model(name).state_dict(), kept)
    assert not any(torch.equal(value, start[key]) for key, value in adapter.items())
    frozen = [p for p in graph_module.parameters() if not p.requires_grad]
    assert len(frozen) > len(adapter)
    assert all(p.grad is None for p in frozen)


@LLAMA
def test_modes_keep_frozen_parts_frozen() -> None:
    graph_module = ours("llama", {"select": [{"target": ["q_proj"]}, {"target": ["lm_head"], "trainable": "all"}]})
    before = {key: p.requires_grad for key, p in graph_module.named_parameters()}
    assert {key for key, trains in before.items() if trains} == {
        *(
            f"model.layers.{layer}.self_attn.q_proj.lora_{factor}.default.weight"
            for layer in range(2)
            for factor in "AB"
        ),
        "lm_head.trained_copy.default.weight",
    }
    for switched in (
        graph_module.train(),
        graph_module.eval(),
        graph_module.train(),
        copy.deepcopy(graph_module).train(),
    ):
        assert {key: p.requires_grad for key, p in switched.named_parameters()} == before


# Precision


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PRIMARY)
def test_a_step_under_autocast_is_bit_equal_to_peft(name: str, narrow: torch.dtype) -> None:
    mine, other = (Run(name, module, autocast=narrow, sizes=VARYING) for module in (ours(name), theirs(name)))
    plain = Run(name, ours(name), sizes=VARYING)
    losses = in_step(mine, other, 5)
    assert {p.dtype for p in trained_of(mine.module).values()} == {torch.float32}
    assert {g.dtype for g in mine.gradients.values()} == {torch.float32}
    wide = plain.take(5)
    assert losses != wide
    assert losses == pytest.approx(wide, rel=0.02)


NARROW = [
    *(  # a trace of T5 takes as long as those of the others together
        pytest.param(each.values[0], torch.bfloat16, marks=each.marks, id=f"bf16-{each.values[0]}")
        for each in rows(("gpt2", "llama", "bert"), ("gpt2",))
    ),
    pytest.param("llama", torch.float16, marks=LLAMA, id="fp16-llama"),
]


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(("name", "dtype"), NARROW)
def test_a_half_precision_base_trains_fp32_adapters_as_peft_does(name: str, dtype: torch.dtype, autocast: bool) -> None:
    mine, other = (
        Run(name, module, autocast=dtype if autocast else None, sizes=VARYING)
        for module in (ours(name, dtype=dtype), theirs(name, dtype))
    )
    kept = {key: value.clone() for key, value in base_of(mine.module).items()}
    in_step(mine, other, 5)
    assert {p.dtype for p in trained_of(mine.module).values()} == {torch.float32}
    assert {g.dtype for g in mine.gradients.values()} == {torch.float32}
    assert dtype in {value.dtype for value in kept.values()}
    assert equal(base_of(mine.module), kept)


@LLAMA
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float16, None), (torch.float32, torch.float16)], ids=["fp16 base", "autocast"]
)
def test_scaled_gradients_unscale_to_those_without_a_scaler(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    """Up to what half precision loses of small gradients without a scaler; with one, PEFT's steps bit for bit."""
    scaled = Run("llama", ours("llama", dtype=dtype), autocast=autocast, scaler=torch.amp.GradScaler("cpu", 2.0**10))
    other = Run("llama", theirs("llama", dtype), autocast=autocast, scaler=torch.amp.GradScaler("cpu", 2.0**10))
    plain = Run("llama", ours("llama", dtype=dtype), autocast=autocast)
    in_step(scaled, other, 1)
    plain.step()
    for key, gradient in plain.gradients.items():
        assert (scaled.gradients[key] - gradient).norm() <= 5e-3 * gradient.norm(), key
    assert sum(float(gradient.norm()) for gradient in plain.gradients.values()) > 0
    in_step(scaled, other, 4)


@LLAMA
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float16, None), (torch.float32, torch.float16)], ids=["fp16 base", "autocast"]
)
def test_a_step_that_overflows_is_skipped_by_a_scaler(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    graph_module = ours("llama", dtype=dtype)
    scaler = torch.amp.GradScaler("cpu", 2.0**30, backoff_factor=2.0**-20)
    run = Run("llama", graph_module, autocast=autocast, scaler=scaler)
    before = {key: p.detach().clone() for key, p in trained_of(graph_module).items()}
    run.step()
    assert not all(gradient.isfinite().all() for gradient in run.gradients.values())
    assert equal(trained_of(graph_module), before)
    assert scaler.get_scale() == 2.0**10
    run.step()
    assert all(gradient.isfinite().all() for gradient in run.gradients.values())
    assert not equal(trained_of(graph_module), before)


@LLAMA
@pytest.mark.parametrize(
    ("dtype", "autocast", "scale"),
    [
        (torch.float32, torch.bfloat16, None),
        (torch.bfloat16, None, None),
        (torch.float16, None, 2.0**10),
        (torch.float32, torch.float16, 2.0**10),
    ],
    ids=["autocast bf16", "bf16 base", "fp16 base, scaler", "autocast fp16, scaler"],
)
def test_a_fused_graph_trains_in_mixed_precision(
    dtype: torch.dtype, autocast: torch.dtype | None, scale: float | None
) -> None:
    """As the plain graph does, up to the rounding of half precision: its sums are rounded at other places."""
    plain, fused = (
        Run("llama", made, autocast=autocast, scaler=scale and torch.amp.GradScaler("cpu", scale))
        for made in (ours("llama", dtype=dtype), lora_fx.fuse(ours("llama", dtype=dtype)))
    )
    for _ in range(4):
        assert fused.step() == pytest.approx(plain.step(), rel=1e-3)
        for key, gradient in plain.gradients.items():
            assert fused.gradients[key].dtype == torch.float32
            assert (fused.gradients[key] - gradient).norm() <= 0.05 * gradient.norm(), key
    assert not equal(trained_of(fused.module), trained_of(ours("llama", dtype=dtype)))


# What PEFT's config can say


def each_layer(rank: Callable[[int], int], alpha: Callable[[int], float]) -> dict[str, Any]:
    """Return rules with a rank and an alpha of its own in every layer of the Llama."""
    select = [
        {"target": ["q_proj", "v_proj"], "layers": [layer], "rank": rank(layer), "alpha": alpha(layer)}
        for layer in range(2)
    ]
    return {"select": select}


Q_AND_V = {"target": ["q_proj", "v_proj"]}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rslora": (
        "llama",
        {"defaults": {"scaling": "rslora"}, "select": [Q_AND_V]},
        {"use_rslora": True},
    ),
    "a rank and an alpha in each layer": (
        "llama",
        each_layer(lambda layer: 2 + layer, lambda layer: 7 - 2 * layer),
        {
            "rank_pattern": {
                f"layers.{layer}.self_attn.{part}": 2 + layer for layer in range(2) for part in ("q_proj", "v_proj")
            },
            "alpha_pattern": {f"layers.{layer}.self_attn.[qv]_proj": 7 - 2 * layer for layer in range(2)},
        },
    ),
    "an alpha of its own": (
        "llama",
        {"select": [{"target": ["q_proj"]}, {"target": ["v_proj"], "alpha": 4}]},
        {"alpha_pattern": {"v_proj": 4}},
    ),
    "dropout": ("t5", {"select": [{"target": ["q", "v"], "dropout": 0.3}]}, {"lora_dropout": 0.3}),
    "dropout in a fused projection": (
        "gpt2",
        {"select": [{"target": ["c_attn"], "dropout": 0.3}]},
        {"lora_dropout": 0.3},
    ),
    "biases of the targets": (
        "bert",
        {"select": [{"target": ["query", "value"]}, {"target": ["query", "value"], "trainable": "bias"}]},
        {"bias": "lora_only"},
    ),
    "all biases": (
        "bert",
        {"select": [{"target": ["query", "value"]}, {"regex": ".*", "trainable": "bias"}]},
        {"bias": "all"},
    ),
    "modules": (
        "llama",
        {"select": [Q_AND_V, {"target": ["lm_head", "model.norm"], "trainable": "all"}]},
        {"modules_to_save": ["lm_head", "model.norm"]},
    ),
}


@pytest.mark.parametrize(
    "variant", [pytest.param(key, marks=pytest.mark.xdist_group(name)) for key, (name, _, _) in VARIANTS.items()]
)
def test_what_a_config_of_peft_says_trains_as_a_rule_file(variant: str) -> None:
    name, rules, config = VARIANTS[variant]
    with unchanged(model(name)):
        mine, other = (Run(name, made) for made in (ours(name, rules, dropout=None), theirs(name, **config)))
        usual = Run(name, ours(name))
        losses = in_step(mine, other, 6)
    assert losses != usual.take(6)


# In the middle of a run


def loaded_strictly(graph_module: lora_fx.TracedGraphModule, directory: Path) -> lora_fx.TracedGraphModule:
    """Return a new rewrite, from other factors, with the state of a graph that was written to a file."""
    torch.save(graph_module.state_dict(), directory / "state.pt")
    fresh = ours("llama", MIXED, seed=99)
    fresh.load_state_dict(torch.load(directory / "state.pt", weights_only=True), strict=True)
    return fresh


def adapter_loaded(graph_module: lora_fx.TracedGraphModule, directory: Path) -> lora_fx.TracedGraphModule:
    lora_fx.save_adapter(graph_module, directory / "adapter")
    return lora_fx.load_adapter(ours("llama", MIXED, seed=99), directory / "adapter")


def from_adapter(graph_module: lora_fx.TracedGraphModule, directory: Path) -> lora_fx.TracedGraphModule:
    lora_fx.save_adapter(graph_module, directory / "adapter")
    return lora_fx.from_adapter(traced("llama"), directory / "adapter", trainable=True)


MIXED = {"select": [{"target": ["q_proj", "up_proj"], "dropout": 0.2}, {"target": ["lm_head"], "trainable": "all"}]}
CONTINUED: dict[str, Callable[[lora_fx.TracedGraphModule, Path], lora_fx.TracedGraphModule]] = {
    "deepcopy": lambda graph_module, _: copy.deepcopy(graph_module),
    "pickle": lambda graph_module, _: pickle.loads(pickle.dumps(graph_module)),
    "state_dict": loaded_strictly,
    "load_adapter": adapter_loaded,
    "from_adapter": from_adapter,
    "transfer": lambda graph_module, _: lora_fx.transfer(graph_module, onto=ours("llama", MIXED, seed=99)),
    "to(device)": lambda graph_module, _: graph_module.to("cpu"),
}


@LLAMA
@pytest.mark.parametrize("how", CONTINUED)
def test_a_run_goes_on_bit_for_bit(how: str, tmp_path: Path) -> None:
    """Factors, a trained head and the optimizer's state; with dropout, and parameters in the same order."""
    run = Run("llama", ours("llama", MIXED, dropout=None), sizes=VARYING)
    run.take(3)
    undisturbed, states = run.go_on(copy.deepcopy(run.module), run.states()), run.states()
    expected = undisturbed.take(5)
    resumed = run.go_on(CONTINUED[how](run.module, tmp_path).train(), states)
    assert resumed.take(5) == expected
    assert equal(trained_of(resumed.module), trained_of(undisturbed.module))
    assert len(set(expected)) == 5


@LLAMA
def test_a_copy_in_the_middle_of_a_run_shares_nothing_with_it() -> None:
    run = Run("llama", ours("llama"))
    run.take(2)
    copied = copy.deepcopy(run.module)
    kept = {key: value.clone() for key, value in copied.state_dict().items()}
    run.take(2)
    assert equal(copied.state_dict(), kept)
    assert not equal(trained_of(run.module), trained_of(copied))


@LLAMA
@pytest.mark.parametrize("convert", [lambda gm: gm.to(torch.bfloat16), lambda gm: gm.half(), lambda gm: gm.double()])
def test_a_change_of_dtype_is_refused_and_the_run_goes_on(convert: Callable[[Any], Any]) -> None:
    run, undisturbed = Run("llama", ours("llama")), Run("llama", ours("llama"))
    run.take(2)
    with pytest.raises(lora_fx.LoraFxError, match=r"keeps its dtype.*trace it again, or use torch\.autocast"):
        convert(run.module)
    assert run.take(2) == undisturbed.take(4)[2:]
    assert {p.dtype for p in run.module.parameters()} == {torch.float32}


@LLAMA
def test_a_trained_adapter_evaluates_alike_on_a_trace_for_inference() -> None:
    run = Run("llama", ours("llama", MIXED, dropout=None))
    before = run.evaluation()
    run.take(4)
    moved = lora_fx.transfer(run.module, onto=lora_fx.trace(model("llama"), inference=True))
    assert Run("llama", moved, optimizer=run.optimizer).evaluation() == run.evaluation() < before
    assert trained_of(moved) == {}


# LoRA+

PLUS = {"select": [{"target": ["q_proj", "v_proj", "embed_tokens"]}]}
PLUS_IN_PEFT = {"target_modules": ["q_proj", "v_proj", "embed_tokens"]}


def loraplus(module: Any, **settings: Any) -> torch.optim.Optimizer:
    settings = {"lr": 2e-3, "loraplus_lr_ratio": 8.0, **settings}
    return create_loraplus_optimizer(module, torch.optim.AdamW, **settings)


def rates_of(module: nn.Module, groups: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return rate and weight decay of each parameter that trains, which must be in one group."""
    names = {id(p): key for key, p in trained_of(module).items()}
    found = [(names[id(p)], (group["lr"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert sorted(key for key, _ in found) == sorted(names.values())
    return dict(found)


@LLAMA
def test_lora_plus_groups_are_those_of_peft() -> None:
    mine, other = ours("llama", PLUS), theirs("llama", **PLUS_IN_PEFT)
    groups = lora_fx.lora_plus_groups(mine, 2e-3, 8.0, weight_decay=0.1, embedding_lr=3e-5)
    expected = loraplus(other, loraplus_weight_decay=0.1, loraplus_lr_embedding=3e-5).param_groups
    assert rates_of(mine, groups) == rates_of(other, expected)
    assert {group["lr"] for group in groups} == {2e-3, 16e-3, 3e-5}
    usual = rates_of(mine, lora_fx.lora_plus_groups(mine, 1e-4))
    assert usual == rates_of(other, loraplus(other, lr=1e-4, loraplus_lr_ratio=16.0).param_groups)
    again = lora_fx.lora_plus_groups(copy.deepcopy(mine), 2e-3, 8.0, weight_decay=0.1, embedding_lr=3e-5)
    positions = {id(p): position for position, p in enumerate(mine.parameters())}
    for group, same in zip(groups, again, strict=True):
        assert [p.shape for p in group["params"]] == [p.shape for p in same["params"]]
        places = [positions[id(p)] for p in group["params"]]
        assert places == sorted(places)


@LLAMA
def test_ten_steps_of_lora_plus_are_those_of_peft() -> None:
    mine, other = ours("llama", PLUS), theirs("llama", **PLUS_IN_PEFT)
    groups = lora_fx.lora_plus_groups(mine, 2e-3, 8.0, weight_decay=0.1, embedding_lr=1e-4)
    theirs_plus = loraplus(other, loraplus_weight_decay=0.1, loraplus_lr_embedding=1e-4)
    run = Run("llama", mine, optimizer=torch.optim.AdamW(groups))
    losses = in_step(run, Run("llama", other, optimizer=theirs_plus), 10)
    assert losses != Run("llama", ours("llama", PLUS)).take(10)


@pytest.mark.xdist_group("bert")
def test_lora_plus_gives_trained_copies_the_rate_of_a_and_vectors_no_decay() -> None:
    rules = {
        "select": [
            {"target": ["query"]},
            {"target": ["intermediate.dense"], "trainable": "all"},
            {"target": ["attention.output.LayerNorm"], "trainable": "all"},
        ]
    }
    graph_module = ours("bert", rules)
    rates = rates_of(graph_module, lora_fx.lora_plus_groups(graph_module, 1e-3, 4.0, weight_decay=0.2))
    assert {
        (key.split(".")[-3] if ".lora_" in key else ".".join(key.split(".")[-2:]), rate) for key, rate in rates.items()
    } == {
        ("lora_A", (1e-3, 0.2)),
        ("lora_B", (4e-3, 0.2)),
        ("dense.weight", (1e-3, 0.2)),
        ("dense.bias", (1e-3, 0.0)),
        ("LayerNorm.weight", (1e-3, 0.0)),
        ("LayerNorm.bias", (1e-3, 0.0)),
    }


@LLAMA
def test_lora_plus_tells_the_factors_of_several_adapters() -> None:
    graph_module = ours("llama", PLUS)
    graph_module = lora_fx.rewrite(graph_module, {"select": [{"target": ["o_proj", "embed_tokens"]}]}, adapter="B")
    graph_module = all_acting(graph_module)
    rates = rates_of(graph_module, lora_fx.lora_plus_groups(graph_module, 1e-3, 4.0, embedding_lr=1e-5))
    expected = {"A": 1e-3, "B": 4e-3}
    for key, (rate, _) in rates.items():
        assert rate == (1e-5 if "embed_tokens" in key else expected[re.search(r"\.lora_([AB])\.", key)[1]]), key


@pytest.mark.xdist_group("gpt2")
def test_lora_plus_tells_the_factors_of_parts() -> None:
    select = [{"role": ["attention.query"], "features": ["query", "value"]}]
    graph_module = ours("gpt2", {"select": select})
    rates = rates_of(graph_module, lora_fx.lora_plus_groups(graph_module, 1e-3, 4.0))
    assert {(key.rpartition("lora_")[2], rate) for key, (rate, _) in rates.items()} == {
        (f"{factor}.default.{part}.weight", rate)
        for factor, rate in (("A", 1e-3), ("B", 4e-3))
        for part in ("query", "value")
    }


def test_lora_plus_knows_the_names_that_peft_gives_factors_beside_embeddings() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_embedding_A, self.lora_embedding_B = (
                nn.ParameterDict({"default": torch.ones(2, 2)}) for _ in "AB"
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.lora_embedding_A["default"] @ self.lora_embedding_B["default"]

    (group,) = lora_fx.lora_plus_groups(fx.symbolic_trace(Wrapped()), 1e-3)
    assert (len(group["params"]), group["lr"]) == (2, 1e-6)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"ratio": 0}, "expected a finite number above 0 for ratio, got 0"),
        ({"ratio": -16.0}, r"expected .* for ratio, got -16\.0"),
        ({"ratio": float("nan")}, "expected .* for ratio, got nan"),
        ({"ratio": "16"}, "expected .* for ratio, got '16'"),
        ({"lr": 0.0}, r"expected a finite number above 0 for lr, got 0\.0"),
        ({"lr": float("inf")}, "expected .* for lr, got inf"),
        ({"embedding_lr": -1}, "expected .* for embedding_lr, got -1"),
        ({"weight_decay": -0.1}, r"expected a finite number, 0 or above, for weight_decay, got -0\.1"),
    ],
)
@LLAMA
def test_lora_plus_refuses_numbers_that_make_no_sense(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(lora_fx.LoraFxError, match=problem):
        lora_fx.lora_plus_groups(ours("llama"), **{"lr": 1e-3, **settings})


@LLAMA
def test_lora_plus_refuses_a_graph_in_which_nothing_trains() -> None:
    with pytest.raises(
        lora_fx.LoraFxError, match=r"no parameter of the graph trains. Give it an adapter with lora_fx\.rewrite"
    ):
        lora_fx.lora_plus_groups(traced("llama"), 1e-3)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel], ids=["compiled", "parallel"])
def test_our_functions_take_the_graph_and_not_a_wrapper_of_it(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    gm = branched("bert")
    wrapped = wrap(gm)
    uses: list[Callable[[], object]] = [
        lambda: lora_fx.fuse(wrapped),
        lambda: lora_fx.transfer(wrapped, onto=gm),
        lambda: lora_fx.transfer(gm, onto=wrapped),
        lambda: lora_fx.save_adapter(wrapped, tmp_path / "adapter"),
    ]
    for use in uses:
        with pytest.raises(
            lora_fx.PlanError, match=r"it wraps one, which is its attribute '(module|_orig_mod)': pass that"
        ):
            use()
