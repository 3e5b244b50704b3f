"""Adapters of PEFT that started from a split of the weights, and were saved without a conversion: the start is computed anew, as PEFT does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from lora_fx.adapters.peft_format.keys import Slot
from lora_fx.adapters.starts import model_weight, split_at
from lora_fx.errors import AdapterError, listed
from lora_fx.graph.records import BranchSpec
from lora_fx.numerics.factor_init import Split
from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.rules.peft_config.config import CONFIG_NAME
from lora_fx.rules.vocabulary import NITER
from lora_fx.sites.call_sites import Site


def splits_of(
    branches: dict[Slot, BranchSpec],
    read: dict[Slot, tuple[torch.Tensor, torch.Tensor]],
    tensors: Mapping[str, torch.Tensor],
    weights: Callable[[str], torch.Tensor | None],
    problems: list[str],
) -> dict[str, tuple[Site, Split]]:
    """Return the site of each branch that split its weight, and the parts of the weight, by its key.

    Of a graph without weights the factors become those of an update of the weight itself (in place), of twice the rank.

    Args:
        branches: of the adapter; changes.
        read: A and B of each; changes.
        tensors: of the graph.
        weights: reads a weight that the graph has not, by its name; None for one that is quantised.
        problems: grows by starts that cannot be computed.
    """
    found: dict[str, tuple[Site, Split]] = {}
    quantised: list[str] = []
    for slot, branch in list(branches.items()):
        if not branch.splits:
            continue
        name = model_weight(slot.site)
        if NITER.fullmatch(branch.setting.init):
            problems.append(
                f"{CONFIG_NAME}: init_lora_weights: the start {branch.setting.init!r} was random, changed {name}, and is not in the file. "
                "Convert the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
            )
            continue
        own = tensors[name]
        weight = weights(name) if own.is_meta else own
        if weight is None or isinstance(weight, QuantisedWeight):
            quantised.append(name)
            continue
        parts = split_at(slot.site, branch, weight)
        if own.is_meta:
            a, b = read[slot]
            read[slot] = torch.cat([a, parts.a.to(a.dtype)]), torch.cat([b, -parts.b.to(b.dtype)], dim=1)
            branches[slot] = replace(branch, setting=branch.added)
        else:
            found[branch.key] = slot.site, parts
    if quantised:
        problems.append(
            f"{CONFIG_NAME}: init_lora_weights: the adapter started by splitting dense weights, expected these, got {listed(quantised, 3)} "
            "quantised, of which the same start takes something else. Convert the adapter on the dense base with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    return found


def no_weight(name: str) -> torch.Tensor:
    """Refuse to compute a start without the weight."""
    problem = "the adapter started from it, and the graph is on the meta device: load the model with its weights"
    raise AdapterError(name, [problem])
