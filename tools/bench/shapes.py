"""The models that are measured: configs of transformers, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import transformers
from torch import nn

VOCABULARY = 1000
"""A small one, since neither the embedding nor the head gets a branch."""


@dataclass(frozen=True)
class Llama:
    """A decoder.

    Attributes:
        width: of the hidden states.
        inner: of the MLP.
        layers: their number.
        heads: of the queries.
        groups: heads of keys and values; as many as those of the queries by default.
        vocabulary: its size.
    """

    width: int
    inner: int
    layers: int
    heads: int
    groups: int | None = None
    vocabulary: int = VOCABULARY

    def build(self) -> nn.Module:
        """Return the model with its language-model head."""
        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups or self.heads,
            max_position_embeddings=8192,
            use_cache=False,
        )
        return transformers.LlamaForCausalLM(config)

    def tiny(self, layers: int = 2) -> Llama:
        """Return one of the same kind that takes no time."""
        groups = None if self.groups is None else 2
        return replace(self, width=32, inner=48, layers=layers, heads=4, groups=groups, vocabulary=VOCABULARY)


LLAMA_8B = Llama(width=4096, inner=14336, layers=32, heads=32, groups=8, vocabulary=128256)
LLAMA_70B = Llama(width=8192, inner=28672, layers=80, heads=64, groups=8, vocabulary=128256)


@dataclass(frozen=True)
class MT5:
    """An encoder–decoder with the blocks of mT5."""

    width: int
    inner: int
    layers: int
    heads: int
    head: int

    def build(self) -> nn.Module:
        """Return the model with its language-model head."""
        config = transformers.MT5Config(
            vocab_size=VOCABULARY,
            d_model=self.width,
            d_ff=self.inner,
            d_kv=self.head,
            num_layers=self.layers,
            num_heads=self.heads,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
            use_cache=False,
        )
        return transformers.MT5ForConditionalGeneration(config)

    def tiny(self) -> MT5:
        """Return one of the same kind that takes no time."""
        return replace(self, width=32, inner=48, layers=1, heads=2, head=16)


@dataclass(frozen=True)
class Timed:
    """A model, what it is run on, and how often: what rows of the table have in common.

    Attributes:
        name: of the row.
        model: its shape.
        batch, sequence: sizes of the input.
        repetitions: of each call or step, in alternation.
    """

    name: str
    model: Llama | MT5
    batch: int
    sequence: int
    repetitions: int

    def tiny(self) -> Self:
        """Return the same with sizes that take no time."""
        return replace(self, model=self.model.tiny(), batch=2, sequence=8, repetitions=3)


def built(shape: Llama | MT5, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """Return a model on a device, in train mode, with nothing that trains."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return shape.build().requires_grad_(False).train()
    finally:
        torch.set_default_dtype(before)


def batch_of(
    model: nn.Module, batch: int, sequence: int, device: str = "cpu", *, padding: int = 0
) -> dict[str, torch.Tensor]:
    """Return random tokens with their mask and labels, the first tokens padding; an encoder–decoder gets a quarter as many labels."""
    generator = torch.Generator().manual_seed(batch * sequence)
    config: Any = model.config
    ids = torch.randint(1, config.vocab_size, (batch, sequence), generator=generator)
    labels = torch.randint(1, config.vocab_size, (batch, max(4, sequence // 4)), generator=generator)
    values = {
        "input_ids": ids,
        "attention_mask": (torch.arange(sequence) >= padding).long().expand(batch, -1).contiguous(),
        "labels": labels if config.is_encoder_decoder else ids,
    }
    return {name: value.to(device) for name, value in values.items()}


def embedded(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same batch with embeddings instead of tokens, which require a gradient."""
    values = dict(batch)
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        values["inputs_embeds"] = embedding(values.pop("input_ids"))
        if model.config.is_encoder_decoder:
            shifted = model.prepare_decoder_input_ids_from_labels(batch["labels"])
            values["decoder_inputs_embeds"] = embedding(shifted)
    return {name: value.requires_grad_() if value.is_floating_point() else value for name, value in values.items()}
