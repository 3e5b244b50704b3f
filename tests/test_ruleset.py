from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import runpy
import subprocess
import sys
import textwrap
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, settings

from lora_fx.errors import RuleError
from lora_fx.rules.lookup import builtin, directory, load
from lora_fx.rules.rule_file import Bounds, RuleSet, Selection, Setting
from lora_fx.rules.toml_lines import FILE_BYTES, toml_lines
from lora_fx.rules.vocabulary import FOREIGN_KEYS, ROLES

ROOT = Path(__file__).parent.parent
FUZZED = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])

SEED_MAPPING = {
    "t5": {"q", "v"},
    "mt5": {"q", "v"},
    "bart": {"q_proj", "v_proj"},
    "gpt2": {"c_attn"},
    "bloom": {"query_key_value"},
    "blip-2": {"q", "v", "q_proj", "v_proj"},
    "opt": {"q_proj", "v_proj"},
    "gptj": {"q_proj", "v_proj"},
    "gpt_neox": {"query_key_value"},
    "gpt_neo": {"q_proj", "v_proj"},
    "bert": {"query", "value"},
    "roberta": {"query", "value"},
    "xlm-roberta": {"query", "value"},
    "electra": {"query", "value"},
    "layoutlm": {"query", "value"},
    "deberta-v2": {"query_proj", "value_proj"},
    "deberta": {"in_proj"},
    "llama": {"q_proj", "v_proj"},
    "chatglm": {"query_key_value"},
}


@pytest.mark.parametrize("model_type", SEED_MAPPING)
def test_every_row_of_the_mapping_has_its_targets(model_type: str) -> None:
    rules = load("auto", model_type)
    assert model_type in rules.model_types
    assert {target for selection in rules.select for target in selection.target or ()} == SEED_MAPPING[model_type]
    assert load(model_type) == rules


def test_a_model_type_is_in_one_file_and_every_file_is_commented() -> None:
    types = [kind for rules in builtin() for kind in rules.model_types]
    assert len(types) == len(set(types))
    assert all(path.read_text().startswith("# ") for path in directory().glob("*.toml"))


@pytest.mark.parametrize(
    ("target", "name", "expected"),
    [
        ("q", "block.0.q", True),
        ("q", "q", True),
        ("q", "block.0.seq", False),
        ("q", "q.0", False),
        ("fc1", "layer.fc10", False),
        ("self.query", "attention.self.query", True),
        ("self.query", "attention.myself.query", False),
        ("self.query", "query", False),
        ("*_proj", "layer.0.q_proj", True),
        ("*_proj", "layer.0.q_projection", False),
        ("*_proj", "a_proj.b", False),
        ("layers.*.q_proj", "model.layers.11.q_proj", True),
        ("layers.*.q_proj", "model.layers.11.attention.q_proj", False),
        ("layers.*.q_proj", "model.layers.q_proj", False),
        ("*", "anything.at.all", True),
        ("*.*", "alone", False),
        ("a*b*c", "x.a1b2c", True),
        ("a*b*c", "x.acb", False),
        ("q?", "qk", False),
        ("[qk]", "q", False),
        ("[qk]", "x.[qk]", True),
        ("Q", "q", False),
    ],
)
def test_targets_match_whole_dotted_names(target: str, name: str, expected: bool) -> None:
    assert Selection(target=(target,)).matches_name(name) is expected
    assert Selection(op=("linear",), exclude=(target,)).matches_name(name) is not expected


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        (r"q", "layer.0.q", False),
        (r".*\.q", "layer.0.q", True),
        (r"layers\.(?:0|1[01])\.(q|v)_proj", "layers.11.v_proj", True),
        (r"layers\.(?:0|1[01])\.(q|v)_proj", "layers.12.v_proj", False),
        (r"(?i)LAYER\.\d+\.q", "layer.0.q", True),
        (r"\p{L}+", "queryß", True),
        (r"(?P<x>q|k){1,2}(?:x|y)", "kqx", True),
    ],
)
def test_a_regular_expression_matches_the_whole_name(pattern: str, name: str, expected: bool) -> None:
    assert Selection(regex=pattern).matches_name(name) is expected


def test_a_regular_expression_that_takes_too_long_is_stopped() -> None:
    selection, name, began = Selection(regex="(?:a|aa)+b"), "a" * 60, time.monotonic()
    with pytest.raises(RuleError) as caught:
        selection.matches_name(name, "select[1] (line 4)")
    assert time.monotonic() - began < 10
    problem = f"regex '(?:a|aa)+b' took more than 0.1 s to match {name!r}; simplify it"
    assert str(caught.value) == f"select[1] (line 4): {problem}"


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ([0], ["h.0.q"]),
        ([3, "5-6"], ["h.3.q", "h.5.q", "h.6.q"]),
        (["5-"], ["h.5.q", "h.6.q", "h.11.q"]),
        (["0-"], ["h.0.q", "h.3.q", "h.5.q", "h.6.q", "h.11.q"]),
        (["11-11"], ["h.11.q"]),
    ],
)
def test_the_layer_of_a_name_is_its_first_part_that_is_a_number(layers: list[int | str], names: list[str]) -> None:
    every = [f"h.{index}.q" for index in (0, 3, 5, 6, 11)]
    selection = load({"select": [{"layers": layers}]}).select[0]
    assert [name for name in every if selection.matches_name(name)] == names
    assert not any(selection.matches_name(name) for name in ("q", "h0.q", "h.٣.q"))
    assert [Selection(layers=(n,)).matches_name("experts.2.layers.7") for n in (2, 7)] == [True, False]


def test_a_selection_wants_all_its_predicates_and_exclude_wins() -> None:
    selection = Selection(target=("q", "v"), regex=r"decoder\..*", layers=("1-2",), exclude=("layers.2.v",))
    names = [f"{side}.layers.{index}.{end}" for side in ("encoder", "decoder") for index in range(4) for end in "qkv"]
    expected = ["decoder.layers.1.q", "decoder.layers.1.v", "decoder.layers.2.q"]
    assert [name for name in names if selection.matches_name(name)] == expected


def test_bounds_include_their_ends() -> None:
    cases = [Bounds(min=4), Bounds(max=8), Bounds(min=4, max=8)]
    assert list(map(str, cases)) == ["≥ 4", "≤ 8", "4 to 8"]
    assert [[n for n in (3, 4, 8, 9) if bounds.admits(n)] for bounds in cases] == [[4, 8, 9], [3, 4, 8], [4, 8]]


def write(directory: Path, text: str) -> Path:
    path = directory / "mine.toml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


Q = "[[select]]\ntarget = ['q']\n"
SOME = "target, regex, role, op, layers, in_features, out_features, groups"
WORDS = {
    "{SOME}": SOME,
    "{SELECT}": "alpha, alternatives, bias, calls, dropout, exclude, exclude_role, features, freeze, groups, in_features, init, "
    "invocation_tokens, layers, op, optional, out_features, override, rank, regex, role, scaling, target, trainable, variant",
    "{DEFAULTS}": "alpha, bias, dropout, freeze, init, invocation_tokens, rank, scaling, task_type, variant",
    "{FILE}": "defaults, model_types, prefix, prompt, select",
    "{ROLES}": ", ".join(map(repr, [*ROLES, *(f"attention.{end}" for end in ("query", "key", "value"))]))
    + " or 'attention.output'",
    "{NAME}": 'expected a dotted name or its end, such as "self.query" or "layers.*.q_proj"',
    "{LAYER}": 'expected an integer ≥ 0 or a range such as "4-7" or "4-"',
    "{CALLS}": 'expected "all", "each" or a list of different integers ≥ 1',
    "{LONG}": "0x1" + "0" * 400,
    "{DEEP}": ".a" * 200,
    "{NUL}": "\0",
    "{Q}": "[[select]] ¦ target = ['q']",
}

# A TOML document on one line, with ¦ where its lines end; below it the whole message, without the path of the file.
BROKEN = r"""
select = []
    line 1: select: at least one is required, found []
select = 3
    line 1: select: expected a list, e.g. tables under [[select]], found 3
select = [3]
    line 1: select[0]: expected a table, found 3
[select] ¦ target = ['q']
    line 1: select: expected a list, e.g. tables under [[select]], found {'target': ['q']}
[[select]]
    line 1: select[0]: expected at least one of {SOME}, found none
# empty ¦ model_types = []
    select: required, and missing
[[select]] ¦ rank = 4 ¦ init = 'gaussian'
    line 1: select[0]: expected at least one of {SOME}, found init, rank
[[select]] ¦ exclude = ['q']
    line 1: select[0]: expected at least one of {SOME}, found exclude
[[select]] ¦ ¦ target = []
    line 3: select[0].target: at least one is required, found []
[[select]] ¦ target = 'q'
    line 2: select[0].target: expected a list, e.g. ["q"], found 'q'
[[select]] ¦ target = {a = 1}
    line 2: select[0].target: expected a list, e.g. ["q"], found {'a': 1}
[[select]] ¦ target = ['q', 'v', 'q']
    line 2: select[0].target: expected each item once, found 'q' 2 times
[[select]] ¦ target = ['a b']
    line 2: select[0].target[0]: {NAME}, found 'a b'
[[select]] ¦ target = [ ¦ 'q', ¦ '.q']
    line 4: select[0].target[1]: {NAME}, found '.q'
[[select]] ¦ target = ['']
    line 2: select[0].target[0]: {NAME}, found ''
[[select]] ¦ target = [2020-01-02]
    line 2: select[0].target[0]: {NAME}, found 2020-01-02
{Q} ¦ exclude = ['a..b']
    line 3: select[0].exclude[0]: {NAME}, found 'a..b'
{Q} ¦ r = 4
    line 3: select[0].r: unknown key (did you mean 'rank'?); known here: {SELECT}
{Q} ¦ ranks = 4
    line 3: select[0].ranks: unknown key (did you mean 'rank'?); known here: {SELECT}
[[select]] ¦ target_modules = ['q'] ¦ target = ['q']
    line 2: select[0].target_modules: unknown key (did you mean 'target'?); known here: {SELECT}
{Q} ¦ 'a.b' = 4
    line 3: select[0].'a.b': unknown key; known here: {SELECT}
{Q} ¦ '[key]' = 4
    line 3: select[0].'[key]': unknown key; known here: {SELECT}
{Q} ¦ [defaults] ¦ lora_alpha = 4
    line 4: defaults.lora_alpha: unknown key (did you mean 'alpha'?); known here: {DEFAULTS}
{Q} ¦ [defaults] ¦ modules_to_save = 4
    line 4: defaults.modules_to_save: unknown key; known here: {DEFAULTS}
{Q} ¦ [default] ¦ rank = 4
    line 3: default: unknown key (did you mean 'defaults'?); known here: {FILE}
{Q} ¦ [select.sub.x]
    line 3: select[0].sub: unknown key; known here: {SELECT}
name = 'x' ¦ {Q}
    line 1: name: unknown key; a rule set is named after its file
defaults = 3 ¦ {Q}
    line 1: defaults: expected a table, found 3
model_types = 't5' ¦ {Q}
    line 1: model_types: expected a list, e.g. ["t5"], found 't5'
model_types = ['a', ¦ 1] ¦ {Q}
    line 2: model_types[1]: expected a string, found 1
model_types = ['a', 'a'] ¦ {Q}
    line 1: model_types: expected each item once, found 'a' 2 times
{Q} ¦ rank = 0
    line 3: select[0].rank: expected an integer ≥ 1, found 0
{Q} ¦ rank = 1.5
    line 3: select[0].rank: expected an integer ≥ 1, found 1.5
{Q} ¦ rank = true
    line 3: select[0].rank: expected an integer ≥ 1, found True
{Q} ¦ rank = '4'
    line 3: select[0].rank: expected an integer ≥ 1, found '4'
{Q} ¦ rank = {LONG}
    line 3: select[0].rank: expected an integer ≥ 1, found an integer of 1601 bits
{Q} ¦ alpha = {LONG}
    line 3: select[0].alpha: expected a finite number > 0, found an integer of 1601 bits
{Q} ¦ alpha = 0
    line 3: select[0].alpha: expected a finite number > 0, found 0
{Q} ¦ alpha = nan
    line 3: select[0].alpha: expected a finite number > 0, found nan
{Q} ¦ alpha = inf
    line 3: select[0].alpha: expected a finite number > 0, found inf
{Q} ¦ alpha = '8'
    line 3: select[0].alpha: expected a finite number > 0, found '8'
{Q} ¦ dropout = 1.0
    line 3: select[0].dropout: expected a number ≥ 0 and < 1, found 1.0
{Q} ¦ dropout = false
    line 3: select[0].dropout: expected a number ≥ 0 and < 1, found False
{Q} ¦ scaling = 'rs_lora'
    line 3: select[0].scaling: expected 'standard' or 'rslora', found 'rs_lora' (did you mean 'rslora'?)
{Q} ¦ init = true
    line 3: select[0].init: expected 'kaiming', 'gaussian', 'orthogonal', 'pissa', 'olora', 'mica' or 'pissa_niter_16', found True
{Q} ¦ override = 1
    line 3: select[0].override: expected true or false, found 1
{Q} ¦ optional = 'yes'
    line 3: select[0].optional: expected true or false, found 'yes'
[[select]] ¦ role = ['head', 'roter']
    line 2: select[0].role[1]: expected {ROLES}, found 'roter' (did you mean 'router'?)
[[select]] ¦ role = 'head'
    line 2: select[0].role: expected a list, e.g. ["attention.query"], found 'head'
{Q} ¦ exclude_role = [['head']]
    line 3: select[0].exclude_role[0]: expected {ROLES}, found ['head']
[[select]] ¦ op = ['Linear']
    line 2: select[0].op[0]: expected 'linear', 'conv1d', 'conv2d', 'conv3d', 'embedding' or 'expert', found 'Linear' (did you mean 'linear'?)
{Q} ¦ features = ['query', 'vale']
    line 3: select[0].features[1]: expected 'query', 'key', 'value', 'gate' or 'up', found 'vale' (did you mean 'value'?)
[[select]] ¦ layers = []
    line 2: select[0].layers: at least one is required, found []
[[select]] ¦ layers = 3
    line 2: select[0].layers: expected a list, e.g. [0, "4-7"], found 3
[[select]] ¦ layers = [-1]
    line 2: select[0].layers[0]: {LAYER}, found -1
[[select]] ¦ layers = ['-7']
    line 2: select[0].layers[0]: {LAYER}, found '-7'
[[select]] ¦ layers = ['4']
    line 2: select[0].layers[0]: {LAYER}, found '4'
[[select]] ¦ layers = [0, '7-4']
    line 2: select[0].layers[1]: expected the first layer before the last, found '7-4'
[[select]] ¦ in_features = 4
    line 2: select[0].in_features: expected a table, found 4
[[select]] ¦ in_features = {}
    line 2: select[0].in_features: expected min, max or both, found neither
[[select]] ¦ in_features.min = -1
    line 2: select[0].in_features.min: expected an integer ≥ 0, found -1
[[select]] ¦ [select.out_features] ¦ min = 5 ¦ max = 3
    line 2: select[0].out_features: expected min ≤ max, found 5 and 3
[[select]] ¦ out_features = {min = 5, most = 3}
    line 2: select[0].out_features.most: unknown key; known here: max, min
[[select]] ¦ regex = 3
    line 2: select[0].regex: expected a string, found 3
[[select]] ¦ regex = '(q'
    line 2: select[0].regex: expected a regular expression, found '(q': missing ) at position 2
[[select]] ¦ regex = '((a{1000}){1000}){1000}'
    line 2: select[0].regex: expected a pattern with fewer characters or counted repetitions, found '((a{1000}){1000}){1000}'
[[select]] ¦ regex = '(?ix)q'
    line 2: select[0].regex: expected a pattern without the verbose flag x, found '(?ix)q'
{Q} ¦ calls = 'some'
    line 3: select[0].calls: {CALLS}, found 'some'
{Q} ¦ calls = [0]
    line 3: select[0].calls: {CALLS}, found [0]
{Q} ¦ calls = [1, 1]
    line 3: select[0].calls: {CALLS}, found [1, 1]
{Q} ¦ trainable = 'biases'
    line 3: select[0].trainable: expected 'bias', 'all' or a list of different integers ≥ 0 (rows), found 'biases' (did you mean 'bias'?)
{Q} ¦ rank = 4 ¦ trainable = 'all'
    line 3: select[0].rank: expected none beside trainable, which adds no branch, found 4
{Q} ¦ trainable = 'bias' ¦ calls = 'each'
    line 4: select[0].calls: expected none beside trainable, which adds no branch, found 'each'
defaults.rank{DEEP} = 1 ¦ {Q}
    line 1: defaults.rank: expected an integer ≥ 1, found {'a': {'a': {'a': {...}}}}
[[select] ¦ target = ['q']
    is not valid TOML: Expected ']]' at the end of an array declaration (at line 1, column 9)
{Q} ¦ rank = 1 ¦ rank = 1
    is not valid TOML: Cannot overwrite a value (at end of document)
{Q} ¦ rank = 1{NUL}
    is not valid TOML: Expected newline or end of document after a statement (at line 3, column 9)
"""


def cases(table: str) -> list[tuple[str, str]]:
    lines = table.strip().splitlines()
    for word, meaning in WORDS.items():
        lines = [line.replace(word, meaning) for line in lines]
    texts = ["\n".join(part.strip(" ") for part in line.split("¦")) for line in lines[::2]]
    return list(zip(texts, (line.strip() for line in lines[1::2]), strict=True))


@pytest.mark.parametrize(("text", "message"), [("", "select: required, and missing"), *cases(BROKEN)])
def test_a_broken_file_says_where_and_what(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RuleError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: {message}"


def test_all_problems_of_a_file_are_named_at_once_in_the_order_of_its_lines(tmp_path: Path) -> None:
    text = """\
        [[select]]
        dropout = 2
        [[select]]
        target = ['q']
        rank = 0
        in_features = { min = 3, max = 2 }
        [defaults]
        r = 1
        """
    with pytest.raises(RuleError) as caught:
        load(write(tmp_path, text))
    assert caught.value.problems == (
        f"line 1: select[0]: expected at least one of {SOME}, found dropout",
        "line 2: select[0].dropout: expected a number ≥ 0 and < 1, found 2",
        "line 5: select[1].rank: expected an integer ≥ 1, found 0",
        "line 6: select[1].in_features: expected min ≤ max, found 3 and 2",
        f"line 8: defaults.r: unknown key (did you mean 'rank'?); known here: {WORDS['{DEFAULTS}']}",
    )
    assert str(caught.value).count("\n  ") == 5


def test_keys_of_other_tools_are_hinted_at() -> None:
    for foreign, ours in FOREIGN_KEYS.items():
        with pytest.raises(RuleError) as caught:
            load({"select": [{"target": ["q"], foreign: 1}]})
        assert str(caught.value).startswith(f"rules: select[0].{foreign}: unknown key (did you mean {ours!r}?); known")


def test_a_mapping_in_code_has_no_lines_and_may_hold_anything() -> None:
    document = {
        "\ud800": 1,
        3: 4,
        "select": [{"target": ["\ud800"]}],
        "defaults": {"\ud800": 1, "rank": object},
        None: None,
    }
    with pytest.raises(RuleError) as caught:
        load(document)  # type: ignore[arg-type]
    assert len(caught.value.problems) == 6
    assert not any("line" in problem or "Input should" in problem for problem in caught.value.problems)


def test_files_that_are_no_toml(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"model_types = ['\xff']")
    with pytest.raises(RuleError, match=r"mine.toml: is not UTF-8 text: .*byte 0xff in position 16"):
        load(path)
    with pytest.raises(RuleError, match="cannot be read: Is a directory"):
        load(tmp_path)
    with pytest.raises(RuleError, match="cannot be read: No such file"):
        load(Path("nowhere.toml"))
    with pytest.raises(RuleError, match="is not valid TOML: Exceeds the limit"):
        load(write(tmp_path, "x = " + "1" * 5000))
    with pytest.raises(RuleError, match="is not valid TOML: it nests too deep"):
        load(write(tmp_path, "x = " + "[" * 5000))
    with pytest.raises(RuleError, match=f"it has {FILE_BYTES + 1:,} bytes, and at most {FILE_BYTES:,} are read"):
        load(write(tmp_path, "#" * (FILE_BYTES + 1)))
    with pytest.raises(RuleError, match="null byte"):
        load("a\0.toml")
    path.write_bytes(b"\xef\xbb\xbf[[select]]\r\ntarget = ['q']\r\n")  # as editors of Windows write it
    assert load(path).where(0) == "select[0] (line 1)"


TRICKY = """\
# [[select]]
model_types = [   # [[select]]
  "a",

  "b",
]
defaults.rank = 1
"defaults" . 'alpha' = 2
inputs = { a = { shape = [1, "x"], fill = 1 }, "b" = 1 }

[[select]]
regex = '''
[[select]]
target = 1
'''
[select.in_features]
min = 1
[[ "select" ]]
layers = [ 1,
  # 0
  "2-", ]
"t\\u0061rget" = [
  "]", '"', "b",
  "[[select]]"]
[select . out_features ]
max = 1
"""
TRICKY_LINES = {
    ("model_types",): 2,
    ("model_types", 1): 5,
    ("defaults",): 7,
    ("defaults", "alpha"): 8,
    ("inputs", "a", "shape", 1): 9,
    ("select",): 11,
    ("select", 0): 11,
    ("select", 0, "regex"): 12,
    ("select", 0, "in_features"): 16,
    ("select", 0, "in_features", "min"): 17,
    ("select", 1): 18,
    ("select", 1, "layers", 1): 21,
    ("select", 1, "target"): 22,
    ("select", 1, "target", 1): 23,
    ("select", 1, "target", 3): 24,
    ("select", 1, "out_features"): 25,
    ("select", 1, "out_features", "max"): 26,
}


def test_lines_are_right_in_a_tricky_document(tmp_path: Path) -> None:
    lines = toml_lines(TRICKY)
    assert set(lines) == set(paths(tomllib.loads(TRICKY)))
    assert {path: lines[path] for path in TRICKY_LINES} == TRICKY_LINES
    with pytest.raises(
        RuleError,
        match=r"line 9: inputs: unknown key; example inputs are given by --example-inputs FILE\.safetensors, or by example_inputs= ",
    ):
        load(write(tmp_path, TRICKY))


def paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths(item, (*path, key))


def test_an_unknown_name_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match=r"rules='gpt_2'.*did you mean 'gpt2'.*built in: .*bart, bert, .*xlm-roberta"):
        load("gpt_2")
    with pytest.raises(RuleError, match=r"did you mean 'all-linear'"):
        load("all_linear")
    for name in ("../rules/t5", "t5.tom", "", "*", "t?", "/etc/passwd", "a\0b", "x" * 5000):
        with pytest.raises(RuleError, match="no rules of this name"):
            load(name)
    write(tmp_path, Q)
    (tmp_path / "sub").mkdir()
    with pytest.raises(RuleError, match="no rules of this name"):
        load("../mine", directories=[tmp_path / "sub"])


def test_auto_without_a_file_goes_by_role(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lora_fx.rules.lookup"):
        rules = load("auto", "no_such_model")
        assert load("auto") == rules
        load("auto", "t5")
    assert (rules.name, rules.model_types) == ("auto", ())
    said = [selection.model_dump(exclude_defaults=True) for selection in rules.select]
    assert said == [{"role": ("attention.query", "attention.value")}]
    assert rules.setting_of(rules.select[0]) == Setting(8, 32.0, 0.1)
    does = "rules 'auto' select the query and value projections of attention by their role"
    assert [record.getMessage() for record in caplog.records] == [
        f"no rule file is for model type 'no_such_model': {does}",
        f"the model has no config.model_type: {does}",
    ]


def test_all_linear_leaves_out_heads_routers_and_gates_with_one_output() -> None:
    rules = load("all-linear")
    assert rules.name == "all-linear"
    said = [selection.model_dump(exclude_defaults=True) for selection in rules.select]
    assert said == [{"op": ("linear",), "out_features": {"min": 2}, "exclude_role": ("head", "router")}]


def test_directories_come_before_the_variable_and_that_before_what_is_built_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "a/t5": ["mine"],
        "a/new": ["gpt2"],
        "b/t5": ["t5"],
        "b/bert": ["bert", "new2"],
        "c/bert": ["bert", "hidden"],
    }
    for name, types in files.items():
        path = tmp_path / f"{name}.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"model_types = {types}\n{Q}")
    (tmp_path / "a" / "folder.toml").mkdir()
    monkeypatch.setenv("LORA_FX_RULES", os.pathsep.join([str(tmp_path / "b"), "", str(tmp_path / "c")]))

    def source(name: str, model_type: str | None = None) -> str:
        found = Path(load(name, model_type, directories=[tmp_path / "a"]).source)
        return f"{found.parent.name}/{found.stem}"

    assert source("t5") == source("mine") == source("auto", "mine") == "a/t5"
    assert source("auto", "gpt2") == "a/new"
    assert source("bert") == source("auto", "new2") == "b/bert"
    assert source("llama") == "rules/llama"
    for name in ("mt5", "hidden"):
        with pytest.raises(RuleError, match=r"built in: .*bart.*; in .*a: gpt2, mine, new, t5; in .*b: bert, new2"):
            source(name)
    assert Path(load("t5").source) == tmp_path / "b" / "t5.toml"
    monkeypatch.delenv("LORA_FX_RULES")
    assert Path(load("t5").source) == directory() / "t5.toml"


def test_a_directory_that_does_not_exist_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuleError, match="nowhere: is no directory; it is listed in directories"):
        load("t5", directories=["nowhere"])
    monkeypatch.setenv("LORA_FX_RULES", f"{tmp_path}{os.pathsep}nowhere")
    with pytest.raises(RuleError, match="nowhere: is no directory; it is listed in the environment variable LORA_FX"):
        load("t5")


def test_overrides_replace_defaults_and_leave_a_selections_own_settings() -> None:
    rules = load({"defaults": {"rank": 2}, "select": [{"target": ["q"], "rank": 4}, {"target": ["v"]}]})
    changed = rules.with_overrides(rank=6, alpha=None, dropout=0.5)
    assert (changed.defaults.rank, changed.defaults.dropout, changed.select[0].rank) == (6, 0.5, 4)
    assert rules.with_overrides(None, None, None) == rules
    with pytest.raises(RuleError) as caught:
        rules.with_overrides(rank=0, alpha=-1, dropout=None)
    assert str(caught.value) == (
        "arguments to rules 'custom':\n  defaults.rank: expected an integer ≥ 1, found 0\n"
        "  defaults.alpha: expected a finite number > 0, found -1"
    )
    assert load("t5").with_overrides(4, None, None).where(0) == load("t5").where(0) != "select[0]"


def test_settings_are_a_selections_own_before_the_defaults() -> None:
    selections = [{"op": ["linear"]}, {"op": ["expert"], "scaling": "rslora"}]
    rules = load({"defaults": {"rank": 4, "alpha": 6, "init": "gaussian"}, "select": selections})
    first, second = map(rules.setting_of, rules.select)
    assert first == Setting(rank=4, alpha=6.0, dropout=0.0, scaling="standard", init="gaussian")
    assert (first.scale, second.scale) == (1.5, 3.0)


def test_rule_sets_are_equal_if_they_say_the_same(tmp_path: Path) -> None:
    one, other = load(write(tmp_path, Q)), load(write(tmp_path, "\n" + Q))
    assert one == other
    assert hash(one) == hash(other)
    assert one.where(0) != other.where(0)
    assert one != load({"select": [{"target": ["q"]}]})  # of another name
    assert one != one.with_overrides(3, None, None)
    for twin in (copy.deepcopy(other), pickle.loads(pickle.dumps(other)), other.model_copy()):
        assert twin == other
        assert twin.lines == other.lines
    assert RuleSet(name="mine", select=(Selection(target=("q",)),)).where(0) == "select[0]"


def test_torch_is_not_needed_to_read_rules() -> None:
    code = """
        import sys
        from lora_fx.rules.rule_file import Selection
        assert Selection(target=("q",)).matches_name("a.q") and "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


SCHEMA_TEXT = (ROOT / "rules" / "schema.json").read_text(encoding="utf-8")
SCHEMA = json.loads(SCHEMA_TEXT)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def test_the_schema_is_that_of_the_models_and_every_built_in_file_fits_it() -> None:
    made = runpy.run_path(str(ROOT / "tools" / "make_schema.py"))["schema"]()
    assert made == SCHEMA_TEXT, "run tools/make_schema.py --write"
    VALIDATOR.check_schema(SCHEMA)
    for path in directory().glob("*.toml"):
        VALIDATOR.validate(tomllib.loads(path.read_text(encoding="utf-8")))
    broken: list[Any] = [[], [{}], [{"target": "q"}], [{"op": ["linear"], "r": 1}], [{"role": ["heads"]}]]
    assert not any(VALIDATOR.is_valid({"select": select}) for select in broken)
    fields = [field for table in SCHEMA["$defs"].values() for field in table["properties"].values()]
    assert all("description" in field for field in [*fields, *SCHEMA["properties"].values()])
