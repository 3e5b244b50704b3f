"""Mixtures of experts traced on meta: they compute on a CPU, and get stacks of experts from files that have each expert apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx.folding.checkpoint import Checkpoint
from lora_fx.graph.graph_module import state_of
from lora_fx.parallel.checkpoint_sources import Sources
from lora_fx.tracing.transformers_models import traced_class

pytestmark = pytest.mark.xdist_group("checkpoint_sources")

MOE = "model.layers.1.block_sparse_moe"


@pytest.fixture(scope="module")
def weights() -> nn.Module:
    return families.build("mixtral")


@pytest.fixture(scope="module")
def empty() -> lora_fx.TracedGraphModule:
    with torch.device("meta"):
        model = families.FAMILIES["mixtral"].build()
    return lora_fx.trace(model, inference=True)


@pytest.fixture(scope="module")
def stored(weights: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    directory = tmp_path_factory.mktemp("mixtral")
    weights.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def test_experts_traced_on_meta_compute_the_models_bits_on_a_cpu_for_batches_of_one_row_too(
    weights: nn.Module, empty: lora_fx.TracedGraphModule
) -> None:
    ready = lora_fx.materialize(empty, weights.state_dict())
    for batch in (1, 3):
        inputs = families.inputs("mixtral", batch, 5)
        assert torch.equal(ready(**inputs).logits, weights(**inputs).logits)


def test_stacks_of_experts_are_read_from_files_with_each_expert_apart(
    weights: nn.Module, empty: lora_fx.TracedGraphModule, stored: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    assert f"{MOE}.experts.2.w3.weight" in stored  # as on the hub, and not as in the model
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    sources = Sources.of(state_of(empty), checkpoint, traced_class(empty))
    expected = dict(weights.named_parameters())
    assert {*sources.plain, *sources.stacks} == set(expected)
    assert sources.plain["model.layers.1.mlp.gate.weight"] == f"{MOE}.gate.weight"
    assert len(sources.stacks) == 6
    for name in sources.stacks:
        values = torch.empty_like(expected[name])
        sources.fill(name, values, checkpoint)
        assert torch.equal(values, expected[name]), name


def without(key: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[key]

    return change


def with_(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({key: change(tensors[key])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{MOE}.experts.2.w3.weight"), "'model.layers.1.block_sparse_moe.experts.2.w3' is missing, of which"),
        (without(f"{MOE}.gate.weight"), "'model.layers.1.mlp.gate.weight' is missing"),
        (
            with_(f"{MOE}.experts.2.w1.weight", lambda value: value[:, 1:].contiguous()),
            r"experts.2.w1.weight' is torch.float32 \(80, 47\), not torch.float32 \(80, 48\)",
        ),
        (with_(f"{MOE}.experts.2.w2.weight", torch.Tensor.double), "w2.weight' is torch.float64 .*, not torch.float32"),
        (
            lambda tensors: tensors.update(
                {f"{MOE}.experts.4.w1.weight": tensors[f"{MOE}.experts.0.w1.weight"].clone()}
            ),
            "has 4 experts: 'model.layers.1.block_sparse_moe.experts.4.w1.weight' is unknown",
        ),
        (lambda tensors: tensors.update({f"{MOE}.other": torch.ones(2)}), "block_sparse_moe.other' is unknown"),
    ],
    ids=["expert", "plain", "shape", "dtype", "number", "unknown"],
)
def test_files_that_do_not_fit_are_refused_by_their_own_keys(
    change: Callable[[dict[str, torch.Tensor]], None],
    message: str,
    empty: lora_fx.TracedGraphModule,
    stored: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    tensors = dict(stored)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(lora_fx.LoraFxError, match=message) as caught:
        Sources.of(state_of(empty), Checkpoint.open(tmp_path), traced_class(empty))
    assert str(tmp_path) in str(caught.value)


def test_two_values_for_one_tensor_are_refused(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))  # type: ignore[no-any-return]

    graph = lora_fx.trace(Tied(), example_inputs=(torch.ones(4, 3),), inference=True)
    tensors = {
        f"{name}.{leaf}": torch.ones(*size)
        for name in ("first", "second")
        for leaf, size in (("weight", (3, 3)), ("bias", (3,)))
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert set(Sources.of(state_of(graph), Checkpoint.open(tmp_path), None).plain.values()) == {
        "first.weight",
        "first.bias",
    }
    tensors["second.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        lora_fx.LoraFxError, match=r"'first.weight' and 'second.weight' have other values, and are one tensor"
    ):
        Sources.of(state_of(graph), Checkpoint.open(tmp_path), None)
