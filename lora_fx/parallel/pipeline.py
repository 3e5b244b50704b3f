"""Stages of a pipeline: parts of a nested graph, for ``torch.distributed.pipelining``, which lets several processes compute them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from lora_fx.adapters.prefix import acting_prefix, prefix_record
from lora_fx.errors import LoraFxError, did_you_mean, listed
from lora_fx.graph.cached_graphs import check_undivided
from lora_fx.graph.graph_module import TracedGraphModule, as_traced, state_of
from lora_fx.graph.info import info_of
from lora_fx.graph.input_checks import InputCheck, RelationCheck
from lora_fx.graph.layers import Layer, nesting
from lora_fx.graph.module_tensors import trainable_names
from lora_fx.graph.nested import nest_in_place


def stage_module(graph_module: TracedGraphModule, splits: Sequence[str], index: int) -> fx.GraphModule:
    """Return one stage of a graph for ``torch.distributed.pipelining.PipelineStage``, over the graph's own parameters.

    A stage is called with what the stage before it returns and, by keyword, with the inputs of the graph that it reads. Only what follows
    from layers or parameters goes from stage to stage; masks, rotary tables and sizes are computed in each from the inputs. The last stage
    returns the outputs of the graph, without a class around them: the tensor, or a tuple of several::

        module = lora_fx.parallel.stage_module(graph, ["model.layers.8"], rank)
        stage = PipelineStage(module, rank, 2, device)
        schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=loss_of)
        own = {name: batch[name] for name in lora_fx.parallel.inputs_of(module)}
        schedule.step(**own) if rank == 0 else schedule.step(**own, target=labels, losses=losses)

    Args:
        graph_module: a flat one is nested (in place). Its layers are those of the stages.
        splits: paths of the layers with which the second stage and further ones begin, in their order.
        index: of the stage, from 0.

    Raises:
        LoraFxError: the graph cannot be nested, a path is that of no layer, the order is another, or a parameter that trains is read in
            several stages, in each of which it would get a part of its gradient; a prefix acts.
        PlanError: the argument is no graph of lora_fx.
    """
    check_undivided(as_traced(graph_module))
    parts = nesting(as_traced(graph_module), graph_module.graph)
    if (adapter := acting_prefix(graph_module)) is not None:
        raise LoraFxError(
            f"the {prefix_record(graph_module, adapter).kind} of adapter {adapter!r} acts, which all stages read, and each would get a part of its "
            "gradient. Train it in one process, or sharded (torch.distributed.fsdp.fully_shard)."
        )
    if not info_of(graph_module).nested:
        nest_in_place(graph_module, info_of(graph_module).checkpointing)
    assert parts.outer is not None
    cut = _Cut.of(graph_module, parts.outer, splits)
    if not 0 <= index <= len(splits):
        raise LoraFxError(f"expected the index of one of {len(splits) + 1} stages, got {index}.")
    _check_parameters(graph_module, cut)
    return fx.GraphModule(graph_module, cut.graph(index), class_name=f"{type(graph_module).__name__}Stage{index}")


def inputs_of(stage: fx.GraphModule) -> tuple[str, ...]:
    """Return the names of the inputs of the graph that a stage reads."""
    return tuple(str(node.target) for node in stage.graph.find_nodes(op="placeholder") if not node.meta.get("received"))


@dataclass(frozen=True)
class _Cut:
    """A graph in stages.

    Attributes:
        outer: the graph, with calls of layers.
        stages: the stage of each node, by its place.
        again: nodes that each stage computes for itself, since they follow from the inputs alone.
        count: number of stages.
    """

    outer: fx.Graph
    stages: dict[fx.Node, int]
    again: frozenset[fx.Node]
    count: int

    @classmethod
    def of(cls, root: nn.Module, outer: fx.Graph, splits: Sequence[str]) -> _Cut:
        calls = [node for node in outer.find_nodes(op="call_module") if isinstance(_module(root, node), Layer)]
        paths = list(dict.fromkeys(str(node.target) for node in calls))
        unknown = [path for path in splits if path not in paths]
        if unknown:
            raise LoraFxError(
                f"expected paths of layers ({listed(paths, 6)}), got {unknown[0]!r}{did_you_mean(unknown[0], paths)}."
            )
        if sorted(set(splits), key=paths.index) != [*splits]:
            raise LoraFxError(f"expected layers in the order in which they are computed, got {', '.join(splits)}.")
        first = {path: next(node for node in calls if node.target == path) for path in splits}
        starts, stages, stage = {node: n for n, node in enumerate(first.values(), 1)}, dict[fx.Node, int](), 0
        again: set[fx.Node] = set()
        for node in outer.nodes:
            stage = starts.get(node, stage)
            stages[node] = stage
            if _follows_from_inputs(root, node, again):
                again.add(node)
        return cls(outer, stages, frozenset(again), len(splits) + 1)

    def needs(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Return what nodes read, with what a stage computes for itself on the way."""
        found: set[fx.Node] = set()
        waiting = [source for node in nodes for source in node.all_input_nodes]
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += node.all_input_nodes if node in self.again else []
        return found

    def own(self, index: int) -> list[fx.Node]:
        """Return the nodes that a stage computes, and no other does; checks of inputs are those of the first."""
        checks = (node for node in self.again if node.op == "call_module" and index == 0)
        own = {node for node, stage in self.stages.items() if stage == index and node not in self.again}
        own.update(checks)
        return [node for node in self.outer.nodes if node in own]

    def received(self, index: int) -> list[fx.Node]:
        """Return the values that a stage gets from the one before, in their order."""
        read = self.needs(node for later in range(index, self.count) for node in self.own(later))
        return [
            node for node in self.outer.nodes if node in read and node not in self.again and self.stages[node] < index
        ]

    def graph(self, index: int) -> fx.Graph:
        """Return the graph of a stage."""
        made, image = fx.Graph(), dict[fx.Node, fx.Node]()
        sent = self.received(index + 1) if index + 1 < self.count else []
        own, received = self.own(index), self.received(index)
        copied = self.needs(own).union(own)
        for count, node in enumerate(received):
            image[node] = made.placeholder(f"received_{count}")
            image[node].meta = {"received": True}
        for node in self.outer.nodes:
            if node.op == "placeholder" and node in copied:
                image[node] = made.placeholder(str(node.target))
            elif node.op == "output":
                leaves = [image[leaf] for leaf in node.all_input_nodes] if not sent else [image[each] for each in sent]
                if index + 1 == self.count or sent:
                    made.output(leaves[0] if len(leaves) == 1 else tuple(leaves))
            elif node in copied and node not in image:
                image[node] = made.node_copy(node, image.__getitem__)
        return made


def _module(root: nn.Module, node: fx.Node) -> nn.Module:
    return root.get_submodule(str(node.target))


def _follows_from_inputs(root: nn.Module, node: fx.Node, known: set[fx.Node]) -> bool:
    """Tell whether any stage can compute a node for itself, with the same result: from inputs, buffers and parameters that are read alone."""
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op == "output" or not all(
        source in known and not _is_parameter(root, source) for source in node.all_input_nodes
    ):
        return False
    if node.op == "call_module":
        return isinstance(_module(root, node), InputCheck | RelationCheck)
    return torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())


def _is_parameter(root: nn.Module, node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    path, _, leaf = str(node.target).rpartition(".")
    return leaf in root.get_submodule(path)._parameters


def _check_parameters(graph_module: TracedGraphModule, cut: _Cut) -> None:
    """Raise where a parameter that trains is read in several stages."""
    trained, first = trainable_names(graph_module), state_of(graph_module).aliases()
    read: dict[str, set[int]] = {}
    for node, stage in cut.stages.items():
        if node.op == "get_attr":
            for user in node.users:
                read.setdefault(str(node.target), set()).add(cut.stages[user])
        elif node.op == "call_module":
            for name, _ in _module(graph_module, node).named_parameters():
                read.setdefault(f"{node.target}.{name}", set()).add(stage)
    stages: dict[str, set[int]] = {}
    for name, found in read.items():
        if name in trained:
            stages.setdefault(first[name], set()).update(found)
    shared = [name for name, found in stages.items() if len(found) > 1]
    if shared:
        raise LoraFxError(
            f"{listed(shared, 3)}: trains and is read in several stages of the pipeline, in each of which it would get a part of its gradient. "
            "Freeze it, or split elsewhere."
        )
