"""Quantised tensors in safetensors files: which keys are one weight, by the formats of bitsandbytes, GPTQ and AWQ.

bitsandbytes   ``x.weight`` (codes) with ``x.weight.absmax``, ``.quant_map``, ``.quant_state.bitsandbytes__nf4`` (JSON), and
               ``.nested_absmax``, ``.nested_quant_map``; 8 bits: ``x.weight`` with ``x.SCB``
GPTQ           ``x.qweight`` (in · bits/32, out), ``x.qzeros`` (groups, out · bits/32), ``x.scales`` (groups, out), ``x.g_idx`` (in,)
AWQ            ``x.qweight`` (in, out/8), ``x.qzeros`` (groups, out/8), ``x.scales`` (groups, out)

Files are a stranger's: every shape is compared with what the others imply before anything is computed of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lora_fx.errors import LoraFxError, printable, shortened
from lora_fx.files.safetensors import TensorEntry

Packing = Literal["blocks", "rows", "gptq", "gptq_v2", "awq"]


@dataclass(frozen=True)
class QuantisedTensor:
    """Tensors of a checkpoint that stand for one matrix.

    Attributes:
        key: of the matrix in a checkpoint that is not quantised.
        shape: ``(out, in)``.
        dtype: of the matrix when it was quantised, or that of its scales.
        scheme: text of the scheme, see :func:`lora_fx.numerics.schemes.parse_scheme`.
        packing: how the parts lie: blocks of bitsandbytes in 4 bits, its rows in 8, or words of 32 bits.
        parts: key of each, by what it is: ``codes``, ``scale``, ``zero``, ….
        offset: mean of nested scales.
        symmetric: whether the config says that all zero points are in the middle, ``2 ** (bits - 1)``.
    """

    key: str
    shape: tuple[int, int]
    dtype: torch.dtype
    scheme: str
    packing: Packing
    parts: Mapping[str, str]
    offset: float = 0.0
    symmetric: bool = False


def quantised_tensors(
    source: str,
    settings: Mapping[str, Any],
    entries: Mapping[str, TensorEntry],
    read: Callable[[str], torch.Tensor],
) -> tuple[QuantisedTensor, ...]:
    """Return the quantised tensors of a checkpoint.

    Args:
        source: of the checkpoint, for messages.
        settings: ``quantization_config`` of its config.
        entries: dtypes and shapes by key.
        read: returns a tensor; called for small ones.

    Raises:
        LoraFxError: the method is not known, or tensors do not fit each other. All such are named.
    """
    method = settings.get("quant_method")
    found: list[QuantisedTensor] = []
    problems: list[str] = []
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # as transformers before 4.38 wrote it
    if not isinstance(method, str) or method not in _METHODS:
        raise LoraFxError(
            f"{source}: expected weights that are quantised by {', '.join(_METHODS)}, got quant_method {_shown(method)} in config.json. Fold "
            "into the checkpoint that they were made of."
        )
    problems += _settings_problems(method, settings)
    if not problems:
        for stem, make in _METHODS[method](settings, entries):
            try:
                found.append(make(stem, settings, entries, read))
            except _UnfitError as error:
                problems.append(f"{stem}: {error}")
        used = {key for each in found for key in each.parts.values()}
        left = [key for key in entries if key not in used and key.endswith(_SUFFIXES[method])]
        problems += [f"{key}: belongs to no quantised weight" for key in left if not problems]
        if not found and not problems:
            problems.append(f"quant_method is {method}, and no tensor is quantised so")
    if problems:
        told = "\n  ".join(shortened(problems, _MAX_NAMED, "problems"))
        raise LoraFxError(f"{source}: its quantised weights cannot be read:\n  {told}\nDownload it again.")
    return tuple(found)


_MAX_NAMED = 10


def scheme_of_settings(settings: Mapping[str, Any]) -> str | None:
    """Return the text of the scheme by which bitsandbytes quantises a checkpoint to 4 bits; None for all else.

    Args:
        settings: ``quantization_config`` of a config.
    """
    kind = settings.get("bnb_4bit_quant_type", "fp4")
    if not settings.get("load_in_4bit") or kind not in ("nf4", "fp4"):
        return None
    return f"{kind}:double" if settings.get("bnb_4bit_use_double_quant") else str(kind)


class _UnfitError(Exception):
    """Tensors do not fit each other."""


def _shown(value: object) -> str:
    return printable(repr(value))[:80]


def _settings_problems(method: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a config says of its weights that is not known; each by its name."""
    if method == "bitsandbytes":
        return
    bits, group = settings.get("bits"), settings.get("group_size")
    known = (4,) if method == "awq" else (2, 3, 4, 8)
    if type(bits) is not int or bits not in known:
        yield f"quantization_config: expected bits of {' or '.join(map(str, known))}, got {_shown(bits)}"
    if type(group) is not int or not (group == -1 or 0 < group <= _MAX_GROUP):
        yield f"quantization_config: expected a group_size from 1 to {_MAX_GROUP}, or -1, got {_shown(group)}"
    form = _form(method, settings)
    forms = {"awq": ("gemm",), "gptq": ("gptq", "gptq_v2")}[method]
    if form not in forms:
        yield f"quantization_config: expected the format {' or '.join(forms)}, got {_shown(form)}"
    if settings.get("pack_dtype", "int32") != "int32":
        yield f"quantization_config: expected pack_dtype int32, got {_shown(settings['pack_dtype'])}"
    if settings.get("dynamic"):
        yield "quantization_config: dynamic has other settings for some modules, which are not read"


_MAX_GROUP = 9_999_999  # which the text of a scheme can say


def _form(method: str, settings: Mapping[str, Any]) -> object:
    """Return the format within a method, under the names that programs gave it."""
    keys = ("version", "format") if method == "awq" else ("checkpoint_format", "format")
    given = next((settings[key] for key in keys if settings.get(key) is not None), None)
    default = "gemm" if method == "awq" else "gptq"
    return default if given is None else given.lower() if isinstance(given, str) else given


# bitsandbytes.

_STATE = ".quant_state.bitsandbytes__"

Make = Callable[[str, Mapping[str, Any], Mapping[str, TensorEntry], Callable[[str], torch.Tensor]], QuantisedTensor]


def _of_bitsandbytes(_: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Make]]:
    for key in entries:
        if _STATE in key:
            yield key.partition(_STATE)[0], _blocks
        elif key.endswith(".SCB"):
            yield key.removesuffix(".SCB"), _rows


def _blocks(
    key: str, _: Mapping[str, Any], entries: Mapping[str, TensorEntry], read: Callable[[str], torch.Tensor]
) -> QuantisedTensor:
    """Return the tensor of 4 bits under a key, as ``quant_state`` describes it."""
    states = [other for other in entries if other.startswith(f"{key}{_STATE}")]
    state = _state(entries[states[0]], read) if len(states) == 1 else {}
    kind, blocksize, shape = state.get("quant_type"), state.get("blocksize"), state.get("shape")
    dtype = DTYPES.get(str(state.get("dtype")))
    if kind not in ("nf4", "fp4") or not states[0].endswith(f"__{kind}") or dtype is None:
        raise _UnfitError(
            f"expected one quant_state of nf4 or fp4 with a dtype, got {_shown(states)} with {_shown(state)}"
        )
    if type(blocksize) is not int or blocksize not in (2**power for power in range(5, 13)):
        raise _UnfitError(f"expected a blocksize from 32 to 4096, got {_shown(blocksize)}")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise _UnfitError(f"expected the shape of a matrix, got {_shown(shape)}")
    elements = math.prod(shape)
    blocks = -(-elements // blocksize)
    nested = "nested_blocksize" in state
    parts = {"codes": key, "absmax": f"{key}.absmax", "map": f"{key}.quant_map", "state": states[0]}
    expected = {"absmax": (torch.uint8 if nested else torch.float32, (blocks,)), "map": (torch.float32, (16,))}
    offset = state.get("nested_offset", 0.0)
    if nested:
        if state["nested_blocksize"] != _NESTED or type(offset) not in (float, int) or not abs(offset) <= _LARGEST:
            raise _UnfitError(
                f"expected a nested_blocksize of {_NESTED} and a finite nested_offset of float32, got {_shown(state)}"
            )
        parts |= {"nested_absmax": f"{key}.nested_absmax", "nested_map": f"{key}.nested_quant_map"}
        expected |= {"nested_absmax": (torch.float32, (-(-blocks // _NESTED),)), "nested_map": (torch.float32, (256,))}
    _check_parts(parts, expected, entries)
    if entries[key].size != -(-elements // 2):  # whatever their dtype: quant_storage is only how the bytes are called
        raise _UnfitError(f"expected {-(-elements // 2)} bytes of codes for the shape {shape}, got {entries[key].size}")
    scheme = f"{kind}{':double' if nested else ''}{'' if blocksize == 64 else f':{blocksize}'}"
    return QuantisedTensor(key, (shape[0], shape[1]), dtype, scheme, "blocks", parts, float(offset))


_NESTED = 256
_LARGEST = torch.finfo(torch.float32).max
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes of weights that are quantised, by the names that files have for them."""


def _state(entry: TensorEntry, read: Callable[[str], torch.Tensor]) -> dict[str, Any]:
    """Return the JSON object that the bytes of a tensor are; an empty one if they are none."""
    if entry.dtype != torch.uint8 or not 0 < entry.size < _MAX_STATE:
        return {}
    try:
        found = json.loads(bytes(read(entry.name).tolist()))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


_MAX_STATE = 10_000


def _rows(
    stem: str, _: Mapping[str, Any], entries: Mapping[str, TensorEntry], __: Callable[[str], torch.Tensor]
) -> QuantisedTensor:
    """Return the tensor of 8 bits of a module, with the largest magnitude of each row."""
    key = f"{stem}.weight"
    parts = {"codes": key, "scale": f"{stem}.SCB"}
    parts |= {"format": f"{stem}.weight_format"} if f"{stem}.weight_format" in entries else {}
    shape = entries[key].shape if key in entries else ()
    if len(shape) != 2:
        raise _UnfitError(f"expected a matrix {key}, got the shape {list(shape)}")
    expected = {"codes": (torch.int8, shape), "scale": (torch.float32, shape[:1])}
    if "format" in parts:
        given = entries[parts["format"]].shape
        expected["format"] = (torch.uint8, given if math.prod(given) == 1 else ())
    _check_parts(parts, expected, entries)
    return QuantisedTensor(key, (shape[0], shape[1]), torch.float16, "int8", "rows", parts)


# GPTQ and AWQ.


def _of_words(_: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Make]]:
    for key in entries:
        if key.endswith(".qweight"):
            yield key.removesuffix(".qweight"), _words


def _words(
    stem: str, settings: Mapping[str, Any], entries: Mapping[str, TensorEntry], _: Callable[[str], torch.Tensor]
) -> QuantisedTensor:
    """Return the tensor that a module has in words of 32 bits, along the input features (GPTQ) or the output features (AWQ)."""
    awq = settings["quant_method"] == "awq"
    bits, group = settings["bits"], settings["group_size"]
    parts = {"codes": f"{stem}.qweight", "zero": f"{stem}.qzeros", "scale": f"{stem}.scales"}
    codes, scale = entries[parts["codes"]], entries.get(parts["scale"])
    if len(codes.shape) != 2 or scale is None or len(scale.shape) != 2 or scale.dtype not in _SCALES:
        raise _UnfitError("expected a matrix qweight and a matrix scales of float16, bfloat16 or float32")
    if not awq and codes.shape[0] * 32 % bits:
        raise _UnfitError(f"expected rows of qweight that hold whole integers of {bits} bits, got {codes.shape[0]}")
    inputs, outputs = (codes.shape[0] if awq else codes.shape[0] * 32 // bits), scale.shape[1]
    groups = 1 if group == -1 else -(-inputs // group)
    words = -(-outputs * bits // 32)
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "codes": (torch.int32, (inputs, words) if awq else (codes.shape[0], outputs)),
        "zero": (torch.int32, (groups, words)),
        "scale": (scale.dtype, (groups, outputs)),
    }
    if f"{stem}.g_idx" in entries and not awq:
        parts["columns"] = f"{stem}.g_idx"
        expected["columns"] = (torch.int32, (inputs,))
    if awq and outputs % 8:
        raise _UnfitError(f"expected output features in eights, got {outputs}")
    _check_parts(parts, expected, entries)
    packing: Packing = "awq" if awq else "gptq_v2" if _form("gptq", settings) == "gptq_v2" else "gptq"
    scheme = f"{'awq' if awq else 'gptq'}-int{bits}:{'rows' if group == -1 else group}:asymmetric"
    symmetric = not awq and settings.get("sym") is True
    return QuantisedTensor(
        f"{stem}.weight", (outputs, inputs), scale.dtype, scheme, packing, parts, symmetric=symmetric
    )


_SCALES = (torch.float16, torch.bfloat16, torch.float32)


def _check_parts(
    parts: Mapping[str, str],
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    entries: Mapping[str, TensorEntry],
) -> None:
    missing = [key for key in parts.values() if key not in entries]
    if missing:
        raise _UnfitError(f"expected {', '.join(missing)} beside it, got none")
    for name, (dtype, shape) in expected.items():
        entry = entries[parts[name]]
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise _UnfitError(
                f"expected {entry.name} to be {dtype} {list(shape)}, got {entry.dtype} {list(entry.shape)}"
            )


_METHODS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, TensorEntry]], Iterator[tuple[str, Make]]]] = {
    "bitsandbytes": _of_bitsandbytes,
    "gptq": _of_words,
    "awq": _of_words,
}

_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "bitsandbytes": (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", "__nf4", "__fp4"),
    "gptq": (".qweight", ".qzeros", ".scales", ".g_idx"),
    "awq": (".qweight", ".qzeros", ".scales"),
}
