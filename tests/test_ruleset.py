from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from lora_fx.errors import RuleError
from lora_fx.ruleset import Selection, builtin, load

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
    assert {target for selection in rules.select for target in selection.target} == SEED_MAPPING[model_type]
    assert load(model_type) == rules


def test_a_model_type_is_in_one_file_and_every_file_is_commented() -> None:
    types = [kind for rules in builtin() for kind in rules.model_types]
    assert len(types) == len(set(types))
    from lora_fx.ruleset import directory

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
    ],
)
def test_targets_match_whole_dotted_names(target: str, name: str, expected: bool) -> None:
    assert Selection(target=(target,)).matches(name) is expected


def write(directory: Path, text: str) -> Path:
    path = directory / "mine.toml"
    path.write_text(textwrap.dedent(text))
    return path


# (TOML, the whole message below the path)
BROKEN = [
    ("", "select: required, and missing"),
    ("select = []", "select: at least one is required, found []"),
    ("[[select]]\nrank = 4", "select[0].target: required, and missing"),
    (
        "[[select]]\ntarget = []",
        "select[0].target: at least one is required, found []",
    ),
    ("[[select]]\ntarget = 'q'", "select[0].target: Input should be a valid tuple, found 'q'"),
    (
        "[[select]]\ntarget = ['a b']",
        r"select[0].target[0]: String should match pattern '^[^.\s]+(\.[^.\s]+)*$', found 'a b'",
    ),
    (
        "[[select]]\ntarget = ['q']\nr = 4",
        "select[0].r: unknown key (did you mean 'rank'?); known here: alpha, dropout, rank, target",
    ),
    (
        "[[select]]\ntarget = ['q']\nranks = 4",
        "select[0].ranks: unknown key (did you mean 'rank'?); known here: alpha, dropout, rank, target",
    ),
    (
        "[[select]]\ntarget_modules = ['q']\ntarget = ['q']",
        "select[0].target_modules: unknown key (did you mean 'target'?); known here: alpha, dropout, rank, target",
    ),
    (
        "[[select]]\ntarget = ['q']\n[defaults]\nlora_alpha = 4",
        "defaults.lora_alpha: unknown key (did you mean 'alpha'?); known here: alpha, dropout, rank",
    ),
    (
        "[[select]]\ntarget = ['q']\n[default]\nrank = 4",
        "default: unknown key (did you mean 'defaults'?); known here: defaults, model_types, select",
    ),
    ("[[select]]\ntarget = ['q']\nrank = 0", "select[0].rank: Input should be greater than or equal to 1, found 0"),
    ("[[select]]\ntarget = ['q']\nrank = 1.5", "select[0].rank: Input should be a valid integer, found 1.5"),
    ("[[select]]\ntarget = ['q']\nrank = true", "select[0].rank: Input should be a valid integer, found True"),
    ("[[select]]\ntarget = ['q']\nalpha = 0", "select[0].alpha: Input should be greater than 0, found 0"),
    ("[[select]]\ntarget = ['q']\nalpha = nan", "select[0].alpha: Input should be a finite number, found nan"),
    ("[[select]]\ntarget = ['q']\ndropout = 1.0", "select[0].dropout: Input should be less than 1, found 1.0"),
    ("name = 'x'\n[[select]]\ntarget = ['q']", "name: unknown key; a rule set is named after its file"),
    (
        "[[select]\ntarget = ['q']",
        "is not valid TOML: Expected ']]' at the end of an array declaration (at line 1, column 9)",
    ),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_a_broken_file_says_where_and_what(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RuleError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: {message}"


def test_all_problems_of_a_file_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "[defaults]\nr = 1\n[[select]]\ntarget = ['q']\nrank = 0\ndropout = 2")
    with pytest.raises(RuleError) as caught:
        load(path)
    assert len(caught.value.problems) == 3
    assert str(caught.value).count("\n  ") == 3


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(RuleError, match=r"rules='gpt_2'.*did you mean 'gpt2'.*built in: bart, bert, .*xlm-roberta"):
        load("gpt_2")
    with pytest.raises(RuleError, match="mamba"):
        load("auto", "mamba")
    with pytest.raises(RuleError, match=r"no config\.model_type"):
        load("auto")
    with pytest.raises(RuleError, match="cannot be read: No such file"):
        load(Path("nowhere.toml"))
    with pytest.raises(RuleError, match="no built-in rules"):
        load("../rules/t5")


def test_overrides_replace_defaults_and_leave_a_selections_own_settings() -> None:
    rules = load({"defaults": {"rank": 2}, "select": [{"target": ["q"], "rank": 4}, {"target": ["v"]}]})
    changed = rules.with_overrides(rank=6, alpha=None, dropout=0.5)
    assert (changed.defaults.rank, changed.defaults.dropout, changed.select[0].rank) == (6, 0.5, 4)
    with pytest.raises(RuleError, match=r"arguments to rules 'custom': defaults\.rank: .*found 0"):
        rules.with_overrides(rank=0, alpha=None, dropout=None)
