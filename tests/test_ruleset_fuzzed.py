"""Any input gives a rule set or a RuleError, and nothing else."""

from __future__ import annotations

import copy
import tomllib
from datetime import date, datetime
from pathlib import Path
from typing import Any

import tomlkit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ruleset import VALIDATOR, paths

from lora_fx.errors import RuleError
from lora_fx.rules.lookup import directory, load
from lora_fx.rules.rule_file import RuleSet, Selection
from lora_fx.rules.toml_lines import toml_lines
from lora_fx.rules.vocabulary import FOREIGN_KEYS, OPS, PARTS, ROLES

FUZZED = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])

OTHERS = ["x", "min", "max", "shape", "dtype", "below", "fill", "a b"]
KEYS = st.sampled_from([*RuleSet.model_fields, *Selection.model_fields, *FOREIGN_KEYS, *OTHERS])
NEAR = ["attention.query", "q", "*_proj", "4-7", "7-", "each", "bias", "rslora", "(", "(?:a|aa)+b"]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=5)
SCALARS = st.one_of(
    st.sampled_from([*ROLES, *OPS, *PARTS, *NEAR]),
    TEXTS,
    st.integers(-3, 20),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.sampled_from([date(2020, 1, 2), datetime(2020, 1, 2, 3, 4)]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)
TABLES = st.dictionaries(KEYS, VALUES, max_size=4)
NEARLY = st.fixed_dictionaries({"target": st.just(["q"])}, optional={"rank": SCALARS, "layers": VALUES, "op": VALUES})
DOCUMENTS = st.fixed_dictionaries(
    {"select": st.lists(TABLES | NEARLY, max_size=3) | VALUES},
    optional={
        "defaults": TABLES | VALUES,
        "model_types": VALUES,
        "r": VALUES,
    },
)


def rules_or_none(path: Path) -> RuleSet | None:
    try:
        return load(path)
    except RuleError as error:
        problems = error.problems
    assert problems
    assert not any("Input should" in problem or "Value error" in problem for problem in problems)
    return None


def save(directory: Path, text: str) -> Path:
    path = directory / "custom.toml"
    path.write_bytes(text.encode())
    return path


@FUZZED
@given(DOCUMENTS)
def test_any_document_gives_rules_or_problems_and_has_its_lines(tmp_path: Path, document: dict[str, Any]) -> None:
    text = tomlkit.dumps(document)
    rules_or_none(save(tmp_path, text))
    lines, written = toml_lines(text), text.split("\n")
    assert set(lines) == set(paths(tomllib.loads(text)))
    for path, line in lines.items():
        key = next(part for part in reversed(path) if isinstance(part, str))
        assert isinstance(path[-1], int) or key in written[line - 1]


RICH = """\
# Everything.
model_types = ["a", "b"]

[defaults]
rank = 8
alpha = 32.5
dropout = 0.1
scaling = "rslora"
init = "gaussian"

[[select]]
target = ["q", "layers.*.v_proj"]
layers = [0, "4-7", "9-"]
in_features = { min = 4, max = 8 }
calls = [1, 2]
optional = true

[[select]]
regex = '.*\\.(k|o)'
role = ["attention.key"]
exclude_role = ["head"]
override = true
trainable = "bias"
"""
FILES = st.sampled_from(
    [RICH, *((directory() / f"{name}.toml").read_text(encoding="utf-8") for name in ("t5", "phi3"))]
)
NEW = st.sampled_from(["", "\n", "]", "[", '"', "'", "=", ".", "0", "-", "a", "#", "{", "\0", "é", "\\", "\r"])


@st.composite
def mutated(draw: st.DrawFn) -> str:
    text = draw(FILES)
    for _ in range(draw(st.integers(1, 4))):
        by_line = draw(st.booleans())
        units = text.splitlines(keepends=True) if by_line else list(text)
        start = draw(st.integers(0, len(units)))
        new = draw(st.sampled_from([*units, ""])) if by_line else draw(NEW)
        text = "".join([*units[:start], new, *units[start + draw(st.integers(0, 2)) :]])
    return text


@FUZZED
@given(mutated())
def test_any_mutation_of_a_file_gives_rules_or_problems(tmp_path: Path, text: str) -> None:
    rules = rules_or_none(save(tmp_path, text))
    assert rules is None or all(rules.where(index).endswith(")") for index in range(len(rules.select)))


@FUZZED
@given(st.binary(max_size=60))
def test_any_bytes_give_problems(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "mine.toml").write_bytes(data)
    assert rules_or_none(tmp_path / "mine.toml") is None


def some(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, min_size=1, max_size=3, unique=True)


NAMES = st.from_regex(r"[a-z*]{1,4}(\.[a-z0-9*]{1,4}){0,2}", fullmatch=True)
BOUNDS = st.sampled_from([{"min": 3}, {"max": 9}, {"min": 3, "max": 9}, {"min": 0, "max": 0}])
SETTINGS = {
    "rank": st.integers(1, 2**40),
    "alpha": st.floats(1e-3, 1e6),
    "dropout": st.floats(0, 0.999),
    "scaling": st.sampled_from(["standard", "rslora"]),
    "init": st.sampled_from(["kaiming", "gaussian"]),
    "calls": some(st.integers(1, 9)) | st.just("each"),
    "features": some(st.sampled_from(PARTS)),
}
PREDICATES = {
    "target": some(NAMES),
    "regex": st.sampled_from([".*", r"a\.(b|c)", "x{1,3}"]),
    "role": some(st.sampled_from([*ROLES, "attention.query"])),
    "op": some(st.sampled_from(OPS)),
    "layers": some(st.integers(0, 99) | st.sampled_from(["0-3", "5-", "7-7"])),
    "in_features": BOUNDS,
    "groups": BOUNDS,
    "exclude": some(NAMES),
    "exclude_role": some(st.sampled_from(ROLES)),
    "optional": st.booleans(),
    "override": st.booleans(),
}
SELECTIONS = st.one_of(
    st.fixed_dictionaries({"out_features": BOUNDS}, optional=PREDICATES | SETTINGS),
    st.fixed_dictionaries({"out_features": BOUNDS, "trainable": st.just("all")}, optional=PREDICATES),
)
VALID = st.fixed_dictionaries(
    {"select": st.lists(SELECTIONS, min_size=1, max_size=3)},
    optional={
        "model_types": some(TEXTS),
        "defaults": st.fixed_dictionaries(
            {}, optional={key: SETTINGS[key] for key in ("rank", "alpha", "dropout", "init")}
        ),
    },
)


@FUZZED
@given(VALID)
def test_valid_rules_survive_being_written_and_read(tmp_path: Path, document: dict[str, Any]) -> None:
    rules = load(document)
    assert load(rules.model_dump(exclude={"name"})) == rules
    assert hash(load(copy.deepcopy(document))) == hash(rules)
    text = tomlkit.dumps(rules.model_dump(exclude={"name"}, exclude_none=True))
    assert load(save(tmp_path, text)) == rules
    VALIDATOR.validate(document)
    for selection in rules.select:
        assert rules.setting_of(selection).scale > 0
        assert isinstance(selection.matches_name("layers.3.a.b"), bool)
