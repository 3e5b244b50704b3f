"""State of a model during a trace: restored afterwards, and refused where the model's code keeps values for itself.

A model may cache values in its attributes, count its calls, or draw from Python's random numbers. None of this reaches a
graph, which would repeat what happened once.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from lora_fx.errors import PlanError, TraceError, listed
from lora_fx.graph.compare import compare_values
from lora_fx.graph.process_state import forked_random_state
from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.torch_internals import NormBase
from lora_fx.tracing.random_settings import advice_on_random_settings, undrawn


def inner_model(model: Any) -> Any:
    """Return the model that ``torch.compile`` or a data-parallel wrapper of torch holds; anything else as it is.

    Raises:
        PlanError: FSDP's wrapper, in which no process has whole weights; a module deep inside is compiled; or torch quantised it.
    """
    while (
        isinstance(model, nn.Module)
        and type(model).__name__ in _WRAPPERS
        and type(model).__module__.startswith("torch.")
    ):
        attribute = _WRAPPERS[type(model).__name__]
        if attribute is None:
            raise PlanError(
                f"{type(model).__name__} holds parts of the weights in each process, and a graph needs whole ones: rewrite the model first, and "
                "wrap the graph in torch's DistributedDataParallel."
            )
        model = getattr(model, attribute)
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if type(module).__name__ == "OptimizedModule" and type(module).__module__.startswith("torch."):
                raise PlanError(
                    f"{name!r} is compiled, and its parameters would be called '{name}._orig_mod.…', which no adapter file says: put the "
                    f"module inside, {name}._orig_mod, back in its place, and compile the graph instead."
                )
            if type(module).__module__.startswith("torch.ao.nn"):
                raise PlanError(
                    f"{name!r} is a {type(module).__name__} of torch.ao.quantization, whose weights are packed: rewrite the model before it is "
                    "quantised; fold and export.onnx give a graph that other tools quantise."
                )
    return model


_WRAPPERS: Mapping[str, str | None] = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": None,
}
"""Classes of torch that wrap a model → the attribute with the model inside."""


def unwrapped(model: Any) -> Any:
    """Return the model that wrappers of torch hold; see :func:`inner_model`. One that PEFT wraps is refused.

    Raises:
        PlanError: see :func:`inner_model`; or PEFT wraps the model.
    """
    model = inner_model(model)
    _check_without_peft(model)
    return model


def _check_without_peft(model: Any) -> None:
    """Raise :class:`PlanError` for a model that PEFT wraps, or changed in place: it has adapters that rules know nothing of.

    PEFT is not imported: its classes are told by the module that they come from.
    """
    if not isinstance(model, nn.Module):
        return  # an exported program, or something that a trace refuses
    wrapper = _peft_class(model)
    inside = next((name for name, module in model.named_modules() if name and _peft_class(module)), None)
    if wrapper is None and inside is None:
        return
    # A model with add_adapter(…) of transformers, and the model that get_peft_model(…) was given, have PEFT's layers alone.
    owner = "" if wrapper else " of the PeftModel (or load the model anew)"
    plain = (
        "unload" if wrapper is None or hasattr(model, "unload") else "get_base_model"
    )  # prompt learning has no layers
    where = "" if wrapper else f": {inside!r} is PEFT's {_peft_class(model.get_submodule(str(inside)))}"
    raise PlanError(
        f"{type(model).__name__} is wrapped by PEFT{where}. For the plain model take .{plain}(){owner}; to go on with its "
        "adapter, save_pretrained(directory) and lora_fx.from_adapter(plain model, directory); to merge it, "
        "lora_fx.fold(lora_fx.trace(model))."
    )


def _peft_class(module: nn.Module) -> str | None:
    """Return the name of the class of PEFT that a module is of, if it is of one."""
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__module__.partition(".")[0] == "peft"), None)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore the mode of every module, ``requires_grad``, attributes and the random state.

    Inside, torch's fused path of a transformer layer is off, which gives other numbers at padding than the operators of that layer do.
    Gradients are on, whatever they are outside, and all floating-point parameters require one: torch.export records regions
    without gradients and layout operators by that, and a graph shall not depend on where it was traced, nor on what happened to
    be frozen.
    """
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    holders, drawn = _holders(model), _random_states()
    devices = sorted({tensor.device.index for tensor in model.parameters() if tensor.device.type == "cuda"})
    with torch.inference_mode(False), torch.enable_grad(), forked_random_state(devices), _without_fast_path():
        for parameter in trained:
            if parameter.is_floating_point() and not isinstance(parameter, QuantisedWeight):
                parameter.requires_grad_(True)
        try:
            yield
        finally:
            _set_random_states(drawn)
            for holder in holders:
                holder.restore()
            for parameter, requires_grad in trained.items():
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)


@contextmanager
def traceable_batch_norms(model: nn.Module, cumulative: float) -> Iterator[None]:
    """Let batch norms ask nothing of their inputs or counters by Python inside the block; those of a graph do so at each call.

    Args:
        model: to be traced.
        cumulative: stands for the momentum None.
    """
    averages = [each for each in model.modules() if isinstance(each, NormBase) and each.momentum is None]
    functional: Any = nn.functional
    verify = functional._verify_batch_size
    functional._verify_batch_size = lambda _size: None  # more than one value for each feature
    for each in averages:
        each.momentum = cumulative
    try:
        yield
    finally:
        functional._verify_batch_size = verify
        for each in averages:
            each.momentum = None


@contextmanager
def _without_fast_path() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def stateless(model: nn.Module, run: Callable[[], Any]) -> Iterator[None]:
    """Restore all changes by the model's Python inside, and refuse the ones that a graph would have to repeat at every call.

    Caches and flags are just restored: whether a graph needs them shows when it is run. So is a number that every call sets to the
    same, as Swin's shift where the window covers the image.

    Args:
        model: is called inside.
        run: calls it as it is without a trace.

    Raises:
        TraceError: an attribute counts or measures, or random numbers from Python or numpy matter.
    """
    holders, drawn = _holders(model), _random_states()
    changed: dict[str, None] = {}
    symbolic: list[object] = []

    def look(*_: Any) -> None:  # where the call ends: torch.export puts some attributes back itself
        changed.update((name, None) for holder in holders for name in holder.changed_values())
        values = (value for holder in holders for value in _as_dict(holder.items).values())
        symbolic.extend(value for value in values if isinstance(value, torch.SymInt | torch.SymFloat))

    handle = model.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()
        for holder in holders:
            holder.restore()
        sources = [source for source, state in _random_states().items() if not _same_states(state, drawn[source])]
        _set_random_states(drawn)
    name = type(model).__name__
    if changed and (symbolic or not _settles(holders, run)):
        raise TraceError(
            f"{name} changes its own {', '.join(changed)} while it computes, and a graph would keep what one call made of it. "
            "Compute it from the inputs, or hold it in a tensor that is passed in."
        )
    if sources and not _draws_in_vain(run):
        raise TraceError(
            f"{name} draws random numbers from {' and '.join(sources)} while it computes, and a graph would repeat those of one call. "
            f"Draw them with torch.{advice_on_random_settings(model)}"
        )


def _draws_in_vain(run: Callable[[], Any]) -> bool:
    """Tell whether no random number that Python or numpy draws in a call decides anything; all states are restored."""
    states = _random_states()
    try:
        with undrawn():
            run()
        return all(_same_states(state, states[source]) for source, state in _random_states().items())
    except Exception:  # such as a draw that it computes with
        return False
    finally:
        _set_random_states(states)


def _settles(holders: Sequence[_Holder], run: Callable[[], Any]) -> bool:
    """Tell whether a first and a second call leave the same values, and return the same; all is restored."""
    try:
        first = run()
        left = [_as_dict(holder.items) for holder in holders]
        second = run()
    except Exception:  # without a comparison nothing is known
        return False
    else:
        now = [_as_dict(holder.items) for holder in holders]
        alike = all(
            _same(before.get(key), after.get(key))
            for before, after in zip(left, now, strict=True)
            for key in {**before, **after}
            if _is_plain(before.get(key)) or _is_plain(after.get(key))
        )
        return alike and not compare_values(first, second, None).message
    finally:
        for holder in holders:
            holder.restore()


@dataclass(frozen=True)
class Mode:
    """The mode of a model.

    Attributes:
        training: whether it is in train mode.
        fixed: paths of norms that are in eval mode whatever the mode of the model.
    """

    training: bool
    fixed: tuple[str, ...] = ()

    def set(self, model: nn.Module, training: bool) -> None:
        """Set another mode of a model, but for the norms that are fixed.

        Raises:
            TraceError: there is no train mode, as in what torch.export made.
        """
        try:
            model.train(training)
        except NotImplementedError as error:
            if training:
                raise TraceError(
                    f"{type(model).__name__} is or holds an exported program, which has no train and eval mode ({error}): it computes as "
                    "it did when it was exported. Trace it with inference=True; to train it, trace the module that it was made from."
                ) from error
            for module in model.modules():
                module.training = False
        for path in self.fixed:
            model.get_submodule(path).eval()


def mode_of(model: nn.Module, *, inference: bool) -> Mode:
    """Return the mode of a model. The modes of its modules are left changed.

    A module that torch.export made counts as being in eval mode. Norms with running statistics that are in eval mode while the model
    is in train mode are fixed: so they are in many recipes, which keep the statistics of the pretraining.

    Raises:
        TraceError: the other modules are in other modes than ``model.train()`` or ``model.eval()`` gives them, and a graph has one;
            or there is no train mode, and ``inference`` is false.
    """
    given = _modes(model)
    if inference and is_exported(model):
        return Mode(False)
    possible = []
    for training in (True, False):
        Mode(training).set(model, training)
        possible.append(_modes(model))
    expected = possible[0] if given[""] else possible[1]
    others = [name for name, mode in given.items() if mode != expected[name]]
    fixed = [name for name in others if given[""] and isinstance(model.get_submodule(name), NormBase)]
    unknown = [name for name in others if name not in fixed]
    if unknown:
        raise TraceError(
            f"the modules of {type(model).__name__} are in different modes, and a graph has one: it is in {_mode(given[''])} mode, "
            f"and in {_mode(not given[''])} mode {'is' if len(unknown) == 1 else 'are'} "
            f"{listed(unknown, 8)}. Call model.train() or model.eval() first."
        )
    return Mode(given[""], tuple(fixed))


def _modes(model: nn.Module) -> dict[str, bool]:
    return {name: each.training for name, each in model.named_modules() if not name or _has_mode(each)}


def _has_mode(module: nn.Module) -> bool:
    """Tell whether a module may compute something else in train than in eval mode, by the code of its class.

    A linear layer, an embedding, a layer norm or an activation has no mode that matters: a replaced one is in train mode as made.
    """
    if isinstance(module, _CONTAINERS):
        return False
    kinds = [kind for kind in type(module).__mro__ if issubclass(kind, nn.Module) and kind is not nn.Module]
    functions = [value for kind in kinds for value in vars(kind).values() if isinstance(value, FunctionType)]
    return bool(module._modules) or any(_reads_mode(function.__code__) for function in functions)


def _reads_mode(code: CodeType) -> bool:
    return "training" in (*code.co_names, *code.co_consts) or any(
        _reads_mode(inner) for inner in code.co_consts if isinstance(inner, CodeType)
    )


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def is_exported(model: nn.Module) -> bool:
    """Tell whether a model is, or holds, what torch.export made, which has no modes. The modes are left changed."""
    try:
        model.train()
    except NotImplementedError:
        return True
    return False


def _mode(training: bool) -> str:
    return "train" if training else "eval"


@dataclass(frozen=True)
class _Holder:
    """A dict or list that holds attributes, and its former contents."""

    name: str
    items: Any
    former: Any

    def restore(self) -> None:
        """Restore the former contents."""
        if self._changed() and isinstance(self.items, list):
            self.items[:] = self.former.values()
        elif self._changed():  # all anew, for their order
            self.items.clear()
            self.items.update(self.former)

    def changed_values(self) -> list[str]:
        """Return the names of the plain values that have changed, or took the place of something else."""
        now = _as_dict(self.items)
        plain = [key for key in self._changed() if _is_plain(self.former.get(key)) or _is_plain(now.get(key))]
        return [f"{self.name}.{key}".removeprefix(".") for key in plain]

    def _changed(self) -> list[Any]:
        now = _as_dict(self.items)
        return [key for key in {**self.former, **now} if not _same(self.former.get(key), now.get(key))]


def _holders(model: nn.Module) -> list[_Holder]:
    """Find what holds the attributes of all modules, and of the containers and objects that they have as attributes."""
    found: dict[int, _Holder] = {}

    def hold(name: str, items: Any) -> None:
        found.setdefault(id(items), _Holder(name, items, _as_dict(items)))

    for name, module in model.named_modules():
        hold(name, vars(module))
        for key, value in list(vars(module).items()):
            own = f"{name}.{key}".removeprefix(".")
            if isinstance(value, MutableMapping | list):
                hold(own, value)
            elif hasattr(value, "__dict__") and not isinstance(value, _OPAQUE):
                hold(own, vars(value))
    return list(found.values())


_OPAQUE = (nn.Module, torch.Tensor, FunctionType, ModuleType, type)


def _as_dict(items: Any) -> dict[Any, Any]:
    return dict(enumerate(items)) if isinstance(items, list) else dict(items)


def _is_plain(value: Any) -> bool:
    """Tell whether a value is a number or a text, or a tuple of those."""
    if isinstance(value, tuple):
        return bool(value) and all(map(_is_plain, value))
    return isinstance(value, int | float | str | torch.SymInt | torch.SymFloat) and not isinstance(value, bool)


def _same(before: Any, after: Any) -> bool:
    """Compare plain values by value, and all others by identity."""
    return before is after or (
        type(before) is type(after) and _is_plain(before) and _is_plain(after) and bool(before == after)
    )


def _random_states() -> dict[str, tuple[Any, ...]]:
    states: dict[str, tuple[Any, ...]] = {"random": random.getstate()}
    numpy: Any = sys.modules.get("numpy")
    return states if numpy is None else {**states, "numpy.random": numpy.random.get_state()}


def _set_random_states(states: Mapping[str, tuple[Any, ...]]) -> None:
    random.setstate(states["random"])
    if "numpy.random" in states:
        sys.modules["numpy"].random.set_state(states["numpy.random"])


def _same_states(state: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Compare element by element, of which numpy's is an array."""
    return all(bool((a == b).all()) if hasattr(a, "all") else a == b for a, b in zip(state, other, strict=True))
