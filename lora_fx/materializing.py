"""From a graph that was traced on the meta device, without weights, to one that computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from lora_fx.attaching import new_factors_like
from lora_fx.errors import LoraFxError
from lora_fx.factors import is_factor
from lora_fx.graph_module import TracedGraphModule, assemble, copy_graph, state_of, trainable_names


def materialize(
    graph_module: TracedGraphModule,
    state_dict: Mapping[str, torch.Tensor],
    *,
    like: nn.Module | None = None,
    seed: int | None = None,
) -> TracedGraphModule:
    """Return the graph with values for all of its tensors.

    Args:
        graph_module: traced on the meta device; left as it is.
        state_dict: the model's weights, taken as they are. Factors of branches may be left out, and are then initialised.
        like: a module with values for the buffers that no state dict has (rotary frequencies, position ids). For a
            transformers model they are computed from its config.
        seed: of the factors that are initialised.

    Raises:
        LoraFxError: weights are missing, unknown, or have another shape or dtype; or buffers remain without a value.
    """
    state = state_of(graph_module)
    wanted = {name: tensor for name, tensor in state.tensors.items() if name not in state.non_persistent}
    given = {
        **{name: state_dict[first] for name, first in state.aliases().items() if first in state_dict},
        **state_dict,
    }
    problems = [f"{name!r} is missing" for name in wanted if name not in given and not is_factor(name)]
    problems += [f"{name!r} is unknown" for name in given if name not in wanted]
    problems += [
        f"{name!r} is {tensor.dtype} {tuple(tensor.shape)}, not {wanted[name].dtype} {tuple(wanted[name].shape)}"
        for name, tensor in given.items()
        if name in wanted and (tensor.shape, tensor.dtype) != (wanted[name].shape, wanted[name].dtype)
    ]
    if problems:
        raise LoraFxError(f"the state dict does not fit the graph: {'; '.join(problems)}.")
    device = next((tensor.device for tensor in given.values()), torch.device("cpu"))
    owned: dict[str, nn.Parameter] = {}
    values: dict[str, torch.Tensor] = {}
    for name, first in state.aliases().items():
        if name in given:
            is_parameter = isinstance(state.tensors[name], nn.Parameter)
            values[name] = owned.setdefault(first, nn.Parameter(given[first], False)) if is_parameter else given[name]
    values |= new_factors_like({n: t for n, t in wanted.items() if n not in given}, device, seed)
    values |= {
        name: value.to(device) for name, value in _buffers(graph_module, like).items() if name in state.non_persistent
    }
    state = state.with_tensors(values)
    empty = [name for name, tensor in state.tensors.items() if tensor.is_meta]
    if empty:
        raise LoraFxError(f"{', '.join(empty)} have no values: pass like=, a module of the traced class that has them.")
    graph, _ = copy_graph(graph_module.graph)
    return assemble(
        graph, state, meta=graph_module.meta, training=graph_module.training, trainable=trainable_names(graph_module)
    )


def _buffers(graph_module: TracedGraphModule, like: nn.Module | None) -> dict[str, torch.Tensor]:
    if like is None:
        config, model_class = (graph_module.meta["lora_fx"][key] for key in ("config", "model_class"))
        if config is None:
            return {}
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), _parameters_on_meta():
            like = model_class(config)
    return {name: buffer for name, buffer in like.named_buffers() if not buffer.is_meta}


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules register their parameters without values, and their buffers with."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        on_meta = None if parameter is None else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, on_meta)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
