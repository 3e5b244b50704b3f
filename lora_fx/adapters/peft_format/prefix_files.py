"""Prefixes in PEFT's directories: ``prompt_embeddings``, the keys and values of all layers, with what the model trains beside them.

prompt_embeddings                 (tokens, layers · 2 · heads · size); of a projection what it computes; of a prompt (tokens, width)
base_model.<module>.<parameter>   of a module that trains as a whole, base_model.model.… beside LoRA
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from lora_fx.adapters.peft_format.keys import PREFIX
from lora_fx.adapters.peft_format.tensors import AdapterTensor, AdapterTensors
from lora_fx.adapters.prefix import resolved
from lora_fx.errors import AdapterError, PlanError, listed
from lora_fx.graph.graph_module import state_of
from lora_fx.graph.info import GraphInfo, known_info
from lora_fx.graph.prefix_slot import PrefixSlot, wanted_slot
from lora_fx.graph.records import PrefixSpec
from lora_fx.planning.cautions import TASKS
from lora_fx.planning.prefix_plan import peft_pairs
from lora_fx.rules.peft_config.config import CONFIG_NAME, AdapterConfig
from lora_fx.rules.peft_config.prefix_config import PrefixConfig, PromptConfig

KEY = "prompt_embeddings"
_OWN = "base_model."


@dataclass(frozen=True)
class PrefixFile:
    """The prefix of an adapter directory.

    Attributes:
        config: of the adapter.
        tensor: its keys and values, or embeddings.
        source: the directory, for messages.
    """

    config: PrefixConfig | PromptConfig
    tensor: AdapterTensor
    source: str

    @property
    def kind(self) -> Literal["prefix", "prompt"]:
        """What messages call it."""
        return self.config.kind

    @property
    def traced(self) -> bool | Literal["prompt"]:
        """What the trace of a model for it says."""
        return self.kind if self.kind == "prompt" else True


def apart(file: AdapterTensors, config: PrefixConfig | PromptConfig) -> tuple[PrefixFile, AdapterTensors]:
    """Return the prefix of a file, and the other tensors by the keys that they have beside LoRA.

    Raises:
        AdapterError: the file has no prefix.
    """
    if KEY not in file.entries:
        raise AdapterError(str(file.path.parent), [f"{file.path.name}: expected {KEY!r}, the prefix, which is missing"])
    rest = {
        PREFIX + key.removeprefix(_OWN) if key.startswith(_OWN) else key: entry
        for key, entry in file.entries.items()
        if key != KEY
    }
    return PrefixFile(config, file.entries[KEY], str(file.path.parent)), replace(file, entries=rest)


def beside_prefix(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors by the keys that they have beside a prefix, from those beside LoRA: PEFT wraps the model once less."""
    return {_OWN + key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def fitted_prefix(file: PrefixFile, graph_module: fx.GraphModule) -> tuple[PrefixSpec, torch.Tensor]:
    """Return a prefix of a directory for a graph, and its values.

    Raises:
        AdapterError: it does not fit the graph; all problems are named.
        PlanError: the graph can take no prefix.
    """
    source, slot = file.source, known_info(graph_module).prefix_slot
    if isinstance(file.config, PromptConfig):
        return _fitted_prompt(
            file, file.config, wanted_slot(slot, f"{source}, prompt tuning,", prompt=True), graph_module
        )
    slot = wanted_slot(slot, f"{source}, prefix tuning,")
    config, pairs = file.config, None
    wanted: dict[str, Any] = {
        "num_attention_heads": slot.heads,
        "token_dim": slot.heads * slot.size,
        "num_transformer_submodules": 2 if slot.decodes else 1,
    }
    if not slot.decodes:
        wanted["num_layers"] = slot.layers
    found = {key: getattr(config, key) for key in wanted}
    problems = [
        f"{key}: expected {value} as in the model, found {found[key]}"
        for key, value in wanted.items()
        if found[key] != value
    ]
    try:
        _, pairs = peft_pairs(replace(slot, counted=config.num_layers))
    except PlanError as error:
        problems.append(f"num_layers: {error}")
    held = _read(file, (config.num_virtual_tokens, config.num_layers * 2 * config.token_dim), problems)
    spec = PrefixSpec(
        config.num_virtual_tokens, config.num_layers, slot.heads, slot.size, CONFIG_NAME, hidden=None, pairs=pairs
    )
    return spec, held.to(state_of(graph_module).device)


def _fitted_prompt(
    file: PrefixFile, config: PromptConfig, slot: PrefixSlot, graph_module: fx.GraphModule
) -> tuple[PrefixSpec, torch.Tensor]:
    """Return a prompt of a directory for a graph, and its values: of an encoder-decoder model PEFT reads those in front."""
    wrong = config.token_dim != slot.size
    problems = [f"token_dim: expected {slot.size} as in the model, found {config.token_dim}"] * wrong
    tokens = config.num_virtual_tokens
    held = _read(file, (tokens * (config.num_transformer_submodules or 1), config.token_dim), problems)[:tokens]
    return PrefixSpec(tokens, 0, 1, slot.size, CONFIG_NAME), held.to(state_of(graph_module).device, copy=True)


def _read(file: PrefixFile, shape: tuple[int, ...], problems: list[str]) -> torch.Tensor:
    """Return the values of a directory in float32.

    Raises:
        AdapterError: there are problems, or the values have another shape or are none that float32 has.
    """
    if file.tensor.shape != shape:
        problems.append(f"{KEY}: expected shape {shape} by {CONFIG_NAME}, found {tuple(file.tensor.shape)}")
    elif not file.tensor.dtype.is_floating_point:
        problems.append(f"{KEY}: expected real numbers, found {file.tensor.dtype}")
    if problems:
        raise AdapterError(file.source, problems)
    held = file.tensor.read().to(torch.float32)
    if not torch.isfinite(held).all():
        raise AdapterError(file.source, [f"{KEY}: expected finite numbers that float32 has, found others"])
    return held


def in_peft_words(
    beside: AdapterConfig, prefix: PrefixSpec, info: GraphInfo, adapter: str, tensors: Mapping[str, torch.Tensor]
) -> tuple[PrefixConfig | PromptConfig, dict[str, torch.Tensor]]:
    """Return the config of an adapter with a prefix, and the prefix by its key.

    Args:
        beside: what the adapter trains of the model's own.
        prefix: of the adapter.
        info: record of the graph.
        adapter: its name.
        tensors: of the graph.

    Raises:
        AdapterError: PEFT's file cannot hold it.
    """
    if prefix.place is not None:
        kind = "with unchanged positions" if prefix.place == "self_attention" else f"at {prefix.place}"
        problem = f"its prefix is {kind}, and PEFT's file has one that is the past of self-attentions; torch.save takes the graph"
        raise AdapterError(f"adapter {adapter!r} cannot be written for PEFT", [problem])
    slot = wanted_slot(info.prefix_slot, f"adapter {adapter!r}", prompt=prefix.is_prompt)
    if prefix.without:
        problem = f"its prefix is for some layers alone, none for {listed([*map(str, prefix.without)], 8)}, and PEFT's file has one for all"
        raise AdapterError(f"adapter {adapter!r} cannot be written for PEFT", [problem])
    values = {KEY: resolved(prefix, adapter, tensors)}
    said = {"task_type": beside.task_type or _task(info), "auto_mapping": None}
    sizes = {"num_virtual_tokens": prefix.tokens, "token_dim": prefix.width}
    if prefix.is_prompt:
        return PromptConfig.of(beside, num_transformer_submodules=1, **sizes, **said), values
    if slot.decodes and prefix.pairs is None:
        problem = (
            "its layers have the keys and values of their own numbers, and those of an encoder-decoder model read others of PEFT's file: "
            'say role = "peft" in [[prefix]]'
        )
        raise AdapterError(f"adapter {adapter!r} cannot be written for PEFT", [problem])
    config = PrefixConfig.of(
        beside,
        num_attention_heads=prefix.heads,
        num_layers=prefix.layers,
        num_transformer_submodules=2 if slot.decodes else 1,
        encoder_hidden_size=prefix.hidden or prefix.width,  # PEFT wants a number
        prefix_projection=prefix.hidden is not None,
        **sizes,
        **said,
    )
    return config, values


def _task(info: GraphInfo) -> str:
    """Return the task of a model by which PEFT chooses the class that runs a prefix, where the rules say none."""
    if info.prefix_slot is not None and info.prefix_slot.decodes:
        return "SEQ_2_SEQ_LM"
    if info.generation_config is not None:
        return "CAUSAL_LM"
    return next((task for end, task in TASKS.items() if info.class_name.endswith(end)), "FEATURE_EXTRACTION")
