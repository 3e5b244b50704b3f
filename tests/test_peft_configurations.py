"""PEFT's own LoRA configurations, with PEFT beside them: representatives here, every one in ``make test-all``, and what came of each in a table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from peft_configurations import ROWS
from peft_table import TABLE, check, verdict

BY_NAME = {str(row): row for row in ROWS}

REPRESENTATIVES = (
    "custom_models: mlp: target_modules=[lin0], target_parameters=[lin1.weight]",
    "custom_models: embedding: target_modules=[emb, conv1d]",
    "custom_models: conv2d: target_modules=[conv2d, lin0]",
    "custom_models: embedding with sibling: target_modules=[embed_tokens], init_lora_weights=False",
    "initialization: parts: target_modules=[linear, conv2d], bias=lora_only",
    "initialization: tied: target_modules=[linear, lm_head], ensure_weight_tying=True",
    "tuners_utils: paths: target_modules=[baz], layers_to_transform=[1], layers_pattern=[bar]",
    "tuners_utils: nested: target_modules=all-linear, rank_pattern={'^foo': 16, '^module.foo': 24}",
)
"""How the names of rows begin that stand for the others: one of each kind of layer, of target and of pattern."""

STANDING = {next(name for name in BY_NAME if name.startswith(beginning)) for beginning in REPRESENTATIVES}


def _written() -> dict[str, str]:
    """Return the verdict that the table has for each row."""
    verdicts, word = {}, ""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("### "):
            word = line.partition(": ")[2]
        elif name := re.match(r"- `([^`]*)`", line):
            verdicts[name[1]] = word
    return verdicts


def _rows() -> list[Any]:
    """Return every row as a parameter; those of one model stay in one process, which traces it once."""
    return [
        pytest.param(
            name, marks=[pytest.mark.xdist_group(row.model), *([] if name in STANDING else [pytest.mark.matrix])]
        )
        for name, row in BY_NAME.items()
    ]


@pytest.mark.parametrize("name", _rows())
def test_what_comes_of_a_configuration_of_peft_is_what_the_table_says(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    record_property("row", f"{BY_NAME[name].table}{', variants' if BY_NAME[name].variant else ''}")
    found = check(BY_NAME[name])
    assert verdict(found) == _written()[name], found
    assert name not in STANDING or verdict(found) == "in full"


def test_the_table_has_every_configuration_and_none_is_wrong_or_ends_in_a_raw_error() -> None:
    written = _written()
    assert written.keys() == BY_NAME.keys()
    assert not {"wrong", "raw"}.intersection(written.values())


def test_of_the_configurations_without_a_variant_all_but_fifteen_hold_in_full() -> None:
    counted = Counter(word for name, word in _written().items() if BY_NAME[name].variant is None)
    assert counted["in part"] + counted["refused"] <= 15
    assert counted["in full"] > 240


def test_of_the_variants_that_peft_takes_four_in_five_hold_in_full() -> None:
    counted = Counter(word for name, word in _written().items() if BY_NAME[name].variant is not None)
    assert counted["in full"] >= 0.8 * (counted.total() - counted["PEFT refuses"])
