"""Trainable parameters of a graph: their number, and the learning rates of LoRA+."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lora_fx.errors import LoraFxError
from lora_fx.graph.adapter_names import is_embedding_factor, is_factor, is_factor_b, is_magnitude
from lora_fx.graph.adapter_states import AdapterState, adapter_states
from lora_fx.graph.info import check_module, known_info
from lora_fx.graph.overview import element_counts


@dataclass(frozen=True)
class ParameterSummary:
    """Numbers of trainable and of all parameters. ``str()`` is a line as the first releases of PEFT printed it.

    A second one names the adapters, which of them act and which train, unless the graph has one that does both.

    Attributes:
        trainable: number of elements in parameters that require a gradient.
        total: number of elements in all parameters, tied ones counted once.
        adapters: of a graph: which act, how strongly, and which train.
    """

    trainable: int
    total: int
    adapters: tuple[AdapterState, ...] = ()

    @property
    def percent(self) -> float:
        """Share of trainable elements, in percent."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        numbers = f"trainable params: {self.trainable} || all params: {self.total} || trainable%: {self.percent}"
        usual = [(state.acts, state.strength, state.trains) for state in self.adapters] == [(True, 1.0, True)]
        return numbers if usual or not self.adapters else f"{numbers}\nadapters: {', '.join(map(str, self.adapters))}"


def parameter_summary(module: nn.Module) -> ParameterSummary:
    """Count the elements of a module's parameters, each tensor once.

    Args:
        module: a graph, or any other module.
    """
    check_module(module)
    states = adapter_states(module) if isinstance(module, fx.GraphModule) else ()
    return ParameterSummary(*element_counts(module), states)


def lora_plus_groups(
    graph_module: fx.GraphModule,
    lr: float,
    ratio: float = 16.0,
    *,
    weight_decay: float = 0.0,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    """Return parameter groups for LoRA+ (arXiv 2402.12354): B learns faster than A, by a fixed ratio.

    ::

        A ← A − lr · step(∇A)        B ← B − ratio · lr · step(∇B)

    where ``step`` is the optimizer's. Every parameter that trains is in one group, in the order of ``parameters()``::

        optimizer = torch.optim.AdamW(lora_fx.lora_plus_groups(gm, lr=1e-4))

    Factors have the rates that ``peft.optimizers.create_loraplus_optimizer`` gives them. Trained copies of the model's own
    parameters learn at ``lr``, of biases and norms too, to which PEFT gives the rate of B.

    Args:
        graph_module: with an adapter that trains.
        lr: the rate of A, and of trained copies.
        ratio: the rate of B over that of A. The authors find about 16; harder tasks gain from more.
        weight_decay: of all groups but those of biases and norms. Each group states it, which overrides the optimizer's own.
        embedding_lr: the rate of both factors beside an embedding.

    Raises:
        LoraFxError: nothing trains, or a number is not finite or out of range.
    """
    for name, value in (("lr", lr), ("ratio", ratio), ("embedding_lr", embedding_lr)):
        if not _is_number(value) or value <= 0:
            raise LoraFxError(f"lora_plus_groups: expected a finite number above 0 for {name}, got {value!r}.")
    if not _is_number(weight_decay) or weight_decay < 0:
        raise LoraFxError(
            f"lora_plus_groups: expected a finite number, 0 or above, for weight_decay, got {weight_decay!r}."
        )
    rates = {"A": lr, "B": lr * ratio, "embedding": embedding_lr, "own": lr, "own vectors": lr}
    check_module(graph_module)
    embedding = _embedding_factors(graph_module)
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in graph_module.named_parameters():
        if parameter.requires_grad:
            kind = "embedding" if name in embedding else _parameter_kind(name, parameter)
            groups.setdefault(kind, []).append(parameter)
    if not groups:
        raise LoraFxError(
            "lora_plus_groups: no parameter of the graph trains. Give it an adapter with lora_fx.rewrite or lora_fx.from_adapter, "
            "without inference=True."
        )
    return [
        {"params": members, "lr": rates[kind], "weight_decay": 0.0 if kind == "own vectors" else weight_decay}
        for kind, members in groups.items()
    ]


def _parameter_kind(name: str, parameter: nn.Parameter) -> str:
    """Return the kind of a parameter, as far as its name and shape say."""
    if is_embedding_factor(name):
        return "embedding"
    if is_factor(name):
        return "B" if is_factor_b(name) else "A"
    if is_magnitude(name):  # by its dimensions alone, as PEFT
        return "B" if parameter.dim() == 1 else "A"
    return "own" if parameter.dim() > 1 else "own vectors"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _embedding_factors(graph_module: fx.GraphModule) -> set[str]:
    """Return the names of the factors beside embeddings, by the graph's record of its adapters."""
    found: set[str] = set()
    for adapter, record in known_info(graph_module).adapters.items():
        for _, branch in record.branches.values():
            if branch.op == "embedding":
                found |= {branch.names(adapter).a, branch.names(adapter).b}
    return found
