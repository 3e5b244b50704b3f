"""One training step, as PEFT takes it, as graphs do, and without anything that trains.

All share the weights of one model, and have equal factors. A step is the forward pass with the loss, and the backward pass; an
optimizer would do the same for all, since their parameters are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
from measuring import difference, saved_bytes
from shapes import embedded
from torch import nn

import lora_fx

NAMES = ("PEFT", "plain", "fused", "frozen")
SEED = 7
PREFIX = "base_model.model."
Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Adapter:
    """What is added to a model.

    Attributes:
        rules: of ours.
        targets: PEFT's ``target_modules`` for the same.
        rank, alpha, dropout: settings.
    """

    rules: str | dict[str, Any]
    targets: str | tuple[str, ...]
    rank: int
    alpha: int
    dropout: float = 0.0

    def options(self) -> dict[str, Any]:
        """Return the settings as ``rewrite`` takes them."""
        return {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout, "seed": SEED}

    def peft_config(self) -> peft.LoraConfig:
        """Return the same for PEFT."""
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        return peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets)


@dataclass(frozen=True)
class Contender:
    """Something that takes a training step.

    Attributes:
        name: of the table.
        module: whose parameters train.
        inputs: that it is called with.
        call: the module, or what was compiled of it.
        gradient: of its output; without one, the output has a loss.
    """

    name: str
    module: nn.Module
    inputs: Batch
    call: Callable[..., Any]
    gradient: torch.Tensor | None = None

    def forward(self) -> torch.Tensor:
        """Return what is differentiated."""
        output = self.call(**self.inputs)
        return output if isinstance(output, torch.Tensor) else output.loss

    def step(self) -> torch.Tensor:
        """Run forward and backward from no gradients to all, and return what was differentiated."""
        self.clear()
        output = self.forward()
        output.backward(self.gradient)
        return output

    def clear(self) -> None:
        """Drop all gradients."""
        for tensor in (*self.module.parameters(), *self.inputs.values()):
            tensor.grad = None

    def answers(self) -> dict[str, torch.Tensor]:
        """Return the output and the gradients of a step under a known random state."""
        torch.manual_seed(SEED)
        found = {"": self.step().detach()}
        found |= {key: p.grad for key, p in trained(self.module).items() if p.grad is not None}
        self.clear()
        return found

    def saved(self) -> int:
        """Return the bytes that are kept for the backward pass."""
        return saved_bytes(self.forward, self.module)

    def compiled(self) -> Contender:
        """Return the same through ``torch.compile``."""
        return replace(self, name=f"{self.name}, compiled", call=torch.compile(self.module))


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains, by the names that it has in a graph."""
    return {name.removeprefix(PREFIX): p for name, p in module.named_parameters() if p.requires_grad}


def set_factors(*modules: nn.Module) -> None:
    """Give all modules the same factors, A and B."""
    everyone = [trained(module) for module in modules]
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name in sorted(everyone[0]) if everyone else ():
            values = torch.randn(everyone[0][name].shape, generator=generator) * 0.02
            for own in everyone:
                own[name].copy_(values)


def frozen(model: nn.Module, batch: Batch, empty: nn.Module | None = None) -> Contender:
    """Return the graph without branches, of which nothing trains, on embeddings that require a gradient."""
    inputs = embedded(model, batch)
    graph = lora_fx.trace(empty or model, labels=True, **_sizes(inputs, on_meta=empty is not None))
    if empty is not None:
        graph = lora_fx.materialize(graph, model.state_dict(), like=model)
    return Contender("frozen", graph.train(), inputs, graph)


def rewritten(
    model: nn.Module, adapter: Adapter, batch: Batch, empty: nn.Module | None = None
) -> lora_fx.TracedGraphModule:
    """Return the graph with branches, which returns a loss."""
    sizes = _sizes(batch, on_meta=empty is not None)
    graph = lora_fx.rewrite(empty or model, adapter.rules, labels=True, **sizes, **adapter.options())
    return graph if empty is None else lora_fx.materialize(graph, model.state_dict(), like=model, seed=SEED)


def _sizes(batch: Batch, *, on_meta: bool) -> dict[str, Any]:
    """Return how to trace: for any sequence, and for the batch as it is, since on the meta device one is not told from more."""
    examples = {name: tensor.detach()[:, :16].contiguous() for name, tensor in batch.items()}
    examples = {name: tensor.to("meta") if on_meta else tensor for name, tensor in examples.items()}
    return {"example_inputs": examples, "dynamic": dict.fromkeys(examples, (1,))}


def contenders(
    model: nn.Module,
    adapter: Adapter,
    batch: Batch,
    names: Collection[str] = NAMES,
    empty: nn.Module | None = None,
) -> list[Contender]:
    """Return who takes a step with a model, which PEFT then wraps.

    Args:
        model: in train mode, with nothing that trains.
        adapter: what PEFT and the graphs add.
        batch: of the step.
        names: of them, from :data:`NAMES`; they come in that order.
        empty: the same model on the meta device, to be traced instead where a trace should not compute.
    """
    found: dict[str, Contender] = {}
    modules: dict[str, nn.Module] = {}
    if "frozen" in names:
        found["frozen"] = frozen(model, batch, empty)
    if not {"plain", "fused"}.isdisjoint(names):
        plain = modules["plain"] = rewritten(model, adapter, batch, empty)
        modules["fused"] = lora_fx.fuse(plain)
    if "PEFT" in names:  # in place, over the same weights
        modules["PEFT"] = peft.get_peft_model(model.train(), adapter.peft_config())
    set_factors(*modules.values())
    found |= {name: Contender(name, module.train(), batch, module) for name, module in modules.items()}
    return [found[name] for name in NAMES if name in names]


def compared(found: Sequence[Contender], tolerance: float, *, exact: bool = True) -> dict[str, float]:
    """Return how far loss and gradients of each are from the first one's.

    Args:
        found: to be compared; one with other inputs, as the frozen step, has nothing to compare.
        tolerance: what rounding explains.
        exact: the plain graph is to give the same bits.

    Raises:
        SystemExit: one is further away.
    """
    expected = found[0].answers()
    apart = {found[0].name: 0.0}
    for other in found[1:]:
        if other.inputs is found[0].inputs:
            apart[other.name] = difference(other.answers(), expected)
            if apart[other.name] > (0 if exact and other.name == "plain" else tolerance):
                raise SystemExit(
                    f"{other.name} is {apart[other.name]:.1e} from {found[0].name}: there is nothing to time."
                )
    return apart
