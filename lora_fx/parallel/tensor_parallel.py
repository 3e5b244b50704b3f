"""Tensor parallelism: the graph of one process, which has a part of the weights of each layer (Megatron-LM, arXiv 1909.08053).

Of a site that is divided by output a process has rows of W and of B, and all of A; the values that follow are split, by heads or
features, until a site that is divided by input, of which it has columns of W and of A, and all of B::

    y_r = W_r f(x) + s B_r f(A x)                  by output
    y = g(W_r x_r + s f(B) A_r x_r) + bias         by input

g sums over the processes, and passes the gradient on; f passes a value on, and sums its gradient. So every value and gradient that is whole
is the same on all processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import distributed, fx, nn

from lora_fx.branches.invariants import checked
from lora_fx.branches.lower import describe, lower
from lora_fx.errors import LoraFxError
from lora_fx.graph.aten_kinds import arguments_of, name_of
from lora_fx.graph.cached_graphs import check_changeable, has_cache
from lora_fx.graph.graph_module import TracedGraphModule, as_traced, copy_graph, rebuilt, state_of
from lora_fx.graph.info import check_same_for_all_rows, info_of
from lora_fx.graph.pickling import record
from lora_fx.graph.process_sums import RankShards, Shard, SumOfGradients, SumOverProcesses
from lora_fx.graph.sharded import agreed, digest_of
from lora_fx.graph.state import State
from lora_fx.graph.training_only import TrainingOnly
from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.parallel.layouts import Layouts
from lora_fx.parallel.sharding_plan import Divided, ShardingPlan, divided
from lora_fx.torch_internals import DropoutBase
from lora_fx.tracing.train_eval import ModeSwitch

aten = torch.ops.aten

_SUM, _GRADIENTS = "process_sums.value", "process_sums.gradient"


def shard(
    graph_module: TracedGraphModule,
    plan: ShardingPlan | None = None,
    *,
    group: distributed.ProcessGroup | None = None,
) -> TracedGraphModule:
    """Return the graph of this process, with its part of the weights of each layer: tensor parallelism.

    Every process of the group calls this with an equal graph, and calls the result with equal inputs; each gets the whole outputs. Factors
    are equal where ``rewrite`` was given a seed. Whole parameters have whole gradients, the same on all processes, and parts of parameters
    have parts. A process folds its own graph; :func:`lora_fx.save_adapter`, called by all, gathers the adapter, and the first process writes it.
    Names of parameters stay.

    Args:
        graph_module: flat; not changed, and of no use for the memory of its weights.
        plan: the sites that are divided. By default their roles tell: query, key, value, gate and up by output; the output of an attention
            and down by input.
        group: of the processes; by default all.

    Raises:
        LoraFxError: a value cannot be computed in parts, sizes are no multiples of the number of processes, or the graph is of a kind that
            is not divided: quantised, with a cache, nested, with dropout. All processes raise, also where one alone refuses.
        PlanError: the plan names no linear site, a branch cannot be divided, or the argument is no graph of lora_fx.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        raise LoraFxError("a graph is divided among processes: call torch.distributed.init_process_group first.")
    processes = group or distributed.group.WORLD
    assert processes is not None

    def made() -> tuple[TracedGraphModule, str]:
        part = _of_rank(graph_module, plan, processes.rank(), processes.size(), processes.group_name)
        return part, f"{digest_of(graph_module)} {plan}"

    return agreed([processes], made)


def _of_rank(
    graph_module: TracedGraphModule, plan: ShardingPlan | None, rank: int, world: int, group: str
) -> TracedGraphModule:
    _check_kind(as_traced(graph_module))
    plain = as_traced(lower(graph_module))
    info = info_of(plain)
    found = divided(plain, plan)
    state = state_of(plain)
    graph, _ = copy_graph(plain.graph)
    graph.owning_module = plain  # by which dropouts are known
    _Pass(graph, state, found, Layouts(rank, world)).run()
    sums: dict[str, nn.Module] = {_SUM: SumOverProcesses(group), _GRADIENTS: SumOfGradients(group)}
    own = {first: _part(state.tensors[first], how, rank, world) for first, how in found.shards.items()}
    parts = {name: own[first] for name, first in state.aliases().items() if first in own}
    called = {str(node.target) for node in graph.find_nodes(op="call_module")}
    share = RankShards(rank, world, group, found.shards, record(plain.graph))
    graph.owning_module = None
    graph.lint()
    return checked(
        rebuilt(
            plain,
            graph,
            tensors=parts,
            modules={name: each for name, each in sums.items() if name in called},
            info=replace(info, shards=share),
        ),
        "branched" if info.adapters else "base",
    )


def _part(tensor: torch.Tensor, how: Shard, rank: int, world: int) -> torch.Tensor:
    part = how.part(tensor, rank, world)
    return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


def _check_kind(graph_module: TracedGraphModule) -> None:
    """Refuse graphs of kinds that are not divided."""
    check_changeable(graph_module)
    check_same_for_all_rows(graph_module)
    info, state = info_of(graph_module), state_of(graph_module)
    quantised = next((name for name, each in state.tensors.items() if isinstance(each, QuantisedWeight)), None)
    drawn = next((name for name, each in state.modules.items() if _draws(each)), None)
    random = next((node for node in graph_module.graph.nodes if _draws_numbers(node)), None)
    if quantised is not None:
        raise LoraFxError(f"{quantised!r} is quantised, and tensors of numbers alone are divided: train with DDP.")
    if has_cache(graph_module):
        raise LoraFxError(
            "a graph with a key-value cache is not divided among processes: trace the model without cache=True."
        )
    if info.prefix_slot is not None or any(each.prefix is not None for each in info.adapters.values()):
        raise LoraFxError("a graph that takes a prefix or a prompt is not divided among processes: train with DDP.")
    if info.nested:
        raise LoraFxError("expected a flat graph, got a nested one: divide lora_fx.flatten(graph).")
    if drawn is not None:
        raise LoraFxError(
            f"{drawn!r} drops values in training, and each process would draw for itself: rewrite with dropout=0 and a model without dropout, "
            "or set p = 0 of each nn.Dropout in graph.modules()."
        )
    if random is not None:
        raise LoraFxError(
            f"{random.name} draws random numbers ({random.target}), and each process would draw others: train with FSDP or DDP."
        )


def _draws(module: nn.Module) -> bool:
    if isinstance(module, DropoutBase):
        return module.p > 0
    if isinstance(module, ModeSwitch):
        return module.train_value != module.eval_value
    return isinstance(module, TrainingOnly)


def _draws_numbers(node: fx.Node) -> bool:
    """Tell whether an operator draws random numbers at a rate that the graph states."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    rate = {"dropout": "p", "scaled_dot_product_attention": "dropout_p"}.get(name_of(node))
    given = arguments_of(node)
    if rate is None:
        return True
    # Rates and modes that nodes compute are those of modules.
    return not isinstance(given[rate], fx.Node) and given[rate] > 0 and given.get("train", True) is True


class _Pass:
    """One walk through a graph, whose nodes become those of one process (in place).

    A summand is what a site that is divided by input returns: its branches are added before the sum over the processes, and its bias after.

    Args:
        graph: a copy.
        state: of the whole graph.
        found: the parameters that are divided.
        layouts: of the values.
    """

    def __init__(self, graph: fx.Graph, state: State, found: Divided, layouts: Layouts) -> None:
        self._graph, self._state, self._layouts = graph, state, layouts
        self._shards: Mapping[str, Shard] = {
            name: found.shards[first] for name, first in state.aliases().items() if first in found.shards
        }
        self._summands: dict[fx.Node, tuple[fx.Node, ...]] = {}  # with what is added after the sum
        self._trains: set[fx.Node] = set()  # a gradient may be asked of these values
        self._marked: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        """Rewrite the nodes in their order."""
        split = self._layouts.of
        for node in list(self._graph.nodes):
            product = self._product(node)
            if node.op == "get_attr":
                self._layouts.split(node, self._shards.get(str(node.target)))
            elif product is not None:
                self._multiply(node, *product)
            elif not self._stays_summand(node):
                for each in [each for each in node.all_input_nodes if each in self._summands]:
                    node.replace_input_with(each, self._whole(each, node))
                if any(each in split for each in node.all_input_nodes):
                    layout = self._layouts.layout_after(node)
                    self._mark(node, [each for each in node.all_input_nodes if each not in split])
                    self._layouts.split(node, layout)
            if self._may_train(node):
                self._trains.add(node)

    def _may_train(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        floats = isinstance(value, list | tuple) or (isinstance(value, torch.Tensor) and value.is_floating_point())
        if node.op == "get_attr":
            return isinstance(self._state.tensors[str(node.target)], nn.Parameter)
        if node.op == "placeholder":
            return floats
        return (
            floats and node.target is not aten.detach.default and any(n in self._trains for n in node.all_input_nodes)
        )

    def _product(self, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, int] | None:
        """Return input, weight, addend of a product with a matrix that is divided or of a summand, and the dimension of the weight's outputs."""
        if node.target is aten.linear.default and not node.kwargs:
            value, weight, bias, out = node.args[0], node.args[1], (*node.args, None)[2], 0
        elif node.target is aten.addmm.default and not node.kwargs:
            bias, value, weight, out = *node.args[:3], 1
        elif node.target in (aten.mm.default, aten.matmul.default):
            value, weight, bias, out = *node.args[:2], None, 1
        else:
            return None
        if not isinstance(weight, fx.Node) or not isinstance(value, fx.Node):
            return None
        matrix = weight in self._layouts.of and self._is_parameter(weight)
        if not matrix and not (value in self._summands and out == 0):
            return None
        return value, weight, bias, out  # type: ignore[return-value]

    def _is_parameter(self, node: fx.Node) -> bool:
        """Tell whether a value is a parameter, through transposes and casts."""
        while node.op != "get_attr":
            if len(node.all_input_nodes) != 1 or node.op != "call_function":
                return False
            (node,) = node.all_input_nodes
        return True

    def _multiply(self, node: fx.Node, value: fx.Node, weight: fx.Node, bias: fx.Node | None, out: int) -> None:
        split, summed = self._layouts.of, value in self._summands
        alone = weight not in split and value not in split and bias is None and not self._summands.get(value)
        if summed and alone:
            self._mark(node, [weight])
            self._summands[node] = ()
        else:
            if summed:
                whole = self._whole(value, node)
                node.replace_input_with(value, whole)
                value = whole
            self._multiply_whole(node, value, weight, bias, out)
        if node in self._summands and len(node.users) > 1:
            self._whole(node, node.next, everywhere=True)

    def _multiply_whole(self, node: fx.Node, value: fx.Node, weight: fx.Node, bias: fx.Node | None, out: int) -> None:
        split, refuse = self._layouts.of, self._layouts.refuse
        how, given = split.get(weight), split.get(value)
        if how is None:
            return
        dims = len(self._layouts.shape(value))
        if how.dim == out:
            if given is not None:
                refuse(node, f"its weight is divided by output, and its input {value.name} is split")
            if bias is not None and (bias not in split or split[bias].blocks != how.blocks):
                refuse(node, f"its weight is divided by output, and {bias.name}, which it adds, is whole")
            self._mark(node, [value])
            self._layouts.split(node, Shard(dims - 1, how.blocks))
        else:
            if given is None:
                refuse(node, f"its weight is divided by input, and its input {value.name} is whole")
            if given != Shard(dims - 1, how.blocks):
                refuse(node, f"its weight is divided by input, and its input {value.name} is split otherwise")
            if bias is not None:
                if node.target is aten.addmm.default:
                    node.target, node.args = aten.mm.default, node.args[1:]
                else:
                    node.args, node.kwargs = node.args[:2], {}
            self._summands[node] = () if bias is None else (bias,)

    def _stays_summand(self, node: fx.Node) -> bool:
        """Take a node that is linear in summands as one; tell whether it is."""
        of = [each for each in node.all_input_nodes if each in self._summands]
        values = [each for each in node.args if isinstance(each, fx.Node)]
        if not of or len(node.users) > 1 or node.kwargs or any(len(each.users) > 1 for each in of):
            return False
        scales = node.target is aten.mul.Tensor and len(values) == 1 and not self._summands[of[0]]
        adds = node.target is aten.add.Tensor and len(values) == len(of) == 2
        if scales or adds:
            self._summands[node] = tuple(bias for each in of for bias in self._summands[each])
        return scales or adds

    def _whole(self, summand: fx.Node, before: fx.Node, *, everywhere: bool = False) -> fx.Node:
        """Return the sum over the processes of a summand, with the bias."""
        value = summand.meta.get("val")
        with self._graph.inserting_before(before):
            total = self._graph.create_node("call_module", _SUM, (summand,))
            describe(total, summand, value)
            self._trains.add(total)
            ends = [total]
            for bias in self._summands[summand]:
                ends.append(self._graph.call_function(aten.add.Tensor, (ends[-1], bias)))
                describe(ends[-1], summand, value)
                self._trains.add(ends[-1])
        if everywhere:
            summand.replace_all_uses_with(ends[-1], delete_user_cb=lambda user: user is not total)
            del self._summands[summand]
        return ends[-1]

    def _mark(self, node: fx.Node, values: list[fx.Node]) -> None:
        """Let a node read whole values through sums of their gradients, of which each process computes a part."""
        for value in values:
            if value not in self._trains:
                continue
            if value not in self._marked:
                with self._graph.inserting_before(node):
                    marked = self._graph.create_node("call_module", _GRADIENTS, (value,))
                describe(marked, value, value.meta.get("val"))
                self._marked[value] = marked
            node.replace_input_with(value, self._marked[value])
