"""Branches → merged weights, and back to the graph as it was before the rewrite.

W' = W + Σ scaling · B A        (transposed for weights that are laid out (in, out))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from lora_fx.branches import FoundBranch, Term, find_branches
from lora_fx.errors import FoldError
from lora_fx.factors import is_of_adapter, original_name
from lora_fx.graph_module import State, TracedGraphModule, assemble, copy_graph, erase_unread, state_of
from lora_fx.lowrank import Update, merged_weight
from lora_fx.sites import Operands, operands, uses


def fold(graph_module: TracedGraphModule) -> TracedGraphModule:
    """Return the graph without its branches, with their product merged into the weights of their sites.

    The result computes what ``graph_module`` computes in evaluation, has the graph that the model was traced to, and the
    model's ``state_dict`` keys. ``graph_module`` stays usable; only adapted weights are new tensors. Their names are in
    ``meta["lora_fx"]["merged"]``.

    Raises:
        FoldError: a branch is not linear, a weight would need different values at its uses, or a tensor is on the meta
            device.
    """
    found = find_branches(graph_module)
    state = state_of(graph_module)
    merged: dict[str, torch.Tensor] = {}
    for weight, branches in _by_weight(found).items():
        parts = _site(branches[0])
        _all_uses_alike(parts.weight, branches)
        updates = [_update(term, state) for term in branches[0].terms]
        for name, tensor in [
            (weight, state.tensors[weight]),
            *((n, state.tensors[n]) for t in branches[0].terms for n in t.factors),
        ]:
            if tensor.is_meta:
                raise FoldError(f"{name!r} is on the meta device and has no values to fold. Load the weights first.")
        value = merged_weight(state.tensors[weight], updates, transposed=parts.layout == "in_out")
        if not torch.isfinite(value).all():
            raise FoldError(
                f"folding makes {weight!r} non-finite: the weight or an adapter has a NaN, an infinity, or too large a value."
            )
        parameter = nn.Parameter(value, requires_grad=False)
        merged.update({name: parameter for name, first in state.aliases().items() if first == weight})
    for name, tensor in {**state.tensors, **merged}.items():
        original = original_name(name)
        if original is not None:
            # A copy that trains on must not change what was folded.
            merged[original] = merged.get(name, nn.Parameter(tensor.detach().clone(), requires_grad=False))
    folded = _without_branches(graph_module, found, state.with_tensors(merged))
    own = folded.meta["lora_fx"]
    own["merged"] = (*own.get("merged", ()), *(name for name in merged if not is_of_adapter(name)))
    return folded


def unload(graph_module: TracedGraphModule) -> TracedGraphModule:
    """Return the graph as it was before the rewrite: its branches dropped, its weights unchanged.

    Raises:
        FoldError: a branch cannot be taken out without changing something else.
    """
    return _without_branches(graph_module, find_branches(graph_module), state_of(graph_module))


def _by_weight(found: Sequence[FoundBranch]) -> dict[str, list[FoundBranch]]:
    groups: dict[str, list[FoundBranch]] = {}
    for branch in found:
        groups.setdefault(str(_site(branch).weight.target), []).append(branch)
    return groups


def _site(branch: FoundBranch) -> Operands:
    parts = operands(branch.site)
    assert parts is not None
    return parts


def _update(term: Term, state: State) -> Update:
    places = state.tensors[term.places] if term.places is not None else None
    return Update(tuple(state.tensors[name] for name in term.factors), term.scaling, places)


def _all_uses_alike(weight: fx.Node, branches: Sequence[FoundBranch]) -> None:
    """Raise unless every use of a weight is a site with the same updates: a merged weight has one value for all of them."""
    updates: Mapping[fx.Node, frozenset[tuple[tuple[str, ...], float, str | None]]] = {
        branch.site: frozenset((term.factors, term.scaling, term.places) for term in branch.terms)
        for branch in branches
    }
    readers = list(uses(weight))
    if set(updates) == set(readers) and len(set(updates.values())) == 1:
        return
    named = "; ".join(f"{user.name} ({'with' if user in updates else 'without'} a branch)" for user in readers)
    raise FoldError(
        f"{weight.target!r} is used {len(readers)} times, and its uses need different values after folding: {named}. "
        "Adapt all uses alike, or give the model separate weights before the rewrite."
    )


def _without_branches(graph_module: TracedGraphModule, found: Sequence[FoundBranch], state: State) -> TracedGraphModule:
    graph, copies = copy_graph(graph_module.graph)
    for branch in found:
        copies[branch.end].replace_all_uses_with(copies[branch.base])
        erase_unread(graph, copies[branch.end])
    for node in graph.find_nodes(op="get_attr"):
        node.target = original_name(str(node.target)) or node.target
    graph.lint()
    kept = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    dropped = {name for name in state.tensors if is_of_adapter(name)} | (set(state.modules) - kept)
    own = {key: value for key, value in graph_module.meta["lora_fx"].items() if key != "adapters"}
    meta = {**graph_module.meta, "lora_fx": own}
    return assemble(graph, state.without(dropped), meta=meta, training=graph_module.training, trainable=frozenset())
