"""The number of items that a loss is divided by: an input of graphs with labels, which may be left out.

transformers' ``Trainer`` counts the labels in all batches of an optimizer step, and passes the count to each of them as
``num_items_in_batch``: the loss is the sum over the batch divided by that count, so that accumulated gradients are those of one large
batch, also where batches have different numbers of labels. Without a count it is the mean over the batch. A model is traced with
the count, and where the trace divides a sum by it, modules make the choice at each call:

    ``cross_entropy_loss(…, reduction=sum)``   → ``reduction=Reduction()(count)``
    ``div(total, count)``                      → ``PerItem()(total, count)``

Where the trace reads the count in another way, the count stays an input that each call must give.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from lora_fx.graph.aten_kinds import arguments_of, set_argument
from lora_fx.graph.input_checks import PREFIX
from lora_fx.graph.provenance import module_path
from lora_fx.graph.signature import ITEM_COUNT, let_omit
from lora_fx.tracing.example_inputs import ExampleInputs
from lora_fx.tracing.train_eval import free_path

aten = torch.ops.aten

MEAN, SUM = 1, 2
"""ATen's numbers of the two reductions."""

_CASTS = (aten.to.dtype_layout, aten.to.device, aten.to.dtype, aten._to_copy.default)


class Reduction(nn.Module):
    """Return the reduction of a loss, as a number of ATen: the sum with a count of items, and the mean without."""

    def forward(self, count: torch.Tensor | float | None) -> int:
        """Return the reduction for a count."""
        return MEAN if count is None else SUM


class PerItem(nn.Module):
    """Divide a sum by a count of items, as transformers does; without a count return the value, which is a mean, as it is."""

    def forward(self, value: torch.Tensor, count: torch.Tensor | float | None) -> torch.Tensor:
        """Return the loss."""
        if count is None:
            return value
        return value / (count.to(value.device) if isinstance(count, torch.Tensor) else count)


def accepts_loss_kwargs(model: nn.Module) -> bool:
    """Tell whether transformers' ``Trainer`` passes a count of items to a model.

    An attribute of this name says so, otherwise ``**kwargs`` in the signature of ``forward``: that of the model inside, where PEFT
    wraps it.
    """
    model = trained_model(model)
    if hasattr(model, "accepts_loss_kwargs"):
        return bool(model.accepts_loss_kwargs)
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def trained_model(model: Any) -> Any:
    """Return the model that ``Trainer`` looks at: the one inside a model of PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def with_item_count(model: nn.Module, inputs: ExampleInputs) -> ExampleInputs:
    """Return example inputs with a count of items, if ``Trainer`` passes one to the model."""
    if not accepts_loss_kwargs(model):
        return inputs
    device = next(value.device for value in inputs.kwargs.values() if isinstance(value, torch.Tensor))
    others = {name: value for name, value in inputs.kwargs.items() if name != ITEM_COUNT}
    return replace(inputs, kwargs={**others, ITEM_COUNT: torch.tensor(3.0, device=device)})


def without_item_count(inputs: ExampleInputs) -> ExampleInputs:
    """Return example inputs without the count of items."""
    return replace(inputs, kwargs={name: value for name, value in inputs.kwargs.items() if name != ITEM_COUNT})


def follow_item_count(graph: fx.Graph, taken: Collection[str]) -> dict[str, nn.Module]:
    """Let calls of a graph that was traced with a count of items leave it out (in place), and return the modules that it now calls.

    Args:
        graph: unchanged where it was traced without a count, or reads it in another way than by dividing a sum.
        taken: the names of tensors and modules, which no module may hide.
    """
    count = _placeholder(graph)
    quotients = None if count is None else _quotients(count, count.meta["val"].dtype)
    if count is None or quotients is None:
        return {}
    modules: dict[str, nn.Module] = {}
    for node in quotients:
        total = node.args[0]
        assert isinstance(total, fx.Node)
        base = module_path(node)
        reduction, per_item = (
            free_path(f"{base}.loss.{name}".removeprefix("."), (*taken, *modules)) for name in ("reduction", "per_item")
        )
        modules |= {reduction: Reduction(), per_item: PerItem()}
        with graph.inserting_before(total):
            switch = graph.call_module(reduction, (count,))
        switch.meta = {key: value for key, value in total.meta.items() if key != "val"}
        set_argument(total, "reduction", switch)
        with graph.inserting_before(node):
            loss = graph.call_module(per_item, (total, count))
        loss.meta = dict(node.meta)
        node.replace_all_uses_with(loss)
        graph.erase_node(node)
    graph.eliminate_dead_code(lambda node: node.op == "call_module" or node.is_impure())  # casts of the count
    let_omit(graph, ITEM_COUNT)
    return modules


def loss_uses_count(graph_module: fx.GraphModule) -> bool:
    """Tell whether a graph divides its loss by the count of items, other than a graph that only takes the count, or takes none.

    The models of T5, BART, BERT and Whisper compute a mean of their own and ignore the count, which ``Trainer`` takes to be
    accepted, so that it does not divide by its accumulation steps either.
    """
    count = _placeholder(graph_module.graph)
    return count is not None and any(not str(user.target).startswith(f"{PREFIX}.") for user in count.users)


def _placeholder(graph: fx.Graph) -> fx.Node | None:
    return next((node for node in graph.find_nodes(op="placeholder") if node.target == ITEM_COUNT), None)


def _quotients(count: fx.Node, dtype: torch.dtype) -> list[fx.Node] | None:
    """Return the nodes that divide a sum, which nothing else reads, by the count; None if it is read in another way."""
    found: list[fx.Node] = []
    for user in count.users:
        if user.target in _CASTS and user.args[0] is count and user.meta["val"].dtype is dtype:
            behind = _quotients(user, dtype)
            if behind is None:
                return None
            found += behind
        elif user.target is aten.div.Tensor and user.args[1] is count and _is_sum(user.args[0]):
            found.append(user)
        else:
            return None
    return found


def _is_sum(node: Any) -> bool:
    return isinstance(node, fx.Node) and len(node.users) == 1 and arguments_of(node).get("reduction") == SUM
