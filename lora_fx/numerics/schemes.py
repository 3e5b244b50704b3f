"""Quantisation schemes: how a dense weight becomes integer codes with scales, and what these stand for. In torch alone.

codebook   w ≈ table[code] · absmax              a block of consecutive elements shares absmax (NF4, FP4)
uniform    w ≈ (code − zero) · scale             a row, or a group of a row, shares scale and zero (int8, int4)

A scheme is data; its tensors are a dict of plain ones, so that what quantises a weight can be on disk as well as in a graph.
Dettmers et al., "QLoRA" (arXiv:2305.14314), describe NF4 and double quantisation; all bits here are those of bitsandbytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch.nn import functional

from lora_fx.errors import LoraFxError

Codebook = Literal["nf4", "fp4"]
Method = Literal["rounding", "hqq", "gptq", "awq"]

Part = tuple[tuple[int, ...], tuple[torch.dtype, ...]]
"""Shape and possible dtypes of a tensor of a scheme."""

_BYTES, _FLOAT32 = (torch.uint8,), (torch.float32,)
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""How many elements may share a scale in bitsandbytes."""

NESTED_BLOCKSIZE = 256
"""How many scales share one, where scales are quantised themselves; fixed in bitsandbytes."""

_TABLES: Mapping[Codebook, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}  # fmt: skip


@dataclass(frozen=True)
class CodebookScheme:
    """NF4 and FP4 of bitsandbytes: ``table[code] · absmax``, with one ``absmax`` for each block of consecutive elements.

    Tensors: ``codes``, uint8 of shape ``(⌈n / 2⌉, 1)`` for n elements, the first of two in the high bits; ``absmax``, float32 of shape
    ``(⌈n / blocksize⌉,)``. Nested: ``absmax`` is uint8, and stands for ``nested_map[absmax] · nested_absmax + offset``, with
    ``nested_map`` of 256 values, one ``nested_absmax`` for each 256 of them, and ``offset`` without dimensions, all float32.

    Attributes:
        codebook: the table of 16 values.
        blocksize: how many elements share a scale.
        nested: whether the scales are quantised too ("double quantisation").
    """

    codebook: Codebook
    blocksize: int = 64
    nested: bool = False

    def __post_init__(self) -> None:
        if self.codebook not in _TABLES or self.blocksize not in BLOCKSIZES:
            raise LoraFxError(
                f"expected a codebook of {', '.join(_TABLES)} and a blocksize of {', '.join(map(str, BLOCKSIZES))}, got "
                f"{self.codebook!r} and {self.blocksize!r}."
            )

    def quantise(self, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the codes and scales that stand for a weight; it may have any shape, and any floating-point dtype.

        Each element is divided by the largest magnitude of its block, and gets the nearest entry of the table; in between, the lower one.
        """
        flat = dense.detach().reshape(-1)
        codes = torch.empty((-(-flat.numel() // 2), 1), dtype=torch.uint8, device=flat.device)
        absmax = torch.empty(-(-flat.numel() // self.blocksize), dtype=torch.float32, device=flat.device)
        table = codebook_values(self.codebook).to(flat.device)
        order = table.argsort(stable=True)
        boundaries = _midpoints(table[order])
        order = order.to(torch.uint8)
        for part in _parts(flat.numel(), self.blocksize, _part_of(flat)):
            blocks = _in_blocks(flat[part].float(), self.blocksize)
            scale = blocks.abs().amax(1)
            blocks = blocks * (1.0 / scale.clamp(min=1e-38))[:, None]
            pairs = order[torch.bucketize(blocks, boundaries, out_int32=True)].view(-1, 2)
            stored = codes[part.start // 2 : -(-part.stop // 2), 0]
            stored.copy_((pairs[:, 0] << 4 | pairs[:, 1])[: len(stored)])
            absmax[part.start // self.blocksize :][: len(scale)] = scale
        return {"codes": codes, **(_nested(absmax) if self.nested else {"absmax": absmax})}

    def parts(self, shape: Sequence[int]) -> dict[str, Part]:
        """Return what the tensors for a matrix of a shape have to be, by their names."""
        blocks = -(-math.prod(shape) // self.blocksize)
        parts: dict[str, Part] = {"codes": ((-(-math.prod(shape) // 2), 1), _BYTES), "absmax": ((blocks,), _FLOAT32)}
        if self.nested:
            coarse = -(-blocks // NESTED_BLOCKSIZE)
            parts |= {"absmax": ((blocks,), _BYTES), "nested_absmax": ((coarse,), _FLOAT32)}
            parts |= {"nested_map": ((256,), _FLOAT32), "offset": ((), _FLOAT32)}
        return parts

    def absmax(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the scale of each block, in float32."""
        absmax = tensors["absmax"]
        if not self.nested:
            return absmax
        blocks = _in_blocks(tensors["nested_map"].index_select(0, absmax.int()), NESTED_BLOCKSIZE)
        blocks *= tensors["nested_absmax"][:, None]
        blocks += tensors["offset"]
        return blocks.view(-1)[: absmax.numel()]

    def dequantise(self, tensors: Mapping[str, torch.Tensor], shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return the dense weight of a shape that codes and scales stand for: computed in float32, and rounded to a dtype once."""
        absmax = self.absmax(tensors)[:, None]
        codes = tensors["codes"].reshape(-1)
        byte = torch.arange(256, device=codes.device)
        # Both values of a byte as one number of 64 bits: looked up at a tenth of the time of two rows of a table.
        table = codebook_values(self.codebook).to(codes.device)
        pairs = table[torch.stack((byte >> 4, byte & 15), 1)].view(torch.int64).view(-1)
        dense = torch.empty(math.prod(shape), dtype=dtype, device=codes.device)
        most = _part_of(codes)
        numbers = torch.empty(min(most // 2, len(codes)), dtype=torch.int32, device=codes.device)
        for part in _parts(dense.numel(), self.blocksize, most):
            own, values = codes[part.start // 2 : -(-part.stop // 2)], dense[part]
            scale = absmax[part.start // self.blocksize : -(-part.stop // self.blocksize)]
            index = numbers[: len(own)].copy_(own)
            if dtype == torch.float32 and len(values) % self.blocksize == 0:  # written where they belong
                torch.index_select(pairs, 0, index, out=values.view(torch.int64))
                blocks = values.view(-1, self.blocksize)
                blocks *= scale
            else:
                blocks = _in_blocks(pairs.index_select(0, index).view(torch.float32)[: len(values)], self.blocksize)
                blocks *= scale
                values.copy_(blocks.view(-1)[: len(values)])
        return dense.view(tuple(shape))

    def elements(self, tensors: Mapping[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
        """Return some elements, in float32, of the weight that codes and scales stand for; only their blocks are computed.

        Args:
            tensors: codes and scales.
            positions: of the elements, one after another, int64.
        """
        blocks, inverse = (positions // self.blocksize).unique(return_inverse=True)
        codes = _in_blocks(tensors["codes"].reshape(-1), self.blocksize // 2)[blocks]
        plain = CodebookScheme(self.codebook, self.blocksize)
        own = {"codes": codes, "absmax": self.absmax(tensors)[blocks]}
        values = plain.dequantise(own, (len(blocks), self.blocksize), torch.float32)
        return values.view(-1)[inverse * self.blocksize + positions % self.blocksize]

    def elements_quantised(self, dense: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return :meth:`elements` of what a weight becomes when it is quantised; only their blocks are, and the scales of all where nested."""
        rows = _in_blocks(dense.detach().reshape(-1), self.blocksize)
        blocks, inverse = (positions // self.blocksize).unique(return_inverse=True)
        plain = CodebookScheme(self.codebook, self.blocksize)
        tensors = plain.quantise(rows[blocks])
        if self.nested:
            scales = torch.cat([part.abs().amax(1).float() for part in rows.split(_PART // self.blocksize)])
            tensors["absmax"] = self.absmax(_nested(scales))[blocks]
        return plain.elements(tensors, inverse * self.blocksize + positions % self.blocksize)


@dataclass(frozen=True)
class UniformScheme:
    """Integers with a step for each row of a matrix, or for each group of a row: ``(code − zero) · scale``.

    Tensors: ``codes``, integers of shape ``(out, in)``; ``scale`` of shape ``(out, groups)``; ``zero`` of that shape where the scheme is not
    symmetric; and ``columns`` of shape ``(in,)``, the group of each input feature, where groups are not consecutive ones.

    Attributes:
        bits: of a code, 2 to 8.
        group: how many consecutive input features share a scale; None: all of them.
        symmetric: whether there is no zero point.
        scales: the dtype of the scales that :meth:`quantise` returns, and of its arithmetic: float32, as in torchao's Int8WeightOnlyConfig,
            or the weight's, as in its IntxWeightOnlyConfig.
        method: how the codes were chosen: to the nearest, as torchao does, or by an algorithm that takes more than the weight to repeat.
    """

    bits: int
    group: int | None = None
    symmetric: bool = True
    scales: Literal["float32", "weight"] = "float32"
    method: Method = "rounding"

    def __post_init__(self) -> None:
        if (
            not 2 <= self.bits <= 8
            or (self.group is not None and self.group < 1)
            or self.method not in get_args(Method)
        ):
            raise LoraFxError(
                f"expected 2 to 8 bits, a positive group and a method of {', '.join(get_args(Method))}, got {self.bits!r}, {self.group!r} and "
                f"{self.method!r}."
            )

    def quantise(self, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the codes, int8, and scales that stand for a matrix of shape ``(out, in)``, to the nearest as torchao does.

        Raises:
            LoraFxError: the method is another one, or groups do not divide a row.
        """
        if self.method != "rounding":
            raise LoraFxError(
                f"{scheme_text(self)}: {self.method} chooses codes by more than the weight, so nothing is quantised with it here. Start from "
                "the quantised checkpoint."
            )
        if dense.dim() != 2 or (self.group is not None and dense.shape[1] % self.group):
            raise LoraFxError(
                f"{scheme_text(self)}: expected a matrix with rows in groups of {self.group or 'any size'}, got {tuple(dense.shape)}."
            )
        dense = dense.detach()
        lowest, highest = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        groups = dense.reshape(len(dense), -1, self.group or dense.shape[1])
        least, largest = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
        limits = torch.finfo(torch.float32 if self.scales == "float32" else dense.dtype)
        floor = limits.eps if self.scales == "float32" else limits.smallest_normal
        span = torch.maximum(-least, largest) if self.symmetric else largest - least
        steps = (highest - lowest) / 2 if self.symmetric else float(highest - lowest)
        scale = (span / steps).clamp(min=floor)
        zero = None if self.symmetric else (lowest - torch.round(least / scale)).clamp(lowest, highest)
        scale = scale.float() if self.scales == "float32" else scale
        codes = torch.round(groups * (1.0 / scale))
        codes = (codes if zero is None else codes + zero).clamp(lowest, highest).to(torch.int8)
        found = {"codes": codes.view(dense.shape), "scale": scale[..., 0]}
        return found if zero is None else {**found, "zero": zero[..., 0].to(torch.int8)}

    def parts(self, shape: Sequence[int]) -> dict[str, Part]:
        """Return what the tensors for a matrix of a shape have to be, by their names; ``columns``, which only files have, is left out."""
        rows, columns = shape
        scales = rows, -(-columns // (self.group or max(1, columns)))
        parts: dict[str, Part] = {"codes": ((rows, columns), _INTEGERS), "scale": (scales, _FLOATS)}
        return parts if self.symmetric else {**parts, "zero": (scales, (*_INTEGERS, *_FLOATS))}

    def dequantise(self, tensors: Mapping[str, torch.Tensor], shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return the dense matrix that codes and scales stand for, rounded to a dtype.

        Codes and zero points are subtracted in that dtype, and the difference multiplied in the wider of it and the dtype of the scales.
        """
        scale, zero, columns = tensors["scale"], tensors.get("zero"), tensors.get("columns")
        if columns is not None:
            scale, zero = scale[:, columns], None if zero is None else zero[:, columns]
        dense = torch.empty(tuple(shape), dtype=dtype, device=scale.device)
        rows = max(1, _PART // max(1, shape[1])) if scale.is_cpu else max(1, shape[0])
        for start in range(0, shape[0], rows):
            part = slice(start, start + rows)
            codes = tensors["codes"][part].to(dtype).view(-1, scale.shape[1], shape[1] // scale.shape[1])
            if zero is not None:
                codes = codes - zero[part].to(dtype)[..., None]
            dense[part] = (codes * scale[part, :, None]).view(-1, shape[1])
        return dense


Scheme = CodebookScheme | UniformScheme


def scheme_text(scheme: Scheme) -> str:
    """Return what a scheme is called in files and on the command line, see :func:`parse_scheme`."""
    match scheme:
        case CodebookScheme(codebook, blocksize, nested):
            return ":".join([codebook, *(["double"] if nested else []), *([str(blocksize)] if blocksize != 64 else [])])
        case UniformScheme(bits, group, symmetric, scales, method):
            plain = scales == "float32" and group is None
            parts = [
                f"{'' if method == 'rounding' else f'{method}-'}int{bits}",
                *([] if plain else ["rows" if group is None else str(group)]),
                *([] if symmetric else ["asymmetric"]),
                *(["float32"] if scales == "float32" and not plain else []),
            ]
            return ":".join(parts)


def parse_scheme(text: str) -> Scheme:
    """Return the scheme of a text.

    ======================  ==============================================================================================
    ``nf4``, ``fp4``        bitsandbytes in 4 bits; ``nf4:double``: with quantised scales; ``nf4:128``: in blocks of 128
    ``int8``                a scale for each row, in float32: torchao's Int8WeightOnlyConfig
    ``int4:64``             groups of 64, ``int4:rows`` whole rows, scales in the weight's dtype: torchao's IntxWeightOnlyConfig
    ``int4:64:asymmetric``  with a zero point for each group; ``int4:64:float32``: with scales in float32
    ``gptq-int4:128``       made by another method than rounding: ``gptq-``, ``awq-``, ``hqq-``
    ======================  ==============================================================================================

    Raises:
        LoraFxError: it is the text of none.
    """
    if found := _CODEBOOK.fullmatch(text):
        codebook: Codebook = "nf4" if found[1] == "nf4" else "fp4"
        if (blocksize := int(found[3] or 64)) in BLOCKSIZES:
            return CodebookScheme(codebook, blocksize, found[2] is not None)
    elif found := _UNIFORM.fullmatch(text):
        method = _METHODS[found[1]]
        group = None if found[3] in (None, "rows") else int(found[3])
        scales: Literal["float32", "weight"] = "float32" if found[3] is None or found[5] else "weight"
        return UniformScheme(int(found[2]), group, found[4] is None, scales, method)
    raise LoraFxError(
        f"expected a way to quantise, nf4, nf4:double, fp4, int8 or int4:64 for example, got {text!r}. A number after nf4 and fp4 is one of "
        f"{', '.join(map(str, BLOCKSIZES))}."
    )


_METHODS: Mapping[str | None, Method] = {None: "rounding", "gptq-": "gptq", "awq-": "awq", "hqq-": "hqq"}
_CODEBOOK = re.compile(r"(nf4|fp4)(:double)?(?::([1-9][0-9]{0,3}))?")
_UNIFORM = re.compile(r"(gptq-|awq-|hqq-)?int([2-8])(?::(rows|[1-9][0-9]{0,6}))?(:asymmetric)?(:float32)?")


# The arithmetic of blocks.

_PART = 2**20  # elements in work at a time: of a whole weight, float32 and indices would take many times its memory


_CACHED_PART = 2**19  # few enough for all intermediate results to stay in the cache of a CPU


def _part_of(tensor: torch.Tensor) -> int:
    return _CACHED_PART if tensor.is_cpu else _PART


def _parts(elements: int, blocksize: int, most: int) -> Iterator[slice]:
    """Yield slices of whole blocks."""
    step = max(1, most // blocksize) * blocksize
    for start in range(0, elements, step):
        yield slice(start, min(start + step, elements))


def _in_blocks(flat: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Return elements as rows of a block each; the last one ends in zeros."""
    missing = -len(flat) % blocksize
    return (functional.pad(flat, (0, missing)) if missing else flat).view(-1, blocksize)


def codebook_values(codebook: Codebook) -> torch.Tensor:
    """Return the 16 values of a codebook, by code, in float32."""
    return torch.tensor(_TABLES[codebook], dtype=torch.float32)


def _midpoints(ascending: torch.Tensor) -> torch.Tensor:
    return (ascending[1:] + ascending[:-1]) / 2


def _nested(absmax: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantise scales to 8 bits around their mean.

    The kernel for the CPU of bitsandbytes first takes each value to the nearest of 65,536 steps, which decides differently where one is about
    halfway between two entries (15 of 10,000). Its kernels for CUDA do not.
    """
    offset = absmax.mean()
    table = dynamic_map().to(absmax.device)
    blocks = _in_blocks(absmax - offset, NESTED_BLOCKSIZE)
    scale = blocks.abs().amax(1)
    blocks = (blocks * (1 / scale)[:, None]).clamp(-1, 1)
    steps = ((blocks + 1) * 0.5 * 65535 + 0.5).int().float() / 65535 * 2 - 1
    codes = torch.bucketize(steps, _midpoints(table), out_int32=True)
    codes[scale == 0] = 0  # as there: whatever the code, it stands for zero
    codes = codes.to(torch.uint8).view(-1)[: absmax.numel()]
    return {"absmax": codes, "nested_absmax": scale, "nested_map": table, "offset": offset}


@cache
def _dynamic_values() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        magnitudes = 10.0 ** (exponent - 6) * _midpoints(bounds)
        values += [*magnitudes.tolist(), *(-magnitudes).tolist()]
    return tuple(sorted(values))


def dynamic_map() -> torch.Tensor:
    """Return the 256 values of the signed dynamic type of 8 bits (Dettmers, arXiv:1511.04561), ascending, in float32.

    Seven decades with 1 to 64 values of each sign, in the middles of equal intervals, then 0 and 1.
    """
    return torch.tensor(_dynamic_values(), dtype=torch.float32)
