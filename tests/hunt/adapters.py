"""Random adapters of random programs, and two oracles for them: the program in float64 with their updates, and PEFT."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from hunt.programs import Net
from torch import nn
from transformers.pytorch_utils import Conv1D

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Adapter:
    """Settings of one adapter.

    Attributes:
        name: of the adapter.
        ranks: of each pool name the rank and alpha.
        calls: of a pool name, the one call that is adapted.
        rslora: the scale is alpha / √rank.
        variant: ``"dora"``, or none.
        bias: B has a bias.
        trained: pool names that train as a whole.
        dropout: on the input of the branches.
    """

    name: str
    ranks: Mapping[str, tuple[int, int]]
    calls: Mapping[str, int]
    rslora: bool = False
    variant: str | None = None
    bias: bool = False
    trained: tuple[str, ...] = ()
    dropout: float = 0.0

    @property
    def kinds(self) -> list[str]:
        said = {self.variant: self.variant, "rslora": self.rslora, "bias of B": self.bias, "one call": self.calls}
        return [str(name) for name, here in {**said, "trained copy": self.trained}.items() if here]

    def rules(self) -> dict[str, Any]:
        shared: dict[str, Any] = {"dropout": self.dropout}
        if self.rslora:
            shared["scaling"] = "rslora"
        if self.variant:
            shared["variant"] = self.variant
        if self.bias:
            shared["bias"] = True
        select: list[dict[str, Any]] = []
        for name, (rank, alpha) in self.ranks.items():
            one = {"calls": [self.calls[name]]} if name in self.calls else {}
            select.append({"target": [f"pool.{name}"], "rank": rank, "alpha": alpha, **one, **shared})
        if self.trained:
            select.append({"target": [f"pool.{name}" for name in self.trained], "trainable": "all"})
        return {"select": select}

    def config(self) -> peft.LoraConfig:
        return peft.LoraConfig(
            r=4,
            target_modules=[f"pool.{name}" for name in self.ranks],
            rank_pattern={f"pool.{name}": rank for name, (rank, _) in self.ranks.items()},
            alpha_pattern={f"pool.{name}": alpha for name, (_, alpha) in self.ranks.items()},
            use_rslora=self.rslora,
            use_dora=self.variant == "dora",
            lora_bias=self.bias,
            modules_to_save=[f"pool.{name}" for name in self.trained] or None,
            lora_dropout=self.dropout,
        )

    def update(self, net: Net, tensors: Tensors, name: str) -> torch.Tensor:
        """Return ΔW of a pool name in float64, by hand, in the layout of the module's weight."""
        owner = f"pool.{name}@{self.calls[name]}" if name in self.calls else f"pool.{name}"
        a, b = (tensors[f"{owner}.lora_{side}.{self.name}.weight"].detach().double() for side in "AB")
        rank, alpha = self.ranks[name]
        delta = torch.einsum("or,ri...->oi...", b.flatten(1), a) if a.dim() > 2 else b @ a
        if isinstance(net.pool[name], Conv1D | nn.Embedding) and name not in net.program.head_alone:
            delta = delta.t()
        return delta * (alpha / (rank**0.5 if self.rslora else rank))


def drawn_adapter(net: Net, sites: Mapping[str, int], name: str, draw: random.Random) -> Adapter:
    """Draw an adapter of some pool names, of which it is known how many call sites they have.

    One call is chosen where the graph has all calls of the model: what nothing reads is no node of a graph.
    """
    program = net.program
    chosen = draw.sample(sorted(sites), draw.randint(1, len(sites)))
    shared = (draw.randint(1, 4), draw.randint(1, 9)) if draw.random() < 0.5 else None
    ranks = {each: shared or (draw.randint(1, 4), draw.randint(1, 9)) for each in chosen}
    calls = {
        each: draw.randint(1, sites[each])
        for each in chosen
        if sites[each] == net.calls[each] > 1
        and each not in program.functional | program.ambiguous
        and draw.random() < 0.4
    }
    others = [each for each in net.pool if each.startswith("other") and any(True for _ in net.pool[each].parameters())]
    plain = not calls and name == "default"
    dora = plain and draw.random() < 0.25 and not (program.functional | program.ambiguous) & set(chosen)
    biased = [getattr(net.pool[each], "bias", None) is not None for each in chosen]
    return Adapter(
        name,
        ranks,
        calls,
        rslora=draw.random() < 0.3,
        variant="dora" if dora else None,
        bias=plain and not dora and draw.random() < 0.25 and all(biased),
        trained=tuple(others[:1]) if name == "default" and draw.random() < 0.4 else (),
        dropout=draw.choice((0.0, 0.0, 0.3)),
    )


def set_values(graph: nn.Module, seed: int, adapter: str) -> None:
    """Make factors, magnitudes and trained copies of an adapter values that are no start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(graph.named_parameters()):
            if f".{adapter}" not in name:
                continue
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * drawn.abs())
            elif ".lora_" in name:
                parameter.copy_(drawn * 0.3)
            elif ".trained_copy." in name:
                parameter.add_(drawn * 0.3)


def by_hand(
    net: Net, tensors: Tensors, strengths: Mapping[str, float], adapters: Sequence[Adapter], x: torch.Tensor
) -> Any:
    """Return what the program computes in float64 with the updates of these adapters, each at its strength."""
    oracle: Any = copy.deepcopy(net).double()
    for adapter in adapters:
        strength = strengths.get(adapter.name, 0.0)
        if not strength:
            continue
        for name in adapter.ranks:
            delta = adapter.update(net, tensors, name) * strength
            oracle.deltas.setdefault(name, []).append((adapter.calls.get(name), delta))
        for name in adapter.trained:
            for key, parameter in oracle.pool[name].named_parameters():
                parameter.data.copy_(tensors[f"pool.{name}.trained_copy.{adapter.name}.{key}"].detach())
    with torch.no_grad():
        return oracle(x.clone().double() if x.is_floating_point() else x)


def key_of(name: str) -> str:
    """Return one name for a tensor that trains, in PEFT's model and in a graph: of a copy that of its original."""
    name = name.removeprefix("base_model.model.").replace("lora_embedding_", "lora_").replace("base_layer.", "")
    name = name.replace(".modules_to_save.default", "").replace(".trained_copy.default", "")
    return name.removesuffix(".weight") if ".lora_" in name else name


def give_values(wrapped: nn.Module, graph: nn.Module) -> None:
    """Give the values of the adapters of a graph to PEFT's model, trained biases among them."""
    named = sorted(graph.named_parameters(), key=lambda each: ".trained_copy." in each[0])  # over their originals
    tensors = {key_of(name): value for name, value in named}
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[key_of(name)])
