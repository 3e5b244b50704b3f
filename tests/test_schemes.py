"""Quantisation schemes against the libraries that made them: bitsandbytes and torchao, bit for bit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional as bitsandbytes

from lora_fx.errors import LoraFxError
from lora_fx.numerics.schemes import CodebookScheme, UniformScheme, _dynamic_values, parse_scheme, scheme_text

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def of_bitsandbytes(dense: torch.Tensor, scheme: CodebookScheme) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the tensors that bitsandbytes makes of a weight, and the weight that it makes of them."""
    codes, state = bitsandbytes.quantize_4bit(
        dense, blocksize=scheme.blocksize, quant_type=scheme.codebook, compress_statistics=scheme.nested
    )
    tensors = {"codes": codes, "absmax": state.absmax}
    if scheme.nested:
        inner = {"nested_absmax": state.state2.absmax, "nested_map": state.state2.code, "offset": state.offset}
        tensors |= inner
    return tensors, bitsandbytes.dequantize_4bit(codes, state)


def weight(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a weight with a block of zeros, one of tiny values, exact entries of the tables, and both infinities of a table."""
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    rows = dense.view(-1)
    rows[:64], rows[64:128], rows[128:144] = 0, rows[64:128] * 1e-6, torch.linspace(-3, 3, 16)
    return dense.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_a_codebook_has_the_bits_of_bitsandbytes_both_ways(codebook, nested, dtype):
    for blocksize, shape in ((64, (192, 128)), (32, (33, 64)), (256, (520, 4096)), (4096, (3, 8192))):
        scheme = CodebookScheme(codebook, blocksize, nested)
        dense = weight(shape, dtype)
        theirs, back = of_bitsandbytes(dense, scheme)
        ours = scheme.quantise(dense)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name], tensor), (name, shape)
        assert torch.equal(scheme.dequantise(theirs, shape, dtype), back)
        assert torch.equal(scheme.dequantise(ours, shape, torch.float32).to(dtype), back)


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_blocks_that_cross_rows_are_right_where_the_kernel_of_bitsandbytes_for_the_cpu_is_not(codebook):
    dense = weight((96, 80), torch.float32)
    scheme = CodebookScheme(codebook)
    theirs, wrong = of_bitsandbytes(dense, scheme)
    ours = scheme.quantise(dense)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    table = bitsandbytes.get_4bit_type(codebook, device="cpu").double()
    codes = torch.stack((theirs["codes"].view(-1) >> 4, theirs["codes"].view(-1) & 15), 1).view(-1).long()
    exact = (table[codes] * theirs["absmax"].repeat_interleave(64).double()[: dense.numel()]).view(dense.shape)
    assert torch.equal(scheme.dequantise(ours, dense.shape, torch.float32), exact.float())
    # So this test can fail. Processors without AVX-512 have no such kernel, and bitsandbytes computes with torch there.
    assert ((wrong - exact).abs().max() > 0.5) == (torch.backends.cpu.get_cpu_capability() == "AVX512")


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7, 64), (0, 4)])
def test_sizes_that_no_block_divides_come_back(shape):
    dense = torch.randn(shape)
    for scheme in (CodebookScheme("nf4"), CodebookScheme("fp4", 32, nested=True)):
        tensors = scheme.quantise(dense)
        back = scheme.dequantise(tensors, shape, torch.float32)
        assert back.shape == dense.shape
        assert len(tensors["codes"]) == (dense.numel() + 1) // 2
        assert dense.numel() == 0 or ((back - dense).abs() <= 0.35 * dense.abs().max()).all()


@pytest.mark.parametrize("text", ["nf4", "nf4:double", "fp4:128", "nf4:double:32"])
@pytest.mark.parametrize("shape", [(3, 5), (67, 65), (300, 256)])
def test_some_elements_have_the_bits_of_the_whole(text, shape):
    dense, scheme = torch.randn(shape, dtype=torch.bfloat16), parse_scheme(text)
    tensors = scheme.quantise(dense)
    whole = scheme.dequantise(tensors, shape, torch.float32).view(-1)
    positions = torch.tensor([0, 2, len(whole) // 2, 2, len(whole) - 1])
    assert torch.equal(scheme.elements(tensors, positions), whole[positions])
    assert torch.equal(scheme.elements_quantised(dense, positions), whole[positions])


def test_more_than_one_part_is_the_same_as_one(monkeypatch):
    dense, scheme = torch.randn(130, 96), CodebookScheme("nf4", nested=True)
    whole = scheme.quantise(dense)
    for constant in ("_PART", "_CACHED_PART"):
        monkeypatch.setattr(f"lora_fx.numerics.schemes.{constant}", 128)
    parts = scheme.quantise(dense)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    back = {dtype: scheme.dequantise(parts, dense.shape, dtype) for dtype in (torch.float32, torch.bfloat16)}
    odd = scheme.dequantise(scheme.quantise(dense[:, :67]), (130, 67), torch.float32)
    monkeypatch.undo()
    for dtype, values in back.items():
        assert torch.equal(values, scheme.dequantise(whole, dense.shape, dtype))
    assert torch.equal(odd, scheme.dequantise(scheme.quantise(dense[:, :67]), (130, 67), torch.float32))


@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_are_the_nearest_of_their_steps(symmetric):
    row = torch.tensor([[-7.5, 3.0, 0.25, 7.5, 0.0, 0.0, 0.0, 0.0, 30.0, 1.0, -0.6, 0.4]])
    scheme = UniformScheme(4, 4, symmetric, "weight")
    tensors = scheme.quantise(row)
    if symmetric:  # a step is the largest magnitude / 7.5, and ties go to even
        assert tensors["codes"].tolist() == [[-8, 3, 0, 7, 0, 0, 0, 0, 7, 0, 0, 0]]
        assert tensors["scale"][0, [0, 2]].tolist() == [1.0, 4.0]
    else:  # a step is the width of the group / 15, and zero has a code of its own
        assert tensors["codes"].tolist() == [[-8, 3, 0, 7, -8, -8, -8, -8, 7, -8, -8, -8]]
        assert tensors["zero"].tolist() == [[0, -8, -8]]
    back = scheme.dequantise(tensors, row.shape, torch.float32)
    assert torch.equal(back[0, 4:8], torch.zeros(4))
    assert ((back - row).abs() <= tensors["scale"].repeat_interleave(4, 1)).all()


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_integers_have_the_bits_of_torchao_both_ways(dtype):
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

    cases = {
        "int8": Int8WeightOnlyConfig(),
        "int4:32": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        "int3:rows": IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerAxis(0)),
    }
    for text, config in cases.items():
        linear = torch.nn.Linear(96, 40, bias=False, dtype=dtype)
        linear.weight.data.copy_(weight((40, 96), dtype))
        linear.weight.data[5] = 0
        dense, scheme = linear.weight.detach().clone(), parse_scheme(text)
        quantize_(linear, config)
        theirs = linear.weight
        ours = scheme.quantise(dense)
        assert torch.equal(ours["codes"], theirs.qdata), text
        assert torch.equal(ours["scale"], theirs.scale.reshape(ours["scale"].shape)), text
        assert ours["scale"].dtype == theirs.scale.dtype
        assert torch.equal(scheme.dequantise(ours, dense.shape, dtype), theirs.dequantize()), text


@pytest.mark.matrix
def test_asymmetric_integers_have_the_bits_of_torchao():
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    dense, scheme = weight((24, 64), torch.float32) + 1.5, UniformScheme(4, 16, symmetric=False, scales="weight")
    scale, zero = choose_qparams_affine(dense, MappingType.ASYMMETRIC, (1, 16), torch.int8, -8, 7)
    codes = quantize_affine(dense, (1, 16), scale, zero, torch.int8, -8, 7)
    ours = scheme.quantise(dense)
    assert torch.equal(ours["codes"], codes)
    assert torch.equal(ours["scale"], scale)
    assert torch.equal(ours["zero"].int(), zero)
    back = scheme.dequantise(ours, dense.shape, torch.float32)
    assert ((back - dense).abs() <= 0.501 * scale.repeat_interleave(16, 1)).all()


def test_groups_that_are_not_consecutive_are_read_by_the_group_of_each_column():
    dense, scheme = torch.randn(6, 32), UniformScheme(4, 8)
    order = torch.randperm(32)
    tensors = scheme.quantise(dense[:, order])
    columns = torch.empty(32, dtype=torch.int32)
    columns[order] = torch.arange(32, dtype=torch.int32) // 8
    codes = torch.empty_like(tensors["codes"])
    codes[:, order] = tensors["codes"]
    shuffled = {"codes": codes, "scale": tensors["scale"], "columns": columns}
    expected = torch.empty_like(dense)
    expected[:, order] = scheme.dequantise(tensors, dense.shape, torch.float32)
    assert torch.equal(scheme.dequantise(shuffled, dense.shape, torch.float32), expected)


SCHEMES = {
    "nf4": CodebookScheme("nf4"),
    "nf4:double": CodebookScheme("nf4", nested=True),
    "fp4:128": CodebookScheme("fp4", 128),
    "fp4:double:4096": CodebookScheme("fp4", 4096, nested=True),
    "int8": UniformScheme(8),
    "int8:rows": UniformScheme(8, scales="weight"),
    "int4:64": UniformScheme(4, 64, scales="weight"),
    "int4:64:float32": UniformScheme(4, 64),
    "int2:16:asymmetric": UniformScheme(2, 16, symmetric=False, scales="weight"),
    "int8:asymmetric": UniformScheme(8, symmetric=False),
    "gptq-int4:128:asymmetric": UniformScheme(4, 128, symmetric=False, scales="weight", method="gptq"),
}


@pytest.mark.parametrize("text", SCHEMES)
def test_the_text_of_a_scheme_is_read_back_as_it(text):
    assert parse_scheme(text) == SCHEMES[text]
    assert scheme_text(SCHEMES[text]) == text


@pytest.mark.parametrize(
    "text", ["", "nf5", "nf4:63", "NF4", "nf4:double:double", "int9", "int1", "int4:0", "int4:64:", "nf4\n", "int4:٣"]
)
def test_a_text_of_no_scheme_is_refused_with_examples(text):
    with pytest.raises(LoraFxError, match=r"expected a way to quantise, nf4, nf4:double.*got "):
        parse_scheme(text)


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(LoraFxError, match="gptq chooses codes by more than the weight"):
        parse_scheme("gptq-int4:128").quantise(torch.randn(4, 128))
    with pytest.raises(LoraFxError, match=r"int4:64: expected a matrix with rows in groups of 64, got \(4, 96\)"):
        parse_scheme("int4:64").quantise(torch.randn(4, 96))
    with pytest.raises(LoraFxError, match="expected a codebook of nf4, fp4 and a blocksize"):
        CodebookScheme("nf4", 63)
    with pytest.raises(LoraFxError, match="expected 2 to 8 bits"):
        UniformScheme(9)


def test_another_default_dtype_changes_nothing() -> None:
    scheme = CodebookScheme("nf4", nested=True)
    dense = torch.randn(24, 64, generator=torch.Generator().manual_seed(4))
    _dynamic_values.cache_clear()
    expected = scheme.quantise(dense)
    value = scheme.dequantise(expected, dense.shape, torch.float32)
    for dtype in (torch.float64, torch.bfloat16):
        _dynamic_values.cache_clear()
        torch.set_default_dtype(dtype)
        try:
            found = scheme.quantise(dense)
            again = scheme.dequantise(expected, dense.shape, torch.float32)
        finally:
            torch.set_default_dtype(torch.float32)
        assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in expected.items()}
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert torch.equal(again, value)
