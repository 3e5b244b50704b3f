from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import unchanged
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig

from lora_fx.errors import RuleError
from lora_fx.example_rules import AXES, ELEMENTS, evaluate, parse_size, rule_inputs
from lora_fx.rules.rule_file import RuleSet, load
from lora_fx.tracing.example_inputs import BATCH, SEQUENCE, TARGET_SEQUENCE

CPU = torch.device("cpu")
LENGTHS = dict(zip(AXES, (BATCH, SEQUENCE, TARGET_SEQUENCE), strict=True))
CONFIG = SimpleNamespace(
    size=30, vision=SimpleNamespace(image_size=16, sizes=[1, 2]), rope={"dim": 4}, nothing=None, zero=0
)


def rules(**inputs: Any) -> RuleSet:
    return load({"select": [{"target": ["q"]}], "inputs": inputs})


def test_inputs_are_made_as_the_rules_say() -> None:
    said = rules(
        input_ids={"shape": ["batch", "sequence"], "below": "config.size // 2"},
        bbox={"shape": [" batch ", "sequence", 4], "below": 7},
        decoder={"shape": ["batch", "target_sequence"], "fill": 5},
        pixel_values={"shape": ["batch", 3, "config.vision.image_size", "sequence + 1"], "dtype": "float"},
        bias={"shape": ["batch*2"], "dtype": "float", "fill": 0.5},
        mask={"shape": ["sequence", "sequence"], "dtype": "bool"},
        seen={"shape": ["batch"], "dtype": "bool", "fill": False},
        flag=True,
        count=2,
        rate=0.5,
        mode="text",
    )
    values, axes = rule_inputs(said, CONFIG, torch.bfloat16, CPU)
    assert {name: (tuple(v.shape), v.dtype) for name, v in values.items() if isinstance(v, torch.Tensor)} == {
        "input_ids": ((BATCH, SEQUENCE), torch.int64),
        "bbox": ((BATCH, SEQUENCE, 4), torch.int64),
        "decoder": ((BATCH, TARGET_SEQUENCE), torch.int64),
        "pixel_values": ((BATCH, 3, 16, SEQUENCE + 1), torch.bfloat16),
        "bias": ((2 * BATCH,), torch.bfloat16),
        "mask": ((SEQUENCE, SEQUENCE), torch.bool),
        "seen": ((BATCH,), torch.bool),
    }
    assert axes == {
        "input_ids": ("batch", "sequence"),
        "bbox": ("batch", "sequence", None),
        "decoder": ("batch", "target_sequence"),
        "pixel_values": ("batch", None, None, None),
        "bias": (None,),
        "mask": ("sequence", "sequence"),
        "seen": ("batch",),
    }
    assert {name: values[name] for name in ("flag", "count", "rate", "mode")} == {
        "flag": True,
        "count": 2,
        "rate": 0.5,
        "mode": "text",
    }
    assert 0 <= values["input_ids"].min() < values["input_ids"].max() < 15
    assert values["bbox"].max() < 7
    assert [values[name].unique().tolist() for name in ("decoder", "bias", "mask", "seen")] == [
        [5],
        [0.5],
        [False, True],
        [False],
    ]
    assert list(values) == list(said.inputs)


def test_inputs_are_the_same_each_time_and_leave_the_random_state_alone() -> None:
    said = rules(x={"shape": ["batch", 50], "below": 1000}, y={"shape": [50], "dtype": "float"})
    with unchanged(torch.nn.Module()):
        first, _ = rule_inputs(said, CONFIG, torch.float32, CPU)
    second, _ = rule_inputs(said, CONFIG, torch.float32, CPU)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(first["x"].unique()) > 50


def test_inputs_go_to_the_device_and_no_inputs_are_none() -> None:
    values, _ = rule_inputs(rules(x={"shape": [2], "fill": 1}), CONFIG, torch.float16, torch.device("meta"))
    assert values["x"].device.type == "meta"
    with torch.device("meta"):
        values, _ = rule_inputs(rules(x={"shape": [2], "below": 9}), CONFIG, torch.float16, CPU)
    assert values["x"].device.type == "cpu"
    assert rule_inputs(rules(), None, torch.float32, CPU) == ({}, {})
    large, _ = rule_inputs(rules(x={"shape": [1], "dtype": "float", "fill": 1e300}), CONFIG, torch.float16, CPU)
    assert large["x"].isinf().all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (5, 5),
        ("5", 5),
        ("sequence", SEQUENCE),
        ("1 + 2 * 3", 7),
        ("100 - 7 // 2 - 1", 96),
        ("7 // 2 * 2", 6),
        ("2*7//2", 7),
        ("config.size//config.rope.dim + batch", 7 + BATCH),
        ("target_sequence * config.vision.image_size", TARGET_SEQUENCE * 16),
        ("  config.size ", 30),
    ],
)
def test_sizes(size: int | str, expected: int) -> None:
    assert evaluate(size, LENGTHS, CONFIG) == expected


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["+", "-", "*", "//"]), st.integers(1, 30)), max_size=6), st.integers(1, 30))
def test_sizes_are_computed_as_in_python(others: list[tuple[str, int]], first: int) -> None:
    text = " ".join([str(first), *(f"{operator} {term}" for operator, term in others)])
    expected = eval(text)
    if expected >= 1:
        assert evaluate(text, {}, None) == expected
    else:
        with pytest.raises(ValueError, match="expected an integer ≥ 1"):
            evaluate(text, {}, None)


@settings(deadline=None)
@given(st.text() | st.text("batch +-*/0config.size_", max_size=12))
def test_any_text_is_a_size_or_is_refused(text: str) -> None:
    try:
        tokens = parse_size(text)
    except ValueError:
        return
    assert len(tokens) % 2 == 1
    assert "".join(tokens) == re.sub(r"\s", "", text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found the end"),
        ("batch +", "at position 8 of 'batch +', found the end"),
        ("(batch)", "at position 1 of '(batch)', found '('"),
        ("2 ** 3", "at position 4 of '2 ** 3', found '*'"),
        ("8 / 2", r"expected +, -, * or // at position 3 of '8 / 2', found '/'"),
        ("-1", "at position 1 of '-1', found '-'"),
        ("1.5", "expected +, -, * or // at position 2 of '1.5', found '.'"),
        ("2x", "at position 2 of '2x', found 'x'"),
        ("batches", "found 'batches' (did you mean 'batch'?)"),
        ("config", "found 'config'"),
        ("config.", "found 'config'"),
        ("config.__class__", "found 'config'"),
        ("config.a._b", "expected +, -, * or // at position 9 of 'config.a._b', found '.'"),
        ("__import__('os')", "at position 1 of \"__import__('os')\", found '_'"),
        ("²", "at position 1 of '²', found '²'"),
    ],
)
def test_what_is_no_size_says_where(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        parse_size(text)


SIZE = 'expected an integer ≥ 1 or a size such as "config.hidden_size // 2"'
VALUE = "expected a table, a number, a string, true or false"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("'a b' = 1", "inputs.'a b': expected the name of an input, found 'a b'"),
        ("'[key]' = 1", "inputs.'[key]': expected the name of an input, found '[key]'"),
        ('"x\\n" = 1', r"inputs.'x\n': expected the name of an input, found 'x\n'"),
        ("x = [1]", f"inputs.x: {VALUE}, found [1]"),
        ("x = nan", f"inputs.x: {VALUE}, found nan"),
        ("x = 2020-01-02T03:04:05Z", f"inputs.x: {VALUE}, found 2020-01-02 03:04:05+00:00"),
        ("x = 0x10000000000000000", f"inputs.x: {VALUE}, found an integer of 65 bits"),
        ("x.fill = 1", "inputs.x.shape: required, and missing"),
        ("x.shape = [1]", "inputs.x: expected below or fill for dtype 'int64', found neither"),
        (
            "x = {shape = 'batch', fill = 1}",
            """inputs.x.shape: expected a list, e.g. ["batch", "sequence"], found 'batch'""",
        ),
        ("x = {shape = [], fill = 1}", "inputs.x.shape: at least one is required, found []"),
        ("x = {shape = [1, 0], fill = 1}", f"inputs.x.shape[1]: {SIZE}, found 0"),
        ("x = {shape = [true], fill = 1}", f"inputs.x.shape[0]: {SIZE}, found True"),
        ("x = {shape = [1], below = 1.0}", f"inputs.x.below: {SIZE}, found 1.0"),
        (
            "x = {shape = ['batch + * 2'], fill = 1}",
            "inputs.x.shape[0]: expected a number, batch, sequence, target_sequence or config.<field> "
            "at position 9 of 'batch + * 2', found '*'",
        ),
        (
            "x = {shape = [1], dtype = 'int32', fill = 1}",
            "inputs.x.dtype: expected 'int64', 'float' or 'bool', found 'int32' (did you mean 'int64'?)",
        ),
        ("x = {shape = [1], dtype = 'float', below = 3}", "inputs.x.below: expected none for dtype 'float', found 3"),
        ("x = {shape = [1], fill = 1, below = 3}", "inputs.x.below: expected none beside fill, found 3"),
        ("x = {shape = [1], fill = 'x'}", "inputs.x.fill: expected a number, true or false, found 'x'"),
        ("x = {shape = [1], fill = 0.5}", "inputs.x.fill: expected a value of dtype 'int64', found 0.5"),
        ("x = {shape = [1], fill = 1, dtype = 'bool'}", "inputs.x.fill: expected a value of dtype 'bool', found 1"),
        ("x = {shape = [1], fill = 1, size = 2}", "inputs.x.size: unknown key; known here: below, dtype, fill, shape"),
    ],
)
def test_broken_inputs_say_where_and_what(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"[[select]]\ntarget = ['q']\n[inputs]\n{text}\n")
    with pytest.raises(RuleError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: line 4: {message}"


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (
            "config.sise",
            "expected config.sise in SimpleNamespace, found no 'sise' in SimpleNamespace (did you mean 'size'?)",
        ),
        ("config.vision.hight", "expected config.vision.hight in SimpleNamespace, found no 'hight' in SimpleNamespace"),
        (
            "config.rope.dom",
            "expected config.rope.dom in SimpleNamespace, found no 'dom' in dict (did you mean 'dim'?)",
        ),
        ("config.size.real.x", "expected config.size.real.x in SimpleNamespace, found no 'x' in int"),
        ("config.nothing", "expected an integer as config.nothing in SimpleNamespace, found None"),
        ("config.vision.sizes", "expected an integer as config.vision.sizes in SimpleNamespace, found [1, 2]"),
        ("1 // config.zero", "expected a divisor that is not 0, found config.zero = 0 in '1 // config.zero'"),
        ("config.zero", "expected an integer ≥ 1, found 'config.zero' = 0"),
        ("1 - 2", "expected an integer ≥ 1, found '1 - 2' = -1"),
        ("9" * 5000, "Exceeds the limit"),
        (f"{2**62} * 2", f"expected an integer ≥ 1, found '{2**62} * 2' = an integer of 64 bits"),
    ],
)
def test_a_config_that_does_not_fit_says_where_and_what(size: str, problem: str) -> None:
    with pytest.raises(RuleError) as caught:
        rule_inputs(rules(x={"shape": ["batch", size], "fill": 0}), CONFIG, torch.float32, CPU)
    assert str(caught.value).startswith(f"rules: inputs.x.shape[1]: {problem}")


def test_all_problems_are_named_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        "[[select]]\ntarget = ['q']\n[inputs.x]\nshape = ['config.zzz',\n'config.dtype']\nbelow = 'config.a'\n"
        f"[inputs.y]\nshape = [{2**20}, {2**20}]\nfill = 1\n"
    )
    with pytest.raises(RuleError) as caught:
        rule_inputs(load(path), BertConfig(), torch.float32, CPU)
    assert caught.value.source == str(path)
    assert caught.value.problems == (
        "line 4: inputs.x.shape[0]: expected config.zzz in BertConfig, found no 'zzz' in BertConfig",
        "line 5: inputs.x.shape[1]: expected an integer as config.dtype in BertConfig, found None",
        "line 6: inputs.x.below: expected config.a in BertConfig, found no 'a' in BertConfig",
        f"line 8: inputs.y.shape: expected at most {ELEMENTS} elements, found [{2**20}, {2**20}]",
    )
