"""The arithmetic of a merge against NumPy: in float64, or exact, and rounded once by integers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import peft
import pytest
import torch
from numpy.typing import NDArray
from peft.tuners import lora
from torch import nn

from lora_fx.numerics import lowrank_merge as lowrank
from lora_fx.numerics.factor_init import adapter_dtype, initial_factors
from lora_fx.numerics.lowrank_merge import FOLDABLE, Merge, Merged, measure, merge_into, rounded, surely_finite
from lora_fx.numerics.update import Factor, Update
from lora_fx.numerics.weight_view import SWAP, Step, View

Tensors = dict[str, torch.Tensor]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SWAPPED = View((SWAP,))
PAIR = (Factor("a"), Factor("b"))

# Oracles.


def half(exact: NDArray[np.float64], dtype: torch.dtype) -> NDArray[np.float64]:
    """Return values rounded to a half-precision type, to nearest, ties to even, by integers only: from the bits of float64."""
    digits, least, bias = {torch.bfloat16: (8, -126, 127), torch.float16: (11, -14, 15)}[dtype]
    bits = exact.view(np.uint64)
    exponent = ((bits >> np.uint64(52)) & np.uint64(0x7FF)).astype(np.int64)
    fraction = (bits & np.uint64(2**52 - 1)).astype(np.int64)
    power = np.maximum(exponent, 1) - 1023
    whole = fraction + np.where(exponent > 0, 2**52, 0)
    lost = np.minimum(53 - digits + np.maximum(least - power, 0), 60)  # how many bits do not fit
    kept, rest, tie = whole >> lost, whole & ((1 << lost) - 1), 1 << (lost - 1)
    kept = kept + ((rest > tie) | ((rest == tie) & (kept & 1 == 1)))
    with np.errstate(over="ignore"):
        value = np.ldexp(kept.astype(np.float64), lost + power - 52)
    value = np.where(value >= 2.0 ** (bias + 1), np.inf, value)
    return np.copysign(np.where(np.isfinite(exact), value, np.abs(exact)), exact)


def same(mine: torch.Tensor, oracle: NDArray[np.float64]) -> bool:
    """Tell whether all values are the same, also the signs of zeros."""
    values = mine.double().numpy()
    signs = (np.signbit(each[~np.isnan(oracle)]) for each in (values, oracle))
    return np.array_equal(values, oracle, equal_nan=True) and np.array_equal(*signs)


def whole_numbers(tensors: Mapping[str, tuple[int, ...]], seed: int = 3) -> Tensors:
    """Return tensors of small integers, so that all dtypes have every sum of their products exactly."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randint(-2, 3, shape, generator=generator).double() for n, shape in tensors.items()}


# Merges: shapes, what is asked, and the same written down in NumPy. Rank, rows, columns and the size of a stack all differ.

Numbers = dict[str, NDArray[np.float64]]


def _grouped(n: Numbers) -> NDArray[np.float64]:
    """Two groups: their channels in do not meet."""
    parts = [
        np.einsum("or,rikl->oikl", n["b"][3 * g : 3 * g + 3, :, 0, 0], n["a"][2 * g : 2 * g + 2]) for g in range(2)
    ]
    return np.concatenate(parts)


def _placed(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of a product where ``PLACES`` has them."""
    return np.stack([rows[place] if place < len(rows) else np.zeros_like(rows[0]) for place in PLACES])


PLACES = (3, 1, 0, 3, 2)
EXPERTS_A, EXPERTS_B = (
    View((Step("reshape", (2, 3, 7)),)),
    View((Step("reshape", (5, 3, 2)), Step("permute", (2, 0, 1)))),
)
GROUPS = View((Step("stack", (2,)),))
PLAIN = {"w": (5, 7), "a": (3, 7), "b": (5, 3)}

Case = tuple[dict[str, tuple[int, ...]], tuple[Update, ...], View, Callable[[Numbers], NDArray[np.float64]]]
CASES: dict[str, Case] = {
    "out_in": (PLAIN, (Update(PAIR, 0.5),), View(), lambda n: 0.5 * n["b"] @ n["a"]),
    "in_out": ({**PLAIN, "w": (7, 5)}, (Update(PAIR, -2.0),), SWAPPED, lambda n: -2 * (n["b"] @ n["a"]).T),
    "square in_out": (
        {"w": (4, 4), "a": (1, 4), "b": (4, 1)}, (Update(PAIR, 2.0),), SWAPPED, lambda n: 2 * (n["b"] @ n["a"]).T,
    ),
    "transposed factors": (
        {"w": (5, 7), "a": (7, 3), "b": (3, 5)},
        (Update((Factor("a", SWAPPED), Factor("b", SWAPPED)), 0.5),),
        View(),
        lambda n: 0.5 * n["b"].T @ n["a"].T,
    ),
    "experts out_in": (
        {"w": (2, 5, 7), "a": (6, 7), "b": (5, 6)},
        (Update((Factor("a", EXPERTS_A), Factor("b", EXPERTS_B)), 2.0),),
        View(),
        lambda n: 2 * np.einsum("eri,ore->eoi", n["a"].reshape(2, 3, 7), n["b"].reshape(5, 3, 2)),
    ),
    "experts in_out": (
        {"w": (2, 7, 5), "a": (6, 7), "b": (5, 6)},
        (Update((Factor("a", EXPERTS_A), Factor("b", EXPERTS_B)), 2.0),),
        SWAPPED,
        lambda n: 2 * np.einsum("eri,ore->eio", n["a"].reshape(2, 3, 7), n["b"].reshape(5, 3, 2)),
    ),
    "convolution of groups": (
        {"w": (6, 2, 3, 2), "a": (4, 2, 3, 2), "b": (6, 2, 1, 1)},
        (Update((Factor("a", GROUPS), Factor("b", GROUPS)), 0.5),),
        GROUPS,
        lambda n: 0.5 * _grouped(n),
    ),
    "one factor": ({"w": (5, 7), "a": (5, 7)}, (Update((Factor("a"),), -0.5),), View(), lambda n: -0.5 * n["a"]),
    "one factor in_out": ({"w": (7, 5), "a": (5, 7)}, (Update((Factor("a"),), 0.5),), SWAPPED, lambda n: 0.5 * n["a"].T),
    "three factors": (
        {"w": (5, 7), "a": (2, 7), "m": (3, 2), "b": (5, 3)},
        (Update((Factor("a"), Factor("m"), Factor("b")), 0.5),),
        View(),
        lambda n: 0.5 * n["b"] @ n["m"] @ n["a"],
    ),
    "scales": (
        {**PLAIN, "s": (), "t": (1,)},
        (Update(PAIR, 0.5, ("s", "t")),),
        View(),
        lambda n: 0.5 * n["s"] * n["t"].item() * n["b"] @ n["a"],
    ),
    "places": (
        {**PLAIN, "b": (3, 3)}, (Update(PAIR, 0.5, places="p"),), View(), lambda n: _placed(0.5 * n["b"] @ n["a"]),
    ),
    "places in_out": (
        {"w": (7, 5), "a": (2, 7), "b": (3, 2)},
        (Update(PAIR, 0.5, places="p"),),
        SWAPPED,
        lambda n: _placed(0.5 * n["b"] @ n["a"]).T,
    ),
    "places of one factor": (
        {"w": (5, 7), "a": (3, 7)}, (Update((Factor("a"),), 2.0, places="p"),), View(), lambda n: _placed(2 * n["a"]),
    ),
    "places of experts": (
        {"w": (2, 5, 7), "a": (2, 4, 7), "b": (2, 3, 4)},
        (Update(PAIR, 1.0, places="p"),),
        View(),
        lambda n: np.stack([_placed(b @ a) for a, b in zip(n["a"], n["b"], strict=True)]),
    ),
    "three updates": (
        {**PLAIN, "c": (1, 7), "d": (5, 1), "e": (5, 7)},
        (Update(PAIR, 0.5), Update((Factor("c"), Factor("d")), -1.0), Update((Factor("e"),), 2.0)),
        View(),
        lambda n: 0.5 * n["b"] @ n["a"] - n["d"] @ n["c"] + 2 * n["e"],
    ),
}  # fmt: skip


def _case(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, Merge, Tensors, NDArray[np.float64]]:
    """Return a weight, what is asked, the tensors that it names, and the weight that is to come out."""
    shapes, updates, view, delta = CASES[name]
    tensors = whole_numbers(shapes)
    tensors["w"] = torch.where(tensors["w"] == 0, 7.0, tensors["w"])  # zeros have signs, which are told apart elsewhere
    for scale in ("s", "t"):
        if scale in tensors:
            tensors[scale].fill_(-2.0 if scale == "s" else 1.5)
    numbers = {name: tensor.numpy() for name, tensor in tensors.items()}
    expected = numbers["w"] + delta(numbers)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()} | {"p": torch.tensor(PLACES)}
    return tensors["w"], Merge("w", ("w",), updates, view), tensors, expected + 0.0


@pytest.mark.parametrize("block", [1, 9, 20, 2**18])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_merge_is_what_numpy_computes_in_blocks_of_any_size(
    name: str, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "BLOCK_ELEMENTS", block)
    weight, merge, tensors, expected = _case(name, dtype)
    before, out = weight.clone(), torch.full_like(weight, 99)
    assert merge_into(weight, merge, tensors, out) == 0
    merged = measure(weight, merge, tensors, out)
    assert np.array_equal(out.double().numpy(), expected)
    assert out.dtype == dtype
    assert torch.equal(weight, before)
    delta = expected - before.double().numpy()
    assert merged.elements == np.count_nonzero(delta)
    assert merged.unchanged == 0
    assert merged.update_norm == pytest.approx(np.linalg.norm(delta), rel=1e-6)
    assert merged.weight_norm == pytest.approx(np.linalg.norm(before.double().numpy()), rel=1e-6)
    assert np.abs(delta).max() > 0
    assert merge_into(weight, merge, tensors, None) == 0  # nowhere to write to
    assert torch.equal(weight, before)
    assert merge_into(weight, merge, tensors, weight) == 0  # into itself
    assert torch.equal(weight, out)


@pytest.mark.parametrize("name", CASES)
def test_a_merge_of_any_numbers_is_that_of_numpy_in_float64(name: str) -> None:
    weight, merge, tensors, _ = _case(name, torch.float64)
    for tensor in (t for n, t in tensors.items() if n != "p"):
        tensor.copy_(torch.randn(tensor.shape, dtype=torch.float64))
    numbers = {name: tensor.numpy() for name, tensor in tensors.items()}
    out = torch.empty_like(weight)
    merge_into(weight, merge, tensors, out)
    expected = numbers["w"] + CASES[name][3](numbers)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=2e-15 * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_exact_blocks_are_the_sums_of_numpy_in_float64(name: str) -> None:
    weight, merge, tensors, _ = _case(name, torch.float64)
    numbers = {name: tensor.numpy() for name, tensor in tensors.items()}
    expected = merge.stack(torch.from_numpy(np.asarray(numbers["w"] + CASES[name][3](numbers))))
    found = torch.full_like(merge.stack(weight), torch.nan)
    for index, rows, exact in lowrank.exact_blocks(weight, merge, tensors):
        assert exact.dtype == torch.float64
        found[index, rows] = exact
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-15 * float(expected.abs().max()))


def test_exact_blocks_are_exact_for_factors_of_less_precision() -> None:
    weight, a = torch.randn(5, 7).bfloat16(), torch.randn(5, 7)
    merge = Merge("w", ("w",), (Update((Factor("a"),), 3.0),))
    ((_, _, exact),) = lowrank.exact_blocks(weight, merge, {"a": a})
    assert torch.equal(exact, weight.double() + 3.0 * a.double())
    (product,) = [
        lowrank.exact_blocks(
            weight, Merge("w", ("w",), (Update((Factor("a"), Factor("b"))),)), {"a": a[:2], "b": a[:, :2]}
        )
    ]
    ((_, _, exact),) = product
    assert torch.equal(exact, weight.double() + a[:, :2].double() @ a[:2].double())


def test_one_element_that_overflows_is_seen() -> None:
    weight = torch.zeros(3, 4, dtype=torch.float16)
    weight[1, 2] = 60000
    update = torch.zeros(3, 4)
    update[1, 2] = 10000
    merge = Merge("w", ("w",), (Update((Factor("a"),)),))
    assert merge_into(weight, merge, {"a": update}, None) == 1
    assert merge_into(weight, merge, {"a": update / 2}, None) == 0


@pytest.mark.parametrize("block", [1, 7, 36, 10**6])
def test_no_block_is_larger_than_asked_but_for_a_single_row(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "BLOCK_ELEMENTS", block)
    sizes = []
    block_of = lowrank._Product.block
    monkeypatch.setattr(lowrank._Product, "block", lambda *given: sizes.append(given[-1].numel()) or block_of(*given))
    merge_into(torch.ones(2, 5, 7), Merge("w", ("w",), (Update((Factor("a"),)),)), {"a": torch.ones(2, 5, 7)}, None)
    height = max(1, block // 7)
    rows = [min(height, 5 - start) for start in range(0, 5, height)]
    assert sizes == [7 * number for number in rows] * 2


def test_blocks_are_of_the_size_of_the_cache_on_the_cpu_and_large_on_other_devices() -> None:
    for device, height in (("cpu", 2**4), ("meta", 2**12)):
        stack = torch.empty(1, 1, 1, device=device).expand(2, 2**14, 2**13)
        blocks = list(lowrank._blocks(stack))
        assert blocks[0] == (0, slice(0, height))
        assert blocks[-1] == (1, slice(2**14 - height, 2**14))


def test_blocks_are_about_equal() -> None:
    stack = torch.empty(1, 1, 1).expand(1, 289, 1365)
    assert [rows.stop - rows.start for _, rows in lowrank._blocks(stack)] == [73, 73, 73, 70]


def test_a_weight_without_elements_is_left_as_it_is() -> None:
    for shape in ((0, 4), (4, 0)):
        merge, tensors = Merge("w", ("w",), (Update((Factor("a"),)),)), {"a": torch.empty(shape)}
        assert merge_into(torch.empty(shape), merge, tensors, torch.empty(shape)) == 0
        assert measure(torch.empty(shape), merge, tensors, torch.empty(shape)) == Merged()


# Random merges.

FACTORS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random_merge(seed: int) -> tuple[torch.Tensor, Merge, Tensors]:
    """Return a merge of small whole numbers and zeros of both signs, of which all dtypes have every sum exactly.

    Dtype, layout, stack, strides, number and kind of updates, scalings and places are drawn.
    """
    source, values = np.random.default_rng(seed), torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        numbers = torch.randint(-2, 3, shape, generator=values).float()
        zeros = torch.rand(shape, generator=values) < source.choice([0.0, 0.5, 1.0], p=[0.5, 0.4, 0.1])
        numbers[zeros] = source.choice([0.0, -0.0])
        return numbers.mT.contiguous().mT if source.random() < 0.3 else numbers  # columns one behind the other

    rows, columns, rank = (int(source.integers(1, most)) for most in (30, 40, 6))
    stack = () if source.random() < 0.7 else (2,)
    swapped = bool(source.random() < 0.4)
    tensors: Tensors = {}
    updates = []
    for number in range(int(source.integers(1, 4))):
        placed = source.random() < 0.2
        height = int(source.integers(1, rows + 1)) if placed else rows
        shapes = [[(height, columns)], [(rank, columns), (height, rank)], [(rank, columns), (2, rank), (height, 2)]]
        factors = []
        for place, shape in enumerate(shapes[int(source.integers(3))]):
            name = f"{number}.{place}"
            tensors[name] = draw(*stack, *shape).to(FACTORS[int(source.integers(4))])
            factors.append(Factor(name))
        scales, places = (), None
        if source.random() < 0.2:
            tensors[f"{number}.scale"] = torch.tensor(float(source.choice([0.5, 3.0, -1.0])))
            scales = (f"{number}.scale",)
        if placed:
            tensors[f"{number}.places"] = torch.randint(0, height + 1, (rows,), generator=values)
            places = f"{number}.places"
        scaling = float(source.choice([1.0, 2.0, 0.5, -1.0, 3.0, 0.0]))
        updates.append(Update(tuple(factors), scaling, scales, places))
    weight = draw(*stack, *((columns, rows) if swapped else (rows, columns))).to(DTYPES[int(source.integers(4))])
    return weight, Merge("w", ("w",), tuple(updates), SWAPPED if swapped else View()), tensors


def _by_numpy(weight: torch.Tensor, merge: Merge, tensors: Tensors) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sum of the updates and the merged weight in float64; an element to which zero is added keeps its sign."""
    old = weight.double().numpy()
    total = np.zeros_like(old)
    for update in merge.updates:
        factors = [tensors[factor.name].double().numpy() for factor in update.factors]
        product = factors[0]
        for factor in factors[1:]:
            product = factor @ product
        if update.places is not None:
            padded = np.concatenate([product, np.zeros_like(product[..., :1, :])], axis=-2)
            product = padded[..., tensors[update.places].numpy(), :]
        scale = update.scaling * math.prod(float(tensors[name]) for name in update.scales)
        total += scale * (product.swapaxes(-2, -1) if merge.layout == "in_out" else product)
    return total, np.where(total == 0, old, old + total)


@pytest.mark.parametrize("block", [7, 64, 2**17])
def test_random_merges_give_the_bits_of_an_exact_sum_rounded_once(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest is that of the results of the merge that counted as it went, before the report was computed apart."""
    monkeypatch.setattr(lowrank, "BLOCK_ELEMENTS", block)
    digest = hashlib.sha256()
    for seed in range(600):
        weight, merge, tensors = random_merge(seed)
        delta, wanted = _by_numpy(weight, merge, tensors)
        out = torch.empty_like(weight)
        assert merge_into(weight, merge, tensors, out) == 0
        rounded_once = half(wanted, weight.dtype) if weight.dtype.itemsize == 2 else wanted
        assert same(out, rounded_once), seed
        figures = measure(weight, merge, tensors, out)
        lost = (delta != 0) & (rounded_once == weight.double().numpy())
        assert (figures.elements, figures.unchanged) == (np.count_nonzero(delta), np.count_nonzero(lost))
        assert figures.update_norm == pytest.approx(np.linalg.norm(delta), rel=1e-6)
        assert surely_finite(weight, merge, tensors)
        assert merge_into(weight, merge, tensors, weight) == 0  # into itself
        bits = lowrank.BITS[weight.dtype]
        assert torch.equal(weight.view(bits), out.view(bits))
        digest.update(out.contiguous().view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == "c79cfd1b952a2c251196fca02c81a4e09456f97db5b299bf4ae4c4ec29723e38"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_exclude_infinities_only_where_there_is_none(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    merge, plain = Merge("w", ("w",), (Update(PAIR, 0.5, ("s",)),)), {"s": torch.tensor(2.0)}
    pair = {"a": torch.full((3, 7), 0.25), "b": torch.full((5, 3), 0.25)}
    weight = torch.ones(5, 7, dtype=dtype)
    assert surely_finite(weight, merge, {**pair, **plain})
    for bad in (math.nan, math.inf, largest):
        for name in ("w", "a", "b", "s"):
            tensors = {name: tensor.double() for name, tensor in {**pair, **plain, "w": weight}.items()}
            tensors[name].view(-1)[-1] = bad
            assert not surely_finite(tensors["w"].to(dtype), merge, tensors), (name, bad)
    assert not surely_finite(torch.full((5, 7), largest / 8, dtype=dtype), merge, {**pair, **plain})
    assert surely_finite(torch.full((5, 7), largest**0.25, dtype=dtype), merge, {**pair, **plain})


def test_norms_take_a_product_for_no_smaller_than_what_it_is_computed_from() -> None:
    """A large product of two factors overflows also where a third, a small scaling, would make it small again."""
    merge = Merge("w", ("w",), (Update((*PAIR, Factor("c")), 1e-30),))
    tensors = {"a": torch.full((2, 4), 1e-20), "b": torch.full((3, 2), 1e20), "c": torch.full((5, 3), 1e25)}
    assert merge_into(torch.ones(5, 4), merge, tensors, None) == 20
    assert not surely_finite(torch.ones(5, 4), merge, tensors)


# Where the result goes.


def _memory(kind: str) -> tuple[torch.Tensor, Merge, Tensors]:
    if kind == "channels last":
        weight, merge, tensors, _ = _case("convolution of groups", torch.float32)
        return weight.contiguous(memory_format=torch.channels_last), merge, tensors
    weight, merge, tensors, _ = _case("in_out" if kind == "in_out" else "out_in", torch.float32)
    return (weight.T.contiguous().T if kind == "transposed" else weight), merge, tensors


@pytest.mark.parametrize("kind", ["out_in", "in_out", "transposed", "channels last"])
def test_a_weight_is_merged_into_where_it_lies_however_that_is(kind: str) -> None:
    weight, merge, tensors = _memory(kind)
    expected, place, strides = torch.empty_like(weight), weight.data_ptr(), weight.stride()
    merge_into(weight, merge, tensors, expected)
    assert expected.stride() == strides
    assert not torch.equal(expected, weight)
    merge_into(weight, merge, tensors, weight)
    assert torch.equal(weight, expected)
    assert (weight.data_ptr(), weight.stride()) == (place, strides)


@pytest.mark.parametrize("kind", ["out_in", "channels last"])
def test_gradients_play_no_part(kind: str) -> None:
    weight, merge, tensors = _memory(kind)
    expected = torch.empty_like(weight)
    merge_into(weight, merge, tensors, expected)
    trained = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()}
    out = torch.empty_like(weight)
    merge_into(nn.Parameter(weight), merge, trained, out)
    assert torch.equal(out, expected)
    assert not out.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_element_without_an_update_keeps_its_bits(dtype: torch.dtype) -> None:
    """Also the sign of a zero, which an addition of zero would lose, and what is in a NaN."""
    weight = torch.tensor([[-0.0, 0.0, math.nan, math.inf, 3.0], [-0.0, 1.0, 1.0, 1.0, 1.0]], dtype=dtype)
    bits = lowrank.BITS[dtype]
    weight[0, 2].view(bits).add_(1)
    tensors = {"a": torch.tensor([[0.0, 0, 0, 0, 0], [0, 0, 0, 2, -1]])}
    out = torch.empty_like(weight)
    merge = Merge("w", ("w",), (Update((Factor("a"),)),))
    non_finite = merge_into(weight, merge, tensors, out)
    merged = measure(weight, merge, tensors, out)
    kept = tensors["a"] == 0
    assert torch.equal(out.view(bits)[kept], weight.view(bits)[kept])
    assert out[1, 3:].tolist() == [3, 0]
    assert (merged.elements, merged.unchanged, non_finite) == (2, 0, 2)


# Precision.


def _sum(weight: float, dtype: torch.dtype, *updates: float) -> float:
    tensors = {f"u{i}": torch.tensor([[update]], dtype=torch.float64) for i, update in enumerate(updates)}
    merge = Merge("w", ("w",), tuple(Update((Factor(name),)) for name in tensors))
    out = torch.empty(1, 1, dtype=dtype)
    merge_into(torch.tensor([[weight]], dtype=dtype), merge, tensors, out)
    return out.item()


@pytest.mark.parametrize(
    ("dtype", "updates", "expected"),
    [
        pytest.param(torch.float64, (2.0**-52,), 1 + 2.0**-52, id="float64 in float64"),
        pytest.param(torch.float16, (2.0**-11, 2.0**-40), 1 + 2.0**-10, id="float16 in float64"),
        pytest.param(torch.bfloat16, (2.0**-8 + 2.0**-20,), 1 + 2.0**-7, id="bfloat16 in more than bfloat16"),
        pytest.param(torch.bfloat16, (2.0**-8, 2.0**-40), 1.0, id="bfloat16 in float32"),
        pytest.param(torch.float32, (2.0**-24, 2.0**-50), 1.0, id="float32 in float32"),
        pytest.param(torch.bfloat16, (1.5 * 2.0**-9,) * 2, 1 + 2.0**-7, id="bfloat16, all updates in one rounding"),
        pytest.param(torch.float16, (1.5 * 2.0**-12,) * 2, 1 + 2.0**-10, id="float16, all updates in one rounding"),
        pytest.param(
            torch.float16, (1000.0, -1000.0 + 2.0**-10), 1 + 2.0**-10, id="float16, the update in one rounding"
        ),
        pytest.param(torch.float16, (65504.0, 65504.0, -131007.0), 2.0, id="float16, no overflow in between"),
    ],
)
def test_one_plus_these_updates_is_formed_in_this_precision_and_rounded_once(
    dtype: torch.dtype, updates: tuple[float, ...], expected: float
) -> None:
    assert _sum(1.0, dtype, *updates) == expected


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2.0**-24), (torch.float64, 2.0**-53)], ids=str)
def test_factors_in_half_precision_are_multiplied_in_more(dtype: torch.dtype, unit: float) -> None:
    a = torch.rand(3, 7).add(1).bfloat16()
    b = torch.rand(5, 3).add(1).half()
    out = torch.empty(5, 7, dtype=dtype)
    merge_into(torch.zeros(5, 7, dtype=dtype), Merge("w", ("w",), (Update(PAIR, 0.1),)), {"a": a, "b": b}, out)
    expected = 0.1 * b.double().numpy() @ a.double().numpy()
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=8 * unit, atol=0)


# What is told.


def test_an_update_names_its_factors_scales_and_places() -> None:
    assert Update(PAIR).names == ("a", "b")
    assert Update((Factor("b"), Factor("a")), 2.0, ("s", "t"), "p").names == ("b", "a", "s", "t", "p")
    assert (Update(PAIR).scaling, Update(PAIR).scales, Update(PAIR).places) == (1.0, (), None)


@pytest.mark.parametrize(
    ("view", "layout", "shape", "stacked"),
    [
        (View(), "out_in", (5, 7), (1, 5, 7)),
        (SWAPPED, "in_out", (5, 7), (1, 5, 7)),
        (View(), "out_in", (2, 5, 7), (2, 5, 7)),
        (SWAPPED, "in_out", (2, 5, 7), (2, 5, 7)),
        (GROUPS, "out_in", (6, 2, 3, 2), (2, 3, 12)),
    ],
)
def test_a_weight_is_a_stack_of_matrices_as_they_are_stored(
    view: View, layout: str, shape: tuple[int, ...], stacked: tuple[int, ...]
) -> None:
    merge, weight = Merge("w", ("w", "v"), (), view), nn.Parameter(torch.randn(shape))
    stack = merge.stack(weight)
    assert merge.layout == layout
    assert torch.equal(stack, weight.detach().reshape(stacked))
    assert stack.data_ptr() == weight.data_ptr()
    assert not stack.requires_grad


SUM = Merge("w", ("w",), (Update((Factor("u"),)),))


def _told(weight: torch.Tensor, update: torch.Tensor) -> Merged:
    out = torch.empty_like(weight)
    merge_into(weight, SUM, {"u": update}, out)
    return measure(weight, SUM, {"u": update}, out)


def _non_finite(weight: torch.Tensor, update: torch.Tensor) -> int:
    return merge_into(weight, SUM, {"u": update}, None)


def test_what_is_told_of_a_merge_counts_elements_and_measures_norms() -> None:
    weight = torch.tensor([[1.0, 1, 1, 1], [0, 3, 0, 2]], dtype=torch.bfloat16)
    update = torch.tensor([[2.0**-10, 0, 2.0**-3, math.inf], [0, 1e-9, -0.0, math.nan]])
    merged = _told(weight, update)
    assert (merged.elements, merged.unchanged, _non_finite(weight, update)) == (5, 2, 2)
    merged = _told(weight, torch.tensor([[3.0, 0, 0, 0], [0, 4, 0, 0]]))
    assert merged == Merged(2, 0, 5.0, pytest.approx(math.sqrt(17)))  # type: ignore[arg-type]
    assert merged.relative == pytest.approx(5 / math.sqrt(17))


def test_what_is_not_finite_is_counted_in_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "BLOCK_ELEMENTS", 4)
    update = torch.zeros(3, 4)
    update[0, 1] = update[2, 2] = update[2, 3] = math.inf
    assert _non_finite(torch.ones(3, 4), update) == 3


def test_an_update_of_which_the_square_is_too_small_for_its_dtype_is_one() -> None:
    merged = _told(torch.zeros(1, 4), torch.tensor([[1e-30, 0.0, -1e-30, 2.0]]))
    assert (merged.elements, merged.unchanged, merged.update_norm) == (3, 0, 2.0)


@pytest.mark.parametrize("block", [1, 3, 2**15])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_kept_its_value_is_counted_in_weights_of_any_size(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "BLOCK_ELEMENTS", block)
    for columns in (1, 2, 3, 4, 5, 7, 31, 32):
        weight, update = torch.ones(3, columns, dtype=dtype), torch.full((3, columns), 2.0**-60)
        update[1] = 1.0
        assert _told(weight, update).unchanged == 2 * columns


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_but_finite_values_are_not_taken_for_infinite_ones(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    weight = torch.full((2, 8), largest, dtype=dtype)
    assert _non_finite(weight, torch.full((2, 8), -1.0)) == 0
    assert _non_finite(weight, torch.full((2, 8), largest, dtype=dtype)) == 16
    weight[1] *= -1
    update = torch.zeros(2, 8, dtype=dtype)
    update[:, 3] = torch.tensor([largest, -largest])
    assert _non_finite(weight, update) == 2  # one infinity of each sign


def test_the_size_of_an_update_is_told_as_a_part_of_that_of_the_weight() -> None:
    assert Merged(30, 5, 5.0, 13.0).relative == 5 / 13
    assert Merged(update_norm=1.0).relative == math.inf
    assert Merged(1, 0, 0.0, 2.0).relative == 0


def test_every_floating_point_dtype_of_torch_that_has_an_arithmetic_can_be_merged_into() -> None:
    assert frozenset(DTYPES) == FOLDABLE


# Rounding.


def _spread(dtype: torch.dtype) -> NDArray[np.float64]:
    """Values of every size around those that a half-precision type has: random ones, ties, and neighbours of ties."""
    source = np.random.default_rng(1)
    low, high = {torch.float16: (-27, 18), torch.bfloat16: (-136, 130)}[dtype]
    random = source.uniform(1, 2, 200_000) * np.exp2(source.integers(low, high, 200_000).astype(float))
    grid = np.arange(2**15, dtype=np.int16)
    values = torch.from_numpy(grid).view(dtype).double().numpy()  # all that the type has
    values = values[np.isfinite(values)]
    ties = (values[1:] + values[:-1]) / 2
    near = np.concatenate([np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf), ties * (1 + 2.0**-40)])
    last = torch.finfo(dtype).max
    over = np.array([last, last * (1 + 2.0**-30), 2.0 * last, 1e300, np.inf, np.nan])
    under = np.array([0.0, 5e-324, 1e-300, 1e-46, 1e-45, 1e-40])
    f32 = np.array([torch.finfo(torch.float32).max, np.nextafter(torch.finfo(torch.float32).max, np.inf)])
    every = np.concatenate([random, values, ties, near, over, under, f32])
    return np.concatenate([every, -every])


def test_the_oracle_of_integers_is_that_of_numpy_where_numpy_has_one() -> None:
    values = _spread(torch.float16)
    with np.errstate(over="ignore"):
        assert np.array_equal(half(values, torch.float16), values.astype(np.float16).astype(float), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float64_is_rounded_once_to_nearest_with_ties_to_even(dtype: torch.dtype) -> None:
    values = _spread(dtype)
    mine = rounded(torch.from_numpy(values), dtype)
    assert mine.dtype == dtype
    assert same(mine, half(values, dtype))
    assert not same(torch.from_numpy(values).to(dtype), half(values, dtype))


@pytest.mark.parametrize("sign", [1, -1])
def test_torch_itself_rounds_float64_twice_which_is_why(sign: int) -> None:
    value = sign * (1 + 2.0**-11 + 2.0**-30)  # above a tie of float16, by less than float32 has
    assert torch.tensor(value, dtype=torch.float64).half().item() == sign
    assert np.float64(value).astype(np.float16) == sign * (1 + 2.0**-10)
    assert rounded(torch.tensor(value, dtype=torch.float64), torch.float16).item() == sign * (1 + 2.0**-10)


@pytest.mark.parametrize("source", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_other_conversions_are_those_of_torch_and_the_argument_stays(
    source: torch.dtype, dtype: torch.dtype
) -> None:
    value = torch.randn(3, 4, dtype=source)
    before = value.clone()
    mine = rounded(value, dtype)
    assert (mine.dtype, mine.shape) == (dtype, value.shape)
    assert torch.equal(value, before)
    if dtype in (torch.float32, torch.float64) or source == torch.float32:
        assert torch.equal(mine, value.to(dtype))


# How factors start.

RANK = 3


def _layer(op: str, dtype: torch.dtype, init: bool | str) -> tuple[nn.Module, list[torch.Tensor]]:
    """Return a layer, and A and B as PEFT makes them beside it under seed 5."""
    base: Any
    if op == "linear":
        base, kind = nn.Linear(6, 10), lora.Linear
    elif op == "conv2d":
        base, kind = nn.Conv2d(6, 10, (3, 2), groups=1), lora.Conv2d
    else:
        base, kind = nn.Embedding(11, 10), lora.Embedding
    base = base.to(dtype)
    config = peft.LoraConfig(r=RANK, init_lora_weights=init)  # type: ignore[arg-type]
    torch.manual_seed(5)
    made = kind(base, "default", config=config, r=RANK, lora_alpha=1, init_lora_weights=init)
    factors = [p for name, p in made.named_parameters() if "lora_" in name]
    return base, [factor.detach() for factor in factors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("op", "init"),
    [
        ("linear", "kaiming"),
        ("linear", "gaussian"),
        ("conv2d", "kaiming"),
        ("conv2d", "gaussian"),
        ("embedding", "kaiming"),
    ],
)
def test_under_equal_seeds_factors_start_as_those_of_peft(op: Any, init: Any, dtype: torch.dtype) -> None:
    base, theirs = _layer(op, dtype, True if init == "kaiming" else init)
    torch.manual_seed(5)
    mine = initial_factors(tuple(t.shape for t in theirs), RANK, base.weight, op=op, init=init)  # type: ignore[arg-type]
    drawn = torch.get_rng_state()
    _layer(op, dtype, True if init == "kaiming" else init)
    assert torch.equal(torch.get_rng_state(), drawn)  # what is drawn next is the same too
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    for factor, other in zip(mine, theirs, strict=True):
        assert isinstance(factor, nn.Parameter)
        assert factor.requires_grad
        assert factor.dtype == wide
        assert torch.equal(factor, other.to(wide))
    random, zero = mine if op != "embedding" else reversed(mine)
    assert not zero.any()
    assert bool(random.all())
    if init == "gaussian":
        large = initial_factors(((RANK, 40_000), (2, RANK)), RANK, base.weight, init="gaussian")
        assert float(large[0].detach().std()) == pytest.approx(1 / RANK, rel=0.02)


def test_by_default_factors_are_those_of_a_linear_kaiming_uniform() -> None:
    like = torch.empty(10, 6)
    torch.manual_seed(5)
    default = initial_factors(((RANK, 6), (10, RANK)), RANK, like)
    torch.manual_seed(5)
    explicit = initial_factors(((RANK, 6), (10, RANK)), RANK, like, computed=None, op="linear", init="kaiming")
    assert all(map(torch.equal, default, explicit))
    bound = 1 / math.sqrt(6)
    assert 0.5 * bound < float(default[0].detach().abs().max()) <= bound


@pytest.mark.parametrize(
    ("stored", "computed", "factors"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.bfloat16, torch.float64, torch.float64),
        (torch.float64, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_factors_have_the_dtype_that_is_computed_in_and_the_values_of_the_stored_one(
    stored: torch.dtype, computed: torch.dtype | None, factors: torch.dtype
) -> None:
    torch.manual_seed(5)
    a, b = initial_factors(((RANK, 6), (10, RANK)), RANK, torch.empty(10, 6, dtype=stored), computed=computed)
    torch.manual_seed(5)
    plain, _ = initial_factors(((RANK, 6), (10, RANK)), RANK, torch.empty(10, 6))
    assert (a.dtype, b.dtype) == (factors, factors)
    assert torch.equal(a, plain.to(stored).to(factors))


def test_factors_are_drawn_on_the_cpu_and_moved_to_the_device_of_the_weight() -> None:
    before = torch.get_rng_state()
    a, b = initial_factors(((RANK, 6), (10, RANK)), RANK, torch.empty(10, 6, device="meta"))
    assert a.is_meta
    assert b.is_meta
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("computed", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_factors_beside_half_precision_are_float32(computed: torch.dtype, expected: torch.dtype) -> None:
    assert adapter_dtype(computed) == expected
