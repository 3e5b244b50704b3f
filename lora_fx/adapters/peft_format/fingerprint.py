"""Provenance of an adapter: its rules, the base that it was trained on, and the name that its config gives that base."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from lora_fx.files.computed_file import Computed, ComputedFile
from lora_fx.files.safetensors import TensorEntry, TensorFile
from lora_fx.graph.adapter_names import is_of_adapter
from lora_fx.graph.records import Origin
from lora_fx.graph.state import State
from lora_fx.numerics.quantised_weight import QuantisedWeight
from lora_fx.numerics.schemes import CodebookScheme, scheme_text

SAMPLES = 4096
"""How many elements of a tensor its fingerprint is made of, at most."""

_KEY = "lora_fx"  # in the metadata of a safetensors file


def fingerprint(state: State) -> dict[str, str]:
    """Return for each tensor of a base its dtype, shape and a digest; nothing for a graph without weights.

    The digest is made of up to 4096 elements at equal distances, the first and the last among them, so that it costs next to
    nothing also beside 70 billion parameters. It tells another checkpoint, another dtype or shape, and any change that reaches
    most of a tensor. It need not tell a change of a few elements.

    In the place of its dtype a quantised weight has its scheme, and it has the shape and the float32 values of the matrix that was
    quantised: these are the same on disk and in memory, for whatever dtype a library computes in, and however a model stores it.
    """
    return {
        name: _of_tensor(state.tensors[name])
        for name in state.names()
        if not is_of_adapter(name) and name not in state.non_persistent and not state.tensors[name].is_meta
    }


def fingerprint_on_disk(tensors: Mapping[str, tuple[TensorFile, TensorEntry]]) -> dict[str, str]:
    """Return the same of tensors in files, of which only the sampled parts are read, but for computed ones.

    Args:
        tensors: by their names in the graph: the file of each, and its place there.
    """
    opened = {file.path: np.memmap(file.path, dtype=np.uint8, mode="r") for file, _ in tensors.values()}
    return {
        name: _of_computed(file.computed[entry.name])
        if isinstance(file, ComputedFile) and file.is_computed(entry.name)
        else _of_file(file.on_disk.entries[entry.name], opened[file.path])
        for name, (file, entry) in tensors.items()
    }


def _of_file(entry: TensorEntry, content: np.memmap[Any, np.dtype[np.uint8]], casts: Sequence[torch.dtype] = ()) -> str:
    elements = content[entry.start : entry.end].view(f"V{entry.dtype.itemsize}")
    chosen = elements[_samples(len(elements)).numpy()].tobytes()
    if not chosen or not casts:
        return _tensor_digest(_dtype_text(entry.dtype), entry.shape, chosen)
    values = torch.frombuffer(bytearray(chosen), dtype=entry.dtype)
    for dtype in casts:
        values = values.to(dtype)
    return _tensor_digest(_dtype_text(values.dtype), entry.shape, values.view(torch.uint8).numpy().tobytes())


def in_recorded_dtypes(
    trained_on: Mapping[str, str],
    found: Mapping[str, str | None],
    tensors: Mapping[str, tuple[TensorFile, TensorEntry]],
    loaded_in: torch.dtype | None,
) -> dict[str, str]:
    """Return the fingerprints of tensors in files that have other dtypes than an adapter's base had, and the same values.

    Values in a wider dtype are the same, and training often has norms in float32. Those in a narrower one are, if they were loaded in it.

    Args:
        trained_on: fingerprint of the base that the adapter was trained on.
        found: that of the files.
        tensors: by their names in the graph: the file of each, and its place there; none that is computed.
        loaded_in: the dtype into which the model was loaded there, if that is known.
    """
    same: dict[str, str] = {}
    for name, told in trained_on.items():
        dtype = getattr(torch, told.partition(" ")[0], None)
        text, place = found.get(name), tensors.get(name)
        if text is None or text == told or place is None or not isinstance(dtype, torch.dtype):
            continue
        file, entry = place
        loaded = entry.dtype if loaded_in is None else loaded_in
        if dtype.is_floating_point and entry.dtype.is_floating_point and torch.promote_types(loaded, dtype) == dtype:
            content = np.memmap(file.path, dtype=np.uint8, mode="r")
            if _of_file(file.on_disk.entries[entry.name], content, (loaded, dtype)) == told:
                same[name] = told
    return same


def matches(told: str, computed: Computed) -> bool:
    """Tell whether a fingerprint is that of a quantised matrix."""
    return told == _of_computed(computed)


def _of_computed(computed: Computed) -> str:
    if computed.elements is None:
        return _of_matrix(computed.scheme, computed.matrix(torch.float32))
    shape = computed.shape[::-1] if computed.transposed else computed.shape
    return _of_elements(computed.scheme, shape, computed.elements(_samples(math.prod(shape))))


def _of_tensor(tensor: torch.Tensor) -> str:
    if isinstance(tensor, QuantisedWeight):
        return _of_elements(scheme_text(tensor.scheme), tensor.matrix_shape, _sampled(tensor))
    return _of_matrix(_dtype_text(tensor.dtype), tensor)


def _of_matrix(kind: str, tensor: torch.Tensor) -> str:
    flat = tensor.detach().reshape(-1)
    return _of_elements(kind, tensor.shape, flat[_samples(flat.numel()).to(flat.device)])


def _sampled(weight: QuantisedWeight) -> torch.Tensor:
    return weight.elements_of_matrix(_samples(math.prod(weight.matrix_shape)))


def _of_dense(weight: QuantisedWeight) -> str:
    if isinstance(weight.scheme, CodebookScheme) and not weight.is_cast and not weight.is_transposed:
        return _of_elements(_dtype_text(weight.dtype), weight.shape, _sampled(weight).to(weight.dtype))
    return _of_matrix(_dtype_text(weight.dtype), weight.dequantize())


def _of_elements(kind: str, shape: Sequence[int], chosen: torch.Tensor) -> str:
    return _tensor_digest(kind, shape, chosen.cpu().view(torch.uint8).numpy().tobytes())


def _samples(elements: int) -> torch.Tensor:
    if elements <= SAMPLES:
        return torch.arange(elements)
    return torch.linspace(0, elements - 1, SAMPLES, dtype=torch.float64).long()


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensor_digest(kind: str, shape: Sequence[int], content: bytes) -> str:
    """Return the fingerprint of one tensor: ``"bfloat16 4096x1024 9f86d081884c7d65"``."""
    sizes = "x".join(map(str, shape)) or "scalar"
    return f"{kind} {sizes} {hashlib.sha256(content).hexdigest()[:16]}"


def schemes_of(state: State) -> dict[str, str]:
    """Return how the weights of a base are quantised, by their names: the text of the scheme of each that is."""
    tensors = {name: state.tensors[name] for name in state.names()}
    return {name: scheme_text(tensor.scheme) for name, tensor in tensors.items() if isinstance(tensor, QuantisedWeight)}


def metadata(origin: Origin, state: State) -> dict[str, str]:
    """Return the metadata of an adapter's file: what PEFT writes, and where the adapter comes from.

    Args:
        origin: of the adapter.
        state: of its base.
    """
    versions = {name: version(name) for name in ("lora_fx", "torch", "transformers")}
    rules = {"name": origin.rules, "sha256": origin.digest}
    said: dict[str, Mapping[str, str]] = {"base": fingerprint(state), "rules": rules, "versions": versions}
    if schemes := schemes_of(state):
        said["quantised"] = schemes
        weights = {name: state.tensors[name] for name in schemes}
        said["dense"] = {
            name: _of_dense(weight)
            for name, weight in weights.items()
            if isinstance(weight, QuantisedWeight) and not weight.is_meta
        }
    return {"format": "pt", _KEY: json.dumps(said, sort_keys=True)}


def recorded(given: Mapping[str, str]) -> tuple[dict[str, str], Origin]:
    """Return the fingerprint of the base and the origin that a file's metadata name; nothing where lora_fx did not write it."""
    rules = _recorded_texts(given, "rules")
    return _recorded_texts(given, "base"), Origin(rules.get("name", ""), rules.get("sha256", ""))


def recorded_schemes(given: Mapping[str, str]) -> dict[str, str]:
    """Return how the weights of the base were quantised, as a file's metadata name it; nothing where they were dense, or it does not."""
    return _recorded_texts(given, "quantised")


def recorded_dense(given: Mapping[str, str]) -> dict[str, str]:
    """Return the fingerprint of the dense weights that the quantised ones of the base stand for, by their names."""
    return _recorded_texts(given, "dense")


def recorded_version(given: Mapping[str, str], package: str) -> str | None:
    """Return the version of a package that a file's metadata name; None where lora_fx did not write it."""
    return _recorded_texts(given, "versions").get(package)


def differences(trained_on: Mapping[str, str], found: Mapping[str, str | None]) -> Iterator[str]:
    """Yield every difference between a base and the base that an adapter was trained on, tensor by tensor.

    Args:
        trained_on: fingerprint of the one.
        found: that of the other; None for a tensor that is there in another form, which cannot be compared.
    """
    unknown = {name for name, told in found.items() if told is None}
    for name in dict.fromkeys((*trained_on, *found)):
        if name in unknown:
            continue
        was, now = trained_on.get(name), found.get(name)
        if was is None or now is None:
            yield f"{name}: {'not in the base that it was trained on' if was is None else 'missing in this one'}"
        elif was != now:
            told, telling = was.rpartition(" ")[0], now.rpartition(" ")[0]
            yield f"{name}: other values" if told == telling else f"{name}: was {told}, is {telling}"


def _recorded_texts(given: Mapping[str, str], key: str) -> dict[str, str]:
    try:
        said = json.loads(given.get(_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    value = said.get(key) if isinstance(said, dict) else None
    return {k: v for k, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}
