"""Weights for a graph that was traced on the meta device, and the input checks that it would have had with them."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from lora_fx.adapters.covered_sizes import covered_sizes, with_checks
from lora_fx.adapters.dora import missing_magnitudes
from lora_fx.adapters.starts import is_from_weight, model_weight, rests
from lora_fx.adapters.tokens import token_values
from lora_fx.branches.invariants import checked
from lora_fx.branches.remove import unload
from lora_fx.errors import LoraFxError, PlanError, listed
from lora_fx.graph.adapter_names import is_of_adapter, is_of_start, is_placement, original_name
from lora_fx.graph.compare import described
from lora_fx.graph.graph_module import TracedGraphModule, rebuilt, state_in_parts, state_of
from lora_fx.graph.info import info_of
from lora_fx.graph.process_state import forked_random_state
from lora_fx.graph.records import BranchSpec
from lora_fx.graph.state import State
from lora_fx.numerics.factor_init import initial_factors
from lora_fx.planning.plan import owners_of
from lora_fx.sites.call_sites import Site, sites
from lora_fx.tracing.transformers_models import traced_class


def materialize(
    graph_module: TracedGraphModule,
    state_dict: Mapping[str, torch.Tensor],
    *,
    like: nn.Module | None = None,
    seed: int | None = None,
) -> TracedGraphModule:
    """Return the graph with values for all of its tensors.

    Args:
        graph_module: traced on the meta device; not changed.
        state_dict: the model's weights, taken as they are. What an adapter has may be missing: then it stays where it has values, and is
            initialised where it is on the meta device.
        like: a module of the traced class with values for the buffers that no state dict has (rotary frequencies, position
            ids). A transformers model is made from its config, without weights, and run to find out whether size 1 is covered.
        seed: of the factors that are initialised.

    Raises:
        PlanError: there are no values for a branch of MiCA's, which does not start with random ones.
        LoraFxError: weights are missing, unknown, or have another shape or dtype; or buffers remain without a value; or replicated layers
            have other names than in the model.
    """
    if not isinstance(state_dict, Mapping):
        found = type(state_dict).__name__
        advice = ": pass its state_dict()" if isinstance(state_dict, nn.Module) else ""
        raise LoraFxError(f"state_dict: expected a mapping of names to tensors, got a {found}{advice}.")
    state = state_of(graph_module)
    wanted = {name: tensor for name, tensor in state.tensors.items() if name not in state.non_persistent}
    given = {
        **{name: state_dict[first] for name, first in state.aliases().items() if first in state_dict},
        **state_dict,
    }
    if not any(map(is_of_adapter, state_dict)):  # a model's; with adapters it is a graph's
        check_layers_keep_names(graph_module)
    _check_fit(wanted, given)
    device = next((tensor.device for tensor in given.values()), torch.device("cpu"))
    owned: dict[str, nn.Parameter] = {}
    values: dict[str, torch.Tensor] = {}
    for name, first in state.aliases().items():
        if name in given:
            is_parameter = isinstance(state.tensors[name], nn.Parameter)
            values[name] = owned.setdefault(first, nn.Parameter(given[first], False)) if is_parameter else given[name]
    missing = {name: tensor for name, tensor in wanted.items() if name not in given and tensor.is_meta}
    trained = {name: tensor for name, tensor in wanted.items() if name not in given and not tensor.is_meta}
    values |= {name: tensor for name, tensor in _on(trained, device).items() if is_of_adapter(name)}
    values |= initial_values(graph_module, missing, {**state.tensors, **given, **values}, device, seed)
    values |= {name: tensor.to(device) for name, tensor in state.tensors.items() if is_placement(name)}
    like = like if like is not None else traced_class(graph_module)
    values |= computed_buffers(state, like, device)
    state = state.with_tensors(values)
    check_filled(state.tensors)
    info = info_of(graph_module)
    info = replace(info, statistics={name: state.tensors[name].clone() for name in info.statistics})
    ready = rebuilt(graph_module, state=state, info=info)
    covered = None if like is None else covered_sizes(unload(ready), like)
    return checked(ready if covered is None else with_checks(ready, *covered), "branched" if info.adapters else "base")


def initial_values(
    graph_module: TracedGraphModule,
    missing: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    device: torch.device,
    seed: int | None,
) -> dict[str, torch.Tensor]:
    """Return the values with which the adapters of a graph start, as far as they follow from the weights and random draws.

    Args:
        graph_module: not changed.
        missing: tensors of adapters that have no values, in the order of the graph's.
        tensors: the weights, and what adapters have, by all names of the graph.
        device: for the values.
        seed: of the draws.
    """
    info = info_of(graph_module)
    values: dict[str, torch.Tensor] = {}
    known = ChainMap(values, tensors)  # type: ignore[arg-type]  # which is not written to
    for name in missing:
        original = original_name(name)
        if original is not None and not is_of_start(name):
            value = tensors[original].detach().clone()
            values[name] = nn.Parameter(value) if isinstance(missing[name], nn.Parameter) else value
    for adapter, record in info.adapters.items():
        rows = token_values(record.tokens, known, adapter)
        values |= {name: value for name, value in rows.items() if name in missing}
    branches = [
        (adapter, branch) for adapter, record in info.adapters.items() for _, branch in record.branches.values()
    ]
    found = sites(graph_module)
    dtypes = {name: tensor.dtype for name, tensor in state_in_parts(graph_module).tensors.items()}
    values |= _new_factors(missing, branches, found, dtypes, device, seed)
    values |= missing_magnitudes(missing, branches, found, known)
    left = rests(branches, found, known) if any(map(is_of_start, missing)) else {}
    return {**values, **{name: value for name, value in left.items() if name in missing}}


def _new_factors(
    wanted: Mapping[str, torch.Tensor],
    branches: Iterable[tuple[str, BranchSpec]],
    found: Iterable[Site],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    seed: int | None,
) -> dict[str, torch.Tensor]:
    """Return initial values for pairs of factors that have none yet, those that a rewrite of the model with weights would draw.

    Args:
        wanted: factors by name, in the order of the model's modules, A before B.
        branches: adapter and branch, of every branch in the graph.
        found: the sites of the graph.
        dtypes: of its weights.
        device: for the values.
        seed: of the draws. Without one they come from torch's current random state, which is restored.
    """
    own = ((adapter, branch) for adapter, branch in branches if branch.mirrors is None)
    by_name = {names.a: (branch, names.b, names.bias) for adapter, branch in own for names in (branch.names(adapter),)}
    site_of = {owner: site for site in found for owner in owners_of(site)}
    values: dict[str, torch.Tensor] = {}
    with forked_random_state(seed=seed):
        for name in wanted:
            if name in by_name and by_name[name][1] in wanted:
                branch, other, bias = by_name[name]
                if is_from_weight(branch):
                    raise PlanError(
                        f"the branch at {branch.key!r} starts from the weight (init {branch.setting.init!r}), and there are no values for it. "
                        "Rewrite the model with its weights, or load an adapter from a directory."
                    )
                site = site_of[branch.owner]
                like = torch.empty(0, dtype=dtypes[model_weight(site)], device=device)
                shapes = {each: wanted[each].shape for each in (name, other, bias) if each in wanted}
                drawn = initial_factors(
                    [*shapes.values()],
                    branch.setting.rank,
                    like,
                    computed=site.cast,
                    op=branch.op,
                    init=branch.setting.init,
                )
                values |= dict(zip(shapes, drawn, strict=True))
                values[name].requires_grad_(branch.setting.trains_a)
                values[other].requires_grad_(branch.setting.trains_b)
    return values


def computed_buffers(state: State, like: nn.Module | None, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the buffers that no state dict has, in the dtypes that they have in a graph, from a module of the traced class."""
    buffers = {} if like is None else {name: buffer for name, buffer in like.named_buffers() if not buffer.is_meta}
    return {
        name: value.to(device, state.tensors[name].dtype)
        for name, value in buffers.items()
        if name in state.non_persistent
    }


def check_layers_keep_names(graph_module: TracedGraphModule) -> None:
    """Raise :class:`LoraFxError` if replicated layers have the names of other layers of the model, whose weights they would get by name."""
    ranges = info_of(graph_module).layers
    order = [layer for first, end in ranges for layer in range(first, end)]
    if any(order.index(layer) != layer for layer in order):
        raise LoraFxError(
            f"layer_replication: the graph has the layers {[*map(list, ranges)]}, so that weights of the model would get into other layers by "
            "their names. Rewrite the model with its weights, not on the meta device."
        )


def check_filled(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise :class:`LoraFxError` where a tensor of a graph has no value."""
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if torn := [name for name in empty if is_of_adapter(name)]:
        raise LoraFxError(
            f"{listed(torn, 10)}: expected values for all that a branch has, got some of them. Give these, too, in the state dict."
        )
    if empty:
        raise LoraFxError(f"{', '.join(empty)} have no values: pass like=, a module of the traced class that has them.")


def _on(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Return tensors on a device; those that are there already are the same ones."""
    moved = {id(tensor): tensor for tensor in tensors.values()}  # one tensor may have several names
    for key, tensor in moved.items():
        if tensor.device != device:
            on = tensor.detach().to(device)
            moved[key] = nn.Parameter(on, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else on
    return {name: moved[id(tensor)] for name, tensor in tensors.items()}


def _check_fit(wanted: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """Raise unless the given tensors are the wanted ones, with all problems; tensors of adapters may be missing."""
    problems = [f"{name!r} is missing" for name in wanted if name not in given and not is_of_adapter(name)]
    problems += [f"{name!r} is unknown" for name in given if name not in wanted]
    problems += [
        f"{name!r} is {described(tensor)}, not {described(wanted[name])}"
        for name, tensor in given.items()
        if name in wanted and described(tensor) != described(wanted[name])
    ]
    if problems:
        raise LoraFxError(f"the state dict does not fit the graph: {'; '.join(problems)}.")
