"""Trainable tokens: rows of an embedding for which an adapter has values of its own, as PEFT's ``trainable_token_indices`` has them.

    W → [index_copy of the values at the rows] → all readers of W, a tied head included

The values start as the rows of W, and are float32 beside half precision, cast back before they are written over. So equal values give
PEFT's bits, in outputs and in gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from lora_fx.adapters.fake_values import FakeValues
from lora_fx.branches.lower import describe
from lora_fx.errors import PlanError, listed
from lora_fx.graph.adapter_names import original_name, token_names
from lora_fx.graph.erasing import erase_unread
from lora_fx.graph.provenance import module_path, write_stamp
from lora_fx.graph.records import TokenRows
from lora_fx.graph.state import State
from lora_fx.numerics.factor_init import adapter_dtype
from lora_fx.sites.stored_weight import written_rows
from lora_fx.sites.weight_ops import readers

aten = torch.ops.aten


def token_values(
    tokens: Iterable[TokenRows],
    tensors: Mapping[str, torch.Tensor],
    adapter: str,
    given: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Return new parameters for rows of embeddings, by their names: with given values, or those that the rows have.

    Args:
        tokens: the rows.
        tensors: of the graph, by name.
        adapter: that the values belong to.
        given: values by their names.
    """
    found: dict[str, torch.Tensor] = {}
    for each in tokens:
        if given is not None:
            name = token_names(each.module, adapter)[0]
            found[name] = nn.Parameter(given[name].detach(), given[name].requires_grad)
            continue
        weight = tensors[each.weight].detach()
        rows = torch.tensor(each.rows, device=weight.device)
        values = weight.index_select(0, rows)  # a copy
        found[token_names(each.module, adapter)[0]] = nn.Parameter(values.to(adapter_dtype(weight.dtype)))
    return found


def row_numbers(tokens: Iterable[TokenRows], state: State, adapter: str) -> dict[str, torch.Tensor]:
    """Return the buffers with the numbers of the rows, by their names; they have values even where weights have none."""
    found = {}
    for each in tokens:
        weight, rows = state.tensors[each.weight], torch.tensor(each.rows)
        found[token_names(each.module, adapter)[1]] = rows if weight.is_meta else rows.to(weight.device)
    return found


def check_written_once(
    graph: fx.Graph, adapter: str, tokens: Sequence[TokenRows], copies: Iterable[str], state: State
) -> None:
    """Refuse an adapter that is to act with rows, or a trained copy, of an embedding of which another one that acts has the other.

    Args:
        graph: in which the others act.
        adapter: that is to act.
        tokens: its rows.
        copies: names of its trained copies.
        state: of the graph, with the adapter's tensors.

    Raises:
        PlanError: both have rows of one embedding, or one has rows and the other a copy.
    """
    aliases = state.aliases()
    rows = {aliases[each.weight] for each in tokens}
    either = rows | {aliases[original] for name in copies if (original := original_name(name)) is not None}
    taken = set()
    for node in graph.find_nodes(op="get_attr"):
        original = original_name(str(node.target))
        first = aliases.get(original or str(node.target))
        writes = any(written_rows(user) is not None for user in node.users)
        if (first in either and writes) or (first in rows and original is not None):
            taken.add(str(first))
    if taken:
        raise PlanError(
            f"adapter {adapter!r} and another one that acts have rows of {listed(sorted(taken), 5)}, or one rows and one a trained copy: a "
            "graph computes with the tokens of one adapter, as PEFT does. Let one of them act at a time: "
            f'lora_fx.activate(graph, {{"{adapter}": 1.0}}).'
        )


def write_rows(graph: fx.Graph, state: State, fakes: FakeValues, adapter: str, tokens: Iterable[TokenRows]) -> None:
    """Let the readers of embeddings read them with the values of an adapter (in place).

    Args:
        graph: of plain nodes.
        state: with the values and the numbers of the rows.
        fakes: for the new nodes.
        adapter: that the values belong to.
        tokens: the rows.
    """
    aliases = state.aliases()
    for each in tokens:
        first = aliases[each.weight]
        for node in graph.find_nodes(op="get_attr"):
            if aliases.get(str(node.target)) == first:
                _write(graph, state, fakes, adapter, each, node)


def _write(graph: fx.Graph, state: State, fakes: FakeValues, adapter: str, tokens: TokenRows, weight: fx.Node) -> None:
    """Let the readers of one ``get_attr`` read it with the values: all, or those in the module of the rows.

    PEFT casts the values at each module, and so rounds the gradient of each: in half precision every module has nodes of its own.
    """
    dtype = state.tensors[tokens.weight].dtype
    values_name, rows_name = token_names(tokens.module, adapter)
    casts = state.tensors[values_name].dtype != dtype

    def record(node: fx.Node) -> fx.Node:
        describe(node, weight, None)
        write_stamp(node, {"rule": tokens.rule, "site": tokens.module, "adapter": adapter, "part": "rows"})
        fakes.record(node, weight)
        return node

    by_module: dict[str, list[tuple[fx.Node, list[fx.Node]]]] = {}
    for reader, between in list(readers(weight)):
        module = module_path(reader)
        if not tokens.alone or module == tokens.module:
            by_module.setdefault(module if casts else "", []).append((reader, [weight, *between]))
    if not by_module:
        return
    with graph.inserting_before(weight.next):
        rows, stored = record(graph.get_attr(rows_name)), record(graph.get_attr(values_name))
        written = {}
        for module in by_module:
            values = record(graph.call_function(aten.to.dtype, (stored, dtype))) if casts else stored
            written[module] = record(graph.call_function(aten.index_copy.default, (weight, 0, rows, values)))
    for module, uses in by_module.items():
        for reader, path in uses:
            first = path[1] if len(path) > 1 else reader
            inside = {id(each) for each, _ in uses}
            if first is reader or all(id(each) in inside for each, _ in readers(first)):
                first.replace_input_with(weight, written[module])  # again for a second reader: nothing happens
            else:
                _reread(graph, reader, path, written[module])


def _reread(graph: fx.Graph, reader: fx.Node, path: Sequence[fx.Node], written: fx.Node) -> None:
    """Let one reader of a weight read it as written, through copies of the transposes and casts on its way."""
    value: Any = written
    for original in path[1:]:
        with graph.inserting_after(original):
            value = graph.node_copy(original, lambda n, last=value: last if n in path else n)  # type: ignore[misc]
    reader.replace_input_with(path[-1], value)
    erase_unread(graph, path[-1])
