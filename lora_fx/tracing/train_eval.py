"""Train and eval mode in one graph: the two traces of a model are compared, and differences become modules that know the mode.

A trace has a fixed ``model.training``. So a model is traced in both modes, and the two graphs are walked side by side. They
may differ only in these ways, each of which a module can express:

    a dropout that drops in the train trace only   ``nn.Dropout(p)``
    a dropout that drops in neither, or is absent  nothing: it is the identity
    ``contiguous`` in one of the two               as in the train trace
    attention's ``dropout_p``                      a literal → ``AttentionDropout(p)``
    an RNN's ``train``                             a literal → ``ModeSwitch(train=…, eval=…)``
    what the train trace has more between a        ``TrainingOnly`` (stochastic depth, noise)
    value and where the eval trace reads it
    a batch norm's ``training``, and its counter   a batch norm of the graph, with running statistics of its own;
                                                   so for an instance norm that has them

A dropout that drops in both stays an operator. Anything else (a head that exists in training only, a constant
with another value) is refused, naming the node.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lora_fx.errors import TraceError
from lora_fx.graph.aten_kinds import arguments_of, set_argument
from lora_fx.graph.batch_norms import OPERATORS, batch_norm
from lora_fx.graph.compare import same_values
from lora_fx.graph.provenance import module_path, source_line
from lora_fx.graph.training_only import TrainingOnly
from lora_fx.torch_internals import pytree
from lora_fx.tracing.canonicalize import batch_norms, counted_by, counter_of

aten = torch.ops.aten

DROPOUT, CONTIGUOUS = aten.dropout.default, aten.contiguous.default

DROPOUTS: Mapping[Any, Any] = {
    DROPOUT: nn.Dropout,
    aten.dropout_.default: nn.Dropout,
    aten.feature_dropout.default: nn.Dropout2d,
    aten.feature_dropout_.default: nn.Dropout2d,
    aten.alpha_dropout.default: nn.AlphaDropout,
    aten.alpha_dropout_.default: nn.AlphaDropout,
    aten.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
    aten.feature_alpha_dropout_.default: nn.FeatureAlphaDropout,
}
"""Operator → the module that drops so; the one of whole features has a class for each number of dimensions."""

CUMULATIVE = -1.0
"""Stands in a trace for the momentum None of a batch norm: the average over all batches, which torch computes in Python."""

_NAMED = ("placeholder", "get_attr")  # matched by name, wherever they stand

_RECURRENT = (aten.gru.input, aten.lstm.input, aten.rnn_tanh.input, aten.rnn_relu.input)

MODE_ARGUMENTS: Mapping[object, str] = {
    aten.scaled_dot_product_attention.default: "dropout_p",
    aten.instance_norm.default: "use_input_stats",
    **dict.fromkeys((aten.batch_norm.default, aten.rrelu.default, aten.rrelu_.default), "training"),
    **dict.fromkeys(_RECURRENT, "train"),
}
"""Operator → the argument that carries the mode."""


class ModeSwitch(nn.Module):
    """Return one constant in training and another in evaluation."""

    def __init__(self, train: float, eval: float) -> None:
        super().__init__()
        self.train_value = train
        self.eval_value = eval

    def forward(self) -> float:
        """Return the value for the mode the module is in."""
        return self.train_value if self.training else self.eval_value

    def extra_repr(self) -> str:
        """Show both values where the module is printed."""
        return f"train={self.train_value}, eval={self.eval_value}"


class AttentionDropout(ModeSwitch, nn.Dropout):
    """The dropout that an attention operator does itself: it returns its rate, which is set as that of any ``nn.Dropout``."""

    eval_value = 0.0

    def __init__(self, p: float) -> None:
        nn.Dropout.__init__(self, p)

    def forward(self) -> float:  # type: ignore[override]
        """Return ``p`` in training, and zero in evaluation."""
        return self.p if self.training else 0.0

    extra_repr = nn.Dropout.extra_repr


def unite_modes(train: fx.Graph, evaluation: fx.Graph, taken: Collection[str] = ()) -> dict[str, nn.Module]:
    """Make ``train``, the graph of the train trace, serve both modes (in place), and return the modules that it now calls.

    Args:
        train: edited; inactive dropout was removed from both graphs.
        evaluation: the graph of the eval trace.
        taken: the names of tensors, which no module may hide.

    Raises:
        TraceError: the two graphs differ in a way that no module expresses.
    """
    walk = _ModeComparison(train, evaluation)
    for node in train.nodes:
        if node.op not in _NAMED:
            walk.step(node)
    walk.check_regions()
    return _express(train, walk, taken)


def check_constants(graph: fx.Graph, train: Mapping[str, torch.Tensor], evaluation: Mapping[str, torch.Tensor]) -> None:
    """Raise :class:`TraceError` where constants that the model made, and ``graph`` reads, have other values in evaluation."""
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name in train and name in evaluation and not same_values(train[name], evaluation[name]):
            raise TraceError(
                "the model makes a constant that has another value in training than in evaluation"
                f"{_line(node)}. Such a model cannot be trained as a graph; "
                "use inference=True to plan, fold and export it."
            )


def remove_inactive_dropout(graph: fx.Graph) -> None:
    """Remove the dropout nodes that drop nothing in the mode of the trace (in place)."""
    for node in list(graph.nodes):
        if node.target in DROPOUTS and not (node.args[1] and node.args[2]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


MAX_REGION = 32
"""Most nodes of a region that is computed in training alone."""


@dataclass(frozen=True)
class Region:
    """Nodes that the train trace has more, between one value and where the eval trace reads that value.

    Attributes:
        nodes: in their order.
        value: that is read in evaluation.
        result: of the nodes, which is read in training.
        met: the node of the eval trace behind them.
    """

    nodes: tuple[fx.Node, ...]
    value: fx.Node
    result: fx.Node
    met: fx.Node


def _is_number(node: fx.Node) -> bool:
    """Tell whether a node is a size or a device, which is matched by its operator and arguments, wherever it stands."""
    return node.target is getattr or isinstance(
        node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float
    )


def _is_alike(value: fx.Node, result: fx.Node) -> bool:
    one, other = value.meta["val"], result.meta["val"]
    return one.dtype is other.dtype and [*map(str, one.shape)] == [*map(str, other.shape)]


class _ModeComparison:
    """Comparison of the train graph with the eval graph, node by node.

    A node that is the identity on values (``contiguous``, which is recorded only where the strides of the fake tensors ask for
    it, and those depend on the attention kernel) may be missing on either side, and a dropout in the eval graph.
    """

    def __init__(self, train: fx.Graph, evaluation: fx.Graph) -> None:
        self._evaluation = [node for node in evaluation.nodes if node.op not in _NAMED and not _is_number(node)]
        self._numbers = [node for node in evaluation.nodes if node.op not in _NAMED and _is_number(node)]
        self._position = 0
        self._counters = {counter: norm for norm in batch_norms(train) if (counter := counter_of(norm)) is not None}
        named = {(node.op, node.target): node for node in evaluation.nodes if node.op in _NAMED}
        self._image: dict[fx.Node, fx.Node] = {
            node: named[node.op, node.target]
            for node in train.nodes
            if node.op in _NAMED and (node.op, node.target) in named
        }
        self._value: dict[fx.Node, fx.Node] = {}
        self.differing: dict[fx.Node, tuple[Any, Any]] = {}
        self.dropouts: set[fx.Node] = set()
        self.regions: list[Region] = []
        self._open: list[fx.Node] = []

    def step(self, node: fx.Node) -> None:
        """Match the next node of the train graph."""
        if node in self._counters:
            return
        if _is_number(node):
            like = (each for each in self._numbers if self._corresponds(node, each))
            self._image.update((node, each) for each in itertools.islice(like, 1))
            return
        other = self._evaluation[self._position]
        while other.target is CONTIGUOUS and node.target is not CONTIGUOUS:
            self._value[other] = self._value_of(other.args[0])
            self._position += 1
            other = self._evaluation[self._position]
        source = self._image.get(node.args[0]) if node.target in (CONTIGUOUS, *DROPOUTS) else None  # type: ignore[arg-type]
        if node.target is CONTIGUOUS and source is not None:
            self._image[node] = source
            if other.target is CONTIGUOUS and self._value_of(other.args[0]) is source:
                self._value[other] = source
                self._position += 1
        elif self._corresponds(node, other):
            self._image[node] = other
            self._position += 1
        elif node.target in DROPOUTS and source is not None:
            self._image[node] = source
            self.dropouts.add(node)
        elif not self._closes_region(node, other):
            self._open.append(node)
            if len(self._open) > MAX_REGION or node.op == "output":
                raise _refusal(self._open[0], other)

    def check_regions(self) -> None:
        """Raise :class:`TraceError` where a value of a region is read outside of it, or it updates running statistics."""
        if self._open:
            raise _refusal(self._open[0], self._evaluation[-1])
        for region in self.regions:
            nodes = set(region.nodes)
            leaks = [node for node in region.nodes if node is not region.result and not nodes.issuperset(node.users)]
            norms = {*batch_norms(region.result.graph), *self._counters} & nodes
            if leaks or norms or not _is_alike(region.value, region.result):
                raise _refusal((*leaks, *norms, region.nodes[0])[0], region.met)

    def _closes_region(self, node: fx.Node, other: fx.Node) -> bool:
        """Match a node behind what the train trace has more: it reads the result where the eval trace reads the value before."""
        if not self._open or (node.op, node.target) != (other.op, other.target):
            return False
        inputs = dict.fromkeys(source for each in self._open for source in each.all_input_nodes)
        before = [source for source in inputs if source in self._image and not _is_number(source)]
        for result in (each for each in self._open if each in node.all_input_nodes):
            for value in before:
                self._image[result] = self._image[value]
                if self._corresponds(node, other):
                    self.regions.append(Region(tuple(self._open), value, result, other))
                    self._open = []
                    self._image[node] = other
                    self._position += 1
                    return True
                del self._image[result]
        return False

    def _corresponds(self, node: fx.Node, other: fx.Node) -> bool:
        if (node.op, node.target) != (other.op, other.target):
            return False
        mine, theirs = arguments_of(node), arguments_of(other)
        mode_argument = MODE_ARGUMENTS.get(node.target)
        if mode_argument is not None:
            values = mine.pop(mode_argument, None), theirs.pop(mode_argument, None)
            if values[0] != values[1]:
                self.differing[node] = values
        return _same(fx.map_arg(mine, lambda n: self._image.get(n, n)), fx.map_arg(theirs, self._value_of))

    def _value_of(self, node: Any) -> Any:
        return self._value.get(node, node)


def _same(mine: object, theirs: object) -> bool:
    flat_mine, spec_mine = pytree.tree_flatten(mine)
    flat_theirs, spec_theirs = pytree.tree_flatten(theirs)
    return spec_mine == spec_theirs and all(
        type(a) is type(b) and (a is b or a == b) for a, b in zip(flat_mine, flat_theirs, strict=True)
    )


def _express(graph: fx.Graph, walk: _ModeComparison, taken: Collection[str]) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    calls: dict[fx.Node, fx.Node] = {}  # in place of nodes that are gone, which regions may name
    for norm in [node for node in walk.differing if node.target in OPERATORS]:
        modules |= _follow_batch_norm(graph, norm, modules, calls)
    norms = set(modules)  # other modules may be parts of them
    for region in walk.regions:
        modules |= _follow_region(graph, region, (*taken, *(name for name in modules if name not in norms)), calls)
    for node in list(graph.nodes):
        free = (*taken, *(name for name in modules if name not in norms))
        if node in walk.dropouts:
            target = free_path(_dropout_path(node), free)
            modules[target] = _dropout(node)
            with graph.inserting_before(node):
                replacement = graph.call_module(target, (node.args[0],))
            replacement.meta = dict(node.meta)
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
        elif node in walk.differing:
            argument = MODE_ARGUMENTS[node.target]
            # No submodule can be called train or training, as a method and an attribute of every module are.
            leaf = f"{argument}_mode" if hasattr(nn.Module(), argument) else argument
            target = free_path(f"{module_path(node)}.{leaf}".removeprefix("."), free)
            train_value, eval_value = (
                type(next(v for v in walk.differing[node] if v is not None))(v or 0) for v in walk.differing[node]
            )
            is_dropout = argument == "dropout_p" and not eval_value
            modules[target] = AttentionDropout(train_value) if is_dropout else ModeSwitch(train_value, eval_value)
            with graph.inserting_before(node):
                switch = graph.call_module(target)
            switch.meta = {key: value for key, value in node.meta.items() if key != "val"}
            set_argument(node, argument, switch)
    return modules


def _follow_region(
    graph: fx.Graph, region: Region, taken: Collection[str], calls: dict[fx.Node, fx.Node]
) -> dict[str, nn.Module]:
    """Replace a region by a call of a module (in place), noted in ``calls``; return that module, by the path of the model's module."""
    nodes, value = set(region.nodes), calls.get(region.value, region.value)
    read = dict.fromkeys(source for node in region.nodes for source in node.all_input_nodes if source not in nodes)
    inputs = [value, *(source for source in read if source is not value)]
    body = fx.Graph()
    image = {source: body.placeholder(f"input_{index}") for index, source in enumerate(inputs)}
    for node in region.nodes:
        image[node] = body.node_copy(node, lambda each: image[each])
        image[node].meta = {}
    body.output(image[region.result])
    path = free_path(module_path(region.result) or "training_only", taken)
    with graph.inserting_after(region.nodes[-1]):
        call = graph.call_module(path, tuple(inputs))
    call.meta = dict(region.result.meta)
    calls[region.result] = call
    region.result.replace_all_uses_with(call)
    for node in reversed(region.nodes):
        graph.erase_node(node)
    return {path: TrainingOnly(body)}


def _follow_batch_norm(
    graph: fx.Graph, node: fx.Node, modules: Mapping[str, nn.Module], calls: dict[fx.Node, fx.Node]
) -> dict[str, nn.Module]:
    """Replace a batch norm and its counter by a call of a module (in place), noted in ``calls``; return that, by the path of its statistics."""
    given, weight, bias, mean, var, _, momentum, eps, _ = node.args
    counter = counter_of(node)
    count = None if counter is None else counted_by(counter)
    rank, features = given.meta["val"].dim(), int(given.meta["val"].shape[1])  # type: ignore[union-attr]
    average = None if momentum == CUMULATIVE else momentum
    made = batch_norm(node.target, rank, features, eps, average, affine=weight is not None)  # type: ignore[arg-type]
    path = str(mean.target).rpartition(".")[0] or f"{module_path(node)}.batch_norm".removeprefix(".")  # type: ignore[union-attr]
    if path in modules and repr(modules[path]) != repr(made):
        path = free_path(f"{path}.batch_norm", modules)
    with graph.inserting_before(node):
        call = graph.call_module(path, (given, weight, bias, mean, var, count))
    call.meta = dict(node.meta)
    calls[node] = call
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    if counter is not None and count is not None:
        counter.replace_all_uses_with(count)
        graph.erase_node(counter)
    return {path: modules.get(path, made)}


def _dropout(node: fx.Node) -> nn.Module:
    """Return the module that drops as an operator does."""
    operator: Any = node.target
    kind = DROPOUTS[operator]
    if kind is nn.Dropout2d:
        kind = {4: nn.Dropout2d, 5: nn.Dropout3d}.get(node.meta["val"].dim(), nn.Dropout1d)
    made: nn.Module = kind(node.args[1], inplace=operator._schema.is_mutable)
    return made


def _dropout_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    named = [
        path for path, kind in stack.values() if "Dropout" in str(getattr(kind, "__name__", kind)).rpartition(".")[2]
    ]
    own = [path for path in named if path]  # the path of the model itself is empty
    return own[-1] if own else f"{module_path(node)}.dropout".removeprefix(".")


def free_path(name: str, taken: Collection[str]) -> str:
    """Return a path that lies neither below a taken one nor above: modules must not hide each other or tensors."""

    def collides(candidate: str) -> bool:
        return any(f"{a}.".startswith(f"{b}.") for other in taken for a, b in ((candidate, other), (other, candidate)))

    return next(
        candidate for count in itertools.count() if not collides(candidate := f"{name}_{count}" if count else name)
    )


def _line(node: fx.Node) -> str:
    """Return the model's line that recorded a node, or the nearest of its readers."""
    readers = [node]
    for reader in readers:  # the list grows inside the loop
        if source_line(reader):
            return source_line(reader)
        readers += [user for user in reader.users if user not in readers]
    return ""


def _operator(node: fx.Node) -> str:
    return "its output" if node.op == "output" else str(node.target)


def _refusal(node: fx.Node, other: fx.Node) -> TraceError:
    return TraceError(
        f"the model computes something else in training than in evaluation, beyond dropout: {_operator(node)} in training, where it has "
        f"{_operator(other)} in evaluation{_line(node) or _line(other)}. Such a model cannot be trained as a graph; "
        "use inference=True to plan, fold and export it."
    )
