"""ChatGLM-6B (v1) as a small model of its own: transformers does not have this architecture.

What is particular about it, and kept here: one linear for query, key and value, interleaved per head; rotary positions in
two dimensions (a token's position in the context, and its position in the generated block); queries divided by the number
of the layer and scores multiplied back; residuals that add to the *normalised* states, scaled by ``sqrt(2 · layers)``; a
GELU MLP without a gate; states laid out ``(sequence, batch, hidden)``.

The tokens before the first ``bos_token_id`` are the context: they see each other. From there on, and everywhere in a row
without one, a token sees what came before it.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput


class ChatGLMConfig(transformers.PreTrainedConfig):
    """Sizes of a model, by the names of ChatGLM's own config."""

    model_type = "chatglm"
    attribute_map: ClassVar = {"num_hidden_layers": "num_layers"}

    vocab_size: int = 97
    hidden_size: int = 48
    inner_hidden_size: int = 80
    num_layers: int = 3
    num_attention_heads: int = 4
    layernorm_epsilon: float = 1e-5
    position_encoding_2d: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = 5
    tie_word_embeddings: bool = False


class SelfAttention(nn.Module):
    """Attention with a fused projection, rotary positions and scores whose scale knows the layer."""

    def __init__(self, config: ChatGLMConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, rotations: tuple[tuple[Tensor, Tensor], ...], hide: Tensor) -> Tensor:
        length, batch, width = hidden.shape
        mixed = self.query_key_value(hidden).view(length, batch, self.heads, 3 * self.head_size)
        query, key, value = mixed.chunk(3, dim=-1)
        query, key = _rotate(query, rotations), _rotate(key, rotations)

        coefficient = float(self.layer + 1)
        query = query / (math.sqrt(self.head_size) * coefficient)
        flat = (length, batch * self.heads, self.head_size)
        scores = torch.baddbmm(
            torch.zeros(1, 1, 1, dtype=query.dtype, device=query.device),
            query.reshape(flat).transpose(0, 1),
            key.reshape(flat).permute(1, 2, 0),
            beta=0.0,
            alpha=1.0,
        )
        scores = scores.view(batch, self.heads, length, length).masked_fill(hide, -10000.0) * coefficient
        weights = scores.float().softmax(dim=-1).type_as(query)
        context = torch.bmm(weights.view(-1, length, length), value.reshape(flat).transpose(0, 1))
        context = context.view(batch, self.heads, length, self.head_size).permute(2, 0, 1, 3)
        return self.dense(context.reshape(length, batch, width))


class MLP(nn.Module):
    """Two linears around a GELU."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(hidden), approximate="tanh"))


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: ChatGLMConfig, layer: int) -> None:
        super().__init__()
        self.alpha = math.sqrt(2 * config.num_layers)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = SelfAttention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, rotations: tuple[tuple[Tensor, Tensor], ...], hide: Tensor) -> Tensor:
        normal = self.input_layernorm(hidden)
        hidden = normal * self.alpha + self.attention(normal, rotations, hide)
        normal = self.post_attention_layernorm(hidden)
        return normal * self.alpha + self.mlp(normal)


class Transformer(nn.Module):
    """Embeddings, layers, and the norm behind them."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.word_embeddings(input_ids).transpose(0, 1)
        context = _context(input_ids, self.config.bos_token_id)
        rotations = self._rotations(context, hidden.dtype)
        hide = _hidden_keys(context, attention_mask)
        for layer in self.layers:
            hidden = layer(hidden, rotations, hide)
        return self.final_layernorm(hidden)

    def _rotations(self, context: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return cosines and sines of every kind of position, each turning an equal share of a head."""
        places = torch.arange(context.shape[1], device=context.device)
        if self.config.position_encoding_2d:
            length = context.sum(dim=1, keepdim=True)
            kinds = [places.minimum(length - 1).clamp(min=0), (places - length + 1).clamp(min=0)]
        else:
            kinds = [places.expand(context.shape)]
        share = self.config.hidden_size // self.config.num_attention_heads // len(kinds)
        return tuple(_cosines_and_sines(positions, share, dtype) for positions in kinds)


class ChatGLMForConditionalGeneration(transformers.PreTrainedModel):
    """The language model; it is a decoder, whatever its name says."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.transformer.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        hidden = self.transformer(input_ids, attention_mask)
        return CausalLMOutput(logits=self.lm_head(hidden).transpose(0, 1).contiguous())


def _context(input_ids: Tensor, bos_token_id: int | None) -> Tensor:
    """Return which tokens come before the first start of generation; none where it never starts."""
    starts = input_ids == bos_token_id
    return (starts.cumsum(dim=1) == 0) & starts.any(dim=1, keepdim=True)


def _hidden_keys(context: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return a mask ``(batch, 1, query, key)`` that is true where a query must not look."""
    places = torch.arange(context.shape[1], device=context.device)
    seen = (places[None, :] <= places[:, None])[None] | context[:, None, :]
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, :].bool()
    return ~seen[:, None]


def _cosines_and_sines(positions: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** -(torch.arange(0, size, 2, device=positions.device).float() / size)
    angles = positions.t()[:, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, :, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(value: Tensor, rotations: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
    """Turn each share of a head by its kind of position."""
    shares = value.chunk(len(rotations), dim=-1)
    return torch.cat(
        [share * cosine + _quarter_turn(share) * sine for share, (cosine, sine) in zip(shares, rotations, strict=True)],
        dim=-1,
    )


def _quarter_turn(value: Tensor) -> Tensor:
    left, right = value.chunk(2, dim=-1)
    return torch.cat((-right, left), dim=-1)
