"""Activated LoRA (aLoRA, arXiv 2504.12397): a branch acts from its invocation tokens on, and all before them is the base's.

Where they stand is a value of the graph, computed from ``input_ids``: for each row the last place at which all of these tokens follow each
other. Beside a site, the tokens from there on are selected, and the branch computes on them alone, as PEFT's layers do::

    x → index_select tokens → [dropout] → A → B → mul scaling → add (y → index_select tokens) → index_copy over the tokens of y

A row without the invocation has no such tokens. What a branch does depends on the input, so that no fold can merge it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lora_fx.adapters.batch_dimension import batch_first, shown_shape, size_of_batch
from lora_fx.branches.selected import not_always
from lora_fx.errors import PlanError, listed
from lora_fx.graph.cached_graphs import has_cache
from lora_fx.graph.graph_module import TracedGraphModule
from lora_fx.graph.info import RuledBranches, known_info
from lora_fx.planning.plan import Plan
from lora_fx.sites.weight_ops import Emit, weight_op

aten = torch.ops.aten

IDS = "input_ids"
"""The input in which a graph finds invocation tokens."""


def check_invocable(graph_module: TracedGraphModule, plan: Plan, adapter: str) -> None:
    """Refuse branches with invocation tokens where a graph does not have these.

    Raises:
        PlanError: the graph has no ``input_ids (batch, sequence)``, or takes those alone that follow a cache, or a site's output is not
            ``(batch, tokens, features)``.
    """
    branches = [(chosen.site, branch) for chosen in plan.chosen for branch in chosen.branches]
    if not any(branch.setting.invocation_tokens for _, branch in branches):
        return
    ids = _ids(graph_module.graph)
    value = None if ids is None else ids.meta.get("val")
    if ids is None or not isinstance(value, torch.Tensor) or value.dim() != 2 or value.is_floating_point():
        inputs = [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]
        raise PlanError(
            f"adapter {adapter!r} acts from its invocation tokens on (aLoRA): expected a graph with the input {IDS!r} (batch, sequence), got "
            f"one with {listed(inputs, 8)}. Trace the model with {IDS}, or leave the invocation tokens out."
        )
    info = known_info(graph_module)
    if has_cache(graph_module) or info.part or getattr(info.config, "is_encoder_decoder", False):
        raise PlanError(
            f"adapter {adapter!r} acts from its invocation tokens on (aLoRA), which a graph finds in {IDS!r}: expected the graph of a causal "
            "language model that takes all tokens, got one with a cache or an encoder, whose later calls do not have them. Trace without "
            "cache=True, or generate with PEFT."
        )
    nodes, batch = {node.name: node for node in graph_module.graph.nodes}, size_of_batch(ids)
    problems = list(
        dict.fromkeys(
            f"{site.name} reads {shown_shape(weight_op(nodes[site.node]).input)}"  # type: ignore[union-attr]
            for site, branch in branches
            if branch.setting.invocation_tokens and not _has_tokens(nodes[site.node], batch)
        )
    )
    if problems:
        raise PlanError(
            f"adapter {adapter!r} acts from its invocation tokens on (aLoRA): expected sites that read (batch {batch}, tokens, features), and "
            f"{listed(problems, 5)}. Leave these out."
        )


def check_always_acts(adapter: str, branches: RuledBranches) -> None:
    """Raise :class:`FoldError` for an adapter with invocation tokens, which no weight can hold."""
    partial = next((branch for _, branch in branches.values() if branch.setting.invocation_tokens), None)
    if partial is not None:
        raise not_always(adapter, partial.owner)


def acting_invocations(graph_module: TracedGraphModule) -> tuple[tuple[int, ...], ...]:
    """Return the invocation tokens of the branches that act in a graph, each once."""
    records = known_info(graph_module).adapters.values()
    branches = [branch for record in records if record.acts for _, branch in record.branches.values()]
    return tuple(
        dict.fromkeys(branch.setting.invocation_tokens for branch in branches if branch.setting.invocation_tokens)
    )


def _ids(graph: fx.Graph) -> fx.Node | None:
    return next((node for node in graph.find_nodes(op="placeholder") if node.target == IDS), None)


def _has_tokens(site: fx.Node, batch: object) -> bool:
    product = weight_op(site)
    assert product is not None
    found = None if product.op != "linear" else batch_first(product.input, batch)
    return found is not None and found.source.meta["val"].dim() in (2, 3)


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch for which a branch acts.

    Attributes:
        indices: the node with their places in the batch and the sequence as one dimension ``(tokens,)``.
    """

    indices: fx.Node

    def of(self, emit: Emit, value: fx.Node, like: fx.Node) -> fx.Node:
        """Write the selection of these tokens of a value; see :meth:`lora_fx.adapters.branch_nodes.Rows.of`."""
        return emit("tokens", aten.index_select.default, self._flat(emit, value, like), 0, self.indices)

    def put(self, emit: Emit, whole: fx.Node, value: fx.Node, site: fx.Node) -> fx.Node:
        """Write a value over these tokens of the output of a site, and return that."""
        done = emit("tokens", aten.index_copy.default, self._flat(emit, whole, site), 0, self.indices, value)
        return emit("tokens", aten.view_as.default, done, whole)

    def _flat(self, emit: Emit, value: fx.Node, like: fx.Node) -> fx.Node:
        return emit("tokens", aten.reshape.default, value, [-1, int(like.meta["val"].shape[-1])])


@dataclass(frozen=True)
class Invocations:
    """Writes where the invocation tokens of branches stand, once for all branches that read one value."""

    graph: fx.Graph
    _starts: dict[tuple[int, ...], fx.Node] = field(default_factory=dict)
    _known: dict[tuple[tuple[int, ...], fx.Node], Tokens] = field(default_factory=dict)

    def tokens(self, emit: Emit, site: fx.Node, invocation: tuple[int, ...], mine: fx.Node | None) -> Tokens:
        """Return the tokens of a site from the last invocation on.

        Args:
            emit: appends a node in front of the branch.
            site: whose input has the tokens.
            invocation: the tokens that invoke.
            mine: tells of each row whether the branch may act there; None for all.
        """
        ids, product = _ids(self.graph), weight_op(site)
        assert ids is not None
        assert product is not None
        place = batch_first(product.input, size_of_batch(ids))
        assert place is not None
        key = invocation, place.source
        if key not in self._known:
            self._known[key] = Tokens(self._indices(emit, ids, place.source, invocation, mine))
        return self._known[key]

    def _indices(
        self, emit: Emit, ids: fx.Node, source: fx.Node, invocation: tuple[int, ...], mine: fx.Node | None
    ) -> fx.Node:
        """Write the places of the tokens from the invocation on, counted from the end of the sequence as PEFT does."""
        if invocation not in self._starts:
            count = self._from_end(emit, ids, invocation)
            count = count if mine is None else emit("invocation", aten.mul.Tensor, count, mine)
            self._starts[invocation] = count
        count = self._starts[invocation]
        width: Any = emit("tokens", aten.sym_size.int, source, 1) if source.meta["val"].dim() == 3 else 1
        place = emit("tokens", aten.cumsum.default, emit("tokens", aten.new_ones.default, count, [1, width]), 1)
        before = emit("tokens", aten.rsub.Scalar, emit("tokens", aten.clamp.default, count, None, width), width)
        acts = emit("tokens", aten.gt.Tensor, place, emit("tokens", aten.unsqueeze.default, before, 1))
        found = emit("tokens", aten.nonzero.default, emit("tokens", aten.reshape.default, acts, [-1]))
        return emit("tokens", aten.squeeze.dim, found, 1)

    def _from_end(self, emit: Emit, ids: fx.Node, invocation: tuple[int, ...]) -> fx.Node:
        """Write how many tokens there are from the last invocation of each row on, 0 where there is none: ``(batch,)``."""
        padded = emit("invocation", aten.constant_pad_nd.default, ids, [0, len(invocation) - 1], -1)
        windows = emit("invocation", aten.unfold.default, padded, 1, len(invocation), 1)
        hits = list(self._hits(emit, windows, invocation))
        hit = hits[0]
        for more in hits[1:]:
            hit = emit("invocation", aten.logical_and.default, hit, more)
        place = emit("invocation", aten.cumsum.default, emit("invocation", aten.ones_like.default, ids), 1)
        last = emit("invocation", aten.amax.default, emit("invocation", aten.mul.Tensor, place, hit), [1])
        past = emit("invocation", aten.add.Scalar, emit("invocation", aten.amax.default, place, [1]), 1)
        count = emit("invocation", aten.sub.Tensor, past, last)
        return emit("invocation", aten.mul.Tensor, count, emit("invocation", aten.gt.Scalar, last, 0))

    @staticmethod
    def _hits(emit: Emit, windows: fx.Node, invocation: tuple[int, ...]) -> Iterator[fx.Node]:
        for index, token in enumerate(invocation):
            yield emit("invocation", aten.eq.Scalar, emit("invocation", aten.select.int, windows, 2, index), token)
