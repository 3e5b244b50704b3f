"""What the file of an adapter has of the model's own tensors: trained values, embeddings of a resized vocabulary, and echoes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import fx

from lora_fx.adapters.peft_format.keys import base_key
from lora_fx.adapters.peft_format.opening import AdapterFiles
from lora_fx.errors import listed, warn
from lora_fx.graph.compare import described
from lora_fx.graph.info import GraphInfo, known_info
from lora_fx.rules.peft_config.config import CONFIG_NAME, AdapterConfig


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


def untied_in_file(files: AdapterFiles, parameters: Iterable[tuple[str, ...]], info: GraphInfo) -> set[str]:
    """Return the names of parameters that ``ensure_weight_tying`` was to keep tied, and that the file has apart.

    PEFT ties no others than those that transformers ties to the input embedding, and these only if ``modules_to_save`` says
    ``embed_tokens`` or ``lm_head``; it then writes each under all of its names. So a name without a key was not tied, and computes with
    the model's value. A second adapter is not tied either, and has two values.

    Args:
        files: of the adapter.
        parameters: each by all of its names.
        info: of the graph.
    """
    config, found = files.config, set[str]()
    for names in parameters if config.ensure_weight_tying else ():
        saved = {name for name in names if config.saves_any(name)}
        keys = {name: key for name in names if (key := base_key(name, ())) in files.file.entries}
        if len(names) < 2 or not saved or not keys:
            continue
        one, *others = (files.file.read(key) for key in keys.values())
        if not all(torch.equal(one, other) for other in others):
            found |= keys.keys()
        elif len(keys) < len(names) and not _is_tied_by_peft(config, names, info):
            found |= saved
    return found


def _is_tied_by_peft(config: AdapterConfig, names: Collection[str], info: GraphInfo) -> bool:
    """Tell whether PEFT itself would tie what a file without keys for some of these names loads."""
    embedding = next(iter(info.vocabulary), None)
    return (
        info.pretrained
        and f"{embedding}.weight" in names
        and getattr(info.config, "tie_word_embeddings", True) is not False
        and any(name.rpartition(".")[2] in _PEFT_EMBEDDINGS for name in config.modules_to_save or ())
    )


_PEFT_EMBEDDINGS = ("embed_tokens", "lm_head")
"""``EMBEDDING_LAYER_NAMES`` of PEFT 0.21."""


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
