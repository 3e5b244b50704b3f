"""Forward of a transformers model as a function of its inputs and a prompt: learned embeddings in front of those of the inputs.

The model is called with ``inputs_embeds`` in the place of ids, and a mask that admits the prompt, as PEFT calls it. It counts its
positions from the beginning of the prompt. Of an encoder-decoder model the inputs are those of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from lora_fx.errors import TraceError
from lora_fx.graph.graph_module import state_of
from lora_fx.graph.prefix_slot import PrefixSlot
from lora_fx.torch_internals import pytree
from lora_fx.tracing.cached_forward import TensorCache
from lora_fx.tracing.example_inputs import ExampleInputs, is_pretrained, pad_token_of
from lora_fx.tracing.model_state import preserved
from lora_fx.tracing.prefixed_forward import PrefixedCall, behind_prefix, without_past

IDS, EMBEDDED = "input_ids", "inputs_embeds"
_REFUSED = ("position_ids", "start_positions", "end_positions", EMBEDDED)


def prefixed(model: nn.Module, inputs: ExampleInputs, prefix: bool | Literal["prompt"]) -> PrefixedCall | None:
    """Return the call of a model that can take what stands in front of its text; None where nothing shall.

    Raises:
        TraceError: the model cannot take it.
    """
    return (PromptedCall if prefix == "prompt" else PrefixedCall)(model, inputs) if prefix else None


class PromptedCall(PrefixedCall):
    """A call of a model with a prompt, in the place of ``model.forward``."""

    def _taking(self, model: nn.Module) -> None:
        if not is_pretrained(model) or not {IDS, EMBEDDED} <= self._parameters.keys():
            raise TraceError(
                f'prefix="prompt": {type(model).__name__} is no model of transformers that takes {IDS} and {EMBEDDED}. Use LoRA.'
            )
        self._model: Any = model

    def _caches(self, path: str) -> tuple[TensorCache, ...]:
        del path
        return ()

    def _measured(self, model: Any, given: Mapping[str, Any]) -> PrefixSlot:
        """Return the sizes of an embedding, if the model computes of embeddings what it computes of ids."""
        name, embed = type(model).__name__, model.get_input_embeddings()
        refused = [each for each in _REFUSED if given.get(each) is not None]
        types = given.get("token_type_ids") is not None and model.can_generate()  # which are embedded as words
        if refused or types or not isinstance(given.get(IDS), torch.Tensor):
            told = ", ".join([*refused, *["token_type_ids"] * types]) or f"no {IDS}"
            raise TraceError(
                f'prefix="prompt": expected example_inputs with {IDS}, and without positions, found {told}.'
            )
        ids = given[IDS].clone()
        if (pad := pad_token_of(model.config)) is not None:
            ids[:, -1] = pad  # some heads and positions go by it
        with preserved(model), torch.no_grad():
            model.eval()
            found, expected = (
                [each for each in pytree.tree_leaves(without_past(output)) if isinstance(each, torch.Tensor)]
                for output in (
                    self._original(**{**given, IDS: None, EMBEDDED: embed(ids)}),
                    self._original(**{**given, IDS: ids}),
                )
            )
            dtype, size = embed(ids).dtype, embed(ids).size(-1)
        if len(found) != len(expected) or not all(map(torch.equal, found, expected)):
            raise TraceError(
                f'prefix="prompt": {name} computes of {EMBEDDED} other numbers than of {IDS}, where there is padding or which it reads '
                "for positions, so that its graph cannot take prompts. Use a prefix or LoRA."
            )
        tensors = state_of(model).tensors
        weight = getattr(embed, "weight", None) if type(embed) is nn.Embedding else None
        rows = next((key for key, tensor in tensors.items() if tensor is weight), "")
        return PrefixSlot(0, 1, size, dtype, 0, self._decodes, embeddings=rows)

    def _behind(self, given: dict[str, Any], prefix: torch.Tensor, batch: int) -> Any:
        """Call the model with the embeddings of a prompt in front of those of its ids."""
        ids, tokens = given[IDS], prefix.size(0)
        mask, types, labels = (given.get(name) for name in ("attention_mask", "token_type_ids", "labels"))
        if isinstance(mask, torch.Tensor) and mask.shape != ids.shape:
            raise ValueError("attention_mask has the sizes of the text")  # compared: so a trace knows it from the start
        given = behind_prefix(given, tokens, batch, decodes=False)
        if isinstance(types, torch.Tensor):
            given["token_type_ids"] = torch.cat([types.new_zeros(batch, tokens), types], 1)
        of_tokens = not (self._decodes or type(self._model).__name__.endswith("ForSequenceClassification"))
        if isinstance(labels, torch.Tensor) and of_tokens:
            given["labels"] = torch.cat([labels.new_full((batch, tokens), -100), labels], 1)
        embedded = self._model.get_input_embeddings()(ids)
        given[EMBEDDED] = torch.cat([prefix.expand(batch, -1, -1), embedded], 1)
        return self._original(**{**given, IDS: None})
