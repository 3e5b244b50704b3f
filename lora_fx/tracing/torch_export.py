"""torch.export, called in one place: preparation of model and inputs, and refusals in terms of the user's model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from lora_fx.errors import TraceError, first_line, option
from lora_fx.graph.process_state import quiet
from lora_fx.graph.signature import key_parts
from lora_fx.progress import step
from lora_fx.torch_internals import FakeTensor, dynamo_config, export_trace, parse_to, pytree, use_lazy_graph_module
from lora_fx.tracing.example_inputs import ExampleInputs, example_inputs
from lora_fx.tracing.fake_results import FakeResults
from lora_fx.tracing.parity import map_tensors
from lora_fx.tracing.random_settings import advice_on_random_settings

Dynamic = Mapping[str, Sequence[int]]
T = TypeVar("T")


def export(
    model: nn.Module,
    inputs: ExampleInputs,
    dynamic: Dynamic | None,
    *,
    training: bool,
    results: FakeResults | None = None,
) -> torch.export.ExportedProgram:
    """Export ``model`` in its current mode.

    Args:
        model: called with ``inputs``, in train or eval mode.
        inputs: as :func:`check_inputs` accepted them.
        dynamic: input name → dimensions that must vary; all others are fixed. ``None``: as ``inputs.axes`` say.
        training: for messages.
        results: of operators in earlier exports of the model; those of this one are added.

    Raises:
        TraceError: torch.export refuses; the message names the model's own line, or the dimension that it fixes.
    """
    step(f"exporting in {'training' if training else 'evaluation'} mode")
    results = FakeResults() if results is None else results
    with (
        quiet(),
        _explicit_arguments(model, inputs),
        _broadcast_masks(),
        _without_idle_moves(),
        _histograms_of_floats(),
        _unprinted(),
    ):
        shapes = _dynamic_shapes(model, inputs, dynamic)

        def exported() -> torch.export.ExportedProgram:
            program = torch.export.export(model, inputs.args, dict(inputs.kwargs), strict=False, dynamic_shapes=shapes)
            _release(program)
            return program

        try:
            return with_results(results, exported)
        except Exception as error:
            raise _refusal(model, inputs, error, training) from error


def _release(program: torch.export.ExportedProgram) -> None:
    """Let the values of an export go with the graph that has them: torch (2.13) keeps those of every export in a process.

    A :class:`ShapeEnv` has a list of the fake inputs, needed by the export alone. Their symbolic sizes lead back to it through C++,
    where Python's collector does not follow. The caches of its methods belong to the class, and hold every one that asked them.
    """
    values = (node.meta.get("val") for node in program.graph.nodes)
    for mode in {value.fake_mode for value in values if isinstance(value, FakeTensor)}:
        if mode.shape_env is not None:
            mode.shape_env.tracked_fakes = []
    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()


def with_results(results: FakeResults, run: Callable[[], T]) -> T:
    """Return what a function returns that runs a graph on fake tensors, with the remembered results of operators.

    Once more without them, where an operator writes the strides of one, which has no memory: a pool to one pixel, in place.
    """
    with _without_cache(), _without_code():
        try:
            with results.used():
                return run()
        except Exception as error:
            if not any(_OUT_OF_MEMORY in str(each) for each in _causes(error)):
                raise
            return run()


_OUT_OF_MEMORY = "out of bounds for storage"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def tie(model: nn.Module) -> None:
    """Make tensors that share all their memory one object under all their names (in place), which a saved program forgets."""
    first: dict[object, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.numel() and not tensor.is_meta:
                    place = type(tensor), tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride()
                    held[name] = first.setdefault(place, tensor)


def inputs_of(model: nn.Module, given: Mapping[str, Any] | tuple[Any, ...] | ExampleInputs | None) -> ExampleInputs:
    """Return the inputs to trace ``model`` with, each a tensor of its own.

    Raises:
        TraceError: none are given, and none can be made; or those are of another kind.
    """
    if given is not None and not isinstance(given, Mapping | tuple | ExampleInputs):
        raise TraceError(
            f"example_inputs: expected a mapping of keyword inputs, or a tuple of positional ones, got a {type(given).__name__}."
        )
    seen: set[torch.Tensor] = set()

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if tensor in seen or tensor.is_inference():  # torch.export would take it for another input, or could not use it
            return tensor.clone()
        seen.add(tensor)
        return tensor

    return map_tensors(own, example_inputs(model, given))


def check_inputs(model: nn.Module, inputs: ExampleInputs, dynamic: Dynamic | None) -> None:
    """Raise :class:`TraceError` unless ``model.forward`` takes the inputs, and ``dynamic`` names dimensions that they have."""
    try:
        known = _by_name(model, inputs)
    except TypeError as error:
        raise TraceError(
            f"{type(model).__name__}.forward cannot be called with these {option('example_inputs', '--example-inputs')}: {error}. "
            f"It takes {inspect.signature(model.forward)}."
        ) from error
    if dynamic is not None and not isinstance(dynamic, Mapping):
        raise TraceError(
            f"dynamic=: expected a mapping from inputs to their dimensions, got {dynamic!r}. For the sizes of the example alone, pass {{}}."
        )
    for key, dims in (dynamic or {}).items():
        if key not in known:
            raise TraceError(f"dynamic= names {key!r}, expected one of the inputs: {', '.join(known)}.")
        tensors = [leaf for leaf in pytree.tree_leaves(known[key]) if isinstance(leaf, torch.Tensor)]
        rank = max((tensor.dim() for tensor in tensors), default=0)
        if not isinstance(dims, Sequence) or not all(type(dim) is int and 0 <= dim < rank for dim in dims):
            raise TraceError(
                f"dynamic= for {key!r}: expected a sequence of its {rank} dimensions (0 to {rank - 1}), got {dims!r}."
            )


def in_order(model: nn.Module, inputs: ExampleInputs) -> ExampleInputs:
    """Return the inputs in the order of ``forward``, with the defaults of omitted arguments between them.

    torch.export runs a GraphModule by position, whatever the keywords; other models keep their inputs.
    """
    if not isinstance(model, fx.GraphModule):
        return inputs
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    given = set(bound.arguments)
    bound.apply_defaults()
    names = list(bound.arguments)
    last = max((index for index, name in enumerate(names) if name in given), default=-1)
    return replace(inputs, kwargs={name: bound.arguments[name] for name in names[len(inputs.args) : last + 1]})


def _by_name(model: nn.Module, inputs: ExampleInputs) -> dict[str, Any]:
    return {**inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments, **inputs.kwargs}


@contextmanager
def _explicit_arguments(model: nn.Module, inputs: ExampleInputs) -> Iterator[None]:
    """Let ``model.forward`` name the inputs that it takes through ``**kwargs``, which torch.export mistakes (2.13)."""
    original = model.forward
    signature = inspect.signature(original)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    extra = [name for name in inputs.kwargs if name not in {p.name for p in named}]
    if not extra:
        yield
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    forward.__signature__ = signature.replace(parameters=[*named, *keywords])  # type: ignore[attr-defined]
    own = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


@contextmanager
def _broadcast_masks() -> Iterator[None]:
    """Let transformers make attention masks by broadcasting inside the block.

    Where a mask depends on more than positions (the images of Gemma 3), transformers 5 evaluates its mask function under
    ``torch.vmap``, which leaves an operator on sub-graphs in the trace. The same functions work on index tensors that broadcast,
    as transformers itself does with all other masks.
    """
    own = {kind: ALL_MASK_ATTENTION_FUNCTIONS[kind] for kind in ("sdpa", "eager")}
    try:
        for kind, make in own.items():
            ALL_MASK_ATTENTION_FUNCTIONS[kind] = _without_vmap(make)
        yield
    finally:
        for kind, make in own.items():
            ALL_MASK_ATTENTION_FUNCTIONS[kind] = make


def _without_vmap(make: Callable[..., Any]) -> Callable[..., Any]:
    def broadcasting(*args: Any, **kwargs: Any) -> Any:
        return make(*args, **({**kwargs, "use_vmap": False} if "use_vmap" in kwargs else kwargs))

    return broadcasting


@contextmanager
def _without_idle_moves() -> Iterator[None]:
    """Let ``module.to(…)`` return a module that is there already, in that dtype, as it is: torch cannot move one while it traces."""
    original = nn.Module.to

    def moved(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, memory_format = parse_to(*args, **kwargs)
        tensors = [*self.parameters(), *self.buffers()]
        there = all(device is None or each.device == device for each in tensors)
        cast = all(dtype is None or each.dtype == dtype for each in tensors if each.is_floating_point())
        return self if there and cast and memory_format is None else original(self, *args, **kwargs)

    nn.Module.to = moved  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to = original  # type: ignore[method-assign]


@contextmanager
def _histograms_of_floats() -> Iterator[None]:
    """Let ``torch.histc`` count integers on the meta device as floats, which all devices can, and a CPU no others.

    The experts of transformers ask which device they are on, and count integers wherever that is not a CPU.
    """
    original = torch.histc

    def counted(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        as_floats = input.is_meta and not input.is_floating_point()
        return original(input.float() if as_floats else input, *args, **kwargs)

    torch.histc = counted
    try:
        yield
    finally:
        torch.histc = original


def _without_cache() -> AbstractContextManager[None]:
    """Switch off torch's cache of fake results: with symbolic sizes a look-up takes as long as computing them."""
    return dynamo_config.patch(fake_tensor_cache_enabled=False)  # type: ignore[no-any-return]


@contextmanager
def _unprinted() -> Iterator[None]:
    """Keep torch.export from printing the graph so far, hundreds of lines, where it fails."""
    names = vars(export_trace)
    names["print"] = lambda *_args, **_kwargs: None  # in the place of the builtin, for that module
    try:
        yield
    finally:
        del names["print"]


def _without_code() -> AbstractContextManager[None]:
    """Let torch generate the code of its graphs on demand, which never comes."""
    return use_lazy_graph_module(True)


def _dynamic_shapes(model: nn.Module, inputs: ExampleInputs, dynamic: Dynamic | None) -> dict[str, Any]:
    """Return torch.export's ``dynamic_shapes``: DYNAMIC where a dimension must vary, AUTO where it may."""
    signature = inspect.signature(model.forward)
    keywords = {p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD}

    def dims(name: str, path: pytree.KeyPath, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        if dynamic is not None:
            return {dim: _hint(dim in dynamic.get(name, ())) for dim in range(leaf.dim())}
        axes = inputs.axes.get("_".join([name, *key_parts(path)]))  # the name of the placeholder
        if axes is not None:
            return {dim: _hint(axis is not None) for dim, axis in enumerate(axes)}
        return dict.fromkeys(range(leaf.dim()), torch.export.Dim.AUTO)

    def shape(name: str, value: Any, path: pytree.KeyPath = ()) -> Any:
        children, context = pytree.tree_flatten_with_path(value, is_leaf=lambda part: part is not value)
        if context.is_leaf():
            return dims(name, path, value)
        parts = [shape(name, child, (*path, *key)) for key, child in children]
        # torch.export wants a list for what others registered, such as a ModelOutput of transformers
        return pytree.tree_unflatten(parts, context) if context.type in pytree.BUILTIN_TYPES else parts

    bound = signature.bind(*inputs.args, **inputs.kwargs).arguments
    return {
        name: {key: shape(key, item) for key, item in value.items()} if name in keywords else shape(name, value)
        for name, value in bound.items()
    }


def _hint(varies: bool) -> Any:
    return torch.export.Dim.DYNAMIC if varies else torch.export.Dim.STATIC


# torch.export names a dimension in two ways: inputs['x'].shape[1], and L['x'].size()[1].
_FIXED_DIMENSION = re.compile(r"(?:inputs|L)(?P<path>(?:\['?\w+'?\])+)\.(?:shape|size\(\))\[(?P<dim>\d+)\]")


def _refusal(model: nn.Module, inputs: ExampleInputs, error: Exception, training: bool) -> TraceError:
    message = str(error)
    said = re.sub(r"\s*(Please|please) (file an issue|report).*", "", first_line(message, "nothing"))
    mode = " in training mode" if training else ""
    name = type(model).__name__
    fixed = sorted({(re.findall(r"\w+", m["path"])[0], int(m["dim"])) for m in _FIXED_DIMENSION.finditer(message)})
    if fixed:
        axes = ", ".join(f"dimension {dim}{_axis(inputs, path, dim)} of {path!r}" for path, dim in fixed)
        rest = {
            key: tuple(
                d
                for d in range(value.dim())
                if (key, d) not in fixed and inputs.axes.get(key, ())[d : d + 1] != (None,)
            )
            for key, value in _by_name(model, inputs).items()
            if isinstance(value, torch.Tensor)
        }
        return TraceError(
            f"{name} fixes {axes}{mode}: its own code computes something else, or unrolls, for each size. "
            f"Trace for the sizes of example_inputs alone with dynamic={rest}. torch.export says: {said}"
        )
    if "solve_univariate_inequality" in message:  # of sympy, where a pooled size is divided again
        batch = {key: (0,) for key, value in _by_name(model, inputs).items() if getattr(value, "ndim", 0)}
        return TraceError(
            f"{name} cannot be traced for any sizes{mode}: its code sets a condition on them that torch.export cannot solve. Trace for the "
            f"sizes of example_inputs and any batch with dynamic={batch}. torch.export says: {said}"
        )
    hint = " If the model does so in training only, inference=True traces the eval mode alone." if training else ""
    advice = advice_on_random_settings(model) if training else ""
    if advice:
        return TraceError(
            f"{name} cannot be traced{mode}{_own_line(error)}.{advice} inference=True traces the eval mode alone."
        )
    if _BY_VALUES.search(message):
        said = f"its Python asks for the values of a tensor there, or branches by them{_asked(said)}, and a graph has one course."
        return TraceError(
            f"{name} cannot be traced{mode}{_own_line(error)}: {said} Write it with operators, as torch.where.{hint}"
        )
    return TraceError(f"{name} cannot be traced{mode}{_own_line(error)}. torch.export says: {said}{hint}")


_BY_VALUES = re.compile("data-dependent|GuardOnDataDependent|unbacked|aten._local_scalar_dense|is not supported.*item")


def _asked(said: str) -> str:
    """Return the condition that torch.export names, without its remarks."""
    condition = re.search(r"expression (?P<text>.+?)(?: \(unhinted|$|\.)", said)
    return f" ({condition['text']})" if condition else ""


def _axis(inputs: ExampleInputs, name: str, dim: int) -> str:
    axes = inputs.axes.get(name)
    return f" ({axes[dim]})" if axes and axes[dim] else ""


def _own_line(error: BaseException) -> str:
    """Return the last line of the model's own code in the traceback of an error."""
    found = ""
    traceback = error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if is_model_code(file):
            found = f" at {file}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found


def is_model_code(file: str) -> bool:
    """Tell whether a source file belongs neither to torch or numpy, nor to this package, nor to contextlib."""
    return not any(part in file for part in ("/torch/", "/lora_fx/", "/numpy/", "contextlib"))
