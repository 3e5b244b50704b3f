"""Quantised layers of other libraries: read as weights over their own codes, and replaced by linear layers for a trace.

A library is known by the names of its classes, and never imported. Layers that quantise their input too compute no product with a
weight, and are refused, as are those of classes that are not known here.

During a trace the model has linear layers in the place of its quantised ones, so that neither torch.export nor any comparison runs the
code of the library: a call in eval mode makes bitsandbytes repack weights on some CPUs, after which gradients are None. Only the last
comparison calls the model as it is, in train mode.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lora_fx.errors import TraceError, listed
from lora_fx.graph.compare import compare_values, rounding_tolerance
from lora_fx.graph.graph_module import TracedGraphModule
from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.numerics.schemes import CodebookScheme, UniformScheme
from lora_fx.tracing.example_inputs import ExampleInputs
from lora_fx.tracing.parity import OnCopies, OwnStreams

_logger = logging.getLogger("lora_fx.tracing")


class CastingLinear(nn.Linear):
    """A linear layer that computes in a dtype of its own, whatever those of its input, weight and bias, and returns that of its input.

    Attributes:
        computed: that dtype; None: the weight's.
    """

    computed: torch.dtype | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return ``x W^T + bias``."""
        dtype = self.computed or self.weight.dtype
        weight = self.weight if self.weight.dtype == dtype else self.weight.to(dtype)
        bias = self.bias if self.bias is None or self.bias.dtype == dtype else self.bias.to(dtype)
        if input.dtype == dtype:
            return nn.functional.linear(input, weight, bias)
        return nn.functional.linear(input.to(dtype), weight, bias).to(input.dtype)


class AddingLinear(nn.Linear):
    """A linear layer that adds its bias to the rounded product, as HQQ and quanto do."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return ``x W^T``, plus the bias."""
        product = nn.functional.linear(input, self.weight)
        return product if self.bias is None else product + self.bias


@dataclass(frozen=True)
class QuantisedLayers:
    """The quantised layers of a model.

    Attributes:
        weights: by the paths of the layers.
        repacked: paths of those whose library has rounded scales since it was loaded.
        given: the layers themselves, by their paths, where linear ones stand in their place.
    """

    weights: Mapping[str, QuantisedWeight]
    repacked: tuple[str, ...] = ()
    given: Mapping[str, nn.Module] = field(default_factory=dict)


def quantised_layers(model: nn.Module) -> QuantisedLayers:
    """Return the quantised layers of a model, with weights over the codes that they have.

    Raises:
        TraceError: a layer quantises its input, or is of a class that is not known here.
    """
    weights: dict[str, QuantisedWeight] = {}
    repacked, problems = [], []
    for path, module in model.named_modules():
        try:
            weight = _read(module)
        except _Unreadable as error:
            problems.append(f"{path!r} is a {type(module).__name__}{error}")
            continue
        if weight is not None:
            weights[path] = weight
            if "forward" in vars(module):
                problems.append(
                    f"{path!r} has another forward than its class (accelerate's hooks put one there: remove them)"
                )
            if _is_repacked(module):
                repacked.append(path)
    if problems:
        raise TraceError(f"{type(model).__name__} has layers that cannot be traced: {listed(problems, 3, '; ')}.")
    return QuantisedLayers(weights, tuple(repacked))


class _Unreadable(Exception):  # noqa: N818  # becomes a part of a message
    """A quantised layer that cannot be read, and why."""


def _read(module: nn.Module) -> QuantisedWeight | None:
    """Return the weight of a quantised layer; None for any other module."""
    reader = _READERS.get(type(module).__name__)
    if reader is not None:
        return reader(module)
    weight = module._parameters.get("weight")
    if weight is not None and type(weight).__name__ in _TENSOR_READERS and isinstance(module, nn.Linear):
        return _TENSOR_READERS[type(weight).__name__](module)
    for name, parameter in module._parameters.items():
        package = type(parameter).__module__.partition(".")[0]
        if package in _PACKAGES:
            raise _Unreadable(f" whose {name} is a {type(parameter).__name__} of {package}, which is not known here")
    package = type(module).__module__.partition(".")[0]
    if package in _PACKAGES and (module._parameters or module._buffers):
        raise _Unreadable(f" of {package}, which is not known here")
    return None


_PACKAGES = frozenset(
    {
        "aqlm",
        "auto_gptq",
        "awq",
        "bitsandbytes",
        "compressed_tensors",
        "eetq",
        "gptqmodel",
        "hqq",
        "optimum",
        "quanto",
        "torchao",
    }
)
"""Packages whose modules and tensors are quantised."""


def _of_linear4bit(module: Any) -> QuantisedWeight:
    """Read a layer of bitsandbytes in 4 bits."""
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        raise _Unreadable(" that is not quantised yet: move the model to its device")
    codes, absmax, nested = module.weight.data, state.absmax, bool(state.nested)
    stored = state.dtype
    if _is_repacked(module):
        codes, absmax, nested = _unpacked(codes), absmax.T.reshape(-1).float(), False
        stored = state.original_dtype
    tensors = {"codes": codes.view(torch.uint8).reshape(-1, 1), "absmax": absmax}
    if nested:
        if state.state2.blocksize != 256:
            raise _Unreadable(f" with scales in blocks of {state.state2.blocksize}, expected 256")
        outer = state.state2
        tensors |= {"nested_absmax": outer.absmax, "nested_map": outer.code, "offset": state.offset.reshape(())}
    scheme = CodebookScheme(state.quant_type, state.blocksize, nested)
    computed = module.compute_dtype or stored
    # The library casts to the dtype of the product what it has in the wider of the two. Norms of DoRA, and folds, are of the values before.
    dtype = stored if torch.promote_types(computed, stored) == stored else computed
    return QuantisedWeight(tensors, scheme, tuple(state.shape), dtype)


def _is_repacked(module: nn.Module) -> bool:
    """Tell whether a call in eval mode has rounded the scales of a layer of bitsandbytes."""
    return bool(
        getattr(getattr(module._parameters.get("weight"), "quant_state", None), "packing_format_for_cpu", False)
    )


def _unpacked(codes: torch.Tensor) -> torch.Tensor:
    """Return codes in the order of the weight.

    bitsandbytes packs for the CPU byte ``(rows / 32, in / 2, 2, 32)``-wise: a byte holds a column of two rows, 32 rows at a time, where
    the plain order has two columns of a row.
    """
    rows, half = codes.shape
    bytes_ = codes.reshape(rows // 32, half, 32)
    # Bytes of the upper and lower half of 64 values, which are 32 rows of two neighbouring columns.
    values = torch.stack((bytes_ & 15, bytes_ >> 4), dim=2).reshape(rows // 32, half, 32, 2)
    first, second = values.transpose(1, 2).reshape(rows, half, 2).unbind(-1)
    return first << 4 | second


def _of_linear8bit(_module: Any) -> QuantisedWeight:
    raise _Unreadable(
        ", which quantises its input to 8 bits too, so that it computes no product with a weight; load the model in 4 bits, or in 8 bits "
        "of torchao's Int8WeightOnlyConfig"
    )


def _of_hqq(module: Any) -> QuantisedWeight:
    """Read a layer of HQQ: ``(code − zero) · scale`` in groups."""
    meta = module.meta
    if meta.get("quant_scale") or meta.get("quant_zero") or meta["axis"] != 1:
        raise _Unreadable(f" with axis {meta['axis']} or quantised scales, expected axis 1 and plain scales")
    if meta.get("view_as_float") or not meta.get("packing") or not 2 <= meta["nbits"] <= 8:
        raise _Unreadable(
            f" with {meta['nbits']} bits, packing {meta.get('packing')!r} and view_as_float {bool(meta.get('view_as_float'))}, expected 2 to 8 "
            "bits, a packing and view_as_float False"
        )
    rows, columns = meta["shape"]
    group = meta["group_size"] or columns
    codes = module.unpack(dtype=torch.uint8).reshape(-1)[: rows * columns].reshape(rows, columns)  # 3 bits end in zeros
    scale, zero = (meta[name].reshape(rows, -1) for name in ("scale", "zero"))
    scheme = UniformScheme(
        meta["nbits"], group if group != columns else None, symmetric=False, scales="weight", method="hqq"
    )
    return QuantisedWeight(
        {"codes": codes, "scale": scale, "zero": zero}, scheme, (rows, columns), module.compute_dtype
    )


def _of_quanto(module: Any) -> QuantisedWeight:
    """Read a layer of quanto with 8-bit weights, a scale for each row."""
    weight = module.weight
    if getattr(module, "activation_qtype", None) is not None:
        raise _Unreadable(", which quantises its input too, so that it computes no product with a weight")
    if type(weight).__name__ != "WeightQBytesTensor" or weight._data.dtype != torch.int8 or weight.axis != 0:
        raise _Unreadable(
            f" with a weight in {getattr(weight, 'qtype', type(weight).__name__)}, expected qint8 with a scale for each row"
        )
    tensors = {"codes": weight._data, "scale": weight._scale.reshape(-1, 1)}
    return QuantisedWeight(tensors, UniformScheme(8, scales="weight"), weight.shape, weight.dtype)


def _of_int8_tensor(module: Any) -> QuantisedWeight:
    """Read a weight of torchao's Int8WeightOnlyConfig."""
    weight = module.weight
    if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:
        raise _Unreadable(
            ", whose weight of torchao has its input quantised too, so that it computes no product with a weight"
        )
    if tuple(weight.block_size) != (1, weight.shape[1]):
        raise _Unreadable(f" with a weight in blocks of {tuple(weight.block_size)}, expected a scale for each row")
    return _uniform(weight, 8, "float32")


def _of_intx_tensor(module: Any) -> QuantisedWeight:
    """Read a weight of torchao's IntxWeightOnlyConfig."""
    weight = module.weight
    if weight.activation_quantization is not None:
        raise _Unreadable(
            ", whose weight of torchao has its input quantised too, so that it computes no product with a weight"
        )
    return _uniform(weight, int(str(weight.target_dtype).rpartition("int")[2]), "weight")


def _uniform(weight: Any, bits: int, scales: Any) -> QuantisedWeight:
    rows, columns = weight.shape
    group = int(weight.block_size[-1])
    tensors = {"codes": weight.qdata, "scale": weight.scale.reshape(rows, -1)}
    zero = weight.zero_point
    symmetric = zero is None or not bool(zero.any())
    if not symmetric:
        tensors["zero"] = zero.reshape(rows, -1)
    scheme = UniformScheme(bits, None if group == columns else group, symmetric, scales)
    return QuantisedWeight(tensors, scheme, (rows, columns), weight.dtype)


_READERS: Mapping[str, Callable[[Any], QuantisedWeight]] = {
    "Linear4bit": _of_linear4bit,
    "LinearNF4": _of_linear4bit,
    "LinearFP4": _of_linear4bit,
    "Linear8bitLt": _of_linear8bit,
    "HQQLinear": _of_hqq,
    "QLinear": _of_quanto,
}
"""Readers of layers, by the names of their classes."""

_ADDING = frozenset({"HQQLinear", "QLinear"})
"""Layers that add their bias to the rounded product."""

_TENSOR_READERS: Mapping[str, Callable[[Any], QuantisedWeight]] = {
    "Int8Tensor": _of_int8_tensor,
    "IntxUnpackedToInt8Tensor": _of_intx_tensor,
}
"""Readers of linear layers, by the names of the classes of their weights."""


@contextmanager
def linear_layers(model: nn.Module) -> Iterator[QuantisedLayers]:
    """Put linear layers in the place of the quantised layers of a model, inside the block.

    Raises:
        TraceError: a layer cannot be read.
    """
    layers = quantised_layers(model)
    given = {path: model.get_submodule(path) for path in layers.weights}
    linear = {id(module): _linear(module, layers.weights[path]) for path, module in given.items()}
    with _exchanged(model, linear):
        yield replace(layers, given=given)


@contextmanager
def _given_layers(model: nn.Module, layers: QuantisedLayers) -> Iterator[None]:
    """Put the quantised layers back, inside a block in which linear ones stand for them; in train mode, whatever that of the model."""
    for module in layers.given.values():
        module.train()
    biases = [bias for module in layers.given.values() if (bias := module._parameters.get("bias")) is not None]
    held = [bias.data for bias in biases]
    try:
        with _exchanged(model, {id(model.get_submodule(path)): module for path, module in layers.given.items()}):
            yield
    finally:
        for bias, data in zip(biases, held, strict=True):  # which bitsandbytes casts in place at a first call
            bias.data = data


@contextmanager
def _exchanged(model: nn.Module, others: Mapping[int, Any]) -> Iterator[None]:
    """Put others in the place of modules and parameters of a model, by their ids, inside the block."""
    held: list[tuple[dict[str, Any], str, Any]] = [
        (places, name, value)
        for module in model.modules()
        for places in (module._modules, module._parameters)
        for name, value in places.items()
        if id(value) in others
    ]
    try:
        for places, name, value in held:
            places[name] = others[id(value)]
        yield
    finally:
        for places, name, value in held:
            places[name] = value


def checked_beside_library(
    model: nn.Module, graph_module: TracedGraphModule, inputs: ExampleInputs, layers: QuantisedLayers
) -> TracedGraphModule:
    """Return a graph that agrees with a model whose quantised layers the library computes, both in eval mode; refuse any other.

    The layers stay in train mode. Those that were repacked are not compared: their library computes with other kernels.

    Args:
        model: with linear layers in the place of quantised ones; left in eval mode.
        graph_module: of the model; left in eval mode.
        inputs: of both.
        layers: the quantised layers.

    Raises:
        TraceError: they differ, or the model fails.
    """
    if layers.repacked:
        _logger.warning(
            "%s of %s were repacked by a call in eval mode, in which bitsandbytes rounds their scales to bfloat16, and have no gradients "
            "there any more. The graph trains, beside these scales. For those of the checkpoint, load the model again and rewrite it "
            "before its first call.",
            listed(list(map(repr, layers.repacked)), 3),
            type(model).__name__,
        )
    if not layers.weights or layers.repacked or any(tensor.is_meta for tensor in layers.weights.values()):
        return graph_module
    model.eval()
    graph_module.eval()
    name = type(model).__name__
    run, run_graph = OnCopies(model), OnCopies(graph_module)
    with torch.no_grad(), OwnStreams():
        with _given_layers(model, layers):
            try:
                expected = run(*inputs.args, **inputs.kwargs)
            except Exception as error:
                raise TraceError(f"{name} itself fails on the example inputs: {error}") from error
        found = run_graph(*inputs.args, **inputs.kwargs)
    compared = compare_values(expected, found, rounding_tolerance(expected))
    if compared.message:
        raise TraceError(
            f"the graph of {name} computes something else than the library of its quantised layers: output{compared.part}: "
            f"{compared.message}."
        )
    return graph_module


def _linear(module: nn.Module, weight: QuantisedWeight) -> nn.Linear:
    bias = getattr(module, "bias", None)
    if bias is not None and not isinstance(bias, nn.Parameter):  # HQQ's is a tensor
        bias = nn.Parameter(bias, requires_grad=False)
    kind = AddingLinear if type(module).__name__ in _ADDING else CastingLinear
    linear = kind(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    if isinstance(linear, CastingLinear) and getattr(module, "compute_dtype", None) not in (None, weight.dtype):
        linear.computed = module.compute_dtype  # type: ignore[assignment]
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", bias)
    linear.train(module.training)
    for name, value in vars(module).items():
        if name.endswith("_hooks"):
            vars(linear)[name] = value
    return linear


@contextmanager
def without_codes(model: nn.Module) -> Iterator[None]:
    """Put dense weights without memory in the place of quantised ones, inside the block: a trace reads no values."""
    with _exchanged(
        model, {id(each): _hollow(each) for each in model.parameters() if isinstance(each, QuantisedWeight)}
    ):
        yield


def _hollow(weight: torch.Tensor) -> nn.Parameter:
    dense = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    dense.untyped_storage().resize_(0)
    return nn.Parameter(dense)
