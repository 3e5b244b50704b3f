"""Layers of a nested graph: modules that compute the nodes of one layer of the model each, at its path there.

The graph of a nested graph module is the flat one, which all passes read and write. Only its code is another: that of an outer graph,
which calls a module for each layer, and the code of these. Both are made anew with every recompilation.
"""

from __future__ import annotations

import functools
import operator
import pickle
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from lora_fx.errors import LoraFxError, did_you_mean
from lora_fx.graph.aten_kinds import writes
from lora_fx.graph.codegen import ShortCode
from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.torch_internals import forward_from_src

_LAYER = re.compile(r"(?:[^.]+\.)*?\d+")
_COUNT = re.compile(r"@\d+")


@dataclass(frozen=True)
class Checkpointing:
    """Settings with which layers are computed again in the backward pass, as transformers names them.

    Attributes:
        every_n_layers: of so many layers the first is computed again, and the others keep their activations.
        offload: whether what is kept for the second computation is held in the memory of the host, away from the accelerator.
        options: of ``torch.utils.checkpoint.checkpoint``: ``context_fn``, ``determinism_check``, ``debug``, ``early_stop``.
    """

    every_n_layers: int = 1
    offload: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any] | None, every_n_layers: int = 1, *, offload: bool = False) -> Checkpointing:
        """Return settings from arguments as transformers has them.

        Raises:
            LoraFxError: torch's function has no such options, or gradients would be others than without it.
        """
        given = {"use_reentrant": False, "preserve_rng_state": True, **(options or {})}
        if given.pop("use_reentrant"):
            raise LoraFxError(
                "activation checkpointing: expected use_reentrant=False, got True, with which layers behind frozen ones get no gradient. "
                "Leave it out."
            )
        if not given.pop("preserve_rng_state"):
            raise LoraFxError(
                "activation checkpointing: expected preserve_rng_state=True, got False, with which dropout would draw other masks in the second "
                "computation, and gradients would be wrong. Leave it out."
            )
        unknown = next((name for name in given if name not in _OPTIONS), None)
        if unknown is not None:
            raise LoraFxError(
                f"activation checkpointing: expected options of torch.utils.checkpoint.checkpoint ({', '.join(_OPTIONS)}), "
                f"got {unknown!r}{did_you_mean(unknown, _OPTIONS)}."
            )
        if not isinstance(every_n_layers, int) or every_n_layers < 1:
            raise LoraFxError(
                f"activation checkpointing: expected every_n_layers of 1 or more, got {every_n_layers!r}."
            )
        return cls(every_n_layers, offload, given)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return what a function returns, and compute it again, with the random state of now, when a backward pass asks for it."""
        kept: AbstractContextManager[Any] = nullcontext()
        # Without an accelerator all is in the memory of the host already.
        if self.offload and (device := torch.accelerator.current_accelerator(check_available=True)) is not None:
            kept = save_on_cpu(pin_memory=True, device_type=device.type)
        with kept:
            return checkpoint(function, *args, use_reentrant=False, **self.options)


_OPTIONS = ("context_fn", "determinism_check", "debug", "early_stop")


class LayerKind(type):
    """The class of classes of layers. A layer is an instance of all that are called as its own, for accelerate, which asks the first."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return super().__instancecheck__(instance) or any(
            isinstance(each, LayerKind) and each.__name__ == cls.__name__ for each in type(instance).__mro__
        )


class Layer(nn.Module, metaclass=LayerKind):
    """A layer of a nested graph. Layers of equal code share a class, which is called as the model's own."""

    _computations: ClassVar[tuple[Callable[..., Any], ...]]
    _checkpointing = Checkpointing()
    gradient_checkpointing = False

    def register_forward_pre_hook(self, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
        """Do as torch does, but take no hook of FSDP that casts or makes dense: see :func:`check_hook`."""
        check_hook(self, hook)
        return super().register_forward_pre_hook(hook, **options)

    def forward(self, *inputs: Any, call: int = 0) -> Any:
        """Return what the rest of the graph reads of the layer.

        Args:
            inputs: what the layer reads of the rest, in the order of its nodes.
            call: which code, of a layer that is called several times.
        """
        # Here and not around the call: hooks, which gather the parameters of FSDP, act once.
        compute = self._computations[call]
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._checkpointing.run(compute, self, *inputs)
        return compute(self, *inputs)


@dataclass(frozen=True)
class _LayerCall:
    """One call of a layer.

    Attributes:
        key: torch's name for the call.
        path: of the layer in the model.
        kind: the name of its class.
    """

    key: str
    path: str
    kind: str


@dataclass(frozen=True)
class _LayerCode:
    """Generated code, and the names that it reads."""

    text: str
    names: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Nesting:
    """A flat graph in layers.

    Attributes:
        outer: all nodes outside of layers, and the calls of these; None where there are none.
        classes: of the layers, by their paths.
        nodes: of the calls of the layers, each with the path of its layer.
    """

    outer: fx.Graph | None
    classes: Mapping[str, type[Layer]]
    nodes: Sequence[tuple[str, Sequence[fx.Node]]] = ()

    def computed_again(self, root: nn.Module, checkpointing: Checkpointing) -> list[Sequence[fx.Node]]:
        """Return the nodes of the calls of layers that settings choose."""
        chosen = set(self._order(root)[:: checkpointing.every_n_layers])
        return [nodes for path, nodes in self.nodes if path in chosen]

    def _order(self, root: nn.Module) -> list[str]:
        return [path for path, _ in root.named_modules() if path in self.classes]

    def install(self, root: nn.Module, checkpointing: Checkpointing | None) -> None:
        """Make layers of the modules that hold their tensors (in place)."""
        # For accelerate, which makes a unit of FSDP of each module of these classes.
        vars(root)["_no_split_modules"] = sorted({kind.__name__ for kind in self.classes.values()})
        layers = {path: root.get_submodule(path) for path in self.classes}
        for index, path in enumerate(self._order(root)):
            layer = layers[path]
            if self.classes[path] not in type(layer).__mro__:  # FSDP derives a class of its own, and keeps it
                layer.__class__ = self.classes[path]
            chosen = checkpointing is not None and index % checkpointing.every_n_layers == 0
            vars(layer).update(gradient_checkpointing=chosen, _checkpointing=checkpointing or Checkpointing())


def layers(root: nn.Module) -> dict[str, Layer]:
    """Return the layers of a nested graph, by their paths; of a flat one there are none."""
    return {path: module for path, module in root.named_modules() if isinstance(module, Layer)}


def check_pickles(checkpointing: Checkpointing | None) -> None:
    """Raise :class:`LoraFxError` for an option that does not pickle: a partial function with operators does not."""
    for name, value in checkpointing.options.items() if checkpointing is not None else ():
        try:
            pickle.dumps(value)
        except Exception as error:
            raise LoraFxError(
                f"{name} of the activation checkpointing does not pickle, and with it the graph: expected a function that is defined in a module, "
                f"got {value!r}. Or call activation_checkpointing_disable() before."
            ) from error


def check_unwrapped(names: Iterable[str]) -> None:
    """Raise :class:`LoraFxError` for names in torch's wrapper that computes a module again, which accelerate puts around layers."""
    wrapped = next((name for name in names if "._checkpoint_wrapped_module." in name), None)
    if wrapped is not None:
        raise LoraFxError(
            f"{wrapped.partition('._checkpoint_wrapped_module')[0]!r} is in torch's checkpoint_wrapper, as accelerate does for FSDP: its "
            "parameters have other names than an adapter's file, and with preserve_rng_state=False dropout draws other masks in the second "
            "computation, so that gradients are wrong. Leave it out, and call graph.activation_checkpointing_enable()."
        )


def check_mixed_precision(policy: Any) -> None:
    """Raise :class:`LoraFxError` for a ``MixedPrecisionPolicy`` of FSDP that casts, in a graph whose dtypes are constants."""
    if policy is not None and (policy.param_dtype is not None or policy.output_dtype is not None):
        raise LoraFxError(
            f"expected a MixedPrecisionPolicy with a reduce_dtype alone, got {policy}: a graph keeps its dtype. Rewrite a model with a bfloat16 "
            "base, beside which factors stay float32, or call the graph in torch.autocast; of accelerate and Trainer ask for no mixed "
            "precision then."
        )


def check_unquantised(module: nn.Module) -> None:
    """Raise :class:`LoraFxError` for a graph or a layer of it that FSDP would shard with dense weights in the place of quantised ones."""
    quantised = next((name for name, each in module.named_parameters() if isinstance(each, QuantisedWeight)), None)
    if quantised is not None:
        raise LoraFxError(f"{quantised!r} is quantised, and FSDP shards tensors of numbers alone: train with DDP.")


def check_hook(module: nn.Module, hook: Any) -> None:
    """Raise :class:`LoraFxError` for a hook with which FSDP would cast what a graph or a layer of it computes with, or make it dense."""
    policy = getattr(getattr(hook, "__self__", None), "_mp_policy", None)
    check_mixed_precision(policy)
    if policy is not None:
        check_unquantised(module)


NO_LAYERS = Nesting(None, {})


def nesting(root: nn.Module, graph: fx.Graph) -> Nesting:
    """Return a graph in layers: each at the outermost module whose path ends in a number.

    Args:
        root: holds the tensors and the called modules of the graph, under the model's names.
        graph: is not changed.

    Raises:
        LoraFxError: layers are interleaved, so that neither can be computed before the other.
    """
    called = {str(node.target) for node in graph.find_nodes(op="call_module")}
    held = {path for path, module in root.named_modules() if path and path not in called}
    calls = _calls(graph, held)
    _check_order(graph, calls)
    members: dict[_LayerCall, list[fx.Node]] = {}
    for node, call in calls.items():
        members.setdefault(call, []).append(node)
    last = {nodes[-1]: call for call, nodes in members.items()}
    owners = _owners(graph, calls)
    outer, image, codes = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, list[_LayerCode]]()
    for node in graph.nodes:
        if node.op == "output":
            outer.output(fx.map_arg(node.args[0], image.__getitem__))
        elif node in last:
            call = last[node]
            _emit(outer, image, call, members[call], owners, codes.setdefault(call.path, []))
        elif node not in calls and node not in owners:
            image[node] = outer.node_copy(node, image.__getitem__)
    if not codes:
        raise LoraFxError(
            "the graph cannot be nested: the model has no layers, which are modules with tensors whose paths end in a number."
        )
    outer.set_codegen(graph._codegen)
    kinds = {call.path: call.kind for call in members}
    classes = {path: _layer_class(kinds[path], tuple(code)) for path, code in codes.items()}
    return Nesting(outer, classes, tuple((call.path, nodes) for call, nodes in members.items()))


def _calls(graph: fx.Graph, held: Collection[str]) -> dict[fx.Node, _LayerCall]:
    """Return the nodes in layers, in their order. Sizes that follow from what is outside are outside too: several layers read them."""
    found: dict[fx.Node, _LayerCall] = {}
    for node in graph.nodes:
        if node.op in ("call_function", "call_module"):
            call = _call(node, held)
            is_size = isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)
            if call is not None and not (is_size and not any(source in found for source in node.all_input_nodes)):
                found[node] = call
    return found


def _call(node: fx.Node, held: Collection[str]) -> _LayerCall | None:
    for key, (counted, kind) in (node.meta.get("nn_module_stack") or {}).items():
        path = _COUNT.sub("", counted)
        if _LAYER.fullmatch(path):
            name = kind if isinstance(kind, str) else kind.__qualname__
            return _LayerCall(f"{key} {counted}", path, name.rpartition(".")[2]) if path in held else None
    return None


def _owners(graph: fx.Graph, calls: Mapping[fx.Node, _LayerCall]) -> dict[fx.Node, str]:
    """Return the nodes that read tensors of one layer for it alone, each with the path of the layer."""
    found: dict[fx.Node, str] = {}
    for node in graph.find_nodes(op="get_attr"):
        paths = {calls[user].path if user in calls else "" for user in node.users}
        if len(paths) == 1 and (path := paths.pop()) and str(node.target).startswith(f"{path}."):
            found[node] = path
    return found


def _check_order(graph: fx.Graph, calls: Mapping[fx.Node, _LayerCall]) -> None:
    """Raise unless each layer can be computed at once, where its last node is, with the same random numbers as the flat graph."""
    left: dict[_LayerCall, int] = {}
    for call in calls.values():
        left[call] = left.get(call, 0) + 1
    opened: dict[_LayerCall, None] = {}
    for node in graph.nodes:
        own = calls.get(node)
        others = [call for call in opened if call != own]
        read = next((calls[source] for source in node.all_input_nodes if calls.get(source) in others), None)
        if read is not None or (others and (own is not None or _has_effect(node))):
            between = f"{own.path!r}" if own is not None else f"{node.name!r}, outside of all layers,"
            raise LoraFxError(
                f"the graph cannot be nested: nodes of the layer {(read or others[0]).path!r} stand before and behind {between}"
                f"{' which reads from it' if read is not None else ''}, so that the layer cannot be computed at once."
            )
        if own is not None:
            if node.op == "call_module" and not str(node.target).startswith(f"{own.path}."):
                raise LoraFxError(
                    f"the graph cannot be nested: the layer {own.path!r} calls {node.target!r}, which is outside of it."
                )
            opened[own] = None
            left[own] -= 1
            if not left[own]:
                del opened[own]


def _has_effect(node: fx.Node) -> bool:
    """Tell whether it matters when a node is computed: it draws random numbers or writes."""
    tags = getattr(node.target, "tags", ())
    return node.op == "call_module" or torch.Tag.nondeterministic_seeded in tags or writes(node) is not None


def _emit(
    outer: fx.Graph,
    image: dict[fx.Node, fx.Node],
    call: _LayerCall,
    nodes: Sequence[fx.Node],
    owners: Mapping[fx.Node, str],
    codes: list[_LayerCode],
) -> None:
    """Write the call of a layer into the outer graph, and its code, if it is new, behind the others of the layer."""
    inside = set(nodes)
    read = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    inputs = [source for source in read if owners.get(source) != call.path]
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    code = _code(call.path, nodes, inputs, [source for source in read if source not in inputs], results)
    if code not in codes:
        codes.append(code)
    which = codes.index(code)
    made = outer.call_module(call.path, tuple(image[source] for source in inputs), {"call": which} if which else {})
    if len(results) == 1:
        image[results[0]] = made
    else:
        image.update({node: outer.call_function(operator.getitem, (made, n)) for n, node in enumerate(results)})


def _code(
    path: str,
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    tensors: Sequence[fx.Node],
    results: Sequence[fx.Node],
) -> _LayerCode:
    """Return the code of a layer, with names that do not depend on the layer."""
    body, image = fx.Graph(), dict[fx.Node, fx.Node]()
    for index, source in enumerate(inputs):
        image[source] = body.placeholder(f"input_{index}")
    for node in (*tensors, *nodes):
        is_part = node.op in ("get_attr", "call_module")
        target = str(node.target).removeprefix(f"{path}.") if is_part else node.target
        args: Any = fx.map_arg(node.args, image.__getitem__)
        kwargs: Any = fx.map_arg(node.kwargs, image.__getitem__)
        image[node] = body.create_node(node.op, target, args, kwargs)
    body.output(image[results[0]] if len(results) == 1 else tuple(image[node] for node in results))
    body.set_codegen(ShortCode())
    code = body.python_code("self")
    return _LayerCode(code.src, tuple(sorted(code.globals.items(), key=lambda item: item[0])))


@functools.lru_cache(maxsize=512)
def _layer_class(kind: str, codes: tuple[_LayerCode, ...]) -> type[Layer]:
    """Return the one class for layers of this code."""
    computations = tuple(forward_from_src(code.text, dict(code.names), {}) for code in codes)
    made: Any = LayerKind(kind, (Layer,), {"_computations": computations, "__module__": __name__})
    return made  # type: ignore[no-any-return]
