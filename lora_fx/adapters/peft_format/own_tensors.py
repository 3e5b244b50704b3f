"""What the file of an adapter has of the model's own tensors: trained values, embeddings of a resized vocabulary, and echoes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import fx

from lora_fx.errors import listed, warn
from lora_fx.graph.compare import described
from lora_fx.graph.info import known_info
from lora_fx.rules.peft_config.config import CONFIG_NAME


def warn_of_rounding(directory: Path, saved: Mapping[str, torch.Tensor], kept: Mapping[str, torch.dtype]) -> None:
    """Warn of trained values that are saved with more precision than they are kept with, in one line.

    Args:
        directory: of the adapter.
        saved: the values by the parameters' names.
        kept: the dtypes of the parameters.
    """
    finer = [name for name, to in kept.items() if torch.promote_types(saved[name].dtype, to) != to]
    if finer:
        before = " and ".join(sorted({_dtype_name(saved[name].dtype) for name in finer}))
        after = " and ".join(sorted({_dtype_name(kept[name]) for name in finer}))
        warn(
            f"{directory}: {listed(finer, _MAX_NAMED)}: saved in {before}, rounded to {after}, the dtype of the model.",
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_MAX_NAMED = 4


def is_of_embedding(name: str, graph_module: fx.GraphModule) -> bool:
    """Tell whether a parameter is in the input or the output embedding of the model."""
    return name.rpartition(".")[0] in known_info(graph_module).vocabulary


def warn_of_embeddings(directory: Path, names: Sequence[str]) -> None:
    """Warn of embeddings that an adapter brings along without its config saying so."""
    if names:
        warn(
            f"{directory}: {listed(sorted(names), _MAX_NAMED)}: other values than the model's, as of a resized vocabulary "
            "(save_embedding_layers): taken as trained copies.",
        )


def another_value(key: str, name: str, own: torch.Tensor) -> str:
    """Return the message for a tensor in an adapter's file that differs from the model's own."""
    return (
        f"{key}: another value than the model's {name!r} ({described(own)}), and {CONFIG_NAME} lets neither a bias nor a module train "
        "there. If that is meant, as of a resized embedding, add its module to modules_to_save"
    )


def resized_and_adapted(key: str, name: str) -> str:
    """Return the message for an embedding with other values than the model's, beside which the adapter has a branch."""
    return (
        f"{key}: another value than the model's {name!r}, as of a resized vocabulary, and a branch beside it. Give the model this value "
        "before it is traced"
    )


def equal_as_saved(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors of one shape have equal values, in the less precise of their dtypes if they have two."""
    finer = torch.promote_types(one.dtype, other.dtype) if one.dtype != other.dtype else one.dtype
    kept = other.dtype if finer == one.dtype else one.dtype
    return torch.equal(one.to(kept), other.to(kept))
