"""The GraphModule that every function of lora_fx returns: it owns all of the model's tensors and keeps them through copies.

A ``torch.fx.GraphModule`` keeps only the tensors that its nodes name, forgets which buffers are persistent when it is
copied, and shares ``Parameter`` objects with the module that it was made from. For model surgery none of these will do.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from lora_fx.errors import LoraFxError, PlanError, TraceError
from lora_fx.graph.absent_attributes import SAID_ABSENT, say_absent
from lora_fx.graph.adapter_states import AdapterState, adapter_states
from lora_fx.graph.batch_norms import copied_leaf, statistics
from lora_fx.graph.codegen import is_usable_part
from lora_fx.graph.info import PEFT_SPELLING, GraphInfo, check_module, held_graphs, known_info, with_info
from lora_fx.graph.late_code import is_without_code
from lora_fx.graph.layers import NO_LAYERS, check_pickles, check_unwrapped, nesting
from lora_fx.graph.module_tensors import tensors_of_module, trainable_names
from lora_fx.graph.overview import overview_html, overview_text
from lora_fx.graph.pickling import GraphRecord, record, restore
from lora_fx.graph.signature import InputCodeGen
from lora_fx.graph.state import (
    State,
    leaf_modules,
    owned,
    quantised_apart,
    sharded_name,
    taken_names,
    with_value,
)
from lora_fx.graph.torch_tools import TorchTools


class TracedGraphModule(TorchTools, fx.GraphModule):
    """A ``torch.fx.GraphModule`` with the call, the state dict and the modes of the model that it was traced from.

    Made by :func:`lora_fx.trace` and all functions that return a graph. It is called by position or keyword as the model is, and
    returns what the model returns; inputs that the trace does not cover raise :class:`lora_fx.InputError`. It carries the whole
    state of its model, also tensors that no node names, in parameters of its own.

    Its dtype is fixed, since casts and the minimum values of masks are constants in the graph: ``.to(dtype)``, ``.half()`` and
    the like raise :class:`lora_fx.LoraFxError`. Moving it to another device works, and so do ``copy.deepcopy`` and ``pickle``.
    """

    _keys_to_ignore_on_save = None

    @property
    def config(self) -> Any:
        """The config of the transformers model that the graph was traced from, a copy of its own."""
        config = known_info(self).config
        if config is None:
            raise AttributeError("the graph has no config: it was not traced from a transformers model")
        # transformers tells a model nothing of its trainer, whose constructor reads this: it is followed from there.
        if (caller := sys._getframe(1)).f_globals.get("__name__") == "transformers.trainer":
            from lora_fx import methods

            methods.follow_trainer(caller)
        return config

    @property
    def generation_config(self) -> Any:
        """The settings by which the transformers model generates, a copy of its own; others may be assigned."""
        settings = known_info(self).generation_config
        if settings is None:
            raise AttributeError("the graph has no generation_config: it was not traced from a model that generates")
        return settings

    @generation_config.setter
    def generation_config(self, settings: Any) -> None:
        self.meta.update(with_info(self.meta, replace(known_info(self), generation_config=settings)))

    @property
    def accepts_loss_kwargs(self) -> bool:
        """For transformers' ``Trainer``: whether the graph takes ``num_items_in_batch``, as a model does whose call has ``**kwargs``.

        Otherwise the loss is a mean over the batch, which the trainer divides by its accumulation steps.
        """
        codegen = self._graph._codegen
        return isinstance(codegen, InputCodeGen) and codegen.signature.takes_item_count

    @property
    def loss_type(self) -> str | None:
        """The loss of the transformers model that was traced, by which ``Trainer`` decides what labels it counts."""
        return known_info(self).loss_type

    @property
    def main_input_name(self) -> str:
        """For transformers' ``Trainer``: the input of the model by whose size it counts tokens and operations."""
        return known_info(self).main_input

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the graph's weights: of the first parameter that is a floating-point number."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        """Where the graph's tensors are: the device of the first."""
        tensor = next(iter(state_of(self).tensors.values()), None)
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def adapters(self) -> tuple[AdapterState, ...]:
        """The adapters of the graph, in the order in which they were added: which act, how strongly, and which train."""
        return adapter_states(self)

    def __repr__(self) -> str:
        return overview_text(self)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return overview_html(self)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether layers are computed again in the backward pass, which ``activation_checkpointing_enable`` switches on."""
        return known_info(self).checkpointing is not None

    is_gradient_checkpointing = is_activation_checkpointing

    if TYPE_CHECKING:  # functions of lora_fx.methods, most of them on graphs of transformers models alone
        activation_checkpointing_enable: Callable[..., None]
        activation_checkpointing_disable: Callable[[], None]
        gradient_checkpointing_enable: Callable[..., None]
        gradient_checkpointing_disable: Callable[[], None]
        add_model_tags: Callable[..., None]
        base_model: Callable[..., Any]
        can_generate: Callable[[], bool]
        generate: Callable[..., Any]
        load_adapter: Callable[..., None]
        get_input_embeddings: Callable[[], nn.Module]
        get_output_embeddings: Callable[[], nn.Module]
        get_nb_trainable_parameters: Callable[[], tuple[int, int]]
        merge_and_unload: Callable[..., PreTrainedModel]
        num_parameters: Callable[..., int]
        print_trainable_parameters: Callable[[], None]
        save_pretrained: Callable[..., None]
        set_adapter: Callable[..., None]

    def _methods(self) -> Mapping[str, Callable[..., Any]]:
        from lora_fx import methods  # the one import against the order of the packages: a face, reached from the graph

        return methods.methods_of(self)

    def __getattr__(self, name: str) -> Any:
        if name in PEFT_SPELLING and (method := self._methods().get(name)) is not None:
            return method
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in SAID_ABSENT:
                say_absent(name, known_info(self))
            raise

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._methods()]  # type: ignore[no-untyped-call]

    def recompile(self) -> fx.graph.PythonCode:
        """Generate the code anew from the graph, with the signature of the model; of a nested graph, in layers."""
        vars(self).pop("_below_head", None)
        info, graph = known_info(self), self._graph
        parts = nesting(self, graph) if info.nested and not is_without_code() else NO_LAYERS
        parts.install(self, info.checkpointing)
        self._graph = fx.Graph() if is_without_code() else parts.outer or graph
        try:
            code = super().recompile()
        finally:
            self._graph = graph
        if isinstance(self._graph._codegen, InputCodeGen):
            type(self).forward.__signature__ = self._graph._codegen.signature.shown()  # type: ignore[attr-defined]
        # FSDP puts a class of its own before that of the graph. Two wrapped calls, one above the other, would call each other forever.
        own: Any = type(self)
        if any("_wrapped_call" in vars(cls) for cls in own.__mro__[1:]):
            del own._wrapped_call, own.__call__
        return code

    def __prepare_scriptable__(self) -> fx.GraphModule:
        # torch.jit.script compiles what this returns: TorchScript has no counterpart of the signature of a model.
        from lora_fx import methods

        return methods.scriptable(self)

    def _load_from_state_dict(self, *args: Any) -> None:
        # As the last of the hooks that may change the state dict. This method, other than load_state_dict, is also called
        # where the graph is part of another module.
        hook = self.register_load_state_dict_pre_hook(_take_values)  # type: ignore[no-untyped-call]
        try:
            super()._load_from_state_dict(*args)
        finally:
            hook.remove()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TracedGraphModule:
        for dtype in {p.dtype for p in self.parameters() if p.is_floating_point()}:
            found = fn(torch.empty(0, dtype=dtype)).dtype
            if found != dtype:
                raise LoraFxError(
                    f"a traced graph keeps its dtype: it has {dtype} weights and constants, and was asked to become {found}. "
                    f"Convert the model and trace it again, or use torch.autocast."
                )
        with quantised_apart(self, fn):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedGraphModule:
        tensors = {name: copy.deepcopy(tensor, memo) for name, tensor in state_of(self).tensors.items()}
        return copied_over(self, tensors, copy.deepcopy(self.meta, memo), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        check_pickles(known_info(self).checkpointing)
        return _rebuild_from_record, (record(self.graph), state_of(self), self.meta, _modes(self))


_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_is_full_backward_hook")


def copied_over(
    graph_module: TracedGraphModule, tensors: Mapping[str, torch.Tensor], meta: dict[str, Any], memo: dict[int, Any]
) -> TracedGraphModule:
    """Return a copy over these tensors, with the modes and copies of the hooks and of the called modules."""
    state = state_of(graph_module)
    copied = replace(
        state, tensors=tensors, modules={name: copied_leaf(module, memo) for name, module in state.modules.items()}
    )
    made = _rebuild(copy_graph(graph_module.graph)[0], copied, meta, _modes(graph_module))
    memo[id(graph_module)] = made
    for name, module in graph_module.named_modules(remove_duplicate=False):
        if name not in state.modules:  # those are copied with their hooks
            hooks = {key: value for key, value in vars(module).items() if key.endswith(_HOOKS)}
            vars(made.get_submodule(name)).update(copy.deepcopy(hooks, memo))
    return made


def _rebuild_from_record(recorded: GraphRecord, *rest: Any) -> TracedGraphModule:
    return _rebuild(restore(recorded), *rest)


def _rebuild(graph: fx.Graph, state: State, meta: dict[str, Any], modes: Mapping[str, bool]) -> TracedGraphModule:
    """Make a GraphModule around exactly these tensors and modules."""
    # Tensors first, then the graph: its constructor would register them in the order in which nodes name them.
    module = TracedGraphModule(nn.Module(), fx.Graph(), class_name="GraphModule")
    install(module, state)
    module.meta.update(meta)
    module.graph = graph
    info = known_info(module)
    if info.pretrained:
        # transformers decides by the name of a class: whether a loss shifts labels, which inputs are labels, what a pipeline does.
        type(module).__name__ = info.class_name
    for name, mode in modes.items():
        module.get_submodule(name).training = mode
    return module


def _modes(module: nn.Module) -> dict[str, bool]:
    return {name: submodule.training for name, submodule in module.named_modules()}


def state_of(module: nn.Module) -> State:
    """Return all parameters, buffers and (for a graph) called modules of ``module``; nothing is copied.

    The module tree is not asked for leaf modules unless it is a graph, where the graph says which they are.

    Raises:
        PlanError: the argument is no module.
        LoraFxError: tensors are sharded.
    """
    state = state_in_parts(module)
    if (sharded := sharded_name(state.tensors)) is not None:
        raise LoraFxError(
            f"{sharded!r} is sharded over several devices (FSDP), and lora_fx reads whole tensors. Call this by "
            "lora_fx.parallel.on_first_process(graph, function) in every process, which gives the function whole tensors; "
            "save_adapter(graph, directory) in every process does so itself."
        )
    return state


def state_in_parts(module: nn.Module) -> State:
    """Return the state as :func:`state_of` does; of a sharded graph too, with this process's parts, for what reads names and shapes."""
    check_module(module)
    found = tensors_of_module(module)
    tensors: dict[str, torch.Tensor] = {**found.parameters, **found.buffers}
    check_unwrapped(tensors)
    return State(tensors, found.non_persistent, dict(leaf_modules(module)))


def as_traced(module: nn.Module) -> TracedGraphModule:
    """Return a graph of lora_fx; refuse anything else, such as a wrapper of one.

    Raises:
        PlanError: it is no graph of lora_fx.
    """
    if isinstance(module, TracedGraphModule):
        return module
    advice = held_graphs(module) or "make one with lora_fx.trace, or take a model with lora_fx.from_adapter"
    raise PlanError(f"expected a graph of lora_fx, got a {type(module).__name__}: {advice}.")


def assemble(
    graph: fx.Graph, state: State, *, meta: Mapping[str, Any], training: bool, trainable: frozenset[str]
) -> TracedGraphModule:
    """Make a GraphModule that owns one new ``Parameter`` per distinct parameter of ``state``, over the same storage.

    The running statistics that it updates are copies.

    Args:
        graph: its ``get_attr`` and ``call_module`` targets are names in ``state``.
        state: nothing of it is changed, and no storage is copied.
        meta: becomes ``meta`` of the result.
        training: the mode of the result.
        trainable: names of the parameters that get ``requires_grad=True``; all others are frozen.
    """
    module = _rebuild(graph, owned(state, trainable, statistics(graph, state.modules)), dict(meta), {})
    module.train(training)
    return module


def rebuilt(
    graph_module: fx.GraphModule,
    graph: fx.Graph | None = None,
    *,
    state: State | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    info: GraphInfo | None = None,
    training: bool | None = None,
    trainable: frozenset[str] | None = None,
) -> TracedGraphModule:
    """Return a graph module like another one, except for the arguments given; it has parameters of its own over the same storage.

    Args:
        graph_module: left as it is.
        graph: by default a copy of its graph.
        state: by default its state.
        tensors: added to the state, or replaced in it.
        modules: added to the state, or replaced in it.
        info: its record.
        training: its mode.
        trainable: names of the parameters that require a gradient.
    """
    state = state_of(graph_module) if state is None else state
    return assemble(
        copy_graph(graph_module.graph)[0] if graph is None else graph,
        state.with_tensors(tensors or {}).with_modules(modules or {}),
        meta=graph_module.meta if info is None else with_info(graph_module.meta, info),
        training=graph_module.training if training is None else training,
        trainable=trainable_names(graph_module) if trainable is None else trainable,
    )


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Return a copy of ``graph`` with the same node names, and the map from its nodes to the copies."""
    copied = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = copied.graph_copy(graph, mapping)
    copied.set_codegen(graph._codegen)
    if output is not None:
        node = copied.output(output)
        source = graph.output_node()
        node.meta = dict(source.meta)
        mapping[source] = node
    return copied, mapping


def check_names(names: Collection[str]) -> None:
    """Raise :class:`TraceError` unless a graph can have tensors of these names."""
    firsts = {name.partition(".")[0] for name in names}
    taken = {each for each in firsts if hasattr(_EMPTY, each) or hasattr(TracedGraphModule, each)}
    for name in names:
        first, *_ = parts = name.split(".")
        if first in taken:
            raise TraceError(
                f"the model has a part named {first!r}, and a traced graph has an attribute of this name. Rename the part, "
                "or trace a module that holds the model, so that all names begin with another."
            )
        unusable = [part for part in parts if not is_usable_part(part) or name == "self"]
        if unusable:
            raise TraceError(
                f"the model has a part named {name!r}, and torch.fx cannot write {unusable[0]!r} into the code of a graph. "
                "Rename it: no Python keyword, no quotes and no backslash, and letters in their plain form."
            )


_EMPTY = fx.GraphModule(nn.Module(), fx.Graph())


def _take_values(
    module: TracedGraphModule, values: dict[str, Any], prefix: str, options: Mapping[str, Any], *_: Any
) -> None:
    """Give the tensors of a graph the values of a state dict, as a pre-hook of loading one.

    Torch would write them into the storage, which is also that of the model, or (``assign=True``) put new parameters in
    place of the old, a different one under each name of a tied tensor. Here parameters stay the objects that they are and
    get new storage. Afterwards ``values`` holds the graph's own tensors, so that torch, which goes on from there and
    reports missing and unexpected keys and other shapes, puts each in its own place.
    """
    state = state_in_parts(module)
    assign = bool(options.get("assign_to_params_buffers", False))
    every = state.names()
    for first, names in taken_names(state, values, prefix, assign=assign).items():
        tensor = with_value(state.tensors[first], values[prefix + names[0]].detach(), assign)
        if tensor is not state.tensors[first]:
            install(module, State(dict.fromkeys(every[first], tensor), state.non_persistent))
        values.update({prefix + name: tensor for name in names})


def install(module: nn.Module, state: State) -> None:
    """Register tensors and modules under their dotted names, making plain containers on the way."""
    check_names((*state.tensors, *state.modules))
    holders: dict[str, nn.Module] = {}
    for name, tensor in state.tensors.items():
        path, _, leaf = name.rpartition(".")
        if path not in holders:
            holders[path], _ = _parent(module, name, state.modules)
        parent = holders[path]
        if isinstance(tensor, nn.Parameter):
            parent.register_parameter(leaf, tensor)
        else:
            if leaf in parent._buffers:
                del parent._buffers[leaf]
            parent.register_buffer(leaf, tensor, persistent=name not in state.non_persistent)
    for name, submodule in state.modules.items():
        parent, leaf = _parent(module, name, state.modules)
        parent.add_module(leaf, submodule)


def _parent(module: nn.Module, name: str, modules: Mapping[str, nn.Module]) -> tuple[nn.Module, str]:
    """Return the module that holds a name, made on the way if it is not there; it may be one of ``modules``, by their paths."""
    *path, leaf = name.split(".")
    for count, part in enumerate(path, 1):
        if part not in module._modules:
            if hasattr(module, part):
                raise LoraFxError(f"{name!r} cannot be a name in a graph: {part!r} is something else in it.")
            module.add_module(part, modules.get(".".join(path[:count]), nn.Module()))
        child = module._modules[part]
        assert child is not None
        module = child
    return module, leaf
