"""What a model computes in training alone, between one value and the same value: stochastic depth, noise."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import set_factors
from graph_diff import first_difference
from made import X, agrees, module, refused
from torch import nn

import lora_fx
from lora_fx.graph.training_only import TrainingOnly


class DropPath(nn.Module):
    """As models of transformers have it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        random = (0.7 + torch.rand(shape, dtype=x.dtype, device=x.device)).floor_()
        return x.div(0.7) * random


def _noisy(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.lin(x)
    if self.training:
        y *= torch.empty_like(y).uniform_(0.9, 1.1)
    return y.relu() + x


def _deep(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = x + self.path(self.lin(x))
    return x + self.path(self.drop(self.lin(x)))


def built() -> Any:
    torch.manual_seed(6)
    return module(_deep, path=DropPath(), drop=nn.Dropout(0.2)).requires_grad_(False)


def test_stochastic_depth_follows_the_mode_at_its_own_path(tmp_path: Path) -> None:
    graph = agrees(built())
    paths = [name for name, each in graph.named_modules() if isinstance(each, TrainingOnly)]
    assert paths == ["path", "path_1"]
    for each in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        model = built().train()
        torch.manual_seed(5)
        expected = model(X)
        torch.manual_seed(5)
        assert torch.equal(each.train()(X), expected)
        assert first_difference(each, graph) is None
    tuned = lora_fx.rewrite(graph, {"select": [{"op": ["linear"], "rank": 2}]})
    set_factors(tuned)
    merged = lora_fx.fold(tuned)
    assert first_difference(merged, graph) is None
    torch.testing.assert_close(merged.eval()(X), tuned.eval()(X))
    lora_fx.export.torchscript(merged, tmp_path / "m.pt")


def _deep_behind_a_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.noise(self.path(self.norm(self.lin(x)))).relu()


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x) if self.training else x


def test_what_follows_a_batch_norm_or_another_such_module_at_once_follows_the_mode() -> None:
    graph = agrees(module(_deep_behind_a_norm, norm=nn.BatchNorm1d(4), path=DropPath(), noise=Noise()))
    assert any(isinstance(each, TrainingOnly) for each in graph.modules())


def test_noise_that_is_written_to_its_input_follows_the_mode() -> None:
    agrees(module(_noisy))


def test_a_value_that_training_alone_computes_and_returns_elsewhere_is_refused() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y, extra = self.lin(x), 0
        if self.training:
            noise = torch.rand_like(y)
            y, extra = y * noise, noise
        return y.relu() + extra

    refused(module(forward), "something else in training than in evaluation")


@pytest.mark.parametrize(
    "drop",
    [nn.Dropout(0.4, inplace=True), nn.Dropout1d(0.4), nn.AlphaDropout(0.4), nn.FeatureAlphaDropout(0.4), nn.RReLU()],
    ids=lambda drop: type(drop).__name__,
)
def test_every_kind_of_dropout_follows_the_mode(drop: nn.Module) -> None:
    graph = agrees(module(lambda self, x: self.drop(self.lin(x)), drop=drop))
    if not isinstance(drop, nn.RReLU):
        assert type(graph.drop) is type(drop)
        assert not isinstance(drop, nn.Dropout) or graph.drop.inplace


# Decisions by random numbers in Python.


def wav2vec2(**settings: Any) -> Any:
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=[8, 8],
        conv_stride=[5, 2], conv_kernel=[10, 3], num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        vocab_size=20, **settings,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config).eval()


def test_a_decision_by_random_numbers_names_the_fields_of_the_config() -> None:
    sound = {"input_values": torch.randn(2, 400)}
    with pytest.raises(
        lora_fx.TraceError,
        match=r"^Wav2Vec2ForCTC cannot be traced in training mode at .*modeling_wav2vec2\.py:\d+\. In training its Python decides by random "
        r"numbers, .* anew with config\.layerdrop = 0 and config\.apply_spec_augment = False, then it trains\.",
    ):
        lora_fx.trace(wav2vec2(), sound)
    lora_fx.trace(wav2vec2(layerdrop=0.0, apply_spec_augment=False), sound)
