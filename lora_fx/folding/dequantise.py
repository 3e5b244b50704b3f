"""Quantised weights in a fold: made dense, once, or quantised again after it.

    W' = dense(q(W)) + Σ scaling · B A              what the adapter was trained beside, with its update
    q(W')                                           as small as before; what the rounding takes is of the size of the update

A fold into the weights that were quantised, W + Σ scaling · B A, has the quantisation of W for its error: :mod:`lora_fx.folding.checkpoint`
has a fold that quantises them first.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lora_fx.errors import FoldError, LoraFxError, listed
from lora_fx.graph.cached_graphs import check_whole
from lora_fx.graph.graph_module import TracedGraphModule, as_traced, rebuilt, state_of
from lora_fx.numerics.lowrank_merge import Merge, merge_into
from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.numerics.schemes import CodebookScheme

_logger = logging.getLogger("lora_fx.folding")

MAX_LOST = 0.25
"""Largest rounding error of a weight that is quantised again, as a part of the size of its update, without a warning."""


def dequantise(graph_module: TracedGraphModule) -> TracedGraphModule:
    """Return the graph with dense weights in the place of quantised ones, of the dtype in which it computes with them.

    It computes the same values, bit for bit, in more memory.

    Args:
        graph_module: left as it is. A graph without quantised weights is copied.

    Raises:
        PlanError: the argument is no graph of lora_fx.
    """
    graph_module = as_traced(graph_module)
    check_whole(graph_module)
    state, dense = state_of(graph_module), dict[str, torch.Tensor]()
    for names in state.names().values():
        tensor = state.tensors[names[0]]
        if isinstance(tensor, QuantisedWeight):
            dense.update(dict.fromkeys(names, _like(tensor, tensor.dequantize())))
    return rebuilt(graph_module, tensors=dense)


@dataclass(frozen=True)
class MergedWeight:
    """A quantised weight after a merge.

    Attributes:
        tensor: its value.
        non_finite: how many of its elements are not finite.
        lost: the rounding error of quantising it again, as a part of the size of the update; 0 where it is dense.
    """

    tensor: torch.Tensor
    non_finite: int
    lost: float = 0.0


def merged_dense(weight: QuantisedWeight, merge: Merge, tensors: Mapping[str, torch.Tensor]) -> MergedWeight:
    """Return ``dense(q(W)) + Σ scaling · B A``, rounded to the weight's dtype once."""
    dense = weight.dequantize()
    non_finite = merge_into(dense, merge, tensors, dense)
    return MergedWeight(_like(weight, dense), non_finite)


def merged_quantised(weight: QuantisedWeight, merge: Merge, tensors: Mapping[str, torch.Tensor]) -> MergedWeight:
    """Return ``q(dense(q(W)) + Σ scaling · B A)``, quantised in the way of the weight.

    As PEFT does, a codebook quantises the sum in float32, and a uniform scheme quantises the sum in the weight's dtype. Where the update
    changes no element of that sum, as that of an untrained B does not, the weight stays as it is.

    Raises:
        FoldError: nothing is quantised with the scheme of the weight here.
    """
    dense = weight.dequantize()
    before = dense.float() if isinstance(weight.scheme, CodebookScheme) else dense
    wide = torch.empty_like(before)
    non_finite = merge_into(before, merge, tensors, wide)
    if non_finite:
        return MergedWeight(weight, non_finite)
    try:
        quantised = QuantisedWeight.of(wide, weight.scheme, weight.dtype)
    except LoraFxError as error:
        raise FoldError(f"{merge.weight!r} cannot be quantised again: {error}") from error
    lost, size = (
        float(torch.linalg.vector_norm(part.double())) for part in (quantised.dequantize() - wide, wide - before)
    )
    return MergedWeight(_like(weight, quantised), 0, lost / size) if size else MergedWeight(weight, 0)


def warn_of_losses(lost: Mapping[str, float]) -> None:
    """Warn of weights whose rounding error is not small beside their update.

    Args:
        lost: by the name of the weight, its rounding error as a part of the size of its update.
    """
    large = {name: part for name, part in lost.items() if part > MAX_LOST}
    if large:
        worst = sorted(large, key=large.__getitem__, reverse=True)
        _logger.warning(
            "quantised again, %d of %d weights have a rounding error of more than %g of the size of their update: %s. Much of what was "
            "trained is lost. Fold without quantised='requantise', which makes adapted weights dense, or keep the adapter beside the base.",
            len(large),
            len(lost),
            MAX_LOST,
            listed([f"{name!r} {large[name]:.2f}" for name in worst], 3),
        )


def _like(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(weight, nn.Parameter) else value
