"""Inputs that a call may omit since the model fills them in: known by name, and kept if the model does so in a call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.graph.example_sizes import SUM
from lora_fx.graph.graph_module import TracedGraphModule
from lora_fx.graph.info import GraphInfo
from lora_fx.graph.omitted import Fill, FillKind
from lora_fx.graph.process_state import quiet
from lora_fx.graph.signature import signature_of
from lora_fx.graph.size_relations import Reference
from lora_fx.tracing.cached_forward import PAST_AXIS
from lora_fx.tracing.example_inputs import ExampleInputs
from lora_fx.tracing.parity import GraphFailed, ModelFailed, OnCopies, difference

FILLED: Mapping[str, FillKind] = {
    "attention_mask": "ones",
    "decoder_attention_mask": "ones",
    "position_ids": "positions",
    "token_type_ids": "zeros",
}
"""Arguments of transformers models that may be omitted, and what they are then."""

FLAGS = ("output_attentions", "output_hidden_states", "output_router_logits", "return_dict")
"""Arguments of transformers models that override a flag of the config."""


def flags_of(info: GraphInfo, *, cache: bool) -> dict[str, bool]:
    """Return the flags of a model's config that calls may repeat, and whether the trace has a cache; none of another model."""
    if not info.pretrained:
        return {}
    flags = {name: getattr(info.config, name, None) for name in FLAGS}
    return {**{name: value for name, value in flags.items() if isinstance(value, bool)}, "use_cache": cache}


def fills_of(model: nn.Module, graph_module: TracedGraphModule, inputs: ExampleInputs) -> dict[str, Fill]:
    """Return the inputs that a model fills in, with their values; also the types of tokens that a graph without them may be given.

    For each the model is called without it, and the graph with the value: they have to agree, also where the token for padding
    stands among the others, from which some models make a mask. Of an argument that the graph does not take, the model is
    called with the value, and the graph without it. Where the value is zeros, they choose the first rows of tables, and a row of
    zeros would hide it: the model also has to agree with itself with other first rows.

    Args:
        model: in eval mode.
        graph_module: in eval mode.
        inputs: of the trace.
    """
    candidates = dict(_candidates(graph_module, inputs))
    padded = _with_padding(model, inputs.kwargs)
    return {name: fill for name, fill in candidates.items() if _agrees(model, graph_module, inputs, padded, name, fill)}


def _agrees(
    model: nn.Module,
    graph_module: TracedGraphModule,
    inputs: ExampleInputs,
    values: Mapping[str, Any],
    name: str,
    fill: Fill,
) -> bool:
    rest = {key: value for key, value in values.items() if key != name}
    signature = signature_of(graph_module.graph)
    tensors = dict(zip(signature.inputs, signature.tensors((), values), strict=True))

    value = fill.value(tensors)

    def with_value(called: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **kwargs: called(**kwargs, **{name: value})

    eager = OnCopies(model)
    run: Callable[..., Any] = eager if name in values else with_value(eager)
    run_graph: Callable[..., Any] = with_value(graph_module) if name in values else graph_module

    @functools.cache
    def first_rows() -> dict[str, torch.Tensor]:
        return _with_other_first_rows(model)

    def changed(**kwargs: Any) -> Any:
        return OnCopies(model, first_rows())(**kwargs)

    others = ExampleInputs((), rest, inputs.axes)
    try:
        with torch.no_grad(), quiet():
            agree = difference(run, run_graph, others) is None
            if agree and fill.kind == "zeros":
                agree = difference(changed, with_value(changed), others) is None
            return agree
    except (ModelFailed, GraphFailed):
        return False


def _with_other_first_rows(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of embeddings, and others whose first row is zero, with another first row."""
    made: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() < 2 or not weight.is_floating_point() or not len(weight):
                continue
            if isinstance(module, nn.Embedding) or not weight[0].any():
                row = torch.randn(weight.shape[1:], generator=generator).to(weight)
                made[f"{path}.{name}".removeprefix(".")] = torch.cat([row[None], weight[1:]])
    return made


def _candidates(graph_module: TracedGraphModule, inputs: ExampleInputs) -> Iterator[tuple[str, Fill]]:
    signature = signature_of(graph_module.graph)
    if inputs.args:
        return
    places: dict[str, Reference] = {}
    for name in signature.inputs:
        if name not in FILLED:
            for dim, axis in enumerate(inputs.axes.get(name, ())):
                if axis is not None and SUM not in axis:
                    places.setdefault(axis, (name, dim))
    for argument in signature.arguments:
        kind, axes = FILLED.get(argument.name), inputs.axes.get(argument.name, ())
        if argument.name == "token_type_ids" and not argument.traced:
            axes = inputs.axes.get("input_ids", ())
        elif not argument.is_input:
            continue
        if kind is None or not axes:
            continue
        names = [() if axis is None else tuple(axis.split(SUM)) for axis in axes]
        if kind == "positions" and PAST_AXIS in places:
            names[-1] = (PAST_AXIS, *names[-1])
        if all(each and all(axis in places for axis in each) for each in names):
            sizes = tuple(tuple(places[axis] for axis in each) for each in names)
            value = inputs.kwargs.get(argument.name)
            yield argument.name, Fill(kind, sizes, torch.int64 if value is None else value.dtype)


def _with_padding(model: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    token = getattr(model.config, "pad_token_id", None)
    padded = dict(values)
    for name in ("input_ids", "decoder_input_ids"):
        ids = values.get(name)
        if isinstance(ids, torch.Tensor) and ids.dim() == 2 and isinstance(token, int) and token >= 0:
            padded[name] = ids.clone()
            padded[name][0, -1] = token
    for name in ("attention_mask", "decoder_attention_mask"):  # from which some models count positions
        mask = values.get(name)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            padded[name] = mask.clone()
            padded[name][0, 0] = 0
    return padded
